"""Source: which partitions there are, where to begin with each, and where they end. No Beam."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic, sleep

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka.admin import AdminClient, OffsetSpec

from transforms.errors import KafkaError
from transforms.kafka.client import (
    NO_COORDINATOR,
    NO_LEADER,
    ErrorLog,
    IamLogin,
    KafkaConfig,
    client_settings,
    describe,
    make_admin,
    partitions_of,
    reason,
)
from transforms.kafka.committer import GroupOffsets
from transforms.kafka.fetch import KafkaFetcher, fetch_again
from transforms.kafka.members import Member, MemberConfig, shared_member
from transforms.kafka.messages import PartitionError
from transforms.kafka.transaction import TransactionConfig
from transforms.names import NUMBERS, Names
from transforms.records import PartitionKey, Records
from transforms.source import Detour, Fetcher, Found, Start

_LOGGER = logging.getLogger(__name__)

_TIMEOUT_SECS = 15.0
# For a transaction that somebody left open who is gone: at the start; and while others wait.
_OPEN_SECS, _OPEN_LOOK_SECS = 90.0, 1.0
LOOK_SECS = 3.0
TRIM_HORIZON, LATEST, AT_TIMESTAMP = "TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"

_NO_OFFSET = -1001  # what librdkafka reports for a group without a committed offset
_INTERNAL = "__"
_NOT_YET = NO_COORDINATOR | {ErrorCode.UNSTABLE_OFFSET_COMMIT}


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """What to read: the `Source` of Kafka.

    Attributes:
        kafka: The cluster and the group.
        topics: Topics by name, or empty with a regex.
        topics_regex: Regex for whole topic names, or None.
        starting_position: For partitions without a committed offset.
        starting_timestamp_ms: With AT_TIMESTAMP.
        member: Which of this machine's members of the group it is; None to be none, and read all.
        transaction: What is written in one together with offsets; None if nothing is.
    """

    kafka: KafkaConfig
    topics: tuple[str, ...]
    topics_regex: str | None = None
    starting_position: str = TRIM_HORIZON
    starting_timestamp_ms: int | None = None
    member: int | None = None
    transaction: TransactionConfig | None = None

    def fetcher(self) -> KafkaFetcher:
        return KafkaFetcher(self.kafka)

    def partitions(self, fetcher: Fetcher) -> SourceOffsets:
        assert isinstance(fetcher, KafkaFetcher)
        return SourceOffsets(self, fetcher.consumer)

    def store(self) -> GroupOffsets | Member:
        return self.members() or GroupOffsets(self.kafka)

    def members(self) -> Member | None:
        if self.member is None:
            return None
        return shared_member(MemberConfig(self.kafka, self.member, self.transaction))

    def as_member(self, number: int) -> SourceConfig:
        transaction = self.transaction and replace(self.transaction, number=number)
        return replace(self, member=number, transaction=transaction)

    def fetch_again(self, key: PartitionKey, offsets: Sequence[int]) -> Records | None:
        return fetch_again(self.kafka, key, offsets)

    @property
    def names(self) -> Names:
        return NUMBERS

    @property
    def label(self) -> dict[str, str]:
        return {"bootstrap_servers": self.kafka.bootstrap_servers}

    @property
    def ledger(self) -> str:
        return f"group {self.kafka.group}"


# An unclean election takes the last few records; of a topic made anew nothing is left.
_FEW = 0.01


def choose_start(
    committed: int | None, low: int, high: int, wanted: int
) -> tuple[Start, str | None]:
    """Where to begin, and what to warn of. Pure.

    Args:
        committed: The group's committed offset, or what was reached; None if there is none.
        low: First offset that exists.
        high: The next offset to be written.
        wanted: What the starting position comes to.
    """
    if committed is None:
        return Start(wanted, resolved=True), None
    if committed < low:
        lost = f"{low - committed} offsets after the committed {committed} were deleted by the "
        return Start(low, resolved=False), lost + f"topic's retention; going on at {low}"
    if committed > high:
        beyond = f"the committed offset {committed} is behind the topic's end {high}: "
        if committed - high <= _FEW * committed:
            lost = "its last records were lost, as by an unclean election of a leader; "
            return Start(high, resolved=True), f"{beyond}{lost}going on at {high}"
        # Whatever the starting position: all of it is newer than what was committed.
        return Start(low, resolved=True), f"{beyond}the topic was made anew; going on at {low}"
    return Start(committed, resolved=False), None


def _code(error: KafkaException | TimeoutError) -> int | None:
    return error.args[0].code() if isinstance(error, KafkaException) else None


def _is_unknown(error: KafkaException | TimeoutError) -> bool:
    """Whether the client knows no such partition, or no leader of any, by itself."""
    return _code(error) in (ErrorCode._UNKNOWN_PARTITION, ErrorCode._NOENT)


def partly_known(
    keys: Iterable[PartitionKey], known: Container[PartitionKey]
) -> dict[str, tuple[list[int], int]]:
    """Topics that a group has offsets for in some partitions only. Pure.

    Returns:
        By topic, the partitions without an offset, and how many partitions there are.
    """
    by_topic: dict[str, list[int]] = {}
    for topic, partition in keys:
        by_topic.setdefault(topic, []).append(partition)
    found = {}
    for topic, partitions in by_topic.items():
        unknown = [number for number in partitions if (topic, number) not in known]
        if 0 < len(unknown) < len(partitions):
            found[topic] = (unknown, len(partitions))
    return found


def added_meanwhile(
    keys: Iterable[PartitionKey], committed: Collection[PartitionKey], any_topic: bool
) -> set[PartitionKey]:
    """Partitions that were not there when the group was last at work. Pure.

    Args:
        keys: The partitions there are.
        committed: Those of which the group has an offset.
        any_topic: Whether a topic of which it has none is new too, since it has one of another.
    """
    topics = {topic for topic, _ in committed}
    return {
        key for key in keys if key not in committed and (key[0] in topics or (any_topic and topics))
    }


class SourceOffsets:
    """Asks Kafka about the source's partitions; the `Partitions` of Kafka.

    Args:
        config: The group, the topics and the starting position.
        consumer: A consumer of the group that is not subscribed.
    """

    def __init__(self, config: SourceConfig, consumer: Consumer) -> None:
        self._config = config
        self._kafka = config.kafka
        self._consumer = consumer
        self._admin: AdminClient | None = None
        self._pattern = re.compile(config.topics_regex) if config.topics_regex else None
        self._topic_ids: dict[str, str] = {}
        # Who describes topics: a cluster may be without one for a while, or for good.
        self._has_controller = False
        # Where the partitions ended when they were begun.
        self._targets: dict[PartitionKey, int] = {}
        # Where those begin that were there at the start and that nothing is committed of.
        self._begins: dict[PartitionKey, int] = {}
        # Of those, the ones that others of their topic have an offset for, and of how many.
        self._gaps: dict[PartitionKey, int] = {}
        self._added: set[PartitionKey] = set()

    def find(self, quick: bool = False) -> list[Found]:
        """See `Partitions.find`."""
        return [Found(key) for key in self.partitions(LOOK_SECS if quick else _TIMEOUT_SECS)]

    def problem(self) -> KafkaError | None:
        """What is missing of the topics.

        Raises:
            KafkaError: The brokers cannot be reached.
        """
        found = {topic for topic, _ in self.partitions()}
        missing = [topic for topic in self._config.topics if topic not in found]
        if missing:
            return KafkaError(
                f"--topics: {', '.join(missing)} not found in {describe(self._kafka)}; "
                f"create it first, or check the name{self._unseen()}"
            )
        if not found:
            return KafkaError(
                f"--topics_regex={self._config.topics_regex} matches no topic of "
                f"{describe(self._kafka)}; --no_preflight waits for one"
            )
        return None

    def _unseen(self) -> str:
        # What may not be described is not listed.
        return ", or the right kafka-cluster:DescribeTopic of it" if IamLogin.used else ""

    def made_anew(self, keys: Collection[PartitionKey], quick: bool = False) -> set[str]:
        """Topics that were deleted and made anew since it was asked before.

        Raises:
            KafkaError: They cannot be read.
        """
        topics = {topic for topic, _ in keys}
        if not topics or not self._has_controller:
            return set()
        ids = self.topic_ids(topics, LOOK_SECS if quick else _TIMEOUT_SECS)
        anew = {topic for topic, id in ids.items() if self._topic_ids.get(topic, id) != id}
        self._topic_ids |= ids
        for known in (self._begins, self._gaps, self._targets):
            for key in [key for key in known if key[0] in anew]:
                del known[key]
        return anew

    def gone(self, key: PartitionKey) -> KafkaError:
        """See `Partitions.gone`."""
        return PartitionError(f"topic {key[0]} cannot be read: it is gone")

    def caught_up(self, key: PartitionKey, position: int) -> bool:
        """Whether a position is where the partition ended when it was begun, or behind it."""
        return position >= self._targets.get(key, 0)

    def restarts(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, int]:
        """See `Partitions.restarts`."""
        ranges = self.ranges(positions, LOOK_SECS)
        self._targets |= {key: high for key, (_, high) in ranges.items()}
        return {key: max(offset, ranges[key][0]) for key, offset in positions.items()}

    def detours(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, Detour]:
        """See `Partitions.detours`: retention has overtaken them, or the log ends before them."""
        found = {}
        for key, (low, high) in self.ranges(positions, LOOK_SECS).items():
            reached = positions[key]
            if reached > high:
                start, why = choose_start(reached, low, high, low)
                found[key] = Detour(start.offset, anew=(why or "").rpartition("; ")[0])
            else:
                found[key] = Detour(low, lost=max(0, low - reached))
        return found

    def partitions(self, timeout_secs: float = _TIMEOUT_SECS) -> list[PartitionKey]:
        """All partitions of the topics that exist.

        Args:
            timeout_secs: How long to wait for the brokers.

        Raises:
            KafkaError: The brokers cannot be reached.
        """
        # A consumer that fetches keeps its connection busy until records come: an answer would wait
        # as long.
        client = self._get_admin() if self._consumer.assignment() else self._consumer
        try:
            metadata = client.list_topics(timeout=timeout_secs)
        except KafkaException as error:
            # Hands over what the connections said.
            client.poll(0)
            raise KafkaError(
                f"{describe(self._kafka)} cannot be reached: {ErrorLog.last or reason(error)}; "
                f"check --kafka_bootstrap_servers and --kafka_config_file"
            ) from None
        self._has_controller = metadata.controller_id in metadata.brokers
        topics: Iterable[str] = self._config.topics
        if self._pattern:
            topics = sorted(
                name
                for name in metadata.topics
                if self._pattern.fullmatch(name) and not name.startswith(_INTERNAL)
            )
        return partitions_of(metadata, topics)

    def survey(self, keys: list[PartitionKey]) -> None:
        """See `Partitions.survey`."""
        position = self._config.starting_position
        known = self.committed(keys, _OPEN_SECS if self._config.transaction else _TIMEOUT_SECS)
        ranges = self.ranges(keys)
        self._targets |= {key: high for key, (_, high) in ranges.items()}
        begins = {key: low for key, (low, _) in ranges.items()}
        if position == LATEST:
            self._added = added_meanwhile(keys, known, self._pattern is not None)
            begins |= {key: high for key, (_, high) in ranges.items() if key not in self._added}
        elif position == AT_TIMESTAMP:
            assert self._config.starting_timestamp_ms is not None
            begins = self.at_timestamp(ranges, self._config.starting_timestamp_ms)
        if position != LATEST:
            for topic, (unknown, count) in partly_known(keys, known).items():
                self._gaps |= {(topic, number): count for number in unknown}
        self._begins = begins

    def starts(self, keys: list[PartitionKey]) -> dict[PartitionKey, Start]:
        """See `Partitions.starts`."""
        known = self.committed(keys, self._look_secs)
        committed = {key: offset for key, (offset, _) in known.items()}
        fresh = [key for key in keys if key not in committed]
        self._warn_of_gaps(fresh)
        ranges = self.ranges(keys)
        starts = {}
        for key in keys:
            low, high = ranges[key]
            if committed.get(key, 0) > high:
                # An open transaction hides what is behind it; is the topic's end behind it too?
                high = self._written_end(key)
            wanted = max(low, self._begins.get(key, low))
            start, warning = choose_start(committed.get(key), low, high, wanted)
            if warning:
                _LOGGER.warning("%s-%d: %s", *key, warning)
            if start.offset == committed.get(key):
                start = replace(start, note=known[key][1], end=high)
            elif key in self._added and key not in committed and low < high:
                _LOGGER.warning(
                    "%s-%d has no committed offset, and others of --consumer_group=%s have: it "
                    "was added while no run was up, or its offset has expired; going on at its "
                    "first record, %d, in place of LATEST",
                    *key,
                    self._kafka.group,
                    low,
                )
            starts[key] = start
            self._targets.setdefault(key, high)
        return starts

    def unfinished(self, keys: Collection[PartitionKey]) -> dict[PartitionKey, int]:
        """See `Partitions.unfinished`."""
        known = self.committed(list(keys), self._look_secs)
        kept = {key: known[key][0] if key in known else 0 for key in keys}
        return {
            key: at for key, at in kept.items() if key not in known or not self.caught_up(key, at)
        }

    def _warn_of_gaps(self, keys: list[PartitionKey]) -> None:
        by_topic: dict[str, list[int]] = {}
        for topic, number in keys:
            if (topic, number) in self._gaps:
                by_topic.setdefault(topic, []).append(number)
        for topic, unknown in by_topic.items():
            some = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            _LOGGER.warning(
                "group %s has no offset for %d of the %d partitions of topic %s (%s): they are "
                "new, or the broker has forgotten it; they begin as --starting_position=%s says",
                self._kafka.group,
                len(unknown),
                self._gaps[topic, unknown[0]],
                topic,
                some,
                self._config.starting_position,
            )

    def range(self, key: PartitionKey) -> tuple[int, int]:
        """A partition's first offset and its next one, asked of the broker."""
        return self.ranges([key])[key]

    def ranges(
        self, keys: Iterable[PartitionKey], timeout_secs: float = _TIMEOUT_SECS
    ) -> dict[PartitionKey, tuple[int, int]]:
        """The first offset and the next one of each partition, asked of all brokers at once.

        Raises:
            KafkaError: They cannot be read.
        """
        keys = list(keys)
        lows = self._list_offsets(keys, OffsetSpec.earliest(), timeout_secs=timeout_secs)
        highs = self._list_offsets(
            keys, OffsetSpec.latest(), self._isolation(), timeout_secs=timeout_secs
        )
        return {key: (lows[key], max(lows[key], highs[key])) for key in keys}

    def topic_ids(
        self, topics: Iterable[str], timeout_secs: float = _TIMEOUT_SECS
    ) -> dict[str, str]:
        """What tells a topic from one made anew under its name; nothing of brokers before 2.8.

        Raises:
            KafkaError: They cannot be read.
        """
        admin = self._get_admin()
        try:
            asked = admin.describe_topics(
                TopicCollection(list(topics)), request_timeout=timeout_secs
            )
            found = {}
            for topic, future in asked.items():
                try:
                    found[topic] = future.result(timeout_secs + 1).topic_id
                except KafkaException as error:
                    if error.args[0].code() != ErrorCode.UNKNOWN_TOPIC_OR_PART:
                        raise
        except (KafkaException, TimeoutError) as error:
            raise self._failed("topic ids", error) from None
        finally:
            admin.poll(0)
        return {topic: str(id) for topic, id in found.items() if id is not None}

    def _written_end(self, key: PartitionKey) -> int:
        """A partition's end, records of open transactions included."""
        return self._list_offsets([key], OffsetSpec.latest())[key]

    def _list_offsets(
        self,
        keys: list[PartitionKey],
        which: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
        timeout_secs: float = _TIMEOUT_SECS,
    ) -> dict[PartitionKey, int]:
        if not keys:
            return {}
        again = False
        deadline = monotonic() + timeout_secs
        while True:
            admin = self._get_admin()
            what = "offsets"
            try:
                asked = admin.list_offsets(
                    {TopicPartition(*key): which for key in keys},
                    isolation_level=isolation,
                    request_timeout=timeout_secs,
                )
                found = {}
                for each, future in asked.items():
                    what = f"offsets of {each.topic}-{each.partition}"
                    found[each.topic, each.partition] = int(future.result(timeout_secs + 1).offset)
                return found
            except (KafkaException, TimeoutError) as error:
                if _code(error) in NO_LEADER and monotonic() < deadline:
                    sleep(0.2)
                    continue
                if again or not _is_unknown(error):
                    # No answer in time is none to all of them.
                    late = _code(error) == ErrorCode._TIMED_OUT and len(keys) > 1
                    raise self._failed("offsets" if late else what, error) from None
                # The client keeps what it knows of a topic for minutes, and so takes partitions
                # that were added meanwhile for none. A new client asks.
                again, self._admin = True, None
            finally:
                admin.poll(0)

    def _isolation(self) -> IsolationLevel:
        level = client_settings(self._kafka).get("isolation.level")
        if level == "read_uncommitted":
            return IsolationLevel.READ_UNCOMMITTED
        return IsolationLevel.READ_COMMITTED

    def _get_admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = make_admin(self._kafka)
        return self._admin

    @property
    def _look_secs(self) -> float:
        """How long to ask for committed offsets while other partitions wait."""
        return _OPEN_LOOK_SECS if self._config.transaction else _TIMEOUT_SECS

    def committed(
        self, keys: list[PartitionKey], timeout_secs: float = _TIMEOUT_SECS
    ) -> dict[PartitionKey, tuple[int, str]]:
        """The group's committed offsets, where there are any, and the metadata kept with them.

        There is no answer while a transaction is open that has some of them in it.
        """
        partitions = [TopicPartition(*key) for key in keys]
        deadline = monotonic() + timeout_secs
        not_yet = _NOT_YET | ({ErrorCode._TIMED_OUT} if timeout_secs == _OPEN_SECS else set())
        while True:
            try:
                secs = min(timeout_secs, _TIMEOUT_SECS)
                offsets = self._consumer.committed(partitions, timeout=secs)
                # Of a partition that could not be asked after nothing is known: not even that there
                # is no offset.
                for each in offsets:
                    if each.error:
                        raise KafkaException(each.error)
                break
            except KafkaException as error:
                # A broker that has just begun knows no coordinator for the group yet.
                if error.args[0].code() not in not_yet or monotonic() > deadline:
                    group = f"committed offsets of group {self._kafka.group}"
                    raise self._failed(group, error) from None
                sleep(0.2)
        return {
            (o.topic, o.partition): (o.offset, o.metadata or "")
            for o in offsets
            if o.offset > _NO_OFFSET
        }

    def at_timestamp(
        self, ranges: Mapping[PartitionKey, tuple[int, int]], timestamp: int
    ) -> dict[PartitionKey, int]:
        """The first offsets that are not older than a time in ms; the end where all are.

        Raises:
            KafkaError: They cannot be read.
        """
        try:
            found = self._consumer.offsets_for_times(
                [TopicPartition(*key, timestamp) for key in ranges], timeout=_TIMEOUT_SECS
            )
        except KafkaException as error:
            raise self._failed("offsets by timestamp", error) from None
        # Nothing that young: the partition begins with whatever comes next.
        return {
            (o.topic, o.partition): o.offset if o.offset >= 0 else ranges[o.topic, o.partition][1]
            for o in found
        }

    def _failed(self, what: str, error: KafkaException | TimeoutError) -> KafkaError:
        why = reason(error) if isinstance(error, KafkaException) else "no answer in time"
        return KafkaError(f"{describe(self._kafka)}: {what} cannot be read: {why}")
