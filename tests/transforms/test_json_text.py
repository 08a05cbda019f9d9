"""JSON text: whatever is JSON is read as such, and nothing else."""

from __future__ import annotations

import json
import math
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from transforms.json_text import is_json, loads, no_constant, writable

LONG = "9" * 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d"', "\ud83d"),
        ('{"a\\udc00":["\\ud83d\\ud83d\\ude00"]}', {"a\udc00": ["\ud83d\U0001f600"]}),
        ("1e400", 10**400),
        ("1e9999999999999999999999", math.inf),
        ("-1e9999999999999999999999", -math.inf),
        ("[" * 1010 + "]" * 1010, ANY),
        ("-1.5E+0400", -15 * 10**399),
        (LONG, int(LONG)),
        (f"[-{LONG}.5]", [-int(LONG)]),
        ("1" * 250 + "e60", int("1" * 250) * 10**60),
        ("1e99999", math.inf),
        ("-" + "1" * 5000, -math.inf),
        ("1e-400", 0.0),
    ],
)
def test_what_a_fast_parser_refuses(text: str, value: Any) -> None:
    """Half of a surrogate pair, and numbers of any size."""
    assert loads(text.encode()) == value
    assert is_json(text.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"NaN",
        b'["\\ud83d",NaN]',
        b'["\\ud83d",Infinity]',
        b'"\\ud83d',
        b'{"a":"\\ud83d",}',
        b"1e400 x",
        b"01e400",
        b'"\\ud83d\xff"',
        b'"\\ud83d\n"',
        b'\xef\xbb\xbf"\\ud83d"',
        b"[" * 100_000 + b"1e400",
        b"[" * 100_000 + b"1e400" + b"]" * 100_000,
    ],
)
def test_what_is_no_json(data: bytes) -> None:
    """A mistake is one also beside what only the second parser reads."""
    with pytest.raises(ValueError):
        loads(data)
    assert not is_json(data)


def test_a_string_that_cannot_be_encoded() -> None:
    assert writable("a\ud83d\U0001f600é") == "a?\U0001f600é"


digits = st.text("0123456789", min_size=1, max_size=330)
numbers = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-"]),
    digits.map(lambda text: text.lstrip("0") or "0"),
    st.just("") | digits.map(".{}".format),
    st.just("")
    | st.builds(
        "{}{}{}".format,
        st.sampled_from("eE"),
        st.sampled_from(["", "+", "-"]),
        digits.map(lambda t: t[:5]),
    ),
)
strings = st.text(max_size=5).map(json.dumps) | st.lists(
    st.integers(0xD7F0, 0xE010).map("\\u{:04x}".format) | st.sampled_from(["\\n", "é", "\\uD83D"]),
    max_size=5,
).map(lambda parts: f'"{"".join(parts)}"')
documents = st.recursive(
    numbers | strings | st.sampled_from(["true", "false", "null"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.lists(st.tuples(strings, inner).map(":".join), max_size=3).map(
            lambda parts: f"{{{','.join(parts)}}}"
        )
    ),
    max_leaves=6,
)


@given(documents)
@examples(300)
def test_all_json_is_read(text: str) -> None:
    """As the standard library reads it, numbers apart, of which it makes floats."""
    value = loads(text.encode())
    assert _rough(value) == _rough(json.loads(text))
    assert is_json(text.encode())


def _rough(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rough(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rough(each) for each in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


@given(documents, st.integers(0, 2000), st.sampled_from(["", "\\", '"', "}", "]", ",", "NaN", "0"]))
@examples(300)
def test_nothing_else_is_read(text: str, place: int, other: str) -> None:
    """A text in which something was replaced is read if the standard library reads it."""
    place %= len(text)
    text = text[:place] + other + text[place + 1 :]
    try:
        json.loads(text, parse_constant=no_constant)
        expected = True
    except ValueError:
        expected = False
    try:
        loads(text.encode())
        assert expected
    except ValueError:
        assert not expected
    assert is_json(text.encode()) == expected


@given(documents, st.integers(0, 2000), st.binary(min_size=1, max_size=2))
@examples(300)
def test_bytes_are_json_where_they_can_be_read(text: str, place: int, other: bytes) -> None:
    """Also where what was replaced is no text any more."""
    data = text.encode()
    place %= len(data)
    data = data[:place] + other + data[place + 1 :]
    try:
        loads(data)
        expected = True
    except ValueError:
        expected = False
    assert is_json(data) == expected
