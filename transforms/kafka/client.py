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
from transforms.text_file import read_text

_LOGGER = logging.getLogger(__name__)

SCHEMA_REGISTRY_PREFIX = "schema.registry."
PREFIXES = ("response.", "error.", SCHEMA_REGISTRY_PREFIX)

# What a broker answers that has just begun: it knows no coordinator for the group yet.
NO_COORDINATOR = frozenset(
    {
        ErrorCode.NOT_COORDINATOR,
        ErrorCode.COORDINATOR_NOT_AVAILABLE,
        ErrorCode.COORDINATOR_LOAD_IN_PROGRESS,
    }
)

_WARN_SECS = 30.0
_QUOTED_VALUE = re.compile(r'Invalid value "([^"]*)"')

# A colon is what Java takes, too.
_SETTING = re.compile(r"([A-Za-z0-9._-]+)\s*[=:]\s*(.*)", re.DOTALL)
_ENVIRONMENT = re.compile(r"\$\{env:([^}]*)\}")

# Ours to decide: each of them would break a guarantee or another option.
_OURS = {
    "group.id": "use --consumer_group",
    "bootstrap.servers": "use --kafka_bootstrap_servers",
    "metadata.broker.list": "it is bootstrap.servers by another name; use "
    "--kafka_bootstrap_servers, or bootstrap.servers with a prefix",
    "enable.auto.commit": "offsets are committed when their records are finished",
    "enable.auto.offset.store": "offsets are committed when their records are finished",
    "auto.offset.reset": "use --starting_position",
    "enable.idempotence": "it is always on, since it keeps order and loses nothing",
    "acks": "it is always all",
    "request.required.acks": "it is always all",
    "transactional.id": "nothing begins or ends transactions; delivery is at least once",
    "enable.partition.eof": "the reader needs it on",
}

JAVA_NAMES = {
    "sasl.jaas.config": "sasl.username and sasl.password",
    "ssl.truststore.location": "ssl.ca.location (PEM)",
    "ssl.keystore.location": "ssl.certificate.location and ssl.key.location (PEM), "
    "or ssl.keystore.location with a PKCS#12 file",
    "ssl.truststore.password": "ssl.ca.location (PEM), which needs no password",
    "sasl.login.callback.handler.class": "sasl.oauthbearer.method=oidc and its settings",
}


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


def parse_properties(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Read ``name=value`` or ``name: value`` lines; ``#`` and ``!`` begin a comment line.

    Raises:
        UsageError: With all lines that are no setting, names that are not to be set, and
            environment variables that do not exist. Never shows a value.
    """
    settings: dict[str, str] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#!":
            continue
        found = _SETTING.fullmatch(line)
        if not found:
            problems.append(f"line {number} is not of the form name=value")
            continue
        name, value = found.groups()
        bare = next((name[len(p) :] for p in PREFIXES[:2] if name.startswith(p)), name)
        if bare in _OURS and not (bare == "bootstrap.servers" and bare != name):
            problems.append(f"line {number} sets {name}, which the pipeline owns: {_OURS[bare]}")
        bare = bare.removeprefix(SCHEMA_REGISTRY_PREFIX)
        if bare in JAVA_NAMES and not (bare == "ssl.keystore.location" and value.endswith("p12")):
            problems.append(
                f"line {number} sets {name}, a setting of Java clients; here it is "
                f"{JAVA_NAMES[bare]}"
            )
        missing = [key for key in _ENVIRONMENT.findall(value) if key not in environ]
        for key in missing:
            problems.append(f"line {number} ({name}) needs the environment variable {key!r}")
        if not missing:
            settings[name] = _ENVIRONMENT.sub(lambda match: environ[match[1]], value)
    if problems:
        raise UsageError(problems)
    return settings


def load_properties(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Read a properties file; see `parse_properties`.

    Raises:
        UsageError: The file cannot be read, or what is in it does not fit.
    """
    text = read_text("kafka_config_file", path)
    try:
        return parse_properties(text, environ)
    except UsageError as error:
        prefix = f"--kafka_config_file={path}: "
        raise UsageError([prefix + problem for problem in error.problems]) from None


def client_settings(config: KafkaConfig, prefix: str = "") -> dict[str, Any]:
    """Settings of one client: the common ones, then those with its prefix."""
    settings: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": "beam-lambda-sink",
        # Else a connection that was forgotten on its way is found out at the next request only.
        "socket.keepalive.enable": True,
    }
    if config.config_file:
        properties = load_properties(config.config_file)
        settings |= {k: v for k, v in properties.items() if not k.startswith(PREFIXES)}
        if prefix:
            settings |= {k[len(prefix) :]: v for k, v in properties.items() if k.startswith(prefix)}
    return settings


def make_consumer(config: KafkaConfig, **defaults: Any) -> confluent_kafka.Consumer:
    """A consumer that is never subscribed: it reads and commits what it is told to.

    Args:
        config: The cluster, the group and the settings file.
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
    return _client(confluent_kafka.Consumer, defaults | client_settings(config) | ours)


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
