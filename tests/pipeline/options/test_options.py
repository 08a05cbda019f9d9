"""Options: defaults, bounds, what does not go together, and where each one lands."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.options.declare import (
    GROUPS,
    OPTIONS,
    Config,
    KafkaLambdaOptions,
    format_help,
    parse_arguments,
    parse_timestamp,
)
from transforms.envelope import Envelope
from transforms.errors import UsageError
from transforms.lanes import Lanes


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is() -> Iterator[None]:
    """The command line sets up logging for its process; the tests after it need their own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


LOGGERS = ("apache_beam", "botocore", "urllib3", "pipeline", "transforms", "librdkafka")

NOW = datetime(2026, 11, 2, tzinfo=timezone.utc)

REQUIRED = {
    "kafka_bootstrap_servers": "broker:9092",
    "consumer_group": "g",
    "topics": "orders",
    "function": "f",
}

REGISTRY = "http://registry:8081"
MSK = "arn:aws:kafka:us-east-1:123456789012:cluster/orders/5a7c-2"


def _config(**given: str | None) -> Config:
    return Config.from_options({**REQUIRED, **given}, NOW)


def _problems(**given: str | None) -> tuple[str, ...]:
    with pytest.raises(UsageError) as raised:
        _config(**given)
    assert all(len(problem.splitlines()) == 1 for problem in raised.value.problems)
    return raised.value.problems


def _arguments(*more: str) -> list[str]:
    return [*(f"--{name}={value}" for name, value in REQUIRED.items()), *more]


FILTERS = str(Path(__file__).with_name("filters.json"))

# Every option: where its value is found, its default there, a text, and what that comes to.
ROLE = "arn:aws:iam::123456789012:role/r"

CASES = {
    "kafka_bootstrap_servers": (lambda c: c.kafka.bootstrap_servers, "broker:9092", "a:1", "a:1"),
    "kafka_config_file": (lambda c: c.kafka.config_file, None, "/dev/null", "/dev/null"),
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
    "response_format": (lambda c: c.write.response_format, "json", "string", "string"),
    "error_format": (lambda c: c.write.error_format, "json", "json_schema", "json_schema"),
    "error_record": (
        lambda c: (c.write.destination, "aws" if c.write.destination else "confluent"),
        (None, "confluent"),
        "aws",
        (Envelope("kafka_event", "broker:9092"), "aws"),
    ),
    "workers": (lambda c: c.run.workers, 1, "4", 4),
    "preflight": (lambda c: c.run.preflight, True, "false", False),
    "until": (lambda c: c.run.until, "forever", "caught_up", "caught_up"),
    "summary": (lambda c: c.run.summary, "text", "none", "none"),
    "log_format": (lambda c: c.run.log_format, "text", "json", "json"),
}

# What an option, or one of its values, needs beside it.
BESIDE = {
    "schema_validation": {"schema_registry_url": REGISTRY},
    "event_record_format": {"schema_registry_url": REGISTRY, "envelope": "kafka_event"},
    "event_source_arn": {"envelope": "kafka_event"},
    "topics_regex": {"topics": None},
    "starting_timestamp": {"starting_position": "AT_TIMESTAMP"},
    "filter_unparsable": {"filter_criteria": FILTERS},
    "partial_failure": {"reply": "batch_item_failures"},
    "error_record": {"error_topic": "err"},
    "min_concurrency": {"max_concurrency": "1000"},
    "aws_web_identity": {"aws_role_arn": ROLE},
    "aws_web_identity_audience": {"aws_role_arn": ROLE, "aws_web_identity": "google"},
}
BESIDE_CHOICE = {
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


def test_every_option_has_its_case_here() -> None:
    """A new option has to come with its default, its effect and its place in the config."""
    assert list(CASES) == list(LANDING)


@pytest.mark.parametrize("name", list(CASES))
def test_each_option_s_default(name: str) -> None:
    """An option that is not given has its documented default."""
    find, default, _, _ = CASES[name]
    assert find(_config()) == default


@pytest.mark.parametrize("name", list(CASES))
def test_each_option_lands_where_it_is_used(name: str) -> None:
    """An option's value arrives at its step, and so changes what the pipeline does."""
    find, default, text, expected = CASES[name]
    assert expected != default
    assert find(_config(**{**BESIDE.get(name, {}), name: text})) == expected


def test_the_registry_for_what_is_written_only() -> None:
    """NONE decodes nothing; the schemas of the outputs still have their registry."""
    config = _config(schema_registry_url=REGISTRY, schema_validation="NONE")
    assert config.decode is None
    assert config.write.registry and config.write.registry.url == REGISTRY
    assert _config().write.registry is None


def test_the_function_s_name_is_in_error_records() -> None:
    """The write step knows the function and the cluster too."""
    config = _config(function="orders:live")
    assert config.write.function == "orders:live"
    assert config.write.kafka == config.read.source.kafka == config.kafka


# -- bounds -------------------------------------------------------------------------------

BOUNDS = {
    "commit_refresh_secs": (1, 86_400, None),
    "commit_interval_secs": (0, 60, None),
    "function_timeout_secs": (1, 900, None),
    "batch_size": (1, 10_000, None),
    "batch_bytes": (1, 6_291_455, None),
    "batch_window_secs": (0, 300, None),
    "parallelization_factor": (1, 10, None),
    "max_concurrency": (1, 1000, None),
    "min_concurrency": (1, 1000, None),
    "breaker_failure_rate": (0, 1, None),
    "breaker_invocations": (2, 1000, None),
    "breaker_wait_secs": (1, 3600, None),
    "workers": (1, 64, None),
    "max_retries": (0, 10_000, -1),
    "max_transient_retries": (0, 10_000, -1),
    "max_record_age_secs": (60, 604_800, -1),
}


def test_every_number_has_bounds() -> None:
    """No number is unbounded, and each one's bounds are tested."""
    assert sorted(BOUNDS) == sorted(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_within_its_bounds_is_taken(name: str) -> None:
    """The least, the greatest, and where there is one the special value."""
    low, high, special = BOUNDS[name]
    find = CASES[name][0]
    for number in (low, high, *([special] if special is not None else [])):
        found = find(_config(**BESIDE.get(name, {}), **{name: str(number)}))
        assert (found[0] if isinstance(found, tuple) else found) == number


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_bounds_is_refused(name: str) -> None:
    """One below and one above: the message has the option, the value and the range."""
    low, high, special = BOUNDS[name]
    below = low - 1 if low - 1 != special else low - 2
    for number in (below, high + 1, -(10**9), 10**30):
        (problem,) = _problems(**{name: str(number)})
        assert problem.startswith(f"--{name}={number} is not allowed; give ")
        assert f"{low} to {high}" in problem
        if special is not None:
            assert f"{special} (no limit)" in problem


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["", "many", "1,5", "0x10", "--", "1 2", "none"])
def test_a_number_has_to_be_one(name: str, text: str) -> None:
    """What is no number is refused, with the option, the text and the range."""
    (problem,) = _problems(**{name: text})
    assert problem.startswith(f"--{name}={text} is not a")
    assert str(BOUNDS[name][1]) in problem


@pytest.mark.parametrize("text", ["1.5", "1e2", "nan", "inf"])
@pytest.mark.parametrize("name", [name for name in NUMBERS if OPTIONS[name].kind == "int"])
def test_a_whole_number_has_no_fraction(name: str, text: str) -> None:
    """An int option takes no fraction and no exponent."""
    (problem,) = _problems(**{name: text})
    assert "is not a whole number" in problem


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.001", "300.001"])
def test_the_window_is_a_finite_number(text: str) -> None:
    """A fraction of a second is fine; what is no time is not."""
    (problem,) = _problems(batch_window_secs=text)
    assert "0 to 300" in problem


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_each_of_its_values_and_nothing_else(name: str) -> None:
    """All choices are taken as they are written; anything else names them all."""
    find = CASES[name][0]
    for choice in OPTIONS[name].choices:
        beside = {**BESIDE.get(name, {}), **BESIDE_CHOICE.get(choice, {})}
        found = find(_config(**{name: choice, **beside}))
        assert (found[-1] if isinstance(found, tuple) else found) == choice
    for wrong in ("", "other", OPTIONS[name].choices[0] + " "):
        (problem,) = _problems(**{**BESIDE.get(name, {}), name: wrong})
        assert problem.startswith(f"--{name}={wrong} is not allowed; give ")
        assert all(choice in problem for choice in OPTIONS[name].choices)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_a_flag_is_true_or_false(name: str, text: str, value: bool) -> None:
    """A flag's value may be given, in either case."""
    assert CASES[name][0](_config(**{name: text})) is value


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("text", ["", "yes", "1", "maybe"])
def test_a_flag_is_nothing_else(name: str, text: str) -> None:
    """What is neither true nor false is refused."""
    (problem,) = _problems(**{name: text})
    assert problem == f"--{name}={text} is not allowed; give true | false"


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_is_refused(name: str) -> None:
    """An option given without a value is a mistake, such as a variable that is not set."""
    assert f"--{name} is empty; leave it out, or give it a value" in _problems(
        **{**BESIDE.get(name, {}), name: ""}
    )


@pytest.mark.parametrize("name", ["kafka_bootstrap_servers", "consumer_group", "function"])
def test_what_has_to_be_given(name: str) -> None:
    """A required option that is missing is named, with an example."""
    (problem,) = _problems(**{name: None})
    assert problem == f"--{name} is missing; for example --{name}={OPTIONS[name].example}"


# -- values that have a form --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "kafka_bootstrap_servers",
            ["a:1", "a.b-c:9092,10.0.0.1:9093", "[::1]:9092"],
            ["a", "a:", ":1", "a:x", "a:1,", "a:1 b:2", "a:1,,b:2", "kafka://a:1", "a:1;b:2"],
        ),
        (
            "event_source_arn",
            [MSK, "arn:aws-cn:kafka:cn-north-1:123456789012:cluster/c/1"],
            ["orders", "arn:aws:lambda:us-east-1:123456789012:function:f", MSK + " x"],
        ),
        (
            "function",
            [
                "f",
                "my_function-1",
                "f:7",
                "f:$LATEST",
                "f:live",
                "x" * 64,
                "123456789012:function:f",
                "function:f:live",
                "arn:aws:lambda:eu-west-1:123456789012:function:f",
                "arn:aws-cn:lambda:cn-north-1:123456789012:function:f:live",
            ],
            [
                "x" * 65,
                "f f",
                "f/g",
                "f:",
                "f:a:b",
                "arn:aws:lambda:eu-west-1:123:function:f",
                "arn:aws:s3:::bucket",
                "https://f",
                "f:" + "q" * 129,
            ],
        ),
        (
            "aws_role_arn",
            ["arn:aws:iam::123456789012:role/r", "arn:aws-us-gov:iam::123456789012:role/p/r"],
            ["r", "arn:aws:iam::1:role/r", "arn:aws:iam::123456789012:user/u"],
        ),
        (
            "kafka_bootstrap_servers",
            [
                "b:1",
                "[::1]:9092,b:9092",
                "[::1]:9092,[fe80::1]:9092",
                "b1:9092, b2:9092",
                "SASL_SSL://b:9092,b2:9092",
                "10.0.0.1:9092",
            ],
            ["b", "b:x", "b:1,", "b:1;c:2", "::1:9092", "[::1]", "b :1", "a//b:1", "b:123456"],
        ),
        (
            "lambda_endpoint_url",
            [
                "http://127.0.0.1:9200",
                "https://vpce-1.lambda.eu-west-1.vpce.amazonaws.com",
                "http://h/p",
            ],
            ["127.0.0.1:9200", "ftp://h", "http://", "http://h h"],
        ),
        (
            "schema_registry_url",
            ["http://r:8081", "https://r", "https://r/apis/ccompat/v7", "http://a:1,http://b:2/p"],
            ["r:8081", "ftp://r", "http://", "http://r r", "http://a,b", "http://a,"],
        ),
        ("schema_validation", ["KEY", "KEY,VALUE", " VALUE "], ["", ",", "key", "KEY,HEADER"]),
        ("response_topic", ["a.b-c_D9", "x" * 249], ["a b", "a/b", "x" * 250, "ä", "a,b"]),
        ("error_topic", ["a.b-c_D9"], ["a b", "a/b", "x" * 250]),
        ("topics", ["a", "a,b.c", "a, b"], ["a b", "orders-.*", "a,b/c"]),
        ("topics_regex", ["a|b", "^orders-.*$"], ["(", "[a", "*"]),
        (
            "starting_timestamp",
            [
                "2026-11-01",
                "2026-11-01T00:00:00",
                "2026-11-01T00:00:00Z",
                "2026-11-01T00:00:00+01:00",
                "2026-11-02T00:00:00Z",
            ],
            ["yesterday", "01.11.2026", "1793491200", "2026-13-01", "2026-11-02T00:00:01Z"],
        ),
    ],
)
def test_values_that_have_a_form(name: str, right: list[str], wrong: list[str]) -> None:
    """What has the form is taken; what has not is one problem that shows it."""
    beside = BESIDE.get(name, {})
    for text in right:
        _config(**{**beside, name: text})
    for text in wrong:
        (problem,) = _problems(**{**beside, name: text})
        assert f"--{name}" in problem
        assert text in problem or name == "topics"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=timezone.utc)),
        ("2026-11-01T12:00:00Z", datetime(2026, 11, 1, 12, tzinfo=timezone.utc)),
        ("2026-11-01T12:00:00z", datetime(2026, 11, 1, 12, tzinfo=timezone.utc)),
        ("2026-11-01T12:00:00", datetime(2026, 11, 1, 12, tzinfo=timezone.utc)),
        ("2026-11-01T12:00:00+02:00", datetime(2026, 11, 1, 10, tzinfo=timezone.utc)),
        ("Z", None),
        ("", None),
    ],
)
def test_a_time_without_a_zone_is_utc(text: str, expected: datetime | None) -> None:
    """ISO 8601, with or without a zone."""
    assert parse_timestamp(text) == expected


@pytest.mark.parametrize("text", ["1969-12-31T23:59:59.999Z", "1960-01-01"])
def test_a_time_before_kafka_s_first_is_its_first(text: str) -> None:
    """Numbers below 0 mean something else to Kafka, so no time comes to one."""
    config = _config(starting_position="AT_TIMESTAMP", starting_timestamp=text)
    assert config.source.starting_timestamp_ms == 0


# -- what does not go together ------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"topics": None}, ["exactly one of --topics and --topics_regex, not none"]),
        ({"topics": ""}, ["exactly one", "not none"]),
        ({"topics": "a,b, a"}, ["--topics=a,b, a names a twice"]),
        ({"batch_size": "1_0"}, ["--batch_size=1_0 is not a whole number"]),
        ({"batch_size": "\u0661"}, ["is not a whole number"]),
        ({"batch_window_secs": "1_0"}, ["--batch_window_secs=1_0 is not a number"]),
        ({"batch_window_secs": "nan"}, ["--batch_window_secs=nan is not a number"]),
        ({"topics": " , "}, ["exactly one", "not none"]),
        ({"topics_regex": "x.*"}, ["exactly one of --topics and --topics_regex, not both"]),
        ({"response_topic": "orders"}, ["--response_topic=orders", "--topics)", "feed on"]),
        ({"error_topic": "orders"}, ["--error_topic=orders", "--topics)", "feed on"]),
        (
            {"topics": None, "topics_regex": "orders.*", "response_topic": "orders-out"},
            ["--response_topic=orders-out", "--topics_regex)"],
        ),
        (
            {"topics": None, "topics_regex": "orders.*", "error_topic": "orders-err"},
            ["--error_topic=orders-err", "--topics_regex)"],
        ),
        (
            {"invocation_type": "async", "response_topic": "out"},
            ["--response_topic needs --invocation_type=sync"],
        ),
        (
            {"invocation_type": "async", "batch_bytes": "1048577"},
            ["--batch_bytes=1048577", "async", "1048576"],
        ),
        (
            {"invocation_type": "async", "reply": "batch_item_failures"},
            ["--reply=batch_item_failures needs --invocation_type=sync"],
        ),
        (
            {"invocation_type": "async", "reply": "any", "response_topic": "out"},
            ["--reply=any needs --invocation_type=sync"],
        ),
        (
            {"invocation_type": "async", "client_context": "true"},
            ["--client_context needs --invocation_type=sync"],
        ),
        ({"reply": "any"}, ["--reply=any needs --response_topic"]),
        ({"reply": "none", "response_topic": "out"}, ["--response_topic", "--reply=none"]),
        (
            {"reply": "batch_item_failures", "response_topic": "out"},
            ["--response_topic", "--reply=batch_item_failures"],
        ),
        ({"partial_failure": "named"}, ["--partial_failure goes with --reply=batch_item"]),
        ({"partial_failure": "checkpoint", "reply": "none"}, ["--partial_failure goes with"]),
        (
            {"event_source_arn": MSK},
            ["--event_source_arn goes with --envelope=kafka_event or pipes, or with"],
        ),
        ({"error_record": "aws"}, ["--error_record=aws needs --error_topic"]),
        (
            {"error_record": "aws", "error_topic": "e", "error_format": "string"},
            ["--error_format=string goes with --error_record=confluent only"],
        ),
        (
            {"envelope": "kafka_event", "key_format": "json"},
            ["--key_format=json goes with --envelope=confluent only", "kafka_event has base64"],
        ),
        ({"envelope": "pipes", "value_format": "string"}, ["--value_format=string", "pipes"]),
        ({"schema_validation": "KEY"}, ["--schema_validation needs --schema_registry_url"]),
        (
            {"schema_registry_url": REGISTRY, "schema_validation": "KEY,KEY"},
            ["--schema_validation=KEY,KEY names KEY twice"],
        ),
        (
            {"schema_registry_url": REGISTRY, "schema_validation": "NONE,KEY"},
            ["--schema_validation=NONE,KEY: NONE stands alone"],
        ),
        (
            {"schema_registry_url": REGISTRY, "event_record_format": "SOURCE"},
            ["--event_record_format goes with --envelope=kafka_event or pipes only"],
        ),
        (
            {"envelope": "pipes", "event_record_format": "SOURCE"},
            ["--event_record_format needs --schema_registry_url"],
        ),
        ({"response_format": "avro"}, ["--response_format=avro needs --schema_registry_url"]),
        ({"error_format": "avro"}, ["--error_format=avro needs --schema_registry_url"]),
        (
            {"schema_registry_url": REGISTRY, "value_format": "json"},
            ["--value_format=json has no effect", "--schema_validation has VALUE"],
        ),
        (
            {"schema_registry_url": "http://user:hunter2@registry:8081"},
            ["--schema_registry_url has a login in it", "schema.registry.basic.auth.user.info"],
        ),
        (
            {"lambda_endpoint_url": "http://user:hunter2@127.0.0.1:9200"},
            ["--lambda_endpoint_url has a login in it"],
        ),
        ({"aws_web_identity": "google"}, ["--aws_web_identity=google needs --aws_role_arn"]),
        (
            {"aws_role_arn": ROLE, "aws_web_identity_audience": "orders"},
            ["--aws_web_identity_audience goes with --aws_web_identity only"],
        ),
        (
            {"starting_position": "AT_TIMESTAMP"},
            ["--starting_position=AT_TIMESTAMP needs --starting_timestamp"],
        ),
        (
            {"min_concurrency": "9", "max_concurrency": "8"},
            ["--min_concurrency=9 is above --max_concurrency=8"],
        ),
        ({"min_concurrency": "101"}, ["--min_concurrency=101 is above --max_concurrency=100"]),
        (
            {"workers": "4", "max_concurrency": "3"},
            ["--workers=4 is above --max_concurrency=3"],
        ),
        ({"starting_timestamp": "2026-01-01"}, ["--starting_position=AT_TIMESTAMP only"]),
        (
            {"starting_timestamp": "2026-01-01", "starting_position": "LATEST"},
            ["--starting_position=AT_TIMESTAMP only"],
        ),
    ],
)
def test_options_that_do_not_go_together(given: dict, parts: list[str]) -> None:
    """Each rule is one line that names the options, and shows no secret."""
    (problem,) = _problems(**given)
    assert "hunter2" not in problem
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    "given",
    [
        {"topics": "a,b", "response_topic": "c", "error_topic": "c"},
        {"topics": None, "topics_regex": "orders", "response_topic": "orders-out"},
        {"invocation_type": "async", "batch_bytes": "1048576", "error_topic": "e"},
        {"on_error": "ignore", "error_topic": "e"},
        {"min_concurrency": "8", "max_concurrency": "8"},
        {"starting_position": "AT_TIMESTAMP", "starting_timestamp": "2026-11-02"},
        {"envelope": "pipes", "key_format": "base64", "include_headers": "true"},
        {"error_record": "aws", "error_topic": "e", "event_source_arn": MSK},
        {"error_record": "confluent"},
        {"invocation_type": "async", "client_context": "false"},
        {"envelope": "pipes", "reply": "batch_item_failures", "partial_failure": "checkpoint"},
        {"schema_registry_url": REGISTRY, "key_format": "string"},
        {"schema_registry_url": REGISTRY, "schema_validation": "KEY", "value_format": "json"},
        {"schema_registry_url": REGISTRY, "response_format": "avro", "error_format": "avro"},
        {"schema_registry_url": REGISTRY, "schema_validation": "NONE", "value_format": "json"},
        {"envelope": "kafka_event", "event_source_arn": MSK, "invocation_type": "async"},
    ],
)
def test_options_that_go_together(given: dict) -> None:
    """A rule refuses nothing beyond what it is there for."""
    _config(**given)


@pytest.mark.parametrize(("kind", "limit"), [("sync", 6_291_455), ("async", 1_048_576)])
def test_the_payload_limit_is_the_invocation_type_s(kind: str, limit: int) -> None:
    """Without --batch_bytes it is Lambda's own limit."""
    config = _config(invocation_type=kind)
    assert config.batch.max_bytes == config.read.batch_bytes == limit


def test_base64_is_due_earlier() -> None:
    """Four bytes of payload are three bytes read: waiting for more would only wait."""
    config = _config(envelope="kafka_event", batch_bytes="1000")
    assert (config.batch.max_bytes, config.read.batch_bytes) == (1000, 750)


def test_the_event_shows_the_brokers_as_they_were_given() -> None:
    """The function sees what its configuration says, as with AWS."""
    config = _config(envelope="kafka_event", kafka_bootstrap_servers="a:1,b:2")
    assert config.batch.format.envelope.bootstrap_servers == "a:1,b:2"


@pytest.mark.parametrize(
    ("given", "reply", "log_tail"),
    [
        ({}, "none", False),
        ({"response_topic": "r"}, "confluent", False),
        ({"response_topic": "r", "envelope": "kafka_event"}, "any", False),
        ({"response_topic": "r", "envelope": "pipes"}, "any", False),
        ({"response_topic": "r", "envelope": "pipes", "reply": "confluent"}, "confluent", False),
        ({"response_topic": "r", "reply": "any"}, "any", False),
        ({"reply": "confluent"}, "confluent", False),
        ({"envelope": "kafka_event"}, "none", False),
        ({"on_error": "log", "error_topic": "e"}, "none", True),
        ({"on_error": "log"}, "none", False),
        ({"on_error": "fail", "error_topic": "e"}, "none", False),
        ({"on_error": "log", "error_topic": "e", "invocation_type": "async"}, "none", False),
        ({"invocation_type": "async", "reply": "none"}, "none", False),
    ],
)
def test_what_is_asked_of_the_function_follows_from_the_outputs(
    given: dict, reply: str, log_tail: bool
) -> None:
    """Replies are checked and logs fetched only where somebody gets them."""
    config = _config(**given)
    assert config.invoke.reply == reply
    assert config.invoke.function.log_tail is log_tail


@pytest.mark.parametrize(("kind", "told"), [("sync", True), ("async", False)])
def test_only_a_sync_invocation_has_a_context(kind: str, told: bool) -> None:
    """Lambda drops it from an event that it queues."""
    assert _config(invocation_type=kind).invoke.client_context is told


@pytest.mark.parametrize("on_error", ["fail", "log", "ignore"])
def test_only_fail_halts(on_error: str) -> None:
    """log and ignore go on with the next batch."""
    assert _config(on_error=on_error).invoke.policy.halt is (on_error == "fail")


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", 1_000_000),
        ("message.max.bytes=2000", 2000),
        ("error.message.max.bytes=3000", 3000),
        ("message.max.bytes=2000\nerror.message.max.bytes=3000", 3000),
        ("response.message.max.bytes=4000", 1_000_000),
        ("error.message.max.bytes=many", 1_000_000),
    ],
)
def test_error_records_stay_below_what_their_producer_takes(
    tmp_path: Path, text: str, limit: int
) -> None:
    """The properties file's limit for messages is the one that error records are divided by."""
    file = tmp_path / "kafka.properties"
    file.write_text(text)
    assert _config(kafka_config_file=str(file)).write.max_error_bytes == limit


# -- all at once --------------------------------------------------------------------------


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """One run is enough to learn everything that has to be mended."""
    file = tmp_path / "kafka.properties"
    file.write_text("acks=0\nnonsense\n")
    problems = _problems(
        consumer_group=None,
        topics=None,
        batch_size="0",
        batch_window_secs="soon",
        on_error="panic",
        include_headers="maybe",
        function="f f",
        starting_timestamp="yesterday",
        kafka_config_file=str(file),
    )
    wanted = [
        "--consumer_group is missing",
        "exactly one of --topics",
        "--batch_size=0",
        "--batch_window_secs=soon",
        "--on_error=panic",
        "--include_headers=maybe",
        "--function=f f",
        "--starting_timestamp goes with",
        "--starting_timestamp=yesterday",
        "acks",
        "line 2",
    ]
    assert len(problems) == len(wanted)
    for part in wanted:
        assert sum(part in problem for problem in problems) == 1


@given(st.dictionaries(st.sampled_from(list(OPTIONS)), st.none() | st.text(max_size=12)))
@settings(deadline=None)
def test_any_text_is_taken_or_refused_with_reasons(given: dict) -> None:
    """Whatever is typed, the answer is a config or a list of problems."""
    try:
        _config(**given)
    except UsageError as error:
        assert error.problems
        assert error.exit_code == 2


# -- the command line ---------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAGS)
def test_flags_on_the_command_line(name: str) -> None:
    """A flag alone is true; with a value it is that."""
    find = CASES[name][0]
    for argument, value in ((name, True), (f"{name}=true", True), (f"{name}=false", False)):
        config, _ = parse_arguments(_arguments(f"--{argument}"))
        assert find(config) is value


def test_preflight_has_a_no() -> None:
    """A flag that is on by default can be switched off by its name."""
    assert parse_arguments(_arguments())[0].run.preflight is True
    assert parse_arguments(_arguments("--no_preflight"))[0].run.preflight is False


def test_a_value_may_stand_alone() -> None:
    """`--name value` is the same as `--name=value`, negative numbers among them."""
    config, _ = parse_arguments(_arguments("--batch_size", "7", "--max_retries", "-1"))
    assert config.batch.max_records == 7
    assert config.invoke.policy.max_retries == -1


def test_beam_s_options_are_let_through() -> None:
    """The runner and Beam's other options are known."""
    arguments = _arguments("--runner=DirectRunner", "--streaming", "--job_name=j")
    assert parse_arguments(arguments)[1] == "DirectRunner"
    assert parse_arguments(_arguments())[1] == "DirectRunner"
    assert parse_arguments(_arguments("--runner", "FlinkRunner"))[1] == "FlinkRunner"


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["--topcis=a"], ["--topcis is not an option; did you mean --topics?"]),
        (["--topcis", "a"], ["--topcis is not an option; did you mean --topics?"]),
        (["--batch-size=5"], ["--batch-size is not an option; did you mean --batch_size?"]),
        (["--batch_siz=5"], ["--batch_siz is not an option; did you mean --batch_size?"]),
        (["--qqqqqq"], ["--qqqqqq is not an option; --help lists all"]),
        (["--password=s3cret"], ["--password is not an option; --help lists all"]),
        (["stray"], ["stray is not an option; --help lists all"]),
        (["--no_include_headers"], ["--no_include_headers is not an option"]),
        (["--a=1", "--b=2"], ["--a is not an option", "--b is not an option"]),
    ],
)
def test_an_option_nobody_knows_is_named(arguments: list[str], problems: list[str]) -> None:
    """A misspelt option is never passed over; its value is not shown."""
    with pytest.raises(UsageError) as raised:
        parse_arguments(_arguments(*arguments))
    assert len(raised.value.problems) == len(problems)
    for problem, wanted in zip(raised.value.problems, problems):
        assert problem.startswith(wanted)
        assert "s3cret" not in problem


def test_unknown_options_are_reported_with_the_other_problems() -> None:
    """Misspelt names do not hide wrong values."""
    with pytest.raises(UsageError) as raised:
        parse_arguments(_arguments("--topcis=a", "--batch_size=0"))
    assert len(raised.value.problems) == 2


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--topcis=a", "--batch_size=0"], ["--topcis", "--batch_size=0"]),
        (["--topics"], ["--topics: expected one argument"]),
        (["--runner"], ["--runner: expected one argument"]),
        (["--max_num_workers=abc"], ["--max_num_workers: invalid int value"]),
        (["--no_preflight=false"], ["--no_preflight"]),
        (["--runner=SparkRunner"], ["--runner=SparkRunner"]),
        (["--runner=FlinkRunner", "--workers=2"], ["--workers goes with the DirectRunner only"]),
        (["--direct_num_workers=2"], ["--direct_num_workers=2 has no effect; use --workers"]),
        (["--kafka_config_file=/no/such/file"], ["--kafka_config_file=/no/such/file cannot"]),
    ],
)
def test_wrong_options_end_with_2_and_a_line_each(arguments, lines, capsys) -> None:
    """Nothing on stdout, no stack trace, one line per problem on stderr."""
    assert main(_arguments(*arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == len(lines)
    for line, wanted in zip(err.splitlines(), lines):
        assert line.startswith(f"error: {wanted}")


def test_nothing_given_says_what_is_needed(capsys) -> None:
    """Without any option the four that are needed are named."""
    assert main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["kafka_bootstrap_servers", "consumer_group", "function"]):
        assert line.startswith(f"error: --{name} is missing; for example")
    assert "--topics" in lines[3]


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_ends_with_0(argument: str, capsys) -> None:
    """Help goes to stdout, whatever else is given."""
    assert main(["--nonsense", argument]) == 0
    assert capsys.readouterr().out == format_help() + "\n"


# -- help ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OPTIONS))
def test_help_names_each_option_with_its_facts(name: str) -> None:
    """Name, what it does, unit, range and default."""
    option = OPTIONS[name]
    text = format_help()
    after = text.split(f"  --{name}\n", 1)[1].split("\n  --", 1)[0].split("\n\n", 1)[0]
    shown = " ".join(after.split())
    assert " ".join(option.help.split()) in shown
    assert f"default: {option.default_text}" in shown
    if option.unit:
        assert f"unit: {option.unit}" in shown
    if option.kind in ("int", "float"):
        low, high, special = BOUNDS[name]
        assert f"{low} to {high}" in shown
        assert special is None or f"{special} (no limit) or" in shown
    for choice in option.choices:
        assert choice in shown
    if option.kind == "flag":
        assert "true | false" in shown


def test_help_fits_a_terminal_and_has_the_groups() -> None:
    """80 columns, and the options under their titles."""
    lines = format_help().splitlines()
    assert max(map(len, lines)) <= 80
    for group in GROUPS:
        assert group.title in lines


def test_a_number_with_a_unit_has_it_in_its_name() -> None:
    """Seconds are called so, and every number of them."""
    for name, option in OPTIONS.items():
        assert (option.unit == "seconds") == name.endswith("_secs")


# -- Beam ---------------------------------------------------------------------------------


def test_options_do_not_collide_with_beam_s() -> None:
    """No name is Beam's already, so both can be given to a pipeline together."""
    both = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for options in {each.__name__: each for each in PipelineOptions.__subclasses__()}.values():
        if options is not KafkaLambdaOptions and options.__module__.startswith("apache_beam."):
            options._add_argparse_args(both)
    KafkaLambdaOptions._add_argparse_args(both)  # raises at a name that is taken
    assert vars(both.parse_args(["--topics=a", "--runner=b"])).items() >= {
        ("topics", "a"),
        ("runner", "b"),
    }


def test_beam_can_hold_our_options() -> None:
    """A pipeline's options are built from the same declarations."""
    options = PipelineOptions(_arguments("--include_headers")).view_as(KafkaLambdaOptions)
    assert options.topics == "orders"
    assert options.include_headers == "true"
    assert options.batch_size is None


def _with_properties(folder: Path, text: str, **given: str | None) -> Config:
    file = folder / "kafka.properties"
    file.write_text(text)
    return _config(kafka_config_file=str(file), **given)


def test_a_topic_of_the_same_name_in_another_cluster(tmp_path: Path) -> None:
    """It is another topic, unless the brokers are the same."""
    for name, prefix in (("response_topic", "response"), ("error_topic", "error")):
        text = f"{prefix}.bootstrap.servers=other:9092"
        assert _with_properties(tmp_path, text, **{name: "orders"})
        for same in ("", f"{prefix}.bootstrap.servers=broker:9092"):
            with pytest.raises(UsageError, match="feed on its own output"):
                _with_properties(tmp_path, same, **{name: "orders"})


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"error_topic": "e"}, ["--error_topic=e stays empty with --on_error=fail"]),
        ({"error_topic": "e", "on_error": "log"}, []),
        (
            {"error_topic": "e", "on_error": "log", "response_topic": "e"},
            ["--response_topic=e is --error_topic, too"],
        ),
        (
            {
                "function": "arn:aws:lambda:eu-west-1:123456789012:function:f",
                "aws_region": "us-east-1",
            },
            ["--aws_region=us-east-1 is not the region of --function, eu-west-1"],
        ),
        (
            {
                "function": "arn:aws:lambda:eu-west-1:123456789012:function:f",
                "aws_region": "eu-west-1",
            },
            [],
        ),
    ],
)
def test_what_is_warned_of(given: dict[str, str], parts: list[str]) -> None:
    """It can be meant, but hardly is."""
    warnings = _config(**given).warnings
    assert len(warnings) == len(parts)
    for warning, part in zip(warnings, parts):
        assert part in warning


def test_log_format_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds from there on, for what is wrong with the options too."""
    file = tmp_path / "options.yaml"
    file.write_text("log_format: json\nbatch_size: 0\n")
    assert main([f"--config={file}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(json.loads(line)["message"].startswith("error: ") for line in lines)
    assert main([f"--config={file}", "--log_format=text"]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("redirect", "code"), [(">&-", 0), ("> /dev/full", 0), ("| true", 0), (">&- --batch_size=0", 2)]
)
def test_nobody_takes_what_is_printed(redirect: str, code: int) -> None:
    """The exit code is that of the outcome, and there is no traceback."""
    command = [sys.executable, "-m", "pipeline", *_arguments("--explain")]
    line = f"{shlex.join(command)} {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
