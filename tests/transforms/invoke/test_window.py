"""Window: each record in one window, states handed on in order, and nothing done before its window
is closed. Through the deliveries that a lane makes, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, Delivery, RetryPolicy, Wait
from transforms.invoke.window import MAX_STATE_BYTES, LaneWindow, Turn, is_over, window_of
from transforms.records import (
    EARLY,
    FINAL,
    NO_TIMESTAMP,
    Batch,
    Failure,
    Finished,
    Records,
    Responses,
)

SIZE_MS = 60_000
NOON_MS = 1_700_000_040_000
"""Where a window begins."""
LATER = NOON_MS / 1000 + 100_000
GO_ON = RetryPolicy(halt=False)


def test_a_window_is_where_the_timestamp_is() -> None:
    assert NOON_MS % SIZE_MS == 0
    rule = [
        # timestamp, the least window, whether that is stale, and where it goes
        (NOON_MS, -1, False, NOON_MS),
        (NOON_MS + SIZE_MS - 1, -1, False, NOON_MS),
        (NOON_MS + SIZE_MS, NOON_MS, False, NOON_MS + SIZE_MS),
        (NOON_MS + 9 * SIZE_MS, NOON_MS, True, NOON_MS + 9 * SIZE_MS),
        # Late: with those of the open one, or, where it would have no end, with those behind it.
        (NOON_MS - 1, NOON_MS, False, NOON_MS),
        (NOON_MS - 1, NOON_MS, True, NOON_MS + SIZE_MS),
        (0, NOON_MS, False, NOON_MS),
    ]
    for stamp, least_ms, stale, expected in rule:
        assert window_of(stamp, SIZE_MS, round(LATER * 1000), least_ms, stale) == expected
    # Without a timestamp, and ahead of the clock: now.
    for stamp in (NO_TIMESTAMP, NOON_MS + 10 * SIZE_MS):
        assert window_of(stamp, SIZE_MS, NOON_MS + 5, -1, False) == NOON_MS


def test_a_window_is_kept_open_for_what_comes_late() -> None:
    assert not is_over(NOON_MS, 1000, NOON_MS + 999)
    assert is_over(NOON_MS, 1000, NOON_MS + 1000)
    assert not is_over(NOON_MS, 900_000, NOON_MS + 119_999)
    assert is_over(NOON_MS, 900_000, NOON_MS + 120_000)


@dataclass
class Sent:
    """A call as the function saw it."""

    turn: Turn
    numbers: list[int]

    @property
    def state(self) -> list[int]:
        return json.loads(self.turn.facts.state).get("seen", [])


@dataclass
class Lane:
    """Works the batches of a lane in turn, as the invoker does, and notes what comes of them.

    The function's state is the numbers that it has seen. `fail` says of a call what is wrong with
    it: the index of the record that it names, -1 for an error, None if all is well.
    """

    fail: Callable[[Sent], int | None] = lambda _: None
    policy: RetryPolicy = GO_ON
    max_state_bytes: int = MAX_STATE_BYTES
    clock: float = LATER
    calls: list[Sent] = field(default_factory=list)
    reaches: list[tuple[int, int]] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    closed: list[Sent] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.window = LaneWindow(SIZE_MS, self.max_state_bytes)

    def work(self, batch: Batch) -> Finished:
        delivery = Delivery(batch, self.policy, lambda: self.clock, lambda: 0.5, self.window)
        steps = delivery.steps()
        step = next(steps, None)
        while step is not None:
            outcome = None if isinstance(step, Wait) else self._call(batch, step)
            try:
                step = steps.send(outcome)
            except StopIteration:
                break
        finished = delivery.finished
        self.reaches.append(self.window.reach(finished))
        self.finished.append(finished)
        for part in finished.parts:
            if isinstance(part, Responses):
                self.answered += part.offsets
            else:
                self.given_up += part.records.offsets
        return finished

    def close(self, closes: str = FINAL) -> None:
        at = self.window.position
        self.work(Batch("t", 0, at, at, Records(), (), closes=closes))

    def _call(self, batch: Batch, call: Call) -> Outcome:
        assert call.turn
        numbers = list(call.pick(batch.records.offsets))
        assert bool(numbers) != call.turn.closes
        sent = Sent(call.turn, numbers)
        self.calls.append(sent)
        failed = self.fail(sent)
        if failed is not None and (failed < 0 or call.turn.closes):
            return Outcome(Kind.FUNCTION_ERROR, error_type="E")
        if call.turn.closes:
            self.closed.append(sent)
            return Outcome(Kind.SUCCESS)
        seen = sent.state + numbers[:failed]
        state = json.dumps({"seen": seen}).encode()
        if failed is None:
            return Outcome(Kind.SUCCESS, state=state)
        return Outcome(Kind.PARTIAL, error_type="E", failed=(failed,), state=state)


def _batches(stamps: list[int], sizes: Iterator[int], start: int = 0) -> Iterator[Batch]:
    """Batches of records with these timestamps and numbers that have holes, from one on."""
    numbers = [3 * place for place in range(len(stamps))]
    begin, low = start, next((p for p, n in enumerate(numbers) if n >= start), len(stamps))
    while low < len(stamps):
        own = slice(low, low + next(sizes))
        offsets, nothing = numbers[own], [None] * len(numbers[own])
        records = Records(offsets, stamps[own], nothing, nothing, nothing)
        yield Batch("t", 0, begin, offsets[-1] + 1, records, [b"1"] * len(offsets))
        begin, low = offsets[-1] + 1, low + len(offsets)


def _of(*seconds: float) -> list[int]:
    """Timestamps, in seconds from noon."""
    return [NOON_MS + round(1000 * each) for each in seconds]


def _shape(lane: Lane) -> list[tuple[int, list[int], list[int], bool, bool]]:
    """Of each call: its window as its number, its records, its state, and its flags."""
    return [
        (
            (call.turn.facts.start_ms - NOON_MS) // SIZE_MS,
            call.numbers,
            call.state,
            call.turn.facts.final,
            call.turn.facts.early,
        )
        for call in lane.calls
    ]


def test_a_batch_is_divided_where_a_window_begins() -> None:
    lane = Lane()
    (batch,) = _batches(_of(1, 2, 61, 62, 181), iter([5]))
    lane.work(batch)
    assert _shape(lane) == [
        (0, [0, 3], [], False, False),
        (0, [], [0, 3], True, False),
        (1, [6, 9], [], False, False),
        (1, [], [6, 9], True, False),
        (3, [12], [], False, False),
    ]
    # What is in the open one is not done.
    assert lane.reaches == [(0, 10)]
    lane.close()
    assert _shape(lane)[-1] == (3, [], [12], True, False)
    assert lane.reaches == [(0, 10), (10, 13)]


def test_a_state_goes_from_batch_to_batch() -> None:
    lane = Lane()
    for batch in _batches(_of(1, 2, 3, 61), iter([2, 1, 1])):
        lane.work(batch)
    assert [shape[:3] for shape in _shape(lane)] == [
        (0, [0, 3], []),
        (0, [6], [0, 3]),
        (0, [], [0, 3, 6]),
        (1, [9], []),
    ]
    assert lane.reaches == [(0, 0), (0, 0), (0, 7)]


def test_a_last_call_that_fails_is_repeated_until_it_succeeds() -> None:
    failures = iter([-1] * 20)
    lane = Lane(lambda sent: next(failures, None) if sent.turn.closes else None)
    for batch in _batches(_of(1, 61), iter([1, 1])):
        lane.work(batch)
    assert [call.turn.closes for call in lane.calls] == [False, *[True] * 21, False]
    assert lane.given_up == []


def test_a_run_that_is_told_that_its_function_is_not_there_ends_at_the_window() -> None:
    lane = Lane()
    first, second = _batches(_of(1, 61), iter([1, 1]))
    lane.work(first)
    delivery = Delivery(second, GO_ON, lambda: LATER, lambda: 0.5, lane.window)
    steps = delivery.steps()
    assert isinstance(next(steps), Call)
    with pytest.raises(StopIteration):
        steps.send(Outcome(Kind.CONFIG, error_type="ResourceNotFoundException"))
    assert delivery.config_error
    assert lane.window.reach(delivery.finished) == (0, 0)


def test_a_state_that_is_too_large_ends_its_window_early() -> None:
    lane = Lane(max_state_bytes=20)
    for batch in _batches(_of(1, 2, 3, 4, 5), iter([4, 1])):
        lane.work(batch)
    assert _shape(lane) == [
        (0, [0, 3, 6, 9], [], False, False),
        (0, [], [0, 3, 6, 9], False, True),
        # The same window goes on, with nothing.
        (0, [12], [], False, False),
    ]
    assert lane.reaches == [(0, 10), (10, 10)]


def test_what_was_named_is_not_in_the_state() -> None:
    """With a checkpoint its reply's state is behind what was done; where nothing was, none is."""
    named = iter([2, 0, None])
    lane = Lane(lambda sent: next(named), RetryPolicy(halt=False, max_retries=3))
    (batch,) = _batches(_of(1, 2, 3, 4), iter([4]))
    lane.work(batch)
    assert [shape[1:3] for shape in _shape(lane)] == [
        ([0, 3, 6, 9], []),
        ([6, 9], [0, 3]),
        ([6, 9], [0, 3]),
    ]


def test_a_window_of_which_nothing_was_sent_is_none() -> None:
    lane = Lane(policy=RetryPolicy(halt=False, max_record_age_secs=60))
    (batch,) = _batches(_of(1, 61), iter([2]))
    lane.work(batch)
    lane.close()
    assert lane.calls == []
    assert lane.given_up == [0, 3]
    assert lane.reaches == [(0, 4), (4, 4)]


def test_numbers_without_records_are_held_with_the_open_window() -> None:
    lane = Lane()
    (batch,) = _batches(_of(1), iter([1]))
    lane.work(batch)
    lane.work(Batch("t", 0, 1, 9, Records(), ()))
    lane.close()
    assert lane.reaches == [(0, 0), (0, 0), (0, 9)]


def test_what_is_late_all_the_time_does_not_keep_its_window_open() -> None:
    """One record of now, and then old ones only."""
    lane = Lane(clock=NOON_MS / 1000 + 5)
    batches = _batches(_of(1, -9000, -8000, -7000, -6000), iter([1, 1, 1, 1, 1]))
    for batch in batches:
        lane.work(batch)
        lane.clock += 50
    starts = [shape[0] for shape in _shape(lane) if shape[1]]
    assert starts == [0, 0, 0, 1, 1]
    assert [call.state for call in lane.closed] == [[0, 3, 6]]


STAMPS = st.lists(
    st.one_of(
        st.integers(-200, 400).map(lambda secs: NOON_MS + 1000 * secs),
        st.sampled_from([NO_TIMESTAMP, round(LATER * 1000) + 10**7]),
    ),
    max_size=30,
)
SIZES = st.lists(st.integers(1, 6), min_size=1).map(lambda sizes: iter(sizes + [4] * 40))


@settings(max_examples=200)
@given(
    stamps=STAMPS,
    is_sorted=st.booleans(),
    sizes=SIZES,
    failures=st.lists(st.one_of(st.none(), st.integers(-1, 5)), max_size=40),
    bisect=st.booleans(),
    retries=st.integers(0, 2),
    max_state_bytes=st.sampled_from([25, 60, MAX_STATE_BYTES]),
)
def test_each_record_counts_once_and_is_done_with_its_window(
    stamps: list[int],
    is_sorted: bool,
    sizes: Iterator[int],
    failures: list[int | None],
    bisect: bool,
    retries: int,
    max_state_bytes: int,
) -> None:
    stamps = sorted(stamps) if is_sorted else stamps
    script = iter(failures)

    def fail(sent: Sent) -> int | None:
        failed = next(script, None)
        return failed if failed is None or failed < len(sent.numbers) else None

    policy = RetryPolicy(halt=False, bisect=bisect, max_retries=retries)
    lane = Lane(fail, policy, max_state_bytes)
    for batch in _batches(stamps, sizes):
        lane.work(batch)
        # Nothing is done that was answered and in no state that was handed over at an end.
        over = {number for call in lane.closed for number in call.state}
        end = lane.reaches[-1][1]
        assert all(number in over for number in lane.answered if number < end)
    lane.close()
    numbers = [3 * place for place in range(len(stamps))]
    assert sorted(lane.answered + lane.given_up) == numbers
    # The states at the ends hold what was answered, each record once, in order.
    assert [number for call in lane.closed for number in call.state] == sorted(lane.answered)
    assert [start for start, _ in lane.reaches[1:]] == [end for _, end in lane.reaches[:-1]]
    if numbers:
        assert lane.reaches[-1][1] == numbers[-1] + 1
    # One last call of each window, and no way back.
    finals = [call.turn.facts.start_ms for call in lane.closed if call.turn.facts.final]
    assert finals == sorted(set(finals))
    starts = [call.turn.facts.start_ms for call in lane.calls]
    assert starts == sorted(starts)
    if is_sorted and NO_TIMESTAMP not in stamps and all(s < LATER * 1000 for s in stamps):
        for call in lane.calls:
            for number in call.numbers:
                facts = call.turn.facts
                assert facts.start_ms <= stamps[number // 3] < facts.end_ms


@settings(max_examples=100)
@given(
    stamps=STAMPS.map(sorted),
    sizes=SIZES,
    crashes=st.lists(st.integers(0, 4), max_size=4),
)
def test_what_a_crash_cuts_off_is_begun_anew(
    stamps: list[int], sizes: Iterator[int], crashes: list[int]
) -> None:
    """Each answered record is in the last state of its whole window, whatever crashed before."""
    position, closed = 0, []
    for crash in (*crashes, None):
        lane = Lane()
        for turn, batch in enumerate(_batches(stamps, sizes, position)):
            if turn == crash:
                break
            lane.work(batch)
        else:
            lane.close(EARLY if crash else FINAL)
        position = lane.reaches[-1][1] if lane.reaches else position
        closed += lane.closed
    last = {call.turn.facts.start_ms: call.state for call in closed}
    seen = [number for state in last.values() for number in state]
    assert sorted(seen) == [3 * place for place in range(len(stamps))]


def test_failures_are_parts_of_their_batch() -> None:
    lane = Lane(lambda sent: -1 if 3 in sent.numbers else None)
    for batch in _batches(_of(1, 2, 61), iter([2, 1])):
        lane.work(batch)
    assert [type(part) for part in lane.finished[0].parts] == [Failure]
    # Of the window nobody has heard a state; it is closed all the same, since it was sent.
    assert _shape(lane)[1] == (0, [], [], True, False)
