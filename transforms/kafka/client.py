"""Kafka clients: settings from an options value and a properties file. No Beam.

The properties file takes anything librdkafka takes. Settings without a prefix go to every client;
``response.`` and ``error.`` go to the producer of that topic only. ``${env:NAME}`` is replaced by
the environment variable, so that no secret has to be in the file. It may be in Secret Manager too:
see `transforms.text_file`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from transforms.errors import UsageError
from transforms.properties import PREFIXES, load_properties

_LOGGER = logging.getLogger(__name__)

# What a broker answers that has just begun: it knows no coordinator for the group yet.
NO_COORDINATOR = frozenset(
    {
        ErrorCode.NOT_COORDINATOR,
        ErrorCode.COORDINATOR_NOT_AVAILABLE,
        ErrorCode.COORDINATOR_LOAD_IN_PROGRESS,
    }
)

# Settings of a consumer as a member of its group.
_OF_MEMBERS = frozenset(
    {
        "group.instance.id",
        "group.protocol",
        "group.remote.assignor",
        "heartbeat.interval.ms",
        "max.poll.interval.ms",
        "partition.assignment.strategy",
        "session.timeout.ms",
    }
)

_WARN_SECS = 30.0
_QUOTED_VALUE = re.compile(r'Invalid value "([^"]*)"')


@dataclass(frozen=True, slots=True)
class KafkaConfig:
    """Where Kafka is. Holds the name of the settings file, never what is in it.

    Attributes:
        bootstrap_servers: Comma separated host:port list.
        group: Consumer group whose committed offsets are the durable truth.
        config_file: Properties file, or None.
    """

    bootstrap_servers: str
    group: str
    config_file: str | None = None


def client_settings(config: KafkaConfig, *prefixes: str) -> dict[str, Any]:
    """Settings of one client: the common ones, then those with its prefixes."""
    settings: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": "beam-lambda-sink",
        # Else a connection that was forgotten on its way is found out at the next request only.
        "socket.keepalive.enable": True,
    }
    if config.config_file:
        properties = load_properties(config.config_file)
        settings |= {k: v for k, v in properties.items() if not k.startswith(PREFIXES)}
        for prefix in prefixes:
            settings |= {k[len(prefix) :]: v for k, v in properties.items() if k.startswith(prefix)}
    return settings


def instance_id(settings: Mapping[str, Any], number: int) -> str | None:
    """The name that a member keeps when it is started again; None if it has none. Pure.

    Args:
        settings: The user's.
        number: Which of the members that have the same settings it is.
    """
    name = settings.get("group.instance.id")
    return f"{name}-{number}" if name and number else name


def make_consumer(
    config: KafkaConfig, member: Mapping[str, Any] | None = None, **defaults: Any
) -> confluent_kafka.Consumer:
    """A consumer that reads and commits what it is told to.

    Args:
        config: The cluster, the group and the settings file.
        member: Settings of one that will be subscribed, which the file may not change. None for
            one that never is: what the file says of a member does not concern it.
        defaults: Settings that the file may change.

    Raises:
        UsageError: librdkafka refuses the settings.
    """
    ours = {
        "group.id": config.group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # An offset that is gone must be heard of, not skipped in silence.
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
    }
    given = client_settings(config)
    if member is None:
        given = {name: value for name, value in given.items() if name not in _OF_MEMBERS}
    return _client(confluent_kafka.Consumer, defaults | given | ours | dict(member or {}))


def make_admin(config: KafkaConfig) -> AdminClient:
    """A client that asks about topics; who uses it calls `poll(0)`, so that no events pile up.

    Raises:
        KafkaError: librdkafka refuses the settings.
    """
    return _client(AdminClient, client_settings(config))


def make_producer(settings: Mapping[str, Any]) -> confluent_kafka.Producer:
    """An idempotent producer: keeps order, acknowledged by all replicas, reports failures only.

    Raises:
        UsageError: librdkafka refuses the settings.
    """
    ours = {
        "enable.idempotence": True,
        "delivery.report.only.error": True,
    }
    defaults = {
        "linger.ms": 5,
        "queue.buffering.max.messages": 500_000,
        "queue.buffering.max.kbytes": 65_536,
        # The broker's limit is the one that counts; the client's own must not be met first.
        "message.max.bytes": 1_000_000_000,
    }
    return _client(confluent_kafka.Producer, defaults | dict(settings) | ours)


def _client(kind: Any, settings: Mapping[str, Any]) -> Any:
    try:
        return kind({**settings, "error_cb": ErrorLog()}, logger=logging.getLogger("librdkafka"))
    except KafkaException as error:
        text = _QUOTED_VALUE.sub(_mask, reason(error))
        raise UsageError([f"Kafka settings: {text}; see --kafka_config_file"]) from None
    except (TypeError, ValueError) as error:
        raise UsageError([f"Kafka settings: {error}; see --kafka_config_file"]) from None


def _mask(quoted: re.Match[str]) -> str:
    """librdkafka quotes a value it refuses; what came from the environment may be a secret."""
    return "Invalid value" if quoted[1] in os.environ.values() else quoted[0]


class ErrorLog:
    """What a client says of its connections: one warning in a while, and the last cause.

    Attributes:
        last: The last cause that any client of this process met; "all brokers are down" is none.
    """

    last = ""
    _warned = float("-inf")

    def __call__(self, error: Any) -> None:
        if error.code() == ErrorCode._ALL_BROKERS_DOWN:
            return
        ErrorLog.last = " ".join(error.str().split())
        if monotonic() - ErrorLog._warned > _WARN_SECS:
            ErrorLog._warned = monotonic()
            _LOGGER.warning("kafka: %s", ErrorLog.last)


def reason(error: KafkaException) -> str:
    """What librdkafka says, as one line."""
    inner = error.args[0] if error.args else error
    text = inner.str() if hasattr(inner, "str") else str(inner)
    return " ".join(text.split())


def describe(config: KafkaConfig) -> str:
    """How to name the cluster in a message."""
    return f"Kafka at {config.bootstrap_servers}"


def partitions_of(metadata: Any, topics: Iterable[str]) -> list[tuple[str, int]]:
    """All (topic, partition) of the topics that the metadata has."""
    return [
        (topic, partition)
        for topic in topics
        if topic in metadata.topics
        for partition in sorted(metadata.topics[topic].partitions)
    ]
