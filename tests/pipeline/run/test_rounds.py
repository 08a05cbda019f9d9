"""What the loop of the rounds decides of partitions that others have, as rules alone."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.rounds import not_done_elsewhere, parted
from transforms.records import PartitionKey

A, B, C = KEYS = (("t", 0), ("t", 1), ("t", 2))
SOME = st.frozensets(st.sampled_from(KEYS))


@pytest.mark.parametrize(
    ("taken", "given_now", "asked_for", "leaving", "lost", "going"),
    [
        ({A: 1, B: 2}, {A: 1, B: 2}, (), (), [], []),
        ({A: 1, B: 2}, {A: 1, B: 2}, (B,), (), [], [B]),
        # Taken away, and given anew: what was under way counts for nothing.
        ({A: 1, B: 2}, {A: 1}, (), (), [B], []),
        ({A: 1, B: 2}, {A: 1, B: 3}, (), (), [B], []),
        # Taken away while it is asked for.
        ({A: 1, B: 2}, {A: 1}, (B,), (B,), [B], []),
        # The request was taken back; its reading has ended, so it is seen off all the same.
        ({A: 1, B: 2}, {A: 1, B: 2}, (), (A,), [], [A]),
        # Asked for before it was taken.
        ({A: 1}, {A: 1, C: 1}, (C,), (), [], []),
    ],
)
def test_what_a_member_parts_with(
    taken: Mapping[PartitionKey, int],
    given_now: Mapping[PartitionKey, int],
    asked_for: tuple[PartitionKey, ...],
    leaving: tuple[PartitionKey, ...],
    lost: list[PartitionKey],
    going: list[PartitionKey],
) -> None:
    assert parted(taken, given_now, asked_for, leaving) == (lost, going)


@given(SOME, SOME, SOME)
def test_an_answer_says_nothing_of_partitions_it_was_not_asked_of(
    keys: frozenset[PartitionKey],
    asked_of: frozenset[PartitionKey],
    unfinished: frozenset[PartitionKey],
) -> None:
    """A partition counts as done only if it was asked of, and was not unfinished then."""
    found = not_done_elsewhere(keys, asked_of, unfinished)
    assert found <= keys
    assert keys - found == {key for key in keys if key in asked_of and key not in unfinished}
