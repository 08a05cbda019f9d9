"""Frames: how AWS divides an answer that goes on into events. Pure.

A frame is the length of all of it, the length of its headers, a checksum of both; headers, a
payload, and a checksum of all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from zlib import crc32

_PRELUDE = struct.Struct("!III")
_CHECKSUM = struct.Struct("!I")
_MOST_BYTES = 24 * 2**20
# Lengths of the kinds of values that a header may have, text and bytes left out.
_FIXED = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_BYTES, _TEXT = 6, 7


class Frame(NamedTuple):
    """A frame.

    Attributes:
        headers: Those that are texts.
        payload: What it brings.
    """

    headers: Mapping[str, str]
    payload: bytes


class Frames:
    """Divides what comes into frames, however it comes."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that end in these bytes.

        Raises:
            ValueError: They are none.
        """
        rest = self._rest
        rest += data
        while len(rest) >= _PRELUDE.size:
            size, headers_size, checksum = _PRELUDE.unpack_from(rest)
            if crc32(rest[:8]) != checksum:
                raise ValueError("the checksum of a frame's lengths is wrong")
            least = _PRELUDE.size + headers_size + _CHECKSUM.size
            if not least <= size <= _MOST_BYTES:
                raise ValueError(f"a frame of {size} bytes cannot be")
            if len(rest) < size:
                return
            frame = bytes(rest[:size])
            del rest[:size]
            end = size - _CHECKSUM.size
            if crc32(frame[:end]) != _CHECKSUM.unpack_from(frame, end)[0]:
                raise ValueError("the checksum of a frame is wrong")
            begin = _PRELUDE.size + headers_size
            yield Frame(_read_headers(frame[_PRELUDE.size : begin]), frame[begin:end])


def _read_headers(data: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    try:
        while at < len(data):
            name_end = at + 1 + data[at]
            kind = data[name_end]
            value_at = name_end + 1
            if kind in (_BYTES, _TEXT):
                (size,) = struct.unpack_from("!H", data, value_at)
                value_at += 2
            else:
                size = _FIXED[kind]
            if kind == _TEXT:
                found[data[at + 1 : name_end].decode()] = data[value_at : value_at + size].decode()
            at = value_at + size
    except (IndexError, KeyError, struct.error) as error:
        raise ValueError("a frame's headers cannot be read") from error
    if at != len(data):
        raise ValueError("a frame's headers cannot be read")
    return found


def make_frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """A frame as bytes."""
    packed = b"".join(
        bytes([len(name)]) + name.encode() + bytes([_TEXT]) + struct.pack("!H", len(text)) + text
        for name, text in ((name, value.encode()) for name, value in headers.items())
    )
    size = _PRELUDE.size + len(packed) + len(payload) + _CHECKSUM.size
    lengths = struct.pack("!II", size, len(packed))
    frame = lengths + _CHECKSUM.pack(crc32(lengths)) + packed + payload
    return frame + _CHECKSUM.pack(crc32(frame))
