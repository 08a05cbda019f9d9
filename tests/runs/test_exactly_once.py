"""Whole runs with --delivery=exactly_once: who reads committed records sees each outcome once."""

from __future__ import annotations

from pathlib import Path

from pipeline.local.broker import KafkaBroker
from tests.conftest import Names
from tests.sink import TRANSACTIONS, Topics, poison, serve


def test_outcomes_and_offsets_are_written_together(broker: KafkaBroker, names: Names) -> None:
    topics = Topics(
        broker,
        names,
        partitions=2,
        count=500,
        delivery="exactly_once",
        batch_size=10,
        kafka_config_file=TRANSACTIONS,
    )
    with serve(poison("order 1/77")) as server:
        ended = topics.run(server, bisect_on_error=True, **topics.log_errors)
    topics.assert_exactly_once()
    topics.assert_caught_up()
    assert ended.summary["responses"] == 999
