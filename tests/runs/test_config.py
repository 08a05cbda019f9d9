"""Whole runs: the configuration of another system, as its users have it, and the servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.local.broker import KafkaBroker
from tests.conftest import Names
from tests.sink import (
    FUNCTION,
    Ended,
    answer,
    answered,
    assert_caught_up,
    by_partition,
    failed,
    invocations,
    numbered,
    poison,
    run,
    serve,
)


def _write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_connector_s_file_is_a_run(broker: KafkaBroker, names: Names, tmp_path: Path) -> None:
    """Its topics, its batches of 50, its group, its topics of results and errors.

    Its error topic is the one a connector has if nobody names one, and as the connector does not
    halve, the whole batch of the bad record is in it.
    """
    topic, results, name = names.topic(), names.topic("results"), names.topic("sink")
    errors = f"{name}-error"
    for made in (topic, results, errors):
        broker.create_topic(made, partitions=2)
    broker.produce(topic, numbered(2, 120))
    connector = {
        "name": name,
        "config": {
            "connector.class": "io.confluent.connect.aws.lambda.AwsLambdaSinkConnector",
            "tasks.max": "2",
            "topics": topic,
            "key.converter": "org.apache.kafka.connect.storage.StringConverter",
            "value.converter": "org.apache.kafka.connect.storage.StringConverter",
            "aws.lambda.function.name": FUNCTION,
            "aws.lambda.region": "us-east-1",
            "aws.lambda.invocation.type": "sync",
            "aws.lambda.batch.size": "50",
            "aws.access.key.id": "AKIAIOSFODNN7EXAMPLE",
            "aws.secret.access.key": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "behavior.on.error": "log",
            "reporter.bootstrap.servers": broker.bootstrap_servers,
            "reporter.result.topic.name": results,
            "reporter.result.topic.key.format": "json",
            "reporter.error.topic.replication.factor": 1,
            "reporter.result.topic.replication.factor": 1,
            "confluent.license": "",
            "confluent.topic.bootstrap.servers": broker.bootstrap_servers,
            "confluent.topic.replication.factor": "1",
        },
    }
    config = _write(tmp_path / "connector.json", connector)

    with serve(poison("order 1/60")) as server:
        ended = run(broker, server, function=None, config=config)
        sizes = [len(call.offsets) for call in invocations(server)]

    assert max(sizes) == 50
    lost = set(by_partition(failed(broker, errors))[topic, 1])
    assert 60 in lost and len(lost) <= 50
    expected = {(topic, 0): set(range(120)), (topic, 1): set(range(120)) - lost}
    found = by_partition(answered(broker, results))
    assert {key: set(offsets) for key, offsets in found.items()} == expected
    assert_caught_up(broker, f"connect-{name}", topic)
    assert "are not carried over" in ended.stderr and "AKIA" not in ended.stderr


def test_a_mapping_s_file_is_a_run(broker: KafkaBroker, names: Names, tmp_path: Path) -> None:
    """All it needs is in it, the servers too.

    The function gets the mapping's event, of the records that its filters let through, names one
    that failed, and gets that one again, alone and as often as the mapping says; then it is in
    the destination as AWS has it.
    """
    topic, group, errors = names.topic(), names.group(), names.topic("errors")
    for made in (topic, errors):
        broker.create_topic(made, partitions=1)
    values = [json.dumps({"n": n}).encode() for n in range(30)]
    broker.produce(topic, [(0, b"%d" % n, value) for n, value in enumerate(values)])
    mapping = {
        "UUID": "a1b2c3d4-5678-90ab-cdef-11111EXAMPLE",
        "StartingPosition": "TRIM_HORIZON",
        "BatchSize": 20,
        "MaximumBatchingWindowInSeconds": 1,
        "FilterCriteria": {
            "Filters": [{"Pattern": json.dumps({"value": {"n": [{"numeric": [">=", 5]}]}})}]
        },
        "FunctionArn": f"arn:aws:lambda:us-east-1:123456789012:function:{FUNCTION}",
        "LastModified": "2026-11-01T09:30:00+00:00",
        "LastProcessingResult": "OK",
        "State": "Disabled",
        "StateTransitionReason": "USER_INITIATED",
        "DestinationConfig": {"OnFailure": {"Destination": f"kafka://{errors}"}},
        "Topics": [topic],
        "SelfManagedEventSource": {
            "Endpoints": {"KAFKA_BOOTSTRAP_SERVERS": [broker.bootstrap_servers]}
        },
        "MaximumRecordAgeInSeconds": -1,
        "BisectBatchOnFunctionError": False,
        "MaximumRetryAttempts": 2,
        "FunctionResponseTypes": ["ReportBatchItemFailures"],
        "SelfManagedKafkaEventSourceConfig": {"ConsumerGroupId": group},
    }
    config = _write(tmp_path / "mapping.json", mapping)

    def handler(event: Any, context: Any) -> Any:
        offsets = [record["offset"] for record in event["records"][f"{topic}-0"]]
        place = {"partition": f"{topic}-0", "offset": 7}
        return {"batchItemFailures": [{"itemIdentifier": place}] if 7 in offsets else []}

    with serve(handler) as server:
        run(broker, server, function=None, kafka_bootstrap_servers=None, config=config)
        events = [json.loads(call.payload) for call in server.calls if call.payload]
    events = [event for event in events if event]
    offsets = [[record["offset"] for record in event["records"][f"{topic}-0"]] for event in events]
    assert [offset for sent in offsets if sent != [7] for offset in sent] == list(range(5, 30))
    assert max(map(len, offsets)) <= 20
    # Progress starts the count afresh: one call of what remains, and two retries.
    assert offsets.count([7]) == 3
    assert events[0]["eventSource"] == "SelfManagedKafka"
    assert events[0]["bootstrapServers"] == broker.bootstrap_servers
    (written,) = broker.read_all(errors)
    assert written.key == b"7"
    assert json.loads(written.value or b"")["requestContext"]["condition"] == "RetriesExhausted"
    assert_caught_up(broker, group, topic)


def test_the_command_line_wins_over_a_file_of_options(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """YAML of our own, and one option given again."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 10))
    path = tmp_path / "options.yaml"
    path.write_text(
        f"topics: [{topic}]\nconsumer_group: {group}\nfunction: {FUNCTION}\nbatch_size: 3\n"
        f"kafka_bootstrap_servers: {broker.bootstrap_servers}\n"
    )
    with serve(answer) as server:
        options = {"function": None, "kafka_bootstrap_servers": None}
        run(broker, server, **options, config=str(path), batch_size=5)
        assert [len(call.offsets) for call in invocations(server)] == [5, 5]
    assert_caught_up(broker, group, topic)


def test_explaining_asks_nobody(tmp_path: Path) -> None:
    """Neither Kafka nor AWS: the listing is on stdout, and the exit code says if it would run."""
    path = tmp_path / "connector.json"
    config = {"connector.class": "LambdaSink", "topics": "t", "aws.lambda.function.name": "f"}
    _write(path, config)

    def explained(code: int, **options: Any) -> Ended:
        nowhere: Any = type("Nowhere", (), {"bootstrap_servers": "nowhere.invalid:1"})()
        return run(nowhere, None, code, function=None, config=path, explain=True, **options)

    ended = explained(2)
    assert "Refused, see" in ended.stdout
    assert "--consumer_group=connect-lcc-..." in ended.errors[0]
    ended = explained(0, consumer_group="connect-lcc-7")
    assert "success-lcc-7" in ended.stdout and not ended.errors
