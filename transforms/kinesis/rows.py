"""Rows: how far a shard is done, as the Kinesis Client Library keeps it in its lease table. Pure.

So tools that know such tables show ours, and either program can go on where the other has stopped.
What only we know is in attributes that begin with ``sink``; the library leaves them alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transforms.kinesis.shards import SHARD_END, TRIM_HORIZON, Shard, is_time, shard_id
from transforms.names import joined, parted

KEY = "leaseKey"
COUNTER = "leaseCounter"
OWNER = "leaseOwner"
CHECKPOINT, SUB_NUMBER = "checkpoint", "checkpointSubSequenceNumber"
SWITCHES = "ownerSwitchesSinceCheckpoint"
NOTE, TIME, CREATED = "sinkLanes", "sinkTimestamp", "sinkStreamCreated"
ARRIVAL, REACHED = "sinkArrival", "sinkReached"
UNFINISHED, WANTED = "sinkUnfinished", "sinkWanted"
PENDING = (
    "pendingCheckpoint",
    "pendingCheckpointSubSequenceNumber",
    "pendingCheckpointState",
)
HANDED_BY = "checkpointOwner"

# Rows that are none of a shard, where the library has everything in one table.
_LEASE = "LEASE"

Attribute = Mapping[str, Any]
"""A value as DynamoDB has it: its type, and the value."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table.

    Attributes:
        key: Its ``leaseKey``.
        position: How far the shard is done; None where it is to begin at the starting position.
        counter: Its ``leaseCounter``.
        owner: Who has it, empty if nobody has.
        note: What was kept beside the position.
        created: When its stream was made, in milliseconds since the epoch, as far as it says.
        wanted: Who asks for it.
        unfinished: Whether whoever made it was still making those of the other shards.
        arrival_ms: When the last record came that is done.
        reached_ms: When there was nothing behind the position.
    """

    key: str
    position: int | None
    counter: int = 0
    owner: str = ""
    note: str = ""
    created: int = 0
    wanted: str = ""
    unfinished: bool = False
    arrival_ms: int = 0
    reached_ms: int = 0

    @property
    def ended(self) -> bool:
        """Whether the shard is done for good."""
        return self.position == SHARD_END


def lease_key(number: int, stream: str = "", account: str = "", created_secs: int = 0) -> str:
    """The key of a shard's row; with its stream where a table has shards of several."""
    if not stream:
        return shard_id(number)
    return f"{account}:{stream}:{created_secs}:{shard_id(number)}"


def read_row(item: Mapping[str, Attribute]) -> Row | None:
    """A row as DynamoDB has it; None for one that is of no shard.

    Raises:
        ValueError: Its checkpoint is none.
    """
    if item.get("entityType", {}).get("S", _LEASE) != _LEASE or CHECKPOINT not in item:
        return None
    text = item[CHECKPOINT].get("S", "")
    sub_number = int(item.get(SUB_NUMBER, {}).get("N", 0))
    position: int | None
    if text == "SHARD_END":
        position = SHARD_END
    elif text == "TRIM_HORIZON":
        position = TRIM_HORIZON
    elif text == "AT_TIMESTAMP" and TIME in item:
        position = int(item[TIME]["N"])
    elif text in ("LATEST", "AT_TIMESTAMP"):
        position = None
    elif text.isdecimal():
        # The sub-number is that of the last record of an aggregate that is done.
        position = joined(int(text), sub_number) + 1
    else:
        raise ValueError(f"the checkpoint of {item[KEY].get('S')} is no number: {text[:60]}")
    return Row(
        item[KEY]["S"],
        position,
        int(item.get(COUNTER, {}).get("N", 0)),
        item.get(OWNER, {}).get("S", ""),
        item.get(NOTE, {}).get("S", ""),
        int(item.get(CREATED, {}).get("N", 0)),
        item.get(WANTED, {}).get("S", ""),
        item.get(UNFINISHED, {}).get("BOOL", False),
        int(item.get(ARRIVAL, {}).get("N", 0)),
        int(item.get(REACHED, {}).get("N", 0)),
    )


def checkpoint(position: int) -> dict[str, Attribute]:
    """The attributes that say a position."""
    found: dict[str, Attribute] = {SUB_NUMBER: {"N": "0"}}
    if position == TRIM_HORIZON:
        found[CHECKPOINT] = {"S": "TRIM_HORIZON"}
    elif position == SHARD_END:
        found[CHECKPOINT] = {"S": "SHARD_END"}
    elif is_time(position):
        found[CHECKPOINT] = {"S": "AT_TIMESTAMP"}
        found[TIME] = {"N": str(position)}
    else:
        number, sub = parted(position - 1)
        found[CHECKPOINT], found[SUB_NUMBER] = {"S": str(number)}, {"N": str(sub)}
    return found


def describe(shard: Shard) -> dict[str, Attribute]:
    """The attributes that say which shard it is."""
    found: dict[str, Attribute] = {}
    if shard.parents:
        found["parentShardId"] = {"SS": [shard_id(each) for each in shard.parents]}
    if shard.low and shard.high:
        found |= {"startingHashKey": {"S": shard.low}, "endingHashKey": {"S": shard.high}}
    return found


@dataclass(frozen=True, slots=True)
class Update:
    """An UpdateItem: what it sets and removes, and what must hold for it.

    Attributes:
        key: The row.
        set: Attributes and their new values.
        remove: Attributes to take away.
        counter: The row's counter as it was last seen; None if there must be no such row.
        created: Where there may be such a row of another stream of that name: when ours was made.
        unless: Attributes that must not be there.
    """

    key: str
    set: Mapping[str, Attribute]
    remove: Collection[str] = ()
    counter: int | None = None
    created: int = 0
    unless: Collection[str] = ()

    def arguments(self, table: str) -> dict[str, Any]:
        """Arguments of the call."""
        names: dict[str, str] = {}
        values: dict[str, Attribute] = {}

        def name(attribute: str) -> str:
            return names.setdefault(attribute, f"#n{len(names)}")

        def value(attribute: Attribute) -> str:
            values[f":v{len(values)}"] = attribute
            return f":v{len(values) - 1}"

        text = "SET " + ", ".join(f"{name(n)} = {value(v)}" for n, v in self.set.items())
        removed = [each for each in self.remove if each not in self.set]
        if removed:
            text += " REMOVE " + ", ".join(map(name, removed))
        if self.counter is not None:
            holds = f"{name(COUNTER)} = {value({'N': str(self.counter)})}"
        else:
            holds = f"attribute_not_exists({name(KEY)})"
            if self.created:
                made = name(CREATED)
                other = f"{made} <> {value({'N': str(self.created)})}"
                holds += f" OR (attribute_exists({made}) AND {other})"
        for each in self.unless:
            holds += f" AND attribute_not_exists({name(each)})"
        return {
            "TableName": table,
            "Key": {KEY: {"S": self.key}},
            "UpdateExpression": text,
            "ConditionExpression": holds,
            "ExpressionAttributeNames": {short: long for long, short in names.items()},
            "ExpressionAttributeValues": values,
            "ReturnValues": "ALL_NEW",
        }
