"""Read: a Round of the process's reader -> RecordChunk. The bounded reader of one process's rounds.

One consumer per process reads all partitions and outlives the rounds, so it fetches ahead while
a round runs. It is assigned, never subscribed. What it has and a round does not take (no room, or
a batch that is not due yet) stays with it, unread as far as the pipeline is concerned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import apache_beam as beam
from apache_beam import coders
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError
from transforms.kafka import KafkaConfig, describe, make_consumer, reason
from transforms.per_process import per_process
from transforms.records import NO_TIMESTAMP, PartitionKey, RecordChunk, Records

_LOGGER = logging.getLogger(__name__)

_POLL_RECORDS = 500
_CHUNK_RECORDS = 1_000

# Fetched ahead, for all partitions together. The backoff is what librdkafka waits after that
# is full; its default of a second would leave a fast pipeline with nothing to do.
_PREFETCH = {
    "queued.max.messages.kbytes": 16_384,
    "queued.min.messages": 50_000,
    "fetch.queue.backoff.ms": 20,
}

_FATAL = {
    ErrorCode.TOPIC_AUTHORIZATION_FAILED: "the credentials may not read it",
    ErrorCode.UNKNOWN_TOPIC_OR_PART: "it is gone",
    ErrorCode._UNKNOWN_TOPIC: "it is gone",
    ErrorCode._UNKNOWN_PARTITION: "it is gone",
}


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """How records are read.

    Attributes:
        kafka: The cluster and the group.
        batch_size: Records per batch: chunks are cut so that batches come out whole.
        batch_bytes: Bytes at which records are due without a full batch.
        batch_window_secs: How long a record may wait for its batch to fill.
    """

    kafka: KafkaConfig
    batch_size: int = 100
    batch_bytes: int = 6_291_455
    batch_window_secs: float = 0.5


@dataclass(frozen=True, slots=True)
class Room:
    """How much of a partition a round may take."""

    topic: str
    partition: int
    records: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Round:
    """One round's reading.

    Attributes:
        rooms: Per partition what may be taken; partitions not named are left alone.
        records: Limit for all partitions together.
        bytes: Limit for all partitions together.
        flush: Take incomplete batches too, once a partition has nothing more.
    """

    rooms: tuple[Room, ...]
    records: int
    bytes: int
    flush: bool = False


_NOTHING = Round((), 0, 0)


def releasable(
    records: int, bytes: int, waited_secs: float, ended: bool, config: ReadConfig
) -> int:
    """How many of a partition's waiting records may be batched now.

    Whole batches always; the rest when it is due (window over, enough bytes) or nothing more
    will come (`ended`).
    """
    due = ended or waited_secs >= config.batch_window_secs or bytes >= config.batch_bytes
    return records if due else records - records % config.batch_size


@dataclass(slots=True)
class _Partition:
    """What the reader holds of one partition."""

    key: PartitionKey
    start: int
    next_offset: int
    messages: list[Message] = field(default_factory=list)
    bytes: int = 0
    since: float = 0.0
    at_end: bool = False
    paused: bool = False


class RoundReader:
    """Reads all partitions of a process and hands out chunks, round by round.

    Args:
        config: The cluster and when records are due.
        make: Makes the consumer; injected for tests.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        config: ReadConfig,
        make: Callable[..., Consumer] = make_consumer,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config
        self._timer = timer
        self.consumer = make(config.kafka, **_PREFETCH)
        self._partitions: dict[PartitionKey, _Partition] = {}
        self._round = _NOTHING
        self._turn = 0

    # -- what the rounds' loop needs -------------------------------------------------------

    @property
    def partitions(self) -> list[PartitionKey]:
        return list(self._partitions)

    def assign(self, offsets: dict[PartitionKey, int]) -> None:
        """Begin to read partitions at the given offsets, besides those already read."""
        for key, offset in offsets.items():
            self._partitions[key] = _Partition(key, offset, offset)
        self.consumer.incremental_assign(
            [TopicPartition(*key, offset) for key, offset in offsets.items()]
        )

    def position(self, key: PartitionKey) -> int:
        """Everything below it was handed out."""
        return self._partitions[key].start

    def end(self, key: PartitionKey) -> int | None:
        """The partition's end as the last fetch saw it; None before the first one."""
        try:
            _, high = self.consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
        except KafkaException:
            return None
        return high if high >= 0 else None

    def ready(self, key: PartitionKey, flush: bool) -> bool:
        """Whether a round would get something of this partition now."""
        partition = self._partitions[key]
        if not partition.messages:
            # A tail of offsets without records still has to be committed.
            return partition.start < partition.next_offset
        return self._releasable(partition, flush) > 0

    def set_wanted(self, keys: Iterable[PartitionKey]) -> None:
        """Fetch for these partitions only; the others' records would only pile up here."""
        wanted = set(keys)
        pause = [p for p in self._partitions.values() if not p.paused and p.key not in wanted]
        resume = [p for p in self._partitions.values() if p.paused and p.key in wanted]
        if pause:
            self.consumer.pause([TopicPartition(*p.key) for p in pause])
        if resume:
            self.consumer.resume([TopicPartition(*p.key) for p in resume])
        for partition in pause + resume:
            partition.paused = not partition.paused

    def fill(self, timeout_secs: float) -> int:
        """Take in what has been fetched; waits for the first of it. Returns how many records.

        Raises:
            KafkaError: A partition cannot be read any more.
        """
        try:
            messages = self.consumer.consume(_POLL_RECORDS, timeout_secs)
        except KafkaException as error:
            raise KafkaError(f"{describe(self._config.kafka)}: {reason(error)}") from None
        if not messages:
            return 0
        low = 0
        if any(map(Message.error, messages)):
            # In its place among the records: an end that was believed before the records that
            # come ahead of it would make them look as if they had been read.
            for high, message in enumerate(messages):
                if message.error():
                    self._take_in_all(messages[low:high])
                    self._event(message)
                    low = high + 1
        self._take_in_all(messages[low:] if low else messages)
        return len(messages)

    def close(self) -> None:
        """Leave Kafka."""
        self.consumer.close()

    # -- what a round needs ----------------------------------------------------------------

    def begin(self, round: Round) -> None:
        """Say what the next `take` may hand out."""
        self._round = round

    def take(self) -> Iterator[RecordChunk]:
        """Hand out chunks, in order per partition, until the round is full or nothing is due."""
        round, self._round = self._round, _NOTHING
        records, size = round.records, round.bytes
        rooms = {(room.topic, room.partition): [room.records, room.bytes] for room in round.rooms}
        first = set(rooms)
        while rooms and records > 0 and size > 0:
            # Partitions take turns at the front, so that a short round favours none.
            order = list(rooms)
            self._turn += 1
            order = order[self._turn % len(order) :] + order[: self._turn % len(order)]
            for key in order:
                partition, room = self._partitions[key], rooms[key]
                limit = min(records, room[0]), min(size, room[1])
                for chunk, chunk_bytes in self._hand_out(partition, *limit, round.flush):
                    count = len(chunk.records)
                    room[0], room[1] = room[0] - count, room[1] - chunk_bytes
                    records, size = records - count, size - chunk_bytes
                    yield _first(chunk, first)
                if self._releasable(partition, round.flush):
                    # What is still due found no room; the next round begins with it.
                    del rooms[key]
            piled = sum(len(self._partitions[key].messages) for key in rooms)
            if piled > round.records or not self.fill(0.01):
                break

    def _hand_out(
        self, partition: _Partition, records: int, size: int, flush: bool
    ) -> Iterator[tuple[RecordChunk, int]]:
        config = self._config
        step = max(1, _CHUNK_RECORDS // config.batch_size) * config.batch_size
        due = self._releasable(partition, flush)
        if due > records:
            # A batch is better begun in the next round than cut in two.
            due = records - records % config.batch_size
        taken = taken_bytes = 0
        while taken < due and taken_bytes < size:
            messages = partition.messages[taken : min(taken + step, due)]
            sizes = list(map(_size, messages))
            count, chunk_bytes = _within(sizes, size - taken_bytes, config.batch_size)
            cut_short = count < len(messages)
            if cut_short and taken and count < config.batch_size:
                break
            taken, taken_bytes = taken + count, taken_bytes + chunk_bytes
            is_last = taken == len(partition.messages)
            next_offset = partition.next_offset if is_last else partition.messages[taken].offset()
            yield self._chunk(partition, next_offset, messages[:count]), chunk_bytes
            if cut_short:
                break
        if taken:
            del partition.messages[:taken]
            partition.bytes -= taken_bytes
            partition.since = self._timer()
        elif not partition.messages and partition.start < partition.next_offset:
            yield self._chunk(partition, partition.next_offset, []), 0

    def _chunk(
        self, partition: _Partition, next_offset: int, messages: list[Message]
    ) -> RecordChunk:
        start, partition.start = partition.start, next_offset
        return RecordChunk(*partition.key, start, next_offset, to_records(messages))

    def _releasable(self, partition: _Partition, flush: bool) -> int:
        return releasable(
            len(partition.messages),
            partition.bytes,
            self._timer() - partition.since,
            flush and partition.at_end,
            self._config,
        )

    # -- what the consumer says ------------------------------------------------------------

    def _take_in_all(self, messages: list[Message]) -> None:
        for key, run in _by_partition(messages):
            self._take_in(self._partitions[key], run)

    def _take_in(self, partition: _Partition, messages: list[Message]) -> None:
        # A resumed partition may repeat what was fetched before it was paused.
        first = messages[0].offset()
        if first < partition.next_offset:
            messages = [m for m in messages if m.offset() >= partition.next_offset]
            if not messages:
                return
        if not partition.messages:
            partition.since = self._timer()
        partition.messages += messages
        partition.bytes += sum(map(_size, messages))
        partition.next_offset = messages[-1].offset() + 1
        partition.at_end = False

    def _event(self, message: Message) -> None:
        """Handle what is no record.

        Raises:
            KafkaError: The partition cannot be read any more.
        """
        error = message.error()
        key = (message.topic(), message.partition())
        partition = self._partitions.get(key)
        if error.code() == ErrorCode._PARTITION_EOF:
            if partition and message.offset() >= partition.next_offset:
                partition.next_offset = message.offset()
                partition.at_end = True
            return
        if error.code() in (ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE):
            raise KafkaError(
                f"{key[0]}-{key[1]} cannot be read at the offset it had reached: {error.str()}; "
                f"the topic's retention is shorter than the pipeline's lag, or it was deleted. "
                f"Run again to go on at the first offset that still exists"
            )
        if error.code() in _FATAL:
            what = _FATAL[error.code()]
            raise KafkaError(f"topic {key[0]} cannot be read: {what} ({error.str()})")
        if error.fatal():
            raise KafkaError(f"{describe(self._config.kafka)}: {error.str()}")
        _LOGGER.warning("%s: %s", describe(self._config.kafka), error.str())


def to_records(messages: list[Message]) -> Records:
    """Messages as columns; each column is one pass in C."""
    return Records(
        list(map(Message.offset, messages)),
        [ms if kind else NO_TIMESTAMP for kind, ms in map(Message.timestamp, messages)],
        list(map(Message.key, messages)),
        list(map(Message.value, messages)),
        list(map(Message.headers, messages)),
    )


def _size(message: Message) -> int:
    """About what a record holds, in bytes: value and key."""
    return len(message) + len(message.key() or b"")


def _within(sizes: list[int], limit_bytes: int, batch_size: int) -> tuple[int, int]:
    """How many records fit into a limit, at least one, in whole batches if there is one."""
    total = sum(sizes)
    if total <= limit_bytes:
        return len(sizes), total
    count = total = 0
    for size in sizes:
        if count and total + size > limit_bytes:
            break
        count, total = count + 1, total + size
    if count > batch_size and count % batch_size:
        count -= count % batch_size
        total = sum(sizes[:count])
    return count, total


def _by_partition(messages: list[Message]) -> Iterator[tuple[PartitionKey, list[Message]]]:
    """Runs of messages from the same partition, in order."""
    low = 0
    partitions = list(map(Message.partition, messages))
    topics = list(map(Message.topic, messages))
    for high in range(1, len(messages) + 1):
        if (
            high == len(messages)
            or partitions[high] != partitions[low]
            or topics[high] != topics[low]
        ):
            yield (topics[low], partitions[low]), messages[low:high]
            low = high


def _first(chunk: RecordChunk, first: set[PartitionKey]) -> RecordChunk:
    """Mark a partition's first chunk of the round: the state before it is gone."""
    key = (chunk.topic, chunk.partition)
    if key not in first:
        return chunk
    first.discard(key)
    return RecordChunk(
        chunk.topic, chunk.partition, chunk.start, chunk.next_offset, chunk.records, first=True
    )


def shared_reader(config: ReadConfig) -> RoundReader:
    """This process's reader for the config."""
    return per_process(RoundReader, config)


class ReadRound(beam.PTransform):
    """Read what the process's reader was told to hand out next (`RoundReader.begin`).

    Bounded. Delivery: a record is read again by a later run unless its offset was committed.
    Order: offsets rise per partition. Parallelism: one reader per process, all partitions.
    The round is not part of the graph, so that one graph serves all rounds of a run.

    Args:
        config: The cluster and when records are due.
    """

    def __init__(self, config: ReadConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[RecordChunk]:
        return (
            root
            | "Begin" >> beam.Impulse()
            | "Take" >> beam.ParDo(_TakeFn(self._config)).with_output_types(RecordChunk)
        )

    def display_data(self) -> dict[str, Any]:
        return {"bootstrap_servers": self._config.kafka.bootstrap_servers}


class _TakeFn(beam.DoFn):
    def __init__(self, config: ReadConfig) -> None:
        self._config = config
        self._records = beam.metrics.Metrics.counter("read", "records")
        self._bytes = beam.metrics.Metrics.counter("read", "value_bytes")

    def process(self, _: bytes) -> Iterator[RecordChunk]:
        chunk = None
        for chunk in shared_reader(self._config).take():
            self._records.inc(len(chunk.records))
            self._bytes.inc(sum(len(value or b"") for value in chunk.records.values))
            yield chunk
        if chunk is None:
            # The steps behind it run only if something reaches them, and a round without new
            # records still has to collect what earlier ones began.
            yield RecordChunk("", 0, 0, 0, Records())


coders.registry.register_coder(RecordChunk, coders.PickleCoder)
