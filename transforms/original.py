"""Originals: source records inside error records, byte for byte, for redrive to read. Pure."""

from __future__ import annotations

import io
from typing import Any

import fastavro

from transforms.records import Records

HEADER_PREFIX = "lambda."
ORIGINAL_HEADER = HEADER_PREFIX + "original"
ORIGINAL_SCHEMA = fastavro.parse_schema(
    {
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
)
"""Avro schema of an `ORIGINAL_HEADER`; written without a container, one record each."""


def encode_originals(topic: str, partition: int, records: Records) -> list[bytes]:
    """Each record as Kafka had it, as Avro of `ORIGINAL_SCHEMA`."""
    encoded = []
    for offset, timestamp, key, value, headers in zip(
        records.offsets, records.timestamps, records.keys, records.values, records.headers
    ):
        buffer = io.BytesIO()
        fastavro.schemaless_writer(
            buffer,
            ORIGINAL_SCHEMA,
            {
                "topic": topic,
                "partition": partition,
                "offset": offset,
                "timestamp": timestamp,
                "key": key,
                "value": value,
                "headers": [{"name": name, "value": value} for name, value in headers or ()],
            },
        )
        encoded.append(buffer.getvalue())
    return encoded


def decode_original(data: bytes) -> dict[str, Any]:
    """The record in an `ORIGINAL_HEADER`, with the fields of `ORIGINAL_SCHEMA`."""
    return fastavro.schemaless_reader(io.BytesIO(data), ORIGINAL_SCHEMA, None)  # type: ignore
