"""Formats: responses and failures -> Kafka keys, values and headers. Pure.

Keys and values are those of the Confluent Lambda connector. What it has no field for travels in
headers, the original records among them, byte for byte (docs/error-records.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, TypeAlias

import orjson

from transforms.names import NUMBERS, Names
from transforms.original import (
    HEADER_PREFIX,
    ORIGINAL_HEADER,
    TEXT_ORIGINAL_HEADER,
    encode_originals,
)
from transforms.records import NO_TIMESTAMP, Failure

FORMATS = ("json", "json_schema", "string")
AVRO = "avro"

_SHORT_PAYLOAD = 16_384

INPUT_OMITTED, ORIGINAL_OMITTED = "input.payload.omitted", "original.omitted"
PAYLOAD_SHORTENED, PAYLOAD_OMITTED = "payload.shortened", "payload.omitted"
LOG_OMITTED = "log.result.omitted"
"""What an error record goes without where it is too large, as its headers say it."""


def _field(name: str, type: str, optional: bool = False) -> dict[str, Any]:
    return {"type": type, "optional": optional, "field": name}


def _struct(fields: Sequence[dict[str, Any]]) -> bytes:
    return orjson.dumps({"type": "struct", "fields": fields, "optional": False})


_RESPONSE_KEY = _struct(
    [_field("topic", "string"), _field("partition", "int32"), _field("offset", "int64")]
)
_TEXT_RESPONSE_KEY = _struct(
    [_field("topic", "string"), _field("partition", "int32"), _field("offset", "string")]
)
_RESPONSE_VALUE = orjson.dumps({"type": "string", "optional": False})
_RANGE_KEY = _struct(
    [
        _field("topic", "string"),
        _field("partition", "int32"),
        _field("startOffset", "int64"),
        _field("endOffset", "int64"),
    ]
)
_TEXT_RANGE_KEY = _struct(
    [
        _field("topic", "string"),
        _field("partition", "int32"),
        _field("firstOffset", "string"),
        _field("lastOffset", "string"),
    ]
)
_ERROR_VALUE = _struct(
    [
        _field("functionName", "string"),
        _field("inputPayload", "string", optional=True),
        _field("statusCode", "int32"),
        _field("functionError", "string", optional=True),
        _field("logResult", "string", optional=True),
        _field("payload", "string", optional=True),
        _field("executedVersion", "string", optional=True),
    ]
)


_AVRO_TYPES = {"string": "string", "int32": "int", "int64": "long"}


def avro_schema(schema: bytes) -> str:
    """What Connect's AvroConverter registers for a schema of Connect's."""
    connect = orjson.loads(schema)
    if connect["type"] != "struct":
        return orjson.dumps(_AVRO_TYPES[connect["type"]]).decode()
    fields: list[dict[str, Any]] = []
    for field in connect["fields"]:
        type = _AVRO_TYPES[field["type"]]
        optional = {"type": ["null", type], "default": None}
        fields.append(
            {"name": field["field"], **(optional if field["optional"] else {"type": type})}
        )
    record = {"type": "record", "name": "ConnectDefault", "namespace": "io.confluent.connect.avro"}
    return orjson.dumps({**record, "fields": fields}).decode()


def response_schemas(ranges: bool, names: Names = NUMBERS) -> tuple[str, str]:
    """Avro schemas of a response record's key and value.

    Args:
        ranges: Whether one response answers several records.
        names: How records' numbers are written.
    """
    one = _TEXT_RESPONSE_KEY if names.texts else _RESPONSE_KEY
    return avro_schema(_range_schema(names) if ranges else one), avro_schema(_RESPONSE_VALUE)


def error_schemas(names: Names = NUMBERS) -> tuple[str, str]:
    """The same of an error record."""
    return avro_schema(_range_schema(names)), avro_schema(_ERROR_VALUE)


def _range_schema(names: Names) -> bytes:
    return _TEXT_RANGE_KEY if names.texts else _RANGE_KEY


@dataclass(frozen=True, slots=True)
class AvroEncoders:
    """Make the keys and values of a topic's records, each with the id of its schema."""

    key: Callable[[Any], bytes]
    value: Callable[[Any], bytes]


OutputFormat: TypeAlias = str | AvroEncoders
"""One of `FORMATS`; for `AVRO` its encoders."""


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """One Kafka record for the error topic.

    Attributes:
        key: As bytes, in the format asked for; in AWS's form the source record's, None without.
        value: As bytes, in the format asked for.
        headers: Facts and originals; names may repeat.
    """

    key: bytes | None
    value: bytes
    headers: Sequence[tuple[str, bytes]]

    @property
    def size_bytes(self) -> int:
        """About what the record takes on the wire."""
        headers = sum(len(name) + len(value) + 10 for name, value in self.headers)
        return len(self.key or b"") + len(self.value) + headers + 100


def response_keys(
    topic: str,
    partition: int,
    offsets: Sequence[int],
    format: OutputFormat,
    names: Names = NUMBERS,
) -> list[bytes]:
    """Keys of response records: the coordinates of the record that is answered."""
    if isinstance(format, AvroEncoders):
        place = {"topic": topic, "partition": partition}
        return [format.key({**place, "offset": each}) for each in names.numbers(offsets)]
    name = orjson.dumps(topic).replace(b"%", b"%%")
    written: Sequence[int | bytes] = offsets
    number = b"%d"
    if names.texts:
        written, number = [text.encode() for text in names.as_texts(offsets)], b"%b"
    if format == "string":
        template = b"Struct{topic=%b,partition=%d,offset=" % (
            topic.encode().replace(b"%", b"%%"),
            partition,
        )
        template += number + b"}"
    else:
        template = b'{"topic":%b,"partition":%d,"offset":' % (name, partition)
        template += (b'"%b"}' if names.texts else b"%b}") % number
    if format == "json_schema":
        schema = _TEXT_RESPONSE_KEY if names.texts else _RESPONSE_KEY
        template = b'{"schema":' + schema + b',"payload":' + template + b"}"
    return [template % each for each in written]


def response_values(results: Sequence[bytes], format: OutputFormat) -> Sequence[bytes]:
    """Values of response records: the reply entry's payload, or the reply, as text."""
    if isinstance(format, AvroEncoders):
        return [format.value(result.decode(errors="replace")) for result in results]
    if format != "json_schema":
        return results
    head = b'{"schema":' + _RESPONSE_VALUE + b',"payload":'
    return [head + orjson.dumps(result.decode(errors="replace")) + b"}" for result in results]


def range_key(
    topic: str,
    partition: int,
    start_offset: int,
    end_offset: int,
    format: OutputFormat,
    names: Names = NUMBERS,
) -> bytes:
    """Key of what stands for several records: their range of offsets, its end exclusive; or the
    first and the last one, where numbers are texts."""
    fields: dict[str, Any] = {"topic": topic, "partition": partition}
    if names.texts:
        fields |= {
            "firstOffset": names.text(start_offset),
            "lastOffset": names.text(end_offset - 1),
        }
    else:
        fields |= {"startOffset": start_offset, "endOffset": end_offset}
    if isinstance(format, AvroEncoders):
        return format.key(fields)
    return _encode(fields, _range_schema(names), format)


def error_value(
    failure: Failure, function: str, input_payload: str | None, format: OutputFormat
) -> bytes:
    """Value of an error record, with the Confluent connector's fields."""
    fields = {
        "functionName": function,
        "inputPayload": input_payload,
        "statusCode": failure.status_code,
        "functionError": failure.function_error,
        "logResult": failure.log_result,
        "payload": failure.payload,
        "executedVersion": failure.executed_version,
    }
    if isinstance(format, AvroEncoders):
        return format.value(fields)
    return _encode(fields, _ERROR_VALUE, format)


def _encode(fields: Mapping[str, Any], schema: bytes, format: str) -> bytes:
    if format == "string":
        # As Connect prints a struct: fields without a value are left out.
        text = ",".join(f"{k}={v}" for k, v in fields.items() if v is not None)
        return f"Struct{{{text}}}".encode()
    encoded = orjson.dumps(fields)
    if format == "json_schema":
        return b'{"schema":' + schema + b',"payload":' + encoded + b"}"
    return encoded


def error_facts(failure: Failure, function: str) -> dict[str, str]:
    """What is known about a failure besides the record's value; for headers and for the log."""
    timestamps = [ms for ms in failure.records.timestamps if ms != NO_TIMESTAMP]
    facts = {
        "error.type": failure.error_type,
        "error.message": failure.message[:1000],
        "condition": failure.condition,
        "attempts": str(failure.attempts),
        "function": function,
        "executed.version": failure.executed_version,
        "request.id": failure.request_id,
        "first.timestamp": iso(timestamps[0]) if timestamps else None,
        "last.timestamp": iso(timestamps[-1]) if timestamps else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def error_records(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    format: OutputFormat,
    max_bytes: int,
    names: Names = NUMBERS,
) -> Iterator[tuple[Failure, ErrorRecord]]:
    """Error records for one failure: one, or as many as it takes to stay below a size.

    Args:
        topic: Where the records came from.
        partition: Where the records came from.
        failure: The records and the facts.
        function: The function's name.
        format: One of `FORMATS`; for `AVRO` its encoders.
        max_bytes: Size above which a failure of several records is divided, and that of a
            single record goes without its `inputPayload` (its original is kept all the same)
            and with no more than the beginning of what the function returned.
        names: How records' numbers are written.

    Yields:
        Each error record with the part of the failure that it holds.
    """
    whole = _error_record(topic, partition, failure, function, format, names=names)
    if whole.size_bytes <= max_bytes:
        yield failure, whole
    elif len(failure) == 1:
        short, left_out = failure, [INPUT_OMITTED]
        if failure.payload and len(failure.payload) > _SHORT_PAYLOAD:
            short = replace(failure, payload=failure.payload[:_SHORT_PAYLOAD])
            left_out.append(PAYLOAD_SHORTENED)
        bare = _error_record(topic, partition, short, function, format, left_out, names)
        yield failure, bare
    else:
        middle = len(failure) // 2
        for low, high in ((0, middle), (middle, len(failure))):
            half = replace(
                failure,
                records=failure.records.slice(low, high),
                entries=failure.entries[low:high],
            )
            yield from error_records(topic, partition, half, function, format, max_bytes, names)


def least_error_record(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    format: OutputFormat,
    with_original: bool,
    names: Names = NUMBERS,
) -> ErrorRecord:
    """The error record of a single record with what has to be in it only.

    Without its `inputPayload`, what the function returned and the log, and, if that is still too
    much, without the original. Headers say what was left out.
    """
    bare = replace(failure, payload=None, log_result=None)
    missing = {
        INPUT_OMITTED: True,
        PAYLOAD_OMITTED: failure.payload is not None,
        LOG_OMITTED: failure.log_result is not None,
        ORIGINAL_OMITTED: not with_original,
    }
    left_out = [name for name, is_missing in missing.items() if is_missing]
    return _error_record(topic, partition, bare, function, format, left_out, names)


def _error_record(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    format: OutputFormat,
    left_out: Sequence[str] = (),
    names: Names = NUMBERS,
) -> ErrorRecord:
    offsets = failure.records.offsets
    key = range_key(topic, partition, offsets[0], offsets[-1] + 1, format, names)
    with_input = INPUT_OMITTED not in left_out
    payload = failure.frame.join(failure.entries).decode() if with_input else None
    headers = error_headers(topic, partition, failure, function, left_out, names)
    return ErrorRecord(key, error_value(failure, function, payload, format), headers)


TRACEPARENT = "traceparent"
"""Header of what an invocation came to: its place in a trace, as W3C has it."""


def error_headers(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    left_out: Sequence[str] = (),
    names: Names = NUMBERS,
) -> list[tuple[str, bytes]]:
    """Headers of an error record: the facts, what it goes without, then the originals."""
    headers = [
        (HEADER_PREFIX + name, value.encode())
        for name, value in error_facts(failure, function).items()
    ]
    headers += [(HEADER_PREFIX + name, b"true") for name in left_out]
    if failure.trace:
        headers.append((TRACEPARENT, failure.trace.encode()))
    if ORIGINAL_OMITTED in left_out:
        return headers
    originals = encode_originals(topic, partition, failure.records, names)
    header = TEXT_ORIGINAL_HEADER if names.texts else ORIGINAL_HEADER
    return headers + [(header, original) for original in originals]


def iso(ms: int) -> str:
    """A time as ISO 8601 in UTC, to the millisecond."""
    try:
        moment = datetime.fromtimestamp(ms / 1000, tz=timezone.utc)
    except (OverflowError, OSError, ValueError):
        # A producer may write any number there, microseconds for example.
        return str(ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
