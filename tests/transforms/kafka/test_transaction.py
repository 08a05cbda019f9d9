"""Transactions with a real broker: what can be seen after each way in which one may end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests.conftest import Names
from transforms.errors import KafkaError, WriteError
from transforms.kafka.client import KafkaConfig, make_consumer, make_producer
from transforms.kafka.members import member_settings
from transforms.kafka.transaction import (
    Transaction,
    TransactionConfig,
    returned,
    transaction_settings,
)
from transforms.write.topic_writer import Delivered, TopicWriter


@pytest.mark.parametrize(
    ("given", "number", "java_keys", "expected"),
    [
        ({}, 0, False, {"transactional.id": "g-unique", "transaction.timeout.ms": 30_000}),
        ({"transaction.timeout.ms": "5000"}, 0, False, {"transaction.timeout.ms": "5000"}),
        # Started again, it ends what it had begun.
        ({"group.instance.id": "one"}, 0, False, {"transactional.id": "g-one"}),
        ({"group.instance.id": "one"}, 2, False, {"transactional.id": "g-one-2"}),
        ({}, 0, True, {"partitioner": "murmur2_random"}),
        ({}, 0, False, {"partitioner": None}),
    ],
)
def test_what_the_producer_is_told(given, number, java_keys, expected) -> None:
    settings = transaction_settings(given, "g", number, java_keys, "unique")
    assert {name: settings.get(name) for name in expected} == expected


class _Unanswered:
    """A producer whose commit is not answered: after it has happened, or instead."""

    def __init__(self, producer: Producer, happens: bool) -> None:
        self._producer = producer
        self._happens = happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def commit_transaction(self, timeout: float) -> None:
        if self._happens:
            self._producer.commit_transaction(timeout)
        raise KafkaException(ErrorCode(ErrorCode._TIMED_OUT))


class _World:
    """A group with a member that has the one partition of its topic, and a topic to write to."""

    def __init__(self, broker: KafkaBroker, names: Names) -> None:
        self.broker = broker
        self.source, self.target = names.topic(), names.topic("target")
        broker.create_topic(self.source, 1)
        broker.create_topic(self.target, 1, max_message_bytes=20_000)
        self.kafka = KafkaConfig(broker.bootstrap_servers, names.group())
        self.member = self.join()

    def join(self) -> Consumer:
        consumer = make_consumer(self.kafka, member_settings({}, 0)[0])
        consumer.subscribe([self.source])
        wait_until(lambda: consumer.poll(0) is None and bool(consumer.assignment()), "no member")
        return consumer

    def transaction(self, make: Callable[[Mapping[str, Any]], Any] = make_producer) -> Transaction:
        return Transaction(TransactionConfig(self.kafka), make)

    def write(self, transaction: Transaction, *values: bytes) -> None:
        for value in values:
            transaction.producer.produce(self.target, value, partition=0)
        transaction.producer.flush(10)

    def offsets(self, offset: int, note: str = "") -> list[TopicPartition]:
        return [TopicPartition(self.source, 0, offset, metadata=note)]

    def seen(self) -> list[bytes | None]:
        return [record.value for record in self.broker.read_all(self.target)]

    def committed(self) -> int | None:
        return self.broker.committed(self.kafka.group, self.source).get(0)


@pytest.fixture
def world(broker: KafkaBroker, names: Names) -> Iterator[_World]:
    world = _World(broker, names)
    yield world
    world.member.close()


def test_records_and_offsets_are_there_together_or_not(world: _World) -> None:
    transaction, ended = world.transaction(), []
    transaction.begin(lambda: ended.append(1))
    world.write(transaction, b"a", b"b")
    transaction.commit(world.offsets(2), world.member)
    assert (world.seen(), world.committed(), ended) == ([b"a", b"b"], 2, [1])
    transaction.begin(lambda: ended.append(2))
    world.write(transaction, b"c")
    transaction.abort()
    assert not transaction.is_open
    # Nothing was written in this one.
    transaction.begin(lambda: ended.append(3))
    transaction.commit(world.offsets(3, "note"), world.member)
    assert (world.seen(), world.committed(), ended) == ([b"a", b"b"], 3, [1, 3])


def test_after_a_record_that_is_refused_the_next_one_goes_well(world: _World) -> None:
    """With the same producer it would not."""
    transaction = world.transaction()
    transaction.begin()
    world.write(transaction, b"a", b"x" * 30_000)
    with pytest.raises(KafkaException):
        transaction.commit(world.offsets(1), world.member)
    transaction.begin()
    world.write(transaction, b"b")
    transaction.commit(world.offsets(1), world.member)
    assert (world.seen(), world.committed()) == ([b"b"], 1)


def test_who_is_no_member_any_more_writes_nothing(world: _World) -> None:
    before = world.member
    transaction = world.transaction()
    transaction.begin()
    world.write(transaction, b"a")

    class Frozen:
        """What it knew of the group."""

        metadata = before.consumer_group_metadata()

        def consumer_group_metadata(self) -> Any:
            return self.metadata

    frozen: Any = Frozen()
    before.close()
    world.member = world.join()
    with pytest.raises(KafkaException):
        transaction.commit(world.offsets(1), frozen)
    assert (world.seen(), world.committed()) == ([], None)


@pytest.mark.parametrize("happens", [True, False])
def test_a_commit_that_is_not_answered_is_looked_for(world: _World, happens: bool) -> None:
    """The offsets tell whether it has happened."""
    ended: list[int] = []
    transaction = world.transaction(lambda settings: _Unanswered(make_producer(settings), happens))
    transaction.begin(lambda: ended.append(1))
    world.write(transaction, b"a")
    if happens:
        transaction.commit(world.offsets(1, "note"), world.member)
        assert (world.seen(), world.committed(), ended) == ([b"a"], 1, [1])
    else:
        with pytest.raises(KafkaException):
            transaction.commit(world.offsets(1, "note"), world.member)
        assert (world.seen(), world.committed(), ended) == ([], None, [])


@pytest.mark.parametrize(
    "name",
    ["init_transactions", "send_offsets_to_transaction", "commit_transaction", "abort_transaction"],
)
def test_a_call_that_never_returns_costs_its_producer(
    world: _World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The member's thread goes on, and the transaction with another producer."""
    # The first one may wait for the broker, which gets ready for transactions.
    world.transaction().producer.begin_transaction()
    monkeypatch.setattr("transforms.kafka.transaction._STEP_SECS", 2.0)
    monkeypatch.setattr("transforms.kafka.transaction._ABORT_SECS", 0.5)
    monkeypatch.setattr("transforms.kafka.transaction._GRACE_SECS", 0.5)
    over = threading.Event()
    hanging = False

    class Hangs:
        def __init__(self, producer: Producer) -> None:
            self._producer = producer

        def __getattr__(self, asked: str) -> Any:
            return self._hang if hanging and asked == name else getattr(self._producer, asked)

        def _hang(self, *_: object) -> None:
            over.wait()

    transaction = world.transaction(lambda settings: Hangs(make_producer(settings)))

    def write(value: bytes) -> None:
        transaction.begin()
        world.write(transaction, value)
        transaction.commit(world.offsets(1), world.member)

    hanging = True
    try:
        if name == "abort_transaction":
            transaction.begin()
            world.write(transaction, b"a")
            transaction.abort()
        else:
            refused = WriteError if name == "init_transactions" else KafkaException
            with pytest.raises(refused, match="the client does not answer"):
                write(b"a")
        hanging = False
        assert not transaction.is_open
        write(b"b")
        assert (world.seen(), world.committed()) == ([b"b"], 1)
    finally:
        over.set()


def test_who_may_not_begin_is_told_so(broker: KafkaBroker, names: Names) -> None:
    """With what it needs."""

    class Refused:
        def init_transactions(self, timeout: float) -> None:
            code = ErrorCode.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
            raise KafkaException(ErrorCode(code))

    kafka = KafkaConfig(broker.bootstrap_servers, "orders")
    transaction = Transaction(TransactionConfig(kafka), lambda settings: Refused())  # type: ignore[arg-type,return-value]
    with pytest.raises(KafkaError, match="transactional ids that begin with orders-"):
        transaction.begin()


def test_who_is_fenced_by_another_of_its_name_says_so(broker: KafkaBroker, names: Names) -> None:
    """While it waits for its records; the client itself raises what nobody can make sense of."""
    topic = names.topic()
    broker.create_topic(topic, 2)
    settings = transaction_settings(
        {"bootstrap.servers": broker.bootstrap_servers}, names.group(), 0, False, "one"
    )
    fenced = make_producer(settings)
    fenced.init_transactions(30)
    fenced.begin_transaction()
    writer = TopicWriter(topic, fenced)
    writer.write(0, b"key", b"before", [], Delivered())
    writer.acknowledge()
    make_producer(settings).init_transactions(30)
    for number in range(20):
        writer.write(number, b"key", b"behind", [], Delivered())
    with pytest.raises(WriteError, match="the client has ended for good"):
        writer.acknowledge()
    with pytest.raises(WriteError, match=f"a record of topic {topic} was not acknowledged"):
        writer.write(0, b"key", b"value", [], Delivered())
    with pytest.raises(KafkaException):
        returned(fenced.commit_transaction, 5)
