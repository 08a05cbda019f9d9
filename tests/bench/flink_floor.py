"""What Beam and Flink alone cost for each record: the pipeline's shape, and nothing done in it.

``python -m tests.bench.flink_floor [--rate 45000] [--secs 30] [--record_bytes 250]``

The same steps as the pipeline with the native reader, with the same states, timers and forms of
bytes on the wire and the options that the pipeline sets: a splittable DoFn for each partition,
which gives its work back at once; a keyed step, which keeps what comes and lets go of it; a keyed
step for what is done. But the reader makes up a chunk of as many bytes as records have become due
since its last one, nobody looks into it, and nothing is called, written or committed. What its
processes use of the processor is Beam's and Flink's, and is told for each of the records that the
bytes would have been. Flink tells what has come up to some ten seconds late, so a short time says
little.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.userstate import (
    BagRuntimeState,
    BagStateSpec,
    ReadModifyWriteRuntimeState,
    ReadModifyWriteStateSpec,
    RuntimeTimer,
    TimerSpec,
    on_timer,
)
from apache_beam.utils.timestamp import Duration, Timestamp

from pipeline.local.flink import FlinkCluster
from pipeline.local.processes import wait_until
from pipeline.submit.flink_metrics import get_json, job_counters
from pipeline.submit.streaming import runner_options
from tests.bench.common import CREDENTIALS
from tests.bench.flink import flink_options, jvm_secs_of, python_secs_of
from tests.servers.flink_job import FROM_THE_FIRST_ON

_PARTITIONS = 4
_CHUNK_RECORDS = 1000
_BAG_CHUNKS = 8
_COLLECT_SECS = 0.1
_START_SECS = 120.0
_WARM_UP_SECS = 30.0

Pair = tuple[str, bytes]


class Pace:
    """How many records have become due since it was asked last, and not more than a chunk has.

    Args:
        rate: Records per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._since: float | None = None

    def due(self, now: float) -> int:
        """What is due by now; what is more than half a second behind is not made up for."""
        self._since = now if self._since is None else max(self._since, now - 0.5)
        records = min(_CHUNK_RECORDS, int((now - self._since) * self._rate))
        self._since += records / self._rate
        return records


# Of this process: a key is read here as long as the job is not restored.
_paces: dict[str, Pace] = {}


class _ReadFn(beam.DoFn):
    def __init__(self, rate: float, record_bytes: int) -> None:
        self._rate = rate
        self._data = b"x" * (record_bytes * _CHUNK_RECORDS)
        self._record_bytes = record_bytes

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: str,
        tracker: Any = FROM_THE_FIRST_ON,
    ) -> Iterator[Pair]:
        given = tracker.current_restriction().start
        pace = _paces.setdefault(element, Pace(self._rate))
        while records := pace.due(time.monotonic()):
            given += records
            if not tracker.try_claim(given - 1):
                return
            yield element, self._data[: records * self._record_bytes]
            if records < _CHUNK_RECORDS:
                break
        tracker.defer_remainder(Duration.of(0))


class _KeepFn(beam.DoFn):
    PLACE = ReadModifyWriteStateSpec("floor_place", coders.BytesCoder())
    CHUNKS_0 = BagStateSpec("floor_chunks_0", coders.BytesCoder())
    CHUNKS_1 = BagStateSpec("floor_chunks_1", coders.BytesCoder())
    COLLECT = TimerSpec("floor_collect", beam.TimeDomain.REAL_TIME)

    def __init__(self, record_bytes: int) -> None:
        self._record_bytes = record_bytes
        self._records = beam.metrics.Metrics.counter("read", "records")

    def process(
        self,
        element: Pair,
        place: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        chunks_0: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_0),  # type: ignore[assignment]
        chunks_1: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_1),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
    ) -> Iterator[Pair]:
        key, data = element
        self._records.inc(len(data) // self._record_bytes)
        chunks = int(place.read() or b"0")
        bags = (chunks_0, chunks_1)
        bags[chunks // _BAG_CHUNKS % 2].add(data)
        chunks += 1
        if chunks % _BAG_CHUNKS == 0:
            bags[chunks // _BAG_CHUNKS % 2].clear()
        place.write(b"%0100d" % chunks)
        collect.set(Timestamp.of(time.time() + _COLLECT_SECS))
        yield key, b"%020d" % chunks

    @on_timer(COLLECT)
    def collect(
        self,
        key: str = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
    ) -> Iterator[Pair]:
        yield key, place.read()


class _DoneFn(beam.DoFn):
    DONE = ReadModifyWriteStateSpec("floor_done", coders.BytesCoder())

    def process(
        self,
        element: Pair,
        done: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(DONE),  # type: ignore[assignment]
    ) -> None:
        done.read()
        done.write(element[1])


def build(pipeline: beam.Pipeline, rate: float, record_bytes: int) -> None:
    """The pipeline's shape."""
    keys = [f"partition-{number}" for number in range(_PARTITIONS)]
    (
        pipeline
        | "Begin" >> beam.Impulse()
        | "Partitions" >> beam.FlatMap(lambda _: keys)
        | "Apart" >> beam.Reshuffle()
        | "Read" >> beam.ParDo(_ReadFn(rate / _PARTITIONS, record_bytes)).with_output_types(Pair)
        | "Keep" >> beam.ParDo(_KeepFn(record_bytes)).with_output_types(Pair)
        | "Done" >> beam.ParDo(_DoneFn())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.flink_floor")
    parser.add_argument("--rate", type=float, default=45000, help="records per second")
    parser.add_argument("--secs", type=float, default=30, help="to measure for")
    parser.add_argument("--record_bytes", type=int, default=250, help="on the wire")
    parser.add_argument("--flink_option", action="append", default=[], metavar="OPTION")
    options = parser.parse_args(arguments)
    # The workers' environment is that of the process that starts the pool.
    os.environ |= CREDENTIALS
    with FlinkCluster(job_server=True) as cluster:
        # The reader is the pipeline's own option, and not Beam's.
        given = [each for each in flink_options(cluster, "native") if "kafka_reader" not in each]
        words = runner_options("PortableRunner", [*given, *options.flink_option], bounded=False)
        pipeline = beam.Pipeline(options=PipelineOptions(words))
        build(pipeline, options.rate, options.record_bytes)
        pipeline.run()
        cluster.rest.wait_for_job()
        wait_until(lambda: _figures(cluster)[0] > 0, "no record has come", _START_SECS)
        time.sleep(_WARM_UP_SECS)
        before = _figures(cluster)
        time.sleep(options.secs)
        records, python, jvm = (b - a for a, b in zip(before, _figures(cluster), strict=True))
        cluster.rest.cancel_all()
    print(
        f"{records / options.secs:,.0f} records/s: Python {python / records * 1e6:.1f} us a record,"
        f" JVM {jvm / records * 1e6:.1f}"
    )
    return 0


def _figures(cluster: FlinkCluster) -> tuple[float, float, float]:
    """So far: records that have come to the keyed step, processor's time of Python and JVMs."""
    (job,) = cluster.rest.running_jobs()
    counted = job_counters(get_json(cluster.address), f"{job.name}_")
    return (counted or {}).get("read.records", 0), python_secs_of(cluster), jvm_secs_of(cluster)


if __name__ == "__main__":
    # The workers import the steps by their module's name, and so share the paces.
    from tests.bench import flink_floor

    sys.exit(flink_floor.main())
