"""Originals: source records inside error records, byte for byte, for redrive to read. Pure."""

from __future__ import annotations

import io
from typing import Any

import fastavro

from transforms.names import NUMBERS, Names
from transforms.records import Records

HEADER_PREFIX = "lambda."
ORIGINAL_HEADER = HEADER_PREFIX + "original"
_ORIGINAL: dict[str, Any] = {
    "type": "record",
    "name": "OriginalRecord",
    "namespace": "beam_lambda_sink",
    "fields": [
        {"name": "topic", "type": "string"},
        {"name": "partition", "type": "int"},
        {"name": "offset", "type": "long"},
        {"name": "timestamp", "type": "long"},
        {"name": "key", "type": ["null", "bytes"]},
        {"name": "value", "type": ["null", "bytes"]},
        {
            "name": "headers",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Header",
                    "fields": [
                        {"name": "name", "type": "string"},
                        {"name": "value", "type": ["null", "bytes"]},
                    ],
                },
            },
        },
    ],
}
ORIGINAL_SCHEMA = fastavro.parse_schema(_ORIGINAL)
"""Avro schema of an `ORIGINAL_HEADER`; written without a container, one record each."""

TEXT_ORIGINAL_HEADER = HEADER_PREFIX + "original.text"
"""In place of `ORIGINAL_HEADER` where numbers are texts: the offset in it is a string."""

TEXT_ORIGINAL_SCHEMA = fastavro.parse_schema(
    {
        **_ORIGINAL,
        "name": "OriginalTextRecord",
        "fields": [
            field | {"type": "string"} if field["name"] == "offset" else field
            for field in _ORIGINAL["fields"]
        ],
    }
)


def encode_originals(
    topic: str, partition: int, records: Records, names: Names = NUMBERS
) -> list[bytes]:
    """Each record as its source had it, as Avro of `ORIGINAL_SCHEMA`; or of
    `TEXT_ORIGINAL_SCHEMA`, where numbers are texts."""
    schema = TEXT_ORIGINAL_SCHEMA if names.texts else ORIGINAL_SCHEMA
    encoded = []
    for offset, timestamp, key, value, headers in zip(
        records.offsets, records.timestamps, records.keys, records.values, records.headers
    ):
        buffer = io.BytesIO()
        fastavro.schemaless_writer(
            buffer,
            schema,
            {
                "topic": topic,
                "partition": partition,
                "offset": names.number(offset),
                "timestamp": timestamp,
                "key": key,
                "value": value,
                "headers": [{"name": name, "value": value} for name, value in headers or ()],
            },
        )
        encoded.append(buffer.getvalue())
    return encoded


def decode_original(data: bytes, names: Names = NUMBERS) -> dict[str, Any]:
    """The record in an `ORIGINAL_HEADER`, with the fields of `ORIGINAL_SCHEMA`; that in a
    `TEXT_ORIGINAL_HEADER` where numbers are texts."""
    schema = TEXT_ORIGINAL_SCHEMA if names.texts else ORIGINAL_SCHEMA
    return fastavro.schemaless_reader(io.BytesIO(data), schema, None)  # type: ignore
