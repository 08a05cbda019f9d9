"""Whole runs in several processes: what holds for one holds for all of them, and none is left."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import drop_connection, slow, throttle, unavailable
from pipeline.local.processes import wait_until
from tests import ROOT
from tests.conftest import Names
from tests.pipeline.test_docs import example
from tests.sink import (
    MEMBERS,
    Sink,
    answered,
    arguments,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    by_partition,
    environment,
    invocations,
    is_there,
    numbered,
    poison,
    run,
    serve,
    start,
)

PAGE = ROOT / "docs" / "scaling.md"


def _workers(sink: Sink) -> list[int]:
    """The process ids of a run's workers."""
    pid = sink.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _all_gone(pids: list[int]) -> bool:
    return not any(map(is_there, pids))


@pytest.fixture
def topics(broker: KafkaBroker, names: Names) -> dict[str, Any]:
    """A source topic with 4 partitions of 300 records, and the options of a run over it."""
    broker.create_topic(names.topic(), partitions=4)
    broker.create_topic(names.topic("responses"), partitions=4)
    broker.produce(names.topic(), numbered(4, 300))
    return {
        "topics": names.topic(),
        "consumer_group": names.group(),
        "response_topic": names.topic("responses"),
        "batch_size": 10,
        "workers": 3,
    }


def _shares(broker: KafkaBroker, options: dict[str, Any]) -> list[int]:
    """How many partitions each worker has, by what the group says; 0 for one that it lacks."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    group = options["consumer_group"]
    members = admin.describe_consumer_groups([group])[group].result().members
    shares = [len(member.assignment.topic_partitions) for member in members]
    return shares + [0] * (options["workers"] - len(shares))


def _assert_done(broker: KafkaBroker, options: dict[str, Any], crashed: bool = False) -> None:
    topic, group, responses = (
        options[name] for name in ("topics", "consumer_group", "response_topic")
    )
    assert_exactly_once(broker, group, [topic], responses, crashed=crashed)
    assert_caught_up(broker, group, topic)
    assert_answers_match(broker, [topic], responses)


def test_each_partition_is_worked_in_order_under_faults(
    broker: KafkaBroker, topics: dict[str, Any]
) -> None:
    """Every record once, one call of a partition at a time, and no more calls than allowed."""
    chance = random.Random(7)

    def now_and_then(payload: bytes, name: str) -> bool:
        return chance.random() < 0.05

    faults = [
        throttle(retry_after_secs=0.05, times=None, when=now_and_then),
        unavailable(500, times=None, when=now_and_then),
        drop_connection(executed=True, times=None, when=now_and_then),
        slow(0.02, times=None),
    ]
    with serve(faults=faults) as server:
        ended = run(broker, server, max_concurrency=3, **topics)
        calls = invocations(server)
        in_flight_max = server.in_flight_max

    _assert_done(broker, topics)
    assert_rising(broker, topics["response_topic"])
    assert_one_at_a_time(calls)
    assert_in_order(calls)
    # One at once where the first worker is through before the others have come.
    assert 1 <= in_flight_max <= 3
    summary = ended.summary
    assert (summary["records"], summary["errors"]) == (1200, 0)
    assert summary["invocations"] == len(calls)
    assert summary["concurrency"]["limit"] <= 3
    assert summary["committed"] == {f"{topics['topics']}-{p}": 300 for p in range(4)}


def test_the_example_of_the_docs(broker: KafkaBroker, topics: dict[str, Any]) -> None:
    """As many workers as it says, with lanes in each partition."""
    options = topics | example(PAGE, "workers run")
    with (
        serve(faults=[slow(0.02, times=None)]) as server,
        start(broker, server, **options) as sink,
    ):
        sink.until(lambda: len(server.calls) > 3, "no calls")
        assert len(_workers(sink)) == int(options["workers"])
        ended = sink.wait()
        assert server.in_flight_max > 4
    _assert_done(broker, topics)
    assert ended.summary["concurrency"]["limit"] == int(options["max_concurrency"])


def test_told_to_stop_all_end_what_is_running(broker: KafkaBroker, topics: dict[str, Any]) -> None:
    """What runs is finished and committed, nothing is repeated, and no process stays."""
    with serve(faults=[slow(0.05, times=None)]) as server:
        with start(broker, server, until="forever", **topics) as sink:
            sink.until(lambda: len(server.calls) > 20, "no calls")
            pids = _workers(sink)
            # As a service manager does: to all processes of the service.
            for pid in (sink.process.pid, *pids):
                os.kill(pid, signal.SIGTERM)
            ended = sink.wait()
        assert len(pids) == 3
        assert _all_gone(pids)
        called = {call.partition: call.offsets[-1] + 1 for call in invocations(server)}
        committed = broker.committed(topics["consumer_group"], topics["topics"])
        assert {partition: committed[partition] for partition in called} == called
        # A partition on its way from one worker to another is nobody's.
        told = {
            f"{topics['topics']}-{partition}": offset for partition, offset in committed.items()
        }
        assert ended.summary["committed"].items() <= told.items()
        server.clear_faults()
        run(broker, server, **topics)
        calls = invocations(server)

    _assert_done(broker, topics)
    assert_in_order(calls)


def test_a_worker_that_dies_ends_the_run(broker: KafkaBroker, topics: dict[str, Any]) -> None:
    """The others finish what is running; the next run goes on where each partition was."""
    topics["kafka_config_file"] = MEMBERS
    with serve(faults=[slow(0.3, times=None)]) as server:
        with start(broker, server, **topics) as sink:
            sink.until(lambda: all(_shares(broker, topics)), "a worker has no partition")
            calls = len(server.calls)
            sink.until(lambda: len(server.calls) > calls + 20, "no calls")
            pids = _workers(sink)
            os.kill(pids[1], signal.SIGKILL)
            ended = sink.wait(1)
        assert _all_gone(pids)
        (error,) = ended.errors
        assert error.startswith("error: worker-1 was ended by SIGKILL")
        assert "Traceback" not in ended.stderr
        assert ended.summary["records"] > 0
        server.clear_faults()
        run(broker, server, **topics)

    _assert_done(broker, topics, crashed=True)


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_no_worker_stays_and_nothing_is_lost(
    broker: KafkaBroker, topics: dict[str, Any], seed: int
) -> None:
    """A worker that outlived its run would call the function beside the next one."""
    chance = random.Random(seed)
    topics |= {"workers": 2 + seed, "kafka_config_file": MEMBERS}
    with serve(faults=[slow(0.03, times=None)]) as server:
        for _ in range(3):
            wanted = len(server.calls) + chance.randrange(3, 25)
            with start(broker, server, **topics) as sink:
                sink.until(lambda n=wanted: len(server.calls) >= n, "no calls")
                pids = _workers(sink)
                sink.kill()
            wait_until(lambda pids=pids: _all_gone(pids), "a worker stays", 5)
        server.clear_faults()
        run(broker, server, **topics)

    _assert_done(broker, topics, crashed=True)


def test_a_halt_stops_its_partition_only(broker: KafkaBroker, topics: dict[str, Any]) -> None:
    """Also the other partitions of the same worker go on."""
    with serve(poison("order 1/45")) as server:
        ended = run(broker, server, code=3, **topics | {"bisect_on_error": True})

    topic = topics["topics"]
    assert broker.committed(topics["consumer_group"], topic) == {0: 300, 1: 45, 2: 300, 3: 300}
    (halt,) = ended.summary["halted"]
    assert (halt["topic"], halt["partition"], halt["offset"]) == (topic, 1, 45)
    assert halt["message"] == "cannot process this order"
    assert f"halted: {topic}-1 at offset 45: RetryAttemptsExhausted, " in ended.stderr


def test_a_run_without_end_ends_when_all_is_halted(
    broker: KafkaBroker, topics: dict[str, Any]
) -> None:
    """As in one process: as long as one partition goes on, so does the run."""
    with (
        serve(poison(*(f"order {partition}/20" for partition in range(4)))) as server,
        start(broker, server, until="forever", **topics) as sink,
    ):
        ended = sink.wait(3)

    assert sorted(halt["partition"] for halt in ended.summary["halted"]) == [0, 1, 2, 3]
    assert set(ended.summary["committed"].values()) == {20}


def test_partitions_made_later_are_found_by_their_worker(
    broker: KafkaBroker, topics: dict[str, Any]
) -> None:
    """There are more workers than partitions at first."""
    topic = topics["topics"] = f"{topics['topics']}-more"
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 30))
    with (
        serve() as server,
        start(broker, server, until="forever", **topics) as sink,
    ):
        sink.until(lambda: len(answered(broker, topics["response_topic"])) == 30, "no answers")
        broker.add_partitions(topic, 4)
        broker.produce(topic, numbered(4, 20))
        sink.until(lambda: len(answered(broker, topics["response_topic"])) == 110, "no answers")
        sink.send(signal.SIGTERM)
        sink.wait()

    found = by_partition(answered(broker, topics["response_topic"]))
    assert found == {(topic, p): list(range(50 if p == 0 else 20)) for p in range(4)}
    assert_caught_up(broker, topics["consumer_group"], topic)


# The minutes are seconds, and what is wanted does not hang on how busy this machine is.
IN_SECONDS = """
import sys
from pipeline import cli
from pipeline.run import workers
looks = iter([1, 3, 3, 3, 3])
workers.LOOK_SECS = 2.0
workers.wanted_workers = lambda now, before, count, least, most: (next(looks, least), "a test")
sys.exit(cli.main(sys.argv[1:]))
"""


def test_workers_come_and_go(broker: KafkaBroker, topics: dict[str, Any]) -> None:
    """More of them, then fewer: they share the partitions and the invocations, and what those have
    done that went is counted."""
    topics |= {"workers": 1, "max_workers": 3, "max_concurrency": 9, "until": "forever"}
    with (
        serve(faults=[slow(0.05, times=None)]) as server,
        Sink(arguments(broker, server, **topics), environment(), ("-c", IN_SECONDS)) as sink,
    ):
        sink.until(lambda: "workers: 3 in place of 1: a test" in sink.stderr, "none has come")
        sink.until(lambda: len(_workers(sink)) == 3, "none has come")
        first, *_ = _workers(sink)
        sink.until(lambda: "workers: 1 in place of 3: a test" in sink.stderr, "none has gone")
        sink.until(lambda: len(_workers(sink)) == 1, "they stay")
        assert _workers(sink) == [first]
        broker.produce(topics["topics"], numbered(4, 20))
        sink.until(lambda: len(answered(broker, topics["response_topic"])) == 1280, "no answers")
        sink.send(signal.SIGTERM)
        ended = sink.wait()
        calls = invocations(server)

    _assert_done(broker, topics)
    assert_one_at_a_time(calls)
    assert_in_order(calls)
    summary = ended.summary
    assert (summary["records"], summary["workers"]) == (1280, 1)
    assert summary["concurrency"]["limit"] == 9


def test_what_keeps_all_from_beginning_is_said_once(
    broker: KafkaBroker, topics: dict[str, Any]
) -> None:
    """Each of them finds out; one line is enough."""
    with serve() as server:
        ended = run(broker, server, code=1, **topics | {"function": "nobody-knows"})
    (error,) = ended.errors
    assert "--function=nobody-knows cannot be invoked: ResourceNotFoundException" in error
    assert "Traceback" not in ended.stderr
    assert ended.summary["records"] == 0
