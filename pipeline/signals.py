"""Signals: how a run is told to end, and what its exit code says."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

DONE, FAILED, USAGE, HALTED = 0, 1, 2, 3


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
