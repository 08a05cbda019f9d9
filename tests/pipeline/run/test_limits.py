"""Limits: what a partition may hold, and may hand over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.limits import (
    Held,
    PartitionLimits,
    RoundLimits,
    collect_secs,
    ease_secs,
    wait_secs,
)
from tests.examples import examples
from transforms.invoke.invoker import QueueView

LIMITS = PartitionLimits(bytes=400_000, records=1000, turn_records=100)
FULL = replace(LIMITS, full=True)
TURN_OF_700 = replace(LIMITS, records=1400, turn_records=700)


def _held(queued: int = 0, size: int = 0, read: int = 0, read_bytes: int = 0, **queue: Any) -> Held:
    """So many records handed over and read; bytes with what each record takes besides."""
    view = QueueView(1, queued, size - 200 * queued, **queue)
    return Held(view, read, read_bytes - 200 * read)


@pytest.mark.parametrize(
    ("limits", "held", "room"),
    [
        (LIMITS, _held(), (1000, 200_000)),
        (LIMITS, _held(900, 200_000), (100, 100_000)),
        # Less than a batch for each lane is not worth it.
        (LIMITS, _held(901, 200_000), (0, 0)),
        # Little room would cut batches short.
        (LIMITS, _held(100, 200_001), (0, 0)),
        # What has finished counts until it is written.
        (LIMITS, _held(100, 100_000, finished_bytes=100_001), (0, 0)),
        # What was only read does not: it is what there is to hand over.
        (LIMITS, _held(read=1000, read_bytes=400_000), (1000, 200_000)),
        (LIMITS, _held(halted=True), (0, 0)),
        # Two turns are possible, however large one is.
        (TURN_OF_700, _held(700, 200_000), (700, 100_000)),
        (TURN_OF_700, _held(701, 200_000), (0, 0)),
        # All together hold enough, or this one is stuck: two turns.
        (FULL, _held(), (200, 200_000)),
        (FULL, _held(100, 100_000), (100, 150_000)),
        (FULL, _held(101, 100_000), (0, 0)),
        (LIMITS, _held(100, 100_000, stuck=True), (100, 150_000)),
        (LIMITS, _held(101, 100_000, stuck=True), (0, 0)),
    ],
)
def test_what_a_partition_may_hand_over(limits, held, room) -> None:
    """Bounded by its own bound and by all together; a turn is a batch for each of its lanes."""
    assert limits.room(held) == room


@pytest.mark.parametrize(
    ("limits", "held", "ready", "paused", "wanted"),
    [
        (LIMITS, _held(), True, False, True),
        (LIMITS, _held(read=999, read_bytes=399_999), True, False, True),
        # Enough to hand over has been read.
        (LIMITS, _held(read=1000, read_bytes=200_000), True, False, False),
        (LIMITS, _held(read=100, read_bytes=400_000), True, False, False),
        # What was handed over counts too.
        (LIMITS, _held(100, 300_000, read=100, read_bytes=99_999), True, False, True),
        (LIMITS, _held(100, 300_000, read=100, read_bytes=100_000), True, False, False),
        # Once nothing is read any more, half of it has to go first.
        (LIMITS, _held(read=500, read_bytes=100_000), True, True, False),
        (LIMITS, _held(read=499, read_bytes=200_000), True, True, False),
        (LIMITS, _held(read=499, read_bytes=199_999), True, True, True),
        # Two turns, however large one is.
        (TURN_OF_700, _held(read=1399, read_bytes=399_999), True, False, True),
        (TURN_OF_700, _held(read=1400, read_bytes=399_999), True, False, False),
        # All together hold enough, or this one is stuck: two turns.
        (FULL, _held(read=199, read_bytes=100_000), True, False, True),
        (FULL, _held(read=200, read_bytes=100_000), True, False, False),
        (LIMITS, _held(read=200, read_bytes=100_000, stuck=True), True, False, False),
        # Not even a batch: it would wait for the rest of it, but not beyond its own bound.
        (FULL, _held(read=250, read_bytes=399_999), False, True, True),
        (FULL, _held(read=250, read_bytes=400_000), False, False, False),
        (LIMITS, _held(halted=True), False, False, False),
    ],
)
def test_of_which_more_is_read(limits, held, ready, paused, wanted) -> None:
    """What is held is bounded, and what is paused stays so for a while."""
    assert limits.wanted(held, ready, paused) is wanted


@pytest.mark.parametrize(
    ("limits", "records", "starving"),
    [
        (LIMITS, 0, True),
        (LIMITS, 500, True),
        (LIMITS, 501, False),
        (TURN_OF_700, 700, True),
        (TURN_OF_700, 701, False),
        (FULL, 100, True),
        (FULL, 101, False),
    ],
)
def test_when_a_partition_has_little_left(limits, records: int, starving: bool) -> None:
    """At half of what it may hold it is read for."""
    assert limits.starving(QueueView(1, records, 1)) == starving


sizes = st.integers(0, 2**27)
helds = st.builds(
    Held,
    st.builds(
        QueueView,
        batches=st.integers(0, 9),
        records=st.integers(0, 100_000),
        bytes=sizes,
        halted=st.booleans(),
        stuck=st.booleans(),
        finished_bytes=sizes,
    ),
    st.integers(0, 100_000),
    sizes,
)
turn_records = st.integers(1, 100_000)


@examples(300)
@given(st.lists(helds, min_size=1, max_size=40), turn_records, st.booleans())
def test_nobody_s_room_depends_on_who_is_stuck_or_halted(all_held, turn, ready) -> None:
    """What is held of those changes nothing for the others, however much it is."""
    limits = RoundLimits()
    others = [each for each in all_held if not (each.queue.stuck or each.queue.halted)]
    among = limits.among(all_held, turn)
    alone = limits.among([*others, *[Held()] * (len(all_held) - len(others))], turn)
    assert among == alone
    for each in all_held:
        if each.queue.halted:
            assert among.room(each) == (0, 0)
            assert not among.wanted(each, ready, False)


@examples(300)
@given(st.integers(1, 5000), st.lists(helds, max_size=20), turn_records)
def test_there_is_always_something_that_goes_on(partitions, some, turn) -> None:
    """A partition of which little is held gets two turns, whatever the others hold; one of which
    nothing can be read any more has something to hand over once its queue is worked off."""
    limits = RoundLimits().among([*some, *[Held()] * partitions], turn)
    records, size = limits.room(Held())
    assert records >= 2 * turn
    assert size >= 1
    assert limits.wanted(Held(), False, True)
    for each in some:
        worked_off = replace(each, queue=QueueView())
        if not limits.wanted(worked_off, False, False):
            assert limits.is_full(worked_off)
            assert all(limits.room(worked_off))


@examples(300)
@given(
    st.integers(1, 5000),
    st.lists(st.tuples(helds, st.booleans(), st.booleans()), max_size=20),
    turn_records,
)
def test_what_is_held_is_bounded_whatever_the_partitions_do(partitions, some, turn) -> None:
    """Nothing more is read of, or handed over for, a partition that has its part of it all."""
    rule = RoundLimits()
    held = [each for each, _, _ in some]
    limits = rule.among([*held, *[Held()] * partitions], turn)
    assert limits.bytes * (partitions + len(some)) <= rule.all_bytes
    for each, ready, paused in some:
        if limits.wanted(each, ready, paused):
            assert each.bytes < limits.bytes
        if limits.room(each)[1] > 1:
            assert each.handed_over + 2 * limits.room(each)[1] <= limits.bytes


@pytest.mark.parametrize(
    ("batches", "lanes", "usual_secs", "secs"),
    [
        # An eighth of what the one with the least is busy for.
        ([4, 400], 1, 0.02, 0.01),
        ([4, 400], 4, 0.02, 0.0025),
        # Who has nothing waits for records, not for batches.
        ([0, 4], 1, 0.02, 0.01),
        ([0], 1, 0.02, 0.0),
        ([], 1, 0.02, 0.0),
        # Never for long: others' results are to go on.
        ([400], 1, 0.02, 0.02),
        ([2], 1, 900.0, 0.02),
        # Nothing is known of the function.
        ([400], 1, 0.0, 0.0),
    ],
)
def test_how_long_batches_may_end_without_a_look(batches, lanes, usual_secs, secs) -> None:
    """Much under way: to look at each batch would take the interpreter from those that invoke."""
    queues = [QueueView(count, 100 * count) for count in batches]
    assert ease_secs(queues, lanes, usual_secs) == pytest.approx(secs)


@pytest.mark.parametrize(
    ("much", "round_secs", "secs"),
    [
        # Replies wait behind the work of a round, so rounds stay small however much one costs.
        (True, 0.0, 0.05),
        (True, 0.5, 0.05),
        # Little is under way: rounds take a fifth of the processor at most, up to a wait of 0.1 s.
        (False, 0.0, 0.0),
        (False, 0.001, 0.004),
        (False, 0.5, 0.1),
    ],
)
def test_what_has_finished_does_not_wait_long_for_more(much, round_secs, secs) -> None:
    assert collect_secs(much, round_secs) == pytest.approx(secs)


@pytest.mark.parametrize(
    ("pass_secs", "at_ease_secs", "has_ended", "quiet_secs", "secs"),
    [
        # Nothing is under way.
        (0.3, 0.0, False, None, 0.3),
        (9.0, 0.0, False, None, 0.5),
        (0.0, 0.0, False, None, 0.0),
        (-1.0, 0.01, True, 0.1, 0.0),
        # What is left of a wait that the client has cut short.
        (0.0004, 0.0, False, None, 0.001),
        # A batch that has ended is looked at, unless that has time.
        (0.3, 0.0, True, 0.1, 0.0),
        (0.3, 0.01, True, 0.1, 0.01),
        (0.3, 0.0004, True, 0.1, 0.001),
        (0.005, 0.01, True, 0.1, 0.005),
        # Calls are running: the longer nothing comes, the longer.
        (0.3, 0.0, False, 0.0, 0.001),
        (0.3, 0.0, False, 0.08, 0.01),
        (0.3, 0.0, False, 9.0, 0.02),
        (0.005, 0.0, False, 9.0, 0.005),
    ],
)
def test_how_long_the_loop_waits_for_records(
    pass_secs, at_ease_secs, has_ended, quiet_secs, secs
) -> None:
    """Never for so little that it would not wait at all, but look again and again."""
    assert wait_secs(pass_secs, at_ease_secs, has_ended, quiet_secs) == pytest.approx(secs)
