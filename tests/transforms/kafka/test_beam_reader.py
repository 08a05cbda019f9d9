"""What the reader that is Java says of partitions' beginnings, on a real broker."""

from __future__ import annotations

import pytest

from pipeline.local.broker import KafkaBroker
from tests import sink
from tests.conftest import Names
from transforms.errors import KafkaError
from transforms.kafka.beam_reader import BeamReadConfig, _BeginFn
from transforms.kafka.client import KafkaConfig
from transforms.records import EVERY_LANE, Progress


def test_partitions_begin_where_the_group_is_when_the_job_begins(
    broker: KafkaBroker, names: Names
) -> None:
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 3)
    broker.produce(topic, list(sink.numbered(3, 100)))
    kafka = KafkaConfig(broker.bootstrap_servers, group)
    # As it was when the job was submitted; since then it has come further with one of them.
    starts = (((topic, 0), 10), ((topic, 1), 10), ((topic, 2), 0))
    sink.commit(broker, group, topic, {0: 10, 1: 70})
    begun = _BeginFn(BeamReadConfig(kafka, (topic,), starts=starts)).process(b"")
    assert list(begun) == [
        Progress(topic, number, offset, offset, EVERY_LANE)
        for number, offset in enumerate([10, 70, 0])
    ]


def test_a_group_that_cannot_be_asked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.kafka.beam_reader._ASK_SECS", 0.5)
    config = BeamReadConfig(KafkaConfig("127.0.0.1:1", "g"), ("t",), starts=((("t", 0), 0),))
    with pytest.raises(KafkaError, match=r"127\.0\.0\.1:1.*"):
        list(_BeginFn(config).process(b""))
