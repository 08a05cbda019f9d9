"""Handover: the state and the process agree on what is pending, or it is handed over again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeline.local.processes import wait_until
from transforms.invoke.handover import LEASE_SECS, Handover
from transforms.invoke.invoker import Invoker
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, RetryPolicy
from transforms.records import Batch, LaneKey, Records

KEY: LaneKey = ("orders", 0, 0)


def _batch(offset: int) -> Batch:
    records = Records([offset], [1], [None], [b"v"], [None])
    return Batch("orders", 0, offset, offset + 1, records, [b"{}"])


class Function:
    """A function that answers when it is let go, and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(
        self, batch: Batch, call: Call, request: None, meanwhile: Callable[[], None]
    ) -> Outcome:
        self.calls.append(batch.start)
        assert self.go.wait(30)
        return Outcome(Kind.SUCCESS)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _handover(function: Function, clock: Clock | None = None) -> Handover:
    def make(may_begin: Callable[[LaneKey], bool]) -> Invoker:
        return Invoker(
            lambda batch, call: None,
            function,
            RetryPolicy(),
            4,
            clock=lambda: 0.0,
            random=lambda: 0.0,
            may_begin=may_begin,
        )

    return Handover(make, clock or Clock())


def _starts(handover: Handover, head: int, count: int) -> list[int]:
    """Starts of what is finished, once there are so many."""
    wait_until(lambda: len(handover.finished(KEY, head)) >= count, "not finished")
    return [finished.start for finished in handover.finished(KEY, head)]


def test_outcomes_stay_until_the_state_has_let_go_of_them() -> None:
    handover = _handover(Function())
    assert not handover.agree(KEY, "", 0, 0)
    handover.begin(KEY, "a", 0, [])
    for offset in range(3):
        handover.submit(KEY, _batch(offset))
    assert _starts(handover, 0, 3) == [0, 1, 2]
    # A bundle that failed comes again with the head it had before.
    assert handover.agree(KEY, "a", 0, 3)
    assert _starts(handover, 0, 3) == [0, 1, 2]
    assert handover.agree(KEY, "a", 2, 3)
    assert _starts(handover, 2, 1) == [2]
    # What was let go of is gone: a state that has gone back to it has to hand over again.
    assert not handover.agree(KEY, "a", 1, 3)


def test_a_process_that_knows_nothing_is_handed_everything() -> None:
    function = Function()
    handover = _handover(function)
    assert not handover.agree(KEY, "from-before", 5, 7)
    handover.begin(KEY, "new", 5, [_batch(50), _batch(51)])
    assert _starts(handover, 5, 2) == [50, 51]
    assert handover.agree(KEY, "new", 7, 7)
    assert function.calls == [50, 51]


def test_a_process_that_is_ahead_of_a_restored_state_forgets_what_it_has() -> None:
    function = Function()
    function.go.clear()
    handover = _handover(function)
    handover.begin(KEY, "a", 0, [_batch(0), _batch(1), _batch(2)])
    wait_until(lambda: function.calls == [0], "not called")
    # The checkpoint knew of two batches only; the third may come out another one.
    assert not handover.agree(KEY, "a", 0, 2)
    handover.begin(KEY, "b", 0, [_batch(0), _batch(1)])
    function.go.set()
    assert _starts(handover, 0, 2) == [0, 1]
    # The call that ran counts for nothing, and no other began before it had ended.
    assert function.calls == [0, 0, 1]


def test_the_same_numbers_of_another_handing_over_do_not_agree() -> None:
    handover = _handover(Function())
    handover.begin(KEY, "a", 0, [_batch(0)])
    assert not handover.agree(KEY, "b", 0, 1)


def test_a_key_without_a_sign_of_life_is_not_worked_on() -> None:
    function, clock = Function(), Clock()
    function.go.clear()
    handover = _handover(function, clock)
    handover.begin(KEY, "a", 0, [_batch(0), _batch(1), _batch(2)])
    wait_until(lambda: function.calls == [0], "not called")
    clock.now = LEASE_SECS + 1
    function.go.set()
    wait_until(lambda: handover.invoker.pending_batches == 0, "still worked on")
    assert function.calls == [0]
    assert not handover.agree(KEY, "a", 0, 3)
    handover.begin(KEY, "b", 0, [_batch(0), _batch(1), _batch(2)])
    assert _starts(handover, 0, 3) == [0, 1, 2]


def test_a_renewed_key_goes_on() -> None:
    function, clock = Function(), Clock()
    function.go.clear()
    handover = _handover(function, clock)
    handover.begin(KEY, "a", 0, [_batch(0), _batch(1)])
    wait_until(lambda: function.calls == [0], "not called")
    clock.now = LEASE_SECS - 1
    handover.renew(KEY)
    clock.now = LEASE_SECS + 1
    function.go.set()
    assert _starts(handover, 0, 2) == [0, 1]
