"""Whole runs on a Kinesis and a DynamoDB that nobody here wrote."""

from __future__ import annotations

import shutil
import threading
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.local.lambda_server import LambdaContext
from pipeline.local.processes import free_ports, wait_until
from tests import sink
from tests.servers.moto_server import moto_server
from tests.servers.node_kinesis import NEEDS, PACKAGES, NodeKinesis

STREAM = "orders"


@pytest.fixture(scope="module", params=list(PACKAGES))
def kinesis(request: pytest.FixtureRequest) -> Iterator[NodeKinesis]:
    if missing := [name for name in NEEDS if shutil.which(name) is None]:
        pytest.skip(f"{request.param} needs {', '.join(missing)}")
    with NodeKinesis(request.param, *free_ports(2)) as running:
        yield running


@pytest.fixture(scope="module")
def dynamodb() -> Iterator[str]:
    with moto_server() as url:
        yield url


class Function:
    """Notes the records that it gets, in order; the first call of one fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed = False
        self.came: dict[str, dict[str, None]] = {}

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        with self._lock:
            if not self._failed:
                self._failed = True
                raise ValueError("not yet")
            for each in event["Records"]:
                own = self.came.setdefault(each["kinesis"]["partitionKey"], {})
                own.setdefault(b64decode(each["kinesis"]["data"]).decode())
        return {"batchItemFailures": []}

    @property
    def count(self) -> int:
        with self._lock:
            return sum(map(len, self.came.values()))


def test_reshards_and_a_crash(kinesis: NodeKinesis, dynamodb: str) -> None:
    """In order by partition key over parents and children, and nothing again that was done."""
    arn = kinesis.create_stream(STREAM, 2)
    put: dict[str, list[str]] = {}

    def send(text: str) -> None:
        records = []
        for index in range(120):
            key, data = f"key-{index % 7}", f"{text} {index}"
            put.setdefault(key, []).append(data)
            records.append((key, data.encode()))
        kinesis.put(STREAM, records)

    function = Function()
    with sink.serve(function) as server:
        arguments = [
            # The other one knows no ARN.
            f"--stream={arn if kinesis.name == 'kinesis-mock' else STREAM}",
            f"--lease_table=orders-{kinesis.name}",
            "--lease_secs=3",
            "--stream_poll_secs=0.2",
            f"--kinesis_endpoint_url={kinesis.url}",
            f"--dynamodb_endpoint_url={dynamodb}",
            f"--function={sink.FUNCTION}",
            f"--lambda_endpoint_url={server.url}",
            "--envelope=kinesis_event",
            "--reply=batch_item_failures",
            "--batch_size=25",
            "--max_retries=-1",
            "--summary=json",
        ]
        send("first")
        with sink.Sink(arguments, sink.environment()) as run:
            run.until(lambda: function.count > 0, "nothing came")
            kinesis.split(STREAM, 0)
            send("second")
            kinesis.merge(STREAM, 3, 1)
            send("third")
            run.until(lambda: function.count == 360, "not all of it came", 120)
            run.kill()
        kinesis.split(STREAM, 2)
        send("fourth")
        with sink.Sink([*arguments, "--until=caught_up"], sink.environment()) as run:
            run.wait(0)
            assert function.count == 480
        with sink.Sink([*arguments, "--until=caught_up"], sink.environment()) as run:
            again = run.wait(0)
    assert {key: list(own) for key, own in function.came.items()} == put
    assert again.summary["records"] == 0


def test_fan_out(kinesis: NodeKinesis, dynamodb: str) -> None:
    """Where the server knows it; the other one does not, and is polled."""
    arn = kinesis.create_stream("subscribed", 2)
    knows = kinesis.name == "kinesis-mock"
    if knows:
        names = {"StreamARN": arn, "ConsumerName": "fast"}
        kinesis.client.register_stream_consumer(**names)

        def active() -> bool:
            consumer = kinesis.client.describe_stream_consumer(**names)["ConsumerDescription"]
            return bool(consumer["ConsumerStatus"] == "ACTIVE")

        wait_until(active, "the consumer is not active", 30)
    texts = [f"record {index}" for index in range(100)]
    kinesis.put("subscribed", [(f"key-{i % 7}", text.encode()) for i, text in enumerate(texts)])
    function = Function()
    with sink.serve(function) as server:
        arguments = [
            f"--stream={'subscribed' if kinesis.name == 'kinesalite' else arn}",
            "--consumer_name=fast",
            f"--lease_table=subscribed-{kinesis.name}",
            "--lease_secs=3",
            "--stream_poll_secs=0.2",
            f"--kinesis_endpoint_url={kinesis.url}",
            f"--dynamodb_endpoint_url={dynamodb}",
            f"--function={sink.FUNCTION}",
            f"--lambda_endpoint_url={server.url}",
            "--envelope=kinesis_event",
            "--max_retries=-1",
            "--until=caught_up",
        ]
        with sink.Sink(arguments, sink.environment()) as run:
            ended = run.wait(0)
    expected: dict[str, list[str]] = {}
    for index, text in enumerate(texts):
        expected.setdefault(f"key-{index % 7}", []).append(text)
    assert {key: list(own) for key, own in function.came.items()} == expected
    assert ("is polled, and not subscribed to" in ended.stderr) != knows
