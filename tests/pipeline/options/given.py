"""Options that fit, and for each one where it lands: what the tests here share."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pipeline.options import checks_dataflow
from pipeline.options.config import Config
from pipeline.options.declare import OPTIONS
from pipeline.options.resolve import parse_beam
from transforms.access import Access
from transforms.envelope import Envelope
from transforms.errors import UsageError
from transforms.kinesis.client import AwsConfig
from transforms.kinesis.stream import KinesisSource
from transforms.lanes import Lanes

NOW = datetime(2026, 11, 2, tzinfo=timezone.utc)

REQUIRED = {
    "kafka_bootstrap_servers": "broker:9092",
    "consumer_group": "g",
    "topics": "orders",
    "function": "f",
}

REGISTRY = "http://registry:8081"

MSK = "arn:aws:kafka:us-east-1:123456789012:cluster/orders/5a7c-2"


STREAM = "arn:aws:kinesis:us-east-1:123456789012:stream/payments"
CONSUMER = f"{STREAM}/consumer/fast:1700000000"
# For what goes with a stream only.
STREAMED: dict[str, str | None] = {
    **dict.fromkeys(REQUIRED),
    "function": "f",
    "stream": "orders",
    "lease_table": "orders-to-f",
}


def _aws_of(config: Config) -> AwsConfig:
    return config.source.aws if isinstance(config.source, KinesisSource) else AwsConfig()


def config_of(**given: str | None) -> Config:
    return Config.from_options({**REQUIRED, **given}, NOW)


def problems_of(**given: str | None) -> tuple[str, ...]:
    with pytest.raises(UsageError) as raised:
        config_of(**given)
    assert all(len(problem.splitlines()) == 1 for problem in raised.value.problems)
    return raised.value.problems


def arguments_of(*more: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in REQUIRED.items()), *more]


TOKEN = str(Path(__file__).with_name("token.txt"))
FILTERS = str(Path(__file__).with_name("filters.json"))

# Every option: where its value is found, its default there, a text, and what that comes to.
IAM_PROPERTIES = str(Path(__file__).with_name("iam.properties"))
SECRET = "arn:aws:secretsmanager:us-east-1:123456789012:secret:orders-Ab12Cd"
ROLE = "arn:aws:iam::123456789012:role/r"

QUEUE = "arn:aws:sqs:us-east-1:123456789012:failed"

CASES = {
    "kafka_bootstrap_servers": (lambda c: c.kafka.bootstrap_servers, "broker:9092", "a:1", "a:1"),
    "kafka_config_file": (lambda c: c.kafka.config_file, None, "/dev/null", "/dev/null"),
    "kafka_role_arn": (lambda c: c.kafka.login.role_arn, None, ROLE, ROLE),
    "kafka_access": (
        lambda c: c.kafka.access,
        (),
        f" SASL_SCRAM_512_AUTH={SECRET}, SERVER_ROOT_CA_CERTIFICATE={SECRET} ",
        (Access("SASL_SCRAM_512_AUTH", SECRET), Access("SERVER_ROOT_CA_CERTIFICATE", SECRET)),
    ),
    "topics": (lambda c: c.source.topics, ("orders",), " a, b ,", ("a", "b")),
    "topics_regex": (lambda c: c.source.topics_regex, None, "o-.*", "o-.*"),
    "consumer_group": (lambda c: c.kafka.group, "g", "h", "h"),
    "commit_refresh_secs": (lambda c: c.commit.refresh_secs, 3600, "60", 60),
    "commit_interval_secs": (lambda c: c.commit.interval_secs, 0.1, "2.5", 2.5),
    "starting_position": (lambda c: c.source.starting_position, "TRIM_HORIZON", "LATEST", "LATEST"),
    "starting_timestamp": (
        lambda c: c.source.starting_timestamp_ms,
        None,
        "2026-11-01T00:00:00.5Z",
        1_793_491_200_500,
    ),
    "stream": (
        lambda c: c.source.streams if isinstance(c.source, KinesisSource) else None,
        None,
        f" orders, {STREAM} ",
        ("orders", STREAM),
    ),
    "lease_table": (lambda c: getattr(c.source, "table", None), None, "t-1", "t-1"),
    "lease_secs": (lambda c: getattr(c.source, "expiry_secs", 10), 10, "2.5", 2.5),
    "stream_poll_secs": (lambda c: getattr(c.source, "poll_secs", 1), 1, "0.25", 0.25),
    "consumer_name": (lambda c: getattr(c.source, "consumer_name", None), None, "fast", "fast"),
    "consumer_arn": (lambda c: getattr(c.source, "consumer_arns", ()), (), CONSUMER, (CONSUMER,)),
    "deaggregate": (lambda c: getattr(c.source, "deaggregate", False), False, "true", True),
    "stream_role_arn": (lambda c: _aws_of(c).role_arn, None, ROLE, ROLE),
    "kinesis_endpoint_url": (
        lambda c: _aws_of(c).kinesis_url,
        None,
        "http://127.0.0.1:4567",
        "http://127.0.0.1:4567",
    ),
    "dynamodb_endpoint_url": (
        lambda c: _aws_of(c).dynamodb_url,
        None,
        "http://127.0.0.1:4566",
        "http://127.0.0.1:4566",
    ),
    "filter_criteria": (
        lambda c: c.filter and c.filter.patterns,
        None,
        FILTERS,
        ('{"topic": ["orders"]}',),
    ),
    "filter_unparsable": (lambda c: c.filter and c.filter.unparsable, None, "drop", "drop"),
    "function": (lambda c: c.invoke.function.function, "f", "g:live", "g:live"),
    "invocation_type": (lambda c: c.invoke.function.invocation_type, "sync", "async", "async"),
    "aws_region": (lambda c: c.invoke.function.region, None, "eu-west-1", "eu-west-1"),
    "aws_role_arn": (
        lambda c: c.invoke.function.role_arn,
        None,
        ROLE,
        ROLE,
    ),
    "aws_web_identity": (lambda c: c.invoke.function.web_identity, None, "google", "google"),
    "aws_web_identity_audience": (
        lambda c: c.invoke.function.token_audience,
        "sts.amazonaws.com",
        "orders",
        "orders",
    ),
    "lambda_endpoint_url": (
        lambda c: c.invoke.function.endpoint_url,
        None,
        "http://127.0.0.1:9200",
        "http://127.0.0.1:9200",
    ),
    "function_timeout_secs": (lambda c: c.invoke.function.timeout_secs, 900, "3", 3),
    "batch_size": (lambda c: (c.batch.max_records, c.read.batch_size), (100, 100), "7", (7, 7)),
    "batch_bytes": (
        lambda c: (c.batch.max_bytes, c.read.batch_bytes),
        (6_291_455, 6_291_455),
        "1000",
        (1000, 1000),
    ),
    "batch_window_secs": (lambda c: c.read.batch_window_secs, 0.5, "1.25", 1.25),
    "tumbling_window_secs": (
        lambda c: c.invoke.window.secs if c.invoke.window else 0,
        0,
        "60",
        60,
    ),
    "parallelization_factor": (
        lambda c: (c.lanes.count, c.lanes.run, c.read.lanes, c.commit.lanes),
        (1, 100, Lanes(1, run=100), Lanes(1, run=100)),
        "10",
        (10, 100, Lanes(10, run=100), Lanes(10, run=100)),
    ),
    "max_concurrency": (lambda c: c.invoke.function.max_concurrency, 100, "9", 9),
    "min_concurrency": (lambda c: c.invoke.min_concurrency, 1, "9", 9),
    "envelope": (lambda c: c.batch.format.envelope.name, "confluent", "pipes", "pipes"),
    "event_source_arn": (
        lambda c: c.batch.format.envelope.event_source_arn,
        None,
        MSK,
        MSK,
    ),
    "invoke_identity_arn": (
        lambda c: c.batch.format.envelope.invoke_identity_arn or None,
        None,
        ROLE,
        ROLE,
    ),
    "key_format": (lambda c: c.batch.format.key, "auto", "string", "string"),
    "value_format": (lambda c: c.batch.format.value, "auto", "base64", "base64"),
    "include_headers": (lambda c: c.batch.format.headers, False, "true", True),
    "reply": (lambda c: c.invoke.reply, "none", "batch_item_failures", "batch_item_failures"),
    "partial_failure": (
        lambda c: (c.invoke.policy.named, "named" if c.invoke.policy.named else "checkpoint"),
        (False, "checkpoint"),
        "named",
        (True, "named"),
    ),
    "client_context": (lambda c: c.invoke.client_context, True, "false", False),
    "schema_registry_url": (lambda c: c.decode and c.decode.registry.url, None, REGISTRY, REGISTRY),
    "schema_registry_access": (
        lambda c: c.write.registry and c.write.registry.access,
        None,
        "",
        (),
    ),
    "schema_validation": (
        lambda c: c.decode.attributes if c.decode else ("VALUE",),
        ("VALUE",),
        "VALUE, KEY",
        ("VALUE", "KEY"),
    ),
    "event_record_format": (
        lambda c: "SOURCE" if c.batch.format.envelope.source_format else "JSON",
        "JSON",
        "SOURCE",
        "SOURCE",
    ),
    "max_retries": (lambda c: c.invoke.policy.max_retries, 0, "5", 5),
    "max_transient_retries": (lambda c: c.invoke.policy.max_transient_retries, -1, "5", 5),
    "max_record_age_secs": (lambda c: c.invoke.policy.max_record_age_secs, -1, "90", 90),
    "bisect_on_error": (lambda c: c.invoke.policy.bisect, False, "true", True),
    "on_error": (
        lambda c: (c.invoke.policy.halt, c.write.on_error),
        (True, "fail"),
        "ignore",
        (False, "ignore"),
    ),
    "on_failure_destination": (
        lambda c: c.write.delivery and c.write.delivery.destination,
        None,
        QUEUE,
        QUEUE,
    ),
    "breaker_failure_rate": (lambda c: c.invoke.breaker.failure_rate, 0, "0.75", 0.75),
    "breaker_invocations": (lambda c: c.invoke.breaker.invocations, 20, "9", 9),
    "breaker_wait_secs": (lambda c: c.invoke.breaker.wait_secs, 30, "1.5", 1.5),
    "response_topic": (
        lambda c: (c.write.response_topic, c.invoke.reply),
        (None, "none"),
        "out",
        ("out", "confluent"),
    ),
    "error_topic": (lambda c: c.write.error_topic, None, "err", "err"),
    "delivery": (
        lambda c: (
            "exactly_once"
            if c.commit.settles and c.write.transaction and c.source.transaction
            else "at_least_once"
        ),
        "at_least_once",
        "exactly_once",
        "exactly_once",
    ),
    "response_format": (lambda c: c.write.response_format, "json", "string", "string"),
    "error_format": (lambda c: c.write.error_format, "json", "json_schema", "json_schema"),
    "error_record": (
        lambda c: (c.write.destination, "aws" if c.write.destination else "confluent"),
        (None, "confluent"),
        "aws",
        (Envelope("kafka_event", "broker:9092"), "aws"),
    ),
    "http": (lambda c: c.run.http, None, "[::1]:9464", ("::1", 9464)),
    "http_token_file": (
        lambda c: c.run.http_token,
        "",
        TOKEN,
        "0123456789abcdef",
    ),
    "page_show": (lambda c: c.run.page_show, "none", "messages", "messages"),
    "report": (lambda c: c.run.report, None, "run.html", "run.html"),
    "metrics_partitions": (lambda c: c.run.metrics_partitions, 100, "7", 7),
    "workers": (lambda c: c.run.workers, 1, "4", 4),
    "max_workers": (lambda c: c.run.max_workers, None, "8", 8),
    "rebalance_wait_secs": (lambda c: c.run.rebalance_wait_secs, None, "20.5", 20.5),
    "drain_wait_secs": (lambda c: c.invoke.drain_wait_secs, None, "30.5", 30.5),
    "preflight": (lambda c: c.run.preflight, True, "false", False),
    "until": (lambda c: c.run.until, "forever", "caught_up", "caught_up"),
    "start_paused": (lambda c: c.run.start_paused, False, "true", True),
    "summary": (lambda c: c.run.summary, "text", "none", "none"),
    "log_format": (lambda c: c.run.log_format, "text", "json", "json"),
    "trace": (lambda c: c.invoke.trace and "otlp", None, "otlp", "otlp"),
    "log_level": (lambda c: c.run.log_level, "INFO", "DEBUG", "DEBUG"),
}

# What an option, or one of its values, needs beside it.
BESIDE = {
    "on_failure_destination": {"on_error": "log"},
    "stream": STREAMED,
    "lease_table": STREAMED,
    "lease_secs": STREAMED,
    "stream_poll_secs": STREAMED,
    "stream_role_arn": STREAMED,
    "consumer_name": STREAMED,
    "consumer_arn": {**STREAMED, "stream": STREAM},
    "deaggregate": STREAMED,
    "kinesis_endpoint_url": STREAMED,
    "dynamodb_endpoint_url": STREAMED,
    "invoke_identity_arn": STREAMED,
    "http_token_file": {"http": "0"},
    "metrics_partitions": {"http": "0"},
    "page_show": {"http": "0"},
    "start_paused": {"http": "0", "http_token_file": TOKEN},
    "schema_validation": {"schema_registry_url": REGISTRY},
    "event_record_format": {"schema_registry_url": REGISTRY, "envelope": "kafka_event"},
    "event_source_arn": {"envelope": "kafka_event"},
    "kafka_role_arn": {"kafka_config_file": IAM_PROPERTIES},
    "schema_registry_access": {"schema_registry_url": REGISTRY},
    "topics_regex": {"topics": None},
    "starting_timestamp": {"starting_position": "AT_TIMESTAMP"},
    "filter_unparsable": {"filter_criteria": FILTERS},
    "partial_failure": {"reply": "batch_item_failures"},
    "error_record": {"error_topic": "err"},
    "delivery": {"response_topic": "out"},
    "min_concurrency": {"max_concurrency": "1000"},
    "tumbling_window_secs": {"envelope": "kafka_event"},
    "aws_web_identity": {"aws_role_arn": ROLE},
    "aws_web_identity_audience": {"aws_role_arn": ROLE, "aws_web_identity": "google"},
}

BESIDE_CHOICE = {
    "kinesis_event": STREAMED,
    "AT_TIMESTAMP": {"starting_timestamp": "2026-01-01"},
    "any": {"response_topic": "out"},
    "aws": {"error_topic": "err"},
    "avro": {"schema_registry_url": REGISTRY},
}

# Looked at before there is a config: tests/pipeline/migrate/test_config_file.py.
BEFORE = ("config", "explain")

# Looked at in streaming runs only: tests/pipeline/submit/test_streaming.py.
STREAMING = ("kafka_reader", "expansion_service")

LANDING = {n: option for n, option in OPTIONS.items() if n not in BEFORE + STREAMING}

NUMBERS = [name for name, option in OPTIONS.items() if option.kind in ("int", "float")]

CHOICES = [name for name, option in LANDING.items() if option.kind == "choice"]

FLAGS = [name for name, option in LANDING.items() if option.kind == "flag"]

TEXTS = [name for name, option in LANDING.items() if option.kind == "text"]

BOUNDS = {
    "lease_secs": (1, 300, None),
    "stream_poll_secs": (0.2, 60, None),
    "commit_refresh_secs": (1, 86_400, None),
    "commit_interval_secs": (0, 60, None),
    "function_timeout_secs": (1, 900, None),
    "batch_size": (1, 10_000, None),
    "batch_bytes": (1, 6_291_455, None),
    "batch_window_secs": (0, 300, None),
    "tumbling_window_secs": (0, 900, None),
    "parallelization_factor": (1, 10, None),
    "max_concurrency": (1, 1000, None),
    "min_concurrency": (1, 1000, None),
    "breaker_failure_rate": (0, 1, None),
    "breaker_invocations": (2, 1000, None),
    "breaker_wait_secs": (1, 3600, None),
    "rebalance_wait_secs": (0, 3600, None),
    "drain_wait_secs": (0, 86400, None),
    "workers": (1, 64, None),
    "max_workers": (1, 64, None),
    "metrics_partitions": (0, 10_000, None),
    "max_retries": (0, 10_000, -1),
    "max_transient_retries": (0, 10_000, -1),
    "max_record_age_secs": (60, 604_800, -1),
}


# -- Dataflow --------------------------------------------------------------------------------------

IMAGE = "europe-west1-docker.pkg.dev/demo-project/beam/beam-lambda-sink:0.1.0"
JOB = {
    "project": "demo-project",
    "region": "europe-west1",
    "temp_location": "gs://bucket/dataflow",
    "sdk_container_image": IMAGE,
}


def beam_of(**given: str | None) -> Any:
    arguments = [f"--{name}={value}" for name, value in (JOB | given).items() if value]
    parsed, problems = parse_beam(arguments)
    assert not problems
    return parsed


def job_problems_of(config_file: str | None = None, **given: str | None) -> list[str]:
    return checks_dataflow.problems(beam_of(**given), config_file, lambda: True, lambda: None)
