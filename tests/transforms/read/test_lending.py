"""Lending: what is known of what was read ahead, whatever it was read in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transforms.read.lending import CHUNK_BYTES, CHUNK_RECORDS, Ahead, ReadAhead

LIMITS = ReadAhead(records=6400, bytes=64_000)
READ = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000)), max_size=60)


@given(READ, st.integers(0, 20_000))
def test_what_is_not_committed_counts_to_a_64th(read: list[tuple[int, int]], done: int) -> None:
    """Never too little, and at most one part too much."""
    ahead, position, kept = Ahead(LIMITS), 0, [0, 0]
    largest = [100, 1000]
    for records, size in read:
        position += records
        ahead.add(position, records, size)
        if position > done:
            kept = [kept[0] + records, kept[1] + size]
        largest = [max(largest[0], records), max(largest[1], size)]
    ahead.done(done)
    assert kept[0] <= ahead.records <= kept[0] + largest[0]
    assert kept[1] <= ahead.bytes <= kept[1] + largest[1]
    ahead.done(position)
    assert (ahead.parts, ahead.records, ahead.bytes) == (0, 0, 0)


def test_a_partition_that_is_read_record_by_record_takes_no_more() -> None:
    """A job of days on a quiet topic: nothing is let go of before the limit is reached."""
    ahead = Ahead(LIMITS)
    for position in range(1, LIMITS.records + 1):
        ahead.add(position, 1, 10)
    assert (ahead.records, ahead.bytes) == (LIMITS.records, 10 * LIMITS.records)
    assert ahead.parts <= 65


def test_what_was_read_before_a_restart_is_done_first() -> None:
    ahead = Ahead(LIMITS)
    ahead.add(501, 1, 10)
    ahead.add_before(500, 200, 2000)
    ahead.done(500)
    assert (ahead.records, ahead.bytes) == (1, 10)


def test_one_chunk_does_not_use_up_what_may_be_read_ahead() -> None:
    assert (ReadAhead().chunk_records, ReadAhead().chunk_bytes) == (CHUNK_RECORDS, CHUNK_BYTES)
    small = ReadAhead(records=1500, bytes=20_000)
    assert (small.chunk_records, small.chunk_bytes) == (150, 2000)
    assert ReadAhead(records=5).chunk_records == 1
