"""Help: what --help prints, made of the declarations."""

from __future__ import annotations

import argparse

from pipeline.options.declare import GROUPS, Group


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
