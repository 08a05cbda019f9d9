"""Configuration files: what --config names -> option values, and where each came from.

Three kinds, told apart by what is in them: a connector's configuration, an event source mapping,
and options by their own names. All scalars are read as text, as they would be on a command line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipeline.migrate import connector, mapping
from pipeline.migrate.carried import OWN, Carried
from transforms import plain_text, text_file
from transforms.errors import UsageError


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        UsageError: It cannot be read.
    """
    return text_file.read_text("config", path)


def load(
    path: str,
    given: Mapping[str, str],
    options: Collection[str],
    environ: Mapping[str, str],
    read: Callable[[str], str] = read_text,
) -> Carried:
    """Read a file of any of the three kinds.

    Args:
        path: The file.
        given: The options of the command line.
        options: Names of all options.
        environ: Environment variables.
        read: Gets the file's text.

    Raises:
        UsageError: It cannot be read, or is none of the three. Never shows a value.
    """
    try:
        content = parse(read(path))
    except ValueError as error:
        raise UsageError([f"--config={path}: {error}"]) from None
    return carry(content, path, given, options, environ)


def parse(text: str) -> dict[str, Any]:
    """The settings of a file: JSON, YAML or Java properties; scalars as text, nulls left out.

    Raises:
        ValueError: It is none of them, or names a setting twice.
    """
    try:
        content = json.loads(
            text, parse_int=str, parse_float=str, object_pairs_hook=plain_text.once
        )
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] in ("{", "["):
            # YAML would take most of it, and say something stranger.
            raise ValueError(f"not JSON: {error}") from None
        content = _yaml_or_properties(text)
    content = _texts(content)
    if not isinstance(content, dict) or not content:
        raise ValueError("it holds no settings")
    return content


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _texts(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_texts(inner) for inner in value if inner is not None]
    return str(value).lower() if isinstance(value, bool) else value


def _yaml_or_properties(text: str) -> Any:
    try:
        content = plain_text.parse_yaml(text)
    except plain_text.NotYaml as error:
        properties = plain_text.parse_properties(text)
        if properties and "connector.class" in properties:
            return properties
        raise ValueError(f"neither JSON nor YAML: {error}") from None
    # A line without a colon is a text to YAML.
    return content if isinstance(content, dict) else plain_text.parse_properties(text)


def carry(
    content: Mapping[str, Any],
    path: str,
    given: Mapping[str, str],
    options: Collection[str],
    environ: Mapping[str, str],
) -> Carried:
    """What a file's settings come to; see `load`. Pure."""
    if connector.is_connector(content):
        carried = Carried("the connector", path, given, environ)
        connector.carry(carried, content)
    elif mapping.is_mapping(content):
        carried = Carried("the mapping", path, given, environ)
        mapping.carry(carried, content)
    else:
        carried = Carried(OWN, path, given, environ)
        _carry_options(carried, content, options)
    return carried


def _carry_options(carried: Carried, content: Mapping[str, Any], options: Collection[str]) -> None:
    """Options by their own names; a list is one that is comma separated."""
    for name, value in content.items():
        if name in ("config", "explain"):
            carried.refuse(name, "it belongs on the command line")
        elif name not in options:
            near = difflib.get_close_matches(name, options, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            carried.refuse(name, f"not an option{hint}")
        elif isinstance(value, str):
            carried.take(name, value, name)
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            carried.take(name, ",".join(value), name)
        else:
            carried.refuse(name, "it is neither a value nor a list of values")
