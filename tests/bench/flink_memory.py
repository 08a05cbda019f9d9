"""A job that runs on a Flink cluster for an hour: does its memory grow?

``python -m tests.bench.flink_memory [--secs 3600] [--rate 100] [--every_secs 60] [--mended]``

One record in a hundred fails until it is given up, which goes to the error topic. From time to time
a line says what the TaskManager's JVM and each Python worker hold (resident memory), what lives in
the JVM's heap (after a collection) and how large the last checkpoint is. At the end: by how much
each grew in a minute over the second half of the time, by the line that fits best. A record that is
lost or has two outcomes is exit code 1. Needs a JDK.

The tests' Beam for Flink is older than 2.76, and its heap grows by itself; ``--mended`` takes that
one fault out of it (`tests.bench.flink_mended`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from tests.bench.common import CREDENTIALS, children_of
from tests.bench.flink import end_jobs, flink_options
from tests.bench.flink_mended import mended_jar
from tests.bench.topics import Topics
from tests.sink import FUNCTION, answer, assert_caught_up, assert_exactly_once, serve

_PARTITIONS = 4
_JVM, _POOL = "taskmanager-1", "worker-pool"

Sizes = Mapping[str, float]
"""In MB: each process's resident memory, what lives in the heap, and the last checkpoint."""


def growth(times_secs: Sequence[float], sizes_mb: Sequence[float]) -> float:
    """By how many MB a minute something grows, by the line that fits best. Pure."""
    middle = sum(times_secs) / len(times_secs)
    mean = sum(sizes_mb) / len(sizes_mb)
    spread = sum((each - middle) ** 2 for each in times_secs)
    if not spread:
        return 0.0
    pairs = zip(times_secs, sizes_mb, strict=True)
    return 60 * sum((at - middle) * (size - mean) for at, size in pairs) / spread


def fails_for_some(event: Any, _: Any) -> Any:
    """A function that fails where one record in a hundred is among its records."""
    if any(entry["payload"]["value"]["id"] % 100 == 0 for entry in event):
        raise ValueError("one of a hundred")
    return answer(event)


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(found[0]) / 1024 if found else 0.0


def _live_heap_mb(pid: int) -> float:
    # The last line is "Total", how many, how many bytes.
    done = subprocess.run(
        ["jmap", "-histo:live", str(pid)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1]) / 2**20


def _checkpoint_mb(cluster: FlinkCluster, job: str) -> float:
    last = cluster.rest.checkpoints(job)["latest"]["completed"]
    return float(last["state_size"]) / 2**20 if last else 0.0


def sizes(cluster: FlinkCluster, job: str) -> dict[str, float]:
    """What the cluster's processes hold that run the job's steps, and the job's last checkpoint.

    Raises:
        AssertionError: The TaskManager has ended.
    """
    jvm, pool = cluster.pid(_JVM), cluster.pid(_POOL)
    assert jvm and pool
    found = {"JVM": _resident_mb(jvm)}
    assert found["JVM"], "the TaskManager has ended; its log says why"
    found["heap"] = _live_heap_mb(jvm)
    found["checkpoint"] = _checkpoint_mb(cluster, job)
    for number, pid in enumerate(sorted(children_of(pool)), start=1):
        found[f"worker {number}"] = _resident_mb(pid)
    return found


def run_on(
    broker: KafkaBroker, cluster: FlinkCluster, url: str, options: argparse.Namespace
) -> list[tuple[float, Sizes]]:
    """Let it run; what was seen when, in seconds since the first record was written.

    Raises:
        AssertionError: A record has no outcome, or two.
    """
    source = f"memory-{uuid.uuid4().hex[:8]}"
    topics = Topics(broker.bootstrap_servers)
    for name in (source, f"{source}-out", f"{source}-errors"):
        topics.create(name, _PARTITIONS)
    command = [
        *(sys.executable, "-m", "pipeline"),
        f"--kafka_bootstrap_servers={broker.bootstrap_servers}",
        f"--topics={source}",
        f"--consumer_group={source}",
        f"--function={FUNCTION}",
        f"--lambda_endpoint_url={url}",
        "--aws_region=us-east-1",
        f"--response_topic={source}-out",
        f"--error_topic={source}-errors",
        "--on_error=log",
        "--bisect_on_error",
        "--log_level=WARNING",
        "--max_retries=1",
        "--summary=none",
        *flink_options(cluster, "native"),
    ]
    generator = [
        *(sys.executable, "-m", "tests.bench.generator"),
        f"--bootstrap_servers={broker.bootstrap_servers}",
        f"--topic={source}",
        f"--rate={options.rate}",
        f"--secs={options.secs}",
        f"--partitions={_PARTITIONS}",
    ]
    seen: list[tuple[float, Sizes]] = []
    program = subprocess.Popen(command)
    writing: subprocess.Popen[bytes] | None = None
    try:
        job = cluster.rest.wait_for_job()
        writing = subprocess.Popen(generator, stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        while writing.poll() is None:
            time.sleep(options.every_secs)
            assert program.poll() is None, "the program has ended"
            secs = time.monotonic() - begin
            seen.append((secs, sizes(cluster, job)))
            print(f"{secs / 60:5.1f} min: {_line(seen[-1][1])}", flush=True)
        assert writing.returncode == 0, "not all was written"
        deadline = time.monotonic() + 300
        wanted = round(options.rate * options.secs)
        while sum(broker.committed(source, source).values()) < wanted:
            assert time.monotonic() < deadline, "not all is committed"
            time.sleep(1)
    finally:
        if writing is not None:
            writing.kill()
        end_jobs(cluster)
        program.terminate()
        program.wait()
    assert_caught_up(broker, source, source)
    assert_exactly_once(broker, source, [source], f"{source}-out", f"{source}-errors")
    return seen


def _line(found: Sizes) -> str:
    return ", ".join(f"{name} {size:.1f} MB" for name, size in found.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.flink_memory")
    parser.add_argument("--secs", type=float, default=3600)
    parser.add_argument("--rate", type=float, default=100, help="records per second")
    parser.add_argument("--every_secs", type=float, default=60, help="between two lines")
    parser.add_argument("--mended", action="store_true", help="mend Beam's issue 27648 first")
    options = parser.parse_args(arguments)
    # The workers' credentials are those of the process that starts the pool.
    os.environ |= CREDENTIALS
    with (
        TemporaryDirectory() as folder,
        serve(fails_for_some) as server,
        KafkaBroker() as broker,
        FlinkCluster(
            job_server=True, first_jar=mended_jar(Path(folder)) if options.mended else None
        ) as cluster,
    ):
        try:
            seen = run_on(broker, cluster, server.url, options)
        except AssertionError as error:
            print(f"wrong: {error}")
            return 1
    half = [(at, found) for at, found in seen if at >= options.secs / 2]
    names = [name for name in half[-1][1] if all(name in found for _, found in half)]
    times = [at for at, _ in half]
    grown = {name: round(growth(times, [f[name] for _, f in half]), 2) for name in names}
    last = {name: round(seen[-1][1][name], 1) for name in names}
    print(json.dumps({"last_mb": last, "mb_per_min": grown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
