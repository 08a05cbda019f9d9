"""Delivery of documents about failed batches, to an AWS that nobody here wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import boto3
import pytest
from botocore.exceptions import ConnectionClosedError

from tests import sink
from tests.servers.moto_server import moto_server
from transforms.aws.delivery import DESTINATION, Delivery, DeliveryConfig, object_key
from transforms.errors import WriteError

ACCOUNT = "123456789012"
DOCUMENT = {"requestContext": {"condition": "RetryAttemptsExhausted"}, "version": "1.0"}


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, moto: str) -> None:
    for key, value in sink.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)


def _client(service: str) -> Any:
    return boto3.client(service, region_name="us-east-1")


def test_a_queue_gets_the_document() -> None:
    url = _client("sqs").create_queue(QueueName="alone")["QueueUrl"]
    delivery = Delivery(DeliveryConfig(f"arn:aws:sqs:us-east-1:{ACCOUNT}:alone"))
    delivery.check()
    delivery.deliver(DOCUMENT, b"{}", "orders-0")
    (message,) = _client("sqs").receive_message(QueueUrl=url)["Messages"]
    assert json.loads(message["Body"]) == DOCUMENT


def test_a_topic_gets_the_document() -> None:
    sqs, sns = _client("sqs"), _client("sns")
    url = sqs.create_queue(QueueName="behind")["QueueUrl"]
    topic = sns.create_topic(Name="failed")["TopicArn"]
    queue = f"arn:aws:sqs:us-east-1:{ACCOUNT}:behind"
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue)
    delivery = Delivery(DeliveryConfig(topic))
    delivery.check()
    delivery.deliver(DOCUMENT, b"{}", "orders-0")
    (message,) = sqs.receive_message(QueueUrl=url)["Messages"]
    assert json.loads(json.loads(message["Body"])["Message"]) == DOCUMENT


def test_a_bucket_gets_the_event_too() -> None:
    s3 = _client("s3")
    s3.create_bucket(Bucket="failed-orders")
    delivery = Delivery(DeliveryConfig("arn:aws:s3:::failed-orders", "f/orders/g"))
    delivery.check()
    delivery.deliver(DOCUMENT, b'{"Records":[]}', "shardId-000000000006")
    (listed,) = s3.list_objects_v2(Bucket="failed-orders")["Contents"]
    kept = s3.get_object(Bucket="failed-orders", Key=listed["Key"])["Body"].read()
    assert json.loads(kept) == {**DOCUMENT, "payload": '{"Records":[]}'}
    assert list(json.loads(kept))[-1] == "payload"


def test_the_name_of_an_object() -> None:
    """As AWS's; a pipeline stays the same over its runs."""
    now = datetime(2026, 11, 2, 3, 4, 5, tzinfo=timezone.utc)
    first, second = (object_key("f/orders/g", "shardId-000000000006", now) for _ in range(2))
    uuid = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    form = rf"aws/lambda/({uuid})/shardId-000000000006/2026/11/02/2026-11-02T03\.04\.05-({uuid})"
    matches = [re.fullmatch(form, key) for key in (first, second)]
    assert matches[0] and matches[1]
    assert matches[0][1] == matches[1][1]
    assert matches[0][2] != matches[1][2]


@pytest.mark.parametrize(
    "arn",
    [
        f"arn:aws:sqs:us-east-1:{ACCOUNT}:nowhere",
        f"arn:aws:sns:us-east-1:{ACCOUNT}:nowhere",
        "arn:aws:s3:::nowhere-at-all",
    ],
)
def test_what_is_not_there_takes_nothing(arn: str) -> None:
    """Nobody waits for it."""
    delivery = Delivery(DeliveryConfig(arn), sleep=pytest.fail)
    with pytest.raises(WriteError, match=f"--on_failure_destination={arn} takes nothing: "):
        delivery.check()
    with pytest.raises(WriteError, match="takes nothing"):
        delivery.deliver(DOCUMENT, b"{}", "orders-0")


def test_what_is_away_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    delivery = Delivery(DeliveryConfig(f"arn:aws:sqs:us-east-1:{ACCOUNT}:late"), sleep=waits.append)
    url = _client("sqs").create_queue(QueueName="late")["QueueUrl"]
    send, refused = delivery._client.send_message, iter([True, True, False])

    def send_later(**arguments: Any) -> Any:
        if next(refused):
            raise ConnectionClosedError(endpoint_url="x")
        return send(**arguments)

    monkeypatch.setattr(delivery._client, "send_message", send_later)
    delivery.deliver(DOCUMENT, b"{}", "orders-0")
    assert waits == [0.5, 1.0]
    assert len(_client("sqs").receive_message(QueueUrl=url)["Messages"]) == 1


@pytest.mark.parametrize(
    "arn",
    [
        f"arn:aws:sqs:us-east-1:{ACCOUNT}:q.fifo",
        "arn:aws:s3:::B",
        f"arn:aws:lambda:us-east-1:{ACCOUNT}:function:f",
        "sqs",
    ],
)
def test_other_destinations_are_none(arn: str) -> None:
    assert DESTINATION.fullmatch(arn) is None
