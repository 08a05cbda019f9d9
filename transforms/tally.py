"""Tally: what happens in this process, by topic, outcome and the like. No Beam, no client.

Steps that one process runs in rounds count here what Beam's counters cannot say: by topic, as
histograms, and the last time of something. A count costs about a microsecond, so that it is for
batches and chunks, not for records.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic

Labels = tuple[str, ...]
Series = tuple[str, Labels]
"""A name, and what tells its series apart."""

_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LONG_SECS = (900.0, 3600.0, 21600.0, 86400.0, 604800.0)

# -- books: each record that is read comes to one of the others in the end ------------------------

POLLED = "polled"
FILTERED = "filtered"
ANSWERED = "answered"
DROPPED = "dropped"
"""Given up, and written nowhere but in the log; by topic and condition."""
ERROR_TOPIC = "error_topic"
"""Given up, and written to the error topic; by topic and condition."""
RELEASED = "released"
"""Read, and let go of before they came to an end: behind a halt, or with their partition. They are
not committed, so they are read again."""
HELD = "held"
"""Read, and not at their end; a number that is now, while the others only rise."""

# -- and what it takes -----------------------------------------------------------------------------

POLLED_BYTES = "polled_bytes"
INVOKED = "invoked"
FAILED_INVOKE = "failed_invoke"
COMMITTED = "committed"
INVOCATIONS = "invocations"
RETRIES = "retries"
POLLING_ERRORS = "polling_errors"
READ_CALLS = "read_calls"
READ_THROTTLES = "read_throttles"
FOREIGN_HASH = "foreign_hash"
COMMIT_ERRORS = "commit_errors"
DELIVERY_ERRORS = "error_topic_delivery_errors"

ITERATOR_AGE = "iterator_age"
DURATION = "duration"
BATCH_RECORDS = "batch_records"
BATCH_BYTES = "batch_bytes"
BATCH_WAIT = "batch_wait"

LAST_SUCCESS = "last_success"
LAST_COMMIT = "last_commit"

BOUNDS: Mapping[str, tuple[float, ...]] = {
    ITERATOR_AGE: (*_SECS, *_LONG_SECS),
    DURATION: (*_SECS, 900.0),
    BATCH_RECORDS: (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000),
    BATCH_BYTES: (1e3, 1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 6291556),
    BATCH_WAIT: (0.001, *_SECS, 900.0, 3600.0),
}
"""Upper bounds of the buckets of each histogram; one above the last is added."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values by size.

    Attributes:
        counts: How many fell into each bucket, up to and with its bound, and how many above.
        sum: Of all values.
    """

    counts: tuple[int, ...]
    sum: float

    def joined(self, other: Histogram, sign: int = 1) -> Histogram:
        """With the values of another one; without them where `sign` is -1."""
        counts = tuple(a + sign * b for a, b in zip(self.counts, other.counts))
        return Histogram(counts, self.sum + sign * other.sum)


@dataclass(frozen=True, slots=True)
class Tallied:
    """What was counted so far.

    Attributes:
        counts: By series.
        histograms: By series.
        times: When something was last so, in seconds since the epoch.
    """

    counts: Mapping[Series, float] = field(default_factory=dict)
    histograms: Mapping[Series, Histogram] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)

    def by(self, name: str) -> dict[Labels, float]:
        """The series of a name."""
        return {labels: count for (each, labels), count in self.counts.items() if each == name}

    def total(self, *names: str) -> float:
        """All series of some names together."""
        return sum(count for (name, _), count in self.counts.items() if name in names)

    def since(self, before: Tallied) -> Tallied:
        """What was counted since it stood so."""
        counts = dict(self.counts)
        for series, count in before.counts.items():
            counts[series] = counts.get(series, 0) - count
        histograms = dict(self.histograms)
        for series, histogram in before.histograms.items():
            histograms[series] = histograms[series].joined(histogram, -1)
        times = {name: at for name, at in self.times.items() if before.times.get(name) != at}
        return Tallied({s: count for s, count in counts.items() if count}, histograms, times)

    @staticmethod
    def join(parts: Iterable[Tallied]) -> Tallied:
        """What several processes have counted together."""
        counts: Counter[Series] = Counter()
        histograms: dict[Series, Histogram] = {}
        times: dict[str, float] = {}
        for part in parts:
            for series, count in part.counts.items():
                counts[series] += count  # type: ignore[assignment]
            for series, histogram in part.histograms.items():
                found = histograms.get(series)
                histograms[series] = found.joined(histogram) if found else histogram
            for name, at in part.times.items():
                times[name] = max(at, times.get(name, at))
        return Tallied(dict(counts), histograms, times)


class Tally:
    """Counts, for any thread of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Series, float] = {}
        self._buckets: dict[Series, list[int]] = {}
        self._sums: dict[Series, float] = {}
        self._times: dict[str, float] = {}

    def count(self, name: str, number: float, *labels: str) -> None:
        """Add to a series."""
        if number:
            series = (name, labels)
            with self._lock:
                self._counts[series] = self._counts.get(series, 0) + number

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        series, bounds = (name, labels), BOUNDS[name]
        place = bisect_left(bounds, value)
        with self._lock:
            buckets = self._buckets.get(series)
            if buckets is None:
                buckets = self._buckets[series] = [0] * (len(bounds) + 1)
                self._sums[series] = 0.0
            buckets[place] += 1
            self._sums[series] += value

    def note(self, name: str, at: float) -> None:
        """Say when something was so, in seconds since the epoch."""
        self._times[name] = at

    def take(self) -> Tallied:
        """What was counted so far."""
        with self._lock:
            histograms = {
                series: Histogram(tuple(buckets), self._sums[series])
                for series, buckets in self._buckets.items()
            }
            return Tallied(dict(self._counts), histograms, dict(self._times))


BOOKS, TALLY = Tally(), Tally()
"""This process's. The books balance between two rounds; see `pipeline.run.rounds`."""


class Pulse:
    """When the process's loop was last seen to turn, or to wait for something that it knows of."""

    def __init__(self) -> None:
        self._at = monotonic()

    def beat(self) -> None:
        """It turns."""
        self._at = monotonic()

    @property
    def still_secs(self) -> float:
        """How long it has not turned."""
        return monotonic() - self._at


PULSE = Pulse()
"""This process's."""
