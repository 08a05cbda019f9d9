"""Payload: Records -> JSON entries, one each, as the chosen envelope has them. Pure.

Here is the Confluent Lambda connector's, the default: an entry is
``{"payload":{"timestamp","topic","partition","offset","key","value"}}``, a payload the array of
the entries of one batch. A value that is JSON already is put in as the bytes it is: no number
loses a digit, and nothing is serialized twice. AWS's own are in `transforms.envelope`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import orjson

from transforms.conditions import INVALID_RECORD
from transforms.envelope import CONFLUENT, Envelope, encode_event_records
from transforms.json_text import JSON_STARTS, is_json
from transforms.names import NUMBERS, Names
from transforms.records import NO_TIMESTAMP, Header, Records, Rejection

FORMATS = ("auto", "json", "string", "base64")


@dataclass(frozen=True, slots=True)
class PayloadFormat:
    """How records become entries. All but the envelope is for the connector's entries only.

    Attributes:
        key: ``auto`` (JSON as JSON, other UTF-8 as a string, the rest as base64), ``json`` (as
            auto, but what is not JSON is rejected), ``string`` (never parsed) or ``base64``.
        value: The same for values.
        headers: Whether an entry carries the record's headers, as ``[{"key","value"}]``.
        envelope: What stands around the entries.
        names: How the records' numbers are written.
    """

    key: str = "auto"
    value: str = "auto"
    headers: bool = False
    envelope: Envelope = Envelope()
    names: Names = NUMBERS


@dataclass(slots=True)
class EncodedRecords:
    """Entries for some records.

    Attributes:
        entries: One JSON text per record.
        rejections: By index, the records that must not be sent.
        base64_fields: Keys and values that are neither JSON nor UTF-8 and were sent as base64.
    """

    entries: list[bytes]
    rejections: dict[int, Rejection] = field(default_factory=dict)
    base64_fields: int = 0


class _Encoder:
    """Encodes keys, values or headers; counts what it had to send as base64."""

    def __init__(self, format: str) -> None:
        self.base64_fields = 0
        self._format = format

    def encode(self, column: Iterable[bytes | None]) -> list[bytes | None]:
        """A JSON text each; None for what is no JSON and has to be.

        All in one loop: a call for each field would take as long as the rest of the work.
        """
        if self._format == "base64":
            return list(map(_base64, column))
        may_be_json, must_be_json = self._format != "string", self._format == "json"
        encoded: list[bytes | None] = []
        for data in column:
            if data is None:
                encoded.append(b"null")
                continue
            if may_be_json and data and data[0] in JSON_STARTS and is_json(data):
                encoded.append(data)
            elif must_be_json:
                encoded.append(None)
            elif data.isalnum():
                # Nothing to escape; true of many keys, and a fifth of the price.
                encoded.append(b'"%b"' % data)
            else:
                encoded.append(self._string(data))
        return encoded

    def _string(self, data: bytes) -> bytes:
        try:
            # See transforms.invoke.reply for the newline.
            return orjson.dumps(data.decode(), option=orjson.OPT_APPEND_NEWLINE)[:-1]
        except UnicodeDecodeError:
            self.base64_fields += 1
            return _base64(data)


def _base64(data: bytes | None) -> bytes:
    return b"null" if data is None else b'"' + b64encode(data) + b'"'


def _reject(part: str, data: bytes | None) -> Rejection:
    return Rejection(
        INVALID_RECORD,
        "InvalidJson",
        f"the record's {part} ({len(data or b'')} bytes) is not JSON, and "
        f"--{part}_format=json asks for it; use auto to send it as a string",
    )


def _encode_headers(headers: Sequence[Header] | None, encoder: _Encoder) -> bytes:
    headers = headers or ()
    pairs = (
        b'{"key":%b,"value":%b}' % (orjson.dumps(name), value or b"null")
        for (name, _), value in zip(headers, encoder.encode(value for _, value in headers))
    )
    return b"[" + b",".join(pairs) + b"]"


def _encode_rest(
    encoder: _Encoder, column: Sequence[bytes | None], made: Sequence[bytes | None]
) -> list[bytes | None]:
    """Encode a column where a schema has made nothing of it yet."""
    rest = [data if text is None else None for data, text in zip(column, made)]
    encoded = encoder.encode(rest)
    return [own if text is None else text for text, own in zip(made, encoded)]


def encode_records(
    topic: str, partition: int, records: Records, format: PayloadFormat
) -> EncodedRecords:
    """Encode each record once.

    Args:
        topic: The records' topic.
        partition: The records' partition.
        records: What to encode.
        format: How keys and values become JSON.

    Returns:
        Entries by index, and which of them must not be sent. A rejected record has an entry
        too, with its key and value as ``auto`` has them, for its error record.
    """
    if format.envelope.name != CONFLUENT:
        return EncodedRecords(encode_event_records(topic, partition, records, format.envelope))
    key_encoder, value_encoder = _Encoder(format.key), _Encoder(format.value)
    if any(records.decoded):
        made_keys = [made.key if made else None for made in records.decoded]
        made_values = [made.value if made else None for made in records.decoded]
        keys = _encode_rest(key_encoder, records.keys, made_keys)
        values = _encode_rest(value_encoder, records.values, made_values)
    else:
        keys, values = key_encoder.encode(records.keys), value_encoder.encode(records.values)
    auto = _Encoder("auto")
    rejections: dict[int, Rejection] = {}
    for part, encoded, originals in (
        ("key", keys, records.keys),
        ("value", values, records.values),
    ):
        if not all(encoded):
            for index, fragment in enumerate(encoded):
                if fragment is None:
                    rejections[index] = _reject(part, originals[index])
                    (encoded[index],) = auto.encode([originals[index]])

    timestamps: Sequence[bytes | int] = records.timestamps
    number = b"%d"
    if NO_TIMESTAMP in records.timestamps:
        number = b"%b"
        timestamps = [b"null" if ms == NO_TIMESTAMP else b"%d" % ms for ms in records.timestamps]
    head = (
        b'{"payload":{"timestamp":'
        + number
        + b',"topic":'
        + orjson.dumps(topic).replace(b"%", b"%%")
        + b',"partition":%d' % partition
        + (b',"offset":"%b"' if format.names.texts else b',"offset":%d')
        + b',"key":%b,"value":%b'
    )
    offsets: Sequence[int | bytes] = records.offsets
    if format.names.texts:
        offsets = [text.encode() for text in format.names.as_texts(records.offsets)]
    if format.headers:
        header_columns = [_encode_headers(headers, auto) for headers in records.headers]
        entry = head + b',"headers":%b}}'
        entries = [entry % row for row in zip(timestamps, offsets, keys, values, header_columns)]
    else:
        entry = head + b"}}"
        entries = [entry % row for row in zip(timestamps, offsets, keys, values)]
    return EncodedRecords(
        entries,
        rejections,
        key_encoder.base64_fields + value_encoder.base64_fields + auto.base64_fields,
    )
