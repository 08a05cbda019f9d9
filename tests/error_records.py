"""Error records as redriving reads them, for tests."""

from __future__ import annotations

from typing import Any

from transforms.redrive.selection import (
    ErrorRecord,
    Original,
)


def original(offset: int, partition: int = 0, key: bytes | None = None) -> Original:
    return {
        "topic": "orders",
        "partition": partition,
        "offset": offset,
        "timestamp": 1000 + offset,
        "key": key,
        "value": b"%d" % offset,
        "headers": [],
    }


def error_record(offset: int, partition: int = 0, **facts: Any) -> ErrorRecord:
    whole: dict[str, Any] = {
        "timestamp_ms": 1000,
        "condition": "RetryAttemptsExhausted",
        "error_type": "ValueError",
        "originals": (),
    }
    return ErrorRecord(partition, offset, **(whole | facts))
