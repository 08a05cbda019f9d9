"""Limits: what a run may hold of each partition, and how that leaves one. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pipeline.run.status import BACKING_OFF, FULL, HALTED, IDLE, PAUSED, READING
from transforms.invoke.invoker import QueueView

# What a record takes beside its bytes: the objects that hold it.
_RECORD_BYTES = 200
# How long what has finished may wait for more of it. With much under way: as long as makes the
# fixed price of a round small, and no longer, since replies wait behind the work of a large round
# (docs/adr/0001-rounds-on-the-directrunner.md). Else so many times the processor time of a round,
# so that these leave some of it.
_COLLECT_SECS_BUSY, _COLLECT_SECS_MOST, _COLLECT_ROUNDS = 0.05, 0.1, 4
# The loop leaves batches that end alone for such a part of the time until a partition has none
# left, and never for longer: others' results are to go on.
_EASE_PART, _EASE_SECS = 1 / 8, 0.02
# How long the loop may wait for a record to come. A client of Kafka counts milliseconds: for less
# it would not wait at all, over and over again.
SHORTEST_WAIT_SECS, LONGEST_WAIT_SECS = 0.001, 0.5
# While calls are running it waits for these too, in slices: an eighth of the time that has gone by
# since one ended or began.
_SLICE_PART, _SLICE_SECS = 1 / 8, 0.02


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds of a partition, each thing counted once.

    Attributes:
        queue: What was handed over: waiting, being worked on, finished and not collected.
        records: Records that were read and not handed over.
        read_bytes: Their bytes: keys, values and headers.
    """

    queue: QueueView = QueueView()
    records: int = 0
    read_bytes: int = 0

    @property
    def handed_over(self) -> int:
        """Bytes of what was handed over, until it is collected."""
        queue = self.queue
        return queue.bytes + queue.finished_bytes + _RECORD_BYTES * queue.records

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.handed_over + self.read_bytes + _RECORD_BYTES * self.records


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """What bounds memory, and keeps one partition from using up what is there for all.

    Each partition has a bound of its own, so that all together stay below `all_bytes` whatever
    becomes of them. Below that those that get on share `common_bytes`; where these are used up each
    of them still gets two turns, a turn being a batch for each of its lanes. A partition that is
    stuck or halted takes nothing of what is common.

    Attributes:
        records: Records a round may read.
        bytes: Bytes a round may read.
        first_records: Records of the first round, small so that the function gets to work.
        queue_records: Records a partition may have waiting for the function; as many more may
            have been read for it.
        partition_bytes: Bytes that may be held of a partition.
        common_bytes: Bytes of those that get on, above which each has two turns at most.
        all_bytes: Bytes of all partitions together, divided among them where they are many.
        collect_records: Finished records that are worth a round of their own.
    """

    records: int = 100_000
    bytes: int = 32 * 2**20
    first_records: int = 10_000
    queue_records: int = 20_000
    partition_bytes: int = 32 * 2**20
    common_bytes: int = 128 * 2**20
    all_bytes: int = 512 * 2**20
    collect_records: int = 50_000

    def among(self, all_held: Collection[Held], turn_records: int) -> PartitionLimits:
        """What each partition may have, as things are.

        Args:
            all_held: What is held of each partition.
            turn_records: Records of a batch for each lane of a partition.
        """
        common = sum(h.bytes for h in all_held if not (h.queue.halted or h.queue.stuck))
        own = min(self.partition_bytes, self.all_bytes // max(1, len(all_held)))
        most = max(self.queue_records, 2 * turn_records)
        return PartitionLimits(own, most, turn_records, common >= self.common_bytes)


@dataclass(frozen=True, slots=True)
class PartitionLimits:
    """What each partition may have now. Pure.

    Attributes:
        bytes: Bytes that may be held of it.
        records: Records it may have waiting; as many more may have been read.
        turn_records: Records of a batch for each of its lanes.
        full: Whether what all have in common is used up.
    """

    bytes: int
    records: int
    turn_records: int
    full: bool = False

    def room(self, held: Held) -> tuple[int, int]:
        """How many records and bytes more a partition may hand over; 0 for not now."""
        queue = held.queue
        records = self._records(queue) - queue.records
        free = self.bytes - held.handed_over
        # Less than a batch for each lane is not worth it, and little room would cut batches short.
        if queue.halted or records < self.turn_records or 2 * free < self.bytes:
            return 0, 0
        # What is handed over is held twice from then on: as it was, and as it is sent.
        return records, max(1, free // 2)

    def is_full(self, held: Held) -> bool:
        """Whether nothing more may be read of a partition before it has handed something over."""
        return held.bytes >= self.bytes

    def wanted(self, held: Held, ready: bool, paused: bool) -> bool:
        """Whether more should be read of a partition.

        Args:
            held: What is held of it.
            ready: Whether there is enough for a batch among what was read.
            paused: Whether nothing is read of it now. To pause throws away what was fetched ahead,
                so it is done seldom: until half of what it may have is gone.
        """
        if held.queue.halted:
            return False
        if not ready:
            # Waiting alone would not make a batch of it, or only when its window is over.
            return not self.is_full(held)
        part = 2 if paused else 1
        return part * held.records < self._records(held.queue) and part * held.bytes < self.bytes

    def starving(self, queue: QueueView) -> bool:
        """Whether a partition has so little left that it should be read for."""
        return 2 * queue.records <= self._records(queue)

    def _records(self, queue: QueueView) -> int:
        """What a partition may have waiting."""
        return 2 * self.turn_records if self.full or queue.stuck else self.records


def collect_secs(much: bool, round_secs: float) -> float:
    """How long what has finished may wait for more of it before a round is due. Pure.

    Args:
        much: Whether much is under way.
        round_secs: Processor time of a round.
    """
    return _COLLECT_SECS_BUSY if much else min(_COLLECT_SECS_MOST, _COLLECT_ROUNDS * round_secs)


def ease_secs(queues: Iterable[QueueView], lanes: int, usual_secs: float) -> float:
    """How long batches may end without the loop looking at each. Pure.

    Args:
        queues: Of all partitions.
        lanes: Of each of them.
        usual_secs: How long a call takes.
    """
    left = min((queue.batches for queue in queues if queue.batches), default=0)
    return min(_EASE_SECS, _EASE_PART * usual_secs * left / lanes)


def wait_secs(
    pass_secs: float, ease_secs: float, has_ended: bool, quiet_secs: float | None
) -> float:
    """How long the loop waits for records, with an eye on what else may come. Pure.

    Args:
        pass_secs: Until it looks at everything; 0 or less if that is due.
        ease_secs: Until it looks at batches that have ended; 0 or less if it does.
        has_ended: Whether one has that was not looked at.
        quiet_secs: Since when nothing has come; None if nothing is under way.
    """
    if pass_secs <= 0:
        return 0.0
    longest = LONGEST_WAIT_SECS
    if ease_secs > 0:
        longest = ease_secs
    elif has_ended:
        return 0.0
    elif quiet_secs is not None:
        longest = min(_SLICE_SECS, _SLICE_PART * quiet_secs)
    return max(SHORTEST_WAIT_SECS, min(pass_secs, longest))


def state_of(held: Held, limits: PartitionLimits, lag: int | None, paused: bool = False) -> str:
    """A partition's state. Pure."""
    if held.queue.halted:
        return HALTED
    if paused:
        return PAUSED
    if held.queue.stuck:
        return BACKING_OFF
    if not (held.queue.records or held.records or lag):
        return IDLE
    # Nothing more is read of it before something of it is done.
    return FULL if limits.is_full(held) or held.records >= limits.records else READING
