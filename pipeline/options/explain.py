"""Explain: what will be in force and where each value came from, as text. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.migrate.carried import OWN, Note
from pipeline.options.declare import ACCESS, GROUPS, Option
from pipeline.options.resolve import COMMAND_LINE, Resolved
from transforms.access import shown_access
from transforms.hidden import HIDDEN

# A password may have a slash in it, whatever a URL may.
_LOGIN_IN_URL = re.compile(r"(?<=://)[^@\s]+(?=@)")


def explain(resolved: Resolved) -> str:
    """The listing of --explain. No secret is in it: options hold none, properties are masked."""
    parts = [_options(resolved)]
    if resolved.properties:
        path = resolved.values["kafka_config_file"].text
        listed = (f"  {name} = {HIDDEN}" for name in resolved.properties)
        parts.append("\n".join([f"Kafka properties ({path}):", *listed]))
    if carried := resolved.carried:
        parts += _notes(f"Not carried over from {carried.file}:", carried.notes)
        parts += _notes(f"Refused, see {carried.file}:", carried.refused)
    return "\n\n".join(parts)


def listed(resolved: Resolved) -> list[tuple[str, str, str]]:
    """Each option, its value and where that came from. No secret is in it."""
    return [
        (option.name, *_value(option, resolved))
        for group in GROUPS
        for option in group.options
        if option.name != "explain"
    ]


def _options(resolved: Resolved) -> str:
    rows = []
    values = {name: (value, origin) for name, value, origin in listed(resolved)}
    for group in GROUPS:
        rows.append((group.title, "", ""))
        for option in group.options:
            if option.name in values:
                rows.append((f"  --{option.name}", *values[option.name]))
    rows.append(("  --runner", resolved.runner, ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}".rstrip()
        for name, value, origin in rows
    )


def _value(option: Option, resolved: Resolved) -> tuple[str, str]:
    value = resolved.values.get(option.name)
    if value is None:
        return option.default_text, "default"
    shown = _LOGIN_IN_URL.sub(HIDDEN, value.text)
    if option.name in ACCESS:
        shown = shown_access(shown)
    origin = value.origin
    if resolved.carried and resolved.carried.system == OWN and origin != COMMAND_LINE:
        origin = resolved.carried.file
    return shown if shown.isprintable() else repr(shown), origin


def _notes(title: str, notes: Iterable[Note]) -> list[str]:
    names: dict[str, list[str]] = {}
    for note in notes:
        names.setdefault(note.why, []).append(note.name)
    listed = [f"  {', '.join(same)}: {why}" for why, same in names.items()]
    return ["\n".join([title, *listed])] if listed else []
