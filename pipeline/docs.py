"""Docs: docs/options.md and the table in README.md, made from the options' declaration.

``python -m pipeline.docs`` writes them; with ``--check`` it only says which of them is stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.options import GROUPS, Option

ROOT = Path(__file__).parent.parent
README, OPTIONS = "README.md", "docs/options.md"
BEGIN, END = "<!-- options -->", "<!-- /options -->"

_HEAD = """# Options

Made from the declaration in `pipeline/options.py` by `python -m pipeline.docs`; do not edit.

Write `--OPTION=VALUE`. A flag alone means true. Options that nobody knows, and all that do not fit
together, are named before anything runs (exit code 2). Beam's own options are taken too, such as
`--runner`.
"""


def _marked(text: str) -> str:
    """Options in a text as code."""
    return re.sub(r"--[a-z_]+(=\w+)?", r"`\g<0>`", text)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _default(option: Option) -> str:
    if option.default is not None:
        return _code(option.default_text)
    return "required" if option.help.endswith("Required.") else ""


def _values(option: Option) -> str:
    if option.kind in ("choice", "flag"):
        return ", ".join(map(_code, option.choices or ("true", "false")))
    return " ".join(part for part in (option.range, option.unit) if part)


def options_page() -> str:
    """The whole of docs/options.md."""
    parts = [_HEAD]
    for group in GROUPS:
        parts.append(f"## {group.title}\n")
        for option in group.options:
            facts = {
                "values": _values(option),
                "default": _default(option),
                "example": _code(option.example and f"--{option.name}={option.example}"),
            }
            listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)
            parts.append(f"### `--{option.name}`\n\n{_marked(option.help)}\n\n{listed}\n")
    return "\n".join(parts)


def options_table() -> str:
    """The short table: what each option does in one sentence."""
    lines = ["| option | default | |", "|---|---|---|"]
    for group in GROUPS:
        lines.append(f"| **{group.title}** | | |")
        for option in group.options:
            sentence = option.help.split(". ")[0].removesuffix(".")
            lines.append(f"| `--{option.name}` | {_default(option)} | {_marked(sentence)} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README with a fresh table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README} lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{options_table()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write both files, or check them; returns the exit code."""
    readme = (ROOT / README).read_text(encoding="utf-8")
    page = ROOT / OPTIONS
    made = {README: with_table(readme), OPTIONS: options_page()}
    found = {README: readme, OPTIONS: page.read_text(encoding="utf-8") if page.exists() else ""}
    stale = [name for name in made if made[name] != found[name]]
    if "--check" in arguments:
        for name in stale:
            print(f"{name} is stale; run python -m pipeline.docs", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(made[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
