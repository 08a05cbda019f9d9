"""The soak of the benchmark in short: what it counts, not how fast it is."""

from __future__ import annotations

from pathlib import Path

from pipeline.local.broker import KafkaBroker
from tests.bench.soak import Load, run_on
from tests.conftest import Names


def test_everything_at_once_loses_nothing(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """Filtered rounds, lanes, aborted transactions, a function that fails now and then, and
    partitions that get stuck or halt: each record has one outcome, or is not committed."""
    load = Load(secs=6, partitions=12, stuck=2, halted=2, name=names.topic())
    broker.create_topic(load.name, load.partitions)
    broker.create_topic(load.responses, 4)
    result = run_on(broker, load, tmp_path)
    assert result.wrong == []
    assert result.written == result.answered + result.filtered + result.uncommitted
    assert result.filtered and result.uncommitted
    assert result.without.waits and result.beside.waits
