"""A source in memory: shards of records with long, sparse numbers, which end and have children.

It is as foreign to Kafka as a source may be: numbers of 56 digits with holes, no end that could be
asked for, progress in a table.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from transforms.errors import SinkError
from transforms.names import Names
from transforms.records import PartitionKey, Records
from transforms.source import Detour, Fetched, Fetcher, Found, Start

ENDED = 10**129
"""Above any number: the position behind a shard that has ended and is done."""

_FIRST = 49590338271490256608559692538361571095921575989136588898


@dataclass(frozen=True, slots=True)
class Row:
    """A record."""

    number: int
    name: bytes | None
    data: bytes
    ms: int

    def offset(self) -> int:
        return self.number

    def timestamp(self) -> tuple[int, int]:
        return 1, self.ms


@dataclass
class Shard:
    """A list of records that grows until it ends."""

    parents: tuple[int, ...] = ()
    rows: list[Row] = field(default_factory=list)
    closed: bool = False

    def add(self, count: int, text: str = "record") -> Shard:
        """Append records; the holes between their numbers are of any size."""
        for _ in range(count):
            index = len(self.rows)
            number = self.rows[-1].number + 1 + 7919**index % 10**20 if index else _FIRST
            self.rows.append(
                Row(number, b"k%d" % (index % 9), f"{text} {index}".encode(), 1_600_000_000_000)
            )
        return self


@dataclass
class Stream:
    """All shards, and how far they are done.

    Attributes:
        shards: By number.
        table: Positions, each with its note.
        begun: Shards in the order in which they were begun, run by run.
    """

    shards: dict[int, Shard]
    table: dict[PartitionKey, tuple[int, str]] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)


STREAMS: dict[str, Stream] = {}
"""By name; a source is a value and only names its stream."""


@dataclass(frozen=True)
class MemorySource:
    """The source of a stream of `STREAMS`."""

    name: str
    names = Names(texts=True, ended=ENDED)

    def fetcher(self) -> MemoryFetcher:
        return MemoryFetcher(STREAMS[self.name])

    def partitions(self, fetcher: Fetcher) -> MemoryPartitions:
        return MemoryPartitions(self.name)

    def store(self) -> MemoryStore:
        return MemoryStore(STREAMS[self.name])

    def fetch_again(self, key: PartitionKey, offsets: Sequence[int]) -> Records | None:
        wanted = set(offsets)
        return _records(
            [row for row in STREAMS[key[0]].shards[key[1]].rows if row.number in wanted]
        )

    def members(self) -> None:
        return None

    def as_member(self, number: int) -> MemorySource:
        return self

    @property
    def label(self) -> dict[str, str]:
        return {"stream": self.name}

    @property
    def ledger(self) -> str:
        return f"the table of {self.name}"


class MemoryFetcher:
    """Fetches from lists."""

    most = 50

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._positions: dict[PartitionKey, int] = {}
        self._paused: set[PartitionKey] = set()
        self._told: dict[PartitionKey, int] = {}

    def assign(self, positions: Mapping[PartitionKey, int]) -> None:
        self._positions |= positions

    def assign_again(self, key: PartitionKey, position: int) -> None:
        self._positions[key] = position
        self._paused.discard(key)

    def unassign(self, keys: Collection[PartitionKey]) -> None:
        for key in keys:
            del self._positions[key]

    def pause(self, keys: Collection[PartitionKey]) -> None:
        self._paused |= set(keys)

    def resume(self, keys: Collection[PartitionKey]) -> None:
        self._paused -= set(keys)

    def fetch(self, timeout_secs: float) -> tuple[int, Iterable[Fetched]]:
        fetched = list(self._fetch())
        if not fetched:
            time.sleep(min(timeout_secs, 0.005))
        return sum(len(each.messages) or 1 for each in fetched), fetched

    def _fetch(self) -> Iterator[Fetched]:
        for key, position in list(self._positions.items()):
            if key in self._paused or position == ENDED:
                continue
            shard = self._stream.shards[key[1]]
            rows = [row for row in shard.rows if row.number >= position][: self.most // 2]
            if rows:
                self._positions[key] = rows[-1].number + 1
                yield Fetched(key, rows)
            elif shard.closed:
                self._positions[key] = ENDED
                yield Fetched(key, end=ENDED, ended=True)
            elif self._told.get(key) != position:
                self._told[key] = position
                yield Fetched(key, end=position)

    def behind(self, key: PartitionKey, position: int) -> int | None:
        return sum(row.number >= position for row in self._stream.shards[key[1]].rows)

    def close(self) -> None:
        self._positions = {}

    def keys(self, messages: Sequence[Row]) -> Iterable[bytes | None]:
        return map(attrgetter("name"), messages)

    def offsets(self, messages: Sequence[Row]) -> Iterable[int]:
        return map(attrgetter("number"), messages)

    def records(self, messages: list[Row]) -> Records:
        return _records(messages)

    def bytes(self, messages: list[Row]) -> int:
        return sum(len(row.data) + len(row.name or b"") for row in messages)


def _records(rows: Sequence[Row]) -> Records:
    return Records(
        [row.number for row in rows],
        [row.ms for row in rows],
        [row.name for row in rows],
        [row.data for row in rows],
        [None] * len(rows),
    )


class MemoryPartitions:
    """Knows the shards of a stream."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream = STREAMS[name]
        self._targets: dict[PartitionKey, int] = {}

    def find(self, quick: bool = False) -> list[Found]:
        found = []
        for number, shard in self._stream.shards.items():
            key = (self._name, number)
            parents = tuple((self._name, parent) for parent in shard.parents)
            ended = self._stream.table.get(key, (0, ""))[0] == ENDED
            found.append(Found(key, parents, ended))
        return found

    def problem(self) -> SinkError | None:
        return None

    def made_anew(self, keys: Collection[PartitionKey], quick: bool = False) -> set[str]:
        return set()

    def gone(self, key: PartitionKey) -> SinkError:
        return SinkError(f"shard {key[1]} is gone")

    def survey(self, keys: list[PartitionKey]) -> None:
        pass

    def unfinished(self, keys: Collection[PartitionKey]) -> dict[PartitionKey, int]:
        return {}

    def starts(self, keys: list[PartitionKey]) -> dict[PartitionKey, Start]:
        found = {}
        for key in keys:
            self._stream.begun.append(key[1])
            shard = self._stream.shards[key[1]]
            position, note = self._stream.table.get(key, (0, ""))
            found[key] = Start(position, key not in self._stream.table, note, ENDED)
            last = shard.rows[-1].number + 1 if shard.rows else 0
            self._targets[key] = ENDED if shard.closed else last
        return found

    def restarts(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, int]:
        return dict(positions)

    def detours(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, Detour]:
        return {}

    def caught_up(self, key: PartitionKey, position: int) -> bool:
        return position >= self._targets[key]


class MemoryStore:
    """Keeps positions in a stream's table."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def commit(
        self, positions: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str], late: bool
    ) -> str | None:
        for key, position in positions.items():
            self._stream.table[key] = (position, notes.get(key, ""))
        return None

    def kept(self, key: PartitionKey) -> int | None:
        return self._stream.table[key][0] if key in self._stream.table else None

    def listen(self) -> None:
        pass
