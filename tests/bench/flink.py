"""The benchmark on a Flink cluster: both readers beside the DirectRunner, on this machine's broker.

``./run.sh bench --runner=flink [--records 1000000] [--partitions 4] [--repeat 1]``

The cluster is JobManager, TaskManager and worker pool as processes of their own, parallelism 2 with
a worker for each subtask, a checkpoint every 10 s: what the pipeline sets for its user. A job takes
its seconds to be submitted and to begin, whatever it has to do; so its records/s are counted from
the first call of the function to the last reply, and the DirectRunner's beside it in the same way.
The processor's time is counted from the submission to the end, apart for the Python workers and for
Flink's JVMs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from tests.bench import stub
from tests.bench.common import CREDENTIALS, cpu_secs
from tests.bench.topics import Topics, WrongResult
from transforms.lanes import Lanes

DIRECT, NATIVE, BEAM = "DirectRunner", "Flink, native reader", "Flink, Beam's reader"
READERS = {NATIVE: "native", BEAM: "beam"}

# The smallest share of the DirectRunner's records/s that is aimed at.
AIM = 1.0

_PARALLELISM = 2
_BATCHES = (1000, 100)
_RUN_SECS = 900.0
_JVMS = ("jobmanager", "taskmanager-1")


@dataclass(frozen=True)
class Load:
    """What all are given to do: a filled topic, and how many records a call may have."""

    topic: str
    partitions: int
    records: int
    batch_size: int


@dataclass(frozen=True)
class FlinkRun:
    """The figures of one run; times in seconds.

    Attributes:
        calling_secs: From the first call the stub got to its last reply.
        secs: From the start of the program to where all is committed.
        python_secs: Processor's time of the workers, or of the DirectRunner's process.
        jvm_secs: The same of JobManager and TaskManager; 0 without them.
        checkpoints: How many the job completed.
    """

    who: str
    batch_size: int
    records: int
    calling_secs: float
    secs: float
    python_secs: float
    jvm_secs: float
    checkpoints: int


class FlinkBench:
    """A broker, a cluster, and what runs on them."""

    def __init__(self, broker: KafkaBroker, cluster: FlinkCluster) -> None:
        self._broker = broker
        self._cluster = cluster
        self._topics = Topics(broker.bootstrap_servers)

    def load(self, partitions: int, records: int, record_bytes: int) -> Load:
        """Fill a topic."""
        topic = f"bench-{uuid.uuid4().hex[:12]}"
        self._topics.create(topic, partitions)
        self._topics.fill(topic, partitions, records, record_bytes)
        return Load(topic, partitions, records, 0)

    def measure(self, load: Load, who: str, url: str) -> FlinkRun:
        """Let one do it; its figures after the results are checked.

        Raises:
            WrongResult: What is left is not what should be.
        """
        fresh = f"bench-{uuid.uuid4().hex[:12]}"
        responses = f"{fresh}-out"
        self._topics.create(responses, load.partitions)
        urllib.request.urlopen(urllib.request.Request(f"{url}/reset", method="POST")).close()
        command = [
            *(sys.executable, "-m", "pipeline"),
            f"--kafka_bootstrap_servers={self._broker.bootstrap_servers}",
            f"--topics={load.topic}",
            f"--consumer_group={fresh}",
            "--function=bench",
            f"--lambda_endpoint_url={url}",
            "--aws_region=us-east-1",
            f"--batch_size={load.batch_size}",
            f"--response_topic={responses}",
            "--summary=none",
            *self._runner_options(who),
        ]
        pool = self._cluster.pid("worker-pool")
        jvms = [self._cluster.pid(name) for name in _JVMS]
        python_before, jvm_before = cpu_secs(pool), sum(map(cpu_secs, jvms))
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                self._wait(process, load, fresh, output)
                secs = time.monotonic() - begin
                checkpoints = self._end_jobs()
                python_secs = cpu_secs(process.pid) if who == DIRECT else 0.0
            finally:
                process.terminate()
                process.wait()
        if who != DIRECT:
            python_secs = cpu_secs(pool) - python_before
        with urllib.request.urlopen(f"{url}/stats") as reply:
            stats = stub.Stats(**json.load(reply))
        self._topics.check(load.topic, responses, Lanes())
        self._topics.check_committed(load.topic, fresh)
        self._topics.delete(responses)
        return FlinkRun(
            who=who,
            batch_size=load.batch_size,
            records=load.records,
            calling_secs=round(stats.last - stats.first, 3),
            secs=round(secs, 3),
            python_secs=round(python_secs, 3),
            jvm_secs=round(sum(map(cpu_secs, jvms)) - jvm_before, 3) if who != DIRECT else 0.0,
            checkpoints=checkpoints,
        )

    def _runner_options(self, who: str) -> list[str]:
        if who == DIRECT:
            return ["--runner=DirectRunner"]
        options = [
            "--runner=PortableRunner",
            f"--job_endpoint={self._cluster.job_endpoint}",
            "--environment_type=EXTERNAL",
            f"--environment_config={self._cluster.worker_pool}",
            f"--parallelism={_PARALLELISM}",
            # A worker for each subtask: Python runs one thread at a time.
            f"--sdk_worker_parallelism={_PARALLELISM}",
            f"--kafka_reader={READERS[who]}",
        ]
        if READERS[who] == "beam":
            options.append(f"--expansion_service={self._cluster.expansion_service}")
        return options

    def _wait(self, process: subprocess.Popen[bytes], load: Load, group: str, output: Any) -> None:
        """Wait until all is committed."""
        deadline = time.monotonic() + _RUN_SECS
        while sum(self._broker.committed(group, load.topic).values()) < load.records:
            if process.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                text = output.read().decode(errors="replace")
                raise WrongResult(f"it ended, or did not come to its end:\n{text}")
            time.sleep(0.2)

    def _end_jobs(self) -> int:
        """End what runs on the cluster; how many checkpoints it completed."""
        rest = self._cluster.rest
        completed = sum(rest.completed_checkpoints(job.id) for job in rest.running_jobs())
        rest.cancel_all()
        return completed


def summarize(runs: list[FlinkRun]) -> list[dict[str, Any]]:
    """A row for each batch size and each who: medians, and what of the DirectRunner's they are."""
    rows = []
    for batch_size in dict.fromkeys(run.batch_size for run in runs):
        direct = None
        for who in (DIRECT, NATIVE, BEAM):
            own = [run for run in runs if (run.who, run.batch_size) == (who, batch_size)]
            if not own:
                continue
            rate = statistics.median(run.records / run.calling_secs for run in own)
            if who == DIRECT:
                direct = rate
            rows.append(
                {
                    "who": who,
                    "batch_size": batch_size,
                    "records_per_sec": round(rate),
                    "of_direct": round(rate / direct, 2) if direct else None,
                    "from_start_records_per_sec": round(
                        statistics.median(run.records / run.secs for run in own)
                    ),
                    "python_cpu_us": round(
                        statistics.median(run.python_secs / run.records for run in own) * 1e6, 1
                    ),
                    "jvm_cpu_us": round(
                        statistics.median(run.jvm_secs / run.records for run in own) * 1e6, 1
                    ),
                    "checkpoints": min(run.checkpoints for run in own),
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, and whether the aim is reached."""
    titles = ("batch", "who", "records/s", "of DirectRunner", "from the start")
    titles += ("Python CPU us/record", "JVM CPU us/record", "checkpoints")
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows:
        share = "" if row["of_direct"] is None else f"{row['of_direct']:.2f}"
        print(
            f"| {row['batch_size']} | {row['who']} | {row['records_per_sec']:,} | {share} "
            f"| {row['from_start_records_per_sec']:,} | {row['python_cpu_us']} "
            f"| {row['jvm_cpu_us']} | {row['checkpoints']} |"
        )
    print(
        "\nrecords/s: from the first call to the last reply. From the start: from the start of the "
        "program to where all is committed.\nThe stub, the broker and the cluster share this "
        f"machine's {os.cpu_count()} processors."
    )
    for row in rows:
        if row["who"] == NATIVE and row["of_direct"] is not None:
            holds = "holds" if row["of_direct"] >= AIM else "MISSED"
            print(
                f"{holds}: batch {row['batch_size']}: native reader on Flink >= {AIM:g} x "
                f"DirectRunner ({row['of_direct']:g})"
            )


def bench(options: argparse.Namespace) -> int:
    """Do it all; returns the exit code."""
    # The workers' credentials are those of the process that starts the pool.
    os.environ |= CREDENTIALS
    runs: list[FlinkRun] = []
    process, url = stub.start()
    try:
        with (
            KafkaBroker(compiled_well=True) as broker,
            FlinkCluster(job_server=True, expansion_service=True) as cluster,
        ):
            on_flink = FlinkBench(broker, cluster)
            small = on_flink.load(options.partitions, 2000, options.record_bytes)
            load = on_flink.load(options.partitions, options.records, options.record_bytes)
            everybody = [DIRECT, *READERS]
            # Untimed: what a JVM does only once, and what fails early.
            for who in everybody:
                print(f"warming up: {who}", file=sys.stderr)
                on_flink.measure(replace(small, batch_size=_BATCHES[0]), who, url)
            for batch_size in _BATCHES:
                for _ in range(options.repeat):
                    for who in everybody:
                        run = on_flink.measure(replace(load, batch_size=batch_size), who, url)
                        runs.append(run)
                        print(
                            f"batch {batch_size}: {who}: {run.records / run.calling_secs:,.0f} "
                            f"records/s",
                            file=sys.stderr,
                        )
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        return 1
    finally:
        process.terminate()
        process.wait()
    rows = summarize(runs)
    show(rows)
    if options.json:
        result = {"records": options.records, "rows": rows, "runs": [asdict(run) for run in runs]}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
