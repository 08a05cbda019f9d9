"""Whole runs on streams: the process as a user starts it, against our own Kinesis, which keeps the
limits of AWS; see test_kinesis_others.py for servers that nobody here wrote."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaContext, LambdaServer
from tests import sink

STREAM, TABLE = "orders", "orders-to-lambda"


class Function:
    """Notes what it is sent; fails for data that begins with bad."""

    def __init__(self, names_failures: bool = False) -> None:
        self._names_failures = names_failures
        self._lock = threading.Lock()
        self.calls: list[tuple[int, list[str], list[str]]] = []
        self.events: list[Any] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        records = event["Records"]
        shards = {int(each["eventID"].split(":")[0].rpartition("-")[2]) for each in records}
        assert len(shards) == 1
        numbers = [each["kinesis"]["sequenceNumber"] for each in records]
        data = [b64decode(each["kinesis"]["data"]).decode() for each in records]
        with self._lock:
            self.calls.append((shards.pop(), numbers, data))
            self.events.append(event)
        bad = [number for number, text in zip(numbers, data) if text.startswith("bad")]
        if bad and not self._names_failures:
            raise ValueError("cannot process this")
        return {"batchItemFailures": [{"itemIdentifier": number} for number in bad]}

    def first(self) -> dict[int, list[str]]:
        """By shard, what came, each the first time."""
        by_shard: dict[int, dict[str, str]] = {}
        with self._lock:
            for shard, numbers, data in self.calls:
                for number, text in zip(numbers, data):
                    by_shard.setdefault(shard, {}).setdefault(number, text)
        return {shard: list(own.values()) for shard, own in by_shard.items()}

    def texts(self) -> list[str]:
        """All that came, in order, each once."""
        with self._lock:
            return list(dict.fromkeys(text for _, _, data in self.calls for text in data))


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        yield running


def _arguments(kinesis: LocalKinesis, server: LambdaServer, **options: Any) -> list[str]:
    given = {
        "stream": STREAM,
        "lease_table": TABLE,
        "lease_secs": 2,
        "stream_poll_secs": 0.2,
        "kinesis_endpoint_url": kinesis.url,
        "dynamodb_endpoint_url": kinesis.url,
        "function": sink.FUNCTION,
        "lambda_endpoint_url": server.url,
        "envelope": "kinesis_event",
        "until": "caught_up",
        "summary": "json",
        **options,
    }
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None
    ]


def _start(kinesis: LocalKinesis, server: LambdaServer, **options: Any) -> sink.Sink:
    return sink.Sink(_arguments(kinesis, server, **options), sink.environment())


def _run(
    kinesis: LocalKinesis, server: LambdaServer, code: int | None = 0, **options: Any
) -> sink.Ended:
    with _start(kinesis, server, **options) as run:
        return run.wait(code)


def _put(kinesis: LocalKinesis, count: int, text: str = "order", keys: int = 9) -> list[str]:
    texts = [f"{text} {index}" for index in range(count)]
    kinesis.put(STREAM, [(f"key-{i % keys}", each.encode()) for i, each in enumerate(texts)])
    return texts


def _rows(kinesis: LocalKinesis) -> dict[str, dict[str, Any]]:
    return {key: dict(row) for key, row in kinesis.tables[TABLE].items()}


def _in_order(kinesis: LocalKinesis, function: Function) -> None:
    """Each record of each shard came, and for the first time in the shard's order."""
    came = function.first()
    for number in (0, *kinesis.open_shards(STREAM)):
        expected = [each.data.decode() for each in kinesis.records(STREAM, number)]
        assert came.get(number, []) == expected


def test_a_stream_is_done_and_not_again(kinesis: LocalKinesis) -> None:
    arn = kinesis.create_stream(STREAM, 2)
    texts = _put(kinesis, 300)
    function = Function()
    with sink.serve(function) as server:
        ended = _run(kinesis, server, batch_size=40, invoke_identity_arn="arn:aws:iam::1:role/r")
        calls = len(function.calls)
        again = _run(kinesis, server)
    assert sorted(function.texts()) == sorted(texts)
    for number in (0, 1):
        stored = kinesis.records(STREAM, number)
        assert function.first()[number] == [each.data.decode() for each in stored]
    assert ended.summary["records"] == 300
    assert (len(function.calls), again.summary["records"]) == (calls, 0)
    # As a mapping has it.
    event = function.events[0]
    record = event["Records"][0]
    shard = int(record["eventID"][8:20])
    stored = kinesis.records(STREAM, shard)[0]
    assert list(event) == ["Records"]
    assert json.dumps(record) == json.dumps(
        {
            "kinesis": {
                "kinesisSchemaVersion": "1.0",
                "partitionKey": stored.key,
                "sequenceNumber": str(stored.number),
                "data": record["kinesis"]["data"],
                "approximateArrivalTimestamp": stored.ms / 1000,
            },
            "eventSource": "aws:kinesis",
            "eventVersion": "1.0",
            "eventID": f"shardId-{shard:012d}:{stored.number}",
            "eventName": "aws:kinesis:record",
            "invokeIdentityArn": "arn:aws:iam::1:role/r",
            "awsRegion": "us-east-1",
            "eventSourceARN": arn,
        }
    )
    # As the Kinesis Client Library has it.
    for number in (0, 1):
        row = _rows(kinesis)[f"shardId-{number:012d}"]
        assert row["checkpoint"] == {"S": str(kinesis.records(STREAM, number)[-1].number)}
        assert row["checkpointSubSequenceNumber"] == {"N": "0"}
        assert "leaseOwner" not in row and int(row["leaseCounter"]["N"]) > 1
    assert not kinesis.refused
