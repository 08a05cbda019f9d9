"""The benchmark measures what it says: its rules, and small runs against the real broker."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests.bench import latency
from tests.bench.__main__ import SCENARIOS, families
from tests.bench.common import HAND_WRITTEN, PIPELINE, cpu_secs, serving, table
from tests.bench.flink_floor import Pace
from tests.bench.flink_memory import growth
from tests.bench.flink_mended import mended
from tests.bench.generator import due_count, value
from tests.bench.latency import Idle, Load, Run, Timed, match, percentile
from tests.bench.topics import Topics, WrongResult

LOAD = Load(100, 4, 0, 0)
CHOICE = Namespace(rates=None, partitions=None, latency_ms=None, window=None, idle=None, quick=True)


def _timed(latencies: list[float]) -> list[Timed]:
    return [Timed(10.0 * i, 10.0 * i, 10.0 * i + each) for i, each in enumerate(latencies)]


def _run(load: Load, who: str, latencies: list[float], cpu: float = 10.0) -> Run:
    return latency.figures(load, who, _timed(latencies), cpu, 2.0, 1.0)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (95, 95), (99, 99), (99.5, 100), (100, 100)]
)
def test_a_percentile_is_one_of_the_figures(percent: float, expected: float) -> None:
    assert percentile([float(n) for n in range(1, 101)], percent) == expected
    assert percentile([7.0], percent) == 7


@given(st.lists(st.floats(0, 1e6), min_size=1).map(sorted), st.integers(1, 100))
def test_no_smaller_figure_is_the_percentile(ordered: list[float], percent: int) -> None:
    found = percentile(ordered, percent)
    assert 100 * sum(each <= found for each in ordered) >= percent * len(ordered)
    assert 100 * sum(each < found for each in ordered) < percent * len(ordered)


def test_responses_are_matched_with_their_records() -> None:
    written = {(0, 0): (0.0, 1.0), (0, 1): (20.0, 20.5), (1, 0): (10.0, 12.0), (1, 1): (30.0, 30.0)}
    responses = [((1, 0), 15.0), ((0, 0), 9.0), ((1, 1), 31.0)]
    timed = match(written, responses, 10, 30)
    assert timed == [Timed(10, 12, 15), Timed(20, 20.5, math.inf)]
    assert [each.latency for each in timed] == [5, math.inf]


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0)])
def test_a_response_too_many_is_a_wrong_result(place: tuple[int, int]) -> None:
    with pytest.raises(WrongResult, match="response to"):
        match({(0, 0): (0.0, 1.0)}, [((0, 0), 9.0), (place, 9.0)], 0, 10)


@given(st.floats(1, 10_000), st.lists(st.floats(0, 0.5), max_size=20))
def test_what_is_due_is_sent_in_the_next_tick_and_nothing_before(
    rate: float, waits: list[float]
) -> None:
    elapsed, records = 0.0, round(3 * rate)
    for wait in waits:
        elapsed += wait
        sent = due_count(elapsed, rate, records)
        assert sent <= records
        assert (sent - 1) / rate <= elapsed + 2e-5
        assert sent == records or sent / rate > elapsed


def test_records_are_as_long_as_asked_for_whenever_they_are_due() -> None:
    assert len(value(1.7e12, 0, "x" * 20)) == len(value(1.7e12 + 0.25, 0, "x" * 20))


def test_a_growing_lag_is_no_latency() -> None:
    assert _run(LOAD, PIPELINE, [5.0] * 90).follows
    # One stall of the machine that is made up for.
    assert _run(LOAD, PIPELINE, [5.0] * 30 + [400.0] * 10 + [5.0] * 50).follows
    assert not _run(LOAD, PIPELINE, [10.0 * n for n in range(90)]).follows
    lost = _run(LOAD, PIPELINE, [5.0] * 89 + [math.inf])
    assert (lost.follows, lost.unanswered, lost.max) == (False, 1, math.inf)


def test_medians_ratios_and_aims() -> None:
    windowed = LOAD._replace(window_secs=0.5)
    many = LOAD._replace(rate=5000)
    loads = [LOAD, many, windowed]
    runs = [
        *(_run(LOAD, PIPELINE, [p50] * 9, cpu) for p50, cpu in ((8, 12), (30, 13), (9, 60))),
        *(_run(LOAD, HAND_WRITTEN, [p50] * 9) for p50 in (2, 3, 40)),
        _run(windowed, PIPELINE, [520] * 9),
        _run(many, PIPELINE, [10.0 * n for n in range(90)]),
        _run(many, HAND_WRITTEN, [math.inf] * 9),
    ]
    rows = latency.summarize(runs, loads)
    assert [(row["rate"], row["window_secs"], row["who"]) for row in rows] == [
        (load.rate, load.window_secs, who) for load in loads for who in (PIPELINE, HAND_WRITTEN)
    ]
    first = rows[0]
    assert (first["p50"], first["p50_range"], first["max"]) == (9, [8, 30], 30)
    assert (first["p50_ratio"], first["cpu_ratio"]) == (3, 1.3)
    assert rows[2]["p50_ratio"] is None  # the loop cannot follow
    assert (rows[4]["p50_ratio"], rows[5]["p50"]) == (173.33, 3)  # beside the loop without a window

    idle = [Idle(PIPELINE, 4, 0.7), Idle(HAND_WRITTEN, 4, 0.1)]
    holds = {each["aim"]: each["holds"] for each in latency.judge(rows, idle)}
    assert holds == {
        "100/s: p50 <= 10 ms": True,
        "100/s: p50 <= 3 x the loop's": True,
        "100/s: p99 <= 50 ms": True,
        "100/s: CPU <= 1.3 x the loop's": True,
        "10/s: p50 <= 12 ms": None,
        "1,000/s: p50 <= 15 ms": None,
        "1,000/s: p99 <= 60 ms": None,
        "5,000/s: p50 <= 25 ms": False,
        "5,000/s: p99 <= 150 ms": False,
        "5,000/s: no growing lag": False,
        "100/s over 200 partitions: p50 <= 15 ms": None,
        "window 0.5 s: p95 <= 530 ms, at every load": True,
        "idle, 4 partitions: CPU <= 0.5 % of a core": False,
        "idle, 1,000 partitions: CPU <= 5 % of a core": None,
    }
    result = {"rows": rows, "idle": [], "aims": [], "secs": 10, "repeat": 3, "appended": False}
    report = latency.report(result)
    assert re.search(r"\| 5,000/s +\| +cannot follow \| 10 % \| +cannot follow \| 10 % \|", report)
    assert re.search(
        r"\| 100/s, window 0.5 s +\| +520 / 520 / 520 ms \| 10 % \| +3 / 3 / 3 ms", report
    )


def test_which_loads_are_run() -> None:
    pairs = [(10, 4), (100, 4), (1000, 4), (5000, 4), (100, 200)]
    for quick, latencies in ((True, {0}), (False, {0, 20})):
        loads = latency.loads_of(Namespace(**{**vars(CHOICE), "quick": quick}))
        assert len(set(loads)) == len(loads) == 2 * len(latencies) * len(pairs)
        assert {(load.rate, load.partitions) for load in loads} == set(pairs)
        assert {load.latency_ms for load in loads} == latencies
        assert {load.window_secs for load in loads} == {0, 0.5}
    assert latency.idle_of(CHOICE) == [4, 1000]
    narrow = Namespace(**{**vars(CHOICE), "rates": [50], "window": [0.5]})
    assert (latency.loads_of(narrow), latency.idle_of(narrow)) == ([Load(50, 4, 0, 0.5)], [])


def test_what_is_to_be_as_good_as_the_loop_is_run_more_often() -> None:
    loads = latency.loads_of(CHOICE)
    assert [load for load in loads if latency.turns_of(load, 2) != 2] == [LOAD]
    assert latency.turns_of(LOAD, 2) == 6


def test_scenarios_take_turns_with_what_they_are_multiples_of() -> None:
    found = families(list(SCENARIOS))
    assert sorted(s.name for group in found for s in group) == sorted(s.name for s in SCENARIOS)
    for group in found:
        assert {scenario.beside for scenario in group[1:]} <= {group[0].name}
        assert group[0].beside is None
    assert families([SCENARIOS[1]]) == [[SCENARIOS[1]]]  # --only


def test_a_table_is_markdown() -> None:
    assert table(["who", "ms"], [["loop", "2"]], names=1).splitlines() == [
        "| who  | ms |",
        "| ---- | -: |",
        "| loop |  2 |",
    ]


def test_growth_is_that_of_the_line_which_fits_best() -> None:
    assert growth([0, 60, 120], [100, 102, 104]) == pytest.approx(2)
    assert growth([0, 60, 120], [100, 130, 100]) == pytest.approx(0)
    assert growth([60], [100]) == 0


def test_what_is_long_due_is_not_made_up_for() -> None:
    """A job that stood still would else be measured while it hurries."""
    pace = Pace(1000)
    assert [pace.due(now) for now in (5, 5.25, 5.25, 5.5)] == [0, 250, 0, 250]
    assert pace.due(60) == 500


def test_only_a_source_of_the_known_form_is_changed() -> None:
    assert mended("a b c", (("b", "d"),)) == "a d c"
    for source in ("a c", "b a b"):
        with pytest.raises(AssertionError, match="another form"):
            mended(source, (("b", "d"),))


def test_processor_time_is_that_of_the_whole_tree() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    # Begun by another thread than the first one, as a pool does.
    threaded = f"import threading; threading.Thread(target=exec, args=({start!r},)).start()"
    with subprocess.Popen([sys.executable, "-c", threaded]) as process:
        try:
            wait_until(lambda: cpu_secs(process.pid) >= 0.5, "the child's time does not show")
        finally:
            (task,) = (
                children
                for thread in Path(f"/proc/{process.pid}/task").iterdir()
                if (children := (thread / "children").read_text())
            )
            subprocess.run(["kill", *task.split()], check=True)
    assert cpu_secs(process.pid) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "latency_ms", "window_secs"), [(PIPELINE, 300, 0), (HAND_WRITTEN, 0, 0)]
)
def test_a_small_run(broker: KafkaBroker, who: str, latency_ms: float, window_secs: float) -> None:
    load = Load(50, 4, latency_ms, window_secs)
    bench = latency.Bench(Topics(broker.bootstrap_servers), secs=2, warm_up_secs=1, appended=False)
    with serving(latency_ms, 1) as url:
        run = bench.measure(load, who, url)
    assert (run.records, run.unanswered) == (100, 0)
    # Behind the due time at the latest comes the function's; a timestamp is exact to half a ms.
    assert latency_ms - 2 < run.p50 <= run.p95 <= run.p99 <= run.max
    if latency_ms or window_secs:
        assert run.p95 > 200
    assert -1 < run.late_p50 <= run.late_p99 < run.max + 1
    assert 0 < run.cpu_percent < 100 * 64
    assert 0 < run.generator_percent < 100
    assert run.records_per_call >= 1
    assert not bench.topics._created


@pytest.mark.slow
def test_a_loop_that_cannot_follow_is_found_out(broker: KafkaBroker) -> None:
    bench = latency.Bench(Topics(broker.bootstrap_servers), secs=2, warm_up_secs=1, appended=True)
    with serving(1000, 1) as url:
        run = bench.measure(Load(50, 4, 1000, 0), HAND_WRITTEN, url)
    assert not run.follows and run.unanswered
    bench.topics.delete_all()
