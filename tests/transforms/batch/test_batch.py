"""Batch: where batches end, and that chunks in any order become batches in one order."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import random
import uuid
from base64 import b64encode
from dataclasses import replace

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.userstate import StateSpec, TimerSpec
from hypothesis import given, settings
from hypothesis import strategies as st

import transforms
from transforms.batch.batch import (
    BatchByPartition,
    BatchConfig,
    Cut,
    Piece,
    assemble,
    cut,
    too_large,
)
from transforms.batch.key import KeyByLane
from transforms.batch.payload import PayloadFormat, encode_records
from transforms.envelope import ENVELOPES, Envelope
from transforms.lanes import Lanes
from transforms.records import ARRAY, Frame, RecordChunk, Records, Rejection

BAD = Rejection("InvalidRecord", "InvalidJson", "bad")


# -- cut ----------------------------------------------------------------------------------


def _fits(count: int, size: int) -> int:
    """The least limit for so many entries of one size."""
    return ARRAY.payload_bytes(count * size, count)


@pytest.mark.parametrize(
    ("sizes", "rejected", "open_records", "open_bytes", "records", "limit", "expected"),
    [
        # By count.
        ([], {}, 0, 0, 3, 100, []),
        ([5], {}, 0, 0, 3, 100, [(0, 1, False)]),
        ([5, 5, 5], {}, 0, 0, 3, 100, [(0, 3, True)]),
        ([5] * 4, {}, 0, 0, 3, 100, [(0, 3, True), (3, 4, False)]),
        ([5] * 6, {}, 0, 0, 3, 100, [(0, 3, True), (3, 6, True)]),
        ([5] * 2, {}, 0, 0, 1, 100, [(0, 1, True), (1, 2, True)]),
        ([5], {}, 2, 10, 3, 100, [(0, 1, True)]),
        ([5] * 5, {}, 1, 5, 3, 100, [(0, 2, True), (2, 5, True)]),
        ([], {}, 2, 10, 3, 100, []),
        # By bytes: at the limit, and one byte over it.
        ([5] * 3, {}, 0, 0, 9, _fits(3, 5), [(0, 3, False)]),
        ([5] * 3, {}, 0, 0, 9, _fits(3, 5) - 1, [(0, 2, True), (2, 3, False)]),
        ([5] * 3, {}, 0, 0, 3, _fits(3, 5), [(0, 3, True)]),
        ([5], {}, 1, 5, 9, _fits(2, 5), [(0, 1, False)]),
        ([5], {}, 1, 5, 9, _fits(2, 5) - 1, [(0, 0, True), (0, 1, False)]),
        ([5, 5], {}, 1, 5, 9, _fits(2, 5), [(0, 1, True), (1, 2, False)]),
        # One record alone: at the limit, and one byte over it.
        ([10], {}, 0, 0, 9, 12, [(0, 1, False)]),
        ([11], {}, 0, 0, 9, 12, [(0, 1, True, "MaximumPayloadSizeExceeded")]),
        (
            [1, 11, 1],
            {},
            0,
            0,
            9,
            12,
            [(0, 1, True), (1, 2, True, "MaximumPayloadSizeExceeded"), (2, 3, False)],
        ),
        ([11], {}, 1, 1, 9, 12, [(0, 0, True), (0, 1, True, "MaximumPayloadSizeExceeded")]),
        # Rejected records stand alone in their place.
        ([1], {0: BAD}, 0, 0, 9, 100, [(0, 1, True, "InvalidRecord")]),
        (
            [1, 1, 1],
            {1: BAD},
            0,
            0,
            9,
            100,
            [(0, 1, True), (1, 2, True, "InvalidRecord"), (2, 3, False)],
        ),
        ([1], {0: BAD}, 1, 1, 9, 100, [(0, 0, True), (0, 1, True, "InvalidRecord")]),
        (
            [1, 1],
            {0: BAD, 1: BAD},
            0,
            0,
            9,
            100,
            [(0, 1, True, "InvalidRecord"), (1, 2, True, "InvalidRecord")],
        ),
        # A record that is both is named by what was found first.
        ([999], {0: BAD}, 0, 0, 9, 100, [(0, 1, True, "InvalidRecord")]),
    ],
)
def test_where_batches_end(
    sizes, rejected, open_records, open_bytes, records, limit, expected
) -> None:
    """A batch closes at the first of count and bytes; what may not be sent stands alone."""
    config = BatchConfig(records, limit)
    cuts = [
        (c.low, c.high, c.close, *([c.rejection.condition] if c.rejection else []))
        for c in cut(sizes, rejected, open_records, open_bytes, config)
    ]
    assert cuts == expected


def _one_by_one(sizes, rejected, open_records, open_bytes, config, frame) -> list[Cut]:
    """What `cut` promises, put in the plainest way: each record in turn, no shortcut."""
    cuts: list[Cut] = []
    low, batch = 0, [open_bytes] if open_records == 1 else [0] * open_records
    if open_records > 1:
        batch[0] = open_bytes
    for index, size in enumerate(sizes):
        rejection = rejected.get(index)
        if rejection is None and len(frame.join([b"x" * size])) > config.max_bytes:
            rejection = too_large(size, config.max_bytes, frame)
        together = len(frame.join([b"x" * entry for entry in [*batch, size]]))
        full = len(batch) >= config.max_records or together > config.max_bytes
        if batch and (rejection or full):
            cuts.append(Cut(low, index, close=True))
            low, batch = index, []
        if rejection:
            cuts.append(Cut(index, index + 1, close=True, rejection=rejection))
            low = index + 1
            continue
        batch.append(size)
        if len(batch) == config.max_records:
            cuts.append(Cut(low, index + 1, close=True))
            low, batch = index + 1, []
    if low < len(sizes):
        cuts.append(Cut(low, len(sizes), close=False))
    return cuts


@given(
    sizes=st.lists(st.integers(1, 12), max_size=25),
    rejected=st.sets(st.integers(0, 24), max_size=2),
    records=st.integers(1, 8),
    limit=st.integers(3, 90),
    opened=st.lists(st.integers(1, 5), max_size=7),
    frame=st.builds(Frame, st.binary(min_size=1, max_size=9), st.binary(min_size=1, max_size=9)),
)
@settings(deadline=None, max_examples=400)
def test_cut_is_the_same_as_filling_batches_one_by_one(
    sizes, rejected, records, limit, opened, frame
) -> None:
    """The shortcuts change nothing, the cuts leave no hole, and no batch is over a limit."""
    config = BatchConfig(records, limit)
    while opened and frame.payload_bytes(sum(opened), len(opened)) > limit:
        opened.pop()
    rejections = {index: BAD for index in rejected if index < len(sizes)}
    cuts = list(cut(sizes, rejections, len(opened), sum(opened), config, frame))
    assert cuts == _one_by_one(sizes, rejections, len(opened), sum(opened), config, frame)

    count, size, at = len(opened), sum(opened), 0
    for piece in cuts:
        assert piece.low == at
        at = piece.high
        count, size = count + piece.high - piece.low, size + sum(sizes[piece.low : piece.high])
        if piece.rejection is None and piece.high > piece.low:
            assert count <= records
            assert frame.payload_bytes(size, count) <= limit
        if piece.close:
            count = size = 0
    assert at == len(sizes)
    assert all(piece.close for piece in cuts[:-1])


def test_a_record_too_large_is_told_its_size_and_the_limit() -> None:
    """The message has the numbers and the option."""
    message = too_large(100, 50).message
    assert "102" in message
    assert "50" in message
    assert "--batch_bytes" in message


# -- assemble -----------------------------------------------------------------------------


def _records(offsets) -> Records:
    count = len(offsets)
    values = [b"%d" % offset for offset in offsets]
    return Records(list(offsets), [1] * count, [None] * count, values, [None] * count)


def _piece(start: int, next_offset: int, offsets) -> Piece:
    return Piece(start, next_offset, _records(offsets), [b"e%d" % offset for offset in offsets])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_pieces_are_put_in_order(order) -> None:
    """However a state bag gives them back, records, entries and range come out in order."""
    pieces = [_piece(3, 6, [3, 5]), _piece(6, 8, []), _piece(8, 20, [9, 10])]
    batch = assemble(("t", 1, 0), [pieces[index] for index in order])
    assert batch.records.offsets == [3, 5, 9, 10]
    assert batch.records.values == [b"3", b"5", b"9", b"10"]
    assert batch.entries == [b"e3", b"e5", b"e9", b"e10"]
    assert (batch.topic, batch.partition) == ("t", 1)
    assert (batch.start, batch.next_offset) == (3, 20)
    assert batch.rejection is None


def test_a_single_piece_is_a_batch() -> None:
    """One piece needs no joining; a rejection travels along."""
    batch = assemble(("t", 1, 0), [_piece(3, 6, [4])], BAD)
    assert batch.records.offsets == [4]
    assert (batch.start, batch.next_offset) == (3, 6)
    assert batch.rejection is BAD


# -- the step -----------------------------------------------------------------------------

_collected: dict[str, list] = {}


def _collect(batch, token: str) -> None:
    _collected[token].append(batch)


def _chunk(start, next_offset, offsets=None, partition=0, first=False, values=None) -> RecordChunk:
    offsets = list(range(start, next_offset)) if offsets is None else list(offsets)
    records = _records(offsets)
    if values:
        records = Records(
            records.offsets, records.timestamps, records.keys, values, records.headers
        )
    return RecordChunk("t", partition, start, next_offset, records, first)


def _run(chunks, config: BatchConfig | None = None, lanes: Lanes | None = None):
    """Run the step over chunks that arrive in this order; its batches and its counters."""
    token = uuid.uuid4().hex
    _collected[token] = []
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    _ = (
        pipeline
        | beam.Create([list(chunks)], reshuffle=False)
        | beam.FlatMap(lambda all_chunks: all_chunks).with_output_types(RecordChunk)
        | KeyByLane(lanes or Lanes())
        | BatchByPartition(config or BatchConfig(max_records=3))
        | beam.Map(_collect, token)
    )
    result = pipeline.run()
    result.wait_until_finish()
    counters = {
        counter.key.metric.name: counter.committed
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == "batch" and counter.committed
    }
    closed = {name: counters.pop(name) for name in list(counters) if name.startswith("closed_by_")}
    assert sum(closed.values()) == counters.get("batches", 0), "each batch is closed by something"
    return _collected.pop(token), counters


def _of(batches, partition: int = 0):
    return [batch for batch in batches if batch.partition == partition]


def _shape(batches) -> list[list[int]]:
    return [list(batch.records.offsets) for batch in batches]


def _ranges(batches) -> list[tuple[int, int]]:
    return [(batch.start, batch.next_offset) for batch in batches]


def _check(batches, start: int, next_offset: int, offsets) -> None:
    """Each record once, offsets rising, ranges without a hole from start to end."""
    assert [o for batch in batches for o in batch.records.offsets] == list(offsets)
    at = start
    for batch in batches:
        assert batch.start == at
        at = batch.next_offset
        assert all(batch.start <= offset < at for offset in batch.records.offsets)
        assert len(batch.entries) == len(batch.records)
        for offset, entry in zip(batch.records.offsets, batch.entries):
            # A stream's event has the number, of which an offset is more; and the data.
            assert b'"offset":%d,' % offset in entry or b64encode(b"%d" % offset) in entry
    assert at == next_offset


def test_chunks_in_order() -> None:
    """Batches run over the borders of chunks, and the end of the input closes the last one."""
    batches, counters = _run([_chunk(10, 12, first=True), _chunk(12, 17), _chunk(17, 18)])
    assert _shape(batches) == [[10, 11, 12], [13, 14, 15], [16, 17]]
    _check(batches, 10, 18, range(10, 18))
    assert counters == {"records": 8, "batches": 3}


@pytest.mark.parametrize("name", ENVELOPES)
def test_payloads_are_bounded_with_all_that_is_around_them(name: str) -> None:
    """Batches are as full as the limit allows, head and tail of the envelope included."""
    envelope = Envelope(name, "b-1.example:9092,b-2.example:9092")
    one = envelope.frame("t", 0).join(
        encode_records("t", 0, _records([100]), PayloadFormat(envelope=envelope)).entries
    )
    limit = 4 * len(one)
    config = BatchConfig(max_bytes=limit, format=PayloadFormat(envelope=envelope))
    batches, _ = _run([_chunk(100, 130, first=True), _chunk(130, 200)], config)
    _check(batches, 100, 200, range(100, 200))
    for batch, following in zip(batches, [*batches[1:], None]):
        payload = batch.frame.join(batch.entries)
        assert json.loads(payload)
        assert len(payload) == batch.payload_bytes <= limit
        if following:
            more = [*batch.entries, following.entries[0]]
            assert len(batch.frame.join(more)) > limit

    config = BatchConfig(max_bytes=len(one) - 1, format=PayloadFormat(envelope=envelope))
    batches, _ = _run([_chunk(100, 101, first=True)], config)
    (rejection,) = (batch.rejection for batch in batches)
    assert rejection and f"{len(one)} bytes" in rejection.message


def test_an_early_chunk_waits_for_its_predecessor() -> None:
    """Chunks that overtake others change nothing about the batches."""
    chunks = [_chunk(0, 2, first=True), _chunk(6, 9), _chunk(4, 6), _chunk(2, 4)]
    batches, counters = _run(chunks)
    assert _shape(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    _check(batches, 0, 9, range(9))
    assert not counters.get("out_of_order")
    assert not counters.get("duplicates")


def test_duplicates_are_dropped_and_counted() -> None:
    """What was batched before is not batched again, also where a chunk holds more than that."""
    chunks = [_chunk(0, 4, first=True), _chunk(0, 4), _chunk(2, 6), _chunk(6, 7)]
    batches, counters = _run(chunks)
    _check(batches, 0, 7, range(7))
    assert counters["duplicates"] == 6
    assert counters["records"] == 7


def test_late_records_are_batched_by_themselves_and_counted() -> None:
    """A record from before the beginning was never seen: it is late, not a duplicate."""
    batches, counters = _run([_chunk(5, 8, first=True), _chunk(0, 3), _chunk(8, 10)])
    assert sorted(_shape(batches)) == [[0, 1, 2], [5, 6, 7], [8, 9]]
    assert counters["out_of_order"] == 3
    assert not counters.get("duplicates")
    late = next(batch for batch in batches if batch.start == 0)
    assert (late.start, late.next_offset) == (0, 3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_chunks_that_tell_no_predecessor_lose_nothing_in_any_order(order) -> None:
    """Beam's reader does not say what came before a chunk: each may begin its partition."""
    parts = [_chunk(start, start + 50, first=True) for start in (0, 50, 100)]
    batches, counters = _run([parts[place] for place in order], BatchConfig(20))
    assert sorted(o for batch in batches for o in batch.records.offsets) == list(range(150))
    assert not counters.get("duplicates")


def test_what_fills_a_hole_is_a_duplicate_the_second_time() -> None:
    late = _chunk(2, 5, first=True)
    chunks = [_chunk(0, 2, first=True), _chunk(6, 8, first=True), late, late]
    batches, counters = _run(chunks, BatchConfig(10))
    assert sorted(o for batch in batches for o in batch.records.offsets) == [0, 1, 2, 3, 4, 6, 7]
    assert (counters["out_of_order"], counters["duplicates"]) == (3, 3)


def test_a_late_range_ends_where_the_known_one_begins() -> None:
    """A late chunk that reaches into what is still open must not say that it is done."""
    batches, counters = _run([_chunk(5, 7, first=True), _chunk(0, 9)], BatchConfig(4))
    assert sorted(o for batch in batches for o in batch.records.offsets) == list(range(9))
    assert counters["out_of_order"] == 5
    assert counters["duplicates"] == 2
    for batch in batches:
        # A range may be committed once its batch is done, so it holds no other batch's record.
        inside = range(batch.start, batch.next_offset)
        assert [o for o in range(9) if o in inside] == list(batch.records.offsets)


def test_a_hole_that_nothing_fills_is_never_passed_over() -> None:
    """What waits in vain for its predecessor is batched, but no range covers the hole."""
    batches, _ = _run([_chunk(0, 2, first=True), _chunk(5, 7), _chunk(7, 8)], BatchConfig(10))
    assert sorted(o for batch in batches for o in batch.records.offsets) == [0, 1, 5, 6, 7]
    for batch in batches:
        assert not set(range(batch.start, batch.next_offset)) & {2, 3, 4}


def test_partitions_do_not_mix() -> None:
    """Chunks of two partitions interleave; each partition's batches are its own."""
    chunks = [
        _chunk(0, 2, first=True),
        _chunk(100, 104, partition=1, first=True),
        _chunk(2, 5),
        _chunk(104, 105, partition=1),
    ]
    batches, counters = _run(chunks)
    assert _shape(_of(batches, 0)) == [[0, 1, 2], [3, 4]]
    assert _shape(_of(batches, 1)) == [[100, 101, 102], [103, 104]]
    _check(_of(batches, 0), 0, 5, range(5))
    _check(_of(batches, 1), 100, 105, range(100, 105))
    assert counters["records"] == 10


def test_lanes_have_their_own_batches_over_the_whole_range() -> None:
    """Each lane's records batched in order; its ranges reach from beginning to end, no hole."""
    lanes = Lanes(3)
    # One after the other for records without a key: 10, 13, 16, ... in the lane of 10.
    batches, counters = _run([_chunk(10, 17, first=True), _chunk(17, 20)], lanes=lanes)
    for lane in range(3):
        own = [batch for batch in batches if batch.lane == lane]
        _check(own, 10, 20, [o for o in range(10, 20) if o % 3 == lane])
        assert all(batch.lane_key == ("t", 0, lane) for batch in own)
    assert counters == {"records": 10, "batches": 4}


def test_a_lane_without_records_is_one_empty_batch() -> None:
    """However many chunks had none for it; that is what lets its offsets be committed."""
    batches, counters = _run([_chunk(0, 2, first=True), _chunk(2, 3)], lanes=Lanes(2, run=10))
    assert _shape([batch for batch in batches if batch.lane == 0]) == [[0, 1, 2]]
    assert _ranges([batch for batch in batches if batch.lane == 1]) == [(0, 3)]
    assert counters == {"records": 3, "batches": 1}


def test_no_input_no_batches() -> None:
    """Nothing in, nothing out; the chunk that only wakes the steps behind counts as nothing."""
    assert _run([]) == ([], {})
    assert _run([RecordChunk("", 0, 0, 0, Records())]) == ([], {})


def test_a_record_too_large_stands_alone_in_its_place() -> None:
    """The others around it are batched as ever, in order."""
    values = [b"1", b"2", b'"' + b"x" * 500 + b'"', b"4"]
    config = BatchConfig(max_records=3, max_bytes=400)
    batches, counters = _run([_chunk(0, 4, first=True, values=values), _chunk(4, 6)], config)
    assert _shape(batches) == [[0, 1], [2], [3, 4, 5]]
    assert [b.rejection.condition if b.rejection else None for b in batches] == [
        None,
        "MaximumPayloadSizeExceeded",
        None,
    ]
    _check(batches, 0, 6, range(6))
    assert counters["batches"] == 3


def test_a_record_that_is_not_json_stands_alone_in_its_place() -> None:
    """With the json format a value that does not parse is a rejected batch of one."""
    config = BatchConfig(max_records=3, format=PayloadFormat("auto", "json"))
    batches, _ = _run([_chunk(0, 3, first=True, values=[b"1", b"nope", b"3"])], config)
    assert _shape(batches) == [[0], [1], [2]]
    assert batches[1].rejection.error_type == "InvalidJson"
    _check(batches, 0, 3, range(3))


def test_fields_sent_as_base64_are_counted() -> None:
    """The metric says how many keys and values are neither JSON nor text."""
    _, counters = _run([_chunk(0, 3, first=True, values=[b"\xff", b"ok", b"\xfe"])])
    assert counters["base64_fields"] == 2


@pytest.mark.parametrize(
    ("chunks", "shape", "ranges"),
    [
        ([(0, 5, [])], [[]], [(0, 5)]),
        ([(0, 3, [0, 1, 2]), (3, 9, [])], [[0, 1, 2], []], [(0, 3), (3, 9)]),
        ([(0, 2, [0]), (2, 9, [])], [[0]], [(0, 9)]),
        ([(0, 4, []), (4, 6, [4, 5])], [[4, 5]], [(0, 6)]),
        ([(0, 9, [3, 4, 7])], [[3, 4, 7]], [(0, 9)]),
        ([(0, 9, [3, 4, 7, 8])], [[3, 4, 7], [8]], [(0, 8), (8, 9)]),
    ],
)
def test_offsets_without_records_are_passed_on(chunks, shape, ranges) -> None:
    """A range that ends in, or is, a gap is in some batch's range, so it can be committed."""
    batches, _ = _run([_chunk(*chunk) for chunk in chunks])
    assert _shape(batches) == shape
    assert _ranges(batches) == ranges


def test_a_batch_without_records_is_not_counted() -> None:
    """An empty range is no batch that was sent."""
    _, counters = _run([_chunk(0, 5, [], first=True)])
    assert counters.get("batches", 0) == 0


@pytest.mark.parametrize("seed", range(6))
def test_chunks_in_any_order_give_the_same_batches(seed: int) -> None:
    """Any order of arrival, with duplicates among them: each record once, in order, no hole."""
    shuffle = random.Random(seed)
    offsets = sorted(shuffle.sample(range(300), 120))
    borders = [0, *sorted(shuffle.sample(range(1, 300), 14)), 300]
    chunks = [
        _chunk(low, high, [o for o in offsets if low <= o < high])
        for low, high in itertools.pairwise(borders)
    ]
    expected, _ = _run(chunks, BatchConfig(7))
    # The beginning is what the first chunk says; all others may come as they like.
    rest = [*chunks[1:], *shuffle.sample(chunks, 4)]
    shuffle.shuffle(rest)
    batches, counters = _run([chunks[0], *rest], BatchConfig(7))
    _check(batches, 0, 300, offsets)
    assert _shape(batches) == _shape(expected)
    assert counters["records"] == 120
    assert not counters.get("out_of_order")


def test_names_of_states_and_timers_are_the_pipeline_s_own() -> None:
    """Beam loses timers of fused steps that share an id, so no two steps may."""
    names: list[str] = []
    for module in pkgutil.walk_packages(transforms.__path__, "transforms."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, beam.DoFn):
                if value.__module__ != module.name:
                    continue
                specs = (StateSpec, TimerSpec)
                names += [spec.name for spec in vars(value).values() if isinstance(spec, specs)]
    assert any(name.endswith("batch_window_end") for name in names)
    assert len(names) == len(set(names))


def test_a_record_that_an_earlier_step_rejected_is_not_sent() -> None:
    rejection = Rejection("SCHEMA_NOT_FOUND", "SchemaNotFound", "no schema 7")
    records = replace(_records(range(3)), rejections=[None, rejection, None])
    batches, _ = _run([RecordChunk("t", 0, 0, 3, records)])
    assert [(batch.start, batch.next_offset, batch.rejection) for batch in batches] == [
        (0, 1, None),
        (1, 2, rejection),
        (2, 3, None),
    ]


def test_joined_records_keep_their_columns_aligned() -> None:
    rejection = Rejection("c", "t", "m")
    plain, noted = _records(range(2)), replace(_records([2]), rejections=[rejection])
    joined = Records.join([plain, Records(), noted])
    assert joined.offsets == [0, 1, 2]
    assert (list(joined.decoded), joined.rejections) == ([], [None, None, rejection])
    assert joined.where([True, False, True]).rejections == [None, rejection]


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), max_size=30),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(40, 300),
)
@settings(deadline=None, max_examples=60)
def test_a_chunk_that_is_all_of_its_lane_makes_the_same_batches(
    rows: list[tuple[int, int]], lead: int, tail: int, most: int, max_bytes: int
) -> None:
    """Without state and timers, which is a matter of speed alone."""
    offsets = list(itertools.accumulate((gap for gap, _ in rows), initial=10))[1:]
    values = [b"x" * size for _, size in rows]
    records = Records(offsets, offsets, [None] * len(rows), values, [None] * len(rows))
    end = (offsets[-1] if offsets else 10) + 1 + tail
    chunk = RecordChunk("t", 0, 10 - lead, end, records, first=True, lane=0)
    config = BatchConfig(most, max_bytes)
    kept, alone = (
        [
            (each.start, each.next_offset, list(each.entries), each.rejection)
            for each in _run([given], config)[0]
        ]
        for given in (chunk, replace(chunk, last=True))
    )
    assert alone == kept
