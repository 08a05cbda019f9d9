"""Decode: RecordChunk -> RecordChunk, its records read by the schemas they name.

Only there with a schema registry. What comes of a key and a value travels beside them
(`Records.decoded`), as does the reason why a record cannot be read (`Records.rejections`); the
bytes themselves stay for error records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import apache_beam as beam

from transforms.conditions import DESERIALIZATION_ERROR, SCHEMA_NOT_FOUND
from transforms.errors import RegistryError
from transforms.per_process import per_process
from transforms.records import Decoded, RecordChunk, Records, Rejection
from transforms.schemas.registry import RegistryConfig, shared_registry
from transforms.schemas.schema import (
    AVRO,
    CONNECT,
    JSON,
    PROTOBUF,
    Decode,
    DecodeError,
    SchemaText,
    schema_id,
)

KEY, VALUE = ATTRIBUTES = ("KEY", "VALUE")


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """What is decoded, and into what.

    Attributes:
        registry: Where the schemas are.
        attributes: Which of `ATTRIBUTES` carry a schema; the others are left as they are.
        style: Whose JSON is made: ``connect`` or ``standard``.
    """

    registry: RegistryConfig
    attributes: tuple[str, ...] = (VALUE,)
    style: str = CONNECT


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read the records of one schema.

    Attributes:
        schema: ``(format, id)``, as the function is told.
        decode: Makes JSON of a record's bytes; raises `DecodeError`.
    """

    schema: tuple[str, str]
    decode: Decode


def make_reader(id: int, schema: SchemaText, style: str) -> Reader:
    """A reader of one schema; one that reads nothing if the schema cannot be used.

    Raises:
        RegistryError: Something is missing here that the schema needs.
    """
    try:
        return Reader((schema.format, str(id)), _decoder(schema, style))
    except DecodeError as error:
        problem = str(error)

    def decode(data: bytes) -> NoReturn:
        raise DecodeError(problem)

    return Reader((schema.format, str(id)), decode)


def _decoder(schema: SchemaText, style: str) -> Decode:
    # Imported where they are used: few runs need all of them.
    if schema.format == AVRO:
        from transforms.schemas.avro import avro_decoder

        return avro_decoder(schema, style)
    if schema.format == PROTOBUF:
        from transforms.schemas.protobuf import protobuf_decoder

        try:
            return protobuf_decoder(schema, style)
        except ImportError:
            raise RegistryError(
                "the schema registry hands out Protobuf schemas as text; to read it, install "
                "beam-lambda-sink[proto-text]"
            ) from None
    if schema.format == JSON:
        from transforms.schemas.json_schema import json_decoder

        return json_decoder(schema)
    raise DecodeError(f"its format {schema.format} is not known")


def decode_column(
    part: str, column: Sequence[bytes | None], reader: Callable[[int], Reader | None]
) -> tuple[list[tuple[bytes, tuple[str, str]] | None], dict[int, Rejection]]:
    """Decode all keys, or all values, of some records.

    Args:
        part: ``key`` or ``value``, for messages.
        column: The bytes; None is left alone, since a tombstone has no schema.
        reader: The reader for a schema's id, None if there is no such schema.

    Returns:
        Per record its JSON and ``(format, id)`` of its schema, None where there is neither; and
        by index why a record cannot be read.
    """
    decoded: list[tuple[bytes, tuple[str, str]] | None] = []
    rejections: dict[int, Rejection] = {}
    for index, data in enumerate(column):
        if data is None:
            decoded.append(None)
            continue
        which = ""
        try:
            id = schema_id(data)
            found = reader(id)
            if found is None:
                message = f"the record's {part} names schema {id}, which the registry does not have"
                rejections[index] = Rejection(SCHEMA_NOT_FOUND, SCHEMA_NOT_FOUND, message)
                decoded.append(None)
                continue
            which = f" by schema {id} ({found.schema[0]})"
            decoded.append((found.decode(data), found.schema))
        except DecodeError as error:
            message = f"the record's {part} ({len(data)} bytes) cannot be read{which}: {error}"
            rejections[index] = Rejection(DESERIALIZATION_ERROR, DESERIALIZATION_ERROR, message)
            decoded.append(None)
    return decoded, rejections


def decode_records(
    records: Records, attributes: Sequence[str], reader: Callable[[int], Reader | None]
) -> Records:
    """The records with what their schemas make of them, and why some cannot be read."""
    nothing: list[tuple[bytes, tuple[str, str]] | None] = [None] * len(records)
    keys = values = nothing
    rejections: dict[int, Rejection] = {}
    if KEY in attributes:
        keys, rejections = decode_column("key", records.keys, reader)
    if VALUE in attributes:
        values, refused = decode_column("value", records.values, reader)
        rejections = refused | rejections
    decoded = [
        None
        if index in rejections or not (key or value)
        else Decoded(key and key[0], value and value[0], key and key[1], value and value[1])
        for index, (key, value) in enumerate(zip(keys, values))
    ]
    return replace(
        records,
        decoded=decoded,
        rejections=list(map(rejections.get, range(len(records)))) if rejections else (),
    )


class Readers:
    """The readers of the schemas that this process has met."""

    def __init__(self, config: DecodeConfig) -> None:
        self._registry = shared_registry(config.registry)
        self._style = config.style
        self._readers: dict[int, Reader] = {}

    def __call__(self, id: int) -> Reader | None:
        """The reader for a schema's id, None if there is no such schema; see `SchemaRegistry`."""
        reader = self._readers.get(id)
        if reader is None:
            schema = self._registry.schema(id)
            if schema is None:
                return None
            reader = self._readers[id] = make_reader(id, schema, self._style)
        return reader


class DecodeRecords(beam.PTransform):
    """Decode keys and values by the schemas they name.

    Bounded and unbounded; one element out per element in, nothing dropped and nothing moved. A
    bundle waits while the registry is out of reach, with a warning every 10 s.
    """

    def __init__(self, config: DecodeConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, chunks: beam.PCollection[RecordChunk]) -> beam.PCollection[RecordChunk]:
        return chunks | "BySchema" >> beam.ParDo(_DecodeFn(self._config)).with_output_types(
            RecordChunk
        )

    def display_data(self) -> dict[str, Any]:
        return {"schema_registry_url": self._config.registry.url}


class _DecodeFn(beam.DoFn):
    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        counter = beam.metrics.Metrics.counter
        self._records = counter("decode", "records")
        self._counters = {
            SCHEMA_NOT_FOUND: counter("decode", "schemas_not_found"),
            DESERIALIZATION_ERROR: counter("decode", "deserialization_errors"),
        }

    def process(self, chunk: RecordChunk) -> Iterator[RecordChunk]:
        readers = per_process(Readers, self._config)
        records = decode_records(chunk.records, self._config.attributes, readers)
        self._records.inc(len(records))
        for rejection in filter(None, records.rejections):
            self._counters[rejection.condition].inc()
        yield replace(chunk, records=records)
