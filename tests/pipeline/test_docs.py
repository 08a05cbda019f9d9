"""The documents say what the code does: steps, options, commands, examples, links."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import orjson
import pytest

import transforms
from pipeline import docs
from pipeline.local.lambda_server import ClientContext, LambdaContext
from pipeline.offsets.command import GROUP as OFFSETS_OPTIONS
from pipeline.options.declare import OPTIONS
from pipeline.options.resolve import _FLINK_OPTIONS, _beam_parser, parse_arguments
from pipeline.redrive.command import GROUP as REDRIVE_OPTIONS
from pipeline.watch import ctl
from tests import ROOT
from transforms.batch.payload import PayloadFormat, encode_records
from transforms.conditions import CONDITIONS, RESPONSE_REFUSED, SKIPPED
from transforms.decode import decode
from transforms.envelope import Envelope
from transforms.filter.filter import (
    FIELDS,
    UNPARSABLE,
    FilterConfig,
    RecordFilter,
    load_criteria,
    parse_criteria,
)
from transforms.filter.rules import OPERATORS, all_fields, field, loads_exactly
from transforms.invoke import retry
from transforms.invoke.client_context import client_context
from transforms.invoke.reply import parse_failures, parse_reply
from transforms.invoke.retry import Call
from transforms.lanes import Lanes
from transforms.original import HEADER_PREFIX, ORIGINAL_SCHEMA, decode_original, encode_originals
from transforms.records import ARRAY, NO_TIMESTAMP, Batch, Failure, Records
from transforms.schemas.registry import RegistryConfig, registry_settings
from transforms.schemas.schema import AVRO, CONNECT, PROTOBUF, STANDARD, SchemaText
from transforms.write.destination import destination_records
from transforms.write.formats import (
    FORMATS,
    error_records,
    error_schemas,
    least_error_record,
    response_keys,
    response_schemas,
    response_values,
)

README = ROOT / "README.md"
COMING_FROM = ROOT / "docs" / "coming-from.md"
CONCURRENCY = ROOT / "docs" / "concurrency.md"
ERROR_RECORDS = ROOT / "docs" / "error-records.md"
SCHEMA_PAGE = ROOT / "docs" / "schema-registry.md"
ENVELOPE_PAGE = ROOT / "docs" / "envelopes.md"
FILTER_PAGE = ROOT / "docs" / "filters.md"
TEMPLATE_PAGE = ROOT / "templates" / "dataflow" / "README.md"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "templates" / "README.md",
    TEMPLATE_PAGE,
]

# Options of other programs, and Beam's own.
FOREIGN = {"runner", "flink_master", "help", "fast", "faults", "check", "uuid", "source"}
DATAFLOWS = {
    "project",
    "region",
    "job_name",
    "temp_location",
    "sdk_container_image",
    "setup_file",
    "streaming",
    "dataflow_service_options",
    "update",
    "dry_run",
}
GCLOUD = {"print", "repository", "location", "data", "role", "member", "format"}
SHELL = {"summary", "system", "wheel", "now", "no", "from", "values"}

parametrize_pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def blocks(page: Path, language: str, after: str = "") -> list[str]:
    """The code blocks of a language, those behind a mark only if one is given."""
    text = page.read_text(encoding="utf-8")
    if after:
        mark = f"<!-- {after} -->"
        assert mark in text
        text = text.partition(mark)[2]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# What a run of an example in a test has its own of.
OURS = {
    "kafka_bootstrap_servers",
    "topics",
    "consumer_group",
    "function",
    "lambda_endpoint_url",
    "response_topic",
    "error_topic",
}


def example(page: Path, after: str) -> dict[str, Any]:
    """The options of an example's command line, those left out that name servers and topics."""
    words = blocks(page, "sh", after)[0].replace("\\\n", " ").split()[2:]
    given = [word.removeprefix("--").partition("=") for word in words]
    return {name: value or True for name, _, value in given if name not in OURS}


def rows(page: Path, after: str) -> list[list[str]]:
    """The cells of the first table behind a mark, without its head; code without its ticks."""
    text = page.read_text(encoding="utf-8").partition(f"<!-- {after} -->\n")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    assert lines
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


# -- steps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Those that are always there, and their files."""
    return docs.steps()


def test_the_diagram_has_the_pipelines_steps(steps: list[tuple[str, str]]) -> None:
    (diagram,) = blocks(README, "mermaid")
    (chain,) = re.findall(r"^\s*subgraph pipeline\n\s*(.*)\n\s*end$", diagram, re.MULTILINE)
    assert chain.split(" --> ") == [label for label, _ in steps]


def test_the_table_of_the_transforms_has_the_pipelines_steps(steps: list[tuple[str, str]]) -> None:
    rows = re.findall(r"^(\w+) +(transforms/\w+/\w+\.py) ", transforms.__doc__ or "", re.MULTILINE)
    assert rows == steps


def test_each_step_is_in_the_folder_of_its_name_or_of_the_step_it_prepares(
    steps: list[tuple[str, str]],
) -> None:
    """So that a record can be followed by opening one file a step."""
    rooms = {label: Path(file).parent.name for label, file in steps}
    assert rooms.pop("Key") == "batch"
    assert {label.lower() for label in rooms} == set(rooms.values())


def test_every_folder_says_what_lives_there() -> None:
    for package in ("transforms", "pipeline"):
        for folder in (ROOT / package).iterdir():
            if (folder / "__init__.py").is_file():
                (line, *_) = (folder / "__init__.py").read_text(encoding="utf-8").splitlines()
                assert re.match(r'"""[A-Z][\w ,]+: .{20}', line), folder


# -- options, commands, links ----------------------------------------------------------------------


def test_what_is_made_from_the_options_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().err


def test_the_check_names_stale_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And writing makes them fresh, without touching what is around the table."""
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    readme = tmp_path / docs.README
    readme.write_text("before\n<!-- options -->\nold\n<!-- /options -->\nafter\n")
    coming_from = (ROOT / docs.COMING_FROM).read_text(encoding="utf-8")
    (tmp_path / docs.COMING_FROM).write_text(coming_from.replace("| `name` |", "| `old` |"))
    (tmp_path / docs.REDRIVE).write_text("<!-- options -->\n<!-- /options -->")
    architecture = (ROOT / docs.ARCHITECTURE).read_text(encoding="utf-8")
    (tmp_path / docs.ARCHITECTURE).write_text(architecture.replace("| Read |", "| Old |"))
    template = (ROOT / docs.TEMPLATE).read_text(encoding="utf-8")
    (tmp_path / docs.TEMPLATE).parent.mkdir(parents=True)
    (tmp_path / docs.TEMPLATE).write_text(template.replace("| `topics` |", "| `old` |"))
    chart = (ROOT / docs.CHART).read_text(encoding="utf-8")
    (tmp_path / docs.CHART).parent.mkdir(parents=True)
    (tmp_path / docs.CHART).write_text(chart.replace('"batch_size"', '"old"'))

    assert docs.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert docs.README in said and docs.OPTIONS in said and docs.COMING_FROM in said
    assert docs.METADATA in said and docs.TEMPLATE in said and docs.ARCHITECTURE in said
    assert docs.CHART in said
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")
    assert (tmp_path / docs.COMING_FROM).read_text() == coming_from
    assert (tmp_path / docs.TEMPLATE).read_text() == template
    assert (tmp_path / docs.CHART).read_text() == chart
    assert json.loads((tmp_path / docs.METADATA).read_text())["parameters"]


def test_every_option_is_on_the_page() -> None:
    page = (ROOT / docs.OPTIONS).read_text(encoding="utf-8")
    assert re.findall(r"^### `--(\w+)`$", page, re.MULTILINE) == list(OPTIONS)


# Of ./run.sh bench, and of what stands beside it in tests/bench.
BENCHS = {"flink_option", "latency", "mended", "only", "quick", "records", "repeat", "streams"}


@parametrize_pages
def test_every_named_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
    switches = {f"no_{name}" for name, option in OPTIONS.items() if option.kind == "flag"}
    known = set(OPTIONS) | switches | FOREIGN
    known |= {option.name for option in REDRIVE_OPTIONS.options} | BENCHS
    known |= {option.name for option in OFFSETS_OPTIONS.options} | ctl.options()
    if page.parent.name == "templates":
        known |= SHELL
    if re.search("Flink|Beam's", text):
        beams = {name for action in _beam_parser()._actions for name in action.option_strings}
        known |= {name.removeprefix("--") for name in beams} | _FLINK_OPTIONS | {"worker_pool"}
    if "ataflow" in text:
        known |= DATAFLOWS
    if page == TEMPLATE_PAGE:
        known |= GCLOUD
    assert named <= known


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that commands in the documents name, as the documents have them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kafka.properties").touch()
    for name, language in (
        ("connector.json", "json"),
        ("mapping.json", "json"),
        ("options.yaml", "yaml"),
    ):
        content = blocks(COMING_FROM, language, after=name)[0]
        (tmp_path / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    [README, COMING_FROM, CONCURRENCY, ENVELOPE_PAGE, SCHEMA_PAGE],
    ids=lambda page: page.name,
)
def test_an_example_is_a_command_line_that_fits(page: Path, files: None) -> None:
    """The options of `./run.sh run` in it are taken together, as the program would."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    runs = [line.split() for line in lines if line.startswith("./run.sh run ")]
    for run in runs:
        parse_arguments(run[2:])
    assert runs


def test_the_options_in_a_file_are_a_run(files: None) -> None:
    """The YAML of the docs needs no other option."""
    config, _ = parse_arguments(["--config=options.yaml"])
    assert config.source.topics == ("orders", "payments")


@parametrize_pages
def test_every_named_command_exists(page: Path) -> None:
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    usage = script.partition("<<'END'")[2].partition("\nEND\n")[0]
    commands = re.findall(r"^  (\w+) ", usage, re.MULTILINE)
    named = re.findall(r"\./run\.sh ([a-z]\w*)", page.read_text(encoding="utf-8"))
    assert set(named) <= set(commands)


@parametrize_pages
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@parametrize_pages
def test_every_json_example_is_json(page: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)


# -- examples --------------------------------------------------------------------------------------


def test_the_payload_in_the_readme_is_what_the_function_gets() -> None:
    payload = json.loads(blocks(README, "json")[0])
    records = Records(
        offsets=[41, 43],
        timestamps=[1793000000000, 1793000000250],
        keys=[b"c-7", None],
        values=[b'{"id": 41, "amount": 12.5}', b"not JSON"],
        headers=[None, None],
    )
    encoded = encode_records("orders", 3, records, PayloadFormat())
    assert payload == json.loads(ARRAY.join(encoded.entries))


def test_the_function_in_the_readme_makes_the_reply_beside_it() -> None:
    payload, reply = map(json.loads, blocks(README, "json")[:2])
    (handler,) = blocks(README, "python")
    module: dict[str, Any] = {}
    exec(handler, module)
    answered = module["handler"](payload, None)
    assert answered == reply
    assert len(parse_reply(orjson.dumps(answered), "orders", 3, [41, 43])) == 2


_SERVERS = "broker-1:9092,broker-2:9092"
_SENT = Records(
    offsets=[41, 43],
    timestamps=[1793000000000, 1793000000250],
    keys=[b"c-7", None],
    values=[b'{"id": 41}', b"not JSON"],
    headers=[[("trace", "a\u00eb".encode())], None],
)


@pytest.mark.parametrize("name", ["kafka_event", "pipes"])
def test_an_envelope_in_the_docs_is_what_the_function_gets(name: str) -> None:
    envelope = Envelope(name, _SERVERS)
    entries = encode_records("orders", 3, _SENT, PayloadFormat(envelope=envelope)).entries
    shown = blocks(ENVELOPE_PAGE, "json", after=name)[0]
    assert json.loads(shown) == json.loads(envelope.frame("orders", 3).join(entries))


def test_the_event_of_msk_in_the_docs_has_what_is_around_its_records() -> None:
    arn = OPTIONS["event_source_arn"].example
    frame = Envelope("kafka_event", _SERVERS, arn).frame("orders", 3)
    assert json.loads(blocks(ENVELOPE_PAGE, "json", after="kafka_event of MSK")[0]) == json.loads(
        frame.join([])
    )


def test_the_function_in_the_docs_reads_the_event_beside_it() -> None:
    event = json.loads(blocks(ENVELOPE_PAGE, "json", after="kafka_event")[0])
    module: dict[str, Any] = {}
    exec(blocks(ENVELOPE_PAGE, "python")[0], module)
    assert module["handler"](event, None) == json.loads(blocks(ENVELOPE_PAGE, "json")[2])


def test_the_function_in_the_docs_names_what_failed() -> None:
    event = json.loads(blocks(ENVELOPE_PAGE, "json", after="kafka_event")[0])
    module: dict[str, Any] = {}
    exec(blocks(ENVELOPE_PAGE, "python")[1], module)
    reply = module["handler"](event, None)
    assert reply == json.loads(blocks(ENVELOPE_PAGE, "json", after="batch_item_failures")[0])
    assert parse_failures(orjson.dumps(reply), "orders", 3, [41, 43]) == [1]


def test_the_client_context_in_the_docs_is_what_the_function_is_told() -> None:
    entries = encode_records("orders", 3, _SENT, PayloadFormat()).entries
    batch = Batch("orders", 3, 41, 44, _SENT, entries)
    context = json.loads(b64decode(client_context(batch, Call(0, 2, 2, "ValueError"))))
    assert context["custom"] == json.loads(blocks(ENVELOPE_PAGE, "json", after="client context")[0])


def test_the_function_in_the_docs_does_its_work_once(capsys: pytest.CaptureFixture[str]) -> None:
    module: dict[str, Any] = {}
    exec(blocks(ENVELOPE_PAGE, "python", after="client context")[0], module)
    context = ClientContext(
        custom=json.loads(blocks(ENVELOPE_PAGE, "json", after="client context")[0])
    )
    event = [{"payload": {"offset": offset, "value": "v"}} for offset in (41, 43)]
    for sent in (event[:1], event, event):
        module["handler"](sent, LambdaContext("r", "f", "1", "arn", 0.0, context))
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["41:", "43:"]


_RECORDS = Records([41], [1793000000000], [b"c-7"], [b'{"amount":12.50}'], [[("trace", b"\x00")]])


def _failure(**facts: Any) -> Failure:
    entries = encode_records("orders", 3, _RECORDS, PayloadFormat()).entries
    whole: dict[str, Any] = {
        "condition": retry.RETRIES_EXHAUSTED,
        "error_type": "ValueError",
        "message": "amount",
        "attempts": 1,
        "status_code": 200,
        "function_error": "Unhandled",
        "log_result": "YW1vdW50",
        "payload": '{"errorMessage":"amount","errorType":"ValueError"}',
    }
    return Failure(_RECORDS, entries, **(whole | facts))


def _error(part: str) -> Callable[[str], bytes]:
    def write(format: str) -> bytes:
        written = error_records("orders", 3, _failure(), "process-orders:live", format, 10**6)
        ((_, record),) = written
        return getattr(record, part)

    return write


def _response_value(format: str) -> bytes:
    result = b'{"topic":"orders","partition":3,"offset":41,"result":{"total":12.50}}'
    return response_values([result], format)[0]


@pytest.mark.parametrize(
    ("mark", "write"),
    [
        ("response key", lambda format: response_keys("orders", 3, [41], format)[0]),
        ("response value", _response_value),
        ("error key", _error("key")),
        ("error value", _error("value")),
    ],
)
def test_the_records_in_the_docs_are_what_is_written(
    mark: str, write: Callable[[str], bytes]
) -> None:
    written = {format: write(format).decode() for format in FORMATS}
    plain, with_schema = blocks(ERROR_RECORDS, "json", after=mark)[:2]
    assert json.loads(plain) == json.loads(written["json"])
    assert json.loads(with_schema) == json.loads(written["json_schema"])
    if mark == "response value":
        assert written["string"] == written["json"]
    else:
        assert blocks(ERROR_RECORDS, "text", after=mark)[0] == written["string"] + "\n"


def test_the_error_record_of_aws_in_the_docs_is_what_is_written() -> None:
    shown = json.loads(blocks(ERROR_RECORDS, "json", after="aws error value")[0])
    failure = _failure(executed_version="7", request_id=shown["requestContext"]["requestId"])
    event = Envelope("kafka_event", _SERVERS)
    ((_, record),) = destination_records(
        "orders",
        3,
        failure,
        "process-orders:live",
        event,
        max_bytes=10**6,
        now_ms=1793000005500,
    )
    assert json.loads(record.value) == shown


def test_the_error_record_in_the_readme_has_the_fields_that_are_written() -> None:
    key, value = map(json.loads, blocks(README, "json")[2:4])
    assert list(key) == list(json.loads(_error("key")("json")))
    assert list(value) == list(json.loads(_error("value")("json")))
    (entry,) = json.loads(value["inputPayload"])
    assert entry["payload"]["offset"] == key["startOffset"]


def test_every_header_and_condition_is_in_the_docs() -> None:
    page = ERROR_RECORDS.read_text(encoding="utf-8")
    named = set(re.findall(rf"^\| `({HEADER_PREFIX}[\w.]+)` \|", page, re.MULTILINE))
    failure = _failure(executed_version="7", request_id="id")
    # Too small for what was sent and what came back, so that the headers that say so are there too.
    long = _failure(executed_version="7", request_id="id", payload="x" * 20_000)
    ((_, record),) = error_records("orders", 3, long, "f", "json", 1)
    least = least_error_record("orders", 3, failure, "f", "json", with_original=False)
    assert named == {name for name, _ in (*record.headers, *least.headers)}

    listed = page.partition("| condition |")[2].partition("\n\n")[0]
    conditions = set(re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE))
    text = Records([1], [NO_TIMESTAMP], [None], [b"text"], [None])
    rejected = encode_records("t", 0, text, PayloadFormat(value="json")).rejections[0]
    assert conditions == set(CONDITIONS)
    assert conditions == {
        retry.RETRIES_EXHAUSTED,
        retry.AGE_EXCEEDED,
        retry.SIZE_EXCEEDED,
        retry.INVALID_REPLY,
        retry.INVALID_CONTENT,
        RESPONSE_REFUSED,
        SKIPPED,
        rejected.condition,
        decode.SCHEMA_NOT_FOUND,
        decode.DESERIALIZATION_ERROR,
    }


class _Message:
    """An error record as confluent-kafka would hand it over."""

    def __init__(self, headers: list[tuple[str, bytes]]) -> None:
        self._headers = headers

    def headers(self) -> list[tuple[str, bytes]]:
        return self._headers


class _Producer:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def produce(self, *arguments: Any, headers: list[tuple[str, bytes | None]]) -> None:
        self.sent.append((*arguments, headers))


def test_the_snippet_reads_the_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the schema of the docs, which is the one they are written with."""
    schema = blocks(ERROR_RECORDS, "json", after="original.avsc")[0]
    canonical = fastavro.schema.to_parsing_canonical_form
    assert canonical(json.loads(schema)) == canonical(ORIGINAL_SCHEMA)
    (tmp_path / "original.avsc").write_text(schema, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(ERROR_RECORDS, "python")
    module: dict[str, Any] = {}
    exec(snippet, module)
    records = Records(
        [41, 43],
        [1793000000000, NO_TIMESTAMP],
        [b"\xff\x00", None],
        [None, b"{}"],
        [None, [("trace", b"\x01"), ("trace", None)]],
    )
    originals = encode_originals("orders", 3, records)
    headers = [(f"{HEADER_PREFIX}attempts", b"1")]
    message = _Message([*headers, *(("lambda.original", original) for original in originals)])

    read = module["original_records"](message)
    assert read == [decode_original(original) for original in originals]
    assert [record["offset"] for record in read] == [41, 43]

    producer = _Producer()
    module["send_again"](producer, message)
    assert producer.sent == [
        ("orders", None, b"\xff\x00", 3, []),
        ("orders", b"{}", None, 3, [("trace", b"\x01"), ("trace", None)]),
    ]


# -- filters ---------------------------------------------------------------------------------------


def _outcome(patterns: tuple[str, ...], mode: str, record: Records, topic: str = "orders") -> str:
    record_filter = RecordFilter(FilterConfig(patterns, mode))
    (goes_on,), rejections = record_filter.choose(topic, 0, record)
    return "error" if rejections else "sent" if goes_on else "filtered"


def _record(value: str, headers: Sequence[tuple[str, bytes]] = ()) -> Records:
    return Records([0], [1793000000000], [None], [value.encode()], [list(headers)])


def test_the_filters_of_the_docs_send_what_is_said(tmp_path: Path) -> None:
    file = tmp_path / "filters.json"
    file.write_text(blocks(FILTER_PAGE, "json", after="filters.json")[0], encoding="utf-8")
    patterns = load_criteria(str(file))
    for value, source, outcome in rows(FILTER_PAGE, "sent"):
        headers = [("source", codes(source)[0].encode())]
        record = _record(codes(value)[0], headers)
        assert outcome.startswith(_outcome(patterns, "pass", record)), value


def test_the_rules_of_the_docs_match_what_is_said() -> None:
    """And all operators are there."""
    said = rows(FILTER_PAGE, "rules")
    for rules, right, wrong in said:
        test = all_fields({"f": loads_exactly(codes(rules)[0])}, "", field)
        assert codes(right) and codes(wrong)
        assert all(test({"f": loads_exactly(node)}) for node in codes(right)), rules
        assert not any(test({"f": loads_exactly(node)}) for node in codes(wrong)), rules
    page = " ".join(rules for rules, _, _ in said)
    assert set(OPERATORS) - {"exactly"} <= set(re.findall(r'"([\w-]+)":', page))


def test_the_pattern_of_the_docs_matches_what_is_said() -> None:
    pattern = blocks(FILTER_PAGE, "json", after="pattern")[0]
    patterns = parse_criteria({"Filters": [{"Pattern": pattern}]})
    for value, outcome in rows(FILTER_PAGE, "matched"):
        assert _outcome(patterns, "drop", _record(codes(value)[0])) == outcome, value


def test_the_modes_of_the_docs_do_what_is_said() -> None:
    text = FILTER_PAGE.read_text(encoding="utf-8").partition("<!-- modes -->")[0]
    pattern = codes(text.rpartition("With")[2])[0]
    patterns = parse_criteria({"Filters": [{"Pattern": pattern}]})
    for value, topic, *outcomes in rows(FILTER_PAGE, "modes"):
        record = _record(codes(value)[0])
        done = [_outcome(patterns, mode, record, codes(topic)[0]) for mode in UNPARSABLE]
        assert done == outcomes, value


def test_what_a_pattern_can_name_is_in_the_docs() -> None:
    listed = FILTER_PAGE.read_text(encoding="utf-8").partition("| field |")[2].partition("\n\n")[0]
    named = {name for line in listed.splitlines()[2:] for name in codes(line.split(" | ")[0])}
    assert named == set(FIELDS)


def test_the_optional_steps_are_in_the_docs() -> None:
    assert docs.steps("--schema_registry_url=http://registry:8081")[1][0] == "Decode"
    for text in (README.read_text(encoding="utf-8"), transforms.__doc__ or ""):
        assert re.search(r"--schema_registry_url`[^.]* step[^.]* Decode", text)
        assert re.search(r"--filter_criteria`[^.]* step[^.]* Filter", text)


# -- schemas ---------------------------------------------------------------------------------------


def test_the_avro_record_in_the_docs_is_what_the_function_gets() -> None:
    schema = blocks(SCHEMA_PAGE, "json", after="avro schema")[0]
    order = {
        "id": 41,
        "at": 1793000000000,
        "amount": Decimal("12.34"),
        "state": "NEW",
        "note": None,
        "payment": {"last4": "4242"},
    }
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(json.loads(schema)), order)
    read = decode.make_reader(7, SchemaText(AVRO, schema), CONNECT)
    value = read.decode(b"\0\0\0\0\7" + stream.getvalue())
    shown = json.loads(blocks(SCHEMA_PAGE, "json", after="avro value")[0])
    assert json.dumps(shown) == json.dumps(json.loads(value))


def test_the_protobuf_record_in_the_docs_is_what_the_function_gets() -> None:
    schema = SchemaText(PROTOBUF, blocks(SCHEMA_PAGE, "proto", after="protobuf schema")[0])
    # id 41, created_at, lines {1: "tea"}, card {last4: "4242"}
    data = bytes.fromhex("0829 1206 08c084fcd606 2207 0801 1203 746561 3206 0a04 34323432")
    for style, mark in ((CONNECT, "protobuf value"), (STANDARD, "protobuf standard")):
        value = decode.make_reader(7, schema, style).decode(b"\0\0\0\0\7\0" + data)
        assert json.loads(blocks(SCHEMA_PAGE, "json", after=mark)[0]) == json.loads(value)


def test_the_event_with_a_schema_in_the_docs_is_what_the_function_gets() -> None:
    schema = '{"type":"record","name":"O","fields":[{"name":"id","type":"long"}]}'
    read = decode.make_reader(7, SchemaText(AVRO, schema), STANDARD)
    records = Records([41], [1793000000000], [None], [b"\0\0\0\0\7\x52"], [None])
    records = decode.decode_records(records, ("VALUE",), lambda id: read)
    format = PayloadFormat(envelope=Envelope("kafka_event"))
    (entry,) = encode_records("orders", 3, records, format).entries
    assert json.loads(blocks(SCHEMA_PAGE, "json", after="event record")[0]) == json.loads(entry)


@pytest.mark.parametrize(
    ("mark", "schema"),
    [
        ("response key schema", response_schemas(ranges=False)[0]),
        ("error value schema", error_schemas()[1]),
    ],
)
def test_the_schemas_in_the_docs_are_those_that_are_registered(mark: str, schema: str) -> None:
    assert json.loads(blocks(SCHEMA_PAGE, "json", after=mark)[0]) == json.loads(schema)


def test_the_settings_in_the_docs_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another file of certificates, which is not at the same place everywhere."""
    monkeypatch.setenv("REGISTRY_USER", "name")
    monkeypatch.setenv("REGISTRY_PASSWORD", "word")
    (lines,) = blocks(SCHEMA_PAGE, "properties", after="settings")
    file = tmp_path / "kafka.properties"
    file.write_text(lines.replace("/etc/ssl/certs/ca-certificates.crt", str(README)))
    settings = registry_settings(RegistryConfig("http://r", str(file)))
    assert settings.client["basic.auth.user.info"] == "name:word"
    assert settings.client["timeout"] == 5 and not settings.auto_register


def test_records_go_to_the_lanes_that_the_page_names() -> None:
    page = (ROOT / "docs" / "lanes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`(.+)`|none) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    keys = [key.encode() or None for key, _, _ in rows]
    lanes = Lanes(4, run=100).of(keys, [int(offset) for _, offset, _ in rows])
    assert len(rows) > 5
    assert lanes == [int(lane) for _, _, lane in rows]
