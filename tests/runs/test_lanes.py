"""Whole runs with lanes: order per record key, nothing lost, whatever goes wrong around it."""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import drop_connection, slow, throttle, unavailable
from tests.conftest import Names
from tests.sink import (
    MEMBERS,
    Coordinates,
    Invocation,
    Partition,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    failed,
    invocations,
    poison,
    run,
    serve,
    start,
)
from transforms.lanes import Lanes

PARTITIONS = 4

Keys = Mapping[Partition, list[bytes | None]]
"""Per partition the records' keys, by offset."""

Marks = Mapping[Partition, list[int]]
"""Per partition where each lane begins."""


def _produce(
    broker: KafkaBroker, topic: str, count: int, chance: random.Random, partitions: int = PARTITIONS
) -> Keys:
    """Records with random keys, some without."""
    choice = [None, *(b"key-%d" % number for number in range(chance.randrange(2, 60)))]
    keys: dict[Partition, list[bytes | None]] = defaultdict(list)
    records = []
    for number in range(count):
        for partition in range(partitions):
            key = chance.choice(choice)
            keys[topic, partition].append(key)
            records.append((partition, key, f"order {partition}/{number}".encode()))
    broker.produce(topic, records)
    return keys


def _marks(broker: KafkaBroker, group: str, topic: str, lanes: Lanes) -> dict[Partition, list[int]]:
    """Where each lane would go on, by what the group has committed."""
    settings = {"bootstrap.servers": broker.bootstrap_servers, "group.id": group}
    ends = broker.end_offsets(topic)
    consumer = Consumer(settings)
    try:
        places = consumer.committed([TopicPartition(topic, partition) for partition in ends], 30)
    finally:
        consumer.close()
    return {
        (topic, place.partition): lanes.marks(
            place.metadata or "", max(0, place.offset), ends[place.partition]
        )
        for place in places
    }


def assert_lanes_in_order(
    calls: Iterable[Invocation],
    keys: Keys,
    lanes: Lanes,
    marks: Marks | None = None,
    bad: Collection[Coordinates] = (),
) -> dict[tuple[Partition, int], list[int]]:
    """In each lane one call at a time, each beginning with the first record that is not done.

    So a key's records are sent in order, and what is done is not sent again. For the calls of one
    run, in the order they began.

    Args:
        calls: The calls.
        keys: What was in the topic.
        lanes: How it was divided.
        marks: Where the lanes began, if not at the beginning.
        bad: Records that are given up once they have failed alone.

    Returns:
        By lane the records that are not done.
    """
    homes = {key: lanes.of(own, range(len(own))) for key, own in keys.items()}
    due: dict[tuple[Partition, int], list[int]] = {}
    for key, own in homes.items():
        for offset, lane in enumerate(own):
            if not marks or offset >= marks[key][lane]:
                due.setdefault((key, lane), []).append(offset)
    ended: dict[tuple[Partition, int], float] = {}
    for call in calls:
        places = {homes[call.key][offset] for offset in call.offsets}
        assert len(places) == 1, f"one call with records of lanes {places}"
        place = (call.key, places.pop())
        assert call.started >= ended.get(place, 0.0), f"{place}: calls overlap at {call}"
        ended[place] = call.ended
        expected = due[place][: len(call.offsets)]
        assert list(call.offsets) == expected, f"{place}: {call.offsets} sent, {expected} due"
        alone = len(call.offsets) == 1 and (*call.key, call.offsets[0]) in bad
        # Not by a call that was throttled, or whose connection was dropped.
        if call.answered or (alone and call.function_error):
            del due[place][: len(expected)]
    return due


def _assert_all_done(due: dict[tuple[Partition, int], list[int]]) -> None:
    assert not any(due.values()), due


def _at_once(calls: Iterable[Invocation], partition: int) -> int:
    """The most calls of a partition that were running at the same time."""
    events = []
    for call in calls:
        if call.partition == partition:
            events += [(call.started, 1), (call.ended, -1)]
    most = running = 0
    for _, step in sorted(events):
        running += step
        most = max(most, running)
    return most


def test_order_is_kept_per_key_under_concurrency_and_faults(
    broker: KafkaBroker, names: Names
) -> None:
    """With every kind of trouble at random, each lane is worked strictly in order, side by side."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=PARTITIONS)
    broker.create_topic(responses, partitions=3)
    chance = random.Random(20)
    keys = _produce(broker, topic, 900, chance)

    def now_and_then(payload: bytes, name: str) -> bool:
        return chance.random() < 0.03

    faults = [
        throttle(retry_after_secs=0.05, times=None, when=now_and_then),
        unavailable(500, times=None, when=now_and_then),
        drop_connection(times=None, when=now_and_then),
        drop_connection(executed=True, times=None, when=now_and_then),
        slow(0.05, times=None),
    ]
    with serve(faults=faults) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            batch_size=20,
            parallelization_factor=5,
            max_concurrency=12,
        )
        calls = invocations(server)
        in_flight_max = server.in_flight_max

    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)
    assert_answers_match(broker, [topic], responses)
    _assert_all_done(assert_lanes_in_order(calls, keys, Lanes(5, run=20)))
    assert in_flight_max <= 12
    assert max(_at_once(calls, partition) for partition in range(PARTITIONS)) > 1
    summary = ended.summary
    assert (summary["records"], summary["errors"]) == (3600, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again_lanes_lose_nothing_and_keep_order(
    broker: KafkaBroker, names: Names, seed: int
) -> None:
    """Random keys, lanes, batches, bad records, faults and kills.

    After each kill every lane goes on exactly where what was committed says, its own calls in
    order; in the end each record has its answer or its error record.
    """
    chance = random.Random(seed)
    lanes = Lanes(chance.randrange(2, 11), run=chance.choice([1, 7, 10, 25]))
    topic, group = names.topic(), names.group()
    responses, errors = names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=PARTITIONS)
    broker.create_topic(responses, partitions=PARTITIONS)
    keys = _produce(broker, topic, 1500, chance)
    bad = {
        (topic, partition, chance.randrange(1500)) for partition in range(PARTITIONS) for _ in "abc"
    }

    def now_and_then(payload: bytes, name: str) -> bool:
        return chance.random() < 0.02

    faults = [
        throttle(retry_after_secs=0.02, times=None, when=now_and_then),
        unavailable(500, times=None, when=now_and_then),
        drop_connection(executed=True, times=None, when=now_and_then),
        slow(0.06, times=None),
    ]
    options = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "error_topic": errors,
        "on_error": "log",
        "bisect_on_error": True,
        "batch_size": lanes.run,
        "parallelization_factor": lanes.count,
        "workers": 1 + seed % 3,
        "kafka_config_file": MEMBERS,
    }
    # A server for each attempt: what one of a killed run still reads is no call of the next one's.
    attempts: list[list[Invocation]] = []
    marks: list[dict[Partition, list[int]]] = [
        {(topic, partition): [0] * lanes.count for partition in range(PARTITIONS)}
    ]
    function = poison(*(f"order {partition}/{offset}" for _, partition, offset in bad))
    for kill in range(4):
        wanted = chance.randrange(1, 80)
        with serve(function, faults=faults) as server, start(broker, server, **options) as sink:
            sink.until(lambda n=wanted: len(server.calls) >= n, "no calls")
            if kill % 2:
                # Every other time somewhere behind a commit.
                sink.until(
                    lambda known=marks[-1]: _marks(broker, group, topic, lanes) != known,
                    "nothing is committed",
                )
            sink.kill()
        attempts.append(invocations(server))
        marks.append(_marks(broker, group, topic, lanes))
    with serve(function) as server:
        run(broker, server, **options)
    attempts.append(invocations(server))

    for attempt, starts in zip(attempts, marks, strict=True):
        due = assert_lanes_in_order(attempt, keys, lanes, starts, bad)
    _assert_all_done(due)
    for before, after in pairwise(marks):
        for key, own in after.items():
            assert all(high >= low for low, high in zip(before[key], own, strict=True))
    assert_caught_up(broker, group, topic)
    assert_exactly_once(broker, group, [topic], responses, errors, crashed=True)
    assert_answers_match(broker, [topic], responses)
    assert set(failed(broker, errors)) == bad
    _assert_answers_restart_only_at(marks, answered(broker, responses), keys, lanes, bad)
    # The kills hit some of the work: it was neither all done nor all before it.
    assert any(min(own) != max(own) for each in marks for own in each.values())
    assert sum(len(call.offsets) for each in attempts for call in each) > PARTITIONS * 1500


def _assert_answers_restart_only_at(
    marks: list[dict[Partition, list[int]]],
    found: list[Coordinates],
    keys: Keys,
    lanes: Lanes,
    bad: set[Coordinates],
) -> None:
    """The answers of a lane rise, but where a run began with what was not committed. Records that
    fail have no answer, so the first one of a run may stand behind some of them."""
    homes = {key: lanes.of(own, range(len(own))) for key, own in keys.items()}
    latest: dict[tuple[Partition, int], int] = {}
    for topic, partition, offset in found:
        key = (topic, partition)
        lane = homes[key][offset]
        if offset <= latest.get((key, lane), -1):
            begins = {each[key][lane] for each in marks}
            own = [
                at for at, home in enumerate(homes[key]) if home == lane and (*key, at) not in bad
            ]
            firsts = {next((at for at in own if at >= begin), None) for begin in begins}
            assert offset in firsts, f"{key}, lane {lane}: answers went back to {offset}"
        latest[key, lane] = offset


def test_a_stop_repeats_nothing(broker: KafkaBroker, names: Names) -> None:
    """Lanes that are ahead of the committed offset go on where they were, not with the others."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1)
    broker.create_topic(responses, partitions=1)
    lanes = Lanes(4, run=5)
    keys = _produce(broker, topic, 1200, random.Random(4), partitions=1)
    behind = lanes.of(keys[topic, 0], range(1200))[0]
    of_one_lane = [
        b'"offset":%d,' % offset
        for offset, lane in enumerate(lanes.of(keys[topic, 0], range(1200)))
        if lane == behind
    ]

    def held_up(payload: bytes, name: str) -> bool:
        return any(offset in payload for offset in of_one_lane)

    options = {
        "topics": topic,
        "consumer_group": names.group(),
        "response_topic": responses,
        "batch_size": lanes.run,
        "parallelization_factor": lanes.count,
    }
    with serve(faults=[slow(0.5, times=None, when=held_up), slow(0.02, times=None)]) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            calls = len(server.calls)
            with start(broker, server, **options) as sink:
                sink.until(lambda n=calls: len(server.calls) > n + 60, "no calls")
                sink.send(number)
                sink.wait()
        marks = _marks(broker, names.group(), topic, lanes)[topic, 0]
        server.clear_faults()
        run(broker, server, **options)
        calls = invocations(server)

    assert max(marks) - min(marks) > 200
    _assert_all_done(assert_lanes_in_order(calls, keys, lanes))
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)


def test_a_halt_in_one_lane_stops_the_partition_and_nothing_is_repeated(
    broker: KafkaBroker, names: Names
) -> None:
    """Nothing behind the bad record is committed or sent for its key; other partitions end.

    Once the function is mended, the same command goes on in each lane where it stopped.
    """
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=2)
    broker.create_topic(responses, partitions=2)
    lanes = Lanes(5, run=10)
    keys = _produce(broker, topic, 800, random.Random(7), partitions=2)
    options = {
        "topics": topic,
        "consumer_group": names.group(),
        "response_topic": responses,
        "batch_size": lanes.run,
        "bisect_on_error": True,
        "parallelization_factor": lanes.count,
    }
    with serve(poison("order 0/333"), faults=[slow(0.01, times=None)]) as server:
        ended = run(broker, server, code=3, **options)
        marks = _marks(broker, names.group(), topic, lanes)
        assert_exactly_once_by_lane(broker, topic, responses, keys, lanes, marks)
        before = invocations(server)
    with serve() as server:
        run(broker, server, **options)
        after = invocations(server)

    assert f"halted: {topic}-0 at offset 333" in ended.stderr
    (halt,) = ended.summary["halted"]
    assert (halt["partition"], halt["offset"]) == (0, 333)
    homes = lanes.of(keys[topic, 0], range(800))
    mark = marks[topic, 0][homes[333]]
    assert min(marks[topic, 0]) <= mark <= 333
    # The mark is behind the lane's last finished record; the bad one is the lane's next.
    assert homes[333] not in homes[mark:333]
    assert marks[topic, 1] == [800] * lanes.count
    assert_lanes_in_order(before, keys, lanes)
    _assert_all_done(assert_lanes_in_order(after, keys, lanes, marks))
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)
    assert_answers_match(broker, [topic], responses)


def assert_exactly_once_by_lane(
    broker: KafkaBroker, topic: str, responses: str, keys: Keys, lanes: Lanes, marks: Marks
) -> None:
    """Each record before its lane's mark has one answer, each one from there on has none."""
    found = answered(broker, responses)
    assert len(found) == len(set(found))
    expected = {
        (*key, offset)
        for key, own in keys.items()
        for offset, lane in enumerate(lanes.of(own, range(len(own))))
        if offset < marks[key][lane]
    }
    assert set(found) == expected
