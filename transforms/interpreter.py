"""Interpreter: how it is set up in a process that does nothing but run the pipeline."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def collect_rarely() -> None:
    """Have this process search for garbage seldom, and keep memory that is freed; once. A runner's
    worker is not started by us, so its steps call this."""
    # What the imports left stays for good: to search it again and again costs a tenth of a run.
    # Records that wait for the function stay long: on Flink that cost 2 us of 14 a record.
    # And while it searches, nobody works: with 50,000 objects all lanes stood still for 25 ms.
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc keep what is freed of large memory, and not ask the kernel for it each time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another library
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def tune_interpreter(lanes: int = 1) -> None:
    """Settings for a process that we start.

    Args:
        lanes: Invocations at once inside a partition.
    """
    collect_rarely()
    # A thread whose reply has come wants to send the next request at once, not after the 5 ms that
    # a busy thread may go on by default. With others to fill the time there is less of a hurry, and
    # each switch costs: with 10 lanes that came to a sixth of the work.
    sys.setswitchinterval(0.0005 * lanes)
