"""Write: Finished -> Progress, once its responses and error records are acknowledged by Kafka.

Own producers instead of Beam's WriteToKafka, which gives nothing that a commit could wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
import orjson
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Producer

from transforms.coding import SizedPickleCoder
from transforms.decode.registry import RegistryConfig, shared_registry
from transforms.decode.schemas import DecodeError
from transforms.envelope import Envelope
from transforms.errors import RegistryError, WriteError
from transforms.kafka.client import KafkaConfig, client_settings, make_producer, reason
from transforms.per_process import per_process
from transforms.records import Failure, Finished, Progress, Responses, halt_name
from transforms.write import formats
from transforms.write.destination import destination_records
from transforms.write.formats import (
    OutputFormat,
    error_facts,
    error_records,
    range_key,
    response_keys,
    response_values,
)

_LOGGER = logging.getLogger(__name__)

_FLUSH_SECS = 10.0
_BY_KEY = -1  # librdkafka's number for: as the partitioner says


@dataclass(frozen=True, slots=True)
class WriteConfig:
    """Where outcomes go.

    Attributes:
        kafka: The cluster.
        function: The function's name as given, for error records.
        response_topic: Topic of the responses; None if they are not kept.
        error_topic: Topic of the error records; None for the log.
        on_error: ``fail``, ``log`` or ``ignore``.
        response_format: One of `transforms.write.formats.FORMATS`, or `AVRO`.
        error_format: The same for error records.
        max_error_bytes: Size of an error record above which it is divided.
        registry: Where the schemas of the format `AVRO` are; None if there is no registry.
        destination: How AWS's error records show where records are from; None for the
            connector's error records.
    """

    kafka: KafkaConfig
    function: str
    response_topic: str | None = None
    error_topic: str | None = None
    on_error: str = "fail"
    response_format: str = "json"
    error_format: str = "json"
    max_error_bytes: int = 1_000_000
    registry: RegistryConfig | None = None
    destination: Envelope | None = None


class TopicWriter:
    """An idempotent producer bound to one topic, for all bundles of a process.

    What was not delivered is noted in the list that the bundle gives with each write, so that no
    bundle answers for another one's records.

    Args:
        topic: Where to write.
        settings: Producer settings, as librdkafka has them.
    """

    def __init__(self, topic: str, settings: dict[str, Any]) -> None:
        self.topic = topic
        self._producer: Producer = make_producer(settings)
        self._partitions = 0
        self._turn = 0

    def write_all(
        self, source_partition: int, messages: list[dict[str, Any]], failures: list[str]
    ) -> None:
        """Queue messages in order. Waits while the producer's queue is full.

        Everything from one source partition goes to one partition of the topic, so that its
        readers see the source's order.
        """
        partition = source_partition % self._count_partitions()
        note = partial(_note_failure, failures)
        while messages:
            self._producer.produce_batch(
                self.topic, messages, partition=partition, on_delivery=note
            )
            refused = [message for message in messages if "_error" in message]
            for message in refused:
                error = message.pop("_error")
                if error.code() != ErrorCode._QUEUE_FULL:
                    raise WriteError(self._failed(error.str()))
            messages = refused
            self._producer.poll(0.1 if messages else 0)

    def write(
        self,
        source_partition: int | None,
        key: bytes | None,
        value: bytes,
        headers: list[tuple[str, bytes]],
        failures: list[str],
    ) -> None:
        """Queue one message with headers. Waits while the producer's queue is full.

        Without a source partition to follow, its key says which partition it goes to; those
        without a key take turns.
        """
        if source_partition is not None:
            partition = source_partition % self._count_partitions()
        elif key is not None:
            partition = _BY_KEY
        else:
            partition = self._turn % self._count_partitions()
            self._turn += 1
        note = partial(_note_failure, failures)
        while True:
            try:
                self._producer.produce(
                    self.topic,
                    value,
                    key,
                    partition,
                    headers=headers,
                    on_delivery=note,
                )
                return
            except BufferError:
                self._producer.poll(0.1)

    def flush(self, failures: list[str]) -> None:
        """Wait until everything is acknowledged.

        Raises:
            WriteError: A message was not delivered within librdkafka's `message.timeout.ms`.
        """
        while self._producer.flush(_FLUSH_SECS):
            _LOGGER.warning("waiting for Kafka to acknowledge records of topic %s", self.topic)
        if failures:
            raise WriteError(self._failed(failures[0]))

    def _failed(self, why: str) -> str:
        return (
            f"a record of topic {self.topic} was not acknowledged: {why}; nothing behind it is "
            f"committed, run again once this is mended"
        )

    def problem(self) -> str | None:
        """Why the topic cannot be written, None if it can. Counts its partitions on the way.

        To ask for a topic by its name is what makes a broker create it, where it is set to.
        """
        try:
            metadata = self._producer.list_topics(self.topic, timeout=15).topics[self.topic]
        except KafkaException as error:
            return f"the brokers cannot be reached: {reason(error)}"
        self._partitions = len(metadata.partitions)
        if metadata.error is not None:
            return f"{metadata.error.str()}; create it first"
        return None if self._partitions else "it has no partitions yet"

    def _count_partitions(self) -> int:
        if not self._partitions and (why := self.problem()):
            raise WriteError(self._failed(why))
        return self._partitions


def _note_failure(failures: list[str], error: Any, message: Any) -> None:
    if error is not None:
        failures.append(error.str())


def _make_response_writer(config: WriteConfig) -> TopicWriter:
    assert config.response_topic
    return TopicWriter(config.response_topic, client_settings(config.kafka, "response."))


def _make_error_writer(config: WriteConfig) -> TopicWriter:
    assert config.error_topic
    settings = client_settings(config.kafka, "error.")
    if config.destination:
        # As Java's producers place keys, and so AWS.
        settings = {"partitioner": "murmur2_random"} | settings
    return TopicWriter(config.error_topic, settings)


def response_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the response topic; needs `config.response_topic`."""
    return per_process(_make_response_writer, config)


def error_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the error topic; needs `config.error_topic`."""
    return per_process(_make_error_writer, config)


def _make_response_format(which: tuple[WriteConfig, bool]) -> OutputFormat:
    config, ranges = which
    if config.response_format != formats.AVRO or not config.response_topic:
        return config.response_format
    assert config.registry
    schemas = formats.RANGE_RESPONSE_SCHEMAS if ranges else formats.RESPONSE_SCHEMAS
    return _avro_encoders(config.registry, config.response_topic, schemas)


def _make_error_format(config: WriteConfig) -> OutputFormat:
    if config.error_format != formats.AVRO or not config.error_topic:
        return config.error_format
    assert config.registry
    return _avro_encoders(config.registry, config.error_topic, formats.ERROR_SCHEMAS)


def _avro_encoders(
    registry: RegistryConfig, topic: str, schemas: tuple[str, str]
) -> formats.AvroEncoders:
    """Encoders for a topic's records, by what its subjects have.

    Raises:
        RegistryError: A subject has another schema than ours.
    """
    from transforms.decode.avro import avro_encoder

    encoders = []
    for part, schema in zip(("key", "value"), schemas):
        subject = f"{topic}-{part}"
        id, found = shared_registry(registry).subject_schema(subject, schema)
        try:
            encoders.append(avro_encoder(id, found, like=schema))
        except DecodeError as error:
            raise RegistryError(
                f"schema {id} of subject {subject} does not do for what is written: {error}"
            ) from None
    return formats.AvroEncoders(*encoders)


def response_format(config: WriteConfig, ranges: bool) -> OutputFormat:
    """How responses are written; for `AVRO` this process's encoders.

    Args:
        config: The config of the step.
        ranges: Whether one response answers several records, by their range of offsets.
    """
    return per_process(_make_response_format, (config, ranges))


def error_format(config: WriteConfig) -> OutputFormat:
    """How error records are written; for `AVRO` this process's encoders."""
    return per_process(_make_error_format, config)


class WriteToKafka(beam.PTransform):
    """Write responses and error records, then say how far each partition is done.

    At least once; order per lane of a source partition is kept in the response topic. An element's
    `Progress` comes out only when all its records are acknowledged; a failed delivery fails
    the bundle. Failures of halted partitions are not written: their records will be read again.
    """

    def __init__(self, config: WriteConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, finished: beam.PCollection[Finished]) -> beam.PCollection[Progress]:
        return finished | "Produce" >> beam.ParDo(_ProduceFn(self._config)).with_output_types(
            Progress
        )

    def display_data(self) -> dict[str, Any]:
        return {
            "response_topic": self._config.response_topic or "",
            "error_topic": self._config.error_topic or "",
        }


class _ProduceFn(beam.DoFn):
    def __init__(self, config: WriteConfig) -> None:
        self._config = config
        counter = beam.metrics.Metrics.counter
        self._responses = counter("write", "responses")
        self._errors = counter("write", "errors")
        self._error_records = counter("write", "error_records")
        self._progress: list[Progress] = []
        self._failures: list[str] = []

    def start_bundle(self) -> None:
        self._progress = []
        self._failures = []

    def process(self, finished: Finished) -> None:
        for part in finished.parts:
            if isinstance(part, Responses):
                self._write_responses(finished, part)
            else:
                self._write_failure(finished, part)
        if finished.start < finished.next_offset or finished.halted:
            self._progress.append(
                Progress(
                    finished.topic,
                    finished.partition,
                    finished.start,
                    finished.next_offset,
                    finished.lane,
                    halt_name(finished),
                )
            )

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._config.response_topic:
            response_writer(self._config).flush(self._failures)
        if self._config.error_topic:
            error_writer(self._config).flush(self._failures)
        window = GlobalWindow()
        for progress in self._progress:
            yield WindowedValue(progress, window.max_timestamp(), (window,))

    def _write_responses(self, finished: Finished, part: Responses) -> None:
        self._responses.inc(len(part))
        if not self._config.response_topic:
            return
        offsets, ranges = part.offsets, part.results is None
        format = response_format(self._config, ranges)
        if part.results is not None:
            keys = response_keys(finished.topic, finished.partition, offsets, format)
            values = response_values(part.results, format)
        elif part.body is not None:
            keys = [
                range_key(finished.topic, finished.partition, offsets[0], offsets[-1] + 1, format)
            ]
            values = response_values([part.body], format)
        else:
            return
        messages = [{"key": key, "value": value} for key, value in zip(keys, values)]
        writer = response_writer(self._config)
        writer.write_all(finished.partition, messages, self._failures)

    def _write_failure(self, finished: Finished, failure: Failure) -> None:
        config = self._config
        self._errors.inc(len(failure))
        if config.on_error == "ignore":
            return
        if not config.error_topic:
            offsets = failure.records.offsets
            facts = orjson.dumps(error_facts(failure, config.function)).decode()
            _LOGGER.error(
                "%s-%d@%d-%d failed: %s",
                finished.topic,
                finished.partition,
                offsets[0],
                offsets[-1],
                facts,
            )
            return
        writer = error_writer(config)
        if config.destination:
            for record in destination_records(
                finished.topic,
                finished.partition,
                failure,
                config.function,
                config.destination,
                config.max_error_bytes,
                round(time.time() * 1000),
            ):
                self._error_records.inc()
                writer.write(None, record.key, record.value, list(record.headers), self._failures)
            return
        for _, record in error_records(
            finished.topic,
            finished.partition,
            failure,
            config.function,
            error_format(config),
            config.max_error_bytes,
        ):
            self._error_records.inc()
            headers = list(record.headers)
            writer.write(finished.partition, record.key, record.value, headers, self._failures)


coders.registry.register_coder(Progress, SizedPickleCoder)
