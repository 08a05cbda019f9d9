"""Commit: Progress -> committed offsets of the consumer group.

They are the durable truth on every runner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.userstate import ReadModifyWriteRuntimeState, ReadModifyWriteStateSpec
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, TopicPartition

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, make_consumer, reason
from transforms.lanes import Lanes
from transforms.per_process import per_process
from transforms.records import Finished, LaneKey, PartitionKey, Progress, halt_of

_LOGGER = logging.getLogger(__name__)

_RETRY_SECS = 60.0
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
    """

    kafka: KafkaConfig
    lanes: Lanes = Lanes()


class ContiguousOffsets:
    """The offset of a partition below which everything is done, in all of its lanes. Pure.

    Ranges may arrive in any order; one whose predecessor in its lane is missing is held back, so
    the mark never passes unfinished records.

    Args:
        lanes: Lanes per partition; one of which nothing was heard is not done.
    """

    def __init__(self, lanes: int = 1) -> None:
        self._lanes = lanes
        self._marks: dict[PartitionKey, list[int]] = {}
        self._held: dict[LaneKey, dict[int, int]] = {}

    def begin(self, key: PartitionKey, marks: Sequence[int]) -> None:
        """Say where each lane of a partition begins."""
        self._marks[key] = list(marks)

    def marks(self, key: PartitionKey) -> Sequence[int]:
        """How far each lane of a partition is done; empty if nothing was heard of it."""
        return self._marks.get(key, ())

    def add(self, progress: Progress) -> int | None:
        """Take in a finished range; returns the partition's mark if it moved.

        Of a partition that `begin` was not told of, the first range to come is taken for one
        where all lanes begin.
        """
        key, lane = (progress.topic, progress.partition), progress.lane
        marks = self._marks.setdefault(key, [progress.start] * self._lanes)
        held = self._held.setdefault((*key, lane), {})
        held[progress.start] = max(progress.next_offset, held.get(progress.start, 0))
        before, mark = min(marks), marks[lane]
        while ready := [start for start in held if start <= mark]:
            for start in ready:
                mark = max(mark, held.pop(start))
        marks[lane] = mark
        return after if (after := min(marks)) > before else None


class OffsetCommitter:
    """Commits next offsets for a group that no consumer of ours is subscribed to.

    Args:
        config: The cluster, the group and the lanes.
    """

    def __init__(self, config: CommitConfig) -> None:
        self._config = config.kafka
        self._consumer = make_consumer(config.kafka)
        self.done = ContiguousOffsets(config.lanes.count)
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
        offsets = [
            TopicPartition(*key, offset, metadata=metadata.get(key, ""))
            for key, offset in next_offsets.items()
        ]
        deadline = time.monotonic() + _RETRY_SECS
        while True:
            try:
                results = self._consumer.commit(offsets=offsets, asynchronous=False)
                failed = [result.error for result in results or () if result.error]
                if not failed:
                    break
                raise KafkaException(failed[0])
            except KafkaException as error:
                self._wait_or_raise(error, deadline)
        self.committed.update(next_offsets)

    def _wait_or_raise(self, error: KafkaException, deadline: float) -> None:
        code = error.args[0].code()
        group = self._config.group
        if code in _FOREIGN_MEMBER:
            raise KafkaError(
                f"offsets of --consumer_group={group} cannot be committed: the group has active "
                f"members ({reason(error)}); stop the other consumer or use another group"
            ) from None
        if code == ErrorCode.GROUP_AUTHORIZATION_FAILED or time.monotonic() > deadline:
            raise KafkaError(
                f"offsets of --consumer_group={group} cannot be committed to "
                f"{describe(self._config)}: {reason(error)}"
            ) from None
        _LOGGER.warning("commit to group %s is repeated: %s", group, reason(error))
        time.sleep(0.5)


def shared_committer(config: CommitConfig) -> OffsetCommitter:
    """This process's committer for the config."""
    return per_process(OffsetCommitter, config)


class CommitOffsets(beam.PTransform):
    """Commit each partition's highest contiguous finished offset, once per bundle.

    Comes after Write in the graph, so an offset is committed only when the responses and error
    records below it are acknowledged.

    Args:
        config: The cluster and the group.
        streaming: Whether how far a partition is done is kept in state, since its progress may
            come from several workers; else in this process, which sees all of it.
    """

    def __init__(self, config: CommitConfig, streaming: bool = False) -> None:
        super().__init__()
        self._config = config
        self._streaming = streaming

    def expand(self, progress: beam.PCollection[Progress]) -> beam.PCollection[Any]:
        if not self._streaming:
            return progress | "CommitGroup" >> beam.ParDo(_CommitFn(self._config))
        keyed = progress | "ByPartition" >> beam.Map(_keyed).with_output_types(
            tuple[PartitionKey, Progress]
        )
        return keyed | "CommitPartition" >> beam.ParDo(_CommitPartitionFn(self._config))

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
        shared_committer(self._config).commit(self._next_offsets, self._notes)
        self._commits.inc(len(self._next_offsets))
        yield from ()


class _CommitFn(_CommitBundleFn):
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


HALT_NOTE = "halted "
"""Begins what is kept with the committed offset of a partition that a failure has stopped."""


def read_halt(note: str) -> Finished | None:
    """The halt that is kept with an offset, if one is. Pure."""
    if not note.startswith(HALT_NOTE):
        return None
    try:
        return halt_of(note.removeprefix(HALT_NOTE))
    except ValueError:
        return None


@dataclass(slots=True)
class _Partition:
    """How far a partition is done, and what stopped it, if something did."""

    done: ContiguousOffsets
    halt_note: str = ""


class _CommitPartitionFn(_CommitBundleFn):
    DONE = ReadModifyWriteStateSpec("commit_done", coders.PickleCoder())

    def process(
        self,
        element: tuple[PartitionKey, Progress],
        done_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
    ) -> Iterable[Any]:
        key, progress = element
        partition: _Partition = done_state.read() or _Partition(
            ContiguousOffsets(self._config.lanes.count)
        )
        mark = partition.done.add(progress)
        if progress.halted and not partition.halt_note:
            # Kept with the offset, it can be seen from anywhere, whichever runner this is.
            partition.halt_note = HALT_NOTE + progress.halted
            mark = min(partition.done.marks(key))
        if mark is not None:
            self._next_offsets[key] = mark
            self._notes[key] = partition.halt_note
        done_state.write(partition)
        return ()
