"""PartitionReader: one partition of a streaming run, as a worker process reads it. No Beam.

How far a partition may be read ahead of its committed offset is bounded: nothing is committed of a
partition whose function is stuck, so soon nothing more of it is read, and it does not fill the
workers at the cost of the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from operator import lt
from time import monotonic

from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Message

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, reason
from transforms.kafka.messages import bytes_of, end_of_partition, to_records
from transforms.kafka.shared_consumer import SharedConsumer
from transforms.read.lending import AHEAD, Ahead, ReadAhead
from transforms.records import PartitionKey, Records, read_halt

_LOGGER = logging.getLogger(__name__)

_ASK_COMMITTED_SECS = 0.1
# How soon a partition that cannot be read is tried again; the others go on meanwhile.
_TRY_AGAIN_SECS = 10.0
_GONE = (ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE)


class PartitionReader:
    """Reads one partition in this process.

    Args:
        kafka: The cluster and the group.
        consumer: Which reads it, beside others.
        key: The partition.
        ahead: How far it may be read ahead of what is committed.
        bounded: Whether the run is to end: then a partition that cannot be read ends it.
        sharers: How many partitions share what this process may hold.
        timer: Monotonic seconds.

    Attributes:
        lock: For who reads it now.
        used: When it was last asked for, by the timer.
        closed: Whether it can be read no more.
        offsets_lost: Offsets that retention has taken before they were read.
        errors: How often this partition, and no other, could not be read.
        ended: A partition of Kafka does not.
    """

    ended = False

    def __init__(
        self,
        kafka: KafkaConfig,
        consumer: SharedConsumer,
        key: PartitionKey,
        ahead: ReadAhead = AHEAD,
        bounded: bool = False,
        sharers: Callable[[], int] = lambda: 1,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self.lock = threading.Lock()
        self.used = timer()
        self.closed = False
        self.offsets_lost = self.errors = 0
        self._kafka = kafka
        self._key = key
        self._limits = ahead
        self._bounded = bounded
        self._sharers = sharers
        self._timer = timer
        self._consumer = consumer
        self._position = -1
        self._begun = 0
        # None if it is not known, be it that the group is ahead of what is read (a savepoint).
        self._committed: int | None = None
        self._halted = False
        self._asked = float("-inf")
        self._again = float("inf")
        self._ahead = Ahead(ahead)
        # Records that were read before a restart and are not committed yet; their bytes are taken
        # for those of the first to be read behind them.
        self._unmeasured = 0

    def go_to(self, offset: int) -> bool:
        """Read on from this offset; what was fetched ahead serves if it is where it stands.

        Returns:
            Whether it stood elsewhere.
        """
        self.used = self._timer()
        if offset == self._position:
            return False
        self._consumer.assign(self._key, offset)
        self._position = self._begun = offset
        self._again = float("inf")
        self._ahead.clear()
        self._ask_committed()
        # An open batch of them may wait for more to come, so they cannot keep all else away.
        done = offset if self._committed is None else self._committed
        self._unmeasured = max(0, offset - done)
        return True

    def read(self, timeout_secs: float) -> tuple[Records, int]:
        """The next records, and the offset behind them; that of before if there is nothing.

        Args:
            timeout_secs: How long to wait for records that have not been fetched yet.

        Raises:
            KafkaError: The partition cannot be read any more.
        """
        if self._timer() >= self._again:
            self._again = float("inf")
            self._consumer.assign(self._key, self._position)
        try:
            most = self._limits.chunk_records, self._limits.chunk_bytes
            messages, size = self._consumer.consume(self._key, *most, timeout_secs)
        except KafkaException as error:
            raise KafkaError(f"{describe(self._kafka)}: {reason(error)}") from None
        position = self._position
        records = messages
        if any(map(Message.error, messages)) or not _is_rising(position, messages):
            records = []
            for message in messages:
                if message.error():
                    position = max(position, self._said(message, position))
                elif message.offset() >= position:
                    records.append(message)
                    position = message.offset() + 1
            size = bytes_of(records)
        elif records:
            position = records[-1].offset() + 1
        if records and self._unmeasured:
            before = self._unmeasured * size // len(records)
            self._ahead.add_before(self._begun, self._unmeasured, before)
            self._unmeasured = 0
        if position > self._position:
            self._ahead.add(position, position - self._position, size)
            self._position = position
        return to_records(records), position

    def _said(self, message: Message, position: int) -> int:
        """Where to go on after a message that is no record; 0 if it says nothing of that.

        What is wrong with this partition does not fail the job, which would stop all of them, and
        again after each restart: the position is the checkpoint's. A run that is to end does fail.
        """
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
            self._consumer.assign(self._key, low)
            return low
        try:
            return end_of_partition(message, self._kafka) or 0
        except KafkaError as error:
            if self._bounded or message.error().fatal():
                raise
            self.errors += 1
            self._again = self._timer() + _TRY_AGAIN_SECS
            text = "%s-%d is not read at %d, the others go on; tried again in %d s: %s"
            _LOGGER.warning(text, *self._key, position, _TRY_AGAIN_SECS, error)
            return 0

    def _first_offset(self) -> int:
        """The partition's first offset, asked of the broker; -1 if it does not answer."""
        try:
            return self._consumer.first_offset(self._key)
        except KafkaException as error:
            _LOGGER.warning("%s: %s", describe(self._kafka), reason(error))
            return -1

    @property
    def is_halted(self) -> bool:
        """Whether a failure has stopped the partition, as far as has been heard."""
        return self._halted

    def may_read(self) -> bool:
        """Whether the partition is not too far ahead of what is committed."""
        limit = min(self._limits.bytes, self._limits.process_bytes // self._sharers())
        if self._within(limit):
            return True
        if self._timer() - self._asked >= _ASK_COMMITTED_SECS:
            self._ask_committed()
            self._ahead.done(-1 if self._committed is None else self._committed)
        return self._within(limit)

    def _within(self, limit_bytes: int) -> bool:
        done = self._begun if self._committed is None else self._committed
        records = self._position - done
        return records < self._limits.records and self._ahead.bytes < limit_bytes

    def _ask_committed(self) -> None:
        self._asked = self._timer()
        try:
            found = self._consumer.committed(self._key)
        except KafkaException as error:
            _LOGGER.warning("%s: %s", describe(self._kafka), reason(error))
            return
        # Ahead of what is read is where another run has been: this job has not come so far.
        self._committed = found.offset if 0 <= found.offset <= self._position else None
        self._halted = self._committed is not None and read_halt(found.metadata or "") is not None

    @property
    def end(self) -> int:
        """The partition's end as the last fetch saw it; 0 before the first one."""
        return self._consumer.end(self._key)

    def close(self) -> None:
        """Read it no more."""
        self.closed = True
        self._consumer.release(self._key)


def _is_rising(position: int, messages: list[Message]) -> bool:
    """Whether all are new, and in order."""
    offsets = [position - 1, *map(Message.offset, messages)]
    return all(map(lt, offsets, offsets[1:]))
