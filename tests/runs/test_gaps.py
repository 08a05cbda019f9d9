"""Whole runs in which offsets without a record come behind a call that is running.

A filter, lanes and aborted transactions make them: rounds that hand over a range and no record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from tests.conftest import Names
from tests.runs.test_lanes import assert_lanes_in_order
from tests.sink import answer, assert_exactly_once, invocations, serve, start
from transforms.lanes import Lanes

STEPS = 8
# A call takes as long as some rounds, so that what they hand over piles up behind it.
CALL_SECS, STEP_SECS = 0.6, 0.2

Write = Callable[[KafkaBroker, str, int], None]


def _slow(event: Any, context: Any) -> Any:
    time.sleep(CALL_SECS)
    return answer(event)


def _filtered(broker: KafkaBroker, topic: str, step: int) -> None:
    value = b'{"status":"%s"}' % (b"new" if step % 2 else b"paid")
    broker.produce(topic, [NewRecord(0, None, value)] * 3)


def _keys_in_bursts(broker: KafkaBroker, topic: str, step: int) -> None:
    broker.produce(topic, [NewRecord(0, b"key %d" % (step % 3), b"v")] * 3)


def _aborted(broker: KafkaBroker, topic: str, step: int) -> None:
    how = "abort" if step % 2 else "commit"
    broker.produce(topic, [NewRecord(0, None, b"v")] * 3, transaction=how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (_filtered, {"filter_criteria": "filters.json", "parallelization_factor": 4}),
        (_keys_in_bursts, {"parallelization_factor": 4}),
        (_aborted, {}),
    ],
    ids=["filter and lanes", "lanes", "aborted"],
)
def test_ranges_without_a_record_behind_a_running_call(
    broker: KafkaBroker, names: Names, tmp_path: Path, write: Write, options: dict[str, Any]
) -> None:
    """Each record ends in its place, and what is behind the gaps is committed."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1)
    broker.create_topic(responses, partitions=1)
    if "filter_criteria" in options:
        filters = tmp_path / "filters.json"
        pattern = json.dumps({"value": {"status": ["paid"]}})
        filters.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
        options = options | {"filter_criteria": filters}
    with (
        serve(_slow) as server,
        start(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            batch_size=2,
            batch_window_secs=0,
            until="forever",
            **options,
        ) as sink,
    ):
        for step in range(STEPS):
            write(broker, topic, step)
            time.sleep(STEP_SECS)
        last = broker.end_offsets(topic)[0]
        write(broker, topic, 0)
        sink.until(lambda: broker.committed(names.group(), topic).get(0, 0) > last, "not committed")
        sink.process.terminate()
        sink.wait()
        calls = invocations(server)

    records = broker.read_all(topic)
    filtered = {
        (topic, 0, record.offset) for record in records if record.value == b'{"status":"new"}'
    }
    assert_exactly_once(broker, names.group(), [topic], responses, elsewhere=filtered)
    if write is _keys_in_bursts:
        keys = {(topic, 0): [record.key for record in records]}
        assert_lanes_in_order(calls, keys, Lanes(4, run=2))
