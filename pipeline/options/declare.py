"""Options: declared once, here; the help, the checks and docs/options.md are made from it.

`KafkaLambdaOptions` gives them to Beam. Everything behind `main` sees only the `Config` they
become, made of the steps' own frozen values.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.migrate import config_file
from pipeline.migrate.carried import OWN, Carried, Value
from pipeline.submit import dataflow
from transforms import envelope, text_file
from transforms.aws.function import FUNCTION, MAX_ASYNC_BYTES, MAX_SYNC_BYTES, FunctionConfig
from transforms.batch import payload
from transforms.batch.batch import BatchConfig
from transforms.batch.payload import PayloadFormat
from transforms.commit.committer import INTERVAL_SECS, REFRESH_SECS, CommitConfig
from transforms.decode.decode import ATTRIBUTES, VALUE, DecodeConfig
from transforms.envelope import Envelope
from transforms.errors import UsageError, one_line
from transforms.filter.filter import UNPARSABLE, FilterConfig, load_criteria
from transforms.invoke import reply
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.invoke import InvokeConfig
from transforms.invoke.retry import RetryPolicy
from transforms.kafka.beam_reader import BeamReadConfig
from transforms.kafka.client import KafkaConfig
from transforms.kafka.offsets import AT_TIMESTAMP, LATEST, TRIM_HORIZON, SourceConfig
from transforms.kafka.streaming import KafkaStream
from transforms.lanes import Lanes
from transforms.properties import PREFIXES, load_properties
from transforms.read.rounds import ReadConfig
from transforms.read.streaming import NativeReadConfig
from transforms.schemas.registry import RegistryConfig, check_settings
from transforms.schemas.schema import CONNECT, STANDARD
from transforms.write import destination, formats
from transforms.write.write import WriteConfig

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: Without the dashes.
        help: What it does, as a sentence; unit, range and default are added from the rest.
        kind: ``text``, ``list`` (comma separated), ``int``, ``float``, ``flag`` or ``choice``.
        default: Its value if not given, None for none.
        unit: Unit of a number, as its name's suffix says.
        low: Least value of a number.
        high: Greatest value of a number.
        special: A value outside the range that is allowed, and what it means.
        choices: What a ``choice`` may be.
        example: A value for the docs.
        pattern: Regular expression that a text has to match as a whole, in words that Python and
            the consoles of others know alike.
    """

    name: str
    help: str
    kind: str = "text"
    default: Any = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    special: tuple[int, str] | None = None
    choices: tuple[str, ...] = ()
    example: str = ""
    pattern: str = ""

    @property
    def required(self) -> bool:
        """Whether no run goes without it."""
        return self.help.endswith("Required.")

    def fits(self, text: str) -> bool:
        """Whether a text has the option's form."""
        return re.fullmatch(self.pattern, text) is not None

    @property
    def range(self) -> str:
        """What values are allowed, in words."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind == "list" and self.choices:
            return ", ".join(self.choices)
        if self.kind == "flag":
            return "true | false"
        if self.low is None:
            return ""
        text = f"{self.low:g} to {self.high:g}" if self.high is not None else f"from {self.low:g}"
        if self.low == int(self.low) and self.high is not None:
            text = f"{int(self.low)} to {int(self.high)}"
        return f"{self.special[0]} ({self.special[1]}) or {text}" if self.special else text

    @property
    def default_text(self) -> str:
        if self.default is None:
            return "none"
        if self.kind == "list":
            return ",".join(self.default)
        return str(self.default).lower() if self.kind == "flag" else str(self.default)

    @property
    def help_text(self) -> str:
        """The help as the command line shows it."""
        facts = [self.range and f"range: {self.range}", self.unit and f"unit: {self.unit}"]
        facts.append(f"default: {self.default_text}")
        return f"{self.help} ({'; '.join(fact for fact in facts if fact)})"


@dataclass(frozen=True, slots=True)
class Group:
    """Options that belong together."""

    title: str
    options: tuple[Option, ...]


_RETRY_LIMIT: dict[str, Any] = {
    "kind": "int",
    "low": 0,
    "high": 10000,
    "special": (-1, "no limit"),
}

_NONE = "NONE"

_TOPIC = "[a-zA-Z0-9._-]{1,249}"
_SERVER = r"((SASL_)?(PLAINTEXT|SSL)://)?(\[[0-9a-fA-F:.]+\]|[^,:/\s\[\]]+):\d{1,5}"

GROUPS = (
    Group(
        "Configuration",
        (
            Option(
                "config",
                "File with options: the JSON of a Confluent AWS Lambda sink connector, what `aws "
                "lambda get-event-source-mapping` prints, or YAML with our own option names. What "
                "is given here wins over it, and it wins over the defaults. What cannot be carried "
                "over and would change something is refused.",
                example="connector.json",
            ),
            Option(
                "explain",
                "Print what would be in force and where each value came from, then end without "
                "running.",
                kind="flag",
                default=False,
            ),
        ),
    ),
    Group(
        "Source",
        (
            Option(
                "kafka_bootstrap_servers",
                "Kafka brokers to begin with, as a comma separated host:port list. Required.",
                example="broker-1:9092,broker-2:9092",
                pattern=rf"{_SERVER}(\s*,\s*{_SERVER})*",
            ),
            Option(
                "kafka_config_file",
                "Properties file with settings for the Kafka clients (SASL, TLS, anything "
                "librdkafka takes). Names that begin with response. or error. are for the producer "
                "of that topic, schema.registry. for the schema registry. ${env:NAME} is replaced "
                "by the environment variable NAME. It may be in Cloud Storage, as "
                f"{text_file.GCS_FORM}, or in Secret Manager, as {text_file.SECRET_FORM}; each "
                "worker reads it there.",
                example="kafka.properties",
            ),
            Option(
                "topics",
                "Topics to read, comma separated. Exactly one of --topics and --topics_regex.",
                kind="list",
                example="orders,payments",
                pattern=_TOPIC,
            ),
            Option(
                "topics_regex",
                "Regular expression that the whole name of a topic to read must match. Topics "
                "that are created later are found too.",
                example="orders-.*",
            ),
            Option(
                "consumer_group",
                "Consumer group whose committed offsets say where to go on. Required.",
                example="orders-to-lambda",
            ),
            Option(
                "commit_refresh_secs",
                "How often each partition's offset is committed again, be it where it was: a "
                "broker forgets it a week after its last commit, or as its "
                "offsets.retention.minutes says, even while we run. Well below that.",
                kind="int",
                default=REFRESH_SECS,
                unit="seconds",
                low=1,
                high=86_400,
            ),
            Option(
                "commit_interval_secs",
                "Commit offsets at most this often, on the DirectRunner. A run that ends commits "
                "at once; what was not committed when one crashes is invoked again.",
                kind="float",
                default=INTERVAL_SECS,
                unit="seconds",
                low=0,
                high=60,
            ),
            Option(
                "starting_position",
                "Where to begin with a partition for which the group has no committed offset: at "
                "its first record, behind its last one, or at --starting_timestamp. With LATEST, a "
                "partition added while no run was up begins at its first record all the same: one "
                "of a topic, or of topics of a regex, of which the group has offsets.",
                kind="choice",
                default=TRIM_HORIZON,
                choices=(TRIM_HORIZON, LATEST, AT_TIMESTAMP),
            ),
            Option(
                "starting_timestamp",
                "ISO 8601 time of the first record to read, with AT_TIMESTAMP; UTC if it names "
                "no zone. Not in the future.",
                example="2026-11-01T00:00:00Z",
            ),
        ),
    ),
    Group(
        "Streaming",
        (
            Option(
                "kafka_reader",
                "Reader of a streaming run (Flink, Dataflow): native reads in Python, whole chunks "
                "of records at a time; beam is Beam's ReadFromKafka, which is Java and needs an "
                "expansion service. The DirectRunner has its own.",
                kind="choice",
                default="native",
                choices=("native", "beam"),
            ),
            Option(
                "expansion_service",
                "Expansion service for --kafka_reader=beam, as host:port or the path of its jar. "
                "Not given: Beam starts its own.",
                example="127.0.0.1:8097",
            ),
        ),
    ),
    Group(
        "Filter",
        (
            Option(
                "filter_criteria",
                "JSON or YAML file with the FilterCriteria of an event source mapping: a record "
                "that no filter in it matches is not sent, only committed. May be a gs:// path.",
                example="filters.json",
            ),
            Option(
                "filter_unparsable",
                "What a filter does with a key or value that it cannot be compared with, such as "
                "text where it names fields: pass takes it for matched, as AWS does with Kafka "
                "records; drop takes it for not matched, as AWS does with Kinesis records; error "
                "makes the record an error record.",
                kind="choice",
                default="pass",
                choices=UNPARSABLE,
            ),
        ),
    ),
    Group(
        "Function",
        (
            Option(
                "function",
                "Function to invoke: a name, name:version, name:alias, or an ARN. Required.",
                example="process-orders:live",
                # Of the same form, without the names of its groups, which not everybody knows.
                pattern=re.sub(r"\?P<\w+>", "", FUNCTION.pattern),
            ),
            Option(
                "invocation_type",
                "sync waits for each reply; async lets Lambda queue the event, so there are no "
                "replies and errors of the function are Lambda's to handle.",
                kind="choice",
                default="sync",
                choices=("sync", "async"),
            ),
            Option(
                "aws_region",
                "AWS region of the function; else the one in its ARN, else AWS's default chain.",
                example="eu-central-1",
            ),
            Option(
                "aws_role_arn",
                "Role to assume, with the credentials of AWS's default chain, or as "
                "--aws_web_identity says.",
                example="arn:aws:iam::123456789012:role/invoke-orders",
                pattern=r"arn:aws[a-zA-Z-]*:iam::\d{12}:role/\S+",
            ),
            Option(
                "aws_web_identity",
                "Assume --aws_role_arn without any key: google with the identity token that the "
                "metadata server of Google Cloud gives to a virtual machine, a pod or a worker of "
                "Dataflow.",
                kind="choice",
                choices=("google",),
            ),
            Option(
                "aws_web_identity_audience",
                "Audience of that token, as the trust policy of the role has it.",
                default="sts.amazonaws.com",
            ),
            Option(
                "lambda_endpoint_url",
                "Another endpoint than AWS's, such as a local Lambda or a VPC endpoint.",
                example="http://127.0.0.1:9200",
                pattern=r"https?://[^/@\s]+(/\S*)?",
            ),
            Option(
                "function_timeout_secs",
                "The function's own timeout. The client waits 5 s longer before it takes an "
                "invocation for lost and repeats it.",
                kind="int",
                default=900,
                unit="seconds",
                low=1,
                high=900,
            ),
        ),
    ),
    Group(
        "Batching",
        (
            Option(
                "batch_size",
                "Records per invocation at most.",
                kind="int",
                default=100,
                unit="records",
                low=1,
                high=10000,
            ),
            Option(
                "batch_bytes",
                "Bytes of an invocation's payload at most, as it is sent. Not given: Lambda's own "
                f"limit, {MAX_SYNC_BYTES} sync and {MAX_ASYNC_BYTES} async.",
                kind="int",
                unit="bytes",
                low=1,
                high=MAX_SYNC_BYTES,
            ),
            Option(
                "batch_window_secs",
                "How long a record may wait for its batch to fill.",
                kind="float",
                default=0.5,
                unit="seconds",
                low=0,
                high=300,
            ),
            Option(
                "parallelization_factor",
                "Invocations at once inside a partition. Above 1 order is kept per record key, no "
                "longer over the whole partition; records without a key are spread.",
                kind="int",
                default=1,
                unit="invocations",
                low=1,
                high=10,
            ),
            Option(
                "max_concurrency",
                "Invocations at once, over all partitions, at most; in a streaming run, of each "
                "worker process. Where Lambda throttles there are fewer, and more again while they "
                "succeed and others wait.",
                kind="int",
                default=100,
                unit="invocations",
                low=1,
                high=1000,
            ),
            Option(
                "min_concurrency",
                "Invocations at once that are allowed however often Lambda throttles. Not above "
                "--max_concurrency.",
                kind="int",
                default=1,
                unit="invocations",
                low=1,
                high=1000,
            ),
        ),
    ),
    Group(
        "Payload and reply",
        (
            Option(
                "envelope",
                "How records are handed to the function: confluent as the Confluent Lambda "
                "connector has them, kafka_event as an event source mapping for Kafka, pipes as "
                "EventBridge Pipes.",
                kind="choice",
                default=envelope.CONFLUENT,
                choices=envelope.ENVELOPES,
            ),
            Option(
                "event_source_arn",
                "ARN of the MSK cluster, for the other envelopes. Not given: the function gets "
                "events of a self-managed Kafka.",
                example="arn:aws:kafka:eu-central-1:123456789012:cluster/orders/5a7c-2",
                pattern=r"arn:aws[a-zA-Z-]*:kafka:[a-z0-9-]+:\d{12}:cluster/\S+",
            ),
            Option(
                "key_format",
                "How a key becomes JSON: auto sends JSON as JSON, other UTF-8 text as a string "
                "and the rest as base64; json makes a key that does not parse an error record.",
                kind="choice",
                default="auto",
                choices=payload.FORMATS,
            ),
            Option(
                "value_format",
                "The same for values.",
                kind="choice",
                default="auto",
                choices=payload.FORMATS,
            ),
            Option(
                "include_headers",
                'Send each record\'s headers too, as "headers": [{"key", "value"}].',
                kind="flag",
                default=False,
            ),
            Option(
                "reply",
                "What the function's reply is: confluent answers each record, "
                "batch_item_failures names those that failed, any is kept as it is as one response "
                "per invocation, none is not looked at. Not given: none without --response_topic; "
                "with it confluent, or any with another --envelope.",
                kind="choice",
                choices=reply.REPLIES,
            ),
            Option(
                "partial_failure",
                "What --reply=batch_item_failures repeats: checkpoint all records from the first "
                "one named on, named only those that are named.",
                kind="choice",
                default="checkpoint",
                choices=("checkpoint", "named"),
            ),
            Option(
                "client_context",
                "Tell the function in its context which offsets an invocation holds, which attempt "
                "it is, and why. Not for --invocation_type=async.",
                kind="flag",
                default=True,
            ),
        ),
    ),
    Group(
        "Schemas",
        (
            Option(
                "schema_registry_url",
                "Confluent schema registry (or one that speaks like it), for records that name "
                "an Avro, Protobuf or JSON schema. Its login and TLS settings are in "
                "--kafka_config_file under schema.registry. Not given: records are not decoded.",
                example="https://registry.example.com:8081",
                pattern=r"https?://[^/@\s,]+(/[^\s,]*)?(,https?://[^/@\s,]+(/[^\s,]*)?)*",
            ),
            Option(
                "schema_validation",
                "Which of KEY and VALUE name a schema, comma separated: they are checked and "
                "decoded, and a record that does not fit becomes an error record. NONE uses the "
                "registry for what is written only.",
                kind="list",
                default=(VALUE,),
                choices=(*ATTRIBUTES, _NONE),
            ),
            Option(
                "event_record_format",
                "How what was decoded is handed over: JSON, or SOURCE for the bytes as they are, "
                "without the schema's id, with --envelope=kafka_event or pipes.",
                kind="choice",
                default="JSON",
                choices=("JSON", "SOURCE"),
            ),
        ),
    ),
    Group(
        "Errors",
        (
            Option(
                "max_retries",
                "Repeats of an invocation that failed in the function.",
                default=0,
                **_RETRY_LIMIT,
            ),
            Option(
                "max_transient_retries",
                "Repeats after network errors, timeouts and 5xx. Throttles count in no limit.",
                default=-1,
                **_RETRY_LIMIT,
            ),
            Option(
                "max_record_age_secs",
                "Age by its timestamp at which a record is given up.",
                kind="int",
                default=-1,
                unit="seconds",
                low=60,
                high=604800,
                special=(-1, "no limit"),
            ),
            Option(
                "bisect_on_error",
                "Split a batch in which the function failed in halves, until the bad record "
                "stands alone.",
                kind="flag",
                default=False,
            ),
            Option(
                "on_error",
                "What becomes of records that are given up: fail stops their partition before "
                "them, the others go on; log writes an error record (to the log without "
                "--error_topic) and goes on; ignore goes on.",
                kind="choice",
                default="fail",
                choices=("fail", "log", "ignore"),
            ),
            Option(
                "breaker_failure_rate",
                "Share of failures among the last --breaker_invocations at which no more are made "
                "and no records are given up, until one that tries succeeds. 0 is never.",
                kind="float",
                default=0,
                low=0,
                high=1,
            ),
            Option(
                "breaker_invocations",
                "How many invocations the share is taken of.",
                kind="int",
                default=20,
                unit="invocations",
                low=2,
                high=1000,
            ),
            Option(
                "breaker_wait_secs",
                "How long nothing is invoked before one invocation tries whether it succeeds.",
                kind="float",
                default=30,
                unit="seconds",
                low=1,
                high=3600,
            ),
        ),
    ),
    Group(
        "Output",
        (
            Option(
                "response_topic",
                "Topic for the function's results, one record each, or one per invocation with "
                "--reply=any.",
                example="orders-results",
                pattern=_TOPIC,
            ),
            Option(
                "error_topic",
                "Topic for the error records of --on_error=log.",
                example="orders-errors",
                pattern=_TOPIC,
            ),
            Option(
                "response_format",
                "json, json_schema (with Connect's schema envelope), string (as Connect's "
                "StringConverter prints it) or avro (with the schema in the registry).",
                kind="choice",
                default="json",
                choices=(*formats.FORMATS, formats.AVRO),
            ),
            Option(
                "error_format",
                "The same for error records.",
                kind="choice",
                default="json",
                choices=(*formats.FORMATS, formats.AVRO),
            ),
            Option(
                "error_record",
                "What --error_topic gets: confluent one record for all that failed together, as "
                "the Confluent Lambda connector writes it; aws one for each failed record, as an "
                "event source mapping writes it to a Kafka topic.",
                kind="choice",
                default=destination.CONFLUENT,
                choices=destination.ERROR_RECORDS,
            ),
        ),
    ),
    Group(
        "Running",
        (
            Option(
                "workers",
                "Processes of the DirectRunner, each with its share of the partitions: about one "
                "for each processor, not more than there are partitions. Each takes some 150 MB of "
                "memory more. Together they invoke --max_concurrency at once, at most.",
                kind="int",
                default=1,
                unit="processes",
                low=1,
                high=64,
            ),
            Option(
                "preflight",
                "Check the topics and, with a DryRun invocation, the function before anything is "
                "read. --preflight=false switches it off.",
                kind="flag",
                default=True,
            ),
            Option(
                "until",
                "forever runs until it is told to stop; caught_up ends when all that was in the "
                "topics at the start is done.",
                kind="choice",
                default="forever",
                choices=("forever", "caught_up"),
            ),
            Option(
                "summary",
                "What to print on stdout at the end: text, one line of json, or none.",
                kind="choice",
                default="text",
                choices=("text", "json", "none"),
            ),
            Option(
                "log_format",
                "Log lines as text or as one json object each.",
                kind="choice",
                default="text",
                choices=("text", "json"),
            ),
        ),
    ),
)

DIRECT_RUNNERS = ("DirectRunner", "direct")
FLINK_RUNNERS = ("FlinkRunner", "PortableRunner")
STREAM_RUNNERS = (*FLINK_RUNNERS, dataflow.RUNNER)

OPTIONS = {option.name: option for group in GROUPS for option in group.options}


class KafkaLambdaOptions(PipelineOptions):
    """The options as Beam sees them. All are text here; `Config.from_options` checks them."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        for option in OPTIONS.values():
            help_text = option.help_text.replace("%", "%%")
            if option.kind == "flag":
                parser.add_argument(f"--{option.name}", nargs="?", const="true", help=help_text)
                if option.default:
                    parser.add_argument(
                        f"--no_{option.name}",
                        dest=option.name,
                        action="store_const",
                        const="false",
                        help=argparse.SUPPRESS,
                    )
            else:
                parser.add_argument(f"--{option.name}", help=help_text)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How the rounds run.

    Attributes:
        preflight: Whether to check topics and function first.
        until: ``forever`` or ``caught_up``.
        summary: ``text``, ``json`` or ``none``.
        log_format: ``text`` or ``json``.
        workers: Processes of the DirectRunner.
    """

    preflight: bool
    until: str
    summary: str
    log_format: str
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the pipeline needs, one frozen value per step.

    `stream` says how a streaming run reads; it is None on the DirectRunner, which has `read`.
    `warnings` is what can be meant, but hardly is, one line each.
    """

    kafka: KafkaConfig
    source: SourceConfig
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
        settings: dict[str, str] = {}
        refused: tuple[str, ...] = ()
        if values["kafka_config_file"]:
            try:
                settings = load_properties(values["kafka_config_file"])
            except UsageError as error:
                refused = error.problems
        _check_together(values, given, settings, now or datetime.now(timezone.utc), problems)
        problems += refused
        patterns: tuple[str, ...] = ()
        if values["filter_criteria"]:
            try:
                patterns = load_criteria(values["filter_criteria"])
            except UsageError as error:
                problems += error.problems
        if runner in STREAM_RUNNERS and given.get("workers") is not None:
            problems.append(
                "--workers goes with the DirectRunner only; with Flink give --parallelism and "
                "--sdk_worker_parallelism, with Dataflow --max_num_workers"
            )
        if runner in STREAM_RUNNERS and values["kafka_reader"] == "beam":
            _check_beam_reader(values, settings, problems)
        registry = values["schema_registry_url"]
        if registry and not problems:
            try:
                check_settings(RegistryConfig(registry, values["kafka_config_file"]))
            except UsageError as error:
                problems += error.problems
        if problems:
            raise UsageError(problems)
        return _make_config(values, settings, runner, patterns)


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
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


def _check_together(
    values: dict[str, Any],
    given: dict[str, str | None],
    settings: dict[str, str],
    now: datetime,
    problems: list[str],
) -> None:
    for name, option in OPTIONS.items():
        if option.required and given.get(name) is None:
            problems.append(f"--{name} is missing; for example --{name}={option.example}")
    servers = values["kafka_bootstrap_servers"]
    if servers and not OPTIONS["kafka_bootstrap_servers"].fits(servers):
        problems.append(
            f"--kafka_bootstrap_servers={servers} is not a comma separated list of host:port"
        )
    topics, regex = values["topics"], values["topics_regex"]
    if bool(topics) == bool(regex):
        problems.append(
            f"give exactly one of --topics and --topics_regex, not {'both' if topics else 'none'}"
        )
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
    _check_payload(values, problems)
    _check_schemas(values, given, problems)
    _check_reply(values, given, problems)
    if values["invocation_type"] == "async" and (values["batch_bytes"] or 0) > MAX_ASYNC_BYTES:
        problems.append(
            f"--batch_bytes={values['batch_bytes']} is above the limit of async invocations, "
            f"{MAX_ASYNC_BYTES}"
        )
    if given.get("filter_unparsable") and given.get("filter_criteria") is None:
        problems.append("--filter_unparsable goes with --filter_criteria only")
    low, high = values["min_concurrency"], values["max_concurrency"]
    if low and high and low > high:
        problems.append(f"--min_concurrency={low} is above --max_concurrency={high}")
    workers = values["workers"]
    if workers and high and workers > high:
        problems.append(
            f"--workers={workers} is above --max_concurrency={high}: each of them needs one of the "
            f"invocations"
        )
    _check_start(values, now, problems)


def _cluster(topic: str, values: dict[str, Any], settings: dict[str, str]) -> str:
    """The brokers of the topic that an option names."""
    prefix = topic.removesuffix("topic").replace("_", ".")
    return str(settings.get(f"{prefix}bootstrap.servers", values["kafka_bootstrap_servers"]))


def _warnings(values: dict[str, Any], settings: dict[str, str]) -> Iterator[str]:
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
    if endpoint and re.match(r"\w+://[^/]*@", endpoint):
        problems.append("--lambda_endpoint_url has a login in it, for all to read; leave it out")
    elif endpoint and not OPTIONS["lambda_endpoint_url"].fits(endpoint):
        problems.append(f"--lambda_endpoint_url={endpoint} is not an http:// or https:// address")
    if role and not OPTIONS["aws_role_arn"].fits(role):
        problems.append(f"--aws_role_arn={role} is not the ARN of a role")
    if values["aws_web_identity"] and not role:
        problems.append(
            f"--aws_web_identity={values['aws_web_identity']} needs --aws_role_arn, the role to "
            f"assume with it"
        )
    if given.get("aws_web_identity_audience") is not None and not values["aws_web_identity"]:
        problems.append("--aws_web_identity_audience goes with --aws_web_identity only")


def _reply(values: dict[str, Any]) -> str:
    """What replies are, given or by the other options."""
    if values["reply"]:
        return str(values["reply"])
    if not values["response_topic"] or values["invocation_type"] == "async":
        return reply.NONE
    return reply.CONFLUENT if values["envelope"] == envelope.CONFLUENT else reply.ANY


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


def _check_payload(values: dict[str, Any], problems: list[str]) -> None:
    arn = values["event_source_arn"]
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
        if arn and not aws_errors:
            problems.append(
                "--event_source_arn goes with --envelope=kafka_event or pipes, or with "
                "--error_record=aws, only"
            )
        return
    for name in ("key_format", "value_format"):
        if values[name] not in (OPTIONS[name].default, "base64"):
            problems.append(
                f"--{name}={values[name]} goes with --envelope=confluent only: "
                f"{values['envelope']} has base64"
            )


def _check_schemas(
    values: dict[str, Any], given: dict[str, str | None], problems: list[str]
) -> None:
    url = values["schema_registry_url"]
    if url is None:
        problems += [
            f"--{name} needs --schema_registry_url"
            for name in ("schema_validation", "event_record_format")
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
    if _NONE in attributes and len({*attributes}) > 1:
        problems.append(f"--schema_validation={','.join(attributes)}: {_NONE} stands alone")
    for attribute in set(attributes) - {_NONE}:
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


def _check_beam_reader(
    values: dict[str, Any], settings: dict[str, str], problems: list[str]
) -> None:
    service = values["expansion_service"]
    if service and service.endswith(".jar") and not os.path.isfile(service):
        problems.append(f"--expansion_service={service} is not there; give a jar, or host:port")
    if values["until"] == "caught_up":
        problems.append("--until=caught_up needs --kafka_reader=native: Beam's reader has no end")
    common = sorted(name for name in settings if not name.startswith(PREFIXES))
    if common:
        problems.append(
            f"--kafka_config_file sets {', '.join(common)}, which --kafka_reader=beam would make "
            f"part of the job, for all to read; use --kafka_reader=native"
        )


def _make_config(
    values: dict[str, Any], settings: dict[str, str], runner: str, patterns: tuple[str, ...]
) -> Config:
    streaming = runner in STREAM_RUNNERS
    sync = values["invocation_type"] == "sync"
    batch_bytes = values["batch_bytes"] or (MAX_SYNC_BYTES if sync else MAX_ASYNC_BYTES)
    kafka = KafkaConfig(
        values["kafka_bootstrap_servers"], values["consumer_group"], values["kafka_config_file"]
    )
    wrapping = Envelope(
        values["envelope"],
        values["kafka_bootstrap_servers"],
        values["event_source_arn"],
        values["event_record_format"] == "SOURCE",
    )
    url = values["schema_registry_url"]
    registry = RegistryConfig(url, values["kafka_config_file"]) if url else None
    attributes = tuple(a for a in values["schema_validation"] if a != _NONE)
    style = CONNECT if wrapping.name == envelope.CONFLUENT else STANDARD
    # What the reader counts is bytes as Kafka has them; base64 makes four of three.
    due_bytes = batch_bytes if wrapping.name == envelope.CONFLUENT else batch_bytes * 3 // 4
    aws_errors = values["error_record"] == destination.AWS
    start = values["starting_timestamp"]
    moment = parse_timestamp(start) if start else None
    limit = settings.get("error.message.max.bytes", settings.get("message.max.bytes", ""))
    max_error_bytes = int(limit) if limit.isdecimal() else 1_000_000
    lanes = Lanes(values["parallelization_factor"], run=values["batch_size"])
    source = SourceConfig(
        kafka,
        topics=values["topics"] or (),
        topics_regex=values["topics_regex"],
        starting_position=values["starting_position"],
        # Below 0 are numbers that mean something else to Kafka.
        starting_timestamp_ms=max(0, int(moment.timestamp() * 1000)) if moment else None,
    )
    stream: NativeReadConfig | BeamReadConfig | None = None
    if streaming and values["kafka_reader"] == "beam":
        service, in_flink = values["expansion_service"], runner in FLINK_RUNNERS
        stream = BeamReadConfig(kafka, source.topics, service, in_flink)
    elif streaming:
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
                values["key_format"], values["value_format"], values["include_headers"], wrapping
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
            min_concurrency=values["min_concurrency"],
            breaker=BreakerPolicy(
                failure_rate=values["breaker_failure_rate"],
                invocations=values["breaker_invocations"],
                wait_secs=values["breaker_wait_secs"],
            ),
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
            destination=replace(wrapping, name=envelope.KAFKA_EVENT) if aws_errors else None,
            source=source,
        ),
        commit=CommitConfig(
            source,
            lanes,
            None if stream and values["until"] == "caught_up" else values["commit_refresh_secs"],
            values["commit_interval_secs"],
        ),
        run=RunConfig(
            preflight=values["preflight"],
            until=values["until"],
            summary=values["summary"],
            log_format=values["log_format"],
            workers=values["workers"],
        ),
        warnings=tuple(_warnings(values, settings)),
    )


COMMAND_LINE = "command line"

# Given on the command line, the first of them leaves no room for what a file says of the second.
_IN_PLACE_OF = (
    ("topics", "topics_regex"),
    ("topics_regex", "topics"),
    ("starting_position", "starting_timestamp"),
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a command line and the file it names come to.

    Attributes:
        values: By option, what was given and where; options left to their default are not there.
        carried: What the file of --config came to, None without one.
        properties: Names of the settings in --kafka_config_file.
        runner: The name of the runner.
        beam_arguments: The arguments that are Beam's.
        explain: Whether --explain is on.
        problems: Why it cannot run, one line each.
        config: The checked options, None with problems.
    """

    values: Mapping[str, Value]
    carried: Carried | None
    properties: tuple[str, ...]
    runner: str
    beam_arguments: tuple[str, ...]
    explain: bool
    problems: tuple[str, ...]
    config: Config | None


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read the command line, and the file it names.

    Args:
        arguments: Without the program's name.

    Returns:
        The checked options, and the name of the runner.

    Raises:
        UsageError: With every problem found, options nobody knows among them.
    """
    resolved = resolve(arguments)
    if resolved.config is None:
        raise UsageError(resolved.problems)
    return resolved.config, resolved.runner


def resolve(
    arguments: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read: Callable[[str], str] = config_file.read_text,
) -> Resolved:
    """Read the command line and the file it names, and say what they come to.

    Args:
        arguments: Without the program's name.
        environ: Environment variables.
        read: Gets the text of the file.

    Raises:
        UsageError: The command line or the file cannot be read at all.
    """
    ours, rest = _parser().parse_known_args(arguments)
    given = {name: text for name, text in vars(ours).items() if text is not None}
    # A misspelt option must not be passed over.
    beam, problems = parse_beam(rest)
    if beam and beam.template_location:
        # But the parameters of a template were checked before it was launched, and what else its
        # launcher gives is none of the user's doing.
        for problem in problems:
            _LOGGER.warning("%s; it is passed over", problem)
        problems = []
    runner = _runner(rest)
    if runner not in DIRECT_RUNNERS + STREAM_RUNNERS:
        supported = ", ".join(DIRECT_RUNNERS[:1] + STREAM_RUNNERS)
        problems.append(f"--runner={runner} is not supported; use one of {supported}")
    carried = None
    if path := given.get("config"):
        carried = config_file.load(path, given, OPTIONS, environ, read)
        problems += [f"--config={path}: {note.name}: {note.why}" for note in carried.refused]
    values = _merge(given, carried)
    config = None
    try:
        config = Config.from_options(
            {name: value.text for name, value in values.items()}, runner=runner
        )
    except UsageError as error:
        problems += _with_origins(error.problems, values, carried)
    if beam and runner in DIRECT_RUNNERS and beam.direct_num_workers != 1:
        problems.append(
            f"--direct_num_workers={beam.direct_num_workers} has no effect; use --workers"
        )
    if beam and runner == dataflow.RUNNER:
        problems += dataflow.problems(beam, values.get("kafka_config_file", Value("", "")).text)
    properties: tuple[str, ...] = ()
    if path := values.get("kafka_config_file", Value("", "")).text:
        with suppress(UsageError):  # among the problems already
            properties = tuple(load_properties(path, environ))
    return Resolved(
        values,
        carried,
        properties,
        runner,
        tuple(rest),
        explain=given.get("explain") == "true",
        problems=tuple(map(one_line, problems)),
        config=None if problems else config,
    )


def _merge(given: Mapping[str, str], carried: Carried | None) -> dict[str, Value]:
    """The command line over the file over its system's defaults."""
    values = {name: Value(text, COMMAND_LINE) for name, text in given.items()}
    if carried is None:
        return values
    taken = {option: other for option, other in _IN_PLACE_OF if option in given}
    for name, value in (carried.defaults | carried.values).items():
        if name not in given and name not in taken.values():
            values[name] = value
    # An empty value takes back what the file says.
    return {
        name: value
        for name, value in values.items()
        if value.text or not (name in carried.values or name in carried.defaults)
    }


def _with_origins(
    problems: Sequence[str], values: Mapping[str, Value], carried: Carried | None
) -> list[str]:
    """Problems of options that a file says, with the words of the file."""
    if carried is None:
        return list(problems)
    answered = {option for note in carried.refused for option in note.answers}
    told = []
    for problem in problems:
        named = re.match(r"--(\w+)", problem)
        name = named[1] if named else ""
        needed = re.search(r" needs --(\w+)", problem)
        if (name in answered and "is missing" in problem) or (needed and needed[1] in answered):
            continue  # what is refused says how to give it
        value = values.get(name)
        if value and value.origin != COMMAND_LINE:
            where = "" if carried.system == OWN else f"{value.origin} "
            problem += f" ({where}in {carried.file})"
        told.append(problem)
    return told


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of all options and the end of the program."""

    def __init__(self) -> None:
        super().__init__(prog="beam-lambda-sink", allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError([message.removeprefix("argument ")])


def _parser() -> argparse.ArgumentParser:
    parser = Parser()
    KafkaLambdaOptions._add_argparse_args(parser)
    return parser


def format_help() -> str:
    """The help text: our options in their groups; Beam's own are only named."""
    lines = ["usage: beam-lambda-sink --OPTION=VALUE ...", ""]
    for group in GROUPS:
        lines += format_group(group)
    lines.append("Beam's own options, --runner among them, are taken too (default: DirectRunner).")
    return "\n".join(lines)


def format_group(group: Group, width: int = 78) -> list[str]:
    """The lines of a group in a help text."""
    lines = [group.title, ""]
    for option in group.options:
        lines.append(f"  --{option.name}")
        text = argparse.HelpFormatter("", width=width)._split_lines(option.help_text, width - 6)
        lines += [f"      {line}" for line in text]
    return [*lines, ""]


def _beam_parser() -> argparse.ArgumentParser:
    parser = Parser()
    for subclass in {cls.__name__: cls for cls in PipelineOptions.__subclasses__()}.values():
        if subclass is not KafkaLambdaOptions:
            subclass._add_argparse_args(parser)  # type: ignore[arg-type]
    return parser


def parse_beam(rest: Sequence[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Beam's options by name, and what neither we nor Beam know. Pure."""
    try:
        beam, unknown = _beam_parser().parse_known_args(list(rest))
    except UsageError as error:
        return None, list(error.problems)
    unknown = [argument for argument in unknown if not _is_flinks(argument)]
    names = [f"--{name}" for name in OPTIONS]
    problems = []
    for before, argument in zip(["", *unknown], unknown):
        if before.startswith("--") and "=" not in before and not argument.startswith("-"):
            continue  # the value of an option that is reported already
        name = argument.split("=", 1)[0]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists all"
        problems.append(f"{name} is not an option{hint}")
    return beam, problems


_FLINK_OPTIONS = frozenset(
    {
        "checkpointing_interval",
        "checkpointing_mode",
        "checkpoint_timeout_millis",
        "execution_mode_for_batch",
        "execution_retry_delay",
        "externalized_checkpoints_enabled",
        "fail_on_checkpointing_errors",
        "finish_bundle_before_checkpointing",
        "flink_conf_dir",
        "latency_tracking_interval",
        "max_bundle_size",
        "max_bundle_time_mills",
        "min_pause_between_checkpoints",
        "num_concurrent_checkpoints",
        "number_of_execution_retries",
        "object_reuse",
        "retain_externalized_checkpoints_on_cancellation",
        "savepoint_path",
        "shutdown_sources_after_idle_ms",
        "state_backend",
        "state_backend_storage_path",
        "tolerable_checkpoint_failure_number",
        "unaligned_checkpoint_enabled",
    }
)
"""Options of Flink's runner that only its Java half knows, by the names that Python gives them."""


def _is_flinks(argument: str) -> bool:
    return argument.startswith("--") and argument[2:].split("=", 1)[0] in _FLINK_OPTIONS


def _runner(rest: Sequence[str]) -> str:
    parser = Parser()
    parser.add_argument("--runner", default="DirectRunner")
    return str(parser.parse_known_args(list(rest))[0].runner)
