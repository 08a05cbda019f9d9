"""Filter rules: every operator with what it matches and what not; what cannot be compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.filter.rules import (
    Bare,
    InvalidPatternError,
    all_fields,
    field,
    loads_exactly,
    needs_exact_numbers,
)


def matches(pattern: str, data: str) -> bool:
    """Whether a pattern matches an object; both as JSON, so that numbers have their text."""
    return all_fields(loads_exactly(pattern), "", field)(loads_exactly(data))


def matches_field(rules: str, node: str) -> bool:
    return matches(f'{{"f": {rules}}}', f'{{"f": {node}}}')


# -- operators -------------------------------------------------------------------------------------

# Rules of a field; what it may hold to match; what not. Compared with event-ruler 1.8.1, AWS's own
# implementation, except where a comment says otherwise.
OPERATORS: list[tuple[str, list[str], list[str]]] = [
    # equals
    ('["a"]', ['"a"', '["b", "a"]', '[["a"]]'], ['"A"', '""', "null", '{"a": "a"}', "[]", '["b"]']),
    ('["a", "b"]', ['"a"', '"b"'], ['"c"', '"ab"']),
    ('[""]', ['""'], ['" "', "null", "0", "false"]),
    ("[null]", ["null", "[1, null]"], ['"null"', "0", "false", '""', "{}"]),
    ("[true]", ["true"], ["1", '"true"', "false", "1.0"]),
    ("[false]", ["false"], ["0", '"false"', "null", '""']),
    ('["é"]', ['"é"', r'"\u00e9"'], ['"É"', r'"e\u0301"']),
    # Numbers by their text, as Lambda documents it. event-ruler's code takes 300 and 300.0 for
    # equal; here `numeric` does.
    ("[300]", ["300"], ["300.0", "3e2", '"300"', "301", "true"]),
    ("[300.0]", ["300.0"], ["300", "300.00", "3.0e2", '"300.0"']),
    ("[3.0e2]", ["3.0e2"], ["300.0", "3.0E2"]),
    ("[1, 2.5]", ["1", "2.5"], ["2", "1.0"]),
    ("[0]", ["0"], ["false", "null", '""', "0.0"]),
    ("[12345678901234567890123]", ["12345678901234567890123"], ["12345678901234567890124"]),
    ('[{"exactly": "a"}]', ['"a"'], ['"A"', '"ab"']),
    # equals-ignore-case
    ('[{"equals-ignore-case": "aB"}]', ['"ab"', '"AB"'], ['"abc"', "1", "null", "true"]),
    ('[{"equals-ignore-case": "É"}]', ['"é"', '"É"'], ['"e"']),
    # prefix, suffix
    ('[{"prefix": "eu-"}]', ['"eu-west-1"', '"eu-"'], ['"us"', '"EU-"', '"xeu-"', "1", "null"]),
    ('[{"prefix": ""}]', ['"a"', '""'], ["1", "null"]),
    ('[{"prefix": {"equals-ignore-case": "EU-"}}]', ['"eu-west"', '"Eu-"'], ['"us"', '"e"']),
    ('[{"suffix": ".png"}]', ['"a.png"', '".png"'], ['"a.PNG"', '".png "', '"png"', "null"]),
    ('[{"suffix": {"equals-ignore-case": ".PNG"}}]', ['"a.png"', '"a.Png"'], ['"a.jpg"']),
    # wildcard
    ('[{"wildcard": "a*z"}]', ['"az"', '"abcz"', r'"a\nz"'], ['"a"', '"bz"', '"azb"', "1"]),
    ('[{"wildcard": "*"}]', ['""', '"x"'], ["1", "null"]),
    ('[{"wildcard": "abc"}]', ['"abc"'], ['"abcd"', '"ab"']),
    ('[{"wildcard": "ab*ba"}]', ['"abba"', '"abxba"'], ['"aba"']),
    ('[{"wildcard": "*a*b*"}]', ['"ab"', '"xaxbx"', '"aab"'], ['"ba"', '"a"']),
    ('[{"wildcard": "a*ab*b"}]', ['"aabb"', '"axabxb"'], ['"aab"', '"abb"']),
    (r'[{"wildcard": "a\\*z"}]', ['"a*z"'], ['"abz"', r'"a\\*z"']),
    (r'[{"wildcard": "a\\\\*"}]', [r'"a\\"', r'"a\\b"'], ['"a*"', '"ab"']),
    (r'[{"wildcard": "\\**"}]', ['"*"', '"*x"'], ['"x"', '""']),
    # anything-but: true of every value that is there and is none of these
    ('[{"anything-but": "a"}]', ['"b"', '"A"', "1", "null", "true"], ['"a"', "{}", "[]"]),
    ('[{"anything-but": ["a", "b"]}]', ['"c"', '["a", "c"]'], ['"a"', '"b"', '["a", "b"]']),
    ('[{"anything-but": 5}]', ["6", '"5"', "null"], ["5"]),
    ('[{"anything-but": [5, 6]}]', ["7", "[5, 7]"], ["5", "6"]),
    # Of both kinds in one list: AWS's documents allow it, event-ruler does not.
    ('[{"anything-but": ["a", 5]}]', ["6", '"5"', '"b"'], ["5", '"a"']),
    ('[{"anything-but": {"prefix": "a"}}]', ['"ba"', '"A"', "1", "null"], ['"a"', '"ab"']),
    ('[{"anything-but": {"prefix": ["a", "b"]}}]', ['"c"'], ['"ax"', '"bx"']),
    ('[{"anything-but": {"suffix": "a"}}]', ['"ab"', "1"], ['"a"', '"ba"']),
    ('[{"anything-but": {"suffix": ["a", "b"]}}]', ['"c"'], ['"xa"', '"xb"']),
    ('[{"anything-but": {"equals-ignore-case": "a"}}]', ['"b"', "1"], ['"a"', '"A"']),
    ('[{"anything-but": {"equals-ignore-case": ["a", "b"]}}]', ['"c"'], ['"A"', '"B"']),
    ('[{"anything-but": {"wildcard": "a*z"}}]', ['"a"', "1"], ['"az"', '"abz"']),
    ('[{"anything-but": {"wildcard": ["a*", "*z"]}}]', ['"b"'], ['"ab"', '"yz"']),
    # numeric
    ('[{"numeric": ["=", 100]}]', ["100", "100.0", "1e2"], ["101", '"100"', "null", "true"]),
    ('[{"numeric": [">", 0, "<=", 5]}]', ["0.1", "5", "5.0"], ["0", "5.01", "-1", '"3"']),
    ('[{"numeric": [">=", -1.5, "<", 2]}]', ["-1.5", "1.9"], ["2", "-1.51"]),
    ('[{"numeric": ["<", 10]}]', ["9.99", "-5"], ["10", "false", "{}"]),
    ('[{"numeric": ["<=", 10]}]', ["10"], ["10.1"]),
    ('[{"numeric": [">", 1]}]', ["2", "[0, 2]", "6000000000"], ["1", "true", "[0, 1]"]),
    ('[{"numeric": [">=", 1]}]', ["1"], ["0.99"]),
    # cidr
    (
        '[{"cidr": "10.0.0.0/24"}]',
        ['"10.0.0.255"'],
        ['"10.0.1.0"', '"10.0.0"', '"x"', "10", "null"],
    ),
    ('[{"cidr": "10.0.0.33/24"}]', ['"10.0.0.1"'], ['"10.0.1.33"']),
    ('[{"cidr": "10.1.2.3/32"}]', ['"10.1.2.3"'], ['"10.1.2.4"']),  # event-ruler ends at 31
    ('[{"cidr": "2001:db8::/32"}]', ['"2001:db8::1"', '"2001:0DB8:1::"'], ['"2001:db9::"']),
    # Neither is in the other's network; for event-ruler all v4 is in ::/0.
    ('[{"cidr": "::/0"}]', ['"::1"'], ['"10.0.0.1"']),
    ('[{"cidr": "0.0.0.0/0"}]', ['"10.0.0.1"'], ['"::1"']),
    # exists
    ('[{"exists": true}]', ["1", "null", '""', "[1]", "[[1]]"], ["{}", '{"a": 1}', "[]", "[{}]"]),
    ('[{"exists": false}]', ["{}", '{"a": 1}', "[]", "[{}]"], ["1", "null", '""', "[1]"]),
    # alternatives
    ('["a", {"prefix": "b"}, {"numeric": [">", 5]}, null]', ['"a"', '"bc"', "6", "null"], ["5"]),
    ('["a", {"exists": false}]', ['"a"', "{}"], ['"b"']),
]


@pytest.mark.parametrize(("rules", "right", "wrong"), OPERATORS, ids=[row[0] for row in OPERATORS])
def test_an_operator(rules: str, right: list[str], wrong: list[str]) -> None:
    assert [node for node in right if not matches_field(rules, node)] == []
    assert [node for node in wrong if matches_field(rules, node)] == []


ABSENT_MATCHES = ['[{"exists": false}]', '["a", {"exists": false}]', '{"g": [{"exists": false}]}']


@pytest.mark.parametrize("rules", [row[0] for row in OPERATORS] + ABSENT_MATCHES)
def test_a_field_that_is_not_there(rules: str) -> None:
    """Nothing but exists false is true of it."""
    assert matches(f'{{"f": {rules}}}', "{}") is (rules in ABSENT_MATCHES)


# -- patterns --------------------------------------------------------------------------------------

PEOPLE = '{"people": [{"first": "Anna", "last": "Smith"}, {"first": "John", "last": "Doe"}]}'

# The same; where a comment names event-ruler, it says otherwise.
PATTERNS: list[tuple[str, list[str], list[str]]] = [
    # Fields are AND-ed; what the pattern does not name may be anything.
    (
        '{"a": ["x"], "b": [1]}',
        ['{"a": "x", "b": 1}', '{"b": 1, "a": "x", "c": 2}'],
        ['{"a": "x"}', '{"a": "x", "b": 2}', "{}"],
    ),
    (
        '{"a": {"b": {"c": [1]}}}',
        ['{"a": {"b": {"c": 1, "d": 2}}}', '{"a": [{"b": [{"c": [0, 1]}]}]}'],
        ['{"a": {"c": 1}}', '{"a": {"b": 1}}', '{"a": null}', '{"a": []}', '{"a.b.c": 1}'],
    ),
    # One element of an array has to match all of it.
    ('{"people": {"first": ["Anna"], "last": ["Smith"]}}', [PEOPLE], []),
    ('{"people": {"first": ["Anna"], "last": ["Doe"]}}', [], [PEOPLE]),
    (
        '{"a": {"b": [{"exists": false}]}}',
        # Of the last one event-ruler says no: it asks that no element has the field.
        ["{}", '{"a": 1}', '{"a": []}', '{"a": {"c": 1}}', '{"a": [{"b": 1}, {"c": 1}]}'],
        ['{"a": {"b": null}}', '{"a": [{"b": 1}]}', '{"a": [{"b": 1}, 2]}'],
    ),
    # $or
    (
        '{"s": ["x"], "$or": [{"a": [1]}, {"b": [2], "c": [3]}]}',
        ['{"s": "x", "a": 1}', '{"s": "x", "b": 2, "c": 3}'],
        ['{"a": 1}', '{"s": "x"}', '{"s": "x", "b": 2}', '{"s": "x", "$or": {"a": 1}}'],
    ),
    (
        '{"a": {"$or": [{"b": [1]}, {"c": {"$or": [{"d": [2]}, {"e": [3]}]}}]}}',
        ['{"a": {"b": 1}}', '{"a": {"c": {"e": 3}}}', '{"a": [{"c": {"d": 2}}]}'],
        ['{"a": {"c": {"d": 3}}}', '{"b": 1}'],
    ),
    # Both have to hold of `a`; for event-ruler the one that comes last.
    (
        '{"a": [2], "$or": [{"a": [{"numeric": [">", 1]}]}, {"b": [1]}]}',
        ['{"a": 2}'],
        ['{"a": 3}', '{"a": 3, "b": 1}'],
    ),
    # Where it cannot be meant as an alternative, it is a field.
    ('{"$or": ["x"]}', ['{"$or": "x"}'], ["{}"]),
    ('{"$or": {"a": [1]}}', ['{"$or": {"a": 1}}'], ['{"a": 1}']),
    ('{"$or": [{"prefix": "a"}, {"prefix": "b"}]}', ['{"$or": "bc"}'], ['{"prefix": "a"}']),
    # Of a key that is there twice the last one counts, in patterns and in data; of data
    # event-ruler takes either.
    ('{"a": [1], "a": [2]}', ['{"a": 2}', '{"a": 1, "a": 2}'], ['{"a": 1}', '{"a": 2, "a": 1}']),
    # A dot is part of the name; event-ruler looks into objects too.
    ('{"a.b": [1]}', ['{"a.b": 1}'], ['{"a": {"b": 1}}']),
    ('{"": [1]}', ['{"": 1}'], ["{}"]),
    # Names of operators are fields where fields are.
    (
        '{"numeric": [1.5], "cidr": {"exists": [1]}}',
        ['{"numeric": 1.5, "cidr": {"exists": 1}}'],
        [],
    ),
]


@pytest.mark.parametrize(("pattern", "right", "wrong"), PATTERNS, ids=[row[0] for row in PATTERNS])
def test_a_pattern(pattern: str, right: list[str], wrong: list[str]) -> None:
    assert [data for data in right if not matches(pattern, data)] == []
    assert [data for data in wrong if matches(pattern, data)] == []


# What is no JSON document but a key or a header: it may be meant either way.
BARE: list[tuple[str, list[str], list[str]]] = [
    ('["17"]', ["17"], ["17.0", " 17"]),
    ("[17]", ["17"], ["17.0", '"17"', "x"]),
    ("[17.0]", ["17.0"], ["17"]),
    ("[true, null]", ["true", "null"], ["True", ""]),
    ('["true"]', ["true"], ["false"]),
    ('[{"prefix": "1"}]', ["17"], ["7"]),
    ('[{"numeric": [">", 16]}]', ["17", "1.7e1"], ["16", "x17", "", "0x20", "nan", "true"]),
    ('[{"anything-but": "17"}]', ["18", "x"], ["17"]),
    ('[{"anything-but": 17}]', ["18", "x"], ["17"]),
    ('[{"cidr": "10.0.0.0/8"}]', ["10.1.1.1"], ["11.1.1.1"]),
    ('[{"exists": true}]', ["", "x"], []),
]


@pytest.mark.parametrize(("rules", "right", "wrong"), BARE, ids=[row[0] for row in BARE])
def test_bare_text_is_text_and_what_it_says(rules: str, right: list[str], wrong: list[str]) -> None:
    test = all_fields(loads_exactly(f'{{"f": {rules}}}'), "", field)
    assert [text for text in right if not test({"f": Bare(text)})] == []
    assert [text for text in wrong if test({"f": Bare(text)})] == []


@pytest.mark.parametrize(
    ("pattern", "needs"),
    [
        ('{"a": [1, "x", null, true]}', False),
        ('{"a": [{"numeric": [">", 1.5]}, {"prefix": "1.5"}]}', False),
        ('{"a": [1.5]}', True),
        ('{"a": {"b": [{"anything-but": [1.0]}]}}', True),
        ('{"$or": [{"a": [1]}, {"b": [1e3]}]}', True),
        ('{"numeric": [1.5]}', True),
        ('{"a": [9223372036854775808]}', True),
        ('{"a": [9223372036854775807]}', False),
    ],
)
def test_numbers_are_parsed_slowly_only_where_their_text_counts(pattern: str, needs: bool) -> None:
    assert needs_exact_numbers(loads_exactly(pattern)) is needs


def test_depth_and_length_of_the_data_are_no_matter() -> None:
    """A record nests and repeats what it likes: no recursion, no search that goes back."""
    deep: Any = ["a"]
    for _ in range(5000):
        deep = [deep]
    assert all_fields({"f": ["a"]}, "", field)({"f": deep})
    assert all_fields({"f": {"g": ["a"]}}, "", field)({"f": [deep, {"g": deep}]})
    many = {"f": [{"wildcard": "*a" * 30 + "*b"}]}
    assert not all_fields(many, "", field)({"f": "a" * 100_000})


# -- what does not compile -------------------------------------------------------------------------

INVALID: list[tuple[str, str]] = [
    ("{}", "the pattern must be an object with at least one field"),
    ("[1]", "the pattern must be an object with at least one field"),
    ('"x"', "the pattern must be an object with at least one field"),
    ('{"a": {}}', "a must be an object with at least one field"),
    ('{"a": []}', "a takes a list of rules"),
    ('{"a": 1}', "a takes a list of rules"),
    ('{"a": {"b": "x"}}', "a.b takes a list of rules"),
    ('{"a": null}', "or an object of fields"),
    ('{"a": [1, [2]]}', "a[1] takes a text, a number, true, false, null or an operator"),
    ('{"a": [{}]}', "a[0] must have one operator, not 0"),
    ('{"a": [{"prefix": "a", "suffix": "b"}]}', "a[0] must have one operator, not 2"),
    ('{"a": [{"regex": "a"}]}', 'a[0]: "regex" is not an operator; there are equals-ignore-case, '),
    ('{"a": {"b": [1, {"prefix": 1}]}}', 'a.b[1]: "prefix" takes a text or {"equals-ignore-case"'),
    ('{"a": [{"suffix": {"prefix": "x"}}]}', 'a[0]: "suffix" takes a text or'),
    ('{"a": [{"prefix": {"equals-ignore-case": 1}}]}', 'a[0]: "prefix" takes a text or'),
    ('{"a": [{"equals-ignore-case": ["a"]}]}', 'a[0]: "equals-ignore-case" takes a text'),
    ('{"a": [{"exactly": 1}]}', 'a[0]: "exactly" takes a text'),
    ('{"a": [{"wildcard": 1}]}', 'a[0]: "wildcard" takes a text'),
    ('{"a": [{"wildcard": "a**b"}]}', 'a[0]: "wildcard" has ** in it'),
    (r'{"a": [{"wildcard": "a\\b"}]}', "a backslash that stands before neither"),
    (r'{"a": [{"wildcard": "a\\"}]}', "a backslash that stands before neither"),
    ('{"a": [{"anything-but": null}]}', 'a[0]: "anything-but" takes a text, a number, a list'),
    ('{"a": [{"anything-but": true}]}', 'a[0]: "anything-but" takes'),
    ('{"a": [{"anything-but": []}]}', 'a[0]: "anything-but" takes'),
    ('{"a": [{"anything-but": [null]}]}', 'a[0]: "anything-but" takes'),
    ('{"a": [{"anything-but": {"numeric": ["=", 1]}}]}', "one of equals-ignore-case, prefix,"),
    ('{"a": [{"anything-but": {"prefix": ""}}]}', '"anything-but": "prefix" is empty'),
    ('{"a": [{"anything-but": {"suffix": ["a", ""]}}]}', '"anything-but": "suffix" is empty'),
    ('{"a": [{"anything-but": {"prefix": 1}}]}', '"prefix" takes a text or a list of texts'),
    ('{"a": [{"anything-but": {"wildcard": []}}]}', '"wildcard" takes a text or a list of texts'),
    ('{"a": [{"anything-but": {"wildcard": "**"}}]}', '"anything-but": "wildcard" has ** in it'),
    ('{"a": [{"numeric": []}]}', 'a[0]: "numeric" takes ["=", 1], a limit such as'),
    ('{"a": [{"numeric": 5}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": ["=", "1"]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": ["=", true]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": ["!=", 1]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": [">"]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": [["="], 1]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": ["<", 5, ">", 0]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": ["=", 1, "=", 1]}]}', 'a[0]: "numeric" takes'),
    ('{"a": [{"numeric": [">", 5, "<", 5]}]}', "a range that does not begin below its end"),
    ('{"a": [{"cidr": "10.0.0.1"}]}', 'a[0]: "cidr" takes a network such as 10.0.0.0/8'),
    ('{"a": [{"cidr": "10.0.0.0/33"}]}', 'a[0]: "cidr" takes a network'),
    ('{"a": [{"cidr": 10}]}', 'a[0]: "cidr" takes a network'),
    ('{"a": [{"exists": "yes"}]}', 'a[0]: "exists" takes true or false'),
    ('{"a": [{"exists": 0}]}', 'a[0]: "exists" takes true or false'),
    ('{"$or": [{"a": [1]}]}', "$or takes two objects or more"),
    ('{"$or": [{"a": [1]}, {}]}', "$or[1] must be an object with at least one field"),
    ('{"b": {"$or": [{"a": [1]}, {"c": 5}]}}', "b.$or[1].c takes a list of rules"),
]


@pytest.mark.parametrize(("pattern", "problem"), INVALID, ids=[row[0] for row in INVALID])
def test_an_invalid_pattern(pattern: str, problem: str) -> None:
    """One line with the place and what is allowed there."""
    with pytest.raises(InvalidPatternError) as raised:
        all_fields(loads_exactly(pattern), "", field)
    assert problem in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


# -- properties ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# None of the language's own words among them.
names = st.text("aBé.$* \\", max_size=4)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
scalars = texts | numbers | st.booleans() | st.none()
nodes = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(names, nodes, max_size=4)


def pattern_of(node: Any) -> Any:
    """A pattern that asks for all that a node holds; None if it holds no value."""
    if isinstance(node, dict):
        fields = {name: pattern_of(inner) for name, inner in node.items()}
        return {name: inner for name, inner in fields.items() if inner} or None
    if isinstance(node, list):
        return next(filter(None, map(pattern_of, node)), None)
    return [node]


def without(data: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The object without the value at a path."""
    name, *rest = path
    changed = dict(data)
    if rest and isinstance(data[name], dict):
        changed[name] = without(data[name], rest)
    else:
        del changed[name]
    return changed


def fits(pattern: Any, data: Any) -> bool:
    return matches(json.dumps(pattern), json.dumps(data))


@given(objects)
def test_a_pattern_built_from_a_value_matches_it(data: dict[str, Any]) -> None:
    """And no longer once one of the fields it names is gone."""
    pattern = pattern_of(data)
    if pattern is None:
        return
    assert fits(pattern, data)
    path, rules = [], pattern
    while isinstance(rules, dict):
        path.append(next(iter(rules)))
        rules = rules[path[-1]]
    assert not fits(pattern, without(data, path))


@given(objects, objects)
def test_what_a_pattern_does_not_name_is_no_matter(
    data: dict[str, Any], more: dict[str, Any]
) -> None:
    pattern = pattern_of(data)
    if pattern is not None:
        assert fits(pattern, {**more, **data})


@given(st.lists(texts | numbers, min_size=1, max_size=3), scalars)
def test_anything_but_is_the_negation_of_equals(values: list[Any], scalar: Any) -> None:
    """For every value that is there; of a field that is not, neither is true."""
    equal, other = {"f": values}, {"f": [{"anything-but": values}]}
    assert fits(equal, {"f": scalar}) is not fits(other, {"f": scalar})
    assert all(fits(other, {"f": value}) is False for value in values)
    assert not fits(equal, {}) and not fits(other, {})


@pytest.mark.parametrize("name", ["prefix", "suffix", "equals-ignore-case", "wildcard"])
@given(st.lists(texts.filter(bool), min_size=1, max_size=3), scalars)
def test_anything_but_is_the_negation_of_what_is_in_it(
    name: str, values: list[str], scalar: Any
) -> None:
    if name == "wildcard":
        values = [value.replace("\\", "").replace("**", "*").replace("**", "") for value in values]
    positive = {"f": [{name: value} for value in values]}
    negative = {"f": [{"anything-but": {name: values}}]}
    assert fits(positive, {"f": scalar}) is not fits(negative, {"f": scalar})


@given(nodes)
def test_exists_is_true_or_false(node: Any) -> None:
    there, gone = {"f": [{"exists": True}]}, {"f": [{"exists": False}]}
    for data in ({"f": node}, {}):
        assert fits(there, data) is not fits(gone, data)


@given(texts, texts)
def test_a_text_s_edges(head: str, tail: str) -> None:
    for rule in (
        {"prefix": head},
        {"suffix": tail},
        {"prefix": {"equals-ignore-case": head}},
        {"suffix": {"equals-ignore-case": tail}},
        {"wildcard": "*"},
    ):
        assert fits({"f": [rule]}, {"f": head + tail})


@given(st.lists(texts, min_size=1, max_size=4), texts)
def test_a_wildcard_stands_for_any_text(parts: list[str], between: str) -> None:
    parts = [part for index, part in enumerate(parts) if part or index in (0, len(parts) - 1)]
    escaped = [part.replace("\\", "\\\\").replace("*", "\\*") for part in parts]
    assert fits({"f": [{"wildcard": "*".join(escaped)}]}, {"f": between.join(parts)})


@given(numbers, numbers, st.booleans(), st.booleans())
def test_a_range_is_both_of_its_limits(one: float, other: float, open_: bool, closed: bool) -> None:
    low, high = sorted([one, other])
    if low == high:
        return
    above, below = ">" if open_ else ">=", "<=" if closed else "<"
    for number in (low, high, (low + high) / 2):
        both = fits({"f": [{"numeric": [above, low, below, high]}]}, {"f": number})
        each = [
            fits({"f": [{"numeric": limit}]}, {"f": number})
            for limit in ([above, low], [below, high])
        ]
        assert both is all(each)


@given(st.lists(objects, min_size=2, max_size=3), objects)
def test_or_is_one_of_its_patterns(branches: list[dict[str, Any]], data: dict[str, Any]) -> None:
    patterns = [pattern for pattern in map(pattern_of, branches) if pattern is not None]
    if len(patterns) < 2:
        return
    for tried in (data, *branches):
        either = fits({"f": {"$or": patterns}}, {"f": tried})
        assert either is any(fits({"f": pattern}, {"f": tried}) for pattern in patterns)


@given(st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=8))
def test_whatever_a_pattern_is_it_compiles_or_says_why(pattern: Any) -> None:
    try:
        test = all_fields(pattern, "", field)
    except InvalidPatternError as error:
        assert str(error)
    else:
        test({"a": 1})
