"""Decode: which records are read, which are not and why, and what travels on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from transforms.batch.batch import BatchByPartition, BatchConfig
from transforms.batch.key import KeyByLane
from transforms.batch.payload import PayloadFormat, encode_records
from transforms.decode import decode
from transforms.decode.decode import (
    DecodeConfig,
    DecodeRecords,
    Reader,
    Readers,
    decode_records,
    make_reader,
)
from transforms.envelope import Envelope
from transforms.errors import RegistryError
from transforms.lanes import Lanes
from transforms.records import ARRAY, Decoded, RecordChunk, Records
from transforms.schemas.registry import RegistryConfig
from transforms.schemas.schema import AVRO, CONNECT, JSON, PROTOBUF, SchemaText

LONG = SchemaText(AVRO, '"long"')
OBJECT = SchemaText(JSON, '{"type":"object"}')
SCHEMAS = {7: LONG, 8: OBJECT}


def _reader(id: int) -> Reader | None:
    return make_reader(id, SCHEMAS[id], CONNECT) if id in SCHEMAS else None


def _of(id: int, data: bytes) -> bytes:
    return b"\x00" + id.to_bytes(4, "big") + data


def _records(values: Sequence[bytes | None], keys: Sequence[bytes | None] = ()) -> Records:
    count = len(values)
    offsets = list(range(count))
    return Records(offsets, [1] * count, keys or [None] * count, values, [None] * count)


def test_values_are_read_and_keys_are_left() -> None:
    """By default; what comes of a value says which schema made it."""
    records = _records([_of(7, b"\x02"), _of(8, b'{"a":1}'), None], [b"k", b"\x00", None])
    read = decode_records(records, ("VALUE",), _reader)
    assert read.decoded == [
        Decoded(value=b"1", value_schema=("AVRO", "7")),
        Decoded(value=b'{"a":1}', value_schema=("JSON", "8")),
        None,
    ]
    assert not read.rejections
    assert (read.keys, read.values) == (records.keys, records.values)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (("KEY",), Decoded(key=b"1", key_schema=("AVRO", "7"))),
        (("KEY", "VALUE"), Decoded(b"1", b"2", ("AVRO", "7"), ("AVRO", "7"))),
    ],
)
def test_keys_are_read_too(attributes: tuple[str, ...], expected: Decoded) -> None:
    """Where they are said to have a schema."""
    records = _records([_of(7, b"\x04")], [_of(7, b"\x02")])
    assert decode_records(records, attributes, _reader).decoded == [expected]


NOT_FOUND, BROKEN = "SCHEMA_NOT_FOUND", "DESERIALIZATION_ERROR"


@pytest.mark.parametrize(
    ("data", "condition", "message"),
    [
        (
            _of(9, b"secret"),
            NOT_FOUND,
            "the record's value names schema 9, which the registry does not have",
        ),
        (
            b"",
            BROKEN,
            "the record's value (0 bytes) cannot be read: it is too short for a schema id, which "
            "takes 5 bytes",
        ),
        (
            b'{"a":"secret"}',
            BROKEN,
            "the record's value (14 bytes) cannot be read: it does not begin with a schema id: its "
            "first byte is not 0",
        ),
        (
            _of(7, b""),
            BROKEN,
            "the record's value (5 bytes) cannot be read by schema 7 (AVRO): it ends too early",
        ),
        (
            _of(8, b'["secret"]'),
            BROKEN,
            "the record's value (15 bytes) cannot be read by schema 8 (JSON): type of the schema "
            "does not hold",
        ),
    ],
)
def test_a_record_that_cannot_be_read(data: bytes, condition: str, message: str) -> None:
    """It alone is rejected, with one line that does not quote it; its bytes stay."""
    records = _records([_of(7, b"\x02"), data, _of(7, b"\x04")])
    read = decode_records(records, ("VALUE",), _reader)
    assert [made and made.value for made in read.decoded] == [b"1", None, b"2"]
    before, rejection, after = read.rejections
    assert before is after is None
    assert rejection is not None
    assert (rejection.condition, rejection.error_type) == (condition, condition)
    assert rejection.message == message
    assert read.values == records.values


def test_a_record_is_rejected_for_its_key() -> None:
    """Whatever its value; nothing of it is decoded, so that its error record has its bytes."""
    records = _records([_of(7, b"\x02"), b"x"], [b"bad", b"bad"])
    read = decode_records(records, ("KEY", "VALUE"), _reader)
    assert read.decoded == [None, None]
    assert ["the record's key" in (r.message if r else "") for r in read.rejections] == [True] * 2


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (SchemaText(AVRO, "{"), "it is no Avro schema that can be used"),
        (SchemaText(JSON, "{"), "it is no JSON Schema that can be used"),
        (SchemaText(PROTOBUF, "AAAA"), "it is no Protobuf schema that can be used"),
        (SchemaText("XML", "<a/>"), "its format XML is not known"),
    ],
)
def test_a_schema_that_cannot_be_used(schema: SchemaText, why: str) -> None:
    """Its records are rejected, with the reason; the run goes on with the others."""
    records = _records([_of(5, b"x")])
    read = decode_records(records, ("VALUE",), lambda id: make_reader(id, schema, CONNECT))
    (rejection,) = read.rejections
    assert rejection is not None and rejection.condition == BROKEN
    assert f"by schema 5 ({schema.format}): {why}" in rejection.message


def test_the_compiler_that_is_not_there_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the installation that is wrong, not the record."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RegistryError, match=r"install beam-lambda-sink\[proto-text\]"):
        make_reader(5, SchemaText(PROTOBUF, 'syntax = "proto3";'), CONNECT)


# -- what the function gets ---------------------------------------------------------------


def test_the_connectors_payload() -> None:
    """What was decoded is JSON in it; what was not is as before."""
    read = decode_records(_records([_of(7, b"\x02"), None], [b"k", b"l"]), ("VALUE",), _reader)
    entries = json.loads(ARRAY.join(encode_records("t", 0, read, PayloadFormat()).entries))
    sent = [(entry["payload"]["key"], entry["payload"]["value"]) for entry in entries]
    assert sent == [("k", 1), ("l", None)]


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("name", ["kafka_event", "pipes"])
def test_the_event(name: str, source: bool) -> None:
    """Base64 of the JSON or of the bytes behind the schema's id, with the schema beside it."""
    envelope = Envelope(name, "b:1", source_format=source)
    records = _records([_of(8, b'{"a":1}'), _of(7, b"\x02"), None], [b"k", None, b"l"])
    read = decode_records(records, ("VALUE",), _reader)
    entries = encode_records("t", 0, read, PayloadFormat(envelope=envelope)).entries
    first, second, third = (json.loads(entry) for entry in entries)
    assert (first["key"], first["value"]) == ("aw==", "eyJhIjoxfQ==")
    assert first["valueSchemaMetadata"] == {"dataFormat": "JSON", "schemaId": "8"}
    assert second["value"] == ("Ag==" if source else "MQ==")
    assert second["valueSchemaMetadata"] == {"dataFormat": "AVRO", "schemaId": "7"}
    assert "value" not in third and "valueSchemaMetadata" not in third
    assert all("keySchemaMetadata" not in entry for entry in (first, second, third))


# -- the step -----------------------------------------------------------------------------


class _Registry:
    """What `SchemaRegistry` is for `Readers`."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def schema(self, id: int) -> SchemaText | None:
        self.asked.append(id)
        return SCHEMAS.get(id)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> _Registry:
    """The registry of every config of this test."""
    registry = _Registry()
    monkeypatch.setattr(decode, "shared_registry", lambda config: registry)
    return registry


def test_a_schema_is_asked_for_once(fake: _Registry) -> None:
    """And kept as long as the process lives; one that is missing is asked for again."""
    readers = Readers(DecodeConfig(RegistryConfig("http://none:1")))
    assert readers(7) is readers(7)
    assert readers(9) is readers(9) is None
    assert fake.asked == [7, 9, 9]


def test_the_step(fake: _Registry) -> None:
    """Chunks keep their place; a rejected record becomes a batch of its own; both are counted."""
    config = DecodeConfig(RegistryConfig("http://none:2"), ("VALUE",))
    records = _records([_of(7, b"\x02"), _of(9, b""), b"x", _of(7, b"\x04")])
    chunks = [RecordChunk("t", 0, 0, 5, records, first=True), RecordChunk("t", 1, 0, 3, Records())]
    with TestPipeline(options=PipelineOptions([])) as pipeline:
        batches = (
            pipeline
            | beam.Create(chunks)
            | "Decode" >> DecodeRecords(config)
            | "Key" >> KeyByLane(Lanes())
            | "Batch" >> BatchByPartition(BatchConfig())
        )
        assert_that(
            batches | beam.Map(_shape).with_output_types(Any),
            equal_to(
                [
                    (0, 0, 1, [1], None),
                    (0, 1, 2, [None], "SCHEMA_NOT_FOUND"),
                    (0, 2, 3, [None], "DESERIALIZATION_ERROR"),
                    (0, 3, 5, [2], None),
                    (1, 0, 3, [], None),
                ]
            ),
        )
    counters = pipeline.result.metrics().query()["counters"]
    counted = {
        c.key.metric.name: c.committed for c in counters if c.key.metric.namespace == "decode"
    }
    assert counted == {"records": 4, "schemas_not_found": 1, "deserialization_errors": 1}


def _shape(batch: Any) -> Any:
    sent = [json.loads(entry)["payload"]["value"] for entry in batch.entries]
    if batch.rejection:
        sent = [None]  # its entry is only for its error record
    assert not batch.records.decoded and not any(batch.records.rejections)
    condition = batch.rejection and batch.rejection.condition
    return (batch.partition, batch.start, batch.next_offset, sent, condition)
