"""The test broker does what the other tests take for granted."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from pipeline.local.broker import KafkaBroker, NewRecord, StoredRecord
from pipeline.local.processes import ServerError, wait_until
from tests import ROOT
from tests.conftest import Names


def test_reads_back_what_was_written(broker: KafkaBroker, names: Names) -> None:
    """Null and empty keys and values, headers in order, and timestamps survive."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    written = [
        NewRecord(0, b"key", b"value", [("a", b"1"), ("b", None), ("a", b"")], 1_000),
        NewRecord(0, None, None, (), 2_000),
        NewRecord(1, b"", b"", (), 1_700_000_000_000),
    ]

    assert broker.produce(topic, written) == 3

    assert broker.read_all(topic) == [
        StoredRecord(topic, 0, 0, 1_000, b"key", b"value", (("a", b"1"), ("b", None), ("a", b""))),
        StoredRecord(topic, 0, 1, 2_000, None, None, ()),
        StoredRecord(topic, 1, 0, 1_700_000_000_000, b"", b"", ()),
    ]


def test_plain_tuples_are_records_and_an_unknown_topic_gets_four_partitions(
    broker: KafkaBroker, names: Names
) -> None:
    topic = names.topic()

    broker.produce(topic, [(3, b"key", b"value")])

    assert broker.end_offsets(topic) == {0: 0, 1: 0, 2: 0, 3: 1}
    assert broker.read_all(topic)[0].value == b"value"


def test_offsets_of_a_partition_that_gets_its_leader_are_asked_again(
    broker: KafkaBroker, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is busy lists a new partition a moment before it leads it."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    client = broker._client()

    class Busy:
        times = 2

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def list_offsets(self, asked: dict[Any, Any], **rest: Any) -> dict[Any, Any]:
            answers = dict(client.list_offsets(asked, **rest))
            self.times -= 1
            if self.times >= 0:
                for at in answers:
                    answers[at] = Future()
                    answers[at].set_exception(
                        KafkaException(KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION))
                    )
            return answers

    monkeypatch.setattr(broker, "_admin", Busy())
    assert broker.end_offsets(topic) == {0: 0}


def test_reads_an_empty_topic(broker: KafkaBroker, names: Names) -> None:
    broker.create_topic(names.topic())
    assert broker.read_all(names.topic()) == []


def test_order_within_a_partition_is_kept(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, ((i % 3, None, b"%d" % i) for i in range(30_000)))

    records = broker.read_all(topic)

    for partition in range(3):
        values = [int(r.value or b"") for r in records if r.partition == partition]
        assert values == list(range(partition, 30_000, 3))


def test_partitions_are_added_and_topics_deleted(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, partitions=1)

    broker.add_partitions(topic, 3)
    assert broker.partitions(topic) == [0, 1, 2]

    broker.delete_topic(topic)
    assert broker.partitions(topic) == []
    with pytest.raises(ServerError, match="there is no topic"):
        broker.read_all(topic)


def test_a_record_the_topic_does_not_take_is_an_error(broker: KafkaBroker, names: Names) -> None:
    broker.create_topic(names.topic(), max_message_bytes=1_000)
    with pytest.raises(KafkaException, match="MSG_SIZE_TOO_LARGE"):
        broker.produce(names.topic(), [NewRecord(value=b"x" * 2_000)])


def test_committed_offsets(broker: KafkaBroker, names: Names) -> None:
    """Only the partitions a group committed are there."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=2)
    assert broker.committed(group, topic) == {}

    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": group})
    consumer.commit(offsets=[TopicPartition(topic, 1, 7)], asynchronous=False)
    consumer.close()

    assert broker.committed(group, topic) == {1: 7}


def test_aborted_records_are_not_read_but_take_offsets(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, [NewRecord(value=b"aborted")] * 3, transaction="abort")
    broker.produce(topic, [NewRecord(value=b"committed")], transaction="commit")

    records = broker.read_all(topic)

    # Three records and the marker that aborts them come before; another marker follows.
    assert [(record.offset, record.value) for record in records] == [(4, b"committed")]
    assert broker.end_offsets(topic) == {0: 6}


def test_a_topic_that_ends_in_aborted_records_is_read(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, [NewRecord(value=b"aborted")] * 3, transaction="abort")
    assert broker.read_all(topic) == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_data_and_offsets_survive_a_restart(end: str, broker: KafkaBroker, names: Names) -> None:
    """After an orderly stop and after a crash, on the same address."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, [NewRecord(0, None, b"before")])
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": group})
    consumer.commit(offsets=[TopicPartition(topic, 0, 1)], asynchronous=False)
    consumer.close()
    address, pid = broker.bootstrap_servers, broker.pid

    getattr(broker, end)()
    assert broker.pid is None
    with pytest.raises(ServerError, match="is not up"):
        broker.end_offsets(topic)
    broker.start()

    assert broker.bootstrap_servers == address
    assert broker.pid != pid
    broker.produce(topic, [NewRecord(0, None, b"after")])
    assert [record.value for record in broker.read_all(topic)] == [b"before", b"after"]
    assert broker.committed(group, topic) == {0: 1}


@pytest.mark.slow
def test_compaction_leaves_gaps(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(
        topic,
        partitions=1,
        cleanup_policy="compact",
        segment_ms=1_000,
        min_cleanable_dirty_ratio=0.01,
    )
    start = 1_700_000_000_000
    broker.produce(topic, [(0, b"k%d" % (i % 2), b"%d" % i, (), start) for i in range(10)])
    broker.produce(topic, [(0, b"end", b"end", (), start + 10_000)])

    left = broker.compact_wait(topic, fewer_than=11)

    assert [(record.offset, record.value) for record in left] == [
        (8, b"8"),
        (9, b"9"),
        (10, b"end"),
    ]
    assert broker.end_offsets(topic) == {0: 11}


def test_a_broker_that_does_not_start_shows_its_log(broker: KafkaBroker) -> None:
    """The reason is in the message, and nothing is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        controller = f"127.0.0.1:{free.getsockname()[1]}"
    second = KafkaBroker(
        {
            "listeners": f"BROKER://{broker.bootstrap_servers},CONTROLLER://{controller}",
            "controller.quorum.voters": f"1@{controller}",
        }
    )
    with pytest.raises(ServerError, match=r"exit code 1(.|\n)*Address already in use"), second:
        pass
    assert second.pid is None


@pytest.mark.slow
@pytest.mark.broker
def test_the_broker_ends_with_the_process_that_started_it() -> None:
    """Also when that is killed: no Java process outlives a test run."""
    code = (
        "import os, signal\n"
        "from pipeline.local.broker import KafkaBroker\n"
        "broker = KafkaBroker()\n"
        "broker.start()\n"
        "print(broker.bootstrap_servers, broker.log_path.parent, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    address, folder = done.stdout.split()
    host, port = address.split(":")

    def gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) != 0 and not Path(folder).exists()

    wait_until(gone, f"the broker on {address} is still there")
