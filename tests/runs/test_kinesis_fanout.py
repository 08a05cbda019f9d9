"""Whole runs on streams whose shards send by themselves: enhanced fan-out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import boto3
import pytest
from botocore.exceptions import EventStreamError

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.processes import wait_until
from tests import sink
from tests.kinesis import STREAM, Function, by_key, came_by_key, put, run_on, start_on


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    """Time goes two hundred times as fast for subscriptions."""
    with LocalKinesis(subscription_secs=1.5, again_secs=0.3, idle_secs=0.2) as running:
        running.create_stream(STREAM, 2)
        yield running


def _client(kinesis: LocalKinesis) -> Any:
    return boto3.client(
        "kinesis",
        endpoint_url=kinesis.url,
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )


def test_boto3_understands_our_frames(kinesis: LocalKinesis) -> None:
    """To the end of a subscription, to that of a shard, and where somebody else subscribes."""
    client = _client(kinesis)
    arn = client.register_stream_consumer(
        StreamARN=f"arn:aws:kinesis:us-east-1:000000000000:stream/{STREAM}", ConsumerName="fast"
    )["Consumer"]["ConsumerARN"]
    put(kinesis, 20)

    def subscribe(**start: Any) -> Any:
        return client.subscribe_to_shard(
            ConsumerARN=arn, ShardId="shardId-000000000000", StartingPosition=start
        )["EventStream"]

    events = [each["SubscribeToShardEvent"] for each in subscribe(Type="TRIM_HORIZON")]
    stored = kinesis.records(STREAM, 0)
    records = [record for event in events for record in event["Records"]]
    assert [(r["SequenceNumber"], r["Data"], r["PartitionKey"]) for r in records] == [
        (str(each.number), each.data, each.key) for each in stored
    ]
    assert len(events) > 2 and events[-1]["MillisBehindLatest"] == 0
    assert events[-1]["ContinuationSequenceNumber"] == str(stored[-1].number)
    after = {"Type": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": str(stored[-1].number)}
    with pytest.raises(client.exceptions.ResourceInUseException):
        for _ in range(2):
            held = subscribe(**after)
    held.close()
    children = kinesis.split(STREAM, 0)
    wait_until(lambda: _ends(subscribe, after, children), "the shard does not end", 30)
    kinesis.refuse("SubscribeToShardEvent", "ResourceInUseException")
    with pytest.raises(EventStreamError, match="ResourceInUseException"):
        list(
            client.subscribe_to_shard(
                ConsumerARN=arn,
                ShardId="shardId-000000000001",
                StartingPosition={"Type": "LATEST"},
            )["EventStream"]
        )


def _ends(subscribe: Any, after: dict[str, str], children: tuple[int, int]) -> bool:
    try:
        events = [each["SubscribeToShardEvent"] for each in subscribe(**after)]
    except Exception as error:
        assert "ResourceInUse" in str(error)
        return False
    assert [int(each["ShardId"][8:]) for each in events[-1]["ChildShards"]] == list(children)
    assert "ContinuationSequenceNumber" not in events[-1]
    return True


@pytest.mark.parametrize("by", ["name", "arn"])
def test_a_stream_is_subscribed_to(kinesis: LocalKinesis, by: str) -> None:
    """Over several subscriptions, a reshard and a stop; nothing of it is polled."""
    arn = kinesis.register_consumer(STREAM, "fast")
    options = {"consumer_name": "fast"} if by == "name" else {"consumer_arn": arn}
    function = Function()
    texts = put(kinesis, 200, "first")
    with sink.serve(function) as server:
        with start_on(kinesis, server, until="forever", **options) as run:
            run.until(lambda: len(function.texts()) == 200, "not all of it came")
            run.until(lambda: kinesis.calls["SubscribeToShard"] >= 5, "it is not renewed")
            texts += put(kinesis, 100, "second")
            kinesis.split(STREAM, 0)
            texts += put(kinesis, 100, "third")
            run.until(lambda: len(function.texts()) == 400, "not all of it came")
            run.send(signal.SIGTERM)
            run.wait(0)
        texts += put(kinesis, 50, "fourth")
        ended = run_on(kinesis, server, **options)
    assert sorted(function.texts()) == sorted(texts)
    assert sum(len(data) for _, _, data in function.calls) == 450
    assert came_by_key(function) == by_key(kinesis, 4)
    assert ended.summary["records"] == 50
    assert kinesis.calls["GetRecords"] == 0
    assert "is polled" not in ended.stderr


@pytest.mark.parametrize(
    ("operation", "code", "said"),
    [
        ("", "", "consumer fast is not registered"),
        ("SubscribeToShard", "AccessDeniedException", "AccessDeniedException"),
        ("SubscribeToShard", "ResourceNotFoundException", "ResourceNotFoundException"),
        ("SubscribeToShard", "UnknownOperationException", "UnknownOperationException"),
    ],
)
def test_where_that_fails_it_is_polled(
    kinesis: LocalKinesis, operation: str, code: str, said: str
) -> None:
    """And one line says why."""
    if operation:
        kinesis.register_consumer(STREAM, "fast")
        kinesis.refuse(operation, code, -1)
    texts = put(kinesis, 50)
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, consumer_name="fast")
    assert sorted(function.texts()) == sorted(texts)
    (line,) = [each for each in ended.stderr.splitlines() if "is polled" in each]
    assert said in line


def test_what_can_be_waited_out_is(kinesis: LocalKinesis) -> None:
    """A consumer that is not ready yet, throttles, errors of the service, at the call and in the
    stream: nothing is lost, nothing comes twice, and it is not polled."""
    kinesis.register_consumer(STREAM, "fast")
    texts = put(kinesis, 50)
    function = Function()
    kinesis.refuse("SubscribeToShard", "ResourceInUseException", 1)
    kinesis.refuse("DescribeStreamConsumer", "LimitExceededException", 1)
    options = {"consumer_name": "fast", "until": "forever"}
    with sink.serve(function) as server, start_on(kinesis, server, **options) as run:
        run.until(lambda: len(function.texts()) == 50, "not all of it came")
        for code in ("InternalFailureException", "KMSThrottlingException"):
            kinesis.refuse("SubscribeToShardEvent", code, 1)
            kinesis.refuse("SubscribeToShard", "LimitExceededException", 1)
            texts += put(kinesis, 10, code)
            run.until(partial(function.got, len(texts)), "not all of it came")
        run.send(signal.SIGTERM)
        run.wait(0)
    assert sum(len(data) for _, _, data in function.calls) == len(texts)
    assert kinesis.calls["GetRecords"] == 0


def test_a_key_that_cannot_be_used_ends_the_run(kinesis: LocalKinesis) -> None:
    kinesis.register_consumer(STREAM, "fast")
    kinesis.refuse("SubscribeToShardEvent", "KMSAccessDeniedException", -1)
    with sink.serve(Function()) as server:
        ended = run_on(kinesis, server, code=1, consumer_name="fast")
    (error,) = ended.errors
    assert "--stream=orders cannot be read: KMSAccessDenied" in error


def test_another_reader_with_the_same_consumer(kinesis: LocalKinesis) -> None:
    """Each would take the shard from the other for ever."""
    kinesis.register_consumer(STREAM, "fast")
    kinesis.refuse("SubscribeToShardEvent", "ResourceInUseException", -1)
    texts = put(kinesis, 50)
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, consumer_name="fast")
    assert sorted(function.texts()) == sorted(texts)
    assert "is polled, and not subscribed to: another reader uses the same consumer" in ended.stderr
