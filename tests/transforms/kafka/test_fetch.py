"""Records are read again, on a real broker."""

from __future__ import annotations

from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from tests.conftest import Names
from tests.sink import numbered
from transforms.kafka.client import KafkaConfig
from transforms.kafka.fetch import fetch_again


def test_records_are_read_again(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, 2)
    broker.produce(topic, numbered(2, 20))
    kafka = KafkaConfig(broker.bootstrap_servers, names.group())
    # Of the end, the beginning and between, again and again, with one consumer.
    for offsets in ([19], [7], [7], [0, 3, 18]):
        records = fetch_again(kafka, (topic, 1), offsets)
        assert records is not None
        assert list(records.offsets) == offsets
        assert list(records.values) == [b"order 1/%d" % offset for offset in offsets]


def test_what_is_not_there_any_more_is_not_waited_for(broker: KafkaBroker, names: Names) -> None:
    topic = names.topic()
    broker.create_topic(topic, 1)
    broker.produce(topic, numbered(1, 20))
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    place = TopicPartition(topic, 0, 5)
    admin.delete_records([place])[place].result()
    kafka = KafkaConfig(broker.bootstrap_servers, names.group())
    assert fetch_again(kafka, (topic, 0), [4]) is None
    records = fetch_again(kafka, (topic, 0), [5])
    assert records is not None
