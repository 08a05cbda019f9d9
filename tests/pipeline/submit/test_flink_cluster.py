"""The local Flink cluster does what runs on it are tested with, and so does Beam's runner."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.flink import FlinkCluster
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.servers import flink_job

PARTITIONS = 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[FlinkCluster]:
    """One that may lose any process."""
    with FlinkCluster(job_server=True, high_availability=True) as running:
        yield running


@pytest.fixture(autouse=True)
def no_job_is_left(mended: FlinkCluster) -> Iterator[None]:
    yield
    mended.rest.cancel_all()


class Run:
    """The small pipeline, what it gets and what came of it."""

    def __init__(self, cluster: FlinkCluster, broker: KafkaBroker, names: Names) -> None:
        self.rest = cluster.rest
        self._cluster, self._broker = cluster, broker
        self._topic, self._results = names.topic("records"), names.topic("results")
        self._written = 0
        broker.create_topic(self._topic, partitions=PARTITIONS)
        broker.create_topic(self._results, partitions=1)

    def start(
        self,
        *options: str,
        parallelism: int = 2,
        emit_every_secs: float = 1,
    ) -> str:
        """Submit it; the job's id once all of it runs."""
        known = {job.id for job in self.rest.jobs()}
        flink_job.start(
            self._broker.bootstrap_servers,
            self._topic,
            PARTITIONS,
            self._results,
            [
                "--runner=PortableRunner",
                f"--job_endpoint={self._cluster.job_endpoint}",
                "--environment_type=EXTERNAL",
                f"--environment_config={self._cluster.worker_pool}",
                f"--parallelism={parallelism}",
                "--checkpointing_interval=1000",
                "--finish_bundle_before_checkpointing",
                "--max_bundle_time_mills=200",
                *options,
            ],
            emit_every_secs,
        )
        return self.rest.wait_for_job(known)

    def produce(self, count: int) -> None:
        """Write so many records to each partition."""
        self._broker.produce(
            self._topic, [NewRecord(n % PARTITIONS, None, b"x") for n in range(count * PARTITIONS)]
        )
        self._written += count

    def counted(self, job: str) -> float:
        """How many records are in the sums, by Beam's metric."""
        task = self.rest.tasks(job)["[2]{Sum, Write}"]["id"]
        return sum(self.rest.metrics(job, task, r"\.sum_records$").values())

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(r.value or b"") for r in self._broker.read_all(self._results)]

    def wait_for_all(self) -> None:
        """Wait until every record of every partition is in a result."""
        wait_until(self._is_complete, "records are missing in the results", timeout=180)

    def assert_exactly_once_in_order(self) -> None:
        """Every partition's results follow one another without gap or overlap."""
        for partition in range(PARTITIONS):
            ranges = [r["sum"][1:] for r in self.results() if r["sum"][0] == partition]
            expected = 0
            for first, last, count in ranges:
                assert (first, count) == (expected, last - first + 1)
                expected = last + 1
            assert expected == self._written

    def _is_complete(self) -> bool:
        seen: dict[int, set[int]] = {partition: set() for partition in range(PARTITIONS)}
        for result in self.results():
            partition, first, last, _ = result["sum"]
            seen[partition].update(range(first, last + 1))
        return all(offsets == set(range(self._written)) for offsets in seen.values())


@pytest.fixture
def run(cluster: FlinkCluster, broker: KafkaBroker, names: Names) -> Run:
    return Run(cluster, broker, names)


def test_a_drain_fires_the_timers_at_the_end_of_the_input(run: Run) -> None:
    """What is in state comes out, and the job ends by itself."""
    job = run.start(emit_every_secs=3600)
    run.produce(100)
    wait_until(lambda: run.counted(job) == 100 * PARTITIONS, "not all is read", timeout=180)
    assert run.results() == []

    run.rest.stop(job, drain=True)

    assert run.rest.status(job) == "FINISHED"
    assert Counter(result["why"] for result in run.results()) == {"watermark": PARTITIONS}
    run.assert_exactly_once_in_order()


@pytest.mark.parametrize("victim", ["worker-pool", "taskmanager-1", "jobmanager"])
def test_a_job_goes_on_from_its_last_checkpoint_after_a_crash(
    run: Run, cluster: FlinkCluster, victim: str
) -> None:
    job = run.start()
    run.produce(100)
    run.wait_for_all()
    run.rest.wait_for_checkpoints(job, 2)

    cluster.kill(victim)
    run.produce(100)
    cluster.start(victim)

    run.rest.wait_until_restored(job)
    run.produce(100)
    run.wait_for_all()


def test_what_ended_by_itself_is_named_and_started_again(run: Run, cluster: FlinkCluster) -> None:
    job = run.start()
    run.produce(100)
    run.wait_for_all()
    pid = cluster.pid("taskmanager-1")
    assert pid is not None

    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "taskmanager-1: ended by itself" in cluster.describe(), "it is not told")
    assert cluster.mend() == ["taskmanager-1"]

    assert cluster.mend() == []
    run.rest.wait_until_restored(job)
    run.produce(100)
    run.wait_for_all()


def test_starting_over_leaves_no_job_and_a_cluster_that_works(
    run: Run, cluster: FlinkCluster
) -> None:
    run.start()
    worker_pool = cluster.pid("worker-pool")
    assert worker_pool is not None
    os.kill(worker_pool, signal.SIGSTOP)

    cluster.start_over()

    assert run.rest.running_jobs() == []
    assert cluster.pid("worker-pool") != worker_pool
    run.start()
    run.produce(100)
    run.wait_for_all()


def test_a_stopped_job_is_resumed_with_another_parallelism(run: Run) -> None:
    """Nothing is lost and nothing comes twice."""
    job = run.start(parallelism=2)
    run.produce(100)
    run.wait_for_all()
    run.produce(100)

    savepoint = run.rest.stop(job)
    run.produce(100)
    run.start(f"--savepoint_path={savepoint}", parallelism=4)

    run.wait_for_all()
    run.assert_exactly_once_in_order()


def test_a_cancelled_job_is_resumed_from_its_last_checkpoint(run: Run) -> None:
    """What is left when a JobManager without ZooKeeper dies: the folder of the checkpoints."""
    # Of the cluster's own setting for this Beam's jobs know nothing.
    job = run.start(
        "--externalized_checkpoints_enabled", "--retain_externalized_checkpoints_on_cancellation"
    )
    run.produce(100)
    run.wait_for_all()
    run.rest.wait_for_checkpoints(job, 2)

    run.rest.cancel(job)
    # Asked now: until it was cancelled each new checkpoint took the place of the one before.
    checkpoint = run.rest.latest_checkpoint(job)
    run.produce(100)
    run.start(f"--savepoint_path={checkpoint}")

    run.wait_for_all()
