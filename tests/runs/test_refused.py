"""Whole runs: what Kafka refuses of one record costs that record only."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.lambda_server import LambdaContext
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.sink import (
    Topics,
    answer,
    answered,
    assert_rising,
    facts,
    failed,
    numbered,
    serve,
)

LIMIT = {"max_message_bytes": "20000"}
COUNT = 60


def large(*places: tuple[int, int]) -> Any:
    """A function whose result for some records, by partition and offset, is too large."""

    def handler(event: Any, context: LambdaContext) -> Any:
        replies = answer(event)
        for reply in replies:
            payload = reply["payload"]
            many = (payload["partition"], payload["offset"]) in places
            # Together the others are too large for one request, too.
            payload["result"] = "x" * (30_000 if many else 900)
        return replies

    return handler


def small(broker: KafkaBroker, names: Names, **errors: str) -> Topics:
    """Topics with a response topic that takes no large records."""
    return Topics(broker, names, 2, COUNT, responses=LIMIT, errors=errors, batch_size=20)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_response_that_is_too_large_becomes_an_error_record(
    broker: KafkaBroker, names: Names, lanes: int
) -> None:
    """With its original; all others are answered, also those that shared a request with it."""
    topics = small(broker, names)
    bad = [(0, 7), (1, 25), (1, 26)]
    with serve(large(*bad)) as server:
        ended = topics.run(server, **topics.log_errors, parallelization_factor=lanes)
    places = {(topics.source, *place) for place in bad}
    assert set(failed(broker, topics.errors)) == places
    assert set(answered(broker, topics.responses)) == topics.sent() - places
    for record in broker.read_all(topics.errors):
        found = facts(record)
        assert found["lambda.condition"] == "ResponseRefused"
        assert found["lambda.error.type"] == "MSG_SIZE_TOO_LARGE"
        assert "x" * 100 not in (record.value or b"").decode()
    assert (ended.summary["responses"], ended.summary["errors"]) == (2 * COUNT - 3, 3)
    topics.assert_caught_up()


def test_without_an_error_topic_it_is_logged(broker: KafkaBroker, names: Names) -> None:
    topics = small(broker, names)
    with serve(large((0, 7))) as server:
        ended = topics.run(server, on_error="log")
    assert f"{topics.source}-0@7-7 failed: " in ended.stderr
    topics.assert_caught_up()


def test_a_response_that_is_too_large_halts_its_partition_only(
    broker: KafkaBroker, names: Names
) -> None:
    """With --on_error=fail; run again with a function that is mended, nothing is left out."""
    topics = small(broker, names)
    with serve(large((0, 7))) as server:
        ended = topics.run(server, 3)
    assert f"halted: {topics.source}-0 at offset 7" in ended.stderr
    assert broker.committed(topics.group, topics.source) == {0: 7, 1: COUNT}
    (halted,) = ended.summary["halted"]
    assert halted["error_type"] == "MSG_SIZE_TOO_LARGE"
    assert ended.summary["responses"] == len(broker.read_all(topics.responses))
    with serve() as server:
        topics.run(server)
    assert set(answered(broker, topics.responses)) == topics.sent()
    topics.assert_caught_up()


@pytest.mark.parametrize("form", ["confluent", "aws"])
def test_an_error_record_goes_without_what_makes_it_too_large(
    broker: KafkaBroker, names: Names, form: str
) -> None:
    """First what was sent and came back, the original last; headers say what is not there."""
    topics = small(broker, names, **LIMIT)
    for value in (b"y" * 12_000, b"y" * 40_000):
        broker.produce(topics.source, [(0, b"k", value)])

    def fails(event: Any, context: LambdaContext) -> Any:
        raise ValueError("all of them")

    with serve(fails) as server:
        topics.run(server, **topics.log_errors, error_record=form)
    found = set(failed(broker, topics.errors))
    assert found == topics.sent() - {(topics.source, 0, COUNT + 1)}
    without = [
        record
        for record in broker.read_all(topics.errors)
        if "lambda.original.omitted" in facts(record)
    ]
    assert len(without) == 1
    assert "lambda.input.payload.omitted" in facts(without[0])
    if form == "confluent":
        assert json.loads(without[0].key or b"")["startOffset"] == COUNT + 1
    topics.assert_caught_up()


def test_an_error_record_that_cannot_be_written_at_all_halts_its_partition(
    broker: KafkaBroker, names: Names
) -> None:
    """A compacted topic takes none without a key; nothing of the record is lost."""
    topics = small(broker, names, cleanup_policy="compact")
    broker.produce(topics.source, [(0, None, b"bad"), (0, b"k", b"behind")])

    def fails(event: Any, context: LambdaContext) -> Any:
        if any(entry["payload"]["value"] == "bad" for entry in event):
            raise ValueError("this one")
        return answer(event)

    with serve(fails) as server:
        ended = topics.run(server, 3, bisect_on_error=True, error_record="aws", **topics.log_errors)
    assert f"halted: {topics.source}-0 at offset {COUNT}" in ended.stderr
    assert broker.committed(topics.group, topics.source) == {0: COUNT, 1: COUNT}


@pytest.mark.parametrize("partitions", [1, 5])
def test_a_response_topic_is_made_anew_during_a_run(
    broker: KafkaBroker, names: Names, partitions: int
) -> None:
    """With another number of partitions: the run goes on with those that are there, or ends with
    one line, and the next run answers all that is behind what is committed."""
    topics = small(broker, names)
    with serve() as server:
        with topics.start(server, until="forever") as sink:
            sink.until(
                lambda: sum(broker.committed(topics.group, topics.source).values()) == 2 * COUNT,
                "what was there is not done",
            )
            broker.delete_topic(topics.responses)
            broker.create_topic(topics.responses, partitions=partitions)
            broker.produce(topics.source, numbered(2, COUNT))
            everything = broker.end_offsets(topics.source)

            def done_or_ended() -> bool:
                ended = sink.process.poll() is not None
                return ended or broker.committed(topics.group, topics.source) == everything

            wait_until(done_or_ended, "it neither goes on nor ends", 120)
            if sink.process.poll() is None:
                sink.send(signal.SIGTERM)
            ended = sink.wait(None)
        assert "Traceback" not in ended.stderr
        assert len(ended.errors) == (ended.code != 0)
        assert ended.code in (0, 1)
        topics.run(server)
    behind = {(topics.source, p, offset) for p in range(2) for offset in range(COUNT, 2 * COUNT)}
    assert set(answered(broker, topics.responses)) == behind
    assert broker.partitions(topics.responses) == list(range(partitions))
    assert_rising(broker, topics.responses)
    topics.assert_caught_up()
