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
    answer,
    answered,
    assert_caught_up,
    assert_rising,
    facts,
    failed,
    numbered,
    run,
    serve,
    start,
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


class Topics:
    def __init__(self, broker: KafkaBroker, names: Names, **errors: str) -> None:
        self.source, self.responses = names.topic("orders"), names.topic("responses")
        self.errors, self.group = names.topic("errors"), names.group()
        broker.create_topic(self.source, partitions=2)
        broker.create_topic(self.responses, partitions=2, **LIMIT)
        broker.create_topic(self.errors, partitions=2, **errors)
        broker.produce(self.source, numbered(2, COUNT))
        self.options: dict[str, Any] = {
            "topics": self.source,
            "response_topic": self.responses,
            "consumer_group": self.group,
            "batch_size": 20,
        }

    def everything(self) -> set[tuple[str, int, int]]:
        return {(self.source, p, offset) for p in range(2) for offset in range(COUNT)}


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_response_that_is_too_large_becomes_an_error_record(
    broker: KafkaBroker, names: Names, lanes: int
) -> None:
    """With its original; all others are answered, also those that shared a request with it."""
    topics = Topics(broker, names)
    bad = [(0, 7), (1, 25), (1, 26)]
    with serve(large(*bad)) as server:
        options = {"on_error": "log", "error_topic": topics.errors, "parallelization_factor": lanes}
        ended = run(broker, server, **topics.options, **options)
    places = {(topics.source, *place) for place in bad}
    assert set(failed(broker, topics.errors)) == places
    assert set(answered(broker, topics.responses)) == topics.everything() - places
    for record in broker.read_all(topics.errors):
        found = facts(record)
        assert found["lambda.condition"] == "ResponseRefused"
        assert found["lambda.error.type"] == "MSG_SIZE_TOO_LARGE"
        assert "x" * 100 not in (record.value or b"").decode()
    assert (ended.summary["responses"], ended.summary["errors"]) == (2 * COUNT - 3, 3)
    assert_caught_up(broker, topics.group, topics.source)


def test_without_an_error_topic_it_is_logged(broker: KafkaBroker, names: Names) -> None:
    topics = Topics(broker, names)
    with serve(large((0, 7))) as server:
        ended = run(broker, server, on_error="log", **topics.options)
    assert f"{topics.source}-0@7-7 failed: " in ended.stderr
    assert_caught_up(broker, topics.group, topics.source)


def test_a_response_that_is_too_large_halts_its_partition_only(
    broker: KafkaBroker, names: Names
) -> None:
    """With --on_error=fail; run again with a function that is mended, nothing is left out."""
    topics = Topics(broker, names)
    with serve(large((0, 7))) as server:
        ended = run(broker, server, 3, **topics.options)
    assert f"halted: {topics.source}-0 at offset 7" in ended.stderr
    assert broker.committed(topics.group, topics.source) == {0: 7, 1: COUNT}
    (halted,) = ended.summary["halted"]
    assert halted["error_type"] == "MSG_SIZE_TOO_LARGE"
    with serve() as server:
        run(broker, server, **topics.options)
    assert set(answered(broker, topics.responses)) == topics.everything()
    assert_caught_up(broker, topics.group, topics.source)


@pytest.mark.parametrize("form", ["confluent", "aws"])
def test_an_error_record_goes_without_what_makes_it_too_large(
    broker: KafkaBroker, names: Names, form: str
) -> None:
    """First what was sent and came back, the original last; headers say what is not there."""
    topics = Topics(broker, names, **LIMIT)
    for value in (b"y" * 12_000, b"y" * 40_000):
        broker.produce(topics.source, [(0, b"k", value)])

    def fails(event: Any, context: LambdaContext) -> Any:
        raise ValueError("all of them")

    with serve(fails) as server:
        options = {"on_error": "log", "error_topic": topics.errors, "error_record": form}
        run(broker, server, **topics.options, **options)
    found = set(failed(broker, topics.errors))
    assert found == topics.everything() | {(topics.source, 0, COUNT)}
    without = [
        record
        for record in broker.read_all(topics.errors)
        if "lambda.original.omitted" in facts(record)
    ]
    assert len(without) == 1
    assert "lambda.input.payload.omitted" in facts(without[0])
    if form == "confluent":
        assert json.loads(without[0].key or b"")["startOffset"] == COUNT + 1
    assert_caught_up(broker, topics.group, topics.source)


def test_an_error_record_that_cannot_be_written_at_all_halts_its_partition(
    broker: KafkaBroker, names: Names
) -> None:
    """A compacted topic takes none without a key; nothing of the record is lost."""
    topics = Topics(broker, names, cleanup_policy="compact")
    broker.produce(topics.source, [(0, None, b"bad"), (0, b"k", b"behind")])

    def fails(event: Any, context: LambdaContext) -> Any:
        if any(entry["payload"]["value"] == "bad" for entry in event):
            raise ValueError("this one")
        return answer(event)

    options = {"on_error": "log", "error_topic": topics.errors, "error_record": "aws"}
    with serve(fails) as server:
        ended = run(broker, server, 3, bisect_on_error=True, **topics.options, **options)
    assert f"halted: {topics.source}-0 at offset {COUNT}" in ended.stderr
    assert broker.committed(topics.group, topics.source) == {0: COUNT, 1: COUNT}


@pytest.mark.parametrize("partitions", [1, 5])
def test_a_response_topic_is_made_anew_during_a_run(
    broker: KafkaBroker, names: Names, partitions: int
) -> None:
    """With another number of partitions: the run goes on with those that are there, or ends with
    one line, and the next run answers all that is behind what is committed."""
    topics = Topics(broker, names)
    with serve() as server:
        with start(broker, server, until="forever", **topics.options) as sink:
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
        run(broker, server, **topics.options)
    behind = {(topics.source, p, offset) for p in range(2) for offset in range(COUNT, 2 * COUNT)}
    assert set(answered(broker, topics.responses)) == behind
    assert broker.partitions(topics.responses) == list(range(partitions))
    assert_rising(broker, topics.responses)
    assert_caught_up(broker, topics.group, topics.source)
