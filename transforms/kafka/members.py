"""Member: a consumer that is subscribed, so that the group deals partitions out to this process.

It fetches nothing: what it is given it pauses at once, and `KafkaFetcher` reads it. So it may wait
for calls that are running while partitions move, and the others are read and worked meanwhile. All
that concerns the consumer is done by one thread, commits too: none can come between two of its
polls in which partitions were lost and given anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from confluent_kafka import OFFSET_END, Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError
from transforms.kafka.client import (
    KafkaConfig,
    client_settings,
    describe,
    instance_id,
    leave_group,
    make_consumer,
    reason,
)
from transforms.kafka.committer import final_problem, foreign_members, kept
from transforms.kafka.orphans import Orphans
from transforms.kafka.transaction import TransactionConfig, shared_transaction
from transforms.per_process import per_process
from transforms.records import PartitionKey
from transforms.source import Deal
from transforms.tally import PULSE

_LOGGER = logging.getLogger(__name__)

# How long the group may wait for an answer; while it has given nothing yet, it has more to say.
_POLL_SECS, _EAGER_SECS = 0.2, 0.01
_BEAT_SECS = 10.0
_EAGER_POLLS = 1_000
_SESSION_MS, _HEARTBEAT_MS = 45_000, 300
_METADATA_MS = 2_000
# Of librdkafka; within it a member that was asked for partitions must have let go of them.
_POLL_INTERVAL_MS = 300_000
_MARGIN = 0.9

# What a member is told whose partitions are about to move, or are not its own any more.
_NOT_NOW = frozenset(
    {
        ErrorCode.UNKNOWN_MEMBER_ID,
        ErrorCode.ILLEGAL_GENERATION,
        ErrorCode.REBALANCE_IN_PROGRESS,
        ErrorCode.STALE_MEMBER_EPOCH,
        ErrorCode.FENCED_MEMBER_EPOCH,
    }
)
_REFUSED = frozenset(
    {
        ErrorCode.GROUP_AUTHORIZATION_FAILED,
        ErrorCode.FENCED_INSTANCE_ID,
        ErrorCode.UNRELEASED_INSTANCE_ID,
        ErrorCode.UNSUPPORTED_ASSIGNOR,
        ErrorCode.INVALID_SESSION_TIMEOUT,
        ErrorCode.GROUP_MAX_SIZE_REACHED,
    }
)


@dataclass(slots=True, eq=False)
class _Commit:
    """What is to be committed, and what became of it.

    Attributes:
        offsets: By partition.
        notes: What to keep with them.
        written: Partitions of which something was written in the transaction that this is to end;
            None if it belongs to none.
        done: Whether nothing more becomes of it.
        error: Why it was not committed.
        why: The same of a transaction.
    """

    offsets: Mapping[PartitionKey, int]
    notes: Mapping[PartitionKey, str]
    written: Collection[PartitionKey] | None = None
    done: bool = False
    error: KafkaException | None = None
    why: str | None = "the run has come to its end"


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """Which group to be a member of.

    Attributes:
        kafka: The cluster and the group.
        number: Which of this machine's members it is, for `group.instance.id`.
        transaction: What is written in one together with the offsets; None if nothing is.
    """

    kafka: KafkaConfig
    number: int = 0
    transaction: TransactionConfig | None = None


def member_settings(settings: Mapping[str, Any], number: int) -> tuple[dict[str, Any], float]:
    """What a member's consumer is given beside the user's settings, and how long it may go without
    a poll, in seconds. Pure.

    Args:
        settings: The user's.
        number: Which of the members that have the same settings it is.
    """
    ours: dict[str, Any] = {
        "topic.metadata.refresh.interval.ms": _METADATA_MS,
        # It is paused before anything comes; if something does, let it be little.
        "queued.min.messages": 1,
    }
    if settings.get("group.protocol", "classic") == "classic":
        # By default nothing is done for 45 s of what a member had that died, and what moves takes
        # two heartbeats of 3 s.
        ours["session.timeout.ms"] = settings.get("session.timeout.ms", _SESSION_MS)
        ours["heartbeat.interval.ms"] = settings.get("heartbeat.interval.ms", _HEARTBEAT_MS)
        ours["partition.assignment.strategy"] = "cooperative-sticky"
    if number and (instance := instance_id(settings, number)):
        ours["group.instance.id"] = instance
    interval_ms = int(settings.get("max.poll.interval.ms", _POLL_INTERVAL_MS))
    return ours, interval_ms / 1000


class Member:
    """The `Members` of Kafka, and the store of what its partitions come to.

    Args:
        config: The cluster and the group.
        make: Makes the consumer; injected for tests.
    """

    def __init__(self, config: MemberConfig, make: Callable[..., Consumer] = make_consumer) -> None:
        self._kafka = config.kafka
        self._transaction = config.transaction
        user = client_settings(config.kafka)
        settings, self._interval_secs = member_settings(user, config.number)
        self._consumer = make(config.kafka, settings)
        self._settings = settings
        # Of the protocol of Kafka 4 there are none: there it is the broker that deals.
        self._may_adopt = bool(user.get("group.instance.id")) and "session.timeout.ms" in settings
        self._orphans: Orphans | None = None
        self._changed = threading.Condition()
        self._commits: list[_Commit] = []
        self._given: dict[PartitionKey, int] = {}
        self._taken: set[PartitionKey] = set()
        self._leaving: set[PartitionKey] = set()
        self._serial = 0
        self._topics: frozenset[str] = frozenset()
        self._subscribed: frozenset[str] = frozenset()
        self._looked = monotonic()
        self._closing = self._ended = False
        self._problem: KafkaError | None = None
        self._thread: threading.Thread | None = None

    # -- for the loop ----------------------------------------------------------------------

    def join(self, topics: Collection[str]) -> None:
        """See `Members.join`."""
        with self._changed:
            self._topics = frozenset(topics)
            if self._topics and self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._work, name="member", daemon=True)
                self._thread.start()

    def deal(self) -> Deal:
        """See `Members.deal`."""
        with self._changed:
            self._looked = monotonic()
            if self._problem:
                raise self._problem
            return Deal(dict(self._given), frozenset(self._leaving))

    def wait(self, timeout_secs: float) -> None:
        """See `Members.wait`."""
        with self._changed:
            before = self._serial
            self._changed.wait_for(lambda: self._serial != before or self._problem, timeout_secs)

    def take(self, keys: Collection[PartitionKey]) -> None:
        """See `Members.take`."""
        with self._changed:
            self._taken.update(key for key in keys if key in self._given)

    def let_go(self, keys: Collection[PartitionKey]) -> None:
        """See `Members.let_go`."""
        with self._changed:
            self._taken.difference_update(keys)
            for key in self._leaving.intersection(keys):
                self._given.pop(key, None)
            self._leaving.difference_update(keys)
            self._changed.notify_all()

    @property
    def wait_secs(self) -> float:
        """See `Members.wait_secs`."""
        return self._interval_secs * _MARGIN

    def close(self) -> None:
        """See `Members.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread:
            thread.join()
        else:
            self._consumer.close()

    # -- the store -------------------------------------------------------------------------

    def commit(
        self, offsets: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str], late: bool
    ) -> str | None:
        """See `Store.commit`. What is not this member's is left out.

        Raises:
            KafkaError: They cannot be committed, or the broker stays away.
        """
        asked = _Commit(offsets, notes)
        with self._changed:
            if self._problem:
                raise self._problem
            if self._taken.isdisjoint(offsets):
                return None
            self._commits.append(asked)
            self._changed.notify_all()
            self._changed.wait_for(lambda: asked.done)
        error = asked.error
        if error is None:
            return None
        if error.args[0].code() in _NOT_NOW and not late:
            return reason(error)
        if problem := final_problem(error, self._kafka, late):
            raise problem from None
        return reason(error)

    def settle(
        self,
        offsets: Mapping[PartitionKey, int],
        notes: Mapping[PartitionKey, str],
        written: Collection[PartitionKey],
    ) -> str | None:
        """See `Store.settle`.

        Raises:
            KafkaError: It is not known whether they are kept.
        """
        asked = _Commit(offsets, notes, written)
        with self._changed:
            if self._problem:
                raise self._problem
            self._commits.append(asked)
            self._changed.notify_all()
            while not self._changed.wait_for(lambda: asked.done or self._ended, _BEAT_SECS):
                # Kafka may take minutes to say what became of a transaction: that is no stop.
                PULSE.beat()
            if self._problem:
                raise self._problem
        return asked.why

    def kept(self, key: PartitionKey) -> int | None:
        """See `Store.kept`."""
        return kept(self._consumer, key)

    def listen(self) -> None:
        """See `Store.listen`: the member's own thread does."""

    # -- the member's thread ---------------------------------------------------------------

    def _work(self) -> None:
        polls = 0
        try:
            while not self._closing:
                self._subscribe()
                self._commit_all()
                if monotonic() - self._looked < self._interval_secs:
                    # Else who works the partitions hangs: the group is to take them.
                    message = self._consumer.poll(0)
                    if message is not None and message.error():
                        self._said(message)
                    if self._orphans:
                        self._orphans.turn(self._subscribed)
                polls += 1
                eager = not self._given and polls < _EAGER_POLLS
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._has_orders, _EAGER_SECS if eager else _POLL_SECS
                    )
            self._commit_all()
            self._leave()
        except KafkaError as error:
            self._fail(error)
        except BaseException as error:
            _LOGGER.debug("member failed", exc_info=True)
            why = reason(error) if isinstance(error, KafkaException) else repr(error)
            self._fail(KafkaError(f"{describe(self._kafka)}: {why}"))
        finally:
            with self._changed:
                for each in self._commits:
                    each.done = True
                self._ended = True
                self._taken.clear()
                self._changed.notify_all()

    @property
    def _has_orders(self) -> bool:
        return bool(self._commits or self._closing or self._topics != self._subscribed)

    def _commit_all(self) -> None:
        """Commit what is waiting for it. What is not this member's, or not any more, is left out:
        the broker would take it, whoever's it is."""
        with self._changed:
            commits, self._commits = self._commits, []
        for each in commits:
            if each.written is not None:
                self._settle(each, each.written)
                continue
            with self._changed:
                asked = [
                    TopicPartition(*key, offset, metadata=each.notes.get(key, ""))
                    for key, offset in each.offsets.items()
                    if key in self._taken
                ]
            try:
                if asked:
                    results = self._consumer.commit(offsets=asked, asynchronous=False)
                    if failed := [result.error for result in results or () if result.error]:
                        raise KafkaException(failed[0])
            except KafkaException as error:
                each.error = error
            with self._changed:
                each.done = True
                self._changed.notify_all()

    def _settle(self, each: _Commit, written: Collection[PartitionKey]) -> None:
        """End a transaction, in which nothing may be of partitions that are not this member's."""
        assert self._transaction
        transaction = shared_transaction(self._transaction)
        with self._changed:
            others = set(written) - self._taken
        offsets = [
            TopicPartition(*key, offset, metadata=each.notes.get(key, ""))
            for key, offset in each.offsets.items()
        ]
        try:
            if others:
                transaction.abort()
                each.why = "{}-{} is not this member's any more".format(*min(others))
            else:
                transaction.commit(offsets, self._consumer)
                each.why = None
        except KafkaException as error:
            each.why = reason(error)
        with self._changed:
            each.done = True
            self._changed.notify_all()

    def _subscribe(self) -> None:
        topics = self._topics
        if topics != self._subscribed:
            self._subscribed = topics
            if topics:
                self._consumer.subscribe(
                    sorted(topics),
                    on_assign=self._on_assign,
                    on_revoke=self._on_revoke,
                    on_lost=self._on_lost,
                )
            else:
                self._consumer.unsubscribe()

    def _leave(self) -> None:
        if self._orphans:
            self._orphans.close()
        leave_group(self._consumer)

    def _said(self, message: Message) -> None:
        """An error that is not about a record."""
        error = message.error()
        code = error.code()
        group = self._kafka.group
        if code == ErrorCode.INCONSISTENT_GROUP_PROTOCOL:
            self._fail(foreign_members(self._kafka, reason(KafkaException(error))))
        elif code in _REFUSED or error.fatal():
            self._fail(
                KafkaError(
                    f"--consumer_group={group} cannot be joined in {describe(self._kafka)}: "
                    f"{reason(KafkaException(error))}"
                )
            )
        elif code != ErrorCode._PARTITION_EOF:
            _LOGGER.debug("member of %s: %s", group, error)

    def _fail(self, problem: KafkaError) -> None:
        with self._changed:
            self._problem = self._problem or problem
            self._changed.notify_all()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if partitions:
            marks = [TopicPartition(each.topic, each.partition, OFFSET_END) for each in partitions]
            consumer.incremental_assign(marks)
            consumer.pause(marks)
        with self._changed:
            self._serial += 1
            for key in _keys(partitions):
                self._given[key] = self._serial
            self._changed.notify_all()
        if self._may_adopt:
            self._may_adopt = False
            self._orphans = Orphans(self._kafka, self._settings)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Wait until the loop has let go, which goes on with all the others meanwhile."""
        keys = _keys(partitions)
        with self._changed:
            self._leaving.update(key for key in keys if key in self._given)
            self._serial += 1
            self._changed.notify_all()
        deadline = monotonic() + self._interval_secs
        while not (self._closing or self._leaving.isdisjoint(keys) or monotonic() > deadline):
            self._commit_all()
            with self._changed:
                self._changed.wait_for(
                    lambda: self._commits or self._closing or self._leaving.isdisjoint(keys),
                    _POLL_SECS,
                )
        self._commit_all()
        self._drop(keys)
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._drop(_keys(partitions))
        consumer.incremental_unassign(partitions)

    def _drop(self, keys: Collection[PartitionKey]) -> None:
        """Partitions are not this member's any more: nothing of them is committed from here on."""
        with self._changed:
            for key in keys:
                self._given.pop(key, None)
            self._taken.difference_update(keys)
            self._leaving.difference_update(keys)
            self._serial += 1
            self._changed.notify_all()


def _keys(partitions: Collection[TopicPartition]) -> list[PartitionKey]:
    return [(each.topic, each.partition) for each in partitions]


def shared_member(config: MemberConfig) -> Member:
    """This process's member for the config."""
    return per_process(Member, config)
