"""What a run takes of memory, whatever waits in the topics."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow
from tests.conftest import Names
from tests.sink import serve, start


def _peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


@pytest.mark.slow
def test_a_backlog_is_not_read_into_memory(broker: KafkaBroker, names: Names) -> None:
    """A function that is slower than Kafka leaves the records where they are: 1,000,000 of them."""
    topic = names.topic()
    broker.create_topic(topic, partitions=4)
    records = [(number % 4, None, b"x" * 100) for number in range(100_000)]
    for _ in range(10):
        broker.produce(topic, records)
    with (
        serve(faults=[slow(0.2, times=None)]) as server,
        start(broker, server, topics=topic, consumer_group=names.group(), until="forever") as sink,
    ):
        sink.until(lambda: len(server.calls) > 12, "no calls")
        time.sleep(10)
        peak_mb = _peak_mb(sink.process.pid)
    # 250 before the first record. All records would be 400 more.
    assert peak_mb < 450
