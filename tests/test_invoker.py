"""Invoker: queues worked in order, side by side, on real threads; nothing here sleeps."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.invoker import Hold, Invoker, QueueView
from transforms.outcome import Kind, Outcome
from transforms.records import Batch, Failure, Finished, Records, Responses
from transforms.retry import Call, RetryPolicy

GUARD_SECS = 20.0
"""Only so that a test which would hang fails instead; nothing is measured by it."""

GO_ON = RetryPolicy(halt=False)
A, B, C = ("t", 0), ("t", 1), ("t", 2)

both_ways = pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])


def _batch(key: tuple[str, int], start: int, count: int = 1) -> Batch:
    offsets = list(range(start, start + count))
    records = Records(offsets, [1] * count, [None] * count, [b"v"] * count, [None] * count)
    return Batch(*key, start, start + count, records, [b"%d" % offset for offset in offsets])


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

    def __call__(self, batch: Batch, call: Call) -> Outcome:
        offsets = batch.records.offsets
        with self.changed:
            self.calls.append((batch.key, offsets[call.low], offsets[call.high - 1]))
            self.inside[batch.key] += 1
            self.most = max(self.most, sum(self.inside.values()))
            self.most_of_one = max(self.most_of_one, self.inside[batch.key])
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: batch.key not in self.held, GUARD_SECS)
        try:
            return self.answer(batch, call)
        finally:
            with self.changed:
                self.inside[batch.key] -= 1

    def prepare(self, batch: Batch, call: Call, hold: Hold) -> Outcome | None:
        return self(batch, call) if hold() else None

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
    if ahead:
        more["ahead"] = function.prepare
    fixed = {"clock": lambda: 1e9, "random": lambda: 0.0}
    invoker = Invoker(function, policy, concurrency, **(fixed | more))
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
        assert invoker.queue(A) == QueueView(batches=2, records=2, bytes=6, waiting=True)
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
def test_what_a_queue_holds(ahead: bool) -> None:
    """Batches, records and bytes not finished, the one being worked on among them."""
    function = Function()
    function.hold(A)
    with _running(function, ahead) as invoker:
        assert invoker.queue(A) == QueueView()
        batches = [_batch(A, 0, 3), _batch(A, 3, 2)]
        invoker.submit(batches)
        function.wait_for_calls(1)
        held = sum(batch.payload_bytes for batch in batches)
        assert invoker.queue(A) == QueueView(batches=2, records=5, bytes=held)
        assert invoker.queue(B) == QueueView()
        assert invoker.pending_batches == 2
        assert (invoker.has_finished, invoker.finished_records) == (False, 0)
        function.let_go()
        assert invoker.wait(lambda i: not i.pending_batches, GUARD_SECS)
        assert invoker.queue(A) == QueueView()
        assert (invoker.has_finished, invoker.finished_records) == (True, 5)
        assert len(invoker.collect()) == 2
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
