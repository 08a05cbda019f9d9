"""Avro: what each type becomes as JSON, and what is no data of its schema."""

from __future__ import annotations

import contextlib
import io
import json
import math
import struct
from base64 import b64encode
from itertools import count
from typing import Any

import fastavro
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from transforms.schemas.avro import avro_decoder, avro_encoder, single, unscaled
from transforms.schemas.schema import AVRO, CONNECT, STANDARD, DecodeError, SchemaText
from transforms.write.formats import error_schemas, response_schemas

PREFIX = b"\x00\x00\x00\x00\x07"


def _decode(schema: Any, data: bytes, style: str = CONNECT) -> Any:
    return json.loads(avro_decoder(SchemaText(AVRO, json.dumps(schema)), style)(PREFIX + data))


def _written(schema: Any, value: Any) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema), value)
    return stream.getvalue()


def _record(type: Any, name: str = "R", **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"name": "f", "type": type}], **more}


_POINT = _record("int", "Point", namespace="geo")
_COLOR = {"type": "enum", "name": "Color", "symbols": ["RED", "GREEN"]}
_ID = {"type": "fixed", "name": "Id", "size": 2}
_ENTRY = {
    "type": "record",
    "name": "MapEntry",
    "namespace": "io.confluent.connect.avro",
    "fields": [{"name": "key", "type": "int"}, {"name": "value", "type": "string"}],
}
_MARKED = {
    "type": "record",
    "name": "Entry",
    "connect.internal.type": "MapEntry",
    "fields": [{"name": "key", "type": ["null", "string"]}, {"name": "value", "type": "bytes"}],
}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ("null", None, None),
        ("boolean", True, True),
        ("int", -(2**31), -(2**31)),
        ("long", 2**63 - 1, 2**63 - 1),
        ("double", 0.1, 0.1),
        ("double", math.nan, "NaN"),
        ("double", -math.inf, "-Infinity"),
        ("float", 3.0, 3.0),
        ("float", 0.1, 0.1),
        ("float", math.inf, "Infinity"),
        ("string", "ä\n\u2028", "ä\n\u2028"),
        ("bytes", b"\xff\x00", "/wA="),
        ({"type": "string", "avro.java.string": "String"}, "a", "a"),
        ({"type": "long", "logicalType": "timestamp-millis"}, 5, 5),
        ({"type": "long", "logicalType": "timestamp-micros"}, 5, 5),
        ({"type": "int", "logicalType": "date"}, 20758, 20758),
        ({"type": "int", "logicalType": "time-millis"}, 1, 1),
        ({"type": "string", "logicalType": "uuid"}, "no uuid", "no uuid"),
        (
            {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2},
            b"\0\x01",
            "AQ==",
        ),
        ({**_ID, "logicalType": "decimal", "precision": 4, "scale": 2}, b"\xff\xff", "/w=="),
        (_ID, b"\x00\x01", "AAE="),
        (_COLOR, "GREEN", "GREEN"),
        ({"type": "array", "items": "bytes"}, [b"a", b""], ["YQ==", ""]),
        ({"type": "map", "values": "float"}, {"a": 0.1}, {"a": 0.1}),
        (_record(["null", "string"]), {"f": None}, {"f": None}),
        (_record(["string", "null"]), {"f": "a"}, {"f": "a"}),
        (_record(["null", "bytes"]), {"f": b"a"}, {"f": "YQ=="}),
        (_record(["null", {"type": "array", "items": "int"}]), {"f": [1]}, {"f": [1]}),
        ({"type": "array", "items": _ENTRY}, [{"key": 1, "value": "a"}], [[1, "a"]]),
        ({"type": "array", "items": _ENTRY}, [], []),
        ({"type": "array", "items": _MARKED}, [{"key": "k", "value": b"a"}], {"k": "YQ=="}),
        ({"type": "array", "items": _MARKED}, [], {}),
    ],
)
def test_each_type(schema: Any, value: Any, expected: Any) -> None:
    """As JsonConverter prints what AvroConverter makes of it."""
    raw = json.loads(json.dumps(schema))
    for part in (raw, raw.get("items", {}) if isinstance(raw, dict) else {}):
        if isinstance(part, dict):
            part.pop("logicalType", None)  # fastavro is to write what we say, not what it means
    assert _decode(schema, _written(raw, value)) == expected


UNION = ["null", "int", "string", _POINT, _COLOR, {"type": "map", "values": "long"}]
NAMES = ["int", "string", "Point", "Color", "map"]


@pytest.mark.parametrize(
    ("value", "member", "plain"),
    [
        (None, None, None),
        (5, "int", 5),
        ("a", "string", "a"),
        (("geo.Point", {"f": 1}), "Point", {"f": 1}),
        (("Color", "RED"), "Color", "RED"),
        ({"a": 1}, "map", {"a": 1}),
    ],
)
def test_a_union_of_several_types(value: Any, member: str | None, plain: Any) -> None:
    """Connect makes a struct of it with a field for each member; AWS's JSON has the value."""
    data = _written(_record(UNION), {"f": value})
    struct = dict.fromkeys(NAMES) | {member: plain} if member else None
    assert _decode(_record(UNION), data) == {"f": struct}
    assert _decode(_record(UNION), data, STANDARD) == {"f": plain}


def test_a_union_by_itself_and_of_one_type() -> None:
    """Only null and one other type are an optional value."""
    assert _decode(["int", "string"], _written(["int", "string"], 1)) == {"int": 1, "string": None}
    assert _decode(["int"], _written(["int"], 1)) == {"int": 1}
    assert _decode(["null"], _written(["null"], None)) is None


def test_members_of_the_same_name_are_told_apart() -> None:
    """By their full names; Connect refuses such a union."""
    union = [_record("int", "P", namespace="a"), _record("int", "P", namespace="b")]
    assert _decode(union, _written(union, ("b.P", {"f": 1}))) == {"a_P": None, "b_P": {"f": 1}}


def test_names_are_found_in_their_namespace() -> None:
    """Of the type around it, unless a type names its own; also inside a union of several."""
    outer = {
        "type": "record",
        "name": "Outer",
        "namespace": "shop",
        "fields": [
            {"name": "a", "type": ["int", _record("int", "Inner")]},
            {"name": "b", "type": ["string", "Inner"]},
            {"name": "c", "type": ["null", "shop.Inner", _record("string", "x.Other")]},
            {"name": "d", "type": "x.Other"},
        ],
    }
    value = {"a": {"f": 1}, "b": {"f": 2}, "c": {"f": 3}, "d": {"f": "z"}}
    written = {**value, "c": ("shop.Inner", {"f": 3})}
    assert _decode(outer, _written(outer, written)) == {
        "a": {"int": None, "Inner": {"f": 1}},
        "b": {"string": None, "Inner": {"f": 2}},
        "c": {"Inner": {"f": 3}, "Other": None},
        "d": {"f": "z"},
    }
    assert _decode(outer, _written(outer, written), STANDARD) == value


def test_a_schema_that_imports_others() -> None:
    """What is imported may import too, and is there only once."""
    inner = SchemaText(AVRO, json.dumps(_record("bytes", "Inner", namespace="a")))
    middle = SchemaText(AVRO, json.dumps(_record("a.Inner", "Middle")), (("a.Inner", inner),))
    text = {"type": "record", "name": "Outer", "fields": [
        {"name": "x", "type": ["int", "a.Inner"]}, {"name": "y", "type": "Middle"},
    ]}  # fmt: skip
    outer = SchemaText(AVRO, json.dumps(text), (("a.Inner", inner), ("Middle", middle)))
    data = PREFIX + b"\x02" + b"\x02a" + b"\x02b"
    assert json.loads(avro_decoder(outer, CONNECT)(data)) == {
        "x": {"int": None, "Inner": {"f": "YQ=="}},
        "y": {"f": {"f": "Yg=="}},
    }


NODE = {
    "type": "record",
    "name": "Node",
    "fields": [{"name": "next", "type": ["null", "Node"]}, {"name": "f", "type": "float"}],
}


def test_a_schema_that_holds_itself() -> None:
    """Structs in structs."""
    value = {"next": {"next": None, "f": 0.1}, "f": 2.0}
    assert _decode(NODE, _written(NODE, value)) == value


@pytest.mark.parametrize("depth", [300, 5_000, 1_000_000])
def test_data_that_is_nested_too_deep_is_refused(depth: int) -> None:
    """And does not take the process with it, as it would in fastavro's C reader."""
    with pytest.raises(DecodeError, match="nested too deep"):
        _decode(NODE, b"\x02" * depth + b"\x00" + bytes(4 * depth))


def test_long_data_of_a_schema_that_holds_itself() -> None:
    """It is read all the same, by the slower reader."""
    schema = {**NODE, "fields": [*NODE["fields"], {"name": "text", "type": "string"}]}
    value = {"next": {"next": None, "f": 0.5, "text": "a" * 5000}, "f": 0.1, "text": "ä"}
    assert _decode(schema, _written(schema, value)) == value


@pytest.mark.parametrize(
    ("schema", "data", "why"),
    [
        ("int", b"", "it ends too early"),
        ("string", b"\x08abc", "it ends too early"),
        ("string", b"\x02\xff", "a string is not UTF-8"),
        ("int", b"\x02\x02", "1 bytes are left over"),
        (_COLOR, b"\x08", "an index is none of its enum"),
        (["null", "int"], b"\x08", "an index is none of its enum"),
        (
            {"type": "array", "items": "int"},
            b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            "too early",
        ),
    ],
)
def test_data_that_does_not_fit(schema: Any, data: bytes, why: str) -> None:
    """A reason without what the data was."""
    with pytest.raises(DecodeError, match=why):
        _decode(schema, data)


@pytest.mark.parametrize(
    "items",
    [
        "null",
        _record("null"),
        {"type": "fixed", "name": "F", "size": 0},
        {"type": "record", "name": "E", "namespace": "a.b", "fields": []},
        _record(_record("null", "Inner"), "Outer"),
    ],
)
def test_arrays_of_nothing(items: Any) -> None:
    """Nine bytes of them could fill the memory; the schema is not used."""
    with pytest.raises(DecodeError, match="an array of items that take no bytes"):
        _decode({"type": "array", "items": items}, b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f")
    assert _decode(items, b"") in (None, "", {}, {"f": None}, {"f": {"f": None}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]x",
        "5",
        '"Unknown"',
        '{"type":"record","name":"R"}',
        '{"type":"record","name":"R","fields":[{"name":"f"}]}',
        '{"type":"enum","name":"E","symbols":5}',
        '{"type":"fixed","name":"F"}',
        '{"type":"map"}',
        '{"type":"record","name":"R","__fastavro_parsed__":true,"fields":[{"type":"x"}]}',
    ],
)
def test_what_is_no_schema(text: str) -> None:
    """One line, whatever fastavro thinks of it."""
    with pytest.raises(DecodeError) as raised:
        avro_decoder(SchemaText(AVRO, text), CONNECT)
    assert len(str(raised.value).splitlines()) == 1


# -- properties ---------------------------------------------------------------------------

_PLAIN = {
    "boolean": st.booleans(),
    "int": st.integers(-(2**31), 2**31 - 1),
    "long": st.integers(-(2**63), 2**63 - 1),
    "double": st.floats(allow_nan=False, allow_infinity=False),
    "string": st.text(),
    "bytes": st.binary(),
}


_NUMBERS = count()


@st.composite
def _typed(draw: Any, depth: int = 3) -> tuple[Any, Any, Any]:
    """A schema, a value of it, and the JSON it has to become."""
    kind = draw(
        st.sampled_from([*_PLAIN, "array", "map", "optional", "record"][: 10 if depth else 6])
    )
    if kind in _PLAIN:
        value = draw(_PLAIN[kind])
        return kind, value, b64encode(value).decode() if kind == "bytes" else value
    if kind == "record":
        parts = draw(st.lists(_typed(depth - 1), min_size=1, max_size=3))
        name = f"R{next(_NUMBERS)}"
        fields = [{"name": f"f{i}", "type": part[0]} for i, part in enumerate(parts)]
        return (
            {"type": "record", "name": name, "fields": fields},
            {f"f{i}": part[1] for i, part in enumerate(parts)},
            {f"f{i}": part[2] for i, part in enumerate(parts)},
        )
    schema, value, expected = draw(_typed(depth - 1))
    if kind == "array":
        return {"type": "array", "items": schema}, [value] * 2, [expected] * 2
    if kind == "map":
        return {"type": "map", "values": schema}, {"a": value}, {"a": expected}
    if isinstance(schema, list):
        return schema, value, expected
    is_there = draw(st.booleans())
    return ["null", schema], value if is_there else None, expected if is_there else None


@given(_typed(), st.sampled_from([CONNECT, STANDARD]))
@settings(deadline=None)
def test_what_is_written_is_what_is_read(typed: tuple[Any, Any, Any], style: str) -> None:
    """For any schema of these types and any value of it."""
    schema, value, expected = typed
    assert _decode(schema, _written(schema, value), style) == expected


@given(_typed(), st.binary(max_size=40))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(typed: tuple[Any, Any, Any], data: bytes) -> None:
    """With a reason, and never with another error."""
    decode = avro_decoder(SchemaText(AVRO, json.dumps(typed[0])), CONNECT)
    with contextlib.suppress(DecodeError):
        json.loads(decode(PREFIX + data))


@given(st.floats(width=32))
def test_a_float_keeps_its_value_and_has_no_digits_that_it_had_not(number: float) -> None:
    """As Java prints it."""
    shown = single(number)
    if isinstance(shown, str):
        assert not math.isfinite(number)
        return
    assert struct.pack("f", shown) == struct.pack("f", number)
    if not number.is_integer():
        assert len(repr(shown).strip("-").replace(".", "").split("e")[0].strip("0")) <= 9


@given(st.integers(-(2**200), 2**200), st.integers(0, 5))
def test_a_decimal_is_the_shortest_form_of_its_number(number: int, longer: int) -> None:
    """Whatever size it was written in; Java's BigInteger.toByteArray."""
    size = (number + (number < 0)).bit_length() // 8 + 1
    assume(size + longer > 0)
    shortest = number.to_bytes(size, "big", signed=True)
    written = number.to_bytes(size + longer, "big", signed=True)
    assert unscaled(written) == b64encode(shortest).decode()


# -- our own records ----------------------------------------------------------------------


def test_an_encoder_writes_what_a_decoder_reads() -> None:
    """With the id in front."""
    key, _ = response_schemas(ranges=False)
    place = {"topic": "t", "partition": 3, "offset": 2**40}
    written = avro_encoder(258, key, like=key)(place)
    assert written[:5] == b"\x00\x00\x00\x01\x02"
    assert json.loads(avro_decoder(SchemaText(AVRO, key), CONNECT)(written)) == place


def test_a_schema_that_has_come_to_have_more_fields() -> None:
    """With a default it will do; without one it is refused before anything is written."""
    _, value = error_schemas()
    newer = json.loads(value)
    newer["fields"].append({"name": "team", "type": "string", "default": "x"})
    avro_encoder(1, json.dumps(newer), like=value)
    newer["fields"][-1].pop("default")
    with pytest.raises(DecodeError):
        avro_encoder(1, json.dumps(newer), like=value)


@pytest.mark.parametrize("style", [CONNECT, STANDARD])
@pytest.mark.parametrize(
    ("schema", "data", "why"),
    [
        ("boolean", b"\x02", "a boolean is neither 0 nor 1"),
        (["null", "boolean"], b"\x02\xff", "a boolean is neither 0 nor 1"),
        (_COLOR, b"\x01", "an index is none of its enum or union"),
        (_COLOR, b"\x04", "an index is none of its enum or union"),
        (["null", "string"], b"\x01\x02a", "an index is none of its enum or union"),
        (["null", "string"], b"\x03\x02a", "an index is none of its enum or union"),
        (["null", "string"], b"\x04\x02a", "an index is none of its enum or union"),
        (["int", "string"], b"\x01\x02a", "an index is none of its enum or union"),
        ({"type": "array", "items": _COLOR}, b"\x02\x01\x00", "an index is none"),
        ({"type": "map", "values": _COLOR}, b"\x02\x02a\x01\x00", "an index is none"),
        ([_record(_COLOR), _record("Color", "S")], b"\x02\x01", "an index is none"),
        (_record(["null", "R"]), b"\x01\x00", "an index is none"),
        (_record(["null", "R"]), b"\x02" * 2_000 + b"\x01\x00", "nested too deep|an index is"),
        ("long", b"\xff" * 10 + b"\x01", "a number is too large"),
        ("long", b"\x80" * 10 + b"\x01", "a number is too large"),
    ],
)
def test_what_the_library_lets_pass(schema: Any, data: bytes, why: str, style: str) -> None:
    """An index below zero counts from the end, any byte is a boolean, and numbers wrap."""
    with pytest.raises(DecodeError, match=why):
        _decode(schema, data, style)


def test_texts_that_look_like_long_numbers() -> None:
    """Texts with only high bytes, and bytes that are no text, are read as they are."""
    for value in ("\u0436" * 50, "\u4e2d" * 500):
        assert _decode("string", _written("string", value)) == value
    data = bytes(range(128, 256)) * 2
    assert _decode("bytes", _written("bytes", data)) == b64encode(data).decode()
