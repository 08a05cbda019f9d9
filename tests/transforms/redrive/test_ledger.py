"""Ledger: what is remembered, and that nothing is redriven twice or lost."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.error_records import error_record, original
from tests.examples import examples
from transforms.lanes import Lanes
from transforms.original import encode_originals
from transforms.records import Progress, Records
from transforms.redrive.ledger import Ledger, Redriven
from transforms.redrive.selection import read_originals

# -- what is remembered ----------------------------------------------------------------------------


def _look(redriven: Redriven, offsets: Iterable[int], next_offset: int) -> None:
    """Take all error records that were not redriven before."""
    for offset in offsets:
        if offset not in redriven:
            redriven.take(offset)
    redriven.look(next_offset)


@pytest.mark.parametrize(
    ("read", "done", "mark", "behind"),
    [
        ([], [], 5, []),
        ([5, 6, 7], [], 5, []),
        ([5, 6, 7], [5], 6, []),
        ([5, 6, 7], [5, 6, 7], 8, []),
        ([5, 6, 7], [6], 5, [6]),
        ([5, 6, 7], [5, 7], 6, [7]),
        ([6, 9], [6], 9, []),
        ([6, 9], [9], 6, [9]),
    ],
)
def test_the_mark_is_the_first_that_is_not_redriven(
    read: list[int], done: list[int], mark: int, behind: list[int]
) -> None:
    """What is redriven behind it is remembered; offsets without a record are no obstacle."""
    redriven = Redriven(5)
    _look(redriven, read, max([4, *read]) + 1)
    for offset in done:
        redriven.add(offset)
    committed = redriven.commit()
    assert committed[0] == mark
    assert bool(committed[1]) == bool(behind)
    again = Redriven(*committed)
    assert [offset for offset in range(20) if offset in again] == behind


def test_what_is_skipped_does_not_count_as_redriven() -> None:
    """With --since what is older is not even read; a later redrive finds it."""
    redriven = Redriven(0)
    redriven.skip(100)
    _look(redriven, [100, 101], 102)
    redriven.add(100)
    mark, metadata = redriven.commit()
    assert mark == 0
    again = Redriven(mark, metadata)
    assert 100 in again and 0 not in again and 101 not in again
    _look(again, range(102), 102)
    for offset in range(102):
        again.add(offset)
    assert again.commit() == (102, "")


def test_what_retention_deletes_is_passed_over() -> None:
    """What is remembered of the rest stays."""
    redriven = Redriven(0)
    _look(redriven, range(20), 20)
    redriven.add(3)
    redriven.add(15)
    again = Redriven(*redriven.commit(), first=10)
    assert again.position == 10 and 15 in again
    _look(again, range(10, 20), 20)
    assert again.commit()[0] == 10
    for offset in range(10, 20):
        again.add(offset)
    assert again.commit() == (20, "")


def test_metadata_of_somebody_else_is_refused() -> None:
    """To go on would take their mark for ours."""
    for metadata in ("x", "redriven:1:!", "redriven:1:eA==", "redriven:1:" + "A" * 7):
        with pytest.raises(ValueError):
            Redriven(0, metadata)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 29)), st.booleans()), max_size=6)
)
def test_whatever_is_selected_none_comes_twice_and_none_is_lost(
    runs: list[tuple[int, list[int], bool]],
) -> None:
    """Run after run reads on from the mark, takes some, and crashes or commits."""
    end = 0
    committed = (0, "")
    known: set[int] = set()
    for more, wanted, crashes in runs:
        end += more
        redriven = Redriven(*committed)
        assert {offset for offset in range(end) if offset in redriven} | set(
            range(committed[0])
        ) == known
        offsets = range(redriven.position, end)
        taken = {o for o in offsets if o % 30 in wanted and o not in redriven}
        assert not taken & known
        for offset in offsets:
            if offset in taken:
                redriven.take(offset)
            elif offset not in redriven:
                redriven.leave(offset)
        redriven.look(end)
        for offset in taken:
            redriven.add(offset)
        if not crashes:
            committed = redriven.commit()
            known |= taken


def test_what_is_remembered_is_short() -> None:
    """Long runs cost next to nothing, and some thousand single ones still fit."""
    redriven = Redriven(0)
    _look(redriven, range(1_000_000), 1_000_000)
    for offset in range(500_000, 1_000_000):
        redriven.add(offset)
    assert len(redriven.commit()[1]) < 400
    single = Redriven(0)
    _look(single, range(20_000), 20_000)
    for offset in random.Random(0).sample(range(1, 20_000), 2000):
        single.add(offset)
    assert len(single.commit()[1]) < 3500


# -- the ledger ------------------------------------------------------------------------------------


def ledger(lanes: int = 1, partitions: int = 1) -> Ledger:
    made = Ledger(Lanes(lanes))
    for partition in range(partitions):
        made.partitions[partition] = Redriven(0)
        _look(made.partitions[partition], range(100), 100)
    return made


def finish(made: Ledger, start: int, next_offset: int, partition: int = 0, lane: int = 0) -> None:
    made.finish(Progress("orders", partition, start, next_offset, lane))


def done(made: Ledger, partition: int = 0) -> list[int]:
    return [offset for offset in range(100) if offset in made.partitions[partition]]


def test_an_error_record_is_redriven_when_all_its_originals_are() -> None:
    """Not when some of them are."""
    made = ledger()
    originals = [original(3), original(4), original(8)]
    assert made.begin([(error_record(0), originals)]) == 3
    (chunk,) = made.take()
    assert list(chunk.records.offsets) == [3, 4, 8]
    assert made.take() == []
    finish(made, 3, 8)
    assert done(made) == []
    finish(made, 8, 9)
    assert done(made) == [0]


def test_an_original_is_sent_once_in_a_run() -> None:
    """However many error records hold it; they all count as redriven by it."""
    made = ledger()
    window = [
        (error_record(0), [original(3)]),
        (error_record(1), [original(3), original(4)]),
    ]
    assert made.begin(window) == 2
    finish(made, 3, 5)
    assert done(made) == [0, 1]
    assert made.begin([(error_record(2), [original(4)])]) == 0
    assert done(made) == [0, 1, 2]


def test_a_range_does_not_finish_what_was_sent_later() -> None:
    """An older record of the same partition, found further on in the error topic."""
    made = ledger()
    made.begin([(error_record(0), [original(10), original(20)])])
    finish(made, 10, 21)
    made.begin([(error_record(1), [original(15)])])
    assert done(made) == [0]
    finish(made, 15, 16)
    assert done(made) == [0, 1]


def test_what_a_halted_partition_leaves_is_not_redriven() -> None:
    """Neither the record that stopped it nor those behind it, found in another window or not."""
    made = ledger()
    made.begin([(error_record(0), [original(1)]), (error_record(1), [original(2)])])
    finish(made, 1, 2)
    made.begin([(error_record(2), [original(2)]), (error_record(3), [original(5)])])
    assert done(made) == [0]
    assert made.partitions[0].commit() == (1, "")


def test_originals_are_grouped_by_where_they_came_from() -> None:
    """Each partition's in offset order, whatever the order of the error records."""
    made = ledger(partitions=2)
    window = [
        (error_record(0), [original(9, partition=1)]),
        (error_record(0, partition=1), [original(5), original(6)]),
        (error_record(1), [original(2, partition=1)]),
    ]
    made.begin(window)
    chunks = {chunk.partition: list(chunk.records.offsets) for chunk in made.take()}
    assert chunks == {0: [5, 6], 1: [2, 9]}
    finish(made, 5, 7, partition=0)
    assert (done(made, 0), done(made, 1)) == ([], [0])


def test_lanes_finish_on_their_own() -> None:
    """Their ranges overlap; each finishes the records of its lane."""
    made = ledger(lanes=4)
    keys = [b"a", b"b", b"c", b"d", b"e"]
    originals = [original(offset, key=key) for offset, key in enumerate(keys)]
    made.begin([(error_record(n), [each]) for n, each in enumerate(originals)])
    chunks = made.take()
    assert len({chunk.lane for chunk in chunks}) == len(chunks) == 4
    for chunk in chunks:
        assert chunk.lane is not None
        before = set(done(made))
        finish(made, 0, 5, lane=chunk.lane)
        assert set(done(made)) - before == set(chunk.records.offsets)
    assert done(made) == [0, 1, 2, 3, 4]


def test_more_than_can_be_remembered_is_not_begun() -> None:
    """To redrive what cannot be remembered would be to redrive it twice."""
    made = ledger()
    _look(made.partitions[0], range(400_000), 400_000)
    chosen = sorted(random.Random(0).sample(range(1, 400_000), 10_000))
    assert not made.has_room_for(map(error_record, chosen))
    assert made.has_room_for(map(error_record, range(400_000)))


_VALID = encode_originals("orders", 0, Records([7], [1], [b"k"], [b"v"], [[("h", None)]]))[0]


@given(
    found=st.lists(
        st.lists(
            st.binary(max_size=60)
            | st.just(_VALID)
            | st.tuples(st.integers(0, len(_VALID) - 1), st.binary(min_size=1, max_size=3)).map(
                lambda edit: _VALID[: edit[0]] + edit[1] + _VALID[edit[0] + 1 :]
            ),
            max_size=4,
        ),
        max_size=6,
    ),
    finish=st.booleans(),
)
@examples(50)
def test_error_records_of_any_bytes_end_or_are_passed_over(found, finish) -> None:
    """None raises, and nothing is committed past one whose originals have come to no end."""
    ledger = Ledger()
    redriven = ledger.partitions[0] = Redriven(0)
    taken = []
    for offset, originals in enumerate(found):
        record = error_record(offset, originals=tuple(originals))
        if (read := read_originals(record)) is not None:
            redriven.take(offset)
            taken.append((record, read))
    redriven.look(len(found))
    ledger.begin(taken)
    chunks = ledger.take()
    if finish:
        for chunk in chunks:
            part = (chunk.topic, chunk.partition, chunk.start, chunk.next_offset, chunk.lane or 0)
            ledger.finish(Progress(*part))
    first = len(found) if finish or not taken else taken[0][0].offset
    assert redriven.commit()[0] == first
