"""Whole runs: what is committed lasts, in a group with members and in one without."""

from __future__ import annotations

import signal

import pytest
from confluent_kafka import KafkaError, KafkaException

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.sink import (
    Sink,
    answered,
    arguments,
    commit,
    environment,
    invocations,
    poison,
    run,
    serve,
    start,
)


def test_nobody_else_moves_what_a_run_has_committed(broker: KafkaBroker, names: Names) -> None:
    """Quiet and halted partitions too: the group has a member, and others are refused."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, [(0, None, b"a"), (0, None, b"b"), (1, None, b"a"), (1, None, b"bad")])
    options = {"topics": topic, "consumer_group": group, "batch_size": 1}
    done = {0: 2, 1: 1, 2: 0}
    with (
        serve(poison("bad")) as server,
        start(broker, server, until="forever", **options) as sink,
    ):
        sink.until(lambda: broker.committed(group, topic) == done, "they are not done")
        with pytest.raises(KafkaException) as refused:
            commit(broker, group, topic, {0: 0, 1: 0, 2: 99})
        sink.send(signal.SIGTERM)
        sink.wait(3)
    assert refused.value.args[0].code() == KafkaError.UNKNOWN_MEMBER_ID
    assert broker.committed(group, topic) == done


def test_a_group_with_offsets_for_some_partitions_only(broker: KafkaBroker, names: Names) -> None:
    """It is said: records may be skipped or come again."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, [(0, None, b"a"), (1, None, b"a"), (2, None, b"a")])
    commit(broker, group, topic, {1: 1})
    with serve() as server:
        options = {"topics": topic, "consumer_group": group, "starting_position": "LATEST"}
        ended = run(broker, server, **options)
        lines = [line for line in ended.stderr.splitlines() if "has no committed offset" in line]
        assert len(lines) == 2
        for partition, line in zip((0, 2), lines):
            assert f"{topic}-{partition} has no committed offset, and others" in line
            assert "its offset has expired; going on at its first record, 0" in line
        assert [call.partition for call in invocations(server)] in ([0, 2], [2, 0])
        assert broker.committed(group, topic) == {0: 1, 1: 1, 2: 1}
        again = run(broker, server, **options | {"starting_position": None})
        assert "no offset" not in again.stderr
        assert "no committed offset" not in again.stderr


def test_a_group_with_offsets_for_some_partitions_only_and_trim_horizon(
    broker: KafkaBroker, names: Names
) -> None:
    """It is said: records may come again."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=3)
    commit(broker, group, topic, {1: 0})
    with serve() as server:
        ended = run(broker, server, topics=topic, consumer_group=group)
    assert (
        f"group {group} has no offset for 2 of the 3 partitions of topic {topic} (0, 2): they "
        f"are new, or the broker has forgotten it; they begin as --starting_position=TRIM_HORIZON "
        f"says"
    ) in ended.stderr


@pytest.mark.slow
def test_a_broker_that_forgets_after_a_minute_forgets_nothing_of_a_run() -> None:
    """A run keeps its group's offsets, those it has taken over too; of a redrive that is long ago
    none are left, and so the next one begins only if it is told to."""
    settings = {"offsets.retention.minutes": "1", "offsets.retention.check.interval.ms": "500"}
    with (
        KafkaBroker(settings) as broker,
        serve(poison("bad")) as server,
        serve() as mended,
    ):
        broker.create_topic("orders", partitions=3)
        for topic in ("answers", "errors"):
            broker.create_topic(topic, partitions=1)
        output = {"response_topic": "answers", "batch_size": 1}
        failed = {**output, "on_error": "log", "error_topic": "errors", "topics": "orders"}
        broker.produce("orders", [(0, None, b"bad"), (1, None, b"a")])
        run(broker, server, consumer_group="logging", **failed)
        redrive = [
            "redrive",
            *arguments(broker, mended, consumer_group="logging", **failed),
        ]
        with Sink([*redrive, "--first_redrive"], environment()) as sink:
            assert sink.wait().summary["redrive"]["redriven"] == 1
        with Sink(redrive, environment()) as sink:
            assert sink.wait().summary["redrive"]["redriven"] == 0

        before = len(invocations(server))
        # What another system has committed, and the run takes over: 0 halts, 1 and 2 are quiet.
        halts = {**output, "topics": "orders", "starting_position": "LATEST"}
        commit(broker, "taken", "orders", {0: 0, 1: 1, 2: 0})
        with start(
            broker, server, until="forever", commit_refresh_secs=10, consumer_group="taken", **halts
        ) as sink:
            sink.until(lambda: len(invocations(server)) > before, "nothing is invoked")
            commit(broker, "control", "orders", {0: 0})
            sink.until(
                lambda: (
                    broker.committed("control", "orders") == {}
                    and broker.committed("logging-redrive", "errors") == {}
                ),
                "the broker does not forget",
                timeout=150,
            )
            assert broker.committed("taken", "orders") == {0: 0, 1: 1, 2: 0}
            sink.send(signal.SIGTERM)
            sink.wait(3)

        with Sink(redrive, environment()) as sink:
            (error,) = sink.wait(2).errors
            assert "--redrive_group=logging-redrive has no offsets" in error
        # Nothing is skipped: with its offset forgotten, 2 would begin at its end.
        before = len(answered(broker, "answers"))
        broker.produce("orders", [(2, None, b"late")])
        run(broker, mended, consumer_group="taken", **halts)
        assert answered(broker, "answers")[before:].count(("orders", 2, 0)) == 1
        wait_until(
            lambda: broker.committed("taken", "orders") == broker.end_offsets("orders"),
            "not all is committed",
        )
