"""Commit: the mark of a partition never passes what is not done."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.commit import ContiguousOffsets
from transforms.records import Progress


def _range(start: int, next_offset: int, partition: int = 0) -> Progress:
    return Progress("t", partition, start, next_offset)


@pytest.mark.parametrize(
    ("ranges", "marks"),
    [
        ([(0, 5)], [5]),
        ([(0, 5), (5, 9)], [5, 9]),
        ([(7, 9), (9, 12)], [9, 12]),
        # One that waits for its predecessor, and more than one.
        ([(0, 5), (9, 12), (5, 9)], [5, None, 12]),
        ([(0, 1), (3, 4), (2, 3), (1, 2)], [1, None, None, 4]),
        # The same again, and ranges that overlap.
        ([(0, 5), (0, 5)], [5, None]),
        ([(0, 5), (3, 8)], [5, 8]),
        ([(0, 5), (6, 7), (3, 6)], [5, None, 7]),
        ([(0, 5), (6, 7), (6, 9), (5, 6)], [5, None, None, 9]),
        ([(0, 5), (6, 9), (6, 7), (5, 6)], [5, None, None, 9]),
        ([(4, 5), (0, 3)], [5, None]),
        # An empty one moves nothing.
        ([(3, 3), (3, 4)], [None, 4]),
    ],
)
def test_the_mark_moves_when_its_next_range_is_done(ranges, marks) -> None:
    """Each range moves the mark as far as there is no hole, and says so only if it moved."""
    offsets = ContiguousOffsets()
    assert [offsets.add(_range(*each)) for each in ranges] == marks


def test_partitions_have_their_own_marks() -> None:
    """What one partition misses does not hold back another."""
    offsets = ContiguousOffsets()
    assert offsets.add(_range(0, 5, partition=0)) == 5
    assert offsets.add(_range(3, 4, partition=1)) == 4
    assert offsets.add(_range(8, 9, partition=0)) is None
    assert offsets.add(_range(4, 9, partition=1)) == 9
    assert offsets.add(Progress("other", 0, 8, 9)) == 9
    assert offsets.add(_range(5, 8, partition=0)) == 9


def test_where_a_partition_begins_can_be_told() -> None:
    """Told where it begins, the first range to come is held back if it is not the first one."""
    offsets = ContiguousOffsets()
    assert offsets.add(_range(5, 9), begin=0) is None
    assert offsets.add(_range(0, 5), begin=0) == 9
    # Later on it is the mark that counts.
    assert offsets.add(_range(9, 10), begin=99) == 10


@given(
    borders=st.lists(st.integers(0, 300), min_size=2, max_size=20, unique=True).map(sorted),
    again=st.lists(st.integers(0, 100), max_size=5),
    shuffle=st.randoms(use_true_random=False),
    told=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_any_order_of_arrival_ends_at_the_end(borders, again, shuffle, told) -> None:
    """For any division and any order, the mark is the end of what is done without a hole."""
    ranges = list(itertools.pairwise(borders))
    arrivals = [*ranges, *(ranges[index % len(ranges)] for index in again)]
    if told:
        shuffle.shuffle(arrivals)
    else:
        # With nothing said, the first to come has to be the first one.
        rest = arrivals[1:]
        shuffle.shuffle(rest)
        arrivals = [arrivals[0], *rest]
    begin = borders[0] if told else None
    offsets, mark, arrived = ContiguousOffsets(), borders[0], set()
    for start, next_offset in arrivals:
        moved = offsets.add(_range(start, next_offset), begin)
        arrived.add((start, next_offset))
        done = borders[0]
        for each in ranges:
            if each not in arrived:
                break
            done = each[1]
        assert moved == (done if done > mark else None)
        mark = done
    assert mark == borders[-1]
