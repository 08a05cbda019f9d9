"""SharedConsumer: one consumer for all partitions that a worker process of a streaming run reads.

A consumer costs threads, connections and memory for each broker, so each partition cannot have one
of its own. Whoever waits for records of its partition polls for all; what belongs to others is laid
down for them. A partition of which much lies there is paused.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.kafka.fetch import PREFETCH
from transforms.kafka.messages import bytes_of, in_runs
from transforms.read.lending import CHUNK_RECORDS
from transforms.records import PartitionKey

# How long a poll may keep those waiting that want to move a partition.
_SLICE_SECS = 0.05
# The client counts milliseconds: for less it would not wait at all, over and over again.
_LEAST_SECS = 0.001
# What may lie there, of a partition and of all; paused above it, resumed below half of it.
_FEED_BYTES = 4 * 2**20
_FEEDS_BYTES = 256 * 2**20
_ASK_SECS = 5.0


@dataclass(slots=True)
class _Feed:
    """What was polled of a partition and not consumed yet, oldest first, in runs with their bytes.

    What is no record stands in its place among the records, in a run of its own.
    """

    runs: deque[tuple[list[Message], int]] = field(default_factory=deque)
    bytes: int = 0
    paused: bool = False


class SharedConsumer:
    """Records of many partitions, by partition. For any number of threads.

    Args:
        kafka: The cluster and the group.
        make: Makes consumers; injected for tests.
    """

    def __init__(self, kafka: KafkaConfig, make: Callable[..., Consumer] = make_consumer) -> None:
        self._consumer = make(kafka, **PREFETCH)
        # Its own, since an answer would wait for a poll that is under way.
        self._asker = make(kafka)
        self._changed = threading.Condition()
        self._feeds: dict[PartitionKey, _Feed] = {}
        self._polling = False
        self._moving = 0

    def assign(self, key: PartitionKey, offset: int) -> None:
        """Read a partition from this offset on; what lies there of it is forgotten."""
        with self._changed:
            self._wait_for_poll()
            if key in self._feeds:
                self._unassign(key)
            self._feeds[key] = _Feed()
            self._consumer.incremental_assign([TopicPartition(*key, offset)])
            self._changed.notify_all()

    def release(self, key: PartitionKey) -> None:
        """Read a partition no more."""
        with self._changed:
            self._wait_for_poll()
            if self._feeds.pop(key, None):
                self._unassign(key)
            self._changed.notify_all()

    def _wait_for_poll(self) -> None:
        # What a poll brings is of the assignment it began with.
        self._moving += 1
        self._changed.wait_for(lambda: not self._polling)
        self._moving -= 1

    def _unassign(self, key: PartitionKey) -> None:
        partitions = [TopicPartition(*key)]
        # A pause outlives an assignment: it would still hold when it is assigned again.
        self._consumer.resume(partitions)
        self._consumer.incremental_unassign(partitions)

    def consume(
        self, key: PartitionKey, most: int, most_bytes: int, timeout_secs: float
    ) -> tuple[list[Message], int]:
        """The next messages of a partition that is assigned, and the bytes of their records.

        Messages are records, or what is said of the partition, in the order they came.

        Args:
            key: The partition.
            most: How many at most.
            most_bytes: Bytes of their records at most, about, and one record in any case.
            timeout_secs: How long to wait for the first one.

        Raises:
            KafkaException: The consumer can read nothing any more.
        """
        deadline = monotonic() + timeout_secs
        first = True
        while True:
            with self._changed:
                feed = self._feeds[key]

                def ready(feed: _Feed = feed) -> bool:
                    return bool(feed.runs) or not (self._polling or self._moving)

                self._changed.wait_for(ready, max(0.0, deadline - monotonic()))
                if feed.runs:
                    return self._take(key, feed, most, most_bytes)
                left = deadline - monotonic()
                # Also without any time left: what has been fetched is there at once.
                if not ready() or not (first or left > 0):
                    return [], 0
                first = False
                self._polling = True
            messages: list[Message] = []
            try:
                self._poll(messages, min(_SLICE_SECS, max(_LEAST_SECS, left)) if left > 0 else 0.0)
            finally:
                with self._changed:
                    self._lay_down(messages, key)
                    self._polling = False
                    self._changed.notify_all()

    def _poll(self, messages: list[Message], timeout_secs: float) -> None:
        """Add what comes; what came before an error stays, since it comes only once."""
        # `consume` waits for the whole time unless it gets as many as it is asked for.
        message = self._consumer.poll(timeout_secs)
        if message is not None:
            messages.append(message)
            messages += self._consumer.consume(CHUNK_RECORDS - 1, 0)

    def _lay_down(self, messages: list[Message], poller: PartitionKey) -> None:
        """Give each partition its own; the caller holds the lock."""
        for run in in_runs(messages):
            topic, number = run[0].topic(), run[0].partition()
            if not run[0].error():
                assert topic is not None and number is not None
                self._feed((topic, number), run, bytes_of(run))
                continue
            # What is wrong with a topic may come without a partition, and what is wrong with the
            # cluster without a topic.
            concerned = [
                key
                for key in self._feeds
                if key == (topic, number) or (number is None and key[0] == topic)
            ]
            for key in concerned or [poller]:
                self._feed(key, run, 0)

    def _feed(self, key: PartitionKey, run: list[Message], size: int) -> None:
        feed = self._feeds.get(key)
        if feed is None:
            return
        feed.runs.append((run, size))
        feed.bytes += size
        if not feed.paused and feed.bytes > self._most_bytes():
            feed.paused = True
            self._consumer.pause([TopicPartition(*key)])

    def _take(
        self, key: PartitionKey, feed: _Feed, most: int, most_bytes: int
    ) -> tuple[list[Message], int]:
        taken: list[Message] = []
        before = feed.bytes
        while feed.runs:
            run, size = feed.runs[0]
            room, left = most - len(taken), most_bytes - (before - feed.bytes)
            if size > left:
                # As if all of a run were of the same size.
                room = min(room, max(0 if taken else 1, left * len(run) // size))
            if room <= 0:
                break
            feed.runs.popleft()
            if len(run) > room:
                rest = size * (len(run) - room) // len(run)
                feed.runs.appendleft((run[room:], rest))
                run, size = run[:room], size - rest
            taken += run
            feed.bytes -= size
        if feed.paused and feed.bytes <= self._most_bytes() // 2:
            feed.paused = False
            self._consumer.resume([TopicPartition(*key)])
        return taken, before - feed.bytes

    def _most_bytes(self) -> int:
        return min(_FEED_BYTES, _FEEDS_BYTES // max(1, len(self._feeds)))

    def end(self, key: PartitionKey) -> int:
        """The partition's end as the last fetch saw it; 0 before the first one."""
        try:
            partition = TopicPartition(*key)
            return int(self._consumer.get_watermark_offsets(partition, cached=True)[1])
        except KafkaException:
            return 0

    def first_offset(self, key: PartitionKey) -> int:
        """The partition's first offset, asked of the broker.

        Raises:
            KafkaException: It does not answer.
        """
        return int(self._asker.get_watermark_offsets(TopicPartition(*key), timeout=_ASK_SECS)[0])

    def committed(self, key: PartitionKey) -> TopicPartition:
        """What the group has committed of a partition, asked of the broker.

        Raises:
            KafkaException: It does not answer.
        """
        (found,) = self._asker.committed([TopicPartition(*key)], timeout=_ASK_SECS)
        return found

    def close(self) -> None:
        """Leave Kafka."""
        self._consumer.close()
        self._asker.close()
