"""Options: declared once, here; the help, the checks and docs/options.md are made from it.

`KafkaLambdaOptions` gives them to Beam. Everything behind `main` sees only the `Config` they
become, made of the steps' own frozen values.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions

from transforms import formats, payload
from transforms.aws import FUNCTION, MAX_ASYNC_BYTES, MAX_SYNC_BYTES, FunctionConfig
from transforms.batch import BatchConfig
from transforms.errors import UsageError
from transforms.invoke import InvokeConfig
from transforms.kafka import KafkaConfig, load_properties
from transforms.payload import PayloadFormat
from transforms.read import ReadConfig
from transforms.retry import RetryPolicy
from transforms.write import WriteConfig

TRIM_HORIZON, LATEST, AT_TIMESTAMP = "TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"


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

    @property
    def range(self) -> str:
        """What values are allowed, in words."""
        if self.kind == "choice":
            return " | ".join(self.choices)
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

GROUPS = (
    Group(
        "Source",
        (
            Option(
                "kafka_bootstrap_servers",
                "Kafka brokers to begin with, as a comma separated host:port list. Required.",
                example="broker-1:9092,broker-2:9092",
            ),
            Option(
                "kafka_config_file",
                "Properties file with settings for the Kafka clients (SASL, TLS, anything "
                "librdkafka takes). Names that begin with response. or error. are for the producer "
                "of that topic. ${env:NAME} is replaced by the environment variable NAME.",
                example="kafka.properties",
            ),
            Option(
                "topics",
                "Topics to read, comma separated. Exactly one of --topics and --topics_regex.",
                kind="list",
                example="orders,payments",
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
                "starting_position",
                "Where to begin with a partition for which the group has no committed offset: at "
                "its first record, behind its last one, or at --starting_timestamp.",
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
        "Function",
        (
            Option(
                "function",
                "Function to invoke: a name, name:version, name:alias, or an ARN. Required.",
                example="process-orders:live",
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
                "Role to assume, with the credentials of AWS's default chain.",
                example="arn:aws:iam::123456789012:role/invoke-orders",
            ),
            Option(
                "lambda_endpoint_url",
                "Another endpoint than AWS's, such as a local Lambda or a VPC endpoint.",
                example="http://127.0.0.1:9200",
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
                "max_concurrency",
                "Invocations at once, over all partitions; inside a partition there is one.",
                kind="int",
                default=100,
                unit="invocations",
                low=1,
                high=1000,
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
        ),
    ),
    Group(
        "Output",
        (
            Option(
                "response_topic",
                "Topic for the function's results, one record each. Not given: replies are not "
                "looked at.",
                example="orders-results",
            ),
            Option(
                "error_topic",
                "Topic for the error records of --on_error=log.",
                example="orders-errors",
            ),
            Option(
                "response_format",
                "json, json_schema (with Connect's schema envelope) or string (as Connect's "
                "StringConverter prints it).",
                kind="choice",
                default="json",
                choices=formats.FORMATS,
            ),
            Option(
                "error_format",
                "The same for error records.",
                kind="choice",
                default="json",
                choices=formats.FORMATS,
            ),
        ),
    ),
    Group(
        "Running",
        (
            Option(
                "preflight",
                "Check the topics and, with a DryRun invocation, the function before anything is "
                "read. --no_preflight switches it off.",
                kind="flag",
                default=True,
            ),
            Option(
                "until",
                "forever runs until SIGTERM or SIGINT; caught_up ends when all that was in the "
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
        topics: Topics by name, or empty with a regex.
        topics_regex: Regex for whole topic names, or None.
        starting_position: For partitions without a committed offset.
        starting_timestamp_ms: With AT_TIMESTAMP.
        preflight: Whether to check topics and function first.
        until: ``forever`` or ``caught_up``.
        summary: ``text``, ``json`` or ``none``.
        log_format: ``text`` or ``json``.
    """

    topics: tuple[str, ...]
    topics_regex: str | None
    starting_position: str
    starting_timestamp_ms: int | None
    preflight: bool
    until: str
    summary: str
    log_format: str


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the pipeline needs, one frozen value per step."""

    kafka: KafkaConfig
    read: ReadConfig
    batch: BatchConfig
    invoke: InvokeConfig
    write: WriteConfig
    run: RunConfig

    @staticmethod
    def from_options(given: dict[str, str | None], now: datetime | None = None) -> Config:
        """Check all options together and make the steps' values of them.

        Args:
            given: By name, the text given, None where nothing was.
            now: The time, for the check of --starting_timestamp.

        Raises:
            UsageError: With every problem found.
        """
        problems: list[str] = []
        values = {
            name: _parse(option, given.get(name), problems) for name, option in OPTIONS.items()
        }
        _check_together(values, given, now or datetime.now(timezone.utc), problems)
        settings: dict[str, str] = {}
        if values["kafka_config_file"]:
            try:
                settings = load_properties(values["kafka_config_file"])
            except UsageError as error:
                problems += error.problems
        if problems:
            raise UsageError(problems)
        return _make_config(values, settings)


def _parse(option: Option, text: str | None, problems: list[str]) -> Any:
    """The option's value, or None with a problem noted."""
    if text is None:
        return option.default
    if option.kind == "text":
        if not text:
            problems.append(f"--{option.name} is empty; leave it out, or give it a value")
        return text
    if option.kind == "list":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if option.kind == "choice":
        if text in option.choices:
            return text
    elif option.kind == "flag":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    else:
        try:
            number = int(text) if option.kind == "int" else float(text)
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


_SERVERS = re.compile(r"[^,:\s]+:\d{1,5}(,[^,:\s]+:\d{1,5})*|(\[[0-9a-fA-F:]+\]:\d{1,5},?)+")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def _check_together(
    values: dict[str, Any], given: dict[str, str | None], now: datetime, problems: list[str]
) -> None:
    for name in ("kafka_bootstrap_servers", "consumer_group", "function"):
        if given.get(name) is None:
            problems.append(f"--{name} is missing; for example --{name}={OPTIONS[name].example}")
    servers = values["kafka_bootstrap_servers"]
    if servers and not _SERVERS.fullmatch(servers):
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
        if not _TOPIC.fullmatch(topic):
            problems.append(f"--{name}={topic} is not a topic name (letters, digits, . _ -)")
        if topic in (topics or ()) or (pattern and pattern.fullmatch(topic)):
            problems.append(
                f"--{name}={topic} is also read from (--topics{'_regex' if regex else ''}): the "
                f"pipeline would feed on its own output; write to another topic"
            )
    for topic in topics or ():
        if not _TOPIC.fullmatch(topic):
            problems.append(
                f"--topics: {topic} is not a topic name (letters, digits, . _ -); for a pattern "
                f"use --topics_regex"
            )
    function = values["function"]
    if function and not FUNCTION.fullmatch(function):
        problems.append(
            f"--function={function} is not a function name, name:version, name:alias or ARN"
        )
    endpoint = values["lambda_endpoint_url"]
    if endpoint and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
        problems.append(f"--lambda_endpoint_url={endpoint} is not an http:// or https:// address")
    role = values["aws_role_arn"]
    if role and not re.fullmatch(r"arn:aws[a-zA-Z-]*:iam::\d{12}:role/\S+", role):
        problems.append(f"--aws_role_arn={role} is not the ARN of a role")
    if values["invocation_type"] == "async":
        if values["response_topic"]:
            problems.append(
                "--response_topic needs --invocation_type=sync: async invocations have no reply"
            )
        if (values["batch_bytes"] or 0) > MAX_ASYNC_BYTES:
            problems.append(
                f"--batch_bytes={values['batch_bytes']} is above the limit of async invocations, "
                f"{MAX_ASYNC_BYTES}"
            )
    _check_start(values, now, problems)


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


def _make_config(values: dict[str, Any], settings: dict[str, str]) -> Config:
    sync = values["invocation_type"] == "sync"
    batch_bytes = values["batch_bytes"] or (MAX_SYNC_BYTES if sync else MAX_ASYNC_BYTES)
    kafka = KafkaConfig(
        values["kafka_bootstrap_servers"], values["consumer_group"], values["kafka_config_file"]
    )
    start = values["starting_timestamp"]
    moment = parse_timestamp(start) if start else None
    limit = settings.get("error.message.max.bytes", settings.get("message.max.bytes", ""))
    max_error_bytes = int(limit) if limit.isdecimal() else 1_000_000
    return Config(
        kafka=kafka,
        read=ReadConfig(kafka, values["batch_size"], batch_bytes, values["batch_window_secs"]),
        batch=BatchConfig(
            values["batch_size"],
            batch_bytes,
            PayloadFormat(values["key_format"], values["value_format"], values["include_headers"]),
        ),
        invoke=InvokeConfig(
            FunctionConfig(
                function=values["function"],
                invocation_type=values["invocation_type"],
                region=values["aws_region"],
                role_arn=values["aws_role_arn"],
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
                halt=values["on_error"] == "fail",
            ),
            check_reply=sync and bool(values["response_topic"]),
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
        ),
        run=RunConfig(
            topics=values["topics"] or (),
            topics_regex=values["topics_regex"],
            starting_position=values["starting_position"],
            # Below 0 are numbers that mean something else to Kafka.
            starting_timestamp_ms=max(0, int(moment.timestamp() * 1000)) if moment else None,
            preflight=values["preflight"],
            until=values["until"],
            summary=values["summary"],
            log_format=values["log_format"],
        ),
    )


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read the command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The checked options, and the name of the runner.

    Raises:
        UsageError: With every problem found, options nobody knows among them.
    """
    ours, rest = _parser().parse_known_args(arguments)
    problems = _unknown(rest)
    try:
        config = Config.from_options(vars(ours))
    except UsageError as error:
        problems += error.problems
    if problems:
        raise UsageError(problems)
    runner = _runner(rest)
    return config, runner


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of all options and the end of the program."""

    def __init__(self) -> None:
        super().__init__(prog="beam-lambda-sink", allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError([message.removeprefix("argument ")])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser()
    KafkaLambdaOptions._add_argparse_args(parser)
    return parser


def format_help() -> str:
    """The help text: our options in their groups; Beam's own are only named."""
    lines = ["usage: beam-lambda-sink --OPTION=VALUE ...", ""]
    width = 78
    for group in GROUPS:
        lines += [group.title, ""]
        for option in group.options:
            lines.append(f"  --{option.name}")
            text = argparse.HelpFormatter("", width=width)._split_lines(option.help_text, width - 6)
            lines += [f"      {line}" for line in text]
        lines.append("")
    lines.append("Beam's own options, --runner among them, are taken too (default: DirectRunner).")
    return "\n".join(lines)


def _beam_parser() -> argparse.ArgumentParser:
    parser = _Parser()
    for subclass in {cls.__name__: cls for cls in PipelineOptions.__subclasses__()}.values():
        if subclass is not KafkaLambdaOptions:
            subclass._add_argparse_args(parser)  # type: ignore[arg-type]
    return parser


def _unknown(rest: Sequence[str]) -> list[str]:
    """What neither we nor Beam know; a misspelt option must not be passed over."""
    try:
        unknown = _beam_parser().parse_known_args(list(rest))[1]
    except UsageError as error:
        return list(error.problems)
    names = [f"--{name}" for name in OPTIONS]
    problems = []
    for before, argument in zip(["", *unknown], unknown):
        if before.startswith("--") and "=" not in before and not argument.startswith("-"):
            continue  # the value of an option that is reported already
        name = argument.split("=", 1)[0]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists all"
        problems.append(f"{name} is not an option{hint}")
    return problems


def _runner(rest: Sequence[str]) -> str:
    parser = _Parser()
    parser.add_argument("--runner", default="DirectRunner")
    return str(parser.parse_known_args(list(rest))[0].runner)
