"""Breaker: when it opens and closes, and whose failures it keeps from giving records up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.invoke.breaker import Breaker, BreakerPolicy
from transforms.invoke.outcome import Kind

WAIT = 30.0
FAILURES = [Kind.FUNCTION_ERROR, Kind.POISON, Kind.TRANSIENT]
NEITHER = [Kind.THROTTLED, Kind.TOO_LARGE, Kind.CONFIG]


def _breaker(rate: float = 0.5, invocations: int = 4, halts: bool = False) -> Breaker:
    return Breaker(BreakerPolicy(rate, invocations, WAIT), halts)


def _call(breaker: Breaker, batch: object, kind: Kind, now: float = 0.0) -> bool:
    """One call, begun and ended; whether it spares its records."""
    assert breaker.lets_through(now)
    return breaker.end(breaker.begin(), batch, kind, now)


def _calls(breaker: Breaker, text: str) -> list[bool]:
    """Calls as ``batch`` letter and ``+`` or ``-``; which of them spared their records."""
    return [
        _call(breaker, batch, Kind.SUCCESS if sign == "+" else Kind.FUNCTION_ERROR)
        for batch, sign in text.split()
    ]


def _opened(**more) -> Breaker:
    """One that has just been opened, at time 0."""
    breaker = _breaker(**more)
    _calls(breaker, "a- b- c- d-")
    assert breaker.is_open
    return breaker


# -- opening ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "calls", "opens"),
    [
        # Not before there are as many as are looked at.
        (0.5, "a- b- c-", False),
        (0.5, "a- b- c- d-", True),
        # The share of the last ones.
        (0.5, "a+ b+ c- d-", True),
        (0.75, "a+ b+ c- d-", False),
        (0.75, "a+ b+ c- d- e-", True),
        (0.76, "a+ b+ c- d- e-", False),
        (1.0, "a- b- c- d-", True),
        (1.0, "a- b- c+ d- e- f-", False),
        (1.0, "a- b- c+ d- e- f- g-", True),
        # A success does not open it, even where the share is reached.
        (0.5, "a- b- c+ d+", False),
        (0.5, "a- b- c+ d+ e-", True),
        # One batch alone does not, be it all there is or the reason for the share.
        (0.5, "a- a- a- a- a- a- a- a-", False),
        (0.5, "a- a- a- b+", False),
        (0.5, "b+ a- a- a-", False),
        (1.0, "a- a- a- b-", True),
        (0.5, "b+ a- a- c-", True),
        (0.75, "b+ a- a- c-", False),
        (0.6, "b+ a- a- c-", True),
        # Never.
        (0.0, "a- b- c- d- e- f- g- h-", False),
    ],
)
def test_when_it_opens(rate: float, calls: str, opens: bool) -> None:
    breaker = _breaker(rate)
    spared = _calls(breaker, calls)
    assert breaker.is_open is opens
    assert breaker.openings == opens
    # The failure that opens it is the first one that gives nothing up.
    assert spared == [False] * (len(spared) - 1) + [opens]


@pytest.mark.parametrize("kind", FAILURES)
def test_what_counts_as_a_failure(kind: Kind) -> None:
    breaker = _breaker(1.0)
    assert [_call(breaker, batch, kind) for batch in "abcd"] == [False, False, False, True]


@pytest.mark.parametrize("kind", NEITHER)
def test_what_counts_neither_way(kind: Kind) -> None:
    """Between failures it changes nothing, and is no success either."""
    breaker = _breaker(1.0)
    for batch in "abc":
        assert not _call(breaker, batch, Kind.FUNCTION_ERROR)
        assert not _call(breaker, batch, kind)
    assert not breaker.is_open
    assert _call(breaker, "d", Kind.FUNCTION_ERROR)


# -- open ---------------------------------------------------------------------------------


def test_one_probe_after_each_wait() -> None:
    breaker = _opened()
    assert not breaker.lets_through(WAIT - 0.1)
    assert breaker.probe_at == WAIT
    assert breaker.lets_through(WAIT)
    probe = breaker.begin()
    assert breaker.probe_at == math.inf
    assert not breaker.lets_through(10 * WAIT)
    assert breaker.end(probe, "e", Kind.FUNCTION_ERROR, 50.0)
    assert breaker.is_open
    assert not breaker.lets_through(50.0 + WAIT - 0.1)
    assert not _call(breaker, "f", Kind.SUCCESS, 50.0 + WAIT)
    assert not breaker.is_open
    assert breaker.lets_through(0.0)
    assert breaker.openings == 1


@pytest.mark.parametrize("kind", [*FAILURES, *NEITHER])
def test_only_a_success_closes_it(kind: Kind) -> None:
    breaker = _opened()
    assert _call(breaker, "e", kind, WAIT) is (kind in FAILURES)
    assert breaker.is_open
    assert breaker.probe_at == 2 * WAIT


def test_what_was_running_when_it_opened() -> None:
    """Its failures give nothing up; its successes do not close it."""
    breaker = _breaker()
    running = [breaker.begin() for _ in range(3)]
    _calls(breaker, "a- b- c- d-")
    assert breaker.end(running[0], "e", Kind.FUNCTION_ERROR, 1.0)
    assert not breaker.end(running[1], "f", Kind.SUCCESS, 2.0)
    assert breaker.is_open
    assert breaker.probe_at == WAIT
    assert not _call(breaker, "g", Kind.SUCCESS, WAIT)
    # Still from before: it tells nothing about the function as it is now.
    assert breaker.end(running[2], "h", Kind.FUNCTION_ERROR, WAIT)
    assert not breaker.is_open


def test_it_begins_anew_after_it_closed() -> None:
    """What was before does not open it again; the same failures do."""
    breaker = _opened()
    _call(breaker, "e", Kind.SUCCESS, WAIT)
    assert _calls(breaker, "a- b- c-") == [False] * 3
    assert _calls(breaker, "d-") == [True]
    assert breaker.openings == 2


# -- halting ------------------------------------------------------------------------------


def test_where_it_would_halt_a_failure_waits_for_a_success() -> None:
    """One since its call began, whosever it is; one before says nothing of now."""
    breaker = _breaker(1.0, halts=True)
    assert not _call(breaker, "a", Kind.SUCCESS)
    assert _call(breaker, "b", Kind.FUNCTION_ERROR)
    begun = breaker.begin()
    assert not _call(breaker, "a", Kind.SUCCESS)
    assert not breaker.end(begun, "b", Kind.FUNCTION_ERROR, 0.0)
    assert _call(breaker, "b", Kind.FUNCTION_ERROR)
    assert not breaker.is_open


def test_what_is_no_success_proves_nothing() -> None:
    breaker = _breaker(1.0, halts=True)
    for kind in NEITHER:
        begun = breaker.begin()
        assert not _call(breaker, "a", kind)
        assert breaker.end(begun, "b", Kind.FUNCTION_ERROR, 0.0)


def test_a_batch_that_is_alone_halts_in_the_end() -> None:
    """As many failures as are looked at, nothing else since: then nobody can tell."""
    breaker = _breaker(1.0, invocations=4, halts=True)
    assert _calls(breaker, "a+ b- b- b- b- b-") == [False, True, True, True, False, False]
    assert not breaker.is_open
    # A success of the batch itself, of a part of it, is one among those that are looked at.
    breaker = _breaker(1.0, invocations=4, halts=True)
    assert _calls(breaker, "b+ b- b- b- b-") == [False, True, True, True, False]


# -- properties ---------------------------------------------------------------------------

rates = st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0])
sizes = st.integers(2, 12)


@given(
    rate=rates,
    invocations=sizes,
    calls=st.lists(st.sampled_from([("bad", True), ("bad", False), ("good", False)]), max_size=80),
)
def test_one_batch_alone_never_opens_it(rate, invocations, calls) -> None:
    """Whatever its halves and repeats come to, as long as the calls of the others succeed."""
    breaker = _breaker(rate, invocations)
    for number, (batch, fails) in enumerate(calls):
        which = "bad" if batch == "bad" else number
        assert not _call(breaker, which, Kind.FUNCTION_ERROR if fails else Kind.SUCCESS)
        assert not breaker.is_open


@given(
    rate=rates,
    invocations=sizes,
    before=st.lists(st.booleans(), max_size=30),
    batches=st.integers(2, 5),
)
def test_an_outage_opens_it_within_the_calls_looked_at(rate, invocations, before, batches) -> None:
    """When every call fails, of several batches in turn: fewer than those give records up."""
    breaker = _breaker(rate, invocations)
    for number, succeeds in enumerate(before):
        _call(breaker, number, Kind.SUCCESS if succeeds else Kind.FUNCTION_ERROR)
        if breaker.is_open:
            return
    given_up = 0
    while not _call(breaker, f"batch {given_up % batches}", Kind.FUNCTION_ERROR):
        given_up += 1
        assert given_up < invocations
    assert breaker.is_open


@given(rate=rates, invocations=sizes, before=st.integers(0, 30), batches=st.integers(2, 5))
def test_an_outage_halts_nothing(rate, invocations, before, batches) -> None:
    """From its first failure on, nothing is given up until it opens, if more than one calls."""
    breaker = _breaker(rate, invocations, halts=True)
    for number in range(before):
        _call(breaker, number, Kind.SUCCESS)
    for number in range(invocations):
        assert _call(breaker, f"batch {number % batches}", Kind.FUNCTION_ERROR)
        if breaker.is_open:
            return
    raise AssertionError("closed")


@given(
    rate=rates,
    invocations=sizes,
    halts=st.booleans(),
    moves=st.lists(
        st.tuples(
            st.sampled_from(["begin", "end", "wait"]),
            st.integers(0, 20),
            st.integers(0, 3),
            st.sampled_from([*FAILURES, *NEITHER, Kind.SUCCESS, Kind.SUCCESS]),
        ),
        max_size=150,
    ),
)
def test_whatever_comes(rate, invocations, halts, moves) -> None:
    """One probe at a time while open; only a probe closes it; only failures are spared."""
    breaker = _breaker(rate, invocations, halts)
    running: list[tuple[int, bool]] = []
    now = 0.0
    for move, index, batch, kind in moves:
        was_open = breaker.is_open
        probing = any(probe for _, probe in running)
        if move == "wait":
            now += WAIT / 2
        elif move == "begin":
            lets_through = breaker.lets_through(now)
            assert lets_through or was_open
            assert not (lets_through and was_open and probing)
            if lets_through:
                running.append((breaker.begin(), was_open))
        elif running:
            begun, probe = running.pop(index % len(running))
            spared = breaker.end(begun, batch, kind, now)
            if spared:
                assert kind in FAILURES
            elif kind in FAILURES:
                assert not breaker.is_open
            if was_open:
                assert breaker.is_open is not (probe and kind is Kind.SUCCESS)
            elif breaker.is_open:
                assert spared
        if breaker.is_open and not any(probe for _, probe in running):
            assert now < breaker.probe_at <= now + WAIT or breaker.lets_through(now)


def test_off_it_does_nothing() -> None:
    breaker = Breaker(BreakerPolicy(), halts=True)
    for number in range(1000):
        assert not _call(breaker, number, Kind.FUNCTION_ERROR)
    assert not breaker.is_open
