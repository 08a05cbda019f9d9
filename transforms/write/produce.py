"""Produce: Finished -> Progress; responses and error records, and what is refused of them.

Own producers instead of Beam's WriteToKafka, which gives nothing that a commit could wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import apache_beam as beam
import orjson
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from transforms.aws.delivery import DeliveryConfig, shared_delivery
from transforms.coding import SizedPickleCoder
from transforms.conditions import RESPONSE_REFUSED
from transforms.envelope import Envelope
from transforms.errors import RegistryError, WriteError
from transforms.kafka.client import (
    KafkaConfig,
    client_settings,
    make_producer,
)
from transforms.kafka.transaction import TransactionConfig, shared_transaction
from transforms.names import NUMBERS, Names, spoken
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
    RELEASED,
    TALLY,
)
from transforms.write import formats
from transforms.write.destination import batch_document, destination_records, place_of
from transforms.write.formats import (
    TRACEPARENT,
    OutputFormat,
    error_facts,
    error_records,
    least_error_record,
    range_key,
    response_keys,
    response_values,
)
from transforms.write.topic_writer import Delivered, TopicWriter

_LOGGER = logging.getLogger(__name__)

_WINDOW = GlobalWindow()
_WINDOW_END = _WINDOW.max_timestamp()

WITHOUT_ORIGINAL = 3
"""What is left out of an error record that is refused: first, of each record alone, what was sent
and most of what came back; then all that came back and the log; then the original."""

HaltPartition = Callable[[Finished], None]
"""Has nothing more invoked of a partition."""


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
        transaction: Whose transactions outcomes are written in; None if in none.
        delivery: Where a document about each failed batch goes, in place of an error topic; None
            for nowhere. `destination` says how its records are shown.
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
    transaction: TransactionConfig | None = None
    delivery: DeliveryConfig | None = None


def _make_response_writer(config: WriteConfig) -> TopicWriter:
    assert config.response_topic
    if config.transaction:
        return TopicWriter(config.response_topic, shared_transaction(config.transaction).producer)
    settings = client_settings(config.kafka, "response.")
    return TopicWriter(config.response_topic, make_producer(settings))


def _make_error_writer(config: WriteConfig) -> TopicWriter:
    assert config.error_topic
    if config.transaction:
        return TopicWriter(config.error_topic, shared_transaction(config.transaction).producer)
    settings = client_settings(config.kafka, "error.")
    if config.destination:
        # As Java's producers place keys, and so AWS.
        settings = {"partitioner": "murmur2_random"} | settings
    return TopicWriter(config.error_topic, make_producer(settings))


def response_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the response topic; needs `config.response_topic`."""
    return per_process(_make_response_writer, config)


def error_writer(config: WriteConfig) -> TopicWriter:
    """This process's writer of the error topic; needs `config.error_topic`."""
    return per_process(_make_error_writer, config)


def _make_response_format(config: WriteConfig, ranges: bool = False) -> OutputFormat:
    if config.response_format != formats.AVRO or not config.response_topic:
        return config.response_format
    assert config.registry
    schemas = formats.response_schemas(ranges, config.names)
    return _avro_encoders(config.registry, config.response_topic, schemas)


def _make_range_format(config: WriteConfig) -> OutputFormat:
    return _make_response_format(config, ranges=True)


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
    return per_process(_make_range_format if ranges else _make_response_format, config)


def error_format(config: WriteConfig) -> OutputFormat:
    """How error records are written; for `AVRO` this process's encoders."""
    return per_process(_make_error_format, config)


def make_halted(_: WriteConfig) -> set[PartitionKey]:
    return set()


def records_of(finished: Finished) -> int:
    """How many records something became of."""
    return sum(map(len, finished.parts))


@dataclass(slots=True)
class Written:
    """What a bundle has written of one batch."""

    key: PartitionKey
    start: int
    next_offset: int
    lane: int
    halted: str
    refused: list[tuple[Sequence[int], Any]] = field(default_factory=list)
    reach: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose error record it is, and how much of it was left out already."""

    written: Written
    failure: Failure
    omitted: int = 0


class ProduceFn(beam.DoFn):
    def __init__(self, config: WriteConfig, halt: HaltPartition) -> None:
        self._config = config
        self._halt = halt
        counter = beam.metrics.Metrics.counter
        self._responses: Any = counter("write", "responses")
        self._errors: Any = counter("write", "errors")
        self._error_records: Any = counter("write", "error_records")
        self._refusals: Any = counter("write", "refused_responses")
        self._all_written: list[Written] = []
        self._delivered, self._errors_delivered = Delivered(), Delivered()

    def start_bundle(self) -> None:
        self._all_written = []
        self._delivered, self._errors_delivered = Delivered(), Delivered()

    def process(self, finished: Finished) -> None:
        if finished.key in per_process(make_halted, self._config):
            # It will be read again.
            self._book(RELEASED, records_of(finished), finished.topic)
            return
        written = Written(
            finished.key,
            finished.start,
            finished.next_offset,
            finished.lane,
            halt_name(finished),
            reach=finished.reach,
        )
        self._all_written.append(written)
        with self._fresh_after_failure():
            for part in finished.parts:
                if isinstance(part, Responses):
                    self._write_responses(written, part)
                else:
                    self._write_failure(written, part)

    def _book(self, name: str, records: int, *labels: str) -> None:
        """Count what became of records that were read."""
        BOOKS.count(name, records, *labels)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        with self._fresh_after_failure():
            self._flush()
        yield from self._progress()

    def _progress(self) -> Iterator[WindowedValue]:
        for written in self._all_written:
            start, end = written.reach or (written.start, written.next_offset)
            if start < end or written.halted:
                progress = Progress(*written.key, start, end, written.lane, written.halted)
                yield WindowedValue(progress, _WINDOW_END, (_WINDOW,))

    @contextmanager
    def _fresh_after_failure(self) -> Iterator[None]:
        """A producer that has failed may stay so; the next try has another."""
        try:
            yield
        except WriteError:
            self._forget_writers()
            raise

    def _forget_writers(self) -> None:
        forget(_make_response_writer, self._config)
        forget(_make_error_writer, self._config)

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
                self._book(ANSWERED, -len(offsets), written.key[0])
                self._book(RELEASED, len(offsets), written.key[0])
            for written in self._all_written:
                self._see_to_responses(written)
        if config.error_topic:
            while refusals := error_writer(config).flush(self._errors_delivered):
                for refused in refusals:
                    self._write_less(refused.owner, refused.error)

    def _see_to_responses(self, written: Written) -> None:
        """Make failures of the records whose responses were refused, in offset order."""
        for offsets, error in sorted(written.refused, key=lambda each: each[0][0]):
            if written.next_offset <= offsets[0]:
                return  # halted before it
            self._refusals.inc()
            failure = _response_refused(offsets, self._config, error)
            if self._config.on_error == "fail":
                self._stop_at(written, failure)
                return
            if self._config.on_error == "log" and (
                self._config.error_topic or self._config.delivery
            ):
                source = self._config.source
                records = source.fetch_again(written.key, offsets) if source else None
                if records is None:
                    self._stop_at(written, failure)
                    return
                failure = replace(failure, records=records)
            self._book(RELEASED, -len(failure), written.key[0])
            self._write_failure(written, failure)

    def _stop_at(self, written: Written, failure: Failure) -> None:
        """Halt the partition in front of a record whose outcome cannot be written."""
        offset = failure.records.offsets[0]
        finished = Finished(*written.key, offset, offset, halted=failure, lane=written.lane)
        _LOGGER.error(
            "halted: %s-%d at offset %s: %s, %s: %s; nothing from there on is committed, the other "
            "partitions go on",
            *written.key,
            spoken(offset),
            failure.condition,
            failure.error_type,
            failure.message,
        )
        self._halt(finished)
        per_process(make_halted, self._config).add(written.key)
        written.next_offset = min(written.next_offset, offset)
        if written.reach:
            written.reach = written.reach[0], min(written.reach[1], offset)
        written.halted = written.halted or halt_name(finished)
        behind = False
        for other in self._all_written:
            if behind and (other.key, other.lane) == (written.key, written.lane):
                other.next_offset = other.start
                other.reach = other.reach and (other.reach[0], other.reach[0])
            behind = behind or other is written

    def _write_responses(self, written: Written, part: Responses) -> None:
        self._responses.inc(len(part))
        self._book(ANSWERED, len(part), written.key[0])
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
        writer = response_writer(self._config)
        if part.trace is None:
            writer.write_all(partition, messages, self._delivered, owner)
            return
        # What writes many at once takes no headers.
        headers = [(TRACEPARENT, part.trace.encode())]
        for message in messages:
            writer.write(
                partition, message["key"], message["value"], headers, self._delivered, owner
            )

    @property
    def _failures_go_to(self) -> str:
        config = self._config
        kept = config.error_topic or config.delivery
        return ERROR_TOPIC if kept and config.on_error != "ignore" else DROPPED

    def _write_failure(self, written: Written, failure: Failure, omitted: int = 0) -> None:
        config = self._config
        self._errors.inc(len(failure))
        self._book(self._failures_go_to, len(failure), written.key[0], failure.condition)
        if config.on_error == "ignore":
            return
        if config.delivery and config.destination:
            now_ms = round(time.time() * 1000)
            document, payload = batch_document(
                *written.key, failure, config.function, config.destination, now_ms
            )
            place = place_of(*written.key, config.destination)
            shared_delivery(config.delivery).deliver(document, payload, place)
            self._error_records.inc()
            return
        if not config.error_topic:
            offsets = failure.records.offsets
            facts = orjson.dumps(error_facts(failure, config.function)).decode()
            which = spoken(offsets[0]), spoken(offsets[-1])
            _LOGGER.error("%s-%d@%s-%s failed: %s", *written.key, *which, facts)
            return
        # Without entries it is not known what was sent.
        self._write_error(Owner(written, failure, omitted or (0 if failure.entries else 1)))

    def _write_error(self, owner: Owner) -> None:
        """Write the error records of a failure, with what is to be omitted left out."""
        config, failure, key = self._config, owner.failure, owner.written.key
        max_bytes = 0 if owner.omitted else config.max_error_bytes
        with_original = owner.omitted < WITHOUT_ORIGINAL
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

    def _write_less(self, owner: Owner, error: Any) -> None:
        """An error record was refused: write it with less in it, or halt the partition."""
        failure, written = owner.failure, owner.written
        self._error_records.inc(-1)
        TALLY.count(DELIVERY_ERRORS, 1)
        if written.next_offset <= failure.records.offsets[0]:
            self._release(written, failure)
            return
        if owner.omitted < WITHOUT_ORIGINAL:
            self._write_error(replace(owner, omitted=owner.omitted + 1))
            return
        self._release(written, failure)
        why = f"topic {self._config.error_topic} refuses the error record: {error.str()}"
        self._stop_at(written, replace(failure, message=why, error_type=error.name()))

    def _release(self, written: Written, failure: Failure) -> None:
        """Records whose error record is not written are read again."""
        topic = written.key[0]
        self._book(ERROR_TOPIC, -len(failure), topic, failure.condition)
        self._book(RELEASED, len(failure), topic)


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
