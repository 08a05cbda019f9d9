"""YAML and properties of any kind: values or one clear line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.migrate import config_file
from pipeline.options.config import Config
from pipeline.options.declare import OPTIONS
from pipeline.options.resolve import resolve
from tests.examples import examples
from transforms.errors import SinkError, UsageError
from transforms.filter.filter import FilterConfig, RecordFilter, load_criteria
from transforms.plain_text import NotYaml, parse_yaml
from transforms.properties import parse_properties
from transforms.records import NO_TIMESTAMP, Records

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["NO", "012", "1_000", "12:30:45", "null", "~", "${env:X}", "a,b", "-1", ""]),
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
_MARKUP = st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`,?=\\ \n\t~<0\u0085\ufeff"), max_size=40)


@given(_MARKUP | st.text(max_size=40))
@examples(200)
def test_any_text_is_yaml_or_not(text: str) -> None:
    """Plain values, or an error of one line."""
    try:
        parse_yaml(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=5),
        st.text(max_size=8),
        max_size=4,
    )
)
@examples(100)
def test_what_is_written_with_quotes_is_read_as_it_is(values: dict[str, str]) -> None:
    """Each text, whatever it looks like."""
    text = yaml.safe_dump(values, default_style='"', allow_unicode=False)
    assert parse_yaml(text) == values


@pytest.mark.parametrize("text", ["[" * 100_000, "a: [1", "@", "%x", "a: b: c", "\x00"])
def test_what_is_no_yaml(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_yaml(text)
    assert len(str(raised.value).splitlines()) == 1
    assert isinstance(raised.value, NotYaml) or "deep" in str(raised.value)


def _one_line_each(error: UsageError) -> None:
    assert error.problems
    assert all(len(problem.splitlines()) == 1 for problem in error.problems)


_FILES = st.one_of(
    st.text(max_size=60),
    _MARKUP,
    st.dictionaries(
        st.sampled_from([*OPTIONS, "name", "connector.class", "FunctionArn", "Topics", "config"])
        | st.text(max_size=6),
        _TREES,
        max_size=6,
    ).map(json.dumps),
    st.dictionaries(st.sampled_from([*OPTIONS]), _SCALARS, max_size=8).map(yaml.safe_dump),
)


@given(_FILES)
@examples(30)
def test_any_file_of_options(text: str) -> None:
    """Options, or what is wrong with them, a line each."""
    try:
        resolved = resolve(["--config=x"], {}, lambda path: text)
    except UsageError as error:
        _one_line_each(error)
    else:
        assert resolved.config or resolved.problems
        assert all(len(problem.splitlines()) == 1 for problem in resolved.problems)


_LIKELY = {
    name: st.sampled_from(
        [*option.choices, option.example, option.default_text, "1", "0", "-1", "x", "a,a", "1_0"]
    )
    | st.text(max_size=8)
    for name, option in OPTIONS.items()
    if name not in ("config", "explain", "kafka_config_file", "filter_criteria")
}


@given(st.fixed_dictionaries({}, optional=_LIKELY))
@examples(100)
def test_any_set_of_options(values: dict[str, Any]) -> None:
    """A configuration, or what is wrong with it, a line each."""
    base = {
        "kafka_bootstrap_servers": "b:1",
        "consumer_group": "g",
        "topics": "t",
        "function": "f",
    }
    try:
        Config.from_options({**base, **{k: str(v) for k, v in values.items()}})
    except UsageError as error:
        _one_line_each(error)


@given(
    st.text(max_size=80)
    | st.lists(
        st.tuples(
            st.sampled_from(["sasl.password", "acks", "a.b", "é"]),
            st.sampled_from(["=", ":", " ", " = ", ""]),
            st.text(max_size=10),
        )
    ).map(lambda rows: "\n".join("".join(row) for row in rows))
)
@examples(200)
def test_any_properties(text: str) -> None:
    """Settings, or a line for each that is none."""
    try:
        parse_properties(text, {})
    except UsageError as error:
        _one_line_each(error)
    config_file.plain_text.parse_properties(text)


_RULES = st.one_of(
    _SCALARS,
    st.dictionaries(
        st.sampled_from(
            [
                "prefix",
                "suffix",
                "anything-but",
                "exists",
                "numeric",
                "equals-ignore-case",
                "wildcard",
                "cidr",
                "x",
            ]
        ),
        _TREES | st.just(["=", 1]) | st.just([">", 0, "<=", 1e400]),
        max_size=2,
    ),
)
_PATTERNS = st.dictionaries(
    st.sampled_from(
        ["value", "key", "topic", "partition", "offset", "headers", "timestamp", "$or", "x"]
    ),
    st.lists(_RULES, max_size=3)
    | st.dictionaries(
        st.sampled_from(["a", "b", "$or", ""]), st.lists(_RULES, max_size=3), max_size=2
    )
    | _TREES,
    max_size=3,
)


@given(
    _PATTERNS,
    _TREES.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=12) | st.none(),
    st.sampled_from(["pass", "drop", "error"]),
)
@examples(200)
def test_any_filter_on_any_record(pattern: Any, value: bytes | None, unparsable: str) -> None:
    """A choice, or what is wrong with the filter in one line."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "filters"
        file.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
        try:
            chosen = FilterConfig(load_criteria(str(file)), unparsable)
        except SinkError as error:
            assert isinstance(error, UsageError)
            _one_line_each(error)
            return
    records = Records(
        offsets=[0], keys=[value], values=[value], headers=[None], timestamps=[NO_TIMESTAMP]
    )
    RecordFilter(chosen).choose("t", 0, records)
