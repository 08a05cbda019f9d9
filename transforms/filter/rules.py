"""Filter rules: the pattern language of event source mappings, compiled to closures. Pure.

A pattern is a JSON object that looks like what it is compared with: its fields have to match all,
the rules listed under a field are alternatives. The language is EventBridge's, all of it::

    "a", 1, true, null                      equal; numbers by their text
    {"equals-ignore-case": "a"}             equal in whatever case
    {"prefix": "a"}, {"suffix": "a"}        begins, ends; also with {"equals-ignore-case": "a"}
    {"wildcard": "a*b"}                     * is any text; \\* and \\\\ are * and \\
    {"anything-but": ...}                   none of these: a text, a number, a list of them, or an
                                            object with one of prefix, suffix, equals-ignore-case
                                            and wildcard, and a text or a list of texts in it
    {"numeric": [">", 0, "<=", 5]}          in a range, or ["=", 5]; numbers by their value
    {"cidr": "10.0.0.0/8"}                  an IP address of the network, v4 or v6
    {"exists": true}, {"exists": false}     the field holds a value, or not; an object is none
    "$or": [{...}, {...}]                   in place of a field: one of these patterns

Of an array in the data one element that matches is enough.
"""

from __future__ import annotations

import ipaddress
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from transforms.json_text import integer, loads, no_constant

Test = Callable[[Any], bool]
"""Says whether a node of the data matches."""

CompileField = Callable[[str, Any, str], Test]
"""Makes a field's name, what a pattern has under it, and its place a test of the whole object."""

_ABSENT: Final[Any] = object()


class InvalidPatternError(ValueError):
    """A pattern that cannot be used; the message names the place in it and what is allowed."""


class Float(float):
    """A JSON number with a fraction or an exponent, and the text it was written as."""

    text: str

    def __new__(cls, text: str) -> Float:
        number = super().__new__(cls, text)
        number.text = text
        return number


class Bare(str):
    """Text outside of JSON, which may be meant as a text or as a number, true, false or null."""


# -- JSON whose numbers keep their text ------------------------------------------------------------


_DECODER = json.JSONDecoder(parse_float=Float, parse_int=integer, parse_constant=no_constant)


def loads_exactly(data: bytes | str) -> Any:
    """Parse JSON as `loads` does, but with `Float` and integers of any size.

    Raises:
        ValueError: It is not JSON.
    """
    data = data.encode() if isinstance(data, str) else data
    loads(data)
    try:
        return _DECODER.decode(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def needs_exact_numbers(pattern: Any, listed: bool = False) -> bool:
    """Whether a pattern compares the text of a number that a 64-bit parser does not keep."""
    if isinstance(pattern, dict):
        fields = [node for name, node in pattern.items() if not (listed and name == "numeric")]
        return any(map(needs_exact_numbers, fields))
    if isinstance(pattern, list):
        return any(needs_exact_numbers(node, listed=True) for node in pattern)
    return type(pattern) is Float or (type(pattern) is int and abs(pattern) >= 2**63)


# -- objects ---------------------------------------------------------------------------------------


def all_fields(pattern: Any, place: str, compile_field: CompileField) -> Test:
    """Compile an object of a pattern.

    Args:
        pattern: The object.
        place: Where in the whole pattern it is; empty at the top.
        compile_field: Compiles each of its fields, those inside `$or` too.

    Raises:
        InvalidPatternError: Something in it does not fit.
    """
    if not isinstance(pattern, dict) or not pattern:
        raise InvalidPatternError(
            f"{place or 'the pattern'} must be an object with at least one field"
        )
    tests = []
    for name, rules in pattern.items():
        where = f"{place}.{name}" if place else name
        if name != "$or" or not _is_alternative(rules):
            tests.append(compile_field(name, rules, where))
        elif len(rules) < 2:
            raise InvalidPatternError(f"{where} takes two objects or more")
        else:
            tests.append(
                any_of([all_fields(r, f"{where}[{i}]", compile_field) for i, r in enumerate(rules)])
            )
    return _all_of(tests)


def field(name: str, rules: Any, place: str) -> Test:
    """A `CompileField` for the fields of an object."""
    test = under_field(rules, place)
    return lambda node: test(node.get(name, _ABSENT))


def flat_field(name: str, rules: Any, place: str) -> Test:
    """The same where a field holds no object, so that only a list of rules makes sense."""
    test = listed_rules(rules, place)
    return lambda node: test(node.get(name, _ABSENT))


def under_field(rules: Any, place: str) -> Test:
    """Compile what a pattern has under a field; the test is of what the field holds."""
    if not isinstance(rules, dict):
        return listed_rules(rules, place, " or an object of fields")
    test = all_fields(rules, place, field)
    # What something that is no object comes to: it has none of the fields.
    without_fields = test({})

    def matches(node: Any) -> bool:
        kind = type(node)
        if kind is dict:
            return test(node)
        if kind is list:
            objects = [element for element in _elements(node) if type(element) is dict]
            return any(map(test, objects)) if objects else without_fields
        return without_fields

    return matches


def any_of(tests: Sequence[Test]) -> Test:
    """True if one of the tests is."""
    if len(tests) == 1:
        return tests[0]

    def matches(node: Any) -> bool:
        for test in tests:  # noqa: SIM110 (half the time of any() over a generator)
            if test(node):
                return True
        return False

    return matches


def _all_of(tests: Sequence[Test]) -> Test:
    if len(tests) == 1:
        return tests[0]

    def matches(node: Any) -> bool:
        for test in tests:  # noqa: SIM110
            if not test(node):
                return False
        return True

    return matches


def _is_alternative(rules: Any) -> bool:
    """Whether a `$or` is more than a field of that name."""
    if not isinstance(rules, list) or not rules:
        return False
    return all(isinstance(rule, dict) and not _RESERVED & rule.keys() for rule in rules)


def _elements(array: list[Any]) -> list[Any]:
    """What an array holds, with arrays inside it taken apart."""
    # No recursion: how deep they are nested is up to whoever wrote the record.
    found: list[Any] = []
    arrays = [array]
    while arrays:
        for element in arrays.pop():
            (arrays if type(element) is list else found).append(element)
    return found


# -- lists of rules --------------------------------------------------------------------------------


def listed_rules(rules: Any, place: str, or_else: str = "") -> Test:
    """Compile a list of rules; the test is of what their field holds."""
    if not isinstance(rules, list) or not rules:
        raise InvalidPatternError(
            f'{place} takes a list of rules, such as ["a", {{"prefix": "b"}}]{or_else}'
        )
    absent = False
    equal: list[Any] = []
    tests: list[Test] = []
    for index, rule in enumerate(rules):
        where = f"{place}[{index}]"
        if isinstance(rule, dict):
            name, argument = _operator(rule, where)
            if name == "exists" and argument is False:
                absent = True
            else:
                tests.append(OPERATORS[name](argument, f'{where}: "{name}"'))
        elif isinstance(rule, list):
            raise InvalidPatternError(
                f"{where} takes a text, a number, true, false, null or an operator, not a list"
            )
        else:
            equal.append(rule)
    if equal:
        tests.insert(0, _equals(equal))
    test = any_of(tests)

    def matches(node: Any) -> bool:
        kind = type(node)
        if kind is list:
            leaves = [element for element in _elements(node) if type(element) is not dict]
            return any(map(test, leaves)) if leaves else absent
        if node is _ABSENT or kind is dict:
            return absent
        return test(node)

    return matches


def _operator(rule: dict[str, Any], place: str) -> tuple[str, Any]:
    if len(rule) != 1:
        raise InvalidPatternError(f"{place} must have one operator, not {len(rule)}")
    ((name, argument),) = rule.items()
    if name not in OPERATORS:
        raise InvalidPatternError(
            f'{place}: "{name}" is not an operator; there are {", ".join(OPERATORS)}'
        )
    return name, argument


# -- rules: each compiles to a test of one text, number, true, false or null -----------------------


def _equals(values: Iterable[Any]) -> Test:
    texts = frozenset(value for value in values if isinstance(value, str))
    whole = frozenset(value for value in values if type(value) is int)
    floats = frozenset(value.text for value in values if type(value) is Float)
    constants = [value for value in values if value is None or type(value) is bool]
    bare = texts | floats | {json.dumps(value) for value in [*whole, *constants]}

    def equals(node: Any) -> bool:
        kind = type(node)
        if kind is str:
            return node in texts
        if kind is int:
            return node in whole
        if kind is Bare:
            return node in bare
        if kind is Float:
            return node.text in floats
        return (node is None or kind is bool) and node in constants

    return equals


def _exactly(argument: Any, place: str) -> Test:
    return _equals([_text(argument, place)])


def _equals_ignore_case(argument: Any, place: str) -> Test:
    wanted = _text(argument, place).lower()
    return lambda node: isinstance(node, str) and node.lower() == wanted


def _text(argument: Any, place: str) -> str:
    if not isinstance(argument, str):
        raise InvalidPatternError(f"{place} takes a text")
    return argument


def _edge(has: Callable[[str, str], bool]) -> Callable[[Any, str], Test]:
    """`prefix` or `suffix`."""

    def edge(argument: Any, place: str) -> Test:
        fold = isinstance(argument, dict) and list(argument) == ["equals-ignore-case"]
        wanted = argument["equals-ignore-case"] if fold else argument
        if not isinstance(wanted, str):
            raise InvalidPatternError(f'{place} takes a text or {{"equals-ignore-case": "..."}}')
        if fold:
            wanted = wanted.lower()
            return lambda node: isinstance(node, str) and has(node.lower(), wanted)
        return lambda node: isinstance(node, str) and has(node, wanted)

    return edge


def _wildcard(argument: Any, place: str) -> Test:
    parts = _between_wildcards(_text(argument, place), place)
    if len(parts) == 1:
        return lambda node: isinstance(node, str) and node == parts[0]
    head, *middle, tail = parts
    least = len(head) + len(tail)

    # Each part where it comes first: no text makes this go back and try again.
    def matches(node: Any) -> bool:
        if not isinstance(node, str) or len(node) < least:
            return False
        if not node.startswith(head) or not node.endswith(tail):
            return False
        at, end = len(head), len(node) - len(tail)
        for part in middle:
            at = node.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True

    return matches


def _between_wildcards(text: str, place: str) -> list[str]:
    parts, characters, before = [""], iter(text), ""
    for character in characters:
        if character == "*":
            if before == "*":
                raise InvalidPatternError(f"{place} has ** in it; one * is any text already")
            parts.append("")
        elif character == "\\":
            escaped = next(characters, "")
            if escaped not in ("*", "\\"):
                raise InvalidPatternError(
                    f"{place} has a backslash that stands before neither * nor a backslash"
                )
            parts[-1] += escaped
        else:
            parts[-1] += character
        before = character
    return parts


def _anything_but(argument: Any, place: str) -> Test:
    if isinstance(argument, dict) and len(argument) == 1 and _NEGATED & argument.keys():
        ((name, values),) = argument.items()
        texts = values if isinstance(values, list) else [values]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidPatternError(f'{place}: "{name}" takes a text or a list of texts')
        if name in ("prefix", "suffix") and "" in texts:
            raise InvalidPatternError(f'{place}: "{name}" is empty, so no text would match')
        found = any_of([OPERATORS[name](text, f'{place}: "{name}"') for text in texts])
    else:
        listed = argument if isinstance(argument, list) else [argument]
        if not listed or not all(type(value) in (str, int, Float) for value in listed):
            raise InvalidPatternError(
                f"{place} takes a text, a number, a list of these, or an object with one of "
                f"{', '.join(sorted(_NEGATED))}"
            )
        found = _equals(listed)
    return lambda node: not found(node)


def _numeric(argument: Any, place: str) -> Test:
    parts = argument if isinstance(argument, list) else []
    signs, limits = parts[::2], parts[1::2]
    shape = " ".join(sign if isinstance(sign, str) else "?" for sign in signs)
    if (
        len(parts) % 2
        or shape not in _SHAPES
        or not all(type(limit) in (int, Float) for limit in limits)
    ):
        raise InvalidPatternError(
            f'{place} takes ["=", 1], a limit such as [">", 1], or a range such as '
            f'[">=", 1, "<", 5]'
        )
    if len(limits) == 2 and limits[0] >= limits[1]:
        raise InvalidPatternError(f"{place} has a range that does not begin below its end")
    compare = [(_COMPARE[sign], limit) for sign, limit in zip(signs, limits)]
    low, low_limit = compare[0]
    high, high_limit = compare[-1]

    def numeric(node: Any) -> bool:
        if type(node) is Bare:
            try:
                node = loads(node.encode())
            except ValueError:
                return False
        if type(node) not in (int, float, Float):
            return False
        return low(node, low_limit) and high(node, high_limit)

    return numeric


def _cidr(argument: Any, place: str) -> Test:
    try:
        if "/" not in argument:
            raise ValueError
        # Bits behind the mask may be set, as AWS takes them too; they are not compared.
        network = ipaddress.ip_network(argument, strict=False)
    except (ValueError, TypeError):
        raise InvalidPatternError(
            f"{place} takes a network such as 10.0.0.0/8 or 2001:db8::/32"
        ) from None

    def cidr(node: Any) -> bool:
        if not isinstance(node, str):
            return False
        try:
            return ipaddress.ip_address(node) in network
        except ValueError:
            return False

    return cidr


def _exists(argument: Any, place: str) -> Test:
    if argument is not True:
        raise InvalidPatternError(f"{place} takes true or false")
    return lambda node: True


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SHAPES = frozenset([*_COMPARE, "> <", "> <=", ">= <", ">= <="])

OPERATORS: dict[str, Callable[[Any, str], Test]] = {
    "equals-ignore-case": _equals_ignore_case,
    "prefix": _edge(str.startswith),
    "suffix": _edge(str.endswith),
    "wildcard": _wildcard,
    "anything-but": _anything_but,
    "numeric": _numeric,
    "cidr": _cidr,
    "exists": _exists,
    "exactly": _exactly,
}
_NEGATED = frozenset({"equals-ignore-case", "prefix", "suffix", "wildcard"})

# With one of these inside, `$or` is a field like any other, as it was before it became a word of
# the language. The last ones are kept free there for operators to come.
_RESERVED = (
    frozenset(OPERATORS)
    | frozenset(_COMPARE)
    | {"regex", "not-wildcard", "not-equals-ignore-case"}
    | {"date-after", "date-on-or-after", "date-before", "date-on-or-before", "in-date-range"}
    | {"ip-address-in-range", "ip-address-not-in-range"}
)
