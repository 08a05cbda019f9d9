"""Redrive: error records -> RecordChunks of their originals, and Progress -> what is redriven.

The error topic is read by a consumer group of its own. An error record is redriven when all its
originals have come to an end again, and then never taken again: the group's committed offset is the
first error record that is not redriven, and what is redriven behind it is in the metadata of that
commit (docs/adr/0011-redrive.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from transforms.commit.committer import REFRESH_SECS, CommitConfig, Committer
from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig
from transforms.kafka.offsets import SourceConfig
from transforms.lanes import Lanes
from transforms.per_process import per_process
from transforms.records import PartitionKey, Progress, RecordChunk, Records
from transforms.redrive.ledger import METADATA_BYTES, Ledger
from transforms.redrive.selection import Selection


@dataclass(frozen=True, slots=True)
class RedriveConfig:
    """What is redriven.

    Attributes:
        kafka: The cluster, and the group that remembers what is redriven.
        error_topic: Where the error records are.
        selection: Which of them.
        topics: Topics whose originals are taken, empty with a regex.
        topics_regex: Regex for whole topic names, or None.
        lanes: How a partition's records are divided.
        limit: Error records to take at most; None for all.
        refresh_secs: How often what was committed is committed again.
    """

    kafka: KafkaConfig
    error_topic: str
    selection: Selection = Selection()
    topics: tuple[str, ...] = ()
    topics_regex: str | None = None
    lanes: Lanes = Lanes()
    limit: int | None = None
    refresh_secs: float | None = REFRESH_SECS


def _make_ledger(config: RedriveConfig) -> Ledger:
    return Ledger(config.lanes)


def shared_ledger(config: RedriveConfig) -> Ledger:
    """This process's ledger for the config."""
    return per_process(_make_ledger, config)


def _make_committer(config: RedriveConfig) -> Committer:
    source = SourceConfig(config.kafka, (config.error_topic,))
    return Committer(CommitConfig(source, refresh_secs=config.refresh_secs))


def marks(config: RedriveConfig) -> dict[PartitionKey, int]:
    """By partition of the error topic, the first error record that is not redriven."""
    partitions = shared_ledger(config).partitions.items()
    return {(config.error_topic, number): redriven.commit()[0] for number, redriven in partitions}


def commit(config: RedriveConfig) -> None:
    """Commit what is redriven now.

    Raises:
        KafkaError: It cannot be committed.
    """
    committer = per_process(_make_committer, config)
    offsets, metadata = {}, {}
    for partition, redriven in shared_ledger(config).partitions.items():
        key = (config.error_topic, partition)
        offsets[key], metadata[key] = redriven.commit()
        if len(metadata[key]) > METADATA_BYTES:
            raise KafkaError(cannot_remember(config))
    committer.commit(offsets, metadata)


def refresh(config: RedriveConfig, now: bool = False) -> None:
    """Commit again what was committed, if it is time to; see `Committer.refresh`."""
    per_process(_make_committer, config).refresh(now)


def cannot_remember(config: RedriveConfig) -> str:
    """Why nothing more is taken."""
    return (
        f"--error_topic={config.error_topic}: too many single error records would be redriven "
        f"between others that are left out; Kafka keeps {METADATA_BYTES} bytes to remember them. "
        f"Redrive the others too, or go on with another --redrive_group"
    )


class TakeRedriven(beam.PTransform):
    """Hand out what the process's ledger has. Bounded; order: offsets rise per lane.

    Args:
        config: What is redriven.
    """

    def __init__(self, config: RedriveConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[RecordChunk]:
        return (
            root
            | "Begin" >> beam.Impulse()
            | "Take" >> beam.ParDo(_TakeFn(self._config)).with_output_types(RecordChunk)
        )


class _TakeFn(beam.DoFn):
    def __init__(self, config: RedriveConfig) -> None:
        self._config = config
        self._records = beam.metrics.Metrics.counter("read", "records")

    def process(self, _: bytes) -> Iterator[RecordChunk]:
        chunks = shared_ledger(self._config).take()
        self._records.inc(sum(len(chunk.records) for chunk in chunks))
        # As in a round: what earlier ones began is collected only if something reaches the steps.
        yield from chunks or [RecordChunk("", 0, 0, 0, Records(), lane=0)]


class CommitRedriven(beam.PTransform):
    """Commit which error records are redriven, once per bundle.

    Comes after Write, so an error record counts as redriven only when what became of its
    originals is acknowledged.

    Args:
        config: What is redriven.
    """

    def __init__(self, config: RedriveConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, progress: beam.PCollection[Progress]) -> beam.PCollection[Any]:
        return progress | "CommitGroup" >> beam.ParDo(_CommitFn(self._config))


class _CommitFn(beam.DoFn):
    def __init__(self, config: RedriveConfig) -> None:
        self._config = config
        self._commits = beam.metrics.Metrics.counter("commit", "commits")

    def process(self, progress: Progress) -> Iterable[Any]:
        shared_ledger(self._config).finish(progress)
        return ()

    def finish_bundle(self) -> Iterator[Any]:
        commit(self._config)
        self._commits.inc()
        yield from ()
