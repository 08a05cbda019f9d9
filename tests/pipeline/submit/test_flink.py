"""The pipeline on a real Flink cluster: JobManager, TaskManager and worker pool as processes.

Each run is submitted by the program itself, with the options of a user. What must hold is read from
Kafka and from the calls that the function got.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.faults import unavailable
from pipeline.local.flink import FlinkCluster
from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaServer
from pipeline.local.processes import ServerError, wait_until
from tests import kinesis as streams
from tests import sink
from tests.conftest import Names
from tests.runs.test_secrets import assert_none, plant
from tests.servers.dataflow_service import everything_in
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import PASSWORD, REGION, USER, SecureBroker
from tests.sink import commit

pytestmark = [pytest.mark.slow, pytest.mark.flink]

READERS = ("native", "beam")
JOB_SECS = 120.0  # until a job runs; a few seconds unless something is wrong
WAIT_SECS = 480.0
sink.RUN_SECS = 400.0


@pytest.fixture(scope="module")
def cluster(manager: SecretsManager) -> Iterator[FlinkCluster]:
    """One for all tests here; each of its processes may be lost and comes back."""
    before = dict(os.environ)
    # The workers' credentials are those of the process that starts the pool.
    os.environ.update(manager.env)
    try:
        with FlinkCluster(
            job_server=True, expansion_service=True, high_availability=True
        ) as running:
            yield running
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def server() -> Iterator[LambdaServer]:
    with sink.serve() as running:
        yield running


class Flink:
    """The cluster with topics and a group of one test's own."""

    def __init__(self, cluster: FlinkCluster, broker: KafkaBroker, names: Names) -> None:
        self.cluster, self.broker, self.rest = cluster, broker, cluster.rest
        self.source, self.responses = names.topic("source"), names.topic("responses")
        self.errors, self.group = names.topic("errors"), names.group()
        self._count = 0

    def create(self, partitions: int = 4) -> None:
        for topic in (self.source, self.responses, self.errors):
            self.broker.create_topic(topic, partitions)

    def produce(self, partitions: int, count: int, topic: str | None = None) -> None:
        self.broker.produce(topic or self.source, list(sink.numbered(partitions, count)))

    def start(self, server: LambdaServer, reader: str = "native", **options: Any) -> sink.Sink:
        """Submit the pipeline."""
        given = {
            "topics": self.source,
            "consumer_group": self.group,
            "response_topic": self.responses,
            "runner": "PortableRunner",
            "job_endpoint": self.cluster.job_endpoint,
            "flink_master": self.cluster.address,
            "environment_type": "EXTERNAL",
            "environment_config": self.cluster.worker_pool,
            "parallelism": 2,
            "checkpointing_interval": 1000,
            "until": "forever",
            "kafka_reader": reader,
        }
        if reader == "beam":
            given["expansion_service"] = self.cluster.expansion_service
        given |= options
        known = {job.id for job in self.rest.jobs()}
        run = sink.start(self.broker, server, **given)
        if given["flink_master"] != self.cluster.address or self._comes_to_run(run, known):
            return run
        # In all this time Flink has not begun all tasks: that is the cluster, not what they do.
        warnings.warn(f"no job came to run:\n{self.cluster.describe()}", stacklevel=2)
        run.kill()
        self.cluster.start_over()
        return sink.start(self.broker, server, **given)

    def _comes_to_run(self, run: sink.Sink, known: set[str]) -> bool:
        """Whether all tasks of the job run in time, or it has ended already."""
        until = time.monotonic() + JOB_SECS
        while run.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(ServerError):
                self.rest.wait_for_job(known, timeout=1)
                return True
        return run.process.poll() is not None

    def logged(self, text: str) -> int:
        """How many lines of the workers' log hold a text."""
        logs = [self.cluster.log(name) for name in self.cluster.names if "taskmanager" in name]
        return sum(text in line for log in logs for line in log.splitlines())

    def read(self, job: str) -> float:
        """How many records have been read, as the job counts them."""
        tasks = self.rest.tasks(job).values()
        metrics = [self.rest.metrics(job, task["id"], r"\bread_records$") for task in tasks]
        return sum(sum(found.values()) for found in metrics)

    def answered(self) -> int:
        return len(self.broker.read_all(self.responses))

    def committed(self, topic: str | None = None) -> dict[int, int]:
        return self.broker.committed(self.group, topic or self.source)

    def wait_committed(self, run: sink.Sink, expected: dict[int, int]) -> None:
        run.until(lambda: self.committed() == expected, f"not committed: {expected}", WAIT_SECS)

    def wait_done(self, expected: dict[int, int]) -> None:
        """Wait for offsets of a job that was broken off; else say how far it came."""
        try:
            wait_until(lambda: self.committed() == expected, "not done", WAIT_SECS)
        except ServerError as error:
            stands = f"committed: {self.committed()}, responses: {self.answered()}"
            raise AssertionError(f"{error}; {stands}") from None

    def check(self, **how: Any) -> None:
        try:
            sink.assert_exactly_once(
                self.broker, self.group, [self.source], responses=self.responses, **how
            )
        except AssertionError as error:
            # Where a job was started again by Flink, records are invoked again: why was it?
            error.add_note(self.cluster.describe())
            raise


@pytest.fixture
def flink(mended: FlinkCluster, broker: KafkaBroker, names: Names) -> Iterator[Flink]:
    yield Flink(mended, broker, names)
    mended.rest.cancel_all()


def _assert_never_ahead(calls: Iterable[sink.Invocation]) -> None:
    """No call begins behind a record that was not answered yet; it may go back after a crash."""
    reached: dict[Any, int] = {}
    for call in calls:
        first, last = call.offsets[0], call.offsets[-1]
        assert call.offsets == tuple(range(first, last + 1))
        due = reached.get(call.key, 0)
        assert first <= due, f"{call.key}: {first} is sent, {due} was due"
        if call.answered:
            reached[call.key] = max(due, last + 1)


@pytest.mark.parametrize("reader", READERS)
def test_every_record_is_answered_once_and_in_order(
    flink: Flink, server: LambdaServer, reader: str
) -> None:
    flink.create(8)
    flink.produce(8, 25_000)
    ends = {"until": "caught_up"} if reader == "native" else {}
    with flink.start(server, reader, batch_size=1000, **ends) as run:
        if reader == "native":
            ended = run.wait()
            assert ended.summary["records"] == 200_000
            assert ended.summary["committed"] == {f"{flink.source}-{p}": 25_000 for p in range(8)}
        else:
            flink.wait_committed(run, dict.fromkeys(range(8), 25_000))
    flink.check()
    sink.assert_in_order(sink.invocations(server))
    sink.assert_rising(flink.broker, flink.responses)
    sink.assert_answers_match(flink.broker, [flink.source], flink.responses)


def test_subtasks_have_as_many_partitions_each(flink: Flink, server: LambdaServer) -> None:
    """Of few partitions too: as many are read in each, and as many are worked."""
    flink.create(4)
    flink.produce(4, 4000)
    with flink.start(server, batch_size=1000) as run:
        flink.wait_committed(run, dict.fromkeys(range(4), 4000))
        [job] = [job.id for job in flink.rest.running_jobs()]

        def moved(step: str, metric: str) -> list[float]:
            [task] = [task for name, task in flink.rest.tasks(job).items() if step in name]
            return [each[metric] for each in flink.rest.subtasks(job, task["id"])]

        for step, metric in (("Read, Key", "write-bytes"), ("Invoke, Write", "read-bytes")):
            shares = partial(moved, step, metric)
            wait_until(lambda shares=shares: sum(shares()) > 200_000, f"no {metric} of {step}", 60)
            few, many = sorted(shares())
            assert few > 0.7 * many, f"{step}: {few} and {many} bytes"


def test_workers_log_in_with_iam(
    mended: FlinkCluster, secure: SecureBroker, names: Names, tmp_path: Path
) -> None:
    """What finds partitions, reads, writes responses and error records, and commits: there is no
    other way to the broker. The job has no token in it, nor has any log."""
    flink = Flink(mended, secure, names)
    flink.create(2)
    flink.produce(2, 20)
    file = tmp_path / "kafka.properties"
    file.write_text(
        f"security.protocol=SASL_SSL\nsasl.mechanism=AWS_MSK_IAM\naws.msk.region={REGION}\n"
        f"ssl.ca.location={secure.ca}\n"
    )
    options: dict[str, Any] = {
        "kafka_bootstrap_servers": secure.iam,
        "kafka_config_file": file,
        "on_error": "log",
        "error_topic": flink.errors,
        "bisect_on_error": True,
    }
    try:
        with (
            sink.serve(sink.poison("order 1/7")) as server,
            flink.start(server, **options) as run,
        ):
            flink.wait_committed(run, {0: 20, 1: 20})
            (job,) = flink.rest.running_jobs()
            shown = [json.dumps(flink.rest.get(f"/jobs/{job.id}{of}")) for of in ("", "/config")]
            run.send(signal.SIGTERM)
            ended = run.wait()
    finally:
        mended.rest.cancel_all()
    flink.check(errors=flink.errors)
    assert len(sink.failed(secure, flink.errors)) == 1
    shown += [ended.stderr, *(mended.log(name) for name in mended.names)]
    marks = ("aHR0cHM6Ly9rYWZrYS4", "X-Amz-Signature", sink.SECRET_KEY)
    assert [mark for mark in marks if any(mark in text for text in shown)] == []


def _processes(roots: Iterable[int]) -> dict[int, Path]:
    """Processes, and all that they have started, each with its folder in /proc."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            parents[int(folder.name)] = int(parent)
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: Path(f"/proc/{pid}") for pid in found}


_PAGES = (
    *("/config", "/jobs/overview", "/jobmanager/config", "/jobmanager/environment"),
    *("/jobmanager/logs", "/taskmanagers"),
)
_PAGES_OF_A_JOB = (
    *("", "/config", "/jobmanager/config", "/jobmanager/environment", "/plan", "/exceptions"),
    *("/accumulators?includeSerializedValue=true", "/checkpoints", "/checkpoints/config"),
    "/metrics",
)


def _shown_by(cluster: FlinkCluster, job: str) -> Iterator[tuple[str, bytes]]:
    """What a cluster shows of a job to who looks: its pages, and all its files, logs among them."""
    rest = cluster.rest
    pages = [*_PAGES, *(f"/jobs/{job}{page}" for page in _PAGES_OF_A_JOB)]
    for task in rest.tasks(job).values():
        of_task = f"/jobs/{job}/vertices/{task['id']}"
        pages += [of_task, f"{of_task}/accumulators", f"{of_task}/taskmanagers"]
    for manager in rest.get("/taskmanagers")["taskmanagers"]:
        pages.append(f"/taskmanagers/{manager['id']}")
    for page in pages:
        yield page, json.dumps(rest.get(page)).encode()
    for file in cluster.folder.rglob("*"):
        # A checkpoint may go while it is looked for.
        with contextlib.suppress(FileNotFoundError):
            if file.is_file() and file.suffix != ".jar":
                yield str(file), b"\n".join(everything_in(file.read_bytes()))


def test_a_password_is_rotated_and_the_cluster_shows_none(
    mended: FlinkCluster,
    secure: SecureBroker,
    manager: SecretsManager,
    names: Names,
    tmp_path: Path,
) -> None:
    """Workers fetch the new one when the old one is refused. Neither is in a process's arguments or
    environment, on a page of the JobManager, or in any file of the cluster, be it a log."""
    flink = Flink(mended, secure, names)
    flink.create(2)
    flink.produce(2, 20)
    first, second, of_errors = PASSWORD, plant(), plant()
    secure.set_password("plain", first)
    arn = manager.keep(username=USER, password=first)
    trusted = manager.keep(certificate=secure.ca.read_text())
    file = tmp_path / "kafka.properties"
    # One that only the file of the workers has.
    file.write_text(f"error.sasl.oauthbearer.client.secret={of_errors}\n")
    options: dict[str, Any] = {
        "kafka_bootstrap_servers": secure.plain,
        "kafka_access": f"BASIC_AUTH={arn},SERVER_ROOT_CA_CERTIFICATE={trusted}",
        "kafka_config_file": file,
        "on_error": "log",
        "error_topic": flink.errors,
        "bisect_on_error": True,
        "log_level": "DEBUG",
        "default_sdk_harness_log_level": "DEBUG",
        "env": manager.env,
    }
    shown: dict[str, str | bytes] = {}
    try:
        with (
            sink.serve(sink.poison("order 1/7")) as server,
            flink.start(server, **options) as run,
        ):
            flink.wait_committed(run, {0: 20, 1: 20})
            secure.set_password("plain", second)
            refused = "Invalid username or password"
            run.until(lambda: flink.logged(refused) > 0, "nothing is refused", WAIT_SECS)
            manager.change(arn, username=USER, password=second)
            flink.produce(2, 20)
            flink.wait_committed(run, {0: 40, 1: 40})
            (job,) = flink.rest.running_jobs()
            pids = [pid for name in mended.names if (pid := mended.pid(name))]
            found = _processes([run.process.pid, *pids])
            for pid, folder in found.items():
                # One may have ended meanwhile.
                with contextlib.suppress(OSError):
                    shown[f"arguments of {pid}"] = (folder / "cmdline").read_bytes()
                    shown[f"environment of {pid}"] = (folder / "environ").read_bytes()
            shown |= dict(_shown_by(mended, job.id))
            run.send(signal.SIGTERM)
            ended = run.wait()
    finally:
        mended.rest.cancel_all()
        secure.set_password("plain", PASSWORD)
    # Flink starts a job again whose commit or write was refused for long.
    flink.check(errors=flink.errors, crashed=True)
    every = b" ".join(text for name, text in shown.items() if name.startswith("arguments"))
    assert b"pipeline.local.worker" in every, "no worker was looked at"
    assert f"/jobs/{job.id}/config" in shown
    assert [name for name in shown if name.endswith("taskmanager-1.log")]
    shown |= {"stdout": ended.stdout, "stderr": ended.stderr}
    for topic in (flink.responses, flink.errors):
        shown[topic] = repr(secure.read_all(topic))
    assert_none([first, second, of_errors], shown)
    # Credentials of AWS are where who started a process has put them, and nowhere else.
    given = {name: text for name, text in shown.items() if not name.startswith("environment of")}
    assert_none([sink.SECRET_KEY], given)


def _kill_broker(flink: Flink) -> None:
    flink.broker.kill()
    flink.broker.start()


def _restart(name: str) -> Callable[[Flink], None]:
    return lambda flink: flink.cluster.restart(name)


_LOSE_TASKMANAGER = _restart("taskmanager-1")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(_LOSE_TASKMANAGER, id="taskmanager"),
        pytest.param(_restart("worker-pool"), id="worker-pool"),
        pytest.param(_restart("jobmanager"), id="jobmanager"),
        pytest.param(_kill_broker, id="broker"),
    ],
)
def test_a_lost_process_costs_repeats_and_no_record(
    flink: Flink, reader: str, lose: Callable[[Flink], None]
) -> None:
    flink.create()
    # Without a checkpoint Beam's reader may leave one unread that its TaskManager has read before.
    waits = reader == "beam" and lose is not _LOSE_TASKMANAGER
    records = 8000 if waits else 3000
    flink.produce(4, records)

    def slowly(event: Any, context: Any) -> Any:
        time.sleep(0.05)
        return sink.answer(event)

    # Where a TaskManager is lost there is no checkpoint yet: the group's offsets say where.
    interval = 600_000 if lose is _LOSE_TASKMANAGER else 1000
    options = {"batch_size": 50, "checkpointing_interval": interval}
    with sink.serve(slowly) as server, flink.start(server, reader, **options) as run:
        run.until(lambda: sum(flink.committed().values()) > 2000, "nothing committed", WAIT_SECS)
        flink.check(crashed=True)
        if waits:
            (job,) = flink.rest.running_jobs()
            flink.rest.wait_for_checkpoints(job.id, 2)
        lose(flink)
        flink.wait_done(dict.fromkeys(range(4), records))
        flink.check(crashed=True)
        _assert_never_ahead(sink.invocations(server))


@pytest.mark.parametrize("reader", READERS)
def test_a_partition_whose_function_is_down_stops_neither_the_others_nor_a_checkpoint(
    flink: Flink, server: LambdaServer, reader: str
) -> None:
    flink.create()
    flink.produce(4, 2000)
    server.add_fault(unavailable(times=None, when=sink.of_partition(2)))
    with flink.start(server, reader) as run:
        others = {0: 2000, 1: 2000, 3: 2000}
        run.until(
            lambda: {p: o for p, o in flink.committed().items() if p != 2} == others,
            "the others are not done",
            WAIT_SECS,
        )
        (job,) = flink.rest.running_jobs()
        before = flink.rest.checkpoints(job.id)["counts"]
        until = time.monotonic() + 12
        while time.monotonic() < until:
            flink.rest.wait_for_checkpoints(job.id)
        after = flink.rest.checkpoints(job.id)["counts"]
        assert after["failed"] == before["failed"]
        assert after["restored"] == before["restored"]
        assert flink.committed().get(2, 0) == 0
        server.clear_faults()
        flink.wait_committed(run, others | {2: 2000})
        # Else what is invoked again below would be the restart's, and not ours.
        counts = flink.rest.checkpoints(job.id)["counts"]
        assert counts["restored"] == before["restored"], "the job was restarted"
    flink.check()
    sink.assert_in_order(sink.invocations(server))


@pytest.mark.parametrize("reader", READERS)
def test_a_halted_partition_stays_where_it_is_and_is_named(flink: Flink, reader: str) -> None:
    flink.create()
    flink.produce(4, 1000)
    with (
        sink.serve(sink.poison("order 1/500")) as server,
        flink.start(server, reader, bisect_on_error=True, commit_refresh_secs=5) as run,
    ):
        flink.wait_committed(run, {0: 1000, 1: 500, 2: 1000, 3: 1000})
        # Where it happened and when it happened, not only at the end of the run. Beam's reader runs
        # in the TaskManager and takes over its logging: behind it this log says nothing any more.
        line = f"halted: {flink.source}-1 at offset 500"
        logs = int(reader == "native")
        run.until(lambda: flink.logged(line) == logs, "the halt is not logged", 30)
        (job,) = flink.rest.running_jobs()
        flink.rest.wait_for_checkpoints(job.id)
        # Quiet and halted ones are committed again: what somebody else moves is back soon.
        commit(flink.broker, flink.group, flink.source, {0: 0, 1: 0, 2: 0})
        flink.wait_committed(run, {0: 1000, 1: 500, 2: 1000, 3: 1000})
        run.until(lambda: "records: 3500" in run.stderr, "no progress is shown", 60)
        run.send(signal.SIGTERM)
        ended = run.wait(code=3)
    assert ended.summary["responses"] == 3500
    assert ended.summary["invocations"] > 35
    (halted,) = ended.summary["halted"]
    assert (halted["topic"], halted["partition"], halted["offset"]) == (flink.source, 1, 500)
    assert halted["error_type"] == "ValueError"
    assert line in ended.stderr
    assert flink.logged(line) == logs
    # A new job begins with the failed record, and has a function that is mended.
    flink.cluster.rest.cancel_all()
    with sink.serve() as server, flink.start(server, reader) as run:
        flink.wait_committed(run, dict.fromkeys(range(4), 1000))
        assert min(sink.offsets_called(server, 1))[0] == 500
    flink.check(crashed=True)


@pytest.mark.parametrize("reader", READERS)
def test_a_drain_ends_open_batches_and_loses_nothing(
    flink: Flink, server: LambdaServer, reader: str
) -> None:
    """With Beam's reader only as a source: its DoFn is called again and again, never to be done."""
    flink.create()
    flink.produce(4, 70)
    as_source = {
        "expansion_service": flink.cluster.expansion_service_jar,
        "experiments": "use_deprecated_read",
    }
    more = as_source if reader == "beam" else {}
    with flink.start(server, reader, **more, batch_size=1000, batch_window_secs=300) as run:
        job = flink.rest.wait_for_job()
        run.until(lambda: flink.read(job) == 280, "not all is read", WAIT_SECS)
        assert flink.answered() == 0
        flink.rest.stop(job, drain=True)
        assert run.wait().summary["records"] == 280
    assert flink.committed() == dict.fromkeys(range(4), 70)
    flink.check()


def test_a_drain_waits_for_a_function_that_is_down_as_long_as_it_may(
    flink: Flink, server: LambdaServer
) -> None:
    flink.create()
    flink.produce(4, 70)
    server.add_fault(unavailable(times=None, when=sink.of_partition(2)))
    others = dict.fromkeys((0, 1, 3), 70)
    with flink.start(server, drain_wait_secs=5) as run:
        run.until(
            lambda: {p: o for p, o in flink.committed().items() if p != 2} == others,
            "the others are not done",
            WAIT_SECS,
        )
        (job,) = flink.rest.running_jobs()
        flink.rest.stop(job.id, drain=True)
        run.wait()
    assert flink.rest.status(job.id) == "FINISHED"
    assert flink.committed().get(2, 0) == 0
    assert flink.logged(f"{flink.source}-2: the drain ends after --drain_wait_secs=5")
    server.clear_faults()
    with flink.start(server) as run:
        flink.wait_committed(run, others | {2: 70})
    flink.check()


@pytest.mark.parametrize("reader", READERS)
def test_a_savepoint_goes_on_with_another_parallelism(
    flink: Flink, server: LambdaServer, reader: str
) -> None:
    flink.create()
    flink.produce(4, 500)
    with flink.start(server, reader, batch_size=300, batch_window_secs=300) as run:
        # One batch of each partition is full, one is open, and travels in the savepoint.
        flink.wait_committed(run, dict.fromkeys(range(4), 300))
        (job,) = flink.rest.running_jobs()
        savepoint = flink.rest.stop(job.id)
        run.wait()
    flink.produce(4, 100)
    with flink.start(
        server,
        reader,
        batch_size=300,
        batch_window_secs=300,
        parallelism=4,
        savepoint_path=savepoint,
    ) as run:
        flink.wait_committed(run, dict.fromkeys(range(4), 600))
    flink.check()
    sink.assert_in_order(sink.invocations(server))
    assert {len(call.offsets) for call in sink.invocations(server)} == {300}


@pytest.mark.parametrize("reader", READERS)
def test_a_job_without_a_savepoint_begins_at_the_group_s_offsets(
    flink: Flink, server: LambdaServer, reader: str
) -> None:
    flink.create()
    flink.produce(4, 500)
    with flink.start(server, reader) as run:
        flink.wait_committed(run, dict.fromkeys(range(4), 500))
        flink.rest.cancel_all()
        run.wait(code=None)
    flink.produce(4, 300)
    with flink.start(server, reader) as run:
        flink.wait_committed(run, dict.fromkeys(range(4), 800))
    flink.check()
    sink.assert_in_order(sink.invocations(server))


@pytest.mark.parametrize("reader", READERS)
def test_topics_with_different_numbers_of_partitions(
    flink: Flink, server: LambdaServer, names: Names, reader: str
) -> None:
    small = names.topic("small")
    flink.create(5)
    flink.broker.create_topic(small, 2)
    flink.produce(5, 400)
    flink.produce(2, 300, topic=small)
    # Here the expansion service is one that Beam starts itself.
    jar = {"expansion_service": flink.cluster.expansion_service_jar} if reader == "beam" else {}
    with flink.start(server, reader, topics=f"{flink.source},{small}", **jar) as run:
        flink.wait_committed(run, dict.fromkeys(range(5), 400))
        run.until(lambda: flink.committed(small) == {0: 300, 1: 300}, "the other topic", WAIT_SECS)
    sink.assert_exactly_once(
        flink.broker, flink.group, [flink.source, small], responses=flink.responses
    )
    sink.assert_in_order(sink.invocations(server))


@pytest.mark.parametrize("reader", READERS)
def test_partitions_and_topics_that_come_later_are_read(
    flink: Flink, server: LambdaServer, names: Names, reader: str
) -> None:
    """Beam's reader is told names when it begins, so it finds partitions, but no topics."""
    later = names.topic("source-later")
    flink.create(1)
    flink.produce(1, 200)
    pattern = f"{flink.source}|{later}"
    with flink.start(server, reader, topics=None, topics_regex=pattern) as run:
        flink.wait_committed(run, {0: 200})
        flink.broker.add_partitions(flink.source, 2)
        flink.broker.create_topic(later, 1)
        flink.produce(2, 100)
        flink.produce(1, 50, topic=later)
        flink.wait_committed(run, {0: 300, 1: 100})
        if reader == "native":
            run.until(
                lambda: flink.committed(later) == {0: 50}, "the later topic is not read", WAIT_SECS
            )
    sink.assert_in_order(sink.invocations(server))


def test_what_a_filter_drops_waits_behind_a_running_call(flink: Flink, tmp_path: Path) -> None:
    """Chunks of which nothing is left pile up behind calls, between records that are sent."""
    flink.create(2)
    filters = tmp_path / "filters.json"
    pattern = json.dumps({"value": {"status": ["paid"]}})
    filters.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
    paid, new = b'{"status":"paid"}', b'{"status":"new"}'
    for _ in range(3):
        for value, count in ((paid, 25), (new, 3000)):
            records = [NewRecord(partition, None, value) for partition in range(2)]
            flink.broker.produce(flink.source, records * count)

    def slowly(event: Any, context: Any) -> Any:
        time.sleep(0.5)
        return sink.answer(event)

    with (
        sink.serve(slowly) as server,
        flink.start(
            server, until="caught_up", filter_criteria=filters, batch_size=10, batch_window_secs=0
        ) as run,
    ):
        ended = run.wait()
        assert ended.summary["committed"] == {f"{flink.source}-{p}": 9075 for p in range(2)}
        for partition in range(2):
            called = list(chain.from_iterable(sink.offsets_called(server, partition)))
            assert called == [*range(25), *range(3025, 3050), *range(6050, 6075)]
    assert flink.answered() == 150


def test_lanes_keep_the_order_of_each_key(flink: Flink, server: LambdaServer) -> None:
    flink.create(2)
    flink.produce(2, 2000)
    with flink.start(server, parallelization_factor=4, until="caught_up") as run:
        run.wait()
    assert flink.committed() == {0: 2000, 1: 2000}
    flink.check()


def test_flink_s_own_runner_takes_the_address_of_the_cluster(
    flink: Flink, server: LambdaServer
) -> None:
    flink.create()
    flink.produce(4, 100)
    options = dict(
        option.removeprefix("--").split("=", 1) for option in flink.cluster.runner_options()
    )
    with flink.start(
        server, runner="FlinkRunner", job_endpoint=None, until="caught_up", **options
    ) as run:
        assert run.wait().summary["records"] == 400
        # Beam's job server is a process of its own.
        wait_until(lambda: not run.left(), "it leaves processes behind")
    flink.check()


def test_flink_inside_the_job_server(flink: Flink, server: LambdaServer) -> None:
    """Without any cluster: its workers are in the program itself."""
    flink.create()
    flink.produce(4, 100)
    with flink.start(
        server,
        runner="FlinkRunner",
        flink_master="[local]",
        flink_job_server_jar=flink.cluster.job_server_jar,
        job_endpoint=None,
        environment_type=None,
        environment_config=None,
        until="caught_up",
    ) as run:
        assert run.wait().summary["records"] == 400
        # Beam's job server is a process of its own.
        wait_until(lambda: not run.left(), "it leaves processes behind")
    flink.check()


# -- streams ---------------------------------------------------------------------------------------


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        yield running


def _read_stream(
    flink: Flink, server: LambdaServer, kinesis: LocalKinesis, **options: Any
) -> sink.Sink:
    given = {
        "kafka_bootstrap_servers": None,
        "topics": None,
        "consumer_group": None,
        "response_topic": None,
        "kafka_reader": None,
        "stream": streams.STREAM,
        "lease_table": streams.TABLE,
        "lease_secs": 2,
        "stream_poll_secs": 0.2,
        "kinesis_endpoint_url": kinesis.url,
        "dynamodb_endpoint_url": kinesis.url,
        "envelope": "kinesis_event",
        **options,
    }
    return flink.start(server, **given)


def _checkpoint_of(kinesis: LocalKinesis, number: int) -> str:
    row = kinesis.tables.get(streams.TABLE, {}).get(f"shardId-{number:012d}", {})
    return str(row.get("checkpoint", {}).get("S", ""))


def _is_done(kinesis: LocalKinesis) -> bool:
    """Whether all there is of the open shards is committed."""
    return all(
        _checkpoint_of(kinesis, number) == str(records[-1].number)
        for number in kinesis.open_shards(streams.STREAM)
        if (records := kinesis.records(streams.STREAM, number))
    )


def test_shards_split_and_merge_around_a_savepoint(flink: Flink, kinesis: LocalKinesis) -> None:
    """Each record once, those of a key in order, and no child begun before its parents are done.
    Where the savepoint is gone on with a second time, what came behind it is repeated so, too."""
    kinesis.create_stream(streams.STREAM, 2)
    # 0 -> 2, 3; 1 and 3 -> 4; 4 -> 5, 6
    function, again = (streams.Watched(kinesis) for _ in range(2))
    texts = streams.put(kinesis, 200, "first")
    with sink.serve(function) as server:
        with _read_stream(flink, server, kinesis, batch_size=25) as run:
            run.until(lambda: bool(function.calls), "nothing came", WAIT_SECS)
            kinesis.split(streams.STREAM, 0)
            texts += streams.put(kinesis, 100, "second")
            run.until(lambda: len(function.texts()) == 300, "not all came", WAIT_SECS)
            run.until(lambda: _is_done(kinesis), "not all is committed", WAIT_SECS)
            # Another owner is refused while it lives.
            other = streams.run_on(kinesis, server, code=1, until="forever")
            assert "a streaming job shares none; stop it, or give another table" in other.stderr
            (job,) = flink.rest.running_jobs()
            savepoint = flink.rest.stop(job.id)
            run.wait()
        more = streams.put(kinesis, 50, "third")
        kinesis.merge(streams.STREAM, 1, 3)
        kinesis.split(streams.STREAM, 4)
        more += streams.put(kinesis, 100, "fourth")
        _go_on(flink, server, kinesis, savepoint)
        # Where a job has stopped the DirectRunner goes on.
        assert streams.run_on(kinesis, server).summary["records"] == 0
    assert sorted(text for _, _, data in function.calls for text in data) == sorted(texts + more)
    by_key = streams.by_key(kinesis, 7)
    assert streams.came_by_key(function) == by_key
    with sink.serve(again) as server:
        _go_on(flink, server, kinesis, savepoint)
    assert sorted(text for _, _, data in again.calls for text in data) == sorted(more)
    behind = {key: [text for text in own if text in more] for key, own in by_key.items()}
    assert streams.came_by_key(again) == behind
    assert function.too_early == again.too_early == []
    assert [_checkpoint_of(kinesis, number) for number in (0, 1, 3, 4)] == ["SHARD_END"] * 4


def _go_on(flink: Flink, server: LambdaServer, kinesis: LocalKinesis, savepoint: str) -> None:
    """Go on from a savepoint until 150 records are read, and drain: a shard's end closes its batch,
    whatever its window, and so does the drain."""
    options = {"batch_size": 1000, "batch_window_secs": 300, "savepoint_path": savepoint}
    with _read_stream(flink, server, kinesis, parallelism=4, **options) as run:
        job = flink.rest.wait_for_job()
        run.until(lambda: flink.read(job) == 150, "not all is read", WAIT_SECS)
        flink.rest.stop(job, drain=True)
        assert run.wait().summary["records"] == 150
    assert _is_done(kinesis)


def test_a_lost_process_costs_repeats_of_a_stream_and_no_record(
    flink: Flink, kinesis: LocalKinesis
) -> None:
    kinesis.create_stream(streams.STREAM, 2)
    function = streams.Watched(kinesis, secs=0.05)
    texts = streams.put(kinesis, 600, "first")
    with (
        sink.serve(function) as server,
        _read_stream(flink, server, kinesis, batch_size=10) as run,
    ):
        run.until(lambda: len(function.texts()) > 100, "nothing came", WAIT_SECS)
        (job,) = flink.rest.running_jobs()
        flink.rest.wait_for_checkpoints(job.id)
        kinesis.split(streams.STREAM, 0)
        texts += streams.put(kinesis, 200, "second")
        done = set(function.texts())
        for number in (0, 1):
            # Never past what was not answered.
            text = _checkpoint_of(kinesis, number)
            for each in kinesis.records(streams.STREAM, number):
                if text.isdecimal() and each.number <= int(text):
                    assert each.data.decode() in done
        _LOSE_TASKMANAGER(flink)
        run.until(lambda: len(function.texts()) == len(texts), "not all came", WAIT_SECS)
        run.until(lambda: _is_done(kinesis), "not all is committed", WAIT_SECS)
    assert sorted(function.texts()) == sorted(texts)
    assert streams.came_by_key(function) == streams.by_key(kinesis, 4)
    assert function.too_early == []
