"""Retry: which calls one batch takes, in what order, and where each of its records ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, Delivery, RetryPolicy, Wait, allows
from transforms.records import NO_TIMESTAMP, Batch, Failure, Records, Rejection, Responses

SECS = 1_700_000_000
GO_ON = RetryPolicy(halt=False)
BISECT = RetryPolicy(halt=False, bisect=True)

Function = Callable[[Call], Outcome | None]


def _batch(count, offsets=None, timestamps=None, entries=None, **more) -> Batch:
    offsets = list(range(count)) if offsets is None else offsets
    next_offset = more.pop("next_offset", offsets[-1] + 1 if offsets else 0)
    records = Records(
        offsets, timestamps or [SECS * 1000] * count, [None] * count, [b"v"] * count, [None] * count
    )
    start = more.pop("start", offsets[0] if offsets else 0)
    return Batch("t", 0, start, next_offset, records, entries or [b"1"] * count, **more)


def _answered(call: Call) -> Outcome:
    return Outcome(Kind.SUCCESS, results=[b"%d" % i for i in range(call.low, call.high)])


def _outcome(kind: Kind, error_type: str = "", **more) -> Outcome:
    return Outcome(kind, error_type=error_type or kind.name, message="m", **more)


def _poisoned(bad: Iterable[int], kind: Kind = Kind.FUNCTION_ERROR) -> Function:
    """A function that fails whenever one of these records is in a call."""
    bad = set(bad)

    def function(call: Call) -> Outcome:
        return _outcome(kind) if bad & set(range(call.low, call.high)) else _answered(call)

    return function


def _naming(bad: Iterable[int], first_only: bool = False) -> Function:
    """A function that names the bad records of a call, or, ending there, the first of them."""
    bad = set(bad)

    def function(call: Call) -> Outcome:
        sent = call.pick(range(call.high))
        failed = [place for place, index in enumerate(sent) if index in bad]
        return _partial(*failed[: 1 if first_only else None]) if failed else _ok(call)

    return function


def _partial(*failed: int) -> Outcome:
    return _outcome(Kind.PARTIAL, failed=failed)


def _ok(call: Call) -> Outcome:
    return Outcome(Kind.SUCCESS)


def _scripted(*outcomes: Outcome) -> Function:
    """A function that answers with these outcomes first, then well."""
    left = list(outcomes)
    return lambda call: left.pop(0) if left else _answered(call)


@dataclass
class Driven:
    """A delivery driven to its end, and the steps it took."""

    delivery: Delivery
    calls: list[Call] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def finished(self):
        return self.delivery.finished

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(call.low, call.high) for call in self.calls]

    @property
    def answered(self) -> list[int]:
        return [o for p in self.finished.parts if isinstance(p, Responses) for o in p.offsets]

    @property
    def failures(self) -> list[Failure]:
        return [part for part in self.finished.parts if isinstance(part, Failure)]

    @property
    def failed(self) -> list[int]:
        return [offset for failure in self.failures for offset in failure.records.offsets]

    @property
    def done(self) -> list[int]:
        """Offsets of the records that have ended, in the order of the parts."""
        return [
            offset
            for part in self.finished.parts
            for offset in (part.offsets if isinstance(part, Responses) else part.records.offsets)
        ]


class Clock:
    """Stands still unless a delivery waits."""

    def __init__(self, secs: float = SECS) -> None:
        self.secs = secs

    def __call__(self) -> float:
        return self.secs


def _check_position(driven: Driven) -> None:
    """What would be left behind if the delivery were abandoned now covers just what is done."""
    batch, finished = driven.delivery.batch, driven.finished
    offsets = list(batch.records.offsets)
    done = driven.done
    assert done == offsets[: len(done)]
    if len(done) < len(offsets):
        assert finished.next_offset == (done[-1] + 1 if done else batch.start)


def _drive(
    batch: Batch,
    policy: RetryPolicy,
    function: Function,
    clock: Clock | None = None,
    random: Callable[[], float] = lambda: 0.5,
    steps: int = 100_000,
) -> Driven:
    clock = clock or Clock()
    delivery = Delivery(batch, policy, clock, random)
    driven = Driven(delivery)
    generator = delivery.steps()
    step = next(generator, None)
    while step is not None and steps > 0:
        steps -= 1
        _check_position(driven)
        if isinstance(step, Wait):
            driven.waits.append(step.secs)
            clock.secs += step.secs
            step = next(generator, None)
            continue
        assert 0 <= step.low < step.high <= len(batch)
        # Neither a gap nor an overlap: a call begins with the first record that is not done.
        assert step.low == len(driven.done)
        outcome = function(step)
        if outcome:
            driven.calls.append(step)
        try:
            step = generator.send(outcome)
        except StopIteration:
            step = None
    generator.close()
    _check_position(driven)
    return driven


# -- bisecting ----------------------------------------------------------------------------


def test_the_worked_example() -> None:
    """8 records, the sixth is bad, two retries: these nine calls, in this order."""
    policy = RetryPolicy(max_retries=2, bisect=True, halt=False)
    driven = _drive(_batch(8), policy, _poisoned([5]))
    assert driven.spans == [
        (0, 8),
        (0, 4),
        (4, 8),
        (4, 6),
        (4, 5),
        (5, 6),
        (5, 6),
        (5, 6),
        (6, 8),
    ]
    assert driven.answered == [0, 1, 2, 3, 4, 6, 7]
    assert driven.failed == [5]
    assert [call.attempt for call in driven.calls] == [1, 1, 1, 1, 1, 1, 2, 3, 1]
    assert driven.failures[0].condition == "RetryAttemptsExhausted"
    assert driven.failures[0].attempts == 3
    assert driven.finished.stats.invocations == 9
    assert driven.finished.stats.retries == 2
    assert driven.finished.stats.bisections == 3
    assert driven.finished.next_offset == 8


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("power", [0, 1, 2, 3, 4, 5])
def test_one_bad_record_costs_two_calls_per_halving(power: int, retries: int) -> None:
    """One bad record in 2^k costs 2k + 1 + r calls, wherever it stands."""
    policy = RetryPolicy(max_retries=retries, bisect=True, halt=False)
    size = 2**power
    for bad in {0, size // 3, size - 1}:
        driven = _drive(_batch(size), policy, _poisoned([bad]))
        assert len(driven.calls) == 2 * power + 1 + retries
        assert driven.failed == [bad]


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_when_all_are_bad_each_is_tried_alone(size: int, retries: int) -> None:
    """n bad records cost n - 1 splits and n times the tries of a single one."""
    policy = RetryPolicy(max_retries=retries, bisect=True, halt=False)
    driven = _drive(_batch(size), policy, _poisoned(range(size)))
    assert len(driven.calls) == (size - 1) + size * (retries + 1)
    assert driven.failed == list(range(size))
    assert driven.finished.stats.bisections == size - 1
    assert driven.finished.stats.retries == size * retries


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_without_bisecting_the_batch_fails_as_a_whole(retries: int) -> None:
    """Bisect off: r + 1 calls of the whole batch, then all its records fail together."""
    policy = RetryPolicy(max_retries=retries, halt=False)
    driven = _drive(_batch(8), policy, _poisoned([5]))
    assert driven.spans == [(0, 8)] * (retries + 1)
    assert driven.failed == list(range(8))
    assert driven.failures[0].attempts == retries + 1
    assert len(driven.waits) == retries


def test_a_split_does_not_wait() -> None:
    """Halves are tried at once; only repeats of the same records back off."""
    driven = _drive(_batch(8), BISECT, _poisoned([3]))
    assert driven.waits == []


def test_a_batch_that_recovers_is_answered_whole() -> None:
    """A later call that succeeds answers all records, and what came before is no failure."""
    policy = RetryPolicy(max_retries=2, halt=False)
    driven = _drive(_batch(3), policy, _scripted(*[_outcome(Kind.FUNCTION_ERROR)] * 2))
    assert driven.spans == [(0, 3)] * 3
    assert [call.reason for call in driven.calls] == ["", "FUNCTION_ERROR", "FUNCTION_ERROR"]
    assert driven.answered == [0, 1, 2]
    assert driven.finished.stats.retries == 2


def test_minus_one_retries_without_limit() -> None:
    """With max_retries=-1 a batch is repeated until the function takes it."""
    policy = RetryPolicy(max_retries=-1, halt=False)
    driven = _drive(_batch(2), policy, _scripted(*[_outcome(Kind.FUNCTION_ERROR)] * 500))
    assert len(driven.calls) == 501
    assert driven.answered == [0, 1]


@pytest.mark.parametrize(
    ("limit", "repeats", "allowed"),
    [(0, 0, False), (1, 0, True), (1, 1, False), (-1, 0, True), (-1, 10**9, True), (3, 2, True)],
)
def test_allows(limit: int, repeats: int, allowed: bool) -> None:
    """A limit counts repeats; -1 is none."""
    assert allows(limit, repeats) is allowed


# -- the other kinds ----------------------------------------------------------------------


def test_results_stand_at_their_records() -> None:
    """A split batch's results are those of the calls that were answered."""
    driven = _drive(_batch(4, offsets=[5, 6, 9, 20]), BISECT, _poisoned([2]))
    results = {
        offset: result
        for part in driven.finished.parts
        if isinstance(part, Responses) and part.results
        for offset, result in zip(part.offsets, part.results)
    }
    assert results == {5: b"0", 6: b"1", 20: b"3"}


@pytest.mark.parametrize("policy", [GO_ON, RetryPolicy(max_retries=5, halt=False)])
def test_poison_is_never_repeated(policy: RetryPolicy) -> None:
    """Content that Lambda refuses fails after one call, whatever max_retries says."""
    driven = _drive(_batch(4), policy, _poisoned([2], Kind.POISON))
    assert driven.spans == [(0, 4)]
    assert driven.failed == [0, 1, 2, 3]
    assert driven.failures[0].condition == "InvalidRequestContent"
    assert driven.waits == []


def test_poison_is_split_when_bisecting() -> None:
    """With bisect only the record with the bad content fails."""
    policy = RetryPolicy(max_retries=5, bisect=True, halt=False)
    driven = _drive(_batch(4), policy, _poisoned([2], Kind.POISON))
    assert driven.spans == [(0, 4), (0, 2), (2, 4), (2, 3), (3, 4)]
    assert driven.failed == [2]
    assert driven.failures[0].condition == "InvalidRequestContent"


def test_an_invalid_reply_has_its_own_condition() -> None:
    """A reply that did not answer the batch is retried like a function error, and named."""
    policy = RetryPolicy(max_retries=1, halt=False)
    invalid = _outcome(Kind.FUNCTION_ERROR, "InvalidReply")
    driven = _drive(_batch(2), policy, _scripted(invalid, invalid))
    assert len(driven.calls) == 2
    assert driven.failures[0].condition == "InvalidReply"


def _limited(limit: int, entries: list[bytes]) -> Function:
    """A function that takes no more than so many bytes of entries."""

    def function(call: Call) -> Outcome:
        size = sum(map(len, entries[call.low : call.high]))
        return _outcome(Kind.TOO_LARGE) if size > limit else _answered(call)

    return function


@pytest.mark.parametrize("bisect", [False, True])
def test_too_large_splits_by_size_whatever_bisect_says(bisect: bool) -> None:
    """The bytes are halved, not the count; nothing of it counts as a retry."""
    entries = [b"x" * 100, *[b"x" * 10] * 10]
    policy = RetryPolicy(bisect=bisect, halt=False)
    driven = _drive(_batch(11, entries=entries), policy, _limited(110, entries))
    assert driven.spans == [(0, 11), (0, 1), (1, 11)]
    assert driven.answered == list(range(11))
    assert driven.finished.stats.bisections == 1
    assert driven.finished.stats.retries == 0
    assert driven.waits == []


def test_a_single_record_that_is_too_large_fails() -> None:
    """What cannot be split is given up, its neighbours are not."""
    entries = [b"x", b"x" * 50, b"x"]
    driven = _drive(_batch(3, entries=entries), GO_ON, _limited(20, entries))
    assert driven.failed == [1]
    assert driven.answered == [0, 2]
    assert driven.failures[0].condition == "MaximumPayloadSizeExceeded"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.integers(1, 300))
@settings(deadline=None)
def test_any_batch_too_large_is_split_until_it_fits(sizes: list[int], limit: int) -> None:
    """Every record that fits alone is answered; only the others fail."""
    entries = [b"x" * size for size in sizes]
    driven = _drive(_batch(len(sizes), entries=entries), GO_ON, _limited(limit, entries))
    assert driven.answered == [i for i, size in enumerate(sizes) if size <= limit]
    assert driven.failed == [i for i, size in enumerate(sizes) if size > limit]


@pytest.mark.parametrize("policy", [GO_ON, RetryPolicy(max_transient_retries=0, halt=False)])
def test_throttles_count_in_no_limit(policy: RetryPolicy) -> None:
    """A batch may be throttled as often as it is; no attempt is used up by it."""
    throttled = _outcome(Kind.THROTTLED)
    driven = _drive(_batch(2), policy, _scripted(*[throttled] * 50))
    assert len(driven.calls) == 51
    assert {call.attempt for call in driven.calls} == {1}
    assert driven.answered == [0, 1]
    assert driven.finished.stats.throttles == 50
    assert driven.finished.stats.retries == 0


def test_a_throttle_does_not_reset_what_was_counted() -> None:
    """Throttles between function errors leave their count as it is."""
    policy = RetryPolicy(max_retries=1, halt=False)
    failed, throttled = _outcome(Kind.FUNCTION_ERROR), _outcome(Kind.THROTTLED)
    driven = _drive(_batch(2), policy, _scripted(failed, throttled, throttled, failed))
    assert len(driven.calls) == 4
    assert driven.failed == [0, 1]
    assert driven.failures[0].attempts == 2


@pytest.mark.parametrize("kind", [Kind.THROTTLED, Kind.TRANSIENT])
@pytest.mark.parametrize("asked", [0.0, 3.0, 45.0])
def test_retry_after_is_obeyed(kind: Kind, asked: float) -> None:
    """A wait is never shorter than Lambda asked for, nor longer than the backoff otherwise."""
    outcome = _outcome(kind, retry_after_secs=asked)
    driven = _drive(_batch(1), GO_ON, _scripted(outcome), random=lambda: 0.5)
    backoff = 0.5 * (GO_ON.wait_throttled_secs if kind is Kind.THROTTLED else 0.2)
    assert driven.waits == [max(asked, backoff)]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_transient_failures_have_a_limit_of_their_own(limit: int) -> None:
    """So many repeats after network errors and 5xx; max_retries has no part in it."""
    policy = RetryPolicy(max_retries=0, max_transient_retries=limit, halt=False)
    driven = _drive(_batch(2), policy, _scripted(*[_outcome(Kind.TRANSIENT, "E503")] * 9))
    assert len(driven.calls) == limit + 1
    assert driven.failed == [0, 1]
    assert driven.failures[0].condition == "RetryAttemptsExhausted"
    assert driven.failures[0].error_type == "E503"
    assert driven.finished.stats.retries == limit


def test_an_outage_never_makes_error_records_by_default() -> None:
    """Network errors and 5xx are repeated without limit unless one is set."""
    driven = _drive(_batch(2), GO_ON, _scripted(*[_outcome(Kind.TRANSIENT)] * 200))
    assert len(driven.calls) == 201
    assert driven.answered == [0, 1]


def test_the_two_limits_are_never_mixed() -> None:
    """Transient failures use up no retries, and function errors no transient ones."""
    policy = RetryPolicy(max_retries=2, max_transient_retries=2, halt=False)
    mixed = [Kind.TRANSIENT, Kind.FUNCTION_ERROR, Kind.TRANSIENT, Kind.FUNCTION_ERROR]
    driven = _drive(_batch(2), policy, _scripted(*map(_outcome, mixed)))
    assert len(driven.calls) == 5
    assert driven.answered == [0, 1]
    assert [call.attempt for call in driven.calls] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("halt", [False, True])
def test_a_configuration_error_finishes_nothing(halt: bool) -> None:
    """The records stay undone, no record is blamed, and no call follows."""
    config = _outcome(Kind.CONFIG, "ResourceNotFoundException")
    function = _scripted(_outcome(Kind.FUNCTION_ERROR), _answered(Call(0, 2, 1, "")), config)
    driven = _drive(_batch(4), RetryPolicy(bisect=True, halt=halt), function)
    assert driven.spans == [(0, 4), (0, 2), (2, 4)]
    assert driven.delivery.config_error is config
    assert driven.answered == [0, 1]
    assert driven.failed == []
    assert driven.finished.halted is None
    assert driven.finished.next_offset == 2


def test_a_failure_holds_what_is_known_of_it() -> None:
    """Everything the last call's outcome said is in the failure, with the records themselves."""
    outcome = Outcome(
        Kind.FUNCTION_ERROR, "ValueError", "bad", 200, "Unhandled", "bG9n", "{}", "7", "r-1"
    )
    batch = _batch(2, offsets=[4, 9])
    (failure,) = _drive(batch, GO_ON, _scripted(outcome)).failures
    assert failure.records.offsets == [4, 9]
    assert failure.entries == batch.entries
    assert (failure.error_type, failure.message, failure.attempts) == ("ValueError", "bad", 1)
    assert (failure.status_code, failure.function_error) == (200, "Unhandled")
    assert (failure.log_result, failure.payload) == ("bG9n", "{}")
    assert (failure.executed_version, failure.request_id) == ("7", "r-1")


# -- partial failures ---------------------------------------------------------------------

CHECKPOINT = RetryPolicy(halt=False)
NAMED = RetryPolicy(halt=False, named=True)


def _with(policy: RetryPolicy, **changes) -> RetryPolicy:
    return replace(policy, **changes)


def _sent(driven: Driven) -> list[list[int]]:
    return [list(call.pick(range(call.high))) for call in driven.calls]


@pytest.mark.parametrize(
    ("policy", "bad", "first_only", "calls", "attempts", "failed"),
    [
        # From the first one named on: what is left has a call of its own, then the record is given
        # up alone, and what is behind it goes on.
        (CHECKPOINT, [3], False, ["0-7", "3-7", "4-7"], [1, 1, 1], [[3]]),
        (CHECKPOINT, [3, 5], False, ["0-7", "3-7", "4-7", "5-7", "6-7"], [1] * 5, [[3], [5]]),
        (CHECKPOINT, [3, 5], True, ["0-7", "3-7", "4-7", "5-7", "6-7"], [1] * 5, [[3], [5]]),
        (CHECKPOINT, [7], False, ["0-7", "7"], [1, 1], [[7]]),
        # The first one that was sent: the call that named it is its own.
        (CHECKPOINT, [0], False, ["0-7", "1-7"], [1, 1], [[0]]),
        # Named next to each other, and tried as often: they are given up together.
        (CHECKPOINT, [3, 4], False, ["0-7", "3-7", "5-7"], [1, 1, 1], [[3, 4]]),
        (CHECKPOINT, [3, 4], True, ["0-7", "3-7", "4-7", "5-7"], [1] * 4, [[3], [4]]),
        (CHECKPOINT, range(8), False, ["0-7"], [1], [list(range(8))]),
        # With repeats, counted for the record at the head.
        (
            _with(CHECKPOINT, max_retries=1),
            [3],
            False,
            ["0-7", "3-7", "3-7", "4-7"],
            [1, 1, 2, 1],
            [[3]],
        ),
        (
            _with(CHECKPOINT, max_retries=2),
            [3],
            True,
            ["0-7", "3-7", "3-7", "3-7", "4-7"],
            [1, 1, 2, 3, 1],
            [[3]],
        ),
        (_with(CHECKPOINT, max_retries=1), [0], False, ["0-7", "0-7", "1-7"], [1, 2, 1], [[0]]),
        (
            # The second one has been named as often; it has its own calls once it is at the head.
            _with(CHECKPOINT, max_retries=1),
            [3, 5],
            False,
            ["0-7", "3-7", "3-7", "4-7", "5-7", "5-7", "6-7"],
            [1, 1, 2, 1, 1, 2, 1],
            [[3], [5]],
        ),
        (
            _with(CHECKPOINT, max_retries=1),
            [3, 4],
            False,
            ["0-7", "3-7", "3-7", "5-7"],
            [1, 1, 2, 1],
            [[3, 4]],
        ),
        # Only those that are named.
        (NAMED, [3], False, ["0-7", "3"], [1, 1], [[3]]),
        (NAMED, [3, 5], False, ["0-7", "3,5"], [1, 1], [[3], [5]]),
        (NAMED, [0, 7], False, ["0-7"], [1], [[0], [7]]),
        (NAMED, range(8), False, ["0-7"], [1], [list(range(8))]),
        (_with(NAMED, max_retries=1), [3], False, ["0-7", "3", "3"], [1, 1, 2], [[3]]),
        (
            _with(NAMED, max_retries=1),
            [3, 5, 6],
            False,
            ["0-7", "3,5,6", "3,5,6"],
            [1, 1, 2],
            [[3], [5, 6]],
        ),
        (
            _with(NAMED, max_retries=2),
            [0, 5],
            False,
            ["0-7", "0,5", "0,5"],
            [1, 2, 3],
            [[0], [5]],
        ),
        # With bisect the record at the head is called alone first.
        (_with(CHECKPOINT, bisect=True), [3], False, ["0-7", "3", "4-7"], [1, 1, 1], [[3]]),
        (_with(CHECKPOINT, bisect=True), [7], False, ["0-7", "7"], [1, 1], [[7]]),
        (
            _with(CHECKPOINT, bisect=True),
            [3, 5],
            False,
            ["0-7", "3", "4-7", "5", "6-7"],
            [1, 1, 1, 1, 1],
            [[3], [5]],
        ),
        (
            _with(CHECKPOINT, bisect=True, max_retries=1),
            [3],
            False,
            ["0-7", "3", "3", "4-7"],
            [1, 1, 2, 1],
            [[3]],
        ),
        (
            _with(NAMED, bisect=True),
            [2, 5, 7],
            False,
            ["0-7", "2", "5,7", "5", "7"],
            [1, 1, 1, 1, 1],
            [[2], [5], [7]],
        ),
    ],
)
def test_what_follows_a_partial_failure(policy, bad, first_only, calls, attempts, failed) -> None:
    """Which records are called again, as which attempt, and which of them are given up."""
    driven = _drive(_batch(8), policy, _naming(bad, first_only))
    assert _sent(driven) == [_indexes(text) for text in calls]
    assert [call.attempt for call in driven.calls] == attempts
    assert [list(failure.records.offsets) for failure in driven.failures] == failed
    assert driven.done == list(range(8))
    assert driven.finished.next_offset == 8
    for failure in driven.failures:
        assert failure.condition == "RetryAttemptsExhausted"
        assert failure.error_type == "PARTIAL"
        assert failure.attempts == 1 + policy.max_retries
    assert [call.reason for call in driven.calls] == ["", *["PARTIAL"] * (len(calls) - 1)]


def _indexes(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


@pytest.mark.parametrize("policy", [CHECKPOINT, NAMED])
def test_a_named_record_that_recovers_is_answered(policy: RetryPolicy) -> None:
    """Nothing is given up as long as repeats are left; the records stay in order."""
    policy = _with(policy, max_retries=5)
    driven = _drive(_batch(8), policy, _scripted(_partial(2, 6), _partial(0), _partial(0)))
    assert driven.answered == list(range(8))
    assert driven.failures == []
    assert len(driven.waits) == driven.finished.stats.retries == 3
    assert [call.attempt for call in driven.calls] == [1, 1, 2, 3]


@pytest.mark.parametrize("named", [False, True])
def test_what_progress_leaves_has_all_calls_of_its_own(named: bool) -> None:
    """As recorded of AWS: 3 records, 3 repeats, the last one always named: 5 calls, 4 its own."""
    policy = _with(CHECKPOINT, max_retries=3, named=named)
    driven = _drive(_batch(3), policy, _naming([2]))
    assert _sent(driven) == [[0, 1, 2], [2], [2], [2], [2]]
    (failure,) = driven.failures
    assert failure.attempts == 4
    # Each repeat waits longer than the one before; the first one that is its own as the first.
    assert driven.finished.stats.retries == len(driven.waits) == 4


def test_waits_begin_anew_after_progress() -> None:
    """What is left backs off as if nothing had been called before."""
    policy = _with(CHECKPOINT, max_retries=9)
    script = _scripted(_partial(0), _partial(0), _partial(0), _partial(1), _partial(0))
    driven = _drive(_batch(3), policy, script, random=lambda: 1.0)
    assert driven.waits == [0.2, 0.4, 0.8, 0.2, 0.2]


def test_progress_resets_the_count() -> None:
    """A record that comes to the head has the repeats that are its own."""
    policy = _with(CHECKPOINT, max_retries=1)
    script = _scripted(_partial(2), _partial(1), _partial(1), _partial(1))
    driven = _drive(_batch(8), policy, script)
    assert _sent(driven) == [_indexes(t) for t in ("0-7", "2-7", "3-7", "4-7", "5-7")]
    assert [call.attempt for call in driven.calls] == [1, 1, 1, 1, 1]
    assert driven.answered == list(range(8))


def test_an_error_of_the_whole_batch_counts_for_its_head() -> None:
    """A call that failed and one that named the same record are two tries of it."""
    policy = _with(CHECKPOINT, max_retries=1)
    error = _outcome(Kind.FUNCTION_ERROR)
    driven = _drive(_batch(3), policy, _scripted(error, _partial(0)))
    assert _sent(driven) == [[0, 1, 2], [0, 1, 2], [1, 2]]
    assert driven.failed == [0]
    driven = _drive(_batch(3), policy, _scripted(error, _partial(1)))
    assert _sent(driven) == [[0, 1, 2], [0, 1, 2], [1, 2]]
    assert driven.answered == [0, 1, 2]
    driven = _drive(_batch(3), policy, _scripted(_partial(1), error))
    assert driven.answered == [0, 1, 2]
    driven = _drive(_batch(3), policy, _scripted(_partial(1), error, error))
    assert driven.answered == [0]
    assert driven.failed == [1, 2]


@pytest.mark.parametrize("policy", [CHECKPOINT, NAMED])
def test_an_outage_after_progress_has_all_its_repeats(policy: RetryPolicy) -> None:
    """Transient failures are counted anew for what is left."""
    policy = _with(policy, max_retries=1, max_transient_retries=1)
    transient = _outcome(Kind.TRANSIENT)
    driven = _drive(_batch(3), policy, _scripted(transient, _partial(1), transient))
    assert driven.answered == [0, 1, 2]
    assert len(driven.calls) == 4


def test_the_rest_of_a_partial_failure_may_be_halved() -> None:
    """Errors, sizes and ages divide what is left as they divide a batch, holes and all."""
    policy = _with(NAMED, max_retries=9, bisect=True)
    error = _outcome(Kind.FUNCTION_ERROR)
    script = _scripted(_partial(1, 3, 4, 6, 7), _ok(Call(0, 1, 1, "")), error)
    driven = _drive(_batch(8), policy, script)
    assert _sent(driven) == [list(range(8)), [1], [3, 4, 6, 7], [3, 4], [6, 7]]
    assert driven.answered == list(range(8))

    entries = [b"x" * size for size in (1, 9, 1, 1, 1, 1, 1, 1)]
    script = _scripted(_partial(1, 3, 5), _outcome(Kind.TOO_LARGE))
    driven = _drive(_batch(8, entries=entries), _with(NAMED, max_retries=9), script)
    assert _sent(driven) == [list(range(8)), [1, 3, 5], [1], [3, 5]]
    assert driven.answered == list(range(8))

    class Later(Clock):
        def __call__(self) -> float:
            self.secs += 50
            return self.secs

    timestamps = [(SECS + 9000) * 1000] * 8
    timestamps[3] = SECS * 1000
    policy = _with(NAMED, max_retries=9, max_record_age_secs=60)
    batch = _batch(8, timestamps=timestamps)
    driven = _drive(batch, policy, _scripted(_partial(1, 3, 5)), clock=Later())
    assert _sent(driven) == [list(range(8)), [1], [5]]
    assert driven.failed == [3]
    assert driven.answered == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("policy", "next_offset", "halted"),
    [
        (RetryPolicy(), 14, [14]),
        (RetryPolicy(named=True), 14, [14]),
        (RetryPolicy(bisect=True), 14, [14]),
        (RetryPolicy(named=True, bisect=True, max_retries=2), 14, [14]),
    ],
)
def test_a_partial_failure_halts_in_front_of_the_first_one_named(
    policy, next_offset, halted
) -> None:
    """What was answered behind it is not committed, so it will be sent again."""
    batch = _batch(8, offsets=list(range(11, 19)), start=10, next_offset=30)
    driven = _drive(batch, policy, _naming([3, 5]))
    assert driven.finished.next_offset == next_offset
    assert driven.finished.halted is not None
    assert list(driven.finished.halted.records.offsets) == halted
    assert driven.answered == [11, 12, 13]


# -- halting ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "bisect", "kind", "next_offset", "halted"),
    [
        ([0], False, Kind.FUNCTION_ERROR, 10, [10, 11, 15, 16]),
        ([3], False, Kind.FUNCTION_ERROR, 10, [10, 11, 15, 16]),
        ([0], True, Kind.FUNCTION_ERROR, 10, [10]),
        ([2], True, Kind.FUNCTION_ERROR, 12, [15]),
        ([3], True, Kind.FUNCTION_ERROR, 16, [16]),
        ([2, 3], True, Kind.POISON, 12, [15]),
        ([2], False, Kind.POISON, 10, [10, 11, 15, 16]),
    ],
)
def test_halt_stops_at_the_first_record_that_fails(bad, bisect, kind, next_offset, halted) -> None:
    """What was done before it stays done; it and all behind it stay undone, and uncalled."""
    batch = _batch(4, offsets=[10, 11, 15, 16], next_offset=30)
    driven = _drive(batch, RetryPolicy(bisect=bisect, halt=True), _poisoned(bad, kind))
    assert driven.finished.next_offset == next_offset
    assert driven.finished.halted is not None
    assert list(driven.finished.halted.records.offsets) == halted
    assert driven.failed == []
    assert driven.calls[-1].high <= batch.records.offsets.index(halted[-1]) + 1


def test_halt_keeps_the_start_of_a_range_that_begins_before_its_records() -> None:
    """Nothing done means nothing to commit, also where the range begins with a gap."""
    driven = _drive(_batch(1, offsets=[5], start=3), RetryPolicy(), _poisoned([0]))
    assert driven.finished.next_offset == 3
    assert driven.finished.start == 3


# -- age ----------------------------------------------------------------------------------

AGE = RetryPolicy(max_record_age_secs=60, halt=False)
OLD, YOUNG, LIMIT = (SECS - 61) * 1000, SECS * 1000, (SECS - 60) * 1000


@pytest.mark.parametrize(
    ("timestamps", "spans", "failed"),
    [
        ([YOUNG] * 3, [(0, 3)], []),
        ([LIMIT] * 3, [(0, 3)], []),
        ([LIMIT - 1] * 3, [], [0, 1, 2]),
        ([OLD] * 3, [], [0, 1, 2]),
        ([NO_TIMESTAMP] * 3, [(0, 3)], []),
        ([OLD, OLD, YOUNG], [(2, 3)], [0, 1]),
        ([YOUNG, OLD, OLD], [(0, 1)], [1, 2]),
        ([YOUNG, OLD, YOUNG], [(0, 1), (2, 3)], [1]),
        ([OLD, YOUNG, OLD], [(1, 2)], [0, 2]),
        ([OLD, NO_TIMESTAMP, OLD], [(1, 2)], [0, 2]),
    ],
)
def test_records_too_old_are_given_up_before_a_call(timestamps, spans, failed) -> None:
    """Only those that are too old, in their place among the others, and without a call."""
    driven = _drive(_batch(3, timestamps=timestamps), AGE, _answered)
    assert driven.spans == spans
    assert driven.failed == failed
    for failure in driven.failures:
        assert failure.condition == "MaximumRecordAgeExceeded"
        assert (failure.attempts, failure.status_code) == (0, 0)
        assert "--max_record_age_secs=60" in failure.message


def test_age_is_off_by_default() -> None:
    """Without a limit no record is too old."""
    driven = _drive(_batch(2, timestamps=[0, 1]), GO_ON, _answered)
    assert driven.answered == [0, 1]


def test_age_ends_repeats_without_limit() -> None:
    """A record that becomes too old while it is repeated is given up before the next call."""
    policy = RetryPolicy(max_retries=-1, max_record_age_secs=60, halt=False)
    failing = _poisoned([0])
    driven = _drive(_batch(1), policy, failing, random=lambda: 1.0)
    assert driven.failures[0].condition == "MaximumRecordAgeExceeded"
    assert driven.failures[0].attempts == len(driven.calls) > 1
    assert sum(driven.waits[:-1]) <= 60 < sum(driven.waits)


def test_age_ends_a_throttle_too() -> None:
    """Being throttled for ever is no reason to keep a record for ever."""
    driven = _drive(_batch(2), AGE, lambda _: _outcome(Kind.THROTTLED), random=lambda: 1.0)
    assert driven.failed == [0, 1]
    assert driven.failures[0].attempts == 0


def test_an_old_record_halts_where_failures_halt() -> None:
    """With halt, age stops the partition at the first record that is too old."""
    policy = RetryPolicy(max_record_age_secs=60, halt=True)
    driven = _drive(_batch(3, timestamps=[YOUNG, OLD, YOUNG]), policy, _answered)
    assert driven.spans == [(0, 1)]
    assert driven.finished.next_offset == 1
    assert driven.finished.halted is not None
    assert driven.finished.halted.condition == "MaximumRecordAgeExceeded"


# -- an open breaker ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.FUNCTION_ERROR, Kind.POISON, Kind.TRANSIENT])
@pytest.mark.parametrize("policy", [RetryPolicy(max_transient_retries=0), GO_ON, BISECT])
def test_what_is_spared_is_not_given_up(kind: Kind, policy: RetryPolicy) -> None:
    """The same call again, as often as it takes; it fails nothing and halts nothing."""
    driven = _drive(_batch(1), policy, _scripted(*[_outcome(kind, spared=True)] * 30))
    assert driven.spans == [(0, 1)] * 31
    assert driven.answered == [0]
    assert driven.waits[:4] == [0.1, 0.2, 0.4, 0.8]
    assert len(driven.waits) == 30
    assert max(driven.waits) == 10.0
    assert driven.finished.stats.retries == 30
    assert [call.attempt for call in driven.calls] == list(range(1, 32))


def test_what_is_spared_counts_in_no_limit() -> None:
    """Afterwards as many repeats are left as there were before."""
    policy = RetryPolicy(max_retries=2, max_transient_retries=1, halt=False)
    failed, spared = _outcome(Kind.FUNCTION_ERROR), _outcome(Kind.FUNCTION_ERROR, spared=True)
    away = _outcome(Kind.TRANSIENT)
    gone = _outcome(Kind.TRANSIENT, spared=True)
    script = [failed, spared, gone, spared, away, gone, failed, failed, failed]
    driven = _drive(_batch(1), policy, _scripted(*script))
    assert driven.failures[0].condition == "RetryAttemptsExhausted"
    assert len(driven.calls) == len(script) - 1


def test_what_is_spared_waits_as_it_is_asked_to() -> None:
    """A Retry-After of a failure around the function counts as ever."""
    asked = _outcome(Kind.TRANSIENT, spared=True, retry_after_secs=9.0)
    assert _drive(_batch(1), GO_ON, _scripted(asked, asked)).waits == [9.0, 9.0]


@pytest.mark.parametrize("kind", [Kind.FUNCTION_ERROR, Kind.POISON])
def test_a_split_goes_on_where_nothing_is_given_up(kind: Kind) -> None:
    """Down to the bad record, so that the good ones beside it can show that all is well again."""
    bad = _poisoned([2], kind)

    def function(call: Call) -> Outcome:
        return replace(bad(call), spared=len(calls) < 6)

    calls: list[Call] = []
    driven = _drive(_batch(4), BISECT, lambda call: calls.append(call) or function(call))
    assert driven.spans == [(0, 4), (0, 2), (2, 4), (2, 3), (2, 3), (2, 3), (3, 4)]
    assert driven.failed == [2]


def test_a_call_that_is_not_made_is_asked_for_again() -> None:
    """Nothing is counted, and its records may have become too old meanwhile."""
    clock = Clock()
    policy = RetryPolicy(max_record_age_secs=60, halt=False)
    asked: list[Call] = []

    def function(call: Call) -> Outcome | None:
        asked.append(call)
        clock.secs += 20
        return None

    batch = _batch(2, timestamps=[int(SECS) * 1000, int(SECS + 30) * 1000])
    driven = _drive(batch, policy, function, clock)
    assert [(call.low, call.high, call.attempt) for call in asked] == (
        [(0, 2, 1)] * 4 + [(1, 2, 1)]
    )
    assert [failure.condition for failure in driven.failures] == ["MaximumRecordAgeExceeded"] * 2
    assert [failure.attempts for failure in driven.failures] == [0, 0]
    assert driven.finished.stats.invocations == 0


# -- rejections, empty ranges, backoff ----------------------------------------------------


@pytest.mark.parametrize("halt", [False, True])
def test_a_rejected_record_is_never_sent(halt: bool) -> None:
    """It fails with its rejection's facts and no call, or halts."""
    rejection = Rejection("InvalidRecord", "InvalidJson", "not JSON")
    batch = _batch(1, offsets=[5], start=3, next_offset=9, rejection=rejection)
    driven = _drive(batch, RetryPolicy(halt=halt, max_retries=3), _answered)
    assert driven.calls == []
    failure = driven.finished.halted if halt else driven.failures[0]
    assert failure is not None
    assert (failure.condition, failure.error_type) == ("InvalidRecord", "InvalidJson")
    assert (failure.message, failure.attempts, failure.status_code) == ("not JSON", 0, 0)
    assert failure.function_error == "InvalidJson"
    assert driven.finished.next_offset == (3 if halt else 9)


def test_an_empty_range_is_done_without_a_call() -> None:
    """Offsets that hold no record are passed on, so that they can be committed."""
    driven = _drive(_batch(0, start=5, next_offset=9), RetryPolicy(), _answered)
    assert driven.calls == []
    assert driven.finished.parts == []
    assert (driven.finished.start, driven.finished.next_offset) == (5, 9)


def test_a_batch_ends_at_its_own_end() -> None:
    """Offsets behind the last record belong to the batch; it is done up to there."""
    driven = _drive(_batch(2, offsets=[5, 7], start=4, next_offset=12), BISECT, _poisoned([1]))
    assert driven.finished.next_offset == 12


@given(
    st.integers(0, 10_000),
    st.floats(0.001, 5),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.1, 100),
)
@settings(deadline=None)
def test_backoff_stays_below_its_bounds(repeats, initial, random, most) -> None:
    """A wait is between 0 and the doubled bound, and never above the highest one."""
    policy = RetryPolicy(wait_max_secs=most)
    secs = policy.backoff_secs(repeats, initial, lambda: random)
    assert 0 <= secs <= min(most, initial * 2 ** min(repeats, 60))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Kind.FUNCTION_ERROR, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20]),
        (Kind.TRANSIENT, [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20]),
        (Kind.THROTTLED, [1, 2, 4, 8, 16, 20, 20, 20, 20]),
    ],
)
def test_waits_double_up_to_the_highest(kind: Kind, expected: list[float]) -> None:
    """Each repeat doubles the bound; the jitter takes a part of it."""
    policy = RetryPolicy(max_retries=-1, halt=False)
    script = [_outcome(kind)] * len(expected)
    full = _drive(_batch(1), policy, _scripted(*script), random=lambda: 1.0)
    assert full.waits == pytest.approx(expected)
    none = _drive(_batch(1), policy, _scripted(*script), random=lambda: 0.0)
    assert none.waits == [0.0] * len(expected)


# -- everything together ------------------------------------------------------------------

policies = st.builds(
    RetryPolicy,
    max_retries=st.sampled_from([0, 1, 2, 5, -1]),
    max_transient_retries=st.sampled_from([0, 1, 3, -1, -1]),
    max_record_age_secs=st.sampled_from([-1, -1, 60, 100]),
    bisect=st.booleans(),
    named=st.booleans(),
    halt=st.booleans(),
)
faults = st.sampled_from(
    [None, None, None, Kind.THROTTLED, Kind.TRANSIENT, Kind.TRANSIENT, Kind.FUNCTION_ERROR]
)
NOT_MADE = "not made"


@given(
    # Per record: the gap before it, how many calls it spoils, its size, its age in seconds.
    rows=st.lists(
        st.tuples(
            st.integers(1, 4),
            st.sampled_from([0, 0, 0, 0, 0, 1, 2, 9]),
            st.integers(1, 30),
            st.sampled_from([None, 0, 0, 0, 40, 90, 200]),
        ),
        min_size=1,
        max_size=40,
    ),
    policy=policies,
    script=st.lists(st.one_of(faults, st.just(NOT_MADE)), max_size=30),
    spared=st.lists(st.booleans(), max_size=30),
    bad_kind=st.sampled_from([Kind.FUNCTION_ERROR, Kind.POISON, Kind.PARTIAL, Kind.PARTIAL]),
    first_only=st.booleans(),
    limit=st.sampled_from([15, 100, 10_000]),
    abandon=st.sampled_from([1, 3, 10, 10_000, 10_000, 10_000]),
    config_at=st.sampled_from([None, None, None, 1, 4]),
    jitter=st.floats(0, 1, exclude_max=True),
    lead=st.integers(0, 3),
    tail=st.integers(0, 3),
)
@settings(deadline=None, max_examples=400)
def test_every_record_ends_in_exactly_one_place(
    rows,
    policy,
    script,
    spared,
    bad_kind,
    first_only,
    limit,
    abandon,
    config_at,
    jitter,
    lead,
    tail,
) -> None:
    """Whatever fails and however often, order is kept, and nothing is lost or done twice."""
    offsets, offset = [], 100
    for gap, *_ in rows:
        offset += gap
        offsets.append(offset)
    spoils = [row[1] for row in rows]
    entries = [b"x" * row[2] for row in rows]
    timestamps = [NO_TIMESTAMP if row[3] is None else (SECS - row[3]) * 1000 for row in rows]
    batch = _batch(
        len(rows),
        offsets=offsets,
        timestamps=timestamps,
        entries=entries,
        start=offsets[0] - lead,
        next_offset=offsets[-1] + 1 + tail,
    )
    faults_left = list(script)
    kinds: list[Kind] = []
    spares = [0]
    # A function that ends at the first bad record has not seen those behind it.
    first_only = first_only and not policy.named
    processed: set[int] = set()

    def function(call: Call) -> Outcome | None:
        sent = call.pick(range(len(rows)))
        failed: list[int] = []
        kind = Kind.SUCCESS
        if len(kinds) == config_at:
            kind = Kind.CONFIG
        elif faults_left and (fault := faults_left.pop(0)):
            if fault is NOT_MADE:
                return None
            kind = fault
        elif sum(map(len, call.pick(entries))) > limit:
            kind = Kind.TOO_LARGE
        elif any(call.pick(spoils)):
            kind = bad_kind
            failed = [place for place, index in enumerate(sent) if spoils[index]]
            if first_only:
                del failed[1:]
            for index in sent:
                spoils[index] = max(0, spoils[index] - 1)
        kinds.append(kind)
        fails = kind in (Kind.TRANSIENT, Kind.FUNCTION_ERROR, Kind.POISON)
        fails |= kind is Kind.PARTIAL and len(failed) == len(sent)
        spare = fails and len(kinds) <= len(spared) and spared[len(kinds) - 1]
        spares[0] += spare
        if kind is Kind.PARTIAL:
            seen = failed[0] if first_only else len(sent)
            processed.update(i for place, i in enumerate(sent[:seen]) if place not in failed)
            return _outcome(kind, failed=failed, spared=spare)
        if kind is Kind.SUCCESS:
            processed.update(sent)
            # Results stand at their records, so they go with calls without a hole.
            return _ok(call) if call.only else _answered(call)
        return _outcome(kind, spared=spare)

    driven = _drive(batch, policy, function, random=lambda: jitter, steps=abandon)
    finished, stats = driven.finished, driven.finished.stats
    asked = len(driven.calls) + script.count(NOT_MADE) - faults_left.count(NOT_MADE)
    abandoned = asked + len(driven.waits) >= abandon

    # In order, each once; `_drive` checked that no call left one out or came back to one.
    done = driven.done
    assert done == offsets[: len(done)]
    assert all(len(part) for part in finished.parts)
    assert stats.invocations == len(kinds) == len(driven.calls)
    assert stats.throttles == kinds.count(Kind.THROTTLED)
    failing = (Kind.TRANSIENT, Kind.FUNCTION_ERROR, Kind.PARTIAL)
    assert stats.retries <= sum(map(kinds.count, failing)) + spares[0]
    assert finished.start == batch.start
    assert {offsets.index(offset) for offset in driven.answered} <= processed
    assert driven.delivery.config_error is None or kinds[-1] is Kind.CONFIG
    if policy.halt:
        assert driven.failures == []
    else:
        assert finished.halted is None
    if finished.halted:
        first = len(done)
        assert list(finished.halted.records.offsets) == offsets[first:][: len(finished.halted)]
        assert len(finished.halted) >= 1
    elif not abandoned and driven.delivery.config_error is None:
        assert done == offsets
        assert finished.next_offset == batch.next_offset
    for failure in driven.failures:
        assert failure.condition in {
            "RetryAttemptsExhausted",
            "MaximumRecordAgeExceeded",
            "MaximumPayloadSizeExceeded",
            "InvalidRequestContent",
        }
        if failure.condition == "MaximumPayloadSizeExceeded":
            assert len(failure) == 1
        if failure.condition == "InvalidRequestContent" and policy.bisect:
            assert len(failure) == 1
    for secs in driven.waits:
        assert 0 <= secs <= policy.wait_max_secs
