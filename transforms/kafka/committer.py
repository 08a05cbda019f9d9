"""Committer: offsets of a consumer group of which we are no member; `members` has the others."""

from __future__ import annotations

from collections.abc import Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka import KafkaError as ErrorCode

from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig, describe, make_consumer, reason
from transforms.records import PartitionKey

_ASK_SECS = 5.0
_FOREIGN_MEMBER = frozenset(
    {
        ErrorCode.UNKNOWN_MEMBER_ID,
        ErrorCode.ILLEGAL_GENERATION,
        ErrorCode.REBALANCE_IN_PROGRESS,
    }
)


class GroupOffsets:
    """Keeps offsets in a consumer group.

    Args:
        config: The cluster and the group.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._consumer = make_consumer(config)

    def commit(
        self, offsets: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str], late: bool
    ) -> str | None:
        """See `Store.commit`.

        Raises:
            KafkaError: The group has members elsewhere, or the broker stays away.
        """
        asked = [
            TopicPartition(*key, offset, metadata=notes.get(key, ""))
            for key, offset in offsets.items()
        ]
        try:
            results = self._consumer.commit(offsets=asked, asynchronous=False)
            if failed := [result.error for result in results or () if result.error]:
                raise KafkaException(failed[0])
        except KafkaException as error:
            if problem := final_problem(error, self._config, late):
                raise problem from None
            return reason(error)
        return None

    def kept(self, key: PartitionKey) -> int | None:
        """See `Store.kept`."""
        return kept(self._consumer, key)

    def listen(self) -> None:
        """See `Store.listen`."""
        self._consumer.poll(0)


def kept(consumer: Consumer, key: PartitionKey) -> int | None:
    """What is committed of a partition in a consumer's group; None if it is not known."""
    try:
        (found,) = consumer.committed([TopicPartition(*key)], timeout=_ASK_SECS)
    except KafkaException:
        return None
    return None if found.error or found.offset < 0 else int(found.offset)


def final_problem(error: KafkaException, kafka: KafkaConfig, late: bool) -> KafkaError | None:
    """What to end with after a commit that failed; None if it is worth another try. Pure.

    Args:
        error: What was answered.
        kafka: The cluster and the group.
        late: Whether it has been tried for long enough.
    """
    code, group = error.args[0].code(), kafka.group
    if code in _FOREIGN_MEMBER:
        return foreign_members(kafka, reason(error))
    if late or code == ErrorCode.GROUP_AUTHORIZATION_FAILED:
        return KafkaError(
            f"offsets of --consumer_group={group} cannot be committed to "
            f"{describe(kafka)}: {reason(error)}"
        )
    return None


def foreign_members(kafka: KafkaConfig, why: str) -> KafkaError:
    """What to end with when another program has the group. Pure."""
    return KafkaError(
        f"offsets of --consumer_group={kafka.group} cannot be committed: the group has active "
        f"members ({why}); stop the other consumer or use another group"
    )
