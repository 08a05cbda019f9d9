"""Orphans: partitions that a group has dealt out to nobody, found and dealt out again.

A member with an id of its own (`group.instance.id`) that dies while it lets go of partitions was to
ask the group to deal these out. Started again it does not know of that, and the group takes it for
the same as before: they would be nobody's until a member comes or goes. So a member that has begun
looks for such partitions, and where there are any one more member comes and goes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from time import monotonic
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka import ConsumerGroupState as State

from transforms.kafka.client import (
    KafkaConfig,
    leave_group,
    make_admin,
    make_consumer,
    partitions_of,
)
from transforms.records import PartitionKey

_LOGGER = logging.getLogger(__name__)

# How long a member waits before it looks, and between two looks: what moves is nobody's for a bit.
_WAIT_SECS = 2.0
_LOOKS = 3
_ASK_SECS = 5.0
# How long the one more waits to be dealt with.
_STIR_SECS = 30.0


class Orphans:
    """Looks for orphans in place of one member. Used by its thread.

    Args:
        kafka: The cluster and the group.
        settings: What a member's consumer is told beside the user's settings.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        kafka: KafkaConfig,
        settings: Mapping[str, Any],
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._kafka = kafka
        self._settings = {
            name: value for name, value in settings.items() if name != "group.instance.id"
        }
        self._timer = timer
        self._look_at = timer() + _WAIT_SECS
        self._looks = _LOOKS
        self._seen: set[PartitionKey] = set()
        self._guest: Consumer | None = None
        self._guest_until = 0.0

    def turn(self, topics: Collection[str]) -> None:
        """Do what is due; to be called again and again, while the member is polled.

        Args:
            topics: Those that the member is subscribed to.
        """
        if self._guest:
            self._guest.poll(0)
            if self._timer() > self._guest_until:
                self.close()
        elif self._looks and self._timer() > self._look_at:
            self._looks -= 1
            self._look_at = self._timer() + _WAIT_SECS
            found = self._look(topics)
            if found is not None:
                lasting, self._seen = self._seen & found, found
                if lasting:
                    self._stir(lasting, topics)
                elif not found:
                    self._looks = 0

    def close(self) -> None:
        """Let nobody else come into the group."""
        self._looks = 0
        if guest := self._guest:
            self._guest = None
            leave_group(guest)

    def _look(self, topics: Collection[str]) -> set[PartitionKey] | None:
        """Partitions that are nobody's; None if that cannot be told now."""
        admin = make_admin(self._kafka)
        try:
            asked = admin.describe_consumer_groups([self._kafka.group], request_timeout=_ASK_SECS)
            group = asked[self._kafka.group].result()
            there = partitions_of(admin.list_topics(timeout=_ASK_SECS), topics)
        except KafkaException as error:
            _LOGGER.debug("members of %s: %s", self._kafka.group, error)
            return None
        if group.state != State.STABLE:
            return None
        dealt = {
            (each.topic, each.partition)
            for member in group.members
            if member.assignment
            for each in member.assignment.topic_partitions
        }
        return set(there) - dealt

    def _stir(self, orphans: Collection[PartitionKey], topics: Collection[str]) -> None:
        """Have the group deal anew: one more member comes, and goes when it is dealt with."""
        _LOGGER.info(
            "%s: %d partitions are nobody's (%s-%d first); the group is asked to deal anew",
            self._kafka.group,
            len(orphans),
            *min(orphans),
        )

        def on_assign(guest: Consumer, partitions: list[TopicPartition]) -> None:
            if partitions:
                guest.incremental_assign(partitions)
                guest.pause(partitions)
            self._guest_until = self._timer()

        self._guest = make_consumer(self._kafka, **self._settings)
        self._guest_until = self._timer() + _STIR_SECS
        self._guest.subscribe(sorted(topics), on_assign=on_assign)
