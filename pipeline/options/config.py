"""Config: everything a run needs, one frozen value per step, made from the options' texts."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from pipeline.options.checks import (
    check_beam_reader,
    check_destination,
    check_together,
    parse_address,
    parse_timestamp,
    parse_value,
    warnings_of,
)
from pipeline.options.checks_login import login_of
from pipeline.options.checks_stream import check_stream_job
from pipeline.options.declare import (
    EXACTLY_ONCE,
    FLINK_RUNNERS,
    NO_ATTRIBUTE,
    OPTIONS,
    STREAM_RUNNERS,
)
from pipeline.options.token import VARIABLE, read_token
from transforms import envelope
from transforms.access import (
    KINDS,
    REGISTRY_KINDS,
    Access,
    AccessError,
    login_settings,
    parse_access,
)
from transforms.aws.delivery import DeliveryConfig
from transforms.aws.function import MAX_ASYNC_BYTES, MAX_SYNC_BYTES, FunctionConfig
from transforms.batch.batch import BatchConfig
from transforms.batch.payload import PayloadFormat
from transforms.commit.committer import CommitConfig
from transforms.decode.decode import DecodeConfig
from transforms.envelope import Envelope
from transforms.errors import UsageError
from transforms.filter.filter import STREAM_FIELDS, FilterConfig, load_criteria
from transforms.invoke import reply
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.invoke import InvokeConfig
from transforms.invoke.retry import RetryPolicy
from transforms.kafka.beam_reader import BeamReadConfig
from transforms.kafka.client import KafkaConfig
from transforms.kafka.login import put_over
from transforms.kafka.offsets import SourceConfig
from transforms.kafka.streaming import KafkaStream
from transforms.kafka.transaction import TransactionConfig
from transforms.kinesis.client import AwsConfig
from transforms.kinesis.stream import KinesisSource, stream_name
from transforms.kinesis.streaming import KinesisStream
from transforms.lanes import Lanes
from transforms.names import NUMBERS
from transforms.properties import load_properties
from transforms.read.rounds import ReadConfig
from transforms.read.streaming import NativeReadConfig
from transforms.schemas.registry import RegistryConfig, check_settings
from transforms.schemas.schema import CONNECT, STANDARD
from transforms.tracing import TraceConfig
from transforms.write import destination
from transforms.write.produce import WriteConfig


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How the rounds run.

    Attributes:
        preflight: Whether to check topics and function first.
        until: ``forever`` or ``caught_up``.
        summary: ``text``, ``json`` or ``none``.
        log_format: ``text`` or ``json``.
        log_level: From which level on lines are logged.
        workers: Processes of the DirectRunner.
        max_workers: How many there may be of them; None for as many as there are.
        http: Host and port to answer at; None for nowhere.
        report: File to write the page to at the end; None for none.
        http_token: What who tells the run something has to give; empty if nobody can.
        page_show: ``none`` or ``messages``.
        start_paused: Whether nothing is read before it is resumed.
        metrics_partitions: Up to how many partitions each has series of its own.
        rebalance_wait_secs: How long calls are waited for whose partition the group asks for; None
            for as long as the function may take.
    """

    preflight: bool
    until: str
    summary: str
    log_format: str
    workers: int = 1
    max_workers: int | None = None
    http: tuple[str, int] | None = None
    metrics_partitions: int = 100
    http_token: str = field(default="", repr=False)
    page_show: str = "none"
    report: str | None = None
    start_paused: bool = False
    log_level: str = "INFO"
    rebalance_wait_secs: float | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the pipeline needs, one frozen value per step.

    `stream` says how a streaming run reads; it is None on the DirectRunner, which has `read`.
    `warnings` is what can be meant, but hardly is, one line each.
    """

    kafka: KafkaConfig
    source: SourceConfig | KinesisSource
    read: ReadConfig
    stream: NativeReadConfig | BeamReadConfig | None
    filter: FilterConfig | None
    lanes: Lanes
    decode: DecodeConfig | None
    batch: BatchConfig
    invoke: InvokeConfig
    write: WriteConfig
    commit: CommitConfig
    run: RunConfig
    warnings: tuple[str, ...] = ()

    @staticmethod
    def from_options(
        given: dict[str, str | None], now: datetime | None = None, runner: str = "DirectRunner"
    ) -> Config:
        """Check all options together and make the steps' values of them.

        Args:
            given: By name, the text given, None where nothing was.
            now: The time, for the check of --starting_timestamp.
            runner: Who runs it.

        Raises:
            UsageError: With every problem found.
        """
        problems: list[str] = []
        values = {
            name: parse_value(option, given.get(name), problems) for name, option in OPTIONS.items()
        }
        check_destination(values, problems)
        settings: dict[str, str] = {}
        refused: tuple[str, ...] = ()
        if values["kafka_config_file"]:
            try:
                settings = load_properties(values["kafka_config_file"])
            except UsageError as error:
                refused = error.problems
        reached: dict[str, tuple[Access, ...]] = {}
        for option, kinds in (("kafka_access", KINDS), ("schema_registry_access", REGISTRY_KINDS)):
            try:
                reached[option] = parse_access(values[option] or (), kinds)
            except AccessError as error:
                reached[option] = ()
                problems.append(f"--{option}: {error}")
        settings = put_over(login_settings(reached["kafka_access"]), settings)
        check_together(values, given, settings, now or datetime.now(timezone.utc), problems)
        problems += refused
        patterns: tuple[str, ...] = ()
        if values["filter_criteria"]:
            try:
                names = STREAM_FIELDS if values["stream"] else None
                patterns = load_criteria(values["filter_criteria"], names)
            except UsageError as error:
                problems += error.problems
        problems += [
            f"--{name} goes with the DirectRunner only; with Flink give --parallelism and "
            f"--sdk_worker_parallelism, with Dataflow --max_num_workers"
            for name in ("workers", "max_workers")
            if runner in STREAM_RUNNERS and given.get(name) is not None
        ]
        if runner in STREAM_RUNNERS and values["stream"]:
            check_stream_job(values, problems)
        if values["stream"]:
            values |= _stream_defaults(given)
        if runner in STREAM_RUNNERS and values["delivery"] == EXACTLY_ONCE:
            problems.append(
                f"--delivery={EXACTLY_ONCE} goes with the DirectRunner only: on {runner} outputs "
                f"are written at least once"
            )
        beams = values["kafka_reader"] == "beam" and not values["stream"]
        if runner in STREAM_RUNNERS and beams:
            check_beam_reader(values, settings, problems)
        registry = values["schema_registry_url"]
        # Where it is from AWS, it is read where the client is.
        if registry and not problems and not reached["schema_registry_access"]:
            try:
                check_settings(RegistryConfig(registry, values["kafka_config_file"]))
            except UsageError as error:
                problems += error.problems
        token = ""
        try:
            if values["http"]:
                token = read_token(values["http_token_file"])
            if values["start_paused"] and not token:
                problems.append(
                    f"--start_paused needs --http and a token (--http_token_file, or {VARIABLE}): "
                    f"without them nobody can resume the run"
                )
        except UsageError as error:
            problems += error.problems
        if runner in STREAM_RUNNERS and values["start_paused"]:
            problems.append("--start_paused goes with the DirectRunner only")
        if problems:
            raise UsageError(problems)
        return _make_config(values, settings, runner, patterns, reached, token)


def _reply(values: dict[str, Any]) -> str:
    """What replies are, given or by the other options."""
    if values["reply"]:
        return str(values["reply"])
    if not values["response_topic"] or values["invocation_type"] == "async":
        return reply.NONE
    return reply.CONFLUENT if values["envelope"] == envelope.CONFLUENT else reply.ANY


def _stream_defaults(given: Mapping[str, str | None]) -> dict[str, Any]:
    """What is otherwise with a stream, where it is not given."""
    # A write of the lease table costs money, for each shard; and AWS drops what has no JSON.
    defaults = {"commit_interval_secs": 1.0, "filter_unparsable": "drop"}
    return {name: value for name, value in defaults.items() if given.get(name) is None}


def _trace(values: dict[str, Any]) -> TraceConfig | None:
    if not values["trace"]:
        return None
    arn = values["function"].split(":")
    region = arn[3] if arn[0] == "arn" else values["aws_region"]
    return TraceConfig(
        values["consumer_group"] or values["lease_table"], values["function"], region
    )


def _delivery(values: dict[str, Any]) -> DeliveryConfig | None:
    if not values["on_failure_destination"]:
        return None
    reads = values["stream"] or values["topics"] or (values["topics_regex"],)
    name = values["consumer_group"] or values["lease_table"]
    return DeliveryConfig(
        values["on_failure_destination"],
        "/".join((values["function"], *reads, name)),
        values["aws_region"],
        values["aws_role_arn"],
        values["aws_web_identity"],
        values["aws_web_identity_audience"],
    )


def _stream_source(values: dict[str, Any], start_ms: int | None, streaming: bool) -> KinesisSource:
    # Its own each time it is submitted, so that of two jobs with one table one knows.
    job = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}" if streaming else ""
    return KinesisSource(
        values["stream"],
        values["lease_table"],
        AwsConfig(
            values["aws_region"],
            values["stream_role_arn"],
            values["aws_web_identity"] if values["stream_role_arn"] else None,
            values["aws_web_identity_audience"],
            values["kinesis_endpoint_url"],
            values["dynamodb_endpoint_url"],
        ),
        values["starting_position"],
        start_ms,
        values["stream_poll_secs"],
        values["lease_secs"],
        job=job,
    )


def _make_config(
    values: dict[str, Any],
    settings: dict[str, str],
    runner: str,
    patterns: tuple[str, ...],
    reached: dict[str, tuple[Access, ...]],
    token: str,
) -> Config:
    streaming = runner in STREAM_RUNNERS
    sync = values["invocation_type"] == "sync"
    batch_bytes = values["batch_bytes"] or (MAX_SYNC_BYTES if sync else MAX_ASYNC_BYTES)
    kafka = KafkaConfig(
        values["kafka_bootstrap_servers"] or "",
        values["consumer_group"] or values["lease_table"],
        values["kafka_config_file"],
        login_of(values, settings, os.environ),
        reached["kafka_access"],
    )
    wrapping = Envelope(
        values["envelope"],
        values["kafka_bootstrap_servers"] or "",
        values["event_source_arn"],
        values["event_record_format"] == "SOURCE",
        tuple((stream_name(each), each) for each in values["stream"] or ()),
        values["invoke_identity_arn"] or "",
    )
    url = values["schema_registry_url"]
    registry = None
    if url:
        access = reached["schema_registry_access"]
        registry = RegistryConfig(url, values["kafka_config_file"], access)
    attributes = tuple(a for a in values["schema_validation"] if a != NO_ATTRIBUTE)
    style = CONNECT if wrapping.name == envelope.CONFLUENT else STANDARD
    # What the reader counts is bytes as Kafka has them; base64 makes four of three.
    due_bytes = batch_bytes if wrapping.name == envelope.CONFLUENT else batch_bytes * 3 // 4
    aws_errors = values["error_record"] == destination.AWS
    deliver = _delivery(values)
    event = envelope.KINESIS_EVENT if values["stream"] else envelope.KAFKA_EVENT
    start = values["starting_timestamp"]
    moment = parse_timestamp(start) if start else None
    limit = settings.get("error.message.max.bytes", settings.get("message.max.bytes", ""))
    max_error_bytes = int(limit) if limit.isdecimal() else 1_000_000
    lanes = Lanes(values["parallelization_factor"], run=values["batch_size"])
    transaction = None
    if values["delivery"] == EXACTLY_ONCE:
        transaction = TransactionConfig(kafka, java_keys=aws_errors)
    # Below 0 are numbers that mean something else to Kafka.
    start_ms = max(0, int(moment.timestamp() * 1000)) if moment else None
    source: SourceConfig | KinesisSource = SourceConfig(
        kafka,
        topics=values["topics"] or (),
        topics_regex=values["topics_regex"],
        starting_position=values["starting_position"],
        starting_timestamp_ms=start_ms,
        member=None if streaming else 0,
        transaction=transaction,
    )
    names = NUMBERS
    stream: NativeReadConfig | BeamReadConfig | None = None
    if values["stream"]:
        source = _stream_source(values, start_ms, streaming)
        names = source.names
        if streaming:
            stream = NativeReadConfig(KinesisStream(source), runner in FLINK_RUNNERS)
    elif streaming and values["kafka_reader"] == "beam":
        service, in_flink = values["expansion_service"], runner in FLINK_RUNNERS
        stream = BeamReadConfig(kafka, source.topics, service, in_flink)
    elif streaming:
        assert isinstance(source, SourceConfig)
        stream = NativeReadConfig(
            KafkaStream(source, bounded=values["until"] == "caught_up"),
            drain_by_haste=runner in FLINK_RUNNERS,
        )
    return Config(
        kafka=kafka,
        source=source,
        read=ReadConfig(
            source, values["batch_size"], due_bytes, values["batch_window_secs"], lanes
        ),
        stream=stream,
        filter=FilterConfig(patterns, values["filter_unparsable"]) if patterns else None,
        lanes=lanes,
        decode=DecodeConfig(registry, attributes, style) if registry and attributes else None,
        batch=BatchConfig(
            values["batch_size"],
            batch_bytes,
            PayloadFormat(
                values["key_format"],
                values["value_format"],
                values["include_headers"],
                wrapping,
                names,
            ),
            window_secs=values["batch_window_secs"] if streaming else None,
        ),
        invoke=InvokeConfig(
            FunctionConfig(
                function=values["function"],
                invocation_type=values["invocation_type"],
                region=values["aws_region"],
                role_arn=values["aws_role_arn"],
                web_identity=values["aws_web_identity"],
                token_audience=values["aws_web_identity_audience"],
                endpoint_url=values["lambda_endpoint_url"],
                timeout_secs=values["function_timeout_secs"],
                max_concurrency=values["max_concurrency"],
                log_tail=sync and values["on_error"] == "log" and bool(values["error_topic"]),
            ),
            RetryPolicy(
                max_retries=values["max_retries"],
                max_transient_retries=values["max_transient_retries"],
                max_record_age_secs=values["max_record_age_secs"],
                bisect=values["bisect_on_error"],
                named=values["partial_failure"] == "named",
                halt=values["on_error"] == "fail",
            ),
            reply=_reply(values),
            streaming=streaming,
            client_context=sync and values["client_context"],
            names=names,
            min_concurrency=values["min_concurrency"],
            breaker=BreakerPolicy(
                failure_rate=values["breaker_failure_rate"],
                invocations=values["breaker_invocations"],
                wait_secs=values["breaker_wait_secs"],
            ),
            trace=_trace(values),
        ),
        write=WriteConfig(
            kafka=kafka,
            function=values["function"],
            response_topic=values["response_topic"],
            error_topic=values["error_topic"],
            on_error=values["on_error"],
            response_format=values["response_format"],
            error_format=values["error_format"],
            max_error_bytes=max_error_bytes,
            registry=registry,
            destination=replace(wrapping, name=event) if aws_errors or deliver else None,
            source=source,
            names=names,
            transaction=transaction,
            delivery=deliver,
        ),
        commit=CommitConfig(
            source,
            lanes,
            None if stream and values["until"] == "caught_up" else values["commit_refresh_secs"],
            values["commit_interval_secs"],
            settles=transaction is not None,
            behind=streaming and bool(values["stream"]),
        ),
        run=RunConfig(
            preflight=values["preflight"],
            until=values["until"],
            summary=values["summary"],
            log_format=values["log_format"],
            workers=values["workers"],
            max_workers=values["max_workers"],
            http=parse_address(values["http"]) if values["http"] else None,
            metrics_partitions=values["metrics_partitions"],
            http_token=token,
            page_show=values["page_show"],
            report=values["report"],
            start_paused=values["start_paused"],
            log_level=values["log_level"],
            rebalance_wait_secs=values["rebalance_wait_secs"],
        ),
        warnings=tuple(warnings_of(values, settings)),
    )
