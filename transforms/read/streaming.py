"""Read: partitions as they are found -> RecordChunk. The reader of streaming runs, in Python.

Two splittable DoFns: one finds partitions, again and again, the other reads them. What is not read
yet is a range of offsets that the runner keeps and hands out again after a restart. A chunk says
where its predecessor ended, so chunks can be put in order whatever happens on their way.

What is read, and how, is the `StreamSource`'s: here is only what a runner wants to know, and when
what is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import Any, Protocol

import apache_beam as beam
from apache_beam import coders
from apache_beam.coders.coders import LengthPrefixCoder
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator, WalltimeWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider, WatermarkEstimatorProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp

from transforms.coding import FactsCoder
from transforms.facts import number
from transforms.interpreter import collect_rarely
from transforms.per_process import per_process
from transforms.records import (
    EVERY_LANE,
    NO_TIMESTAMP,
    PartitionKey,
    Progress,
    RecordChunk,
    Records,
)
from transforms.spread import place_of, salt_of

_LOGGER = logging.getLogger(__name__)

# Behind every position, also where positions are longer than Kafka's.
_NO_END = 10**150

# Partitions of one worker take turns, so an idle one must not hold up the others.
_POLL_SECS = 0.02
# What is read leaves the worker when its bundle ends, and a checkpoint waits for that too.
_SLICE_SECS = 0.5
# Flink knows whole seconds only: less is none at all (`delay`). So a partition that gave records
# lately is asked again at once, a quiet one after this time.
_QUIET_POLL_SECS = 1
_LATELY_SECS = 2.0
# How often a busy partition is left alone for a moment, to find out whether the job is drained.
_BREATH_SECS = 60.0
# So much of a delay may have passed before the runner hears of it.
_HEARD_SECS = 0.5
# A partition that gave nothing for so long does not hold the watermark back any more.
_HOLD_SECS = 60


# Where the partitions that this process reads end, as far as it has heard; what a runner is told of
# a backlog is estimated without asking Kafka.
_ends: dict[PartitionKey, int] = {}


Asked = Mapping[PartitionKey, int]
"""By partition that has ended, the number under which the job's state is asked whether all of it is
done; 0 once it has said so."""


class PartitionReader(Protocol):
    """Reads one partition, for who was lent it.

    Attributes:
        offsets_lost: Offsets that were gone before they were read; rises only.
        errors: How often this partition, and no other, could not be read; rises only.
        is_halted: Whether a failure has stopped the partition, as far as has been heard.
        end: The partition's end, as far as has been heard; 0 before that, and where numbers do not
            say how much there is.
        ended: Whether the partition has ended for good behind what was read last.
    """

    offsets_lost: int
    errors: int
    ended: bool

    @property
    def is_halted(self) -> bool: ...

    @property
    def end(self) -> int: ...

    def go_to(self, offset: int) -> bool:
        """Read on from this offset; says whether it stood elsewhere."""

    def may_read(self) -> bool:
        """Whether the partition is not too far ahead of what is committed."""

    def read(self, timeout_secs: float) -> tuple[Records, int]:
        """The next records, and the offset behind them; that of before if there is nothing.

        Args:
            timeout_secs: How long to wait for records that are not there yet.

        Raises:
            SinkError: The run cannot go on.
        """


class StreamSource(Protocol):
    """What is read in a streaming run. A value: it travels with the graph, and equal ones share
    what they need in a worker process.

    Attributes:
        label: What it is, for a runner's page of the job.
        bounded: Whether the run ends where the partitions ended when they were found.
        find_secs: How often to look for partitions; whole seconds.
    """

    @property
    def label(self) -> dict[str, str]: ...

    @property
    def bounded(self) -> bool: ...

    @property
    def find_secs(self) -> int: ...

    def __hash__(self) -> int: ...

    def find(
        self, known: frozenset[PartitionKey] | None, asked: Asked
    ) -> tuple[Mapping[PartitionKey, tuple[int, int]], Asked]:
        """Where partitions that are not known yet begin, and where they end now.

        A partition that takes another's place begins once all of that is done: not only by what is
        kept in the source's store, which may be from before the job was restored, but by the job's
        own state, which is asked for it.

        Args:
            known: Those that were found before; None at the first look.
            asked: What was asked about known ones before.

        Returns:
            Those found now, and what is asked by now. What differs is to be asked.

        Raises:
            SinkError: The run cannot go on.
        """

    def lend(self, key: PartitionKey) -> AbstractContextManager[PartitionReader]:
        """This process's reader of a partition, for the caller alone."""


@dataclass(frozen=True, slots=True)
class NativeReadConfig:
    """How a streaming run reads.

    Attributes:
        source: What to read.
        drain_by_haste: Whether a runner shows that it drains only by not waiting any more (Flink).
            That one waits by itself between two bundles, so a read need not.
    """

    source: StreamSource
    drain_by_haste: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """How far the looking for partitions has come.

    Attributes:
        bounded: Whether one look is all.
        known: Partitions that were passed on; None before the first look.
        asked: What was asked about those that have ended.
    """

    bounded: bool
    known: frozenset[PartitionKey] | None = None
    asked: Asked = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FoundPartition:
    """A partition to read; or one that was read, of which is asked how far it is done.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: First offset to read.
        end: Its next offset when it was found.
        bounded: Whether to stop there.
        asked: If not 0, nothing is to be read: see `Asked`.
        salt: By which Flink reads partitions on all its subtasks alike; see `salted`.
    """

    topic: str
    partition: int
    start: int
    end: int
    bounded: bool
    asked: int = 0
    salt: int = 0

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)


class Haste:
    """Whether a runner has stopped to wait as long as it is asked to. Pure.

    Flink, while it drains a job, calls a splittable DoFn again and again at once, until nothing
    remains to be done; that is all it lets a DoFn know. A restart may call early too, but once, and
    the next restart takes longer than a drain's next call.
    """

    _CALLS = 3
    _WITHIN_SECS = 2.0

    def __init__(self) -> None:
        self._due: float | None = None
        self._early: list[float] = []

    def asked(self, now: float, delay_secs: float) -> None:
        """The runner was asked to come back after so long."""
        self._due = now + delay_secs if delay_secs else None

    def came(self, now: float) -> bool:
        """The runner came back; says whether it is in haste."""
        due, self._due = self._due, None
        if due is not None:
            early = now < due - _QUIET_POLL_SECS / 2
            recent = [each for each in self._early if now - each <= self._WITHIN_SECS]
            self._early = [*recent, now] if early else []
        return len(self._early) >= self._CALLS

    @property
    def is_suspected(self) -> bool:
        """Whether it came early the last time: worth asking for a delay again, to know."""
        return bool(self._early)


@dataclass(slots=True)
class _Pace:
    """How a runner comes back for one partition, in this process.

    Attributes:
        haste: Whether it has stopped to wait.
        breath: When it was asked to wait last.
        gave: When the partition last gave something.
    """

    haste: Haste
    breath: float
    gave: float


class _Paces:
    """How the runner comes back for what it has to do again and again, in this process."""

    def __init__(self, _: NativeReadConfig) -> None:
        self.finding = Haste()
        self._reading: dict[PartitionKey, _Pace] = {}

    def reading(self, key: PartitionKey, now: float) -> _Pace:
        """That of a partition; only who was lent its reader may ask."""
        if key not in self._reading:
            self._reading[key] = _Pace(Haste(), now, now)
        return self._reading[key]


def delay(secs: int) -> Duration:
    """How long to ask a runner to wait.

    It hears of what is left of a delay when the bundle ends, and Flink takes the whole seconds of
    that: of a second that would be none, and to come at once is what it does in a drain.
    """
    return Duration.of(secs + _HEARD_SECS if secs else 0)


class ReadPartitions(beam.PTransform):
    """Find partitions and read them, for streaming runs.

    Delivery: what a runner's checkpoint holds is read from there on; without one, from what is
    committed on. Order: offsets rise per partition, and a chunk that was overtaken can be put in
    its place. Partitions that appear later are found while it runs. Bounded with
    `NativeReadConfig.bounded`, unbounded else.
    """

    def __init__(self, config: NativeReadConfig) -> None:
        super().__init__()
        self._config = config

    def expand(
        self, root: beam.pvalue.PBegin
    ) -> tuple[beam.PCollection[RecordChunk], beam.PCollection[Progress]]:
        """The chunks, and where each partition begins (`EVERY_LANE`)."""
        find, read = beam.ParDo(_FindFn(self._config)), beam.ParDo(_ReadFn(self._config))
        begin = beam.Map(_begin, self._config.source.bounded)
        found = (
            root
            # Not by Create: it has steps named after lines of Beam's code, and a job can be updated
            # only to one whose steps have the same names.
            | "Impulse" >> beam.Impulse()
            | "Begin" >> begin.with_output_types(Finding)
            | "FindPartitions" >> find.with_output_types(FoundPartition)
        )
        begun = beam.Map(_begun).with_output_types(Progress)
        return (
            found | "ReadPartition" >> read.with_output_types(RecordChunk),
            found | "Begun" >> begun,
        )

    def display_data(self) -> dict[str, Any]:
        return self._config.source.label


# -- what the runner keeps -------------------------------------------------------------------------


class _FoundCoder(FactsCoder):
    what = "partitions that were found"

    def facts(self, value: FoundPartition) -> Any:
        positions = number(value.start), number(value.end)
        more = [value.asked, value.salt]
        while more and not more[-1]:
            more.pop()
        return [value.topic, value.partition, *positions, value.bounded, *more]

    def value(self, facts: Any) -> FoundPartition:
        topic, partition, start, end, bounded, asked, salt = [*facts, 0, 0][:7]
        return FoundPartition(topic, partition, int(start), int(end), bounded, asked, salt)


# As it goes to a runner, which does not know the coder.
_FOUND_CODER = LengthPrefixCoder(_FoundCoder())


def salted(found: FoundPartition) -> FoundPartition:
    """The partition with its salt: Flink reads it where a hash of all that it holds says."""

    def make(salt: int) -> bytes:
        return _FOUND_CODER.encode(replace(found, salt=salt))

    return replace(found, salt=salt_of(make, place_of(*found.key)))


class _RangeCoder(FactsCoder):
    """What is not read yet; no end, if there is none."""

    what = "ranges to read"

    def facts(self, value: OffsetRange) -> Any:
        return [number(value.start), None if value.stop == _NO_END else number(value.stop)]

    def value(self, facts: Any) -> OffsetRange:
        start, stop = facts[:2]
        return OffsetRange(int(start), _NO_END if stop is None else int(stop))


class _FindingCoder(FactsCoder):
    what = "partitions that are known"

    def facts(self, value: Finding) -> Any:
        known = value.known if value.known is None else sorted(value.known)
        asked = [[*key, number] for key, number in sorted(value.asked.items())]
        return [value.bounded, known, *([asked] if asked else [])]

    def value(self, facts: Any) -> Finding:
        bounded, known, asked = [*facts, []][:3]
        return Finding(
            bounded,
            None if known is None else frozenset(map(tuple, known)),
            {(topic, partition): number for topic, partition, number in asked},
        )


class _WatermarkCoder(FactsCoder):
    what = "watermarks"

    def facts(self, value: Timestamp | None) -> Any:
        return value and value.micros

    def value(self, facts: Any) -> Timestamp | None:
        return None if facts is None else Timestamp(micros=facts)


class _Watermarks(WatermarkEstimatorProvider):
    """Where the watermark of a restriction is, by an estimator of Beam's."""

    def __init__(self, estimator: Callable[[Timestamp | None], Any]) -> None:
        self._estimator = estimator

    def initial_estimator_state(self, element: Any, restriction: Any) -> None:
        return None

    def create_watermark_estimator(self, estimator_state: Timestamp | None) -> Any:
        return self._estimator(estimator_state)

    def estimator_state_coder(self) -> coders.Coder:
        return _WatermarkCoder()


_WALLTIME = _Watermarks(WalltimeWatermarkEstimator)
_MANUAL = _Watermarks(ManualWatermarkEstimator)


# -- finding -----------------------------------------------------------------------------------


def _begin(_: bytes, bounded: bool) -> Finding:
    return Finding(bounded)


def _begun(found: FoundPartition) -> Progress:
    return Progress(*found.key, found.start, found.start, EVERY_LANE, asked=found.asked)


class _FindingTracker(RestrictionTracker):
    """To claim is to pass on more partitions; what remains is to look for others."""

    def __init__(self, finding: Finding) -> None:
        self._finding = finding
        self._stopped = False

    def current_restriction(self) -> Finding:
        return self._finding

    def try_claim(self, finding: Finding) -> bool:
        if self._stopped:
            return False
        self._finding = finding
        return True

    def try_split(self, fraction_of_remainder: float) -> tuple[Finding, Finding] | None:
        if self._stopped or self._finding.bounded:
            return None
        self._stopped = True
        return self._finding, self._finding

    def current_progress(self) -> RestrictionProgress:
        return RestrictionProgress(fraction=0.0)

    def check_done(self) -> None:
        """What a look found is passed on before it ends, so there is nothing to be missed."""

    def is_bounded(self) -> bool:
        return self._finding.bounded


class _FindProvider(RestrictionProvider):
    def initial_restriction(self, element: Finding) -> Finding:
        return element

    def create_tracker(self, restriction: Finding) -> _FindingTracker:
        return _FindingTracker(restriction)

    def restriction_coder(self) -> coders.Coder:
        return _FindingCoder()

    def restriction_size(self, element: Finding, restriction: Finding) -> float:
        return 1.0


class _FindFn(beam.DoFn):
    def __init__(self, config: NativeReadConfig) -> None:
        self._config = config
        self._partitions = beam.metrics.Metrics.counter("read", "partitions")

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: Finding,
        tracker: Any = beam.DoFn.RestrictionParam(_FindProvider()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(_WALLTIME),
    ) -> Iterator[FoundPartition]:
        haste = per_process(_Paces, self._config).finding
        if haste.came(monotonic()) and self._config.drain_by_haste:
            return
        source, before = self._config.source, tracker.current_restriction()
        found, asked = source.find(before.known, before.asked)
        known = (before.known or frozenset()) | found.keys()
        if not tracker.try_claim(Finding(element.bounded, known, asked)):
            return
        self._partitions.inc(len(found))
        for key, (start, end) in found.items():
            yield salted(FoundPartition(*key, start, end, element.bounded))
        for key, now in asked.items():
            if now and before.asked.get(key) != now:
                yield FoundPartition(*key, 0, 0, element.bounded, now)
        if not element.bounded:
            haste.asked(monotonic(), source.find_secs)
            tracker.defer_remainder(delay(source.find_secs))


# -- reading -----------------------------------------------------------------------------------


class _ReadProvider(RestrictionProvider):
    def initial_restriction(self, element: FoundPartition) -> OffsetRange:
        stop = max(element.start, element.end) if element.bounded else _NO_END
        return OffsetRange(element.start, stop)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return _OffsetTracker(restriction)

    def restriction_coder(self) -> coders.Coder:
        return _RangeCoder()

    def restriction_size(self, element: FoundPartition, restriction: OffsetRange) -> float:
        """The backlog in records: what there is to read, not what may ever come."""
        end = max(element.end, _ends.get(element.key, 0))
        return float(max(0, min(end, restriction.stop) - restriction.start))


class _OffsetTracker(OffsetRestrictionTracker):
    def try_split(self, fraction_of_remainder: float) -> Any:
        # Of what has no end, nobody can say where a part of it would begin.
        if fraction_of_remainder and not self.is_bounded():
            return None
        return super().try_split(fraction_of_remainder)

    def is_bounded(self) -> bool:
        return bool(self.current_restriction().stop != _NO_END)

    def check_done(self) -> None:
        # There is no end to what may come; a drain ends somewhere.
        if self.is_bounded():
            super().check_done()


class _ReadFn(beam.DoFn):
    def __init__(self, config: NativeReadConfig, clock: Callable[[], float] = time) -> None:
        self._config = config
        self._clock = clock
        self._records = beam.metrics.Metrics.counter("read", "records")
        self._bytes = beam.metrics.Metrics.counter("read", "value_bytes")
        self._lost = beam.metrics.Metrics.counter("read", "offsets_lost")
        self._errors = beam.metrics.Metrics.counter("read", "partition_errors")
        self._ended = beam.metrics.Metrics.counter("read", "ended_by_a_drain")

    def setup(self) -> None:
        collect_rarely()

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: FoundPartition,
        tracker: Any = beam.DoFn.RestrictionParam(_ReadProvider()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(_MANUAL),
    ) -> Iterator[TimestampedValue]:
        if element.asked:
            return
        restriction = tracker.current_restriction()
        paces = per_process(_Paces, self._config)
        # What ends by itself is read to its end. Flink is in haste with it as in a drain, once all
        # of a job's sources have ended.
        may_end = self._config.drain_by_haste and not element.bounded
        with self._config.source.lend(element.key) as reader:
            now = monotonic()
            pace = paces.reading(element.key, now)
            if pace.haste.came(now) and may_end:
                self._ended.inc()
                text = (
                    "%s-%d: the runner does not wait any more, as in a drain: not read from %d on"
                )
                _LOGGER.info(text, *element.key, restriction.start)
                return
            until = now + _SLICE_SECS
            position = restriction.start
            if reader.go_to(position):
                pace.gave = now
            pause_secs = 0
            while position < restriction.stop and not pause_secs:
                lately = now - pace.gave <= _LATELY_SECS
                if not reader.may_read():
                    if reader.is_halted and element.bounded:
                        # Nothing behind the halt is needed, and nobody will commit it.
                        tracker.try_claim(restriction.stop - 1)
                        return
                    # Where the function keeps up there is room again in a moment, and Flink has
                    # waited a bundle's time until it asks.
                    at_once = lately and self._config.drain_by_haste
                    pause_secs = 0 if at_once else _QUIET_POLL_SECS
                    break
                # Where little comes the pause is long enough for what there is to be fetched.
                lost, errors = reader.offsets_lost, reader.errors
                # What came while Flink waited is there; to wait for more would keep it here.
                waits = element.bounded or (lately and not self._config.drain_by_haste)
                records, next_offset = reader.read(_POLL_SECS if waits else 0)
                now = monotonic()
                self._lost.inc(reader.offsets_lost - lost)
                self._errors.inc(reader.errors - errors)
                if next_offset == position:
                    if reader.ended:
                        return
                    self._advance(watermark, self._clock() - _HOLD_SECS)
                    pause_secs = 0 if lately else _QUIET_POLL_SECS
                    break
                pace.gave = now
                _ends[element.key] = reader.end
                if next_offset > restriction.stop:
                    count = sum(offset < restriction.stop for offset in records.offsets)
                    records, next_offset = records.slice(0, count), restriction.stop
                if not tracker.try_claim(next_offset - 1):
                    return
                ended = reader.ended
                chunk = RecordChunk(
                    *element.key,
                    position,
                    next_offset,
                    records,
                    first=position == element.start,
                    last=ended,
                )
                position = next_offset
                self._records.inc(len(records))
                self._bytes.inc(sum(map(len, filter(None, records.values))))
                yield TimestampedValue(chunk, self._timestamp(records, watermark))
                if ended:
                    return
                if now >= until:
                    break
            if position == restriction.stop:
                return
            breath = pace.haste.is_suspected or now - pace.breath > _BREATH_SECS
            if breath and may_end:
                pause_secs = _QUIET_POLL_SECS
            if pause_secs:
                pace.breath = now
            pace.haste.asked(monotonic(), pause_secs)
            tracker.defer_remainder(delay(pause_secs))

    def _timestamp(self, records: Records, watermark: Any) -> Timestamp:
        """The newest record's time, but never one to come: a producer may write any number."""
        newest = max(records.timestamps, default=NO_TIMESTAMP)
        secs = self._clock()
        if newest != NO_TIMESTAMP:
            secs = min(newest / 1000, secs)
        return self._advance(watermark, max(0.0, secs))

    def _advance(self, watermark: Any, secs: float) -> Timestamp:
        """Move the watermark, never back, and say where it is."""
        before = watermark.current_watermark()
        now = Timestamp.of(secs)
        if before is None or now > before:
            watermark.set_watermark(now)
            return now
        return before


coders.registry.register_coder(FoundPartition, _FoundCoder)
coders.registry.register_coder(Finding, _FindingCoder)
