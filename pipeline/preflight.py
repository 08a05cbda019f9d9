"""Preflight: find what would fail later, before anything is read."""

from __future__ import annotations

import time

from pipeline.offsets import SourceOffsets
from pipeline.options import Config
from transforms.errors import KafkaError
from transforms.invoke import shared_function
from transforms.kafka import describe
from transforms.write import TopicWriter, error_writer, response_writer

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
    # The clients made here are those the run goes on with.
    if config.write.response_topic:
        _check_output("response_topic", response_writer(config.write))
    if config.write.error_topic:
        _check_output("error_topic", error_writer(config.write))
    shared_function(config.invoke.function).check()


def _check_output(option: str, writer: TopicWriter) -> None:
    deadline = time.monotonic() + _APPEAR_SECS
    while why := writer.problem():
        if time.monotonic() > deadline:
            raise KafkaError(f"--{option}={writer.topic} cannot be written: {why}")
        time.sleep(0.1)
