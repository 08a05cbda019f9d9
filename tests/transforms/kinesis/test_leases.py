"""The lease table on a DynamoDB that nobody here wrote, and on ours beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import boto3
import pytest

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.processes import wait_until
from tests import sink
from tests.servers.moto_server import moto_server
from transforms.errors import KinesisError
from transforms.kinesis.client import AwsConfig
from transforms.kinesis.leases import LeaseTable, StreamFacts, TableConfig
from transforms.kinesis.shards import SHARD_END, Shard, shard_id
from transforms.names import joined

SEQUENCE = 49590338271490256608559692538361571095921575989136588898
NUMBER = joined(SEQUENCE)
KEYS = [("orders", 0), ("orders", 1)]

# What is about time, and not about what DynamoDB takes; the other one is slow.
OURS = pytest.mark.parametrize("url", ["ours"], indirect=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in sink.environment().items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as url:
        yield url


@pytest.fixture(params=["moto", "ours"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "moto":
        yield request.getfixturevalue("moto")
        return
    with LocalKinesis() as running:
        yield running.url


class Tables:
    """Copies of the program with one table."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name
        self._made: list[LeaseTable] = []
        self.client: Any = boto3.client("dynamodb", endpoint_url=url)

    def make(self, secs: float = 1.0, created_ms: int = 17, **shards: Shard) -> LeaseTable:
        aws = AwsConfig("us-east-1", dynamodb_url=self.url)
        made = LeaseTable(TableConfig(self.name, aws, "orders", expiry_secs=secs))
        listed = {0: Shard(0), 1: Shard(1)}
        made.note(StreamFacts("orders", "123", created_ms, listed))
        made.open()
        made.scan()
        self._made.append(made)
        return made

    def row(self, number: int) -> dict[str, Any]:
        key = {"leaseKey": {"S": shard_id(number)}}
        found: dict[str, Any] = self.client.get_item(
            TableName=self.name, Key=key, ConsistentRead=True
        )["Item"]
        return found

    def close(self) -> None:
        for each in self._made:
            each.close()


@pytest.fixture
def tables(url: str, request: pytest.FixtureRequest) -> Iterator[Tables]:
    made = Tables(url, f"leases-{time.time_ns()}")
    yield made
    made.close()


def _given(table: LeaseTable) -> set[tuple[str, int]]:
    return set(table.deal().given)


def _has(table: LeaseTable, *keys: tuple[str, int]) -> None:
    wait_until(lambda: _given(table) == set(keys), f"it does not have {keys}", 30)


def test_a_commit_is_for_the_counter_that_was_seen(tables: Tables) -> None:
    table = tables.make()
    for key in KEYS:
        assert table.add(key, 0)
        assert not table.add(key, 5)
    table.join(["orders"])
    _has(table, *KEYS)
    # Not before it is taken.
    assert table.commit({KEYS[0]: NUMBER + 1}, {}, False) is None
    assert tables.row(0)["checkpoint"] == {"S": "TRIM_HORIZON"}
    table.take(KEYS)
    assert table.commit({KEYS[0]: NUMBER + 1, KEYS[1]: SHARD_END}, {KEYS[0]: "note"}, False) is None
    row = tables.row(0)
    assert (row["checkpoint"], row["sinkLanes"]) == ({"S": str(SEQUENCE)}, {"S": "note"})
    assert tables.row(1)["checkpoint"] == {"S": "SHARD_END"}
    assert (table.kept(KEYS[0]), table.kept(KEYS[1])) == (NUMBER + 1, SHARD_END)
    # A note is gone with what it was for.
    table.commit({KEYS[0]: NUMBER + 9}, {}, False)
    assert "sinkLanes" not in tables.row(0)


@OURS
def test_leases_are_renewed_and_run_out(tables: Tables) -> None:
    first, second = tables.make(), tables.make()
    for key in KEYS:
        first.add(key, 0)
    second.scan()
    first.join(["orders"])
    _has(first, *KEYS)
    counter = int(tables.row(0)["leaseCounter"]["N"])
    wait_until(lambda: int(tables.row(0)["leaseCounter"]["N"]) > counter + 1, "not renewed", 30)
    # As if it had been killed.
    first._closed = True
    second.join(["orders"])
    _has(second, *KEYS)
    second.take(KEYS)
    assert second.commit({KEYS[0]: NUMBER + 1}, {}, False) is None
    # What it committed then would be lost to the other, and is not kept.
    first.take(KEYS)
    assert first.commit({KEYS[0]: NUMBER + 5}, {}, False) is None
    assert tables.row(0)["checkpoint"] == {"S": str(SEQUENCE)}
    assert KEYS[0] not in _given(first)


@OURS
def test_a_lease_is_handed_over_when_it_is_asked_for(tables: Tables) -> None:
    first, second = tables.make(30), tables.make(30)
    for key in KEYS:
        first.add(key, 0)
    first.join(["orders"])
    _has(first, *KEYS)
    second.join(["orders"])

    def asked() -> bool:
        second.deal()
        return bool(first.deal().leaving)

    wait_until(asked, "it was not asked for", 60)
    leaving = first.deal().leaving
    assert len(leaving) == 1
    first.let_go(leaving)
    _has(second, *leaving)
    assert _given(first) == set(KEYS) - leaving


@OURS
def test_an_old_look_at_the_table_takes_nothing_away(tables: Tables) -> None:
    """It may have been begun before a lease was taken, and come back after."""
    table = tables.make()
    for key in KEYS:
        table.add(key, 0)
    table.join(["orders"])
    _has(table, *KEYS)
    with table._changed:
        row = table._held[KEYS[0]].row
        asked = replace(row, wanted="beam-lambda-sink/host/1/dead")
        table._rows[row.key] = replace(asked, counter=row.counter - 1)
        assert not table._is_leaving(KEYS[0], table._held[KEYS[0]])
        table._rows[row.key] = asked
        assert table._is_leaving(KEYS[0], table._held[KEYS[0]])


@OURS
def test_another_program_s_owner_is_an_error(tables: Tables) -> None:
    table = tables.make(1)
    for key in KEYS:
        table.add(key, 0)
    table.join(["orders"])
    _has(table, *KEYS)
    table.take(KEYS)
    tables.client.update_item(
        TableName=tables.name,
        Key={"leaseKey": {"S": shard_id(0)}},
        UpdateExpression="SET leaseOwner = :w, leaseCounter = :c",
        ExpressionAttributeValues={":w": {"S": "worker-9"}, ":c": {"N": "999"}},
    )
    with pytest.raises(KinesisError, match="is in use: worker-9 has the lease shardId-0"):
        table.commit({KEYS[0]: NUMBER + 1}, {}, False)


def test_rows_of_a_stream_that_had_the_name_before(tables: Tables) -> None:
    before = tables.make()
    before.add(KEYS[0], NUMBER + 1)
    table = tables.make(created_ms=18)
    assert table.row(KEYS[0]) is None
    assert table.add(KEYS[0], 0)
    assert tables.row(0)["checkpoint"] == {"S": "TRIM_HORIZON"}


@OURS
def test_a_table_of_something_else_is_refused(tables: Tables) -> None:
    tables.client.create_table(
        TableName=tables.name,
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        BillingMode="PAY_PER_REQUEST",
    )
    with pytest.raises(KinesisError, match="is no lease table: its key is id, and not leaseKey"):
        tables.make()
