"""Redrive: put the original records of an error topic through the pipeline again.

In windows: read some error records, hand their originals to the steps of the pipeline, wait until
all have come to an end, commit, go on. The main run's offsets are left alone. Why windows, and how
an error record is never redriven twice: docs/adr/0011-redrive.md.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from pipeline.build import build
from pipeline.options.config import Config
from pipeline.redrive.counts import Counts
from pipeline.run.graph import Graph
from pipeline.run.preflight import check_outputs
from pipeline.run.rounds import drain, hear, run_or_stop
from pipeline.run.status import Status, Totals, with_calls
from transforms.errors import KafkaError, UsageError
from transforms.invoke.invoke import shared_invoker
from transforms.kafka.client import describe
from transforms.kafka.offsets import SourceConfig
from transforms.read.rounds import ReadConfig, Room, Round, RoundReader
from transforms.records import PartitionKey
from transforms.redrive.ledger import Ledger, Redriven
from transforms.redrive.selection import ErrorRecord, Original, error_records, read_originals
from transforms.redrive.steps import (
    CommitRedriven,
    RedriveConfig,
    TakeRedriven,
    cannot_remember,
    commit,
    marks,
    refresh,
    shared_ledger,
)

_LOGGER = logging.getLogger(__name__)

_POLL_SECS = 0.2
_COLLECT_SECS = 1.0


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """What bounds a window, and so the memory of a redrive.

    Attributes:
        records: Originals after which no more is read.
        bytes: The same in bytes of originals.
        read_records: Error records to read at a time.
        read_bytes: Bytes of error records to read at a time, without their headers.
    """

    records: int = 25_000
    bytes: int = 32 * 2**20
    read_records: int = 1_000
    read_bytes: int = 4 * 2**20


class Redrive:
    """Redrives what is in an error topic when it begins.

    Args:
        config: The pipeline.
        redrive: What to redrive, and which group remembers it.
        stop: Set from outside to end after what is running.
        dry_run: Only count.
        first: Begin at the first error record where no earlier redrive is known.
        started: When the program began, by `timer`.
        limits: What bounds a window.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        redrive: RedriveConfig,
        stop: threading.Event,
        dry_run: bool = False,
        first: bool = False,
        started: float | None = None,
        limits: WindowLimits = WindowLimits(),
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config
        self._redrive = redrive
        self._stop = stop
        self._dry_run = dry_run
        self._first = first
        self._timer = timer
        self._started = timer() if started is None else started
        self._limits = limits
        self._totals = Totals()
        self._ledger: Ledger = shared_ledger(redrive)
        self._invoker = shared_invoker(config.invoke)
        self._stats_before = self._invoker.stats
        # Each error record is due at once.
        errors = SourceConfig(redrive.kafka, (redrive.error_topic,))
        self._reader = RoundReader(ReadConfig(errors, 1, 1, 0))
        self._source = errors.partitions(self._reader.fetcher)
        self._ends: dict[PartitionKey, int] = {}
        self._pattern = re.compile(redrive.topics_regex) if redrive.topics_regex else None
        self._marks: dict[PartitionKey, int] = {}
        hear(config, stop)
        self.counts = Counts()

    def run(self) -> Status:
        """Redrive to the end of what there was at the start.

        Raises:
            SinkError: It cannot go on; what was finished before is committed.
        """
        if self._config.run.preflight and not self._dry_run:
            check_outputs(self._config)
        self._begin()
        if self._dry_run:
            while window := self._window():
                self._hand_over(window)
                self._ledger.take()
            return self.status()
        graph = Graph(
            lambda pipeline: build(
                pipeline, self._config, TakeRedriven(self._redrive), CommitRedriven(self._redrive)
            )
        )
        while not self._invoker.broken and (window := self._window()):
            if not self._ledger.has_room_for(record for record, _ in window):
                raise KafkaError(cannot_remember(self._redrive))
            self._hand_over(window)
            run_or_stop(graph, self._totals)
            self._finish_window(graph)
        drain(self._invoker, self._config.invoke, lambda: run_or_stop(graph, self._totals))
        graph.close()
        refresh(self._redrive, now=True)
        self._marks = marks(self._redrive)
        return self.status()

    @property
    def redriven(self) -> int:
        """Error records that were redriven by this run."""
        return self._ledger.redriven

    def status(self) -> Status:
        """How it stands; may be called from another thread."""
        return Status(
            totals=with_calls(self._totals, self._invoker, self._stats_before),
            in_flight=self._invoker.in_flight,
            lags={
                key: max(0, end - self._reader.position(key))
                for key, end in dict(self._ends).items()
            },
            halted=self._invoker.halted,
            committed=dict(self._marks),
            elapsed_secs=self._timer() - self._started,
            trouble=self._invoker.trouble,
        )

    # -- one window ------------------------------------------------------------------------

    def _window(self) -> list[tuple[ErrorRecord, list[Original]]]:
        """The next error records to redrive; none at the end, or when told to stop."""
        limits = self._limits
        window: list[tuple[ErrorRecord, list[Original]]] = []
        records = size = 0
        while not self._stop.is_set() and records < limits.records and size < limits.bytes:
            keys = [key for key, end in self._ends.items() if self._reader.position(key) < end]
            if not keys:
                break
            self._reader.set_wanted(keys)
            self._reader.fill(_POLL_SECS)
            rooms = tuple(Room(*key, limits.read_records, limits.read_bytes) for key in keys)
            self._reader.begin(Round(rooms, limits.read_records, limits.read_bytes, flush=True))
            for chunk in self._reader.take():
                end = self._ends[chunk.topic, chunk.partition]
                redriven = self._ledger.partitions[chunk.partition]
                for record in error_records(chunk):
                    # Behind the end are those that this run has written.
                    if record.offset >= end or self._was_redriven(record):
                        continue
                    originals = read_originals(record)
                    if originals is None:
                        # Passed over: no other redrive could take it either.
                        self.counts.left["without_originals"] += 1
                        continue
                    if not self._takes(record, originals):
                        redriven.leave(record.offset)
                        continue
                    self.counts.take(record, originals)
                    redriven.take(record.offset)
                    window.append((record, originals))
                    records += len(originals)
                    size += sum(map(len, record.originals))
                redriven.look(min(chunk.next_offset, end))
        return window

    def _hand_over(self, window: Sequence[tuple[ErrorRecord, Sequence[Original]]]) -> None:
        fresh = self._ledger.begin(window)
        self.counts.repeated += sum(len(originals) for _, originals in window) - fresh

    def _was_redriven(self, record: ErrorRecord) -> bool:
        known = record.offset in self._ledger.partitions[record.partition]
        self.counts.left["before"] += known
        return known

    def _takes(self, record: ErrorRecord, originals: Sequence[Original]) -> bool:
        """Whether an error record is to be redriven; counts it if it is not."""
        left, limit = self.counts.left, self._redrive.limit
        if not self._redrive.selection.takes(record):
            left["not_selected"] += 1
        elif not all(self._reads(original["topic"]) for original in originals):
            left["other_topics"] += 1
        elif limit is not None and self.counts.taken.error_records >= limit:
            left["over_limit"] += 1
        else:
            return True
        return False

    def _reads(self, topic: str) -> bool:
        """Whether the pipeline reads a topic; an error topic may serve several."""
        if self._pattern:
            return bool(self._pattern.fullmatch(topic))
        return topic in self._redrive.topics

    def _finish_window(self, graph: Graph) -> None:
        """Collect until all that was handed over has come to an end."""
        invoker = self._invoker
        while invoker.pending_batches or invoker.has_finished:
            if self._stop.is_set() or invoker.broken:
                return
            invoker.wait(
                lambda it: (
                    bool(it.broken)
                    or not it.pending_batches
                    or it.finished_age_secs >= _COLLECT_SECS
                ),
                _POLL_SECS,
            )
            if invoker.finished_age_secs >= _COLLECT_SECS or not invoker.pending_batches:
                run_or_stop(graph, self._totals)
            refresh(self._redrive)
        # Error records whose records all had come to an end before wait for no progress.
        commit(self._redrive)
        self._marks = marks(self._redrive)

    # -- where to begin --------------------------------------------------------------------

    def _begin(self) -> None:
        """Look up what is redriven already and where the topic ends, and begin to read."""
        config, source = self._redrive, self._source
        keys = source.partitions()
        if not keys:
            raise KafkaError(
                f"--error_topic={config.error_topic} not found in {describe(config.kafka)}"
            )
        ranges = {key: source.range(key) for key in keys}
        committed = source.committed(keys)
        unknown = [
            number
            for (_, number), (low, high) in ranges.items()
            if low < high and (config.error_topic, number) not in committed
        ]
        if unknown and not self._first:
            problem = unknown_text(config, unknown, len(keys))
            if not self._dry_run:
                raise UsageError([problem])
            _LOGGER.warning("%s", problem)
        since = self._since(ranges)
        for key, (low, high) in ranges.items():
            offset, metadata = committed.get(key, (low, ""))
            try:
                # Behind the end: the topic was made anew.
                redriven = Redriven(offset, metadata, low) if offset <= high else Redriven(low)
            except ValueError:
                raise KafkaError(
                    f"--redrive_group={config.kafka.group} is in use by another program; give "
                    f"another one"
                ) from None
            redriven.skip(min(since.get(key, low), high))
            self._ledger.partitions[key[1]] = redriven
        if not self._dry_run:
            # From then on the broker counts how long it remembers it.
            commit(config)
        self._ends = {key: high for key, (_, high) in ranges.items()}
        self._reader.assign({key: [self._ledger.partitions[key[1]].position] for key in keys})

    def _since(self, ranges: Mapping[PartitionKey, tuple[int, int]]) -> dict[PartitionKey, int]:
        """Where --since begins, so that what is older need not be read."""
        since_ms = self._redrive.selection.since_ms
        return {} if since_ms is None else self._source.at_timestamp(ranges, since_ms)


def unknown_text(config: RedriveConfig, unknown: Sequence[int], partitions: int) -> str:
    """What to say where no earlier redrive is known."""
    some = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
    which = "" if len(unknown) == partitions else f" in {len(unknown)} partitions ({some})"
    return (
        f"--redrive_group={config.kafka.group} has no offsets of --error_topic="
        f"{config.error_topic}{which}: either nothing was redriven yet, or it was so long ago that "
        f"the broker has forgotten it (offsets.retention.minutes). Give --first_redrive to begin "
        f"at the first error record, with --since later; --dry_run counts what that would be"
    )
