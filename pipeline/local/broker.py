"""A real Kafka broker: one node, in its own Java process, on 127.0.0.1.

    with KafkaBroker() as broker:
        broker.create_topic("orders", partitions=2)
        broker.produce("orders", [NewRecord(partition=0, key=b"k", value=b"v")])
        assert [record.value for record in broker.read_all("orders")] == [b"v"]

It needs Java 17 or newer and, once, Maven to fetch the jars (`pipeline.local.jars`).
"""

from __future__ import annotations

import base64
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic, OffsetSpec

from pipeline.local.jars import classpath
from pipeline.local.processes import (
    LocalServer,
    ServerError,
    free_ports,
    java_command,
    wait_until,
)
from transforms.kafka.client import NO_COORDINATOR, NO_LEADER

# Records in one call of the consumer: large enough that the call itself costs nothing.
_READ_CHUNK = 10_000
# Records between two looks at delivery reports while producing.
_POLL_EVERY = 10_000

# What makes the start short: one compiler tier, a collector without threads, no JMX lookups.
_QUICK_START = ("-XX:TieredStopAtLevel=1",)
_JVM_FLAGS = (
    "-Xshare:auto",
    "-Dlog4j2.level=WARN",
    "-Dlog4j2.disableJmx=true",
)

_BROKER_CONFIG = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "BROKER",
    "controller.listener.names": "CONTROLLER",
    "num.partitions": "4",
    # One node holds the only replica of everything; few partitions are created faster.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    # Tests do not wait long for what a member left that was killed.
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "3000",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "300",
    # Nor for a transaction that was left open.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    # After a kill the new process may register only when the old one's session is over.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Tests write records of any age: none may go because of its timestamp.
    "log.retention.ms": "-1",
    # Compaction has to be seen within seconds, and its buffer has to fit the small heap.
    "log.cleaner.backoff.ms": "200",
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
    "log.initial.task.delay.ms": "500",
}


class NewRecord(NamedTuple):
    """One record to write. A plain tuple in this order does as well."""

    partition: int = 0
    key: bytes | None = None
    value: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int | None = None
    """Milliseconds since the epoch; None is the time of writing."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """One record as a reader of committed records gets it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds since the epoch."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class KafkaBroker(LocalServer):
    """One broker process, its ports and its data; a context manager.

    Entering starts it, leaving ends the process and removes the data. In between it can be
    stopped, killed and started again on the same ports with the same data. It also ends when
    the Python process that started it ends, in whatever way.

    Args:
        config: Broker settings added to or put in place of the usual ones.
        start_timeout: Seconds until the broker must answer.
        compiled_well: Let the JVM compile as well as it can, as brokers do that run for long. It
            starts slower, and takes a minute of work until it is faster.
        heap_mb: Its memory. With thousands of partitions under load the usual is too little.
    """

    def __init__(
        self,
        config: Mapping[str, str] | None = None,
        *,
        start_timeout: float = 60,
        compiled_well: bool = False,
        heap_mb: int = 512,
    ) -> None:
        super().__init__("broker", start_timeout)
        start = () if compiled_well else _QUICK_START
        self._jvm_flags = (f"-Xmx{heap_mb}m", *_JVM_FLAGS, *start)
        self._port, self._controller_port = free_ports(2)
        self._config = {
            **_BROKER_CONFIG,
            "listeners": f"BROKER://127.0.0.1:{self._port}"
            f",CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": f"BROKER://127.0.0.1:{self._port}",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            **(config or {}),
        }
        self._admin: AdminClient | None = None

    # The process

    @property
    def bootstrap_servers(self) -> str:
        """``host:port``; the same over restarts."""
        return f"127.0.0.1:{self._port}"

    def _command(self, folder: Path) -> Sequence[str]:
        java = java_command(classpath("kafka"), *self._jvm_flags)
        properties = self._format(java, folder)
        return [*java, "kafka.Kafka", str(properties)]

    def _format(self, java: Sequence[str], folder: Path) -> Path:
        """Write the settings and prepare the data folder, as a new cluster of one node.

        Returns:
            The file with the settings.
        """
        properties = folder / "server.properties"
        lines = {**self._config, "log.dirs": str(folder / "data")}
        properties.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # With "=", because an id may begin with a dash.
        options = [f"--cluster-id={cluster_id}", f"--config={properties}"]
        done = subprocess.run(
            [*java, "kafka.tools.StorageTool", "format", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise ServerError(f"the broker's data folder cannot be made:\n{done.stdout[-4000:]}")
        return properties

    def _is_up(self, name: str) -> bool:
        try:
            metadata = self._client().list_topics(timeout=1)
        except KafkaException:
            return False
        partitions = (p for t in metadata.topics.values() for p in t.partitions.values())
        return bool(metadata.brokers) and all(partition.leader >= 0 for partition in partitions)

    def _end(self, how: signal.Signals) -> None:
        # The next start gets a new client: this one would wait longer and longer to reconnect.
        self._admin = None
        super()._end(how)

    # Topics

    def create_topic(self, name: str, partitions: int = 4, **config: object) -> None:
        """Create a topic; return when every partition has a leader.

        Args:
            name: The topic.
            partitions: How many.
            config: The topic's settings, an underscore for each dot:
                ``cleanup_policy="compact"``.

        Raises:
            KafkaException: The broker refused, for instance because the topic exists.
            ServerError: The partitions have no leader after 30 seconds.
        """
        settings = {key.replace("_", "."): str(value) for key, value in config.items()}
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=settings)
        self._client().create_topics([topic])[name].result()
        self._wait_for_partitions(name, partitions)

    def delete_topic(self, name: str) -> None:
        """Delete a topic; return when the broker no longer lists it.

        Raises:
            KafkaException: The broker refused, for instance because there is no such topic.
            ServerError: It is still listed after 30 seconds.
        """
        self._client().delete_topics([name])[name].result()
        wait_until(lambda: not self._leaders(name), f"topic {name} was deleted and is still listed")

    def add_partitions(self, name: str, total: int) -> None:
        """Raise a topic's partitions to ``total``; return when each has a leader.

        Raises:
            KafkaException: The broker refused, for instance because it has as many already.
            ServerError: The partitions have no leader after 30 seconds.
        """
        self._client().create_partitions([NewPartitions(name, total)])[name].result()
        self._wait_for_partitions(name, total)

    def partitions(self, topic: str) -> list[int]:
        """The topic's partitions, in order; empty when there is no such topic."""
        return sorted(self._leaders(topic))

    def end_offsets(self, topic: str) -> dict[int, int]:
        """The offset the next record gets, per partition.

        Aborted records and the markers of transactions have taken offsets too.
        """
        return self._list_offsets(topic, OffsetSpec.latest())

    def start_offsets(self, topic: str) -> dict[int, int]:
        """The first offset that is still kept, per partition."""
        return self._list_offsets(topic, OffsetSpec.earliest())

    # Records

    def produce(
        self,
        topic: str,
        records: Iterable[NewRecord | tuple[Any, ...]],
        transaction: Literal["commit", "abort"] | None = None,
        timeout: float = 60,
    ) -> int:
        """Write records, each partition's in the order given; return how many.

        Returns when the broker has them all; 400,000 take a few seconds. If it dies meanwhile,
        records may be there twice.

        Args:
            topic: Created with four partitions when it does not exist.
            records: ``NewRecord``s, or tuples (partition, key, value, headers, timestamp) of
                which the last may be left out.
            transaction: Write all of them in one transaction, and end it this way.
            timeout: Seconds to wait for the broker once all records are handed over.

        Raises:
            KafkaException: A record was refused.
            ServerError: Not all were written in time.
        """
        failures: list[KafkaError] = []

        def on_delivery(error: KafkaError | None, _message: object) -> None:
            if error is not None:
                failures.append(error)

        settings: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap_servers,
            # Keeps the order over a retry. An idempotent producer would too, but half a second
            # goes by before it gets its id.
            "max.in.flight.requests.per.connection": 1,
            "linger.ms": 5,
            "batch.num.messages": 100_000,
            "queue.buffering.max.messages": 200_000,
            "message.max.bytes": 100_000_000,  # the topic's limit is the one that counts
            "delivery.report.only.error": True,  # a callback per record would cost the most
            "log_level": 2,
        }
        if transaction is not None:
            settings["transactional.id"] = f"test-{uuid.uuid4()}"  # this one is idempotent
        producer = Producer(settings)
        if transaction is not None:
            producer.init_transactions(timeout)
            producer.begin_transaction()
        count = 0
        for record in records:
            partition, key, value, headers, timestamp = NewRecord(*record)
            while True:
                try:
                    producer.produce(
                        topic,
                        value,
                        key,
                        partition,
                        on_delivery,
                        timestamp=timestamp or 0,
                        headers=list(headers),
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
            count += 1
            if count % _POLL_EVERY == 0:
                producer.poll(0)
        left = producer.flush(timeout)
        if failures:
            raise KafkaException(failures[0])
        if left:
            raise ServerError(f"{left} of {count} records were not written within {timeout:g} s")
        if transaction == "commit":
            producer.commit_transaction(timeout)
        elif transaction == "abort":
            producer.abort_transaction(timeout)
        return count

    def read_all(self, topic: str, timeout: float = 60) -> list[StoredRecord]:
        """Every committed record of a topic, sorted by partition and offset.

        A partition with an open transaction is read up to that transaction's first record.

        Raises:
            KafkaException: The broker answered with an error.
            ServerError: There is no such topic, or the ends were not reached within
                ``timeout`` seconds.
        """
        # Stays open till every partition's end was seen: the end-of-partition event comes also
        # for an empty partition, and when what is left are aborted records.
        open_partitions = set(self.partitions(topic))
        if not open_partitions:
            raise ServerError(f"there is no topic {topic}")
        consumer = self._consumer(f"read-all-{uuid.uuid4()}")
        records: list[StoredRecord] = []
        try:
            # Connects at once; without it the first fetch is half a second late.
            consumer.list_topics(topic, timeout=30)
            consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in open_partitions])
            deadline = time.monotonic() + timeout
            while open_partitions:
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{topic}: the ends of partitions {sorted(open_partitions)} were not "
                        f"reached within {timeout:g} s, after {len(records)} records"
                    )
                # Returns at its timeout or when full, so a short one: the end comes in between.
                for message in consumer.consume(_READ_CHUNK, timeout=0.05):
                    error = message.error()
                    if error is None:
                        records.append(
                            StoredRecord(
                                topic,
                                message.partition(),
                                message.offset(),
                                message.timestamp()[1],
                                message.key(),
                                message.value(),
                                tuple(message.headers() or ()),
                            )
                        )
                    elif error.code() == KafkaError._PARTITION_EOF:
                        open_partitions.discard(message.partition())
                    elif not error.retriable():
                        raise KafkaException(error)
        finally:
            consumer.close()
        records.sort(key=lambda record: (record.partition, record.offset))
        return records

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """The offset a group would read next, per partition; without those it never committed."""
        consumer = self._consumer(group)
        try:
            asked = [TopicPartition(topic, partition) for partition in self.partitions(topic)]
            answer = self._ask_committed(consumer, asked)
        finally:
            consumer.close()
        return {entry.partition: entry.offset for entry in answer if entry.offset >= 0}

    def _ask_committed(
        self, consumer: Consumer, asked: list[TopicPartition]
    ) -> list[TopicPartition]:
        """Ask until the broker, which may just have begun, knows a coordinator for the group."""
        deadline = time.monotonic() + 30
        while True:
            try:
                answer = consumer.committed(asked, timeout=30)
                failed = [entry.error for entry in answer if entry.error is not None]
                if not failed:
                    return list(answer)
                raise KafkaException(failed[0])
            except KafkaException as error:
                if error.args[0].code() not in NO_COORDINATOR or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def compact_wait(self, topic: str, fewer_than: int, timeout: float = 60) -> list[StoredRecord]:
        """Wait until compaction has left fewer than so many records; return what is left.

        Kafka never compacts a partition's newest segment. A segment ends when a record comes
        whose timestamp is ``segment.ms`` after that of the segment's first, so write one such
        record to each partition before: with its timestamp set nobody has to wait for it.

        Raises:
            ServerError: There are still as many after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            records = self.read_all(topic)
            if len(records) < fewer_than:
                return records
            if time.monotonic() > deadline:
                raise ServerError(f"{topic} still has {len(records)} records: not compacted")
            time.sleep(0.2)

    # Clients

    def _client(self) -> AdminClient:
        if self.pid is None:
            raise ServerError("the broker is not up")
        if self._admin is None:
            self._admin = AdminClient(
                {
                    "bootstrap.servers": self.bootstrap_servers,
                    # While the broker starts its port is closed: try often, say nothing.
                    "reconnect.backoff.ms": 50,
                    "reconnect.backoff.max.ms": 200,
                    "log_level": 2,
                }
            )
        return self._admin

    def _consumer(self, group: str) -> Consumer:
        return Consumer(
            {
                "bootstrap.servers": self.bootstrap_servers,
                "group.id": group,
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "queued.min.messages": 200_000,
                "fetch.wait.max.ms": 20,  # the last fetch of a partition waits for nothing
                "log_level": 2,
            }
        )

    def _leaders(self, topic: str) -> dict[int, int]:
        """The leader of each partition (-1: none); empty when there is no such topic."""
        # All topics are asked for: to ask for one by its name would create it.
        metadata = self._client().list_topics(timeout=30).topics.get(topic)
        return {p.id: p.leader for p in metadata.partitions.values()} if metadata else {}

    def _wait_for_partitions(self, topic: str, count: int) -> None:
        def ready() -> bool:
            leaders = self._leaders(topic)
            return len(leaders) == count and min(leaders.values()) >= 0

        wait_until(ready, f"topic {topic} does not have {count} partitions with a leader")

    def _list_offsets(self, topic: str, which: OffsetSpec) -> dict[int, int]:
        asked = {TopicPartition(topic, partition): which for partition in self.partitions(topic)}
        if not asked:
            raise ServerError(f"there is no topic {topic}")
        # A broker lists a new partition a moment before it leads it.
        deadline = time.monotonic() + 30
        while True:
            answers = self._client().list_offsets(asked, request_timeout=30)
            try:
                return {at.partition: answer.result().offset for at, answer in answers.items()}
            except KafkaException as error:
                if error.args[0].code() not in NO_LEADER or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
