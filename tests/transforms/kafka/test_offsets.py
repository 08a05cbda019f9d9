"""Offsets: where to begin with a partition, and what Kafka is asked for it."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException
from hypothesis import given
from hypothesis import strategies as st

from pipeline.local.broker import KafkaBroker
from tests.conftest import Names
from tests.examples import examples
from transforms.errors import KafkaError
from transforms.kafka import offsets as module
from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.kafka.offsets import SourceConfig, SourceOffsets, added_meanwhile, choose_start


@pytest.mark.parametrize(
    ("committed", "low", "high", "wanted", "start", "resolved", "warning"),
    [
        (None, 3, 10, 10, 10, True, None),
        (5, 3, 10, 10, 5, False, None),
        (3, 3, 10, 10, 3, False, None),
        (10, 3, 10, 3, 10, False, None),
        (2, 3, 10, 10, 3, False, "1 offsets after the committed 2 were deleted"),
        # All of a topic made anew is newer than what was committed, whatever the starting position.
        (100, 0, 3, 3, 0, True, "made anew; going on at 0"),
        (100, 2, 3, 3, 2, True, "made anew; going on at 2"),
        (1000, 0, 989, 989, 0, True, "made anew; going on at 0"),
        (1, 0, 0, 0, 0, True, "made anew; going on at 0"),
        # A few lost at the end: an unclean election; the topic is not read all over again.
        (1000, 0, 990, 0, 990, True, "unclean election of a leader; going on at 990"),
        (10**6, 0, 10**6 - 10, 0, 10**6 - 10, True, "unclean election"),
    ],
)
def test_where_a_partition_begins(committed, low, high, wanted, start, resolved, warning) -> None:
    """Where it was left, if that is still there; what is skipped or comes again is warned of."""
    found, said = choose_start(committed, low, high, wanted)
    assert (found.offset, found.resolved) == (start, resolved)
    assert (warning in said) if warning else said is None


@examples(300)
@given(st.none() | st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_no_partition_begins_where_there_is_nothing(committed, low, more, latest) -> None:
    """The offset exists or is the next one, and nothing committed is skipped without a warning."""
    high = low + more
    found, said = choose_start(committed, low, high, high if latest else low)
    assert low <= found.offset <= high
    if committed is not None and found.offset != committed:
        assert said


@pytest.mark.parametrize(
    ("keys", "committed", "any_topic", "added"),
    [
        # The group's first run.
        ([("a", 0), ("a", 1)], [], True, []),
        ([("a", 0), ("a", 1)], [("a", 0)], False, [("a", 1)]),
        # A topic that is named for the first time is no new one.
        ([("a", 0), ("b", 0)], [("a", 0)], False, []),
        ([("a", 0), ("b", 0)], [("a", 0)], True, [("b", 0)]),
    ],
)
def test_partitions_that_were_added_while_no_run_was_up(keys, committed, any_topic, added) -> None:
    """Those of topics the group knows; with a regex, of all topics once it knows one."""
    assert added_meanwhile(keys, committed, any_topic) == set(added)


class _Consumer:
    """Says of one partition that it cannot be asked after."""

    def __init__(self, code: int, times: int) -> None:
        self.code, self.times = code, times

    def committed(self, partitions: list[Any], timeout: float) -> list[Any]:
        self.times -= 1
        error = ErrorCode(self.code) if self.times >= 0 else None
        known = {"topic": "t", "metadata": "", "error": None}
        return [
            SimpleNamespace(partition=0, offset=7, **known),
            SimpleNamespace(partition=1, offset=-1001, **known | {"error": error}),
        ]


def test_a_partition_that_cannot_be_asked_after_is_not_one_without_an_offset(monkeypatch) -> None:
    """It would begin at the starting position. What passes is asked again."""
    monkeypatch.setattr(module, "sleep", lambda secs: None)
    config = SourceConfig(KafkaConfig("broker:9092", "g"), ("t",))
    keys = [("t", 0), ("t", 1)]
    source = SourceOffsets(config, _Consumer(ErrorCode.UNSTABLE_OFFSET_COMMIT, 2))
    assert source.committed(keys) == {("t", 0): (7, "")}
    source = SourceOffsets(config, _Consumer(ErrorCode.GROUP_AUTHORIZATION_FAILED, 1))
    with pytest.raises(KafkaError, match="committed offsets of group g cannot be read"):
        source.committed(keys)


class _Admin:
    """Says of a partition that it has no leader yet, so many times."""

    def __init__(self, code: int, times: float) -> None:
        self.code, self.times = code, times

    def list_offsets(self, asked: dict[Any, Any], **_: Any) -> dict[Any, Future[Any]]:
        self.times -= 1
        answers: dict[Any, Future[Any]] = {each: Future() for each in asked}
        for future in answers.values():
            if self.times >= 0:
                future.set_exception(KafkaException(ErrorCode(self.code)))
            else:
                future.set_result(SimpleNamespace(offset=7))
        return answers

    def poll(self, timeout: float) -> None:
        pass


def test_a_partition_that_gets_a_leader_is_waited_for(monkeypatch) -> None:
    """Its first one, or another: a run that begins then does not end for it."""
    monkeypatch.setattr(module, "sleep", lambda secs: None)
    source = SourceOffsets(SourceConfig(KafkaConfig("broker:9092", "g"), ("t",)), _Consumer(0, 0))
    source._admin = _Admin(ErrorCode.NOT_LEADER_FOR_PARTITION, 2)
    assert source.range(("t", 0)) == (7, 7)
    for code in (ErrorCode.NOT_LEADER_FOR_PARTITION, ErrorCode.TOPIC_AUTHORIZATION_FAILED):
        source._admin = _Admin(code, float("inf"))
        with pytest.raises(KafkaError, match="offsets of t-0 cannot be read"):
            source.ranges([("t", 0)], timeout_secs=0.05)


def test_what_a_broker_says_of_partitions(broker: KafkaBroker, names: Names) -> None:
    """All ranges in one request, one that is not there named, and another id for a new topic."""
    topic = names.topic()
    kafka = KafkaConfig(broker.bootstrap_servers, names.group())
    consumer = make_consumer(kafka)
    source = SourceOffsets(SourceConfig(kafka, (topic,)), consumer)
    try:
        broker.create_topic(topic, partitions=3)
        broker.produce(topic, [(0, None, b"v"), (2, None, b"v"), (2, None, b"v")])
        ranges = {(topic, 0): (0, 1), (topic, 1): (0, 0), (topic, 2): (0, 2)}
        assert source.ranges(ranges) == ranges
        assert source.range((topic, 2)) == (0, 2)
        with pytest.raises(KafkaError, match=f"offsets of {topic}-9 cannot be read"):
            source.ranges([(topic, 0), (topic, 9)])
        before = source.topic_ids([topic, names.topic("none")])
        assert list(before) == [topic]
        assert source.topic_ids([topic]) == before
        broker.delete_topic(topic)
        broker.create_topic(topic, partitions=3)
        assert source.topic_ids([topic])[topic] != before[topic]
    finally:
        consumer.close()


def test_kafka_that_is_away_is_one_line() -> None:
    """Whatever is asked."""
    kafka = KafkaConfig("127.0.0.1:1", "g")
    consumer = make_consumer(kafka)
    source = SourceOffsets(SourceConfig(kafka, ("t",)), consumer)
    try:
        with pytest.raises(KafkaError, match="cannot be read"):
            source.ranges([("t", 0)], timeout_secs=0.2)
        with pytest.raises(KafkaError, match="topic ids cannot be read"):
            source.topic_ids(["t"], timeout_secs=0.2)
    finally:
        consumer.close()
