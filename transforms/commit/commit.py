"""Commit: Progress -> committed offsets of the consumer group.

They are the durable truth on every runner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.userstate import (
    ReadModifyWriteRuntimeState,
    ReadModifyWriteStateSpec,
    RuntimeTimer,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from transforms.commit.committer import CommitConfig, Committer, shared_committer
from transforms.commit.contiguous import ContiguousOffsets
from transforms.facts import number, unversioned, versioned
from transforms.per_process import forget
from transforms.records import (
    END_NOTE,
    EVERY_LANE,
    HALT_NOTE,
    LaneKey,
    PartitionKey,
    Progress,
)

_LOGGER = logging.getLogger(__name__)

_ASK_AGAIN_SECS = 10.0

_VERSION = 1
_WINDOW = GlobalWindow()
_WINDOW_END = _WINDOW.max_timestamp()


class CommitOffsets(beam.PTransform):
    """Commit each partition's highest contiguous finished offset, once per bundle.

    Comes after Write in the graph, so an offset is committed only when the responses and error
    records below it are acknowledged.

    Args:
        config: The cluster and the group.
        begun: In a streaming run, where each partition begins, as a range without records: how far
            it is done is kept in state then, since its progress may come from several workers.
            None if it is kept in this process, which sees all of it and is told by itself.
        told: Partitions that `begun` has; of any other the first range to come is taken for one
            where all of its lanes begin. None if it has all.
    """

    def __init__(
        self,
        config: CommitConfig,
        begun: beam.PCollection[Progress] | None = None,
        told: frozenset[PartitionKey] | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._begun = begun
        self._told = told

    def expand(self, progress: beam.PCollection[Progress]) -> beam.PCollection[Any]:
        if self._begun is None:
            return progress | "CommitGroup" >> beam.ParDo(_CommitFn(self._config))
        types = tuple[PartitionKey, bytes]
        keyed = progress | "ByPartition" >> beam.ParDo(_PackFn()).with_output_types(types)
        begun = self._begun | "BegunByPartition" >> beam.Map(pack).with_output_types(types)
        return (
            (keyed, begun)
            | "WithBeginnings" >> beam.Flatten()
            | "CommitPartition" >> beam.ParDo(_CommitPartitionFn(self._config, self._told))
        )

    def display_data(self) -> dict[str, Any]:
        return {"ledger": self._config.source.ledger}


class _CommitBundleFn(beam.DoFn):
    """Commits what its bundle came to."""

    def __init__(self, config: CommitConfig) -> None:
        self._config = config
        self._commits = beam.metrics.Metrics.counter("commit", "commits")
        self._next_offsets: dict[PartitionKey, int] = {}
        self._notes: dict[PartitionKey, str] = {}

    def start_bundle(self) -> None:
        self._next_offsets, self._notes = {}, {}

    def finish_bundle(self) -> Iterator[Any]:
        self._commit(shared_committer(self._config))
        self._commits.inc(len(self._next_offsets))
        yield from ()

    def _commit(self, committer: Committer) -> None:
        committer.commit(self._next_offsets, self._notes)


class _CommitFn(_CommitBundleFn):
    """In rounds nobody waits for the answer: the next round begins meanwhile. Where outcomes are
    written in a transaction it ends here."""

    def __init__(self, config: CommitConfig) -> None:
        super().__init__(config)
        self._written: set[PartitionKey] = set()

    def start_bundle(self) -> None:
        super().start_bundle()
        self._written = set()

    def _commit(self, committer: Committer) -> None:
        put = {key: (offset, self._notes[key]) for key, offset in self._next_offsets.items()}
        if self._config.settles and self._written:
            if not committer.settle(put, self._written):
                self._next_offsets = {}
        elif put:
            committer.put(put)

    def process(self, progress: Progress) -> Iterable[Any]:
        key = (progress.topic, progress.partition)
        self._written.add(key)
        done = shared_committer(self._config).done
        if not done.marks(key):
            return ()  # another process has it by now, and takes it on from what was committed
        done.add(progress)
        # Also if it is where it was: another lane may be further.
        marks = done.marks(key)
        self._next_offsets[key] = min(marks)
        self._notes[key] = self._config.lanes.note(marks)
        return ()


def pack(progress: Progress) -> tuple[PartitionKey, bytes]:
    """Progress as it crosses to the worker that commits its partition, of which it says no more
    than the key does."""
    count = progress.next_offset - progress.start
    facts: list[int | str] = [number(progress.start), number(count), progress.lane]
    facts += [progress.halted, progress.asked]
    while facts and not facts[-1]:
        facts.pop()
    return (progress.topic, progress.partition), versioned(_VERSION, facts)


def unpack(key: PartitionKey, data: bytes) -> Progress:
    """The progress of a partition.

    Raises:
        StateError: A later version has written it.
    """
    facts = unversioned(_VERSION, data, "ranges that are done")
    start, count, lane, halted, asked = (*facts, *(0, 0, 0, "", 0)[len(facts) :])[:5]
    return Progress(*key, int(start), int(start) + int(count), lane, halted, asked)


def merged(every: Iterable[Progress]) -> Iterator[Progress]:
    """The same said in as few ranges as there can be. Pure."""
    open_ranges: dict[LaneKey, Progress] = {}
    for progress in every:
        lane = (progress.topic, progress.partition, progress.lane)
        before = open_ranges.get(lane)
        if before and not before.halted and before.next_offset == progress.start:
            progress = replace(progress, start=before.start)
        elif before:
            yield before
        open_ranges[lane] = progress
    yield from open_ranges.values()


class _PackFn(beam.DoFn):
    """Packs what a bundle has done, in as few elements as it can be said in."""

    def __init__(self) -> None:
        self._done: list[Progress] = []

    def start_bundle(self) -> None:
        self._done = []

    def process(self, progress: Progress) -> None:
        self._done.append(progress)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for progress in merged(self._done):
            yield WindowedValue(pack(progress), _WINDOW_END, (_WINDOW,))


@dataclass(slots=True)
class _Partition:
    """How far a partition is done, and what stopped it, if something did."""

    done: ContiguousOffsets
    halt_note: str = ""

    def encode(self, key: PartitionKey) -> bytes:
        """For the state, which has the key."""
        marks, held = self.done.keep(key)
        facts: dict[str, Any] = {"marks": list(map(number, marks))}
        if held:
            facts["held"] = [(lane, number(start), number(end)) for lane, start, end in held]
        if self.halt_note:
            facts["halt"] = self.halt_note
        return versioned(_VERSION, facts)

    @staticmethod
    def decode(key: PartitionKey, data: bytes) -> _Partition:
        """See `encode`.

        Raises:
            StateError: A later version has written it.
        """
        facts = unversioned(_VERSION, data, "the marks of partitions")
        held = [(lane, int(start), int(end)) for lane, start, end in facts.get("held", ())]
        done = ContiguousOffsets.kept(key, list(map(int, facts["marks"])), held)
        return _Partition(done, facts.get("halt", ""))


def _read(key: PartitionKey, done_state: ReadModifyWriteRuntimeState) -> _Partition | None:
    data = done_state.read()
    return None if data is None else _Partition.decode(key, data)


class _CommitPartitionFn(_CommitBundleFn):
    DONE = ReadModifyWriteStateSpec("commit_done", coders.BytesCoder())
    REFRESH = TimerSpec("commit_refresh", beam.TimeDomain.REAL_TIME)
    # Fires at a drain and when a bounded run is done.
    WINDOW_END = TimerSpec("commit_window_end", beam.TimeDomain.WATERMARK)

    def __init__(
        self,
        config: CommitConfig,
        told: frozenset[PartitionKey] | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(config)
        self._told = told
        self._clock = clock
        self._ask_at: dict[PartitionKey, float] = {}
        self._waits = False

    def start_bundle(self) -> None:
        super().start_bundle()
        self._waits = False

    def _commit(self, committer: Committer) -> None:
        if not self._config.behind:
            super()._commit(committer)
            return
        try:
            if self._next_offsets:
                committer.put({k: (at, self._notes[k]) for k, at in self._next_offsets.items()})
            if self._waits:
                committer.flush()
        except BaseException:
            # It commits nothing more. A runner may begin the job again in this process.
            forget(Committer, self._config)
            raise

    def process(
        self,
        element: tuple[PartitionKey, bytes],
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
        refresh: RuntimeTimer = beam.DoFn.TimerParam(REFRESH),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterable[Any]:
        key, data = element
        progress = unpack(key, data)
        partition = _read(key, done_state)
        if progress.asked:
            self._answer(key, partition, progress.asked)
            return ()
        if partition is None:
            partition = _Partition(ContiguousOffsets())
            self._set(refresh)
            window_end.set(window.end)
        done = partition.done
        before = min(done.marks(key), default=-1)
        begins = progress.lane == EVERY_LANE
        if not done.marks(key) and (begins or self._begins_unsaid(key)):
            done.begin(key, [progress.start] * self._config.lanes.count)
        if not begins:
            done.add(progress)
        if done.waits(key) and not self._ends:
            self._skip(key, done)
        stops = bool(progress.halted and not partition.halt_note)
        if stops:
            # Kept with the offset, it can be seen from anywhere, whichever runner this is.
            partition.halt_note = HALT_NOTE + progress.halted
            self._waits = True
        if stops or min(done.marks(key), default=-1) > before:
            self._commit_again(key, partition)
        done_state.write(partition.encode(key))
        return ()

    @on_timer(REFRESH)
    def refresh(
        self,
        key: PartitionKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
        refresh: RuntimeTimer = beam.DoFn.TimerParam(REFRESH),  # type: ignore[assignment]
    ) -> Iterable[Any]:
        self._commit_again(key, _read(key, done_state))
        if not self._ends or self._next_offsets.get(key) != self._config.source.names.ended:
            self._set(refresh)
        return ()

    def _set(self, refresh: RuntimeTimer) -> None:
        if self._config.refresh_secs is not None:
            refresh.set(Timestamp.of(self._clock() + self._config.refresh_secs))

    @on_timer(WINDOW_END)
    def end(
        self,
        key: PartitionKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
        refresh: RuntimeTimer = beam.DoFn.TimerParam(REFRESH),  # type: ignore[assignment]
    ) -> Iterable[Any]:
        # Flink's drain waits for every timer that is set, and fires none of real time any more.
        refresh.clear()
        self._commit_again(key, _read(key, done_state))
        self._waits = True
        return ()

    @property
    def _ends(self) -> bool:
        """Whether partitions end, and others take their place. What is kept of such a one may be
        from before the job was restored; to skip to it would have the next ones begin beside it."""
        return self._config.source.names.ended is not None

    def _answer(self, key: PartitionKey, partition: _Partition | None, asked: int) -> None:
        """Commit where a partition stands, and if that is its end, that it was asked. What is kept
        may be from before the job was restored: then it is less."""
        self._commit_again(key, partition)
        if self._next_offsets.get(key) == self._config.source.names.ended:
            self._notes[key] = f"{END_NOTE}{asked}"
        # The state must not be kept with the question in it, and the answer lost.
        self._waits = True

    def _begins_unsaid(self, key: PartitionKey) -> bool:
        return self._told is not None and key not in self._told

    def _skip(self, key: PartitionKey, done: ContiguousOffsets) -> None:
        """Skip what an earlier worker has done.

        A job may go back to a checkpoint in which a partition has begun and its reader has not.
        That begins at what is committed by then: the ranges before it never come.
        """
        if (now := time.monotonic()) < self._ask_at.get(key, now):
            return
        self._ask_at[key] = now + _ASK_AGAIN_SECS
        if (kept := shared_committer(self._config).kept(key)) is not None:
            done.skip(key, kept)
            at = self._config.source.names.stood(kept)
            _LOGGER.info("%s-%d goes on at %s, where the group stands", *key, at)

    def _commit_again(self, key: PartitionKey, partition: _Partition | None) -> None:
        """Have the bundle commit where a partition stands, if that is known."""
        if partition and (marks := partition.done.marks(key)):
            self._next_offsets[key] = min(marks)
            self._notes[key] = partition.halt_note
