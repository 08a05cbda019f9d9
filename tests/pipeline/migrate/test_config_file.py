"""Configuration files: what each setting becomes, what is refused, and what wins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_values
from hypothesis import strategies as st

from pipeline.cli import main
from pipeline.migrate import connector, mapping
from pipeline.migrate.carried import Carried, Row, find_row
from pipeline.migrate.config_file import carry, load, parse
from pipeline.options.declare import OPTIONS
from pipeline.options.explain import explain
from pipeline.options.resolve import Resolved, parse_arguments, resolve
from transforms.aws.msk import TokenError
from transforms.errors import UsageError

CLASS = "io.confluent.connect.aws.lambda.AwsLambdaSinkConnector"
PLAIN = {
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "org.apache.kafka.connect.storage.StringConverter",
}
CONNECTOR = {
    "connector.class": CLASS,
    "name": "orders-sink",
    "topics": "orders",
    "aws.lambda.function.name": "f",
    **PLAIN,
}
CLOUD = {
    "connector.class": "LambdaSink",
    "name": "shown",
    "topics": "orders",
    "aws.lambda.function.name": "f",
}
JSON_CONVERTER = "org.apache.kafka.connect.json.JsonConverter"
AVRO_CONVERTER = "io.confluent.connect.avro.AvroConverter"
MAPPING = {
    "UUID": "a1b2c3d4-5678-90ab-cdef-EXAMPLE11111",
    "StartingPosition": "TRIM_HORIZON",
    "BatchSize": "100",
    "FunctionArn": "arn:aws:lambda:us-east-2:123456789012:function:f",
    "State": "Disabled",
    "Topics": ["orders"],
    "SelfManagedEventSource": {"Endpoints": {"KAFKA_BOOTSTRAP_SERVERS": ["a:1", "b:2"]}},
    "SelfManagedKafkaEventSourceConfig": {"ConsumerGroupId": "g"},
}


def carried(
    base: dict[str, Any],
    more: dict[str, Any],
    given: dict[str, str] | None = None,
    environ: dict[str, str] | None = None,
) -> Carried:
    """What the settings come to; a setting that is None is left out."""
    content = {name: value for name, value in {**base, **more}.items() if value is not None}
    found = carry(content, "file", given or {}, OPTIONS, environ or {})
    assert {*found.values, *found.defaults} <= {*OPTIONS}
    return found


def texts(found: Carried) -> dict[str, str]:
    return {name: value.text for name, value in (found.defaults | found.values).items()}


def refusals(found: Carried) -> dict[str, str]:
    return {note.name: note.why for note in found.refused}


def notes(found: Carried) -> dict[str, str]:
    return {note.name: note.why for note in found.notes}


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"a": 1, "b": 1.50, "c": true, "d": null, "e": "x"}',
            {"a": "1", "b": "1.50", "c": "true", "e": "x"},
        ),
        ('{"a": [1, null, {"b": false}]}', {"a": ["1", {"b": "false"}]}),
        ('{\n\t"a": "b"\n}', {"a": "b"}),
        (
            "a: 1\nb: [x, y]\nc: 2026-11-01T00:00:00Z\nd: yes\ne: 1_000\n",
            {"a": "1", "b": ["x", "y"], "c": "2026-11-01T00:00:00Z", "d": "yes", "e": "1_000"},
        ),
        ("# comment\na:\n  b: 1\n", {"a": {"b": "1"}}),
        ("a: null\nb: ~\nc:\nd: 'null'\ne: [null, x]\n", {"d": "null", "e": ["x"]}),
        ("a: NO\nb: 012\nc: 12:30:45\n", {"a": "NO", "b": "012", "c": "12:30:45"}),
        ("name=n\nconnector.class=c\n", {"name": "n", "connector.class": "c"}),
        (
            "! c\n a = b = c \nconnector.class : x\nd e\nf=1,\\\n   2\ng=\\u0041\\t\\=\n",
            {"a": "b = c", "connector.class": "x", "d": "e", "f": "1,2", "g": "A\t="},
        ),
        ("a=1\na=2\nconnector.class=x", {"a": "2", "connector.class": "x"}),
    ],
)
def test_what_a_file_holds(text: str, expected: dict[str, Any]) -> None:
    """JSON, YAML or properties; scalars as they are written, nulls left out."""
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no settings"),
        ("{}", "no settings"),
        ("[1]", "no settings"),
        ("null", "no settings"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1, "a": 2}', "a is there twice"),
        ("a: 1\na: 2\n", "a is there twice"),
        ("a: [1\n", "YAML"),
        ("a: 1\n\tb: 2\n", "YAML: found character '\\t' that cannot start any token in line 2"),
        ("a: &x [*x]\n", "refers to itself"),
        ("? [a]\n: 1\n", "the name in line 1 is no text"),
        (
            "a: &a [x, x]\n"
            + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in pairwise("abcdefghijklmnopqrst")),
            "it is too large",
        ),
        ("--- 1\n--- 2\n", "YAML"),
    ],
)
def test_a_file_that_is_none(text: str, part: str) -> None:
    """One line says what it is not, with the line if there is one."""
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, and one that is no text: one line each."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, part in ((tmp_path / "missing", "No such file"), (binary, "not UTF-8")):
        with pytest.raises(UsageError) as raised:
            load(str(path), {}, OPTIONS, {})
        (problem,) = raised.value.problems
        assert problem.startswith(f"--config={path} cannot be read: ") and part in problem


def test_a_mark_at_the_beginning_is_no_part_of_it(tmp_path: Path) -> None:
    """Editors on Windows put one there."""
    path = tmp_path / "options.json"
    path.write_bytes(b'\xef\xbb\xbf{"topics": "a"}')
    assert load(str(path), {}, OPTIONS, {}).values["topics"].text == "a"


# -- options by their own names --------------------------------------------------------------------


def test_options_by_their_own_names() -> None:
    """A list may be one, or text."""
    found = carried({}, {"topics": ["a", "b"], "batch_size": "7", "on_error": "log"})
    assert texts(found) == {"topics": "a,b", "batch_size": "7", "on_error": "log"}
    assert not found.notes and not found.refused


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("batchsize", "1", "not an option; did you mean batch_size?"),
        ("--topics", "a", "not an option; did you mean topics?"),
        ("xyzzy", "1", "not an option"),
        ("config", "other.yaml", "it belongs on the command line"),
        ("explain", "true", "it belongs on the command line"),
        ("batch_size", {"a": "1"}, "it is neither a value nor a list of values"),
        ("topics", [["a"]], "it is neither a value nor a list of values"),
    ],
)
def test_what_is_no_option(name: str, value: Any, why: str) -> None:
    """Each is named, with the nearest that is one."""
    assert refusals(carried({}, {"topics": "a", name: value})) == {name: why}


# -- a connector -----------------------------------------------------------------------------------


def test_a_connector_s_own_defaults() -> None:
    """What its file does not say is as the connector has it, not as we have it."""
    assert texts(carried(CONNECTOR, {})) == {
        "topics": "orders",
        "consumer_group": "connect-orders-sink",
        "function": "f",
        "envelope": "confluent",
        "error_record": "confluent",
        "starting_position": "TRIM_HORIZON",
        "invocation_type": "sync",
        "batch_size": "20",
        "batch_window_secs": "0",
        "function_timeout_secs": "50",
        "max_concurrency": "1",
        "max_retries": "0",
        "on_error": "fail",
        "response_topic": "orders-sink-success",
        "response_format": "string",
        "error_format": "string",
        "key_format": "string",
        "value_format": "string",
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"topics": None, "topics.regex": "o.*"}, {"topics_regex": "o.*"}),
        ({"topics": "a, b"}, {"topics": "a, b"}),
        ({"consumer.override.group.id": "mine"}, {"consumer_group": "mine"}),
        ({"consumer.override.bootstrap.servers": "a:1"}, {"kafka_bootstrap_servers": "a:1"}),
        ({"consumer.override.auto.offset.reset": "latest"}, {"starting_position": "LATEST"}),
        ({"aws.lambda.region": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"aws.lambda.batch.size": "1"}, {"batch_size": "1"}),
        ({"aws.lambda.socket.timeout": "1001"}, {"function_timeout_secs": "2"}),
        ({"aws.lambda.socket.timeout": "0"}, {"function_timeout_secs": "900"}),
        ({"aws.lambda.socket.timeout": "9999999"}, {"function_timeout_secs": "900"}),
        ({"tasks.max": "8"}, {"max_concurrency": "8"}),
        ({"tasks.max": "5000"}, {"max_concurrency": "1000"}),
        ({"behavior.on.error": "ignore"}, {"on_error": "ignore"}),
        ({"behavior.on.error": "log"}, {"on_error": "log", "error_topic": "orders-sink-error"}),
        ({"reporter.result.topic.name": "r-${connector}"}, {"response_topic": "r-orders-sink"}),
        ({"reporter.result.topic.name": ""}, {"response_topic": None}),
        (
            {"behavior.on.error": "log", "reporter.error.topic.name": ""},
            {"on_error": "log", "error_topic": None},
        ),
        ({"reporter.error.topic.name": "e"}, {"error_topic": None}),
        (
            {"aws.lambda.invocation.type": "async", "reporter.result.topic.name": "r"},
            {"invocation_type": "async", "response_topic": None},
        ),
        (
            {"aws.lambda.invocation.type": "async", "behavior.on.error": "log"},
            {"error_topic": None, "response_topic": None},
        ),
        (
            {
                "aws.lambda.invocation.type": "async",
                "behavior.on.error": "log",
                "reporter.error.topic.name": "e",
            },
            {"error_topic": "e"},
        ),
        # The connector of before the reporters wrote nothing that was not asked for.
        (
            {"behavior.on.error": "log", "aws.lambda.response.topic": "r"},
            {"response_topic": "r", "error_topic": None},
        ),
        (
            {"behavior.on.error": "log", "aws.lambda.error.topic": "e"},
            {"response_topic": None, "error_topic": "e"},
        ),
        (
            {"aws.lambda.response.topic": "r", "reporter.result.topic.name": "r"},
            {"response_topic": "r"},
        ),
        ({"reporter.result.topic.key.format": "json"}, {"response_format": "json"}),
        ({"reporter.result.topic.value.format": "json"}, {"response_format": "string"}),
        (
            {
                f"reporter.{kind}.topic.{part}.{name}": value
                for kind in ("result", "error")
                for part in ("key", "value")
                for name, value in (("format", "json"), ("format.schemas.enable", "true"))
            },
            {"response_format": "json_schema", "error_format": "json_schema"},
        ),
        ({"key.converter": None}, {"key_format": None, "value_format": "string"}),
        (
            {"value.converter": "org.apache.kafka.connect.converters.ByteArrayConverter"},
            {"value_format": "base64"},
        ),
        (
            {"value.converter": JSON_CONVERTER, "value.converter.schemas.enable": "false"},
            {"value_format": "json"},
        ),
        (
            {
                "value.converter": JSON_CONVERTER,
                "value.converter.schemas.enable": "false",
                "record.converter.class": "io.confluent.connect.aws.lambda.converters."
                "EscapedJsonKeyValueConverter",
            },
            {"value_format": "string"},
        ),
        (
            {
                "value.converter": AVRO_CONVERTER,
                "value.converter.schema.registry.url": "http://r:8081",
                "value.converter.enhanced.avro.schema.support": "true",
            },
            {
                "schema_registry_url": "http://r:8081",
                "schema_validation": "VALUE",
                "key_format": "string",
                "value_format": None,
            },
        ),
        (
            {
                f"{part}.converter{name}": value
                for part in ("key", "value")
                for name, value in (("", AVRO_CONVERTER), (".schema.registry.url", "http://r:1"))
            },
            {"schema_registry_url": "http://r:1", "schema_validation": "KEY,VALUE"},
        ),
        (
            {
                "aws.credentials.provider.class": "com.example.AssumeRoleCredentialsProvider",
                "aws.credentials.provider.sts.role.arn": "arn:aws:iam::123456789012:role/r",
            },
            {"aws_role_arn": "arn:aws:iam::123456789012:role/r"},
        ),
        ({"aws.lambda.function.name": "${env:FUNCTION}"}, {"function": "from-environment"}),
        (
            {"aws.lambda.topic2function.map": "a;g:live, b;g:live"},
            {"topics": "a,b", "function": "g:live"},
        ),
    ],
)
def test_what_a_connector_s_settings_become(
    more: dict[str, str], expected: dict[str, str | None]
) -> None:
    """Each setting, and those that are looked at together."""
    found = carried(CONNECTOR, more, environ={"FUNCTION": "from-environment"})
    assert {name: texts(found).get(name) for name in expected} == expected
    if "aws.credentials.provider.class" not in more:
        assert not found.refused


@pytest.mark.parametrize(
    ("more", "name", "part", "answer"),
    [
        ({"connector.class": "com.example.Sink"}, "connector.class", "not the Confluent", None),
        ({"transforms": "drop"}, "transforms", "no transforms here", None),
        ({"transforms.drop.type": "x"}, "transforms.drop.type", "no transforms here", None),
        ({"aws.lambda.batch.size": ["1"]}, "aws.lambda.batch.size", "are texts", None),
        ({"tasks.max": "many"}, "tasks.max", "not a whole number", "max_concurrency"),
        (
            {"consumer.override.auto.offset.reset": "none"},
            "consumer.override.auto.offset.reset",
            "has to begin somewhere",
            "starting_position",
        ),
        (
            {"name": None, "reporter.result.topic.name": "r"},
            "name",
            "--consumer_group=connect-NAME",
            "consumer_group",
        ),
        (
            {"record.converter.class": "com.example.Mine"},
            "record.converter.class",
            "a class of yours",
            None,
        ),
        (
            {"value.converter": "com.example.Mine"},
            "value.converter",
            "com.example.Mine is not known here",
            "value_format",
        ),
        (
            {"value.converter": JSON_CONVERTER},
            "value.converter.schemas.enable",
            "envelope of schema and payload",
            "value_format",
        ),
        (
            {"value.converter": AVRO_CONVERTER},
            "value.converter",
            "--schema_registry_url",
            "schema_registry_url",
        ),
        (
            {
                "key.converter": AVRO_CONVERTER,
                "value.converter": AVRO_CONVERTER,
                "key.converter.schema.registry.url": "http://a:1",
                "value.converter.schema.registry.url": "http://b:1",
            },
            "value.converter.schema.registry.url",
            "different registries",
            "schema_registry_url",
        ),
        (
            {"value.converter.basic.auth.user.info": "secret"},
            "value.converter.basic.auth.user.info",
            "put basic.auth.user.info=NAME:PASSWORD, with schema.registry. in front, into",
            "kafka_config_file",
        ),
        (
            {"key.converter.schema.registry.ssl.truststore.location": "/etc/jks"},
            "key.converter.schema.registry.ssl.truststore.location",
            "put ssl.ca.location (PEM), with schema.registry. in front, into",
            "kafka_config_file",
        ),
        (
            {"value.converter.basic.auth.credentials.source": "SASL_INHERIT"},
            "value.converter.basic.auth.credentials.source",
            "put basic.auth.user.info=NAME:PASSWORD",
            "kafka_config_file",
        ),
        (
            {"value.converter.decimal.format": "NUMERIC"},
            "value.converter.decimal.format",
            "one way",
            None,
        ),
        ({"value.converter.other": "x"}, "value.converter.other", "become JSON", None),
        (
            {"consumer.override.security.protocol": "SASL_SSL"},
            "consumer.override.security.protocol",
            "put security.protocol=SASL_SSL into --kafka_config_file",
            "kafka_config_file",
        ),
        (
            {"consumer.override.sasl.jaas.config": "secret"},
            "consumer.override.sasl.jaas.config",
            "put sasl.username and sasl.password into --kafka_config_file",
            "kafka_config_file",
        ),
        (
            {"reporter.producer.sasl.password": "1234"},
            "reporter.producer.sasl.password",
            "put response.sasl.password=... and error.sasl.password=... into",
            "kafka_config_file",
        ),
        (
            {"aws.lambda.error.ssl.key.password": "1234"},
            "aws.lambda.error.ssl.key.password",
            "put error.ssl.key.password=... into",
            "kafka_config_file",
        ),
        (
            {"aws.credentials.provider.class": "com.example.Mine"},
            "aws.credentials.provider.class",
            "a class of yours",
            "aws_role_arn",
        ),
        (
            {"aws.credentials.provider.sts.role.external.id": "secret"},
            "aws.credentials.provider.sts.role.external.id",
            "no external id",
            "aws_role_arn",
        ),
        ({"aws.lambda.proxy.url": "https://p"}, "aws.lambda.proxy.url", "HTTPS_PROXY", None),
        (
            {"reporter.result.topic.name": "a", "aws.lambda.response.topic": "b"},
            "aws.lambda.response.topic",
            "keep one of them",
            "response_topic",
        ),
        (
            {"reporter.error.topic.key.format": "json"},
            "reporter.error.topic.key.format",
            "the key is json and the value string",
            "error_format",
        ),
        (
            {"aws.lambda.function.name": "${file:/etc/names:f}"},
            "aws.lambda.function.name",
            "give --function",
            "function",
        ),
        (
            {"aws.lambda.function.name": "${env:MISSING}"},
            "aws.lambda.function.name",
            "give --function",
            "function",
        ),
        (
            {"aws.lambda.topic2function.map": "a;f,b;g"},
            "aws.lambda.topic2function.map",
            "run once for each",
            "function",
        ),
        ({"schema.context.name": "other"}, "schema.context.name", "default context", None),
    ],
)
def test_what_a_connector_cannot_bring(
    more: dict[str, Any], name: str, part: str, answer: str | None
) -> None:
    """It is refused with what to do, once, unless an option of the command line settles it."""
    found = carried(CONNECTOR, more)
    assert list(refusals(found)) == [name]
    assert part in refusals(found)[name]
    if answer:
        settled = carried(CONNECTOR, more, {answer: "x"})
        assert not settled.refused
        assert notes(settled)[name] == f"--{answer} is given instead"


def test_harmless_values_of_refused_settings() -> None:
    """Empty, or as they would be without being there."""
    more = {
        "transforms": "",
        "value.converter.decimal.format": "BASE64",
        "schema.context.name": "default",
        "aws.lambda.proxy.url": "",
        "value.converter.basic.auth.credentials.source": "USER_INFO",
        "aws.credentials.provider.class": "software.amazon.awssdk.auth.credentials."
        "DefaultCredentialsProvider",
        "consumer.override.security.protocol": "PLAINTEXT",
        "consumer.override.isolation.level": "read_uncommitted",
        "consumer.override.max.poll.records": "500",
    }
    found = carried(CONNECTOR, more)
    assert not found.refused
    assert "isolation.level=read_uncommitted" in notes(found)["consumer.override.isolation.level"]


def test_a_proxy_in_the_environment_settles_that_of_the_connector() -> None:
    """What the AWS client takes from there."""
    found = carried(CONNECTOR, {"aws.lambda.proxy.url": "x"}, environ={"https_proxy": "http://p"})
    assert not found.refused


@pytest.mark.parametrize(
    "name",
    [
        "aws.access.key.id",
        "aws.secret.access.key",
        "confluent.license",
        "confluent.topic.x",
        "tasks.max.enforce",
        "errors.tolerance",
        "header.converter",
        "predicates",
        "made.up",
    ],
)
def test_what_a_connector_does_not_need_to_bring(name: str) -> None:
    """It is listed, and nothing is refused."""
    found = carried(CONNECTOR, {name: "x"})
    assert name in notes(found)
    assert not found.refused


@pytest.mark.parametrize("base", [CONNECTOR, CLOUD])
def test_no_value_that_is_not_an_option_s_is_ever_shown(base: dict[str, str]) -> None:
    """Secrets are in many of a connector's settings; a listing shows none of them."""
    secret = "do-not-show-4711"
    names = [
        pattern.replace("*", part)
        for row in connector.ROWS
        for pattern in row.names
        for part in ("key", "sasl.jaas.config", "password", "result", "error", "value")
        if not row.option
    ]
    for name in names:
        found = carried(base, {name: secret}, {"consumer_group": "connect-x"})
        said = [part for note in (*found.notes, *found.refused) for part in note[:2]]
        if not name.endswith((".format", ".enable", "connector.class", "converter", "servers")):
            assert not [text for text in said if secret in text], name


def test_the_forms_of_a_connector_s_file() -> None:
    """As it was posted, as Connect gives it back, and the settings alone."""
    bare = {name: value for name, value in CONNECTOR.items() if name != "name"}
    whole = carried({}, {"name": "orders-sink", "config": bare})
    assert texts(whole) == texts(carried(CONNECTOR, {}))
    again = carried({}, {"name": "orders-sink", "config": CONNECTOR, "tasks": [], "type": "sink"})
    assert texts(again) == texts(whole)
    alone = carried(bare, {}, {"consumer_group": "connect-orders-sink"})
    assert texts(alone)["response_topic"] == "orders-sink-success"
    assert not alone.refused


def test_a_topic_that_needs_a_name_nobody_said() -> None:
    """A group of another name tells nothing of the connector's."""
    found = carried(CONNECTOR, {"name": None}, {"consumer_group": "mine"})
    why = "${connector}-success needs the connector's name; give --response_topic"
    assert refusals(found) == {"reporter.result.topic.name": why}


def test_what_the_command_line_says_is_what_the_file_is_read_with() -> None:
    """With errors to be logged the error topic is needed, and without replies no response topic."""
    logs = carried(CONNECTOR, {"reporter.error.topic.name": "e"}, {"on_error": "log"})
    assert texts(logs)["error_topic"] == "e"
    async_ = carried(CONNECTOR, {}, {"invocation_type": "async"})
    assert "response_topic" not in texts(async_)


def test_a_connector_in_confluent_cloud() -> None:
    """Its defaults, its names of topics, and its converters."""
    more = {
        "aws.lambda.configuration.mode": "single",
        "input.data.format": "JSON",
        "kafka.auth.mode": "KAFKA_API_KEY",
        "kafka.api.key": "k",
        "kafka.api.secret": "s",
        "tasks.max": "2",
    }
    found = carried(CLOUD, more)
    assert set(refusals(found)) == {"kafka.api.key", "kafka.api.secret", "name"}
    assert "--consumer_group=connect-lcc-..." in refusals(found)["name"]
    given = {"consumer_group": "connect-lcc-1", "kafka_config_file": "kafka.properties"}
    found = carried(CLOUD, more, given)
    assert not found.refused
    expected = {
        "on_error": "log",
        "response_topic": "success-lcc-1",
        "error_topic": "error-lcc-1",
        "key_format": "base64",
        "value_format": "json",
        "max_concurrency": "2",
    }
    assert texts(found).items() >= expected.items()


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("STRING", {"value_format": "string"}),
        ("BYTES", {"value_format": "base64"}),
        ("AVRO", {"schema_validation": "VALUE"}),
        ("JSON_SR", {"schema_validation": "VALUE"}),
        ("PROTOBUF", {"schema_validation": "VALUE"}),
    ],
)
def test_formats_of_confluent_cloud(format: str, expected: dict[str, str]) -> None:
    """Where a schema is needed the registry is not in the file."""
    given = {"consumer_group": "connect-lcc-1", "schema_registry_url": "http://r:1"}
    found = carried(CLOUD, {"input.data.format": format}, given)
    assert texts(found).items() >= expected.items()
    assert not found.refused


def test_another_cluster_for_the_results_is_named() -> None:
    """It may be the same by another name, so it is no reason to refuse."""
    name = "reporter.bootstrap.servers"
    same = carried(CONNECTOR, {name: "a:1"}, {"kafka_bootstrap_servers": "a:1"})
    other = carried(CONNECTOR, {name: "b:1"}, {"kafka_bootstrap_servers": "a:1"})
    assert name not in notes(same)
    assert "response. and error." in notes(other)[name]


# -- an event source mapping -----------------------------------------------------------------------


def test_a_mapping_s_own_defaults() -> None:
    """What its file does not say is as the mapping has it, not as we have it."""
    assert texts(carried(MAPPING, {})) == {
        "kafka_bootstrap_servers": "a:1,b:2",
        "topics": "orders",
        "consumer_group": "g",
        "starting_position": "TRIM_HORIZON",
        "function": "arn:aws:lambda:us-east-2:123456789012:function:f",
        "envelope": "kafka_event",
        "batch_size": "100",
        "batch_window_secs": "0.5",
        "max_retries": "-1",
        "max_record_age_secs": "-1",
        "bisect_on_error": "false",
        "on_error": "log",
    }


KINESIS = {
    "UUID": "14e0db71-5d35-4eb5-b481-8945cf9d10c2",
    "StartingPosition": "AT_TIMESTAMP",
    "StartingPositionTimestamp": "1793491200",
    "EventSourceArn": "arn:aws:kinesis:us-east-2:123456789012:stream/orders",
    "FunctionArn": "arn:aws:lambda:us-east-2:123456789012:function:f",
    "State": "Enabled",
}


def test_the_defaults_of_a_mapping_of_kinesis() -> None:
    """No limit on retries and age, no window; and a checkpoint where a reply names records."""
    expected = {
        "stream": "arn:aws:kinesis:us-east-2:123456789012:stream/orders",
        "lease_table": "beam-lambda-sink-14e0db71-5d35-4eb5-b481-8945cf9d10c2",
        "starting_position": "AT_TIMESTAMP",
        "starting_timestamp": "2026-11-01T00:00:00+00:00",
        "function": "arn:aws:lambda:us-east-2:123456789012:function:f",
        "envelope": "kinesis_event",
        "batch_size": "100",
        "batch_window_secs": "0",
        "max_retries": "-1",
        "max_record_age_secs": "-1",
        "bisect_on_error": "false",
        "on_error": "log",
    }
    found = carried(KINESIS, {})
    assert texts(found) == expected
    assert any("both would invoke the function" in note.why for note in found.notes)
    more = {
        "FunctionResponseTypes": ["ReportBatchItemFailures"],
        "ParallelizationFactor": "4",
        "TumblingWindowInSeconds": "30",
        "MaximumBatchingWindowInSeconds": "3",
        "DestinationConfig": {"OnFailure": {"Destination": "kafka://orders-errors"}},
    }
    assert texts(carried(KINESIS, more)) == expected | {
        "reply": "batch_item_failures",
        "partial_failure": "checkpoint",
        "parallelization_factor": "4",
        "tumbling_window_secs": "30",
        "batch_window_secs": "3",
        "error_topic": "orders-errors",
        "error_record": "aws",
    }


def test_a_consumer_of_a_stream() -> None:
    """With it Lambda takes aggregates apart."""
    arn = f"{KINESIS['EventSourceArn']}/consumer/fast:1700000000"
    found = carried(KINESIS, {"EventSourceArn": arn})
    assert texts(found)["stream"] == KINESIS["EventSourceArn"]
    assert (texts(found)["consumer_arn"], texts(found)["deaggregate"]) == (arn, "true")


MSK = {
    "SelfManagedEventSource": None,
    "SelfManagedKafkaEventSourceConfig": None,
    "EventSourceArn": "arn:aws:kafka:us-east-2:123456789012:cluster/c/1",
    "AmazonManagedKafkaEventSourceConfig": {"ConsumerGroupId": "m"},
}


ON_FAILURE = "DestinationConfig.OnFailure.Destination"


def _destination(target: str) -> dict[str, Any]:
    return {"DestinationConfig": {"OnFailure": {"Destination": target}}}


def _registry(**more: Any) -> dict[str, Any]:
    config = {"SchemaRegistryURI": "https://r:8081", "EventRecordFormat": "JSON", **more}
    kafka = {"ConsumerGroupId": "g", "SchemaRegistryConfig": config}
    return {"SelfManagedKafkaEventSourceConfig": kafka}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            MSK,
            {
                "event_source_arn": "arn:aws:kafka:us-east-2:123456789012:cluster/c/1",
                "consumer_group": "m",
                "kafka_bootstrap_servers": None,
            },
        ),
        ({"BatchSize": "7"}, {"batch_size": "7"}),
        ({"MaximumBatchingWindowInSeconds": "30"}, {"batch_window_secs": "30"}),
        ({"MaximumRecordAgeInSeconds": "60"}, {"max_record_age_secs": "60"}),
        ({"BisectBatchOnFunctionError": "true"}, {"bisect_on_error": "true"}),
        ({"ParallelizationFactor": "10"}, {"parallelization_factor": "10"}),
        (
            {"StartingPosition": "AT_TIMESTAMP", "StartingPositionTimestamp": "1793491200.5"},
            {
                "starting_position": "AT_TIMESTAMP",
                "starting_timestamp": "2026-11-01T00:00:00.500000+00:00",
            },
        ),
        (
            {"StartingPositionTimestamp": "2026-11-01T00:00:00+00:00"},
            {"starting_timestamp": "2026-11-01T00:00:00+00:00"},
        ),
        ({"MaximumRetryAttempts": "3"}, {"max_retries": "3"}),
        (
            {"MaximumRetryAttempts": "-1", **_destination("kafka://dlq")},
            {"max_retries": "10", "error_topic": "dlq", "error_record": "aws", "on_error": "log"},
        ),
        (_destination("kafka://dlq"), {"max_retries": "10"}),
        ({"MaximumRetryAttempts": "0", **_destination("kafka://dlq")}, {"max_retries": "0"}),
        ({"MaximumRetryAttempts": "-1"}, {"max_retries": "-1", "error_topic": None}),
        ({"DestinationConfig": {"OnFailure": {}}}, {"error_topic": None, "max_retries": "-1"}),
        (
            {"FunctionResponseTypes": ["ReportBatchItemFailures"]},
            {"reply": "batch_item_failures", "partial_failure": "named"},
        ),
        ({"FunctionResponseTypes": []}, {"reply": None, "partial_failure": None}),
        ({"FilterCriteria": {"Filters": [{"Pattern": "{}"}]}}, {"filter_criteria": "file"}),
        ({"FilterCriteria": {"Filters": []}}, {"filter_criteria": None}),
        ({"FilterCriteria": {}}, {"filter_criteria": None}),
        (
            {"ProvisionedPollerConfig": {"MinimumPollers": "1", "MaximumPollers": "4"}},
            {"max_concurrency": "20", "workers": "1", "max_workers": "4"},
        ),
        (
            {"ProvisionedPollerConfig": {"MaximumPollers": "2000"}},
            {"max_concurrency": "1000", "max_workers": "64", "workers": None},
        ),
        (
            _registry(SchemaValidationConfigs=[{"Attribute": "KEY"}, {"Attribute": "VALUE"}]),
            {
                "schema_registry_url": "https://r:8081",
                "event_record_format": "JSON",
                "schema_validation": "KEY,VALUE",
            },
        ),
    ],
)
def test_what_a_mapping_s_settings_become(
    more: dict[str, Any], expected: dict[str, str | None]
) -> None:
    """Each setting, and those that are looked at together."""
    found = carried(MAPPING, more)
    assert {name: texts(found).get(name) for name in expected} == expected
    assert not found.refused


@pytest.mark.parametrize(
    ("more", "name", "part", "answer"),
    [
        (_destination("arn:aws:lambda:us-east-2:1:f"), ON_FAILURE, "neither", "error_topic"),
        (
            {"EventSourceArn": "arn:aws:dynamodb:us-east-2:1:table/t/stream/2026"},
            "EventSourceArn",
            "a mapping of a DynamoDB stream, and not of Kafka or Kinesis",
            None,
        ),
        (
            {"EventSourceArn": "arn:aws:sqs:us-east-2:1:q"},
            "EventSourceArn",
            "a mapping of sqs",
            None,
        ),
        ({"Queues": ["q"]}, "Queues", "only mappings of Kafka", None),
        (
            {"SelfManagedKafkaEventSourceConfig": {"ConsumptionMode": "Queue"}},
            "SelfManagedKafkaEventSourceConfig.ConsumptionMode",
            "no order",
            None,
        ),
        (
            {"FilterCriteriaError": {"ErrorCode": "K", "Message": "m"}},
            "FilterCriteriaError.ErrorCode",
            "decrypt",
            "filter_criteria",
        ),
        (
            {"FunctionResponseTypes": ["Other"]},
            "FunctionResponseTypes",
            "Other is not known",
            "reply",
        ),
        (
            _registry(SchemaRegistryURI="arn:aws:glue:us-east-2:1:registry/r"),
            "SelfManagedKafkaEventSourceConfig.SchemaRegistryConfig.SchemaRegistryURI",
            "one of Glue's",
            "schema_registry_url",
        ),
        (
            _registry(AccessConfigs=[{"Type": "BASIC_AUTH", "URI": "arn:secret"}]),
            "SelfManagedKafkaEventSourceConfig.SchemaRegistryConfig.AccessConfigs.BASIC_AUTH",
            "its URI is no ARN of a secret",
            "kafka_config_file",
        ),
        (
            {"SourceAccessConfigurations": [{"Type": "SASL_SCRAM_256_AUTH", "URI": "arn:secret"}]},
            "SourceAccessConfigurations.SASL_SCRAM_256_AUTH",
            "its URI is no ARN of a secret",
            "kafka_config_file",
        ),
        (
            {"SourceAccessConfigurations": [{"Type": "NEW_AUTH", "URI": "x"}]},
            "SourceAccessConfigurations.NEW_AUTH",
            "not known here",
            "kafka_config_file",
        ),
        ({"BatchSize": ["1"]}, "BatchSize", "not a single value", "batch_size"),
        ({"SomethingNew": "1"}, "SomethingNew", "take it out", None),
    ],
)
def test_what_a_mapping_cannot_bring(
    more: dict[str, Any], name: str, part: str, answer: str | None
) -> None:
    """It is refused with what to do, once, unless an option of the command line settles it."""
    found = carried(MAPPING, more)
    assert list(refusals(found)) == [name]
    assert part in refusals(found)[name]
    assert "arn:secret" not in str(found.refused)
    if answer:
        settled = carried(MAPPING, more, {answer: "x"})
        assert not settled.refused
        assert notes(settled)[name] == f"--{answer} is given instead"


SECRET = "arn:aws:secretsmanager:us-east-2:123456789012:secret:orders-Ab12Cd"


def test_logins_of_a_mapping_become_an_option() -> None:
    """Their ARNs; what is in the secrets is read where it is needed. Networks are left out."""
    access = [
        {"Type": "OAUTHBEARER_AUTH", "URI": SECRET},
        {"Type": "OAUTHBEARER_SCOPE", "URI": "kafka"},
        {"Type": "VPC_SUBNET", "URI": "subnet:x"},
    ]
    found = carried(MAPPING, {"SourceAccessConfigurations": access})
    assert not found.refused
    assert texts(found)["kafka_access"] == f"OAUTHBEARER_AUTH={SECRET},OAUTHBEARER_SCOPE=kafka"
    assert {*notes(found)} == {"SourceAccessConfigurations.VPC_SUBNET", "State"}


def test_logins_of_a_registry_become_an_option() -> None:
    found = carried(MAPPING, _registry(AccessConfigs=[{"Type": "BASIC_AUTH", "URI": SECRET}]))
    assert not found.refused
    assert texts(found)["schema_registry_access"] == f"BASIC_AUTH={SECRET}"


def test_two_logins_of_a_mapping_are_refused() -> None:
    access = [{"Type": kind, "URI": SECRET} for kind in ("BASIC_AUTH", "SASL_SCRAM_512_AUTH")]
    found = carried(MAPPING, {"SourceAccessConfigurations": access})
    assert "are two logins" in refusals(found)["SourceAccessConfigurations"]


MSK_MAPPING = {
    **{name: value for name, value in MAPPING.items() if name != "SelfManagedEventSource"},
    "EventSourceArn": "arn:aws:kafka:us-east-2:123456789012:cluster/orders/5a7c-2",
}
BROKERS = {
    "": "b-1.o.a1.c2.kafka.us-east-2.amazonaws.com:9092",
    "Tls": "b-1.o.a1.c2.kafka.us-east-2.amazonaws.com:9094",
    "SaslScram": "b-1.o.a1.c2.kafka.us-east-2.amazonaws.com:9096",
    "SaslIam": "b-1.o.a1.c2.kafka.us-east-2.amazonaws.com:9098",
    "PublicSaslIam": "b-1-public.o.a1.c2.kafka.us-east-2.amazonaws.com:9198",
}
TAKEN_SECRET = [{"Type": "SASL_SCRAM_512_AUTH", "URI": SECRET}]


@pytest.mark.parametrize(
    ("brokers", "access", "arguments", "servers", "login"),
    [
        (BROKERS, [], [], BROKERS["SaslIam"], "IAM_AUTH"),
        ({"": BROKERS[""], "Tls": BROKERS["Tls"]}, [], [], BROKERS["Tls"], "TLS"),
        ({"": BROKERS[""]}, [], [], BROKERS[""], None),
        (BROKERS, TAKEN_SECRET, [], BROKERS["SaslScram"], f"SASL_SCRAM_512_AUTH={SECRET}"),
        (
            {"PublicSaslIam": BROKERS["PublicSaslIam"]},
            [],
            [],
            BROKERS["PublicSaslIam"],
            "IAM_AUTH",
        ),
        (
            {},
            [],
            [f"--kafka_bootstrap_servers={BROKERS['SaslIam']}"],
            BROKERS["SaslIam"],
            "IAM_AUTH",
        ),
        ({}, [], ["--kafka_bootstrap_servers=10.0.0.1:9098"], "10.0.0.1:9098", None),
    ],
)
def test_what_a_mapping_of_msk_leaves_to_aws(
    tmp_path: Path,
    brokers: dict[str, str],
    access: list[dict[str, str]],
    arguments: list[str],
    servers: str,
    login: str | None,
) -> None:
    """Its brokers, and, where it has no secret, the login that the cluster has."""
    content = {**MSK_MAPPING, "SourceAccessConfigurations": access}
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(content))

    def ask(arn: str, identity: Any) -> dict[str, str]:
        assert not arguments, "brokers that are given are not asked for"
        assert arn == MSK_MAPPING["EventSourceArn"]
        return brokers

    found = resolve([f"--config={path}", *arguments], ask=ask)
    assert found.problems == ()
    assert found.values["kafka_bootstrap_servers"].text == servers
    assert (found.values["kafka_access"].text if login else None) == login


def test_msk_that_does_not_say(tmp_path: Path) -> None:
    """Why is the one line; that the brokers are missing goes without saying."""
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(MSK_MAPPING))

    def ask(arn: str, identity: Any) -> dict[str, str]:
        raise TokenError("AccessDenied: no; it needs the right kafka:GetBootstrapBrokers")

    (problem,) = resolve([f"--config={path}"], ask=ask).problems
    assert "MSK does not say what its brokers are: AccessDenied" in problem
    scram = {**MSK_MAPPING, "SourceAccessConfigurations": TAKEN_SECRET}
    path.write_text(json.dumps(scram))
    (problem,) = resolve([f"--config={path}"], ask=lambda *_: {"Tls": "x:9094"}).problems
    assert "has no brokers for this login, only for Tls" in problem


def test_a_list_of_mappings() -> None:
    """One of them is as good as alone; of several it would be a guess."""
    assert texts(carried({}, {"EventSourceMappings": [MAPPING]})) == texts(carried(MAPPING, {}))
    for some in ([], [MAPPING, MAPPING]):
        found = carried({}, {"EventSourceMappings": some})
        assert f"has {len(some)} mappings" in refusals(found)["EventSourceMappings"]


@pytest.mark.parametrize(
    ("state", "part"),
    [("Enabled", "disable the mapping"), ("Disabled", "the pipeline runs all the same")],
)
def test_the_state_of_a_mapping_is_told(state: str, part: str) -> None:
    """Neither is a reason to refuse."""
    assert part in notes(carried(MAPPING, {"State": state}))["State"]


def test_all_that_aws_says_of_a_mapping_is_known() -> None:
    """Each field of the API's answer has its row."""
    import botocore.session

    model = botocore.session.get_session().get_service_model("lambda")
    shape = model.operation_model("GetEventSourceMapping").output_shape
    assert shape
    assert [name for name in _paths(shape) if find_row(mapping.ROWS, name) is None] == []


def _paths(shape: Any, path: str = "") -> Iterator[str]:
    for name, member in shape.members.items():
        if member.type_name == "structure":
            yield from _paths(member, f"{path}{name}.")
        elif member.type_name == "map":
            yield f"{path}{name}.KAFKA_BOOTSTRAP_SERVERS"
        else:
            yield path + name


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [connector.ROWS, mapping.ROWS])
def test_no_row_hides_another(rows: tuple[Row, ...]) -> None:
    """What a row names is what it gets."""
    for row in rows:
        for name in row.names:
            assert find_row(rows, name.replace("*", "x")) is row or "*" in name
            assert find_row(rows, name) is row


_NAMES = st.sampled_from(
    [
        name.replace("*", "x")
        for rows in (connector.ROWS, mapping.ROWS)
        for row in rows
        for name in row.names
    ]
    + ["config", "EventSourceMappings", "OnFailure", "Destination", "Filters", "Type", "URI"]
    + ["ConsumerGroupId", "SchemaRegistryConfig", "AccessConfigs", "SchemaValidationConfigs"]
)
_VALUES = st.recursive(
    st.text(max_size=5) | st.sampled_from(["1", "true", "kafka://t", "${env:X}", "arn:aws:kafka:"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given_values(st.dictionaries(_NAMES, _VALUES, max_size=12))
def test_whatever_a_file_holds_has_an_end(content: dict[str, Any]) -> None:
    """Nonsense becomes values, notes and refusals, and what is left is checked as any option."""
    text = json.dumps(content)
    try:
        resolved = resolve(["--config=file"], environ={}, read=lambda path: text)
    except UsageError as error:
        assert error.problems
        return
    assert all(len(problem.splitlines()) == 1 for problem in resolved.problems)
    explain(resolved)


# -- what wins, and what is said -------------------------------------------------------------------


def _resolve(content: dict[str, Any], *arguments: str) -> Resolved:
    text = json.dumps(content)
    return resolve(["--config=file", *arguments], environ={}, read=lambda path: text)


def test_the_command_line_wins_over_the_file_and_that_over_all_defaults() -> None:
    """One option of each, and where each came from."""
    found = _resolve(
        {**CONNECTOR, "aws.lambda.batch.size": "30"},
        "--kafka_bootstrap_servers=a:1",
        "--function=other",
    )
    assert found.problems == ()
    assert found.config
    assert found.config.invoke.function.function == "other"
    assert found.values["function"].origin == "command line"
    assert found.config.batch.max_records == 30
    assert found.values["batch_size"].origin == "aws.lambda.batch.size"
    assert found.config.invoke.function.timeout_secs == 50
    assert found.values["function_timeout_secs"].origin == "default of the connector"
    assert found.config.invoke.policy.max_record_age_secs == -1
    assert "max_record_age_secs" not in found.values


def test_an_empty_value_takes_back_what_the_file_says() -> None:
    """The way to have none of something; an empty value without a file is still a mistake."""
    found = _resolve(CONNECTOR, "--kafka_bootstrap_servers=a:1", "--response_topic=")
    assert found.config and found.config.write.response_topic is None
    found = _resolve(CONNECTOR, "--kafka_bootstrap_servers=a:1", "--aws_region=")
    assert found.problems == ("--aws_region is empty; leave it out, or give it a value",)


def test_topics_by_name_take_the_place_of_the_file_s_regex() -> None:
    """And the other way round, and a starting position that of its time."""
    servers = "--kafka_bootstrap_servers=a:1"
    found = _resolve({**CONNECTOR, "topics.regex": "x"}, servers, "--topics=a")
    assert found.problems == ()
    found = _resolve(CONNECTOR, servers, "--topics_regex=a.*")
    assert found.config and found.config.source.topics == ()
    own = {"topics": "t", "consumer_group": "g", "function": "f"}
    start = {"starting_position": "AT_TIMESTAMP", "starting_timestamp": "2026-11-01"}
    assert _resolve({**own, **start}, servers, "--starting_position=LATEST").problems == ()


def test_a_problem_says_where_its_value_came_from() -> None:
    """In the words of the file."""
    found = _resolve({**CONNECTOR, "aws.lambda.batch.size": "0"}, "--kafka_bootstrap_servers=a")
    assert found.problems == (
        "--batch_size=0 is not allowed; give 1 to 10000 (aws.lambda.batch.size in file)",
        "--kafka_bootstrap_servers=a is not a comma separated list of host:port",
    )
    found = _resolve({"topics": "t", "consumer_group": "g", "function": "a b"})
    assert found.problems[-1].endswith("(in file)")


def test_a_missing_name_is_told_once() -> None:
    """What is refused says how to give it; that the option is missing says no more."""
    content = {name: value for name, value in CONNECTOR.items() if name != "name"}
    found = _resolve(content, "--kafka_bootstrap_servers=a:1", "--response_topic=r")
    (problem,) = found.problems
    assert problem.startswith("--config=file: name: ")


def test_a_missing_registry_is_told_once() -> None:
    """The same where an option needs it."""
    converter = {"value.converter": AVRO_CONVERTER}
    found = _resolve({**CONNECTOR, **converter}, "--kafka_bootstrap_servers=a:1")
    (problem,) = found.problems
    assert "needs the schema registry's address" in problem


def test_what_carried_settings_are_called_here_exists() -> None:
    """Each option that a row names."""
    for rows in (connector.ROWS, mapping.ROWS):
        for row in rows:
            assert not row.option or row.option in OPTIONS


def test_the_explanation_masks_what_may_be_secret(tmp_path: Path) -> None:
    """Values of Kafka's settings, and a login in an address."""
    properties = tmp_path / "kafka.properties"
    properties.write_text("sasl.username=alice\nsasl.password=wonderland\n")
    own = {"topics": "t", "consumer_group": "g", "function": "f"}
    found = _resolve(
        own,
        "--kafka_bootstrap_servers=a:1",
        f"--kafka_config_file={properties}",
        "--lambda_endpoint_url=http://bob:builder@h:1",
    )
    said = explain(found)
    assert "sasl.password = ***" in said and "sasl.username = ***" in said
    assert "http://***@h:1" in said
    assert not [secret for secret in ("alice", "wonderland", "bob", "builder") if secret in said]


@pytest.mark.parametrize(("size", "code"), [("1", 0), ("0", 2)])
def test_explaining_ends_without_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, code: int
) -> None:
    """With the exit code of a run that would be refused, or of one that is done."""
    path = tmp_path / "options.yaml"
    path.write_text(f"topics: t\nconsumer_group: g\nfunction: f\nbatch_size: {size}\n")
    arguments = [f"--config={path}", "--kafka_bootstrap_servers=nowhere.invalid:1", "--explain"]
    assert main(arguments) == code
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if "--batch_size" in line]
    assert line.split() == ["--batch_size", size, str(path)]
    assert ("error: --batch_size=0" in err) == (code == 2)


def test_explaining_needs_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what the command line alone comes to."""
    assert main(["--explain", "--topics=t"]) == 2
    out, err = capsys.readouterr()
    assert "command line" in out and "Not carried over" not in out
    assert "--function is missing" in err


def test_the_arguments_of_a_run_take_a_file(tmp_path: Path) -> None:
    """The same entry that everything else uses."""
    path = tmp_path / "connector.json"
    path.write_text(json.dumps({"name": "n", "config": CONNECTOR}))
    config, runner = parse_arguments([f"--config={path}", "--kafka_bootstrap_servers=a:1"])
    assert config.kafka.group == "connect-orders-sink"
    assert runner == "DirectRunner"
