"""Read: partitions as they are found -> RecordChunk. The reader of streaming runs, in Python.

Two splittable DoFns: one finds partitions, again and again, the other reads them. What is not read
yet is a range of offsets that the runner keeps and hands out again after a restart. A chunk says
where its predecessor ended, so chunks can be put in order whatever happens on their way.

How far a partition may be read ahead of its committed offset is bounded: nothing is committed of a
partition whose function is stuck, so soon nothing more of it is read, and it does not fill the
workers at the cost of the others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, time
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator, WalltimeWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Duration, Timestamp
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.commit.commit import CommitConfig, read_halt, shared_committer
from transforms.errors import KafkaError
from transforms.kafka.client import describe, make_consumer, reason
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.per_process import per_process
from transforms.read.rounds import bytes_of, end_of_partition, to_records
from transforms.records import (
    EVERY_LANE,
    NO_TIMESTAMP,
    PartitionKey,
    Progress,
    RecordChunk,
    Records,
)

_LOGGER = logging.getLogger(__name__)

_NO_END = 2**63 - 1

_WALLTIME = WalltimeWatermarkEstimator.default_provider()
_MANUAL = ManualWatermarkEstimator.default_provider()

_CHUNK_RECORDS = 1_000
# Partitions of one worker take turns, so an idle one must not hold up the others.
_POLL_SECS = 0.02
# What is read leaves the worker when its bundle ends, and a checkpoint waits for that too.
_SLICE_SECS = 0.5
# Flink knows whole seconds only: less is none at all. So a partition that gave records lately is
# asked again at once, a quiet one after this time.
_QUIET_POLL_SECS = 1
_LATELY_SECS = 2.0
_FIND_SECS = 5
# How often a busy partition is left alone for a moment, to find out whether the job is drained.
_BREATH_SECS = 10.0
_ASK_COMMITTED_SECS = 0.1
# A partition that gave nothing for so long does not hold the watermark back any more.
_HOLD_SECS = 60
_UNUSED_SECS = 120.0
# How soon a partition that cannot be read is tried again; the others go on meanwhile.
_TRY_AGAIN_SECS = 10.0
_GONE = (ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE)

_PREFETCH = {
    "queued.max.messages.kbytes": 4_096,
    "queued.min.messages": 10_000,
    "fetch.queue.backoff.ms": 20,
}


# Where the partitions that this process reads end, as far as it has heard; what a runner is told of
# a backlog is estimated without asking Kafka.
_ends: dict[PartitionKey, int] = {}


@dataclass(frozen=True, slots=True)
class NativeReadConfig:
    """How a streaming run reads.

    Attributes:
        source: What to read, and from where on.
        bounded: End where the partitions ended when they were found, instead of never.
        ahead_records: Records of a partition that may be read and not committed.
        ahead_bytes: The same in bytes, for one partition.
        process_bytes: The same for all partitions that a worker process reads.
        drain_by_haste: Whether a runner shows that it drains only by not waiting any more (Flink).
    """

    source: SourceConfig
    bounded: bool = False
    ahead_records: int = 100_000
    ahead_bytes: int = 32 * 2**20
    process_bytes: int = 512 * 2**20
    drain_by_haste: bool = False


@dataclass(frozen=True, slots=True)
class FoundPartition:
    """A partition to read.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: First offset to read.
        end: Its next offset when it was found.
        bounded: Whether to stop there.
    """

    topic: str
    partition: int
    start: int
    end: int
    bounded: bool

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


class PartitionReader:
    """One partition's consumer in this process.

    Args:
        config: How to read.
        key: The partition.
        make: Makes the consumer; injected for tests.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        config: NativeReadConfig,
        key: PartitionKey,
        make: Callable[..., Consumer] = make_consumer,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self.lock = threading.Lock()
        self.used = self.breath = self.gave = timer()
        self.haste = Haste()
        self._config = config
        self._key = key
        self._timer = timer
        self._consumer = make(config.source.kafka, **_PREFETCH)
        self.closed = False
        # Offsets that retention has taken before they were read, and errors of this partition only.
        self.offsets_lost = self.errors = 0
        self._position = -1
        self._begun = 0
        # None if it is not known, be it that the group is ahead of what is read (a savepoint).
        self._committed: int | None = None
        self._halted = False
        self._asked = float("-inf")
        self._again = float("inf")
        # What was read and not committed yet: where each chunk ended, and its bytes.
        self._ahead: deque[tuple[int, int]] = deque()
        self._ahead_bytes = 0

    def go_to(self, offset: int) -> None:
        """Read on from this offset; what was fetched ahead serves if it is where it stands."""
        self.used = self._timer()
        if offset == self._position:
            return
        self._consumer.assign([TopicPartition(*self._key, offset)])
        self._position = self._begun = offset
        self._again = float("inf")
        self._ahead.clear()
        self._ahead_bytes = 0
        self.gave = self.used
        self._ask_committed()
        if self._committed is not None and self._committed < offset:
            # What was read before a restart: its bytes are not known, so it has to be done with.
            self._ahead.append((offset, self._config.ahead_bytes))
            self._ahead_bytes = self._config.ahead_bytes

    def read(self, timeout_secs: float) -> tuple[Records, int]:
        """The next records, and the offset behind them; that of before if there is nothing.

        Args:
            timeout_secs: How long to wait for records that have not been fetched yet.

        Raises:
            KafkaError: The partition cannot be read any more.
        """
        kafka = self._config.source.kafka
        if self._timer() >= self._again:
            self._again = float("inf")
            self._consumer.assign([TopicPartition(*self._key, self._position)])
        try:
            messages = self._consumer.consume(_CHUNK_RECORDS, timeout_secs)
        except KafkaException as error:
            raise KafkaError(f"{describe(kafka)}: {reason(error)}") from None
        position = self._position
        records = []
        for message in messages:
            if message.error():
                position = max(position, self._said(message, position))
            elif message.offset() >= position:
                records.append(message)
                position = message.offset() + 1
        size = bytes_of(records)
        if position > self._position:
            _ends[self._key] = self._end()
            self._ahead.append((position, size))
            self._ahead_bytes += size
            self._position = position
        return to_records(records), position

    def _said(self, message: Message, position: int) -> int:
        """Where to go on after a message that is no record; 0 if it says nothing of that.

        What is wrong with this partition does not fail the job, which would stop all of them, and
        again after each restart: the position is the checkpoint's. A run that is to end does fail.
        """
        kafka = self._config.source.kafka
        if message.error().code() in _GONE and (low := self._first_offset()) > position:
            _LOGGER.warning(
                "%s-%d: %d offsets from %d on were deleted by the topic's retention before they "
                "were read; going on at %d",
                *self._key,
                low - position,
                position,
                low,
            )
            self.offsets_lost += low - position
            self._consumer.assign([TopicPartition(*self._key, low)])
            return low
        try:
            return end_of_partition(message, kafka) or 0
        except KafkaError as error:
            if self._config.bounded or message.error().fatal():
                raise
            self.errors += 1
            self._again = self._timer() + _TRY_AGAIN_SECS
            text = "%s-%d is not read at %d, the others go on; tried again in %d s: %s"
            _LOGGER.warning(text, *self._key, position, _TRY_AGAIN_SECS, error)
            return 0

    def _first_offset(self) -> int:
        """The partition's first offset, asked of the broker; -1 if it does not answer."""
        try:
            low, _ = self._consumer.get_watermark_offsets(TopicPartition(*self._key), timeout=5)
            return int(low)
        except KafkaException as error:
            _LOGGER.warning("%s: %s", describe(self._config.source.kafka), reason(error))
            return -1

    @property
    def is_halted(self) -> bool:
        """Whether a failure has stopped the partition, as far as has been heard."""
        return self._halted

    def may_read(self, readers: int) -> bool:
        """Whether the partition is not too far ahead of what is committed.

        Args:
            readers: How many partitions share what this process may hold.
        """
        limit = min(self._config.ahead_bytes, self._config.process_bytes // readers)
        if self._within(limit):
            return True
        if self._timer() - self._asked >= _ASK_COMMITTED_SECS:
            self._ask_committed()
            done = -1 if self._committed is None else self._committed
            while self._ahead and self._ahead[0][0] <= done:
                self._ahead_bytes -= self._ahead.popleft()[1]
        return self._within(limit)

    def _within(self, limit_bytes: int) -> bool:
        done = self._begun if self._committed is None else self._committed
        records = self._position - done
        return records < self._config.ahead_records and self._ahead_bytes < limit_bytes

    def _ask_committed(self) -> None:
        self._asked = self._timer()
        try:
            (found,) = self._consumer.committed([TopicPartition(*self._key)], timeout=5)
        except KafkaException as error:
            _LOGGER.warning("%s: %s", describe(self._config.source.kafka), reason(error))
            return
        # Ahead of what is read is where another run has been: this job has not come so far.
        self._committed = found.offset if 0 <= found.offset <= self._position else None
        self._halted = self._committed is not None and read_halt(found.metadata or "") is not None

    def _end(self) -> int:
        """The partition's end as the last fetch saw it."""
        try:
            partition = TopicPartition(*self._key)
            return int(self._consumer.get_watermark_offsets(partition, cached=True)[1])
        except KafkaException:
            return 0

    def close(self) -> None:
        """Leave Kafka."""
        self.closed = True
        self._consumer.close()


class _Readers:
    """The readers of a worker process; one for each partition that it was given lately."""

    def __init__(self, config: NativeReadConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._readers: dict[PartitionKey, PartitionReader] = {}

    def __len__(self) -> int:
        return len(self._readers)

    @contextmanager
    def lend(self, key: PartitionKey) -> Iterator[PartitionReader]:
        """A partition's reader, for the caller alone."""
        while True:
            reader = self._get(key)
            with reader.lock:
                # Not if it was closed while the caller stood still.
                if not reader.closed:
                    yield reader
                    return

    def _get(self, key: PartitionKey) -> PartitionReader:
        with self._lock:
            for other, reader in list(self._readers.items()):
                # Another process reads it now, or nobody does.
                unused = other != key and monotonic() - reader.used > _UNUSED_SECS
                if unused and reader.lock.acquire(blocking=False):
                    del self._readers[other]
                    reader.close()
                    reader.lock.release()
            if key not in self._readers:
                self._readers[key] = PartitionReader(self._config, key)
            self._readers[key].used = monotonic()
            return self._readers[key]


def _shared_readers(config: NativeReadConfig) -> _Readers:
    return per_process(_Readers, config)


class ReadPartitions(beam.PTransform):
    """Find partitions and read them, for streaming runs.

    Delivery: what a runner's checkpoint holds is read from there on; without one, from the
    group's committed offsets on. Order: offsets rise per partition, and a chunk that was
    overtaken can be put in its place. Partitions of topics that appear later are found while it
    runs. Bounded with `NativeReadConfig.bounded`, unbounded else.
    """

    def __init__(self, config: NativeReadConfig) -> None:
        super().__init__()
        self._config = config

    def expand(
        self, root: beam.pvalue.PBegin
    ) -> tuple[beam.PCollection[RecordChunk], beam.PCollection[Progress]]:
        """The chunks, and where each partition begins (`EVERY_LANE`)."""
        find, read = beam.ParDo(_FindFn(self._config)), beam.ParDo(_ReadFn(self._config))
        begin = beam.Map(_begin, self._config.bounded)
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
        return {"bootstrap_servers": self._config.source.kafka.bootstrap_servers}


# -- finding -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """How far the looking for partitions has come.

    Attributes:
        bounded: Whether one look is all.
        known: Partitions that were passed on; None before the first look.
    """

    bounded: bool
    known: frozenset[PartitionKey] | None = None


def _begin(_: bytes, bounded: bool) -> Finding:
    return Finding(bounded)


def _begun(found: FoundPartition) -> Progress:
    return Progress(*found.key, found.start, found.start, EVERY_LANE)


class _FindingTracker(RestrictionTracker):
    """To claim is to pass on more partitions; what remains is to look for others."""

    def __init__(self, finding: Finding) -> None:
        self._finding = finding
        self._stopped = False

    def current_restriction(self) -> Finding:
        return self._finding

    def try_claim(self, known: frozenset[PartitionKey]) -> bool:
        if self._stopped:
            return False
        self._finding = Finding(self._finding.bounded, known)
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

    def restriction_size(self, element: Finding, restriction: Finding) -> float:
        return 1.0


class _Finder:
    """What looks for partitions in a worker process."""

    def __init__(self, config: SourceConfig) -> None:
        self.haste = Haste()
        self._config = config
        self._source = SourceOffsets(config, make_consumer(config.kafka))

    def look(self, known: frozenset[PartitionKey] | None, bounded: bool) -> list[FoundPartition]:
        """Partitions that are not known yet.

        Raises:
            KafkaError: The brokers cannot be asked.
        """
        keys = [key for key in self._source.partitions() if key not in (known or ())]
        if not keys:
            return []
        starts = self._source.starts(keys, at_start=known is None)
        # What a starting position came to is committed at once, so that a restart before the
        # first batch is finished does not move it. And an earlier run's halt is over.
        shared_committer(CommitConfig(self._config.kafka)).commit(
            {
                key: start.offset
                for key, start in starts.items()
                if start.resolved or read_halt(start.note)
            }
        )
        return [
            FoundPartition(*key, starts[key].offset, self._source.range(key)[1], bounded)
            for key in keys
        ]


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
        finder = per_process(_Finder, self._config.source)
        if finder.haste.came(monotonic()) and self._config.drain_by_haste:
            return
        known = tracker.current_restriction().known
        try:
            found = finder.look(known, element.bounded)
        except KafkaError as error:
            if known is None:
                raise
            # A broker that is away for a moment; asked again with the next turn.
            _LOGGER.warning("new partitions cannot be looked for: %s", error)
            found = []
        passed_on = (known or frozenset()) | {partition.key for partition in found}
        if not tracker.try_claim(passed_on):
            return
        self._partitions.inc(len(found))
        yield from found
        if not element.bounded:
            finder.haste.asked(monotonic(), _FIND_SECS)
            tracker.defer_remainder(Duration.of(_FIND_SECS))


# -- reading -----------------------------------------------------------------------------------


class _ReadProvider(RestrictionProvider):
    def initial_restriction(self, element: FoundPartition) -> OffsetRange:
        stop = max(element.start, element.end) if element.bounded else _NO_END
        return OffsetRange(element.start, stop)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return _OffsetTracker(restriction)

    def restriction_size(self, element: FoundPartition, restriction: OffsetRange) -> float:
        """The backlog in records: what there is to read, not what may ever come."""
        end = max(element.end, _ends.get(element.key, 0))
        return float(max(0, min(end, restriction.stop) - restriction.start))


class _OffsetTracker(OffsetRestrictionTracker):
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

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: FoundPartition,
        tracker: Any = beam.DoFn.RestrictionParam(_ReadProvider()),
        watermark: Any = beam.DoFn.WatermarkEstimatorParam(_MANUAL),
    ) -> Iterator[TimestampedValue]:
        restriction = tracker.current_restriction()
        readers = _shared_readers(self._config)
        with readers.lend(element.key) as reader:
            now = monotonic()
            if reader.haste.came(now) and self._config.drain_by_haste:
                self._ended.inc()
                text = (
                    "%s-%d: the runner does not wait any more, as in a drain: not read from %d on"
                )
                _LOGGER.info(text, *element.key, restriction.start)
                return
            until = now + _SLICE_SECS
            position = restriction.start
            reader.go_to(position)
            pause_secs = 0
            while position < restriction.stop and not pause_secs:
                if not reader.may_read(len(readers)):
                    if reader.is_halted and element.bounded:
                        # Nothing behind the halt is needed, and nobody will commit it.
                        tracker.try_claim(restriction.stop - 1)
                        return
                    pause_secs = _QUIET_POLL_SECS
                    break
                # Where little comes the pause is long enough for what there is to be fetched.
                lately = now - reader.gave <= _LATELY_SECS
                lost, errors = reader.offsets_lost, reader.errors
                records, next_offset = reader.read(_POLL_SECS if lately else 0)
                now = monotonic()
                self._lost.inc(reader.offsets_lost - lost)
                self._errors.inc(reader.errors - errors)
                if next_offset == position:
                    self._advance(watermark, self._clock() - _HOLD_SECS)
                    pause_secs = 0 if lately else _QUIET_POLL_SECS
                    break
                reader.gave = now
                if next_offset > restriction.stop:
                    count = sum(offset < restriction.stop for offset in records.offsets)
                    records, next_offset = records.slice(0, count), restriction.stop
                if not tracker.try_claim(next_offset - 1):
                    return
                chunk = RecordChunk(
                    *element.key, position, next_offset, records, first=position == element.start
                )
                position = next_offset
                self._records.inc(len(records))
                self._bytes.inc(sum(map(len, filter(None, records.values))))
                yield TimestampedValue(chunk, self._timestamp(records, watermark))
                if now >= until:
                    break
            if position == restriction.stop:
                return
            breath = reader.haste.is_suspected or now - reader.breath > _BREATH_SECS
            if breath and self._config.drain_by_haste:
                pause_secs = _QUIET_POLL_SECS
            if pause_secs:
                reader.breath = now
            reader.haste.asked(monotonic(), pause_secs)
            tracker.defer_remainder(Duration.of(pause_secs))

    def _timestamp(self, records: Records, watermark: Any) -> Timestamp:
        """The newest record's time, but never one to come: a producer may write any number."""
        known = [ms for ms in records.timestamps if ms != NO_TIMESTAMP]
        secs = min(max(known) / 1000, self._clock()) if known else self._clock()
        return self._advance(watermark, max(0.0, secs))

    def _advance(self, watermark: Any, secs: float) -> Timestamp:
        """Move the watermark, never back, and say where it is."""
        before = watermark.current_watermark()
        now = Timestamp.of(secs)
        if before is None or now > before:
            watermark.set_watermark(now)
            return now
        return before


coders.registry.register_coder(FoundPartition, coders.PickleCoder)
coders.registry.register_coder(Finding, coders.PickleCoder)
