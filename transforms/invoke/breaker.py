"""Breaker: what calls come to -> whether there may be calls, and records may be given up. Pure.

For the outage of something the function needs, which would otherwise send every record to the
error output, or halt every partition. Closed, it looks at what the last calls came to, and opens
when too many of them failed. Open, it lets nothing through but one call after each wait, and closes
when that succeeds. The rules:

- What counts is what can give records up: FUNCTION_ERROR, POISON and TRANSIENT as failures; and
  SUCCESS. THROTTLED and TOO_LARGE say nothing either way. A partial failure is a success, unless
  the function failed in all the records of the call (`Outcome.of_function`).
- It opens when, of the last `invocations` outcomes since it closed, the share of failures is
  `failure_rate` or more. Failures of a single batch do not open it, however many its halves and
  repeats make: those of at least two are needed, and the share has to hold as well where all calls
  of any one batch count as one failure.
- Records are not given up because of a failure that opens it, that comes while it is open, or whose
  call was begun before it closed: the call is made again. So an outage costs the records of fewer
  than `invocations` calls: of those that failed before it opened.
- Where giving up halts a partition, it waits for proof that the function works: a call that has
  succeeded since the failed one began. Until then that is made again. So an outage halts nothing.
  Only if the last `invocations` outcomes are all failures of this one batch there is nothing to
  wait for: nobody else calls, and a bad batch looks just the same.

Time is a parameter, in monotonic seconds. Why so: docs/adr/0009-fewer-calls-when-it-hurts.md.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import dataclass

from transforms.invoke.outcome import Kind

_FAILURES = frozenset({Kind.FUNCTION_ERROR, Kind.POISON, Kind.TRANSIENT})

Begun = tuple[int, int]
"""How often the breaker had turned, and calls had succeeded, when a call began."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to stop calling, and for how long.

    Attributes:
        failure_rate: Share of failures at which it opens, above 0 to 1; 0 for never.
        invocations: Outcomes that are looked at; at least 2.
        wait_secs: From opening, and from a failed probe, to the next probe.
    """

    failure_rate: float = 0.0
    invocations: int = 20
    wait_secs: float = 30.0


class Breaker:
    """The breaker of one function in this process. Not thread-safe.

    Args:
        policy: When it opens.
        halts: Whether giving records up halts their partition.

    Attributes:
        openings: How often it has opened.
    """

    def __init__(self, policy: BreakerPolicy, halts: bool) -> None:
        self._policy = policy
        self._halts = halts
        self._recent: deque[tuple[Hashable, bool]] = deque(maxlen=policy.invocations)
        self._turns = 0
        self._successes = 0
        self._open = False
        self._probe_at = math.inf
        self.openings = 0

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def probe_at(self) -> float:
        """While it is open: when the next probe may begin; infinite while one is running."""
        return self._probe_at

    def lets_through(self, now: float) -> bool:
        """Whether a call may begin."""
        return not self._open or now >= self._probe_at

    def begin(self) -> Begun:
        """A call that was let through begins. Returns what `end` needs to know about it."""
        self._probe_at = math.inf
        return self._turns, self._successes

    def end(self, begun: Begun, batch: Hashable, kind: Kind, now: float) -> bool:
        """A call has ended.

        Args:
            begun: What `begin` returned.
            batch: Which batch the call was for, or for a part of.
            kind: What it came to.
            now: The time.

        Returns:
            Whether it failed and no records may be given up because of it.
        """
        if not self._policy.failure_rate:
            return False
        failed = kind in _FAILURES
        turns, successes = begun
        self._successes += kind is Kind.SUCCESS
        if turns != self._turns:
            return failed
        if self._open:
            if kind is Kind.SUCCESS:
                self._turn(open=False)
            else:
                self._probe_at = now + self._policy.wait_secs
            return failed
        if failed or kind is Kind.SUCCESS:
            self._recent.append((batch, failed))
        if not failed:
            return False
        if self._too_many():
            self._turn(open=True)
            self.openings += 1
            self._probe_at = now + self._policy.wait_secs
            return True
        return self._halts and successes == self._successes and not self._alone(batch)

    def _turn(self, open: bool) -> None:
        self._open = open
        self._turns += 1
        self._recent.clear()

    def _too_many(self) -> bool:
        rate, count = self._policy.failure_rate, len(self._recent)
        failures = sum(failed for _, failed in self._recent)
        if count < self._policy.invocations or failures / count < rate:
            return False
        calls = Counter(batch for batch, _ in self._recent)
        failures_of = Counter(batch for batch, failed in self._recent if failed)
        return all(
            failures > failed and (failures - failed + 1) / (count - calls[batch] + 1) >= rate
            for batch, failed in failures_of.items()
        )

    def _alone(self, batch: Hashable) -> bool:
        """Whether all that is known are failures of this batch."""
        return len(self._recent) == self._policy.invocations and all(
            failed and each == batch for each, failed in self._recent
        )
