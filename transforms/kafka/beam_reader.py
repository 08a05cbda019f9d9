"""Read: Beam's ReadFromKafka -> RecordChunk. The reader of streaming runs that is Java.

Each record comes as a row of its own; here rows become chunks again, right behind the read. A row
does not say where its predecessor ended, so nothing can be waited for: the order is that in which
the reader hands them over. What was overtaken on its way is not lost, but invoked by itself; should
the run crash before that, its offsets may be committed already. A position that retention has taken
is for Java's consumer to handle, as "auto.offset.reset" says: it goes on at the first offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.kafka import ReadFromKafka, default_io_expansion_service
from apache_beam.transforms.external import JavaJarExpansionService
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from confluent_kafka import KafkaException, TopicPartition

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, make_consumer, reason
from transforms.records import (
    EVERY_LANE,
    NO_TIMESTAMP,
    PartitionKey,
    Progress,
    RecordChunk,
    Records,
)

_CHUNK_RECORDS = 1_000
_FIND_SECS = 10
_ASK_SECS = 30.0
_LOG_APPEND_TIME = 1  # Java's number for a timestamp that the broker has set

AS_SOURCE = "use_deprecated_read"
"""Beam's name, among its experiments, for reading by a source of the runner's own."""

# The reader runs inside the TaskManager, not in a container beside it.
_IN_FLINK = ("--defaultEnvironmentType=EMBEDDED",)

_POLL_SECS = 1
"""How long a partition without records is waited for: Beam's least. A job that restarts shares its
consumers with what is left of the attempt before, which ends with the poll under way."""

_DEFAULT_POLL_SECS = 2
"""Beam's own, without which it does not read as a source."""

_BYTES = "org.apache.kafka.common.serialization.ByteArrayDeserializer"


@dataclass(frozen=True, slots=True)
class BeamReadConfig:
    """How ReadFromKafka reads.

    Attributes:
        kafka: The cluster and the group. Of a settings file nothing is used: the settings of the
            Java consumer become part of the job as it is submitted, so none may be a secret.
        topics: Topics by name.
        expansion_service: Address of an expansion service, or the path of its jar; None for
            Beam's own.
        in_flink: Whether the runner is Flink, which has the reader among its own classes.
        as_source: Whether it is to be a source of the runner's own, and not a splittable DoFn:
            then Flink can drain it, but it finds no partitions that come later.
        starts: Where the partitions begin that were there when the job was submitted.
    """

    kafka: KafkaConfig
    topics: tuple[str, ...]
    expansion_service: str | None = None
    in_flink: bool = False
    as_source: bool = False
    starts: tuple[tuple[PartitionKey, int], ...] = ()


class ReadRows(beam.PTransform):
    """Read with Beam's ReadFromKafka, and pack its rows.

    Delivery: what a runner's checkpoint holds is read from there on; without one, from the
    group's committed offsets on. Order: offsets rise per partition, as far as the runner keeps
    the order between the read and the next step. Unbounded.
    """

    def __init__(self, config: BeamReadConfig) -> None:
        super().__init__()
        self._config = config

    def expand(
        self, root: beam.pvalue.PBegin
    ) -> tuple[beam.PCollection[RecordChunk], beam.PCollection[Progress]]:
        """The chunks, and where partitions begin (`EVERY_LANE`), as far as that is known."""
        config = self._config
        read = ReadFromKafka(
            consumer_config={
                "bootstrap.servers": config.kafka.bootstrap_servers,
                "group.id": config.kafka.group,
                "enable.auto.commit": "false",
                # Where there is no committed offset: that is a partition that was found later.
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
            },
            topics=list(config.topics),
            key_deserializer=_BYTES,
            value_deserializer=_BYTES,
            with_metadata=True,
            consumer_polling_timeout=_DEFAULT_POLL_SECS if config.as_source else _POLL_SECS,
            dynamic_read_poll_interval_seconds=None if config.as_source else _FIND_SECS,
            expansion_service=_service(config),
        )
        pack = beam.ParDo(_PackFn()).with_output_types(RecordChunk)
        begun = beam.ParDo(_BeginFn(config)).with_output_types(Progress)
        return (
            root | "ReadFromKafka" >> read | "Pack" >> pack,
            root | "Impulse" >> beam.Impulse() | "Begun" >> begun,
        )

    def display_data(self) -> dict[str, Any]:
        return {"topics": ",".join(self._config.topics)}


class _BeginFn(beam.DoFn):
    """Says where partitions begin: there where the reader does.

    A job that is restarted without a checkpoint begins anew, and its reader at what the group has
    committed by then. So the group is asked when that happens, not when the job is submitted.
    """

    def __init__(self, config: BeamReadConfig) -> None:
        self._config = config

    def process(self, _: bytes) -> Iterator[Progress]:
        consumer = make_consumer(self._config.kafka)
        try:
            asked = [TopicPartition(*key) for key, _ in self._config.starts]
            committed = consumer.committed(asked, timeout=_ASK_SECS) if asked else []
        except KafkaException as error:
            raise KafkaError(f"{describe(self._config.kafka)}: {reason(error)}") from None
        finally:
            consumer.close()
        offsets = {(found.topic, found.partition): found.offset for found in committed}
        for key, start in self._config.starts:
            begin = offsets[key] if offsets[key] >= 0 else start
            yield Progress(*key, begin, begin, EVERY_LANE)


def _service(config: BeamReadConfig) -> Any:
    """What expands the read: a service that runs, or a jar, started as the runner needs it."""
    given = config.expansion_service
    if given and not given.endswith(".jar"):
        return given
    arguments = list(_IN_FLINK) if config.in_flink else []
    if config.as_source:
        arguments.append(f"--experiments={AS_SOURCE}")
    if given:
        return JavaJarExpansionService(given, append_args=arguments)
    return default_io_expansion_service(append_args=arguments)


class _PackFn(beam.DoFn):
    """Packs the rows of a bundle into chunks, per partition and in the order they came."""

    def __init__(self) -> None:
        self._records = beam.metrics.Metrics.counter("read", "records")
        self._rows: dict[PartitionKey, list[Any]] = {}

    def start_bundle(self) -> None:
        self._rows = {}

    def process(self, row: Any) -> Iterator[RecordChunk]:
        key = (row.topic, row.partition)
        rows = self._rows.setdefault(key, [])
        rows.append(row)
        if len(rows) == _CHUNK_RECORDS:
            del self._rows[key]
            yield self._pack(key, rows)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        window = GlobalWindow()
        for key, rows in self._rows.items():
            timestamp = max(row.timestamp for row in rows) / 1000
            yield WindowedValue(self._pack(key, rows), max(0, timestamp), (window,))
        self._rows = {}

    def _pack(self, key: PartitionKey, rows: list[Any]) -> RecordChunk:
        self._records.inc(len(rows))
        rows.sort(key=_offset)
        return RecordChunk(*key, rows[0].offset, rows[-1].offset + 1, to_columns(rows), first=True)


def _offset(row: Any) -> int:
    return int(row.offset)


def to_columns(rows: list[Any]) -> Records:
    """ReadFromKafka's rows as columns."""
    by_broker = [row.timestampTypeId == _LOG_APPEND_TIME for row in rows]
    return Records(
        [row.offset for row in rows],
        [row.timestamp if row.timestampTypeId >= 0 else NO_TIMESTAMP for row in rows],
        [row.key for row in rows],
        [row.value for row in rows],
        [[(h.key, h.value) for h in row.headers] if row.headers else None for row in rows],
        log_append=by_broker if any(by_broker) else (),
    )
