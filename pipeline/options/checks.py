"""Checks: what text an option takes, and what does not go together. Only a jar is looked for.

Each check adds what is wrong to a list, one line each, so that one run shows all of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from pipeline.options.checks_login import any_iam, check_login
from pipeline.options.checks_stream import check_stream
from pipeline.options.declare import ACCESS, EXACTLY_ONCE, NO_ATTRIBUTE, OF_TOPICS, OPTIONS, Option
from transforms import envelope, java_login
from transforms.aws.function import MAX_ASYNC_BYTES
from transforms.invoke import reply
from transforms.kafka.offsets import AT_TIMESTAMP
from transforms.properties import PREFIXES
from transforms.write import destination, formats

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_TOPIC_OF = "kafka://"
_NUMBERS: dict[str, Callable[[str], int | float]] = {"int": int, "float": float}


def parse_value(option: Option, text: str | None, problems: list[str]) -> Any:
    """The option's value, or None with a problem noted."""
    if text is None:
        return option.default
    if option.kind == "text":
        if not text:
            problems.append(f"--{option.name} is empty; leave it out, or give it a value")
        return text
    if option.kind == "list":
        parts = tuple(part.strip() for part in text.split(",") if part.strip())
        if option.name in ACCESS:
            # What is wrong with them is said elsewhere, without what may be a secret.
            return parts
        for part in sorted({part for part in parts if parts.count(part) > 1}):
            problems.append(f"--{option.name}={text} names {part} twice")
        if not option.choices or (parts and set(parts) <= set(option.choices)):
            return parts
    elif option.kind == "choice":
        if text in option.choices:
            return text
    elif option.kind == "flag":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            # Python would take 1_0, and digits of other scripts.
            number = _NUMBERS[option.kind](text.strip() if _NUMBER.fullmatch(text) else "")
        except ValueError:
            problems.append(
                f"--{option.name}={text} is not {'a whole' if option.kind == 'int' else 'a'} "
                f"number; give {option.range}"
            )
            return None
        low, high = option.low, option.high
        if option.special and number == option.special[0]:
            return number
        if (low is None or number >= low) and (high is None or number <= high):
            return number
    problems.append(f"--{option.name}={text} is not allowed; give {option.range}")
    return None


def check_together(
    values: dict[str, Any],
    given: dict[str, str | None],
    settings: dict[str, str],
    now: datetime,
    problems: list[str],
) -> None:
    """Note what is missing, has not its form, or does not go together.

    Args:
        values: By option, its value, None where the text was none.
        given: By option, the text given.
        settings: What --kafka_config_file sets.
        now: The time.
        problems: Where to note it.
    """
    stream = given.get("stream") is not None
    for name, option in OPTIONS.items():
        if option.required and given.get(name) is None and not (stream and name in OF_TOPICS):
            problems.append(f"--{name} is missing; for example --{name}={option.example}")
    servers = values["kafka_bootstrap_servers"]
    if servers and not OPTIONS["kafka_bootstrap_servers"].fits(servers):
        problems.append(
            f"--kafka_bootstrap_servers={servers} is not a comma separated list of host:port"
        )
    topics, regex = values["topics"], values["topics_regex"]
    if sum(map(bool, (topics, regex, stream))) != 1:
        count = "none" if not (topics or regex or stream) else "several"
        problems.append(f"give exactly one of --topics, --topics_regex and --stream, not {count}")
    check_stream(values, given, problems)
    pattern = None
    if regex:
        try:
            pattern = re.compile(regex)
        except re.error as error:
            problems.append(f"--topics_regex={regex} is not a regular expression: {error}")
    for name in ("response_topic", "error_topic"):
        topic = values[name]
        if not topic:
            continue
        if not OPTIONS[name].fits(topic):
            problems.append(f"--{name}={topic} is not a topic name (letters, digits, . _ -)")
        is_read = topic in (topics or ()) or (pattern and pattern.fullmatch(topic))
        # In another cluster it is another topic.
        if is_read and _cluster(name, values, settings) == values["kafka_bootstrap_servers"]:
            problems.append(
                f"--{name}={topic} is also read from (--topics{'_regex' if regex else ''}): the "
                f"pipeline would feed on its own output; write to another topic"
            )
    for topic in topics or ():
        if not OPTIONS["topics"].fits(topic):
            problems.append(
                f"--topics: {topic} is not a topic name (letters, digits, . _ -); for a pattern "
                f"use --topics_regex"
            )
    function = values["function"]
    if function and not OPTIONS["function"].fits(function):
        problems.append(
            f"--function={function} is not a function name, name:version, name:alias or ARN"
        )
    _check_aws(values, given, problems)
    _check_payload(values, settings, problems)
    check_login(values, settings, os.environ, problems)
    _check_schemas(values, given, problems)
    _check_reply(values, given, problems)
    if values["invocation_type"] == "async" and (values["batch_bytes"] or 0) > MAX_ASYNC_BYTES:
        problems.append(
            f"--batch_bytes={values['batch_bytes']} is above the limit of async invocations, "
            f"{MAX_ASYNC_BYTES}"
        )
    if given.get("filter_unparsable") and given.get("filter_criteria") is None:
        problems.append("--filter_unparsable goes with --filter_criteria only")
    if values["trace"] and not has_otel():
        problems.append(
            f"--trace={values['trace']} needs OpenTelemetry: pip install 'beam-lambda-sink[otel]'"
        )
    low, high = values["min_concurrency"], values["max_concurrency"]
    if low and high and low > high:
        problems.append(f"--min_concurrency={low} is above --max_concurrency={high}")
    workers, most = values["workers"], values["max_workers"]
    for name in ("workers", "max_workers"):
        if values[name] and high and values[name] > high:
            problems.append(
                f"--{name}={values[name]} is above --max_concurrency={high}: each of them needs "
                f"one of the invocations"
            )
    if workers and most and workers > most:
        problems.append(f"--workers={workers} is above --max_workers={most}")
    _check_start(values, now, problems)
    if values["delivery"] == EXACTLY_ONCE:
        _check_exactly_once(values, settings, problems)
    _check_watching(values, given, problems)


def has_otel() -> bool:
    """Whether what exports traces is installed."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def _cluster(topic: str, values: dict[str, Any], settings: dict[str, str]) -> str:
    """The brokers of the topic that an option names."""
    prefix = topic.removesuffix("topic").replace("_", ".")
    return str(settings.get(f"{prefix}bootstrap.servers", values["kafka_bootstrap_servers"]))


def _check_exactly_once(
    values: dict[str, Any], settings: dict[str, str], problems: list[str]
) -> None:
    what = f"--delivery={EXACTLY_ONCE}"
    if not (values["response_topic"] or values["error_topic"]):
        problems.append(
            f"{what} needs --response_topic or --error_topic: it is about what is written to them"
        )
    servers = values["kafka_bootstrap_servers"]
    for name in ("response_topic", "error_topic"):
        if values[name] and _cluster(name, values, settings) != servers:
            problems.append(
                f"{what} needs --{name}={values[name]} in the cluster that is read: a transaction "
                f"is of one; take {name.split('_')[0]}.bootstrap.servers out of --kafka_config_file"
            )
    for name in sorted(settings):
        other = "error." + name.removeprefix("response.")
        if name.startswith("response.") and settings.get(other, settings[name]) != settings[name]:
            problems.append(
                f"{what} has one producer for both topics: --kafka_config_file sets {name} and "
                f"{other} to different values; give one"
            )
    if settings.get("isolation.level") == "read_uncommitted":
        problems.append(
            f"{what} needs isolation.level=read_committed, the default: it is how a member waits "
            f"for the transaction of another; take it out of --kafka_config_file"
        )


def warnings_of(values: dict[str, Any], settings: dict[str, str]) -> Iterator[str]:
    """What can be meant, but hardly is."""
    responses, errors = values["response_topic"], values["error_topic"]
    if errors and values["on_error"] != "log":
        yield (
            f"--error_topic={errors} stays empty with --on_error={values['on_error']}; error "
            f"records are written with --on_error=log"
        )
    if responses and responses == errors:
        clusters = (_cluster(name, values, settings) for name in ("response_topic", "error_topic"))
        if len({*clusters}) == 1:
            yield (
                f"--response_topic={responses} is --error_topic, too: a redrive would go over "
                f"every response; give each a topic of its own"
            )
    region, arn = values["aws_region"], (values["function"] or "").split(":")
    if region and arn[0] == "arn" and region != arn[3]:
        yield f"--aws_region={region} is not the region of --function, {arn[3]}; leave it out"


def _check_aws(values: dict[str, Any], given: dict[str, str | None], problems: list[str]) -> None:
    endpoint, role = values["lambda_endpoint_url"], values["aws_role_arn"]
    if endpoint and "@" in endpoint:
        problems.append("--lambda_endpoint_url has a login in it, for all to read; leave it out")
    elif endpoint and not OPTIONS["lambda_endpoint_url"].fits(endpoint):
        problems.append(f"--lambda_endpoint_url={endpoint} is not an http:// or https:// address")
    if role and not OPTIONS["aws_role_arn"].fits(role):
        problems.append(f"--aws_role_arn={role} is not the ARN of a role")
    roles = (role, values["kafka_role_arn"], values["stream_role_arn"])
    if values["aws_web_identity"] and not any(roles):
        problems.append(
            f"--aws_web_identity={values['aws_web_identity']} needs --aws_role_arn, the role to "
            f"assume with it, or --kafka_role_arn or --stream_role_arn"
        )
    if given.get("aws_web_identity_audience") is not None and not values["aws_web_identity"]:
        problems.append("--aws_web_identity_audience goes with --aws_web_identity only")


def _check_reply(values: dict[str, Any], given: dict[str, str | None], problems: list[str]) -> None:
    mode, topic = values["reply"], values["response_topic"]
    if values["invocation_type"] == "async":
        if mode not in (None, reply.NONE):
            problems.append(
                f"--reply={mode} needs --invocation_type=sync: async invocations have no reply"
            )
        elif topic:
            problems.append(
                "--response_topic needs --invocation_type=sync: async invocations have no reply"
            )
    elif mode == reply.ANY and not topic:
        problems.append("--reply=any needs --response_topic: it is where replies are kept")
    elif mode in (reply.BATCH_ITEM_FAILURES, reply.NONE) and topic:
        problems.append(f"--response_topic stays empty with --reply={mode}; leave one of them out")
    asked = given.get("client_context") is not None and values["client_context"]
    if asked and values["invocation_type"] == "async":
        problems.append(
            "--client_context needs --invocation_type=sync: async invocations carry none"
        )
    if given.get("partial_failure") is not None and mode != reply.BATCH_ITEM_FAILURES:
        problems.append("--partial_failure goes with --reply=batch_item_failures only")


def _check_payload(values: dict[str, Any], settings: dict[str, str], problems: list[str]) -> None:
    arn = values["event_source_arn"]
    if (values["envelope"] == envelope.KINESIS_EVENT) > bool(values["stream"]):
        problems.append(f"--envelope={envelope.KINESIS_EVENT} goes with --stream only")
    if arn and not OPTIONS["event_source_arn"].fits(arn):
        problems.append(f"--event_source_arn={arn} is not the ARN of an MSK cluster")
    aws_errors = values["error_record"] == destination.AWS
    if aws_errors and not values["error_topic"]:
        problems.append("--error_record=aws needs --error_topic")
    if aws_errors and values["error_format"] != OPTIONS["error_format"].default:
        problems.append(
            f"--error_format={values['error_format']} goes with --error_record=confluent only: "
            f"AWS has JSON"
        )
    if values["envelope"] == envelope.CONFLUENT:
        if values["event_record_format"] != OPTIONS["event_record_format"].default:
            problems.append("--event_record_format goes with --envelope=kafka_event or pipes only")
        if arn and not aws_errors and not any_iam(settings):
            problems.append(
                "--event_source_arn goes with --envelope=kafka_event or pipes, with "
                "--error_record=aws, or with a login with IAM, only"
            )
        return
    for name in ("key_format", "value_format"):
        if values[name] not in (OPTIONS[name].default, "base64"):
            problems.append(
                f"--{name}={values[name]} goes with --envelope=confluent only: "
                f"{values['envelope']} has base64"
            )


def check_destination(values: dict[str, Any], problems: list[str]) -> None:
    """Note what does not go with a destination; one that is a topic becomes the error topic."""
    target = values["on_failure_destination"]
    if not target:
        return
    what = f"--on_failure_destination={target}"
    if not OPTIONS["on_failure_destination"].fits(target):
        problems.append(
            f"{what} is no ARN of a queue, a topic of SNS or a bucket, nor kafka://TOPIC"
        )
    if values["error_topic"]:
        problems.append(f"{what} takes the place of --error_topic; leave one of them out")
    elif values["on_error"] != "log":
        problems.append(f"{what} needs --on_error=log")
    elif values["delivery"] == EXACTLY_ONCE and not target.startswith(_TOPIC_OF):
        problems.append(f"{what} does not go with --delivery={EXACTLY_ONCE}: it is not in Kafka")
    elif target.startswith(_TOPIC_OF):
        values["error_topic"] = target.removeprefix(_TOPIC_OF)
        values["error_record"] = destination.AWS
        values["on_failure_destination"] = None


def _check_schemas(
    values: dict[str, Any], given: dict[str, str | None], problems: list[str]
) -> None:
    url = values["schema_registry_url"]
    if url is None:
        problems += [
            f"--{name} needs --schema_registry_url"
            for name in ("schema_validation", "event_record_format", "schema_registry_access")
            if given.get(name) is not None
        ]
        problems += [
            f"--{name}=avro needs --schema_registry_url, which the schemas are registered with"
            for name in ("response_format", "error_format")
            if values[name] == formats.AVRO
        ]
        return
    if "@" in url:
        problems.append(
            "--schema_registry_url has a login in it; put it into --kafka_config_file, as "
            "schema.registry.basic.auth.user.info=NAME:PASSWORD"
        )
    elif url and not OPTIONS["schema_registry_url"].fits(url):
        problems.append(f"--schema_registry_url={url} is not an http:// or https:// address")
    attributes = values["schema_validation"] or ()
    if NO_ATTRIBUTE in attributes and len({*attributes}) > 1:
        problems.append(f"--schema_validation={','.join(attributes)}: {NO_ATTRIBUTE} stands alone")
    for attribute in set(attributes) - {NO_ATTRIBUTE}:
        name = f"{attribute.lower()}_format"
        if values[name] != OPTIONS[name].default:
            problems.append(
                f"--{name}={values[name]} has no effect: --schema_validation has {attribute}, "
                f"which is decoded by its schema"
            )


def _check_start(values: dict[str, Any], now: datetime, problems: list[str]) -> None:
    text = values["starting_timestamp"]
    wanted = values["starting_position"] == AT_TIMESTAMP
    if not text:
        if wanted:
            problems.append("--starting_position=AT_TIMESTAMP needs --starting_timestamp")
        return
    if not wanted:
        problems.append("--starting_timestamp goes with --starting_position=AT_TIMESTAMP only")
    moment = parse_timestamp(text)
    if moment is None:
        problems.append(
            f"--starting_timestamp={text} is not an ISO 8601 time, such as 2026-11-01T00:00:00Z"
        )
    elif moment > now:
        problems.append(f"--starting_timestamp={text} is in the future")


def parse_timestamp(text: str) -> datetime | None:
    """An ISO 8601 time, UTC if it names no zone; None if it is none."""
    # Python 3.10 knows no Z, and fractions of three or six digits only.
    text = re.sub(r"[zZ]$", "+00:00", text)
    text = re.sub(r"[.,](\d{1,6})\d*", lambda fraction: f".{fraction[1]:0<6}", text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _check_watching(
    values: dict[str, Any], given: dict[str, str | None], problems: list[str]
) -> None:
    http = values["http"]
    if http and parse_address(http) is None:
        problems.append(
            f"--http={http} is not a HOST:PORT or a PORT of 0 to 65535, such as 127.0.0.1:9464"
        )
    problems += [
        f"--{name} goes with --http only"
        for name in ("http_token_file", "metrics_partitions")
        if given.get(name) is not None and not http
    ]
    if given.get("page_show") is not None and not (http or values["report"]):
        problems.append("--page_show goes with --http or --report only")


def parse_address(text: str) -> tuple[str, int] | None:
    """Host and port; this machine alone where no host is named. None if it is no address."""
    if not OPTIONS["http"].fits(text):
        return None
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    return (host, int(port)) if int(port) <= 65535 else None


def check_beam_reader(
    values: dict[str, Any], settings: dict[str, str], problems: list[str]
) -> None:
    service = values["expansion_service"]
    if service and service.endswith(".jar") and not os.path.isfile(service):
        problems.append(f"--expansion_service={service} is not there; give a jar, or host:port")
    if values["until"] == "caught_up":
        problems.append("--until=caught_up needs --kafka_reader=native: Beam's reader has no end")
    common = sorted(name for name in settings if not name.startswith(PREFIXES))
    if any_iam(settings):
        problems.append(
            f"--kafka_reader=beam cannot log in with {java_login.MECHANISM}: it would need "
            f"Amazon's aws-msk-iam-auth on the class path of the expansion service and of each "
            f"worker; use --kafka_reader=native"
        )
    elif values["kafka_access"]:
        problems.append(
            "--kafka_access goes with --kafka_reader=native only: Beam's reader would have the "
            "secrets in the job, for all to read"
        )
    elif common:
        problems.append(
            f"--kafka_config_file sets {', '.join(common)}, which --kafka_reader=beam would make "
            f"part of the job, for all to read; use --kafka_reader=native"
        )
