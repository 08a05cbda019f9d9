"""Preflight: find what would fail later, before anything is read."""

from __future__ import annotations

import time

from confluent_kafka import KafkaException

from pipeline.offsets import SourceOffsets
from pipeline.options import Config
from transforms.aws import LambdaFunction
from transforms.errors import KafkaError
from transforms.kafka import client_settings, describe, make_producer, reason

_APPEAR_SECS = 5.0


def preflight(config: Config, source: SourceOffsets) -> None:
    """Check the topics, then the function by a DryRun.

    A missing response or error topic is made by a broker that makes topics by itself, as it
    would be at the first record written.

    Raises:
        KafkaError: The brokers cannot be reached, or a topic is missing.
        FunctionConfigError: The function cannot be invoked.
    """
    found = {topic for topic, _ in source.partitions()}
    missing = [topic for topic in config.run.topics if topic not in found]
    if missing:
        raise KafkaError(
            f"--topics: {', '.join(missing)} not found in {describe(config.kafka)}; "
            f"create it first, or check the name"
        )
    if not found:
        raise KafkaError(
            f"--topics_regex={config.run.topics_regex} matches no topic of "
            f"{describe(config.kafka)}; --no_preflight waits for one"
        )
    for option, prefix, topic in (
        ("response_topic", "response.", config.write.response_topic),
        ("error_topic", "error.", config.write.error_topic),
    ):
        if topic:
            _check_output(config, option, prefix, topic)
    LambdaFunction(config.invoke.function).check()


def _check_output(config: Config, option: str, prefix: str, topic: str) -> None:
    producer = make_producer(client_settings(config.kafka, prefix))
    deadline = time.monotonic() + _APPEAR_SECS
    while True:
        try:
            # Naming the topic is what makes a broker create it, where it is set to.
            metadata = producer.list_topics(topic, timeout=15).topics[topic]
        except KafkaException as error:
            raise KafkaError(f"--{option}={topic} cannot be reached: {reason(error)}") from None
        if metadata.error is None and metadata.partitions:
            return
        if time.monotonic() > deadline:
            why = metadata.error.str() if metadata.error else "it has no partitions"
            raise KafkaError(f"--{option}={topic} cannot be written: {why}; create it first")
        time.sleep(0.1)
