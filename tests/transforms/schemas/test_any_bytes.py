"""Bytes of any kind under schemas of each format: JSON, or why not in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import fastavro
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from tests.transforms.schemas.test_schema_json import ORDER
from tests.transforms.schemas.test_schema_protobuf import ORDERS
from transforms.decode.decode import Reader, decode_column, make_reader
from transforms.schemas.protobuf import _load
from transforms.schemas.schema import AVRO, CONNECT, JSON, PROTOBUF, STANDARD, SchemaText

PREFIX = b"\x00\x00\x00\x00\x07"

_NODE: Any = {
    "type": "record",
    "name": "Node",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "name", "type": ["null", "string"]},
        {"name": "color", "type": {"type": "enum", "name": "Color", "symbols": ["RED", "BLUE"]}},
        {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 2}},
        {"name": "tags", "type": {"type": "map", "values": ["int", "boolean", "bytes"]}},
        {"name": "rates", "type": {"type": "array", "items": "double"}},
        {"name": "rate", "type": "float"},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "uuid", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "next", "type": ["null", "Node"]},
    ],
}
_NODES = st.recursive(st.none(), lambda inner: st.builds(dict, next=inner), max_leaves=4)


def _avro(following: Any) -> bytes:
    """A record of all types, and those that follow it."""
    node = None
    depth = 0
    while following:
        depth, following = depth + 1, following["next"]
    for id in range(depth + 1):
        node = {
            "id": id,
            "name": "x" * id or None,
            "color": "BLUE",
            "hash": b"\xff\x00",
            "tags": {"a": 1, "b": True, "c": b"\x80"},
            "rates": [0.5, float("nan")],
            "rate": 0.1,
            "price": b"\x01\x02",
            "at": 1,
            "day": 2,
            "uuid": "no uuid",
            "next": node,
        }
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, _without_logical_types(), node)
    return stream.getvalue()


@cache
def _without_logical_types() -> Any:
    """What is written is what the bytes are, whatever they mean."""
    plain = json.loads(json.dumps(_NODE))
    for field in plain["fields"]:
        if isinstance(field["type"], dict) and "logicalType" in field["type"]:
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(plain)


@cache
def _order() -> Any:
    pool, _, _ = _load(SchemaText(PROTOBUF, ORDERS))
    return GetMessageClass(pool.FindMessageTypeByName("shop.Order"))


def _protobuf(following: Any) -> bytes:
    """A message with each kind of field, and those in it."""
    order = _order()(
        id=-1,
        customer="\u00e9",
        amount=float("inf"),
        rate=0.1,
        paid=True,
        token=b"\xff",
        big=2**64 - 1,
        state=1,
        numbers=[1, -1],
        items={"a": {"name": "b"}},
        names={1: "x"},
        note="",
        cash=5,
        at={"seconds": 1, "nanos": 5},
        day={"year": 2026, "month": 11, "day": 27},
        time={"hours": 1},
        limit={"value": 7},
    )
    if following:
        order.parent.ParseFromString(_protobuf(following["next"])[1:])
    return b"\x00" + bytes(order.SerializeToString())


def _json(following: Any) -> bytes:
    order: dict[str, Any] = {"id": 1, "note": "ab\u00e9", "x": [1e3, None]}
    if following:
        order["next"] = json.loads(_json(following["next"]))
    return json.dumps(order).encode()


_SCHEMAS = {
    AVRO: (lambda: json.dumps(_NODE), _avro),
    PROTOBUF: (lambda: ORDERS, _protobuf),
    JSON: (lambda: json.dumps(ORDER), _json),
}


@cache
def _reader(format: str, style: str) -> Reader:
    text: Callable[[], str] = _SCHEMAS[format][0]
    return make_reader(7, SchemaText(format, text()), style)


@st.composite
def _mutated(draw: st.DrawFn, written: bytes) -> bytes:
    """Bytes of a record, some of them cut out, repeated, or others."""
    data = written
    for _ in range(draw(st.integers(0, 4))):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]))
        if kind == "replace" and start < len(data):
            end = start + 1
        other = draw(st.binary(max_size=6)) if kind in ("replace", "insert") else b""
        if kind == "insert":
            end = start
        if kind == "repeat":
            other = data[start:end] * 2
        data = data[:start] + other + (b"" if kind == "cut" else data[end:])
    return data


def _read_or_refused(format: str, style: str, data: bytes) -> bool:
    """Whether it is read; if not, there is a reason of one line."""
    (decoded,), rejections = decode_column("value", [data], lambda id: _reader(format, style))
    if decoded is None:
        assert len(rejections[0].message.splitlines()) == 1
        return False
    assert not rejections
    json.loads(decoded[0])
    return True


_STYLES = st.sampled_from([CONNECT, STANDARD])
_ANY = st.binary(max_size=60)


def _records(write: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    whole = _NODES.map(write).flatmap(_mutated).map(lambda data: PREFIX + data)
    return whole | _ANY.map(lambda data: PREFIX + data) | _ANY


def test_what_is_changed_was_right() -> None:
    """Each record is one of its schema before anything is changed in it."""
    for format, (_, write) in _SCHEMAS.items():
        for style in (CONNECT, STANDARD):
            for following in (None, {"next": {"next": None}}):
                assert _read_or_refused(format, style, PREFIX + write(following))


@given(_records(_avro), _STYLES)
@examples(100)
def test_any_avro(data: bytes, style: str) -> None:
    _read_or_refused(AVRO, style, data)


@given(_records(_protobuf), _STYLES)
@examples(100)
def test_any_protobuf(data: bytes, style: str) -> None:
    _read_or_refused(PROTOBUF, style, data)


@given(_records(_json), _STYLES)
@examples(100)
def test_any_json(data: bytes, style: str) -> None:
    _read_or_refused(JSON, style, data)
