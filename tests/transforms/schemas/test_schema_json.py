"""JSON Schema: what fits goes on as the bytes it is, what does not is named by the rule."""

from __future__ import annotations

import json
from typing import Any

import pytest

from transforms.schemas.json_schema import json_decoder
from transforms.schemas.schema import JSON, DecodeError, SchemaText

PREFIX = b"\x00\x00\x00\x00\x07"

ORDER = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "integer"}, "note": {"maxLength": 3}},
}


def _decode(schema: Any, data: bytes, *references: tuple[str, SchemaText]) -> bytes:
    return json_decoder(SchemaText(JSON, json.dumps(schema), references))(PREFIX + data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"id":1}',
        b' {"id" : 1.0, "more": 1e300 }\n',
        b'{"id":123456789012345678901234567890}',
        b'{"id":1e400,"note":"\\ud83d"}',
        b'{"id":' + b"9" * 400 + b"}",
    ],
)
def test_what_fits_stays_as_it_is(data: bytes) -> None:
    """Not a digit is lost and nothing is added."""
    assert _decode(ORDER, data) == data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b'{"id":NaN}', "it is not JSON"),
        (b"\xff", "it is not JSON"),
        (b"{}", "required of the schema does not hold"),
        (b'{"id":"secret"}', "properties/id/type of the schema does not hold"),
        (b'{"id":1,"note":"secret"}', "properties/note/maxLength of the schema does not hold"),
        (b"5", "type of the schema does not hold"),
    ],
)
def test_what_does_not_fit(data: bytes, why: str) -> None:
    """The rule is named by its place in the schema; the record is not quoted."""
    with pytest.raises(DecodeError) as raised:
        _decode(ORDER, data)
    assert str(raised.value) == why


def test_references() -> None:
    """By the names the schema uses; they may go round in circles."""
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "node.json"}, "x": {"type": "string"}},
    }
    reference = ("node.json", SchemaText(JSON, json.dumps(node)))
    schema = {"properties": {"a": {"$ref": "node.json"}}}
    assert _decode(schema, b'{"a":{"next":{"x":"y"}}}', reference)
    with pytest.raises(DecodeError, match="x/type of the schema does not hold"):
        _decode(schema, b'{"a":{"next":{"x":5}}}', reference)


def test_a_schema_names_its_draft() -> None:
    """And without one it is draft 7, as with Confluent."""
    exclusive = {"exclusiveMinimum": True, "minimum": 5}
    draft4 = {"$schema": "http://json-schema.org/draft-04/schema#", **exclusive}
    with pytest.raises(DecodeError, match="inimum"):
        _decode(draft4, b"5")
    assert _decode({"prefixItems": [{"type": "string"}]}, b"[1]")
    newest = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    with pytest.raises(DecodeError, match="prefixItems/0/type"):
        _decode({**newest, "prefixItems": [{"type": "string"}]}, b"[1]")


def test_json_that_is_nested_deep() -> None:
    """It is read or refused, and the process lives."""
    schema = {"properties": {"a": {"$ref": "#"}}}
    for depth in (200, 1_000, 100_000):
        data = b'{"a":' * depth + b"1" + b"}" * depth
        try:
            assert _decode(schema, data) == data
        except DecodeError:
            assert depth > 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        '{"type":"nothing"}',
        '{"$ref":"other.json"}',
        '{"$ref":"http://127.0.0.1:9/other.json"}',
        '{"pattern":"("}',
        '{"pattern":"[a"}',
        '{"pattern":"*"}',
    ],
)
def test_what_is_no_schema(text: str) -> None:
    """Also a schema that names what it did not bring; nothing is fetched for it."""
    with pytest.raises(DecodeError) as raised:
        json_decoder(SchemaText(JSON, text))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ({"pattern": r"^[\w-.]+@[\w-]+$"}, "a.b-c@example", "a b@example"),
        ({"pattern": r"^[\d-x]$"}, "-", "y"),
        ({"pattern": r"^a\hb$"}, "a\u00a0b", "aab"),
        ({"pattern": r"^[\h,]$"}, "\t", "h"),
        ({"pattern": r"\Aa\z"}, "a", "ba"),
        ({"pattern": r"^\Qa.b\E$"}, "a.b", "axb"),
        ({"pattern": r"(?i)^abc$"}, "ABC", None),
        ({"pattern": r"^a++$"}, "aa", None),
        ({"pattern": r"^\p{javaLowerCase}$"}, "a", None),
        (
            {"properties": {"pattern": {"enum": [{"pattern": "\\h"}]}}},
            {"pattern": {"pattern": "\\h"}},
            {"pattern": {"pattern": "h"}},
        ),
        ({"properties": {"default": {"pattern": r"^[\w-.]$"}}}, {"default": "."}, {"default": "("}),
        (
            {"patternProperties": {r"^[\w-.]$": {"type": "string"}}, "additionalProperties": False},
            {".": "x"},
            {"(": "x"},
        ),
        ({"patternProperties": {r"(?i)^x": {}}, "additionalProperties": False}, {"X": "x"}, None),
        ({"$schema": "https://example.com/our-meta-schema", "type": "object"}, {}, 5),
        ({"$schema": "", "type": "object"}, {}, 5),
        ({"$schema": None, "type": "object"}, {}, 5),
        (
            {
                "$schema": "http://json-schema.org/draft-03/schema#",
                "properties": {
                    "a": {"required": True, "divisibleBy": 2},
                    "b": {"type": "any"},
                    "c": {"type": ["string", {"type": "null"}]},
                },
            },
            {"a": 4, "b": 1, "c": None},
            {"b": 1},
        ),
        (
            {
                "$schema": "http://json-schema.org/draft-03/schema",
                "disallow": "string",
                "extends": {"type": ["number", "string"]},
            },
            5,
            "x",
        ),
    ],
)
def test_what_the_tools_of_producers_take(schema: Any, fits: Any, does_not: Any) -> None:
    """Patterns of Java's, schemas of no draft that is known, and of draft 3."""
    data = json.dumps(fits).encode()
    assert _decode(schema, data) == data
    if does_not is not None:
        with pytest.raises(DecodeError, match="of the schema does not hold"):
            _decode(schema, json.dumps(does_not).encode())


def test_a_pattern_that_is_not_checked_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Once, when the schema is read."""
    assert _decode({"pattern": r"(?i)^abc$"}, b'"x"')
    assert [record.getMessage() for record in caplog.records] == [
        "a JSON Schema has the pattern '(?i)^abc$', which only Java can check"
    ]


@pytest.mark.parametrize("id", ["https://example.com/schemas/order.json", "order.json", "/a/b/"])
def test_references_beside_an_id(id: str) -> None:
    """A name of a reference is one beside the schema's own, wherever that is."""
    item = SchemaText(
        JSON,
        '{"$schema":"https://example.com/x","properties":{"x":{"$ref":"x.json"}}}',
        (("x.json", SchemaText(JSON, '{"type":"string"}')),),
    )
    schema = {"$id": id, "properties": {"item": {"$ref": "item.json"}, "x": {"$ref": "x.json#"}}}
    assert _decode(schema, b'{"item":{"x":"y"}}', ("item.json", item))
    with pytest.raises(DecodeError, match="type of the schema does not hold"):
        _decode(schema, b'{"item":{"x":5}}', ("item.json", item))
