"""Columns: a chunk of records <-> bytes, for what crosses between workers and stays in state.

The first byte is the version of the form; behind it come parts, each with a tag of its own: numbers
as arrays, keys and values as the arrays of their lengths and the data, joined. What is not there
has no part. So a fact that is added gets a tag that is new: bytes from before do not have it, and
are read as ever. The version changes only where that does not do.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from io import BytesIO
from struct import Struct
from typing import Any

import orjson

from transforms.facts import check_version
from transforms.records import Decoded, Header, LaneKey, RecordChunk, Records, Rejection

_VERSION = 1

_PART = Struct("<BI")
_NONE = -1
# How numbers are written: the first one of a row without a gap, 64 bits each, or as text, since
# positions may be longer than that.
_ROW, _WORDS, _TEXT = range(3)
# Tags of the parts; never used for anything else again.
_FACTS, _OFFSETS, _TIMESTAMPS, _KEYS, _VALUES = 1, 2, 3, 4, 6
_HEADERS, _NAMES, _HEADER_VALUES = 8, 9, 11
_MADE_KEYS, _MADE_VALUES, _SCHEMAS, _REJECTIONS, _LOG_APPEND = 13, 15, 17, 18, 19
_FLAGS = (False, True, None)

_Parts = dict[int, memoryview]


def encode_chunk(chunk: RecordChunk) -> bytes:
    """A chunk without its lane key, which travels beside it."""
    records = chunk.records
    # A position may be longer than 64 bits, and so is a text.
    facts: dict[str, Any] = {"start": str(chunk.start), "next": str(chunk.next_offset)}
    if chunk.first or chunk.last or chunk.closed_by:
        facts |= {"first": chunk.first, "last": chunk.last, "closed_by": chunk.closed_by}
    parts: list[tuple[int, bytes]] = [(_FACTS, orjson.dumps(facts))]
    if count := len(records):
        parts += [
            (_OFFSETS, _write_rising(records.offsets)),
            (_TIMESTAMPS, _write_numbers(records.timestamps)),
            *_write_column(_KEYS, records.keys),
            *_write_column(_VALUES, records.values),
            *_write_headers(records.headers),
            *_write_decoded(records.decoded),
        ]
        if any(records.rejections):
            parts.append((_REJECTIONS, _write_rejections(records.rejections)))
        if records.log_append:
            parts.append((_LOG_APPEND, bytes(map(_FLAGS.index, records.log_append))))
        assert count == len(records.timestamps)
    joined = [bytes((_VERSION,))]
    for tag, data in parts:
        joined += [_PART.pack(tag, len(data)), data]
    return b"".join(joined)


def decode_chunk(key: LaneKey, data: bytes) -> RecordChunk:
    """The chunk of a lane.

    Raises:
        StateError: A later version has written it.
    """
    check_version(_VERSION, data, "records")
    parts: _Parts = {}
    view, at = memoryview(data), 1
    while at < len(data):
        tag, length = _PART.unpack_from(data, at)
        at += _PART.size
        parts[tag] = view[at : at + length]
        at += length
    facts = orjson.loads(parts[_FACTS])
    topic, partition, lane = key
    return RecordChunk(
        topic,
        partition,
        int(facts["start"]),
        int(facts["next"]),
        _read_records(parts) if _OFFSETS in parts else Records(),
        facts.get("first", False),
        lane,
        facts.get("last", False),
        facts.get("closed_by", ""),
    )


def _read_records(parts: _Parts) -> Records:
    offsets = _read_numbers(parts[_OFFSETS])
    count = len(offsets)
    rejections: list[Rejection | None] = []
    if _REJECTIONS in parts:
        rejections = [each and Rejection(*each) for each in orjson.loads(parts[_REJECTIONS])]
    return Records(
        offsets,
        _read_numbers(parts[_TIMESTAMPS]),
        _read_column(parts, _KEYS, count),
        _read_column(parts, _VALUES, count),
        _read_headers(parts, count),
        _read_decoded(parts, count),
        rejections,
        [_FLAGS[flag] for flag in parts.get(_LOG_APPEND, b"")],
    )


# -- numbers ---------------------------------------------------------------------------------------


def _write_rising(numbers: Sequence[int]) -> bytes:
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return b"%c%d %d" % (_ROW, numbers[0], len(numbers))
    return _write_numbers(numbers)


def _write_numbers(numbers: Sequence[int]) -> bytes:
    try:
        return bytes((_WORDS,)) + _little(array("q", numbers)).tobytes()
    except OverflowError:
        return bytes((_TEXT,)) + b" ".join(b"%d" % number for number in numbers)


def _read_numbers(data: memoryview) -> list[int]:
    form, rest = data[0], data[1:]
    if form == _WORDS:
        return _read_array("q", rest)
    numbers = list(map(int, bytes(rest).split()))
    return list(range(numbers[0], numbers[0] + numbers[1])) if form == _ROW else numbers


def _little(numbers: array[int]) -> array[int]:
    """The same on machines of either kind."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _read_array(code: str, data: memoryview) -> list[int]:
    numbers = array(code)
    numbers.frombytes(data)
    return _little(numbers).tolist()


# -- keys, values, headers -------------------------------------------------------------------------


def _write_column(tag: int, column: Sequence[bytes | None]) -> Iterable[tuple[int, bytes]]:
    """Its lengths under the tag, its data under the next one; nothing if all are None."""
    if None in column:
        if not any(each is not None for each in column):
            return ()
        lengths = [_NONE if each is None else len(each) for each in column]
        joined = b"".join(filter(None, column))
    else:
        lengths = list(map(len, column))  # type: ignore[arg-type]
        joined = b"".join(column)  # type: ignore[arg-type]
    return (tag, _little(array("i", lengths)).tobytes()), (tag + 1, joined)


def _read_column(parts: _Parts, tag: int, count: int) -> list[bytes | None]:
    if tag not in parts:
        return [None] * count
    lengths, read = _read_array("i", parts[tag]), BytesIO(parts[tag + 1]).read
    if _NONE not in lengths:
        return list(map(read, lengths))
    return [None if length == _NONE else read(length) for length in lengths]


def _write_headers(column: Sequence[Sequence[Header] | None]) -> Iterable[tuple[int, bytes]]:
    if column.count(None) == len(column):
        return
    counts = [_NONE if headers is None else len(headers) for headers in column]
    every = [header for headers in column for header in headers or ()]
    yield _HEADERS, _little(array("i", counts)).tobytes()
    yield from _write_column(_NAMES, [name.encode("utf-8", "surrogatepass") for name, _ in every])
    yield from _write_column(_HEADER_VALUES, [value for _, value in every])


def _read_headers(parts: _Parts, count: int) -> list[Sequence[Header] | None]:
    if _HEADERS not in parts:
        return [None] * count
    counts = _read_array("i", parts[_HEADERS])
    total = sum(each for each in counts if each != _NONE)
    names = (bytes(name or b"") for name in _read_column(parts, _NAMES, total))
    pairs = zip(
        (name.decode("utf-8", "surrogatepass") for name in names),
        _read_column(parts, _HEADER_VALUES, total),
    )
    return [None if n == _NONE else [next(pairs) for _ in range(n)] for n in counts]


# -- what earlier steps have found -----------------------------------------------------------------


def _write_decoded(column: Sequence[Decoded | None]) -> Iterable[tuple[int, bytes]]:
    if not len(column):
        return
    nothing = Decoded()
    made = [each or nothing for each in column]
    yield from _write_column(_MADE_KEYS, [each.key for each in made])
    yield from _write_column(_MADE_VALUES, [each.value for each in made])
    # Few schemas, many records: each pair once, and then which of them it is.
    pairs = [each and (each.key_schema, each.value_schema) for each in column]
    distinct = list(dict.fromkeys(pairs))
    which = dict(zip(distinct, range(len(distinct))))
    yield _SCHEMAS, orjson.dumps([distinct, [which[pair] for pair in pairs]])


def _read_decoded(parts: _Parts, count: int) -> list[Decoded | None]:
    if _SCHEMAS not in parts:
        return []
    distinct, which = orjson.loads(parts[_SCHEMAS])
    schemas = [pair and [each and tuple(each) for each in pair] for pair in distinct]
    keys, values = _read_column(parts, _MADE_KEYS, count), _read_column(parts, _MADE_VALUES, count)
    return [
        None if schemas[place] is None else Decoded(key, value, *schemas[place])
        for key, value, place in zip(keys, values, which)
    ]


def _write_rejections(column: Sequence[Rejection | None]) -> bytes:
    return orjson.dumps(
        [each and (each.condition, each.error_type, each.message) for each in column]
    )
