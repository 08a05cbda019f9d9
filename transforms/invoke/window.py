"""Window: which tumbling window a record is in, and what is kept of a lane's open one. Pure.

The function is handed the state that it returned last, for as long as a window lasts; then once
more with a call that has no records. The state is in the process only: what a window holds is not
committed before the window is closed (`LaneWindow.reach`), so a crash begins it anew.

A record's window is the one that its timestamp is in, but never one before the newest that was
begun: a window that is closed stays closed, and what comes late counts in the one that is open.
"""

from __future__ import annotations

from dataclasses import dataclass

from transforms.envelope import Envelope, WindowFacts
from transforms.records import NO_TIMESTAMP, Finished

MAX_STATE_BYTES = 2**20
"""Above it a window ends early, as AWS has it."""
NO_STATE = b"{}"
MAX_WINDOW_BYTES = MAX_STATE_BYTES + 1024
"""What a call says of its window, besides its records, is no longer."""

_MOST_GRACE_MS = 120_000
_NONE_YET = -1


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """Windows of a run.

    Attributes:
        secs: How long each lasts. They begin at whole multiples of it since the epoch, in UTC.
        envelope: What stands around the records of a call, and the window beside them.
    """

    secs: int
    envelope: Envelope

    @property
    def ms(self) -> int:
        """How long each lasts."""
        return 1000 * self.secs


def grace_ms(size_ms: int) -> int:
    """How long a window that is over by the clock is kept open for what may come late: as long as
    it has lasted, and two minutes at most."""
    return min(size_ms, _MOST_GRACE_MS)


def is_over(end_ms: int, size_ms: int, clock_ms: float) -> bool:
    """Whether a window of which nothing more has come may be closed."""
    return clock_ms >= end_ms + grace_ms(size_ms)


def window_of(timestamp_ms: int, size_ms: int, clock_ms: int, least_ms: int, stale: bool) -> int:
    """Where the window of a record begins.

    Args:
        timestamp_ms: The record's, or `NO_TIMESTAMP`: then it is taken for one of now. So is one
            ahead of the clock, behind which nothing would be on time for as long.
        size_ms: How long a window lasts.
        clock_ms: The time.
        least_ms: The window that is open, or the first that may be.
        stale: Whether that is open for so long by the clock that it takes nothing late any more.
            Where all that comes is late, it would have no end.
    """
    stamp_ms = clock_ms if timestamp_ms == NO_TIMESTAMP else min(timestamp_ms, clock_ms)
    start_ms = stamp_ms - stamp_ms % size_ms
    if start_ms >= least_ms:
        return start_ms
    return least_ms + size_ms if stale else least_ms


@dataclass(frozen=True, slots=True)
class Turn:
    """What a call says of its window.

    Attributes:
        facts: What the function is told.
        first: Number of the window's first record.
        last: Number of the last one that was sent.
    """

    facts: WindowFacts
    first: int
    last: int

    @property
    def closes(self) -> bool:
        """Whether it is the call that ends the window, without records."""
        return self.facts.final or self.facts.early


@dataclass(slots=True)
class _Open:
    """A window that is open.

    Attributes:
        start_ms: Where it begins.
        position: Everything below it was done before the window was begun.
        since_ms: When that was, by the clock.
        first: Number of its first record that was sent.
        last: Number of the last one.
        state: What the function has returned last, as JSON text.
    """

    start_ms: int
    position: int
    since_ms: int
    first: int
    last: int = 0
    state: bytes = NO_STATE


class LaneWindow:
    """The windows of one lane, in turn: at most one of them is open.

    Args:
        size_ms: How long a window lasts.
        max_state_bytes: Size of a state above which its window ends early.
    """

    def __init__(self, size_ms: int, max_state_bytes: int = MAX_STATE_BYTES) -> None:
        self._size_ms = size_ms
        self._max_state_bytes = max_state_bytes
        self._open: _Open | None = None
        self._least_ms = _NONE_YET
        self._reached: int | None = None
        self.position = 0

    @property
    def end_ms(self) -> int | None:
        """Where the open window ends; None if none is open."""
        return self._open.start_ms + self._size_ms if self._open else None

    def of(self, timestamp_ms: int, least_ms: int, clock_ms: int) -> int:
        """Where the window of a record begins, behind records of windows up to `least_ms`."""
        least_ms = max(least_ms, self._least_ms)
        own = self._open if self._open and self._open.start_ms == least_ms else None
        allowed_ms = self._size_ms + grace_ms(self._size_ms)
        stale = own is not None and clock_ms - own.since_ms >= allowed_ms
        return window_of(timestamp_ms, self._size_ms, clock_ms, least_ms, stale)

    def is_done_before(self, start_ms: int) -> bool:
        """Whether the open window has to be closed before a record of this one is sent."""
        return self._open is not None and (self.is_full or not self.is_in(start_ms))

    def is_in(self, start_ms: int) -> bool:
        """Whether this is the open window."""
        return self._open is not None and self._open.start_ms == start_ms

    @property
    def is_full(self) -> bool:
        """Whether the state has become too large."""
        return self._open is not None and len(self._open.state) > self._max_state_bytes

    @property
    def is_open(self) -> bool:
        """Whether a window is open: the function knows of it."""
        return self._open is not None

    def sends(self, start_ms: int, first: int, last: int, position: int, clock_ms: int) -> Turn:
        """The next call has the records from one number to another, of this window; it begins, if
        it is not open.

        Args:
            start_ms: The window, which `is_done_before` does not forbid.
            first: Number of the first record.
            last: Number of the last one.
            position: Everything below it is done.
            clock_ms: The time.
        """
        if self._open is None:
            self._open = _Open(start_ms, position, clock_ms, first)
            self._least_ms = start_ms
        self._open.last = last
        return self._turn()

    def closing(self, early: bool) -> Turn:
        """The next call ends the window."""
        return self._turn(final=not early, early=early)

    def _turn(self, final: bool = False, early: bool = False) -> Turn:
        assert self._open
        start_ms = self._open.start_ms
        facts = WindowFacts(start_ms, start_ms + self._size_ms, self._open.state, final, early)
        return Turn(facts, self._open.first, self._open.last)

    def keep(self, state: bytes) -> None:
        """The function has returned this state."""
        assert self._open
        self._open.state = state

    def close(self, early: bool) -> None:
        """The window has ended; if early, it may go on with an empty state."""
        if self._open:
            self._least_ms = self._open.start_ms + (0 if early else self._size_ms)
            self._open = None

    def reach(self, finished: Finished) -> tuple[int, int]:
        """The range that may be committed once a batch is written: up to where the open window
        begins."""
        start = finished.start if self._reached is None else self._reached
        self.position = finished.next_offset
        self._reached = self._open.position if self._open else finished.next_offset
        return start, self._reached
