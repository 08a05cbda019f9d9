"""Transaction: what is written and how far that is, to be seen together or not at all. No Beam.

One producer per member, and one transaction at a time. After one that did not come to its end there
is another producer of the same name: whatever stood in the way of the old one, what it had begun is
ended by that.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic, sleep
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError, WriteError
from transforms.kafka.client import (
    KafkaConfig,
    client_settings,
    describe,
    instance_id,
    make_producer,
    reason,
    served,
)
from transforms.per_process import per_process

_LOGGER = logging.getLogger(__name__)

# How long the broker lets one be open whose producer is gone. Nothing behind it is read meanwhile.
TIMEOUT_MS = 30_000
_STEP_SECS, _ABORT_SECS, _LOOK_SECS = 30.0, 5.0, 2.0
# How much longer than it was told to a call may take before it counts as one that never returns.
_GRACE_SECS = 5.0
# How long it may stay unknown whether a transaction has come to its end.
_DOUBT_SECS = 60.0
# What librdkafka packs into a request, unless the settings say so.
_BATCH_BYTES = 1_000_000

# What another try may change, of what is said to a producer that begins.
_PASSING = frozenset(
    {
        ErrorCode._TIMED_OUT,
        ErrorCode._TRANSPORT,
        ErrorCode._ALL_BROKERS_DOWN,
        ErrorCode._FENCED,
        ErrorCode.CONCURRENT_TRANSACTIONS,
    }
)


@dataclass(frozen=True, slots=True)
class TransactionConfig:
    """Whose transactions.

    Attributes:
        kafka: The cluster and the group.
        number: Which of this machine's members writes them.
        java_keys: Whether keys are placed as Java's producers place them.
    """

    kafka: KafkaConfig
    number: int = 0
    java_keys: bool = False


def transaction_settings(
    settings: Mapping[str, Any], group: str, number: int, java_keys: bool, unique: str
) -> dict[str, Any]:
    """The producer's settings: the user's, and what makes it a member's. Pure.

    Args:
        settings: The user's.
        group: The consumer group.
        number: Which of the members that have the same settings it is.
        java_keys: See `TransactionConfig`.
        unique: Tells it from others where the settings do not.
    """
    # A member that is started again under its name ends by that what it had begun.
    name = instance_id(settings, number) or unique
    defaults: dict[str, Any] = {
        "transaction.timeout.ms": TIMEOUT_MS,
        "batch.size": _BATCH_BYTES,
    }
    if java_keys:
        defaults["partitioner"] = "murmur2_random"
    return defaults | dict(settings) | {"transactional.id": f"{group}-{name}"}


def returned(call: Callable[[float], None], secs: float) -> None:
    """Make a call of a producer. One that does not return is left to itself, and its producer with
    it: the group waits for the thread that is held up, with all its other members. After a broker's
    restart librdkafka 2.16 forgets the call that adds offsets to a transaction now and then.

    Args:
        call: Takes how long it may take.
        secs: That.

    Raises:
        KafkaException: What it raises; `_TIMED_OUT` where it does not return.
    """
    outcome: list[BaseException | None] = []

    def make() -> None:
        try:
            served(call, secs)
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=make, name="transaction", daemon=True)
    thread.start()
    thread.join(secs + _GRACE_SECS)
    if not outcome:
        raise KafkaException(ErrorCode(ErrorCode._TIMED_OUT, "the client does not answer"))
    if outcome[0]:
        raise outcome[0]


class Transaction:
    """A member's transactions, one after the other. Used by one thread at a time.

    Args:
        config: Whose.
        make: Makes the producer; injected for tests.
    """

    def __init__(
        self,
        config: TransactionConfig,
        make: Callable[[Mapping[str, Any]], Producer] = make_producer,
    ) -> None:
        self._kafka = config.kafka
        self._make = make
        self._settings = transaction_settings(
            # It writes to both topics; settings of one that contradict the other's are refused.
            client_settings(config.kafka, "response.", "error."),
            config.kafka.group,
            config.number,
            config.java_keys,
            uuid.uuid4().hex,
        )
        # A step that takes as long as a transaction may be open is too late in any case.
        limit = str(self._settings["transaction.timeout.ms"])
        self._step_secs = min(_STEP_SECS, int(limit) / 1000 if limit.isdecimal() else _STEP_SECS)
        self._producer: Producer | None = None
        self._is_open = False
        self._then: Callable[[], None] = lambda: None

    @property
    def is_open(self) -> bool:
        """Whether it was begun and has not come to its end."""
        return self._is_open

    @property
    def producer(self) -> Producer:
        """What writes; another one after `abort`.

        Raises:
            WriteError: The brokers do not let one begin now.
            KafkaError: They never will.
        """
        if self._producer is None:
            self._producer = self._begin_producer()
        return self._producer

    def begin(self, then: Callable[[], None] = lambda: None) -> None:
        """Begin one.

        Args:
            then: Called once it has come to its end.

        Raises:
            WriteError: See `producer`.
            KafkaError: See `producer`.
        """
        if self._is_open:
            self.abort()
        try:
            self.producer.begin_transaction()
        except KafkaException as error:
            self.abort()
            raise WriteError(self._failed(error)) from None
        self._is_open, self._then = True, then

    def abort(self) -> None:
        """Have nothing been written. What a producer that met an error comes to is not to be
        foreseen, so there is another one next time."""
        producer, self._producer = self._producer, None
        self._is_open = False
        if producer:
            with suppress(KafkaException):
                returned(producer.abort_transaction, _ABORT_SECS)

    def write_smaller(self) -> bool:
        """Put less into each request from the next producer on. Says whether that can be."""
        size = int(self._settings["batch.size"])
        self._settings["batch.size"] = max(1, size // 8)
        return size > 1

    def commit(self, offsets: Sequence[TopicPartition], member: Consumer) -> None:
        """End it, with the group's offsets in it.

        Args:
            offsets: Of partitions that are the member's.
            member: The member's consumer; who is none any more is refused.

        Raises:
            KafkaException: Nothing of it will be seen. It is aborted.
            KafkaError: It is not known what became of it.
        """
        try:
            producer = self.producer
            if offsets:
                group = member.consumer_group_metadata()
                send = partial(producer.send_offsets_to_transaction, list(offsets), group)
                returned(send, self._step_secs)
        except KafkaException:
            self.abort()
            raise
        try:
            returned(producer.commit_transaction, self._step_secs)
        except KafkaException as error:
            _LOGGER.debug("commit of a transaction: %s", error)
            if not self._has_landed(offsets, member):
                raise
        self._is_open = False
        self._then()

    def _has_landed(self, offsets: Sequence[TopicPartition], member: Consumer) -> bool:
        """Whether it has come to its end, although nobody said so: its offsets tell. It is over
        once the next producer of the same name has begun."""
        self.abort()
        deadline = monotonic() + _DOUBT_SECS
        while True:
            try:
                _ = self.producer
                found = member.committed(
                    [TopicPartition(each.topic, each.partition) for each in offsets], _LOOK_SECS
                )
                if failed := [each.error for each in found if each.error]:
                    raise KafkaException(failed[0])
                return bool(offsets) and [(o.offset, o.metadata or "") for o in found] == [
                    (o.offset, o.metadata or "") for o in offsets
                ]
            except (KafkaException, WriteError) as error:
                if monotonic() > deadline:
                    why = reason(error) if isinstance(error, KafkaException) else str(error)
                    raise KafkaError(
                        f"{describe(self._kafka)}: it is not known whether a transaction has come "
                        f"to its end: {why}; run again once this is mended"
                    ) from None
                sleep(0.2)

    def _begin_producer(self) -> Producer:
        producer = self._make(self._settings)
        try:
            returned(producer.init_transactions, self._step_secs)
        except KafkaException as error:
            code = error.args[0].code()
            if code in _PASSING or error.args[0].retriable():
                raise WriteError(self._failed(error)) from None
            raise KafkaError(
                f"--delivery=exactly_once: {describe(self._kafka)} lets transactions of "
                f"{self._settings['transactional.id']} not begin: {reason(error)}; the user needs "
                f"the right to write with transactional ids that begin with {self._kafka.group}-"
            ) from None
        return producer

    def _failed(self, error: KafkaException) -> str:
        return f"a transaction cannot begin in {describe(self._kafka)}: {reason(error)}"


def shared_transaction(config: TransactionConfig) -> Transaction:
    """This process's transactions for the config."""
    return per_process(Transaction, config)
