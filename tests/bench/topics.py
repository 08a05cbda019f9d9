"""Filling the benchmark's topic, and checking what a run left behind. Memory stays small: a child
process's peak RSS is never reported below that of the parent it was started from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import orjson
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.local.processes import wait_until
from transforms.lanes import Lanes


class WrongResult(Exception):
    """A run left something else than it should."""


class Topics:
    """The topics of one broker."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        # Silent about a broker that is gone: that is how a benchmark ends.
        self._servers = {"bootstrap.servers": bootstrap_servers, "log_level": 2}
        self._admin = AdminClient(self._servers)
        self._created: list[str] = []

    def create(self, topic: str, partitions: int, config: dict[str, str] | None = None) -> None:
        """Create a topic and wait until it is there, and each partition has a leader."""
        new = NewTopic(topic, partitions, 1, config=config or {})
        self._admin.create_topics([new])[topic].result(60)
        self._created.append(topic)
        wait_until(lambda: self._leaders(topic) == partitions, f"topic {topic} is not there")

    def delete(self, topic: str) -> None:
        """Delete a topic that `create` made."""
        self._created.remove(topic)
        self._admin.delete_topics([topic])[topic].result(30)

    def delete_all(self) -> None:
        """Delete what `create` made and is left."""
        for topic in list(self._created):
            self.delete(topic)

    def fill(self, topic: str, partitions: int, records: int, record_bytes: int) -> None:
        """Write JSON objects of about `record_bytes` bytes, spread evenly over the partitions, in
        the order of their numbers: `check` knows a record's key by its place."""
        producer = Producer({**self._servers, "linger.ms": 20, "enable.idempotence": True})
        short = len(_record(0, ""))
        padding = "x" * max(0, record_bytes - short)
        for number in range(records):
            value = _record(number, padding)
            while True:
                try:
                    producer.produce(topic, value, key=_key(number), partition=number % partitions)
                    break
                except BufferError:
                    producer.poll(0.1)
            if number % 1000 == 0:
                producer.poll(0)
        if producer.flush(60):
            raise RuntimeError(f"not all records were written to {topic}")
        ends = self._ends(topic)
        if sum(ends) != records:
            raise RuntimeError(f"{topic} has {sum(ends)} records, not {records}")

    def write(self, topic: str, key: bytes, value: bytes) -> None:
        """Write one record to partition 0; return when the broker has it."""
        producer = Producer(self._servers)
        producer.produce(topic, value, key, 0)
        if producer.flush(30):
            raise RuntimeError(f"a record was not written to {topic}")

    def check(self, topic: str, response_topic: str, lanes: Lanes) -> None:
        """Raise WrongResult unless every record has one response.

        Within a partition of the response topic the offsets of each lane of a source partition
        must rise: that is what order promises, whichever way responses are spread over partitions.
        """
        ends = self._ends(topic)
        seen = [bytearray(end) for end in ends]
        responses = 0
        latest: dict[tuple[int, int, int], int] = {}
        for message in self.read(response_topic):
            source, offset = answered(topic, message)
            if seen[source][offset]:
                raise WrongResult(f"more than one response to {source}/{offset}")
            (lane,) = lanes.of([_key(offset * len(ends) + source)], [offset])
            place = (message.partition(), source, lane)
            before = latest.get(place, -1)
            if offset <= before:
                raise WrongResult(f"the response to {source}/{offset} comes after {before}'s")
            seen[source][offset] = 1
            latest[place] = offset
            responses += 1
        if responses != sum(ends):
            raise WrongResult(f"{responses} responses to {sum(ends)} records")

    def check_committed(self, topic: str, group: str) -> None:
        """Raise WrongResult unless the group is at the topic's end."""
        ends = self._ends(topic)
        committed = self._committed(group, topic, len(ends))
        # Where there never was a record there need not be an offset.
        if any(end and offset != end for offset, end in zip(committed, ends, strict=True)):
            raise WrongResult(f"{group} has committed {committed}, the topic ends at {ends}")

    def count(self, topic: str) -> int:
        """How many records were written to a topic, if none of them in a transaction."""
        return sum(self._ends(topic))

    def _leaders(self, topic: str) -> int:
        """How many partitions of a topic have a leader."""
        found = self._admin.list_topics(topic, timeout=30).topics[topic].partitions
        return sum(partition.leader >= 0 for partition in found.values())

    def _ends(self, topic: str) -> list[int]:
        consumer = Consumer({**self._servers, "group.id": "bench-check"})
        try:
            partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
            return [
                consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)[1]
                for partition in sorted(partitions)
            ]
        finally:
            consumer.close()

    def _committed(self, group: str, topic: str, partitions: int) -> list[int]:
        consumer = Consumer({**self._servers, "group.id": group})
        try:
            wanted = [TopicPartition(topic, partition) for partition in range(partitions)]
            return [found.offset for found in consumer.committed(wanted, timeout=30)]
        finally:
            consumer.close()

    def read(self, topic: str) -> Iterator[Message]:
        """Yield what a topic has now, each partition's in order."""
        consumer = Consumer(
            {
                **self._servers,
                "group.id": "bench-check",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                # Transaction markers take offsets too, so the end is asked for, not counted.
                "enable.partition.eof": True,
                "queued.max.messages.kbytes": 8192,
                "fetch.message.max.bytes": 2_000_000,
            }
        )
        ends = self._ends(topic)
        left = {partition for partition, end in enumerate(ends) if end}
        try:
            consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
            while left:
                messages: Sequence[Message] = consumer.consume(2000, 1.0)
                for message in messages:
                    error = message.error()
                    if error is None:
                        yield message
                    elif error.name() == "_PARTITION_EOF":
                        left.discard(message.partition())
                    else:
                        raise KafkaException(error)
        finally:
            consumer.close()


def answered(topic: str, response: Message) -> tuple[int, int]:
    """Partition and offset of the record that a response answers.

    Raises:
        WrongResult: It is none to a record of this topic, or another one than it should be.
    """
    key, value = orjson.loads(response.key()), orjson.loads(response.value())
    if key["topic"] != topic or any(value[name] != key[name] for name in key):
        raise WrongResult(f"a response's key {key} does not fit its value {value}")
    if value["result"] != {"ok": True}:
        raise WrongResult(f"the response to {key} is {value}")
    return key["partition"], key["offset"]


def _key(number: int) -> bytes:
    """A record's key; the records take turns over the partitions."""
    return b"key-%d" % number


def _record(number: int, padding: str) -> bytes:
    """A record's value: a flat object with a few types, of the same length for every `number`."""
    return (
        f'{{"id":{number + 1_000_000_000},"customer":"customer-{number % 9973:04}",'
        f'"amount":{number % 9000 + 1000}.25,"paid":true,"note":"{padding}"}}'
    ).encode()
