"""Frames of events, with botocore's parser as the oracle."""

from __future__ import annotations

import struct
from zlib import crc32

import pytest
from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from transforms.kinesis.frames import Frame, Frames, make_frame

names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
frames = st.builds(
    Frame, st.dictionaries(names, st.text(max_size=40), max_size=5), st.binary(max_size=300)
)


@given(frames=st.lists(frames, max_size=5), size=st.integers(1, 50))
def test_frames_are_found_however_they_come(frames: list[Frame], size: int) -> None:
    data = b"".join(make_frame(*each) for each in frames)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    reader = Frames()
    assert [frame for piece in pieces for frame in reader.feed(piece)] == frames
    peer = EventStreamBuffer()  # type: ignore[no-untyped-call]
    peer.add_data(data)  # type: ignore[no-untyped-call]
    assert [Frame(each.headers, each.payload) for each in peer] == frames


def test_headers_that_are_no_texts_are_passed_over() -> None:
    values = [
        (0, b""),
        (1, b""),
        (2, b"1"),
        (3, b"12"),
        (4, b"1234"),
        (5, b"12345678"),
        (6, b"\0\x03abc"),
        (8, b"12345678"),
        (9, b"1" * 16),
        (7, b"\0\x02hi"),
    ]
    headers = b"".join(b"\x01" + b"%c" % (97 + kind) + bytes([kind]) + v for kind, v in values)
    lengths = struct.pack("!II", 16 + len(headers), len(headers))
    data = lengths + struct.pack("!I", crc32(lengths)) + headers
    data += struct.pack("!I", crc32(data))
    assert list(Frames().feed(data)) == [Frame({"h": "hi"}, b"")]
    peer = EventStreamBuffer()  # type: ignore[no-untyped-call]
    peer.add_data(data)  # type: ignore[no-untyped-call]
    (message,) = list(peer)
    assert message.headers["h"] == "hi" and len(message.headers) == len(values)


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_byte_that_is_another_is_noticed(place: int, flip: int) -> None:
    data = bytearray(make_frame({":message-type": "event"}, b"payload"))
    data[place % len(data)] ^= flip
    with pytest.raises(ValueError, match="checksum"):
        list(Frames().feed(bytes(data)))


def test_what_is_no_frame() -> None:
    with pytest.raises(ValueError, match="checksum of a frame's lengths"):
        list(Frames().feed(b"<html><body>no</body></html>"))
    lengths = struct.pack("!II", 2**31, 0)
    with pytest.raises(ValueError, match="cannot be"):
        list(Frames().feed(lengths + struct.pack("!I", crc32(lengths))))
