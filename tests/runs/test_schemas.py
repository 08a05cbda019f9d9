"""Whole runs: records with schemas, on a real registry that may go away."""

from __future__ import annotations

import base64
import http.server
import io
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
from aws_lambda_powertools.utilities.kafka import (
    ConsumerRecords,
    SchemaConfig,
    kafka_consumer,
)
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf.message_factory import GetMessageClass

from pipeline.local.broker import KafkaBroker, NewRecord, StoredRecord
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.servers.registry_door import RegistryDoor
from tests.servers.schema_registry import SchemaRegistryServer
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import Authority
from tests.sink import (
    answer,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    facts,
    failed,
    invocations,
    originals,
    run,
    serve,
    start,
)
from transforms.schemas.protobuf import _load
from transforms.schemas.schema import PROTOBUF, SchemaText

AVRO_ORDER = json.dumps(
    {
        "type": "record",
        "name": "Order",
        "namespace": "shop",
        "fields": [
            {"name": "id", "type": "long"},
            {"name": "rate", "type": "float"},
            {"name": "note", "type": ["null", "string"], "default": None},
            {"name": "payment", "type": ["string", "long"]},
            {"name": "token", "type": "bytes"},
        ],
    }
)
PROTO_ORDER = """
syntax = "proto3";
package shop;
import "google/protobuf/timestamp.proto";
message Line { string name = 1; }
message Order { int64 id = 1; google.protobuf.Timestamp at = 2; repeated Line lines = 3; }
"""
JSON_ORDER = '{"type":"object","required":["id"],"properties":{"id":{"type":"integer"}}}'


def _of(id: int, data: bytes) -> bytes:
    return b"\x00" + id.to_bytes(4, "big") + data


def _avro(id: int, schema: str, value: Any) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(json.loads(schema)), value)
    return _of(id, stream.getvalue())


def _value_of(topic: str) -> SerializationContext:
    return SerializationContext(topic, MessageField.VALUE)


def _values(server: Any) -> list[Any]:
    return [entry["value"] for call in invocations(server) for entry in call.entries]


def _reasons(broker: KafkaBroker, topic: str) -> list[tuple[int, str]]:
    """Of each error record its first offset and its condition."""
    records = broker.read_all(topic)
    return sorted((originals(r)[0]["offset"], facts(r)["lambda.condition"]) for r in records)


def test_records_of_each_format(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """In one topic, as Confluent's own serializers write them; a tombstone stays null."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    order = {"id": 1, "rate": 0.1, "note": None, "payment": 5, "token": b"\xff"}
    avro = AvroSerializer(registry.client, AVRO_ORDER)(order, _value_of(topic))

    # One of Python's, which registers a descriptor, and one of Java's, which registers the text.
    pool, _, _ = _load(SchemaText(PROTOBUF, PROTO_ORDER))
    message = GetMessageClass(pool.FindMessageTypeByName("shop.Order"))(id=2)
    message.at.FromMilliseconds(1_793_000_000_000)
    message.lines.add(name="tea")
    serialize = ProtobufSerializer(type(message), registry.client, {"use.deprecated.format": False})
    python = serialize(message, _value_of(names.topic("proto")))
    text_id = registry.register(names.topic("text") + "-value", PROTO_ORDER, "PROTOBUF")
    java = _of(text_id, b"\x02\x02" + message.SerializeToString())

    json_id = registry.register(names.topic("json") + "-value", JSON_ORDER, "JSON")
    text = b'{"id": 3, "more": 12.50}'
    values = [avro, python, java, _of(json_id, text), None]
    broker.produce(topic, [NewRecord(0, b"k", value) for value in values])

    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
        )
        sent = _values(server)
    proto = {"id": 2, "at": 1_793_000_000_000, "lines": [{"name": "tea"}]}
    assert sent == [
        {**order, "payment": {"string": None, "long": 5}, "token": "/w=="},
        proto,
        proto,
        json.loads(text),
        None,
    ]
    assert_caught_up(broker, names.group(), topic)


def test_keys_and_schemas_that_import_others(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """Keys are decoded where they are said to have a schema; values then are not."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    inner = '{"type":"record","name":"Id","namespace":"shop","fields":[{"name":"n","type":"long"}]}'
    outer = '{"type":"record","name":"Key","fields":[{"name":"id","type":"shop.Id"}]}'
    registry.register(names.topic("id"), inner)
    id = registry.register(f"{topic}-key", outer, references=[("shop.Id", names.topic("id"))])
    broker.produce(topic, [NewRecord(0, _of(id, b"\x0e"), b'{"plain": true}')])
    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            schema_validation="KEY",
        )
        ((entry,),) = [call.entries for call in invocations(server)]
    assert (entry["key"], entry["value"]) == ({"id": {"n": 7}}, {"plain": True})


def test_records_that_cannot_be_read(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """Each costs only itself: an error record with the reason and its bytes, never a call."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    for name in (topic, responses, errors):
        broker.create_topic(name, partitions=2)
    id = registry.register(f"{topic}-value", AVRO_ORDER)
    broken = registry.register(names.topic("other"), '"string"')
    bad = {
        3: (b'{"id": 1}', "DESERIALIZATION_ERROR"),
        10: (b"", "DESERIALIZATION_ERROR"),
        11: (_of(2_000_000_000, b"x"), "SCHEMA_NOT_FOUND"),
        12: (_of(4_000_000_000, b"x"), "SCHEMA_NOT_FOUND"),
        40: (_of(id, b"\x02"), "DESERIALIZATION_ERROR"),
        41: (_of(broken, b"\x08ab"), "DESERIALIZATION_ERROR"),
        99: (b"\x00\x00", "DESERIALIZATION_ERROR"),
    }
    order = {"rate": 1.5, "note": "a", "payment": "b", "token": b""}
    values = [
        bad[n][0] if n in bad else _avro(id, AVRO_ORDER, {"id": n, **order}) for n in range(100)
    ]
    broker.produce(topic, [NewRecord(p, b"k", value) for p in range(2) for value in values])
    with serve() as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            response_topic=responses,
            on_error="log",
            error_topic=errors,
            batch_size=20,
        )
        ids = sorted(value["id"] for value in _values(server))
    assert ids == sorted(n for _ in range(2) for n in range(100) if n not in bad)
    expected = sorted((n, why) for _ in range(2) for n, (_, why) in bad.items())
    assert _reasons(broker, errors) == expected
    for record in broker.read_all(errors):
        (original,) = originals(record)
        assert original["value"] == bad[original["offset"]][0]
        assert facts(record)["lambda.error.message"].startswith("the record's value")
        assert facts(record)["lambda.attempts"] == "0"
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert ended.summary["errors"] == 2 * len(bad)


def test_a_record_that_cannot_be_read_halts_its_partition(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """With --on_error=fail, as any record that is given up."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    id = registry.register(f"{topic}-value", '"long"')
    good = _of(id, b"\x02")
    broker.produce(topic, [NewRecord(0, None, value) for value in (good, good, b"bad", good)])
    broker.produce(topic, [NewRecord(1, None, good)] * 4)
    with serve() as server:
        ended = run(
            broker,
            server,
            code=3,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
        )
    assert f"{topic}-0" in ended.stderr and "DESERIALIZATION_ERROR" in ended.stderr
    assert broker.committed(names.group(), topic) == {0: 2, 1: 4}


# -- AWS's events -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JSON", "SOURCE"])
def test_the_event_of_a_mapping(
    format: str, broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """Base64 of JSON, or of the bytes behind the schema's id; the schema is named beside it."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    id = registry.register(f"{topic}-value", AVRO_ORDER)
    order = {"id": 1, "rate": 0.5, "note": None, "payment": 5, "token": b"\xff"}
    broker.produce(topic, [NewRecord(0, b"k", _avro(id, AVRO_ORDER, order)), (0, b"l", None)])
    events: list[Any] = []
    with serve(lambda event, context: events.append(event)) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            envelope="kafka_event",
            event_record_format=format,
        )
    first, second = events[0]["records"][f"{topic}-0"]
    assert first["valueSchemaMetadata"] == {"dataFormat": "AVRO", "schemaId": str(id)}
    assert first["key"] == "aw==" and "keySchemaMetadata" not in first
    assert "value" not in second and "valueSchemaMetadata" not in second
    data = base64.b64decode(first["value"])
    if format == "JSON":
        assert json.loads(data) == {**order, "token": "/w=="}
    else:
        schema = fastavro.parse_schema(json.loads(AVRO_ORDER))
        assert fastavro.schemaless_reader(io.BytesIO(data), schema, None) == order


def test_powertools_reads_the_source_format(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """AWS's own library for it, which expects the place of the message in front of it."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    pool, _, _ = _load(SchemaText(PROTOBUF, PROTO_ORDER))
    line = GetMessageClass(pool.FindMessageTypeByName("shop.Line"))
    id = registry.register(f"{topic}-value", PROTO_ORDER, "PROTOBUF")
    broker.produce(topic, [(0, None, _of(id, b"\x00" + line(name="tea").SerializeToString()))])
    seen: list[Any] = []

    @kafka_consumer(schema_config=SchemaConfig(value_schema_type="PROTOBUF", value_schema=line))
    def handler(event: ConsumerRecords, context: LambdaContext) -> None:
        seen.extend(record.value for record in event.records)

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            envelope="kafka_event",
            event_record_format="SOURCE",
        )
    assert seen == [{"name": "tea"}]


def test_filters_see_what_was_decoded(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names, tmp_path: Path
) -> None:
    """Whatever form the function gets; what cannot be read is no matter for a filter."""
    topic, errors = names.topic(), names.topic("errors")
    for name in (topic, errors):
        broker.create_topic(name, partitions=1)
    id = registry.register(f"{topic}-value", AVRO_ORDER)
    order = {"rate": 0.5, "note": None, "payment": "b", "token": b""}
    orders = [_avro(id, AVRO_ORDER, {"id": n, **order}) for n in range(10)]
    broker.produce(topic, [(0, None, value) for value in (*orders, b"bad")])
    criteria = tmp_path / "filters.json"
    pattern = json.dumps({"value": {"id": [{"numeric": [">=", 7]}], "payment": ["b"]}})
    criteria.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
    events: list[Any] = []
    with serve(lambda event, context: events.append(event)) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            envelope="kafka_event",
            event_record_format="SOURCE",
            filter_criteria=criteria,
            on_error="log",
            error_topic=errors,
        )
    sent = [base64.b64decode(record["value"]) for record in events[0]["records"][f"{topic}-0"]]
    assert sent == [order[5:] for order in orders[7:]]
    assert _reasons(broker, errors) == [(10, "DESERIALIZATION_ERROR")]
    assert ended.summary["filtered"] == 7
    assert_caught_up(broker, names.group(), topic)


# -- a registry that goes away ------------------------------------------------------------


@pytest.fixture
def restarted(registry: SchemaRegistryServer) -> Iterator[SchemaRegistryServer]:
    """The registry, which runs again when the test is over."""
    yield registry
    if not registry.is_running:
        registry.start()


@pytest.mark.slow
def test_the_registry_stops_and_starts_again(
    broker: KafkaBroker, restarted: SchemaRegistryServer, names: Names
) -> None:
    """Nothing is lost, nothing becomes an error record, and what is known goes on meanwhile."""
    registry = restarted
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    for name in (topic, responses, errors):
        broker.create_topic(name, partitions=2)
    old = registry.register(f"{topic}-value", '"long"')
    new = registry.register(names.topic("new"), '{"type":"array","items":"long"}')

    def produce(value: bytes, count: int) -> None:
        broker.produce(topic, [(n % 2, None, value) for n in range(count)])

    def done() -> int:
        return sum(broker.committed(names.group(), topic).values())

    with serve() as server:
        options = {
            "topics": topic,
            "consumer_group": names.group(),
            "schema_registry_url": registry.url,
            "response_topic": responses,
            "on_error": "log",
            "error_topic": errors,
            "until": "forever",
        }
        produce(_of(old, b"\x02"), 40)
        with start(broker, server, **options) as sink:
            sink.until(lambda: done() == 40, "the first 40 are not done", 120)
            registry.kill()
            produce(_of(old, b"\x02"), 20)
            sink.until(lambda: done() == 60, "what has a known schema is not done", 120)
            produce(_of(new, b"\x02\x02\x00"), 30)
            sink.until(lambda: "waiting for it" in sink.stderr, "it does not say so", 120)
            assert done() == 60
            sink.send(signal.SIGTERM)
            ended = sink.wait(0)
            assert "before the run was told to stop" in ended.stderr
            assert ended.summary["committed"] == {f"{topic}-0": 30, f"{topic}-1": 30}
        with start(broker, server, preflight="false", **options) as sink:
            sink.until(lambda: "waiting for it" in sink.stderr, "it does not say so", 120)
            registry.start()
            sink.until(lambda: done() == 90, "the rest is not done", 120)
            assert "it answers again" in sink.stderr
            sink.send(signal.SIGTERM)
            sink.wait(0)
        assert_in_order(invocations(server))
    assert failed(broker, errors) == []
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)


def test_a_registry_that_is_not_there(broker: KafkaBroker, names: Names) -> None:
    """One line before anything is read."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    url = "http://127.0.0.1:9"
    with serve() as server:
        ended = run(
            broker,
            server,
            code=1,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=url,
        )
    (line,) = ended.errors
    assert line.startswith(f"error: --schema_registry_url={url} does not give a look-up: ")
    assert "Connection refused" in line


def test_a_registry_that_refuses(broker: KafkaBroker, names: Names) -> None:
    """In the middle of a run: it ends with one line, and nothing is committed."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error_code": 401, "message": "Unauthorized"}')

        def log_message(self, *arguments: Any) -> None:
            pass

    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, [(0, None, _of(7, b"secret"))])
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as refusing, serve() as server:
        thread = threading.Thread(target=refusing.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{refusing.server_port}"
        ended = run(
            broker,
            server,
            code=1,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=url,
            preflight="false",
        )
        refusing.shutdown()
    (line,) = ended.errors
    assert line.startswith(
        f"error: --schema_registry_url={url} does not give schema 7: Unauthorized (HTTP 401)"
    )
    assert broker.committed(names.group(), topic) in ({}, {0: 0})


# -- Avro that is written -----------------------------------------------------------------


def test_responses_and_errors_as_avro(
    broker: KafkaBroker, registry: SchemaRegistryServer, names: Names
) -> None:
    """Confluent's own deserializer reads them, by the schemas that the run registered."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    for name in (topic, responses, errors):
        broker.create_topic(name, partitions=2)
    broker.produce(topic, [(n % 2, None, b"%d" % n) for n in range(10)])

    def handler(event: Any, context: LambdaContext) -> Any:
        if any(entry["payload"]["value"] == 7 for entry in event):
            raise ValueError("seven")
        return answer(event)

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            schema_registry_url=registry.url,
            schema_validation="NONE",
            response_topic=responses,
            response_format="avro",
            on_error="log",
            error_topic=errors,
            error_format="avro",
            bisect_on_error=True,
        )
    subjects = {f"{name}-{part}" for name in (responses, errors) for part in ("key", "value")}
    assert subjects <= set(registry.client.get_subjects())
    read = AvroDeserializer(registry.client)

    def records(name: str) -> list[tuple[Any, Any, StoredRecord]]:
        return [
            (
                read(record.key, SerializationContext(name, MessageField.KEY)),
                read(record.value, SerializationContext(name, MessageField.VALUE)),
                record,
            )
            for record in broker.read_all(name)
        ]

    answered = sorted((key["partition"], key["offset"]) for key, _, _ in records(responses))
    assert answered == [(p, o) for p in range(2) for o in range(5) if (p, o) != (1, 3)]
    for key, value, record in records(responses):
        assert key["topic"] == topic and record.partition == key["partition"]
        result = json.loads(value)
        assert result["result"] == 2 * key["offset"] + key["partition"]
    ((key, value, record),) = records(errors)
    assert key == {"topic": topic, "partition": 1, "startOffset": 3, "endOffset": 4}
    assert json.loads(value["payload"])["errorMessage"] == "seven"
    assert json.loads(value["inputPayload"])[0]["payload"]["value"] == 7
    assert value["statusCode"] == 200 and value["functionName"]
    assert originals(record)[0]["value"] == b"7"


# -- its login -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BASIC_AUTH", "CLIENT_CERTIFICATE_TLS_AUTH"])
def test_its_login_is_changed_while_a_run_goes_on(
    broker: KafkaBroker,
    registry: SchemaRegistryServer,
    manager: SecretsManager,
    names: Names,
    tmp_path: Path,
    kind: str,
) -> None:
    """The registry takes the new one first, the secret has it later: until then the run waits, and
    then it goes on."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=1)
    schemas = [f'{{"type":"enum","name":"{name}","symbols":["A"]}}' for name in "ab"]
    ids = [
        registry.register(names.topic(f"subject-{n}"), schema) for n, schema in enumerate(schemas)
    ]
    (tmp_path / "other").mkdir()
    ours, other = Authority(tmp_path), Authority(tmp_path / "other")
    door_file = tmp_path / "door.pem"
    door_file.write_text("".join(reversed(ours.issue("door"))))
    with_certificates = kind != "BASIC_AUTH"

    def secret(number: int) -> dict[str, str]:
        if not with_certificates:
            return {"username": "orders", "password": f"password-{number}"}
        certificate, key = (ours, other)[number].issue("orders")
        return {"certificate": certificate, "privateKey": key}

    def lock(door: RegistryDoor, number: int) -> None:
        if with_certificates:
            door.trust((ours, other)[number].ca)
        else:
            door.login = f"orders:password-{number}"

    arn = manager.keep(**secret(0))
    access = f"{kind}={arn}"
    if with_certificates:
        access += f",SERVER_ROOT_CA_CERTIFICATE={manager.keep(certificate=ours.ca.read_text())}"
    with RegistryDoor(registry.url, door_file if with_certificates else None) as door:
        lock(door, 0)
        options = {
            "topics": topic,
            "consumer_group": group,
            "schema_registry_url": door.url.removesuffix("/"),
            "schema_registry_access": access,
            "until": "forever",
        }
        with serve() as server, start(broker, server, manager.env, **options) as sink:
            broker.produce(topic, [NewRecord(0, b"k", _of(ids[0], b"\x00"))])
            sink.until(lambda: broker.committed(group, topic) == {0: 1}, "the first is not done")
            lock(door, 1)
            broker.produce(topic, [NewRecord(0, b"k", _of(ids[1], b"\x00"))])
            waits = f"no answer for schema {ids[1]}"
            sink.until(lambda: waits in sink.stderr, "the old login is not refused")
            manager.change(arn, **secret(1))
            sink.until(lambda: broker.committed(group, topic) == {0: 2}, "the other is not done")
            sink.send(signal.SIGTERM)
            ended = sink.wait()
            assert _values(server) == ["A", "A"]
    assert "it answers again" in ended.stderr
    assert "password-" not in ended.stderr and "PRIVATE" not in ended.stderr
