"""Scaling: how many workers there should be, looked at each minute.

What is counted comes from the workers and from the machine; what follows from it is a pure rule.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOK_SECS = 60.0

# Of a processor: what one more worker needs to find idle; how much each has to use before another
# one would be of use; and what each may use at most if there is one less.
_IDLE, _BUSY, _ENOUGH = 0.75, 0.6, 0.4


@dataclass(frozen=True, slots=True)
class Look:
    """How things are.

    Attributes:
        lag: Records that are not done; None if not known.
        partitions: How many there are.
        used: Processors that the workers used since the look before.
        idle: Processors that nobody used.
        held_back: Whether invocations wait for the function, and not for a worker.
    """

    lag: int | None
    partitions: int
    used: float
    idle: float
    held_back: bool = False


def wanted_workers(
    now: Look, before: Look | None, workers: int, least: int, most: int
) -> tuple[int, str]:
    """How many there should be. Pure.

    Args:
        now: How things are.
        before: How they were a look ago, None if this is the first one.
        workers: How many there are.
        least: How many there always are.
        most: How many there are at most; more than partitions would have nothing to do.

    Returns:
        The number, and why it is another one.
    """
    most = max(least, min(most, now.partitions))
    if workers > most:
        return most, f"there are {now.partitions} partitions"
    if before is None or now.lag is None or before.lag is None:
        return workers, ""
    grows = now.lag > before.lag
    if grows and now.used >= _BUSY * workers and now.idle >= _IDLE and not now.held_back:
        # At most twice as many: then it is looked at again.
        more = min(most, workers + min(workers, max(1, int(now.idle))))
        why = f"{now.lag} records are waiting, {before.lag} were before"
        return more, f"{why}, and {now.idle:.1f} processors are idle"
    if not grows and workers > least and now.used <= _ENOUGH * (workers - 1):
        why = f"{now.lag} records are waiting, {before.lag} were before"
        return workers - 1, f"{why}, and all of them use {now.used:.1f} processors"
    return workers, ""


class Machine:
    """Counts the idle processors since it was asked before: of the machine, or of what this
    process's control group may use of it.

    Args:
        proc: Where the kernel says what the machine has done.
        group: Where it says what the control group may do, and has done.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        proc: Path = Path("/proc/stat"),
        group: Path = Path("/sys/fs/cgroup"),
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._group = group
        self._timer = timer
        self._before = self._count()

    def idle(self) -> float:
        """How many processors had nothing to do."""
        before, self._before = self._before, self._count()
        secs = max(self._before[0] - before[0], 1e-3)
        idle = (self._before[1] - before[1]) / secs
        with suppress(OSError, ValueError):
            quota, period = (self._group / "cpu.max").read_text().split()
            if quota != "max":
                used = (self._before[2] - before[2]) / secs
                idle = min(idle, int(quota) / int(period) - used)
        return max(0.0, idle)

    def _count(self) -> tuple[float, float, float]:
        """The time, seconds of processors that were idle, and those that the group has used."""
        now, used = self._timer(), 0.0
        with suppress(OSError, ValueError, IndexError):
            found = dict(
                line.split() for line in (self._group / "cpu.stat").read_text().splitlines()
            )
            used = int(found.get("usage_usec", 0)) / 1e6
        try:
            ticks = [int(each) for each in self._proc.read_text().splitlines()[0].split()[1:6]]
            # Idle, and idle while a disk works.
            idle = (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            # Not Linux: by the load of late.
            before = getattr(self, "_before", (now, 0.0, 0.0))
            free = max(0.0, (os.cpu_count() or 1) - os.getloadavg()[0])
            idle = before[1] + free * (now - before[0])
        return now, idle, used
