"""Write: Finished -> Progress, once its responses and error records are acknowledged by Kafka.

Own producers instead of Beam's WriteToKafka, which gives nothing that a commit could wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import apache_beam as beam
import orjson
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Producer

from transforms.coding import SizedPickleCoder
from transforms.conditions import RESPONSE_REFUSED
from transforms.envelope import Envelope
from transforms.errors import RegistryError, WriteError
from transforms.kafka.client import (
    KafkaConfig,
    client_settings,
    make_producer,
    reason,
)
from transforms.names import NUMBERS, Names
from transforms.per_process import forget, per_process
from transforms.records import (
    NO_TIMESTAMP,
    Failure,
    Finished,
    PartitionKey,
    Progress,
    Records,
    Responses,
    halt_name,
)
from transforms.schemas.registry import RegistryConfig, shared_registry
from transforms.schemas.schema import DecodeError
from transforms.source import Source
from transforms.tally import (
    ANSWERED,
    BOOKS,
    DELIVERY_ERRORS,
    DROPPED,
    ERROR_TOPIC,
    PULSE,
    RELEASED,
    TALLY,
)
from transforms.write import formats
from transforms.write.destination import destination_records
from transforms.write.formats import (
    OutputFormat,
    error_facts,
    error_records,
    least_error_record,
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
        source: What the records are from, to ask it for one again. None if it cannot be asked.
        names: How records' numbers are written.
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
    source: Source | None = None
    names: Names = NUMBERS


# What Kafka says of a record, and not of itself: others may be written all the same.
_OF_THE_RECORD = frozenset(
    {
        ErrorCode.MSG_SIZE_TOO_LARGE,
        ErrorCode.RECORD_LIST_TOO_LARGE,
        ErrorCode.INVALID_RECORD,
        ErrorCode.INVALID_TIMESTAMP,
        ErrorCode.POLICY_VIOLATION,
    }
)
# The topic was made anew: worth another try, with its partitions counted again.
_OF_THE_COUNT = frozenset({ErrorCode._UNKNOWN_PARTITION, ErrorCode.UNKNOWN_TOPIC_OR_PART})


class Note(NamedTuple):
    """What a delivery report needs to say whose message it is.

    Attributes:
        bundle: What was refused of the bundle's messages.
        owner: Whose it is; anything.
        source_partition: What its partition follows, None for its key.
        headers: Its headers, which a delivery report does not bring back.
    """

    bundle: Delivered
    owner: Any
    source_partition: int | None
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Refused:
    """A message that Kafka did not take, and why."""

    owner: Any
    source_partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    error: Any


@dataclass(slots=True)
class Delivered:
    """What became of a bundle's messages: nothing is said of those that were delivered.

    Attributes:
        failures: Why messages were not delivered, where it is not the message that is at fault.
        refused: Messages that are at fault themselves, or shared a request with one.
    """

    failures: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class TopicWriter:
    """An idempotent producer bound to one topic, for all bundles of a process.

    What was not delivered is noted in what the bundle gives with each write, so that no bundle
    answers for another one's records.

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
        self,
        source_partition: int,
        messages: list[dict[str, Any]],
        delivered: Delivered,
        owner: Any = None,
    ) -> None:
        """Queue messages in order. Waits while the producer's queue is full.

        Everything from one source partition goes to one partition of the topic, so that its
        readers see the source's order.
        """
        partition = source_partition % self._count_partitions()
        note = Note(delivered, owner, source_partition, [])
        report = partial(_report, note)
        while messages:
            self._producer.produce_batch(
                self.topic, messages, partition=partition, on_delivery=report
            )
            refused = [message for message in messages if "_error" in message]
            messages = []
            for message in refused:
                error = message.pop("_error")
                if error.code() == ErrorCode._QUEUE_FULL:
                    messages.append(message)
                else:
                    self._note(note, error, message["key"], message["value"])
            if messages:
                PULSE.beat()
            self._producer.poll(0.1 if messages else 0)

    def write(
        self,
        source_partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes]],
        delivered: Delivered,
        owner: Any = None,
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
        note = Note(delivered, owner, source_partition, headers)
        report = partial(_report, note)
        while True:
            try:
                self._producer.produce(
                    self.topic, value, key, partition, headers=headers, on_delivery=report
                )
                return
            except BufferError:
                PULSE.beat()
                self._producer.poll(0.1)
            except KafkaException as error:
                self._note(note, error.args[0], key, value)
                return

    def _note(self, note: Note, error: Any, key: bytes | None, value: bytes | None) -> None:
        if error.code() not in _OF_THE_RECORD | _OF_THE_COUNT:
            raise WriteError(self._failed(error.str()))
        _refuse(note, error, key, value)

    def flush(self, delivered: Delivered) -> list[Refused]:
        """Wait until everything is acknowledged.

        Messages that shared a request with one at fault are written once more, in their order,
        by halves, until those at fault stand alone.

        Returns:
            The messages that Kafka does not take.

        Raises:
            WriteError: A message was not delivered within librdkafka's `message.timeout.ms`.
        """
        self._wait(delivered)
        refused, delivered.refused = delivered.refused, []
        if any(each.error.code() in _OF_THE_COUNT for each in refused):
            self._partitions = 0
        parts = [refused] if refused else []
        at_fault: list[Refused] = []
        while parts:
            part = parts.pop()
            for each in part:
                self.write(
                    each.source_partition,
                    each.key,
                    each.value,
                    each.headers,
                    delivered,
                    each.owner,
                )
            self._wait(delivered)
            again, delivered.refused = delivered.refused, []
            if unknown := [each for each in again if each.error.code() in _OF_THE_COUNT]:
                raise WriteError(self._failed(unknown[0].error.str()))
            if len(again) <= 1:
                at_fault += again
            else:
                middle = len(again) // 2
                parts += [again[middle:], again[:middle]]
        return at_fault

    def _wait(self, delivered: Delivered) -> None:
        while self._producer.flush(_FLUSH_SECS):
            _LOGGER.warning("waiting for Kafka to acknowledge records of topic %s", self.topic)
            PULSE.beat()
        if delivered.failures:
            raise WriteError(self._failed(delivered.failures[0]))

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


def _report(note: Note, error: Any, message: Any) -> None:
    if error is None:
        return
    if error.code() in _OF_THE_RECORD | _OF_THE_COUNT:
        _refuse(note, error, message.key(), message.value())
    else:
        note.bundle.failures.append(error.str())


def _refuse(note: Note, error: Any, key: bytes | None, value: bytes | None) -> None:
    refused = Refused(note.owner, note.source_partition, key, value, note.headers, error)
    note.bundle.refused.append(refused)


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
    schemas = formats.response_schemas(ranges, config.names)
    return _avro_encoders(config.registry, config.response_topic, schemas)


def _make_error_format(config: WriteConfig) -> OutputFormat:
    if config.error_format != formats.AVRO or not config.error_topic:
        return config.error_format
    assert config.registry
    return _avro_encoders(config.registry, config.error_topic, formats.error_schemas(config.names))


def _avro_encoders(
    registry: RegistryConfig, topic: str, schemas: tuple[str, str]
) -> formats.AvroEncoders:
    """Encoders for a topic's records, by what its subjects have.

    Raises:
        RegistryError: A subject has another schema than ours.
    """
    from transforms.schemas.avro import avro_encoder

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


HaltPartition = Callable[[Finished], None]
"""Has nothing more invoked of a partition."""


class WriteToKafka(beam.PTransform):
    """Write responses and error records, then say how far each partition is done.

    At least once; order per lane of a source partition is kept in the response topic. An element's
    `Progress` comes out only when all its records are acknowledged; a failed delivery fails
    the bundle. Failures of halted partitions are not written: their records will be read again.

    A response that Kafka refuses (too large, for example) makes a failure of what it answers. An
    error record that it refuses goes without its largest parts. What cannot be written even so
    halts the partition in front of the record.

    Args:
        config: Where outcomes go.
        halt: Told of partitions that are halted here.
    """

    def __init__(self, config: WriteConfig, halt: HaltPartition = lambda _: None) -> None:
        super().__init__()
        self._config = config
        self._halt = halt

    def expand(self, finished: beam.PCollection[Finished]) -> beam.PCollection[Progress]:
        produce = beam.ParDo(_ProduceFn(self._config, self._halt))
        return finished | "Produce" >> produce.with_output_types(Progress)

    def display_data(self) -> dict[str, Any]:
        return {
            "response_topic": self._config.response_topic or "",
            "error_topic": self._config.error_topic or "",
        }


def _make_halted(_: WriteConfig) -> set[PartitionKey]:
    return set()


def lift_halt(config: WriteConfig, key: PartitionKey) -> None:
    """A partition that was stopped by what could not be written is begun again."""
    per_process(_make_halted, config).discard(key)


def write_at_once(config: WriteConfig, finished: Finished) -> bool:
    """Write what became of records, outside any pipeline, and wait until it is acknowledged.

    Returns:
        Whether it was; an error record may be refused.

    Raises:
        SinkError: It cannot be written now.
    """
    lift_halt(config, finished.key)
    write = _ProduceFn(config, lambda _: None)
    write.start_bundle()
    write.process(finished)
    return not any(progress.value.halted for progress in write.finish_bundle())


@dataclass(slots=True)
class _Written:
    """What a bundle has written of one batch."""

    key: PartitionKey
    start: int
    next_offset: int
    lane: int
    halted: str
    refused: list[tuple[Sequence[int], Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Whose error record it is, and how much of it was left out already."""

    written: _Written
    failure: Failure
    omitted: int = 0


class _ProduceFn(beam.DoFn):
    def __init__(self, config: WriteConfig, halt: HaltPartition) -> None:
        self._config = config
        self._halt = halt
        counter = beam.metrics.Metrics.counter
        self._responses = counter("write", "responses")
        self._errors = counter("write", "errors")
        self._error_records = counter("write", "error_records")
        self._refusals = counter("write", "refused_responses")
        self._all_written: list[_Written] = []
        self._delivered, self._errors_delivered = Delivered(), Delivered()

    def start_bundle(self) -> None:
        self._all_written = []
        self._delivered, self._errors_delivered = Delivered(), Delivered()

    def process(self, finished: Finished) -> None:
        if finished.key in per_process(_make_halted, self._config):
            # It will be read again.
            BOOKS.count(RELEASED, sum(map(len, finished.parts)), finished.topic)
            return
        written = _Written(
            finished.key,
            finished.start,
            finished.next_offset,
            finished.lane,
            halt_name(finished),
        )
        self._all_written.append(written)
        with self._fresh_after_failure():
            for part in finished.parts:
                if isinstance(part, Responses):
                    self._write_responses(written, part)
                else:
                    self._write_failure(written, part)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        with self._fresh_after_failure():
            self._flush()
        window = GlobalWindow()
        for written in self._all_written:
            if written.start < written.next_offset or written.halted:
                progress = Progress(
                    *written.key, written.start, written.next_offset, written.lane, written.halted
                )
                yield WindowedValue(progress, window.max_timestamp(), (window,))

    @contextmanager
    def _fresh_after_failure(self) -> Iterator[None]:
        """A producer that has failed may stay so; the next try has another."""
        try:
            yield
        except WriteError:
            forget(_make_response_writer, self._config)
            forget(_make_error_writer, self._config)
            raise

    def _flush(self) -> None:
        """Wait until all is acknowledged, and see to what is refused."""
        config = self._config
        if config.response_topic:
            for refused in response_writer(config).flush(self._delivered):
                written, offsets_of = refused.owner
                offsets = offsets_of[refused.key]
                written.refused.append((offsets, refused.error))
                # Counted when it was handed over; whatever becomes of its records, it is not there.
                self._responses.inc(-len(offsets))
                # Unless their error records are written, they are read again.
                topic = written.key[0]
                BOOKS.count(ANSWERED, -len(offsets), topic)
                BOOKS.count(RELEASED, len(offsets), topic)
            for written in self._all_written:
                self._see_to_responses(written)
        if config.error_topic:
            while refusals := error_writer(config).flush(self._errors_delivered):
                for refused in refusals:
                    self._write_less(refused.owner, refused.error)

    def _see_to_responses(self, written: _Written) -> None:
        """Make failures of the records whose responses were refused, in offset order."""
        for offsets, error in sorted(written.refused, key=lambda each: each[0][0]):
            if written.next_offset <= offsets[0]:
                return  # halted before it
            self._refusals.inc()
            failure = _response_refused(offsets, self._config, error)
            if self._config.on_error == "fail":
                self._stop_at(written, failure)
                return
            if self._config.on_error == "log" and self._config.error_topic:
                source = self._config.source
                records = source.fetch_again(written.key, offsets) if source else None
                if records is None:
                    self._stop_at(written, failure)
                    return
                failure = replace(failure, records=records)
            BOOKS.count(RELEASED, -len(failure), written.key[0])
            self._write_failure(written, failure)

    def _stop_at(self, written: _Written, failure: Failure) -> None:
        """Halt the partition in front of a record whose outcome cannot be written."""
        offset = failure.records.offsets[0]
        finished = Finished(*written.key, offset, offset, halted=failure, lane=written.lane)
        _LOGGER.error(
            "halted: %s-%d at offset %d: %s, %s: %s; nothing from there on is committed, the other "
            "partitions go on",
            *written.key,
            offset,
            failure.condition,
            failure.error_type,
            failure.message,
        )
        self._halt(finished)
        per_process(_make_halted, self._config).add(written.key)
        written.next_offset = min(written.next_offset, offset)
        written.halted = written.halted or halt_name(finished)
        behind = False
        for other in self._all_written:
            if behind and (other.key, other.lane) == (written.key, written.lane):
                other.next_offset = other.start
            behind = behind or other is written

    def _write_responses(self, written: _Written, part: Responses) -> None:
        self._responses.inc(len(part))
        BOOKS.count(ANSWERED, len(part), written.key[0])
        if not self._config.response_topic:
            return
        topic, partition, names = *written.key, self._config.names
        offsets, ranges = part.offsets, part.results is None
        format = response_format(self._config, ranges)
        if part.results is not None:
            keys = response_keys(topic, partition, offsets, format, names)
            values = response_values(part.results, format)
            answered: Iterable[Sequence[int]] = ([offset] for offset in offsets)
        elif part.body is not None:
            keys = [range_key(topic, partition, offsets[0], offsets[-1] + 1, format, names)]
            values = response_values([part.body], format)
            answered = [offsets]
        else:
            return
        messages = [{"key": key, "value": value} for key, value in zip(keys, values)]
        owner = (written, _Answered(keys, answered))
        response_writer(self._config).write_all(partition, messages, self._delivered, owner)

    @property
    def _failures_go_to(self) -> str:
        config = self._config
        return ERROR_TOPIC if config.error_topic and config.on_error != "ignore" else DROPPED

    def _write_failure(self, written: _Written, failure: Failure) -> None:
        config = self._config
        self._errors.inc(len(failure))
        BOOKS.count(self._failures_go_to, len(failure), written.key[0], failure.condition)
        if config.on_error == "ignore":
            return
        if not config.error_topic:
            offsets = failure.records.offsets
            facts = orjson.dumps(error_facts(failure, config.function)).decode()
            _LOGGER.error("%s-%d@%d-%d failed: %s", *written.key, offsets[0], offsets[-1], facts)
            return
        # Without entries it is not known what was sent.
        self._write_error(_Owner(written, failure, 0 if failure.entries else 1))

    def _write_error(self, owner: _Owner) -> None:
        """Write the error records of a failure, with what is to be omitted left out."""
        config, failure, key = self._config, owner.failure, owner.written.key
        max_bytes = 0 if owner.omitted else config.max_error_bytes
        with_original = owner.omitted < _WITHOUT_ORIGINAL
        parts: Iterable[tuple[Failure, formats.ErrorRecord]]
        if config.destination:
            now_ms = round(time.time() * 1000)
            parts = destination_records(
                *key,
                failure,
                config.function,
                config.destination,
                max_bytes,
                now_ms,
                with_original,
            )
        elif owner.omitted <= 1:
            format = error_format(config)
            parts = error_records(*key, failure, config.function, format, max_bytes, config.names)
        else:
            format = error_format(config)
            record = least_error_record(
                *key, failure, config.function, format, with_original, config.names
            )
            parts = [(failure, record)]
        follows = None if config.destination else key[1]
        for part, record in parts:
            self._error_records.inc()
            whose = replace(owner, failure=part)
            headers = list(record.headers)
            error_writer(config).write(
                follows, record.key, record.value, headers, self._errors_delivered, whose
            )

    def _write_less(self, owner: _Owner, error: Any) -> None:
        """An error record was refused: write it with less in it, or halt the partition."""
        failure, written = owner.failure, owner.written
        self._error_records.inc(-1)
        TALLY.count(DELIVERY_ERRORS, 1)
        if written.next_offset <= failure.records.offsets[0]:
            self._release(written, failure)
            return
        if owner.omitted < _WITHOUT_ORIGINAL:
            self._write_error(replace(owner, omitted=owner.omitted + 1))
            return
        self._release(written, failure)
        why = f"topic {self._config.error_topic} refuses the error record: {error.str()}"
        self._stop_at(written, replace(failure, message=why, error_type=error.name()))

    def _release(self, written: _Written, failure: Failure) -> None:
        """Records whose error record is not written are read again."""
        topic = written.key[0]
        BOOKS.count(ERROR_TOPIC, -len(failure), topic, failure.condition)
        BOOKS.count(RELEASED, len(failure), topic)


_WITHOUT_ORIGINAL = 3
"""What is left out of an error record that is refused: first, of each record alone, what was sent
and most of what came back; then all that came back and the log; then the original."""


class _Answered:
    """Which records a response answers, by its key; read only where one is refused."""

    def __init__(self, keys: Sequence[bytes], answered: Iterable[Sequence[int]]) -> None:
        self._keys = keys
        self._answered = answered
        self._found: dict[bytes, Sequence[int]] | None = None

    def __getitem__(self, key: bytes | None) -> Sequence[int]:
        if self._found is None:
            self._found = dict(zip(self._keys, self._answered))
        return self._found[key or b""]


def _response_refused(offsets: Sequence[int], config: WriteConfig, error: Any) -> Failure:
    nothing = [None] * len(offsets)
    records = Records(offsets, [NO_TIMESTAMP] * len(offsets), nothing, nothing, nothing)
    return Failure(
        records=records,
        entries=(),
        condition=RESPONSE_REFUSED,
        error_type=error.name(),
        message=f"topic {config.response_topic} refuses the response: {error.str()}",
        attempts=1,
        status_code=200,
        function_error=error.name(),
    )


coders.registry.register_coder(Progress, SizedPickleCoder)
