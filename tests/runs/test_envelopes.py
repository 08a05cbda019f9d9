"""Whole runs: functions written for AWS's event sources, behind the pipeline as they are."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from aws_lambda_powertools.utilities.data_classes import KafkaEvent, event_source
from aws_lambda_powertools.utilities.kafka import (
    ConsumerRecords,
    SchemaConfig,
    kafka_consumer,
)

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.sink import (
    assert_caught_up,
    assert_in_order,
    assert_one_at_a_time,
    invocations,
    numbered,
    run,
    serve,
)

TIMESTAMP = 1_700_000_000_000
MSK = "arn:aws:kafka:us-east-1:123456789012:cluster/orders/5a7c-2"

ORDERS = [
    NewRecord(
        0, b"c-1", b'{"order": 1, "amount": 12.50}', [("trace", "\u00eb".encode())], TIMESTAMP
    ),
    NewRecord(0, None, b'{"order": 2, "amount": 3}', (), TIMESTAMP + 1),
    NewRecord(0, b"c-3", b'{"order": 3, "amount": 7}', [("a", b"1"), ("a", b"2")], TIMESTAMP + 2),
]


class Seen:
    """What a function made of its events."""

    def __init__(self) -> None:
        self.orders: list[Any] = []
        self.events: list[Any] = []


def _plain(seen: Seen) -> Any:
    """As in the Lambda guide: no library."""

    def handler(event: dict[str, Any], context: LambdaContext) -> None:
        for records in event["records"].values():
            for record in records:
                order = json.loads(base64.b64decode(record["value"]))
                key = record.get("key")
                trace = [
                    bytes(byte % 256 for byte in value).decode()
                    for header in record["headers"]
                    for value in header.values()
                ]
                seen.orders.append((order["order"], key and base64.b64decode(key).decode(), trace))

    return handler


def _data_class(seen: Seen) -> Any:
    """With Powertools' view of the event."""

    @event_source(data_class=KafkaEvent)
    def handler(event: KafkaEvent, context: LambdaContext) -> None:
        for record in event.records:
            key = record.decoded_key
            trace = [value.decode() for value in record.decoded_headers.values()]
            seen.orders.append((record.json_value["order"], key and key.decode(), trace))

    return handler


def _consumer(seen: Seen) -> Any:
    """With Powertools' consumer, which decodes keys and values itself."""

    @kafka_consumer(schema_config=SchemaConfig(value_schema_type="JSON"))
    def handler(event: ConsumerRecords, context: LambdaContext) -> None:
        for record in event.records:
            trace = [value.decode() for value in record.headers.values()]
            seen.orders.append((record.value["order"], record.key, trace))

    return handler


@pytest.mark.parametrize("function", [_plain, _data_class, _consumer])
def test_a_function_of_an_event_source_mapping(
    function: Any, broker: KafkaBroker, names: Names
) -> None:
    """It reads keys, values and headers as it did behind AWS's own poller."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, ORDERS)
    seen = Seen()
    with serve(function(seen)) as server:
        run(broker, server, topics=topic, consumer_group=names.group(), envelope="kafka_event")
    numbers, keys, traces = zip(*seen.orders)
    assert numbers == (1, 2, 3)
    assert keys == ("c-1", None, "c-3")
    # Powertools keeps one header of a name.
    assert traces in ((["\u00eb"], [], ["1", "2"]), (["\u00eb"], [], ["2"]))
    assert_caught_up(broker, names.group(), topic)


@pytest.mark.parametrize("arn", [None, MSK])
def test_the_event_of_a_mapping(arn: str | None, broker: KafkaBroker, names: Names) -> None:
    """The whole event, of a self-managed Kafka and of MSK; a tombstone has no value."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1, message_timestamp_type="LogAppendTime")
    broker.produce(
        topic, [NewRecord(0, b"k", b"\xff", [("a", b"\x80\x01")]), NewRecord(0, b"k", None)]
    )
    seen = Seen()
    with serve(lambda event, context: seen.events.append(event)) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope="kafka_event",
            event_source_arn=arn,
        )
    stamps = [record.timestamp for record in broker.read_all(topic)]
    source = (
        {"eventSource": "aws:kafka", "eventSourceArn": MSK}
        if arn
        else {"eventSource": "SelfManagedKafka"}
    )
    common = {"topic": topic, "partition": 0, "timestampType": "LOG_APPEND_TIME", "key": "aw=="}
    first = {"offset": 0, "timestamp": stamps[0], "value": "/w==", "headers": [{"a": [-128, 1]}]}
    second = {"offset": 1, "timestamp": stamps[1], "headers": []}
    (event,) = seen.events
    assert event == {
        **source,
        "bootstrapServers": broker.bootstrap_servers,
        "records": {f"{topic}-0": [{**common, **first}, {**common, **second}]},
    }


def test_a_function_of_eventbridge_pipes(broker: KafkaBroker, names: Names) -> None:
    """A flat list; each record says itself where it comes from."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, ORDERS)
    seen = Seen()

    def handler(event: list[dict[str, Any]], context: LambdaContext) -> None:
        for record in event:
            assert record["eventSource"] == "SelfManagedKafka"
            assert record["bootstrapServers"] == broker.bootstrap_servers
            assert record["eventSourceKey"] == f"{record['topic']}-{record['partition']}"
            order = json.loads(base64.b64decode(record["value"]))
            seen.orders.append((record["offset"], order["order"], record.get("key")))

    with serve(handler) as server:
        run(broker, server, topics=topic, consumer_group=names.group(), envelope="pipes")
    assert seen.orders == [(0, 1, "Yy0x"), (1, 2, None), (2, 3, "Yy0z")]
    assert_caught_up(broker, names.group(), topic)


@pytest.mark.parametrize("envelope", ["kafka_event", "pipes"])
def test_many_partitions_and_bisecting(envelope: str, broker: KafkaBroker, names: Names) -> None:
    """Halves of a batch have the same envelope, and payloads stay below their limit."""
    topic = names.topic()
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, numbered(3, 200))
    done: list[bytes] = []

    def handler(event: Any, context: LambdaContext) -> None:
        records = event if envelope == "pipes" else next(iter(event["records"].values()))
        values = [base64.b64decode(record["value"]) for record in records]
        if b"order 1/77" in values:
            raise ValueError("cannot process this order")
        done.extend(values)

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope=envelope,
            batch_bytes=9000,
            bisect_on_error=True,
            on_error="ignore",
        )
        calls = invocations(server)
    assert all(len(call.payload) <= 9000 for call in server.calls)
    wanted = {value for _, _, value in numbered(3, 200)} - {b"order 1/77"}
    assert len(done) == len(wanted) and set(done) == wanted
    assert_one_at_a_time(calls)
    assert_caught_up(broker, names.group(), topic)
    answered = [call for call in calls if call.key != (topic, 1)]
    assert_in_order(answered)
