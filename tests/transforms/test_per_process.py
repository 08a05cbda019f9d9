"""One instance per process, and what takes long to make stops nobody else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from transforms.per_process import forget, per_process


def test_what_takes_long_to_make_stops_nobody_else() -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(name: str) -> str:
        begun.set()
        assert go.wait(30)
        return name

    with ThreadPoolExecutor() as threads:
        waiting = [threads.submit(per_process, slow, "a") for _ in range(3)]
        assert begun.wait(30)
        try:
            assert per_process(str.upper, "b") == "B"
        finally:
            go.set()
        made = [each.result(30) for each in waiting]
    assert made == ["a"] * 3


def test_many_that_ask_at_once_get_the_same_one() -> None:
    made = []

    def make(name: str) -> object:
        made.append(name)
        return object()

    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda _: per_process(make, "x"), range(200)))
    assert made == ["x"]
    assert len(set(map(id, got))) == 1
    assert forget(make, "x") is got[0]
    assert forget(make, "x") is None
    assert per_process(make, "x") is not got[0]


def test_what_could_not_be_made_is_tried_again() -> None:
    answers = [ValueError("not yet"), None]

    def make(name: str) -> str:
        if error := answers.pop(0):
            raise error
        return name

    for expected in ("not yet", "y"):
        try:
            got = per_process(make, "y")
        except ValueError as error:
            got = str(error)
        assert got == expected
