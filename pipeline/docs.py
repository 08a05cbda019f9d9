"""Docs: what is made from declarations in the code.

From the options docs/options.md, the table in README.md, those of redrive in docs/redrive.md, the
parameters of the template for Dataflow, and what the Helm chart checks; from what becomes of each
setting of another system the tables in docs/coming-from.md; from the chain and the folders the
picture and the tables in docs/architecture.md.
``python -m pipeline.docs`` writes them; with ``--check`` it only says which of them is stale.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

from pipeline.build import build
from pipeline.migrate import connector, mapping
from pipeline.migrate.carried import Row
from pipeline.options import chart
from pipeline.options.declare import GROUPS, Option
from pipeline.options.declare import OPTIONS as DECLARED
from pipeline.options.explain import explain
from pipeline.options.resolve import resolve
from pipeline.redrive import command as redrive
from pipeline.submit import flex_template

ROOT = Path(__file__).parent.parent
README, OPTIONS = "README.md", "docs/options.md"
COMING_FROM, REDRIVE = "docs/coming-from.md", "docs/redrive.md"
ARCHITECTURE = "docs/architecture.md"
METADATA, TEMPLATE = "templates/dataflow/metadata.json", "templates/dataflow/README.md"
CHART = "templates/helm/values.schema.json"

_HEAD = """# Options

Made by `python -m pipeline.docs` from `pipeline/options/declare.py`; do not edit.

Write `--OPTION=VALUE`. A flag alone means true. Options that nobody knows, and all that do not fit
together, are named before anything runs (exit code 2). Beam's own options are taken too, such as
`--runner`.
"""


def _marked(text: str) -> str:
    """Options in a text as code."""
    return re.sub(r"--[a-z_]+(=[\w-]+)?", r"`\g<0>`", text)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _default(option: Option) -> str:
    if option.default is not None:
        return _code(option.default_text)
    return "required" if option.required else ""


def _values(option: Option) -> str:
    if option.kind in ("choice", "flag"):
        return ", ".join(map(_code, option.choices or ("true", "false")))
    return " ".join(part for part in (option.range, option.unit) if part)


def options_page() -> str:
    """The whole of docs/options.md."""
    parts = [_HEAD]
    for group in GROUPS:
        parts.append(f"## {group.title}\n")
        parts += map(_option, group.options)
    return "\n".join(parts)


def _option(option: Option) -> str:
    facts = {
        "values": _values(option),
        "default": _default(option),
        "example": _code(option.example and f"--{option.name}={option.example}"),
    }
    listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)
    return f"### `--{option.name}`\n\n{_marked(option.help)}\n\n{listed}\n"


def options_table() -> str:
    """The short table: what each option does in one sentence."""
    lines = ["| option | default | |", "|---|---|---|"]
    for group in GROUPS:
        lines.append(f"| **{group.title}** | | |")
        for option in group.options:
            sentence = option.help.split(". ")[0].removesuffix(".")
            lines.append(f"| `--{option.name}` | {_default(option)} | {_marked(sentence)} |")
    return "\n".join(lines)


def settings_table(system: str, rows: Iterable[Row]) -> str:
    """What becomes of each setting of another system."""
    lines = [f"| {system} | here |", "|---|---|"]
    for row in rows:
        names = ", ".join(map(_code, row.names))
        if row.default:
            names += f" ({_marked_names(row.default)})"
        here = _marked(row.here)
        if row.option in DECLARED and DECLARED[row.option].default is not None:
            here += f" ({DECLARED[row.option].default_text})"
        lines.append(f"| {names} | {here} |")
    return "\n".join(lines)


def _marked_names(text: str) -> str:
    return re.sub(r"[\w-]*\$\{connector\}[\w-]*", r"`\g<0>`", text)


def with_part(name: str, page: str, part: str, file: str) -> str:
    """A page with a fresh part between the marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{file} lacks the marks {begin} and {end}")
    return f"{before}{begin}\n{part}\n{end}{after}"


def coming_from(page: str) -> str:
    """docs/coming-from.md with fresh tables."""
    for name, rows in (("connector", connector.ROWS), ("mapping", mapping.ROWS)):
        page = with_part(name, page, settings_table(name, rows), COMING_FROM)
    return with_part("explain", page, f"```text\n{_explained(page)}\n```", COMING_FROM)


def _redrive_options() -> str:
    return "\n" + "\n".join(map(_option, redrive.GROUP.options))


def template_page(page: str) -> str:
    """The template's README with fresh tables."""
    for name, made in (
        ("required", flex_template.required_table()),
        ("optional", flex_template.optional_table()),
        ("left out", flex_template.left_out_list()),
    ):
        page = with_part(name, page, made, TEMPLATE)
    return page


def _explained(page: str) -> str:
    """What --explain says of the connector on the page, without the lines of our defaults."""
    found = re.search(r"<!-- connector.json -->\n```json\n(.*?)```", page, re.DOTALL)
    if not found:
        raise ValueError(f"{COMING_FROM} lacks its connector.json")
    arguments = ["--config=connector.json", "--kafka_bootstrap_servers=broker-1:9092"]
    text = explain(resolve(arguments, environ={}, read=lambda path: found[1]))
    return "\n".join(line for line in text.splitlines() if not line.endswith("  default"))


class _TopLevel(PipelineVisitor):
    """Collects the steps right below the root, in order, with the files they are from."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def enter_composite_transform(self, transform_node: AppliedPTransform) -> None:
        label = transform_node.full_label
        if label and "/" not in label:
            module = type(transform_node.transform).__module__
            self.steps.append((label, module.replace(".", "/") + ".py"))


def steps(*more: str) -> list[tuple[str, str]]:
    """The steps of the chain and their files.

    Args:
        more: Options that ask for steps which are not always there.
    """
    arguments = ["--kafka_bootstrap_servers=localhost:9092", "--topics=t", "--consumer_group=g"]
    resolved = resolve([*arguments, "--function=f", *more])
    assert resolved.config, resolved.problems
    pipeline = beam.Pipeline()
    build(pipeline, resolved.config)
    visitor = _TopLevel()
    pipeline.visit(visitor)
    return visitor.steps


def chain_picture() -> str:
    """The chain, and a table with a link to each step's file and when the step is there."""
    always = {label for label, _ in steps()}
    with NamedTemporaryFile("w", suffix=".json") as filters:
        json.dump({"Filters": [{"Pattern": {"topic": ["t"]}}]}, filters)
        filters.flush()
        asked = {
            "Decode": "--schema_registry_url=http://registry:8081",
            "Filter": f"--filter_criteria={filters.name}",
        }
        found = steps(*asked.values())
    names = [label if label in always else f"{label}([{label}])" for label, _ in found]
    lines = [
        f"```mermaid\nflowchart LR\n    {' --> '.join(names)}\n```",
        "",
        "| step | file | when |",
        "|---|---|---|",
    ]
    for label, file in found:
        when = "always" if label in always else f"with `{asked[label].partition('=')[0]}`"
        lines.append(f"| {label} | [{file}](../{file}) | {when} |")
    return "\n".join(lines)


def rooms_table() -> str:
    """What each folder says of itself."""
    lines = ["| folder | |", "|---|---|"]
    for package in ("transforms", "pipeline"):
        root = importlib.import_module(package)
        for found in pkgutil.iter_modules(root.__path__):
            if found.ispkg:
                says = importlib.import_module(f"{package}.{found.name}").__doc__ or ""
                lines.append(f"| `{package}/{found.name}/` | {' '.join(says.split())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Write the files, or check them; returns the exit code."""
    names = (README, OPTIONS, COMING_FROM, REDRIVE, ARCHITECTURE, METADATA, TEMPLATE, CHART)
    found = {name: _read(ROOT / name) for name in names}
    made = {
        README: with_part("options", found[README], options_table(), README),
        OPTIONS: options_page(),
        COMING_FROM: coming_from(found[COMING_FROM]),
        REDRIVE: with_part("options", found[REDRIVE], _redrive_options(), REDRIVE),
        ARCHITECTURE: with_part(
            "rooms",
            with_part("chain", found[ARCHITECTURE], chain_picture(), ARCHITECTURE),
            rooms_table(),
            ARCHITECTURE,
        ),
        METADATA: flex_template.metadata_text(),
        TEMPLATE: template_page(found[TEMPLATE]),
        CHART: chart.with_options(found[CHART]),
    }
    stale = [name for name in made if made[name] != found[name]]
    if "--check" in arguments:
        for name in stale:
            print(f"{name} is stale; run python -m pipeline.docs", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(made[name], encoding="utf-8")
    return 0


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
