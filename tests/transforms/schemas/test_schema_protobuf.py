"""Protobuf: what each kind of field becomes as JSON, and what is no message of its schema."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.schemas.protobuf import _load, message_indexes, protobuf_decoder
from transforms.schemas.schema import CONNECT, PROTOBUF, STANDARD, DecodeError, SchemaText

PREFIX = b"\x00\x00\x00\x00\x07"

ORDERS = """
syntax = "proto3";
package shop;
import "google/protobuf/timestamp.proto";
import "google/protobuf/wrappers.proto";
import "google/type/date.proto";
import "google/type/timeofday.proto";
import "confluent/meta.proto";
message Order {
  int64 id = 1;
  string customer = 2;
  double amount = 3;
  float rate = 4;
  bool paid = 5;
  bytes token = 6;
  uint64 big = 7;
  State state = 8;
  repeated int32 numbers = 9;
  map<string, Item> items = 10;
  map<int32, string> names = 11;
  Item item = 12;
  optional string note = 13;
  oneof payment { string card = 14; int32 cash = 15; }
  google.protobuf.Timestamp at = 16;
  google.type.Date day = 17;
  google.type.TimeOfDay time = 18;
  google.protobuf.Int64Value limit = 19;
  Order parent = 20;
  enum State { NEW = 0; SENT = 1; }
  message Item { string name = 1; }
}
message Other { sint32 x = 1; }
"""

NOTHING: dict[str, Any] = {
    "payment_0": None,
    "id": 0,
    "customer": "",
    "amount": 0.0,
    "rate": 0.0,
    "paid": False,
    "token": "",
    "big": 0,
    "state": "NEW",
    "numbers": [],
    "items": {},
    "names": [],
    "item": None,
    "note": None,
    "at": None,
    "day": None,
    "time": None,
    "limit": None,
    "parent": None,
}


@pytest.fixture(scope="module")
def orders() -> SchemaText:
    """The schema as a registry of Confluent's hands it out."""
    _, file, _ = _load(SchemaText(PROTOBUF, ORDERS))
    return SchemaText(PROTOBUF, base64.b64encode(file.SerializeToString()).decode())


def _message(schema: SchemaText, name: str = "shop.Order") -> Any:
    pool, _, _ = _load(schema)
    return GetMessageClass(pool.FindMessageTypeByName(name))()


def _decode(schema: SchemaText, data: bytes, style: str = CONNECT) -> Any:
    return json.loads(protobuf_decoder(schema, style)(PREFIX + data))


def test_what_is_not_set(orders: SchemaText) -> None:
    """Scalars have their zero, as in Connect; messages and optional fields are null."""
    assert _decode(orders, b"\x00") == NOTHING
    assert _decode(orders, b"\x00", STANDARD) == {}


@pytest.mark.parametrize(
    ("set", "connect", "standard"),
    [
        ({"id": 2**62}, {"id": 2**62}, {"id": str(2**62)}),
        ({"big": 2**64 - 1}, {"big": 2**64 - 1}, {"big": str(2**64 - 1)}),
        ({"rate": 0.1}, {"rate": 0.1}, {"rate": 0.1}),
        ({"amount": float("nan")}, {"amount": "NaN"}, {"amount": "NaN"}),
        ({"amount": float("-inf")}, {"amount": "-Infinity"}, {"amount": "-Infinity"}),
        ({"token": b"\xff"}, {"token": "/w=="}, {"token": "/w=="}),
        ({"state": 1}, {"state": "SENT"}, {"state": "SENT"}),
        ({"state": 7}, {"state": "UNKNOWN_ENUM_VALUE_State_7"}, {"state": 7}),
        ({"numbers": [1, -1]}, {"numbers": [1, -1]}, {"numbers": [1, -1]}),
        (
            {"names": {2: "b", 1: "a"}},
            {"names": [[1, "a"], [2, "b"]]},
            {"names": {"1": "a", "2": "b"}},
        ),
        ({"item": {"name": "x"}}, {"item": {"name": "x"}}, {"item": {"name": "x"}}),
        ({"note": ""}, {"note": ""}, {"note": ""}),
        ({"cash": 0}, {"payment_0": {"card": None, "cash": 0}}, {"cash": 0}),
        ({"card": "a"}, {"payment_0": {"card": "a", "cash": None}}, {"card": "a"}),
        (
            {"at": {"seconds": -1, "nanos": 5_999_999}},
            {"at": -995},
            {"at": "1969-12-31T23:59:59.005999999Z"},
        ),
        (
            {"day": {"year": 2026, "month": 11, "day": 1}},
            {"day": 20758},
            {"day": {"year": 2026, "month": 11, "day": 1}},
        ),
        (
            {"time": {"hours": 1, "nanos": 2_000_000}},
            {"time": 3_600_002},
            {"time": {"hours": 1, "nanos": 2_000_000}},
        ),
        ({"limit": {"value": 5}}, {"limit": {"value": 5}}, {"limit": "5"}),
        ({"parent": {"id": 3}}, {"parent": {**NOTHING, "id": 3}}, {"parent": {"id": "3"}}),
    ],
)
def test_each_kind_of_field(
    orders: SchemaText, set: dict[str, Any], connect: dict[str, Any], standard: dict[str, Any]
) -> None:
    """As JsonConverter prints what ProtobufConverter makes of it; and as Protobuf's own JSON."""
    message = type(_message(orders))(**set)
    data = b"\x00" + message.SerializeToString()
    assert _decode(orders, data) == NOTHING | connect
    assert _decode(orders, data, STANDARD) == standard


def test_a_map_of_messages(orders: SchemaText) -> None:
    """Keys that are strings make an object, in the order of the keys."""
    message = _message(orders)
    message.items["b"].name = "x"
    message.items["a"].name = "y"
    data = b"\x00" + message.SerializeToString()
    assert list(_decode(orders, data)["items"].items()) == [
        ("a", {"name": "y"}),
        ("b", {"name": "x"}),
    ]


@pytest.mark.parametrize(
    ("indexes", "path", "expected"),
    [
        (b"\x00", (0,), NOTHING),
        (b"\x02\x00", (0,), NOTHING),
        (b"\x02\x02", (1,), {"x": 0}),
        (b"\x04\x00\x00", (0, 0), None),
        (b"\x04\x00\x02", (0, 1), None),
        (b"\x04\x00\x04", (0, 2), {"name": ""}),
    ],
)
def test_which_message_a_record_is(
    orders: SchemaText, indexes: bytes, path: tuple[int, ...], expected: Any
) -> None:
    """By its place in the schema, which one zero stands for if it is the first."""
    assert message_indexes(PREFIX + indexes + b"rest") == (path, 5 + len(indexes))
    if expected is not None:
        assert _decode(orders, indexes) == expected


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "message indexes are cut off"),
        (b"\x80", "message indexes are cut off"),
        (b"\xff" * 4, "message indexes are cut off"),
        (b"\xff" * 11, "no numbers of 32 bits"),
        (b"\x02", "message indexes are none"),
        (b"\x01", "message indexes are none"),
        (b"\x02\x01", "message indexes are none"),
        (b"\x02\x10", "no message at its message indexes"),
        (b"\x08\x00\x00\x00\x00", "no message at its message indexes"),
        (b"\x00\xff", "it is no message"),
        (b"\x00\x12\x01\xff", "it is no message"),
        (b"\x00\x12\x05ab", "it is no message"),
        (b"\x00\x8a\x01\x02\x08\x01", "ValueError"),
    ],
)
def test_data_that_does_not_fit(orders: SchemaText, data: bytes, why: str) -> None:
    """A reason without what the data was: no indexes, no such message, not UTF-8, no such day."""
    with pytest.raises(DecodeError, match=why):
        _decode(orders, data)


def test_messages_that_are_nested_too_deep(orders: SchemaText) -> None:
    """Protobuf itself refuses them."""
    data = b""
    for _ in range(200):
        data = b"\xa2\x01" + _varint(len(data)) + data
    with pytest.raises(DecodeError, match="it is no message"):
        _decode(orders, b"\x00" + data)


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


@given(st.binary(max_size=60), st.sampled_from([CONNECT, STANDARD]))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, style: str) -> None:
    """With a reason, and never with another error."""
    file = FileDescriptorProto(name="x", syntax="proto3")
    message = file.message_type.add(name="M")
    for number, type in enumerate((3, 9, 12, 1, 2, 8, 13), 1):
        message.field.add(name=f"f{number}", number=number, type=type, label=1 + 2 * (number % 2))
    schema = SchemaText(PROTOBUF, base64.b64encode(file.SerializeToString()).decode())
    with contextlib.suppress(DecodeError):
        json.loads(protobuf_decoder(schema, style)(PREFIX + data))


def test_a_wrapper_by_itself_is_its_value() -> None:
    """Connect's wrapper.for.raw.primitives, which is on by default."""
    text = 'syntax = "proto3"; package google.protobuf; message StringValue { string value = 1; }'
    assert _decode(SchemaText(PROTOBUF, text), b"\x00\x0a\x01a") == "a"


def test_proto2() -> None:
    """An optional field that is not set is null, whatever its default; groups are messages."""
    text = """
    syntax = "proto2";
    message M {
      required int32 a = 1;
      optional int32 b = 2 [default = 5];
      repeated group G = 3 { optional string c = 4; }
    }
    """
    assert _decode(SchemaText(PROTOBUF, text), b"\x00\x08\x01\x1b\x1c") == {
        "a": 1,
        "b": None,
        "g": [{"c": None}],
    }


@pytest.mark.parametrize("encoded", [True, False])
def test_a_schema_that_imports_others(encoded: bool) -> None:
    """As text, as descriptors, and as both."""
    item = SchemaText(PROTOBUF, 'syntax = "proto3"; package a; message Item { int32 x = 1; }')
    if encoded:
        file = _load(item)[1]
        item = SchemaText(PROTOBUF, base64.b64encode(file.SerializeToString()).decode())
    pair = SchemaText(
        PROTOBUF,
        'syntax = "proto3"; package a; import "shared/item.proto"; message Pair { Item b = 1; }',
        (("shared/item.proto", item),),
    )
    order = SchemaText(
        PROTOBUF,
        'syntax = "proto3"; import "pair.proto"; import "shared/item.proto"; '
        "message Order { a.Pair p = 1; a.Item i = 2; }",
        (("pair.proto", pair), ("shared/item.proto", item)),
    )
    assert _decode(order, b"\x00\x0a\x04\x0a\x02\x08\x05\x12\x02\x08\x06") == {
        "p": {"b": {"x": 5}},
        "i": {"x": 6},
    }


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("%%%", "the schema:1:1"),
        ('syntax = "proto3"; message M { Nowhere a = 1; }', "Nowhere"),
        ('syntax = "proto3"; import "other.proto";', "imports other.proto, which is not among"),
        ('syntax = "proto3"; import "google/protobuf/none.proto";', "imports google/protobuf/none"),
        ('syntax = "proto3"; import "../../etc/passwd";', "which is not among"),
        ("AAAA", "DecodeError"),
    ],
)
def test_what_is_no_schema(text: str, why: str) -> None:
    """One line that says what is wrong with it."""
    with pytest.raises(DecodeError, match=why) as raised:
        protobuf_decoder(SchemaText(PROTOBUF, text), CONNECT)
    assert len(str(raised.value).splitlines()) == 1
    assert "/tmp" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../x.proto",
        "/etc/x.proto",
        "--python_out=.",
        "@x.proto",
        "a\nb.proto",
        "x",
        "0.proto",
        "",
    ],
)
@pytest.mark.parametrize("quote", ['"', "'"])
def test_names_of_the_registry_are_no_paths_and_no_arguments(name: str, quote: str) -> None:
    """What a schema imports is found by any name, and comments and defaults are no imports."""
    item = SchemaText(PROTOBUF, 'syntax = "proto3"; package a; message Item { int32 x = 1; }')
    text = f"""
        syntax = "proto2"; // import "comment.proto";
        /* import "other.proto"; */ import /* this */ public {quote}{name}{quote};
        message M {{ required a.Item i = 1; optional string import = 2 [default = "import"]; }}
    """
    if "\n" in name:
        with pytest.raises(DecodeError, match="no Protobuf schema"):
            protobuf_decoder(SchemaText(PROTOBUF, text, ((name, item),)), CONNECT)
    else:
        decoded = _decode(SchemaText(PROTOBUF, text, ((name, item),)), b"\x00\x0a\x02\x08\x05")
        assert decoded == {"i": {"x": 5}, "import": None}


def test_names_of_the_registry_run_nothing(tmp_path: Path) -> None:
    """Not as options of the compiler, with or without an import of them."""
    nothing = SchemaText(PROTOBUF, 'syntax = "proto3";')
    names = (
        "--plugin=protoc-gen-x=/bin/sh",
        f"--x_out={tmp_path}",
        f"--python_out={tmp_path}",
        f"a\ntouch {tmp_path}/flag\nexit 0\n.proto",
    )
    text = 'syntax = "proto3"; message M { string a = 1; }'
    schema = SchemaText(PROTOBUF, text, tuple((name, nothing) for name in names))
    assert _decode(schema, b"\x00\x0a\x01a") == {"a": "a"}
    assert not list(tmp_path.iterdir())


def test_the_compiler_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes longer is no schema that can be used."""
    monkeypatch.setattr("transforms.schemas.protobuf._COMPILER_SECS", 0.001)
    with pytest.raises(DecodeError, match="to compile it takes over"):
        protobuf_decoder(SchemaText(PROTOBUF, ORDERS), CONNECT)


def _any(type: str, value: bytes) -> bytes:
    field = b"\x0a" + bytes([len(type)]) + type.encode() + b"\x12" + bytes([len(value)]) + value
    return b"\x00\x0a" + bytes([len(field)]) + field


@pytest.mark.parametrize("style", [CONNECT, STANDARD])
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0a\x01a", "a required field is missing"),
        (b"\x0a\x02\xff\xfe\x10\x01", "a string is not UTF-8"),
        (b"\x10\x01\x1a\x01\xff", "a string is not UTF-8"),
        (b"\x10\x01\x22\x04\x0a\x02\x10\x01\x22\x02\x0a\x00", "a required field is missing"),
        (b"\x10\x01\x22\x05\x0a\x01\xff\x10\x01", "a string is not UTF-8"),
        (b"\x10\x01\x2a\x05\x0a\x01\xff\x12\x00", "a string is not UTF-8"),
        (b"\x10\x01\x2a\x05\x0a\x00\x12\x01\xff", "a string is not UTF-8"),
        (b"\x10\x01\x32\x04\x0a\x00\x12\x00", "a required field is missing"),
    ],
)
def test_what_the_library_lets_pass(data: bytes, why: str, style: str) -> None:
    """Messages of proto2 have required fields, and strings that nobody has looked at."""
    text = """
    syntax = "proto2";
    message M {
      optional string s = 1;
      required int32 need = 2;
      repeated string many = 3;
      repeated M within = 4;
      map<string, string> map = 5;
      map<string, M> messages = 6;
    }
    """
    with pytest.raises(DecodeError, match=why):
        _decode(SchemaText(PROTOBUF, text), b"\x00" + data, style)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_any("type.googleapis.com/p.Unknown", b"x"), "a type that the schema does not have"),
        (_any("type.googleapis.com/M", b"x"), "no message of its type"),
    ],
)
def test_what_an_any_holds(data: bytes, why: str) -> None:
    """Protobuf's own JSON shows the message inside, so it has to be one."""
    text = 'syntax = "proto3"; import "google/protobuf/any.proto"; '
    schema = SchemaText(PROTOBUF, text + "message M { google.protobuf.Any a = 1; }")
    with pytest.raises(DecodeError, match=why):
        _decode(schema, data, STANDARD)
    assert set(_decode(schema, data)["a"]) == {"type_url", "value"}


def test_text_needs_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is an extra; whoever needs it is told so (see `transforms.decode.decode`)."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError):
        protobuf_decoder(SchemaText(PROTOBUF, ORDERS), CONNECT)
