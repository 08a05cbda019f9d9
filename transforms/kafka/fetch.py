"""Fetch: one consumer for all partitions of a process. It is told which; see `members`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, make_consumer, reason
from transforms.kafka.messages import (
    OffsetGoneError,
    PartitionError,
    bytes_of,
    end_of_partition,
    in_runs,
    to_records,
)
from transforms.per_process import per_process
from transforms.records import PartitionKey, Records
from transforms.source import Fetched

_LOGGER = logging.getLogger(__name__)

_POLL_RECORDS = 500
_AGAIN_SECS, _POLL_SECS = 30.0, 0.5
# What a consumer says of an offset that retention has taken.
_GONE = frozenset({ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE})

# Fetched ahead, for all partitions together. The backoff is what librdkafka waits after that
# is full; its default of a second would leave a fast pipeline with nothing to do.
PREFETCH = {
    "queued.max.messages.kbytes": 16_384,
    "queued.min.messages": 50_000,
    "fetch.queue.backoff.ms": 20,
}


class KafkaFetcher:
    """The `Fetcher` of Kafka.

    Args:
        config: The cluster and the group.
        make: Makes the consumer; injected for tests.
    """

    most = _POLL_RECORDS

    def __init__(self, config: KafkaConfig, make: Callable[..., Consumer] = make_consumer) -> None:
        self._config = config
        self.consumer = make(config, **PREFETCH)
        self._assigned: set[PartitionKey] = set()

    def assign(self, positions: Mapping[PartitionKey, int]) -> None:
        self._assigned |= positions.keys()
        self.consumer.incremental_assign(
            [TopicPartition(*key, offset) for key, offset in positions.items()]
        )
        # One that was here before, and paused when it went, would stay so.
        self.resume(positions.keys())

    def assign_again(self, key: PartitionKey, position: int) -> None:
        self.consumer.incremental_unassign([TopicPartition(*key)])
        self.consumer.incremental_assign([TopicPartition(*key, position)])
        self.resume([key])

    def unassign(self, keys: Collection[PartitionKey]) -> None:
        self._assigned -= set(keys)
        partitions = [TopicPartition(*key) for key in keys]
        # A pause outlives an assignment: it would still hold when they are assigned again.
        self.consumer.resume(partitions)
        self.consumer.incremental_unassign(partitions)

    def pause(self, keys: Collection[PartitionKey]) -> None:
        self.consumer.pause([TopicPartition(*key) for key in keys])

    def resume(self, keys: Collection[PartitionKey]) -> None:
        self.consumer.resume([TopicPartition(*key) for key in keys])

    def fetch(self, timeout_secs: float) -> tuple[int, Iterable[Fetched]]:
        try:
            # `consume` waits for the whole time unless it gets as many as it is asked for.
            first = self.consumer.poll(timeout_secs)
            if first is None:
                return 0, ()
            messages = [first, *self.consumer.consume(_POLL_RECORDS - 1, 0)]
        except KafkaException as error:
            raise KafkaError(f"{describe(self._config)}: {reason(error)}") from None
        return len(messages), self._sorted(messages)

    def _sorted(self, messages: list[Message]) -> Iterator[Fetched]:
        for run in in_runs(messages):
            topic, number = run[0].topic(), run[0].partition()
            if run[0].error():
                yield from self._said(run[0])
            elif topic is not None and number is not None:
                yield Fetched((topic, number), run)

    def _said(self, message: Message) -> Iterator[Fetched]:
        """What a message says that is no record."""
        topic, number = message.topic(), message.partition()
        try:
            end = end_of_partition(message, self._config)
        except PartitionError as error:
            overtaken = isinstance(error, OffsetGoneError)
            for key in sorted(self._assigned):
                # What is wrong with a topic may come without a partition.
                if key == (topic, number) or (number is None and key[0] == topic):
                    yield Fetched(key, problem=error, overtaken=overtaken)
            return
        if end is not None and topic is not None and number is not None:
            yield Fetched((topic, number), end=end)

    def behind(self, key: PartitionKey, position: int) -> int | None:
        """Records to the partition's end, as the last fetch saw it; None before the first one."""
        try:
            _, high = self.consumer.get_watermark_offsets(TopicPartition(*key), cached=True)
        except KafkaException:
            return None
        return max(0, high - position) if high >= 0 else None

    def close(self) -> None:
        self.consumer.close()

    def keys(self, messages: Sequence[Message]) -> Iterable[bytes | None]:
        return map(Message.key, messages)

    def offsets(self, messages: Sequence[Message]) -> Iterable[int]:
        return map(Message.offset, messages)

    def records(self, messages: list[Message]) -> Records:
        return to_records(messages)

    def bytes(self, messages: list[Message]) -> int:
        return bytes_of(messages)


def _make_consumer(kafka: KafkaConfig) -> Consumer:
    # What is wanted is there; else it would come behind the fetch before, which waits at the end.
    settings: dict[str, Any] = {"fetch.wait.max.ms": 10}
    return make_consumer(kafka, **settings)


def fetch_again(kafka: KafkaConfig, key: PartitionKey, offsets: Sequence[int]) -> Records | None:
    """Records as Kafka has them, read again; None if they are not all there any more.

    A response holds no record that it answers: to keep each until it is acknowledged would cost
    more memory than the few are worth whose response is refused.
    """
    consumer = per_process(_make_consumer, kafka)
    wanted = set(offsets)
    found: list[Any] = []
    deadline = time.monotonic() + _AGAIN_SECS
    consumer.assign([TopicPartition(*key, min(offsets))])
    try:
        while len(found) < len(wanted) and time.monotonic() < deadline:
            # One by one: to ask for many waits until so many have come.
            message = consumer.poll(_POLL_SECS)
            if message is None:
                continue
            # The partition's end is told with the offset that the next record gets.
            error, offset = message.error(), message.offset()
            if error and error.code() in _GONE:
                break
            if error and error.code() != ErrorCode._PARTITION_EOF:
                continue
            if not error and offset in wanted:
                found.append(message)
            elif offset is not None and offset > offsets[-1]:
                break
    except KafkaException as error:
        _LOGGER.warning("%s: %s", describe(kafka), reason(error))
    finally:
        consumer.unassign()
    return to_records(found) if len(found) == len(wanted) else None
