"""LocalKafka: a Kafka broker inside this process, for the demo and the tests.

It is librdkafka's mock cluster: it speaks the real protocol to any client, in this process or
another one, for as long as this process lives. It keeps only the newest 5 MiB of a partition, and
it imitates neither transactions nor access control. A real broker is in `pipeline.local.broker`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError

TIMEOUT_SECS = 30.0

Headers = tuple[tuple[str, bytes | None], ...]

# What goes wrong is raised; librdkafka's own lines on stderr would say it a second time.
_QUIET = {"log_level": 0}


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A record to write.

    Attributes:
        key: Records with the same key go to the same partition; None goes to any.
        value: None is a tombstone.
        headers: Names and values, in order; names may repeat.
        partition: Where to write it whatever its key, or None.
    """

    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as a topic has it; fields as in `NewRecord`."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class LocalKafka:
    """One broker on a free port of 127.0.0.1 until `close`. A context manager.

    Topics come into being at the first use of their name, with 4 partitions.

    Attributes:
        bootstrap_servers: For clients, as host:port.

    Raises:
        KafkaError: It does not answer.
    """

    def __init__(self) -> None:
        # The cluster belongs to this producer, and ends with it.
        self._producer: Any = Producer(
            _QUIET
            | {
                "test.mock.num.brokers": 1,
                "bootstrap.servers": "",  # the mock's own address takes its place
                "enable.idempotence": True,  # keeps the order of what is produced
            }
        )
        brokers = self._producer.list_topics(timeout=TIMEOUT_SECS).brokers.values()
        if not brokers:
            raise KafkaError("the local Kafka did not start")
        self.bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def __enter__(self) -> LocalKafka:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the broker; its topics are gone. May be called twice."""
        self._producer = None

    def produce(self, topic: str, records: Iterable[NewRecord]) -> None:
        """Write records, in order, and wait until they are stored.

        Raises:
            KafkaError: One of them is not.
        """
        failures: list[str] = []

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                failures.append(error.str())

        for record in records:
            while True:
                try:
                    self._producer.produce(
                        topic,
                        record.value,
                        record.key,
                        # -1 lets the partitioner choose by the key.
                        -1 if record.partition is None else record.partition,
                        headers=list(record.headers),
                        on_delivery=delivered,
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
        left = self._producer.flush(TIMEOUT_SECS)
        if left:
            failures.append(f"{left} records not acknowledged after {TIMEOUT_SECS:.0f} seconds")
        if failures:
            raise KafkaError(f"cannot write to topic {topic} of the local Kafka: {failures[0]}")

    def read_all(self, topic: str) -> list[StoredRecord]:
        """Everything in a topic, by partition and offset; nothing if there is no such topic.

        Raises:
            KafkaError: It cannot be read to its end in time.
        """
        consumer: Any = Consumer(
            _QUIET
            | {
                "bootstrap.servers": self.bootstrap_servers,
                "group.id": "local-kafka",  # needed by the client, never used
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 10,  # how long an empty partition keeps its end to itself
            }
        )
        try:
            # Without naming the topic: that would make it.
            topics = consumer.list_topics(timeout=TIMEOUT_SECS).topics
            unread = set(topics[topic].partitions) if topic in topics else set()
            consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in unread])
            records = []
            deadline = time.monotonic() + TIMEOUT_SECS
            while unread:
                if time.monotonic() > deadline:
                    raise KafkaError(
                        f"topic {topic} of the local Kafka is not read to its end after "
                        f"{TIMEOUT_SECS:.0f} seconds"
                    )
                for message in consumer.consume(10_000, timeout=0.1):
                    error = message.error()
                    if error is None:
                        records.append(_stored(message))
                    elif error.code() == ErrorCode._PARTITION_EOF:
                        unread.discard(message.partition())
                    else:
                        raise KafkaError(
                            f"topic {topic} of the local Kafka cannot be read: {error.str()}"
                        )
        finally:
            consumer.close()
        return sorted(records, key=lambda record: (record.partition, record.offset))


def _stored(message: Any) -> StoredRecord:
    return StoredRecord(
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        tuple(message.headers() or ()),
    )
