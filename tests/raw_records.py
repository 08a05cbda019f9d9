"""Records as no client sends them: straight to the broker, in Kafka's own bytes.

send(broker, "topic", 0, [RawRecord(b"key", b"value", [(b"caf\\xe9", b"1")])])
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.local.broker import KafkaBroker

_SECS = 10.0
# What a broker says that has not heard of a new topic: unknown, or not the leader.
_NOT_YET = (3, 6)


class RawRecord(NamedTuple):
    """One record; names of headers are bytes too."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[bytes, bytes | None]] = ()
    timestamp: int | None = None
    """Milliseconds since the epoch; None for now."""


def send(broker: KafkaBroker, topic: str, partition: int, records: Sequence[RawRecord]) -> int:
    """Write them as one batch; returns the first one's offset."""
    data = _batch(records)
    name = topic.encode()
    request = b"".join(
        [
            # Produce, version 3: acknowledged by all, within ten seconds.
            struct.pack(">hhih", 0, 3, 1, 3) + b"raw",
            struct.pack(">hhi", -1, -1, 10_000),
            struct.pack(">ih", 1, len(name)) + name,
            struct.pack(">iii", 1, partition, len(data)) + data,
        ]
    )
    deadline = time.monotonic() + _SECS
    while True:
        error, offset = _answer(broker, request, name)
        if error not in _NOT_YET or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert error == 0, f"the broker answers with error {error}"
    return offset


def _answer(broker: KafkaBroker, request: bytes, name: bytes) -> tuple[int, int]:
    """The broker's error code, and the first record's offset."""
    host, _, port = broker.bootstrap_servers.partition(":")
    with socket.create_connection((host, int(port)), _SECS) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = connection.makefile("rb")
        (size,) = struct.unpack(">i", answer.read(4))
        body = answer.read(size)
    _, error, offset = struct.unpack_from(">ihq", body, 4 + 4 + 2 + len(name) + 4)
    return error, offset


def _batch(records: Sequence[RawRecord]) -> bytes:
    now = round(time.time() * 1000)
    stamps = [now if record.timestamp is None else record.timestamp for record in records]
    base = stamps[0]
    body = struct.pack(
        ">hiqqqhii", 0, len(records) - 1, base, max(stamps), -1, -1, -1, len(records)
    ) + b"".join(
        _record(number, record, stamp - base)
        for number, (record, stamp) in enumerate(zip(records, stamps, strict=True))
    )
    return struct.pack(">qiibI", 0, 4 + 1 + 4 + len(body), -1, 2, _crc32c(body)) + body


def _record(number: int, record: RawRecord, later_ms: int) -> bytes:
    parts = [b"\0", _varint(later_ms), _varint(number), _field(record.key), _field(record.value)]
    parts.append(_varint(len(record.headers)))
    parts += [_field(name) + _field(value) for name, value in record.headers]
    body = b"".join(parts)
    return _varint(len(body)) + body


def _field(value: bytes | None) -> bytes:
    return _varint(-1) if value is None else _varint(len(value)) + value


def _varint(number: int) -> bytes:
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


_TABLE = _table()
