"""Whole runs: error records as an event source mapping writes them, and where it sends them."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaContext
from tests import sink
from tests.conftest import Names
from tests.servers.moto_server import moto_server
from tests.sink import (
    FUNCTION,
    assert_caught_up,
    assert_exactly_once,
    coordinates,
    facts,
    failed,
    records_of,
    run,
    serve,
)


def test_each_failed_record_is_written_with_its_key(broker: KafkaBroker, names: Names) -> None:
    """Keys go where Java's producers put them, records without one take turns; none is lost."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=2)
    broker.create_topic(errors, partitions=3)
    keys = [b"foo", b"bar", b"foo", None, b"bar", None, None, b"foo"]
    records = [NewRecord(p, key, b"bad %d" % n) for p in range(2) for n, key in enumerate(keys)]
    broker.produce(topic, records)

    def handler(event: Any, context: LambdaContext) -> None:
        if any(base64.b64decode(r["value"]).startswith(b"bad") for r in records_of(event)):
            raise ValueError("cannot process this order")

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope="kafka_event",
            on_error="log",
            error_topic=errors,
            error_record="aws",
            max_retries=1,
        )
    sources = {coordinates(record): record for record in broker.read_all(topic)}
    assert len(failed(broker, errors)) == len(sources) == 16
    assert_exactly_once(broker, names.group(), [topic], errors=errors)
    assert_caught_up(broker, names.group(), topic)

    homes: dict[bytes | None, list[int]] = {}
    seen: dict[tuple[bytes | None, int], list[int]] = {}
    for written in broker.read_all(errors):
        value = json.loads(written.value or b"")
        (event_records,) = value["payload"]["records"].values()
        (record,) = event_records
        source = sources[record["topic"], record["partition"], record["offset"]]
        assert written.key == source.key
        assert base64.b64decode(record["value"]) == source.value
        assert value["payload"]["eventSource"] == "SelfManagedKafka"
        assert value["KafkaBatchInfo"]["recordInfo"]["offset"] == str(source.offset)
        assert value["KafkaBatchInfo"]["bootstrapServers"] == broker.bootstrap_servers
        assert value["requestContext"]["condition"] == "RetriesExhausted"
        assert value["requestContext"]["functionArn"] == FUNCTION
        assert value["requestContext"]["approximateInvokeCount"] == 2
        assert value["requestContext"]["requestId"]
        assert value["responseContext"]["statusCode"] == 200
        assert facts(written)["lambda.error.message"] == "cannot process this order"
        homes.setdefault(written.key, []).append(written.partition)
        seen.setdefault((written.key, source.partition), []).append(source.offset)
    # murmur2 of the key, without its sign, modulo the partitions.
    assert set(homes[b"foo"]) == {_java_partition(b"foo", 3)}
    assert set(homes[b"bar"]) == {_java_partition(b"bar", 3)}
    assert sorted(homes[None]) == [0, 0, 1, 1, 2, 2]
    for (key, _), offsets in seen.items():
        assert key is None or offsets == sorted(offsets)


def _fails(event: Any, context: LambdaContext) -> None:
    """In each batch that has a bad record, of a topic or of a stream."""
    if "Records" in event:
        data = [each["kinesis"]["data"] for each in event["Records"]]
    else:
        data = [each["value"] for each in records_of(event)]
    if any(base64.b64decode(each).startswith(b"bad") for each in data):
        raise ValueError("cannot process this order")


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    with moto_server() as url:
        yield url


def _client(service: str, url: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )


@pytest.mark.parametrize("service", ["sqs", "s3"])
def test_a_failed_batch_of_a_topic_is_told(
    broker: KafkaBroker, names: Names, aws: str, service: str
) -> None:
    """One document for it. While that cannot be delivered, nothing of it is committed."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=1)
    values = [b"bad" if n == 5 else b"order %d" % n for n in range(10)]
    broker.produce(topic, [NewRecord(0, b"k", value) for value in values])
    stored = broker.read_all(topic)
    place = "sqs:us-east-1:123456789012:failed" if service == "sqs" else "s3:::failed"
    options = {
        "topics": topic,
        "consumer_group": group,
        "envelope": "kafka_event",
        "batch_size": 4,
        "max_retries": 1,
        "on_error": "log",
        "on_failure_destination": f"arn:aws:{place}",
        "preflight": "false",
        "env": sink.environment(**{f"AWS_ENDPOINT_URL_{service.upper()}": aws}),
    }
    client = _client(service, aws)
    with serve(_fails) as server:
        (error,) = run(broker, server, 1, **options).errors
        assert f"--on_failure_destination=arn:aws:{place}" in error
        assert broker.committed(group, topic).get(0, 0) <= 4
        if service == "sqs":
            url = client.create_queue(QueueName="failed")["QueueUrl"]
        else:
            client.create_bucket(Bucket="failed")
        run(broker, server, **options)
    assert_caught_up(broker, group, topic)
    if service == "sqs":
        (message,) = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
        document = json.loads(message["Body"])
    else:
        (found,) = client.list_objects_v2(Bucket="failed")["Contents"]
        hexes, day = "[0-9a-f-]{36}", r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\d"
        form = rf"aws/lambda/{hexes}/{re.escape(topic)}-0/\d{{4}}/\d\d/\d\d/{day}-{hexes}"
        assert re.fullmatch(form, found["Key"])
        document = json.loads(client.get_object(Bucket="failed", Key=found["Key"])["Body"].read())
        assert list(document)[-1] == "payload"
        event = json.loads(document.pop("payload"))
        assert [base64.b64decode(r["value"]) for r in records_of(event)] == values[4:8]
    assert list(document) == [
        "requestContext",
        "responseContext",
        "version",
        "timestamp",
        "KafkaBatchInfo",
    ]
    context = document["requestContext"]
    assert context.pop("requestId")
    assert context == {
        "functionArn": FUNCTION,
        "condition": "RetryAttemptsExhausted",
        "approximateInvokeCount": 2,
    }
    assert document["responseContext"]["functionError"] == "Unhandled"
    info = document["KafkaBatchInfo"]
    (of_partition,) = info.pop("recordsInfo").items()
    assert of_partition[0] == f"{topic}-0"
    assert (of_partition[1]["firstRecordOffset"], of_partition[1]["lastRecordOffset"]) == ("4", "7")
    assert of_partition[1]["firstRecordTimestamp"] == _iso(stored[4].timestamp)
    assert list(info) == ["batchSize", "bootstrapServers", "payloadSize"]
    assert (info["batchSize"], info["bootstrapServers"]) == (4, broker.bootstrap_servers)


def _iso(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms // 1000)) + f".{ms % 1000:03}Z"


def test_a_destination_may_be_a_topic(broker: KafkaBroker, names: Names) -> None:
    """Then each failed record is in it, as it is with --error_record=aws."""
    topic, errors, group = names.topic(), names.topic("errors"), names.group()
    broker.create_topic(topic, partitions=1)
    broker.create_topic(errors, partitions=1)
    broker.produce(topic, [NewRecord(0, b"k%d" % n, b"bad %d" % n) for n in range(3)])
    with serve(_fails) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=group,
            envelope="kafka_event",
            on_error="log",
            on_failure_destination=f"kafka://{errors}",
        )
    assert_caught_up(broker, group, topic)
    assert_exactly_once(broker, group, [topic], errors=errors)
    found = broker.read_all(errors)
    assert [each.key for each in found] == [b"k0", b"k1", b"k2"]
    value = json.loads(found[1].value or b"")
    assert value["requestContext"]["condition"] == "RetriesExhausted"
    assert value["KafkaBatchInfo"]["recordInfo"]["offset"] == "1"
    (record,) = records_of(value["payload"])
    assert base64.b64decode(record["value"]) == b"bad 1"


def test_a_destination_of_a_stream_may_be_a_topic(broker: KafkaBroker, names: Names) -> None:
    """With the partition key as its key, and the numbers as texts."""
    errors = names.topic("errors")
    broker.create_topic(errors, partitions=1)
    with LocalKinesis() as kinesis, serve(_fails) as server:
        arn = kinesis.create_stream("orders", 1)
        kinesis.put("orders", [(f"k{n}", b"bad %d" % n) for n in range(3)])
        stored = kinesis.records("orders", 0)
        run(
            broker,
            server,
            stream="orders",
            lease_table="orders-to-lambda",
            stream_poll_secs=0.2,
            kinesis_endpoint_url=kinesis.url,
            dynamodb_endpoint_url=kinesis.url,
            envelope="kinesis_event",
            on_error="log",
            on_failure_destination=f"kafka://{errors}",
        )
        row = kinesis.tables["orders-to-lambda"]["shardId-000000000000"]
        assert row["checkpoint"] == {"S": str(stored[-1].number)}
    found = broker.read_all(errors)
    assert [each.key for each in found] == [b"k0", b"k1", b"k2"]
    for written, record in zip(found, stored):
        value = json.loads(written.value or b"")
        info = value["KinesisBatchInfo"]
        assert info["startSequenceNumber"] == info["endSequenceNumber"] == str(record.number)
        assert (info["shardId"], info["batchSize"]) == ("shardId-000000000000", 1)
        assert info["streamArn"] == arn
        assert value["requestContext"]["condition"] == "RetriesExhausted"
        (event,) = value["payload"]["Records"]
        assert base64.b64decode(event["kinesis"]["data"]) == record.data


def _java_partition(key: bytes, partitions: int) -> int:
    """As `org.apache.kafka.common.utils.Utils.murmur2` has it."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := key[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return ((h ^ h >> 15) & 0x7FFFFFFF) % partitions
