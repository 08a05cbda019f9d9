"""Watching: a run that is looked at, as by an open page and a Prometheus."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from tests.bench.topics import WrongResult


@contextmanager
def watching(http: str) -> Iterator[None]:
    """Look at a run as an open page and a Prometheus do, from when it can be seen on.

    Raises:
        WrongResult: It could not be seen.
    """
    ended = threading.Event()
    seen = {"/api/events": 0, "/metrics": 0}

    def look(path: str, pause_secs: float) -> None:
        while not ended.wait(pause_secs):
            try:
                with urllib.request.urlopen(f"http://{http}{path}", timeout=10) as reply:
                    for line in reply:
                        seen[path] += len(line)
                        if ended.is_set():
                            break
            except (OSError, HTTPException):
                continue  # it has not begun yet, or has ended

    looks = [("/api/events", 0.05), ("/metrics", 1.0)]
    threads = [threading.Thread(target=look, args=each) for each in looks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if not all(seen.values()):
        raise WrongResult(f"nothing was seen at {http}: {seen}")
