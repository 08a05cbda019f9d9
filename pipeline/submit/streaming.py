"""Streaming: submit the pipeline to a cluster, and say how it goes.

Unlike in rounds the work is done elsewhere: on the workers of Flink or Dataflow. What those runners
need for this pipeline is set here, unless the user has set it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from pipeline.build import build
from pipeline.options.config import Config
from pipeline.options.declare import DATAFLOW_RUNNER, FLINK_RUNNERS
from pipeline.options.resolve import parse_beam
from pipeline.run.hands import Command, Told
from pipeline.run.preflight import preflight
from pipeline.run.status import Status, Totals
from pipeline.submit import dataflow, flink
from pipeline.submit.flink_metrics import IN_FLIGHT, OLDEST_AGE_SECS, get_json, job_counters
from transforms.commit.committer import shared_committer
from transforms.errors import KafkaError, SinkError
from transforms.invoke.failures import Trouble
from transforms.invoke.invoke import HALTS
from transforms.kafka.beam_reader import AS_SOURCE, BeamReadConfig
from transforms.kafka.client import make_consumer
from transforms.kafka.offsets import LOOK_SECS, SourceConfig, SourceOffsets
from transforms.kinesis.stream import StreamShards
from transforms.records import Finished, PartitionKey, halt_of, read_halt

_LOGGER = logging.getLogger(__name__)

_CHECKPOINT_MS = 10_000
_BUNDLE_MS = 60
_ASK_SOURCE_SECS = 120.0

FLINK_CONF = Path(__file__).parent / "flink_conf"
"""What a job on Flink is made with, for a job server that is given no other settings."""


def runner_options(
    runner: str,
    arguments: Sequence[str],
    bounded: bool,
    group: str = "",
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """Beam's arguments with those added that the runner needs and the user did not give.

    Args:
        runner: Its name.
        arguments: Beam's arguments as the user gave them.
        bounded: Whether the run ends by itself.
        group: The consumer group, which gives a job on Dataflow its name.
        environ: Environment variables.
    """
    given = {argument.split("=", 1)[0] for argument in arguments}
    wanted = ["--streaming"]
    if runner in FLINK_RUNNERS:
        wanted += [
            f"--checkpointing_interval={_CHECKPOINT_MS}",
            # Without it, what a bundle gives while a checkpoint begins waits in a buffer until
            # something else comes to that step, which may be never.
            "--finish_bundle_before_checkpointing",
            # What comes to a step is handed to Python when the bundle ends: a second, as Flink has
            # it, is what a record would wait at each step. Flink looks twice in this time, and ends
            # a bundle at the third look: a bundle lasts half as long again.
            f"--max_bundle_time_mills={_BUNDLE_MS}",
        ]
        # Beam starts the job server here, where this folder is.
        server_is_ours = runner == "FlinkRunner" and "--flink_submit_uber_jar" not in given
        if server_is_ours and "FLINK_CONF_DIR" not in environ:
            wanted.append(f"--flink_conf_dir={FLINK_CONF}")
        if runner == "PortableRunner":
            wanted.append("--environment_type=LOOPBACK")
        if bounded:
            # A job with checkpoints would else stay, with nothing left to do.
            wanted.append("--shutdown_sources_after_idle_ms=1000")
    elif runner == DATAFLOW_RUNNER and (beam_options := parse_beam(arguments)[0]):
        return [*arguments, "--streaming", *dataflow.added_options(beam_options, group)]
    return [*arguments, *(option for option in wanted if option.split("=", 1)[0] not in given)]


def _fresh_metrics(result: Any) -> Any:
    """What a job's metrics are now, by kind."""
    if hasattr(result, "_metrics"):
        # The result of a portable runner asks once, and gives that answer for ever.
        result._metrics = None
    return result.metrics().query()


def _job_of(result: Any) -> str | None:
    """The id of a submitted job, None if there is none."""
    if not getattr(result, "has_job", True):
        return None
    job = getattr(result, "_job_id", None) or getattr(result, "job_id", None)
    return str(job() if callable(job) else job) if job else None


def ended_on_purpose(result: Any, error: BaseException | None = None) -> str:
    """How somebody has drained, updated or cancelled a job, which Beam takes for a failure; empty
    if nobody has, or that is not known.

    Args:
        result: What Beam gave for the job.
        error: What it says of its end.
    """
    if flink.is_cancelled(error):
        return str(PipelineState.CANCELLED)
    ends = (PipelineState.DRAINED, PipelineState.UPDATED, PipelineState.CANCELLED)
    try:
        state = getattr(result, "state", "")
    except flink.service_errors():
        return ""
    return str(state) if state in ends else ""


class StreamRun:
    """One submitted job, as far as the program that submitted it can see.

    Args:
        config: What to run.
        runner: Name of the runner.
        arguments: Beam's arguments.
        stop: Set from outside to leave the job alone.
        started: When the program began, by `timer`.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        runner: str,
        arguments: Sequence[str],
        stop: threading.Event,
        started: float,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config
        self._runner = runner
        self._arguments = arguments
        self._stop = stop
        self._started = started
        self._timer = timer
        self._source: SourceOffsets | StreamShards
        if isinstance(config.source, SourceConfig):
            self._source = SourceOffsets(config.source, make_consumer(config.kafka))
        else:
            self._source = config.source.partitions(config.source.fetcher())
        self._ask_at = float("-inf")
        # A job that goes on where a savepoint ends has its halts in it.
        self._is_resumed = any(each.split("=", 1)[0] == "--savepoint_path" for each in arguments)
        self._beam = parse_beam(arguments)[0]
        master = getattr(self._beam, "flink_master", "")
        self._flink_master = master.removeprefix("http://") if ":" in master else ""
        self._result: Any = None
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> Status | None:
        """Submit the job and wait for its end, or until told to stop; then the job goes on.

        Returns:
            How it ended; None if there is no job, since it was only to be written or built.

        Raises:
            SinkError: The job cannot begin, or has failed.
        """
        config = self._config
        if config.run.preflight:
            preflight(config, self._source)
        if isinstance(config.stream, BeamReadConfig):
            config = self._resolve(config, config.stream)
        if not self._is_resumed:
            self._forget_halts()
        result = self._submit(config)
        if not _job_of(result):
            _LOGGER.info("the job is built and was not submitted from here")
            return None
        self._result = result
        _LOGGER.info("submitted: %s", self._name)
        threading.Thread(target=self._wait, name="wait", daemon=True).start()
        while not self._ended.wait(0.2):
            if self._stop.is_set():
                _LOGGER.warning(
                    "the job %s goes on; end it with Flink's or Dataflow's own", self._name
                )
                break
        if self._error:
            failure = dataflow.failure if self._runner == DATAFLOW_RUNNER else flink.failure
            raise failure(self._error, self._name)
        return self.status()

    def _submit(self, config: Config) -> Any:
        """Build the pipeline and hand it to the runner."""
        bounded = config.run.until == "caught_up"
        arguments = runner_options(self._runner, self._arguments, bounded, config.kafka.group)
        on_dataflow = self._runner == DATAFLOW_RUNNER
        endpoint = getattr(self._beam, "job_endpoint", None) or ""
        submission = dataflow.submission if on_dataflow else partial(flink.submission, endpoint)
        with submission():
            options = PipelineOptions(arguments)
            if on_dataflow:
                dataflow.check_update(options)
            pipeline = beam.Pipeline(options=options)
        build(pipeline, config)
        with submission():
            return pipeline.run()

    def status(self) -> Status:
        """How the job stands; may be called from another thread."""
        totals = Totals()
        halts: dict[PartitionKey, Finished] = {}
        elapsed_secs = self._timer() - self._started
        if not self._result:
            return Status(totals, 0, {}, [], {}, elapsed_secs)
        in_flight = 0
        oldest_age_secs = None
        unknown: tuple[type[BaseException], ...] = (
            OSError,
            ValueError,
            *flink.service_errors(),
            *dataflow.service_errors(),
        )
        try:
            if (counted := self._running_counters()) is not None:
                in_flight = counted.pop(IN_FLIGHT, 0)
                oldest_age_secs = counted.pop(OLDEST_AGE_SECS, 0) or None
                totals.counters.update(counted)
            else:
                self._add_counters(totals, halts)
        except unknown as error:
            # No reason to end: the job does not depend on being watched.
            why = flink.call_line(error) or type(error).__name__
            _LOGGER.warning("the numbers of the job %s are not known: %s", self._name, why)
        committed, lags, halted = self._offsets()
        halts |= halted
        # What failed last, and what waits for what, is in the workers' log only.
        trouble = Trouble(oldest_age_secs=oldest_age_secs)
        return Status(
            totals,
            in_flight,
            lags,
            list(halts.values()),
            committed,
            elapsed_secs,
            trouble=trouble,
            names=self._config.commit.source.names,
        )

    def command(self, _: Command) -> Told:
        """Nothing can be told to a job from here; see `Rounds.command`."""
        return Told(False, "a job elsewhere is told by Flink's or Dataflow's own commands")

    def _running_counters(self) -> Counter[str] | None:
        """What a job that runs on Flink has counted, if Flink can be asked."""
        if self._runner not in FLINK_RUNNERS or self._ended.is_set():
            return None
        if not self._flink_master:
            return None
        return job_counters(get_json(self._flink_master), self._name)

    def _add_counters(self, totals: Totals, halts: dict[PartitionKey, Finished]) -> None:
        """What the runner says that was counted."""
        for counter in _fresh_metrics(self._result)["counters"]:
            name = counter.key.metric
            if name.namespace == HALTS:
                halt = halt_of(name.name)
                halts[halt.key] = halt
            else:
                # Not every runner tells what is committed of what was tried.
                counted = counter.attempted if counter.committed is None else counter.committed
                totals.counters[f"{name.namespace}.{name.name}"] += counted or 0

    @property
    def _name(self) -> str:
        return _job_of(self._result) or ""

    def _wait(self) -> None:
        error: BaseException | None = None
        try:
            self._result.wait_until_finish()
        except BaseException as raised:
            error = raised
        if state := ended_on_purpose(self._result, error):
            _LOGGER.info("the job %s was ended: %s", self._name, state)
        else:
            self._error = error
        self._ended.set()

    def _resolve(self, config: Config, stream: BeamReadConfig) -> Config:
        """What Beam's reader cannot do: find topics by regex, and begin where it is told to."""
        assert isinstance(self._source, SourceOffsets)
        keys = self._source.partitions()
        self._source.survey(keys)
        starts = self._source.starts(keys)
        shared_committer(config.commit).commit({key: start.offset for key, start in starts.items()})
        topics = tuple(dict.fromkeys(topic for topic, _ in keys))
        as_source = AS_SOURCE in (getattr(self._beam, "experiments", None) or ())
        begins = tuple((key, start.offset) for key, start in starts.items())
        stream = replace(stream, topics=topics, as_source=as_source, starts=begins)
        return replace(config, stream=stream)

    def _forget_halts(self) -> None:
        """Take back what an earlier job has said of partitions that it halted. Of shards it is
        taken back when they are begun: the lease table is the job's alone."""
        if not isinstance(self._source, SourceOffsets):
            return
        try:
            found = self._source.committed(self._source.partitions(LOOK_SECS))
        except KafkaError:
            return  # out of reach from here: then nothing is said of halts either
        halted = {key: offset for key, (offset, note) in found.items() if read_halt(note)}
        shared_committer(self._config.commit).commit(halted)

    def _offsets(
        self,
    ) -> tuple[
        dict[PartitionKey, int], dict[PartitionKey, int | None], dict[PartitionKey, Finished]
    ]:
        """What the group has committed, what is left of each partition, and what is halted."""
        if self._timer() < self._ask_at:
            return {}, {}, {}
        lags: dict[PartitionKey, int | None]
        try:
            if isinstance(self._source, SourceOffsets):
                found = self._source.committed(self._source.partitions())
                committed = {key: offset for key, (offset, _) in found.items()}
                lags = {
                    key: max(0, self._source.range(key)[1] - offset)
                    for key, offset in committed.items()
                }
            else:
                found = self._source.kept()
                committed = {key: offset for key, (offset, _) in found.items()}
                # Who reads a shard knows how far behind it is; that is a worker.
                lags = dict.fromkeys(committed)
        except SinkError:
            # Where it is the cluster's workers that it is in reach of, each question takes long.
            self._ask_at = self._timer() + _ASK_SOURCE_SECS
            return {}, {}, {}
        notes = {key: read_halt(note) for key, (_, note) in found.items()}
        return committed, lags, {key: halt for key, halt in notes.items() if halt}
