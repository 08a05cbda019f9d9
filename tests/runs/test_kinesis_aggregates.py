"""Whole runs on streams with aggregates of the Kinesis Producer Library."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaContext
from tests import sink
from tests.kinesis import STREAM, TABLE, aggregate, rows_of, run_on, signed, start_on


class Function:
    """Notes what it is sent; fails in a batch with certain data."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.batches: list[list[str]] = []
        self.came: list[tuple[str, str, str]] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        found = [
            (
                each["kinesis"]["sequenceNumber"],
                each["kinesis"]["partitionKey"],
                b64decode(each["kinesis"]["data"]).decode(errors="replace"),
            )
            for each in event["Records"]
        ]
        self.batches.append([text for _, _, text in found])
        if self.bad in self.batches[-1]:
            raise ValueError("cannot process this")
        self.came += found
        return {"batchItemFailures": []}


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        running.create_stream(STREAM)
        yield running


def _put(kinesis: LocalKinesis, name: str, count: int) -> str:
    """An aggregate; returns its sequence number."""
    records = [(f"k{i % 3}", f"{name}{i}".encode(), i or None) for i in range(count)]
    ((_, number),) = kinesis.put(STREAM, [("outer", aggregate(records))])
    return str(number)


def test_aggregates_are_taken_apart(kinesis: LocalKinesis) -> None:
    """Each record for itself, with the number of the one that it came in; what cannot be taken
    apart is a record."""
    broken = signed(b"\x0a\x01k")
    kinesis.put(STREAM, [("p", b"plain"), ("p", broken)])
    first = _put(kinesis, "a", 5)
    kinesis.put(STREAM, [("p", b"last")])
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, deaggregate=True, batch_size=3)
        again = run_on(kinesis, server, deaggregate=True)
    texts = [broken.decode(errors="replace"), *(f"a{i}" for i in range(5)), "last"]
    assert [text for _, _, text in function.came] == ["plain", *texts]
    assert [batch[-1] for batch in function.batches] == ["a0", "a3", "last"]
    assert [(n, k) for n, k, t in function.came if t.startswith("a")] == [
        (first, f"k{i % 3}") for i in range(5)
    ]
    assert (ended.summary["records"], again.summary["records"]) == (8, 0)


def test_without_it_they_are_handed_on(kinesis: LocalKinesis) -> None:
    _put(kinesis, "a", 5)
    stored = kinesis.records(STREAM, 0)[0].data
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server)
    assert [text for _, _, text in function.came] == [stored.decode(errors="replace")]


def test_a_run_may_stop_within_an_aggregate(kinesis: LocalKinesis) -> None:
    """It says so as the client library does, and goes on there; whoever takes none apart goes on
    in front of it."""
    _put(kinesis, "a", 4)
    second = _put(kinesis, "b", 6)
    function = Function("b3")
    options = {"deaggregate": True, "batch_size": 1, "max_retries": 0, "on_error": "fail"}
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, code=3, **options)
        row = rows_of(kinesis)["shardId-000000000000"]
        assert row["checkpoint"] == {"S": second}
        assert row["checkpointSubSequenceNumber"] == {"N": "2"}
        assert ended.summary["halted"][0]["offset"] == f"{second}:3"
        assert f"at offset {second}:3:" in ended.stderr
        before = len(function.came)
        whole = kinesis.tables[TABLE]["shardId-000000000000"].copy()
        function.bad = ""
        run_on(kinesis, server, **options)
        assert [text for _, _, text in function.came[before:]] == ["b3", "b4", "b5"]
        row = rows_of(kinesis)["shardId-000000000000"]
        assert row["checkpointSubSequenceNumber"] == {"N": "5"}
        kinesis.tables[TABLE]["shardId-000000000000"] = whole
        before = len(function.came)
        run_on(kinesis, server)
        assert [number for number, _, _ in function.came[before:]] == [second]
        row = rows_of(kinesis)["shardId-000000000000"]
        assert row["checkpointSubSequenceNumber"] == {"N": "0"}


def test_lanes_and_a_crash(kinesis: LocalKinesis) -> None:
    """Keys within aggregates are kept in order, and nothing is lost of one that is done in part."""
    for name in "abcdefgh":
        _put(kinesis, name, 30)
    function = Function()
    options = {"deaggregate": True, "batch_size": 4, "parallelization_factor": 3, "lease_secs": 1}
    with sink.serve(function) as server:
        with start_on(kinesis, server, until="forever", **options) as run:
            run.until(lambda: len(function.came) > 60, "nothing came")
            run.kill()
        run_on(kinesis, server, **options)
    came: dict[str, dict[str, None]] = {}
    for _, key, text in function.came:
        came.setdefault(key, {}).setdefault(text)
    assert {key: list(texts) for key, texts in came.items()} == {
        f"k{key}": [f"{name}{i}" for name in "abcdefgh" for i in range(key, 30, 3)]
        for key in range(3)
    }


def test_a_reply_names_an_aggregate(kinesis: LocalKinesis) -> None:
    """All of its records have its number: it comes again from its first one in the batch."""
    _put(kinesis, "a", 2)
    second = _put(kinesis, "b", 3)
    function = Function()
    replies = iter([{"batchItemFailures": [{"itemIdentifier": second}]}])

    def answer(event: Any, context: LambdaContext) -> Any:
        function(event, context)
        return next(replies, {"batchItemFailures": []})

    with sink.serve(answer) as server:
        run_on(kinesis, server, deaggregate=True, reply="batch_item_failures")
    assert function.batches == [["a0", "a1", "b0", "b1", "b2"], ["b0", "b1", "b2"]]


def test_keys_of_responses_tell_them_apart(kinesis: LocalKinesis) -> None:
    """With the envelope of the connector: a number, a colon, and the place within."""
    number = _put(kinesis, "a", 3)
    calls: list[Any] = []

    def answer(event: Any, context: LambdaContext) -> Any:
        calls.append(event)
        return sink.answer(event)

    with sink.serve(answer) as server:
        run_on(kinesis, server, deaggregate=True, envelope="confluent")
    offsets = [each["payload"]["offset"] for event in calls for each in event]
    assert offsets == [number, f"{number}:1", f"{number}:2"]
    assert json.dumps(calls)
