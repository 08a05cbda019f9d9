"""Signals: how a run is told to end, what its exit code says, and how its process is set up."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from types import FrameType

DONE, FAILED, USAGE, HALTED = 0, 1, 2, 3


def tune_interpreter(lanes: int = 1) -> None:
    """Settings for a process that does nothing but run the pipeline.

    Args:
        lanes: Invocations at once inside a partition.
    """
    # What the imports left stays for good; searching it for garbage again and again costs a tenth
    # of the run.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # A thread whose reply has come wants to send the next request at once, not after the 5 ms that
    # a busy thread may go on by default. With others to fill the time there is less of a hurry, and
    # each switch costs: with 10 lanes that came to a sixth of the work.
    sys.setswitchinterval(0.0005 * lanes)


def stop_on_signals(stop: threading.Event, what: str = "finishing what is running") -> None:
    """The first SIGTERM or SIGINT ends the run after its round, the second one at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()
        name = signal.Signals(number).name
        os.write(2, f"{name}: {what}; again to stop at once\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
