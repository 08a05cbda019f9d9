"""SharedConsumer on a real broker: each partition's records, in order, whoever polls."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests import sink
from tests.conftest import Names
from transforms.kafka import shared_consumer
from transforms.kafka.client import KafkaConfig
from transforms.kafka.shared_consumer import SharedConsumer
from transforms.records import PartitionKey

PARTITIONS = 20
RECORDS = 2_000


@pytest.fixture
def topic(broker: KafkaBroker, names: Names) -> str:
    topic = names.topic()
    broker.create_topic(topic, PARTITIONS)
    broker.produce(topic, list(sink.numbered(PARTITIONS, RECORDS)))
    return topic


@pytest.fixture
def consumer(broker: KafkaBroker, names: Names) -> Iterator[SharedConsumer]:
    with closing(SharedConsumer(KafkaConfig(broker.bootstrap_servers, names.group()))) as made:
        yield made


def _records(
    consumer: SharedConsumer, key: PartitionKey, most: int = 300, most_bytes: int = 2**20
) -> list[int]:
    messages, _ = consumer.consume(key, most, most_bytes, 0.02)
    assert all((message.topic(), message.partition()) == key for message in messages)
    return [message.offset() for message in messages if not message.error()]


def test_threads_that_read_and_move_their_partitions_get_each_record_in_order(
    consumer: SharedConsumer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while much lies there, so that partitions are paused, and while some are released."""
    monkeypatch.setattr(shared_consumer, "_FEED_BYTES", 2_000)
    wrong: list[str] = []

    def read(number: int) -> None:
        chance = random.Random(number)
        key = (topic, number)
        due = 0
        consumer.assign(key, due)
        while due < RECORDS and not wrong:
            if chance.random() < 0.03:
                due = chance.randrange(RECORDS) if chance.random() < 0.3 else due
                if chance.random() < 0.5:
                    consumer.release(key)
                consumer.assign(key, due)
            found = _records(consumer, key, chance.randrange(1, 400), chance.randrange(1, 4000))
            if found != list(range(due, due + len(found))):
                wrong.append(f"partition {number}: {found[:3]}... in place of {due}")
            due += len(found)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(PARTITIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_partitions_cost_no_threads_of_their_own(
    consumer: SharedConsumer, topic: str, broker: KafkaBroker
) -> None:
    consumer.assign((topic, 0), 0)
    wait_until(lambda: _records(consumer, (topic, 0)), "nothing is read")
    before = _threads()
    for number in range(1, PARTITIONS):
        consumer.assign((topic, number), 0)
    for number in range(1, PARTITIONS):
        wait_until(lambda n=number: _records(consumer, (topic, n)), "nothing is read")  # type: ignore[misc]
    assert _threads() <= before
    assert consumer.end((topic, 3)) == RECORDS


def test_what_nobody_consumes_is_held_up_to_a_bound(
    consumer: SharedConsumer, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are read; what was not consumed is there in the end."""
    monkeypatch.setattr(shared_consumer, "_FEED_BYTES", 2_000)
    monkeypatch.setattr(shared_consumer, "CHUNK_RECORDS", 500)
    idle, busy = (topic, 0), (topic, 1)
    consumer.assign(idle, 0)
    consumer.assign(busy, 0)
    seen = 0

    def done() -> bool:
        nonlocal seen
        seen += len(_records(consumer, busy))
        return seen == RECORDS

    wait_until(done, "the other is not read")
    feed = consumer._feeds[idle]
    # A poll more than the bound, at most.
    assert feed.bytes < 2_000 + 500 * 25
    got: list[int] = []
    wait_until(lambda: got.extend(_records(consumer, idle)) or len(got) == RECORDS, "lost")  # type: ignore[func-returns-value]
    assert got == list(range(RECORDS))


@pytest.mark.parametrize(("most_bytes", "most"), [(1, 1), (1_000, 1), (5_500, 5), (10**6, 100)])
def test_what_is_consumed_at_once_has_a_bound_of_bytes(
    broker: KafkaBroker, names: Names, consumer: SharedConsumer, most_bytes: int, most: int
) -> None:
    topic = names.topic()
    broker.create_topic(topic, 1)
    broker.produce(topic, [(0, None, b"x" * 1_000)] * 100)
    key = (topic, 0)
    consumer.assign(key, 0)
    got: list[list[int]] = []
    wait_until(
        lambda: got.append(_records(consumer, key, 100, most_bytes)) or sum(map(len, got)) == 100,  # type: ignore[func-returns-value]
        "not all is read",
    )
    assert list(chain(*got)) == list(range(100))
    assert max(map(len, got)) <= most
    assert max(map(len, got)) == most or most == 100


class _Breaks(Consumer):
    """Hands out a record, and fails where it is asked for more."""

    def __init__(self) -> None:
        super().__init__({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})

    def poll(self, timeout: float = -1) -> Any:
        return Message(topic="t", partition=0, offset=5, value=b"v")

    def consume(self, num_messages: int = 1, timeout: float = -1) -> Any:
        raise KafkaException(KafkaError(KafkaError._FAIL))


def test_what_came_before_an_error_is_not_lost() -> None:
    """The client hands out each record once."""
    consumer = SharedConsumer(KafkaConfig("127.0.0.1:1", "g"), lambda *_, **__: _Breaks())
    with closing(consumer):
        consumer.assign(("t", 0), 5)
        with pytest.raises(KafkaException):
            consumer.consume(("t", 0), 10, 1000, 0)
        (message,), _ = consumer.consume(("t", 0), 10, 1000, 0)
        assert message.offset() == 5


class _Counts(Consumer):
    """Has nothing, and waits as the client does: whole milliseconds, which are over a bit early."""

    def __init__(self) -> None:
        super().__init__({"bootstrap.servers": "127.0.0.1:1", "group.id": "g"})
        self.waits: list[float] = []

    def poll(self, timeout: float = -1) -> Any:
        self.waits.append(timeout)
        time.sleep(max(0.0, int(timeout * 1000) / 1000 - 0.0005))


@pytest.mark.parametrize("secs", [0.0, 0.0004, 0.0055])
def test_a_reader_never_waits_for_less_than_the_client_can(secs: float) -> None:
    """It would ask again and again until its time is over."""
    client = _Counts()
    consumer = SharedConsumer(KafkaConfig("127.0.0.1:1", "g"), lambda *_, **__: client)
    with closing(consumer):
        consumer.assign(("t", 0), 5)
        assert consumer.consume(("t", 0), 10, 1000, secs) == ([], 0)
    assert client.waits
    assert all(wait == 0 or wait >= 0.001 for wait in client.waits)
    assert (0 in client.waits) == (secs == 0)
