"""The reader of streaming runs beside a source that is no Kafka: a list in this process."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import apache_beam as beam
import pytest
from apache_beam.io.restriction_trackers import OffsetRange
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.utils.timestamp import Duration, Timestamp

from transforms.errors import StateError
from transforms.read import streaming
from transforms.read.streaming import (
    _NO_END,
    Asked,
    Finding,
    FoundPartition,
    NativeReadConfig,
    PartitionReader,
    ReadPartitions,
    _FindingCoder,
    _FoundCoder,
    _RangeCoder,
    _ReadFn,
    _ReadProvider,
    _WatermarkCoder,
)
from transforms.records import PartitionKey, RecordChunk, Records

# As Kinesis numbers records: 56 digits, and far from dense.
FIRST, STEP, COUNT = 49 * 10**54, 10**40 + 7, 25
OFFSETS = [FIRST + number * STEP for number in range(COUNT)]
END = OFFSETS[-1] + 1
AT_ONCE = 10


class _ListReader:
    """Gives a few records at a time."""

    offsets_lost = errors = 0
    is_halted = ended = False
    end = END

    def __init__(self) -> None:
        self._position = -1
        self.waits: list[float] = []
        self.has_room = True

    def go_to(self, offset: int) -> bool:
        moved, self._position = offset != self._position, offset
        return moved

    def may_read(self) -> bool:
        return self.has_room

    def read(self, timeout_secs: float) -> tuple[Records, int]:
        self.waits.append(timeout_secs)
        found = [offset for offset in OFFSETS if offset >= self._position][:AT_ONCE]
        if found:
            self._position = found[-1] + 1
        count = len(found)
        records = Records(found, [1] * count, [None] * count, [b"1"] * count, [None] * count)
        return records, self._position


_readers: dict[PartitionKey, _ListReader] = {}


@dataclass(frozen=True)
class _List:
    """A source of one partition."""

    name: str
    bounded: bool = True
    find_secs: int = 5

    @property
    def label(self) -> dict[str, str]:
        return {"list": self.name}

    def find(
        self, known: frozenset[PartitionKey] | None, asked: Asked
    ) -> tuple[Mapping[PartitionKey, tuple[int, int]], Asked]:
        key = (self.name, 0)
        return {} if key in (known or ()) else {key: (FIRST, END)}, asked

    @contextmanager
    def lend(self, key: PartitionKey) -> Iterator[PartitionReader]:
        yield _readers.setdefault(key, _ListReader())


_chunks: dict[str, list[RecordChunk]] = {}


def _keep(chunk: RecordChunk) -> None:
    _chunks[chunk.topic].append(chunk)


def test_positions_are_as_long_and_as_sparse_as_the_source_has_them() -> None:
    name = uuid.uuid4().hex
    _chunks[name] = []
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    chunks, _ = pipeline | ReadPartitions(NativeReadConfig(_List(name)))
    _ = chunks | beam.Map(_keep)
    pipeline.run().wait_until_finish()
    place = FIRST
    for number, chunk in enumerate(_chunks[name]):
        assert (chunk.start, chunk.first) == (place, number == 0)
        place = chunk.next_offset
    assert place == END
    assert [offset for chunk in _chunks[name] for offset in chunk.records.offsets] == OFFSETS


def test_what_has_no_end_goes_on_behind_any_position() -> None:
    found = FoundPartition("shard", 0, END, END, bounded=False)
    restriction = _ReadProvider().initial_restriction(found)
    tracker = _ReadProvider().create_tracker(restriction)
    assert not tracker.is_bounded()
    assert tracker.try_claim(END + STEP)
    split = tracker.try_split(0)
    assert split
    assert split[1].start == END + STEP + 1
    assert _ReadProvider().restriction_size(found, split[1]) == 0


class _View:
    """What a runner gives the reader of a restriction."""

    def __init__(self, found: FoundPartition) -> None:
        restriction = _ReadProvider().initial_restriction(found)
        self._tracker = _ReadProvider().create_tracker(restriction)
        self.current_restriction = self._tracker.current_restriction
        self.try_claim = self._tracker.try_claim
        self.deferred: list[Duration] = []

    def defer_remainder(self, delay: Duration) -> None:
        self.deferred.append(delay)


@pytest.mark.parametrize(
    ("on_flink", "bounded", "waits"),
    [(True, False, False), (False, False, True), (True, True, True)],
)
def test_where_the_runner_waits_between_bundles_the_reader_does_not(
    on_flink: bool, bounded: bool, waits: bool
) -> None:
    """Partitions take turns: what one has read would wait for the next ones."""
    name = uuid.uuid4().hex
    config = NativeReadConfig(_List(name, bounded), drain_by_haste=on_flink)
    found = FoundPartition(name, 0, FIRST, END, bounded)
    view = _View(found)
    given = list(_ReadFn(config).process(found, view, ManualWatermarkEstimator(None)))
    offsets = [offset for each in given for offset in each.value.records.offsets]
    assert offsets == OFFSETS
    assert {wait > 0 for wait in _readers[name, 0].waits} == {waits}
    # It gave records lately, so it is asked again at once.
    assert view.deferred == ([] if bounded else [Duration.of(0)])


@pytest.mark.parametrize(
    ("on_flink", "later_secs", "pause_secs"), [(True, 0, 0), (True, 10, 1), (False, 0, 1)]
)
def test_what_may_not_be_read_is_asked_again_at_once_while_it_is_on_the_move(
    on_flink: bool, later_secs: float, pause_secs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second's pause left a worker with nothing to do; one whose function is stuck is let be."""
    name = uuid.uuid4().hex
    config = NativeReadConfig(_List(name, bounded=False), drain_by_haste=on_flink)
    found = FoundPartition(name, 0, FIRST, END, bounded=False)
    view, read = _View(found), _ReadFn(config)
    # What there is, so that it gave records just now.
    given = list(read.process(found, view, ManualWatermarkEstimator(None)))
    assert given
    _readers[name, 0].has_room = False
    view = _View(FoundPartition(name, 0, END, END, bounded=False))
    monkeypatch.setattr(streaming, "monotonic", lambda: time.monotonic() + later_secs)
    assert not list(read.process(found, view, ManualWatermarkEstimator(None)))
    assert view.deferred == [streaming.delay(pause_secs)]


@pytest.mark.parametrize(
    ("coder", "value", "data"),
    [
        (_FoundCoder(), FoundPartition("t", 3, 5, 9, True), b'\x01["t",3,5,9,true]'),
        (
            _FoundCoder(),
            FoundPartition("t", 3, 2**70, 2**70, False),
            b'\x01["t",3,"1180591620717411303424","1180591620717411303424",false]',
        ),
        (
            _FoundCoder(),
            FoundPartition("t", 3, 0, 0, False, 17),
            b'\x01["t",3,0,0,false,17]',
        ),
        (
            _FoundCoder(),
            FoundPartition("t", 3, 5, 9, False, salt=77),
            b'\x01["t",3,5,9,false,0,77]',
        ),
        (_FindingCoder(), Finding(True), b"\x01[true,null]"),
        (
            _FindingCoder(),
            Finding(False, frozenset([("a", 1)]), {("a", 1): 17, ("a", 0): 0}),
            b'\x01[false,[["a",1]],[["a",0,0],["a",1,17]]]',
        ),
        (
            _FindingCoder(),
            Finding(False, frozenset([("b", 0), ("a", 1)])),
            b'\x01[false,[["a",1],["b",0]]]',
        ),
        (_RangeCoder(), OffsetRange(5, 9), b"\x01[5,9]"),
        (_RangeCoder(), OffsetRange(5, _NO_END), b"\x01[5,null]"),
        (_WatermarkCoder(), None, b"\x01null"),
        (_WatermarkCoder(), Timestamp(micros=1_700_000_000_000_001), b"\x011700000000000001"),
    ],
)
def test_what_a_savepoint_has_of_the_reader_is_read_for_ever(
    coder: beam.coders.Coder, value: object, data: bytes
) -> None:
    """As the first version wrote it; never changed. What is added comes behind it."""
    assert coder.encode(value) == data
    assert coder.decode(data) == value
    if data.endswith(b"]"):
        # What is as if it were not there is left out at the end.
        every = {_FoundCoder: [None] * 5 + [0, 0], _FindingCoder: [None] * 2 + [[]]}
        facts = json.loads(data[1:])
        whole = [*facts, *every.get(type(coder), [])[len(facts) :], "more"]
        assert coder.decode(data[:1] + json.dumps(whole).encode()) == value
    with pytest.raises(StateError, match="the version that wrote"):
        coder.decode(b"\x02" + data[1:])
