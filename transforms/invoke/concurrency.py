"""Concurrency: what calls come to -> how many calls there may be at once. Pure; no clock.

Additive increase, multiplicative decrease: a throttle cuts the limit to a part of the calls that
were running, successes raise it again by one per round trip while it is what holds calls back.
Right below the number that was throttled last it rises more slowly, so that throttles are rare
once the function's own limit is found. Why so: docs/adr/0009-fewer-calls-when-it-hurts.md.
"""

from __future__ import annotations

import math

from transforms.invoke.outcome import Kind

# What a throttle leaves of the calls that were running.
_CUT = 0.7
# What a round trip of successes adds: in general, and within one of what was throttled last.
_STEP = 1.0
_CAREFUL_STEP = 0.1


class ConcurrencyLimit:
    """How many calls of one function may run at once in this process. Not thread-safe.

    An outcome counts only if its call was begun under the limit in force: of the calls that were
    running together and were throttled, one lowers it.

    Args:
        minimum: The limit never falls below it; at least 1.
        maximum: The limit begins there, and never rises above it.
    """

    def __init__(self, minimum: int, maximum: int) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._limit = float(maximum)
        self._throttled_at = math.inf
        self._cuts = 0

    def bound(self, minimum: int, maximum: int) -> None:
        """Bound it otherwise from here on. Where nothing was throttled it is the new maximum."""
        unhurt = self._limit == self._maximum
        self._minimum, self._maximum = minimum, maximum
        self._limit = min(float(maximum), maximum if unhurt else max(self._limit, minimum))

    @property
    def allowed(self) -> int:
        """Calls at once, from the minimum to the maximum."""
        return int(self._limit)

    def begin(self) -> int:
        """A call begins. Returns what `end` needs to know about it."""
        return self._cuts

    def end(self, begun: int, kind: Kind, in_flight: int, held_back: bool) -> None:
        """A call has ended.

        Args:
            begun: What `begin` returned.
            kind: What it came to.
            in_flight: Calls that were running, this one among them.
            held_back: Whether others wait for nothing but the limit.
        """
        if begun != self._cuts:
            return
        if kind is Kind.THROTTLED:
            self._cuts += 1
            self._throttled_at = min(in_flight, self.allowed)
            self._limit = max(float(self._minimum), self._throttled_at * _CUT)
        elif kind is Kind.SUCCESS and held_back:
            near = self._throttled_at - 1 <= self._limit < self._throttled_at
            step = _CAREFUL_STEP if near else _STEP
            self._limit = min(float(self._maximum), self._limit + step / self._limit)
