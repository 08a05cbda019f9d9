"""Connector: a configuration of the Confluent AWS Lambda sink -> option values. Pure.

Takes the self-managed connector's names, those of before it had `reporter.*`, and Confluent
Cloud's. What no setting says keeps the connector's own default, not ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.migrate.carried import (
    Carried,
    Row,
    Value,
    becomes,
    find_row,
    looked_up,
    refused,
    unneeded,
)
from transforms.properties import JAVA_NAMES

CLASSES = ("io.confluent.connect.aws.lambda.AwsLambdaSinkConnector", "LambdaSink")
_CLOUD = ("LambdaSink", "kafka.auth.mode", "kafka.api.key", "input.data.format")

_GROUP_PREFIX = "connect-"
_NAME = "${connector}"
_LOOKED_UP = re.compile(r"\$\{(?!connector\})([^}]*)\}")
_STARTS = {"earliest": "TRIM_HORIZON", "latest": "LATEST"}
_MAX_TIMEOUT_SECS = 900

# What a converter makes of bytes, as --key_format and --value_format call it.
_PLAIN_CONVERTERS = {
    "org.apache.kafka.connect.storage.StringConverter": "string",
    "org.apache.kafka.connect.converters.ByteArrayConverter": "base64",
}
_JSON_CONVERTER = "org.apache.kafka.connect.json.JsonConverter"
_REGISTRY_CONVERTERS = (
    "io.confluent.connect.avro.AvroConverter",
    "io.confluent.connect.protobuf.ProtobufConverter",
    "io.confluent.connect.json.JsonSchemaConverter",
)
_REGISTRY_FORMATS = ("AVRO", "PROTOBUF", "JSON_SR")
_PLAIN_FORMATS = {"STRING": "string", "BYTES": "base64"}
_ESCAPED = "EscapedJsonKeyValueConverter"

_AWS_CHAIN = "AWS credentials come from AWS's default chain, such as the environment or a role"

# What is no secret, and may be shown.
_OPEN_VALUE = re.compile(r"\d+|true|false|[a-z_]{3,20}|(SASL_)?(SSL|PLAINTEXT)|PLAIN|SCRAM-SHA-\d+")
_CLOSED_NAME = re.compile(r"password|secret|key|token|jaas|user|ssl\.")
_BEFORE_REPORTER = ("aws.lambda.response.", "aws.lambda.error.")
_PRODUCERS = {
    "reporter.producer.": ("response.", "error."),
    "aws.lambda.response.": ("response.",),
    "aws.lambda.error.": ("error.",),
}
_LOGIN = ("sasl.", "ssl.", "security.protocol")


def _timeout_secs(text: str) -> str:
    """Milliseconds of a socket as seconds of a function, never less."""
    secs = -(-_whole(text) // 1000)
    return str(secs if 0 < secs < _MAX_TIMEOUT_SECS else _MAX_TIMEOUT_SECS)


def _concurrency(text: str) -> str:
    return str(min(_whole(text), 1000))


def _whole(text: str) -> int:
    if not re.fullmatch(r"\s*\d+\s*", text):
        raise ValueError("it is not a whole number")
    return int(text)


def _start(text: str) -> str:
    if text not in _STARTS:
        raise ValueError("a partition without a committed offset has to begin somewhere")
    return _STARTS[text]


def _credentials(carried: Carried, name: str, text: str) -> None:
    """A class that finds credentials: fine if it looks where the default chain does."""
    known = (
        "Default|InstanceProfile|EnvironmentVariable|Profile|SystemPropert|WebIdentity|Container"
    )
    if re.search(rf"\.(EC2)?({known})\w*Credentials?Provider(Chain)?$", text):
        carried.note(name, _AWS_CHAIN)
    else:
        why = f"a class of yours; {_AWS_CHAIN}, with a role to assume in --aws_role_arn"
        carried.refuse(name, why, "aws_role_arn")


def _proxy(carried: Carried, name: str, text: str) -> None:
    if not text:
        return
    if any(carried.environ.get(variable) for variable in ("HTTPS_PROXY", "https_proxy")):
        carried.note(name, "the environment variable HTTPS_PROXY is in force")
    else:
        carried.refuse(name, "set the environment variable HTTPS_PROXY instead")


def _consumer(carried: Carried, name: str, text: str) -> None:
    _client(carried, name, name.removeprefix("consumer.override."), text, ("",))


def _producer(carried: Carried, name: str, text: str) -> None:
    for prefix, outputs in _PRODUCERS.items():
        if name.startswith(prefix):
            _client(carried, name, name.removeprefix(prefix), text, outputs)


def _client(
    carried: Carried, name: str, setting: str, text: str, prefixes: tuple[str, ...]
) -> None:
    """A setting of a Java client: a login is needed, the rest is tuning."""
    if not text:
        return
    here = JAVA_NAMES.get(setting, setting)
    is_open = _OPEN_VALUE.fullmatch(text) and not _CLOSED_NAME.search(setting)
    shown = text if is_open else "..."
    lines = " and ".join(f"{prefix}{here}={shown}" for prefix in prefixes)
    if setting in JAVA_NAMES:
        lines = here if prefixes == ("",) else f"{here}, each with {' and '.join(prefixes)}"
    if setting.startswith(_LOGIN) and text != "PLAINTEXT":
        carried.refuse(
            name,
            f"a login of a Kafka client; put {lines} into --kafka_config_file",
            "kafka_config_file",
        )
    elif re.search(r"serializer|class|interceptor|reporters", setting):
        carried.note(name, "a class of Java's; there is nothing here to load it")
    else:
        carried.note(
            name, f"tuning of a client; if it is still wanted, put {lines} into --kafka_config_file"
        )


def _registry_login(carried: Carried, name: str, text: str) -> None:
    setting = name.partition(".converter.")[2].removeprefix("schema.registry.")
    if setting == "basic.auth.credentials.source" and text in ("USER_INFO", "URL"):
        carried.note(name, "the login itself says it")
        return
    if setting.startswith("basic.auth."):
        lines = "basic.auth.user.info=NAME:PASSWORD"
    else:
        lines = JAVA_NAMES.get(setting, f"{setting}=...")
    carried.refuse(
        name,
        f"a login of the schema registry; put {lines}, with schema.registry. in front, into "
        f"--kafka_config_file",
        "kafka_config_file",
    )


def _topic_map(carried: Carried, name: str, text: str) -> None:
    """Cloud's topic;function pairs: one pipeline invokes one function."""
    pairs = [pair.strip().partition(";")[::2] for pair in text.split(",") if pair.strip()]
    functions = {function for _, function in pairs}
    if len(functions) == 1:
        carried.take("topics", ",".join(topic for topic, _ in pairs), name)
        carried.take("function", functions.pop(), name)
    elif functions:
        why = "a run invokes one function; run once for each with --function, --topics and a "
        carried.refuse(name, why + "--consumer_group of its own", "function")


ROWS = (
    looked_up("connector.class", "tells this file from others; any other class is refused"),
    becomes("topics", "topics"),
    becomes("topics.regex", "topics_regex"),
    looked_up(
        "name", "--consumer_group=connect-NAME, where its offsets are", option="consumer_group"
    ),
    becomes("consumer.override.group.id", "consumer_group"),
    becomes("consumer.override.bootstrap.servers", "kafka_bootstrap_servers"),
    becomes("consumer.override.auto.offset.reset", "starting_position", "earliest", _start),
    becomes("aws.lambda.function.name", "function"),
    becomes("aws.lambda.region", "aws_region"),
    becomes("aws.lambda.invocation.type", "invocation_type", "sync"),
    becomes("aws.lambda.batch.size", "batch_size", "20"),
    becomes("aws.lambda.socket.timeout", "function_timeout_secs", "50000 ms", _timeout_secs),
    becomes("tasks.max", "max_concurrency", "1", _concurrency),
    becomes("behavior.on.error", "on_error", "fail, in Cloud log"),
    looked_up(
        "reporter.result.topic.name aws.lambda.response.topic",
        "--response_topic",
        "${connector}-success, in Cloud success-${connector}",
        "response_topic",
    ),
    looked_up(
        "reporter.error.topic.name aws.lambda.error.topic",
        "--error_topic, with --on_error=log",
        "${connector}-error, in Cloud error-${connector}",
        "error_topic",
    ),
    looked_up(
        "reporter.result.topic.*.format reporter.result.topic.*.format.schemas.enable",
        "--response_format, one for key and value",
        "string",
        "response_format",
    ),
    looked_up(
        "reporter.error.topic.*.format reporter.error.topic.*.format.schemas.enable",
        "--error_format, one for key and value",
        "string",
        "error_format",
    ),
    looked_up(
        "key.converter value.converter key.converter.schemas.enable value.converter.schemas.enable "
        "record.converter.class input.key.format input.data.format",
        "--key_format and --value_format, or the schema registry",
        "as the worker has it; here `auto`",
    ),
    looked_up(
        "key.converter.schema.registry.url value.converter.schema.registry.url",
        "--schema_registry_url and --schema_validation",
        option="schema_registry_url",
    ),
    looked_up("aws.credentials.provider.sts.role.arn", "--aws_role_arn", option="aws_role_arn"),
    Row(
        ("aws.lambda.topic2function.map",),
        "--topics and --function if it names one function, else refused",
        _topic_map,
    ),
    unneeded("aws.lambda.configuration.mode", "the topics and functions say it"),
    unneeded(
        "aws.access.key.id aws.secret.access.key aws.credentials.provider.*.access.key.id "
        "aws.credentials.provider.*.secret.* authentication.method provider.integration.id",
        f"no option holds a secret; {_AWS_CHAIN}",
    ),
    Row(
        ("aws.credentials.provider.class",),
        f"not needed where it is one of AWS's own: {_AWS_CHAIN}; else refused without "
        f"--aws_role_arn",
        _credentials,
    ),
    unneeded("aws.credentials.provider.sts.role.session.name", "a name in AWS's logs"),
    refused(
        "aws.credentials.provider.*",
        f"{_AWS_CHAIN}, with a role to assume in --aws_role_arn, which takes no external id",
        answers="aws_role_arn",
    ),
    Row(
        ("aws.lambda.proxy.*",),
        "the environment variable `HTTPS_PROXY`; refused where it is not set",
        _proxy,
    ),
    Row(
        ("consumer.override.*",),
        "lines for --kafka_config_file; a login (`sasl.`, `ssl.`, `security.protocol`) is "
        "refused without it",
        _consumer,
    ),
    Row(
        ("reporter.producer.*", "aws.lambda.response.*", "aws.lambda.error.*"),
        "the same, with `response.` and `error.` in front",
        _producer,
    ),
    looked_up(
        "reporter.bootstrap.servers aws.lambda.response.bootstrap.servers "
        "aws.lambda.error.bootstrap.servers",
        "responses and error records go to --kafka_bootstrap_servers, unless "
        "--kafka_config_file says `response.bootstrap.servers` and `error.bootstrap.servers`",
    ),
    refused(
        "kafka.api.key kafka.api.secret kafka.service.account.id",
        "a login of Confluent Cloud; put security.protocol=SASL_SSL, sasl.mechanism=PLAIN, "
        "sasl.username=... and sasl.password=${env:NAME} into --kafka_config_file",
        answers="kafka_config_file",
    ),
    Row(
        (
            "*.converter.basic.auth.*",
            "*.converter.bearer.auth.*",
            "*.converter.schema.registry.*",
            "*.converter.sasl.*",
        ),
        "`schema.registry.*` in --kafka_config_file; refused without it",
        _registry_login,
    ),
    refused(
        "transforms transforms.*",
        "records reach the function as they are; there are no transforms here",
    ),
    unneeded("predicates predicates.*", "they are for transforms"),
    refused("*.converter.decimal.format", "decimals are written one way here", ("BASE64",)),
    unneeded(
        "*.converter.*.strategy *.converter.schemas.cache.size *.converter.auto.register.schemas "
        "*.converter.use.latest.version *.converter.connect.meta.data "
        "*.converter.enhanced.avro.schema.support",
        "it is about writing schemas, or about speed",
    ),
    refused("*.converter.*", "it may change how records become JSON"),
    refused("schema.context.name", "schemas are looked up in the default context", ("default",)),
    unneeded("header.converter header.converter.*", "headers go as they are: --include_headers"),
    unneeded(
        "errors.*",
        "a record that cannot be decoded goes the way of --on_error",
    ),
    unneeded("result.handler.class", "replies are checked entry by entry, as its default does"),
    unneeded(
        "reporter.*.topic.replication.factor reporter.*.topic.partitions reporter.admin.*",
        "topics are not made here; what is missing is refused before anything is read",
    ),
    unneeded("reporter.*.format.schemas.cache.size", "it is about speed"),
    unneeded("confluent.license confluent.license.* confluent.topic.*", "there is no licence here"),
    unneeded("aws.lambda.user.agent", "a name in AWS's logs"),
    unneeded(
        "kafka.auth.mode kafka.endpoint kafka.region max.poll.* "
        "connector.egress.whitelist auto.restart.* config.action.reload connector.client.* "
        "connector.plugin.version tasks.*",
        "how Connect runs a connector",
    ),
)


def is_connector(content: Mapping[str, object]) -> bool:
    """Whether a file's content is the configuration of a connector, of whatever class."""
    return (
        isinstance(content.get("config"), Mapping)
        or "connector.class" in content
        or any(name.startswith("aws.lambda.") for name in content)
    )


def carry(carried: Carried, content: Mapping[str, object]) -> None:
    """Put a connector's configuration into `carried`.

    Args:
        carried: Empty, with the command line's options.
        content: ``{"name", "config"}`` as Connect's REST interface has it, or the ``config``
            alone; all scalars as text.
    """
    inner = content.get("config")
    config: dict[str, str] = {}
    for name, value in (inner if isinstance(inner, Mapping) else content).items():
        if isinstance(value, str):
            config[name] = value
        else:
            carried.refuse(name, "a connector's settings are texts")
    if isinstance(inner, Mapping) and isinstance(name := content.get("name"), str):
        config.setdefault("name", name)

    connector = config.get("connector.class", CLASSES[0])
    if connector not in CLASSES and not connector.endswith(".AwsLambdaSinkConnector"):
        carried.refuse("connector.class", f"{connector} is not the Confluent AWS Lambda sink")
        return
    cloud = any(name in config or name == connector for name in _CLOUD)
    _look_up_values(carried, config)
    for name, text in config.items():
        row = find_row(ROWS, name)
        if row is None:
            carried.note(name, "not a setting of this connector")
        elif row.take:
            row.take(carried, name, text)
    _defaults(carried, cloud)
    _group(carried, config, cloud)
    _topics(carried, config, cloud)
    _formats(carried, config)
    _converters(carried, config, cloud)
    if role := config.get("aws.credentials.provider.sts.role.arn"):
        carried.take("aws_role_arn", role, "aws.credentials.provider.sts.role.arn")
    _servers(carried, config)


def _look_up_values(carried: Carried, config: dict[str, str]) -> None:
    """Replace ${env:NAME}; what another provider of Connect's would look up stays unknown."""
    for name, text in list(config.items()):
        if not text or name.startswith("transforms"):
            continue
        text = re.sub(
            r"\$\{env:([^}]*)\}", lambda found: carried.environ.get(found[1], found[0]), text
        )
        config[name] = text
        row = find_row(ROWS, name)
        if _LOOKED_UP.search(text) and row and row.option:
            del config[name]
            why = f"Connect looks its value up elsewhere; give --{row.option}"
            carried.refuse(name, why, row.option)


def _defaults(carried: Carried, cloud: bool) -> None:
    carried.assume("envelope", "confluent")
    carried.assume("error_record", "confluent")
    carried.assume("starting_position", "TRIM_HORIZON")
    carried.assume("invocation_type", "sync")
    carried.assume("batch_size", "20")
    # What a poll returned is sent; nothing waits for a batch to fill.
    carried.assume("batch_window_secs", "0")
    carried.assume("function_timeout_secs", "50")
    carried.assume("max_concurrency", "1")
    carried.assume("max_retries", "0")
    carried.assume("on_error", "log" if cloud else "fail")


def _group(carried: Carried, config: Mapping[str, str], cloud: bool) -> None:
    if "consumer_group" in carried.values:
        return
    # In Cloud the group has the connector's id, which is not in its configuration.
    if (name := config.get("name")) and not cloud:
        carried.take("consumer_group", _GROUP_PREFIX + name, "name")
        return
    what = "id, lcc-..." if cloud else "name"
    carried.refuse(
        "name",
        f"the file does not say the connector's {what}; give --consumer_group=connect-"
        f"{'lcc-...' if cloud else 'NAME'} to go on where it stopped",
        "consumer_group",
    )


def _topics(carried: Carried, config: Mapping[str, str], cloud: bool) -> None:
    """The topics of responses and errors, with their names filled in."""
    group = carried.in_force("consumer_group") or ""
    if config.get("name") and not cloud:
        connector = config["name"]
    else:
        connector = group.removeprefix(_GROUP_PREFIX) if group.startswith(_GROUP_PREFIX) else ""
    # The connector of before the reporters had no default for these topics.
    before_reporter = any(name.startswith(_BEFORE_REPORTER) for name in config) and not any(
        name.startswith("reporter.") for name in config
    )
    sync = carried.in_force("invocation_type") != "async"
    logs = carried.in_force("on_error") == "log"
    for option, kind, old, used, why in (
        ("response_topic", "result", "response", sync, "async invocations have no reply"),
        ("error_topic", "error", "error", logs, "nothing is written there without --on_error=log"),
    ):
        new, old = f"reporter.{kind}.topic.name", f"aws.lambda.{old}.topic"
        if new in config and old in config and config[new] != config[old]:
            carried.refuse(old, f"{new} says something else; keep one of them", option)
            continue
        name = old if old in config and new not in config else new
        word = "success" if kind == "result" else "error"
        default = f"{word}-{_NAME}" if cloud else f"{_NAME}-{word}"
        topic = config.get(name, "" if before_reporter else default)
        if not topic:
            continue
        if not used or (name not in config and not sync):
            if name in config:
                carried.note(name, why)
            continue
        if _NAME in topic and not connector:
            # Without a group that is refused already, and the group will say the name.
            if group:
                carried.refuse(name, f"{topic} needs the connector's name; give --{option}", option)
            continue
        topic = topic.replace(_NAME, connector)
        if name in config:
            carried.take(option, topic, name)
        else:
            carried.assume(option, topic)


def _formats(carried: Carried, config: Mapping[str, str]) -> None:
    """Two formats of the connector are one here."""
    for option, kind in (("response_format", "result"), ("error_format", "error")):
        prefix = f"reporter.{kind}.topic."
        formats = {}
        for part in ("key", "value"):
            format = config.get(f"{prefix}{part}.format", "string")
            enabled = config.get(f"{prefix}{part}.format.schemas.enable", "false").lower()
            formats[part] = "json_schema" if format == "json" and enabled == "true" else format
        key, value = formats["key"], formats["value"]
        # A response's value is a text, and the same in both.
        if kind == "result" and {key, value} == {"json", "string"}:
            value = key
        if key != value:
            carried.refuse(
                f"{prefix}key.format",
                f"the key is {key} and the value {value}; here one format is for both",
                option,
            )
            continue
        if any(f"{prefix}{part}.format" in config for part in ("key", "value")):
            carried.take(option, key, f"{prefix}*.format")
        else:
            carried.assume(option, key)


def _converters(carried: Carried, config: Mapping[str, str], cloud: bool) -> None:
    """What makes JSON of keys and values."""
    if carried.in_force("envelope") != "confluent":
        return
    escaped = config.get("record.converter.class", "").endswith(_ESCAPED)
    given = config.get("record.converter.class", "JsonKeyValueConverter")
    if not given.endswith("JsonKeyValueConverter"):
        carried.refuse(
            "record.converter.class",
            "a class of yours makes the payload; the function would get another one",
        )
        return
    schemas = []
    for part in ("key", "value"):
        option, name = f"{part}_format", f"{part}.converter"
        cloud_name = "input.key.format" if part == "key" else "input.data.format"
        if cloud:
            format = config.get(cloud_name, "BYTES" if part == "key" else "JSON")
            name = cloud_name
            converter = "" if format in _REGISTRY_FORMATS else format
        else:
            converter = config.get(name, "")
            format = converter
            if not converter:
                carried.note(
                    name,
                    f"not in the file, so the worker's was in force; here --{option}=auto sends "
                    f"JSON as JSON and other text as a string",
                )
                continue
        if format in _REGISTRY_CONVERTERS or (cloud and format in _REGISTRY_FORMATS):
            schemas.append((part.upper(), name))
        elif converter in _PLAIN_CONVERTERS or converter in _PLAIN_FORMATS:
            plain = _PLAIN_CONVERTERS.get(converter) or _PLAIN_FORMATS[converter]
            _format(carried, option, plain, name, name in config)
        elif converter == _JSON_CONVERTER and (
            config.get(f"{name}.schemas.enable", "true").lower() == "true"
        ):
            carried.refuse(
                f"{name}.schemas.enable",
                "each record is an envelope of schema and payload, which is not taken apart here",
                option,
            )
        elif converter in (_JSON_CONVERTER, "JSON"):
            # What Connect cannot parse is an error there too.
            _format(carried, option, "string" if escaped else "json", name, name in config)
        else:
            carried.refuse(name, f"{converter} is not known here; choose --{option}", option)
    if schemas:
        _registry(carried, config, schemas)


def _format(carried: Carried, option: str, format: str, name: str, said: bool) -> None:
    if said:
        carried.take(option, format, name)
    else:
        carried.assume(option, format)


def _registry(carried: Carried, config: Mapping[str, str], schemas: list[tuple[str, str]]) -> None:
    """Keys or values with schemas, as (``KEY`` or ``VALUE``, the setting that says so)."""
    carried.take("schema_validation", ",".join(part for part, _ in schemas), schemas[-1][1])
    carried.assume("event_record_format", "JSON")
    urls = {
        config[f"{part.lower()}.converter.schema.registry.url"]: part.lower()
        for part, _ in schemas
        if f"{part.lower()}.converter.schema.registry.url" in config
    }
    if len(urls) > 1:
        carried.refuse(
            "value.converter.schema.registry.url",
            "keys and values have different registries; here there is one",
            "schema_registry_url",
        )
    elif urls:
        ((url, part),) = urls.items()
        carried.take("schema_registry_url", url, f"{part}.converter.schema.registry.url")
    else:
        carried.refuse(
            schemas[-1][1],
            "needs the schema registry's address; give --schema_registry_url",
            "schema_registry_url",
        )


def _servers(carried: Carried, config: Mapping[str, str]) -> None:
    """The reporters' cluster may be another one; what is read from is not in the file."""
    servers: Value | None = carried.values.get("kafka_bootstrap_servers")
    here = carried.given.get("kafka_bootstrap_servers") or (servers.text if servers else "")
    for name, prefixes in (
        ("reporter.bootstrap.servers", "response. and error."),
        ("aws.lambda.response.bootstrap.servers", "response."),
        ("aws.lambda.error.bootstrap.servers", "error."),
    ):
        if config.get(name) and config[name] != here:
            carried.note(
                name,
                f"responses and error records go to --kafka_bootstrap_servers; if {config[name]} "
                f"is another cluster, set bootstrap.servers with {prefixes} in front in "
                f"--kafka_config_file",
            )
