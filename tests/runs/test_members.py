"""Whole runs that share a consumer group: partitions move among them, and nothing is lost by it."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    Sink,
    Topics,
    answered,
    assert_in_order,
    assert_one_at_a_time,
    invocations,
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


@contextmanager
def _load(topics: Topics, partitions: int) -> Iterator[None]:
    """Some records for each partition, again and again."""
    ended = threading.Event()

    def work() -> None:
        step = 0
        while not ended.wait(0.1):
            records = [
                (p, b"k%d" % n, b"order %d/%d" % (p, step * 5 + n))
                for p in range(partitions)
                for n in range(5)
            ]
            topics.broker.produce(topics.source, records)
            step += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
    sink.wait()


def test_a_member_that_dies_is_replaced_by_the_others(broker: KafkaBroker, names: Names) -> None:
    """Within the session's time. Nothing is lost, and only what it had begun is done twice."""
    topics = Topics(broker, names, partitions=6, batch_size=5, until="forever")
    with serve(faults=[slow(0.02, times=None)]) as server, ExitStack() as stack:
        copies = [stack.enter_context(topics.start(server)) for _ in range(3)]
        with _load(topics, 6):
            copies[0].until(lambda: len(_worked_on(server, 0)) == 6, "not all get to work")
            # They have shared it out by then.
            copies[0].until(lambda: _lag(topics) < 60 and len(server.calls) > 300, "no calls")
            copies[0].kill()
            calls = len(invocations(server))
            copies[1].until(lambda: len(_worked_on(server, calls + 20)) == 6, "some stand still")
        copies[1].until(lambda: _lag(topics) == 0, "not all is done")
        for copy in copies[1:]:
            _stop(copy)
        times = _times(server)

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
        with _load(topics, 6):
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
        with _load(topics, 4):
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


@PROTOCOLS
@pytest.mark.parametrize("seed", range(2))
def test_killed_and_started_at_random_nothing_is_lost(
    broker: KafkaBroker, names: Names, settings: Path, seed: int
) -> None:
    """Whatever moves when: the commit is never past what has no answer yet."""
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
        with _load(topics, 5):
            for _ in range(8):
                if len(copies) < 2 or (len(copies) < 4 and chance.random() < 0.5):
                    copies.append(stack.enter_context(topics.start(server)))
                else:
                    copy = copies.pop(chance.randrange(len(copies)))
                    copy.kill() if chance.random() < 0.6 else _stop(copy)
                    # What is committed has its answer, at any time.
                    done = broker.committed(topics.group, topics.source)
                    answers = set(answered(broker, topics.responses))
                    assert all(
                        (topics.source, partition, number) in answers
                        for partition, offset in done.items()
                        for number in range(offset)
                    )
                time.sleep(chance.random() * 1.5)
        copies[0].until(lambda: _lag(topics) == 0, "not all is done")
        for copy in copies:
            _stop(copy)

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
