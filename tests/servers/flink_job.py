"""A small streaming pipeline, to show what the local Flink cluster and Beam's runner do.

Kafka -> sums per partition in state -> Kafka. It has what the real pipeline relies on and nothing
else: a splittable reader, state, timers of both kinds, a write per bundle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.coders import VarIntCoder
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Duration
from confluent_kafka import Consumer, Producer, TopicPartition

_IDLE_SECS = 2
_POLL_SECS = 0.2
_FOR_EVER = 2**62

Partition = tuple[str, int]


def start(
    bootstrap_servers: str,
    topic: str,
    partitions: int,
    results: str,
    options: Sequence[str],
    emit_every_secs: float = 1,
) -> PipelineResult:
    """Submit it; returns when it is submitted.

    Args:
        bootstrap_servers: Of Kafka.
        topic: To read, from its beginning or from where a savepoint left it.
        partitions: Of the topic.
        results: The topic to write to: JSON, ``[partition, first offset, last offset, count]`` of
            records that came one after the other, and ``why``: the kind of the timer.
        options: The runner's.
        emit_every_secs: Between two results of a partition.
    """
    pipeline = beam.Pipeline(options=PipelineOptions([*options, "--streaming"]))
    chunks = (
        pipeline
        | "Partitions" >> beam.Create([(topic, partition) for partition in range(partitions)])
        | "Spread" >> beam.Reshuffle()
        | "Read"
        >> beam.ParDo(ReadPartitionFn(bootstrap_servers)).with_output_types(
            tuple[Partition, tuple[int, ...]]
        )
    )
    (
        chunks
        | "Sum" >> beam.ParDo(SumFn(emit_every_secs)).with_output_types(tuple[int, str])
        | "Write" >> beam.ParDo(WriteFn(bootstrap_servers, results))
    )
    return pipeline.run()


class _EndlessTracker(OffsetRestrictionTracker):
    """A reader may leave a partition without having claimed all of it: at a drain."""

    def check_done(self) -> None:
        pass


class _Offsets(RestrictionProvider):
    def initial_restriction(self, element: Any) -> OffsetRange:
        return OffsetRange(0, _FOR_EVER)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return _EndlessTracker(restriction)

    def restriction_size(self, element: Any, restriction: OffsetRange) -> int:
        return 1


FROM_THE_FIRST_ON = beam.DoFn.RestrictionParam(_Offsets())
"""The offsets of what has no end; any element's."""


class ReadPartitionFn(beam.DoFn):
    """Read a partition for ever, from where it was left."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._servers = bootstrap_servers

    def setup(self) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": self._servers,
                "group.id": "flink-job",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                # Less than it is polled for: the broker answers the fetch for the partition
                # before this one first, and if that has nothing, only after so long.
                "fetch.wait.max.ms": 20,
            }
        )
        self._back_at: dict[Partition, float] = {}

    def teardown(self) -> None:
        self._consumer.close()

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: Partition,
        tracker: Any = FROM_THE_FIRST_ON,
    ) -> Iterator[tuple[Partition, tuple[int, ...]]]:
        # Flink calls a reader back at once, whatever it asked for, only when the job is drained.
        if time.monotonic() < self._back_at.pop(element, 0.0) - _IDLE_SECS / 2:
            return
        position = tracker.current_restriction().start
        self._consumer.assign([TopicPartition(*element, position)])
        deadline = time.monotonic() + _POLL_SECS
        while time.monotonic() < deadline:
            messages = self._consumer.consume(1000, timeout=_POLL_SECS)
            offsets = tuple(m.offset() for m in messages if m.error() is None)
            if offsets:
                if not tracker.try_claim(offsets[-1]):
                    return
                deadline = time.monotonic() + _POLL_SECS
                yield element, offsets
        self._back_at[element] = time.monotonic() + _IDLE_SECS
        tracker.defer_remainder(Duration(_IDLE_SECS))


class SumFn(beam.DoFn):
    """Emit what came for a partition now and then, and at the end of the input."""

    OFFSETS = BagStateSpec("offsets", VarIntCoder())
    NOW_AND_THEN = TimerSpec("now_and_then", TimeDomain.REAL_TIME)
    AT_THE_END = TimerSpec("at_the_end", TimeDomain.WATERMARK)

    def __init__(self, emit_every_secs: float) -> None:
        self._emit_every_secs = emit_every_secs
        self._records = Metrics.counter("sum", "records")
        self._chunk_records = Metrics.distribution("sum", "chunk_records")

    def process(
        self,
        element: tuple[Partition, tuple[int, ...]],
        offsets: Any = beam.DoFn.StateParam(OFFSETS),
        now_and_then: Any = beam.DoFn.TimerParam(NOW_AND_THEN),
        at_the_end: Any = beam.DoFn.TimerParam(AT_THE_END),
        window: Any = beam.DoFn.WindowParam,
    ) -> None:
        for offset in element[1]:
            offsets.add(offset)
        self._records.inc(len(element[1]))
        self._chunk_records.update(len(element[1]))
        now_and_then.set(time.time() + self._emit_every_secs)
        at_the_end.set(min(window.end, MAX_TIMESTAMP))

    @on_timer(NOW_AND_THEN)
    def emit_now(
        self,
        key: Partition = beam.DoFn.KeyParam,
        offsets: Any = beam.DoFn.StateParam(OFFSETS),
    ) -> Iterator[tuple[int, str]]:
        yield from _emit(key, offsets, "real time")

    @on_timer(AT_THE_END)
    def emit_last(
        self,
        key: Partition = beam.DoFn.KeyParam,
        offsets: Any = beam.DoFn.StateParam(OFFSETS),
        now_and_then: Any = beam.DoFn.TimerParam(NOW_AND_THEN),
    ) -> Iterator[tuple[int, str]]:
        # Left pending it would hold the watermark, and the drain would wait for ever.
        now_and_then.clear()
        yield from _emit(key, offsets, "watermark")


def _emit(key: Partition, offsets: Any, why: str) -> Iterator[tuple[int, str]]:
    found = sorted(offsets.read())
    if found:
        offsets.clear()
        result = {"sum": [key[1], found[0], found[-1], len(found)], "why": why}
        yield key[1], json.dumps(result)


class WriteFn(beam.DoFn):
    """Write, and let the bundle end only when Kafka has all of it."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._servers, self._topic = bootstrap_servers, topic

    def setup(self) -> None:
        self._producer = Producer({"bootstrap.servers": self._servers, "linger.ms": 0})

    def process(self, element: tuple[int, str]) -> None:
        self._producer.produce(self._topic, element[1].encode(), str(element[0]).encode())

    def finish_bundle(self) -> None:
        if self._producer.flush(30):
            raise RuntimeError("results were not written")
