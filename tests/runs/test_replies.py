"""Whole runs: functions that name the records they failed in, and replies kept as they are."""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import pytest
from aws_lambda_powertools.utilities.batch import (
    BatchProcessor,
    EventType,
    process_partial_response,
)
from aws_lambda_powertools.utilities.data_classes.kafka_event import KafkaEventRecord

from pipeline.local.broker import KafkaBroker
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.sink import (
    Coordinates,
    assert_caught_up,
    assert_exactly_once,
    assert_one_at_a_time,
    facts,
    failed,
    invocations,
    numbered,
    offsets_called,
    records_of,
    run,
    serve,
)


class Orders:
    """A function that processes each record by itself; it fails in some of them."""

    def __init__(self, *bad: str) -> None:
        self.bad = set(bad)
        self.done: Counter[Coordinates] = Counter()
        self.tried: Counter[str] = Counter()

    def process(self, record: dict[str, Any]) -> None:
        value = base64.b64decode(record["value"]).decode()
        self.tried[value] += 1
        if value in self.bad:
            raise ValueError("cannot process this order")
        self.done[record["topic"], record["partition"], record["offset"]] += 1

    def handler(self, event: Any, context: LambdaContext) -> dict[str, Any]:
        """As in the Lambda guide: no library, each failed record is named."""
        failures = []
        for record in records_of(event):
            try:
                self.process(record)
            except ValueError:
                place = f"{record['topic']}-{record['partition']}"
                identifier = {"partition": place, "offset": record["offset"]}
                failures.append({"itemIdentifier": identifier})
        return {"batchItemFailures": failures}

    def first_only(self, event: Any, context: LambdaContext) -> dict[str, Any]:
        """Ends at the first failure, so that order is kept."""
        for record in records_of(event):
            try:
                self.process(record)
            except ValueError:
                place = f"{record['topic']}-{record['partition']}"
                identifier = {"partition": place, "offset": record["offset"]}
                return {"batchItemFailures": [{"itemIdentifier": identifier}]}
        return {}

    def powertools(self, event: Any, context: LambdaContext) -> Any:
        """With Powertools' batch processor, which names the failed records itself."""
        processor = BatchProcessor(event_type=EventType.Kafka)

        def process(record: KafkaEventRecord) -> None:
            self.process(record.raw_event)

        return process_partial_response(
            event=event, record_handler=process, processor=processor, context=context
        )


@pytest.mark.parametrize(
    ("partial_failure", "kind", "bisect"),
    [
        ("checkpoint", "handler", False),
        ("checkpoint", "powertools", True),
        ("checkpoint", "first_only", False),
        ("checkpoint", "first_only", True),
        ("named", "handler", True),
        ("named", "powertools", False),
    ],
)
def test_only_the_named_records_fail(
    partial_failure: str, kind: str, bisect: bool, broker: KafkaBroker, names: Names
) -> None:
    """They are tried as often as is allowed, and cost no other record anything but a repeat."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 30))
    orders = Orders("order 0/4", "order 0/5", "order 0/28", "order 1/0")
    with serve(getattr(orders, kind)) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope="kafka_event",
            reply="batch_item_failures",
            partial_failure=partial_failure,
            error_topic=errors,
            on_error="log",
            max_retries=1,
            batch_size=10,
            bisect_on_error=bisect,
        )
        calls = invocations(server)
    bad = {(topic, 0, 4), (topic, 0, 5), (topic, 0, 28), (topic, 1, 0)}
    assert set(failed(broker, errors)) == bad and len(failed(broker, errors)) == 4
    assert_exactly_once(broker, names.group(), [topic], errors=errors, elsewhere=set(orders.done))
    assert_caught_up(broker, names.group(), topic)
    assert_one_at_a_time(calls)
    for record in broker.read_all(errors):
        said = facts(record)
        assert said["lambda.condition"] == "RetryAttemptsExhausted"
        # Where all records it got failed, Powertools fails as a whole.
        assert said["lambda.error.type"] in ("BatchItemFailure", "BatchProcessingError")
        assert int(said["lambda.attempts"]) >= 2
    assert all(orders.tried[value] >= 2 for value in orders.bad)
    if partial_failure == "named":
        assert set(orders.done.values()) == {1}
    if partial_failure == "checkpoint" and kind == "first_only":
        # It never goes on behind a record that failed, so nothing is done twice.
        assert set(orders.done.values()) == {1}
    assert ended.summary["errors"] == 4


def test_a_partition_halts_at_the_record_that_is_named(broker: KafkaBroker, names: Names) -> None:
    """What is before it is committed, the others go on; a mended function goes on from there."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 10))
    orders = Orders("order 0/6")
    options = {
        "topics": topic,
        "consumer_group": names.group(),
        "envelope": "kafka_event",
        "reply": "batch_item_failures",
    }
    with serve(orders.handler) as server:
        ended = run(broker, server, 3, **options)
    assert f"{topic}-0" in ended.stderr
    assert broker.committed(names.group(), topic) == {0: 6, 1: 10}

    orders.bad.clear()
    with serve(orders.handler) as server:
        run(broker, server, **options)
        assert offsets_called(server) == [[6, 7, 8, 9]]
    assert_caught_up(broker, names.group(), topic)
    assert set(orders.done) == {(topic, p, o) for p in range(2) for o in range(10)}


def test_a_reply_that_names_another_record_fails_the_batch(
    broker: KafkaBroker, names: Names
) -> None:
    """Nothing of such a reply is believed: the whole batch is called again, then given up."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 4))
    identifier = {"partition": f"{topic}-0", "offset": 4}

    def handler(event: Any, context: LambdaContext) -> dict[str, Any]:
        return {"batchItemFailures": [{"itemIdentifier": identifier}]}

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            reply="batch_item_failures",
            error_topic=errors,
            on_error="log",
            max_retries=1,
        )
        assert offsets_called(server) == [[0, 1, 2, 3]] * 2
    (record,) = broker.read_all(errors)
    assert facts(record)["lambda.condition"] == "InvalidReply"
    assert_exactly_once(broker, names.group(), [topic], errors=errors)


def test_any_reply_is_a_response(broker: KafkaBroker, names: Names) -> None:
    """One response per invocation, keyed by the range of offsets it answers."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=2)
    broker.create_topic(responses, partitions=2)
    broker.produce(topic, numbered(2, 25))

    def handler(event: Any, context: LambdaContext) -> Any:
        return {"sum": sum(record["offset"] for record in records_of(event)), "text": "Zo\u00eb"}

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope="kafka_event",
            response_topic=responses,
            batch_size=10,
        )
    found = [
        (response.partition, json.loads(response.key or b""), json.loads(response.value or b""))
        for response in broker.read_all(responses)
    ]
    assert found == [
        (
            partition,
            {"topic": topic, "partition": partition, "startOffset": low, "endOffset": high},
            {"sum": sum(range(low, high)), "text": "Zo\u00eb"},
        )
        for partition in range(2)
        for low, high in [(0, 10), (10, 20), (20, 25)]
    ]
    assert_caught_up(broker, names.group(), topic)
