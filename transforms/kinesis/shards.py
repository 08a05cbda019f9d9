"""Shards: what their numbers, positions and kinship mean. Pure.

A position is an int, as everywhere: the last record's number + 1. Its number is its sequence number
with a sub-number below it, see `transforms.names`: 0, or its place in an aggregate. Numbers are
larger than `FIRST`, so what is below it says where to begin with a shard of which no record is
done: 0 at its oldest record, any other at a time in milliseconds. `SHARD_END` is above all. A
position whose sub-number is 0 is that of a record that is to come: the others have 1 at least.

A position is never sent to Kinesis, which knows no number + 1: what is sent is its number, with the
word after.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transforms.names import SUB_BITS, Names, joined, parted

SHARD_END = 10**129 << SUB_BITS
"""Above any number: the position behind a shard that has ended and is done."""
FIRST = 10**15
"""Above any time, and below any number that AWS gives."""
TRIM_HORIZON = 0
"""The position of a shard's oldest record, whichever that is."""

NAMES = Names(texts=True, ended=SHARD_END, first=FIRST, alone=True, lag_ms=True, subs=True)

STREAM_ARN = re.compile(
    r"arn:aws[a-zA-Z-]*:kinesis:(?P<region>[a-z0-9-]+):(?P<account>\d{12}):stream/"
    r"(?P<name>[a-zA-Z0-9_.-]{1,128})"
)
STREAM_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_SHARD_ID = re.compile(r"shardId-(\d{12})", re.ASCII)

# Reads that a shard allows, for all who read it together.
_CALL_SECS = 0.2
_BYTES_PER_SEC = 2 * 2**20
_MOST_RECORDS, _LEAST_RECORDS, _FIRST_RECORDS = 10_000, 100, 1000


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as Kinesis lists it.

    Attributes:
        number: The number in its id.
        parents: Numbers of those whose place it has taken: one after a split, two after a merge.
        closed: Whether nothing more is written to it.
        low: First hash key of its range, as a text.
        high: Last hash key of its range.
    """

    number: int
    parents: tuple[int, ...] = ()
    closed: bool = False
    low: str = ""
    high: str = ""


def shard_id(number: int) -> str:
    """The id of a shard."""
    return f"shardId-{number:012d}"


def shard_number(id: str) -> int:
    """The number in a shard's id.

    Raises:
        ValueError: It is none as Kinesis has made them so far.
    """
    match = _SHARD_ID.fullmatch(id)
    if not match:
        raise ValueError(f"{id} is not a shard id such as {shard_id(3)}")
    return int(match[1])


def read_shard(listed: Mapping[str, Any]) -> Shard:
    """A shard of an answer of ListShards, or of the children that GetRecords names.

    Raises:
        ValueError: An id in it is none.
    """
    parents = [listed.get("ParentShardId"), listed.get("AdjacentParentShardId")]
    parents = listed.get("ParentShards", parents)
    ranged = listed.get("HashKeyRange", {})
    numbers = listed.get("SequenceNumberRange", {})
    return Shard(
        shard_number(listed["ShardId"]),
        tuple(shard_number(each) for each in parents if each),
        numbers.get("EndingSequenceNumber") is not None,
        str(ranged.get("StartingHashKey", "")),
        str(ranged.get("EndingHashKey", "")),
    )


def is_time(position: int) -> bool:
    """Whether a position is a time in milliseconds."""
    return TRIM_HORIZON < position < FIRST


def whole(position: int) -> int:
    """Where to go on where aggregates are not taken apart: in front of one that is done in part."""
    if position < FIRST or position == SHARD_END:
        return position
    number, sub = parted(position)
    return joined(number) if sub > 1 else position


def begin_at(position: int, parts: bool = False) -> dict[str, Any]:
    """What GetShardIterator is asked for.

    Args:
        position: Where to go on, below `SHARD_END`.
        parts: Whether aggregates are taken apart: then the record that the position lies behind
            comes again, since more of it may be to come.
    """
    if position == TRIM_HORIZON:
        return {"ShardIteratorType": "TRIM_HORIZON"}
    if is_time(position):
        return {"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": position / 1000}
    number, sub = parted(position)
    word = "AT" if parts or sub == 0 else "AFTER"
    return {
        "ShardIteratorType": f"{word}_SEQUENCE_NUMBER",
        "StartingSequenceNumber": str(number),
    }


def starting_position(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same for SubscribeToShard, which has other names for it."""
    names = {
        "ShardIteratorType": "Type",
        "StartingSequenceNumber": "SequenceNumber",
        "Timestamp": "Timestamp",
    }
    return {names[name]: value for name, value in asked.items()}


def done_shards(shards: Iterable[Shard], ended: Collection[int], kept: Collection[int]) -> set[int]:
    """Shards of which nothing is to be read any more.

    A closed one without a row counts as done if one that descends from it has a row: the row was
    cleared away when it was done, or it lies before where the stream was begun.

    Args:
        shards: All that are listed.
        ended: Those whose row says that they are done.
        kept: Those that have a row.
    """
    shards = list(shards)
    begun = set(kept)
    while True:
        more = {p for each in shards if each.number in begun for p in each.parents} - begun
        if not more:
            break
        begun |= more
    passed = {s.number for s in shards if s.closed and s.number in begun and s.number not in kept}
    return passed | set(ended)


def limit_of(records: int, bytes: int) -> int:
    """How many records to ask for, from what the shard has brought before.

    An answer that is larger than what a shard may give in a second is paid for with refusals in
    the next ones.
    """
    if not records:
        return _FIRST_RECORDS
    fitting = _BYTES_PER_SEC * records // max(1, bytes)
    return max(_LEAST_RECORDS, min(_MOST_RECORDS, fitting))


def pause_secs(bytes: int, caught_up: bool, poll_secs: float) -> float:
    """How long after one call to wait with the next.

    Args:
        bytes: What it has brought.
        caught_up: Whether there was no more.
        poll_secs: How often to look for more then.
    """
    least = max(_CALL_SECS, bytes / _BYTES_PER_SEC)
    return max(least, poll_secs) if caught_up else least
