"""Payload: what each kind of bytes becomes, in each format."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transforms.batch.payload import FORMATS, PayloadFormat, encode_records
from transforms.records import ARRAY, NO_TIMESTAMP, Decoded, Records

AUTO = PayloadFormat()


def _records(values, keys=None, headers=None, timestamps=None, offsets=None) -> Records:
    count = len(values)
    return Records(
        offsets or list(range(count)),
        timestamps or [1_700_000_000_000] * count,
        keys or [None] * count,
        values,
        headers or [None] * count,
    )


def _encode(value: bytes | None, format: str = "auto") -> bytes:
    """The JSON fragment of one value, cut out of its entry."""
    encoded = encode_records("t", 0, _records([value]), PayloadFormat("auto", format))
    assert not encoded.rejections
    return encoded.entries[0].split(b'"value":', 1)[1][:-2]


def _reject_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _exact(text: bytes):
    """Parse JSON so that no digit of a number is lost."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=_reject_constant)


JSON_TEXTS = [
    # Half of a surrogate pair, and numbers that no double holds.
    b'"\\ud800"',
    b'{"cut":"\\ud83d"}',
    b"1e400",
    b"9" * 400,
    b'{"a":1}',
    b"[1,2]",
    b"{}",
    b"[]",
    b"0",
    b"-1.5",
    b"true",
    b"false",
    b"null",
    b'"text"',
    b' {"a": 1}\n',
    b"\t[1]",
    b"12345678901234567890123456789012345678901234567890",
    b"0.1234567890123456789012345678901234567890",
    b"1e-400",
    b"1E5",
    b'{"id":9007199254740993,"price":10.10}',
    '{"stadt":"Köln 🌧"}'.encode(),
    b'"\\u00e9"',
    b'{"a":1,"a":2}',
]
TEXTS = [
    b"",
    b" ",
    b"abc",
    b"two words",
    b"true story",
    b"nul",
    b"{a:1}",
    b"{'a':1}",
    b'{"a":1}}',
    b'{"a":1} x',
    b"[1,]",
    b"01",
    b"+1",
    b"1.",
    b".5",
    b"0x10",
    b"NaN",
    b"[NaN]",
    b"nan",
    b"Infinity",
    b"-Infinity",
    b"2026-11-01T00:00:00Z",
    b'quo"te',
    b"back\\slash",
    b"line\nbreak",
    b"\x00\x01",
    b"100%",
    b"%d",
    b'"halb',
    "Grüße 🌧".encode(),
    "\ufeff{}".encode(),
]
NOT_UTF8 = [b"\xff", b"\x80abc", b'{"a":"\xff"}', b"\xed\xa0\x80", bytes(range(256))]


@pytest.mark.parametrize("data", JSON_TEXTS)
@pytest.mark.parametrize("format", ["auto", "json"])
def test_json_is_sent_as_the_bytes_it_is(data: bytes, format: str) -> None:
    """A value that is JSON keeps every digit and every space."""
    assert _encode(data, format) == data


@pytest.mark.parametrize("data", JSON_TEXTS + TEXTS)
def test_string_never_looks_inside(data: bytes) -> None:
    """With `string` JSON is text like any other."""
    assert json.loads(_encode(data, "string")) == data.decode()


@pytest.mark.parametrize("data", TEXTS)
def test_auto_sends_other_text_as_a_string(data: bytes) -> None:
    """What is UTF-8 but no JSON becomes a JSON string of itself."""
    assert json.loads(_encode(data)) == data.decode()


@pytest.mark.parametrize("format", ["auto", "string"])
@pytest.mark.parametrize("data", NOT_UTF8)
def test_what_is_no_text_is_sent_as_base64_and_counted(data: bytes, format: str) -> None:
    """Bytes that are not UTF-8 are base64, and the batch says how many fields were."""
    fields = PayloadFormat(format, format)
    encoded = encode_records("t", 0, _records([data], keys=[data]), fields)
    payload = json.loads(encoded.entries[0])["payload"]
    assert payload["value"] == payload["key"] == b64encode(data).decode()
    assert encoded.base64_fields == 2


@pytest.mark.parametrize("data", JSON_TEXTS + TEXTS + NOT_UTF8)
def test_base64_is_base64_whatever_it_is(data: bytes) -> None:
    """With `base64` nothing is parsed, and nothing counts as odd."""
    encoded = encode_records("t", 0, _records([data]), PayloadFormat("base64", "base64"))
    assert json.loads(encoded.entries[0])["payload"]["value"] == b64encode(data).decode()
    assert encoded.base64_fields == 0


@pytest.mark.parametrize("format", FORMATS)
def test_no_value_is_null(format: str) -> None:
    """A tombstone and a missing key are null in every format, never rejected."""
    encoded = encode_records("t", 0, _records([None]), PayloadFormat(format, format))
    payload = json.loads(encoded.entries[0])["payload"]
    assert payload["key"] is None
    assert payload["value"] is None
    assert not encoded.rejections
    assert encoded.base64_fields == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "data",
    [b"[" + b"1," * (2**19 - 1) + b"1]", b"x" * 2**20, b"\xff" * 2**20],
    ids=["json", "text", "bytes"],
)
def test_a_mebibyte_is_a_value_like_any_other(data: bytes, format: str) -> None:
    """Size changes nothing about how a value is encoded."""
    encoded = encode_records("t", 0, _records([data]), PayloadFormat("auto", format))
    value = json.loads(encoded.entries[0])["payload"]["value"]
    if format == "base64":
        assert value == b64encode(data).decode()
    elif data[:1] == b"[":
        assert value == (data.decode() if format == "string" else [1] * 2**19)
    elif data[:1] == b"x":
        assert value == data.decode()
        assert bool(encoded.rejections) == (format == "json")
    else:
        assert value == b64encode(data).decode()
        assert bool(encoded.rejections) == (format == "json")


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("data", TEXTS + NOT_UTF8)
def test_json_format_rejects_what_does_not_parse(part: str, data: bytes) -> None:
    """With `json` such a record must not be sent; its entry is there for the error record."""
    records = (
        _records([b"1", data, b"2"])
        if part == "value"
        else _records([None] * 3, keys=[b"1", data, b"2"])
    )
    format = PayloadFormat(**{part: "json"})
    encoded = encode_records("t", 0, records, format)
    assert list(encoded.rejections) == [1]
    rejection = encoded.rejections[1]
    assert (rejection.condition, rejection.error_type) == ("InvalidRecord", "InvalidJson")
    assert f"--{part}_format" in rejection.message
    assert str(len(data)) in rejection.message
    payload = json.loads(encoded.entries[1])["payload"]
    try:
        assert payload[part] == data.decode()
    except UnicodeDecodeError:
        assert payload[part] == b64encode(data).decode()
        assert encoded.base64_fields == 1


def test_what_a_schema_made_is_sent_and_the_bytes_are_not_looked_at() -> None:
    """Neither parsed, nor counted as base64, nor rejected; the others are as ever."""
    records = replace(
        _records([b"\xff", b"1", b"\xff"], keys=[b"\xff", b"\xff", None]),
        decoded=[Decoded(key=b'"k"', value=b'{"v":1}'), Decoded(value=b'{"v":2}'), None],
    )
    for format in ("auto", "json"):
        encoded = encode_records("t", 0, records, PayloadFormat(format, format))
        payloads = [json.loads(entry)["payload"] for entry in encoded.entries]
        assert [payload["value"] for payload in payloads] == [{"v": 1}, {"v": 2}, "/w=="]
        assert [payload["key"] for payload in payloads] == ["k", "/w==", None]
        assert encoded.base64_fields == 2
        assert list(encoded.rejections) == ([] if format == "auto" else [1, 2])


def test_a_rejection_shows_no_payload() -> None:
    """The message of a rejection names sizes and options, never the data."""
    encoded = encode_records("t", 0, _records([b"top secret"]), PayloadFormat("auto", "json"))
    assert "secret" not in encoded.rejections[0].message


def test_key_and_value_have_their_own_formats() -> None:
    """The key's format says nothing about the value's."""
    records = _records([b"1"], keys=[b"1"])
    encoded = encode_records("t", 0, records, PayloadFormat("string", "base64"))
    payload = json.loads(encoded.entries[0])["payload"]
    assert payload["key"] == "1"
    assert payload["value"] == "MQ=="


def test_an_entry_has_the_connector_s_fields_in_its_order() -> None:
    """Without headers an entry is byte for byte what the connector sends."""
    records = _records([b'{"x":1}'], keys=[b"k1"], timestamps=[1562844607000], offsets=[43822])
    encoded = encode_records("mytopic", 1, records, AUTO)
    assert encoded.entries == [
        b'{"payload":{"timestamp":1562844607000,"topic":"mytopic","partition":1,'
        b'"offset":43822,"key":"k1","value":{"x":1}}}'
    ]


def test_a_record_without_a_timestamp_has_null() -> None:
    """Only the records without a timestamp have null; the others keep theirs."""
    records = _records([b"1", b"2", b"3"], timestamps=[5, NO_TIMESTAMP, 0])
    encoded = encode_records("t", 0, records, AUTO)
    stamps = [json.loads(entry)["payload"]["timestamp"] for entry in encoded.entries]
    assert stamps == [5, None, 0]


@pytest.mark.parametrize("topic", ["a%b", "%d%s%%", 'qu"ote', "back\\slash", "a.b-c_d", "%"])
@pytest.mark.parametrize("with_headers", [False, True])
def test_topic_names_are_data(topic: str, with_headers: bool) -> None:
    """No character of a topic's name is taken for something else."""
    format = PayloadFormat(headers=with_headers)
    encoded = encode_records(topic, 0, _records([b"100%"], keys=[b"%d"]), format)
    payload = json.loads(encoded.entries[0])["payload"]
    assert payload["topic"] == topic
    assert payload["value"] == "100%"
    assert payload["key"] == "%d"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, []),
        ([], []),
        ([("a", b"x")], [{"key": "a", "value": "x"}]),
        (
            [("a", b"1"), ("a", b'{"b":2}'), ("a", None)],
            [
                {"key": "a", "value": 1},
                {"key": "a", "value": {"b": 2}},
                {"key": "a", "value": None},
            ],
        ),
        ([("%s", b"%s"), ('"', b"")], [{"key": "%s", "value": "%s"}, {"key": '"', "value": ""}]),
        ([("b", b"\xff")], [{"key": "b", "value": "/w=="}]),
    ],
)
def test_headers_keep_their_order_and_repeat(headers, expected) -> None:
    """With `headers` each entry lists its record's headers; names may repeat."""
    encoded = encode_records(
        "t", 0, _records([b"1"], headers=[headers]), PayloadFormat(headers=True)
    )
    assert json.loads(encoded.entries[0])["payload"]["headers"] == expected
    assert encoded.base64_fields == (1 if headers and headers[0][1] == b"\xff" else 0)


def test_headers_are_left_out_unless_asked_for() -> None:
    """By default an entry has no field for headers at all."""
    encoded = encode_records("t", 0, _records([b"1"], headers=[[("a", b"x")]]), AUTO)
    assert "headers" not in json.loads(encoded.entries[0])["payload"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner)
    ),
    max_leaves=8,
)
fields = (
    st.none()
    | st.binary(max_size=20)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10).map(str.encode)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(JSON_TEXTS + TEXTS + NOT_UTF8)
)
headers_of_one = st.none() | st.lists(st.tuples(st.text(max_size=5), fields), max_size=3)


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 5), st.integers(-1, 2**50), fields, fields, headers_of_one),
        max_size=6,
    ),
    topic=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
    partition=st.integers(0, 2**31 - 1),
    base=st.integers(0, 2**62),
    key_format=st.sampled_from(FORMATS),
    value_format=st.sampled_from(FORMATS),
    with_headers=st.booleans(),
)
@example(
    rows=[(1, -1, b"%", b'{"a":%}', [("%", b"%")])],
    topic="%",
    partition=0,
    base=0,
    key_format="json",
    value_format="json",
    with_headers=True,
)
@settings(deadline=None, max_examples=200)
def test_any_records_make_a_payload_that_says_where_they_are_from(
    rows, topic, partition, base, key_format, value_format, with_headers
) -> None:
    """A payload always parses, has one entry per record in order, and loses no digit."""
    offsets = []
    for gap, *_ in rows:
        base += gap
        offsets.append(base)
    records = Records(
        offsets,
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
        [row[4] and [(n.encode(errors="ignore").decode(), v) for n, v in row[4]] for row in rows],
    )
    format = PayloadFormat(key_format, value_format, with_headers)
    encoded = encode_records(topic, partition, records, format)
    body = ARRAY.join(encoded.entries)
    entries = _exact(body)
    assert len(entries) == len(rows)
    assert len(body) == ARRAY.payload_bytes(sum(map(len, encoded.entries)), len(encoded.entries))
    for index, entry in enumerate(entries):
        assert list(entry) == ["payload"]
        payload = entry["payload"]
        names = ["timestamp", "topic", "partition", "offset", "key", "value"]
        assert list(payload) == names + ["headers"] * with_headers
        assert payload["topic"] == topic
        assert payload["partition"] == partition
        assert payload["offset"] == offsets[index]
        stamp = records.timestamps[index]
        assert payload["timestamp"] == (None if stamp == NO_TIMESTAMP else stamp)
        if with_headers:
            assert len(payload["headers"]) == len(records.headers[index] or ())
        value = records.values[index]
        if value is None:
            assert payload["value"] is None
        elif value_format == "base64":
            assert payload["value"] == b64encode(value).decode()


@given(st.lists(st.binary(max_size=50), max_size=20))
@settings(deadline=None)
def test_payload_bytes_is_the_exact_size(entries: list[bytes]) -> None:
    """The size that batches are closed by is the size that is sent."""
    assert ARRAY.payload_bytes(sum(map(len, entries)), len(entries)) == len(ARRAY.join(entries))


@given(json_values)
@settings(deadline=None)
def test_any_json_value_arrives_as_it_was(value) -> None:
    """Whatever JSON a record holds, the function gets the same JSON."""
    text = json.dumps(value).encode()
    encoded = encode_records("t", 0, _records([text]), AUTO)
    assert _exact(encoded.entries[0])["payload"]["value"] == _exact(text)
