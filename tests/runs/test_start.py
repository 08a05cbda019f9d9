"""Whole runs: where a run begins, and which partitions it finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import unavailable
from tests import ROOT
from tests.conftest import Names
from tests.sink import (
    SAME_MEMBER,
    answered,
    arguments,
    assert_caught_up,
    assert_in_order,
    assert_rising,
    by_partition,
    environment,
    invocations,
    numbered,
    of_partition,
    offsets_called,
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
        # They were added while no run was up: nothing of them may be skipped.
        ({"starting_position": "LATEST"}, {0: 4, 1: 3, 2: 0}),
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
    """The others begin at their first record, or at the first so young.

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
        "kafka_config_file": SAME_MEMBER,
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


def test_partitions_and_topics_added_while_no_run_was_up_begin_at_their_first_record(
    broker: KafkaBroker, names: Names
) -> None:
    """With LATEST too, and with a warning: what came meanwhile is not skipped."""
    first, second = names.topic("orders-a"), names.topic("orders-b")
    responses, group = names.topic("responses"), names.group()
    broker.create_topic(first, partitions=1)
    broker.create_topic(responses, partitions=1)
    broker.produce(first, numbered(1, 5, "before"))
    options: dict[str, Any] = {
        "topics_regex": f"orders-.-{names.topic('').removeprefix('-')}",
        "consumer_group": group,
        "response_topic": responses,
        "starting_position": "LATEST",
    }
    with serve() as server:
        run(broker, server, **options)
        assert broker.committed(group, first) == {0: 5}
        broker.add_partitions(first, 2)
        broker.create_topic(second, partitions=1)
        broker.produce(first, [(1, None, b"added")])
        broker.produce(second, [(0, None, b"added")])
        ended = run(broker, server, **options)
    assert by_partition(answered(broker, responses)) == {(first, 1): [0], (second, 0): [0]}
    warnings = [line for line in ended.stderr.splitlines() if " WARNING " in line]
    assert len(warnings) == 2, ended.stderr
    for name, line in zip((f"{first}-1", f"{second}-0"), warnings):
        assert f"{name} has no committed offset" in line
        assert "going on at its first record, 0, in place of LATEST" in line


def test_retention_that_overtakes_a_partition_costs_it_only_what_is_gone(
    broker: KafkaBroker, names: Names
) -> None:
    """What it held is worked off, then it goes on at the first record there is, with a warning; the
    others notice nothing."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=2)
    broker.create_topic(responses, partitions=2)
    value = b"x" * 1000
    broker.produce(topic, [(0, None, value) for _ in range(60_000)])
    down = threading.Event()
    down.set()

    def is_down(payload: bytes, name: str) -> bool:
        return down.is_set() and of_partition(0)(payload, name)

    with serve(
        lambda event, context: None, faults=[unavailable(503, times=None, when=is_down)]
    ) as server:
        with start(
            broker,
            server,
            topics=topic,
            consumer_group=group,
            batch_size=1000,
            until="forever",
            max_transient_retries=-1,
        ) as sink:
            sink.until(lambda: len(offsets_called(server, 0)) > 1, "partition 0 is not stuck")
            _delete_records(broker, topic, {0: 59_900})
            broker.produce(topic, [(1, None, b"v") for _ in range(10)])
            sink.until(
                lambda: broker.committed(group, topic).get(1) == 10, "the other stands still"
            )
            down.clear()
            sink.until(lambda: broker.committed(group, topic).get(0) == 60_000, "it does not go on")
            broker.produce(topic, [(p, None, b"v") for p in range(2)])
            sink.until(
                lambda: broker.committed(group, topic) == {0: 60_001, 1: 11}, "they do not go on"
            )
            sink.send(signal.SIGTERM)
            ended = sink.wait()
        calls = {offset for offsets in offsets_called(server, 0) for offset in offsets}
    (line,) = [line for line in ended.stderr.splitlines() if "retention" in line]
    assert f"{topic}-0: " in line
    assert "going on at 59900" in line or "goes on at 59900" in line
    held = max(offset for offset in calls if offset < 59_900) + 1
    assert calls == {*range(held), *range(59_900, 60_001)}


@pytest.mark.parametrize("more", [3, 8], ids=["fewer records", "more records"])
def test_a_topic_made_anew_is_read_from_its_first_record(
    broker: KafkaBroker, names: Names, more: int
) -> None:
    """While a run is up: its offsets are those of other records, however many there are."""
    topic, other, group = names.topic(), names.topic("other"), names.group()
    responses = names.topic("responses")
    for name in (topic, other):
        broker.create_topic(name, partitions=1)
    broker.create_topic(responses, partitions=1)
    broker.produce(topic, numbered(1, 5, "old"))
    with serve() as server:
        with start(
            broker,
            server,
            topics=f"{topic},{other}",
            consumer_group=group,
            response_topic=responses,
            until="forever",
        ) as sink:
            sink.until(lambda: broker.committed(group, topic) == {0: 5}, "nothing is committed")
            broker.delete_topic(topic)
            broker.create_topic(topic, partitions=1)
            broker.produce(topic, numbered(1, more, "new"))
            sink.until(lambda: "made anew" in sink.stderr, "nobody notices", timeout=90)
            sink.until(
                lambda: broker.committed(group, topic) == {0: more}, "it is not read", timeout=90
            )
            broker.produce(other, numbered(1, 2))
            sink.until(lambda: broker.committed(group, other) == {0: 2}, "the other stands still")
            sink.send(signal.SIGTERM)
            sink.wait()
        values = [entry["payload"]["value"] for call in server.calls for entry in _entries(call)]
    news = [value for value in values if value.startswith("new")]
    assert set(news) == {f"new 0/{n}" for n in range(more)}
    assert news[-more:] == [f"new 0/{n}" for n in range(more)]


def _entries(call: Any) -> list[Any]:
    return json.loads(call.payload) if call.invocation_type != "DryRun" else []


def test_a_topic_that_is_deleted_stops_nothing_else(broker: KafkaBroker, names: Names) -> None:
    """The others go on; where there are none the run ends and says why."""
    gone, stays = names.topic("gone"), names.topic("stays")
    responses, group = names.topic("responses"), names.group()
    for name in (gone, stays, responses):
        broker.create_topic(name, partitions=1)
    broker.produce(gone, numbered(1, 2))
    options = {"consumer_group": group, "response_topic": responses, "until": "forever"}
    with serve() as server, start(broker, server, topics=f"{gone},{stays}", **options) as sink:
        sink.until(lambda: broker.committed(group, gone) == {0: 2}, "nothing is committed")
        broker.delete_topic(gone)
        sink.until(lambda: f"topic {gone} cannot be read" in sink.stderr, "nobody notices")
        broker.produce(stays, numbered(1, 2))
        sink.until(lambda: broker.committed(group, stays) == {0: 2}, "the other stands still")
        broker.delete_topic(stays)
        ended = sink.wait(1)
    (error,) = ended.errors
    assert "cannot be read: it is gone" in error


@pytest.mark.parametrize("closed", [False, True])
def test_a_summary_that_nobody_takes_changes_nothing(
    broker: KafkaBroker, names: Names, closed: bool
) -> None:
    """How a run ended does not depend on who listens."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 3))
    reading, writing = os.pipe()
    os.close(reading)
    with serve() as server:
        command = [
            sys.executable,
            "-m",
            "pipeline",
            *arguments(broker, server, topics=topic, consumer_group=group),
        ]
        ended = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *command] if closed else command,
            cwd=ROOT,
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert broker.committed(group, topic) == {0: 3}
