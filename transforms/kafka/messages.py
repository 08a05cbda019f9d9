"""Messages: what the Kafka client hands out, as columns of records, or as what it says instead."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from functools import partial
from itertools import groupby

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, TIMESTAMP_NOT_AVAILABLE, Message
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, said
from transforms.records import NO_TIMESTAMP, Header, Records, header_bytes

_LOGGER = logging.getLogger(__name__)


_NO_NAME = "\ufffd"


_FATAL = {
    ErrorCode.TOPIC_AUTHORIZATION_FAILED: "the credentials may not read it",
    ErrorCode.UNKNOWN_TOPIC_OR_PART: "it is gone",
    ErrorCode._UNKNOWN_TOPIC: "it is gone",
    ErrorCode._UNKNOWN_PARTITION: "it is gone",
}


class PartitionError(KafkaError):
    """One partition cannot be read; the others may."""


class OffsetGoneError(PartitionError):
    """A partition cannot be read at the offset it had reached."""


def end_of_partition(message: Message, kafka: KafkaConfig) -> int | None:
    """What a message that is no record says: where the partition ends for now, or nothing.

    Raises:
        PartitionError: The partition cannot be read any more.
        KafkaError: Nothing can be read any more.
    """
    error = message.error()
    name = f"{message.topic()}-{message.partition()}"
    if error.code() == ErrorCode._PARTITION_EOF:
        return int(message.offset())
    if error.code() in (ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE):
        raise OffsetGoneError(
            f"{name} cannot be read at the offset it had reached: {error.str()}; "
            f"the topic's retention is shorter than the pipeline's lag, or it was deleted. "
            f"Run again to go on at the first offset that still exists"
        )
    if error.code() in _FATAL:
        what = _FATAL[error.code()]
        raise PartitionError(f"topic {message.topic()} cannot be read: {what} ({said(error)})")
    if error.fatal():
        raise KafkaError(f"{describe(kafka)}: {said(error)}")
    _LOGGER.warning("%s: %s", describe(kafka), said(error))
    return None


def in_runs(messages: list[Message]) -> Iterator[list[Message]]:
    """Messages in their order: records of one partition together, what is no record by itself.

    In its place among the records: an end that was believed before the records that come ahead of
    it would make them look as if they had been read.
    """
    low = 0
    if any(map(Message.error, messages)):
        for high, message in enumerate(messages):
            if message.error():
                yield from _by_partition(messages[low:high])
                yield [message]
                low = high + 1
    yield from _by_partition(messages[low:] if low else messages)


def _by_partition(messages: list[Message]) -> Iterator[list[Message]]:
    for _, run in groupby(messages, Message.partition):
        for _, part in groupby(run, Message.topic):
            yield list(part)


def to_records(messages: list[Message]) -> Records:
    """Messages as columns; each column is one pass in C."""
    stamps = list(map(Message.timestamp, messages))
    kinds = {kind for kind, _ in stamps}
    timestamps = [ms for _, ms in stamps]
    if TIMESTAMP_NOT_AVAILABLE in kinds:
        timestamps = [ms if kind else NO_TIMESTAMP for kind, ms in stamps]
    by_broker: list[bool] = []
    if TIMESTAMP_LOG_APPEND_TIME in kinds:
        by_broker = [kind == TIMESTAMP_LOG_APPEND_TIME for kind, _ in stamps]
    return Records(
        list(map(Message.offset, messages)),
        timestamps,
        list(map(Message.key, messages)),
        list(map(Message.value, messages)),
        headers_of(messages),
        log_append=by_broker,
    )


def bytes_of(messages: list[Message]) -> int:
    """About what records hold, in bytes: values, keys and headers."""
    size = sum(map(len, messages)) + sum(map(len, filter(None, map(Message.key, messages))))
    return size + sum(map(header_bytes, filter(None, headers_of(messages))))


def headers_of(messages: list[Message]) -> list[list[Header] | None]:
    """The headers of each; a name that is no UTF-8 text is U+FFFD.

    Kafka takes names of any bytes, and one record must not stop those around it.
    """
    try:
        return list(map(Message.headers, messages))
    except (SystemError, UnicodeDecodeError):
        return [_mended_headers(message) for message in messages]


def _mended_headers(message: Message) -> list[Header] | None:
    # Not called by name: where the interpreter has learned such a call it does not look for errors.
    ask = partial(map, Message.headers, [message])
    try:
        (headers,) = ask()
    except (SystemError, UnicodeDecodeError):
        # The client fails the first time only. The second time it hands out what it came to: pairs
        # that hold a value and no name, which must not be looked at as pairs.
        (headers,) = ask()
    if not headers:
        return None
    mended = [
        pair if len(held := gc.get_referents(pair)) > 1 else (_NO_NAME, held[0]) for pair in headers
    ]
    message.set_headers(mended)
    return mended
