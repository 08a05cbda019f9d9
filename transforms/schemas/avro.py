"""Avro: a schema -> a decoder of its data to JSON, and the encoder for our own records. Pure.

The JSON is that of Connect's JsonConverter for what its AvroConverter makes of the data. The schema
is rewritten before fastavro gets it, so that its C reader returns that JSON and nothing has to go
over it again: a record of one field is encoded as the field alone is, and null takes no bytes, so a
member of a union can be read as the struct that Connect makes of it.
"""

from __future__ import annotations

import io
import re
import struct
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import fastavro
import orjson
from fastavro import _read_py as python_reader
from fastavro.read import LOGICAL_READERS
from fastavro.utils import generate_many

from transforms.records import PREFIX_BYTES
from transforms.schemas.schema import (
    CONNECT,
    Decode,
    DecodeError,
    SchemaText,
    all_references,
    explain,
    why,
)

_PRIMITIVES = frozenset(
    ("null", "boolean", "int", "long", "float", "double", "bytes", "string"),
)
_NAMED = frozenset(("record", "error", "enum", "fixed"))
_MAP_ENTRY = "io.confluent.connect.avro.MapEntry"

_DEEP_BYTES = 1_000
"""Data of a recursive schema above this size may nest so deep that the C stack overflows."""


_ROOT = "BeamLambdaSinkRoot"

# Each byte of a number but its last has the high bit, and 64 bits take ten bytes.
_HIGH_BITS = bytes(byte & 0x80 for byte in range(256))
_LONG_NUMBER = b"\x80" * 10
_LONG_RUN = re.compile(rb"[\x80-\xff]{10,}")


def unscaled(data: bytes) -> str:
    """A decimal as Connect's JSON has it: base64 of the shortest form of its unscaled value."""
    number = int.from_bytes(data, "big", signed=True)
    bits = (number if number >= 0 else ~number).bit_length()
    return b64encode(number.to_bytes(bits // 8 + 1, "big", signed=True)).decode()


def double(number: float) -> float | str:
    """A number; what is none has no place in JSON, and Connect writes its name as a string."""
    if number - number == 0.0:
        return number
    return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"


_SINGLE = struct.Struct("f")


def single(number: float) -> float | str:
    """A number of 32 bits with the digits that it has, without those of its 64-bit form."""
    if number - number != 0.0 or number.is_integer():
        return double(number)
    for digits in (6, 7, 8):
        short = float(f"{number:.{digits}g}")
        if _SINGLE.pack(short) == _SINGLE.pack(number):
            return short
    return float(f"{number:.9g}")


def _base64(data: bytes, *_: Any) -> str:
    return b64encode(data).decode()


def _decimal(data: bytes, *_: Any) -> str:
    return unscaled(data)


def _single(number: float, *_: Any) -> float | str:
    return single(number)


def _double(number: float, *_: Any) -> float | str:
    return double(number)


_BOOLEANS = {b"\0": False, b"\1": True}


def _boolean(data: bytes, *_: Any) -> bool:
    try:
        return _BOOLEANS[data]
    except KeyError:
        raise DecodeError("a boolean is neither 0 nor 1") from None


def _object(entries: list[dict[str, Any]], *_: Any) -> dict[str, Any]:
    return {str(entry["key"]): entry["value"] for entry in entries}


def _pairs(entries: list[dict[str, Any]], *_: Any) -> list[list[Any]]:
    return [[entry["key"], entry["value"]] for entry in entries]


_READERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("bytes", "base64"): _base64,
    ("fixed", "base64"): _base64,
    ("bytes", "decimal"): _decimal,
    ("fixed", "decimal"): _decimal,
    ("fixed", "boolean"): _boolean,
    ("float", "number"): _single,
    ("double", "number"): _double,
    ("array", "object"): _object,
    ("array", "pairs"): _pairs,
}
# Logical types of our own: fastavro lets such a function have a value before it goes on.
LOGICAL_READERS.update(
    {f"{kind}-beam-lambda-sink-{name}": reader for (kind, name), reader in _READERS.items()}
)


def _read_as(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "logicalType": f"beam-lambda-sink-{name}"}


_TEXT = ("string", ["null", "string"], ["string", "null"])
_REWRITTEN = {
    "bytes": _read_as("base64", {"type": "bytes"}),
    "float": _read_as("number", {"type": "float"}),
    "double": _read_as("number", {"type": "double"}),
}


class _Rewriter:
    """Makes schemas whose data reads as JSON.

    Args:
        structs: Whether a union of several types reads as Connect's struct with a field for each
            of them; else as the plain value.
    """

    def __init__(self, structs: bool) -> None:
        self._structs = structs
        self._kinds: dict[str, str] = {}
        self._maps: dict[str, str] = {}
        self._empty: set[str] = set()
        self._open: set[str] = set()
        self._numbers = count()
        self.recursive = False

    def rewrite(self, schema: Any, namespace: str = "") -> Any:
        """The schema to read with.

        Raises:
            KeyError, TypeError, ValueError: It is no Avro schema, or none to read by.
        """
        if isinstance(schema, str):
            if schema == "boolean":
                # fastavro takes any byte for one.
                fixed = {"type": "fixed", "name": self._new_name(), "namespace": "", "size": 1}
                return _read_as("boolean", fixed)
            if schema in _PRIMITIVES:
                return _REWRITTEN.get(schema, schema)
            name = _full_name(schema, namespace)
            self.recursive |= name in self._open
            return name
        if isinstance(schema, list):
            return self._union(schema, namespace)
        kind = schema["type"]
        if not isinstance(kind, str):
            return self.rewrite(kind, namespace)
        if kind in _NAMED:
            return self._named(kind, schema, namespace)
        if kind == "array":
            array = {"type": "array", "items": self.rewrite(schema["items"], namespace)}
            if self._is_empty(array["items"]):
                # A few bytes could say that there are more of them than there is memory.
                raise ValueError("an array of items that take no bytes")
            entry = self._maps.get(self._name(schema["items"], namespace))
            return _read_as(entry, array) if entry else array
        if kind == "map":
            return {"type": "map", "values": self.rewrite(schema["values"], namespace)}
        if kind == "bytes" and schema.get("logicalType") == "decimal":
            return _read_as("decimal", {"type": "bytes"})
        # Other logical types are numbers and strings in Connect's JSON, as they are in the data.
        return self.rewrite(kind, namespace)

    def _named(self, kind: str, schema: dict[str, Any], namespace: str) -> dict[str, Any]:
        name = self._name(schema, namespace)
        space, _, short = name.rpartition(".")
        self._kinds[name] = kind
        named: dict[str, Any] = {"type": kind, "name": short, "namespace": space}
        if kind == "enum":
            return {**named, "symbols": schema["symbols"]}
        if kind == "fixed":
            if not schema["size"]:
                self._empty.add(name)
            is_decimal = schema.get("logicalType") == "decimal"
            return _read_as(
                "decimal" if is_decimal else "base64", {**named, "size": schema["size"]}
            )
        fields = schema["fields"]
        marked = schema.get("connect.internal.type") == "MapEntry" or name == _MAP_ENTRY
        self._open.add(name)
        types = {field["name"]: self.rewrite(field["type"], space) for field in fields}
        self._open.discard(name)
        if all(map(self._is_empty, types.values())):
            self._empty.add(name)
        if marked and self._structs and types.keys() == {"key", "value"}:
            self._maps[name] = "object" if types["key"] in _TEXT else "pairs"
        return {**named, "fields": [{"name": name, "type": type} for name, type in types.items()]}

    def _is_empty(self, schema: Any) -> bool:
        """Whether the data of a rewritten schema takes no bytes."""
        if isinstance(schema, dict) and schema["type"] in _NAMED:
            schema = _full_name(schema["name"], schema["namespace"])
        return schema == "null" or (isinstance(schema, str) and schema in self._empty)

    def _union(self, members: list[Any], namespace: str) -> Any:
        rewritten = [self.rewrite(member, namespace) for member in members]
        is_null = [member == "null" for member in rewritten]
        is_optional = len(members) == 2 and any(is_null)
        if not self._structs or is_optional or all(is_null):
            return rewritten
        names = [self._member_name(member, namespace, full=False) for member in members]
        twice = {name for name, times in Counter(names).items() if times > 1}
        names = [
            self._member_name(member, namespace, full=True) if name in twice else name
            for member, name in zip(members, names)
        ]
        fields = [name for name, null in zip(names, is_null) if not null]
        return [
            "null" if null else self._struct(fields, name, member)
            for name, null, member in zip(names, is_null, rewritten)
        ]

    def _new_name(self) -> str:
        return f"BeamLambdaSink{next(self._numbers)}"

    def _struct(self, fields: Sequence[str], set: str, schema: Any) -> dict[str, Any]:
        return {
            "type": "record",
            "name": self._new_name(),
            # None, since a reference inside it without a namespace means one that has none.
            "namespace": "",
            "fields": [
                {"name": field, "type": schema if field == set else "null"} for field in fields
            ],
        }

    def _member_name(self, schema: Any, namespace: str, full: bool) -> str:
        if isinstance(schema, dict) and schema["type"] not in _NAMED:
            return self._member_name(schema["type"], namespace, full)
        name = self._name(schema, namespace)
        kind = self._kinds.get(name, name)
        if kind not in _NAMED or (kind == "fixed" and not full):
            return kind
        return name.replace(".", "_") if full else name.rpartition(".")[2]

    def _name(self, schema: Any, namespace: str) -> str:
        """Full name of a named type or of a reference to one; a primitive's is its own."""
        if isinstance(schema, str):
            return schema if schema in _PRIMITIVES else _full_name(schema, namespace)
        if isinstance(schema, dict) and schema["type"] in _NAMED:
            return _full_name(schema["name"], schema.get("namespace", namespace))
        return ""


class _Choices(list[Any]):
    """The members of a union or the symbols of an enum, of which data chooses one by its index.

    Readers would count a negative index from the end. They ask a list for its length to do so.
    """

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        if index < 0:
            raise IndexError
        return super().__getitem__(index)


def _with_choices(schema: Any) -> Any:
    """A parsed schema that takes no index below zero. Changes records and what is in them."""
    if isinstance(schema, list):
        return _Choices(map(_with_choices, schema))
    if isinstance(schema, dict):
        for field in schema.get("fields", ()):
            field["type"] = _with_choices(field["type"])
        for part in ("items", "values"):
            if part in schema:
                schema[part] = _with_choices(schema[part])
        if "symbols" in schema:
            schema["symbols"] = _Choices(schema["symbols"])
    return schema


def _full_name(name: str, namespace: str | None) -> str:
    return name if "." in name or not namespace else f"{namespace}.{name}"


def avro_decoder(schema: SchemaText, style: str) -> Decode:
    """A decoder of one schema's data.

    Args:
        schema: An Avro schema.
        style: ``connect``, or ``standard`` for unions as plain values.

    Raises:
        DecodeError: fastavro cannot read by the schema.
    """
    rewriter = _Rewriter(structs=style == CONNECT)
    named: dict[str, Any] = {}
    try:
        for _, reference in all_references(schema):
            fastavro.parse_schema(rewriter.rewrite(orjson.loads(reference.text)), named)
        # In a record, whose data is that of its only field: it is parsed once, unlike a union.
        root = {
            "type": "record",
            "name": _ROOT,
            "namespace": "",
            "fields": [{"name": "value", "type": rewriter.rewrite(orjson.loads(schema.text))}],
        }
        parsed = _with_choices(fastavro.parse_schema(root, named))
        for part in named.values():
            _with_choices(part)
    except Exception as error:
        raise DecodeError(f"it is no Avro schema that can be used: {explain(error)}") from None
    recursive = rewriter.recursive
    read_fast, read_deep = fastavro.schemaless_reader, python_reader.schemaless_reader

    def decode(data: bytes) -> bytes:
        stream = io.BytesIO(data)
        stream.seek(PREFIX_BYTES)
        # The Python reader ends with an error where the C reader would end the process, or wrap a
        # number of more than 64 bits.
        is_deep = recursive and len(data) > _DEEP_BYTES
        read = read_deep if is_deep or _may_hold_long_number(data) else read_fast
        try:
            value: Any = read(stream, parsed, None)
            text = orjson.dumps(value["value"])
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(why(error)) from None
        if left := len(data) - stream.tell():
            raise DecodeError(f"{left} bytes are left over")
        return text

    return decode


def _may_hold_long_number(data: bytes) -> bool:
    """Whether there are bytes in a row as in a number of more than 64 bits, and in no text."""
    if _LONG_NUMBER not in data.translate(_HIGH_BITS):
        return False
    for run in _LONG_RUN.finditer(data):
        try:
            run[0].decode()
        except UnicodeDecodeError:
            return True
    return False


def avro_encoder(id: int, schema: str, like: str) -> Callable[[Any], bytes]:
    """An encoder of values, each with the prefix that names the schema.

    Args:
        id: The schema's id.
        schema: The Avro schema to write by.
        like: The Avro schema that describes the values, for a check that they can be written.

    Raises:
        DecodeError: They cannot.
    """
    prefix = b"\0" + id.to_bytes(4, "big")

    def encode(value: Any) -> bytes:
        stream = io.BytesIO()
        stream.write(prefix)
        fastavro.schemaless_writer(stream, parsed, value)
        return stream.getvalue()

    try:
        parsed = fastavro.parse_schema(orjson.loads(schema))
        encode(next(generate_many(orjson.loads(like), 1)))
    except Exception as error:
        raise DecodeError(explain(error)) from None
    return encode
