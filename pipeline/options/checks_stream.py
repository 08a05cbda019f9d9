"""Checks of what goes with --stream, and of what goes without it only."""

from __future__ import annotations

from typing import Any

from pipeline.options.declare import EXACTLY_ONCE, OPTIONS
from transforms import envelope
from transforms.kinesis.stream import stream_name

_NEEDED_BY = ("response_topic", "error_topic")
_STREAMS_ONLY = (
    "lease_table",
    "lease_secs",
    "stream_poll_secs",
    "stream_role_arn",
    "kinesis_endpoint_url",
    "dynamodb_endpoint_url",
    "invoke_identity_arn",
)
_TOPICS_ONLY = ("consumer_group", "event_source_arn", "schema_registry_url")


def check_stream(values: dict[str, Any], given: dict[str, str | None], problems: list[str]) -> None:
    """Note what is missing for a stream, or does not go with one."""
    for name in ("kinesis_endpoint_url", "dynamodb_endpoint_url", "stream_role_arn"):
        if values[name] and not OPTIONS[name].fits(values[name]):
            what = "the ARN of a role" if name.endswith("arn") else "an http:// or https:// address"
            problems.append(f"--{name}={values[name]} is not {what}")
    if given.get("stream") is None:
        problems += [
            f"--{name} goes with --stream only" for name in _STREAMS_ONLY if given.get(name)
        ]
        return
    streams = values["stream"] or ()
    if not streams:
        problems.append("--stream is empty; leave it out, or give it a value")
    names = [stream_name(each) for each in streams]
    for each in streams:
        if not OPTIONS["stream"].fits(each):
            problems.append(f"--stream: {each} is no name of a stream, nor its ARN")
        elif names.count(stream_name(each)) > 1:
            problems.append(f"--stream: {each} has the name of another; read them in two runs")
    table = values["lease_table"]
    if not table:
        example = OPTIONS["lease_table"].example
        problems.append(f"--lease_table is missing; for example --lease_table={example}")
    elif not OPTIONS["lease_table"].fits(table):
        problems.append(
            f"--lease_table={table} is not a table name (3 to 255 letters, digits, . _ -)"
        )
    for name in _TOPICS_ONLY:
        if given.get(name) is not None:
            problems.append(f"--{name} does not go with --stream")
    for name in _NEEDED_BY:
        if values[name] and not values["kafka_bootstrap_servers"]:
            problems.append(f"--{name}={values[name]} needs --kafka_bootstrap_servers")
    if values["envelope"] in (envelope.KAFKA_EVENT, envelope.PIPES):
        problems.append(
            f"--envelope={values['envelope']} does not go with --stream; give "
            f"--envelope={envelope.KINESIS_EVENT}"
        )
    if values["delivery"] == EXACTLY_ONCE:
        problems.append(
            f"--delivery={EXACTLY_ONCE} does not go with --stream: how far it is done is not kept "
            f"in Kafka"
        )


def check_stream_job(values: dict[str, Any], problems: list[str]) -> None:
    """Note what a streaming job cannot do with a stream."""
    if values["until"] == "caught_up":
        problems.append(
            "--until=caught_up with --stream goes with the DirectRunner only: a shard does not say "
            "where it ends"
        )
    if values["kafka_reader"] == "beam":
        problems.append("--kafka_reader=beam does not go with --stream: it reads topics")
