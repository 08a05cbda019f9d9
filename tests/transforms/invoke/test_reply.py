"""Reply: what answers a batch, what does not, and that no digit is lost on the way."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.invoke.reply import (
    BATCH_ITEM_FAILURES,
    MOST_STATE_BYTES,
    Answer,
    InvalidReplyError,
    parse_failures,
    parse_reply,
    parse_state,
    parse_stream_failures,
    read_reply,
)

HEAD = b'"topic":"t","partition":3,"offset":7'


def _parse(body: bytes, offsets=(7,)) -> list[bytes]:
    return parse_reply(body, "t", 3, offsets)


def _exact(text: bytes | str):
    """Parse JSON so that no digit of a number is lost."""
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def _answer(offset: int, **more) -> dict:
    return {"payload": {"topic": "t", "partition": 3, "offset": offset, **more}}


@pytest.mark.parametrize(
    "result",
    [
        "null",
        "true",
        '"text"',
        '"Grüße 🌧 \\u00e9 \\" \\\\ \\n"',
        "[]",
        "{}",
        '{"a":[1,{"b":null}]}',
        "0",
        "-1",
        "999999999999999",
        "1.10",
        "12345678901234567890",
        "-98765432109876543210987654321098765432109",
        "9007199254740993",
        "0.1",
        "0.12345678901234567890123456789",
        "123456789012345.678901234567890",
        "1e5",
        "1E5",
        "1.5e-300",
        "10E-400",
        "1e22",
        # Just above what a double holds for sure.
        "1234567890.1234561",
        "8.41000000000000004",
        "900719925474099.31",
        "0.3000000000000000001",
        "9007199254740993.0",
        '"a long run of digits 12345678901234567890 in a text"',
        '{"]":"}","[":"{","a\\"b":12345678901234567890}',
    ],
)
@pytest.mark.parametrize(
    "frame",
    [
        '[{{"payload":{{{head},"result":{result}}}}}]',
        '[{{"payload":{{"result":{result},{head}}}}}]',
        ' [ {{ "payload" : {{ {head} , "result" : {result} }} }} ] \n',
        '[{{"before":{result},"payload":{{{head},"result":{result}}}}}]',
        '[\r\n\t{{"payload":{{{head},"result":{result}}} , "after":{result},"x":[]}}\n]',
        '[{{"payloads":1,"payload":{{{head},"result":{result}}},"pay":{{"payload":2}}}}]',
        '[{{"payl\\u006fad":{{{head},"result":{result}}}}}]',
    ],
)
def test_each_entry_s_payload_is_kept(frame: str, result: str) -> None:
    """The payload comes out as the JSON it was, whatever stands around it."""
    body = frame.format(head=HEAD.decode(), result=result).encode()
    (payload,) = _parse(body)
    assert _exact(payload) == {
        "topic": "t",
        "partition": 3,
        "offset": 7,
        "result": _exact(result),
    }


@pytest.mark.parametrize(
    "number",
    [
        "12345678901234567890",
        "0.1234567890123456789",
        "1e5",
        "1.0E+2",
        "100000000000000000000.0",
        "12.50",
        "0.10",
        "-0",
        "-0.0",
        "1E0",
        "1e400",
        "9" * 5000,
    ],
)
@pytest.mark.parametrize("space", ["", " "])
def test_a_number_is_kept_as_it_was_written(number: str, space: str) -> None:
    """Digit for digit, whatever a double makes of it, and whatever else is in the reply."""
    result = f'"result":{space}{number}'.encode()
    (payload,) = _parse(b'[{"payload":{' + HEAD + b"," + result + b"}}]")
    assert payload.replace(b" ", b"").endswith(f'"result":{number}}}'.encode())


@pytest.mark.parametrize(
    "result",
    [r'"cut \ud83d"', r'{"\udc00":1}', '{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', r'"\u00e9\/"'],
)
def test_a_result_that_would_be_written_otherwise_is_kept(result: str) -> None:
    """Half of a surrogate pair, a name that is there twice, and escapes."""
    (payload,) = _parse(b'[{"payload":{' + HEAD + b',"result":' + result.encode() + b"}}]")
    assert payload == b"{" + HEAD + b',"result":' + result.encode() + b"}"


def test_results_come_in_the_order_of_the_batch() -> None:
    """One result per record, each with its own coordinates."""
    offsets = [7, 9, 2**62]
    body = json.dumps([_answer(offset, result=offset) for offset in offsets]).encode()
    assert [_exact(text)["result"] for text in _parse(body, offsets)] == offsets


@pytest.mark.parametrize("result", ["1", "12345678901234567890"])
@pytest.mark.parametrize("depth", [250, 255, 500, 900])
def test_a_deep_result_is_a_result(depth: int, result: str) -> None:
    """Nesting is no reason to refuse a reply, and never an error of ours."""
    nested = "[" * depth + result + "]" * depth
    (payload,) = _parse(b'[{"payload":{' + HEAD + b',"result":' + nested.encode() + b"}}]")
    assert payload.decode().split('"result":')[1] == nested + "}"


@pytest.mark.parametrize("result", ["1", "12345678901234567890"])
@pytest.mark.parametrize("depth", [1019, 1100, 100_000])
def test_a_reply_nested_without_end_is_the_function_s_error(depth: int, result: str) -> None:
    """A reply too deep to be read is an invalid reply or an answer; it breaks nothing else."""
    nested = "[" * depth + result + "]" * depth
    body = b'[{"payload":{' + HEAD + b',"result":' + nested.encode() + b"}}]"
    try:
        (payload,) = _parse(body)
    except InvalidReplyError as error:
        assert "[[" not in str(error)
    else:
        assert payload.decode().split('"result":')[1] == nested + "}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the reply is not JSON"),
        (b"nonsense", "the reply is not JSON"),
        (b"[", "the reply is not JSON"),
        (b"[NaN]", "the reply is not JSON"),
        (b'["\xff"]', "the reply is not JSON"),
        (b'[{"payload":{"topic":"\xff","partition":1,"offset":1}}]', "the reply is not JSON"),
        (b'[{"payload":{' + HEAD + b',"result":"\xff"}}]', "the reply is not JSON"),
        (b"null", "the reply is null, not an array"),
        (b"{}", "the reply is an object, not an array"),
        (b'"text"', "the reply is a string, not an array"),
        (b"true", "the reply is a boolean, not an array"),
        (b"1", "the reply is a number, not an array"),
        (b"1.5", "the reply is a number, not an array"),
        (b"[]", "the reply has 0 entries, 2 records were sent"),
        (b"[1]", "the reply has 1 entries, 2 records were sent"),
        (b"[1,2,3]", "the reply has 3 entries, 2 records were sent"),
        (b"[1,2]", "entry 0 of the reply lacks"),
        (b"[null,null]", "entry 0 of the reply lacks"),
        (b'["payload","payload"]', "entry 0 of the reply lacks"),
        (b"[[],[]]", "entry 0 of the reply lacks"),
        (b"[{},{}]", "entry 0 of the reply lacks"),
        (b'[{"payload":null},{}]', "entry 0 of the reply lacks"),
        (b'[{"payload":"offset"},{}]', "entry 0 of the reply lacks"),
        (b'[{"payload":[1]},{}]', "entry 0 of the reply lacks"),
        (b'[{"payload":{"topic":"t","partition":3}},{}]', "entry 0 of the reply lacks"),
        (b'[{"payload":{"topic":"t","offset":7}},{}]', "entry 0 of the reply lacks"),
        (b'[{"payload":{"partition":3,"offset":7}},{}]', "entry 0 of the reply lacks"),
        (
            b'[{"payload":{"topic":"t","partition":3,"offset":8}},{}]',
            "entry 0 of the reply answers another record than t-3@7",
        ),
        (
            b'[{"payload":{"topic":"t","partition":2,"offset":7}},{}]',
            "entry 0 of the reply answers another record than t-3@7",
        ),
        (
            b'[{"payload":{"topic":"T","partition":3,"offset":7}},{}]',
            "entry 0 of the reply answers another record than t-3@7",
        ),
        (
            b'[{"payload":{"topic":"t","partition":3,"offset":"7"}},{}]',
            "entry 0 of the reply answers another record than t-3@7",
        ),
        (
            b'[{"payload":{"topic":"t","partition":3,"offset":7}},'
            b'{"payload":{"topic":"t","partition":3,"offset":7}}]',
            "entry 1 of the reply answers another record than t-3@8",
        ),
        (
            b'[{"payload":{"topic":"t","partition":3,"offset":7}},{"payload":{}}]',
            "entry 1 of the reply lacks",
        ),
        (
            b'[{"payload":{"topic":"t","partition":3,"offset":8}},'
            b'{"payload":{"topic":"t","partition":3,"offset":7}}]',
            "entry 0 of the reply answers another record than t-3@7",
        ),
    ],
)
def test_what_does_not_answer_the_batch_is_named(body: bytes, message: str) -> None:
    """An invalid reply says what is wrong with it, and at which entry first."""
    with pytest.raises(InvalidReplyError) as raised:
        _parse(body, [7, 8])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


numbers = (
    st.integers(-(10**50), 10**50).map(str)
    | st.decimals(allow_nan=False, allow_infinity=False, places=30).map(lambda d: f"{d:f}")
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.builds(
        "{}e{}".format, st.integers(-(10**20), 10**20).map(str), st.integers(-200, 200).map(str)
    )
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(
    numbers,
    st.sampled_from(["null", "true", "false"]),
    texts.map(lambda text: json.dumps(text, ensure_ascii=False)),
    texts.map(json.dumps),
)
spaces = st.text(" \t\r\n", max_size=2)


def _containers(inner):
    items = st.lists(st.tuples(spaces, inner, spaces).map("".join), max_size=4)
    members = st.dictionaries(texts, inner, max_size=4).flatmap(
        lambda fields: spaces.map(
            lambda space: [f"{json.dumps(n)}{space}:{space}{v}" for n, v in fields.items()]
        )
    )
    return items.map(lambda parts: f"[{','.join(parts)}]") | members.map(
        lambda parts: f"{{{','.join(parts)}}}"
    )


documents = st.recursive(scalars, _containers, max_leaves=10)


@given(
    results=st.lists(st.tuples(documents, st.booleans(), spaces), min_size=1, max_size=5),
    topic=texts.filter(bool),
    partition=st.integers(0, 2**31 - 1),
    start=st.integers(0, 2**60),
    gap=st.integers(1, 1000),
)
@settings(deadline=None, max_examples=300)
def test_any_result_comes_out_as_it_was_sent(results, topic, partition, start, gap) -> None:
    """Each result is JSON equal to what the function returned, its numbers exact."""
    offsets = [start + index * gap for index in range(len(results))]
    entries = []
    for offset, (result, extra_first, space) in zip(offsets, results):
        fields = [
            f'"topic":{json.dumps(topic)}',
            f'"partition":{space}{partition}',
            f'"offset"{space}:{offset}',
            f'"result":{result}',
        ]
        payload = f'"payload"{space}:{{{space}{f"{space},".join(fields)}}}'
        extra = f'"extra":{space}{result}'
        members = [extra, payload] if extra_first else [payload, extra]
        entries.append(f"{space}{{{','.join(members)}}}{space}")
    body = f"[{','.join(entries)}]".encode()
    payloads = parse_reply(body, topic, partition, offsets)
    assert [_exact(payload) for payload in payloads] == [
        {"topic": topic, "partition": partition, "offset": offset, "result": _exact(result)}
        for offset, (result, _, _) in zip(offsets, results)
    ]


# -- batchItemFailures --------------------------------------------------------------------

OFFSETS = (7, 8, 12, 100)


def _failure(offset, partition="t-3", **more) -> dict:
    return {"itemIdentifier": {"partition": partition, "offset": offset}, **more}


def _failures(reply) -> list[int]:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    return parse_failures(body, "t", 3, OFFSETS)


@pytest.mark.parametrize(
    ("reply", "failed"),
    [
        # A reply without failures: all went well.
        (None, []),
        ({}, []),
        ({"batchItemFailures": []}, []),
        ({"batchItemFailures": None}, []),
        ({"other": 1}, []),
        ({"statusCode": 500, "body": "x"}, []),
        # Records that were sent.
        ({"batchItemFailures": [_failure(100)]}, [3]),
        ({"batchItemFailures": [_failure(12), _failure(7)]}, [0, 2]),
        ({"batchItemFailures": [_failure(8), _failure(8)]}, [1]),
        ({"batchItemFailures": [_failure(o) for o in OFFSETS]}, [0, 1, 2, 3]),
        ({"batchItemFailures": [_failure(8, reason="x")], "other": 1}, [1]),
        (b'{"batchItemFailures":[],"note":"\\ud83d","n":1e400}', []),
    ],
)
def test_which_records_failed(reply, failed: list[int]) -> None:
    """Each named record once, in the order of the offsets, however they are named."""
    assert _failures(reply) == failed


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        # A record that was not sent.
        ({"batchItemFailures": [_failure(9)]}, "entry 0"),
        ({"batchItemFailures": [_failure(7), _failure(9)]}, "entry 1"),
        ({"batchItemFailures": [_failure(7, "t-4")]}, "entry 0"),
        ({"batchItemFailures": [_failure(7, "u-3")]}, "t-3@7-100"),
        ({"batchItemFailures": [_failure(7, "")]}, "entry 0"),
        ({"batchItemFailures": [_failure(7, 3)]}, "entry 0"),
        ({"batchItemFailures": [_failure("7")]}, "entry 0"),
        ({"batchItemFailures": [_failure(7.0)]}, "entry 0"),
        ({"batchItemFailures": [_failure(True)]}, "entry 0"),
        ({"batchItemFailures": [_failure(None)]}, "entry 0"),
        ({"batchItemFailures": [_failure([7])]}, "entry 0"),
        ({"batchItemFailures": [_failure({})]}, "entry 0"),
        # No identifier of a Kafka record.
        ({"batchItemFailures": [{"itemIdentifier": "7"}]}, "lacks"),
        ({"batchItemFailures": [{"itemIdentifier": "t-3-7"}]}, "lacks"),
        ({"batchItemFailures": [{"itemIdentifier": ""}]}, "lacks"),
        ({"batchItemFailures": [{"itemIdentifier": None}]}, "lacks"),
        ({"batchItemFailures": [{"itemIdentifier": {"offset": 7}}]}, "lacks"),
        ({"batchItemFailures": [{"itemIdentifier": {"partition": "t-3"}}]}, "lacks"),
        ({"batchItemFailures": [{"itemidentifier": {"partition": "t-3", "offset": 7}}]}, "lacks"),
        ({"batchItemFailures": [{}]}, "lacks"),
        ({"batchItemFailures": [None]}, "lacks"),
        ({"batchItemFailures": ["7"]}, "lacks"),
        ({"batchItemFailures": [7]}, "lacks"),
        ({"batchItemFailures": [[]]}, "lacks"),
        # No such reply at all.
        ({"batchItemFailures": "7"}, "batchItemFailures is a string"),
        ({"batchItemFailures": {"itemIdentifier": "7"}}, "batchItemFailures is an object"),
        ({"batchItemFailures": 0}, "batchItemFailures is a number"),
        ({"batchItemFailures": False}, "batchItemFailures is a boolean"),
        ([], "the reply is an array"),
        ([_failure(7)], "the reply is an array"),
        ("ok", "the reply is a string"),
        ("", "the reply is a string"),
        (True, "the reply is a boolean"),
        (7, "the reply is a number"),
        (b"", "not JSON"),
        (b"ok", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"batchItemFailures":[', "not JSON"),
    ],
)
def test_what_says_nothing_that_fits_fails_the_batch(reply, says: str) -> None:
    """A record that was not sent, or a reply of another form: nothing of it is believed."""
    with pytest.raises(InvalidReplyError, match=says):
        _failures(reply)


@given(st.sets(st.sampled_from(OFFSETS)), st.randoms())
def test_any_choice_of_records_is_read_back(offsets: set[int], random) -> None:
    """Whatever records a function names, in whatever order, those failed and no others."""
    named = sorted(offsets)
    random.shuffle(named)
    failed = _failures({"batchItemFailures": [_failure(offset) for offset in named]})
    assert [OFFSETS[index] for index in failed] == sorted(offsets)


@pytest.mark.parametrize(
    ("mode", "body", "expected"),
    [
        ("confluent", b'[{"payload":{' + HEAD + b"}}]", Answer(results=[b"{" + HEAD + b"}"])),
        ("batch_item_failures", b"null", Answer(failed=[])),
        (
            "batch_item_failures",
            json.dumps({"batchItemFailures": [_failure(7)]}).encode(),
            Answer(failed=[0]),
        ),
        ("any", b"not JSON \xff", Answer(body=b"not JSON \xff")),
        ("any", b"", Answer(body=b"")),
        ("none", b"not JSON", Answer()),
    ],
)
def test_each_mode_reads_a_reply_its_own_way(mode: str, body: bytes, expected: Answer) -> None:
    """Results, failures, the body, or nothing at all."""
    assert read_reply(mode, body, "t", 3, (7,)) == expected


# -- of a stream -----------------------------------------------------------------------------------

_NUMBERS = ["49590338271490256608559692538361571095921575989136588898", "9" * 129, "3"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b'""',
        b"[]",
        b"null",
        b"{}",
        b'{"batchItemFailures":[]}',
        b'{"batchItemFailures":null}',
    ],
)
def test_what_says_nothing_of_a_stream_s_records_is_success(body: bytes) -> None:
    assert parse_stream_failures(body, _NUMBERS) == []


def test_records_of_a_stream_are_named_by_their_numbers() -> None:
    named = [{"itemIdentifier": _NUMBERS[2]}, {"itemIdentifier": _NUMBERS[1]}]
    body = orjson.dumps({"batchItemFailures": named})
    assert parse_stream_failures(body, _NUMBERS) == [1, 2]
    answer = read_reply(BATCH_ITEM_FAILURES, body, "orders", 3, _NUMBERS, alone=True)
    assert answer.failed == [1, 2]


@pytest.mark.parametrize(
    "entry",
    [
        {"itemIdentifier": 3},
        {"itemIdentifier": "4"},
        {"itemIdentifier": ""},
        {"itemIdentifier": None},
        {"identifier": "3"},
        {},
        "3",
        {"itemIdentifier": {"partition": "orders-3", "offset": "3"}},
    ],
)
def test_what_names_no_record_of_the_batch_fails_all_of_it(entry: Any) -> None:
    body = orjson.dumps({"batchItemFailures": [{"itemIdentifier": "3"}, entry]})
    with pytest.raises(InvalidReplyError, match="entry 1 of batchItemFailures names no record"):
        parse_stream_failures(body, _NUMBERS)


@pytest.mark.parametrize("body", [b"done", b"7", b'"done"', b"[1]", b'{"batchItemFailures":7}'])
def test_other_replies_fail_all_of_a_stream_s_batch(body: bytes) -> None:
    with pytest.raises(InvalidReplyError):
        parse_stream_failures(body, _NUMBERS)


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (b'{"state":{}}', b"{}"),
        (b' { "state" : {"n": 12345678901234567890.10} , "batchItemFailures":[] } ', None),
        (b'{"a":{"state":{"no":1}},"state":{"n":1},"b":["}"]}', b'{"n":1}'),
        (b'{"state":{"n":1},"state":{"n":2}}', b'{"n":2}'),
        ('{"state":{"ü":"\\"}"}}'.encode(), '{"ü":"\\"}"}'.encode()),
    ],
)
def test_a_state_is_kept_as_it_is_written(body: bytes, state: bytes | None) -> None:
    assert parse_state(body) == (state or b'{"n": 12345678901234567890.10}')


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'""', b"{}", b'{"state":null}', b'{"state":[]}', b'{"state":"s"}', b"{"],
)
def test_a_reply_without_a_state_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidReplyError, match=r"state|not JSON"):
        parse_state(body)


def test_a_state_that_fits_into_no_call_is_refused() -> None:
    with pytest.raises(InvalidReplyError, match="would fit into no further invocation"):
        parse_state(b'{"state":{"x":"%b"}}' % (b"x" * MOST_STATE_BYTES))
