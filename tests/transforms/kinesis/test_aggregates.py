"""Aggregates of the Kinesis Producer Library; with its authors' own library for Python as the
oracle."""

from __future__ import annotations

from base64 import b64decode
from hashlib import md5
from typing import Any

import pytest
from aws_kinesis_agg.aggregator import RecordAggregator
from aws_kinesis_agg.deaggregator import iter_deaggregate_records
from hypothesis import given
from hypothesis import strategies as st

from tests.kinesis import aggregate, field, signed
from transforms.kinesis.aggregates import MAGIC, Part, foreign, take_apart
from transforms.kinesis.fetch import Aggregates, Message
from transforms.kinesis.shards import SHARD_END, begin_at, whole
from transforms.names import SUB_BITS, joined, parted

NUMBER = 49590338271490256608559692538361571095921575989136588898

keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
hash_keys = st.none() | st.integers(0, 2**128 - 1)
records = st.lists(st.tuples(keys, st.binary(max_size=40), hash_keys), min_size=1, max_size=30)


@given(records=records)
def test_what_was_put_in_comes_out(records: list[tuple[str, bytes, int | None]]) -> None:
    assert take_apart(aggregate(records)) == [Part(k.encode(), d, h) for k, d, h in records]


@given(records=st.lists(st.tuples(keys, st.binary(max_size=40)), min_size=1, max_size=30))
def test_as_its_authors_library_has_it(records: list[tuple[str, bytes]]) -> None:
    maker: Any = RecordAggregator()
    for key, data in records:
        maker.add_user_record(key, data)
    data = maker.clear_and_get().get_contents()[2]
    outer = {
        "SequenceNumber": str(NUMBER),
        "PartitionKey": "outer",
        "Data": data,
        "ApproximateArrivalTimestamp": 0,
    }
    read = iter_deaggregate_records([outer], data_format="Boto3")
    parts = take_apart(data)
    assert parts is not None
    assert [(part.key.decode(), part.data) for part in parts] == [
        (each["kinesis"]["partitionKey"], b64decode(each["kinesis"]["data"])) for each in read
    ]


KEY, ONE = field(1, b"a"), field(3, field(1, 0) + field(3, b"x"))
BROKEN = {
    "nothing": b"",
    "another magic": b"\xf3\x89\x9a\xc3" + signed(KEY + ONE)[4:],
    "too short": MAGIC + b"1" * 15,
    "another checksum": signed(KEY + ONE)[:-1] + b"?",
    "cut off": signed(KEY + ONE)[:-3],
    "no message": signed(b"\xff\xff\xff"),
    "empty": signed(b""),
    "keys alone": signed(KEY),
    "a key that is not there": signed(KEY + ONE + field(3, field(1, 7) + field(3, b"x"))),
    "a key far away": signed(KEY + field(3, field(1, 2**64 - 1) + field(3, b"x"))),
    "no key": signed(KEY + field(3, field(3, b"x"))),
    "no data": signed(KEY + field(3, field(1, 0))),
    "a hash key that is not there": signed(KEY + field(3, field(1, 0) + field(2, 0) + ONE[4:])),
    "a hash key that is none": signed(KEY + field(2, b"1x") + ONE),
    "a hash key that is too large": signed(KEY + field(2, str(2**128).encode()) + ONE),
    "a key that is no text": signed(field(1, b"\xff") + ONE),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_aggregate_is_a_record(data: bytes) -> None:
    """All of it, so that nothing is lost of one that is broken within."""
    assert take_apart(data) is None
    message = Message(joined(NUMBER), b"k", data, 1)
    assert Aggregates(lambda key: (0, 1)).take_apart(("s", 0), [message]) == [message]


@given(data=st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    for each in (data, MAGIC + data, signed(data), signed(KEY + data)):
        parts = take_apart(each)
        assert parts is None or parts


def test_records_of_one_have_its_number() -> None:
    """And a sub-number each; what is between aggregates stays as it is."""
    data = aggregate([("a", b"1", None), ("b", b"2", None)])
    messages = [
        Message(joined(NUMBER), b"o", b"plain", 1),
        Message(joined(NUMBER + 5), b"o", data, 2),
    ]
    assert Aggregates(lambda key: None).take_apart(("s", 0), messages) == [
        messages[0],
        Message(joined(NUMBER + 5, 0), b"a", b"1", 2),
        Message(joined(NUMBER + 5, 1), b"b", b"2", 2),
    ]


def test_what_belongs_to_another_shard_is_counted() -> None:
    half = 2**127
    low, high = (
        next(
            k for k in map(str, range(99)) if (int(md5(k.encode()).hexdigest(), 16) < half) == first
        )
        for first in (True, False)
    )
    parts = [
        Part(low.encode(), b"", None),
        Part(high.encode(), b"", None),
        Part(low.encode(), b"", half),
        Part(high.encode(), b"", half - 1),
    ]
    assert foreign(parts, 0, half - 1) == 2
    assert foreign(parts, 0, 2**128 - 1) == 0


@given(number=st.integers(10**15, 10**129 - 1), sub=st.integers(0, (1 << SUB_BITS) - 3))
def test_positions_within_an_aggregate(number: int, sub: int) -> None:
    """In order, and taken up with the record itself; where it stays whole, before it."""
    assert parted(joined(number, sub)) == (number, sub)
    position = joined(number, sub) + 1
    assert joined(number) < position <= joined(number, sub + 1) < joined(number + 1) <= SHARD_END
    at = {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": str(number)}
    assert begin_at(position, parts=True) == at
    assert begin_at(whole(position)) == (
        at if sub else at | {"ShardIteratorType": "AFTER_SEQUENCE_NUMBER"}
    )
    assert whole(whole(position)) == whole(position)
