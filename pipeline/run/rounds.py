"""Rounds: run the bounded pipeline again and again on this machine, and decide when.

A round reads what is due, hands it to the invoker and writes and commits what has finished. The
invoker, the reader and the committer outlive the rounds, so the function is kept busy while one
round ends and the next begins. Why rounds at all: docs/adr/0001-rounds-on-the-directrunner.md.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from zlib import crc32

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.environments import EmbeddedPythonEnvironment

from pipeline.build import build
from pipeline.options.declare import Config
from pipeline.run.preflight import preflight
from transforms.commit.commit import shared_committer
from transforms.decode.registry import shared_registry
from transforms.errors import SinkError, Stopped, from_runner
from transforms.invoke.invoke import InvokeConfig, shared_invoker, why_broken
from transforms.invoke.invoker import Invoker, QueueView
from transforms.kafka.offsets import LOOK_SECS, SourceOffsets
from transforms.read.rounds import Room, Round, shared_reader
from transforms.records import Finished, PartitionKey

_LOGGER = logging.getLogger(__name__)

# The state is in this process already. To cache it there a second time only costs: the cache weighs
# each value it takes by going through the globals of all modules, a millisecond a time.
worker_handlers.STATE_CACHE_SIZE_MB = 0

_DISCOVER_SECS = 2.0
_ENDS_SECS = 0.5
_BUSY_POLL_SECS = 0.02
_IDLE_POLL_SECS = 0.2
# While much is under way fewer, larger rounds; else a result should not have to wait.
_COLLECT_SECS_BUSY = 1.0
_COLLECT_SECS_IDLE = 0.1


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """What bounds memory, and keeps one partition from using up what is there for all.

    Attributes:
        records: Records a round may read.
        bytes: Bytes a round may read.
        first_records: Records of the first round, small so that the function gets to work.
        queue_records: Records a partition may have waiting for the function; as many more may
            have been read for it.
        queue_bytes: Bytes of payloads a partition may have waiting; the same holds for them.
        held_bytes: Bytes of payloads of all partitions together; above it a partition gets
            one batch at a time. Of records that were only read, the same.
        collect_records: Finished records that are worth a round of their own.
    """

    records: int = 100_000
    bytes: int = 32 * 2**20
    first_records: int = 10_000
    queue_records: int = 25_000
    queue_bytes: int = 16 * 2**20
    held_bytes: int = 64 * 2**20
    collect_records: int = 50_000

    def room(self, queue: QueueView, held_bytes: int, turn_records: int) -> tuple[int, int]:
        """How many records and bytes more a partition may hand over; 0 for not now.

        Args:
            queue: What it has waiting already.
            held_bytes: What all partitions together have.
            turn_records: Records of a batch for each of its lanes.
        """
        if queue.halted:
            return 0, 0
        if held_bytes >= self.held_bytes:
            return (0, 0) if queue.batches else (turn_records, self.queue_bytes)
        records = self._most_records(turn_records) - queue.records
        size = self.queue_bytes - queue.bytes
        return (records, size) if records >= turn_records and size > 0 else (0, 0)

    def wanted(
        self, records: int, size: int, all_bytes: int, ready: bool, turn_records: int
    ) -> bool:
        """Whether more should be read of a partition that may hand over something.

        Args:
            records: Its records that were read and not handed over.
            size: Their bytes.
            all_bytes: The bytes of all partitions' such records.
            ready: Whether there is enough for a batch among them.
            turn_records: Records of a batch for each of its lanes.
        """
        if not ready:
            # Waiting alone would not make a batch of it, or only when its window is over.
            return True
        return (
            records < self._most_records(turn_records)
            and size < self.queue_bytes
            and all_bytes < self.held_bytes
        )

    def starving(self, queue: QueueView, turn_records: int) -> bool:
        """Whether a partition has so little left that it should be read for."""
        return 2 * queue.records <= self._most_records(turn_records)

    def _most_records(self, turn_records: int) -> int:
        """What a partition may have waiting: two turns at least, however large one is."""
        return max(self.queue_records, 2 * turn_records)


@dataclass(frozen=True, slots=True)
class Share:
    """What belongs to one of several processes that run the same. Pure.

    Attributes:
        index: Which of them it is.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def has(self, key: PartitionKey) -> bool:
        """Whether a partition is its own: each topic's are dealt out in turn, so that every
        process gets as many as any other, more or less by one."""
        topic, partition = key
        return (crc32(topic.encode()) + partition) % self.count == self.index

    def part_of(self, total: int) -> int:
        """Its part of so many things; all parts together are the total."""
        return total // self.count + (self.index < total % self.count)


@dataclass(slots=True)
class Totals:
    """Sums over all rounds, by the metrics' names."""

    counters: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def __getitem__(self, name: str) -> int:
        return self.counters[name]

    @property
    def records(self) -> int:
        """Records that have come to their end."""
        return self["write.responses"] + self["write.errors"] + self["filter.filtered"]


@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands; what progress and summary show.

    Attributes:
        totals: Sums over all rounds.
        in_flight: Invocations running now.
        lags: Per partition, records behind what is committed; None if not known yet.
        halted: Batches that stopped their partitions.
        committed: The group's offsets as far as this run knows them.
        elapsed_secs: Since the program began.
        limit: Invocations that may run at once now; None if other processes invoke, each with
            its own limit and breaker.
        in_flight_max: The most that have been running at once.
        breaker_open: Whether nothing is invoked now, but for a probe from time to time.
        breaker_openings: How often it came to that.
        begun: Whether the partitions are known.
    """

    totals: Totals
    in_flight: int
    lags: dict[PartitionKey, int | None]
    halted: list[Finished]
    committed: dict[PartitionKey, int]
    elapsed_secs: float
    limit: int | None = None
    in_flight_max: int = 0
    breaker_open: bool = False
    breaker_openings: int = 0
    begun: bool = False

    @staticmethod
    def of_nothing(elapsed_secs: float) -> Status:
        """How a run stands that could not begin."""
        return Status(Totals(), 0, {}, [], {}, elapsed_secs)


class Graph:
    """The bounded pipeline, run again and again.

    Args:
        wire: Puts the steps into a pipeline.
    """

    def __init__(self, wire: Callable[[beam.Pipeline], Any]) -> None:
        self._options = PipelineOptions([])
        pipeline = beam.Pipeline(runner=FnApiRunner(), options=self._options)
        wire(pipeline)
        # Translated once: building and translating costs twice what running an empty round does.
        self._translated = pipeline.to_runner_api(
            default_environment=EmbeddedPythonEnvironment.default()
        )

    def run(self, totals: Totals) -> None:
        """Run it once, and add what it counted.

        Raises:
            SinkError: A step failed.
        """
        try:
            result = FnApiRunner().run_via_runner_api(self._translated, self._options)
            result.wait_until_finish()
        except Exception as error:
            raise from_runner(error) from None
        for counter in result.metrics().query()["counters"]:
            name = f"{counter.key.metric.namespace}.{counter.key.metric.name}"
            totals.counters[name] += counter.committed or 0
        totals.rounds += 1


def drain(invoker: Invoker, config: InvokeConfig, collect: Callable[[], None]) -> None:
    """End what is running, then write and commit what it came to.

    Args:
        invoker: Begins no further call.
        config: What it was made of.
        collect: Runs a round that hands nothing over.

    Raises:
        SinkError: What broke the invoker off, after all that.
    """
    invoker.stop()
    invoker.join(config.function.timeout_secs + 10)
    if invoker.has_finished:
        collect()
    if error := why_broken(invoker, config.function):
        raise error


class Rounds:
    """Runs rounds until told to stop, caught up, or nothing can go on.

    Args:
        config: What to run.
        stop: Set from outside to end after the round that is running.
        started: When the program began, by `timer`.
        limits: What bounds a round.
        timer: Monotonic seconds.
        share: Which partitions to read, if other processes read the others.
    """

    def __init__(
        self,
        config: Config,
        stop: threading.Event,
        started: float | None = None,
        limits: RoundLimits = RoundLimits(),
        timer: Callable[[], float] = monotonic,
        share: Share = Share(),
    ) -> None:
        self._config = config
        self._share = share
        self._stop = stop
        self._limits = limits
        self._timer = timer
        self._started = timer() if started is None else started
        self._totals = Totals()
        self._graph = Graph(lambda pipeline: build(pipeline, config))
        self._invoker = shared_invoker(config.invoke)
        self._reader = shared_reader(config.read)
        self._committer = shared_committer(config.commit)
        self._source = SourceOffsets(config.source, self._reader.consumer)
        if config.write.registry:
            shared_registry(config.write.registry).stop = stop
        self._targets: dict[PartitionKey, int] = {}
        self._discovered = float("-inf")
        self._ends: dict[PartitionKey, int | None] | None = None
        self._looked = float("-inf")

    def run(self) -> Status:
        """Run to the end.

        Raises:
            SinkError: The run cannot go on; what was finished before is committed.
        """
        if self._config.run.preflight:
            preflight(self._config, self._source)
        self._discover(at_start=True)
        self._look_at_ends(0)
        while not self._stop.is_set() and not self._invoker.broken and not self._ended():
            busy = self._invoker.pending_batches > 0 or self._invoker.has_finished
            self._reader.fill(_BUSY_POLL_SECS if busy else _IDLE_POLL_SECS)
            self._look_at_ends()
            if self._timer() - self._discovered > _DISCOVER_SECS:
                self._discover(at_start=False)
            rooms = self._rooms()
            ready = {room.key for room in rooms if self._reader.ready(room.key, self._flush)}
            self._fetch(rooms, ready)
            if self._due(ready):
                self._run_round(rooms)
        drain(self._invoker, self._config.invoke, lambda: self._run_round([]))
        self._look_at_ends(0)
        return self.status()

    def status(self) -> Status:
        """How the run stands; may be called from another thread."""
        committed, ends = dict(self._committer.committed), self._ends
        return Status(
            totals=self._totals,
            in_flight=self._invoker.in_flight,
            lags={key: _lag(end, committed.get(key)) for key, end in (ends or {}).items()},
            halted=self._invoker.halted,
            committed=committed,
            elapsed_secs=self._timer() - self._started,
            limit=self._invoker.limit,
            in_flight_max=self._invoker.in_flight_max,
            breaker_open=self._invoker.breaker_open,
            breaker_openings=self._invoker.breaker_openings,
            begun=ends is not None,
        )

    # -- one pass of the loop --------------------------------------------------------------

    def _rooms(self) -> list[Room]:
        """What each partition may hand over now, those left out that may not."""
        queues = {
            key: self._invoker.queue(key)
            for key in self._reader.partitions
            if not self._at_target(key)
        }
        held = sum(queue.bytes for queue in queues.values())
        rooms = [
            Room(*key, *self._limits.room(queue, held, self._turn_records))
            for key, queue in queues.items()
        ]
        return [room for room in rooms if room.records]

    def _fetch(self, rooms: list[Room], ready: set[PartitionKey]) -> None:
        """Fetch for those that may hand over something, but not for those of which enough for that
        has been read."""
        reader, all_bytes = self._reader, self._reader.held_bytes
        reader.set_wanted(
            room.key
            for room in rooms
            if self._limits.wanted(
                *reader.waiting(room.key), all_bytes, room.key in ready, self._turn_records
            )
        )

    def _due(self, ready: set[PartitionKey]) -> bool:
        """Whether a round is worth its while now, with partitions that are ready for one."""
        invoker, limits, turn_records = self._invoker, self._limits, self._turn_records
        if any(limits.starving(invoker.queue(key), turn_records) for key in ready):
            return True
        if not invoker.has_finished:
            return False
        lanes = len(self._reader.partitions) * self._config.lanes.count
        busy = ready or invoker.pending_batches > 2 * lanes
        patience_secs = _COLLECT_SECS_BUSY if busy else _COLLECT_SECS_IDLE
        return (
            invoker.finished_age_secs >= patience_secs
            or invoker.finished_records >= limits.collect_records
            or not invoker.pending_batches
        )

    def _run_round(self, rooms: list[Room]) -> None:
        limits = self._limits
        # Each of the first rounds twice the one before: the function gets to work early, and what
        # it has been given lasts until the next round has read.
        records = min(limits.records, limits.first_records << min(self._totals.rounds, 16))
        records = max(records, self._turn_records)
        self._reader.begin(Round(tuple(rooms), records, limits.bytes, self._flush))
        try:
            self._graph.run(self._totals)
        except Stopped as stopped:
            _LOGGER.warning("%s; it goes on there with the next run", stopped)

    @property
    def _turn_records(self) -> int:
        """Records of a batch for each lane of a partition."""
        return self._config.read.batch_size * self._config.lanes.count

    @property
    def _flush(self) -> bool:
        """In a run that ends, nothing more is waited for to fill a batch."""
        return self._config.run.until == "caught_up"

    # -- beginning and end -----------------------------------------------------------------

    def _discover(self, at_start: bool) -> None:
        """Take in partitions that were not there before."""
        self._discovered = self._timer()
        try:
            known = set(self._reader.partitions)
            found = self._source.partitions() if at_start else self._source.partitions(LOOK_SECS)
            keys = [key for key in found if key not in known and self._share.has(key)]
            starts = self._source.starts(keys, at_start) if keys else {}
        except SinkError:
            if at_start:
                raise
            return  # a broker that is away for a moment; asked again with the next turn
        if self._flush:
            self._targets |= {key: self._source.range(key)[1] for key in keys}
        if starts:
            # What a starting position came to is committed at once, so that a crash before the
            # first batch is finished does not move it.
            self._committer.commit({k: s.offset for k, s in starts.items() if s.resolved})
            marks = {
                key: self._config.lanes.marks(start.note, start.offset, start.end)
                for key, start in starts.items()
            }
            for key, each in marks.items():
                self._committer.begin(key, each)
            self._reader.assign(marks)

    def _ended(self) -> bool:
        """Whether nothing more is to come, or nothing more can."""
        invoker = self._invoker
        if invoker.pending_batches or invoker.has_finished:
            return False
        halted = {finished.key for finished in invoker.halted}
        going_on = [key for key in self._reader.partitions if key not in halted]
        if halted and not going_on:
            # Of several processes another may go on, and partitions be found for this one.
            return self._flush or self._share.count == 1
        return self._flush and all(map(self._at_target, going_on))

    def _at_target(self, key: PartitionKey) -> bool:
        """Whether a run that ends has read what was there when it found the partition."""
        return self._flush and self._reader.position(key) >= self._targets[key]

    def _look_at_ends(self, every_secs: float = _ENDS_SECS) -> None:
        """Note where the partitions end, for `status`. Another thread must not ask the consumer: it
        would have to wait for a moment in which this one does not, and may never meet with one."""
        if self._timer() - self._looked >= every_secs:
            self._looked = self._timer()
            self._ends = {key: self._reader.end(key) for key in self._reader.partitions}


def _lag(end: int | None, committed: int | None) -> int | None:
    return None if committed is None or end is None else max(0, end - committed)
