"""Selection: what is read of error records, and which of them are redriven. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transforms.names import NUMBERS, SUB_BITS, TEXTS, Names
from transforms.original import (
    HEADER_PREFIX,
    ORIGINAL_HEADER,
    TEXT_ORIGINAL_HEADER,
    decode_original,
)
from transforms.records import RecordChunk

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
# Below what a stream has behind its last number.
_TEXT_MAX = 10**129 << SUB_BITS
_HEADERS = (ORIGINAL_HEADER, TEXT_ORIGINAL_HEADER)

Original = Mapping[str, Any]
"""A record with the fields of `transforms.original.ORIGINAL_SCHEMA`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which error records to redrive; empty takes all.

    Attributes:
        since_ms: Only those that were written then or later.
        conditions: Only those with one of these conditions.
        error_types: Only those with one of these error types.
    """

    since_ms: int | None = None
    conditions: tuple[str, ...] = ()
    error_types: tuple[str, ...] = ()

    def takes(self, record: ErrorRecord) -> bool:
        """Whether an error record is to be redriven."""
        return (
            (self.since_ms is None or record.timestamp_ms >= self.since_ms)
            and (not self.conditions or record.condition in self.conditions)
            and (not self.error_types or record.error_type in self.error_types)
        )


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """What redriving needs of a record of the error topic.

    Attributes:
        partition: Of the error topic.
        offset: In the error topic.
        timestamp_ms: When it was written.
        condition: Why its originals were given up.
        error_type: The cause.
        originals: The originals as they are in its headers; empty if it has none.
        names: How numbers are written in them.
    """

    partition: int
    offset: int
    timestamp_ms: int
    condition: str
    error_type: str
    originals: tuple[bytes, ...]
    names: Names = NUMBERS


def error_records(chunk: RecordChunk) -> Iterator[ErrorRecord]:
    """The error records of a chunk that was read from an error topic."""
    records = chunk.records
    for offset, timestamp, headers in zip(records.offsets, records.timestamps, records.headers):
        facts = {name: value or b"" for name, value in headers or () if name not in _HEADERS}
        texts = any(name == TEXT_ORIGINAL_HEADER for name, _ in headers or ())
        header = TEXT_ORIGINAL_HEADER if texts else ORIGINAL_HEADER
        yield ErrorRecord(
            chunk.partition,
            offset,
            timestamp,
            facts.get(f"{HEADER_PREFIX}condition", b"").decode(errors="replace"),
            facts.get(f"{HEADER_PREFIX}error.type", b"").decode(errors="replace"),
            tuple(value or b"" for name, value in headers or () if name == header),
            TEXTS if texts else NUMBERS,
        )


def read_originals(record: ErrorRecord) -> list[Original] | None:
    """The originals of an error record; None if it has none that can be read."""
    try:
        originals: list[Original] = [
            (found := decode_original(data, record.names))
            | {"offset": record.names.read(found["offset"])}
            for data in record.originals
        ]
    except (ValueError, TypeError, LookupError, EOFError, OverflowError):
        return None  # a header of that name which is somebody else's
    most = _TEXT_MAX if record.names.texts else _INT64_MAX
    return originals if originals and all(_is_possible(o, most) for o in originals) else None


def _is_possible(original: Original, most: int) -> bool:
    """Whether a source could have a record there: other bytes can be read as Avro, too."""
    return (
        bool(original["topic"])
        and 0 <= original["partition"] <= _INT32_MAX
        and 0 <= original["offset"] < most
        and -_INT64_MAX <= original["timestamp"] <= _INT64_MAX
    )
