"""Place: what a lane's state says, in bytes that are read for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transforms.pending.test_pending import Worker, _ranges, _succeed
from transforms.batch.batch import APART, OpenBatch
from transforms.errors import StateError
from transforms.pending.place import (
    KeptChunk,
    Mark,
    Place,
    decode_kept,
    decode_place,
    encode_place,
)

_number = st.integers(-1, 2**190)
_count = st.integers(0, 2**40)
_places = st.builds(
    Place,
    st.text("0123456789abcdef"),
    _count,
    _count,
    st.builds(Mark, _count, _number, _number),
    _count,
    _count,
    _count,
    st.integers(0, 1),
    st.booleans(),
    st.booleans(),
    st.builds(
        OpenBatch,
        _number,
        _number,
        _number,
        _count,
        _count,
        _count,
        st.lists(st.tuples(_number, _number), max_size=3).map(tuple),
    ),
)


@given(_places)
def test_a_place_comes_out_as_it_went_in(place: Place) -> None:
    assert decode_place(encode_place(place)) == place


def test_a_place_is_small() -> None:
    place = Place("f" * 32, 10**6, 10**6 + 9, Mark(10**6, 10**12, 10**12), 10**6)
    assert len(encode_place(place)) < 250


@given(st.integers(0, 2**60), st.binary())
def test_a_chunk_that_is_kept_comes_out_as_it_went_in(number: int, data: bytes) -> None:
    assert decode_kept(KeptChunk(number, APART, data).encode()) == (number, APART, data)


def test_what_a_later_version_wrote_is_refused() -> None:
    for decode in (decode_place, decode_kept):
        with pytest.raises(StateError, match="version"):
            decode(b"\x02{}")


# A lane's state as a savepoint of the first version has it, batches of 2: a chunk of the offsets 3
# to 7, of which 3 is done, and one of 9 and 10 that waits for what is between. Never changed: what
# is added to the state is not in it, and it is resumed none the less.
PLACE = b"\x01" + (
    b'{"token":"43bb4b486aa14fa08fe5402e66a6ee30","batches":[2,4],"done":[1,4,4],"chunks":[1'
    b',2,2,0],"open":[0,8,8,0,0,1],"holes":[],"collecting":true}'
)
CHUNKS: tuple[list[str], list[str]] = (
    [
        "010100000000000000000101180000007b227374617274223a2233222c226e657874223a2238227d"
        "02040000000033203503290000000101000000000000000100000000000000010000000000000001"
        "00000000000000010000000000000006140000000100000001000000010000000100000001000000"
        "07050000003131313131",
    ],
    [],
)
EARLY = [
    "0101190000007b227374617274223a2239222c226e657874223a223131227d020400000000392032"
    "03110000000101000000000000000100000000000000060800000001000000010000000702000000"
    "3131",
]


def test_a_savepoint_of_the_first_version_goes_on() -> None:
    worker = Worker(_succeed, batch_size=2)
    worker.place.items = [PLACE]
    for bag, chunks in zip(worker.bags, CHUNKS):
        bag.items = [bytes.fromhex(chunk) for chunk in chunks]
    worker.early.items = [bytes.fromhex(chunk) for chunk in EARLY]
    out = worker.collect() + worker.process(8, 9) + worker.drain()
    assert _ranges(out) == [(4, 6), (6, 8), (8, 10), (10, 11)]
    assert worker.calls == [4, 6, 8, 10]
    assert worker.held == 0


def test_a_fact_that_was_added_and_is_not_known_does_no_harm() -> None:
    """So a version may be rolled back that has only added one."""
    assert decode_place(PLACE[:-1] + b',"more":[1]}') == decode_place(PLACE)
