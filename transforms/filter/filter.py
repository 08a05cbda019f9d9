"""Filter: RecordChunk -> RecordChunk without the records that no filter matches.

The filters are the FilterCriteria of an event source mapping: one that matches is enough. What
they say about key and value is compared with the record's JSON or its text; where the record has
not the form that a pattern asks for, `--filter_unparsable` decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Final

import apache_beam as beam
import orjson

from transforms.conditions import INVALID_RECORD
from transforms.errors import UsageError
from transforms.filter.rules import (
    Bare,
    InvalidPatternError,
    Test,
    all_fields,
    any_of,
    flat_field,
    listed_rules,
    loads_exactly,
    needs_exact_numbers,
    under_field,
)
from transforms.json_text import JSON_STARTS, loads, no_constant
from transforms.plain_text import parse_yaml
from transforms.records import NO_TIMESTAMP, Header, RecordChunk, Records, Rejection
from transforms.tally import BOOKS, FILTERED
from transforms.text_file import read_text

MAX_FILTERS = 10
UNPARSABLE = ("pass", "drop", "error")

STREAM_FIELDS = {"data": "value", "partitionKey": "key"}
"""What a pattern for a stream calls the fields. AWS knows data alone."""

FIELDS = ("value", "key", "headers", "topic", "partition", "offset", "timestamp")
"""What a pattern may name at its top; a `_Row` has its columns in this order."""

_Row = tuple[Any, ...]
"""One record. Key and value are pairs, see `_forms`."""

_OBJECT, _TEXT = 0, 1
_MISFIT: Final[Any] = object()


@dataclass(frozen=True, slots=True)
class FilterConfig:
    """Which records go to the function.

    Attributes:
        patterns: JSON texts, as `parse_criteria` gives them; at least one.
        unparsable: What a pattern's part about a key or value says if these cannot be compared
            with it: ``pass`` that they match, ``drop`` that they do not; ``error`` makes an
            error record of the record, unless the rest decides.
    """

    patterns: tuple[str, ...]
    unparsable: str = "pass"


# -- criteria --------------------------------------------------------------------------------------

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
# Numbers of a pattern that is not a text yet keep the text they have in the file.
_VERBATIM = json.JSONDecoder(
    parse_float=orjson.Fragment, parse_int=orjson.Fragment, parse_constant=no_constant
)


def load_criteria(path: str, aliases: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Read a file with FilterCriteria; see `parse_criteria`.

    Raises:
        UsageError: The file cannot be read, or what is in it does not fit.
    """
    text = read_text("filter_criteria", path)
    name = f"--filter_criteria={path}"
    try:
        return parse_criteria(_decode(text), aliases)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise UsageError([f"{name} is neither JSON nor YAML: {why}"]) from None
    except UsageError as error:
        raise UsageError([f"{name}: {problem}" for problem in error.problems]) from None


def _decode(text: str) -> Any:
    try:
        return _VERBATIM.decode(text)
    except ValueError:
        if text.lstrip()[:1] in ("{", "["):
            # YAML would take most of it, and say something stranger.
            raise
        return parse_yaml(text, _scalar)


def _scalar(text: str) -> Any:
    """What YAML has without quotes: what JSON writes in the same way, and else the text it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return orjson.Fragment(text) if _NUMBER.fullmatch(text) else text


def parse_criteria(criteria: Any, aliases: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Check FilterCriteria and take the patterns out.

    Args:
        criteria: ``{"Filters": [{"Pattern": "<JSON text>"}]}``, or an object with that as its
            ``FilterCriteria``, such as AWS's description of a mapping, or its list of one. A
            pattern may be an object in place of its text.
        aliases: What a pattern calls the fields there are, where that is not `FIELDS`.

    Returns:
        The patterns, for a `FilterConfig`.

    Raises:
        UsageError: With a line for each filter that does not fit.
    """
    if isinstance(criteria, dict) and "EventSourceMappings" in criteria:
        mappings = criteria["EventSourceMappings"]
        criteria = mappings[0] if isinstance(mappings, list) and len(mappings) == 1 else None
    if isinstance(criteria, dict) and "FilterCriteria" in criteria:
        criteria = criteria["FilterCriteria"]
    filters = criteria.get("Filters") if isinstance(criteria, dict) else None
    if not isinstance(filters, list) or not filters:
        raise UsageError(['there are no filters in it; give {"Filters": [{"Pattern": "..."}]}'])
    if len(filters) > MAX_FILTERS:
        raise UsageError([f"{len(filters)} filters are too many; give {MAX_FILTERS} at most"])
    patterns, problems = [], []
    for number, entry in enumerate(filters, 1):
        try:
            pattern = _pattern_text(entry)
            if aliases is not None:
                pattern = _renamed(pattern, aliases)
            _Pattern(pattern, misfit=True)
        except InvalidPatternError as error:
            problems.append(f"filter {number}: {error}")
        else:
            patterns.append(pattern)
    if problems:
        raise UsageError(problems)
    return tuple(patterns)


def _pattern_text(entry: Any) -> str:
    if not isinstance(entry, dict) or list(entry) != ["Pattern"]:
        raise InvalidPatternError('it must be an object with "Pattern" and nothing else')
    pattern = entry["Pattern"]
    if isinstance(pattern, str):
        return pattern
    try:
        return orjson.dumps(pattern).decode()
    except TypeError as error:
        raise InvalidPatternError(f"the pattern is not JSON: {error}") from None


def _renamed(text: str, aliases: Mapping[str, str]) -> str:
    """A pattern with the fields' own names in place of other ones."""

    def rename(pattern: Any) -> Any:
        if not isinstance(pattern, dict):
            return pattern
        found = {}
        for name, rules in pattern.items():
            if name == "$or" and isinstance(rules, list):
                found[name] = [rename(each) for each in rules]
            elif name in aliases:
                found[aliases[name]] = rules
            else:
                raise InvalidPatternError(f"{name} is not known; there are {', '.join(aliases)}")
        return found

    try:
        return orjson.dumps(rename(_VERBATIM.decode(text))).decode()
    except InvalidPatternError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidPatternError(f"the pattern is not JSON: {error}") from None


# -- patterns about records ------------------------------------------------------------------------


class _Pattern:
    """A compiled pattern.

    Args:
        text: The pattern as JSON.
        misfit: What it says about a key or value that has not the form it asks for.

    Raises:
        InvalidPatternError: It does not fit.
    """

    def __init__(self, text: str, misfit: bool) -> None:
        self._misfit = misfit
        self.names: set[str] = set()
        self.forms: set[tuple[str, int]] = set()
        try:
            pattern = loads_exactly(text)
            self.exact = needs_exact_numbers(pattern)
            self.test = all_fields(pattern, "", self._field)
        except InvalidPatternError:
            raise
        except ValueError as error:
            raise InvalidPatternError(f"the pattern is not JSON: {error}") from None
        except RecursionError:
            raise InvalidPatternError("the pattern is nested too deeply") from None

    def _field(self, name: str, rules: Any, place: str) -> Test:
        """One of `FIELDS`, for a test of a `_Row`."""
        if name not in FIELDS:
            raise InvalidPatternError(f"{place} is not known; there are {', '.join(FIELDS)}")
        self.names.add(name)
        index = FIELDS.index(name)
        if name in ("value", "key"):
            listed = isinstance(rules, list)
            test = _listed(rules, place) if listed else under_field(rules, place)
            return self._data(name, index, test, _TEXT if listed else _OBJECT)
        if name == "headers":
            if not isinstance(rules, dict):
                raise InvalidPatternError(f"{place} takes an object of header names")
            test = all_fields(rules, place, flat_field)
        else:
            test = _listed(rules, place)
        return lambda row: test(row[index])

    def _data(self, name: str, index: int, test: Test, form: int) -> Test:
        misfit = self._misfit
        self.forms.add((name, form))

        def matches(row: _Row) -> bool:
            node = row[index][form]
            return misfit if node is _MISFIT else test(node)

        return matches


def _listed(rules: Any, place: str) -> Test:
    """A list of rules about what a record may lack: then it is null, and for `exists` not there."""
    test = listed_rules(rules, place)
    others = [rule for rule in rules if rule != {"exists": True}]
    lacking = {"exists": False} in rules or (bool(others) and listed_rules(others, place)(None))
    return lambda node: lacking if node is None else test(node)


class RecordFilter:
    """The compiled filters of a config."""

    def __init__(self, config: FilterConfig) -> None:
        lenient = [_Pattern(pattern, misfit=True) for pattern in config.patterns]
        strict = [_Pattern(pattern, misfit=False) for pattern in config.patterns]
        self._lenient = any_of([pattern.test for pattern in lenient])
        self._strict = any_of([pattern.test for pattern in strict])
        self._names = {name for pattern in lenient for name in pattern.names}
        self._forms = sorted({form for pattern in lenient for form in pattern.forms})
        self._loads = loads_exactly if any(p.exact for p in lenient) else loads
        self._unparsable = config.unparsable

    def choose(
        self, topic: str, partition: int, records: Records
    ) -> tuple[list[bool], dict[int, Rejection]]:
        """Say which records go on. Each key and value is parsed once, and only if looked at.

        Args:
            topic: The records' topic.
            partition: The records' partition.
            records: What to look at; a key or value as its schema made it, if it did.

        Returns:
            Per record whether it goes on, and by index the ones that may only do so as error
            records. A record that was rejected before goes on as it is.
        """
        rows = list(self._rows(topic, partition, records))
        chosen = list(map(self._lenient if self._unparsable == "pass" else self._strict, rows))
        rejections: dict[int, Rejection] = {}
        if self._unparsable == "error":
            for index, row in enumerate(rows):
                # It hangs on what cannot be compared.
                if not chosen[index] and self._lenient(row):
                    rejections[index] = self._reject(row, records, index)
        for index, earlier in enumerate(records.rejections):
            if earlier:
                rejections[index] = earlier
        for index in rejections:
            chosen[index] = True
        return chosen, rejections

    def _rows(self, topic: str, partition: int, records: Records) -> Iterable[_Row]:
        keys, values = records.keys, records.values
        if records.decoded:
            decoded = records.decoded
            keys = [d.key if d and d.key is not None else key for d, key in zip(decoded, keys)]
            values = [d.value if d and d.value is not None else v for d, v in zip(decoded, values)]
        names, loads, nothing = self._names, self._loads, repeat(None)
        return zip(
            [_forms(value, loads) for value in values] if "value" in names else nothing,
            [_forms(key, loads) for key in keys] if "key" in names else nothing,
            map(_by_name, records.headers) if "headers" in names else nothing,
            repeat(topic),
            repeat(partition),
            records.offsets,
            [None if ms == NO_TIMESTAMP else ms for ms in records.timestamps],
        )

    def _reject(self, row: _Row, records: Records, index: int) -> Rejection:
        data = {"key": records.keys[index], "value": records.values[index]}
        parts = {
            f"{name} ({len(data[name] or b'')} bytes)": None
            for name, form in self._forms
            if row[FIELDS.index(name)][form] is _MISFIT
        }
        return Rejection(
            INVALID_RECORD,
            "FilterUnparsable",
            f"the record's {' and '.join(parts)} cannot be compared with --filter_criteria, and "
            f"--filter_unparsable=error asks for an error record then",
        )


def _forms(data: bytes | None, loads: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A key or value as patterns may ask for it: as object or array, and as a text.

    It has one of the forms, or none if it is not UTF-8. Null and JSON that is neither object nor
    array are of the second one, a JSON string as what it says.
    """
    if data is None:
        return _MISFIT, None
    try:
        # To ask the parser about every text would take most of the time.
        node = loads(data) if data and data[0] in JSON_STARTS else _MISFIT
    except ValueError:
        node = _MISFIT
    if node is _MISFIT:
        try:
            return _MISFIT, Bare(data.decode())
        except UnicodeDecodeError:
            return _MISFIT, _MISFIT
    kind = type(node)
    if kind is dict or kind is list:
        return node, _MISFIT
    return _MISFIT, node if kind is str else Bare(data.strip().decode())


def _by_name(headers: Sequence[Header] | None) -> dict[str, list[Any]]:
    """Headers by name, each with the values of all that have it.

    A value that is not UTF-8 stays bytes: it is there, and equals nothing.
    """
    named: dict[str, list[Any]] = {}
    for name, value in headers or ():
        named.setdefault(name, []).append(_header_text(value))
    return named


def _header_text(value: bytes | None) -> Bare | bytes | None:
    try:
        return value if value is None else Bare(value.decode())
    except UnicodeDecodeError:
        return value


# -- the step --------------------------------------------------------------------------------------


def filter_chunk(chunk: RecordChunk, record_filter: RecordFilter) -> RecordChunk:
    """The chunk with the records that go on. Its range stays, so that the others are committed."""
    chosen, rejections = record_filter.choose(chunk.topic, chunk.partition, chunk.records)
    records = chunk.records
    if rejections:
        records = replace(records, rejections=[rejections.get(i) for i in range(len(records))])
    if not all(chosen):
        records = records.where(chosen)
    return chunk if records is chunk.records else replace(chunk, records=records)


class FilterRecords(beam.PTransform):
    """Take out the records that no filter matches.

    Bounded and unbounded; one element out per element in, with the range of offsets it came with.
    A record that cannot be compared goes on, is taken out, or goes on rejected, as the config
    says. Counts the records taken out as `filtered`.
    """

    def __init__(self, config: FilterConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, chunks: beam.PCollection[RecordChunk]) -> beam.PCollection[RecordChunk]:
        return chunks | "ByCriteria" >> beam.ParDo(_FilterFn(self._config)).with_output_types(
            RecordChunk
        )

    def display_data(self) -> dict[str, Any]:
        return {
            "patterns": len(self._config.patterns),
            "unparsable": self._config.unparsable,
        }


class _FilterFn(beam.DoFn):
    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._filtered = beam.metrics.Metrics.counter("filter", "filtered")

    def setup(self) -> None:
        self._filter = RecordFilter(self._config)

    def process(self, chunk: RecordChunk) -> Iterator[RecordChunk]:
        kept = filter_chunk(chunk, self._filter)
        filtered = len(chunk.records) - len(kept.records)
        self._filtered.inc(filtered)
        BOOKS.count(FILTERED, filtered, chunk.topic)
        yield kept
