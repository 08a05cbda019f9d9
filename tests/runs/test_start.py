"""Whole runs: where a run begins, and which partitions it finds."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from tests.conftest import Names
from tests.sink import (
    answered,
    assert_caught_up,
    assert_in_order,
    assert_rising,
    by_partition,
    invocations,
    numbered,
    run,
    serve,
    start,
)

TIMESTAMP = 1_700_000_000_000  # 2023-11-14T22:13:20Z


def _commit(broker: KafkaBroker, group: str, topic: str, offsets: dict[int, int]) -> None:
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": group})
    consumer.commit(
        offsets=[TopicPartition(topic, *item) for item in offsets.items()], asynchronous=False
    )
    consumer.close()


def _delete_records(broker: KafkaBroker, topic: str, before: dict[int, int]) -> None:
    """What retention does: the partition begins later from now on."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    marks = [TopicPartition(topic, *item) for item in before.items()]
    for answer in admin.delete_records(marks).values():
        answer.result()
    assert broker.start_offsets(topic).items() >= before.items()


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        ({"starting_position": "TRIM_HORIZON"}, {0: 4, 1: 3, 2: 0}),
        ({"starting_position": "LATEST"}, {0: 4, 1: 10, 2: 10}),
        (
            {
                "starting_position": "AT_TIMESTAMP",
                "starting_timestamp": "2023-11-14T23:13:26.500+01:00",
            },
            {0: 4, 1: 7, 2: 10},
        ),
    ],
    ids=["TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"],
)
def test_a_committed_offset_wins_over_the_starting_position(
    broker: KafkaBroker, names: Names, options: dict[str, str], starts: dict[int, int]
) -> None:
    """The others begin at their first record, behind their last, or at the first so young.

    Partition 0 has a committed offset, the log of partition 1 begins at 3, and all records of
    partition 2 are older than the timestamp. Where a partition began is committed.
    """
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=3)
    ages = {0: 0, 1: 0, 2: -3_600_000}
    broker.produce(
        topic,
        [
            (partition, None, b"%d" % n, (), TIMESTAMP + age + n * 1000)
            for partition, age in ages.items()
            for n in range(10)
        ],
    )
    _delete_records(broker, topic, {1: 3})
    _commit(broker, group, topic, {0: 4})

    with serve() as server:
        run(broker, server, topics=topic, consumer_group=group, response_topic=responses, **options)

    assert by_partition(answered(broker, responses)) == {
        (topic, partition): list(range(first, 10))
        for partition, first in starts.items()
        if first < 10
    }
    assert_caught_up(broker, group, topic)


def test_offsets_that_do_not_exist_are_warned_of(broker: KafkaBroker, names: Names) -> None:
    """Deleted by retention: on with the first that exists. Behind the end: a new topic, from 0."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 20))
    _commit(broker, group, topic, {0: 5, 1: 100})
    _delete_records(broker, topic, {0: 12})

    with serve() as server:
        ended = run(broker, server, topics=topic, consumer_group=group, response_topic=responses)

    warnings = [line for line in ended.stderr.splitlines() if " WARNING " in line]
    assert len(warnings) == 2, ended.stderr
    assert f"{topic}-0: 7 offsets after the committed 5 were deleted" in warnings[0]
    assert "going on at 12" in warnings[0]
    assert f"{topic}-1: the committed offset 100 is behind the topic's end 20" in warnings[1]
    assert "going on at 0" in warnings[1]
    assert by_partition(answered(broker, responses)) == {
        (topic, 0): list(range(12, 20)),
        (topic, 1): list(range(20)),
    }
    assert_caught_up(broker, group, topic)


def test_latest_misses_nothing_that_comes_after_the_start(
    broker: KafkaBroker, names: Names
) -> None:
    """The end found at the first start holds, also if that run dies before it did anything."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=2)
    broker.create_topic(responses, partitions=2)
    broker.produce(topic, numbered(2, 50, "before"))
    options: dict[str, Any] = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "starting_position": "LATEST",
        "until": "forever",
    }
    with serve() as server:
        with start(broker, server, **options) as sink:
            sink.until(
                lambda: broker.committed(group, topic) == {0: 50, 1: 50},
                "where the run begins is not committed",
            )
            sink.kill()
        assert invocations(server) == []
        broker.produce(topic, numbered(2, 5, "while it was down"))
        with start(broker, server, **options) as sink:
            sink.until(
                lambda: len(broker.read_all(responses)) == 10, "what came meanwhile has no answers"
            )
            broker.produce(topic, numbered(2, 5, "while it runs"))
            sink.until(lambda: len(broker.read_all(responses)) == 20, "what came has no answers")
            sink.send(signal.SIGTERM)
            sink.wait()
        calls = invocations(server)

    assert_in_order(calls, {(topic, 0): 50, (topic, 1): 50})
    assert by_partition(answered(broker, responses)) == {
        (topic, partition): list(range(50, 60)) for partition in range(2)
    }
    assert_caught_up(broker, group, topic)
    assert_rising(broker, responses)


def test_topics_and_partitions_made_later_are_found(broker: KafkaBroker, names: Names) -> None:
    """They begin with their first record, whatever the starting position."""
    first, second = names.topic("orders-a"), names.topic("orders-b")
    responses, group = names.topic("responses"), names.group()
    broker.create_topic(first, partitions=1)
    broker.create_topic(responses, partitions=2)
    broker.produce(first, numbered(1, 5, "before"))
    suffix = names.topic("").removeprefix("-")
    with serve() as server:
        with start(
            broker,
            server,
            topics_regex=f"orders-.-{suffix}",
            consumer_group=group,
            response_topic=responses,
            starting_position="LATEST",
            until="forever",
        ) as sink:
            sink.until(
                lambda: broker.committed(group, first) == {0: 5},
                "where the run begins is not committed",
            )
            broker.create_topic(second, partitions=2)
            broker.produce(second, numbered(2, 30))
            broker.add_partitions(first, 2)
            broker.produce(first, numbered(2, 30, "after"))
            sink.until(
                lambda: len(broker.read_all(responses)) == 120, "not all is answered", timeout=30
            )
            sink.send(signal.SIGTERM)
            sink.wait()
        calls = invocations(server)

    assert by_partition(answered(broker, responses)) == {
        (first, 0): list(range(5, 35)),
        (first, 1): list(range(30)),
        (second, 0): list(range(30)),
        (second, 1): list(range(30)),
    }
    assert_in_order(calls, {(first, 0): 5})
    assert_caught_up(broker, group, first)
    assert_caught_up(broker, group, second)
