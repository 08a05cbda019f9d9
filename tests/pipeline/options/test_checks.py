"""Checks: bounds, forms, and what does not go together."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from pipeline.options.checks import parse_timestamp
from pipeline.options.config import Config
from pipeline.options.declare import OPTIONS
from tests.pipeline.options.given import (
    BESIDE,
    BESIDE_CHOICE,
    BOUNDS,
    CASES,
    CHOICES,
    CONSUMER,
    FILTERS,
    FLAGS,
    IAM_PROPERTIES,
    MSK,
    NOW,
    NUMBERS,
    REGISTRY,
    REQUIRED,
    ROLE,
    STREAM,
    STREAMED,
    TEXTS,
    TOKEN,
    config_of,
    problems_of,
)
from transforms.aws.function import MAX_SYNC_BYTES
from transforms.errors import UsageError
from transforms.invoke.window import MAX_WINDOW_BYTES
from transforms.kafka.client import client_settings


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_within_its_bounds_is_taken(name: str) -> None:
    """The least, the greatest, and where there is one the special value."""
    low, high, special = BOUNDS[name]
    find = CASES[name][0]
    for number in (low, high, *([special] if special is not None else [])):
        found = find(config_of(**BESIDE.get(name, {}), **{name: str(number)}))
        assert (found[0] if isinstance(found, tuple) else found) == number


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_bounds_is_refused(name: str) -> None:
    """One below and one above: the message has the option, the value and the range."""
    low, high, special = BOUNDS[name]
    below = low - 1 if low - 1 != special else low - 2
    for number in (below, high + 1, -(10**9), 10**30):
        (problem,) = problems_of(**BESIDE.get(name, {}), **{name: str(number)})
        assert problem.startswith(f"--{name}={number} is not allowed; give ")
        assert f"{low} to {high}" in problem
        if special is not None:
            assert f"{special} (no limit)" in problem


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["", "many", "1,5", "0x10", "--", "1 2", "none"])
def test_a_number_has_to_be_one(name: str, text: str) -> None:
    """What is no number is refused, with the option, the text and the range."""
    (problem,) = problems_of(**BESIDE.get(name, {}), **{name: text})
    assert problem.startswith(f"--{name}={text} is not a")
    assert str(BOUNDS[name][1]) in problem


@pytest.mark.parametrize("text", ["1.5", "1e2", "nan", "inf"])
@pytest.mark.parametrize("name", [name for name in NUMBERS if OPTIONS[name].kind == "int"])
def test_a_whole_number_has_no_fraction(name: str, text: str) -> None:
    """An int option takes no fraction and no exponent."""
    (problem,) = problems_of(**BESIDE.get(name, {}), **{name: text})
    assert "is not a whole number" in problem


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.001", "300.001"])
def test_the_window_is_a_finite_number(text: str) -> None:
    """A fraction of a second is fine; what is no time is not."""
    (problem,) = problems_of(batch_window_secs=text)
    assert "0 to 300" in problem


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_each_of_its_values_and_nothing_else(name: str) -> None:
    """All choices are taken as they are written; anything else names them all."""
    find = CASES[name][0]
    for choice in OPTIONS[name].choices:
        beside = {**BESIDE.get(name, {}), **BESIDE_CHOICE.get(choice, {})}
        found = find(config_of(**{name: choice, **beside}))
        assert (found[-1] if isinstance(found, tuple) else found) == choice
    for wrong in ("", "other", OPTIONS[name].choices[0] + " "):
        (problem,) = problems_of(**{**BESIDE.get(name, {}), name: wrong})
        assert problem.startswith(f"--{name}={wrong} is not allowed; give ")
        assert all(choice in problem for choice in OPTIONS[name].choices)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("True", True), ("FALSE", False)]
)
def test_a_flag_is_true_or_false(name: str, text: str, value: bool) -> None:
    """A flag's value may be given, in either case."""
    assert CASES[name][0](config_of(**BESIDE.get(name, {}), **{name: text})) is value


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("text", ["", "yes", "1", "maybe"])
def test_a_flag_is_nothing_else(name: str, text: str) -> None:
    """What is neither true nor false is refused."""
    (problem,) = problems_of(**{**BESIDE.get(name, {}), name: text})
    assert problem == f"--{name}={text} is not allowed; give true | false"


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_is_refused(name: str) -> None:
    """An option given without a value is a mistake, such as a variable that is not set."""
    assert f"--{name} is empty; leave it out, or give it a value" in problems_of(
        **{**BESIDE.get(name, {}), name: ""}
    )


@pytest.mark.parametrize("name", ["kafka_bootstrap_servers", "consumer_group", "function"])
def test_what_has_to_be_given(name: str) -> None:
    """A required option that is missing is named, with an example."""
    (problem,) = problems_of(**{name: None})
    assert problem == f"--{name} is missing; for example --{name}={OPTIONS[name].example}"


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
        config_of(**{**beside, name: text})
    for text in wrong:
        (problem,) = problems_of(**{**beside, name: text})
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


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"topics": None}, ["exactly one of --topics, --topics_regex and --stream, not none"]),
        ({"topics": ""}, ["exactly one", "not none"]),
        ({"topics": "a,b, a"}, ["--topics=a,b, a names a twice"]),
        ({"batch_size": "1_0"}, ["--batch_size=1_0 is not a whole number"]),
        ({"batch_size": "\u0661"}, ["is not a whole number"]),
        ({"batch_window_secs": "1_0"}, ["--batch_window_secs=1_0 is not a number"]),
        ({"batch_window_secs": "nan"}, ["--batch_window_secs=nan is not a number"]),
        ({"topics": " , "}, ["exactly one", "not none"]),
        (
            {"topics_regex": "x.*"},
            ["exactly one of --topics, --topics_regex and --stream, not several"],
        ),
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
            ["--event_source_arn goes with --envelope=kafka_event or pipes, with"],
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
        ({"kafka_role_arn": ROLE}, ["--kafka_role_arn goes with sasl.mechanism=AWS_MSK_IAM"]),
        (
            {"kafka_role_arn": "read", "kafka_config_file": IAM_PROPERTIES},
            ["--kafka_role_arn=read is not the ARN of a role"],
        ),
        (
            {"kafka_bootstrap_servers": "b-1.x.c2.kafka.us-east-1.amazonaws.com:9098"},
            ["--kafka_bootstrap_servers=b-1", "MSK has IAM at this port", "mechanism=AWS_MSK_IAM"],
        ),
        (
            {
                "kafka_bootstrap_servers": "b-1.x.c2.kafka.us-east-1.amazonaws.com:9096",
                "kafka_config_file": IAM_PROPERTIES,
            },
            ["amazonaws.com:9096: MSK has SASL_SSL with SCRAM-SHA-512", "ports of IAM are 9098"],
        ),
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
        (
            {"max_workers": "4", "max_concurrency": "3"},
            ["--max_workers=4 is above --max_concurrency=3"],
        ),
        ({"workers": "4", "max_workers": "3"}, ["--workers=4 is above --max_workers=3"]),
        ({"delivery": "exactly_once"}, ["--delivery=exactly_once needs --response_topic or"]),
        ({"http": "127.0.0.1:99999"}, ["--http=127.0.0.1:99999 is not a HOST:PORT"]),
        ({"http_token_file": TOKEN}, ["--http_token_file goes with --http only"]),
        ({"http": "0", "http_token_file": "/no/such"}, ["/no/such cannot be read"]),
        ({"metrics_partitions": "5"}, ["--metrics_partitions goes with --http only"]),
        ({"page_show": "messages"}, ["--page_show goes with --http or --report only"]),
        ({"start_paused": "true"}, ["--start_paused needs --http and a token"]),
        ({"start_paused": "true", "http": "0"}, ["--start_paused needs --http and a token"]),
        (
            {**STREAMED, "filter_criteria": FILTERS},
            ["topic is not known; there are data, partitionKey"],
        ),
        (
            {**STREAMED, "consumer_name": "fast", "consumer_arn": CONSUMER, "stream": STREAM},
            ["give --consumer_name or --consumer_arn, and not both"],
        ),
        ({**STREAMED, "consumer_arn": CONSUMER}, ["is the consumer of none of --stream"]),
        ({**STREAMED, "consumer_name": "a b"}, ["--consumer_name=a b is no name of a consumer"]),
        (
            {**STREAMED, "consumer_arn": STREAM, "stream": STREAM},
            ["is not the ARN of a stream's consumer"],
        ),
        ({"deaggregate": "true"}, ["--deaggregate goes with --stream only"]),
        ({"starting_timestamp": "2026-01-01"}, ["--starting_position=AT_TIMESTAMP only"]),
        (
            {"starting_timestamp": "2026-01-01", "starting_position": "LATEST"},
            ["--starting_position=AT_TIMESTAMP only"],
        ),
    ],
)
def test_options_that_do_not_go_together(given: dict, parts: list[str]) -> None:
    """Each rule is one line that names the options, and shows no secret."""
    (problem,) = problems_of(**given)
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
    config_of(**given)


def with_properties(folder: Path, text: str, **given: str | None) -> Config:
    file = folder / "kafka.properties"
    file.write_text(text)
    return config_of(kafka_config_file=str(file), **given)


def test_a_topic_of_the_same_name_in_another_cluster(tmp_path: Path) -> None:
    """It is another topic, unless the brokers are the same."""
    for name, prefix in (("response_topic", "response"), ("error_topic", "error")):
        text = f"{prefix}.bootstrap.servers=other:9092"
        assert with_properties(tmp_path, text, **{name: "orders"})
        for same in ("", f"{prefix}.bootstrap.servers=broker:9092"):
            with pytest.raises(UsageError, match="feed on its own output"):
                with_properties(tmp_path, same, **{name: "orders"})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("response.bootstrap.servers=other:9092", "take response.bootstrap.servers out of"),
        ("error.bootstrap.servers=other:9092", "--error_topic=e in the cluster that is read"),
        ("response.linger.ms=5\nerror.linger.ms=6", "response.linger.ms and error.linger.ms"),
        ("isolation.level=read_uncommitted", "needs isolation.level=read_committed"),
    ],
)
def test_what_does_not_go_into_one_transaction(tmp_path: Path, text: str, part: str) -> None:
    options = {"delivery": "exactly_once", "response_topic": "r", "error_topic": "e"}
    with pytest.raises(UsageError) as raised:
        with_properties(tmp_path, text, **options)
    (problem,) = raised.value.problems
    assert problem.startswith("--delivery=exactly_once ") and part in problem


def test_one_producer_has_the_settings_of_both_topics(tmp_path: Path) -> None:
    text = "linger.ms=1\nresponse.linger.ms=7\nerror.compression.type=lz4\n"
    text += "response.bootstrap.servers=broker:9092"
    config = with_properties(tmp_path, text, delivery="exactly_once", response_topic="r")
    assert config.write.transaction
    settings = client_settings(config.write.transaction.kafka, "response.", "error.")
    assert (settings["linger.ms"], settings["compression.type"]) == ("7", "lz4")


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"envelope": "confluent"}, "goes with --envelope=kafka_event or kinesis_event, not with"),
        ({"envelope": "pipes"}, "not with pipes, which has no place for a window"),
        ({"invocation_type": "async"}, "needs --invocation_type=sync"),
        ({"parallelization_factor": "2"}, "does not go with --parallelization_factor=2"),
        ({"response_topic": "r"}, "without --response_topic"),
        ({"reply": "any", "response_topic": "r"}, "--reply=batch_item_failures or none"),
        ({"delivery": "exactly_once", "error_topic": "e"}, "does not go with --delivery="),
    ],
)
def test_what_a_window_does_not_go_with(given: dict[str, str], part: str) -> None:
    (problem,) = problems_of(**{"envelope": "kafka_event", "tumbling_window_secs": "60", **given})
    assert problem.startswith("--tumbling_window_secs=60 ") and part in problem


def test_a_window_leaves_room_for_its_state() -> None:
    windowed = {"envelope": "kafka_event", "tumbling_window_secs": "60"}
    assert config_of(**windowed).batch.max_bytes == MAX_SYNC_BYTES - MAX_WINDOW_BYTES
    assert config_of(**windowed, batch_bytes="1000").batch.max_bytes == 1000


@pytest.mark.parametrize("runner", ["FlinkRunner", "DataflowRunner"])
def test_windows_are_refused_where_nothing_keeps_them(runner: str) -> None:
    given = {**REQUIRED, "envelope": "kafka_event", "tumbling_window_secs": "60"}
    with pytest.raises(UsageError) as raised:
        Config.from_options(given, NOW, runner)
    (problem,) = raised.value.problems
    assert problem.startswith("--tumbling_window_secs goes with the DirectRunner only: on")


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
    warnings = config_of(**given).warnings
    assert len(warnings) == len(parts)
    for warning, part in zip(warnings, parts):
        assert part in warning
