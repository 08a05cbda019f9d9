"""Options: declared once, here; the help, the checks and docs/options.md are made from it.

`KafkaLambdaOptions` gives them to Beam. What runs sees only the `Config` that they become.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.options.levels import LEVELS
from transforms import access, envelope, text_file
from transforms.aws import delivery
from transforms.aws.function import FUNCTION, MAX_ASYNC_BYTES, MAX_SYNC_BYTES
from transforms.batch import payload
from transforms.commit.committer import INTERVAL_SECS, REFRESH_SECS
from transforms.decode.decode import ATTRIBUTES, VALUE
from transforms.filter.filter import UNPARSABLE
from transforms.invoke import reply
from transforms.kafka.offsets import AT_TIMESTAMP, LATEST, TRIM_HORIZON
from transforms.kinesis import shards
from transforms.write import destination, formats


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

# The same, without the names of its groups.
STREAM_ARN = re.sub(r"\?P<\w+>", "", shards.STREAM_ARN.pattern)
STREAM_NAME = shards.STREAM_NAME

NO_ATTRIBUTE = "NONE"
EXACTLY_ONCE = "exactly_once"
ACCESS = ("kafka_access", "schema_registry_access")
"""Options with logins, in which somebody may write a secret where the ARN of one belongs."""

_URL = r"https?://[^/@\s]+(/\S*)?"
_TOPIC = "[a-zA-Z0-9._-]{1,249}"
_DESTINATION = re.sub(r"\?P<\w+>", "", delivery.DESTINATION.pattern)
_ROLE = r"arn:aws[a-zA-Z-]*:iam::\d{12}:role/\S+"
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
                "kafka_role_arn",
                "Role to assume for a login to MSK with IAM (sasl.mechanism=AWS_MSK_IAM in "
                "--kafka_config_file), with the credentials of AWS's default chain, or as "
                "--aws_web_identity says. --aws_role_arn is the function's only.",
                example="arn:aws:iam::123456789012:role/read-orders",
                pattern=_ROLE,
            ),
            Option(
                "kafka_access",
                "Logins as an event source mapping names them, TYPE=URI each, comma separated: "
                f"{', '.join(access.KINDS)}. URI is the ARN of a secret in AWS Secrets Manager, or "
                "a text where nothing is secret. Each worker reads the secret itself, and again "
                "when the login is refused. What --kafka_config_file says wins.",
                kind="list",
                pattern="[A-Z0-9_]+(=[^,]+)?",
                example="SASL_SCRAM_512_AUTH=arn:aws:secretsmanager:eu-central-1:123456789012:"
                "secret:AmazonMSK_orders-Ab12Cd",
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
                "Commit offsets at most this often, on the DirectRunner or of streams. A run that "
                "ends commits at once; what was not committed when one crashes is invoked again.",
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
        "Kinesis",
        (
            Option(
                "stream",
                "Kinesis streams to read in place of topics, names or ARNs, comma separated; with "
                "--lease_table in place of --consumer_group. --kafka_bootstrap_servers is needed "
                "only for topics that are written. --starting_position is for a stream of which "
                "the table has nothing, and --filter_unparsable is drop unless given.",
                kind="list",
                example="orders",
                pattern=rf"{STREAM_ARN}|{STREAM_NAME.pattern}",
            ),
            Option(
                "lease_table",
                "DynamoDB table that says how far each shard is done and which process works on "
                "it, in the shape of the Kinesis Client Library. One for each pipeline; it is made "
                "if it is not there. Needed with --stream.",
                example="orders-to-lambda",
                pattern="[a-zA-Z0-9_.-]{3,255}",
            ),
            Option(
                "lease_secs",
                "After how long a shard is taken over whose process is not heard of.",
                kind="float",
                default=10,
                unit="seconds",
                low=1,
                high=300,
            ),
            Option(
                "stream_poll_secs",
                "How often to look for more in a shard that has been read to its end. A shard "
                "allows five reads in a second, to all who read it together.",
                kind="float",
                default=1,
                unit="seconds",
                low=0.2,
                high=60,
            ),
            Option(
                "stream_role_arn",
                "Role to assume for the streams and the lease table, with the credentials of AWS's "
                "default chain, or as --aws_web_identity says. --aws_role_arn is the function's "
                "only.",
                example="arn:aws:iam::123456789012:role/read-orders",
                pattern=_ROLE,
            ),
            Option(
                "kinesis_endpoint_url",
                "Another endpoint than AWS's for the streams, such as a VPC endpoint.",
                example="http://127.0.0.1:4567",
                pattern=_URL,
            ),
            Option(
                "dynamodb_endpoint_url",
                "The same for the lease table.",
                example="http://127.0.0.1:4566",
                pattern=_URL,
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
                pattern=_ROLE,
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
                pattern=_URL,
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
                "EventBridge Pipes, kinesis_event as a mapping of a stream.",
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
                "invoke_identity_arn",
                "What kinesis_event says to be the role that invokes the function.",
                example="arn:aws:iam::123456789012:role/invoke-orders",
                pattern=_ROLE,
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
                "schema_registry_access",
                "Logins of the registry as an event source mapping names them, TYPE=URI each, "
                f"comma separated: {', '.join(access.REGISTRY_KINDS)}. URI is the ARN of a secret "
                "in AWS Secrets Manager.",
                kind="list",
                pattern="[A-Z_]+=[^,]+",
                example="BASIC_AUTH=arn:aws:secretsmanager:eu-central-1:123456789012:secret:"
                "registry-Ab12Cd",
            ),
            Option(
                "schema_validation",
                "Which of KEY and VALUE name a schema, comma separated: they are checked and "
                "decoded, and a record that does not fit becomes an error record. NONE uses the "
                "registry for what is written only.",
                kind="list",
                default=(VALUE,),
                choices=(*ATTRIBUTES, NO_ATTRIBUTE),
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
                "on_failure_destination",
                "Where a document about each failed batch goes, as an event source mapping sends "
                "it: ARN of an SQS queue, an SNS topic or an S3 bucket (there with the event), or "
                "kafka://TOPIC for error records in a topic. In place of --error_topic, with "
                "--on_error=log, and with the function's credentials. What is not taken within a "
                "minute ends the run.",
                example="arn:aws:sqs:eu-central-1:123456789012:orders-failed",
                pattern=rf"kafka://{_TOPIC}|{_DESTINATION}",
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
                "delivery",
                "exactly_once writes responses, error records and the group's offsets in one Kafka "
                "transaction: who reads with isolation.level=read_committed sees what became of "
                "each record once, whatever crashes. The function may still be invoked twice with "
                "a record. On the DirectRunner, with all topics in one cluster.",
                kind="choice",
                default="at_least_once",
                choices=("at_least_once", EXACTLY_ONCE),
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
        "Watching",
        (
            Option(
                "http",
                "Answer at HOST:PORT for the run: a page at /, /metrics for Prometheus, /livez and "
                "/readyz for Kubernetes, /api/status and /version. PORT alone listens for this "
                "machine only, at 127.0.0.1; give 0.0.0.0:PORT for others, who can then read it.",
                example="127.0.0.1:9464",
                pattern=r"((\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]*):)?\d{1,5}",
            ),
            Option(
                "http_token_file",
                "File with the token that whoever tells the run to do something over --http has to "
                "give; else the environment variable BEAM_LAMBDA_SINK_TOKEN. Without a token "
                "nobody can tell it anything.",
                example="/run/secrets/beam-lambda-sink/token",
            ),
            Option(
                "page_show",
                "What the page and /api/status show besides places, types and numbers: messages "
                "are those of failures, in which a function may quote its records.",
                kind="choice",
                default="none",
                choices=("none", "messages"),
            ),
            Option(
                "report",
                "File to write the page to when the run ends, with its plots of the last 15 "
                "minutes, as one file for a browser.",
                example="run.html",
            ),
            Option(
                "metrics_partitions",
                "Metrics have each partition's lag by itself as long as there are not more "
                "partitions than that; each topic's they have always.",
                kind="int",
                default=100,
                unit="partitions",
                low=0,
                high=10000,
            ),
        ),
    ),
    Group(
        "Running",
        (
            Option(
                "workers",
                "Processes of the DirectRunner, each a member of the consumer group: about one "
                "for each processor, not more than there are partitions. Each takes some 150 MB of "
                "memory more. Together they invoke --max_concurrency at once, at most.",
                kind="int",
                default=1,
                unit="processes",
                low=1,
                high=64,
            ),
            Option(
                "max_workers",
                "Processes at most: looked at each minute, there are more while more and more "
                "records wait and the machine has processors to spare, and fewer again, down to "
                "--workers, when there is little to do. Not given: as many as --workers says.",
                kind="int",
                unit="processes",
                low=1,
                high=64,
            ),
            Option(
                "rebalance_wait_secs",
                "How long to wait for running invocations when the consumer group moves their "
                "partition to another member, on the DirectRunner. What has not ended then is left "
                "to the next owner, which may invoke with the same records. By default as long as "
                "--function_timeout_secs and the group (max.poll.interval.ms) allow.",
                kind="float",
                unit="seconds",
                low=0,
                high=3600,
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
                "start_paused",
                "Read and invoke nothing before it is resumed over --http, on the DirectRunner.",
                kind="flag",
                default=False,
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
            Option(
                "trace",
                "Trace batches and invocations with OpenTelemetry; otlp sends spans where the "
                "OTEL_* environment variables say, and needs the extra otel. Functions, responses "
                "and error records are told the trace.",
                kind="choice",
                choices=("otlp",),
            ),
            Option(
                "log_level",
                "From which level on lines are logged. With DEBUG each partition's offsets are "
                "logged once a minute, too.",
                kind="choice",
                default="INFO",
                choices=LEVELS,
            ),
        ),
    ),
)

DIRECT_RUNNERS = ("DirectRunner", "direct")
FLINK_RUNNERS = ("FlinkRunner", "PortableRunner")
DATAFLOW_RUNNER = "DataflowRunner"
STREAM_RUNNERS = (*FLINK_RUNNERS, DATAFLOW_RUNNER)

OF_TOPICS = ("kafka_bootstrap_servers", "consumer_group")
"""Required where topics are read; with a stream for topics that are written, or not at all."""

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
