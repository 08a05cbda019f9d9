"""Formats: what is written for an answer and for a failure, byte for byte."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.batch.payload import PayloadFormat, encode_records
from transforms.names import TEXTS, joined
from transforms.original import ORIGINAL_HEADER, decode_original, encode_originals
from transforms.records import ARRAY, NO_TIMESTAMP, Failure, Records
from transforms.write.formats import (
    FORMATS,
    AvroEncoders,
    error_facts,
    error_records,
    error_value,
    least_error_record,
    range_key,
    response_keys,
    response_schemas,
    response_values,
)

ODD_TOPICS = ["t", "a.b-c_d", "100%", "%d%%", 'qu"ote']


def _records(offsets, values=None, keys=None, headers=None, timestamps=None) -> Records:
    count = len(offsets)
    return Records(
        offsets,
        timestamps or [1_562_844_607_000] * count,
        keys or [b"k"] * count,
        values or [b"%d" % offset for offset in offsets],
        headers or [None] * count,
    )


def _failure(records: Records, **more) -> Failure:
    facts = {
        "condition": "RetryAttemptsExhausted",
        "error_type": "ValueError",
        "message": "bad",
        "attempts": 3,
        "status_code": 200,
        "function_error": "Unhandled",
        "log_result": "bG9n",
        "payload": '{"errorMessage":"bad"}',
        "executed_version": "7",
        "request_id": "r-1",
    }
    entries = encode_records("t", 0, records, PayloadFormat()).entries
    return Failure(records=records, entries=entries, **(facts | more))


def _only(failure: Failure, format: str = "json", max_bytes: int = 1_000_000):
    ((part, record),) = error_records("t", 0, failure, "f", format, max_bytes)
    assert part is failure
    return record


def _originals(record) -> list[dict]:
    return [decode_original(value) for name, value in record.headers if name == ORIGINAL_HEADER]


# -- responses ----------------------------------------------------------------------------


@pytest.mark.parametrize("topic", ODD_TOPICS)
def test_response_keys_as_json(topic: str) -> None:
    """A response's key is where the answered record stands."""
    keys = response_keys(topic, 3, [0, 2**62], "json")
    assert [json.loads(key) for key in keys] == [
        {"topic": topic, "partition": 3, "offset": 0},
        {"topic": topic, "partition": 3, "offset": 2**62},
    ]


def test_response_keys_are_always_the_same_bytes() -> None:
    """Compaction compares bytes, so the key of a record is compact and its fields in one order."""
    assert response_keys("t", 3, [5], "json") == [b'{"topic":"t","partition":3,"offset":5}']


@pytest.mark.parametrize("topic", ODD_TOPICS)
def test_response_keys_as_text(topic: str) -> None:
    """As Connect prints a struct."""
    expected = f"Struct{{topic={topic},partition=3,offset=7}}".encode()
    assert response_keys(topic, 3, [7], "string") == [expected]


@pytest.mark.parametrize("topic", ODD_TOPICS)
def test_response_keys_with_a_schema(topic: str) -> None:
    """Connect's envelope: the schema, and the same key as its payload."""
    (key,) = response_keys(topic, 3, [7], "json_schema")
    assert json.loads(key) == {
        "schema": {
            "type": "struct",
            "fields": [
                {"type": "string", "optional": False, "field": "topic"},
                {"type": "int32", "optional": False, "field": "partition"},
                {"type": "int64", "optional": False, "field": "offset"},
            ],
            "optional": False,
        },
        "payload": {"topic": topic, "partition": 3, "offset": 7},
    }


@pytest.mark.parametrize("format", ["json", "string"])
def test_response_values_are_what_the_function_returned(format: str) -> None:
    """The entry's payload goes out as it came, digit for digit."""
    results = [b'{"offset":0,"result":12345678901234567890}', "ü".encode()]
    assert list(response_values(results, format)) == results


def test_response_values_with_a_schema() -> None:
    """The payload is text to Connect: a string in an envelope."""
    result = '{"result":"Grüße \\" 12345678901234567890"}'
    (value,) = response_values([result.encode()], "json_schema")
    assert json.loads(value) == {
        "schema": {"type": "string", "optional": False},
        "payload": result,
    }


def test_a_reply_of_any_bytes_fits_into_a_schema() -> None:
    """A whole reply need not be text; in the envelope it has to be."""
    (value,) = response_values([b"\xff{"], "json_schema")
    assert json.loads(value)["payload"] == "\ufffd{"
    assert list(response_values([b"\xff{"], "json")) == [b"\xff{"]


@pytest.mark.parametrize("format", FORMATS)
def test_no_responses_no_keys(format: str) -> None:
    """Nothing in, nothing out."""
    assert response_keys("t", 0, [], format) == []
    assert list(response_values([], format)) == []


# -- errors -------------------------------------------------------------------------------

ERROR_KEY_SCHEMA = {
    "type": "struct",
    "fields": [
        {"type": "string", "optional": False, "field": "topic"},
        {"type": "int32", "optional": False, "field": "partition"},
        {"type": "int64", "optional": False, "field": "startOffset"},
        {"type": "int64", "optional": False, "field": "endOffset"},
    ],
    "optional": False,
}
ERROR_VALUE_SCHEMA = {
    "type": "struct",
    "fields": [
        {"type": "string", "optional": False, "field": "functionName"},
        {"type": "string", "optional": True, "field": "inputPayload"},
        {"type": "int32", "optional": False, "field": "statusCode"},
        {"type": "string", "optional": True, "field": "functionError"},
        {"type": "string", "optional": True, "field": "logResult"},
        {"type": "string", "optional": True, "field": "payload"},
        {"type": "string", "optional": True, "field": "executedVersion"},
    ],
    "optional": False,
}
ERROR_VALUE = {
    "functionName": "f",
    "inputPayload": "[1]",
    "statusCode": 200,
    "functionError": "Unhandled",
    "logResult": "bG9n",
    "payload": '{"errorMessage":"bad"}',
    "executedVersion": "7",
}


@pytest.mark.parametrize("topic", ODD_TOPICS)
def test_range_keys(topic: str) -> None:
    """An error's key is the range that failed, its end exclusive, in all three formats."""
    fields = {"topic": topic, "partition": 3, "startOffset": 5, "endOffset": 9}
    assert json.loads(range_key(topic, 3, 5, 9, "json")) == fields
    assert json.loads(range_key(topic, 3, 5, 9, "json_schema")) == {
        "schema": ERROR_KEY_SCHEMA,
        "payload": fields,
    }
    expected = f"Struct{{topic={topic},partition=3,startOffset=5,endOffset=9}}"
    assert range_key(topic, 3, 5, 9, "string") == expected.encode()


@pytest.mark.parametrize("digits", [1, 20, 56, 129])
def test_keys_with_numbers_that_are_texts(digits: int) -> None:
    """A stream's numbers, whatever their length: as texts, and both ends of a range are records."""
    number = 10**digits - 2
    at, behind = joined(number, 0), joined(number + 1, 0) + 1
    one = {"topic": "s", "partition": 3, "offset": str(number)}
    ends = {"firstOffset": str(number), "lastOffset": str(number + 1)}
    both = {"topic": "s", "partition": 3, **ends}
    for format in ("json", "json_schema", "string"):
        (key,) = response_keys("s", 3, [at], format, TEXTS)
        keys = key, range_key("s", 3, at, behind, format, TEXTS)
        for written, fields in zip(keys, (one, both)):
            if format == "string":
                text = ",".join(f"{name}={value}" for name, value in fields.items())
                assert written == f"Struct{{{text}}}".encode()
                continue
            found = json.loads(written)
            if format == "json_schema":
                types = {each["field"]: each["type"] for each in found["schema"]["fields"]}
                assert types == {
                    name: "int32" if name == "partition" else "string" for name in fields
                }
                found = found["payload"]
            assert found == fields
    avro = AvroEncoders(orjson.dumps, orjson.dumps)
    assert response_keys("s", 3, [at], avro, TEXTS) == [orjson.dumps(one)]
    assert range_key("s", 3, at, behind, avro, TEXTS) == orjson.dumps(both)
    for schema in (response_schemas(False, TEXTS), response_schemas(True, TEXTS)):
        types = {each["name"]: each["type"] for each in json.loads(schema[0])["fields"]}
        assert types.pop("partition") == "int" and set(types.values()) == {"string"}


def test_error_values() -> None:
    """An error's value has the connector's fields, in all three formats."""
    failure = _failure(_records([5]))
    assert json.loads(error_value(failure, "f", "[1]", "json")) == ERROR_VALUE
    assert json.loads(error_value(failure, "f", "[1]", "json_schema")) == {
        "schema": ERROR_VALUE_SCHEMA,
        "payload": ERROR_VALUE,
    }
    assert error_value(failure, "f", "[1]", "string") == (
        b"Struct{functionName=f,inputPayload=[1],statusCode=200,functionError=Unhandled,"
        b'logResult=bG9n,payload={"errorMessage":"bad"},executedVersion=7}'
    )


def test_what_is_not_known_is_null_or_left_out() -> None:
    """JSON has null for a field without a value; Connect's text leaves it out."""
    failure = _failure(_records([5]), log_result=None, payload=None, executed_version=None)
    unknown = dict.fromkeys(["inputPayload", "logResult", "payload", "executedVersion"])
    assert json.loads(error_value(failure, "f", None, "json")) == ERROR_VALUE | unknown
    assert error_value(failure, "f", None, "string") == (
        b"Struct{functionName=f,statusCode=200,functionError=Unhandled}"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_record_says_all_there_is(format: str) -> None:
    """Key, value, facts and the originals of one failure, in one record."""
    failure = _failure(_records([5, 9]))
    record = _only(failure, format)
    assert record.key == range_key("t", 0, 5, 10, format)
    payload = ARRAY.join(failure.entries).decode()
    assert record.value == error_value(failure, "f", payload, format)
    facts = {name: value for name, value in record.headers if name != ORIGINAL_HEADER}
    assert facts == {
        "lambda.error.type": b"ValueError",
        "lambda.error.message": b"bad",
        "lambda.condition": b"RetryAttemptsExhausted",
        "lambda.attempts": b"3",
        "lambda.function": b"f",
        "lambda.executed.version": b"7",
        "lambda.request.id": b"r-1",
        "lambda.first.timestamp": b"2019-07-11T11:30:07.000Z",
        "lambda.last.timestamp": b"2019-07-11T11:30:07.000Z",
    }
    assert [original["offset"] for original in _originals(record)] == [5, 9]


def test_the_input_payload_is_what_was_sent() -> None:
    """Whoever reads the error can invoke the function with the very same bytes."""
    failure = _failure(_records([5, 6], values=[b"12345678901234567890", b"\xff"]))
    value = json.loads(_only(failure).value)
    assert value["inputPayload"].encode() == ARRAY.join(failure.entries)


@pytest.mark.parametrize(
    ("timestamps", "first", "last"),
    [
        ([0, 1], "1970-01-01T00:00:00.000Z", "1970-01-01T00:00:00.001Z"),
        ([NO_TIMESTAMP, 1500], "1970-01-01T00:00:01.500Z", "1970-01-01T00:00:01.500Z"),
        ([NO_TIMESTAMP, NO_TIMESTAMP], None, None),
        # A producer may have written anything.
        ([2**63 - 1, 1_700_000_000_000_000], str(2**63 - 1), "1700000000000000"),
    ],
)
def test_timestamps_in_the_facts(timestamps, first, last) -> None:
    """First and last timestamp as ISO 8601, left out where there are none, never an error."""
    facts = error_facts(_failure(_records([1, 2], timestamps=timestamps)), "f")
    assert facts.get("first.timestamp") == first
    assert facts.get("last.timestamp") == last


def test_facts_are_short_and_only_those_known() -> None:
    """A long message is cut, and what is not known is not there."""
    failure = _failure(_records([1]), message="x" * 5000, executed_version=None, request_id=None)
    facts = error_facts(failure, "f")
    assert facts["error.message"] == "x" * 1000
    assert "executed.version" not in facts
    assert "request.id" not in facts


@pytest.mark.parametrize("max_bytes", [600, 1500, 3000, 10_000, 10**9])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_a_large_failure_is_divided(count: int, max_bytes: int) -> None:
    """As many error records as it takes: each original in exactly one, in order."""
    failure = _failure(_records(list(range(0, 3 * count, 3))))
    parts = list(error_records("t", 0, failure, "f", "json", max_bytes))
    assert [o for part, _ in parts for o in part.records.offsets] == failure.records.offsets
    assert [o["offset"] for _, r in parts for o in _originals(r)] == failure.records.offsets
    for part, record in parts:
        key = json.loads(record.key)
        assert key["startOffset"] == part.records.offsets[0]
        assert key["endOffset"] == part.records.offsets[-1] + 1
        assert record.size_bytes <= max_bytes or len(part) == 1
        if len(part) > 1:
            value = json.loads(record.value)
            assert value["inputPayload"].encode() == ARRAY.join(part.entries)


def test_a_record_too_large_for_the_topic_goes_without_its_copy() -> None:
    """A single record keeps its original, and loses its copy in the value and a long error."""
    failure = _failure(_records([5], values=[b"x" * 5000]), payload="e" * 100_000)
    record = _only(failure, max_bytes=30_000)
    value = json.loads(record.value)
    assert value["inputPayload"] is None
    assert 0 < len(value["payload"]) < 20_000
    assert _left_out(record) == {"input.payload.omitted", "payload.shortened"}
    assert _originals(record)[0]["value"] == b"x" * 5000
    assert record.size_bytes <= 30_000


def _left_out(record) -> set[str]:
    """What the headers say that an error record goes without."""
    return {
        name.removeprefix("lambda.")
        for name, value in record.headers
        if value == b"true" and name.endswith((".omitted", ".shortened"))
    }


def test_what_fits_says_nothing_of_what_is_left_out() -> None:
    assert _left_out(_only(_failure(_records([5])))) == set()


@pytest.mark.parametrize("length", [10, 16_384])
def test_an_error_that_is_short_is_not_shortened(length: int) -> None:
    """Beside an input that does not fit it is all there, and no header says otherwise."""
    failure = _failure(_records([5], values=[b"x" * 60_000]), payload="e" * length)
    record = _only(failure, max_bytes=90_000)
    assert json.loads(record.value)["payload"] == "e" * length
    assert _left_out(record) == {"input.payload.omitted"}


@pytest.mark.parametrize("format", ["json", "json_schema", "string"])
@pytest.mark.parametrize("with_original", [True, False])
@pytest.mark.parametrize("payload", [None, "", "said"])
@pytest.mark.parametrize("log", [None, "logged"])
def test_each_part_that_is_left_out_has_a_header(
    format: str, with_original: bool, payload: str | None, log: str | None
) -> None:
    """And none has one that was not there to begin with."""
    failure = _failure(_records([5]), payload=payload, log_result=log)
    record = least_error_record("t", 0, failure, "f", format, with_original)
    assert _left_out(record) == (
        {"input.payload.omitted"}
        | ({"payload.omitted"} if payload is not None else set())
        | ({"log.result.omitted"} if log is not None else set())
        | (set() if with_original else {"original.omitted"})
    )
    assert len(_originals(record)) == with_original
    assert b"said" not in record.value and b"logged" not in record.value


def test_the_size_of_an_error_record_is_not_below_what_it_holds() -> None:
    """What is compared with the limit counts key, value and headers."""
    record = _only(_failure(_records([5, 6])))
    held = len(record.key) + len(record.value) + sum(len(n) + len(v) for n, v in record.headers)
    assert held < record.size_bytes < held + 500


# -- originals ----------------------------------------------------------------------------

some_bytes = st.none() | st.binary(max_size=30)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from("ab")


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2**62),
            st.integers(-1, 2**62),
            some_bytes,
            some_bytes,
            st.none() | st.lists(st.tuples(names, some_bytes), max_size=4),
        ),
        max_size=5,
    ),
    topic=names.filter(bool),
    partition=st.integers(0, 2**31 - 1),
)
@settings(deadline=None)
def test_originals_come_back_byte_for_byte(rows, topic, partition) -> None:
    """Nothing of a record is lost: None is not empty, and header names repeat in order."""
    records = Records(*([row[column] for row in rows] for column in range(5)))
    decoded = [decode_original(data) for data in encode_originals(topic, partition, records)]
    assert decoded == [
        {
            "topic": topic,
            "partition": partition,
            "offset": offset,
            "timestamp": timestamp,
            "key": key,
            "value": value,
            "headers": [{"name": name, "value": content} for name, content in headers or ()],
        }
        for offset, timestamp, key, value, headers in rows
    ]
