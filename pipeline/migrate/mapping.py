"""Mapping: an event source mapping of Lambda for Kafka or for Kinesis -> option values. Pure.

Takes the output of ``aws lambda get-event-source-mapping``, and that of
``list-event-source-mappings`` if it has one mapping. What is not in it keeps the mapping's own
default, not ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from pipeline.migrate.carried import (
    Carried,
    Row,
    becomes,
    find_row,
    looked_up,
    refused,
    single,
    unneeded,
)
from transforms.access import (
    KINDS,
    NETWORK,
    REGISTRY_KINDS,
    SECRET_ARN,
    WITH_SECRET,
    AccessError,
    parse_access,
)

_MARKS = ("EventSourceMappings", "FunctionArn", "EventSourceArn", "SelfManagedEventSource", "UUID")
_LIST = "EventSourceMappings"

# With a destination AWS gives up after so many, even where no limit is set.
_RETRIES_WITH_DESTINATION = "10"
_CALLS_PER_POLLER = 5
_MAX_CONCURRENCY = 1000
_MAX_WORKERS = 64

_DESTINATIONS = ("sqs", "sns", "s3")


def _joined(value: Any) -> str:
    """A list of texts as an option has it."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("it is not a list of texts")
    return ",".join(value)


def _attributes(value: Any) -> str:
    return _joined([config.get("Attribute") for config in _mappings(value)])


def _timestamp(value: Any) -> str:
    """As ISO 8601; some versions of the command line interface print seconds since the epoch."""
    text = single(value)
    if re.fullmatch(r"\d{1,11}(\.\d+)?", text):
        return datetime.fromtimestamp(float(text), timezone.utc).isoformat()
    return text


def _calls(value: Any) -> str:
    """Invocations at once of so many pollers."""
    if not single(value).isdecimal():
        raise ValueError("it is not a whole number")
    return str(min(_CALLS_PER_POLLER * int(value), _MAX_CONCURRENCY))


def _workers(value: Any) -> str:
    """Processes for so many pollers, as many as there can be."""
    if not single(value).isdecimal():
        raise ValueError("it is not a whole number")
    return str(min(int(value), _MAX_WORKERS))


def _pollers(carried: Carried, name: str, value: Any) -> None:
    try:
        carried.take("max_workers", _workers(value), name)
        carried.take("max_concurrency", _calls(value), name)
    except ValueError as error:
        carried.refuse(name, str(error), "max_concurrency")


def _event_source(carried: Carried, name: str, value: Any) -> None:
    service = _service(arn := str(value))
    if service == "kafka":
        carried.take("event_source_arn", arn, name)
    elif service == "kinesis":
        # With a consumer behind it the mapping has the stream pushed to it, and then takes what
        # the Kinesis Producer Library has put into one record apart.
        stream, _, consumer = arn.partition("/consumer/")
        carried.take("stream", stream, name)
        if consumer:
            carried.take("consumer_arn", arn, name)
            carried.take("deaggregate", "true", name)
    else:
        what = {"dynamodb": "a DynamoDB stream"}.get(service, service or "something else")
        carried.refuse(name, f"this is a mapping of {what}, and not of Kafka or Kinesis")


def _registry(value: Any) -> str:
    if (uri := single(value)).startswith("arn:"):
        raise ValueError(
            "schemas are read from a Confluent registry, this is one of Glue's; give "
            "--schema_registry_url"
        )
    return uri


def _destination(carried: Carried, name: str, value: Any) -> None:
    target = str(value)
    if target.startswith("kafka://"):
        carried.assume("error_record", "aws")
        carried.take("error_topic", target.removeprefix("kafka://"), name)
    elif _service(target) in _DESTINATIONS:
        carried.take("on_failure_destination", target, name)
    else:
        why = (
            "it is neither a Kafka topic nor a queue, an SNS topic or a bucket; give --error_topic"
        )
        carried.refuse(name, why, "error_topic")


def _filters(carried: Carried, name: str, value: Any) -> None:
    if value:
        carried.take("filter_criteria", carried.file, name)


def _access(carried: Carried, name: str, value: Any) -> None:
    _logins(carried, name, value, "kafka_access", KINDS)


def _registry_access(carried: Carried, name: str, value: Any) -> None:
    _logins(carried, name, value, "schema_registry_access", REGISTRY_KINDS)


def _logins(carried: Carried, name: str, value: Any, option: str, kinds: tuple[str, ...]) -> None:
    """Logins, as an option has them; what they name is read where it is needed."""
    texts = []
    for access in _mappings(value):
        kind, uri = str(access.get("Type")), str(access.get("URI", ""))
        if kind in NETWORK:
            carried.note(f"{name}.{kind}", "the pipeline runs where the brokers can be reached")
        elif carried.given.get("kafka_config_file") and not carried.given.get(option):
            # It may have another login, and nobody can be logged in twice.
            carried.note(f"{name}.{kind}", "--kafka_config_file is given instead")
        elif why := _unfit(kind, uri, kinds):
            why = f"{why}; put the login into --kafka_config_file"
            carried.refuse(f"{name}.{kind}", why, option, "kafka_config_file")
        else:
            texts.append(f"{kind}={uri}")
    if not texts or carried.given.get(option):
        return
    try:
        parse_access(texts, kinds)
    except AccessError as error:
        carried.refuse(name, str(error), option, "kafka_config_file")
        return
    carried.take(option, ",".join(texts), name)


def _unfit(kind: str, uri: str, kinds: tuple[str, ...]) -> str:
    """Why a way in cannot be carried over; never says the URI, which may be the secret itself."""
    if kind not in kinds:
        return "it is not known here"
    if "," in uri:
        return "its URI has a comma"
    secret = kind in WITH_SECRET and not SECRET_ARN.fullmatch(uri)
    return "its URI is no ARN of a secret in AWS Secrets Manager" if secret else ""


def _responses(carried: Carried, name: str, value: Any) -> None:
    for kind in value if isinstance(value, list) else [value]:
        if kind == "ReportBatchItemFailures":
            carried.take("reply", "batch_item_failures", name)
            # Of a Kafka batch just the records that are named come again.
            carried.assume("partial_failure", "checkpoint" if _is_stream(carried) else "named")
        else:
            carried.refuse(name, f"{kind} is not known here; choose --reply", "reply")


def _state(carried: Carried, name: str, value: Any) -> None:
    if value in ("Disabled", "Disabling", "false"):
        carried.note(name, "the mapping is disabled; the pipeline runs all the same")
    else:
        both = "invoke the function" if _is_stream(carried) else "go on in one consumer group"
        carried.note(name, f"disable the mapping before the pipeline runs: both would {both}")


_SELF_MANAGED, _MSK = "SelfManagedKafkaEventSourceConfig", "AmazonManagedKafkaEventSourceConfig"

ROWS = (
    becomes("Topics", "topics", convert=_joined),
    becomes(f"{_SELF_MANAGED}.ConsumerGroupId {_MSK}.ConsumerGroupId", "consumer_group"),
    becomes(
        "SelfManagedEventSource.Endpoints.KAFKA_BOOTSTRAP_SERVERS",
        "kafka_bootstrap_servers",
        convert=_joined,
    ),
    Row(
        ("EventSourceArn",),
        "of MSK --event_source_arn, of Kinesis --stream, with a consumer --consumer_arn and "
        "--deaggregate too; any other is refused",
        _event_source,
    ),
    becomes("FunctionArn", "function"),
    becomes("StartingPosition", "starting_position"),
    becomes("StartingPositionTimestamp", "starting_timestamp", convert=_timestamp),
    becomes("BatchSize", "batch_size", "100"),
    becomes("MaximumBatchingWindowInSeconds", "batch_window_secs", "0.5, of Kinesis 0"),
    becomes("ParallelizationFactor", "parallelization_factor", "1"),
    looked_up(
        "MaximumRetryAttempts",
        "--max_retries; with a destination 10 in place of -1, but not of Kinesis",
        "-1",
        "max_retries",
    ),
    becomes("MaximumRecordAgeInSeconds", "max_record_age_secs", "-1"),
    becomes("BisectBatchOnFunctionError", "bisect_on_error", "false"),
    Row(
        ("FunctionResponseTypes",),
        "--reply=batch_item_failures with --partial_failure=named, of Kinesis with checkpoint; "
        "without it --reply=none",
        _responses,
        "none",
    ),
    Row(
        ("DestinationConfig.OnFailure.Destination",),
        "`kafka://TOPIC`: --on_error=log, --error_topic and --error_record=aws; a queue, an SNS "
        "topic or a bucket: --on_error=log and --on_failure_destination; none: --on_error=log, so "
        "a line of the log",
        _destination,
        "none",
    ),
    unneeded("DestinationConfig.OnSuccess.Destination", "a mapping of Kafka has no use for it"),
    Row(("FilterCriteria.Filters",), "--filter_criteria", _filters),
    refused(
        "FilterCriteriaError.*",
        "the filters are not in the file; ask for the mapping with the right to decrypt them, or "
        "give --filter_criteria",
        answers="filter_criteria",
    ),
    looked_up("FilterCriteriaError.Message", "the same"),
    unneeded("KMSKeyArn", "the filters in the file are plain"),
    becomes("*.SchemaRegistryConfig.SchemaRegistryURI", "schema_registry_url", convert=_registry),
    becomes("*.SchemaRegistryConfig.EventRecordFormat", "event_record_format"),
    becomes(
        "*.SchemaRegistryConfig.SchemaValidationConfigs", "schema_validation", convert=_attributes
    ),
    Row(
        ("*.SchemaRegistryConfig.AccessConfigs",),
        "--schema_registry_access; left out with --kafka_config_file",
        _registry_access,
    ),
    Row(
        ("SourceAccessConfigurations",),
        "--kafka_access; left out with --kafka_config_file, and networks always",
        _access,
    ),
    refused(
        f"{_SELF_MANAGED}.ConsumptionMode",
        "a queue has no order and no offsets; topics are read in order here",
        harmless=("Stream",),
    ),
    becomes("ProvisionedPollerConfig.MinimumPollers", "workers", convert=_workers),
    Row(
        ("ProvisionedPollerConfig.MaximumPollers",),
        "--max_workers, and --max_concurrency: five for each",
        _pollers,
    ),
    unneeded("ProvisionedPollerConfig.*", "nothing has to be kept ready"),
    Row(("State", "Enabled"), "disable the mapping before the pipeline runs", _state),
    becomes("TumblingWindowInSeconds", "tumbling_window_secs", "0"),
    refused(
        "Queues DocumentDBEventSourceConfig.*",
        "only mappings of Kafka and of Kinesis are known here",
    ),
    unneeded("ScalingConfig.*", "it is for queues"),
    unneeded("MetricsConfig.* LoggingConfig.*", "logs are always there; metrics with --http"),
    looked_up("UUID", "of Kinesis it names --lease_table, unless that is given"),
    looked_up(
        "EventSourceMappingArn LastModified LastProcessingResult StateTransitionReason "
        "ResponseMetadata.*",
        "what AWS says of the mapping",
    ),
)


def is_mapping(content: Mapping[str, object]) -> bool:
    """Whether a file's content is what AWS says of event source mappings."""
    return any(mark in content for mark in _MARKS)


def carry(carried: Carried, content: Mapping[str, Any]) -> None:
    """Put an event source mapping into `carried`.

    Args:
        carried: Empty, with the command line's options.
        content: One mapping, or the list of one; all scalars as text.
    """
    if _LIST in content:
        mappings = _mappings(content[_LIST])
        if len(mappings) != 1:
            count = f"the file has {len(mappings)} mappings"
            carried.refuse(_LIST, f"{count}; put the one to carry over into a file of its own")
            return
        content = mappings[0]
    # Where it reads decides on the rest.
    settings = dict(sorted(_leaves(content), key=lambda each: each[0] != "EventSourceArn"))
    for name, value in settings.items():
        row = find_row(ROWS, name)
        if row is None:
            why = "not known here, so it may matter; take it out of the file if it does not"
            carried.refuse(name, why)
        elif row.take:
            row.take(carried, name, value)
    _defaults(carried)
    if _is_stream(carried):
        _stream_defaults(carried, settings.get("UUID"))
    _retries(carried, settings.get("MaximumRetryAttempts"))


def _defaults(carried: Carried) -> None:
    carried.assume("envelope", "kafka_event")
    carried.assume("batch_size", "100")
    carried.assume("batch_window_secs", "0.5")
    carried.assume("bisect_on_error", "false")
    carried.assume("max_record_age_secs", "-1")
    # Without a destination AWS drops; here it goes on, too, with a line of the log for each.
    carried.assume("on_error", "log")


def _is_stream(carried: Carried) -> bool:
    return "stream" in carried.values


def _stream_defaults(carried: Carried, uuid: Any) -> None:
    carried.assume("envelope", "kinesis_event")
    carried.assume("batch_window_secs", "0")
    if isinstance(uuid, str) and re.fullmatch("[a-zA-Z0-9-]+", uuid):
        # It has to be the same in the next run.
        carried.assume("lease_table", f"beam-lambda-sink-{uuid}")


def _retries(carried: Carried, attempts: Any) -> None:
    kept = carried.in_force("error_topic") or carried.in_force("on_failure_destination")
    limited = kept and not _is_stream(carried)
    if attempts in (None, "-1") and limited:
        carried.assume("max_retries", _RETRIES_WITH_DESTINATION)
    elif attempts is None:
        carried.assume("max_retries", "-1")
    else:
        carried.take("max_retries", str(attempts), "MaximumRetryAttempts")


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All that is in a structure, by the path that leads to it; lists count as one."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{path}{name}.")
        else:
            yield path + name, inner


def _service(arn: str) -> str:
    return [*arn.split(":"), "", "", ""][2]


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
