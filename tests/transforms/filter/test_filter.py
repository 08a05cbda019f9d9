"""Filter: criteria as they are given, what a record is compared by, and the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from pipeline.options.resolve import parse_arguments
from transforms.errors import UsageError
from transforms.filter.filter import (
    FilterConfig,
    FilterRecords,
    RecordFilter,
    filter_chunk,
    load_criteria,
    parse_criteria,
)
from transforms.records import NO_TIMESTAMP, Decoded, Header, RecordChunk, Records, Rejection

PAID = {"value": {"status": ["paid"]}}


def _config(*patterns: Any, unparsable: str = "pass") -> FilterConfig:
    return FilterConfig(
        parse_criteria({"Filters": [{"Pattern": json.dumps(pattern)} for pattern in patterns]}),
        unparsable,
    )


def _records(
    values: list[bytes | None], keys: list[bytes | None] | None = None, **columns: Any
) -> Records:
    return Records(
        offsets=list(range(len(values))),
        timestamps=[1000] * len(values),
        keys=keys or [None] * len(values),
        values=values,
        headers=columns.pop("headers", [None] * len(values)),
        **columns,
    )


def _sent(records: Records, *patterns: Any, unparsable: str = "pass") -> list[int]:
    """Indexes of the records that go on."""
    chosen, _ = RecordFilter(_config(*patterns, unparsable=unparsable)).choose("t", 0, records)
    return [index for index, goes_on in enumerate(chosen) if goes_on]


# -- criteria --------------------------------------------------------------------------------------


def test_criteria_in_every_form() -> None:
    """Alone, inside what AWS prints of a mapping, patterns as texts and as objects."""
    text = json.dumps(PAID)
    for pattern in (text, PAID):
        criteria = {"Filters": [{"Pattern": pattern}, {"Pattern": '{"topic": ["t"]}'}]}
        mapping = {"UUID": "1", "BatchSize": 100, "FilterCriteria": criteria}
        for given_ in (criteria, mapping, {"EventSourceMappings": [mapping]}):
            first, second = parse_criteria(given_)
            assert json.loads(first) == PAID
            assert second == '{"topic": ["t"]}'


def test_a_file_s_numbers_keep_their_text(tmp_path: Path) -> None:
    """In a pattern that is a text and in one that is an object."""
    file = tmp_path / "filters.json"
    pattern = '{"value": {"n": [1.50, 12345678901234567890123]}}'
    for written in (json.dumps(pattern), pattern):
        text = f'{{"Filters": [{{"Pattern": {written}}}]}}'
        file.write_text(text, encoding="utf-8")
        config = FilterConfig(load_criteria(str(file)))
        values = [b'{"n": %b}' % n for n in (b"1.50", b"1.5", b"12345678901234567890123", b"1e22")]
        chosen, _ = RecordFilter(config).choose("t", 0, _records(list(values)))
        assert chosen == [True, False, True, False]


def test_a_file_may_be_yaml(tmp_path: Path) -> None:
    """As a template for AWS has them."""
    file = tmp_path / "filters.yaml"
    file.write_text(
        'FilterCriteria:\n  Filters:\n    - Pattern: \'{"topic": ["t"]}\'\n'
        "    - Pattern:\n        value: {n: [1, {prefix: a}]}\n",
        encoding="utf-8",
    )
    assert load_criteria(str(file)) == ('{"topic": ["t"]}', '{"value":{"n":[1,{"prefix":"a"}]}}')


@pytest.mark.parametrize(
    ("yaml", "json"),
    [
        ("NO", '"NO"'),
        ("on", '"on"'),
        ("Y", '"Y"'),
        ("012", '"012"'),
        ("0x1F", '"0x1F"'),
        ("1_000", '"1_000"'),
        ("12:30:45", '"12:30:45"'),
        ("2026-11-01", '"2026-11-01"'),
        (".inf", '".inf"'),
        ("=", '"="'),
        ("true", "true"),
        ("False", "false"),
        ("null", "null"),
        ("~", "null"),
        ("1.50", "1.50"),
        ("-1e3", "-1e3"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("'5'", '"5"'),
        ('"null"', '"null"'),
        ("'true'", '"true"'),
    ],
)
def test_what_yaml_has_without_quotes(tmp_path: Path, yaml: str, json: str) -> None:
    """A number, a truth or nothing where JSON writes the same; else the text that stands there."""
    file = tmp_path / "filters.yaml"
    file.write_text(f"Filters:\n  - Pattern:\n      value:\n        no: [{yaml}]\n")
    assert load_criteria(str(file)) == (f'{{"value":{{"no":[{json}]}}}}',)


@pytest.mark.parametrize("wrap", [dict, lambda mapping: {"EventSourceMappings": [mapping]}])
def test_a_mapping_brings_its_filters(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    """The file that --config names is the one with the criteria."""
    mapping = {
        "FunctionArn": "arn:aws:lambda:eu-central-1:123456789012:function:f",
        "Topics": ["orders"],
        "SelfManagedEventSource": {"Endpoints": {"KAFKA_BOOTSTRAP_SERVERS": ["b:1"]}},
        "SelfManagedKafkaEventSourceConfig": {"ConsumerGroupId": "g"},
        "FilterCriteria": {"Filters": [{"Pattern": '{"topic": ["t"]}'}]},
    }
    file = tmp_path / "mapping.json"
    file.write_text(json.dumps(wrap(mapping)), encoding="utf-8")
    config, _ = parse_arguments([f"--config={file}"])
    assert config.filter == FilterConfig(('{"topic": ["t"]}',))


@pytest.mark.parametrize(
    ("criteria", "problems"),
    [
        ([], ["there are no filters in it"]),
        ({}, ["there are no filters in it"]),
        ({"Filters": []}, ["there are no filters in it"]),
        ({"filters": [{"Pattern": "{}"}]}, ["there are no filters in it"]),
        # What AWS shows of encrypted criteria.
        ({"FilterCriteria": None}, ["there are no filters in it"]),
        ({"EventSourceMappings": []}, ["there are no filters in it"]),
        ({"Filters": [{"Pattern": PAID}] * 11}, ["11 filters are too many; give 10 at most"]),
        ({"Filters": ["x"]}, ['filter 1: it must be an object with "Pattern" and nothing else']),
        (
            {"Filters": [{"Pattern": PAID, "Name": "x"}]},
            ['filter 1: it must be an object with "Pattern" and nothing else'],
        ),
        ({"Filters": [{"Pattern": 5}]}, ["filter 1: the pattern must be an object"]),
        ({"Filters": [{"Pattern": ""}]}, ["filter 1: the pattern is not JSON"]),
        ({"Filters": [{"Pattern": "{'a'}"}]}, ["filter 1: the pattern is not JSON"]),
        ({"Filters": [{"Pattern": '{"value": [NaN]}'}]}, ["filter 1: the pattern is not JSON"]),
        ({"Filters": [{"Pattern": {"value": [{1}]}}]}, ["filter 1: the pattern is not JSON"]),
        ({"Filters": [{"Pattern": '{"a":' * 900 + "1" + "}" * 900}]}, ["filter 1: "]),
        (
            {"Filters": [{"Pattern": PAID}, {"Pattern": {"data": {"a": [1]}}}]},
            [
                "filter 2: data is not known; there are value, key, headers, topic, partition, "
                "offset, timestamp"
            ],
        ),
        (
            {"Filters": [{"Pattern": {"$or": [{"topic": ["a"]}, {"valeu": ["a"]}]}}]},
            ["filter 1: $or[1].valeu is not known"],
        ),
        (
            {"Filters": [{"Pattern": {"topic": {"a": [1]}}}]},
            ["filter 1: topic takes a list of rules"],
        ),
        ({"Filters": [{"Pattern": {"headers": ["a"]}}]}, ["filter 1: headers takes an object"]),
        (
            {"Filters": [{"Pattern": {"headers": {"a": {"b": ["c"]}}}}]},
            ["filter 1: headers.a takes a list of rules"],
        ),
        # Every filter that does not fit, and where.
        (
            {
                "Filters": [
                    {"Pattern": {"value": {"n": [1, {"numeric": [">"]}]}}},
                    {"Pattern": PAID},
                    {"Pattern": '{"key": "c-7"}'},
                ]
            },
            ['filter 1: value.n[1]: "numeric" takes ["=", 1]', "filter 3: key takes a list of"],
        ),
    ],
)
def test_criteria_that_do_not_fit(criteria: Any, problems: list[str]) -> None:
    """One line for each filter, with its number, the place and what is allowed there."""
    with pytest.raises(UsageError) as raised:
        parse_criteria(criteria)
    assert len(raised.value.problems) == len(problems)
    for problem, expected in zip(raised.value.problems, problems):
        assert problem.startswith(expected)
        assert "\n" not in problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "cannot be read: it is not UTF-8 text"),
        (b"{", "is neither JSON nor YAML: Expecting"),
        (b"a: [1\n", "is neither JSON nor YAML: expected ',' or ']'"),
        (b"[1: 2", "is neither JSON nor YAML: "),
        (b'{"Filters": [{"Pattern": {"a": [NaN]}}]}', "is neither JSON nor YAML: NaN is not"),
        (b"[" * 100_000, "is neither JSON nor YAML: "),
        (b"", ": there are no filters in it"),
        (b"{}", ": there are no filters in it"),
        (b'{"Filters": [{"Pattern": {"a": [1]}}]}', ": filter 1: a is not known"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """The option and the file are named."""
    file = tmp_path / "filters.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_criteria(str(file))
    (said,) = raised.value.problems
    name = f"--filter_criteria={file}"
    assert said.startswith(name)
    assert said[len(name) :].strip().startswith(problem.strip())


def test_ten_filters_are_enough_and_one_that_matches_is() -> None:
    patterns = [{"value": {"n": [n]}} for n in range(10)]
    values = [b'{"n": %d}' % n for n in (9, 10, 0)]
    assert _sent(_records(list(values)), *patterns) == [0, 2]


# -- what a record is compared by ------------------------------------------------------------------


def test_every_part_of_a_record_can_be_asked_for() -> None:
    headers: list[list[Header] | None] = [
        None,
        [("trace", b"a1"), ("trace", b"b2"), ("n", b"3")],
        [("trace", b"\xff"), ("none", None)],
        [("ce.type", b"order")],
    ]
    records = Records(
        offsets=[10, 11, 15, 16],
        timestamps=[1000, NO_TIMESTAMP, 3000, 4000],
        keys=[b"c-7", None, b'{"id": 7}', b"17"],
        values=[b'{"a": 1}', b"text", b"[1]", None],
        headers=headers,
    )

    def sent(pattern: Any, unparsable: str = "drop") -> list[int]:
        chosen, _ = RecordFilter(_config(pattern, unparsable=unparsable)).choose("t", 3, records)
        return [offset for offset, goes_on in zip(records.offsets, chosen) if goes_on]

    everything = [10, 11, 15, 16]
    assert sent({"topic": ["t"]}) == sent({"partition": [3]}) == everything
    assert sent({"topic": [{"prefix": "u"}]}) == sent({"partition": [4, "3"]}) == []
    assert sent({"offset": [{"numeric": [">", 10, "<", 16]}]}) == [11, 15]
    assert sent({"timestamp": [{"numeric": [">=", 3000]}]}) == [15, 16]
    assert sent({"timestamp": [None]}) == sent({"timestamp": [{"exists": False}]}) == [11]
    assert sent({"headers": {"trace": ["b2"]}}) == [11]
    assert sent({"headers": {"trace": [{"exists": True}]}}) == [11, 15]
    assert sent({"headers": {"trace": [{"exists": False}]}}) == [10, 16]
    assert sent({"headers": {"trace": [{"anything-but": "a1"}]}}) == [11, 15]
    assert sent({"headers": {"n": [{"numeric": [">", 2]}]}}) == [11]
    assert sent({"headers": {"none": [None]}}) == [15]
    assert sent({"headers": {"ce.type": ["order"]}}) == [16]
    assert sent({"headers": {"$or": [{"n": ["3"]}, {"ce.type": ["order"]}]}}) == [11, 16]
    assert sent({"key": ["c-7"]}) == [10]
    assert sent({"key": {"id": [7]}}) == [15]
    assert sent({"key": ["17"]}) == sent({"key": [17]}) == [16]
    assert sent({"key": [None]}) == sent({"key": [{"exists": False}]}) == [11]
    assert sent({"key": [{"exists": True}]}) == [10, 16]
    assert sent({"key": [{"exists": True}, None]}) == [10, 11, 16]
    assert sent({"key": [{"anything-but": "17"}]}) == [10, 11]
    assert sent({"value": ["text"]}) == [11]
    assert sent({"value": [None]}) == sent({"value": [{"exists": False}]}) == [16]
    assert sent({"value": {"a": [1]}, "key": ["c-7"]}) == [10]
    assert sent({"$or": [{"value": {"a": [1]}}, {"key": ["17"]}]}) == [10, 16]
    assert sent({"topic": ["t"], "$or": [{"offset": [10]}, {"headers": {"n": ["3"]}}]}) == [10, 11]


# A value; whether it is compared as an object, as a text, or not at all.
FORMS = [
    (b'{"a": 1}', "object"),
    (b' [{"a": 1}]', "object"),
    (b"[]", "object"),
    (b'{"a": "\\ud83d"}', "object"),
    (b'{"a": 1e400}', "object"),
    (b'"\\ud83d"', "text"),
    (b"1e400", "text"),
    (b"text", "text"),
    (b"", "text"),
    (b"{broken", "text"),
    (b'{"a": 1} x', "text"),
    (b"17", "text"),
    (b'"quoted"', "text"),
    (b"null", "text"),
    ("é".encode(), "text"),
    (None, "text"),
    (b"\xff", "neither"),
    ("text".encode("utf-16"), "neither"),
    (b'{"a": "\xff"}', "neither"),
]
LIST, OBJECT = [{"anything-but": "!"}], {"b": [{"exists": False}]}


@pytest.mark.parametrize("part", ["value", "key"])
@pytest.mark.parametrize(("data", "form"), FORMS, ids=[repr(data) for data, _ in FORMS])
def test_what_cannot_be_compared(part: str, data: bytes | None, form: str) -> None:
    """A list of rules asks for a text, an object of fields for a JSON object.

    Patterns that match everything of their form, and nothing of it: what makes a difference where
    the record is of the other form, is the mode.
    """
    records = _records([data]) if part == "value" else _records([None], [data])
    for asked, right, wrong in (
        ("text", LIST, [{"suffix": "!"}]),
        ("object", OBJECT, {"a": [{"exists": True}], "b": [{"exists": True}]}),
    ):
        for rules in (right, wrong):
            for mode, misfit in (("pass", True), ("drop", False), ("error", True)):
                record_filter = RecordFilter(_config({part: rules}, unparsable=mode))
                chosen, rejections = record_filter.choose("t", 0, records)
                fits = form == asked
                assert chosen == [rules is right if fits else misfit], (asked, rules, mode)
                assert bool(rejections) is (mode == "error" and not fits)


# The record's value against {"value": {...}} and {"value": [...]}: as AWS has it for Kafka, with
# a pattern that matches nothing and a topic that matches or not.
@pytest.mark.parametrize(
    ("value", "rules", "compared"),
    [
        (b"text", ["no"], True),
        (b"text", {"a": ["no"]}, False),
        (b'{"a": 1}', ["no"], False),
        (b'{"a": 1}', {"a": ["no"]}, True),
        (b"\xff", ["no"], False),
        (b"\xff", {"a": ["no"]}, False),
    ],
)
def test_by_default_the_rest_of_the_pattern_decides(
    value: bytes, rules: Any, compared: bool
) -> None:
    records = _records([value])
    assert _sent(records, {"value": rules}) == ([] if compared else [0])
    assert _sent(records, {"value": rules, "topic": ["t"]}) == ([] if compared else [0])
    assert _sent(records, {"value": rules, "topic": ["other"]}) == []
    assert _sent(records, {"value": rules, "headers": {"n": ["1"]}}) == []


def test_error_is_for_records_that_hang_on_what_cannot_be_compared() -> None:
    """Not for those which another part, or another filter, has decided."""
    records = _records([b"text", b"\xff", b'{"a": 1}', b'{"a": 2}'], [b"k0", b"k1", b"k2", b"\xff"])
    by_value = {"value": {"a": [1]}}

    def rejected(*patterns: Any) -> tuple[list[int], list[int]]:
        record_filter = RecordFilter(_config(*patterns, unparsable="error"))
        chosen, rejections = record_filter.choose("t", 0, records)
        sent = [i for i, goes_on in enumerate(chosen) if goes_on and i not in rejections]
        return sent, sorted(rejections)

    assert rejected(by_value) == ([2], [0, 1])
    assert rejected(by_value, {"key": ["k0"]}) == ([0, 2], [1, 3])
    assert rejected({**by_value, "key": ["k0"]}) == ([], [0])
    assert rejected({**by_value, "topic": ["other"]}) == ([], [])
    assert rejected(by_value, {"topic": ["t"]}) == ([0, 1, 2, 3], [])
    assert rejected({"$or": [by_value, {"key": ["k1"]}]}) == ([1, 2], [0, 3])


def test_a_rejection_says_what_and_not_what_is_in_it() -> None:
    records = _records([b"secret text", b"\xff"], [b"k", b"\xfe\xfd"])
    pattern = {"value": {"a": [1]}, "key": [{"exists": True}]}
    _, rejections = RecordFilter(_config(pattern, unparsable="error")).choose("t", 0, records)
    assert {(r.condition, r.error_type) for r in rejections.values()} == {
        ("InvalidRecord", "FilterUnparsable")
    }
    for index, parts in ((0, "value (11 bytes)"), (1, "key (2 bytes) and value (1 bytes)")):
        assert f"the record's {parts} cannot be compared" in rejections[index].message
        assert "secret" not in rejections[index].message


def test_what_schemas_made_of_a_record_is_compared_in_place_of_its_bytes() -> None:
    raw = b"\x00\x00\x00\x00\x07\x02"
    decoded = [
        Decoded(value=b'{"status": "paid"}', value_schema=("AVRO", "7")),
        Decoded(key=b'"c-7"', value=b'{"status": "new"}'),
        Decoded(key=b"17"),
        None,
    ]
    keys, values = [raw, raw, raw, b"c-7"], [raw, raw, b'{"status": "paid"}', b'{"status": "new"}']
    records = _records(list(values), list(keys), decoded=decoded)
    assert _sent(records, PAID, unparsable="drop") == [0, 2]
    assert _sent(records, {"key": ["c-7", 17]}, unparsable="drop") == [1, 2, 3]


@pytest.mark.parametrize("mode", ["pass", "drop", "error"])
def test_a_record_that_was_rejected_before_stays_so(mode: str) -> None:
    """It is no longer a matter of filters: its error record is written."""
    earlier = Rejection("DESERIALIZATION_ERROR", "Avro", "no such schema")
    records = _records([b"\xff", b'{"status": "new"}', b"x"], rejections=[earlier, None, earlier])
    chunk = RecordChunk("t", 0, 0, 3, records)
    kept = filter_chunk(chunk, RecordFilter(_config(PAID, unparsable=mode)))
    assert kept.records.offsets == [0, 2]
    assert kept.records.rejections == [earlier, earlier]


# -- the step --------------------------------------------------------------------------------------


def test_a_chunk_keeps_its_range() -> None:
    """What was taken out is still covered, so that it is committed; columns stay together."""
    records = Records(
        [3, 5, 6],
        [1, 2, 3],
        [b"a", b"b", b"c"],
        [b'{"status": "new"}', b'{"status": "paid"}', b"text"],
        [None, [("h", b"1")], None],
    )
    chunk = RecordChunk("orders", 2, 3, 9, records, first=True)
    kept = filter_chunk(chunk, RecordFilter(_config(PAID, unparsable="error")))
    assert (kept.topic, kept.partition, kept.start, kept.next_offset, kept.first) == (
        "orders",
        2,
        3,
        9,
        True,
    )
    assert kept.records.offsets == [5, 6]
    assert kept.records.keys == [b"b", b"c"]
    assert kept.records.headers == [[("h", b"1")], None]
    first, second = kept.records.rejections
    assert first is None
    assert second and second.error_type == "FilterUnparsable"


def test_a_chunk_of_which_all_goes_on_is_handed_on_as_it_is() -> None:
    chunk = RecordChunk("t", 0, 0, 2, _records([b'{"status": "paid"}', b"text"]))
    record_filter = RecordFilter(_config(PAID))
    assert filter_chunk(chunk, record_filter) is chunk
    empty = RecordChunk("t", 0, 0, 2, Records())
    assert filter_chunk(empty, record_filter) is empty


VALUES = st.sampled_from([b'{"status": "paid"}', b'{"status": "new"}', b"text", b"\xff", None])


@given(
    st.lists(VALUES, max_size=8),
    st.lists(
        st.sampled_from(
            [PAID, {"value": ["text"]}, {"value": [None]}, {"offset": [{"numeric": [">", 2]}]}]
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_the_modes_differ_in_what_cannot_be_compared_only(
    values: list[bytes | None], patterns: list[Any]
) -> None:
    """What drop sends, all send; what pass sends, error sends or rejects; nothing else is sent."""
    records = _records(values)
    dropping = _sent(records, *patterns, unparsable="drop")
    passing = _sent(records, *patterns, unparsable="pass")
    record_filter = RecordFilter(_config(*patterns, unparsable="error"))
    chosen, rejections = record_filter.choose("t", 0, records)
    assert set(dropping) <= set(passing)
    assert [index for index, goes_on in enumerate(chosen) if goes_on] == passing
    assert sorted(rejections) == sorted(set(passing) - set(dropping))


def test_the_step_takes_out_and_counts() -> None:
    values: list[bytes | None] = [b'{"status": "paid"}', b'{"status": "new"}', b"text", b"\xff"]
    chunks = [
        RecordChunk("t", partition, 0, 10, _records(values[partition:])) for partition in range(3)
    ]
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([])) as pipeline:
        kept = (
            pipeline
            | beam.Create(chunks, reshuffle=False).with_output_types(RecordChunk)
            | "Filter" >> FilterRecords(_config(PAID, unparsable="drop"))
        )
        found = kept | beam.Map(_shape)
        assert_that(found, equal_to([(0, [0], 10), (1, [], 10), (2, [], 10)]))
    counters = pipeline.result.metrics().query()["counters"]
    assert {
        f"{c.key.metric.namespace}.{c.key.metric.name}": c.committed
        for c in counters
        if c.key.metric.namespace == "filter"
    } == {"filter.filtered": 8}


def _shape(chunk: RecordChunk) -> tuple[int, list[int], int]:
    return chunk.partition, list(chunk.records.offsets), chunk.next_offset
