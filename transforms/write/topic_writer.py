"""Topic writer: a producer bound to one topic, and what Kafka refuses of its messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Producer

from transforms.errors import WriteError
from transforms.kafka.client import (
    reason,
    said,
    served,
)
from transforms.tally import PULSE

_LOGGER = logging.getLogger(__name__)

_FLUSH_SECS = 10.0
_BY_KEY = -1  # librdkafka's number for: as the partitioner says

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
OF_THE_COUNT = frozenset({ErrorCode._UNKNOWN_PARTITION, ErrorCode.UNKNOWN_TOPIC_OR_PART})


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
        producer: What writes.
    """

    def __init__(self, topic: str, producer: Producer) -> None:
        self.topic = topic
        self._producer = producer
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
            self._poll(0.1 if messages else 0)

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
                self._poll(0.1)
            except KafkaException as error:
                self._note(note, error.args[0], key, value)
                return

    def _note(self, note: Note, error: Any, key: bytes | None, value: bytes | None) -> None:
        if error.code() not in _OF_THE_RECORD | OF_THE_COUNT:
            raise WriteError(self._failed(said(error)))
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
        if any(each.error.code() in OF_THE_COUNT for each in refused):
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
            if unknown := [each for each in again if each.error.code() in OF_THE_COUNT]:
                raise WriteError(self._failed(said(unknown[0].error)))
            if len(again) <= 1:
                at_fault += again
            else:
                middle = len(again) // 2
                parts += [again[middle:], again[:middle]]
        return at_fault

    def _wait(self, delivered: Delivered) -> None:
        self.acknowledge()
        if delivered.failures:
            raise WriteError(self._failed(delivered.failures[0]))

    def acknowledge(self) -> None:
        """Wait until it is known of everything what became of it.

        Raises:
            WriteError: It never will be.
        """
        while self._serve(self._producer.flush, _FLUSH_SECS):
            _LOGGER.warning("waiting for Kafka to acknowledge records of topic %s", self.topic)
            PULSE.beat()

    def _poll(self, secs: float) -> None:
        self._serve(self._producer.poll, secs)

    def _serve(self, call: Callable[[float], Any], secs: float) -> Any:
        try:
            return served(call, secs)
        except KafkaException as error:
            raise WriteError(self._failed(reason(error))) from None

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
            return f"{said(metadata.error)}; create it first"
        return None if self._partitions else "it has no partitions yet"

    def _count_partitions(self) -> int:
        if not self._partitions and (why := self.problem()):
            raise WriteError(self._failed(why))
        return self._partitions


def _report(note: Note, error: Any, message: Any) -> None:
    if error is None:
        return
    if error.code() in _OF_THE_RECORD | OF_THE_COUNT:
        _refuse(note, error, message.key(), message.value())
    else:
        note.bundle.failures.append(said(error))


def _refuse(note: Note, error: Any, key: bytes | None, value: bytes | None) -> None:
    refused = Refused(note.owner, note.source_partition, key, value, note.headers, error)
    note.bundle.refused.append(refused)
