"""How many workers there should be, and how much of the machine is idle."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run.scaling import Look, Machine, wanted_workers

BUSY = Look(lag=1000, partitions=12, used=1.0, idle=2.5)


def look(**changes: object) -> Look:
    return Look(**{**{name: getattr(BUSY, name) for name in BUSY.__slots__}, **changes})


@pytest.mark.parametrize(
    ("now", "before", "workers", "wanted"),
    [
        # More and more is waiting.
        ({}, {"lag": 999}, 1, 2),
        ({"used": 1.9}, {"lag": 999}, 2, 4),
        ({"used": 3.9, "idle": 1.2}, {"lag": 999}, 4, 5),
        # As much as before, or not known, or looked at for the first time.
        ({"used": 1.7}, {"lag": 1000}, 2, 2),
        ({"lag": None}, {"lag": 999}, 2, 2),
        ({}, {"lag": None}, 2, 2),
        ({}, None, 2, 2),
        # Nothing would come of it: no processor, workers that wait, a function that is full.
        ({"idle": 0.5}, {"lag": 0}, 1, 1),
        ({"used": 0.3}, {"lag": 0}, 1, 1),
        ({"held_back": True}, {"lag": 0}, 1, 1),
        # Never more than partitions, nor than allowed.
        ({"used": 3.9, "partitions": 5, "idle": 9}, {"lag": 0}, 4, 5),
        ({"used": 7.0, "idle": 9}, {"lag": 0}, 7, 8),
        ({"partitions": 3}, {"lag": 0}, 6, 3),
        # Little to do: one less each time, down to the least.
        ({"lag": 0, "used": 0.1}, {"lag": 0}, 4, 3),
        ({"lag": 0, "used": 0.0}, {"lag": 0}, 1, 1),
        ({"lag": 0, "used": 0.6}, {"lag": 0}, 2, 2),
    ],
)
def test_how_many_there_should_be(now, before, workers, wanted) -> None:
    before = before if before is None else look(**before)
    found, why = wanted_workers(look(**now), before, workers, least=1, most=8)
    assert found == wanted
    assert bool(why) == (found != workers)


NUMBERS = st.integers(0, 10**6)
SHARES = st.floats(0, 64)
LOOKS = st.builds(Look, NUMBERS | st.none(), st.integers(0, 100), SHARES, SHARES, st.booleans())


@given(LOOKS, LOOKS | st.none(), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_it_stays_within_bounds(now, before, workers, least, most) -> None:
    workers = max(least, workers)
    wanted, _ = wanted_workers(now, before, workers, least, max(least, most))
    assert least <= wanted <= max(workers, least, most)
    assert wanted <= max(least, now.partitions) or wanted == workers


def _stat(folder: Path, idle: int) -> Path:
    file = folder / "stat"
    file.write_text(f"cpu  100 0 100 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    return file


@pytest.mark.parametrize(("quota", "idle"), [("max 100000", 2.0), ("150000 100000", 0.5)])
def test_what_is_idle_is_of_the_machine_or_of_the_group(
    tmp_path: Path, quota: str, idle: float
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    (tmp_path / "cpu.stat").write_text("usage_usec 5000000\nuser_usec 1\n")
    now = [0.0]
    machine = Machine(_stat(tmp_path, 1000), tmp_path, lambda: now[0])
    now[0] = 10.0
    _stat(tmp_path, 3000)  # in hundredths of a second
    (tmp_path / "cpu.stat").write_text("usage_usec 15000000\nuser_usec 1\n")
    assert machine.idle() == pytest.approx(idle)
    assert machine.idle() >= 0


def test_where_nothing_is_told_the_load_is_asked_for(tmp_path: Path) -> None:
    now = [0.0]
    machine = Machine(tmp_path / "none", tmp_path, lambda: now[0])
    now[0] = 10.0
    assert machine.idle() >= 0
