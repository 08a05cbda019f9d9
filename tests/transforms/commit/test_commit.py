"""Commit: the mark of a partition never passes what is not done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.commit.commit import _Partition, merged, pack, unpack
from transforms.commit.committer import CommitConfig, Committer
from transforms.commit.contiguous import ContiguousOffsets
from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig
from transforms.kafka.committer import GroupOffsets, final_problem
from transforms.kafka.offsets import SourceConfig
from transforms.records import (
    EVERY_LANE,
    HALT_NOTE,
    Failure,
    Finished,
    Progress,
    Records,
    halt_name,
    read_halt,
)


def _range(start: int, next_offset: int, partition: int = 0, lane: int = 0) -> Progress:
    return Progress("t", partition, start, next_offset, lane)


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
    offsets.begin(("t", 0), [ranges[0][0]])
    assert [offsets.add(_range(*each)) for each in ranges] == marks


def test_partitions_have_their_own_marks() -> None:
    """What one partition misses does not hold back another."""
    offsets = ContiguousOffsets()
    for key, start in {("t", 0): 0, ("t", 1): 3, ("other", 0): 8}.items():
        offsets.begin(key, [start])
    assert offsets.add(_range(0, 5, partition=0)) == 5
    assert offsets.add(_range(3, 4, partition=1)) == 4
    assert offsets.add(_range(8, 9, partition=0)) is None
    assert offsets.add(_range(4, 9, partition=1)) == 9
    assert offsets.add(Progress("other", 0, 8, 9)) == 9
    assert offsets.add(_range(5, 8, partition=0)) == 9


def test_nothing_is_done_of_a_partition_until_it_is_known_where_it_begins() -> None:
    """Whatever is heard of it before is held, and counts from then on."""
    offsets = ContiguousOffsets()
    assert offsets.add(_range(5, 9)) is None
    assert offsets.add(_range(2, 4)) is None
    assert not offsets.marks(("t", 0))
    offsets.begin(("t", 0), [2])
    assert offsets.marks(("t", 0)) == [4]
    assert offsets.add(_range(4, 5)) == 9


@given(
    borders=st.lists(st.integers(0, 300), min_size=2, max_size=20, unique=True).map(sorted),
    again=st.lists(st.integers(0, 100), max_size=5),
    shuffle=st.randoms(use_true_random=False),
    told_after=st.integers(0, 30),
)
@settings(deadline=None, max_examples=300)
def test_any_order_of_arrival_ends_at_the_end(borders, again, shuffle, told_after) -> None:
    """For any division and any order, the mark is the end of what is done without a hole, from
    the moment on at which it is said where the partition begins."""
    ranges = list(itertools.pairwise(borders))
    arrivals = [*ranges, *(ranges[index % len(ranges)] for index in again)]
    shuffle.shuffle(arrivals)
    offsets, key, mark, arrived = ContiguousOffsets(), ("t", 0), borders[0], set()
    for number, (start, next_offset) in enumerate(arrivals):
        if number == told_after:
            offsets.begin(key, [borders[0]])
            mark = min(offsets.marks(key))
        moved = offsets.add(_range(start, next_offset))
        arrived.add((start, next_offset))
        done = borders[0]
        for each in ranges:
            if each not in arrived:
                break
            done = each[1]
        if number < told_after:
            assert moved is None and not offsets.marks(key)
        else:
            assert moved == (done if done > mark else None)
            mark = done
    if told_after >= len(arrivals):
        offsets.begin(key, [borders[0]])
    assert offsets.marks(key) == [borders[-1]]


# -- lanes --------------------------------------------------------------------------------


def test_the_mark_is_the_lowest_of_the_lanes() -> None:
    """A lane that is ahead moves nothing, and one of which nothing was heard holds all back."""
    offsets = ContiguousOffsets()
    offsets.begin(("t", 0), [10, 10, 10])
    assert offsets.add(_range(10, 50, lane=1)) is None
    assert offsets.add(_range(10, 30, lane=0)) is None
    assert offsets.add(_range(10, 20, lane=2)) == 20
    assert offsets.add(_range(20, 90, lane=2)) == 30
    assert offsets.add(_range(40, 60, lane=0)) is None
    assert offsets.add(_range(30, 40, lane=0)) == 50
    assert offsets.add(_range(10, 20, lane=2)) is None


def test_partitions_with_lanes_have_their_own_marks() -> None:
    """The same lane of another partition is another lane."""
    offsets = ContiguousOffsets()
    for partition in (0, 1):
        offsets.begin(("t", partition), [0, 0])
    assert offsets.add(_range(0, 9, partition=0, lane=0)) is None
    assert offsets.add(_range(0, 9, partition=1, lane=1)) is None
    assert offsets.add(_range(0, 5, partition=1, lane=0)) == 5
    assert offsets.add(_range(0, 4, partition=0, lane=1)) == 4


def test_lanes_may_begin_at_different_offsets() -> None:
    """As an earlier run left them; the partition is done up to the one that is behind."""
    offsets = ContiguousOffsets()
    offsets.begin(("t", 0), [40, 10, 25])
    assert offsets.add(_range(10, 30, lane=1)) == 25
    assert offsets.add(_range(40, 50, lane=0)) is None
    assert offsets.add(_range(25, 60, lane=2)) == 30
    assert offsets.marks(("t", 0)) == [50, 30, 60]


@given(
    # Per lane the borders of its ranges behind the common beginning.
    lanes=st.lists(
        st.lists(st.integers(1, 200), max_size=8, unique=True).map(sorted), min_size=1, max_size=6
    ),
    shuffle=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=300)
def test_the_mark_never_passes_what_a_lane_has_not_done(lanes, shuffle) -> None:
    """In any order of arrival: all below the mark is done in each lane, and no more could be."""
    borders = [[0, *ends] for ends in lanes]
    arrivals = [
        _range(*pair, lane=lane)
        for lane, ends in enumerate(borders)
        for pair in itertools.pairwise(ends)
    ]
    shuffle.shuffle(arrivals)
    offsets, mark = ContiguousOffsets(), 0
    offsets.begin(("t", 0), [0] * len(lanes))
    done: list[set[int]] = [set() for _ in lanes]
    for progress in arrivals:
        moved = offsets.add(progress)
        done[progress.lane] |= set(range(progress.start, progress.next_offset))
        lowest = min(
            next(offset for offset in itertools.count() if offset not in each) for each in done
        )
        assert moved == (lowest if lowest > mark else None)
        mark = lowest


# -- halts --------------------------------------------------------------------------------


def _halted(topic: str, error_type: str = "ValueError") -> Finished:
    records = Records([41], [1], [None], [b"secret"], [None])
    failure = Failure(records, (), "RetryAttemptsExhausted", error_type, "why", 1, 200, "Unhandled")
    return Finished(topic, 3, 30, 41, halted=failure)


@pytest.mark.parametrize("error_type", ["ValueError", "a|b", "x" * 9000])
def test_a_halt_can_be_read_from_what_is_kept_with_the_offset(error_type: str) -> None:
    """Kafka keeps up to 4 KB."""
    note = HALT_NOTE + halt_name(_halted("t" * 249, error_type))
    assert len(note) < 4096
    assert "secret" not in note
    halt = read_halt(note)
    assert halt and halt.halted
    assert halt.key == ("t" * 249, 3)
    assert list(halt.halted.records.offsets) == [41]
    assert halt.halted.condition == "RetryAttemptsExhausted"
    assert error_type.startswith(halt.halted.error_type)


@pytest.mark.parametrize("note", ["", "lanes 4 100 1,2", "halted", "halted by hand", HALT_NOTE])
def test_other_notes_are_no_halts(note: str) -> None:
    assert read_halt(note) is None


def test_what_is_not_halted_has_no_name() -> None:
    assert halt_name(Finished("t", 0, 1, 2)) == ""


# -- commits that fail ----------------------------------------------------------------------

KAFKA = KafkaConfig("broker-1:9092", "group")
FOREIGN = "--consumer_group=group cannot be committed: the group has active members"
REFUSED = "--consumer_group=group cannot be committed to Kafka at broker-1:9092: "


@pytest.mark.parametrize(
    ("code", "at_once", "late"),
    [
        # Another consumer has the group: waiting changes nothing.
        (ErrorCode.UNKNOWN_MEMBER_ID, FOREIGN, FOREIGN),
        (ErrorCode.ILLEGAL_GENERATION, FOREIGN, FOREIGN),
        (ErrorCode.REBALANCE_IN_PROGRESS, FOREIGN, FOREIGN),
        (ErrorCode.GROUP_AUTHORIZATION_FAILED, REFUSED, REFUSED),
        # All others may pass, and are waited for as long as a commit is repeated.
        (ErrorCode.TOPIC_AUTHORIZATION_FAILED, None, REFUSED),
        (ErrorCode.NOT_COORDINATOR, None, REFUSED),
        (ErrorCode.COORDINATOR_NOT_AVAILABLE, None, REFUSED),
        (ErrorCode.COORDINATOR_LOAD_IN_PROGRESS, None, REFUSED),
        (ErrorCode.OFFSET_METADATA_TOO_LARGE, None, REFUSED),
        (ErrorCode.UNKNOWN_TOPIC_OR_PART, None, REFUSED),
        (ErrorCode.REQUEST_TIMED_OUT, None, REFUSED),
        (ErrorCode._TRANSPORT, None, REFUSED),
        (ErrorCode._TIMED_OUT, None, REFUSED),
    ],
)
def test_which_failures_of_a_commit_end_the_run(
    code: int, at_once: str | None, late: str | None
) -> None:
    error = KafkaException(ErrorCode(code))
    for is_late, expected in ((False, at_once), (True, late)):
        problem = final_problem(error, KAFKA, is_late)
        assert (problem is None) == (expected is None)
        assert expected is None or expected in str(problem)


class _Clock:
    """A time that a commit's pauses move on."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.pauses = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs
        self.pauses += 1


def _committer(monkeypatch, clock: _Clock, failures: Iterator[int]) -> Committer:
    """A committer whose broker answers so, one after the other, and then takes the commit.

    What a broker that is away and comes back does to whole runs is in tests/runs.
    """

    def commit(offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        code = next(failures, None)
        if code is not None:
            raise KafkaException(ErrorCode(code))
        return offsets

    monkeypatch.setattr("transforms.commit.committer.time.sleep", clock.sleep)
    # Never connected to anything: nothing listens there.
    made = Committer(CommitConfig(SourceConfig(KafkaConfig("127.0.0.1:1", "group"), ())), clock)
    assert isinstance(made._store, GroupOffsets)
    made._store._consumer = SimpleNamespace(commit=commit)
    return made


@pytest.mark.parametrize("failures", [0, 1, 119])
def test_a_commit_is_repeated_for_a_minute(monkeypatch, failures: int) -> None:
    """The last try of those is at 59.5 s; what is taken then is committed."""
    clock = _Clock()
    made = _committer(monkeypatch, clock, iter([ErrorCode._TRANSPORT] * failures))
    made.commit({("t", 0): 5}, {("t", 0): "note"})
    assert made.committed == {("t", 0): 5}
    assert clock.pauses == failures


def test_after_a_minute_a_commit_is_given_up(monkeypatch) -> None:
    """Once a minute has passed, not before, and nothing counts as committed."""
    clock = _Clock()
    made = _committer(monkeypatch, clock, itertools.repeat(ErrorCode._TRANSPORT))
    with pytest.raises(KafkaError, match="cannot be committed to"):
        made.commit({("t", 0): 5})
    assert clock.now == 1_060.0
    assert made.committed == {}


@pytest.mark.parametrize(
    "code", [ErrorCode.ILLEGAL_GENERATION, ErrorCode.GROUP_AUTHORIZATION_FAILED]
)
def test_what_waiting_cannot_mend_is_not_repeated(monkeypatch, code: int) -> None:
    clock = _Clock()
    made = _committer(monkeypatch, clock, itertools.repeat(code))
    with pytest.raises(KafkaError):
        made.commit({("t", 0): 5})
    assert clock.pauses == 0


# -- partitions that are let go of ----------------------------------------------------------


def test_what_was_let_go_of_is_not_committed(monkeypatch) -> None:
    """Not what was put, not what is tried again, and nothing is known of it afterwards."""
    clock = _Clock()
    made = _committer(monkeypatch, clock, iter([ErrorCode._TRANSPORT]))
    for partition in range(2):
        made.begin(("t", partition), [3])

    def sleep(secs: float) -> None:
        # Between the first try and the next one.
        assert made.holds(("t", 0))
        made.forget(("t", 0))

    monkeypatch.setattr("transforms.commit.committer.time.sleep", sleep)
    made.put({("t", 0): (9, ""), ("t", 1): (8, "")})
    made.flush()
    assert made.committed == {("t", 1): 8}
    assert not made.holds(("t", 0))
    assert made.done.marks(("t", 0)) == ()


def test_ranges_of_before_move_nothing_when_a_partition_comes_back() -> None:
    done = ContiguousOffsets()
    done.begin(("t", 0), [0])
    done.add(_range(5, 9))
    done.forget(("t", 0))
    done.begin(("t", 0), [5])
    assert done.marks(("t", 0)) == [5]


# -- what crosses and what stays -------------------------------------------------------------------

KEY = ("orders", 7)


@pytest.mark.parametrize(
    ("progress", "data"),
    [
        (Progress(*KEY, 0, 0, EVERY_LANE), b"\x01[0,0,-1]"),
        (Progress(*KEY, 0, 0), b"\x01[]"),
        (Progress(*KEY, 1000, 1100), b"\x01[1000,100]"),
        (Progress(*KEY, 1000, 1000, 2, "t|7|5|a|b"), b'\x01[1000,0,2,"t|7|5|a|b"]'),
        (Progress(*KEY, 2**70, 2**70 + 1), b'\x01["1180591620717411303424",1]'),
        (Progress(*KEY, 0, 0, EVERY_LANE, asked=17), b'\x01[0,0,-1,"",17]'),
    ],
)
def test_progress_crosses_as_little_more_than_its_numbers(progress: Progress, data: bytes) -> None:
    """As the first version wrote it; never changed."""
    assert pack(progress) == (KEY, data)
    assert unpack(KEY, data) == progress
    # A fact that was added since then, and is not known.
    assert unpack(KEY, b'\x01[1000,100,0,"",0,9]') == Progress(*KEY, 1000, 1100)


def test_what_a_bundle_has_done_of_a_lane_is_one_range_if_it_can_be() -> None:
    done = [
        Progress("t", 0, 0, 10),
        Progress("t", 1, 5, 6),
        Progress("t", 0, 10, 20, 1),
        Progress("t", 0, 10, 15),
        Progress("t", 0, 15, 15, halted="why"),
        Progress("t", 0, 15, 20),
        Progress("t", 1, 7, 8),
        Progress("t", 1, 8, 9),
    ]
    assert sorted(merged(done), key=lambda each: (each.partition, each.lane, each.start)) == [
        Progress("t", 0, 0, 15, halted="why"),
        Progress("t", 0, 15, 20),
        Progress("t", 0, 10, 20, 1),
        Progress("t", 1, 5, 6),
        Progress("t", 1, 7, 9),
    ]


@given(
    st.permutations([Progress(*KEY, n, n + 1, lane) for n in range(5) for lane in range(2)]),
    st.integers(0, 10),
    st.integers(0, 10),
)
def test_how_far_a_partition_is_survives_the_state(
    ranges: list[Progress], begun: int, kept: int
) -> None:
    """Whatever has come before, and whether it is known where the partition begins."""
    partition = _Partition(ContiguousOffsets())
    for number, progress in enumerate(ranges):
        if number == kept:
            partition.halt_note = "halted why"
            partition = _Partition.decode(KEY, partition.encode(KEY))
        if number == begun:
            partition.done.begin(KEY, [0, 0])
        partition.done.add(progress)
    if begun == 10:
        partition.done.begin(KEY, [0, 0])
    assert partition.done.marks(KEY) == [5, 5]
    assert not partition.done.waits(KEY)
    assert partition.halt_note == ("halted why" if kept < 10 else "")


@pytest.mark.parametrize(
    ("data", "marks", "waits", "note"),
    [
        (b'\x01{"marks":[]}', [], False, ""),
        (b'\x01{"marks":[40,30]}', [40, 30], False, ""),
        (b'\x01{"marks":[40,30],"held":[[1,35,50]],"halt":"halted x"}', [40, 30], True, "halted x"),
        (b'\x01{"marks":["1180591620717411303424"],"more":1}', [2**70], False, ""),
    ],
)
def test_marks_of_the_first_version_are_read(
    data: bytes, marks: list[int], waits: bool, note: str
) -> None:
    partition = _Partition.decode(KEY, data)
    assert list(partition.done.marks(KEY)) == marks
    assert (partition.done.waits(KEY), partition.halt_note) == (waits, note)
    if b"more" not in data:
        assert partition.encode(KEY) == data
