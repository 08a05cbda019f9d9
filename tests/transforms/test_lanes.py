"""Lanes: which one a record goes to, and that the lanes of a chunk, keyed, are the chunk."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from transforms.batch.key import KeyByLane
from transforms.lanes import Lanes
from transforms.records import RecordChunk, Records

keys = st.one_of(st.none(), st.binary(max_size=6))
columns = st.lists(keys, max_size=40)


def _chunk(columns: list[bytes | None], start: int = 0) -> RecordChunk:
    offsets = list(range(start, start + 2 * len(columns), 2))
    values = [b"%d" % offset for offset in offsets]
    records = Records(offsets, offsets, columns, values, [None] * len(columns))
    return RecordChunk("t", 3, start, start + 2 * len(columns) + 1, records)


# -- which lane ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "lane"),
    [(b"", 0), (b"a", 9), (b"customer-7", 0), (b"\xff\x00", 8), ("über".encode(), 8)],
)
def test_a_key_has_its_lane_for_ever(key: bytes, lane: int) -> None:
    """Written down, since a lane that moved would put a key's records out of order."""
    assert Lanes(10).of([key], [123]) == [lane]


def test_a_lane_is_the_same_in_every_process() -> None:
    """Python's own hash of bytes differs from process to process; this one must not."""
    code = (
        "from transforms.batch.key import Lanes; print(Lanes(7).of([b'a', b'b', b'cc'], [1, 2, 3]))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert printed == {f"{Lanes(7).of([b'a', b'b', b'cc'], [1, 2, 3])}\n"}


@given(column=columns, count=st.integers(1, 10), run=st.integers(1, 9), again=st.integers(0, 99))
def test_a_lane_depends_on_the_key_alone(column, count, run, again) -> None:
    """Wherever a key stands and whatever is around it; without a key it is the offset."""
    lanes = Lanes(count, run)
    offsets = range(again, again + len(column))
    found = lanes.of(column, offsets)
    assert all(0 <= lane < count for lane in found)
    for key, offset, lane in zip(column, offsets, found):
        assert lanes.of([key], [offset]) == [lane]
        if key is not None:
            assert lanes.of([key], [again]) == [lane]


def test_records_without_a_key_take_turns_in_runs() -> None:
    """A batch's worth goes to one lane, the next to the one after it."""
    assert Lanes(3, run=2).of([None] * 8, range(8)) == [0, 0, 1, 1, 2, 2, 0, 0]
    assert Lanes(3).of([None] * 4, range(4)) == [0, 1, 2, 0]


@pytest.mark.parametrize("partitions", [1, 2, 3, 4, 5, 10, 12, 20, 64])
@pytest.mark.parametrize("count", [2, 4, 5, 10])
@pytest.mark.parametrize("template", [b"key-%d", b"%d", b"%08d", b'{"id":%d}'])
def test_lanes_are_even_whatever_chose_the_partition(partitions, count, template) -> None:
    """librdkafka's producers choose a partition by the same checksum modulo their number.

    A lane that were that modulo the number of lanes would leave most of them empty.
    """
    chosen = [
        key
        for key in (template % number for number in range(2000 * partitions))
        if zlib.crc32(key) % partitions == partitions - 1
    ]
    sizes = Counter(Lanes(count).of(chosen, range(len(chosen))))
    assert len(chosen) > 1500
    fair = len(chosen) / count
    assert set(sizes) == set(range(count))
    assert all(0.7 * fair < size < 1.3 * fair for size in sizes.values()), sizes


# -- where lanes go on --------------------------------------------------------------------


@given(
    marks=st.lists(st.integers(0, 10**15), min_size=1, max_size=10),
    run=st.integers(1, 10_000),
    end=st.integers(0, 10**15),
)
def test_a_note_brings_back_where_each_lane_was(marks, run, end) -> None:
    """Beside the lowest of them, and within what Kafka keeps; no note where none is needed."""
    lanes, lowest = Lanes(len(marks), run), min(marks)
    note = lanes.note(marks)
    assert len(note) < 4096
    assert bool(note) == (set(marks) != {lowest})
    assert lanes.marks(note, lowest, max(marks)) == marks
    behind = [lowest] * len(marks)
    assert lanes.marks(note, lowest, end) == (marks if max(marks) <= end else behind)
    # Divided otherwise, a lane's records are others.
    for other in (Lanes(len(marks) + 1, run), Lanes(len(marks), run + 1)):
        assert set(other.marks(note, lowest, max(marks))) == {lowest}


@pytest.mark.parametrize(
    "note",
    [
        "",
        "lanes/2",
        "lanes/2 2 7 100 ",
        "lanes/2 2 7 100 5",
        "lanes/2 2 7 100 5,x",
        "lanes/2 2 7 100 5,-1",
        "lanes/2 2 7 100 0,5,5",
        "lanes/2 2 7 0,5",
        "{}",
    ],
)
def test_a_note_that_is_none_of_ours_says_nothing(note: str) -> None:
    """Other programs may keep what they like there."""
    assert Lanes(2, run=7).marks(note, 100, 999) == [100, 100]
    assert Lanes(2, run=7).marks("lanes/2 2 7 100 0,5", 100, 999) == [100, 105]
    # Notes of before did not say beside which offset they were written.
    assert Lanes(2, run=7).marks("lanes/1 2 7 0,5", 100, 999) == [100, 100]


@given(
    ahead=st.lists(st.integers(0, 500), min_size=2, max_size=10),
    written=st.integers(0, 10_000),
    found=st.integers(0, 10_000),
)
def test_a_note_counts_only_beside_the_offset_it_was_written_for(ahead, written, found) -> None:
    """Who copies offsets to another cluster translates them, and copies the notes as they are."""
    lanes = Lanes(len(ahead), run=7)
    marks = [written + each for each in ahead]
    lowest = min(marks)
    there = lanes.marks(lanes.note(marks), found, 20_000)
    assert there == (marks if found == lowest else [found] * len(ahead))


# -- dividing a chunk ---------------------------------------------------------------------


def test_with_one_lane_a_chunk_passes_as_it_is() -> None:
    """No record is looked at."""
    chunk = _chunk([b"a", None])
    assert list(Lanes().split(chunk)) == [replace(chunk, lane=0)]


def test_a_divided_chunk_passes_as_it_is() -> None:
    """The reader of rounds divides for itself."""
    chunk = replace(_chunk([b"a", None]), lane=4)
    assert list(Lanes(10).split(chunk)) == [chunk]


@given(column=columns, count=st.integers(2, 10), first=st.booleans())
def test_the_lanes_of_a_chunk_are_the_chunk(column, count, first) -> None:
    """Each lane over the same range, each record in one of them, in order; a key in one only."""
    chunk = replace(_chunk(column, 10), first=first)
    parts = list(Lanes(count).split(chunk))
    assert [part.lane for part in parts] == list(range(count))
    for part in parts:
        assert (part.topic, part.partition) == ("t", 3)
        assert (part.start, part.next_offset, part.first) == (10, chunk.next_offset, first)
        offsets = list(part.records.offsets)
        assert offsets == sorted(offsets)
    rows = sorted(row for part in parts for row in zip(part.records.offsets, part.records.values))
    assert rows == list(zip(chunk.records.offsets, chunk.records.values))
    homes: dict[bytes, set[int | None]] = {}
    for part in parts:
        for key in part.records.keys:
            if key is not None:
                homes.setdefault(key, set()).add(part.lane)
    assert all(len(lanes) == 1 for lanes in homes.values())


def test_chunks_are_keyed_by_lane() -> None:
    """The key is the place and the lane, whether the chunk was divided or is now."""
    chunk = _chunk([b"a", b"b", None])
    divided = replace(chunk, lane=7)
    expected = [(part.lane_key, part) for part in Lanes(3).split(chunk)]
    expected.append((("t", 3, 7), divided))
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([])) as pipeline:
        found = pipeline | beam.Create([chunk, divided]) | KeyByLane(Lanes(3))
        assert_that(found, equal_to(expected))
