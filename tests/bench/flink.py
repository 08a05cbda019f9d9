"""The benchmark on a Flink cluster: both readers beside the DirectRunner, on this machine's broker.

``./run.sh bench --runner=flink [--records 1000000] [--partitions 4] [--repeat 1]``

The cluster is JobManager, TaskManager and worker pool as processes of their own, parallelism 2 with
a worker for each subtask, a checkpoint every 10 s: what the pipeline sets for its user. The
DirectRunner has two workers beside it. A job takes its seconds to be submitted and to begin,
whatever it has to do; so its records/s are counted from the first call of the function to the last
reply, and the DirectRunner's in the same way. The processor's time is counted from when the
function has got a quarter of the records to where all is committed, by the records that were left:
by then each worker has imported and made what it does once. It is told apart for the Python
processes and for Flink's JVMs. The first run on Flink does not count: its JVMs compile.

Besides how soon a record is answered on Flink, as `tests.bench.latency` has it, at 100 records/s,
with the native reader.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from tests.bench import latency, stub
from tests.bench.common import CREDENTIALS, PIPELINE, chosen, cpu_secs, table, verdict
from tests.bench.generator import Generated
from tests.bench.topics import Topics, WrongResult
from transforms.lanes import Lanes

DIRECT, NATIVE, BEAM = "DirectRunner", "Flink, native reader", "Flink, Beam's reader"
READERS = {NATIVE: "native", BEAM: "beam"}
COMPETITORS = (DIRECT, *READERS)

# The share of the records behind which the processor's time is counted.
_BEGUN = 0.25

_PARALLELISM = 2
_BATCHES = (1000, 100)
_RUN_SECS = 900.0
_JVMS = ("jobmanager", "taskmanager-1")

# The smallest share of the DirectRunner's records/s that is aimed at, by batch size.
AIMS_OF_DIRECT = {1000: 0.8, 100: 1.0}
# And the most that a record may cost: as a multiple of the DirectRunner's, and in us.
AIM_PYTHON = 1.3
AIM_JVM_US = 10.0
# In ms.
AIMS_LATENCY = {"p50": 150.0, "p99": 500.0}

_RATE = 100.0
_LATENCY_SECS = 15.0
# The workers' code is new to the JVM, as the job is.
_LATENCY_WARM_UP_SECS = 10.0


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
        counted: Records that were not handed to the function yet when the processor's time began
            to be counted.
        python_secs: Processor's time of the workers, or of the DirectRunner's processes.
        jvm_secs: The same of JobManager and TaskManager; 0 without them.
        checkpoints: How many the job completed.
    """

    who: str
    batch_size: int
    records: int
    calling_secs: float
    secs: float
    counted: int
    python_secs: float
    jvm_secs: float
    checkpoints: int


@dataclass(frozen=True)
class Latency:
    """How soon records were answered on Flink, in ms, and shares of a processor in percent."""

    p50: float
    p95: float
    p99: float
    max: float
    python_percent: float
    jvm_percent: float


class FlinkBench:
    """A broker, a cluster, and what runs on them."""

    def __init__(
        self, broker: KafkaBroker, cluster: FlinkCluster, extra: Sequence[str] = ()
    ) -> None:
        self._broker = broker
        self._cluster = cluster
        self._extra = extra
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
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                begun = load.records * _BEGUN
                self._wait(process, output, lambda: _stats(url).records > begun, 0.05)
                python_before, jvm_before = self._cpu_secs(who, process)
                before = _stats(url).records
                self._wait(process, output, lambda: self._is_committed(load, fresh), 0.2)
                secs = time.monotonic() - begin
                python_secs, jvm_secs = self._cpu_secs(who, process)
                checkpoints = end_jobs(self._cluster)
            finally:
                process.terminate()
                process.wait()
        stats = _stats(url)
        self._topics.check(load.topic, responses, Lanes())
        self._topics.check_committed(load.topic, fresh)
        self._topics.delete(responses)
        return FlinkRun(
            who=who,
            batch_size=load.batch_size,
            records=load.records,
            calling_secs=round(stats.last - stats.first, 3),
            secs=round(secs, 3),
            counted=load.records - before,
            python_secs=round(python_secs - python_before, 3),
            jvm_secs=round(jvm_secs - jvm_before, 3),
            checkpoints=checkpoints,
        )

    def _runner_options(self, who: str) -> list[str]:
        if who == DIRECT:
            return ["--runner=DirectRunner", f"--workers={_PARALLELISM}"]
        return [*flink_options(self._cluster, READERS[who]), *self._extra]

    def _cpu_secs(self, who: str, process: subprocess.Popen[bytes]) -> tuple[float, float]:
        """Processor's time so far of Python and of JVMs."""
        if who == DIRECT:
            return cpu_secs(process.pid), 0.0
        return python_secs_of(self._cluster), jvm_secs_of(self._cluster)

    def _is_committed(self, load: Load, group: str) -> bool:
        return sum(self._broker.committed(group, load.topic).values()) >= load.records

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        output: Any,
        holds: Callable[[], bool],
        every_secs: float,
    ) -> None:
        deadline = time.monotonic() + _RUN_SECS
        while not holds():
            if process.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                text = output.read().decode(errors="replace")
                raise WrongResult(f"it ended, or did not come to its end:\n{text}")
            time.sleep(every_secs)


class FlinkLatency(latency.Bench):
    """How soon a record is answered on a cluster."""

    def __init__(
        self,
        broker: KafkaBroker,
        cluster: FlinkCluster,
        extra: Sequence[str] = (),
        secs: float = _LATENCY_SECS,
        warm_up_secs: float = _LATENCY_WARM_UP_SECS,
    ) -> None:
        super().__init__(Topics(broker.bootstrap_servers), secs, warm_up_secs, appended=False)
        self._broker = broker
        self._cluster = cluster
        self._extra = extra
        self._jvm_percent = 0.0

    def figures(self, rate: float, partitions: int, url: str) -> Latency:
        """What it comes to at so many records a second, the function instant, no window.

        Raises:
            WrongResult: What is left is not what should be, or it cannot follow.
        """
        load = latency.Load(rate, partitions, 0, 0)
        try:
            run = super().measure(load, NATIVE, url)
        finally:
            # Not before the program has left it alone: it would say that its job has failed.
            end_jobs(self._cluster)
        if not run.follows:
            raise WrongResult(f"{load}: it cannot follow")
        times = (run.p50, run.p95, run.p99, run.max)
        return Latency(*times, run.cpu_percent, round(self._jvm_percent, 2))

    def _command(
        self, who: str, topic: str, responses: str, url: str, window_secs: float
    ) -> list[str]:
        command = super()._command(PIPELINE, topic, responses, url, window_secs)
        at = command.index("--runner=DirectRunner")
        command[at : at + 1] = flink_options(self._cluster, READERS[who])
        ours = (word for word in command if not word.startswith("--workers="))
        return [*ours, *self._extra]

    def _cpu_secs(self, process: subprocess.Popen[bytes]) -> float:
        return python_secs_of(self._cluster)

    def _generate(
        self, load: latency.Load, topic: str, process: subprocess.Popen[bytes]
    ) -> tuple[float, float, Generated]:
        before, begin = jvm_secs_of(self._cluster), time.monotonic()
        generated = super()._generate(load, topic, process)
        used = jvm_secs_of(self._cluster) - before
        self._jvm_percent = 100 * used / (time.monotonic() - begin)
        return generated

    def _wait_for_all(
        self,
        process: subprocess.Popen[bytes],
        records: int,
        rate: float,
        responses: str,
        url: str,
    ) -> bool:
        topic = responses.removesuffix("-out")
        follows = super()._wait_for_all(process, records, rate, responses, url)
        # Told to end, the program leaves at once, and what it began goes on.
        deadline = time.monotonic() + _RUN_SECS
        while follows and sum(self._broker.committed(topic, topic).values()) <= records:
            if time.monotonic() > deadline:
                raise WrongResult(f"not all is committed of {topic}")
            time.sleep(0.2)
        return follows


def flink_options(cluster: FlinkCluster, reader: str) -> list[str]:
    """What a pipeline is told to run on the cluster."""
    options = [
        "--runner=PortableRunner",
        f"--job_endpoint={cluster.job_endpoint}",
        "--environment_type=EXTERNAL",
        f"--environment_config={cluster.worker_pool}",
        f"--parallelism={_PARALLELISM}",
        # A worker for each subtask: Python runs one thread at a time.
        f"--sdk_worker_parallelism={_PARALLELISM}",
        f"--kafka_reader={reader}",
    ]
    if reader == "beam":
        options.append(f"--expansion_service={cluster.expansion_service}")
    return options


def python_secs_of(cluster: FlinkCluster) -> float:
    """Processor's time so far of the cluster's Python workers."""
    return cpu_secs(cluster.pid("worker-pool"))


def jvm_secs_of(cluster: FlinkCluster) -> float:
    """The same of JobManager and TaskManager."""
    return sum(cpu_secs(cluster.pid(name)) for name in _JVMS)


def end_jobs(cluster: FlinkCluster) -> int:
    """End what runs on the cluster; how many checkpoints it completed."""
    rest = cluster.rest
    completed = sum(rest.completed_checkpoints(job.id) for job in rest.running_jobs())
    rest.cancel_all()
    return completed


def _stats(url: str) -> stub.Stats:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return stub.Stats(**json.load(reply))


def summarize(runs: list[FlinkRun]) -> list[dict[str, Any]]:
    """A row for each batch size and each who: medians, and what of the DirectRunner's they are."""
    rows = []
    for batch_size in dict.fromkeys(run.batch_size for run in runs):
        direct: dict[str, Any] | None = None
        for who in COMPETITORS:
            own = [run for run in runs if (run.who, run.batch_size) == (who, batch_size)]
            if not own:
                continue
            rate = statistics.median(run.records / run.calling_secs for run in own)
            python = statistics.median(run.python_secs / run.counted for run in own) * 1e6
            row = {
                "who": who,
                "batch_size": batch_size,
                "records_per_sec": round(rate),
                "of_direct": None,
                "from_start_records_per_sec": round(
                    statistics.median(run.records / run.secs for run in own)
                ),
                "python_cpu_us": round(python, 1),
                "python_of_direct": None,
                "jvm_cpu_us": round(
                    statistics.median(run.jvm_secs / run.counted for run in own) * 1e6, 1
                ),
                "checkpoints": min(run.checkpoints for run in own),
            }
            if who == DIRECT:
                direct = row
            if direct:
                row["of_direct"] = round(rate / direct["records_per_sec"], 2)
                if direct["python_cpu_us"]:
                    row["python_of_direct"] = round(python / direct["python_cpu_us"], 2)
            rows.append(row)
    return rows


def judge(rows: list[dict[str, Any]], latencies: list[Latency]) -> list[dict[str, Any]]:
    """For each aim the native reader's figure and whether it holds; None if not measured."""
    verdicts = []

    def say(text: str, figure: float | None, holds: bool) -> None:
        known = figure is not None
        verdicts.append({"aim": text, "figure": figure, "holds": holds if known else None})

    for batch, least in AIMS_OF_DIRECT.items():
        found = [row for row in rows if (row["who"], row["batch_size"]) == (NATIVE, batch)]
        row = found[0] if found else {}
        share, python, jvm = map(row.get, ("of_direct", "python_of_direct", "jvm_cpu_us"))
        say(f"batch {batch}: >= {least:g} x DirectRunner", share, (share or 0) >= least)
        text = f"batch {batch}: Python CPU per record <= {AIM_PYTHON:g} x DirectRunner"
        say(text, python, (python or 0) <= AIM_PYTHON)
        text = f"batch {batch}: JVM CPU per record <= {AIM_JVM_US:g} us"
        say(text, jvm, (jvm or 0) <= AIM_JVM_US)
    for name, most in AIMS_LATENCY.items():
        figures = [getattr(each, name) for each in latencies]
        figure = statistics.median(figures) if figures else None
        say(f"{_RATE:g}/s: {name} <= {most:g} ms", figure, (figure or 0) <= most)
    return verdicts


def show(rows: list[dict[str, Any]], latencies: list[Latency]) -> None:
    """Print the rows as tables, and whether the aims are reached."""
    titles = ("batch", "who", "records/s", "of DirectRunner", "from the start")
    titles += ("Python CPU us/record", "of DirectRunner", "JVM CPU us/record", "checkpoints")
    lines = [
        (
            str(row["batch_size"]),
            row["who"],
            f"{row['records_per_sec']:,}",
            _share(row["of_direct"]),
            f"{row['from_start_records_per_sec']:,}",
            f"{row['python_cpu_us']}",
            _share(row["python_of_direct"]),
            f"{row['jvm_cpu_us']}",
            f"{row['checkpoints']}",
        )
        for row in rows
    ]
    if lines:
        print(table(titles, lines))
        print(
            f"\nDirectRunner: {_PARALLELISM} workers. records/s: from the first call to the last "
            "reply. From the start: from the start of the\nprogram to where all is committed. "
            "CPU: from when a quarter had been called. The stub, the broker and the cluster share\n"
            f"this machine's {os.cpu_count()} processors.\n"
        )
    if latencies:
        print(
            table(
                ("records/s", "p50 ms", "p95", "p99", "max", "Python CPU %", "JVM CPU %"),
                [
                    (f"{_RATE:g}", *(f"{figure:.0f}" for figure in asdict(each).values()))
                    for each in latencies
                ],
                names=1,
            )
        )
        print()
    for each in judge(rows, latencies):
        figure = "" if each["figure"] is None else f" ({each['figure']:g})"
        print(f"{verdict(each['holds'])}: {each['aim']}{figure}")


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def bench(options: argparse.Namespace) -> int:
    """Do it all; returns the exit code."""
    # The workers' credentials are those of the process that starts the pool.
    os.environ |= CREDENTIALS
    runs: list[FlinkRun] = []
    latencies: list[Latency] = []
    everybody = [who for who in COMPETITORS if chosen(who, list(COMPETITORS), options.only)]
    process, url = stub.start()
    try:
        with (
            KafkaBroker(compiled_well=True) as broker,
            FlinkCluster(job_server=True, expansion_service=BEAM in everybody) as cluster,
        ):
            on_flink = FlinkBench(broker, cluster, options.flink_option)
            small = on_flink.load(options.partitions, 2000, options.record_bytes)
            load = on_flink.load(options.partitions, options.records, options.record_bytes)
            # Untimed: what fails early, and what a JVM compiles only once; that takes more than a
            # few records, and a cluster that lives has it behind it.
            for who in everybody:
                print(f"warming up: {who}", file=sys.stderr)
                once = small if who == DIRECT else load
                on_flink.measure(replace(once, batch_size=_BATCHES[0]), who, url)
            for batch_size in options.batch or _BATCHES:
                for _ in range(options.repeat):
                    for who in everybody:
                        run = on_flink.measure(replace(load, batch_size=batch_size), who, url)
                        runs.append(run)
                        print(
                            f"batch {batch_size}: {who}: {run.records / run.calling_secs:,.0f} "
                            f"records/s, CPU us/record: Python "
                            f"{run.python_secs / run.counted * 1e6:.1f}, JVM "
                            f"{run.jvm_secs / run.counted * 1e6:.1f}",
                            file=sys.stderr,
                        )
            for _ in range(options.repeat if NATIVE in everybody else 0):
                measuring = FlinkLatency(broker, cluster, options.flink_option)
                latencies.append(measuring.figures(_RATE, options.partitions, url))
                print(f"{_RATE:g}/s: {latencies[-1]}", file=sys.stderr)
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        return 1
    finally:
        process.terminate()
        process.wait()
    rows = summarize(runs)
    show(rows, latencies)
    if options.json:
        result = {
            "records": options.records,
            "rows": rows,
            "aims": judge(rows, latencies),
            "runs": [asdict(run) for run in runs],
            "latencies": [asdict(each) for each in latencies],
        }
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0
