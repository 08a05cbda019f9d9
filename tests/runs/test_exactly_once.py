"""Whole runs with --delivery=exactly_once: who reads committed records sees each outcome once."""

from __future__ import annotations

import random
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.sink import (
    TRANSACTIONS,
    Sink,
    Topics,
    answered,
    failed,
    invocations,
    load,
    poison,
    serve,
)

KILLS = 4
"""And for a longer one: `be_killed` with 50."""
PARTITIONS = 4


def _topics(broker: KafkaBroker, names: Names, **options: object) -> Topics:
    return Topics(
        broker,
        names,
        **{
            "delivery": "exactly_once",
            "kafka_config_file": TRANSACTIONS,
            "batch_size": 10,
            **options,
        },
    )


def be_killed(
    broker: KafkaBroker, names: Names, kills: int, seed: int, restarts: int = 1, **options: object
) -> Topics:
    """One to three copies under load, killed, stopped and started at random, and so the broker."""
    chance = random.Random(seed)
    topics = _topics(
        broker,
        names,
        partitions=PARTITIONS,
        until="forever",
        parallelization_factor=(1, 4)[seed % 2],
        bisect_on_error=True,
        **options,
    )
    topics.options |= topics.log_errors
    bad = [f"order {p}/{n}" for p in range(PARTITIONS) for n in range(0, 3000, 97)]
    steps = ["kill"] * kills
    for _ in range(restarts):
        steps.insert(chance.randrange(len(steps)), "restart")
    copies: list[Sink] = []
    with serve(poison(*bad), faults=[slow(0.01, times=None)]) as server, ExitStack() as stack:
        with load(topics, PARTITIONS, restarts="restart" in steps):
            for step in steps:
                while not copies or (len(copies) < 3 and chance.random() < 0.4):
                    copies.append(stack.enter_context(topics.start(server)))
                if step == "restart":
                    # One that begins meanwhile ends: it cannot ask where to begin.
                    wait_until(partial(topics.is_dealt, len(copies)), "not all are members", 60)
                    chance.choice([broker.stop, broker.kill])()
                    broker.start()
                calls = len(server.calls)
                copies[0].until(lambda calls=calls: len(server.calls) > calls + 5, "no calls")
                time.sleep(chance.random())
                if step == "kill":
                    copy = copies.pop(chance.randrange(len(copies)))
                    copy.kill()
        for copy in copies:
            copy.send(signal.SIGTERM)
        for copy in copies:
            copy.wait(None)  # one that has just begun is ended by the signal itself
        topics.run(server, until="caught_up")
    return topics


def assert_each_once(topics: Topics) -> None:
    """Each record's outcome can be seen once, as soon as what was left open is over."""
    broker, sent = topics.broker, topics.sent()

    def all_there() -> bool:
        return sent <= {*answered(broker, topics.responses), *failed(broker, topics.errors)}

    wait_until(all_there, "not all outcomes can be seen", 60)
    topics.assert_exactly_once()
    topics.assert_caught_up()
    assert failed(broker, topics.errors)


def test_outcomes_and_offsets_are_written_together(broker: KafkaBroker, names: Names) -> None:
    topics = _topics(broker, names, partitions=2, count=500)
    with serve(poison("order 1/77")) as server:
        ended = topics.run(server, bisect_on_error=True, workers=2, **topics.log_errors)
    topics.assert_exactly_once()
    topics.assert_caught_up()
    assert (ended.summary["responses"], ended.summary["errors"]) == (999, 1)


def test_what_kafka_refuses_is_left_out_of_the_transaction(
    broker: KafkaBroker, names: Names
) -> None:
    """A response that is too large becomes an error record; all others are there once. The topic
    takes less than a request of them, too."""
    topics = _topics(broker, names, partitions=2, responses={"max_message_bytes": "20000"})
    large = {(0, 70), (1, 3)}
    broker.produce(
        topics.source,
        [
            (p, b"k", b"x" * 30_000 if (p, n) in large else b"order %d/%d" % (p, n))
            for n in range(200)
            for p in range(2)
        ],
    )
    with serve() as server:
        ended = topics.run(server, **topics.log_errors)
    assert ended.summary["errors"] == 2
    assert ended.summary["responses"] == 398 == len(answered(broker, topics.responses))
    assert set(failed(broker, topics.errors)) == {(topics.source, *each) for each in large}
    topics.assert_exactly_once()
    topics.assert_caught_up()


def test_a_partition_stops_at_what_cannot_be_written(broker: KafkaBroker, names: Names) -> None:
    """In front of it all is there once, behind it nothing; the next run goes on there."""
    topics = _topics(broker, names, partitions=2, responses={"max_message_bytes": "20000"})
    broker.produce(
        topics.source,
        [
            (p, None, b"x" * 30_000 if (p, n) == (0, 55) else b"%d" % n)
            for n in range(100)
            for p in range(2)
        ],
    )
    with serve() as server:
        ended = topics.run(server, 3)
        assert f"topic {topics.responses} refuses the response" in ended.stderr
        assert ended.summary["responses"] == len(answered(broker, topics.responses))
        topics.assert_exactly_once()
        assert broker.committed(topics.group, topics.source) == {0: 55, 1: 100}
        # With its error record too large as well: halted at the same place.
        errors = {"on_error": "log", "error_topic": f"{topics.errors}-small"}
        broker.create_topic(errors["error_topic"], 1, max_message_bytes="300")
        ended = topics.run(server, 3, **errors)
        assert f"topic {errors['error_topic']} refuses the error record" in ended.stderr
        topics.assert_exactly_once()
        topics.run(server, **topics.log_errors)
    topics.assert_exactly_once()
    topics.assert_caught_up()


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_copies_that_come_and_go_write_each_outcome_once(
    broker: KafkaBroker, names: Names, tmp_path: Path, protocol: str
) -> None:
    """Nobody dies: so nothing is even invoked twice, and nothing is written again."""
    file = tmp_path / "kafka.properties"
    settings = "group.protocol=consumer\n" if protocol == "consumer" else ""
    file.write_text(settings or TRANSACTIONS.read_text())
    topics = _topics(broker, names, partitions=4, until="forever", kafka_config_file=file)
    with serve(faults=[slow(0.02, times=None)]) as server, ExitStack() as stack:
        copies = [stack.enter_context(topics.start(server)) for _ in range(2)]
        with load(topics, PARTITIONS):
            copies[0].until(lambda: len(server.calls) > 50, "no calls")
            for number in range(2):
                copies[number].send(signal.SIGTERM)
                copies[number].wait()
                copies[number] = stack.enter_context(topics.start(server))
                calls = len(server.calls)
                copies[number].until(
                    lambda calls=calls: len(server.calls) > calls + 100, "no calls"
                )
        for copy in copies:
            copy.send(signal.SIGTERM)
            copy.wait(None)
        topics.run(server, until="caught_up")
        offsets = [(c.partition, offset) for c in invocations(server) for offset in c.offsets]
    assert len(offsets) == len(set(offsets))
    topics.assert_exactly_once()
    topics.assert_caught_up()


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_each_outcome_is_there_once(
    broker: KafkaBroker, names: Names, seed: int
) -> None:
    """Where a copy died in the middle of a transaction the next one waits until it is over."""
    assert_each_once(be_killed(broker, names, KILLS, seed, restarts=seed))
