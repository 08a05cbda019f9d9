"""History: how a run went, a sample a second over the last quarter of an hour, in memory."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from time import time
from typing import Any

from pipeline.run.status import Status
from transforms import tally
from transforms.invoke.outcome import NAMES as OUTCOMES
from transforms.records import CLOSED_BY
from transforms.tally import BOUNDS, Histogram, Tallied

_LOGGER = logging.getLogger(__name__)

EVERY_SECS = 1.0
MOST = 900
_WAIT_SECS = 5.0

NAMES = (
    "time",
    "lag",
    "lag_max",
    "oldest_age",
    "records_in",
    "records_done",
    "invocations",
    "p50",
    "p95",
    "p99",
    "in_flight",
    "limit",
    "batch_records",
    "errors",
    "retries",
    "throttles",
    *(f"closed_by_{by}" for by in CLOSED_BY),
    *(f"outcome_{name}" for name in OUTCOMES),
)
"""What a sample holds, in this order: levels as they are, rates per second since the one before,
seconds for ages and durations; None where there is nothing to say."""

Sample = tuple[float | None, ...]


def quantile(histogram: Histogram, bounds: Sequence[float], part: float) -> float | None:
    """The value below which this part of all is, as far as the buckets tell; None of nothing."""
    up_to = list(accumulate(histogram.counts))
    if not up_to or not up_to[-1]:
        return None
    wanted = part * up_to[-1]
    place = bisect_left(up_to, wanted)
    if place >= len(bounds):
        return bounds[-1]
    low = bounds[place - 1] if place else 0.0
    before = up_to[place - 1] if place else 0
    return low + (bounds[place] - low) * (wanted - before) / max(1, up_to[place] - before)


def sample(before: Status, now: Status, secs: float, at: float) -> Sample:
    """One sample. Pure.

    Args:
        before: How the run stood at the sample before.
        now: How it stands.
        secs: What is between them.
        at: Seconds since the epoch.
    """

    def rate(count: float) -> float:
        return round(max(0.0, count) / secs, 3)

    def counted(name: str) -> float:
        return rate(now.totals[name] - before.totals[name])

    calls = now.tallied.since(before.tallied)
    durations = [calls.histograms.get((tally.DURATION, (each,))) for each in ("success", "error")]
    both = Tallied.join([Tallied(histograms={("", ()): each}) for each in durations if each])
    duration = both.histograms.get(("", ()), Histogram((), 0.0))
    quantiles = [quantile(duration, BOUNDS[tally.DURATION], part) for part in (0.5, 0.95, 0.99)]
    sizes = calls.histograms.get((tally.BATCH_RECORDS, ()))
    batches = sum(sizes.counts) if sizes else 0
    outcomes = calls.by(tally.INVOCATIONS)
    lags = [lag for lag in now.lags.values() if lag is not None]
    here = bool(now.books.counts or before.books.counts)
    read = (
        now.books.total(tally.POLLED) - before.books.total(tally.POLLED)
        if here
        else now.totals["read.records"] - before.totals["read.records"]
    )
    return (
        round(at, 3),
        (max(lags) if now.names.lag_ms else sum(lags)) if lags else None,
        max(lags, default=None),
        None if now.trouble.oldest_age_secs is None else round(now.trouble.oldest_age_secs, 1),
        rate(read),
        rate(now.totals.records - before.totals.records),
        counted("invoke.invocations"),
        *quantiles,
        now.in_flight,
        now.limit,
        round(sizes.sum / batches, 1) if sizes and batches else None,
        counted("write.errors"),
        counted("invoke.retries"),
        counted("invoke.throttles"),
        *(counted(f"batch.closed_by_{by}") for by in CLOSED_BY),
        *(rate(outcomes.get((name,), 0)) for name in OUTCOMES),
    )


class History:
    """Takes samples while it is open, and tells those who listen of each.

    Args:
        status: How the run stands.
        clock: Seconds since the epoch.
    """

    def __init__(self, status: Callable[[], Status], clock: Callable[[], float] = time) -> None:
        self._status = status
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=MOST)
        self._changed = threading.Condition()
        self._turn = 0
        self._latest: tuple[Status, Sample] | None = None
        self._said: tuple[int, bytes] = (-1, b"")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="history", daemon=True)

    def __enter__(self) -> History:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with self._changed:
            self._changed.notify_all()

    @property
    def samples(self) -> list[Sample]:
        """All there are, the oldest first."""
        with self._changed:
            return list(self._samples)

    def stream(self, say: Callable[[Status, Sample], bytes]) -> Iterator[bytes]:
        """What there is to say of each sample from now on; nothing, now and then, where there is
        none. Said once for all who listen."""
        turn = self._turn
        while not self._ended.is_set():
            with self._changed:
                self._changed.wait_for(
                    lambda seen=turn: self._turn != seen or self._ended.is_set(),  # type: ignore[misc]
                    _WAIT_SECS,
                )
                if self._turn == turn or self._latest is None:
                    yield b""
                    continue
                turn = self._turn
                if self._said[0] != turn:
                    self._said = turn, say(*self._latest)
                said = self._said[1]
            yield said

    def _work(self) -> None:
        before, then = self._status(), self._clock()
        while not self._ended.wait(EVERY_SECS):
            try:
                now, at = self._status(), self._clock()
                taken = sample(before, now, max(0.001, at - then), at)
            except Exception:
                # The run does not depend on being watched.
                _LOGGER.debug("no sample was taken", exc_info=True)
                continue
            before, then = now, at
            with self._changed:
                self._samples.append(taken)
                self._latest = now, taken
                self._turn += 1
                self._changed.notify_all()


def as_columns(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as the page takes them: names, and per name its values."""
    return {"names": NAMES, "columns": list(zip(*samples)) if samples else [[] for _ in NAMES]}
