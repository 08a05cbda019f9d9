"""Preflight: find what would fail later, before anything is read."""

from __future__ import annotations

import time

from pipeline.options.config import Config
from transforms.aws.delivery import shared_delivery
from transforms.errors import KafkaError
from transforms.invoke.invoke import shared_function
from transforms.schemas.registry import shared_registry
from transforms.source import Partitions
from transforms.write.produce import (
    error_format,
    error_writer,
    response_format,
    response_writer,
)
from transforms.write.topic_writer import TopicWriter

_APPEAR_SECS = 5.0


def preflight(config: Config, source: Partitions) -> None:
    """Check what is read and where it is written, and the schema registry; then the function by a
    DryRun.

    A missing response or error topic is made by a broker that makes topics by itself, as it
    would be at the first record written.

    Raises:
        SinkError: What is read cannot be reached, or is not all there.
        KafkaError: A topic is missing.
        RegistryError: The schema registry does not answer.
        FunctionConfigError: The function cannot be invoked.
    """
    if problem := source.problem():
        raise problem
    check_outputs(config)


def check_outputs(config: Config) -> None:
    """Check the response and the error topic, then the function.

    Raises:
        KafkaError: A topic is missing.
        WriteError: The destination of failed batches is not there.
        FunctionConfigError: The function cannot be invoked.
    """
    # The clients made here are those the run goes on with.
    if config.write.response_topic:
        _check_output("response_topic", response_writer(config.write))
    if config.write.error_topic:
        _check_output("error_topic", error_writer(config.write))
    if config.write.delivery:
        shared_delivery(config.write.delivery).check()
    if config.write.registry:
        shared_registry(config.write.registry).check()
        # Registers the schemas of what is written.
        response_format(config.write, ranges=config.invoke.reply == "any")
        error_format(config.write)
    shared_function(config.invoke.function).check()


def _check_output(option: str, writer: TopicWriter) -> None:
    deadline = time.monotonic() + _APPEAR_SECS
    while why := writer.problem():
        if time.monotonic() > deadline:
            raise KafkaError(f"--{option}={writer.topic} cannot be written: {why}")
        time.sleep(0.1)
