"""Shards, rows, dealing and reach: rules without a client."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.kinesis import rows
from transforms.kinesis.dealing import OWNERS, plan
from transforms.kinesis.fetch import Message, read_messages
from transforms.kinesis.reach import Reach
from transforms.kinesis.rows import Row, Update, checkpoint, describe, lease_key, read_row
from transforms.kinesis.shards import (
    FIRST,
    NAMES,
    SHARD_END,
    TRIM_HORIZON,
    Shard,
    begin_at,
    done_shards,
    limit_of,
    pause_secs,
    read_shard,
    shard_id,
    shard_number,
)
from transforms.names import NUMBERS, joined, spoken

SEQUENCE = 49590338271490256608559692538361571095921575989136588898
NUMBER = joined(SEQUENCE)

positions = st.one_of(
    st.just(0),
    st.integers(1, FIRST - 1),
    st.builds(
        lambda number, sub: joined(number, sub) + 1,
        st.integers(FIRST, 10**129 - 1),
        st.integers(0, 10**6),
    ),
    st.just(SHARD_END),
)


@pytest.mark.parametrize(
    ("position", "parts", "asked"),
    [
        (0, False, {"ShardIteratorType": "TRIM_HORIZON"}),
        (
            1_700_000_000_123,
            False,
            {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": 1_700_000_000.123},
        ),
        (
            NUMBER + 1,
            False,
            {
                "ShardIteratorType": "AFTER_SEQUENCE_NUMBER",
                "StartingSequenceNumber": str(SEQUENCE),
            },
        ),
        (
            NUMBER,
            False,
            {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": str(SEQUENCE)},
        ),
        (
            NUMBER + 4,
            True,
            {"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": str(SEQUENCE)},
        ),
    ],
)
def test_what_a_position_asks_for(position: int, parts: bool, asked: dict[str, Any]) -> None:
    """A number that is sent is always a record's, never a position."""
    assert begin_at(position, parts) == asked


@given(position=positions)
def test_a_position_comes_back_from_its_row(position: int) -> None:
    item = {"leaseKey": {"S": "shardId-000000000001"}, **checkpoint(position)}
    row = read_row(item)
    assert row is not None
    assert (row.position, row.ended) == (position, position == SHARD_END)
    # DynamoDB's numbers have 38 digits.
    assert all(len(value["N"]) <= 38 for value in item.values() if "N" in value)


@pytest.mark.parametrize(
    ("text", "sub_number", "position"),
    [
        ("TRIM_HORIZON", "0", 0),
        ("LATEST", "0", None),
        ("AT_TIMESTAMP", "0", None),
        ("SHARD_END", "0", SHARD_END),
        (str(SEQUENCE), "0", NUMBER + 1),
        (str(SEQUENCE), "4", NUMBER + 5),
        ("9" * 129, "0", joined(10**129 - 1) + 1),
    ],
)
def test_rows_of_the_client_library(text: str, sub_number: str, position: int | None) -> None:
    item = {
        "leaseKey": {"S": "shardId-000000000001"},
        "checkpoint": {"S": text},
        "checkpointSubSequenceNumber": {"N": sub_number},
        "leaseCounter": {"N": "12"},
        "leaseOwner": {"S": "worker"},
    }
    row = read_row(item)
    assert row is not None
    assert (row.position, row.counter, row.owner) == (position, 12, "worker")


def test_rows_that_are_none_of_a_shard() -> None:
    """Where the library keeps everything in one table; and one that is broken."""
    key = {"leaseKey": {"S": "x"}}
    assert read_row({**key, "entityType": {"S": "LEADER"}, "checkpoint": {"S": "0"}}) is None
    assert read_row(key) is None
    with pytest.raises(ValueError, match="the checkpoint of x is no number: 12x"):
        read_row({**key, "checkpoint": {"S": "12x"}})


def test_what_a_row_says_of_its_shard() -> None:
    assert describe(Shard(3, (1, 2), low="0", high="7")) == {
        "parentShardId": {"SS": [shard_id(1), shard_id(2)]},
        "startingHashKey": {"S": "0"},
        "endingHashKey": {"S": "7"},
    }
    # An empty set is none to DynamoDB.
    assert describe(Shard(0)) == {}
    assert lease_key(6) == "shardId-000000000006"
    assert lease_key(6, "orders", "123", 17) == "123:orders:17:shardId-000000000006"


@pytest.mark.parametrize("counter", [None, 4])
def test_an_update_uses_each_name_and_value_that_it_declares(counter: int | None) -> None:
    """DynamoDB refuses any other."""
    update = Update(
        "k",
        {rows.COUNTER: {"N": "5"}, rows.NOTE: {"S": "n"}},
        {rows.NOTE, rows.OWNER},
        counter,
        17,
        (rows.WANTED,),
    )
    made = update.arguments("t")
    text = made["UpdateExpression"] + made["ConditionExpression"]
    assert set(re.findall(r"#n\d+", text)) == made["ExpressionAttributeNames"].keys()
    assert set(re.findall(r":v\d+", text)) == made["ExpressionAttributeValues"].keys()
    assert "sinkLanes" not in made["UpdateExpression"].partition("REMOVE")[2]


@pytest.mark.parametrize("id", ["shardId-1", "shard-000000000001", "shardId-00000000000x", ""])
def test_other_shard_ids_are_refused(id: str) -> None:
    assert shard_number(shard_id(7)) == 7
    with pytest.raises(ValueError, match="is not a shard id such as shardId-000000000003"):
        shard_number(id)


def test_a_shard_as_it_is_listed_and_as_a_child() -> None:
    hash_range = {"StartingHashKey": "0", "EndingHashKey": "9"}
    listed = {
        "ShardId": shard_id(4),
        "ParentShardId": shard_id(1),
        "AdjacentParentShardId": shard_id(3),
        "HashKeyRange": hash_range,
        "SequenceNumberRange": {"StartingSequenceNumber": "1", "EndingSequenceNumber": "2"},
    }
    assert read_shard(listed) == Shard(4, (1, 3), True, "0", "9")
    child = {"ShardId": shard_id(4), "ParentShards": [shard_id(1)], "HashKeyRange": hash_range}
    assert read_shard(child) == Shard(4, (1,), False, "0", "9")


def test_which_shards_are_done() -> None:
    """Those that a row says; and closed ones without a row that something with a row descends
    from: theirs was cleared away, or the stream was begun behind them."""
    shards = [
        Shard(0, (), True),
        Shard(1, (), True),
        Shard(2, (0,), True),
        Shard(3, (2, 1)),
        Shard(4, (9,)),
        Shard(5, (), True),
    ]
    assert done_shards(shards, {2}, {2}) == {0, 2}
    assert done_shards(shards, set(), {3}) == {0, 1, 2}
    assert done_shards(shards, {1}, {1, 5}) == {1}
    assert done_shards(shards, set(), set()) == set()


@pytest.mark.parametrize(
    ("records", "size", "limit"),
    [(0, 0, 1000), (10, 10, 10_000), (1000, 2**21, 1000), (10, 10 * 2**20, 100), (5000, 0, 10_000)],
)
def test_how_many_records_are_asked_for(records: int, size: int, limit: int) -> None:
    """About as many as a shard gives in a second."""
    assert limit_of(records, size) == limit


def test_when_the_next_call_may_be() -> None:
    assert pause_secs(0, False, 1.0) == 0.2
    assert pause_secs(10 * 2**20, False, 1.0) == 5.0
    assert pause_secs(100, True, 1.0) == 1.0
    assert pause_secs(4 * 2**20, True, 1.0) == 2.0


def test_numbers_outside() -> None:
    """A position is written as the record below it; one that says where to begin is not."""
    assert NAMES.position(NUMBER + 1) == str(SEQUENCE)
    assert NAMES.position(NUMBER + 4) == f"{SEQUENCE}:3"
    assert NAMES.position(SHARD_END) == "ended"
    assert NAMES.position(0) is None
    assert NAMES.position(1_700_000_000_000) is None
    assert NAMES.number(joined(10**128)) == "1" + "0" * 128
    for number in (NUMBER, NUMBER + 7, joined(10**129 - 1, 2)):
        assert NAMES.read(NAMES.text(number)) == number
    assert spoken(17) == "17"
    assert spoken(NUMBER + 7) == f"{SEQUENCE}:7"
    assert NUMBERS.stood(17) == "17"
    assert NAMES.stood(NUMBER + 1) == f"the record behind {SEQUENCE}"
    assert (NAMES.stood(TRIM_HORIZON), NAMES.stood(SHARD_END)) == ("its beginning", "its end")
    for text in ("", "1:x", f"1:{2**24}", "1:-1"):
        with pytest.raises(ValueError):
            NAMES.read(text)


# Dealing.

A, B, C = (f"{OWNERS}{name}" for name in "abc")


def _rows(*owners: str) -> dict[str, Row]:
    return {f"s{i}": Row(f"s{i}", 0, owner=owner) for i, owner in enumerate(owners)}


def test_one_takes_all_that_is_free() -> None:
    assert plan(_rows("", "", ""), set(), A).take == ("s0", "s1", "s2")
    assert plan(_rows(B, "", ""), set(), A).take == ("s1", "s2")


def test_what_nobody_is_heard_of_is_free() -> None:
    assert plan(_rows(B, B), {"s0", "s1"}, A) == plan(_rows("", ""), set(), A)
    # One's own is not.
    assert plan(_rows(A, A), {"s0", "s1"}, A).take == ()


def test_who_comes_late_asks() -> None:
    decided = plan(_rows(B, B, B, B), set(), A)
    assert (decided.take, decided.ask) == ((), ("s0", "s1"))
    # And waits for what it has asked for.
    asked = _rows(B, B, B, B)
    asked["s0"] = replace(asked["s0"], wanted=A)
    assert plan(asked, set(), A).ask == ("s1",)


def test_what_is_let_go_of_is_for_who_asked() -> None:
    """Its owner does not take it back, though it seems to be alone."""
    given = _rows(B, "")
    given["s1"] = replace(given["s1"], wanted=A)
    assert plan(given, set(), B).take == ()
    assert plan(given, set(), A).take == ("s1",)
    # Unless who asked is not heard of any more.
    assert plan(given, {"s1"}, B).take == ("s1",)


def test_nobody_else_s_program_is_asked() -> None:
    assert plan(_rows("worker", "worker"), set(), A).ask == ()


def test_fewer_shards_than_copies() -> None:
    assert plan(_rows(B), set(), A) == plan(_rows(), set(), A)


@given(
    leases=st.integers(0, 12),
    copies=st.integers(1, 5),
    begin=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_copies_come_to_a_fair_share(leases: int, copies: int, begin: list[int]) -> None:
    """From whatever they have, within a few turns, and then nothing moves any more."""
    names = [f"{OWNERS}{number}" for number in range(copies)]
    owners = [names[number] if number < copies else "" for number in begin[:leases]]
    rows = _rows(*owners)
    changed = True
    for _ in range(40):
        changed = False
        for me in names:
            decided = plan(rows, set(), me)
            changed = changed or bool(decided.take or decided.ask)
            for key in decided.take:
                rows[key] = replace(rows[key], owner=me, wanted="")
            for key in decided.ask:
                assert rows[key].owner not in ("", me)
                rows[key] = replace(rows[key], wanted=me)
        for key, row in rows.items():
            if row.wanted and row.owner:
                rows[key] = replace(row, owner="")
        if not changed:
            break
    assert not changed
    counts = [sum(row.owner == name for row in rows.values()) for name in names]
    assert sum(counts) == leases
    assert min(counts) >= leases // copies


# Reach.


def _messages(*pairs: tuple[int, int]) -> list[Message]:
    return [Message(NUMBER + number, b"k", b"d", ms) for number, ms in pairs]


def test_how_far_behind_in_time() -> None:
    reach = Reach()
    assert reach.behind_ms(0) is None
    reach.note(_messages((1, 1000), (5, 2000)), NUMBER + 6, 7000, 50)
    assert (reach.behind_ms(0), reach.target) == (8000, None)
    reach.note(_messages((7, 8000), (9, 9000)), NUMBER + 10, 0, 60)
    assert reach.target == NUMBER + 10
    assert reach.behind_ms(0) == 8000
    assert reach.arrival_ms(NUMBER + 6) == 2000
    assert reach.behind_ms(NUMBER + 6) == 1000
    assert (reach.reached_ms(NUMBER + 6), reach.reached_ms(NUMBER + 10)) == (0, 60)
    assert reach.behind_ms(NUMBER + 10) == 0
    assert reach.arrival_ms(NUMBER + 10) == 9000


def test_an_idle_shard_is_at_its_end() -> None:
    """Empty answers far behind the end are not."""
    reach = Reach()
    reach.note([], 0, 60_000, 10)
    assert (reach.behind_ms(0), reach.target) == (60_000, None)
    reach.note([], 0, 0, 20)
    assert (reach.behind_ms(0), reach.target, reach.reached_ms(0)) == (0, 0, 20)


def test_a_shard_that_nobody_asks_about_takes_no_more_memory() -> None:
    """In a job its lease is another worker's mostly. What came lately is told to the answer."""
    reach = Reach()
    for number in range(0, 100_000, 2):
        reach.note(_messages((number, number), (number + 1, number + 1)), NUMBER + number + 2, 0, 1)
    assert reach.answers <= 1000
    assert 0 <= reach.arrival_ms(NUMBER + 50_000) <= 50_000
    assert 0 < reach.behind_ms(NUMBER + 50_000) <= 100_000
    for number in range(99_900, 100_000, 2):
        assert reach.arrival_ms(NUMBER + number) == number - 1
        assert reach.behind_ms(NUMBER + number) == 99_999 - number
    assert reach.behind_ms(NUMBER + 100_000) == 0


def test_records_of_an_answer() -> None:
    answer = {
        "SequenceNumber": str(SEQUENCE),
        "PartitionKey": "ü",
        "Data": "aGk=",
        "ApproximateArrivalTimestamp": 1.671562498449e9,
    }
    assert read_messages([answer]) == [Message(NUMBER, "ü".encode(), b"hi", 1671562498449)]
    # Streams that distribute records by themselves have some without a key.
    del answer["PartitionKey"]
    assert read_messages([answer])[0].name == b""
    with pytest.raises(ValueError, match="sequence number 17 is too small"):
        read_messages([{**answer, "SequenceNumber": "17"}])
