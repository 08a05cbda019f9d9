"""Interpreter: how it is set up in a process that does nothing but run the pipeline."""

from __future__ import annotations

import gc
import sys
from functools import cache


def collect_rarely() -> None:
    """Search for garbage as seldom as suits objects of which most live long, and hold no cycles."""
    # What the imports left stays for good; searching it again and again costs a tenth of a run. So
    # does what waits for the function: on Flink it was 2 us of 14 a record.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@cache
def set_up_worker() -> None:
    """For a runner's worker process, in which the steps have the first word; once."""
    collect_rarely()


def tune_interpreter(lanes: int = 1) -> None:
    """For a process of our own.

    Args:
        lanes: Invocations at once inside a partition.
    """
    collect_rarely()
    # A thread whose reply has come wants to send the next request at once, not after the 5 ms that
    # a busy thread may go on by default. With others to fill the time there is less of a hurry, and
    # each switch costs: with 10 lanes that came to a sixth of the work.
    sys.setswitchinterval(0.0005 * lanes)
