"""Columns: chunks come out of their bytes as they went in; bytes of before are read for ever."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.columns import decode_chunk, encode_chunk
from transforms.errors import StateError
from transforms.records import BY_BYTES, Decoded, RecordChunk, Records, Rejection

KEY = ("orders", 7, 3)

_data = st.none() | st.binary(max_size=9)
_schema = st.none() | st.tuples(st.sampled_from(["AVRO", "JSON"]), st.sampled_from("12"))
_decoded = st.none() | st.builds(Decoded, _data, _data, _schema, _schema)
_rejection = st.none() | st.builds(Rejection, st.text(), st.text(), st.text())
_headers = st.none() | st.lists(st.tuples(st.text(), _data), max_size=3)


@st.composite
def _chunks(draw: st.DrawFn) -> RecordChunk:
    most = draw(st.sampled_from([10, 2**63, 2**190]))
    offsets = sorted(draw(st.sets(st.integers(0, most), max_size=5)))
    if draw(st.booleans()):
        offsets = [offsets[0] + step for step in range(len(offsets))] if offsets else []
    count = len(offsets)

    def column(each: st.SearchStrategy, left_out: bool = False) -> list:
        column = draw(st.lists(each, min_size=count, max_size=count))
        return [] if left_out and draw(st.booleans()) else column

    rejections = column(_rejection, left_out=True)
    records = Records(
        offsets,
        column(st.integers(-1, 2**41)),
        column(_data),
        column(_data),
        column(_headers),
        column(_decoded, left_out=True),
        rejections if any(rejections) else [],
        column(st.sampled_from([True, False, None]), left_out=True),
    )
    start = draw(st.integers(0, offsets[0] if offsets else most))
    end = (offsets[-1] + 1 if offsets else start) + draw(st.integers(0, 9))
    first, last = draw(st.booleans()), draw(st.booleans())
    closed_by = draw(st.sampled_from(["", BY_BYTES]))
    return RecordChunk(*KEY[:2], start, end, records, first, KEY[2], last, closed_by)


def _lists(records: Records) -> list[list]:
    return [list(getattr(records, field.name)) for field in fields(records)]


@given(_chunks())
def test_a_chunk_comes_out_as_it_went_in(chunk: RecordChunk) -> None:
    found = decode_chunk(KEY, encode_chunk(chunk))
    assert replace(found, records=Records()) == replace(chunk, records=Records())
    if len(chunk.records):
        assert _lists(found.records) == _lists(chunk.records)
    else:
        assert len(found.records) == 0


def test_a_chunk_is_little_more_than_its_data() -> None:
    count, value = 1000, b"x" * 200
    records = Records(
        list(range(10**12, 10**12 + count)),
        [1_700_000_000_000] * count,
        [None] * count,
        [value] * count,
        [None] * count,
    )
    chunk = RecordChunk("orders", 0, 10**12, 10**12 + count, records, lane=0)
    data = encode_chunk(chunk)
    assert len(data) < count * (len(value) + 12) + 200
    assert b"transforms" not in data and b"orders" not in data


FIXTURE = bytes.fromhex(
    # Of the first version of the form, and never changed.
    "0101470000007b227374617274223a223430222c226e657874223a223630222c226669727374223a"
    "747275652c226c617374223a747275652c22636c6f7365645f6279223a226279746573227d021900"
    "00000129000000000000002b000000000000002c000000000000000319000000010068e5cf8b0100"
    "00ffffffffffffffff0168e5cf8b010000040c00000001000000ffffffff0000000005010000006b"
    "060c0000000700000001000000ffffffff07080000007b2261223a317dff080c00000002000000ff"
    "ffffff00000000090800000001000000010000000a0200000068680b0800000001000000ffffffff"
    "0c01000000310f0c00000007000000ffffffffffffffff10070000007b2261223a317d1130000000"
    "5b5b5b6e756c6c2c5b224156524f222c2237225d5d2c6e756c6c2c5b6e756c6c2c6e756c6c5d5d2c"
    "5b302c312c325d5d12190000005b6e756c6c2c5b2243222c2254222c226d225d2c6e756c6c5d1303"
    "000000010002"
)
FIRST = RecordChunk(
    *KEY[:2],
    40,
    60,
    Records(
        [41, 43, 44],
        [1_700_000_000_000, -1, 1_700_000_000_001],
        [b"k", None, b""],
        [b'{"a":1}', b"\xff", None],
        [[("h", b"1"), ("h", None)], None, []],
        [Decoded(None, b'{"a":1}', None, ("AVRO", "7")), None, Decoded()],
        [None, Rejection("C", "T", "m"), None],
        [True, False, None],
    ),
    True,
    3,
    True,
    BY_BYTES,
)


def test_bytes_of_the_first_version_are_read() -> None:
    """As they are in savepoints; a change of the form must leave this as it is."""
    assert decode_chunk(KEY, FIXTURE) == FIRST


def test_what_is_not_known_yet_is_left_out() -> None:
    """So bytes without a fact that was added later are those of a chunk without it."""
    plain = replace(FIRST, records=replace(FIRST.records, decoded=[], rejections=[], log_append=[]))
    data = encode_chunk(plain)
    assert len(data) < len(FIXTURE)
    assert decode_chunk(KEY, data) == plain
    # And a part with a tag that is not known does no harm.
    assert decode_chunk(KEY, data + bytes([200, 2, 0, 0, 0]) + b"??") == plain


def test_bytes_of_a_later_version_are_refused_in_one_line() -> None:
    with pytest.raises(StateError, match=r"form 9.*up to 1.*savepoint") as raised:
        decode_chunk(KEY, b"\x09" + FIXTURE[1:])
    assert "\n" not in str(raised.value)
