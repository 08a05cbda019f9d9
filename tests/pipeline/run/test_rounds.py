"""Rounds: how much a partition may hand over, and what running them must not cost."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.worker import statecache

from pipeline.run.rounds import RoundLimits
from transforms.batch.batch import BatchByPartition, BatchConfig
from transforms.batch.key import KeyByLane
from transforms.invoke.invoker import QueueView
from transforms.records import RecordChunk, Records

LIMITS = RoundLimits(queue_records=1000, queue_bytes=500, held_bytes=2000)


@pytest.mark.parametrize(
    ("queue", "held", "turn", "room"),
    [
        (QueueView(), 0, 100, (1000, 500)),
        (QueueView(1, 900, 100), 100, 100, (100, 400)),
        # Less than a batch for each lane is not worth it.
        (QueueView(1, 901, 100), 100, 100, (0, 0)),
        (QueueView(1, 100, 500), 500, 100, (0, 0)),
        (QueueView(halted=True), 0, 100, (0, 0)),
        # Two turns are possible, however large one is.
        (QueueView(1, 700, 100), 100, 700, (700, 400)),
        (QueueView(1, 701, 100), 100, 700, (0, 0)),
        # All together hold enough: a turn for those that have nothing.
        (QueueView(), 2000, 100, (100, 500)),
        (QueueView(1, 1, 1), 2000, 100, (0, 0)),
    ],
)
def test_what_a_partition_may_hand_over(queue, held, turn, room) -> None:
    """Bounded by its own queue and by all together; a turn is a batch for each of its lanes."""
    assert LIMITS.room(queue, held, turn) == room


@pytest.mark.parametrize(
    ("records", "size", "held", "ready", "turn", "wanted"),
    [
        (0, 0, 0, False, 100, True),
        (999, 499, 499, True, 100, True),
        # Enough to hand over has been read.
        (1000, 100, 100, True, 100, False),
        (100, 500, 500, True, 100, False),
        # Two turns, however large one is.
        (1399, 100, 100, True, 700, True),
        (1400, 100, 100, True, 700, False),
        # All together hold enough.
        (1, 1, 2000, True, 100, False),
        # Not even a batch: it would wait for the rest of it.
        (99, 99, 2000, False, 100, True),
        (40, 600, 600, False, 100, True),
    ],
)
def test_of_which_more_is_read(records, size, held, ready, turn, wanted) -> None:
    """What is read and not handed over is bounded like what is handed over."""
    assert LIMITS.wanted(records, size, held, ready, turn) is wanted


@pytest.mark.parametrize(
    ("records", "turn", "starving"),
    [(0, 100, True), (500, 100, True), (501, 100, False), (700, 700, True), (701, 700, False)],
)
def test_when_a_partition_has_little_left(records: int, turn: int, starving: bool) -> None:
    """At half of what it may hold it is read for."""
    assert LIMITS.starving(QueueView(1, records, 1), turn) == starving


def test_beam_s_state_is_not_weighed_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam's cache of state goes through all modules for each value that it takes in."""

    def weigh(*_: object) -> int:
        raise AssertionError("a value of state was weighed")

    monkeypatch.setattr(statecache, "get_deep_size", weigh)
    records = Records([0], [1], [None], [b"v"], [None])
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    _ = (
        pipeline
        | beam.Create([RecordChunk("t", 0, 0, 1, records)])
        | KeyByLane()
        | BatchByPartition(BatchConfig())
    )
    pipeline.run().wait_until_finish()
