"""One instance per process, and what takes long to make stops nobody else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transforms import per_process as module
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


@dataclass(frozen=True)
class _Config:
    name: str


def test_a_config_finds_the_instance_of_one_that_is_equal() -> None:
    """Also once it has been forgotten by an equal one, and made again."""

    def make(config: _Config) -> list[str]:
        return [config.name]

    one, other = _Config("z"), _Config("z")
    first = per_process(make, one)
    for _ in range(2):
        assert per_process(make, one) is per_process(make, other) is first
        assert per_process(make, _Config("not z")) is not first
    assert forget(make, _Config("z")) is first
    second = per_process(make, other)
    assert second is not first
    assert per_process(make, one) is second


def test_a_config_that_is_asked_with_again_is_not_hashed_again() -> None:
    """Nor are more of them held than so many."""
    hashed = []

    class Hashed:
        def __hash__(self) -> int:
            hashed.append(self)
            return 1

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Hashed)

    config = Hashed()
    got = [per_process(id, config) for _ in range(100)]
    assert len(set(got)) == 1
    assert len(hashed) <= 2
    for _ in range(2 * module._ASKED_MOST):
        assert per_process(id, Hashed()) == got[0]
    assert len(module._asked) <= module._ASKED_MOST
    assert forget(id, config) == got[0]
