"""The documents say what the code does: steps, options, commands, examples, links."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import fastavro
import orjson
import pytest
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

import transforms
from pipeline import docs
from pipeline.build import build
from pipeline.options import OPTIONS, parse_arguments
from transforms import retry
from transforms.formats import (
    FORMATS,
    HEADER_PREFIX,
    ORIGINAL_SCHEMA,
    decode_original,
    encode_originals,
    error_records,
    response_keys,
    response_values,
)
from transforms.payload import PayloadFormat, encode_records, join_entries
from transforms.records import NO_TIMESTAMP, Failure, Records
from transforms.reply import parse_reply

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ERROR_RECORDS = ROOT / "docs" / "error-records.md"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "templates" / "README.md",
]

# Options of other programs, and Beam's own.
FOREIGN = {"runner", "help", "fast", "check"}
SHELL = {"summary", "system", "wheel", "now", "no", "from"}

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


# -- steps -----------------------------------------------------------------------------------------


class _TopLevel(PipelineVisitor):
    """Collects the labels right below the root."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def enter_composite_transform(self, transform_node: AppliedPTransform) -> None:
        self.visit_transform(transform_node)

    def visit_transform(self, transform_node: AppliedPTransform) -> None:
        if transform_node.full_label and "/" not in transform_node.full_label:
            self.labels.append(transform_node.full_label)


@pytest.fixture(scope="module")
def labels() -> list[str]:
    arguments = ["--kafka_bootstrap_servers=localhost:9092", "--topics=t", "--consumer_group=g"]
    config, _ = parse_arguments([*arguments, "--function=f"])
    pipeline = beam.Pipeline()
    build(pipeline, config)
    visitor = _TopLevel()
    pipeline.visit(visitor)
    return visitor.labels


def test_the_diagram_has_the_pipelines_steps(labels: list[str]) -> None:
    (diagram,) = blocks(README, "mermaid")
    (chain,) = re.findall(r"^\s*subgraph pipeline\n\s*(.*)\n\s*end$", diagram, re.MULTILINE)
    assert chain.split(" --> ") == labels


def test_the_table_of_the_transforms_has_the_pipelines_steps(labels: list[str]) -> None:
    rows = re.findall(r"^(\w+) +(transforms/\w+\.py) ", transforms.__doc__ or "", re.MULTILINE)
    assert [step for step, _ in rows] == labels
    assert all((ROOT / file).is_file() for _, file in rows)


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
    readme.write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")

    assert docs.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert docs.README in said and docs.OPTIONS in said
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")


def test_every_option_is_on_the_page() -> None:
    page = (ROOT / docs.OPTIONS).read_text(encoding="utf-8")
    assert re.findall(r"^### `--(\w+)`$", page, re.MULTILINE) == list(OPTIONS)


@parametrize_pages
def test_every_named_option_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text(encoding="utf-8")))
    switches = {f"no_{name}" for name, option in OPTIONS.items() if option.kind == "flag"}
    known = set(OPTIONS) | switches | FOREIGN
    if page.parent.name == "templates":
        known |= SHELL
    assert named <= known


def test_an_example_in_the_readme_is_a_command_line_that_fits(tmp_path: Path) -> None:
    """The options of `./run.sh run` in it are taken together, as the program would."""
    properties = tmp_path / "kafka.properties"
    properties.touch()
    runs = [block for block in blocks(README, "sh") if "./run.sh run " in block]
    for run in runs:
        given = run.replace("\\\n", " ").replace("kafka.properties", str(properties)).split()
        parse_arguments(given[2:])
    assert runs


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
    assert payload == json.loads(join_entries(encoded.entries))


def test_the_function_in_the_readme_makes_the_reply_beside_it() -> None:
    payload, reply = map(json.loads, blocks(README, "json")[:2])
    (handler,) = blocks(README, "python")
    module: dict[str, Any] = {}
    exec(handler, module)
    answered = module["handler"](payload, None)
    assert answered == reply
    assert len(parse_reply(orjson.dumps(answered), "orders", 3, [41, 43])) == 2


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
    # Too small for the input payload, so that the header that says so is there too.
    ((_, record),) = error_records("orders", 3, failure, "f", "json", 1)
    assert named == {name for name, _ in record.headers}

    listed = page.partition("| condition |")[2].partition("\n\n")[0]
    conditions = set(re.findall(r"^\| `(\w+)` \|", listed, re.MULTILINE))
    text = Records([1], [NO_TIMESTAMP], [None], [b"text"], [None])
    rejected = encode_records("t", 0, text, PayloadFormat(value="json")).rejections[0]
    assert conditions == {
        retry.RETRIES_EXHAUSTED,
        retry.AGE_EXCEEDED,
        retry.SIZE_EXCEEDED,
        retry.INVALID_REPLY,
        retry.INVALID_CONTENT,
        rejected.condition,
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
