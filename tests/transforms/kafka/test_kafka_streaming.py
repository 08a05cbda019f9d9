"""Kafka as the source of streaming runs: on a real broker, without a runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests import sink
from tests.conftest import Names
from transforms.commit.committer import CommitConfig, Committer
from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig
from transforms.kafka.offsets import LATEST, SourceConfig
from transforms.kafka.partition_reader import PartitionReader
from transforms.kafka.shared_consumer import SharedConsumer
from transforms.kafka.streaming import KafkaStream, PartitionFinder, PartitionReaders
from transforms.read.lending import ReadAhead
from transforms.records import PartitionKey

MakeReader = Callable[..., tuple[PartitionReader, CommitConfig, PartitionKey]]


@pytest.fixture
def make_reader(broker: KafkaBroker, names: Names) -> Iterator[MakeReader]:
    """Makes a topic of one partition with so many records, and its reader with limits."""
    with ExitStack() as stack:

        def make(
            produced: int, **limits: int
        ) -> tuple[PartitionReader, CommitConfig, PartitionKey]:
            topic = names.topic()
            broker.create_topic(topic, 1)
            broker.produce(topic, list(sink.numbered(1, produced)))
            source = SourceConfig(KafkaConfig(broker.bootstrap_servers, names.group()), (topic,))
            consumer = stack.enter_context(closing(SharedConsumer(source.kafka)))
            reader = PartitionReader(source.kafka, consumer, (topic, 0), ReadAhead(**limits))
            return reader, CommitConfig(source, refresh_secs=None), (topic, 0)

        yield make


def _read_all(reader: PartitionReader, until: int) -> int:
    """Read as far as the reader lets, to `until` at least; returns where that is."""
    position = 0

    def far() -> bool:
        nonlocal position
        if not reader.may_read():
            return True
        position = reader.read(0.02)[1]
        return position >= until

    wait_until(far, "nothing is read")
    return position


def test_a_partition_is_not_read_far_ahead_of_what_is_committed(make_reader: MakeReader) -> None:
    reader, commit, key = make_reader(5000, records=1500)
    reader.go_to(0)
    position = _read_all(reader, 5000)
    assert 1500 <= position <= 2500
    Committer(commit).commit({key: position - 100})
    wait_until(lambda: reader.may_read(), "a commit gives no room")


def test_what_retention_has_taken_is_passed_over_and_counted(
    broker: KafkaBroker, make_reader: MakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader, _, key = make_reader(100)
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    for deleted in admin.delete_records([TopicPartition(*key, 50)]).values():
        deleted.result(30)
    # What a checkpoint holds.
    reader.go_to(10)
    assert _read_all(reader, 100) == 100
    assert reader.offsets_lost == 40
    assert "40 offsets from 10 on were deleted" in caplog.text


def test_a_position_beyond_the_end_stops_its_partition_only(
    make_reader: MakeReader, caplog: pytest.LogCaptureFixture
) -> None:
    reader, _, _ = make_reader(10)
    reader.go_to(5000)

    def told() -> bool:
        assert reader.read(0.05)[1] == 5000
        return reader.errors > 0

    wait_until(told, "not noticed")
    assert "the others go on" in caplog.text


def test_a_group_that_is_ahead_of_a_savepoint_gives_no_room(make_reader: MakeReader) -> None:
    reader, commit, key = make_reader(5000, records=1500)
    committer = Committer(commit)
    committer.commit({key: 5000})
    reader.go_to(0)
    assert 1500 <= _read_all(reader, 5000) < 5000
    # The job commits what it has come to, be it below what another run had.
    committer.commit({key: 1400})
    wait_until(lambda: reader.may_read(), "a commit gives no room")


def test_restarts_give_no_more_room(make_reader: MakeReader) -> None:
    reader, commit, key = make_reader(5000, records=1500)
    committer = Committer(commit)
    committer.commit({key: 0})
    reader.go_to(0)
    position = _read_all(reader, 5000)
    assert position < 5000
    reader.go_to(0)
    reader.go_to(position)
    assert not reader.may_read()
    committer.commit({key: position})
    wait_until(lambda: reader.may_read(), "a commit gives no room")


def test_a_restart_reads_on_for_an_open_batch(make_reader: MakeReader) -> None:
    """What was read before it and is not committed may be a batch that waits for what comes."""
    reader, commit, key = make_reader(600)
    Committer(commit).commit({key: 300})
    reader.go_to(500)
    assert _read_all(reader, 600) == 600
    assert reader.may_read()


def test_a_restart_takes_what_was_read_before_for_as_large(make_reader: MakeReader) -> None:
    reader, commit, key = make_reader(5000, bytes=20_000)
    committer = Committer(commit)
    committer.commit({key: 0})
    reader.go_to(3000)
    assert 3000 < _read_all(reader, 5000) < 5000
    assert not reader.may_read()
    committer.commit({key: 3000})
    wait_until(lambda: reader.may_read(), "a commit gives no room")


def test_partitions_that_were_added_are_found(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, 1)
    finder = PartitionFinder(
        SourceConfig(KafkaConfig(broker.bootstrap_servers, names.group()), (topic,))
    )
    known = finder.look(None)
    assert known == {(topic, 0): (0, 0)}
    broker.add_partitions(topic, 3)
    found: dict[PartitionKey, tuple[int, int]] = {}

    def all_found() -> bool:
        # They may have no leader yet; a run asks again, too.
        with suppress(KafkaError):
            found.update(finder.look(frozenset(known | found)))
        return len(found) == 2

    wait_until(all_found, "the new partitions are not found")
    assert found == {(topic, 1): (0, 0), (topic, 2): (0, 0)}


def test_with_latest_a_topic_that_comes_later_begins_at_its_first_record(
    broker: KafkaBroker, names: Names
) -> None:
    topic = names.topic()
    kafka = KafkaConfig(broker.bootstrap_servers, names.group())
    finder = PartitionFinder(SourceConfig(kafka, (topic,), starting_position=LATEST))
    assert finder.look(None) == {}
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 5)))
    wait_until(lambda: finder.look(frozenset()), "not found")
    assert finder.look(frozenset()) == {(topic, 0): (0, 5)}


def test_a_reader_that_was_closed_is_not_lent() -> None:
    # Nothing listens there, and nothing is asked of it.
    readers = PartitionReaders(KafkaStream(SourceConfig(KafkaConfig("127.0.0.1:1", "g"), ("t",))))
    with readers.lend(("t", 0)) as first:
        pass
    first.used = float("-inf")
    with readers.lend(("t", 1)):
        assert first.closed
        # A thread that was given it before it was closed finds it free, and is told.
        assert first.lock.acquire(timeout=5)
        first.lock.release()
    with readers.lend(("t", 0)) as second:
        assert second is not first
        # In use, however long.
        second.used = float("-inf")
        with readers.lend(("t", 2)):
            assert not second.closed
