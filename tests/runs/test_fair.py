"""Whole runs: what partitions that do not get on cost the others."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import Fault
from pipeline.local.processes import wait_until
from pipeline.options.resolve import parse_arguments
from pipeline.run.limits import RoundLimits
from pipeline.run.rounds import Rounds
from tests.conftest import Names
from tests.sink import answer, arguments, environment, of_partition, serve

STUCK, HEALTHY = range(4), range(4, 8)


def test_stuck_partitions_take_nothing_from_the_others(
    broker: KafkaBroker, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold as much as all have in common, and each of the others still gets on as if alone:
    many batches wait behind its call, where a few would do if all was used up."""
    topic = names.topic()
    broker.create_topic(topic, partitions=8)
    value = b"x" * 1000
    broker.produce(topic, [(partition, None, value) for partition in STUCK for _ in range(2000)])
    fail, go_on = threading.Event(), threading.Event()

    def handler(event: Any, context: Any) -> Any:
        go_on.wait(60)
        return answer(event)

    def is_stuck(payload: bytes, name: str) -> bool:
        return fail.is_set() and any(of_partition(p)(payload, name) for p in STUCK)

    for name, text in environment().items():
        monkeypatch.setenv(name, text)
    # The four that will be stuck fill what is common; the others together do not.
    limits = RoundLimits(partition_bytes=400_000, common_bytes=1_500_000)
    with serve(handler, faults=[Fault(status=503, times=None, when=is_stuck)]) as server:
        options = {"topics": topic, "consumer_group": names.group(), "until": "forever"}
        config, _ = parse_arguments(arguments(broker, server, **options, batch_size=10))
        stop = threading.Event()
        rounds = Rounds(config, stop, limits=limits)
        invoker = rounds._invoker
        runner = threading.Thread(target=rounds.run)

        def held(partition: int) -> int:
            key = (topic, partition)
            read = rounds._reader.waiting(key)[1] if key in rounds._reader.partitions else 0
            return invoker.queue(key).bytes + read

        runner.start()
        try:
            wait_until(
                lambda: all(held(p) >= 400_000 for p in STUCK),
                "those that will be stuck hold little",
                60,
            )
            fail.set()
            go_on.set()
            wait_until(
                lambda: all(invoker.queue((topic, p)).stuck for p in STUCK), "nothing is stuck", 60
            )
            go_on.clear()
            broker.produce(topic, [(p, None, value) for p in HEALTHY for _ in range(150)])
            wait_until(
                lambda: all(invoker.queue((topic, p)).batches > 5 for p in HEALTHY),
                "the others get only what nobody can be refused",
                60,
            )
            assert all(held(p) >= 380_000 for p in STUCK)
        finally:
            stop.set()
            go_on.set()
            runner.join(60)
    assert not runner.is_alive()
