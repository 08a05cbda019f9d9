"""Commit: Progress -> committed offsets of the consumer group.

They are the durable truth on every runner.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
from apache_beam.utils.timestamp import Timestamp
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, TopicPartition

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, make_consumer, reason
from transforms.lanes import Lanes
from transforms.per_process import per_process
from transforms.records import (
    EVERY_LANE,
    HALT_NOTE,
    LaneKey,
    PartitionKey,
    Progress,
)

_LOGGER = logging.getLogger(__name__)

_RETRY_SECS = 60.0
REFRESH_SECS = 3600
INTERVAL_SECS = 0.1
_FOREIGN_MEMBER = frozenset(
    {
        ErrorCode.UNKNOWN_MEMBER_ID,
        ErrorCode.ILLEGAL_GENERATION,
        ErrorCode.REBALANCE_IN_PROGRESS,
    }
)


@dataclass(frozen=True, slots=True)
class CommitConfig:
    """What is committed.

    Attributes:
        kafka: The cluster and the group.
        lanes: How a partition's records are divided.
        refresh_secs: How often each partition's offset is committed again, be it where it was. No
            consumer is a member of the group, so the broker forgets an offset
            (`offsets.retention.minutes`) by when it was committed last, even while we run. None in
            a streaming run that ends: there each is committed once more at the end, and a timer
            that is set far ahead would keep the run from ending.
        interval_secs: How long, at least, is between two commits of what rounds have finished.
    """

    kafka: KafkaConfig
    lanes: Lanes = Lanes()
    refresh_secs: float | None = REFRESH_SECS
    interval_secs: float = INTERVAL_SECS


class ContiguousOffsets:
    """The offset of a partition below which everything is done, in all of its lanes. Pure.

    Ranges may arrive in any order; one whose predecessor in its lane is missing is held back, so
    the mark never passes unfinished records. So are all ranges of a partition of which is not known
    yet where it begins.
    """

    def __init__(self) -> None:
        self._marks: dict[PartitionKey, list[int]] = {}
        self._held: dict[LaneKey, dict[int, int]] = {}

    def begin(self, key: PartitionKey, marks: Sequence[int]) -> None:
        """Say where each lane of a partition begins."""
        self._marks[key] = list(marks)
        for lane in range(len(marks)):
            self._advance(key, lane)

    def marks(self, key: PartitionKey) -> Sequence[int]:
        """How far each lane of a partition is done; empty until `begin`."""
        return self._marks.get(key, ())

    def add(self, progress: Progress) -> int | None:
        """Take in a finished range; returns the partition's mark if it moved."""
        key, lane = (progress.topic, progress.partition), progress.lane
        held = self._held.setdefault((*key, lane), {})
        held[progress.start] = max(progress.next_offset, held.get(progress.start, 0))
        if not (marks := self._marks.get(key)):
            return None
        before = min(marks)
        self._advance(key, lane)
        return after if (after := min(marks)) > before else None

    def _advance(self, key: PartitionKey, lane: int) -> None:
        held, marks = self._held.get((*key, lane), {}), self._marks[key]
        while ready := [start for start in held if start <= marks[lane]]:
            for start in ready:
                marks[lane] = max(marks[lane], held.pop(start))


class OffsetCommitter:
    """Commits next offsets for a group that no consumer of ours is subscribed to.

    Args:
        config: The cluster, the group and how often to commit again.
        timer: Monotonic seconds.

    Attributes:
        done: How far the partitions are done.
        committed: By partition, the offset that was committed last.
    """

    def __init__(self, config: CommitConfig, timer: Callable[[], float] = time.monotonic) -> None:
        self._config = config.kafka
        self._consumer = make_consumer(config.kafka)
        self._refresh_secs = math.inf if config.refresh_secs is None else config.refresh_secs
        self._interval_secs = config.interval_secs
        self._timer = timer
        self._refresh_at = timer() + self._refresh_secs
        self._notes: dict[PartitionKey, str] = {}
        # One commit at a time, so that an older one never comes behind a newer one.
        self._one = threading.Lock()
        self._changed = threading.Condition()
        self._put: dict[PartitionKey, tuple[int, str]] = {}
        self._thread: threading.Thread | None = None
        self._committing = self._flushing = False
        self._problem: BaseException | None = None
        self.done = ContiguousOffsets()
        self.committed: dict[PartitionKey, int] = {}

    def begin(self, key: PartitionKey, marks: Sequence[int]) -> None:
        """Say where each lane of a partition begins; nothing is committed by that."""
        self.done.begin(key, marks)
        self.committed[key] = min(marks)

    def commit(
        self,
        next_offsets: Mapping[PartitionKey, int],
        metadata: Mapping[PartitionKey, str] = MappingProxyType({}),
    ) -> None:
        """Commit, and wait for the answer. Repeats while the broker is away, up to a minute.

        Args:
            next_offsets: By partition.
            metadata: What to keep with the offsets, where there is anything.

        Raises:
            KafkaError: The group has members elsewhere, or the broker stays away.
        """
        if not next_offsets:
            return
        deadline = self._timer() + _RETRY_SECS
        while True:
            try:
                with self._one:
                    self._commit(next_offsets, metadata)
                    self.committed.update(next_offsets)
                    for key in next_offsets:
                        self._notes[key] = metadata.get(key, "")
                return
            except KafkaException as error:
                if problem := final_problem(error, self._config, self._timer() >= deadline):
                    raise problem from None
                _LOGGER.warning(
                    "commit to group %s is repeated: %s", self._config.group, reason(error)
                )
                time.sleep(0.5)

    def put(self, next_offsets: Mapping[PartitionKey, tuple[int, str]]) -> None:
        """Have offsets committed soon, by a thread of the committer's own.

        Nobody waits for the answer; offsets that come meanwhile take the place of those before.

        Args:
            next_offsets: By partition, each with what to keep beside it.

        Raises:
            KafkaError: What was put before could not be committed.
        """
        with self._changed:
            self._raise_problem()
            self._put.update(next_offsets)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Commit what was put, and wait for the answer.

        Raises:
            KafkaError: It could not be committed.
        """
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._put or self._committing) or self._problem)
            self._flushing = False
            self._raise_problem()

    def _raise_problem(self) -> None:
        if problem := self._problem:
            raise problem

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._put)
                    put, self._put = self._put, {}
                    self._committing = True
                self.commit(
                    {key: offset for key, (offset, _) in put.items()},
                    {key: note for key, (_, note) in put.items()},
                )
                with self._changed:
                    self._committing = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._flushing, self._interval_secs)
        except BaseException as error:
            with self._changed:
                self._problem = error
                self._changed.notify_all()

    def refresh(self, now: bool = False) -> None:
        """Commit all that was committed again, if it is time to.

        A broker that does not take it is warned of, and asked again within a minute: nothing that
        was finished depends on it.

        Args:
            now: Whether it is time, whenever it was done last.

        Raises:
            KafkaError: The group has members elsewhere, or what was put could not be committed.
        """
        with self._changed:
            self._raise_problem()
        if not self._notes or not (now or self._timer() >= self._refresh_at):
            return
        try:
            with self._one:
                self._commit({key: self.committed[key] for key in self._notes}, self._notes)
            self._refresh_at = self._timer() + self._refresh_secs
        except KafkaException as error:
            if problem := final_problem(error, self._config, late=False):
                raise problem from None
            _LOGGER.warning(
                "offsets of group %s are not committed again: %s", self._config.group, reason(error)
            )
            self._refresh_at = self._timer() + min(_RETRY_SECS, self._refresh_secs)

    def _commit(
        self, next_offsets: Mapping[PartitionKey, int], metadata: Mapping[PartitionKey, str]
    ) -> None:
        offsets = [
            TopicPartition(*key, offset, metadata=metadata.get(key, ""))
            for key, offset in next_offsets.items()
        ]
        results = self._consumer.commit(offsets=offsets, asynchronous=False)
        failed = [result.error for result in results or () if result.error]
        if failed:
            raise KafkaException(failed[0])

    def listen(self) -> None:
        """Take in what the connections have said: nobody else does, and it would pile up."""
        self._consumer.poll(0)


def final_problem(error: KafkaException, kafka: KafkaConfig, late: bool) -> KafkaError | None:
    """What to end with after a commit that failed; None if it is worth another try. Pure.

    Args:
        error: What was answered.
        kafka: The cluster and the group.
        late: Whether it has been tried for long enough.
    """
    code, group = error.args[0].code(), kafka.group
    if code in _FOREIGN_MEMBER:
        return KafkaError(
            f"offsets of --consumer_group={group} cannot be committed: the group has active "
            f"members ({reason(error)}); stop the other consumer or use another group"
        )
    if late or code == ErrorCode.GROUP_AUTHORIZATION_FAILED:
        return KafkaError(
            f"offsets of --consumer_group={group} cannot be committed to "
            f"{describe(kafka)}: {reason(error)}"
        )
    return None


def shared_committer(config: CommitConfig) -> OffsetCommitter:
    """This process's committer for the config."""
    return per_process(OffsetCommitter, config)


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
        types = tuple[PartitionKey, Progress]
        keyed = progress | "ByPartition" >> beam.Map(_keyed).with_output_types(types)
        begun = self._begun | "BegunByPartition" >> beam.Map(_keyed).with_output_types(types)
        return (
            (keyed, begun)
            | "WithBeginnings" >> beam.Flatten()
            | "CommitPartition" >> beam.ParDo(_CommitPartitionFn(self._config, self._told))
        )

    def display_data(self) -> dict[str, Any]:
        return {"consumer_group": self._config.kafka.group}


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

    def _commit(self, committer: OffsetCommitter) -> None:
        committer.commit(self._next_offsets, self._notes)


class _CommitFn(_CommitBundleFn):
    """In rounds nobody waits for the answer: the next round begins meanwhile."""

    def _commit(self, committer: OffsetCommitter) -> None:
        if self._next_offsets:
            committer.put(
                {key: (offset, self._notes[key]) for key, offset in self._next_offsets.items()}
            )

    def process(self, progress: Progress) -> Iterable[Any]:
        key = (progress.topic, progress.partition)
        done = shared_committer(self._config).done
        done.add(progress)
        # Also if it is where it was: another lane may be further.
        marks = done.marks(key)
        self._next_offsets[key] = min(marks)
        self._notes[key] = self._config.lanes.note(marks)
        return ()


def _keyed(progress: Progress) -> tuple[PartitionKey, Progress]:
    return (progress.topic, progress.partition), progress


@dataclass(slots=True)
class _Partition:
    """How far a partition is done, and what stopped it, if something did."""

    done: ContiguousOffsets
    halt_note: str = ""


class _CommitPartitionFn(_CommitBundleFn):
    DONE = ReadModifyWriteStateSpec("commit_done", coders.PickleCoder())
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

    def process(
        self,
        element: tuple[PartitionKey, Progress],
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
        refresh: RuntimeTimer = beam.DoFn.TimerParam(REFRESH),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterable[Any]:
        key, progress = element
        partition: _Partition | None = done_state.read()
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
        stops = bool(progress.halted and not partition.halt_note)
        if stops:
            # Kept with the offset, it can be seen from anywhere, whichever runner this is.
            partition.halt_note = HALT_NOTE + progress.halted
        if stops or min(done.marks(key), default=-1) > before:
            self._commit_again(key, partition)
        done_state.write(partition)
        return ()

    @on_timer(REFRESH)
    def refresh(
        self,
        key: PartitionKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
        refresh: RuntimeTimer = beam.DoFn.TimerParam(REFRESH),  # type: ignore[assignment]
    ) -> Iterable[Any]:
        self._commit_again(key, done_state.read())
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
        self._commit_again(key, done_state.read())
        return ()

    def _begins_unsaid(self, key: PartitionKey) -> bool:
        return self._told is not None and key not in self._told

    def _commit_again(self, key: PartitionKey, partition: _Partition | None) -> None:
        """Have the bundle commit where a partition stands, if that is known."""
        if partition and (marks := partition.done.marks(key)):
            self._next_offsets[key] = min(marks)
            self._notes[key] = partition.halt_note
