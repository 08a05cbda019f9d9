"""Invoker: what an operator does to a partition, and books that balance whatever is done."""

from __future__ import annotations

import random

import pytest

from tests.transforms.invoke.test_invoker import (
    GUARD_SECS,
    A,
    B,
    C,
    Function,
    Timer,
    _answered,
    _batch,
    _failed,
    _running,
    both_ways,
)
from transforms.conditions import SKIPPED
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.invoker import Invoker
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, RetryPolicy
from transforms.records import Batch
from transforms.tally import BOOKS, RELEASED

FOR_EVER = RetryPolicy(max_retries=-1, halt=False, wait_initial_secs=100, wait_max_secs=100)


def _wait(invoker: Invoker, holds) -> None:  # type: ignore[no-untyped-def]
    assert invoker.wait(holds, GUARD_SECS)


@both_ways
def test_a_paused_partition_ends_what_runs_and_begins_nothing(ahead: bool) -> None:
    """What it was given stays, and goes on where it stood; the others go on meanwhile."""
    function = Function()
    with _running(function, ahead) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), _batch(A, 1)])
        function.wait_for_calls(1)
        invoker.pause([A])
        function.let_go()
        invoker.submit([_batch(A, 2), _batch(B, 0)])
        _wait(invoker, lambda i: i.done_batches == 2)
        assert function.of(A) == [(0, 0)]
        assert function.of(B) == [(0, 0)]
        assert invoker.queue(A).batches == 2
        assert invoker.has_work
        invoker.pause([B])
        _wait(invoker, lambda i: i.done_batches == 4)
        assert function.of(A) == [(0, 0), (1, 1), (2, 2)]


def test_a_back_off_of_a_paused_partition_waits_for_it_to_be_resumed() -> None:
    timer = Timer()

    def answer(batch: Batch, call: Call) -> Outcome:
        fails = batch.key == A and call.attempt == 1
        return _failed() if fails else _answered(batch, call)

    function = Function(answer)
    policy = RetryPolicy(max_retries=5, halt=False, wait_initial_secs=10)
    with _running(function, False, policy, timer=timer, random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 0)])
        _wait(invoker, lambda i: i.queue(A).waiting)
        invoker.pause([A])
        timer.secs = 1000
        invoker.submit([_batch(B, 0)])
        _wait(invoker, lambda i: i.has_finished_of(B))
        assert len(function.of(A)) == 1
        invoker.pause([])
        _wait(invoker, lambda i: i.queue(A).batches == 0)
    assert len(function.of(A)) == 2


def test_a_paused_partition_can_be_abandoned_halted_and_stopped() -> None:
    """Nothing of it stays in a line that nobody works."""
    function = Function()
    with _running(function, False) as invoker:
        invoker.pause([A, B])
        invoker.submit([_batch(A, 0), _batch(B, 0), _batch(C, 0)])
        _wait(invoker, lambda i: i.done_batches == 1)
        invoker.abandon((*A, 0))
        invoker.retire(B)
        assert not invoker.has_work
        invoker.pause([])
        invoker.submit([_batch(A, 5)])
        _wait(invoker, lambda i: i.done_batches == 2)
    assert function.of(A) == [(5, 5)]
    assert function.of(B) == []


def test_a_back_off_is_ended() -> None:
    """Of the partition that is meant, and of no other."""
    fails = {A, B}

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed() if batch.key in fails else _answered(batch, call)

    function = Function(answer)
    with _running(function, False, FOR_EVER, random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 0), _batch(B, 0)])
        _wait(invoker, lambda i: i.queue(A).waiting and i.queue(B).waiting)
        assert invoker.retry([C]) == set()
        fails.clear()
        assert invoker.retry([A, C]) == {A}
        _wait(invoker, lambda i: i.done_batches == 1)
        assert invoker.queue(B).waiting
        assert invoker.retry([A, B]) == {B}
        _wait(invoker, lambda i: i.done_batches == 2)


@pytest.mark.parametrize("paused", [False, True])
def test_a_partition_that_backs_off_is_halted_in_front_of_its_record(paused: bool) -> None:
    """With what is done of the batch; only if that record is meant, and none is being invoked."""

    def answer(batch: Batch, call: Call) -> Outcome:
        if call.low == 0 and len(call) == 3:
            return Outcome(Kind.PARTIAL, error_type="Named", failed=(1,))
        return _failed()

    function = Function(answer)
    with _running(function, False, FOR_EVER, random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 10, 3), _batch(A, 13)])
        _wait(invoker, lambda i: i.queue(A).waiting)
        if paused:
            invoker.pause([A])
        assert invoker.stop_at(A, 10) is None
        assert invoker.stop_at(B) is None
        halt = invoker.stop_at(A, 11)
        assert halt and halt.halted
        assert list(halt.halted.records.offsets) == [11]
        assert halt.halted.condition == SKIPPED
        assert halt.next_offset == 11
        assert [list(part.offsets) for part in halt.parts] == [[10]]  # type: ignore[union-attr]
        assert invoker.halted == [halt]
        assert not invoker.has_work
        assert invoker.stop_at(A) is None


def test_a_breaker_does_not_keep_a_partition_from_being_stopped() -> None:
    function = Function(lambda batch, call: _failed(Kind.TRANSIENT))
    policy = RetryPolicy(halt=False)
    breaker = BreakerPolicy(0.5, 2, 1000)
    with _running(function, False, policy, breaker=breaker, random=lambda: 0.0) as invoker:
        invoker.submit([_batch(A, 0), _batch(B, 0)])
        _wait(invoker, lambda i: i.breaker_open and i.queue(A).waiting and i.queue(B).waiting)
        assert invoker.retry([A]) == set()
        assert invoker.stop_at(A, 0)
        assert invoker.queue(B).batches == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_books_balance_whatever_is_done(seed: int) -> None:
    """What was handed over is here, collected or released: never nowhere, never twice."""
    rand = random.Random(seed)

    def answer(batch: Batch, call: Call) -> Outcome:
        kind = rand.choice([Kind.SUCCESS] * 4 + [Kind.FUNCTION_ERROR, Kind.TRANSIENT])
        return _answered(batch, call) if kind is Kind.SUCCESS else _failed(kind)

    policy = RetryPolicy(max_retries=1, halt=seed % 2 == 0, bisect=seed % 3 == 0)
    before = BOOKS.take().total(RELEASED)
    submitted = collected = 0
    ends = dict.fromkeys((A, B, C), 0)
    with _running(Function(answer), seed % 4 > 1, policy, concurrency=2) as invoker:

        def check() -> None:
            books, held = invoker.books()
            released = books.total(RELEASED) - before
            assert submitted == collected + sum(held.values()) + released

        for _ in range(150):
            key = rand.choice([A, B, C])
            match rand.randrange(8):
                case 0 | 1 | 2:
                    count = rand.randrange(1, 5)
                    submitted += count
                    invoker.submit([_batch(key, ends[key], count)])
                    ends[key] += count
                case 3:
                    for finished in invoker.collect():
                        collected += sum(map(len, finished.parts))
                case 4:
                    invoker.pause(rand.sample([A, B, C], rand.randrange(3)))
                case 5:
                    invoker.retry([key])
                case 6:
                    invoker.stop_at(key)
                case 7:
                    rand.choice([invoker.retire, lambda k: invoker.abandon((*k, 0))])(key)
            check()
        invoker.stop()
        invoker.join(GUARD_SECS)
        check()
