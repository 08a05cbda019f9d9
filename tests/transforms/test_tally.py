"""Tally: counts, histograms, and what they come to over several processes."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from transforms.tally import BATCH_RECORDS, BOUNDS, Tallied, Tally

VALUES = st.lists(st.integers(0, 20_000))


def test_counts_by_labels_and_since_a_moment() -> None:
    """What is 0 is no series; what was there before does not count."""
    tally = Tally()
    tally.count("read", 3, "orders")
    before = tally.take()
    tally.count("read", 2, "orders")
    tally.count("read", 0, "payments")
    tally.count("read", 4, "payments")
    tally.note("seen", 7.0)
    assert tally.take().by("read") == {("orders",): 5, ("payments",): 4}
    since = tally.take().since(before)
    assert since.by("read") == {("orders",): 2, ("payments",): 4}
    assert since.total("read") == 6
    assert since.times == {"seen": 7.0}
    assert tally.take().since(tally.take()) == Tallied()


@given(VALUES, VALUES)
def test_histograms_of_two_processes_are_that_of_one(some: list[int], others: list[int]) -> None:
    """Every value is in one bucket, the first whose bound it does not exceed."""
    first, second, both = Tally(), Tally(), Tally()
    for values, tally in ((some, first), (others, second), (some + others, both)):
        for value in values:
            tally.observe(BATCH_RECORDS, value)
    joined = Tallied.join([first.take(), second.take()])
    assert joined == both.take()
    if some + others:
        (histogram,) = joined.histograms.values()
        bounds = BOUNDS[BATCH_RECORDS]
        up_to = [sum(value <= bound for value in some + others) for bound in bounds]
        assert [sum(histogram.counts[: place + 1]) for place in range(len(bounds))] == up_to
        assert sum(histogram.counts) == len(some + others)
        assert histogram.sum == sum(some + others)
        assert both.take().since(first.take()).histograms.keys() <= joined.histograms.keys()


def test_threads_lose_nothing() -> None:
    tally = Tally()

    def work() -> None:
        for _ in range(2000):
            tally.count("read", 1, "orders")
            tally.observe(BATCH_RECORDS, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = tally.take()
    assert taken.total("read") == 8000
    assert taken.histograms[BATCH_RECORDS, ()].sum == 8000
