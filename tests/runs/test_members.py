"""Whole runs that share a consumer group: partitions move among them, and nothing is lost by it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from confluent_kafka import Consumer

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow
from pipeline.local.lambda_server import LambdaServer
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.sink import (
    MEMBERS,
    Coordinates,
    Invocation,
    Sink,
    Topics,
    answered,
    assert_in_order,
    assert_one_at_a_time,
    invocations,
    load,
    of_partition,
    serve,
)

PROTOCOLS = pytest.mark.parametrize("protocol", ["classic", "consumer"])
SESSION_SECS = 3.0
"""Of the members here; the broker's for the new protocol is as long."""


@pytest.fixture
def settings(tmp_path: Path, protocol: str) -> Path:
    """What makes a run a member by one protocol or the other."""
    file = tmp_path / "kafka.properties"
    file.write_text("group.protocol=consumer\n" if protocol == "consumer" else MEMBERS.read_text())
    return file


def _times(server: LambdaServer) -> Counter[Coordinates]:
    """How often each record was invoked."""
    return Counter(
        (call.topic, call.partition, offset)
        for call in invocations(server)
        for offset in call.offsets
    )


def _lag(topics: Topics) -> int:
    done = topics.broker.committed(topics.group, topics.source)
    ends = topics.broker.end_offsets(topics.source)
    return sum(end - done.get(partition, 0) for partition, end in ends.items())


def _worked_on(server: LambdaServer, since: int) -> set[int]:
    """The partitions of which something was invoked since there were so many calls."""
    return {call.partition for call in invocations(server)[since:]}


def _stop(sink: Sink) -> None:
    sink.send(signal.SIGTERM)
    # It may not have got so far yet as to hear signals: then it has begun nothing.
    assert sink.wait(None).code in (0, -signal.SIGTERM)


def _assert_first_in_order(server: LambdaServer) -> None:
    """Whoever invoked and however often: no record of a key came before an earlier one of it."""
    first: dict[tuple[int, str], int] = {}
    seen: set[Coordinates] = set()
    for call in invocations(server):
        for entry in call.entries:
            place = (call.topic, call.partition, entry["offset"])
            if place not in seen:
                seen.add(place)
                key = (call.partition, entry["key"])
                assert entry["offset"] > first.get(key, -1), f"{place} comes too late"
                first[key] = entry["offset"]


def _assert_goes_back_once(calls: list[Invocation]) -> None:
    """Each partition in order; where its owner died it went back, once, and in order from there."""
    back: Counter[int] = Counter()
    due: dict[int, int] = {}
    for call in calls:
        first, expected = call.offsets[0], due.get(call.partition, 0)
        assert call.offsets == tuple(range(first, call.offsets[-1] + 1))
        if first != expected:
            assert first < expected, f"{call} leaves records out"
            back[call.partition] += 1
        due[call.partition] = call.offsets[-1] + 1
    assert set(back.values()) <= {1}


def test_a_member_that_dies_is_replaced_by_the_others(broker: KafkaBroker, names: Names) -> None:
    """Within the session's time. Nothing is lost, and only what it had begun is done twice."""
    topics = Topics(broker, names, partitions=12, batch_size=5, until="forever")
    with serve(faults=[slow(0.02, times=None)]) as server, ExitStack() as stack:
        copies = [stack.enter_context(topics.start(server)) for _ in range(3)]
        with load(topics, 12):
            copies[0].until(lambda: len(_worked_on(server, 0)) == 12, "not all get to work")
            # They have shared it out by then.
            copies[0].until(lambda: _lag(topics) < 120 and len(server.calls) > 300, "no calls")
            copies[0].kill()
            calls = len(invocations(server))
            copies[1].until(lambda: len(_worked_on(server, calls + 40)) == 12, "some stand still")
        copies[1].until(lambda: _lag(topics) == 0, "not all is done")
        for copy in copies[1:]:
            _stop(copy)
        times = _times(server)
        _assert_goes_back_once(invocations(server))

    assert topics.missing() == set()
    assert max(times.values()) <= 2
    topics.assert_caught_up()


@PROTOCOLS
def test_a_rolling_restart_does_nothing_twice(
    broker: KafkaBroker, names: Names, settings: Path
) -> None:
    """Who leaves ends what it has begun; who gives partitions away does so, too."""
    topics = Topics(
        broker, names, partitions=6, batch_size=5, until="forever", kafka_config_file=settings
    )
    with serve(faults=[slow(0.05, times=None)]) as server, ExitStack() as stack:
        copies = [stack.enter_context(topics.start(server)) for _ in range(3)]
        with load(topics, 6):
            copies[0].until(lambda: len(_worked_on(server, 0)) == 6, "not all get to work")
            for number in range(3):
                _stop(copies[number])
                copies[number] = stack.enter_context(topics.start(server))
                calls = len(invocations(server))
                copies[number].until(
                    lambda calls=calls: len(_worked_on(server, calls + 50)) == 6, "some stand still"
                )
        copies[0].until(lambda: _lag(topics) == 0, "not all is done")
        for copy in copies:
            _stop(copy)
        times = _times(server)
        calls_made = invocations(server)

    assert topics.missing() == set()
    assert set(times.values()) == {1}
    assert_one_at_a_time(calls_made)
    assert_in_order(calls_made)
    topics.assert_exactly_once()
    topics.assert_caught_up()


def pauses(calls: list[Invocation], since: float, until: float) -> dict[int, float]:
    """By partition, the longest time in between in which no call of it began."""
    longest = {}
    for partition in {call.partition for call in calls}:
        times = [each.started for each in calls if each.partition == partition]
        times = [since, *(each for each in times if since < each < until), until]
        longest[partition] = max(after - before for before, after in pairwise(times))
    return longest


def test_what_does_not_move_goes_on_while_others_do(broker: KafkaBroker, names: Names) -> None:
    """A partition moves when its call has ended. One takes its time, and no other waits for it."""
    topics = Topics(broker, names, partitions=6, batch_size=5, until="forever")
    long_secs, held_up = 8.0, {0, 2, 4}
    with ExitStack() as stack:
        # One for each copy, so that it can be seen who has what.
        servers = [stack.enter_context(serve(faults=[slow(0.05, times=None)])) for _ in range(2)]
        first = stack.enter_context(topics.start(servers[0]))
        with load(topics, 6):
            first.until(lambda: len(_worked_on(servers[0], 0)) == 6, "not all get to work")
            servers[0].clear_faults()
            for partition in held_up:
                servers[0].add_fault(slow(long_secs, when=of_partition(partition)))
            servers[0].add_fault(slow(0.05, times=None))
            second = stack.enter_context(topics.start(servers[1]))
            second.until(lambda: len(_worked_on(servers[1], 0)) == 3, "nothing moves")
        second.until(lambda: _lag(topics) == 0, "not all is done")
        for copy in (first, second):
            _stop(copy)
        calls = invocations(servers[0])
        moved = _worked_on(servers[1], 0)

    late = [call for call in calls if call.ended - call.started > long_secs - 1]
    assert {call.partition for call in late} == held_up
    # What moved had to wait for such a call, and what stayed did not.
    assert moved & held_up
    since, until = min(c.started for c in late), min(c.ended for c in late)
    found = pauses(calls, since, until)
    stayed = [found[partition] for partition in set(range(6)) - moved - held_up]
    assert stayed and max(stayed) < long_secs / 2
    topics.assert_exactly_once()


@PROTOCOLS
def test_a_frozen_member_commits_nothing_of_others(
    broker: KafkaBroker, names: Names, settings: Path
) -> None:
    """It wakes up with calls that have ended, and what it had is another's. Then it joins again."""
    topics = Topics(
        broker, names, partitions=4, batch_size=5, until="forever", kafka_config_file=settings
    )
    before: dict[int, int] = {}

    def never_back() -> bool:
        now = broker.committed(topics.group, topics.source)
        assert all(now.get(partition, 0) >= offset for partition, offset in before.items())
        before.update(now)
        return True

    with serve(faults=[slow(0.05, times=None)]) as server, ExitStack() as stack:
        frozen = stack.enter_context(topics.start(server))
        with load(topics, 4):
            frozen.until(lambda: len(_worked_on(server, 0)) == 4, "not all get to work")
            other = stack.enter_context(topics.start(server))
            frozen.send(signal.SIGSTOP)
            # The other has all of them by then.
            calls = len(invocations(server)) + 4
            other.until(
                lambda: never_back() and len(_worked_on(server, calls)) == 4, "some stand still"
            )
            frozen.send(signal.SIGCONT)
            awake = time.monotonic()
            frozen.until(lambda: never_back() and "not heard of in time" in frozen.stderr, "asleep")
            other.until(
                lambda: never_back() and time.monotonic() > awake + SESSION_SECS, "it ended"
            )
        other.until(lambda: never_back() and _lag(topics) == 0, "not all is done")
        _stop(other)
        # It is a member again, and gets all there is.
        broker.produce(topics.source, [(p, None, b"late") for p in range(4)])
        frozen.until(lambda: never_back() and _lag(topics) == 0, "it does nothing any more")
        _stop(frozen)

    assert topics.missing() == set()
    topics.assert_caught_up()


def come_and_go(
    broker: KafkaBroker, names: Names, settings: Path, seed: int, points: int
) -> Topics:
    """One to four copies under load, of which some are killed, stopped and started."""
    chance = random.Random(seed)
    topics = Topics(
        broker,
        names,
        partitions=5,
        batch_size=5,
        until="forever",
        kafka_config_file=settings,
        parallelization_factor=(1, 4)[seed % 2],
    )
    copies: list[Sink] = []
    with serve(faults=[slow(0.03, times=None)]) as server, ExitStack() as stack:
        with load(topics, 5):
            for _ in range(points):
                if not copies or (len(copies) < 4 and chance.random() < 0.55):
                    copies.append(stack.enter_context(topics.start(server)))
                else:
                    copy = copies.pop(chance.randrange(len(copies)))
                    if chance.random() < 0.6:
                        copy.kill()
                    else:
                        copy.send(signal.SIGTERM)
                        copy.wait(None)  # one that has just begun is ended by the signal itself
                    # What is committed has its answer, at any time.
                    done = broker.committed(topics.group, topics.source)
                    answers = set(answered(broker, topics.responses))
                    assert all(
                        (topics.source, partition, number) in answers
                        for partition, offset in done.items()
                        for number in range(offset)
                    )
                time.sleep(chance.random() * 1.5)
        for copy in copies:
            copy.send(signal.SIGTERM)
            copy.wait(None)
        topics.run(server, until="caught_up")
        _assert_first_in_order(server)
    return topics


@PROTOCOLS
@pytest.mark.parametrize("seed", range(2))
def test_killed_and_started_at_random_nothing_is_lost(
    broker: KafkaBroker, names: Names, settings: Path, seed: int
) -> None:
    """Whatever moves when: the commit is never past what has no answer yet."""
    topics = come_and_go(broker, names, settings, seed, points=8)
    assert topics.missing() == set()
    topics.assert_caught_up()


def test_copies_that_end_are_through_with_all_of_it(broker: KafkaBroker, names: Names) -> None:
    """Each of them ends, and all that was there is done, once."""
    topics = Topics(broker, names, partitions=4, count=300, batch_size=10)
    with serve(faults=[slow(0.02, times=None)]) as server, ExitStack() as stack:
        copies = [stack.enter_context(topics.start(server)) for _ in range(3)]
        for copy in copies:
            copy.wait()
        assert set(_times(server).values()) == {1}
    topics.assert_exactly_once()
    topics.assert_caught_up()


def test_one_that_waits_for_others_can_be_stopped(broker: KafkaBroker, names: Names) -> None:
    """What it had is done; of what another one has it says nothing, since it was told not to
    wait."""
    topics = Topics(broker, names, partitions=2, count=10)
    other = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": topics.group,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
        }
    )
    other.subscribe([topics.source])
    try:
        wait_until(lambda: other.poll(0.1) is None and len(other.assignment()) == 2, "no member")
        with serve() as server, topics.start(server, until="caught_up") as sink:

            def half() -> bool:
                other.poll(0.1)
                return list(broker.committed(topics.group, topics.source).values()) == [10]

            sink.until(half, "it has nothing")
            time.sleep(2)
            sink.send(signal.SIGTERM)
            ended = sink.wait()
    finally:
        other.close()
    assert ended.summary["records"] == 10


def test_the_group_of_another_program_is_left_alone(broker: KafkaBroker, names: Names) -> None:
    """One that deals out otherwise: the run says so and ends."""
    topics = Topics(broker, names, count=10)
    other = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": topics.group,
            "partition.assignment.strategy": "range",
        }
    )
    other.subscribe([topics.source])
    try:
        wait_until(lambda: other.poll(0.1) is None and bool(other.assignment()), "not a member")
        with serve() as server:
            ended = topics.run(server, 1)
    finally:
        other.close()
    (error,) = ended.errors
    assert f"--consumer_group={topics.group} cannot be committed: the group has active" in error
    assert "Traceback" not in ended.stderr
