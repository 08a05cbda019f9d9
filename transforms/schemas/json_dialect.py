"""JSON Schemas as the tools of their producers take them, made into what our library takes. Pure.

Confluent's registry and clients are Java's: patterns are Java's, a schema of a draft that they do
not know is one of draft 7, and a reference has its name beside the schema's ``$id``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import jsonschema_rs

_LOGGER = logging.getLogger(__name__)

_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/20(19-09|20-12))/schema#?")
_DRAFT_3 = re.compile(r"https?://json-schema\.org/draft-03/schema#?")

_MAPS = frozenset(
    ("properties", "patternProperties", "definitions", "$defs", "dependencies", "dependentSchemas")
)
"""What holds schemas by names, which are no keywords."""
_DATA = frozenset(("const", "enum", "default", "examples", "example"))
"""What holds no schemas."""

_HORIZONTAL = r" \t\xa0\u1680\u180e\u2000-\u200a\u202f\u205f\u3000"
_VERTICAL = r"\n\x0b\f\r\x85\u2028\u2029"
_ESCAPES = {
    r"\h": f"[{_HORIZONTAL}]",
    r"\H": f"[^{_HORIZONTAL}]",
    r"\R": rf"(?:\r\n|[{_VERTICAL}])",
    r"\A": "^",
    r"\z": "$",
    r"\Z": "$",
    r"\a": r"\x07",
    r"\e": r"\x1b",
}
_ESCAPES_IN_CLASS = {r"\h": _HORIZONTAL, r"\a": r"\x07", r"\e": r"\x1b"}
_TOKEN = re.compile(r"\\Q(?P<quoted>.*?)(?:\\E|$)|\\[pP]\{[^}]*\}|\\.|.", re.DOTALL)
_SET = re.compile(r"\\[dDwWsShHpP]")
_NO_PATTERN = ("missing )", "unterminated", "nothing to repeat", "unbalanced", "min repeat")


def usable(schema: Any) -> Any:
    """The schema with what our library refuses and Java takes written in its way.

    A pattern that is Java's alone is left out with a warning: whoever wrote the record has checked
    it. What is no pattern in any language stays, and is refused.
    """
    if not isinstance(schema, dict):
        return schema
    named = schema.get("$schema")
    rewritten = _usable(schema, isinstance(named, str) and bool(_DRAFT_3.fullmatch(named)))
    if not (isinstance(named, str) and _DRAFT.fullmatch(named)):
        rewritten.pop("$schema", None)
    return rewritten


def _usable(schema: Any, draft3: bool) -> Any:
    if isinstance(schema, list):
        return [_usable(item, draft3) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _DATA:
            result[name] = value
        elif name in _MAPS and isinstance(value, dict):
            result[name] = {key: _usable(item, draft3) for key, item in value.items()}
        else:
            result[name] = _usable(value, draft3)
    if isinstance(pattern := result.pop("pattern", None), str):
        if (translated := _pattern(pattern)) is not None:
            result["pattern"] = translated
    elif pattern is not None:
        result["pattern"] = pattern
    if isinstance(by_pattern := result.get("patternProperties"), dict):
        translated_all = {_pattern(key): item for key, item in by_pattern.items()}
        if translated_all.pop(None, None) is not None:
            # Which properties are the additional ones is not known then.
            result.pop("additionalProperties", None)
        result["patternProperties"] = translated_all
    return _from_draft3(result) if draft3 else result


def _from_draft3(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    if isinstance(properties, dict):
        names = [
            name
            for name, item in properties.items()
            if isinstance(item, dict) and item.pop("$required", False)
        ]
        if names:
            schema["required"] = names
    # For the object that it is a property of, which comes after.
    if isinstance(required := schema.get("required"), bool):
        del schema["required"]
        if required:
            schema["$required"] = True
    if "divisibleBy" in schema:
        schema["multipleOf"] = schema.pop("divisibleBy")
    if isinstance(extended := schema.pop("extends", None), dict | list):
        schema["allOf"] = extended if isinstance(extended, list) else [extended]
    for name in ("type", "disallow"):
        if name in schema:
            kinds = _kinds3(schema.pop(name))
            if name == "disallow":
                schema["not"] = kinds
            elif kinds is not True:
                schema |= kinds if "type" in kinds else {"allOf": [*schema.get("allOf", ()), kinds]}
    return schema


def _kinds3(kinds: Any) -> Any:
    """What draft 3 has for a type, as a schema: a name, or a list of names and schemas."""
    if kinds == "any" or (isinstance(kinds, list) and "any" in kinds):
        return True
    if not isinstance(kinds, list) or all(isinstance(kind, str) for kind in kinds):
        return {"type": kinds}
    return {"anyOf": [{"type": kind} if isinstance(kind, str) else kind for kind in kinds]}


def _is_taken(pattern: str) -> bool:
    try:
        jsonschema_rs.Draft7Validator({"pattern": pattern})
    except Exception:
        return False
    return True


def _pattern(pattern: str) -> str | None:
    """A pattern of Java's in the way of our library; None if only Java knows what it means."""
    if _is_taken(pattern):
        return pattern
    translated = _translated(pattern)
    if _is_taken(translated):
        return translated
    try:
        re.compile(translated)
    except re.error as error:
        if error.msg.startswith(_NO_PATTERN):
            return pattern
    except (OverflowError, RecursionError):
        return pattern
    _LOGGER.warning("a JSON Schema has the pattern %r, which only Java can check", pattern[:200])
    return None


def _translated(pattern: str) -> str:
    parts: list[str] = []
    depth = 0
    tokens = list(_TOKEN.finditer(pattern))
    for place, token in enumerate(tokens):
        part = token[0]
        if part.startswith(r"\Q"):
            parts.append("".join(f"\\{c}" if c in r"\^$.|?*+()[]{}/-" else c for c in token[1]))
        elif not depth:
            depth += part == "["
            parts.append(_ESCAPES.get(part, part))
        elif part == "-" and _beside_set(tokens, place):
            parts.append(r"\-")
        else:
            depth += (part == "[") - (part == "]")
            parts.append(_ESCAPES_IN_CLASS.get(part, part))
    return "".join(parts)


def _beside_set(tokens: list[re.Match[str]], place: int) -> bool:
    """Whether a hyphen has a class of characters beside it, so that it is no range."""
    beside = (tokens[place - 1][0], tokens[place + 1][0] if place + 1 < len(tokens) else "")
    return any(_SET.match(part) for part in beside)


def ids(schema: Any) -> Iterator[str]:
    """Every ``$id`` in a schema."""
    if isinstance(schema, list):
        for item in schema:
            yield from ids(item)
    elif isinstance(schema, dict):
        for name, item in schema.items():
            if name in ("$id", "id") and isinstance(item, str):
                yield item
            elif name not in _DATA:
                yield from ids(item)


def resources(schema: Any, references: dict[str, Any]) -> dict[str, Any]:
    """What schemas may be looked up by: their names, as they are and beside each ``$id``."""
    found = dict(references)
    for base in {id for part in (schema, *references.values()) for id in ids(part)}:
        for name, reference in references.items():
            found.setdefault(urljoin(base, name), reference)
    return found
