"""Write: Finished -> Progress, once its responses and error records are acknowledged by Kafka.

Own producers instead of Beam's WriteToKafka, which gives nothing that a commit could wait for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import orjson
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Producer

from transforms.errors import WriteError
from transforms.formats import error_facts, error_records, response_keys, response_values
from transforms.kafka import KafkaConfig, client_settings, make_producer, reason
from transforms.per_process import per_process
from transforms.records import Failure, Finished, Progress, Responses

_LOGGER = logging.getLogger(__name__)

_FLUSH_SECS = 10.0


@dataclass(frozen=True, slots=True)
class WriteConfig:
    """Where outcomes go.

    Attributes:
        kafka: The cluster.
        function: The function's name as given, for error records.
        response_topic: Topic of the responses; None if they are not kept.
        error_topic: Topic of the error records; None for the log.
        on_error: ``fail``, ``log`` or ``ignore``.
        response_format: One of `transforms.formats.FORMATS`.
        error_format: The same for error records.
        max_error_bytes: Size of an error record above which it is divided.
    """

    kafka: KafkaConfig
    function: str
    response_topic: str | None = None
    error_topic: str | None = None
    on_error: str = "fail"
    response_format: str = "json"
    error_format: str = "json"
    max_error_bytes: int = 1_000_000


class TopicWriter:
    """An idempotent producer bound to one topic; remembers failed deliveries until `flush`.

    Args:
        topic: Where to write.
        settings: Producer settings, as librdkafka has them.
    """

    def __init__(self, topic: str, settings: dict[str, Any]) -> None:
        self.topic = topic
        self._producer: Producer = make_producer(settings)
        self._failures: list[str] = []
        self._partitions = 0

    def write_all(self, source_partition: int, messages: list[dict[str, Any]]) -> None:
        """Queue messages in order. Waits while the producer's queue is full.

        Everything from one source partition goes to one partition of the topic, so that its
        readers see the source's order.
        """
        partition = source_partition % self._count_partitions()
        while messages:
            self._producer.produce_batch(
                self.topic, messages, partition=partition, on_delivery=self._delivered
            )
            refused = [message for message in messages if "_error" in message]
            for message in refused:
                error = message.pop("_error")
                if error.code() != ErrorCode._QUEUE_FULL:
                    raise WriteError(self._failed(error.str()))
            messages = refused
            self._producer.poll(0.1 if messages else 0)

    def write(
        self, source_partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
    ) -> None:
        """Queue one message with headers. Waits while the producer's queue is full."""
        partition = source_partition % self._count_partitions()
        while True:
            try:
                self._producer.produce(
                    self.topic,
                    value,
                    key,
                    partition,
                    headers=headers,
                    on_delivery=self._delivered,
                )
                return
            except BufferError:
                self._producer.poll(0.1)

    def flush(self) -> None:
        """Wait until everything is acknowledged.

        Raises:
            WriteError: A message was not delivered within librdkafka's `message.timeout.ms`.
        """
        while self._producer.flush(_FLUSH_SECS):
            _LOGGER.warning("waiting for Kafka to acknowledge records of topic %s", self.topic)
        if self._failures:
            failures, self._failures = self._failures, []
            raise WriteError(self._failed(failures[0]))

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failures.append(error.str())

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


def _make_response_writer(config: WriteConfig) -> TopicWriter:
    assert config.response_topic
    return TopicWriter(config.response_topic, client_settings(config.kafka, "response."))


def _make_error_writer(config: WriteConfig) -> TopicWriter:
    assert config.error_topic
    return TopicWriter(config.error_topic, client_settings(config.kafka, "error."))


def response_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the response topic; needs `config.response_topic`."""
    return per_process(_make_response_writer, config)


def error_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the error topic; needs `config.error_topic`."""
    return per_process(_make_error_writer, config)


class WriteToKafka(beam.PTransform):
    """Write responses and error records, then say how far each partition is done.

    At least once; order per source partition is kept in the response topic. An element's
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

    def start_bundle(self) -> None:
        self._progress = []

    def process(self, finished: Finished) -> None:
        for part in finished.parts:
            if isinstance(part, Responses):
                self._write_responses(finished, part)
            else:
                self._write_failure(finished, part)
        if finished.start < finished.next_offset:
            self._progress.append(
                Progress(finished.topic, finished.partition, finished.start, finished.next_offset)
            )

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._config.response_topic:
            response_writer(self._config).flush()
        if self._config.error_topic:
            error_writer(self._config).flush()
        window = GlobalWindow()
        for progress in self._progress:
            yield WindowedValue(progress, window.max_timestamp(), (window,))

    def _write_responses(self, finished: Finished, part: Responses) -> None:
        self._responses.inc(len(part))
        if not self._config.response_topic or part.results is None:
            return
        format = self._config.response_format
        keys = response_keys(finished.topic, finished.partition, part.offsets, format)
        values = response_values(part.results, format)
        messages = [{"key": key, "value": value} for key, value in zip(keys, values)]
        writer = response_writer(self._config)
        writer.write_all(finished.partition, messages)

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
        for _, record in error_records(
            finished.topic,
            finished.partition,
            failure,
            config.function,
            config.error_format,
            config.max_error_bytes,
        ):
            self._error_records.inc()
            writer.write(finished.partition, record.key, record.value, list(record.headers))


coders.registry.register_coder(Progress, coders.PickleCoder)
