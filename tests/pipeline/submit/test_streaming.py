"""Streaming: the steps on input without an end, one by one, and together as a bounded run.

On a cluster: tests/pipeline/submit/test_flink.py (./run.sh test --flink).
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.test_stream import TestStream
from hypothesis import given
from hypothesis import strategies as st

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from pipeline.options.config import Config
from pipeline.options.resolve import parse_arguments
from pipeline.submit.streaming import runner_options
from tests import sink
from tests.conftest import Names
from transforms.commit.commit import CommitOffsets, _CommitPartitionFn, pack
from transforms.commit.committer import CommitConfig, Committer
from transforms.errors import UsageError
from transforms.kafka.beam_reader import BeamReadConfig, _service
from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.kafka.partition_reader import PartitionReader
from transforms.kafka.streaming import KafkaStream
from transforms.kinesis.shards import SHARD_END
from transforms.kinesis.stream import KinesisSource
from transforms.kinesis.streaming import KinesisStream
from transforms.lanes import Lanes
from transforms.read.lending import ReadAhead
from transforms.read.streaming import (
    Finding,
    Haste,
    NativeReadConfig,
    ReadPartitions,
    _FindingTracker,
    delay,
)
from transforms.records import (
    EVERY_LANE,
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


STREAMED = {"stream": "orders", "lease_table": "leases", "function": "f"}


@pytest.mark.parametrize("runner", ["FlinkRunner", "PortableRunner", "DataflowRunner"])
def test_a_stream_is_read_by_a_job_that_is_one_owner(runner: str) -> None:
    config, other = (Config.from_options(STREAMED, runner=runner) for _ in range(2))
    assert isinstance(config.stream, NativeReadConfig)
    assert config.stream.source == KinesisStream(config.commit.source)
    assert config.stream.drain_by_haste == (runner != "DataflowRunner")
    assert config.commit.behind
    # Another one each time that it is submitted.
    names = {each.source.job for each in (config, other) if isinstance(each.source, KinesisSource)}
    assert len(names) == 2 and all(names)


def test_what_a_job_cannot_do_with_a_stream_is_refused() -> None:
    asked = {"until": "caught_up", "kafka_reader": "beam"}
    with pytest.raises(UsageError) as raised:
        Config.from_options(STREAMED | asked, runner="FlinkRunner")
    assert [problem.split()[0] for problem in raised.value.problems] == [
        "--until=caught_up",
        "--kafka_reader=beam",
    ]


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
    assert "--max_bundle_time_mills=100" in added
    said = ["--checkpointing_interval=500"]
    assert "--checkpointing_interval=10000" not in runner_options("FlinkRunner", said, False)
    ends = [name for name in runner_options("FlinkRunner", [], True) if "shutdown_sources" in name]
    assert ends
    assert not any("shutdown_sources" in name for name in added)


def test_options_of_flink_s_java_half_are_known() -> None:
    arguments = [f"--{name}={value}" for name, value in GIVEN.items()]
    flinks = ["--runner=FlinkRunner", "--checkpointing_interval=500", "--savepoint_path=file:/s"]
    assert parse_arguments([*arguments, *flinks])[1] == "FlinkRunner"


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


@pytest.mark.parametrize("passed", [0.0, 1e-6, 0.2, 0.49, 0.51, 0.9])
@pytest.mark.parametrize("secs", [1, 5])
def test_a_delay_is_none_to_flink_only_when_it_is_nearly_over(secs: int, passed: float) -> None:
    """However short bundles are, to come back after a delay is no haste."""
    left = int(delay(secs).micros / 1e6 - passed)
    haste = Haste()
    for start in range(0, 1000, 100):
        haste.asked(start, secs)
        assert not haste.came(start + passed + left)
    assert left >= secs - 1
    assert delay(0) == 0


@given(st.lists(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 3)))))
def test_a_restart_goes_on_looking_where_the_last_look_ended(looks: list[Any]) -> None:
    finding = Finding(bounded=False)
    for look in looks:
        tracker = _FindingTracker(finding)
        known = tracker.current_restriction().known or frozenset()
        assert tracker.try_claim(Finding(False, known | look))
        split = tracker.try_split(0)
        assert split
        _, finding = split
        assert finding.known is not None and finding.known >= look
        assert not tracker.try_claim(Finding(False))


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
        self._noted = _committed[config.source.ledger]

    def commit(self, offsets: dict[PartitionKey, int], notes: dict[PartitionKey, str]) -> None:
        if offsets:
            self._noted.append((dict(offsets), dict(notes)))

    def put(self, next_offsets: dict[PartitionKey, tuple[int, str]]) -> None:
        self._noted.append(
            (
                {k: at for k, (at, _) in next_offsets.items()},
                {k: n for k, (_, n) in next_offsets.items()},
            )
        )

    def flush(self) -> None:
        self._noted.append(({}, {}))


def _same(element: Any) -> Any:
    return element


_asked: list[float] = []


def _hour_by_hour() -> float:
    """Two partitions begin at 0; a timer set later is due after the end of the test."""
    _asked.append(0.0)
    return 0.0 if len(_asked) <= 2 else 1e6


def test_each_partition_is_committed_again_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of which nothing came and one that is halted too; also at the end."""
    group = uuid.uuid4().hex
    config = CommitConfig(SourceConfig(KafkaConfig("broker:9092", group), ("t",)), refresh_secs=60)
    noted = _committed[config.source.ledger] = []
    monkeypatch.setattr("transforms.commit.commit.shared_committer", _NotedCommits)
    quiet, halted = ("t", 0), ("t", 1)
    stream = (
        TestStream()
        .add_elements([pack(Progress(*quiet, 7, 7, EVERY_LANE))])
        .add_elements([pack(Progress(*halted, 3, 3, EVERY_LANE))])
        .add_elements([pack(Progress(*halted, 3, 5, halted="t|1|5|Why|What"))])
        .advance_processing_time(61)
        .advance_watermark_to_infinity()
    )
    _asked.clear()
    with TestPipeline(options=PipelineOptions([], streaming=True)) as pipeline:
        _ = (
            pipeline
            | stream
            | beam.Map(_same).with_output_types(tuple[PartitionKey, bytes])
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


def test_it_is_said_how_far_a_partition_is_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what has ended, under the number asked with, and before the bundle is done."""
    source = KinesisSource(("s",), uuid.uuid4().hex)
    noted = _committed[source.ledger] = []
    config = CommitConfig(source, refresh_secs=None, behind=True)
    monkeypatch.setattr("transforms.commit.commit.shared_committer", _NotedCommits)
    key = ("s", 0)
    stream = (
        TestStream()
        .add_elements([pack(Progress(*key, 0, 0, EVERY_LANE, asked=3))])
        .add_elements([pack(Progress(*key, 0, 0, EVERY_LANE))])
        .add_elements([pack(Progress(*key, 0, 10**20))])
        .add_elements([pack(Progress(*key, 0, 0, EVERY_LANE, asked=4))])
        .add_elements([pack(Progress(*key, 10**20, SHARD_END))])
        .add_elements([pack(Progress(*key, 0, 0, EVERY_LANE, asked=6))])
        .advance_watermark_to_infinity()
    )
    with TestPipeline(options=PipelineOptions([], streaming=True)) as pipeline:
        _ = (
            pipeline
            | stream
            | beam.Map(_same).with_output_types(tuple[PartitionKey, bytes])
            | beam.ParDo(_CommitPartitionFn(config, None))
        )
    flushed = (None, None)
    assert [(offsets.get(key), notes.get(key)) for offsets, notes in noted] == [
        flushed,  # nothing is known of it
        (0, ""),
        (10**20, ""),
        *[(10**20, ""), flushed],
        (SHARD_END, ""),
        *[(SHARD_END, "end 6"), flushed],
        *[(SHARD_END, ""), flushed],
    ]


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
