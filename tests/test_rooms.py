"""Rooms: what each folder may know, read from the imports of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

STEPS = {"read", "decode", "filter", "batch", "invoke", "write", "commit"}
# Of a streaming run: two of them as one.
TOGETHER = {"pending": {"batch", "invoke"}}
SOURCES = {"kafka", "kinesis"}
FOREIGN = ("apache_beam", "boto3", "botocore", "confluent_kafka")

# Pure rules, by file: they know none of the above.
RULES = (
    "transforms/aws/answers.py",
    "transforms/batch/payload.py",
    "transforms/commit/contiguous.py",
    "transforms/envelope.py",
    "transforms/filter/rules.py",
    "transforms/invoke/breaker.py",
    "transforms/invoke/concurrency.py",
    "transforms/invoke/failures.py",
    "transforms/invoke/outcome.py",
    "transforms/invoke/reply.py",
    "transforms/invoke/retry.py",
    "transforms/columns.py",
    "transforms/facts.py",
    "transforms/kinesis/aggregates.py",
    "transforms/kinesis/dealing.py",
    "transforms/kinesis/frames.py",
    "transforms/kinesis/rows.py",
    "transforms/kinesis/shards.py",
    "transforms/lanes.py",
    "transforms/original.py",
    "transforms/names.py",
    "transforms/source.py",
    "transforms/spread.py",
    "transforms/write/formats.py",
)


def _files() -> Iterator[Path]:
    for package in ("transforms", "pipeline"):
        yield from sorted((ROOT / package).rglob("*.py"))


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it; for types alone too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rooms(file: Path, package: str) -> set[str]:
    """The folders of a package that a file imports from."""
    rooms = set()
    for module in _imports(file):
        head, _, rest = module.partition(".")
        room = rest.partition(".")[0]
        if head == package and (ROOT / package / room).is_dir() and room:
            rooms.add(room)
    return rooms


def _of(file: Path) -> tuple[str, str]:
    """The package and the folder in it; the ground has none."""
    package, *folders, _ = file.relative_to(ROOT).parts
    return package, folders[0] if folders else ""


@pytest.mark.parametrize("file", [f for f in _files() if _of(f)[0] == "transforms"], ids=_name)
def test_a_room_of_the_steps_knows_what_it_may(file: Path) -> None:
    room = _of(file)[1]
    known = _rooms(file, "transforms") - {room}
    assert not _rooms(file, "pipeline")
    if not room:
        assert not known, "the ground imports no room"
    if room in STEPS:
        assert not known & (STEPS | TOGETHER.keys()), "a step imports no other step"
    if room in TOGETHER:
        assert known & STEPS <= TOGETHER[room], "and steps that are one no third one"
    if room in STEPS - {"write", "commit", "read"} | TOGETHER.keys():
        assert not known & SOURCES, "what is between Read and Write knows no source"
    if room in SOURCES:
        assert not known & SOURCES, "sources do not know each other"
    if room in {"aws", "schemas"}:
        assert not known & STEPS, "clients know no step"


@pytest.mark.parametrize("name", RULES)
def test_rules_are_pure(name: str) -> None:
    file = ROOT / name
    assert not [module for module in _imports(file) if module.startswith(FOREIGN)]


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("options", {"run", "submit", "watch", "redrive", "local"}),
        ("migrate", {"run", "submit", "watch", "redrive", "local", "options"}),
        ("run", {"submit", "redrive", "local", "migrate"}),
        ("watch", {"submit", "redrive", "local", "migrate"}),
        ("submit", {"redrive", "local", "migrate"}),
        ("redrive", {"submit", "local", "migrate"}),
        ("offsets", {"submit", "local", "migrate", "run", "watch", "redrive"}),
    ],
)
def test_a_room_of_the_program_knows_what_it_may(room: str, never: set[str]) -> None:
    for file in (ROOT / "pipeline" / room).rglob("*.py"):
        assert not _rooms(file, "pipeline") & never, file
        assert "pipeline.cli" not in _imports(file), file


def test_only_the_chain_knows_all_steps() -> None:
    """Besides it, what makes their configurations of the options."""
    for file in _files():
        if _of(file)[0] == "pipeline" and _name(file) not in (
            "pipeline/build.py",
            "pipeline/options/config.py",
        ):
            assert not _rooms(file, "transforms") >= STEPS, file
