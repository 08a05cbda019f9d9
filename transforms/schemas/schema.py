"""Schemas: what a registry holds, how a record names its schema, and what can be wrong. Pure.

A record with a schema begins with a zero and the schema's id in four bytes; what follows is the
data, in Protobuf after the place of its message in the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import orjson

from transforms.records import PREFIX_BYTES

AVRO, PROTOBUF, JSON = "AVRO", "PROTOBUF", "JSON"

CONNECT, STANDARD = "connect", "standard"
"""Whose JSON is made: that of Kafka Connect's converters, or the format's own."""

Decode: TypeAlias = Callable[[bytes], bytes]
"""A record's bytes, the prefix among them, to JSON text. Raises `DecodeError`."""


class DecodeError(Exception):
    """A record does not fit its schema, or the schema cannot be used. Never shows a payload."""


@dataclass(frozen=True, slots=True)
class SchemaText:
    """A schema as the registry has it.

    Attributes:
        format: ``AVRO``, ``PROTOBUF`` or ``JSON``.
        text: The schema; of Protobuf the text, or base64 of a FileDescriptorProto.
        references: What it imports: by the name it uses, the schema.
    """

    format: str
    text: str
    references: tuple[tuple[str, SchemaText], ...] = ()


def schema_id(data: bytes) -> int:
    """The id of a record's schema.

    Raises:
        DecodeError: It names none.
    """
    if len(data) < PREFIX_BYTES:
        raise DecodeError(f"it is too short for a schema id, which takes {PREFIX_BYTES} bytes")
    if data[0]:
        raise DecodeError("it does not begin with a schema id: its first byte is not 0")
    return int.from_bytes(data[1:PREFIX_BYTES], "big")


def all_references(schema: SchemaText) -> Iterator[tuple[str, SchemaText]]:
    """What a schema imports and what that imports, each once, after what it needs itself."""
    seen: set[str] = set()

    def walk(schema: SchemaText) -> Iterator[tuple[str, SchemaText]]:
        for name, reference in schema.references:
            if name not in seen:
                seen.add(name)
                yield from walk(reference)
                yield name, reference

    return walk(schema)


def explain(error: Exception) -> str:
    """What a library says of a schema, as one line. Not for records: it may quote them."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:300]}"


_REASONS = (
    (EOFError, "it ends too early"),
    (UnicodeDecodeError, "a string is not UTF-8"),
    (IndexError, "an index is none of its enum or union"),
    (RecursionError, "it is nested too deep"),
    (orjson.JSONDecodeError, "it is not JSON"),
    (orjson.JSONEncodeError, "it is nested too deep, or a number is too large"),
    (OverflowError, "a number is too large"),
)


def why(error: Exception) -> str:
    """Why a record could not be read, without what the library quotes of it."""
    return next((text for kind, text in _REASONS if isinstance(error, kind)), type(error).__name__)
