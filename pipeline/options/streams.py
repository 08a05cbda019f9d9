"""Streams: what the options leave to AWS: the ARN of a stream that is given by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.options.config import Config
from transforms.envelope import KINESIS_EVENT
from transforms.kinesis.client import AwsConfig
from transforms.kinesis.shards import STREAM_ARN
from transforms.kinesis.stream import KinesisSource, arn_of


def with_arns(config: Config, ask: Callable[[AwsConfig, str], str] = arn_of) -> Config:
    """The config with each stream's ARN, where events show it.

    Args:
        config: Of a checked command line.
        ask: Asks Kinesis for the ARN of a name.

    Raises:
        KinesisError: Kinesis does not say it.
    """
    source, format, write = config.source, config.batch.format, config.write
    shown = format.envelope.name == KINESIS_EVENT or write.destination
    if not isinstance(source, KinesisSource) or not shown:
        return config
    arns = tuple(
        (name, arn if STREAM_ARN.fullmatch(arn) else ask(source.aws, name))
        for name, arn in format.envelope.stream_arns
    )
    envelope = replace(format.envelope, stream_arns=arns)
    if write.destination:
        write = replace(write, destination=replace(write.destination, stream_arns=arns))
    batch = replace(config.batch, format=replace(format, envelope=envelope))
    invoke = config.invoke
    if invoke.window:
        invoke = replace(invoke, window=replace(invoke.window, envelope=envelope))
    return replace(config, batch=batch, invoke=invoke, write=write)
