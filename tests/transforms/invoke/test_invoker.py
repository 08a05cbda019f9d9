"""Invoker: queues worked in order, side by side, on real threads; nothing here sleeps."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.commit.contiguous import ContiguousOffsets
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.invoker import Invoker, QueueView
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, RetryPolicy
from transforms.lanes import Lanes
from transforms.records import (
    FINAL,
    Batch,
    CallStats,
    Failure,
    Finished,
    Progress,
    RecordChunk,
    Records,
    Rejection,
    Responses,
)
from transforms.tally import BATCH_WAIT, BOOKS, DURATION, INVOCATIONS, INVOKED, RELEASED, TALLY

GUARD_SECS = 20.0
"""Only so that a test which would hang fails instead; nothing is measured by it."""

GO_ON = RetryPolicy(halt=False)
A, B, C = ("t", 0), ("t", 1), ("t", 2)

both_ways = pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])


def _batch(key: tuple[str, int], start: int, count: int = 1, lane: int = 0) -> Batch:
    offsets = list(range(start, start + count))
    records = Records(offsets, [1] * count, [None] * count, [b"v"] * count, [None] * count)
    entries = [b"%d" % offset for offset in offsets]
    return Batch(*key, start, start + count, records, entries, lane=lane)


def _answered(batch: Batch, call: Call) -> Outcome:
    return Outcome(Kind.SUCCESS, results=batch.entries[call.low : call.high])


def _failed(kind: Kind = Kind.FUNCTION_ERROR, **more) -> Outcome:
    return Outcome(kind, error_type=kind.name, **more)


class Function:
    """Answers calls as it is told, and notes who is in it at once."""

    def __init__(self, answer: Callable[[Batch, Call], Outcome] = _answered) -> None:
        self.answer = answer
        self.changed = threading.Condition()
        self.calls: list[tuple[tuple[str, int], int, int]] = []
        self.inside: dict[tuple[str, int], int] = defaultdict(int)
        self.most = 0
        self.most_of_one = 0
        self.held: set[tuple[str, int]] = set()
        self.prepared: list[tuple[tuple[str, int], int]] = []
        self.sent_prepared: list[tuple[tuple[str, int], int]] = []
        self.threads: dict[tuple[str, int], set[int]] = defaultdict(set)
        # Done with a call that has been sent, before anything else.
        self.on_sent: Callable[[Batch], None] = lambda batch: None

    def __call__(
        self, batch: Batch, call: Call, request: Any, meanwhile: Callable[[], None]
    ) -> Outcome:
        offsets = batch.records.offsets
        with self.changed:
            self.calls.append((batch.key, offsets[call.low], offsets[call.high - 1]))
            self.inside[batch.key] += 1
            self.most = max(self.most, sum(self.inside.values()))
            self.most_of_one = max(self.most_of_one, self.inside[batch.key])
            self.threads[batch.key].add(threading.get_ident())
            self.changed.notify_all()
        if request is not None:
            assert request == (batch, call)
            self.sent_prepared.append((batch.key, batch.start))
        self.on_sent(batch)
        meanwhile()
        with self.changed:
            assert self.changed.wait_for(lambda: batch.key not in self.held, GUARD_SECS)
        try:
            return self.answer(batch, call)
        finally:
            with self.changed:
                self.inside[batch.key] -= 1

    def prepare(self, batch: Batch, call: Call) -> Any:
        with self.changed:
            self.prepared.append((batch.key, batch.start))
            self.changed.notify_all()
        return batch, call

    def hold(self, *keys: tuple[str, int]) -> None:
        """Calls for these keys do not return until they are let go."""
        with self.changed:
            self.held |= set(keys)

    def let_go(self) -> None:
        with self.changed:
            self.held.clear()
            self.changed.notify_all()

    def wait_for_calls(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.calls) >= count, GUARD_SECS)

    def of(self, key: tuple[str, int]) -> list[tuple[int, int]]:
        return [(low, high) for each, low, high in self.calls if each == key]


class Timer:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.secs = 0.0

    def __call__(self) -> float:
        return self.secs


@contextmanager
def _running(
    function: Function, ahead: bool, policy: RetryPolicy = GO_ON, concurrency: int = 4, **more
) -> Iterator[Invoker]:
    """An invoker whose threads end with the test."""
    prepare = function.prepare if ahead else lambda batch, call: None
    fixed = {"clock": lambda: 1e9, "random": lambda: 0.0}
    invoker = Invoker(prepare, function, policy, concurrency, **(fixed | more))
    try:
        yield invoker
    finally:
        invoker.stop()
        function.let_go()
        assert invoker.join(GUARD_SECS) or invoker.broken


def _until(invoker: Invoker, done: Callable[[Invoker], bool]) -> None:
    """Wait for something that is no result; asked again and again, since nothing tells of it."""
    assert any(invoker.wait(done, 0.01) for _ in range(int(GUARD_SECS * 100)))


def _drain(invoker: Invoker) -> dict[tuple[str, int], list[Finished]]:
    """Wait until nothing is pending; what has finished, by key."""
    assert invoker.wait(lambda i: not i.pending_batches or bool(i.broken), GUARD_SECS)
    return _by_key(invoker.collect())


def _by_key(finished: list[Finished]) -> dict[tuple[str, int], list[Finished]]:
    by_key: dict[tuple[str, int], list[Finished]] = defaultdict(list)
    for each in finished:
        by_key[each.key].append(each)
    return by_key


def _offsets(finished: list[Finished]) -> list[int]:
    return [
        offset
        for each in finished
        for part in each.parts
        for offset in (part.offsets if isinstance(part, Responses) else part.records.offsets)
    ]


# -- order and concurrency ----------------------------------------------------------------


@both_ways
def test_a_key_s_batches_go_one_by_one_in_order(ahead: bool) -> None:
    """However many threads there are, a partition has one call at a time, in offset order."""
    function = Function()
    keys = [("t", partition) for partition in range(5)]
    with _running(function, ahead, concurrency=8) as invoker:
        for start in range(0, 120, 3):
            invoker.submit(_batch(key, start, 3) for key in keys)
        finished = _drain(invoker)
    assert function.most_of_one == 1
    for key in keys:
        assert function.of(key) == [(start, start + 2) for start in range(0, 120, 3)]
        assert _offsets(finished[key]) == list(range(120))
        assert [each.start for each in finished[key]] == list(range(0, 120, 3))


@both_ways
def test_different_keys_run_side_by_side(ahead: bool) -> None:
    """As many calls at once as there are partitions and threads allowed."""
    together = threading.Barrier(3)

    def answer(batch: Batch, call: Call) -> Outcome:
        together.wait(GUARD_SECS)  # passes only when all three are in it
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, concurrency=3) as invoker:
        for start in range(4):
            invoker.submit(_batch(key, start) for key in (A, B, C))
        finished = _drain(invoker)
    assert sorted(finished) == [A, B, C]
    assert [_offsets(each) for each in finished.values()] == [[0, 1, 2, 3]] * 3
    assert function.most == 3


@both_ways
@pytest.mark.parametrize("concurrency", [1, 2, 3])
def test_never_more_calls_at_once_than_allowed(ahead: bool, concurrency: int) -> None:
    """The limit is reached, and never passed, whatever is waiting."""
    together = threading.Barrier(concurrency)

    def answer(batch: Batch, call: Call) -> Outcome:
        together.wait(GUARD_SECS)
        return _answered(batch, call)

    function = Function(answer)
    keys = [("t", partition) for partition in range(6)]
    with _running(function, ahead, concurrency=concurrency) as invoker:
        function.hold(*keys)
        for key in keys:
            invoker.submit([_batch(key, 0)])
        function.wait_for_calls(concurrency)
        assert invoker.in_flight == concurrency
        function.let_go()
        finished = _drain(invoker)
        assert invoker.in_flight == 0
    assert function.most == concurrency
    assert sorted(finished) == keys


@both_ways
def test_many_queues_on_few_threads_all_get_their_turn(ahead: bool) -> None:
    """More partitions than threads: all are worked to their end, and the limit holds."""
    function = Function()
    keys = [("t", partition) for partition in range(20)]
    with _running(function, ahead, concurrency=2) as invoker:
        invoker.submit(_batch(key, start) for start in range(20) for key in keys)
        finished = _drain(invoker)
    assert function.most <= 2
    for key in keys:
        assert _offsets(finished[key]) == list(range(20))


@both_ways
def test_a_key_that_backs_off_holds_no_thread(ahead: bool) -> None:
    """With a single thread, one partition waiting for its repeat does not stop another."""
    timer = Timer()
    failures = [_failed(Kind.TRANSIENT)]

    def answer(batch: Batch, call: Call) -> Outcome:
        return failures.pop() if batch.key == A and failures else _answered(batch, call)

    function = Function(answer)
    more = {"timer": timer, "random": lambda: 1.0}
    with _running(function, ahead, concurrency=1, **more) as invoker:
        invoker.submit([_batch(A, 0), _batch(A, 1)])
        _until(invoker, lambda i: i.queue(A).waiting)
        invoker.submit([_batch(B, 0), _batch(B, 1)])
        assert invoker.wait(lambda i: not i.queue(B).batches, GUARD_SECS)
        assert invoker.queue(A) == QueueView(2, 2, 8, waiting=True, stuck=True, busy=frozenset({0}))
        assert [each.key for each in invoker.collect()] == [B, B]
        assert function.of(A) == [(0, 0)]
        timer.secs = 100.0
        invoker.submit([_batch(C, 0)])
        finished = _drain(invoker)
    assert _offsets(finished[A]) == [0, 1]
    assert function.of(A) == [(0, 0), (0, 0), (1, 1)]


@both_ways
def test_keys_that_back_off_hold_no_threads_for_what_comes_behind(ahead: bool) -> None:
    """More batches for partitions that wait take no thread from those that do not."""
    failing = {A, B}

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed(Kind.TRANSIENT) if batch.key in failing else _answered(batch, call)

    function = Function(answer)
    timer = Timer()
    more = {"timer": timer, "random": lambda: 1.0}
    with _running(function, ahead, concurrency=1, **more) as invoker:
        invoker.submit([_batch(A, 0), _batch(B, 0)])
        _until(invoker, lambda i: i.queue(A).waiting and i.queue(B).waiting)
        for start in (1, 2):
            invoker.submit([_batch(A, start), _batch(B, start)])
        for start in range(3):
            invoker.submit([_batch(C, start)])
            assert invoker.wait(lambda i: not i.queue(C).batches, GUARD_SECS)
        assert invoker.queue(A).waiting
        assert invoker.queue(B).waiting
        failing.clear()
        timer.secs = 100.0
        invoker.submit([_batch(C, 3)])
        finished = _drain(invoker)
    assert _offsets(finished[A]) == _offsets(finished[B]) == [0, 1, 2]


@both_ways
@pytest.mark.parametrize("idle", [1, 2])
def test_an_idle_thread_does_not_stand_for_all(ahead: bool, idle: int) -> None:
    """After a quiet time, too, as many calls begin at once as are allowed and there are."""
    together = threading.Barrier(idle)

    def answer(batch: Batch, call: Call) -> Outcome:
        together.wait(GUARD_SECS)
        return _answered(batch, call)

    function = Function(answer)
    keys = [("t", partition) for partition in range(4)]
    with _running(function, ahead, concurrency=4) as invoker:
        invoker.submit(_batch(key, 0) for key in keys[:idle])
        _drain(invoker)
        together = threading.Barrier(4)
        invoker.submit(_batch(key, 1) for key in keys)
        finished = _drain(invoker)
        assert invoker.broken is None
    assert sorted(finished) == keys
    assert function.most == 4


@both_ways
def test_partitions_take_turns_where_there_are_more_than_may_run(ahead: bool) -> None:
    """A queue that never gets empty does not keep the others from the function."""
    function = Function()
    keys = [("t", partition) for partition in range(6)]
    with _running(function, ahead, concurrency=1) as invoker:
        function.hold(*keys)
        invoker.submit(_batch(key, start) for start in range(20) for key in keys)
        function.let_go()
        _drain(invoker)
    assert [key for key, *_ in function.calls] == keys * 20


def test_a_wait_ends_in_time_while_another_partition_s_call_runs() -> None:
    """Somebody is there to take it up."""
    failures = [_failed(Kind.TRANSIENT)]

    def answer(batch: Batch, call: Call) -> Outcome:
        return failures.pop() if batch.key == A and failures else _answered(batch, call)

    function = Function(answer)
    timer = Timer()
    with _running(function, True, concurrency=2, timer=timer, random=lambda: 1.0) as invoker:
        function.hold(B)
        invoker.submit([_batch(B, 0), _batch(B, 1)])
        function.wait_for_calls(1)
        invoker.submit([_batch(A, 0)])
        # The thread of A's call is free again, and waits for what it has to do.
        _until(invoker, lambda i: i.queue(A).waiting and i._idle == 1)
        timer.secs = 100.0
        invoker.submit([_batch(C, 0)])
        assert invoker.wait(lambda i: not i.queue(A).batches, GUARD_SECS)
        function.let_go()
        _drain(invoker)
    assert function.of(A) == [(0, 0), (0, 0)]


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged beside the failures themselves."""
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if not line.startswith("failed: t-0 offset 0: throttled")]


def test_a_long_wait_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """With its partition; one that an answer asked for, since none of ours is so long."""
    waits = [30.0, 31.0]

    def answer(batch: Batch, call: Call) -> Outcome:
        if waits:
            return _failed(Kind.THROTTLED, retry_after_secs=waits.pop(0))
        return _answered(batch, call)

    timer = Timer()
    with _running(Function(answer), False, timer=timer) as invoker:
        invoker.submit([_batch(A, 0)])
        _until(invoker, lambda i: i.queue(A).waiting)
        assert _told(caplog) == []
        timer.secs = 30.0
        _nudge(invoker)
        _until(invoker, lambda i: i.queue(A).waiting and not waits)
        timer.secs = 61.0
        _nudge(invoker)
        _drain(invoker)
    (line,) = _told(caplog)
    assert line == (
        "t-0 waits 31 s before its next invocation, as the answer to the last one asked for "
        "(Retry-After)"
    )


@both_ways
def test_shorter_waits_end_first(ahead: bool) -> None:
    """Each partition comes back when its own wait is over."""
    timer = Timer()
    asked = {A: 50.0, B: 5.0}

    def answer(batch: Batch, call: Call) -> Outcome:
        secs = asked.pop(batch.key, None)
        return _failed(Kind.THROTTLED, retry_after_secs=secs) if secs else _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, concurrency=1, timer=timer) as invoker:
        invoker.submit([_batch(A, 0), _batch(B, 0)])
        _until(invoker, lambda i: i.queue(A).waiting and i.queue(B).waiting)
        timer.secs = 10.0
        invoker.submit([_batch(C, 0)])
        assert invoker.wait(lambda i: not i.queue(B).batches, GUARD_SECS)
        assert invoker.queue(A).waiting
        timer.secs = 60.0
        invoker.submit([_batch(C, 1)])
        _drain(invoker)
    assert function.of(A) == [(0, 0), (0, 0)]


def test_what_is_tried_again_is_work_at_every_moment() -> None:
    """A run that is to end asks; on its way from one line to another a batch was in none of them,
    and the run ended with 0 before it was answered."""
    function = Function(lambda batch, call: _failed(Kind.TRANSIENT))
    before = sys.getswitchinterval()
    with _running(function, False) as invoker:
        invoker.submit([_batch(A, 0)])
        sys.setswitchinterval(1e-6)
        try:
            until = time.monotonic() + 2
            while time.monotonic() < until:
                assert all(invoker.has_work for _ in range(100))
        finally:
            sys.setswitchinterval(before)
    assert len(function.calls) > 10


# -- how many at once ---------------------------------------------------------------------


@both_ways
def test_throttled_calls_lower_how_many_run_at_once(ahead: bool) -> None:
    """Six at once are throttled: from then on there are four."""
    keys = [("t", partition) for partition in range(6)]
    # Those that come after the first six are held.
    together = threading.Barrier(6, action=lambda: function.hold(*keys))

    def answer(batch: Batch, call: Call) -> Outcome:
        if len(function.calls) > 6:
            return _answered(batch, call)
        together.wait(GUARD_SECS)
        return _failed(Kind.THROTTLED)

    function = Function(answer)
    with _running(function, ahead, concurrency=6) as invoker:
        assert invoker.limit == 6
        invoker.submit(_batch(key, start) for start in range(5) for key in keys)
        function.wait_for_calls(6 + 4)
        assert invoker.limit == invoker.in_flight == 4
        assert invoker.in_flight_max == 6
        function.let_go()
        finished = _drain(invoker)
    assert 4 <= invoker.limit <= 6
    for key in keys:
        assert _offsets(finished[key]) == [0, 1, 2, 3, 4]
    assert sum(each.stats.throttles for key in keys for each in finished[key]) == 6


@both_ways
def test_the_limit_rises_again_where_as_many_run_as_it_allows(ahead: bool) -> None:
    """There are never more, so it is at that number that it has to rise."""
    keys = [("t", partition) for partition in range(6)]
    throttles = [_failed(Kind.THROTTLED)]

    def answer(batch: Batch, call: Call) -> Outcome:
        if throttles:
            return throttles.pop()
        # So that calls overlap.
        time.sleep(0.001)
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, concurrency=4) as invoker:
        function.hold(*keys)
        invoker.submit(_batch(key, start) for start in range(20) for key in keys)
        function.wait_for_calls(4)
        function.let_go()
        finished = _drain(invoker)
        # The throttle has left two.
        assert invoker.limit > 2
    assert sum(each.stats.throttles for key in keys for each in finished[key]) == 1


@both_ways
def test_never_fewer_at_once_than_the_least(ahead: bool) -> None:
    """Whatever is throttled."""
    function = Function(lambda batch, call: _failed(Kind.THROTTLED))
    keys = [("t", partition) for partition in range(6)]
    with _running(function, ahead, concurrency=6, min_concurrency=3) as invoker:
        invoker.submit(_batch(key, 0) for key in keys)
        function.wait_for_calls(100)
        assert invoker.limit == 3


def test_a_split_batch_gives_its_place_back_where_too_many_run() -> None:
    """Between two of its calls; it goes on when there is room again."""
    D = ("t", 3)

    def answer(batch: Batch, call: Call) -> Outcome:
        if batch.key == D and len(function.of(D)) == 1:
            return _failed(Kind.THROTTLED)
        return _failed() if call.high - call.low > 1 else _answered(batch, call)

    function = Function(answer)
    policy = RetryPolicy(bisect=True, halt=False)
    with _running(function, False, policy, concurrency=4) as invoker:
        function.hold(A, B, C, D)
        invoker.submit([_batch(A, 0, 2), _batch(B, 0), _batch(C, 0), _batch(D, 0)])
        function.wait_for_calls(4)
        with function.changed:
            function.held = {A, B, C}
            function.changed.notify_all()
        # Two of four are allowed, and three are running.
        _until(invoker, lambda i: i.limit == 2 and i.in_flight == 3)
        with function.changed:
            function.held = {B, C}
            function.changed.notify_all()
        _until(invoker, lambda i: i._working == 2)
        assert function.of(A) == [(0, 1)]
        function.let_go()
        finished = _drain(invoker)
    assert function.of(A) == [(0, 1), (0, 0), (1, 1)]
    assert sorted(finished) == [A, B, C, D]


# -- lanes that have gone elsewhere --------------------------------------------------------


@both_ways
def test_a_lane_may_be_abandoned_while_it_stands_in_line(ahead: bool) -> None:
    """What it held is never called; what comes for it later is."""
    function = Function()
    with _running(function, ahead, concurrency=1) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), _batch(B, 0), _batch(C, 0)])
        function.wait_for_calls(1)
        invoker.abandon((*B, 0))
        function.let_go()
        assert set(_drain(invoker)) == {A, C}
        invoker.submit([_batch(B, 5)])
        assert _offsets(_drain(invoker)[B]) == [5]
    assert function.of(B) == [(5, 5)]


@both_ways
def test_a_lane_may_be_abandoned_while_it_is_called(ahead: bool) -> None:
    """What the call comes to counts for nothing, and what was prepared behind it is not sent."""
    function = Function()
    with _running(function, ahead) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), _batch(A, 1)])
        function.wait_for_calls(1)
        invoker.abandon((*A, 0))
        invoker.submit([_batch(A, 7)])
        function.let_go()
        assert _offsets(_drain(invoker)[A]) == [7]
    assert function.of(A) == [(0, 0), (7, 7)]
    assert function.sent_prepared == []


@both_ways
def test_a_retired_partition_ends_what_runs_and_begins_nothing(ahead: bool) -> None:
    """What its call comes to can be collected; taken back, it goes on with what comes then."""
    function = Function()
    with _running(function, ahead) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), _batch(A, 1), _batch(B, 0)])
        function.wait_for_calls(2)
        invoker.retire(A)
        invoker.submit([_batch(A, 2)])
        assert invoker.queue(A).batches == 1
        function.let_go()
        assert invoker.wait(lambda i: i.queue(A).batches == 0, GUARD_SECS)
        assert invoker.has_finished_of(A)
        assert invoker.wait(lambda i: i.has_finished_of(B), GUARD_SECS)
        assert _offsets(_drain(invoker)[A]) == [0]
        assert not invoker.has_finished_of(A)
        invoker.abandon((*A, 0))
        invoker.submit([_batch(A, 9)])
        assert _offsets(_drain(invoker)[A]) == [9]
    assert function.of(A) == [(0, 0), (9, 9)]
    assert function.sent_prepared == []


def test_a_retired_partition_that_backs_off_is_left_where_it_stands() -> None:
    """It is not waited for."""
    function = Function(lambda batch, call: _failed(Kind.TRANSIENT))
    with _running(function, False, timer=Timer(), random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 0)])
        assert invoker.wait(lambda i: i.queue(A).waiting, GUARD_SECS)
        invoker.retire(A)
        assert invoker.queue(A).batches == 0
        (finished,) = invoker.collect()
        assert (finished.start, finished.next_offset, finished.parts) == (0, 0, [])
    assert function.of(A) == [(0, 0)]


# -- prepared calls -----------------------------------------------------------------------


def test_while_a_call_runs_the_next_one_is_prepared_and_then_sent() -> None:
    """All but the first, if there is always a batch waiting; on one thread per partition."""
    function = Function()
    with _running(function, True) as invoker:
        function.hold(A, B)
        invoker.submit(_batch(key, start) for start in range(10) for key in (A, B))
        function.wait_for_calls(2)
        function.let_go()
        _drain(invoker)
    for key in (A, B):
        rest = [(key, start) for start in range(1, 10)]
        assert [each for each in function.prepared if each[0] == key] == rest
        assert [each for each in function.sent_prepared if each[0] == key] == rest
        assert len(function.threads[key]) == 1


def test_a_prepared_call_is_not_sent_when_it_is_old() -> None:
    """Its signature would be refused; the call is made all the same."""
    timer = Timer()

    def answer(batch: Batch, call: Call) -> Outcome:
        if batch.start == 1:
            timer.secs += 61.0
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, True, timer=timer) as invoker:
        function.hold(A)
        invoker.submit(_batch(A, start) for start in range(4))
        function.let_go()
        finished = _drain(invoker)
    assert _offsets(finished[A]) == [0, 1, 2, 3]
    assert function.sent_prepared == [(A, 1), (A, 3)]


def test_a_prepared_call_is_not_kept_behind_one_that_is_repeated() -> None:
    """It is prepared anew with the repeat."""
    failures = [_failed(Kind.TRANSIENT)]
    function = Function(lambda batch, call: failures.pop() if failures else _answered(batch, call))
    with _running(function, True) as invoker:
        function.hold(A)
        invoker.submit(_batch(A, start) for start in range(2))
        function.let_go()
        finished = _drain(invoker)
    assert _offsets(finished[A]) == [0, 1]
    assert function.of(A) == [(0, 0), (0, 0), (1, 1)]
    assert function.prepared == [(A, 1), (A, 1)]
    assert function.sent_prepared == [(A, 1)]


def test_a_prepared_call_is_not_sent_for_a_part_of_its_batch() -> None:
    """Records that became too old while it waited are left out."""
    now = [1e9]

    def answer(batch: Batch, call: Call) -> Outcome:
        now[0] = 2000.0
        return _answered(batch, call)

    function = Function(answer)
    policy = RetryPolicy(halt=False, max_record_age_secs=100)
    young = Records([1, 2], [1_000_000, 5_000_000], [None] * 2, [b"v"] * 2, [None] * 2)
    with _running(function, True, policy, clock=lambda: now[0]) as invoker:
        now[0] = 0.0
        function.hold(A)
        invoker.submit([_batch(A, 0), Batch(*A, 1, 3, young, [b"1", b"2"])])
        function.let_go()
        _drain(invoker)
    assert function.prepared == [(A, 1)]
    assert function.sent_prepared == []
    assert function.of(A) == [(0, 0), (2, 2)]


def test_nothing_is_prepared_where_partitions_take_turns() -> None:
    """By its turn it would be too old, and each one holds the bytes of its payload."""
    function = Function()
    with _running(function, True, concurrency=1) as invoker:
        function.hold(A, B)
        invoker.submit(_batch(key, start) for start in range(3) for key in (A, B))
        function.let_go()
        _drain(invoker)
    assert function.prepared == []


def test_what_cannot_be_prepared_ahead_is_called_when_its_turn_comes() -> None:
    """The reply that is under way has nothing to do with it."""
    function = Function()

    def prepare(batch: Batch, call: Call) -> Any:
        raise OSError("no token")

    function.prepare = prepare
    with _running(function, True) as invoker:
        function.hold(A)
        invoker.submit(_batch(A, start) for start in range(3))
        function.let_go()
        finished = _drain(invoker)
        assert invoker.broken is None
    assert _offsets(finished[A]) == [0, 1, 2]
    assert function.of(A) == [(0, 0), (1, 1), (2, 2)]


def test_what_is_never_called_is_not_prepared() -> None:
    """An empty range, and a record that was refused before."""
    function = Function()
    refused = replace(_batch(A, 5), rejection=Rejection("InvalidRecord", "InvalidJson", "no JSON"))
    with _running(function, True) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), Batch(*A, 1, 5, Records(), []), refused, _batch(A, 6)])
        function.let_go()
        _drain(invoker)
    assert function.prepared == []
    assert function.of(A) == [(0, 0), (6, 6)]


@pytest.mark.parametrize("put_back", [False, True])
def test_a_prepared_call_is_old_by_either_clock(put_back: bool) -> None:
    """Monotonic time stands still while a machine is suspended; a clock may have been wrong."""
    now = [1e9]

    def answer(batch: Batch, call: Call) -> Outcome:
        if batch.start == 1:
            now[0] += -61.0 if put_back else 61.0
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, True, clock=lambda: now[0], timer=Timer()) as invoker:
        function.hold(A)
        invoker.submit(_batch(A, start) for start in range(4))
        function.let_go()
        finished = _drain(invoker)
    assert _offsets(finished[A]) == [0, 1, 2, 3]
    assert function.sent_prepared == [(A, 1), (A, 3)]


# -- calls that are sent ahead ------------------------------------------------------------


class Sent:
    """Three batches of A: what is done when the second is sent, and what then became of them.

    The calls are noted with how many batches were counted as done when they were sent.
    """

    def __init__(
        self, done: int, do: Callable[[Invoker], None] = lambda invoker: None, **more: Any
    ) -> None:
        self.done_at: list[tuple[int, int]] = []
        self.function = Function(more.pop("answer", _answered))
        self.function.on_sent = self._on_sent
        self._do = do
        before = BOOKS.take()
        with _running(self.function, True, **more) as self._invoker:
            self.function.hold(A)
            self._invoker.submit(_batch(A, start) for start in range(3))
            # The second is sent when the first one's reply is there: it has been prepared by then.
            self.function.let_go()
            assert self._invoker.wait(
                lambda i: bool(i.broken) or i.done_batches == done, GUARD_SECS
            )
            self.view = self._invoker.queue(A)
            finished = self._invoker.collect()
            self.stats = self._invoker.stats
            self.broken = self._invoker.broken
        finished += self._invoker.collect()
        self.finished = _offsets(finished)
        self.released = BOOKS.take().since(before).total(RELEASED)

    def _on_sent(self, batch: Batch) -> None:
        self.done_at.append((batch.start, self._invoker.done_batches))
        if batch.start == 1:
            self._do(self._invoker)


def test_a_call_is_sent_before_the_one_in_front_of_it_is_booked() -> None:
    """The function is answered at once; nothing of what is counted is lost by it."""
    sent = Sent(3)
    assert sent.done_at == [(0, 0), (1, 0), (2, 1)]
    assert sent.finished == [0, 1, 2]
    assert sent.stats.invocations == 3
    assert sent.view == QueueView(finished_bytes=3)
    assert sent.released == 0


def _begin_anew(invoker: Invoker) -> None:
    invoker.abandon((*A, 0))
    assert invoker.queue(A).batches == 2
    invoker.submit([_batch(A, 7)])


def _halt(invoker: Invoker) -> None:
    failure = Failure(_batch(A, 0).records, [b"0"], "c", "E", "m", 1, 0, "E")
    invoker.halt(Finished(*A, 0, 0, halted=failure))


@pytest.mark.parametrize(
    ("do", "calls", "finished", "released"),
    [
        (_begin_anew, [0, 1, 7], [7], 3),
        (lambda invoker: invoker.abandon((*A, 0)), [0, 1], [], 3),
        (lambda invoker: invoker.retire(A), [0, 1], [0, 1], 1),
        (_halt, [0, 1], [0, 1], 1),
        # What waits is left where it stands, and counted when the process ends.
        (lambda invoker: invoker.stop(), [0, 1], [0, 1], 0),
        (lambda invoker: invoker.pause([A]), [0, 1], [0, 1], 0),
    ],
    ids=["anew", "abandon", "retire", "halt", "stop", "pause"],
)
def test_what_happens_while_a_call_is_sent_ahead(do, calls, finished, released) -> None:
    """Both calls have begun: they end, and count as much as others that were under way then."""
    sent = Sent(len(calls), do)
    assert [start for start, _ in sent.done_at] == calls
    assert sent.finished == finished
    assert sent.released == released
    waiting = 3 - len(finished) - released if finished != [7] else 0
    assert (sent.view.records, sent.view.bytes) == (waiting, 4 * waiting)


@pytest.mark.parametrize(
    "more",
    [
        {"policy": RetryPolicy(halt=False, max_record_age_secs=2 * 10**9)},
        {"max_finished_bytes": 0},
    ],
    ids=["records may be too old", "more has finished than may wait"],
)
def test_what_may_have_to_wait_is_not_sent_ahead(more: dict[str, Any]) -> None:
    """It is known once what is in front of it is booked."""
    sent = Sent(1 if "max_finished_bytes" in more else 3, **more)
    assert sent.done_at[:2] in ([(0, 0)], [(0, 0), (1, 1)])


def test_what_fails_behind_a_success_is_booked_behind_it() -> None:
    """The one in front has succeeded, and its records are done."""

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed() if batch.start == 1 else _answered(batch, call)

    sent = Sent(2, answer=answer, policy=RetryPolicy(halt=True))
    assert [start for start, _ in sent.done_at] == [0, 1]
    assert sent.finished == [0]


@pytest.mark.parametrize("when", ["before it is sent", "while it is under way"])
def test_an_error_of_ours_behind_a_success_leaves_that_one_finished(when: str) -> None:
    """It is not to be done again for what came behind it."""

    def fail(batch: Batch) -> None:
        if batch.start == 1:
            raise ZeroDivisionError

    def answer(batch: Batch, call: Call) -> Outcome:
        if when == "while it is under way":
            fail(batch)
        return _answered(batch, call)

    class Broken(Sent):
        def _on_sent(self, batch: Batch) -> None:
            super()._on_sent(batch)
            if when == "before it is sent":
                fail(batch)

    sent = Broken(2, answer=answer)
    assert isinstance(sent.broken, ZeroDivisionError)
    assert sent.finished == [0]


# -- failures -----------------------------------------------------------------------------


@both_ways
def test_a_halt_stops_its_key_only(ahead: bool) -> None:
    """What is behind the failed record is never called; the other partitions go on."""

    def answer(batch: Batch, call: Call) -> Outcome:
        bad = batch.key == A and 3 in batch.records.offsets[call.low : call.high]
        return _failed() if bad else _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, policy=RetryPolicy(halt=True)) as invoker:
        function.hold(A, B)
        for start in range(0, 10, 2):
            invoker.submit([_batch(A, start, 2), _batch(B, start, 2)])
        function.let_go()
        finished = _drain(invoker)
        assert function.of(A) == [(0, 1), (2, 3)]
        assert _offsets(finished[B]) == list(range(10))
        assert [(each.start, each.next_offset) for each in finished[A]] == [(0, 2), (2, 2)]
        assert finished[A][0].halted is None
        assert list(finished[A][1].halted.records.offsets) == [2, 3]
        assert invoker.halted == [finished[A][1]]
        assert invoker.queue(A) == QueueView(halted=True)
        assert invoker.broken is None

        # What comes later is not taken.
        invoker.submit([_batch(A, 10), _batch(B, 10)])
        assert list(_drain(invoker)) == [B]
        assert invoker.pending_batches == 0
    assert function.of(A) == [(0, 1), (2, 3)]


@both_ways
def test_a_configuration_error_stops_everything(ahead: bool) -> None:
    """It is seen as `broken`, its records are not done, and no call begins after it."""
    config = _failed(Kind.CONFIG)
    function = Function(lambda batch, call: config)
    with _running(function, ahead, concurrency=1) as invoker:
        invoker.submit([_batch(A, 0), _batch(A, 1), _batch(B, 0)])
        assert invoker.wait(lambda i: i.broken is not None, GUARD_SECS)
        assert invoker.broken is config
        assert _offsets(invoker.collect()) == []
    assert len(function.calls) == 1


@both_ways
def test_what_was_done_before_a_configuration_error_can_be_collected(ahead: bool) -> None:
    """A run that ends writes and commits what was finished until then."""

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed(Kind.CONFIG) if batch.start == 2 else _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead) as invoker:
        invoker.submit(_batch(A, start) for start in range(4))
        assert invoker.wait(lambda i: i.broken is not None, GUARD_SECS)
        finished = invoker.collect()
    assert _offsets(finished) == [0, 1]
    assert max(each.next_offset for each in finished) == 2


@both_ways
def test_an_exception_in_a_call_stops_everything(ahead: bool) -> None:
    """A bug of ours ends the run; it is not taken for a failure of the records."""
    error = ZeroDivisionError("a bug")

    def answer(batch: Batch, call: Call) -> Outcome:
        if batch.start == 1:
            raise error
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, concurrency=1) as invoker:
        invoker.submit(_batch(A, start) for start in range(4))
        assert invoker.wait(lambda i: i.broken is not None, GUARD_SECS)
        assert invoker.broken is error
        assert _offsets(invoker.collect()) == [0]
    assert function.of(A) == [(0, 0), (1, 1)]


# -- lanes --------------------------------------------------------------------------------


@both_ways
def test_lanes_of_a_partition_run_side_by_side_each_in_order(ahead: bool) -> None:
    """As many calls at once as lanes; in a lane one after the other."""
    together = threading.Barrier(3)
    inside: dict[int, int] = defaultdict(int)

    def answer(batch: Batch, call: Call) -> Outcome:
        inside[batch.lane] += 1
        assert inside[batch.lane] == 1
        together.wait(GUARD_SECS)  # passes only when all three are in it
        inside[batch.lane] -= 1
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead) as invoker:
        for start in range(0, 12, 3):
            invoker.submit(_batch(A, start + lane, lane=lane) for lane in range(3))
        finished = _drain(invoker)[A]
        assert invoker.broken is None
    for lane in range(3):
        own = [each for each in finished if each.lane == lane]
        assert _offsets(own) == list(range(lane, 12, 3))


@both_ways
def test_a_lane_that_backs_off_does_not_stop_the_others(ahead: bool) -> None:
    """Of the partition it is one that waits, and what the lanes hold is added up."""

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed(Kind.TRANSIENT) if batch.lane == 1 else _answered(batch, call)

    function = Function(answer)
    more = {"timer": Timer(), "random": lambda: 1.0}
    with _running(function, ahead, concurrency=1, **more) as invoker:
        invoker.submit([_batch(A, 0, lane=1), _batch(A, 1, lane=1)])
        _until(invoker, lambda i: i.queue(A).waiting)
        invoker.submit(_batch(A, start, lane=2) for start in range(2, 9))
        assert invoker.wait(lambda i: i.queue(A).batches == 2, GUARD_SECS)
        assert _offsets(invoker.collect()) == [2, 3, 4, 5, 6, 7, 8]
        assert invoker.queue(A) == QueueView(2, 2, 8, waiting=True, stuck=True, busy=frozenset({1}))
        assert invoker.pending_batches == 2


@both_ways
def test_a_halt_stops_all_lanes_of_its_partition(ahead: bool) -> None:
    """What runs ends and counts; what is repeated, queued or comes later is not called.

    Lane 0 fails while lane 1 runs, lane 2 backs off inside a split batch, and lane 3 waits for
    a thread. Nothing of that keeps the partition from coming to rest.
    """
    function = Function()
    timer = Timer()

    def answer(batch: Batch, call: Call) -> Outcome:
        if batch.key == A and batch.lane == 0:
            return _failed()
        if batch.lane == 2:
            if call.high - call.low > 2:
                return _failed()
            return _failed(Kind.TRANSIENT) if call.low else _answered(batch, call)
        return _answered(batch, call)

    function.answer = answer
    policy = RetryPolicy(halt=True, bisect=True)
    more = {"timer": timer, "random": lambda: 1.0}
    with _running(function, ahead, policy, concurrency=2, **more) as invoker:
        invoker.submit([_batch(A, 20, 4, lane=2), _batch(A, 24, 4, lane=2)])
        _until(invoker, lambda i: i.queue(A).waiting)
        calls = len(function.calls)
        gates = {0: threading.Event(), 1: threading.Event()}
        entered = threading.Semaphore(0)

        def gated(batch: Batch, call: Call) -> Outcome:
            if batch.lane in gates:
                entered.release()
                assert gates[batch.lane].wait(GUARD_SECS)
            return answer(batch, call)

        function.answer = gated
        for lane in (0, 1):
            invoker.submit(_batch(A, start, lane=lane) for start in (lane, lane + 4))
        for _ in range(2):
            assert entered.acquire(timeout=GUARD_SECS)
        invoker.submit([_batch(A, 3, lane=3), _batch(B, 0)])
        gates[0].set()
        assert invoker.wait(lambda i: i.queue(A).halted and not i.queue(B).batches, GUARD_SECS)
        assert invoker.queue(A) == QueueView(
            1, 1, 4, halted=True, finished_bytes=4, busy=frozenset({1})
        )
        gates[1].set()
        timer.secs = 1000.0
        finished = _drain(invoker)
        assert invoker.queue(A) == QueueView(halted=True)
        invoker.submit([_batch(A, 90, lane=4)])
        assert invoker.pending_batches == 0
        (halted,) = invoker.halted
    assert [each.start for each in finished[B]] == [0]
    assert _offsets(finished[A]) == [20, 21, 1]
    assert {each.lane: (each.start, each.next_offset) for each in finished[A]} == {
        0: (0, 0),
        1: (1, 2),
        2: (20, 22),
    }
    assert (halted.lane, halted.halted.records.offsets) == (0, [0])
    assert len(function.calls) == calls + 3


@both_ways
def test_of_two_failures_side_by_side_the_first_in_the_log_stands_for_the_halt(ahead: bool) -> None:
    """That is where the committed offset stays, and what the user is told."""
    gates = {1: threading.Event(), 2: threading.Event()}
    entered = threading.Semaphore(0)

    def answer(batch: Batch, call: Call) -> Outcome:
        entered.release()
        assert gates[batch.lane].wait(GUARD_SECS)
        return _failed()

    with _running(Function(answer), ahead, policy=RetryPolicy(halt=True)) as invoker:
        invoker.submit([_batch(A, 7, lane=1), _batch(A, 5, lane=2)])
        for _ in gates:
            assert entered.acquire(timeout=GUARD_SECS)
        gates[1].set()
        assert invoker.wait(lambda i: bool(i.halted), GUARD_SECS)
        assert [each.start for each in invoker.halted] == [7]
        gates[2].set()
        _drain(invoker)
        assert [each.start for each in invoker.halted] == [5]


# -- the breaker --------------------------------------------------------------------------

BREAKER = BreakerPolicy(failure_rate=1.0, invocations=4, wait_secs=30.0)
# Time stands still, so whoever backs off stays away until it is moved: no thread that comes first
# can make all the calls that the breaker looks at.
BACKS_OFF = {"random": lambda: 1.0, "breaker": BREAKER}
KEYS = [("t", partition) for partition in range(6)]


def _nudge(invoker: Invoker) -> None:
    """Have a thread look at the timer, which does not wake anybody by itself."""
    invoker.submit([Batch("nudge", 0, 0, 1, Records(), [])])


def _waits(invoker: Invoker) -> bool:
    """Whether no call runs, and each partition waits."""
    return not invoker.in_flight and all(invoker.queue(key).waiting for key in KEYS)


@both_ways
@pytest.mark.parametrize("halt", [False, True])
def test_an_outage_is_waited_for(ahead: bool, halt: bool) -> None:
    """One probe after each wait, of each partition in turn; few records are given up, or none."""
    away = True

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed() if away else _answered(batch, call)

    function = Function(answer)
    timer = Timer()
    policy = RetryPolicy(halt=halt)
    with _running(function, ahead, policy, concurrency=6, timer=timer, **BACKS_OFF) as invoker:
        invoker.submit(_batch(key, start) for start in range(5) for key in KEYS)
        _until(invoker, _waits)
        assert invoker.breaker_open
        probed = set()
        while probed != set(KEYS):
            before = len(function.calls)
            timer.secs += 30.0
            _nudge(invoker)
            function.wait_for_calls(before + 1)
            _until(invoker, _waits)
            assert len(function.calls) == before + 1
            probed.add(function.calls[-1][0])
            # Not always strictly in turn, since threads overtake each other.
            assert timer.secs < 30.0 * 100
        away = False
        timer.secs += 30.0
        _nudge(invoker)
        finished = _drain(invoker)
        assert not invoker.breaker_open
        assert invoker.breaker_openings == 1
        assert invoker.halted == []
    given_up = 0
    for key in KEYS:
        assert _offsets(finished[key]) == [0, 1, 2, 3, 4]
        given_up += sum(isinstance(part, Failure) for each in finished[key] for part in each.parts)
    assert given_up == (0 if halt else 3)


@both_ways
def test_a_bad_record_opens_no_breaker(ahead: bool) -> None:
    """However many calls its halves take, and although nobody else calls."""

    def answer(batch: Batch, call: Call) -> Outcome:
        bad = 0 in batch.records.offsets[call.low : call.high]
        return _failed() if bad else _answered(batch, call)

    function = Function(answer)
    policy = RetryPolicy(bisect=True, halt=False, max_retries=10)
    with _running(function, ahead, policy, breaker=BREAKER) as invoker:
        invoker.submit([_batch(A, 0, 32)])
        (finished,) = _drain(invoker)[A]
        assert invoker.breaker_openings == 0
    (failure,) = (part for part in finished.parts if isinstance(part, Failure))
    assert list(failure.records.offsets) == [0]
    assert failure.attempts == 11


@both_ways
def test_age_ends_the_wait_for_the_breaker(ahead: bool) -> None:
    """It is looked at when a probe is due, of all that wait; too old, they take no call."""
    now = 1e9
    function = Function(lambda batch, call: _failed())
    timer = Timer()
    policy = RetryPolicy(halt=False, max_record_age_secs=60)
    more = {"clock": lambda: now, "timer": timer, "breaker": BREAKER}

    def batch(key: tuple[str, int], start: int) -> Batch:
        records = Records([start], [int(now * 1000)], [None], [b"v"], [None])
        return Batch(*key, start, start + 1, records, [b"1"])

    with _running(function, ahead, policy, concurrency=6, **more) as invoker:
        invoker.submit(batch(key, start) for start in range(5) for key in KEYS)
        _until(invoker, _waits)
        before = len(function.calls)
        now += 61
        timer.secs = 30.0
        _nudge(invoker)
        finished = _drain(invoker)
        assert invoker.breaker_open
    assert len(function.calls) == before
    last = [finished[key][-1].parts[0] for key in KEYS]
    assert {part.condition for part in last} == {"MaximumRecordAgeExceeded"}


@both_ways
def test_a_halt_takes_along_what_waits_for_the_breaker(ahead: bool) -> None:
    """A record of one lane is too old when a probe is due: the partition's other lanes stop too."""
    now = 1e9
    function = Function(lambda batch, call: _failed())
    timer = Timer()
    policy = RetryPolicy(halt=True, max_record_age_secs=60)
    more = BACKS_OFF | {"clock": lambda: now, "timer": timer}
    with _running(function, ahead, policy, concurrency=6, **more) as invoker:
        for lane in range(4):
            age = 50 if lane == 2 else 0
            records = Records([lane], [int((now - age) * 1000)], [None], [b"v"], [None])
            invoker.submit([Batch(*A, lane, lane + 1, records, [b"1"], lane=lane)])
        _until(invoker, lambda i: i.breaker_open and len(i._held) + len(i._waits) == 4)
        calls = len(function.calls)
        now += 20
        timer.secs = 30.0
        _nudge(invoker)
        assert invoker.wait(lambda i: i.queue(A).halted and not i.pending_batches, GUARD_SECS)
        (halted,) = invoker.halted
    assert halted.halted.condition == "MaximumRecordAgeExceeded"
    assert halted.lane == 2
    # Before the old record's turn came, one of the others may have been the probe.
    assert len(function.calls) - calls <= 1


@both_ways
def test_stop_while_the_breaker_is_open(ahead: bool) -> None:
    """Nothing is waited for; the records that were done before can be collected."""
    timer = Timer()
    function = Function(lambda batch, call: _failed())
    with _running(
        function, ahead, policy=RetryPolicy(), concurrency=6, timer=timer, **BACKS_OFF
    ) as invoker:
        invoker.submit(_batch(key, start) for start in range(3) for key in KEYS)
        _until(invoker, _waits)
        calls = len(function.calls)
        invoker.stop()
        assert invoker.join(GUARD_SECS)
        finished = _by_key(invoker.collect())
        assert invoker.halted == []
    assert len(function.calls) == calls
    for key in KEYS:
        assert [(each.start, each.next_offset) for each in finished[key]] == [(0, 0)]
        assert _offsets(finished[key]) == []


# -- ending -------------------------------------------------------------------------------


@both_ways
def test_stop_begins_no_further_call(ahead: bool) -> None:
    """The running call ends and counts; what is behind it stays undone."""
    function = Function()
    function.hold(A)
    with _running(function, ahead) as invoker:
        invoker.submit(_batch(A, start) for start in range(3))
        function.wait_for_calls(1)
        assert not invoker.join(0)
        invoker.stop()
        invoker.submit([_batch(B, 0)])
        function.let_go()
        assert invoker.join(GUARD_SECS)
        finished = invoker.collect()
    assert _offsets(finished) == [0]
    assert [(each.start, each.next_offset) for each in finished] == [(0, 1)]
    assert len(function.calls) == 1


@both_ways
def test_stop_keeps_what_a_split_batch_has_done(ahead: bool) -> None:
    """Inside a bisected batch the answered part can be collected and committed."""

    def answer(batch: Batch, call: Call) -> Outcome:
        return _failed() if call.high - call.low > 2 else _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead, policy=RetryPolicy(bisect=True)) as invoker:
        invoker.submit([_batch(B, 0)])
        _drain(invoker)
        function.calls.clear()
        function.hold(A)
        invoker.submit([_batch(A, 0, 4), _batch(A, 4, 4)])
        function.wait_for_calls(1)
        with function.changed:
            # Lets the first call go, and holds the one after it.
            function.held.clear()
            function.answer = lambda batch, call: (
                function.hold(A) or answer(batch, call) if call.high == 4 else answer(batch, call)
            )
            function.changed.notify_all()
        function.wait_for_calls(2)
        invoker.stop()
        function.let_go()
        assert invoker.join(GUARD_SECS)
        finished = invoker.collect()
    assert function.calls == [(A, 0, 3), (A, 0, 1)]
    assert [(each.start, each.next_offset) for each in finished] == [(0, 2)]
    assert _offsets(finished) == [0, 1]
    assert finished[0].halted is None


@both_ways
def test_stop_leaves_what_backs_off_where_it_stands(ahead: bool) -> None:
    """A wait is not waited for; the records done before it can be collected."""

    def answer(batch: Batch, call: Call) -> Outcome:
        if call.high - call.low > 2:
            return _failed()
        return _failed(Kind.TRANSIENT) if call.low else _answered(batch, call)

    function = Function(answer)
    more = {"timer": Timer(), "random": lambda: 1.0}
    with _running(function, ahead, policy=RetryPolicy(bisect=True), **more) as invoker:
        invoker.submit([_batch(A, 0, 4), _batch(A, 4, 4)])
        _until(invoker, lambda i: i.queue(A).waiting)
        invoker.stop()
        assert invoker.join(GUARD_SECS)
        finished = invoker.collect()
        assert invoker.collect() == []
    assert [(each.start, each.next_offset) for each in finished] == [(0, 2)]
    assert _offsets(finished) == [0, 1]


@both_ways
def test_stopping_what_does_nothing(ahead: bool) -> None:
    """Stop and join may be called at any time, and more than once."""
    with _running(Function(), ahead) as invoker:
        invoker.stop()
        assert invoker.join(0)
        invoker.stop()
        assert invoker.join(0)
        assert invoker.collect() == []


# -- numbers ------------------------------------------------------------------------------


@both_ways
def test_no_call_begins_while_too_much_has_finished(ahead: bool) -> None:
    """Replies have a bound, however small their requests are; collecting them goes on with it."""
    reply = b"x" * 100

    def answer(batch: Batch, call: Call) -> Outcome:
        return Outcome(Kind.SUCCESS, results=[reply] * len(call))

    function = Function(answer)
    with _running(function, ahead, concurrency=2, max_finished_bytes=250) as invoker:
        for key in (A, B):
            invoker.submit(_batch(key, start) for start in range(10))
        seen = 0
        while seen < 20:
            # Three are one too many, and another call was under way.
            assert invoker.wait(lambda i: i.is_full or not i.pending_batches, GUARD_SECS)
            _until(invoker, lambda i: i._working == 0)
            held = sum(invoker.queue(key).finished_bytes for key in (A, B))
            assert held <= 400
            finished = invoker.collect()
            assert held == 100 * len(finished)
            seen += len(finished)
        assert not invoker.is_full
    assert len(function.calls) == 20


def test_what_a_forgotten_lane_had_finished_counts_no_more() -> None:
    """Its bytes would hold the others back for good."""
    with _running(Function(), False, max_finished_bytes=0) as invoker:
        invoker.submit([_batch(A, 0)])
        assert invoker.wait(lambda i: i.is_full, GUARD_SECS)
        invoker.submit([_batch(B, 0)])
        invoker.abandon((*A, 0))
        assert invoker.wait(lambda i: i.queue(B).finished_bytes > 0, GUARD_SECS)
        assert invoker.queue(A) == QueueView()


@both_ways
def test_a_partition_that_repeats_what_failed_is_stuck(ahead: bool) -> None:
    """Also while the call is under way again, and no more once it is through."""
    function = Function()
    timer = Timer()
    outcomes = [_failed(Kind.TRANSIENT)]
    function.answer = lambda b, c: outcomes.pop() if outcomes else _answered(b, c)
    with _running(function, ahead, timer=timer, random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 0)])
        _until(invoker, lambda i: i.queue(A).waiting)
        assert invoker.queue(A).stuck
        function.hold(A)
        timer.secs = 1000.0
        invoker.submit([_batch(B, 0)])
        function.wait_for_calls(3)
        assert invoker.queue(A).stuck
        assert not invoker.queue(A).waiting
        function.let_go()
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        assert not invoker.queue(A).stuck


@both_ways
def test_what_a_queue_holds(ahead: bool) -> None:
    """Batches, records and bytes not finished, the one being worked on among them."""
    function = Function()
    function.hold(A)
    with _running(function, ahead) as invoker:
        assert invoker.queue(A) == QueueView()
        batches = [_batch(A, 0, 3), _batch(A, 3, 2)]
        invoker.submit(batches)
        function.wait_for_calls(1)
        held = sum(batch.payload_bytes + len(batch) * len(b"v") for batch in batches)
        assert invoker.queue(A) == QueueView(2, 5, held, busy=frozenset({0}))
        assert invoker.queue(B) == QueueView()
        assert invoker.pending_batches == 2
        assert (invoker.has_finished, invoker.finished_records) == (False, 0)
        function.let_go()
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        assert invoker.queue(A) == QueueView(finished_bytes=5)
        assert (invoker.has_finished, invoker.finished_records) == (True, 5)
        assert len(invoker.collect()) == 2
        assert invoker.queue(A) == QueueView()
        assert (invoker.has_finished, invoker.finished_records) == (False, 0)
        assert invoker.collect() == []


@both_ways
def test_how_long_the_oldest_result_waits(ahead: bool) -> None:
    """Counted from the first batch that finished since results were collected."""
    timer = Timer()
    with _running(Function(), ahead, timer=timer) as invoker:
        assert invoker.finished_age_secs == 0
        invoker.submit([_batch(A, 0)])
        assert invoker.wait(lambda i: i.has_finished, GUARD_SECS)
        timer.secs = 3.0
        invoker.submit([_batch(A, 1)])
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        assert invoker.finished_age_secs == 3.0
        invoker.collect()
        assert invoker.finished_age_secs == 0


@both_ways
def test_the_calls_of_a_batch_are_counted_and_timed(ahead: bool) -> None:
    """Each batch knows how many invocations it took and how long they ran."""
    timer = Timer()

    def answer(batch: Batch, call: Call) -> Outcome:
        timer.secs += 2.0
        return _failed() if call.high - call.low > 1 else _answered(batch, call)

    with _running(Function(answer), ahead, policy=RetryPolicy(bisect=True), timer=timer) as invoker:
        invoker.submit([_batch(A, 0, 2)])
        (finished,) = _drain(invoker)[A]
    assert finished.stats.invocations == 3
    assert finished.stats.bisections == 1
    assert finished.stats.invoke_ms == 6000


@both_ways
def test_an_empty_range_is_finished_without_a_call(ahead: bool) -> None:
    """Offsets without records keep their place among the batches."""
    function = Function()
    empty = Batch(*A, 1, 5, Records(), [])
    with _running(function, ahead) as invoker:
        function.hold(A)
        invoker.submit([_batch(A, 0), empty, _batch(A, 5)])
        function.let_go()
        finished = _drain(invoker)[A]
    assert [(each.start, each.next_offset) for each in finished] == [(0, 1), (1, 5), (5, 6)]
    assert function.of(A) == [(0, 0), (5, 5)]


# -- everything together ------------------------------------------------------------------


@given(
    batches=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    size=st.integers(1, 6),
    # Calls that fail before all is well again, in an outage or now and then.
    outage=st.integers(0, 40),
    troubles=st.dictionaries(
        st.integers(0, 60), st.sampled_from([Kind.THROTTLED, Kind.TOO_LARGE, Kind.TRANSIENT])
    ),
    breaker=st.builds(
        BreakerPolicy,
        failure_rate=st.sampled_from([0.3, 0.7, 1.0]),
        invocations=st.integers(2, 8),
        wait_secs=st.just(0.001),
    ),
    policy=st.builds(RetryPolicy, halt=st.booleans(), bisect=st.booleans()),
    bounds=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    ahead=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_an_outage_leaves_nothing_behind(
    batches, size, outage, troubles, breaker, policy, bounds, ahead
) -> None:
    """When it is over all goes on: every record once, in order, whatever was throttled with it."""
    lock = threading.Lock()
    left = [outage]
    counts = [0]

    def answer(batch: Batch, call: Call) -> Outcome:
        with lock:
            counts[0] += 1
            trouble = troubles.get(counts[0])
            if trouble and (trouble is not Kind.TOO_LARGE or call.high - call.low > 1):
                return _failed(trouble)
            left[0] -= 1
            return _failed() if left[0] >= 0 else _answered(batch, call)

    low, high = bounds
    more = {"concurrency": high, "min_concurrency": low, "breaker": breaker}
    function = Function(answer)
    with _running(function, ahead, policy, **more) as invoker:
        for partition, count in enumerate(batches):
            invoker.submit(_batch(("t", partition), n * size, size) for n in range(count))
        finished = _drain(invoker)
        assert low <= invoker.limit <= high
        halted = {each.key for each in invoker.halted}
        assert policy.halt or not halted
    assert function.most <= high
    assert function.most_of_one <= 1
    for partition, count in enumerate(batches):
        key = ("t", partition)
        done = _offsets(finished.get(key, []))
        assert done == list(range(count * size))[: len(done)]
        assert key in halted or len(done) == count * size


@given(
    # Per partition its batches' sizes, and which of its records are bad.
    partitions=st.lists(
        st.tuples(
            st.lists(st.integers(1, 5), min_size=1, max_size=8),
            st.sets(st.integers(0, 39), max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    # The n-th call of a partition is throttled, or fails around the function.
    faults=st.dictionaries(
        st.tuples(st.integers(0, 4), st.integers(0, 12)),
        st.sampled_from([Kind.TRANSIENT, Kind.THROTTLED, Kind.TOO_LARGE]),
        max_size=10,
    ),
    bisect=st.booleans(),
    halt=st.booleans(),
    retries=st.integers(0, 2),
    concurrency=st.integers(1, 4),
    ahead=st.booleans(),
    collect_early=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_results_are_complete_and_in_order_whatever_fails(
    partitions, faults, bisect, halt, retries, concurrency, ahead, collect_early
) -> None:
    """Per partition: every record once, in offset order, up to where it halted if it did."""
    lock = threading.Lock()
    counts: dict[int, int] = defaultdict(int)

    def answer(batch: Batch, call: Call) -> Outcome:
        with lock:
            count = counts[batch.partition]
            counts[batch.partition] += 1
        fault = faults.get((batch.partition, count))
        if fault and not (fault is Kind.TOO_LARGE and call.high - call.low == 1):
            return _failed(fault)
        bad = partitions[batch.partition][1] & set(batch.records.offsets[call.low : call.high])
        return _failed() if bad else _answered(batch, call)

    function = Function(answer)
    policy = RetryPolicy(max_retries=retries, bisect=bisect, halt=halt)
    batches: list[list[Batch]] = []
    for partition, (sizes, _) in enumerate(partitions):
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        batches.append([_batch(("t", partition), *pair) for pair in zip(starts, sizes)])
    collected: list[Finished] = []
    with _running(function, ahead, policy, concurrency) as invoker:
        for index in range(8):
            invoker.submit(each[index] for each in batches if index < len(each))
            if collect_early:
                collected += invoker.collect()
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        collected += invoker.collect()
        assert invoker.broken is None
        halted = {finished.key for finished in invoker.halted}

    finished = _by_key(collected)
    assert function.most_of_one <= 1
    assert function.most <= concurrency
    for partition, (sizes, bad) in enumerate(partitions):
        key, total = ("t", partition), sum(sizes)
        mine = finished[key]
        at = 0
        for each in mine:
            assert each.start == at
            at = each.next_offset
        offsets = _offsets(mine)
        assert offsets == list(range(at))
        bad_here = {offset for offset in bad if offset < total}
        failed = {
            offset
            for each in mine
            for part in each.parts
            if isinstance(part, Failure)
            for offset in part.records.offsets
        }
        if halt and bad_here:
            assert key in halted
            assert at <= min(bad_here)
            assert mine[-1].halted is not None
            assert mine[-1].halted.records.offsets[0] == at
        else:
            assert key not in halted
            assert at == total
        if not halt:
            assert bad_here <= failed
            if bisect:
                assert failed == bad_here
        else:
            assert failed == set()


@given(
    # A partition's records: each one's key, and whether the function fails in it.
    log=st.lists(
        st.tuples(st.sampled_from([None, b"a", b"b", b"c", b"d", b"e"]), st.integers(0, 20)),
        min_size=1,
        max_size=50,
    ),
    faults=st.dictionaries(
        st.integers(0, 30), st.sampled_from([Kind.TRANSIENT, Kind.THROTTLED]), max_size=8
    ),
    count=st.integers(2, 10),
    size=st.integers(1, 6),
    bisect=st.booleans(),
    halt=st.booleans(),
    concurrency=st.integers(1, 4),
    ahead=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_lanes_keep_the_order_of_each_key_and_the_mark_below_what_is_not_done(
    log, faults, count, size, bisect, halt, concurrency, ahead
) -> None:
    """Calls of a key rise, each record ends once, and what is committed is done in all lanes."""
    lock = threading.Lock()
    called: list[tuple[int, ...]] = []
    keys = [key for key, _ in log]
    bad = {offset for offset, (_, number) in enumerate(log) if number == 0}
    lanes = Lanes(count, run=size)

    def answer(batch: Batch, call: Call) -> Outcome:
        offsets = batch.records.offsets[call.low : call.high]
        with lock:
            fault = faults.get(len(called))
            called.append(() if fault else tuple(offsets))
        if fault:
            return _failed(fault)
        return _failed() if bad & set(offsets) else _answered(batch, call)

    records = Records(range(len(log)), [1] * len(log), keys, [b"v"] * len(log), [None] * len(log))
    batches: list[Batch] = []
    for part in lanes.split(RecordChunk("t", 0, 0, len(log), records)):
        own, start = part.records, 0
        for low in range(0, max(1, len(own)), size):
            some = own.slice(low, low + size)
            following = own.offsets[low + size : low + size + 1]
            end = following[0] if following else len(log)
            entries = [b"%d" % offset for offset in some.offsets]
            batches.append(Batch("t", 0, start, end, some, entries, lane=part.lane or 0))
            start = end
    function = Function(answer)
    policy = RetryPolicy(bisect=bisect, halt=halt)
    with _running(function, ahead, policy, concurrency) as invoker:
        invoker.submit(batches)
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        assert invoker.broken is None
        collected, halted = invoker.collect(), invoker.halted

    done = _offsets(collected)
    assert len(done) == len(set(done))
    marks = ContiguousOffsets()
    marks.begin(("t", 0), [0] * count)
    mark = 0
    for each in collected:
        progress = Progress("t", 0, each.start, each.next_offset, each.lane)
        if each.start < each.next_offset:
            mark = marks.add(progress) or mark
    assert set(range(mark)) <= set(done)
    for key in set(keys) - {None}:
        own = [offset for offset in done if keys[offset] == key]
        assert own == [offset for offset in range(len(log)) if keys[offset] == key][: len(own)]
    if halt and bad:
        (why,) = halted
        # Lanes that were behind the failed record stop with the others.
        assert mark <= why.halted.records.offsets[0]
        assert not bad & set(done)
    else:
        assert not halted
        assert sorted(done) == list(range(len(log)))
        assert mark == len(log)


def test_calls_are_counted_when_they_end_and_each_once() -> None:
    """Not when their batch ends, which while a function is away is never."""
    timer = Timer()
    ok = threading.Event()

    def answer(batch: Batch, call: Call) -> Outcome:
        return _answered(batch, call) if ok.is_set() else _failed(Kind.TRANSIENT)

    function = Function(answer)
    with _running(function, False, timer=timer, random=lambda: 1.0) as invoker:
        invoker.submit([_batch(A, 0), _batch(B, 0)])
        assert invoker.wait(lambda invoker: invoker.stats.retries == 2, GUARD_SECS)
        assert not invoker.has_finished
        assert invoker.take_stats().invocations == 2
        ok.set()
        both = ["backoff", "backoff"]
        assert invoker.wait(
            lambda invoker: [stuck.waits_for for stuck in invoker.trouble.stuck] == both, GUARD_SECS
        )
        timer.secs = 100.0
        invoker.submit([_batch(C, 0)])
        assert invoker.wait(lambda invoker: not invoker.pending_batches, GUARD_SECS)
        taken = invoker.take_stats()
        assert (taken.invocations, taken.retries) == (3, 0)
        assert invoker.take_stats() == CallStats()
        total = CallStats()
        for finished in invoker.collect():
            total.add(finished.stats)
        assert invoker.stats == total
        assert not invoker.trouble.stuck
        assert invoker.trouble.last_error


# -- windows ------------------------------------------------------------------------------


class Windowed(Function):
    """Has a state, and notes which one it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[tuple[bytes, bool]] = []

    def __call__(
        self, batch: Batch, call: Call, request: Any, meanwhile: Callable[[], None]
    ) -> Outcome:
        assert call.turn
        facts = call.turn.facts
        self.states.append((facts.state, facts.final))
        return Outcome(Kind.SUCCESS, state=b'{"calls":%d}' % len(self.states))


def test_a_window_is_closed_from_outside_and_forgotten_with_its_lane() -> None:
    function = Windowed()
    with _running(function, ahead=False, window_ms=60_000) as invoker:

        def idle() -> None:
            assert invoker.wait(lambda each: not each.pending_batches, GUARD_SECS)

        invoker.submit([_batch(A, 0, 2), _batch(A, 2, 2), _batch(B, 0)])
        idle()
        assert invoker.open_windows() == {A: 60_000, B: 60_000}
        assert [each.reach for each in invoker.collect() if each.key == A] == [(0, 0), (0, 0)]
        # What was under way of it counts for nothing, and it is begun anew where it was.
        invoker.abandon((*A, 0))
        assert invoker.open_windows() == {B: 60_000}
        function.states.clear()
        invoker.submit([_batch(A, 0, 4)])
        idle()
        invoker.close_window(A, FINAL)
        idle()
        assert function.states == [(b"{}", False), (b'{"calls":1}', True)]
        assert [each.reach for each in invoker.collect()] == [(0, 0), (0, 4)]
        invoker.retire(B)
        assert invoker.open_windows() == {}


def test_a_halted_partition_has_no_window_to_close() -> None:
    function = Windowed()
    with _running(function, ahead=False, window_ms=60_000) as invoker:
        invoker.submit([_batch(A, 0)])
        assert invoker.wait(lambda each: not each.pending_batches, GUARD_SECS)
        failure = Failure(_batch(A, 1).records, (), "c", "e", "m", 0, 0, "e")
        invoker.halt(Finished(*A, 1, 1, halted=failure))
        assert invoker.open_windows() == {}


@pytest.mark.parametrize("took_secs", [0.0005, 5.0], ids=["fast", "slow"])
def test_a_round_stays_for_its_calls_only_where_they_are_known_to_be_fast(took_secs) -> None:
    """The first call says how long calls take: before it nobody stays, and not for a slow one."""
    timer, stayed = Timer(), []

    def answer(batch: Batch, call: Call) -> Outcome:
        timer.secs += took_secs
        return _answered(batch, call)

    function = Function(answer)
    with _running(function, ahead=False, timer=timer) as invoker:
        wait_for = invoker._changed.wait_for
        invoker._changed.wait_for = lambda done, secs=None: (
            stayed.append(secs) or wait_for(done, secs)
        )
        invoker.stay(1, 0.01)
        assert stayed == []
        invoker.submit([_batch(A, 0)])
        _until(invoker, lambda it: it.done_batches == 1)
        stayed.clear()
        invoker.stay(0, 0.01)
        assert stayed == ([0.01] if took_secs < 0.01 else [])


@both_ways
def test_what_a_call_came_to_is_counted_though_none_follows(ahead: bool) -> None:
    """It is counted while the next call is under way; behind the last one, at once."""
    before = TALLY.take()
    with _running(Function(), ahead) as invoker:
        invoker.submit([_batch(("counted", 0), 0, 3), _batch(("counted", 0), 3, 2)])
        _until(invoker, lambda it: it.done_batches == 2 and it.is_idle)
        assert invoker.stats.invocations == 2
    tallied = TALLY.take().since(before)
    assert tallied.by(INVOKED) == {("counted",): 5}
    assert tallied.by(INVOCATIONS) == {("success",): 2}
    assert sum(tallied.histograms[DURATION, ("success",)].counts) == 2
    assert sum(tallied.histograms[BATCH_WAIT, ()].counts) == 2
