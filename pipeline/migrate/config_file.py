"""Configuration files: what --config names -> option values, and where each came from.

Three kinds, told apart by what is in them: a connector's configuration, an event source mapping,
and options by their own names. All scalars are read as text, as they would be on a command line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import yaml

from pipeline.migrate import connector, mapping
from pipeline.migrate.carried import OWN, Carried
from transforms import text_file
from transforms.errors import UsageError

_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_CONTINUED = re.compile(r"(?<!\\)(?:\\\\)*\\$")
_KEY = re.compile(r"((?:\\.|[^\\\s=:])*)\s*[=:]?\s*(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


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
        content = json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] in ("{", "["):
            # YAML would take most of it, and say something stranger.
            raise ValueError(f"not JSON: {error}") from None
        content = _yaml_or_properties(text)
    content = _texts(content)
    if not isinstance(content, dict) or not content:
        raise ValueError("it holds no settings")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in set(names):
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice")
    return dict(pairs)


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _texts(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_texts(inner) for inner in value if inner is not None]
    return str(value).lower() if isinstance(value, bool) else value


def _yaml_or_properties(text: str) -> Any:
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        properties = _properties(text)
        if properties and "connector.class" in properties:
            return properties
        raise ValueError(f"neither JSON nor YAML: {_one_line(error)}") from None
    if isinstance(root, yaml.MappingNode):
        return _plain(root)
    # A line without a colon is a text to YAML.
    return _properties(text)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or 'not readable'}{where}"


def _plain(node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> Any:
    """A YAML node as plain values. Every scalar is the text it is written as."""
    if node in above:
        raise ValueError("it refers to itself")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        return _once([(str(_plain(k, above)), _plain(v, above)) for k, v in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(inner, above) for inner in node.value]
    return node.value


def _properties(text: str) -> dict[str, str]:
    """Java's properties, as Connect's standalone worker reads them."""
    settings: dict[str, str] = {}
    lines = iter(text.splitlines())
    for raw in lines:
        line = raw.lstrip()
        if not line or line[0] in "#!":
            continue
        while _CONTINUED.search(line):
            line = line[:-1] + next(lines, "").lstrip()
        found = _KEY.fullmatch(line)
        assert found
        name, value = (_ESCAPE.sub(_unescape, part) for part in found.groups())
        # The last one wins, as in Java.
        settings[name] = value.strip()
    return settings


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPES.get(code, code)


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
