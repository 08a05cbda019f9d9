"""Commit: Progress -> committed offsets of the consumer group.

They are the durable truth on every runner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, TopicPartition

from transforms.errors import KafkaError
from transforms.kafka import KafkaConfig, describe, make_consumer, reason
from transforms.per_process import per_process
from transforms.records import PartitionKey, Progress

_LOGGER = logging.getLogger(__name__)

_RETRY_SECS = 60.0
_FOREIGN_MEMBER = frozenset(
    {
        ErrorCode.UNKNOWN_MEMBER_ID,
        ErrorCode.ILLEGAL_GENERATION,
        ErrorCode.REBALANCE_IN_PROGRESS,
    }
)


class ContiguousOffsets:
    """The highest offset of a partition below which everything is done. Pure.

    Ranges may arrive in any order (lanes of a partition finish out of order); a range whose
    predecessor is missing is held back, so the mark never passes unfinished records.
    """

    def __init__(self) -> None:
        self._marks: dict[PartitionKey, int] = {}
        self._held: dict[PartitionKey, dict[int, int]] = {}

    def add(self, progress: Progress, begin: int | None = None) -> int | None:
        """Take in a finished range; returns the partition's mark if it moved.

        Args:
            progress: The range.
            begin: Where the partition's first range begins, looked at once per partition; None
                if nothing tells, and then the first range to come is taken for the first one.
        """
        key = (progress.topic, progress.partition)
        before = self._marks.setdefault(key, progress.start if begin is None else begin)
        held = self._held.setdefault(key, {})
        held[progress.start] = max(progress.next_offset, held.get(progress.start, 0))
        mark = before
        while ready := [start for start in held if start <= mark]:
            for start in ready:
                mark = max(mark, held.pop(start))
        self._marks[key] = mark
        return mark if mark > before else None


class OffsetCommitter:
    """Commits next offsets for a group that no consumer of ours is subscribed to.

    Args:
        config: The cluster and the group.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._consumer = make_consumer(config)
        self.done = ContiguousOffsets()
        self.committed: dict[PartitionKey, int] = {}

    def commit(self, next_offsets: dict[PartitionKey, int]) -> None:
        """Commit, and wait for the answer. Repeats while the broker is away, up to a minute.

        Raises:
            KafkaError: The group has members elsewhere, or the broker stays away.
        """
        if not next_offsets:
            return
        offsets = [TopicPartition(*key, offset) for key, offset in next_offsets.items()]
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


def shared_committer(config: KafkaConfig) -> OffsetCommitter:
    """This process's committer for the config."""
    return per_process(OffsetCommitter, config)


class CommitOffsets(beam.PTransform):
    """Commit each partition's highest contiguous finished offset, once per bundle.

    Comes after Write in the graph, so an offset is committed only when the responses and error
    records below it are acknowledged.
    """

    def __init__(self, config: KafkaConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, progress: beam.PCollection[Progress]) -> beam.PCollection[Any]:
        return progress | "CommitGroup" >> beam.ParDo(_CommitFn(self._config))

    def display_data(self) -> dict[str, Any]:
        return {"consumer_group": self._config.group}


class _CommitFn(beam.DoFn):
    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._commits = beam.metrics.Metrics.counter("commit", "commits")
        self._next_offsets: dict[PartitionKey, int] = {}

    def start_bundle(self) -> None:
        self._next_offsets = {}

    def process(self, progress: Progress) -> Iterable[Any]:
        committer = shared_committer(self._config)
        begin = committer.committed.get((progress.topic, progress.partition))
        mark = committer.done.add(progress, begin)
        if mark is not None:
            self._next_offsets[progress.topic, progress.partition] = mark
        return ()

    def finish_bundle(self) -> Iterator[Any]:
        shared_committer(self._config).commit(self._next_offsets)
        self._commits.inc(len(self._next_offsets))
        yield from ()
