"""Files that people write: YAML and Java's properties, read in one way for all options.

Every scalar is the text that it is written as: ``NO`` is no false, ``012`` is no 10 and ``12:30``
is no 750, since nobody who writes such a thing into a list of countries or codes means that. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

_NULL = re.compile(r"~|null|Null|NULL|")
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_CONTINUED = re.compile(r"(?<!\\)(?:\\\\)*\\$")
_KEY = re.compile(r"((?:\\.|[^\\\s=:])*)\s*[=:]?\s*(.*)", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_MAX_NODES = 100_000


class NotYaml(ValueError):
    """A text is not YAML at all."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of names and values.

    Raises:
        ValueError: A name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def as_it_is(text: str) -> Any:
    """A scalar without quotes: its text."""
    return text


def parse_yaml(text: str, scalar: Callable[[str], Any] = as_it_is) -> Any:
    """YAML as plain values; an empty scalar, ``~`` and ``null`` without quotes are None.

    Args:
        text: One document.
        scalar: What another scalar without quotes means.

    Raises:
        NotYaml: It is something else.
        ValueError: It refers to itself, names a key twice, is nested too deep or is far too large
            once its aliases are written out.
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise NotYaml(_one_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    left = _MAX_NODES

    def plain(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("it is too large")
        if node in above:
            raise ValueError("it refers to itself")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return once([(_name(key), plain(value, above)) for key, value in node.value])
        if isinstance(node, yaml.SequenceNode):
            return [plain(inner, above) for inner in node.value]
        if node.style is not None:
            return node.value
        return None if _NULL.fullmatch(node.value) else scalar(node.value)

    try:
        return None if root is None else plain(root, ())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _name(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"the name in line {node.start_mark.line + 1} is no text")
    return str(node.value)


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or "not readable"
    return " ".join(f"{problem}{where}".split())


def parse_properties(text: str) -> dict[str, str]:
    """Java's properties, as Connect's standalone worker reads them; the last of a name counts."""
    settings: dict[str, str] = {}
    # Not splitlines: to Java no other characters end a line.
    lines = iter(re.split(r"\r\n|\n|\r", text))
    for raw in lines:
        line = raw.lstrip(" \t\f")
        if not line or line[0] in "#!":
            continue
        while _CONTINUED.search(line):
            line = line[:-1] + next(lines, "").lstrip(" \t\f")
        found = _KEY.fullmatch(line)
        assert found
        name, value = (_ESCAPE.sub(_unescape, part) for part in found.groups())
        settings[name] = value.strip()
    return settings


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPES.get(code, code)
