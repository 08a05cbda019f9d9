"""Whole runs that are broken off: nothing is lost, and little is done twice."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from itertools import pairwise

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow
from tests.conftest import Names
from tests.sink import (
    SAME_MEMBER,
    Invocation,
    Partition,
    Topics,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    by_partition,
    invocations,
    load,
    numbered,
    run,
    serve,
    start,
)

PARTITIONS = 4
KILLS = 10
MOMENTS = 6
"""And for a longer one: `be_killed_at_any_moment` with 50."""


@pytest.mark.slow
def test_killed_ten_times_nothing_is_lost(broker: KafkaBroker, names: Names) -> None:
    """Each attempt begins exactly at what was committed when the one before was killed.

    So records are done twice only from there on. In each attempt the calls of a partition are
    in order; at the end each record has its answer, and the log of answers is the attempts'
    one after the other.
    """
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=PARTITIONS)
    broker.create_topic(responses, partitions=PARTITIONS)
    broker.produce(topic, numbered(PARTITIONS, 5000))
    chance = random.Random(42)
    # A server for each attempt: what one of a killed run still reads is no call of the next one's.
    attempts: list[list[Invocation]] = []
    committed: list[dict[Partition, int]] = [{}]
    options = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "batch_size": 10,
        "kafka_config_file": SAME_MEMBER,
    }
    for kill in range(KILLS):
        calls_wanted = chance.randrange(1, 120)
        faults = [slow(0.04, times=None)]
        with serve(faults=faults) as server, start(broker, server, **options) as sink:
            sink.until(lambda n=calls_wanted: len(server.calls) >= n, "no calls")
            if kill % 2:
                # Every other time somewhere behind a commit.
                sink.until(
                    lambda known=committed[-1]: _committed(broker, group, topic) != known,
                    "nothing is committed",
                )
            sink.kill()
        attempts.append(invocations(server))
        committed.append(_committed(broker, group, topic))
    with serve() as server:
        run(broker, server, **options)
    attempts.append(invocations(server))

    for before, after in pairwise(committed):
        assert all(after[key] >= offset for key, offset in before.items())
    for attempt, starts in zip(attempts, committed, strict=True):
        assert_one_at_a_time(attempt)
        assert_in_order(_as_answered(attempt), starts)
    assert_caught_up(broker, group, topic)
    assert_exactly_once(broker, group, [topic], responses, crashed=True)
    assert_answers_match(broker, [topic], responses)
    for key, offsets in by_partition(answered(broker, responses)).items():
        restarts = [offset for before, offset in pairwise(offsets) if offset <= before]
        known = {starts.get(key, 0) for starts in committed}
        assert known.issuperset(restarts), f"{key} went back to {set(restarts) - known}"
    _assert_something_happened(committed, [call for attempt in attempts for call in attempt])


def _committed(broker: KafkaBroker, group: str, topic: str) -> dict[Partition, int]:
    offsets = broker.committed(group, topic)
    return {(topic, partition): offsets.get(partition, 0) for partition in range(PARTITIONS)}


def _as_answered(calls: list[Invocation]) -> list[Invocation]:
    """Nothing failed here; a call whose answer found nobody was its partition's last one."""
    return [call._replace(answered=True) for call in calls]


def _assert_something_happened(
    committed: list[dict[Partition, int]], calls: list[Invocation]
) -> None:
    """The kills hit what they were meant to hit: some of the work was done, some not yet."""
    assert len({tuple(offsets.values()) for offsets in committed}) >= KILLS // 2
    assert sum(len(call.offsets) for call in calls) > PARTITIONS * 5000


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_committed_that_is_not_written(
    broker: KafkaBroker, names: Names
) -> None:
    met = be_killed_at_any_moment(broker, names, MOMENTS, seed=7)
    assert met["written and not committed"], met


def be_killed_at_any_moment(
    broker: KafkaBroker, names: Names, kills: int, seed: int
) -> Counter[str]:
    """Killed so many times while records come all the time and rounds wait for their results.

    Returns:
        In how many kills a call was under way, records were answered whose response was not
        written yet, and responses were written that were not committed yet.
    """
    chance = random.Random(seed)
    met: Counter[str] = Counter()
    topics = Topics(
        broker,
        names,
        partitions=PARTITIONS,
        batch_size=10,
        kafka_config_file=SAME_MEMBER,
        until="forever",
    )
    source, responses, group = topics.source, topics.responses, topics.group
    known: dict[Partition, int] = {}
    with load(topics, PARTITIONS):
        for _ in range(kills):
            # A round waits for calls that take less than 10 ms.
            faults = [slow(0.005, times=None)]
            with serve(faults=faults) as server, topics.start(server) as sink:
                sink.until(lambda server=server: invocations(server), "no calls")
                time.sleep(chance.random() * 0.5)
                now = time.monotonic()
                sink.kill()
            assert_exactly_once(broker, group, [source], responses, crashed=True)
            committed, written = _committed(broker, group, source), answered(broker, responses)
            assert all(committed[key] >= offset for key, offset in known.items())
            known = committed
            calls = invocations(server)
            replied = {(*c.key, offset) for c in calls if c.ended < now for offset in c.offsets}
            met["called"] += any(call.started <= now < call.ended for call in calls)
            met["answered and not written"] += not replied <= set(written)
            met["written and not committed"] += any(
                offset >= committed[topic, partition] for topic, partition, offset in written
            )
    with serve() as server:
        topics.run(server, until="caught_up")
    topics.assert_caught_up()
    assert_exactly_once(broker, group, [source], responses, crashed=True)
    assert not topics.missing()
    return met


@pytest.mark.slow
def test_a_broker_that_restarts_is_waited_for(broker: KafkaBroker, names: Names) -> None:
    """Nothing is lost, nothing is done twice, and the run ends as if nothing had been."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=PARTITIONS)
    broker.create_topic(responses, partitions=PARTITIONS)
    broker.produce(topic, numbered(PARTITIONS, 3000))
    with serve(faults=[slow(0.02, times=None)]) as server:
        with start(
            broker,
            server,
            topics=topic,
            consumer_group=group,
            response_topic=responses,
            batch_size=20,
        ) as sink:
            sink.until(lambda: len(server.calls) > 50, "no calls")
            calls_before = len(server.calls)
            broker.stop()
            broker.start()
            ended = sink.wait()
        calls = invocations(server)

    assert len(calls) > calls_before
    assert_exactly_once(broker, group, [topic], responses)
    assert_caught_up(broker, group, topic)
    assert_answers_match(broker, [topic], responses)
    assert_rising(broker, responses)
    assert_one_at_a_time(calls)
    assert_in_order(calls)
    assert ended.summary["records"] == PARTITIONS * 3000


@pytest.mark.slow
def test_answers_kafka_does_not_take_are_never_committed(broker: KafkaBroker, names: Names) -> None:
    """An answer larger than the response topic takes halts its partition; nothing is passed over.

    Exit code 3, a line that says what and how to go on, and once the topic takes it the next run
    begins with the record whose answer was not written.
    """
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=1)
    broker.create_topic(responses, partitions=1, max_message_bytes=20_000)
    large = b"x" * 30_000
    broker.produce(topic, [(0, None, large if n == 250 else b"%d" % n) for n in range(300)])
    options = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "batch_size": 10,
    }
    with serve() as server:
        ended = run(broker, server, code=3, **options)

        assert f"topic {responses} refuses the response" in ended.stderr
        assert ended.summary["responses"] == len(broker.read_all(responses))
        assert "Traceback" not in ended.stderr
        committed = broker.committed(group, topic)[0]
        assert committed == 250
        assert_exactly_once(broker, group, [topic], responses, crashed=True)

        done = len(invocations(server))
        _set_max_message_bytes(broker, responses, 100_000)
        run(broker, server, **options)
        again = invocations(server)[done:]

    assert again[0].offsets[0] == committed
    assert_in_order(again, {(topic, 0): committed})
    assert_exactly_once(broker, group, [topic], responses, crashed=True)
    assert_caught_up(broker, group, topic)
    values = [json.loads(r.value or b"") for r in broker.read_all(responses)]
    assert large.decode() in [value["result"] for value in values]


def _set_max_message_bytes(broker: KafkaBroker, topic: str, size: int) -> None:
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    admin.incremental_alter_configs([resource])[resource].result()
