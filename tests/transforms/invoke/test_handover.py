"""Handover: the state and the process agree on what is pending, or it is handed over again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipeline.local.processes import wait_until
from transforms.invoke.handover import LEASE_SECS, LET_GO_SECS, Handover, Marked
from transforms.invoke.invoker import Invoker
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, RetryPolicy
from transforms.records import Batch, LaneKey, Records

KEY: LaneKey = ("orders", 0, 0)


def _batch(offset: int) -> Batch:
    records = Records([offset], [1], [None], [b"v"], [None])
    return Batch("orders", 0, offset, offset + 1, records, [b"{}"])


def _marked(batches: list[Batch]) -> list[Marked]:
    return [(batch, batch.next_offset) for batch in batches]


class Function:
    """A function that answers when it is let go, and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.answer = Outcome(Kind.SUCCESS)
        self.go = threading.Event()
        self.go.set()

    def __call__(
        self, batch: Batch, call: Call, request: None, meanwhile: Callable[[], None]
    ) -> Outcome:
        self.calls.append(batch.start)
        assert self.go.wait(30)
        return self.answer


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
    assert handover.agree(KEY, "", 0, 0) is None
    handover.begin(KEY, "a", 0, [])
    for offset in range(3):
        handover.submit(KEY, _batch(offset))
    assert _starts(handover, 0, 3) == [0, 1, 2]
    # A bundle that failed comes again with the head it had before.
    assert handover.agree(KEY, "a", 0, 3) == 3
    assert _starts(handover, 0, 3) == [0, 1, 2]
    assert handover.agree(KEY, "a", 2, 3) == 3
    assert _starts(handover, 2, 1) == [2]
    # What was let go of is gone: a state that has gone back to it has to hand over again.
    assert handover.agree(KEY, "a", 1, 3) is None


def test_a_process_that_knows_nothing_is_handed_everything() -> None:
    function = Function()
    handover = _handover(function)
    assert handover.agree(KEY, "from-before", 5, 7) is None
    handover.begin(KEY, "new", 5, _marked([_batch(50), _batch(51)]))
    assert _starts(handover, 5, 2) == [50, 51]
    assert handover.agree(KEY, "new", 7, 7) == 7
    assert function.calls == [50, 51]


def test_a_process_that_is_ahead_of_a_restored_state_forgets_what_it_has() -> None:
    function = Function()
    function.go.clear()
    handover = _handover(function)
    handover.begin(KEY, "a", 0, _marked([_batch(0), _batch(1), _batch(2)]))
    wait_until(lambda: function.calls == [0], "not called")
    # The checkpoint knew of two batches only; the third may come out another one.
    assert handover.agree(KEY, "a", 0, 2) is None
    handover.begin(KEY, "b", 0, _marked([_batch(0), _batch(1)]))
    function.go.set()
    assert _starts(handover, 0, 2) == [0, 1]
    # The call that ran counts for nothing, and no other began before it had ended.
    assert function.calls == [0, 0, 1]


def test_a_process_that_is_ahead_in_chunks_only_forgets_what_it_has() -> None:
    """A bundle that failed has put records into the open batch, and ended none."""
    handover = _handover(Function())
    handover.begin(KEY, "a", 0, [], 1, "open")
    assert handover.agree(KEY, "a", 0, 0, 1) == 0
    assert handover.open(KEY) == "open"
    handover.keep(KEY, 2, "more")
    assert handover.agree(KEY, "a", 0, 0, 1) is None
    assert handover.open(KEY) is None


def test_marks_go_with_their_batches() -> None:
    function, clock = Function(), Clock()
    handover = _lapsed(function, clock, 3)
    assert [handover.mark(KEY, number) for number in range(3)] == [1, 2, 3]
    assert handover.agree(KEY, "a", 0, 3) == 1
    # What is handed over again may be divided otherwise.
    handover.resume(KEY, [(_batch(1), 3)])
    assert _starts(handover, 0, 2) == [0, 1]
    assert [handover.mark(KEY, number) for number in range(2)] == [1, 3]
    assert handover.agree(KEY, "a", 1, 2) == 2
    assert handover.mark(KEY, 1) == 3


def test_the_same_numbers_of_another_handing_over_do_not_agree() -> None:
    handover = _handover(Function())
    handover.begin(KEY, "a", 0, _marked([_batch(0)]))
    assert handover.agree(KEY, "b", 0, 1) is None


def _lapsed(function: Function, clock: Clock, batches: int) -> Handover:
    """A key of which nothing was heard for too long while its first call was running."""
    function.go.clear()
    handover = _handover(function, clock)
    handover.begin(KEY, "a", 0, _marked([_batch(number) for number in range(batches)]))
    wait_until(lambda: function.calls == [0], "not called")
    clock.now = LEASE_SECS + 1
    function.go.set()
    wait_until(lambda: handover.invoker.pending_batches == 0, "still worked on")
    assert function.calls == [0]
    return handover


def test_a_key_without_a_sign_of_life_keeps_what_is_finished_and_begins_nothing() -> None:
    function, clock = Function(), Clock()
    handover = _lapsed(function, clock, 3)
    assert handover.agree(KEY, "a", 0, 3) == 1
    handover.resume(KEY, _marked([_batch(1), _batch(2)]))
    assert _starts(handover, 0, 3) == [0, 1, 2]
    assert handover.agree(KEY, "a", 3, 3) == 3
    assert function.calls == [0, 1, 2]


def test_looks_that_are_further_apart_than_a_lease_get_on() -> None:
    function, clock = Function(), Clock()
    handover = _lapsed(function, clock, 20)
    head = turns = 0
    while head < 20:
        held = handover.agree(KEY, "a", head, 20)
        assert held is not None
        if held < 20:
            handover.resume(KEY, _marked([_batch(number) for number in range(held, 20)]))
        wait_until(lambda: handover.finished(KEY, head), "no progress")  # noqa: B023
        head += len(handover.finished(KEY, head))
        clock.now += 2 * LEASE_SECS
        turns += 1
    assert function.calls == list(range(20))


def test_a_batch_that_comes_when_the_lease_has_lapsed_waits_for_those_before_it() -> None:
    function, clock = Function(), Clock()
    handover = _lapsed(function, clock, 2)
    # The process stood still between agreeing and this.
    handover.submit(KEY, _batch(2))
    assert handover.agree(KEY, "a", 0, 3) == 1
    handover.resume(KEY, _marked([_batch(1), _batch(2)]))
    assert _starts(handover, 0, 3) == [0, 1, 2]
    assert function.calls == [0, 1, 2]


def test_a_batch_of_a_key_that_was_let_go_of_is_handed_over_with_the_next_look() -> None:
    handover = _handover(Function())
    handover.submit(KEY, _batch(0))
    assert handover.agree(KEY, "a", 0, 1) is None


def test_a_key_that_has_moved_to_another_worker_is_let_go_of() -> None:
    clock = Clock()
    handover = _handover(Function(), clock)
    handover.begin(KEY, "a", 0, _marked([_batch(0)]))
    assert _starts(handover, 0, 1) == [0]
    other = ("orders", 1, 0)
    clock.now = LET_GO_SECS - 1
    handover.agree(other, "", 0, 0)
    assert handover.finished(KEY, 0)
    clock.now = LET_GO_SECS + LEASE_SECS
    handover.agree(other, "", 0, 0)
    assert not handover.finished(KEY, 0)


def test_another_lane_s_halt_outlives_a_lapse() -> None:
    clock = Clock()
    function = Function()
    handover = _lapsed(function, clock, 2)
    lane = Batch("orders", 0, 9, 10, _batch(9).records, [b"{}"], lane=1)
    function.answer = Outcome(Kind.FUNCTION_ERROR, error_type="ValueError", message="m")
    handover.begin(("orders", 0, 1), "l", 0, _marked([lane]))
    wait_until(lambda: handover.invoker.queue(("orders", 0)).halted, "not halted")
    function.answer = Outcome(Kind.SUCCESS)
    assert handover.agree(KEY, "a", 0, 2) == 1
    handover.resume(KEY, _marked([_batch(1)]))
    assert handover.invoker.queue(("orders", 0)).halted
    assert function.calls == [0, 9]


def test_a_renewed_key_goes_on() -> None:
    function, clock = Function(), Clock()
    function.go.clear()
    handover = _handover(function, clock)
    handover.begin(KEY, "a", 0, _marked([_batch(0), _batch(1)]))
    wait_until(lambda: function.calls == [0], "not called")
    clock.now = LEASE_SECS - 1
    handover.renew(KEY)
    clock.now = LEASE_SECS + 1
    function.go.set()
    assert _starts(handover, 0, 2) == [0, 1]
