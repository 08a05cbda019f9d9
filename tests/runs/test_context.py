"""Whole runs: what the function is told about each call."""

from __future__ import annotations

from typing import Any

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import drop_connection, throttle, unavailable
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.sink import (
    answer,
    assert_caught_up,
    assert_exactly_once,
    numbered,
    of_partition,
    records_of,
    run,
    serve,
)


class Told:
    """A function that keeps what it is told, and fails in batches with a certain record."""

    def __init__(self, bad: str = "", times: int = 0) -> None:
        self.bad, self.times = bad, times
        self.calls: list[tuple[Any, list[dict[str, Any]]]] = []

    def handler(self, event: Any, context: LambdaContext) -> Any:
        told = context.client_context and context.client_context.custom
        records = records_of(event)
        self.calls.append((told, records))
        if self.times and any(record["value"] == self.bad for record in records):
            self.times -= 1
            raise ValueError("cannot process this order")
        return answer(event)

    def of(self, partition: int) -> list[tuple[int, int, int, str]]:
        """First offset, next offset, attempt and reason of each call."""
        return [
            (int(t["first_offset"]), int(t["next_offset"]), int(t["attempt"]), t["reason"])
            for t, _ in self.calls
            if t["partition"] == str(partition)
        ]


def test_the_function_sees_that_records_come_again(broker: KafkaBroker, names: Names) -> None:
    """And why: it failed, it could not be reached, it was throttled, its batch was halved."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=4)
    broker.produce(topic, numbered(4, 4))
    faults = [
        unavailable(502, "EC2ThrottledException", times=1, when=of_partition(1)),
        drop_connection(executed=True, times=1, when=of_partition(2)),
        throttle(times=2, when=of_partition(3)),
    ]
    told = Told("order 0/2", times=3)
    with serve(told.handler, faults=faults) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            bisect_on_error=True,
            max_retries=1,
        )
    assert told.of(0) == [
        (0, 4, 1, ""),
        (0, 2, 1, "ValueError"),
        (2, 4, 1, "ValueError"),
        (2, 3, 1, "ValueError"),
        (2, 3, 2, "ValueError"),
        (3, 4, 1, "ValueError"),
    ]
    assert told.of(1) == [(0, 4, 2, "EC2ThrottledException")]
    assert told.of(2) == [(0, 4, 1, ""), (0, 4, 2, "ConnectionClosedError")]
    assert told.of(3) == [(0, 4, 1, "TooManyRequestsException")]
    assert_exactly_once(broker, names.group(), [topic], responses)


def test_each_call_is_told_what_it_holds(broker: KafkaBroker, names: Names) -> None:
    """Also one that was prepared while the one before it was running."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 500))
    told = Told()
    with serve(told.handler) as server:
        run(broker, server, topics=topic, consumer_group=names.group(), batch_size=7)
    assert len(told.calls) == 2 * 72
    for context, records in told.calls:
        assert context == {
            "topic": topic,
            "partition": str(records[0]["partition"]),
            "first_offset": str(records[0]["offset"]),
            "next_offset": str(records[-1]["offset"] + 1),
            "attempt": "1",
            "reason": "",
        }
    assert_caught_up(broker, names.group(), topic)


def test_nothing_is_told_where_it_is_not_wanted(broker: KafkaBroker, names: Names) -> None:
    """The function's context is as it would be without."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 3))
    told = Told()
    with serve(told.handler) as server:
        run(broker, server, topics=topic, consumer_group=names.group(), no_client_context=True)
        assert {call.client_context for call in server.calls} == {None}
    assert [context for context, _ in told.calls] == [None]
