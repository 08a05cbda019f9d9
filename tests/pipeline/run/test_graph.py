"""Graph: what is kept between rounds changes nothing but what a round costs.

Each graph here runs on the kept runner and on Beam's plain one, round by round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import apache_beam as beam
import pytest
from apache_beam import coders
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.worker import statecache
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.utils.timestamp import Timestamp

from pipeline.run import graph
from pipeline.run.graph import Graph
from transforms.batch.batch import BatchByPartition, BatchConfig
from transforms.batch.key import KeyByLane
from transforms.errors import KafkaError
from transforms.records import RecordChunk, Records

# Steps are pickled, this module is not: what they share with a test stands here.
SEEN: list[Any] = []
ROUND: list[int] = []
CALLS: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    for shared in (SEEN, ROUND, CALLS):
        shared.clear()


class _Give(beam.DoFn):
    """Keys and numbers, other ones in each round."""

    def __init__(self, keys: int = 3, each: int = 4) -> None:
        self._keys, self._each = keys, each
        self._given = beam.metrics.Metrics.counter("give", "given")

    def setup(self) -> None:
        CALLS.append("setup")

    def start_bundle(self) -> None:
        CALLS.append("start_bundle")

    def teardown(self) -> None:
        CALLS.append("teardown")

    def process(self, _: bytes) -> Iterator[tuple[str, int]]:
        ROUND.append(len(ROUND))
        for number in range(self._keys * self._each):
            self._given.inc()
            yield f"key-{number % self._keys}", 100 * ROUND[-1] + number


class _Sum(beam.DoFn):
    """Adds up in state, and says the sum, and which values there were, when the window ends."""

    SUM = ReadModifyWriteStateSpec("graph_sum", coders.PickleCoder())
    VALUES = BagStateSpec("graph_values", coders.PickleCoder())
    END = TimerSpec("graph_end", beam.TimeDomain.WATERMARK)
    EARLY = TimerSpec("graph_early", beam.TimeDomain.WATERMARK)

    def __init__(self) -> None:
        self._added = beam.metrics.Metrics.counter("sum", "added")
        self._early = beam.metrics.Metrics.counter("sum", "early")
        self._sizes = beam.metrics.Metrics.distribution("sum", "sizes")

    def process(
        self,
        element: tuple[str, int],
        total: Any = beam.DoFn.StateParam(SUM),
        values: Any = beam.DoFn.StateParam(VALUES),
        end: Any = beam.DoFn.TimerParam(END),
        early: Any = beam.DoFn.TimerParam(EARLY),
        window: Any = beam.DoFn.WindowParam,
    ) -> None:
        end.set(window.end)
        early.set(Timestamp(1))
        total.write((total.read() or 0) + element[1])
        values.add(element[1])
        self._added.inc(element[1])
        self._sizes.update(element[1])

    @on_timer(EARLY)
    def early(self, early: Any = beam.DoFn.TimerParam(EARLY)) -> None:
        self._early.inc()

    @on_timer(END)
    def end(
        self,
        key: Any = beam.DoFn.KeyParam,
        total: Any = beam.DoFn.StateParam(SUM),
        values: Any = beam.DoFn.StateParam(VALUES),
    ) -> Iterator[tuple[str, tuple[int, list[int]]]]:
        yield key, (total.read(), sorted(values.read()))


def _see(element: Any) -> Any:
    SEEN.append(element)
    return element


def _stateful(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    _ = given | beam.ParDo(_Sum()) | beam.Map(_see)


def _two_stateful(pipeline: beam.Pipeline) -> None:
    """The second keyed by another key: three stages, and timers in two of them."""
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    sums = given | "First" >> beam.ParDo(_Sum())
    once_more = sums | beam.Map(lambda kv: ("all", kv[1][0])).with_output_types(tuple[str, int])
    _ = once_more | "Second" >> beam.ParDo(_Again()) | beam.Map(_see)


class _Again(beam.DoFn):
    """Like `_Sum`, with names of its own: Beam loses timers of steps that share one."""

    SUM = ReadModifyWriteStateSpec("graph_again", coders.PickleCoder())
    END = TimerSpec("graph_again_end", beam.TimeDomain.WATERMARK)

    def process(
        self,
        element: tuple[str, int],
        total: Any = beam.DoFn.StateParam(SUM),
        end: Any = beam.DoFn.TimerParam(END),
        window: Any = beam.DoFn.WindowParam,
    ) -> None:
        end.set(window.end)
        total.write((total.read() or 0) + element[1])

    @on_timer(END)
    def end(self, total: Any = beam.DoFn.StateParam(SUM)) -> Iterator[int]:
        yield total.read()


def _grouped(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    grouped = given | beam.GroupByKey()
    _ = grouped | beam.Map(lambda kv: _see((kv[0], sorted(kv[1]))))


def _branches(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    even = given | "Even" >> beam.Filter(lambda kv: kv[1] % 2 == 0)
    odd = given | "Odd" >> beam.Filter(lambda kv: kv[1] % 2 == 1)
    both = (even, odd) | beam.Flatten()
    _ = both | beam.CombinePerKey(sum) | beam.Map(_see)


def _nothing(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give(0)).with_output_types(tuple[str, int])
    _ = given | beam.ParDo(_Sum()) | beam.Map(_see)


def _rounds(wire: Callable[[beam.Pipeline], None], keep: bool) -> list[tuple[Any, Any]]:
    """What four rounds see and count."""
    rounds = []
    ROUND.clear()
    made = Graph(wire, keep)
    for _ in range(4):
        SEEN.clear()
        counted = made.run()
        assert keep is made.is_kept
        rounds.append((sorted(SEEN), {name: n for name, n in counted.items() if n}))
    made.close()
    return rounds


@pytest.mark.parametrize("wire", [_stateful, _two_stateful, _grouped, _branches, _nothing])
def test_rounds_are_the_same_as_on_the_plain_runner(wire: Callable[..., None]) -> None:
    """State and timers are gone between rounds, counters are a round's own."""
    kept, plain = _rounds(wire, keep=True), _rounds(wire, keep=False)
    assert kept == plain
    if wire is not _nothing:
        seen = [seen for seen, _ in kept]
        assert all(seen)
        assert seen[0] != seen[1]


def test_a_round_counts_what_its_steps_counted() -> None:
    for _, counted in _rounds(_stateful, keep=True)[:1]:
        assert counted == {"give.given": 12, "sum.added": sum(range(12)), "sum.early": 3}


def test_steps_are_set_up_once() -> None:
    """However many bundles they have, and torn down once."""
    made = Graph(_stateful)
    for _ in range(3):
        made.run()
    assert CALLS.count("start_bundle") >= 3
    assert [call for call in CALLS if call != "start_bundle"] == ["setup"]
    made.close()
    assert [call for call in CALLS if call != "start_bundle"] == ["setup", "teardown"]


class _FailAt(beam.DoFn):
    def process(self, element: Any) -> Iterator[Any]:
        if ROUND[-1] == 1:
            raise KafkaError("broker is away")
        yield element


def _failing(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    sums = given | beam.ParDo(_Sum())
    _ = sums | beam.Reshuffle() | beam.ParDo(_FailAt()) | beam.Map(_see)


@pytest.mark.parametrize("keep", [True, False])
def test_a_round_after_one_that_failed_begins_anew(keep: bool) -> None:
    """The error is the step's own; nothing of its round is left in the next."""
    made = Graph(_failing, keep)
    made.run()
    first = sorted(SEEN)
    SEEN.clear()
    with pytest.raises(KafkaError, match=r"^broker is away$"):
        made.run()
    assert not SEEN
    made.run()
    third = [(key, [value - 200 for value in values]) for key, (_, values) in sorted(SEEN)]
    assert third == [(key, values) for key, (_, values) in first]
    made.close()


def test_an_idle_graph_keeps_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam's worker would let go of what nothing has happened in for a minute."""
    made = Graph(_stateful)
    made.run()
    kept = made._kept
    assert kept
    for stage in kept._context.stages.values():
        for handler in kept._context.bundle_manager_for(stage).worker_handlers:
            assert handler.bundle_processor_cache.periodic_shutdown._finished.is_set()
    made.close()


@pytest.mark.parametrize("how", ["another version", "another inside"])
def test_where_beam_looks_different_the_plain_runner_runs(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning, however many rounds there are."""
    if how == "another version":
        monkeypatch.setattr(graph, "_KNOWN", "2.76.")
    else:

        def other(*_: object) -> None:
            raise AttributeError("'BundleProcessorCache' object has no attribute 'get'")

        monkeypatch.setattr(graph._KeptRunner, "_adopt", other)
    made = Graph(_grouped)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made.run()
    assert not made.is_kept
    assert len(SEEN) == 9
    assert len(caplog.records) == 1


class _Final(beam.DoFn):
    def process(
        self, element: tuple[str, int], final: Any = beam.DoFn.BundleFinalizerParam
    ) -> Iterator[Any]:
        final.register(lambda: _see("final"))
        yield element


def test_what_the_kept_runner_does_not_do_the_plain_one_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A step that is to be told when its bundle is final."""

    def wire(pipeline: beam.Pipeline) -> None:
        given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
        _ = given | beam.ParDo(_Final())

    made = Graph(wire)
    with caplog.at_level(logging.WARNING):
        made.run()
    assert not made.is_kept
    assert "final" in SEEN
    assert len(caplog.records) == 1
    assert "finalization" in caplog.records[0].message


def _large(pipeline: beam.Pipeline) -> None:
    """More between two stages than a stream holds at once."""
    given = pipeline | beam.Impulse() | beam.ParDo(_Give(2, 12)).with_output_types(tuple[str, int])
    wide = given | beam.Map(lambda kv: (kv[0], bytes(2**19))).with_output_types(tuple[str, bytes])
    _ = wide | beam.GroupByKey() | beam.Map(lambda kv: _see((kv[0], len(b"".join(kv[1])))))


class _SetAgain(beam.DoFn):
    """A timer that sets itself again and is cleared: bundles behind one another in one round."""

    LEFT = ReadModifyWriteStateSpec("graph_left", coders.PickleCoder())
    AGAIN = TimerSpec("graph_set_again", beam.TimeDomain.WATERMARK)
    NEVER = TimerSpec("graph_never", beam.TimeDomain.WATERMARK)

    def process(
        self,
        element: tuple[str, int],
        left: Any = beam.DoFn.StateParam(LEFT),
        again: Any = beam.DoFn.TimerParam(AGAIN),
        never: Any = beam.DoFn.TimerParam(NEVER),
    ) -> None:
        left.write(3)
        again.set(Timestamp(1))
        never.set(Timestamp(2))
        never.clear()

    @on_timer(AGAIN)
    def again(
        self,
        key: Any = beam.DoFn.KeyParam,
        left: Any = beam.DoFn.StateParam(LEFT),
        again: Any = beam.DoFn.TimerParam(AGAIN),
    ) -> Iterator[tuple[str, int]]:
        yield key, left.read()
        left.write(left.read() - 1)
        if left.read():
            again.set(Timestamp(5 - left.read()))

    @on_timer(NEVER)
    def never(self) -> Iterator[str]:
        yield "never"


def _set_again(pipeline: beam.Pipeline) -> None:
    given = pipeline | beam.Impulse() | beam.ParDo(_Give()).with_output_types(tuple[str, int])
    _ = given | beam.ParDo(_SetAgain()) | beam.Map(_see)


@pytest.mark.parametrize("wire", [_large, _set_again])
def test_streams_and_timers_are_those_of_the_plain_runner(wire: Callable[..., None]) -> None:
    kept, plain = _rounds(wire, keep=True), _rounds(wire, keep=False)
    assert kept == plain
    assert all(seen for seen, _ in kept)


def test_beam_s_state_is_not_weighed_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam's cache of state goes through all modules for each value that it takes in."""

    def weigh(*_: object) -> int:
        raise AssertionError("a value of state was weighed")

    monkeypatch.setattr(statecache, "get_deep_size", weigh)
    records = Records([0], [1], [None], [b"v"], [None])
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    _ = (
        pipeline
        | beam.Create([RecordChunk("t", 0, 0, 1, records)])
        | KeyByLane()
        | BatchByPartition(BatchConfig())
    )
    pipeline.run().wait_until_finish()
