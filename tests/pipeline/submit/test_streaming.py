"""Streaming: the steps on input without an end, one by one, and together as a bounded run.

On a cluster: tests/pipeline/submit/test_flink.py (./run.sh test --flink).
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import GlobalWindow
from hypothesis import given
from hypothesis import strategies as st

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from pipeline.options.config import Config
from pipeline.options.resolve import parse_arguments
from pipeline.submit.streaming import runner_options
from tests import sink
from tests.conftest import Names
from transforms.aws.function import FunctionConfig
from transforms.batch.batch import BatchByPartition, BatchConfig, _BufferFn
from transforms.commit.commit import CommitOffsets, _CommitPartitionFn
from transforms.commit.committer import CommitConfig, Committer
from transforms.errors import FunctionConfigError, UsageError
from transforms.invoke.handover import Handover
from transforms.invoke.invoke import InvokeConfig, _PendingFn
from transforms.invoke.invoker import Invoker
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import RetryPolicy
from transforms.kafka.beam_reader import BeamReadConfig, _service
from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.kafka.partition_reader import PartitionReader, ReadAhead
from transforms.kafka.streaming import KafkaStream
from transforms.lanes import Lanes
from transforms.read.streaming import (
    Finding,
    Haste,
    NativeReadConfig,
    ReadPartitions,
    _FindingTracker,
)
from transforms.records import (
    EVERY_LANE,
    Batch,
    Finished,
    LaneKey,
    PartitionKey,
    Progress,
    RecordChunk,
    Records,
    read_halt,
)

GIVEN = {
    "kafka_bootstrap_servers": "broker:9092",
    "topics": "orders",
    "consumer_group": "g",
    "function": "f",
}


# -- options -------------------------------------------------------------------------------


def test_the_direct_runner_has_a_reader_of_its_own() -> None:
    config = Config.from_options(GIVEN)
    assert config.stream is None
    assert config.batch.window_secs is None
    assert not config.invoke.streaming


@pytest.mark.parametrize("runner", ["FlinkRunner", "PortableRunner", "DataflowRunner"])
def test_the_native_reader_is_the_default_of_streaming_runs(runner: str) -> None:
    config = Config.from_options(GIVEN, runner=runner)
    assert isinstance(config.stream, NativeReadConfig)
    assert not config.stream.source.bounded
    assert config.stream.drain_by_haste == (runner != "DataflowRunner")
    assert config.batch.window_secs == 0.5
    assert config.invoke.streaming


def test_a_run_that_ends_reads_what_was_there() -> None:
    config = Config.from_options(GIVEN | {"until": "caught_up"}, runner="FlinkRunner")
    assert isinstance(config.stream, NativeReadConfig)
    assert config.stream.source.bounded


def test_beam_s_reader_is_there_to_be_asked_for() -> None:
    asked = {"kafka_reader": "beam", "expansion_service": "127.0.0.1:8097"}
    config = Config.from_options(GIVEN | asked, runner="FlinkRunner")
    assert config.stream == BeamReadConfig(config.kafka, ("orders",), "127.0.0.1:8097", True)


@pytest.mark.parametrize(
    ("service", "in_flink", "as_source", "arguments"),
    [
        ("expansion:8097", True, False, None),  # runs already, as its user started it
        ("kafka.jar", False, False, []),
        ("kafka.jar", True, False, ["--defaultEnvironmentType=EMBEDDED"]),
        (None, True, False, ["--defaultEnvironmentType=EMBEDDED"]),
        (
            None,
            True,
            True,
            ["--defaultEnvironmentType=EMBEDDED", "--experiments=use_deprecated_read"],
        ),
    ],
)
def test_beam_s_expansion_service_is_started_as_the_runner_needs_it(
    service: str | None, in_flink: bool, as_source: bool, arguments: list[str] | None
) -> None:
    config = BeamReadConfig(KafkaConfig("b:1", "g"), ("t",), service, in_flink, as_source)
    made = _service(config)
    assert (made if arguments is None else made._append_args) == (
        service if arguments is None else arguments
    )


def test_beam_s_reader_refuses_what_it_cannot_do(tmp_path: Any) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("sasl.password=hunter2\nresponse.linger.ms=1\n")
    asked = {"kafka_reader": "beam", "until": "caught_up", "kafka_config_file": str(file)}
    with pytest.raises(UsageError) as raised:
        Config.from_options(GIVEN | asked, runner="FlinkRunner")
    problems = raised.value.problems
    assert [problem.split()[0] for problem in problems] == [
        "--until=caught_up",
        "--kafka_config_file",
    ]
    assert "sasl.password" in problems[1]
    assert "hunter2" not in problems[1]


def test_other_runners_are_refused() -> None:
    arguments = [f"--{name}={value}" for name, value in GIVEN.items()]
    with pytest.raises(UsageError, match="--runner=SparkRunner is not supported; use one of"):
        parse_arguments([*arguments, "--runner=SparkRunner"])


def test_flink_gets_what_this_pipeline_needs_unless_the_user_says_otherwise() -> None:
    added = runner_options("FlinkRunner", ["--flink_master=h:1"], bounded=False)
    assert "--streaming" in added
    assert "--finish_bundle_before_checkpointing" in added
    assert "--checkpointing_interval=10000" in added
    said = ["--checkpointing_interval=500"]
    assert "--checkpointing_interval=10000" not in runner_options("FlinkRunner", said, False)
    ends = [name for name in runner_options("FlinkRunner", [], True) if "shutdown_sources" in name]
    assert ends
    assert not any("shutdown_sources" in name for name in added)


def test_options_of_flink_s_java_half_are_known() -> None:
    arguments = [f"--{name}={value}" for name, value in GIVEN.items()]
    flinks = ["--runner=FlinkRunner", "--checkpointing_interval=500", "--savepoint_path=file:/s"]
    assert parse_arguments([*arguments, *flinks])[1] == "FlinkRunner"


# -- batches that are closed by time -------------------------------------------------------


def _chunk(start: int, next_offset: int, first: bool = False) -> tuple[LaneKey, RecordChunk]:
    offsets = list(range(start, next_offset))
    count = len(offsets)
    records = Records(offsets, [1] * count, [None] * count, [b"1"] * count, [None] * count)
    return ("t", 0, 0), RecordChunk("t", 0, start, next_offset, records, first, lane=0)


_collected: dict[str, list[tuple[int, int]]] = {}


def _collect(batch: Batch, token: str) -> None:
    _collected[token].append((batch.start, batch.next_offset))


def _batches(stream: TestStream, window_secs: float) -> list[tuple[int, int]]:
    token = uuid.uuid4().hex
    _collected[token] = []
    config = BatchConfig(max_records=3, window_secs=window_secs)
    with TestPipeline(options=PipelineOptions([], streaming=True)) as pipeline:
        _ = (
            pipeline
            | stream
            | beam.Map(_same).with_output_types(tuple[LaneKey, RecordChunk])
            | BatchByPartition(config, clock=_zero)
            | beam.Map(_collect, token)
        )
    return _collected[token]


def _same(element: Any) -> Any:
    return element


def _zero() -> float:
    return 0.0


def test_a_batch_is_closed_when_it_is_full_when_it_is_due_and_by_a_drain() -> None:
    stream = (
        TestStream()
        .add_elements([_chunk(0, 5, first=True)])
        .advance_processing_time(6)
        .add_elements([_chunk(5, 6)])
        .advance_watermark_to_infinity()
    )
    assert _batches(stream, 5) == [(0, 3), (3, 5), (5, 6)]


def test_a_chunk_that_was_overtaken_is_put_in_its_place() -> None:
    stream = (
        TestStream()
        .add_elements([_chunk(4, 6), _chunk(2, 4)])
        .advance_processing_time(6)
        .add_elements([_chunk(0, 2, first=True)])
        .advance_watermark_to_infinity()
    )
    assert _batches(stream, 5) == [(0, 3), (3, 6)]


# -- the native reader ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pauses", "in_haste"),
    [
        ([], False),
        ([(1, 1.0)] * 9, False),
        ([(1, 0.01)] * 2, False),
        ([(1, 0.01)] * 3, True),
        ([(1, 0.01), (1, 0.01), (1, 1.0), (1, 0.01), (1, 0.01)], False),
        # No delay was asked for: to come at once is what it should do.
        ([(0, 0.0)] * 9, False),
        ([(1, 0.01), (0, 0.0), (1, 0.01), (0, 0.0), (1, 0.01)], True),
        # A job that fails and is restarted again and again: early each time, but not at once.
        ([(1, 0.3), (0, 1.0)] * 9, False),
        ([(5, 0.3)] * 3, True),
        ([(5, 1.5)] * 9, False),
    ],
)
def test_a_runner_that_does_not_wait_any_more_is_noticed(
    pauses: list[tuple[int, float]], in_haste: bool
) -> None:
    haste, now, last = Haste(), 0.0, False
    for asked, waited in pauses:
        haste.asked(now, asked)
        now += waited
        last = haste.came(now)
    assert last == in_haste


@given(st.lists(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 3)))))
def test_a_restart_goes_on_looking_where_the_last_look_ended(looks: list[Any]) -> None:
    finding = Finding(bounded=False)
    for look in looks:
        tracker = _FindingTracker(finding)
        known = tracker.current_restriction().known or frozenset()
        assert tracker.try_claim(known | look)
        split = tracker.try_split(0)
        assert split
        _, finding = split
        assert finding.known is not None and finding.known >= look
        assert not tracker.try_claim(frozenset())


_chunks: dict[str, list[RecordChunk]] = {}


def _keep(chunk: RecordChunk, token: str) -> None:
    _chunks[token].append(chunk)


def _run(pipeline: beam.Pipeline) -> None:
    pipeline.run().wait_until_finish()


def _read(config: NativeReadConfig) -> dict[int, list[RecordChunk]]:
    """What a bounded run of the reader gives, by partition."""
    token = uuid.uuid4().hex
    _chunks[token] = []
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    chunks, _ = pipeline | ReadPartitions(config)
    _ = chunks | beam.Map(_keep, token)
    _run(pipeline)
    found: dict[int, list[RecordChunk]] = {}
    for chunk in _chunks[token]:
        found.setdefault(chunk.partition, []).append(chunk)
    return found


def _commit(
    config: CommitConfig,
    progress: list[Progress],
    begins: dict[int, int],
    told: frozenset[PartitionKey] | None = None,
) -> None:
    """Run the commit of a streaming run, what progress there is coming in the order given."""
    topic = progress[0].topic
    begun = [Progress(topic, *pair, pair[1], EVERY_LANE) for pair in begins.items()]
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    beginnings = pipeline | "begun" >> beam.Create(begun, reshuffle=False)
    ranges = pipeline | beam.Create(progress, reshuffle=False)
    _ = ranges | CommitOffsets(config, beginnings, told)
    _run(pipeline)


def test_lanes_that_come_out_of_order_before_a_halt_are_not_committed_past(
    broker: KafkaBroker, names: Names
) -> None:
    """What of a lane was not heard of is not done, whichever range comes first."""
    halt = f"{names.topic()}|0|900|RetryAttemptsExhausted|ValueError"
    topic, lanes = names.topic(), Lanes(2, 100)
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 1000)))
    progress = [
        Progress(topic, 0, 500, 1000, lane=0),  # its predecessor is still on its way
        Progress(topic, 0, 500, 900, lane=1, halted=halt),
        Progress(topic, 0, 0, 300, lane=1),
        Progress(topic, 0, 0, 200, lane=0),
    ]
    kafka = KafkaConfig(broker.bootstrap_servers, names.group())
    for count, (begin, done) in enumerate([(0, 200), (0, 0), (0, 0)]):
        config = CommitConfig(
            SourceConfig(replace(kafka, group=f"{kafka.group}-{count}"), (topic,)), lanes, None
        )
        _commit(config, progress[: len(progress) - count], {0: begin})
        assert broker.committed(config.source.kafka.group, topic) == {0: done}
        found = SourceOffsets(config.source, make_consumer(config.source.kafka)).committed(
            [(topic, 0)]
        )
        halted = read_halt(found[topic, 0][1])
        assert halted and halted.next_offset == 900


def test_a_partition_that_nothing_was_said_of_begins_with_the_first_range_to_come(
    broker: KafkaBroker, names: Names
) -> None:
    """Beam's reader finds partitions that nobody tells of; those that were told of wait for it."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 2)
    broker.produce(topic, list(sink.numbered(2, 50)))
    config = CommitConfig(
        SourceConfig(KafkaConfig(broker.bootstrap_servers, group), (topic,)), refresh_secs=None
    )
    progress = [Progress(topic, 0, 20, 30), Progress(topic, 1, 20, 30)]
    _commit(config, progress, {0: 10}, frozenset([(topic, 0)]))
    assert broker.committed(group, topic) == {0: 10, 1: 30}


@pytest.mark.parametrize(("lanes", "done"), [(Lanes(), 30), (Lanes(2, 100), 20)])
def test_what_an_earlier_worker_has_committed_is_not_waited_for(
    broker: KafkaBroker, names: Names, lanes: Lanes, done: int
) -> None:
    """A restored job may know a beginning that its reader, which begins anew, has passed."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 50)))
    config = CommitConfig(
        SourceConfig(KafkaConfig(broker.bootstrap_servers, group), (topic,)), lanes, None
    )
    Committer(config).commit({(topic, 0): 20})
    _commit(config, [Progress(topic, 0, 20, 30)], {0: 0})
    assert broker.committed(group, topic) == {0: done}


_committed: dict[str, list[tuple[dict[PartitionKey, int], dict[PartitionKey, str]]]] = {}


class _NotedCommits:
    """In place of a committer: notes what is to be committed."""

    def __init__(self, config: CommitConfig) -> None:
        self._noted = _committed[config.source.kafka.group]

    def commit(self, offsets: dict[PartitionKey, int], notes: dict[PartitionKey, str]) -> None:
        if offsets:
            self._noted.append((dict(offsets), dict(notes)))


_asked: list[float] = []


def _hour_by_hour() -> float:
    """Two partitions begin at 0; a timer set later is due after the end of the test."""
    _asked.append(0.0)
    return 0.0 if len(_asked) <= 2 else 1e6


def test_each_partition_is_committed_again_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of which nothing came and one that is halted too; also at the end."""
    group = uuid.uuid4().hex
    noted = _committed[group] = []
    config = CommitConfig(SourceConfig(KafkaConfig("broker:9092", group), ("t",)), refresh_secs=60)
    monkeypatch.setattr("transforms.commit.commit.shared_committer", _NotedCommits)
    quiet, halted = ("t", 0), ("t", 1)
    stream = (
        TestStream()
        .add_elements([(quiet, Progress(*quiet, 7, 7, EVERY_LANE))])
        .add_elements([(halted, Progress(*halted, 3, 3, EVERY_LANE))])
        .add_elements([(halted, Progress(*halted, 3, 5, halted="t|1|5|Why|What"))])
        .advance_processing_time(61)
        .advance_watermark_to_infinity()
    )
    _asked.clear()
    with TestPipeline(options=PipelineOptions([], streaming=True)) as pipeline:
        _ = (
            pipeline
            | stream
            | beam.Map(_same).with_output_types(tuple[PartitionKey, Progress])
            | beam.ParDo(_CommitPartitionFn(config, None, clock=_hour_by_hour))
        )
    by_partition = {
        key: [(offsets[key], notes[key]) for offsets, notes in noted if key in offsets]
        for key in (quiet, halted)
    }
    # At the start, while it runs, and at the end.
    assert by_partition[quiet] == [(7, "")] * 3
    note = "halted t|1|5|Why|What"
    assert by_partition[halted] == [(3, ""), *[(5, note)] * 3]


def test_the_native_reader_gives_every_record_once_in_ranges_without_a_hole(
    broker: KafkaBroker, names: Names
) -> None:
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 3)
    broker.produce(topic, list(sink.numbered(2, 3500)))
    kafka = KafkaConfig(broker.bootstrap_servers, group)
    config = NativeReadConfig(KafkaStream(SourceConfig(kafka, (topic,)), bounded=True))
    chunks = _read(config)
    assert sorted(chunks) == [0, 1]  # nothing to tell of an empty partition
    for partition in (0, 1):
        place = 0
        for number, chunk in enumerate(chunks[partition]):
            assert (chunk.start, chunk.first) == (place, number == 0)
            place = chunk.next_offset
        offsets = [offset for chunk in chunks[partition] for offset in chunk.records.offsets]
        assert offsets == list(range(3500))
    # What the starting position came to is committed before anything is read.
    assert broker.committed(group, topic) == {0: 0, 1: 0, 2: 0}


def test_a_run_that_ends_is_no_drain_however_often_the_runner_comes_back(
    broker: KafkaBroker, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flink is in haste with it, too, and the first records may be long in coming."""
    topic = names.topic()
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 50)))
    read, calls = PartitionReader.read, []

    def late(self: PartitionReader, timeout_secs: float) -> tuple[Records, int]:
        calls.append(timeout_secs)
        if len(calls) < 10:
            return Records([], [], [], [], []), 0
        return read(self, timeout_secs)

    monkeypatch.setattr(PartitionReader, "read", late)
    monkeypatch.setattr(Haste, "came", lambda self, now: len(calls) > 2)
    source = SourceConfig(KafkaConfig(broker.bootstrap_servers, names.group()), (topic,))
    chunks = _read(NativeReadConfig(KafkaStream(source, bounded=True), drain_by_haste=True))
    assert [offset for chunk in chunks[0] for offset in chunk.records.offsets] == list(range(50))


def test_the_native_reader_begins_where_the_group_stands(broker: KafkaBroker, names: Names) -> None:
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 50)))
    commit = CommitConfig(
        SourceConfig(KafkaConfig(broker.bootstrap_servers, group), (topic,)), refresh_secs=None
    )
    ranges = [Progress(topic, 0, 20, 30), Progress(topic, 0, 0, 20), Progress(topic, 0, 31, 40)]
    _commit(commit, ranges, {0: 0})
    # What is behind the hole is not committed.
    assert broker.committed(group, topic) == {0: 30}
    source = commit.source
    (chunk,) = _read(NativeReadConfig(KafkaStream(source, bounded=True)))[0]
    assert (chunk.start, chunk.next_offset, chunk.first) == (30, 50, True)


def test_a_run_that_ends_does_not_wait_for_what_is_behind_a_halt(
    broker: KafkaBroker, names: Names
) -> None:
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, 1)
    broker.produce(topic, list(sink.numbered(1, 5000)))
    commit = CommitConfig(
        SourceConfig(KafkaConfig(broker.bootstrap_servers, group), (topic,)), refresh_secs=None
    )
    config = NativeReadConfig(KafkaStream(commit.source, bounded=True, ahead=ReadAhead(1500)))

    def halt() -> None:
        # A halt from before the reading counts as an earlier run's: the start says that it is over.
        wait_until(lambda: broker.committed(group, topic) == {0: 0}, "the reading did not begin")
        Committer(commit).commit({(topic, 0): 7}, {(topic, 0): f"halted {topic}|0|7|A|B"})

    stuck = threading.Thread(target=halt)
    stuck.start()
    chunks = _read(config)[0]
    stuck.join()
    assert 1500 <= chunks[-1].next_offset < 5000


# -- pending batches -----------------------------------------------------------------------


class State:
    """A state cell or bag, in memory."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def read(self) -> Any:
        return self.items[-1] if self.items else None

    def write(self, value: Any) -> None:
        self.items = [value]

    def add(self, value: Any) -> None:
        self.items.append(value)

    def clear(self) -> None:
        self.items = []


class Bag(State):
    def read(self) -> Any:
        return list(reversed(self.items))  # a bag promises no order


class Timer:
    def __init__(self) -> None:
        self.due: Any = None

    def set(self, due: Any) -> None:
        self.due = due

    def clear(self) -> None:
        self.due = None


class Worker:
    """One key of the step, in a process that can be lost."""

    def __init__(self, answer: Callable[[Batch], Outcome]) -> None:
        self._answer = answer
        self.place, self.pending, self.early = State(), Bag(), Bag()
        self.timer, self.end = Timer(), Timer()
        self.calls: list[int]
        self.start_process()

    def start_process(self) -> None:
        """A process without memory."""

        calls = self.calls = []

        def call(batch: Batch, *_: Any) -> Outcome:
            calls.append(batch.start)
            return self._answer(batch)

        def make(may_begin: Callable[[LaneKey], bool]) -> Invoker:
            return Invoker(
                lambda batch, call: None,
                call,
                RetryPolicy(),
                4,
                clock=lambda: 0.0,
                random=lambda: 0.0,
                may_begin=may_begin,
            )

        self.handover = handover = Handover(make)
        config = InvokeConfig(FunctionConfig("f"), streaming=True)
        self.step = _PendingFn(config, share=lambda _: handover, clock=lambda: 0.0)

    def process(self, batch: Batch) -> list[Finished]:
        element = (batch.lane_key, batch)
        states = (self.place, self.pending, self.early, self.timer, self.end)
        return list(self.step.process(element, *states, GlobalWindow()))  # type: ignore[arg-type]

    def collect(self) -> list[Finished]:
        return list(self.step.collect(("t", 0, 0), self.place, self.pending, self.timer))  # type: ignore[arg-type]

    def drain(self) -> list[Finished]:
        states = (self.place, self.pending, self.early, self.timer)
        return list(self.step.collect_all(("t", 0, 0), *states))  # type: ignore[arg-type]


def _batch(number: int) -> Batch:
    records = Records([number], [1], [None], [b"1"], [None])
    return Batch("t", 0, number, number + 1, records, [b"{}"], first=number == 0)


def _succeed(_: Batch) -> Outcome:
    return Outcome(Kind.SUCCESS)


def test_what_waited_is_batched_with_the_chunk_it_waited_for() -> None:
    """Not only at the end, and what still waits stays counted."""
    state, pieces, early = State(), Bag(), Bag()
    step = _BufferFn(BatchConfig(max_records=2))

    def process(*chunk: Any, first: bool = False) -> list[tuple[int, int]]:
        states = (state, pieces, early, Timer(), GlobalWindow())
        out = step.process(_chunk(*chunk, first=first), *states)  # type: ignore[arg-type]
        return [(batch.start, batch.next_offset) for batch in out]

    assert process(6, 8) == process(2, 4) == process(10, 12) == []
    assert state.read().early == 3
    assert process(0, 2, first=True) == [(0, 2), (2, 4)]
    assert state.read().early == len(early.items) == 2
    assert process(4, 6) == [(4, 6), (6, 8)]
    assert state.read().early == len(early.items) == 1
    # The beginning is known: another chunk that says it begins changes nothing about that.
    assert process(0, 2, first=True) == []
    assert (state.read().base, state.read().next_offset) == (0, 8)


def test_a_drain_waits_for_everything_and_leaves_no_timer() -> None:
    worker = Worker(_succeed)
    out = [finished for number in range(40) for finished in worker.process(_batch(number))]
    out += worker.drain()
    assert [finished.start for finished in out] == list(range(40))
    assert worker.timer.due is None
    assert worker.place.read().head == 40


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 1, 3]])
def test_batches_that_have_overtaken_others_wait_for_them(order: list[int]) -> None:
    worker = Worker(_succeed)
    out = [finished for number in order for finished in worker.process(_batch(number))]
    out += worker.drain()
    assert worker.calls == [0, 1, 2, 3]
    assert [finished.start for finished in out] == [0, 1, 2, 3]
    assert worker.early.items == []


def test_a_batch_whose_predecessor_never_comes_is_invoked_by_a_drain() -> None:
    worker = Worker(_succeed)
    for number in (0, 3, 2):
        worker.process(_batch(number))
    worker.drain()
    assert worker.calls == [0, 2, 3]


def test_a_late_batch_is_invoked_when_it_comes() -> None:
    worker = Worker(_succeed)
    for number in (0, 1):
        worker.process(_batch(number))
    worker.process(replace(_batch(0), first=False))
    worker.drain()
    assert worker.calls == [0, 1, 0]


def test_a_lost_process_costs_a_second_call_and_no_batch() -> None:
    worker = Worker(_succeed)
    before = worker.process(_batch(0)) + worker.process(_batch(1))
    worker.start_process()
    after = worker.process(_batch(2)) + worker.drain()
    assert [finished.start for finished in before + after] == [0, 1, 2]
    emitted = len(before)
    assert worker.calls == list(range(emitted, 3))


def test_what_is_done_leaves_the_state() -> None:
    worker = Worker(_succeed)
    out = []
    for number in range(100):
        out += worker.process(_batch(number))
        out += worker.collect()
        assert len(worker.pending.items) <= 2 * (number + 1 - len(out)) + 18
    out += worker.drain()
    worker.collect()
    assert len(out) == 100
    assert worker.pending.items == []


def test_a_halt_stops_the_key_and_drops_what_is_behind_it() -> None:
    def fail_at_two(batch: Batch) -> Outcome:
        if batch.start == 2:
            return Outcome(Kind.FUNCTION_ERROR, error_type="ValueError", message="m")
        return Outcome(Kind.SUCCESS)

    worker = Worker(fail_at_two)
    out = [finished for number in range(5) for finished in worker.process(_batch(number))]
    out += worker.drain()
    assert [(finished.start, finished.halted is not None) for finished in out] == [
        (0, False),
        (1, False),
        (2, True),
    ]
    assert worker.pending.items == []
    assert worker.process(_batch(9)) == []
    assert worker.calls == [0, 1, 2]


def test_a_halt_between_two_looks_is_told() -> None:
    """What halted the key comes out with the next look; it is not taken for another lane's."""
    gate = threading.Event()

    def fail(_: Batch) -> Outcome:
        assert gate.wait(20)
        return Outcome(Kind.FUNCTION_ERROR, error_type="ValueError", message="m")

    worker = Worker(fail)
    look = worker.handover.finished

    def look_too_early(key: LaneKey, head: int) -> list[Finished]:
        found = look(key, head)
        gate.set()
        assert worker.handover.invoker.wait(lambda invoker: invoker.queue(key[:2]).halted, 20)
        return found

    worker.handover.finished = look_too_early  # type: ignore[method-assign]
    assert worker.process(_batch(0)) == []
    (told,) = worker.collect()
    assert told.halted


def test_a_function_that_is_not_there_fails_the_bundle() -> None:
    worker = Worker(lambda _: Outcome(Kind.CONFIG, error_type="ResourceNotFoundException"))
    with pytest.raises(FunctionConfigError, match="--function=f cannot be invoked"):
        worker.process(_batch(0))
        worker.drain()
