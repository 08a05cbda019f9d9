"""Pending: chunks in any order, lost processes and failed bundles; each record comes out once."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import GlobalWindow
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.aws.function import FunctionConfig
from transforms.batch.batch import BatchConfig
from transforms.errors import FunctionConfigError
from transforms.invoke.handover import LEASE_SECS, Handover
from transforms.invoke.invoke import InvokeConfig
from transforms.invoke.invoker import Invoker
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, RetryPolicy
from transforms.pending.pending import SaltedKey, _PendingFn, pack, salted
from transforms.pending.place import Place, decode_place
from transforms.records import (
    Batch,
    Failure,
    Finished,
    LaneKey,
    RecordChunk,
    Records,
    Rejection,
    Responses,
)

KEY: LaneKey = ("t", 0, 0)
SALTED = salted(KEY)


class State:
    """A state cell or bag, in memory."""

    def __init__(self) -> None:
        self.items: list[bytes] = []

    def read(self) -> Any:
        return self.items[-1] if self.items else None

    def write(self, value: bytes) -> None:
        self.items = [value]

    def add(self, value: bytes) -> None:
        self.items = [*self.items, value]

    def clear(self) -> None:
        self.items = []


class Bag(State):
    def read(self) -> Any:
        return list(reversed(self.items))  # a bag promises no order


class Timer:
    def __init__(self) -> None:
        self.due: Any = None

    def set(self, due: Any) -> None:
        self.due = due

    def clear(self) -> None:
        self.due = None


class Worker:
    """One lane of the step, in a process that can be lost."""

    def __init__(
        self, answer: Callable[[Batch], Outcome], batch_size: int = 1, halt: bool = True
    ) -> None:
        self._answer = answer
        self._policy = RetryPolicy(halt=halt)
        self.config = BatchConfig(batch_size, window_secs=5.0)
        self.place, self.early = State(), Bag()
        self.bags = (Bag(), Bag())
        self.timer, self.due, self.end = Timer(), Timer(), Timer()
        self.now, self.clock = 0.0, 10.0
        self.drain_wait_secs: float | None = None
        self.calls: list[int] = []
        self.start_process()

    def start_process(self) -> None:
        """A process without memory."""
        calls = self.calls

        def call(batch: Batch, step: Call, *_: Any) -> Outcome:
            calls.append(batch.start)
            return self._answer(batch)

        def make(may_begin: Callable[[LaneKey], bool]) -> Invoker:
            return Invoker(
                lambda batch, call: None,
                call,
                self._policy,
                4,
                clock=lambda: 0.0,
                random=lambda: 0.0,
                may_begin=may_begin,
            )

        self.handover = handover = Handover(make, lambda: self.now)
        config = InvokeConfig(
            FunctionConfig("f"), streaming=True, drain_wait_secs=self.drain_wait_secs
        )
        self.step = _PendingFn(
            self.config, config, share=lambda _: handover, clock=lambda: self.clock
        )

    @property
    def states(self) -> tuple[State, ...]:
        return (self.place, *self.bags, self.early)

    @property
    def at(self) -> Place:
        return decode_place(self.place.read())

    @property
    def held(self) -> int:
        return sum(len(bag.items) for bag in self.bags)

    def take(self, chunk: RecordChunk) -> list[Finished]:
        element = pack((chunk.lane_key, chunk))
        timers = (self.timer, self.due, self.end)
        return list(self.step.process(element, *self.states, *timers, GlobalWindow()))  # type: ignore[arg-type]

    def process(self, start: int, next_offset: int, first: bool = False) -> list[Finished]:
        return self.take(_chunk(start, next_offset, first or start == 0))

    def collect(self) -> list[Finished]:
        return list(self.step.collect(SALTED, self.place, *self.bags, self.timer))  # type: ignore[arg-type]

    def close_due(self) -> list[Finished]:
        return list(self.step.close_due(SALTED, self.place, *self.bags, self.timer))  # type: ignore[arg-type]

    def drain(self) -> list[Finished]:
        timers = (self.timer, self.due)
        return list(self.step.end(SALTED, *self.states, *timers))  # type: ignore[arg-type]

    @contextmanager
    def failing_bundle(self) -> Iterator[None]:
        """State and timers are as before; the process knows more."""
        kept = [state.items for state in self.states]
        timers = [timer.due for timer in (self.timer, self.due, self.end)]
        yield
        for state, items in zip(self.states, kept):
            state.items = items
        for timer, due in zip((self.timer, self.due, self.end), timers):
            timer.due = due


def _chunk(
    start: int, next_offset: int, first: bool = False, offsets: list[int] | None = None
) -> RecordChunk:
    offsets = list(range(start, next_offset)) if offsets is None else offsets
    count = len(offsets)
    records = Records(offsets, [1] * count, [None] * count, [b"1"] * count, [None] * count)
    return RecordChunk(*KEY[:2], start, next_offset, records, first, lane=0)


def _succeed(_: Batch) -> Outcome:
    return Outcome(Kind.SUCCESS)


def _ranges(finished: list[Finished]) -> list[tuple[int, int]]:
    return [(each.start, each.next_offset) for each in finished]


def _tile(finished: list[Finished], start: int, end: int) -> None:
    """Each range begins where the one before it ends."""
    for each in finished:
        assert each.start == start < each.next_offset
        start = each.next_offset
    assert start == end


# -- batches ---------------------------------------------------------------------------------------

_collected: dict[str, list[tuple[int, int]]] = {}
_handovers: dict[str, Handover] = {}


def _share_by_name(config: InvokeConfig) -> Handover:
    return _handovers[config.function.function]


def _collect(finished: Finished, token: str) -> None:
    _collected[token].append((finished.start, finished.next_offset))


def _same(element: Any) -> Any:
    return element


def _zero() -> float:
    return 0.0


def _packed(start: int, next_offset: int) -> tuple[SaltedKey, bytes]:
    return pack((KEY, _chunk(start, next_offset, first=start == 0)))


def _run(stream: TestStream) -> list[tuple[int, int]]:
    """What comes out of the step on a runner, which fires its timers; batches of 3."""
    token = uuid.uuid4().hex
    _collected[token] = []
    _handovers[token] = Worker(_succeed).handover
    step = _PendingFn(
        BatchConfig(max_records=3, window_secs=5),
        InvokeConfig(FunctionConfig(token), streaming=True),
        share=_share_by_name,
        clock=_zero,
    )
    with TestPipeline(options=PipelineOptions([], streaming=True)) as pipeline:
        _ = (
            pipeline
            | stream
            | beam.Map(_same).with_output_types(tuple[SaltedKey, bytes])
            | beam.ParDo(step).with_output_types(Finished)
            | beam.Map(_collect, token)
        )
    return _collected[token]


def test_a_batch_is_closed_when_it_is_full_when_it_is_due_and_by_a_drain() -> None:
    stream = (
        TestStream()
        .add_elements([_packed(0, 5)])
        .advance_processing_time(6)
        .add_elements([_packed(5, 6)])
        .advance_watermark_to_infinity()
    )
    assert _run(stream) == [(0, 3), (3, 5), (5, 6)]


def test_a_chunk_that_was_overtaken_is_put_in_its_place() -> None:
    stream = (
        TestStream()
        .add_elements([_packed(4, 6), _packed(2, 4)])
        .advance_processing_time(6)
        .add_elements([_packed(0, 2)])
        .advance_watermark_to_infinity()
    )
    assert _run(stream) == [(0, 3), (3, 6)]


def test_the_open_batch_waits_from_when_it_is_opened() -> None:
    worker = Worker(_succeed, batch_size=3)
    worker.process(0, 2)
    assert worker.due.due == 15
    worker.due.due = None
    worker.process(2, 3)  # full
    assert worker.due.due is None
    worker.process(3, 4)
    assert worker.due.due == 15
    worker.due.due = None
    worker.process(4, 5)
    assert worker.due.due is None
    assert worker.close_due() + worker.drain() != []
    assert worker.calls == [0, 3]


@pytest.mark.parametrize(
    ("clock", "batch_size", "window_secs", "stays"),
    [
        (0.5, 1, 5.0, [2, 1]),  # the records are of 1 ms past 0
        (0.5, 2, 5.0, [1]),
        (0.5, 9, 5.0, []),
        (0.5, 9, 0.0, [1, 1]),
        (5.0, 1, 5.0, []),  # behind a backlog others would wait for it
        (5.0, 9, 0.0, []),
    ],
)
def test_a_bundle_stays_for_the_outcome_of_records_that_came_just_now(
    clock: float, batch_size: int, window_secs: float, stays: list[int]
) -> None:
    worker = Worker(_succeed, batch_size)
    worker.config = replace(worker.config, window_secs=window_secs)
    worker.start_process()
    worker.clock = clock
    stayed: list[int] = []

    def stay(batches: int, secs: float) -> None:
        assert secs < 0.1
        stayed.append(batches)
        assert worker.handover.invoker.wait(lambda invoker: not invoker.pending_batches, 20)

    worker.handover.invoker.stay = stay  # type: ignore[method-assign]
    out = worker.process(0, 2)
    out += worker.process(2, 3)
    assert stayed == stays
    if sum(stays):
        _tile(out, 0, 2 if batch_size == 2 else 3)
    _tile(out + worker.drain(), 0, 3)


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 1, 3]])
def test_chunks_that_have_overtaken_others_wait_for_them(order: list[int]) -> None:
    worker = Worker(_succeed)
    out = [finished for number in order for finished in worker.process(number, number + 1)]
    out += worker.drain()
    assert worker.calls == [0, 1, 2, 3]
    assert _ranges(out) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert worker.early.items == []


def test_what_waited_is_batched_with_the_chunk_it_waited_for() -> None:
    """Not only at the end, and what still waits stays counted."""
    worker = Worker(_succeed, batch_size=2)
    for start in (6, 2, 10):
        assert worker.process(start, start + 2) == []
    assert worker.at.open.early == len(worker.early.items) == 3
    worker.process(0, 2)
    assert (worker.at.tail, worker.at.open.early, len(worker.early.items)) == (2, 2, 2)
    worker.process(4, 6)
    assert (worker.at.tail, worker.at.open.early, len(worker.early.items)) == (4, 1, 1)
    # The beginning is known: another chunk that says it begins changes nothing about that.
    worker.process(0, 2)
    assert (worker.at.open.base, worker.at.open.next_offset, worker.at.tail) == (0, 8, 4)


def test_a_hole_that_nothing_fills_is_never_passed_over() -> None:
    worker = Worker(_succeed, batch_size=10)
    out = worker.process(0, 1) + worker.process(3, 4) + worker.process(2, 3)
    out += worker.drain()
    assert worker.calls == [0, 2]
    assert _ranges(out) == [(0, 1), (2, 4)]


def test_a_hole_is_not_passed_over_after_a_lapse_either() -> None:
    """The drain takes longer than a lease; what is batched again keeps its distance."""
    gate = threading.Event()

    def slow(batch: Batch) -> Outcome:
        if batch.start == 0:
            worker.now += LEASE_SECS + 1
            gate.set()
        return Outcome(Kind.SUCCESS)

    worker = Worker(slow, batch_size=10)
    out = worker.process(0, 1) + worker.process(3, 4) + worker.process(6, 7)
    out += worker.drain()
    assert gate.is_set()
    assert _ranges(out) == [(0, 1), (3, 4), (6, 7)]


def test_records_from_before_the_beginning_are_invoked_by_themselves() -> None:
    """And in the order in which they came: what was open goes before them."""
    worker = Worker(_succeed, batch_size=10)
    out = worker.process(5, 7, first=True) + worker.process(0, 3, first=True)
    out += worker.process(7, 9) + worker.drain()
    assert worker.calls == [5, 0, 7]
    assert _ranges(out) == [(5, 7), (0, 3), (7, 9)]


def test_a_chunk_that_comes_twice_is_invoked_once() -> None:
    worker = Worker(_succeed)
    out = worker.process(0, 2) + worker.process(0, 2) + worker.process(1, 3) + worker.drain()
    assert worker.calls == [0, 1, 2]
    _tile(out, 0, 3)


REFUSED = Rejection("InvalidRecord", "InvalidJson", "no")


@pytest.mark.parametrize("refused", [(), (1,), (1, 3), (0, 1, 2)])
def test_refused_records_and_empty_ranges_stand_behind_a_call(refused: tuple[int, ...]) -> None:
    worker = Worker(_succeed, batch_size=10, halt=False)
    chunk = _chunk(0, 4, first=True)
    rejections = [REFUSED if offset in refused else None for offset in range(4)]
    chunk = replace(chunk, records=replace(chunk.records, rejections=rejections))
    out = worker.take(chunk) + worker.take(_chunk(4, 9, offsets=[])) + worker.process(9, 10)
    out += worker.drain()
    _tile(out, 0, 10)
    parts = [part for each in out for part in each.parts]
    answered = [o for part in parts if isinstance(part, Responses) for o in part.offsets]
    failed = [o for part in parts if isinstance(part, Failure) for o in part.records.offsets]
    assert answered == [offset for offset in (0, 1, 2, 3, 9) if offset not in refused]
    assert failed == list(refused)


# -- what is kept ----------------------------------------------------------------------------------


def test_a_drain_waits_for_everything_and_leaves_no_timer() -> None:
    worker = Worker(_succeed)
    out = [finished for number in range(40) for finished in worker.process(number, number + 1)]
    out += worker.drain()
    _tile(out, 0, 40)
    assert (worker.timer.due, worker.due.due) == (None, None)
    assert (worker.at.head, worker.held) == (40, 0)


def test_a_drain_leaves_what_takes_too_long_uncommitted_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()

    def answer(batch: Batch) -> Outcome:
        return (
            Outcome(Kind.SUCCESS) if batch.start < 2 or gate.wait(60) else Outcome(Kind.TRANSIENT)
        )

    worker = Worker(answer)
    worker.drain_wait_secs = 5.0
    worker.start_process()
    out = [finished for number in range(5) for finished in worker.process(number, number + 1)]
    worker.handover.drains(5.0)  # another lane's, which has taken it all
    worker.now = 5.0
    worker.handover.invoker.wait(lambda _: 2 in worker.calls, 60)
    out += worker.drain()
    _tile(out, 0, 2)
    assert "t-0: the drain ends after --drain_wait_secs=5 with 3 batches" in caplog.text
    assert "offsets 2 to 4: they are not committed" in caplog.text
    assert (worker.at.head, worker.at.tail, worker.timer.due) == (2, 5, None)
    # Where the job goes on after all, nothing is missing.
    gate.set()
    worker.start_process()
    _tile(out + worker.process(5, 6) + worker.drain(), 0, 6)


def test_what_comes_after_a_drain_that_failed_has_all_its_time_again() -> None:
    worker = Worker(_succeed)
    assert worker.handover.drains(5.0) == 5.0
    worker.now = 100.0
    assert worker.handover.drains(5.0) == 5.0
    worker.process(0, 1)
    assert worker.handover.drains(5.0) == 105.0


def test_a_lost_process_costs_a_second_call_and_no_record() -> None:
    worker = Worker(_succeed, batch_size=2)
    before = worker.process(0, 3) + worker.process(3, 4)
    worker.start_process()
    after = worker.process(4, 5) + worker.drain()
    assert _ranges(before + after) == [(0, 2), (2, 4), (4, 5)]
    assert worker.calls.count(4) == 1


def test_batches_that_were_closed_by_time_are_not_opened_again() -> None:
    gate = threading.Event()

    def wait(_: Batch) -> Outcome:
        assert gate.wait(20)
        return Outcome(Kind.SUCCESS)

    worker = Worker(wait, batch_size=10)
    worker.process(0, 2)
    worker.close_due()
    worker.process(2, 3)
    worker.start_process()
    gate.set()
    out = worker.collect()
    assert worker.at.open.start == 2
    assert worker.at.tail == 1
    assert _ranges(out + worker.drain()) == [(0, 2), (2, 3)]


def test_a_batch_size_that_has_changed_is_that_of_what_is_pending_too() -> None:
    gate = threading.Event()

    def wait(_: Batch) -> Outcome:
        assert gate.wait(20)
        return Outcome(Kind.SUCCESS)

    worker = Worker(wait, batch_size=2)
    worker.process(0, 5)
    worker.config = replace(worker.config, max_records=3)
    worker.start_process()
    gate.set()
    assert _ranges(worker.collect() + worker.drain()) == [(0, 3), (3, 4), (4, 5)]


def test_what_is_done_leaves_the_state() -> None:
    worker = Worker(_succeed)
    out = []
    for number in range(20):
        out += worker.process(number, number + 1)
        assert worker.handover.invoker.wait(lambda invoker: not invoker.pending_batches, 20)
        out += worker.collect()
        assert worker.held == 0
    _tile(out, 0, 20)


def test_what_is_not_done_is_never_written_again() -> None:
    """While one batch hangs the bags fill; of what is done half leaves at a time."""
    waiting = threading.Semaphore(0)

    def wait(_: Batch) -> Outcome:
        assert waiting.acquire(timeout=20)
        return Outcome(Kind.SUCCESS)

    worker = Worker(wait)
    added: list[bytes] = []
    for bag in worker.bags:
        add = bag.add
        bag.add = lambda value, add=add: (added.append(value), add(value))[1]  # type: ignore[method-assign]
    for number in range(60):
        worker.process(number, number + 1)
        if number >= 10:
            waiting.release()
            assert worker.handover.invoker.wait(lambda i: i.pending_batches <= 10, 20)
            worker.collect()
            assert worker.held <= 22
    assert len(added) == 60
    waiting.release(10)
    worker.drain()
    assert worker.held == 0


def test_the_state_has_records_once_and_no_entries() -> None:
    gate = threading.Event()

    def wait(_: Batch) -> Outcome:
        assert gate.wait(20)
        return Outcome(Kind.SUCCESS)

    worker = Worker(wait, batch_size=10)
    value = b'"' + b"x" * 1000 + b'"'
    records = Records(list(range(25)), [1] * 25, [None] * 25, [value] * 25, [None] * 25)
    worker.take(RecordChunk(*KEY[:2], 0, 25, records, first=True, lane=0))
    kept = b"".join(item for state in worker.states for item in state.items)
    assert kept.count(value) == 25
    assert b"payload" not in kept
    assert len(kept) < 25 * len(value) + 25 * 30
    gate.set()
    _tile(worker.drain(), 0, 25)


# -- halts and errors ------------------------------------------------------------------------------


def test_a_halt_stops_the_lane_and_drops_what_is_behind_it() -> None:
    def fail_at_two(batch: Batch) -> Outcome:
        if batch.start == 2:
            return Outcome(Kind.FUNCTION_ERROR, error_type="ValueError", message="m")
        return Outcome(Kind.SUCCESS)

    worker = Worker(fail_at_two)
    out = [finished for number in range(5) for finished in worker.process(number, number + 1)]
    out += worker.drain()
    assert [(finished.start, finished.halted is not None) for finished in out] == [
        (0, False),
        (1, False),
        (2, True),
    ]
    assert worker.held == 0
    assert worker.process(9, 10) == []
    assert worker.calls == [0, 1, 2]


def test_a_halt_between_two_looks_is_told() -> None:
    """What halted the lane comes out with the next look; it is not taken for another lane's."""
    gate = threading.Event()

    def fail(_: Batch) -> Outcome:
        assert gate.wait(20)
        return Outcome(Kind.FUNCTION_ERROR, error_type="ValueError", message="m")

    worker = Worker(fail)
    look = worker.handover.finished

    def look_too_early(key: LaneKey, head: int) -> list[Finished]:
        found = look(key, head)
        gate.set()
        assert worker.handover.invoker.wait(lambda invoker: invoker.queue(key[:2]).halted, 20)
        return found

    worker.handover.finished = look_too_early  # type: ignore[method-assign]
    assert worker.process(0, 1) == []
    (told,) = worker.collect()
    assert told.halted


def test_a_function_that_is_not_there_fails_the_bundle() -> None:
    worker = Worker(lambda _: Outcome(Kind.CONFIG, error_type="ResourceNotFoundException"))
    with pytest.raises(FunctionConfigError, match="--function=f cannot be invoked"):
        worker.process(0, 1)
        worker.drain()


# -- whatever happens ------------------------------------------------------------------------------

TAKE, FAIL, LOOK, DUE, LOSE, LAPSE = "take", "take and fail", "look", "due", "lose", "lapse"


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=10),
    gaps=st.lists(st.integers(0, 2), min_size=10, max_size=10),
    batch_size=st.integers(1, 5),
    tells=st.booleans(),
    steps=st.lists(
        st.tuples(st.sampled_from([TAKE, TAKE, FAIL, LOOK, DUE, LOSE, LAPSE]), st.integers(0, 99)),
        max_size=30,
    ),
)
@settings(deadline=None, max_examples=100)
def test_each_record_comes_out_once_whatever_happens(
    sizes: list[int],
    gaps: list[int],
    batch_size: int,
    tells: bool,
    steps: list[tuple[str, int]],
) -> None:
    """Chunks in any order, bundles that fail, processes that are lost, leases that lapse.

    A runner keeps state and output of a bundle together, or neither. Of chunks that tell their
    predecessor the order is kept, too, also if they come twice.
    """
    chunks, at = [], 0
    for size, gap in zip(sizes, gaps):
        end = at + size + gap
        if end > at:
            offsets = list(range(at, at + size))
            chunks.append(_chunk(at, end, at == 0 or not tells, offsets))
        at = end
    worker = Worker(_succeed, batch_size)
    left = list(chunks)
    out: list[Finished] = []
    for kind, choice in steps:
        began = bool(worker.place.items)
        if kind in (TAKE, FAIL) and left:
            again = tells and choice % 5 == 0
            chunk = (chunks if again else left)[choice % len(chunks if again else left)]
            if kind == TAKE:
                out += worker.take(chunk)
                left = [each for each in left if each is not chunk]
            else:
                with worker.failing_bundle():
                    worker.take(chunk)
        elif kind == LOOK and began:
            out += worker.collect()
        elif kind == DUE and began:
            out += worker.close_due()
        elif kind == LOSE:
            worker.start_process()
        elif kind == LAPSE:
            worker.now += LEASE_SECS + 1
    for chunk in left:
        out += worker.take(chunk)
    if chunks:
        out += worker.drain()
    answered = [o for each in out for part in each.parts for o in part.offsets]  # type: ignore[union-attr]
    records = [o for chunk in chunks for o in chunk.records.offsets]
    if tells:
        _tile(out, 0, at)
        assert answered == records
    else:
        assert sorted(answered) == records
    assert worker.held == 0
