"""Concurrency: how the limit moves, call by call, and where it comes to rest."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.invoke.concurrency import ConcurrencyLimit
from transforms.invoke.outcome import Kind


def _round_trip(limit: ConcurrencyLimit, calls: int, kind: Kind, held_back: bool = True) -> None:
    """So many calls that run together and come to the same."""
    begun = [limit.begin() for _ in range(calls)]
    for left, each in zip(range(calls, 0, -1), begun):
        limit.end(each, kind, left, held_back)


def _throttled_at(in_flight: int, minimum: int = 1, maximum: int = 100) -> ConcurrencyLimit:
    """A limit after one throttle, with so many calls running."""
    limit = ConcurrencyLimit(minimum, maximum)
    limit.end(limit.begin(), Kind.THROTTLED, in_flight, False)
    return limit


# -- down ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("minimum", "maximum"), [(1, 1), (1, 100), (7, 7), (3, 1000)])
def test_it_begins_at_the_maximum(minimum: int, maximum: int) -> None:
    assert ConcurrencyLimit(minimum, maximum).allowed == maximum


@pytest.mark.parametrize(
    ("minimum", "maximum", "in_flight", "allowed"),
    [
        (1, 100, 100, 70),
        # What counts is how many were running, not how many might have been.
        (1, 100, 9, 6),
        (1, 100, 2, 1),
        (1, 100, 1, 1),
        (8, 100, 9, 8),
        (20, 20, 20, 20),
        # More may be running than are allowed: what was begun under a higher limit goes on.
        (1, 10, 30, 7),
    ],
)
def test_a_throttle_cuts(minimum: int, maximum: int, in_flight: int, allowed: int) -> None:
    assert _throttled_at(in_flight, minimum, maximum).allowed == allowed


def test_calls_that_ran_together_cut_once() -> None:
    """However many of them were throttled; those begun after it cut again."""
    limit = ConcurrencyLimit(1, 100)
    _round_trip(limit, 40, Kind.THROTTLED)
    assert limit.allowed == 28
    _round_trip(limit, 28, Kind.THROTTLED)
    assert limit.allowed == 19


@pytest.mark.parametrize(
    "kind", [Kind.FUNCTION_ERROR, Kind.POISON, Kind.TOO_LARGE, Kind.TRANSIENT, Kind.CONFIG]
)
def test_other_failures_change_nothing(kind: Kind) -> None:
    limit = _throttled_at(11)
    _round_trip(limit, 7, kind)
    assert limit.allowed == 7
    assert ConcurrencyLimit(1, 9).allowed == 9


# -- up -----------------------------------------------------------------------------------


def test_a_round_trip_of_successes_adds_one() -> None:
    limit = ConcurrencyLimit(1, 100)
    _round_trip(limit, 100, Kind.THROTTLED)
    seen = []
    for _ in range(20):
        # A little more than one, since the limit grows on the way.
        _round_trip(limit, limit.allowed + 1, Kind.SUCCESS)
        seen.append(limit.allowed)
    assert seen == list(range(71, 91))


def test_it_rises_only_where_it_holds_calls_back() -> None:
    limit = _throttled_at(11)
    for _ in range(100):
        _round_trip(limit, 7, Kind.SUCCESS, held_back=False)
    assert limit.allowed == 7
    _round_trip(limit, 8, Kind.SUCCESS)
    assert limit.allowed == 8


def test_what_was_begun_before_a_cut_does_not_raise() -> None:
    """The calls that were not throttled say nothing about the new limit."""
    limit = ConcurrencyLimit(1, 100)
    begun = [limit.begin() for _ in range(9)]
    limit.end(begun.pop(), Kind.THROTTLED, 9, True)
    assert limit.allowed == 6
    for each in begun:
        limit.end(each, Kind.SUCCESS, 8, True)
    _round_trip(limit, 4, Kind.SUCCESS)
    assert limit.allowed == 6


def test_below_what_was_throttled_it_rises_slowly_and_beyond_it_quickly() -> None:
    """9 at once were too many: 8 are soon there, 9 are seldom tried; if they pass, it goes on."""
    limit = _throttled_at(9)
    trips: dict[int, int] = {}
    for trip in range(30):
        trips.setdefault(limit.allowed, trip)
        _round_trip(limit, limit.allowed, Kind.SUCCESS)
    assert trips[8] <= 3
    assert trips[9] - trips[8] >= 9
    assert trips[12] - trips[9] <= 5


def test_exactly_one_below_what_was_throttled_it_rises_slowly() -> None:
    """As it does closer to it."""
    limit = _throttled_at(10, minimum=9)
    for _ in range(9):
        _round_trip(limit, 9, Kind.SUCCESS)
    assert limit.allowed == 9
    for _ in range(2):
        _round_trip(limit, 9, Kind.SUCCESS)
    assert limit.allowed == 10


def test_it_ends_at_the_maximum() -> None:
    limit = _throttled_at(3, maximum=5)
    assert limit.allowed == 2
    for _ in range(100):
        _round_trip(limit, 5, Kind.SUCCESS)
    assert limit.allowed == 5


# -- properties ---------------------------------------------------------------------------


@given(
    bounds=st.tuples(st.integers(1, 1000), st.integers(1, 1000)).map(sorted),
    # Begin a call; or end the oldest or the youngest one that runs, with this outcome.
    moves=st.lists(
        st.one_of(st.none(), st.tuples(st.booleans(), st.sampled_from(Kind), st.booleans())),
        max_size=300,
    ),
)
def test_whatever_calls_come_to(bounds, moves) -> None:
    """Always within its bounds; down only by a throttle, up only by a success held back."""
    low, high = bounds
    limit = ConcurrencyLimit(low, high)
    running: deque[tuple[int, int]] = deque()
    cuts = 0
    for move in moves:
        before = limit.allowed
        if move is None or not running:
            running.append((limit.begin(), cuts))
            assert limit.allowed == before
            continue
        oldest, kind, held_back = move
        begun, cuts_then = running.popleft() if oldest else running.pop()
        limit.end(begun, kind, len(running) + 1, held_back)
        assert low <= limit.allowed <= high
        if kind is Kind.THROTTLED and cuts_then == cuts:
            cuts += 1
            assert limit.allowed <= max(low, before)
            assert limit.allowed == low or limit.allowed < before
        elif kind is Kind.SUCCESS and held_back and cuts_then == cuts:
            assert before <= limit.allowed <= before + 1
        else:
            assert limit.allowed == before


class Simulated:
    """A function that takes so many calls at once, and partitions that always have a batch.

    A throttled partition waits for as long as some calls take, an accepted call ends at random.
    """

    def __init__(self, limit: ConcurrencyLimit, capacity: int, partitions: int, seed: int) -> None:
        self.limit = limit
        self.capacity = capacity
        self.chance = random.Random(seed)
        self.ready = partitions
        self.waits: deque[int] = deque()
        self.running: list[int] = []
        self.now = 0
        self.accepted = 0
        self.throttled = 0

    def step(self) -> None:
        """Begin what may begin, and end one call."""
        self.now += 1
        while self.waits and self.waits[0] <= self.now:
            self.waits.popleft()
            self.ready += 1
        while self.ready and len(self.running) < self.limit.allowed:
            self.ready -= 1
            begun = self.limit.begin()
            if len(self.running) < self.capacity:
                self.running.append(begun)
                self.accepted += 1
            else:
                self.limit.end(begun, Kind.THROTTLED, len(self.running) + 1, self.ready > 0)
                self.throttled += 1
                self.waits.append(self.now + 10 * self.capacity)
        if self.running:
            held_back = self.ready > 0 and len(self.running) >= self.limit.allowed
            begun = self.running.pop(self.chance.randrange(len(self.running)))
            self.limit.end(begun, Kind.SUCCESS, len(self.running) + 1, held_back)
            self.ready += 1


@given(
    capacity=st.integers(4, 60),
    crowd=st.integers(4, 8),
    maximum=st.sampled_from([100, 1000]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=30)
def test_it_settles_right_below_what_the_function_takes(capacity, crowd, maximum, seed) -> None:
    """With a backlog: nearly all of it is used, and throttles are rare."""
    limit = ConcurrencyLimit(1, maximum)
    run = Simulated(limit, capacity, crowd * capacity, seed)
    for _ in range(200 * capacity):
        run.step()
    run.accepted = run.throttled = 0
    used, steps = 0, 400 * capacity
    for _ in range(steps):
        run.step()
        used += len(run.running)
        assert 0.6 * capacity <= limit.allowed <= capacity + 1
    assert used / steps >= 0.85 * capacity - 1
    assert run.throttled <= 0.03 * run.accepted


@given(capacity=st.integers(4, 30), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=15)
def test_it_finds_room_that_was_not_there_before(capacity, seed) -> None:
    """A function that takes twice as many at once gets them, and half as many afterwards."""
    limit = ConcurrencyLimit(1, 1000)
    run = Simulated(limit, capacity, 8 * capacity, seed)
    for now in (capacity, 2 * capacity, capacity):
        run.capacity = now
        for _ in range(60 * capacity * now):
            run.step()
        assert 0.6 * now <= limit.allowed <= now + 1
