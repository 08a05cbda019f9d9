"""Stream: the source, and what it knows of its shards: which there are, and where to begin."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transforms.errors import KinesisError
from transforms.kinesis.client import AwsConfig, Refused, StreamApi, final_error
from transforms.kinesis.fetch import KinesisFetcher, fetch_again
from transforms.kinesis.leases import Later, LeaseTable, StreamFacts, TableConfig, shared_table
from transforms.kinesis.shards import (
    NAMES,
    SHARD_END,
    STREAM_ARN,
    TRIM_HORIZON,
    read_shard,
    shard_id,
)
from transforms.names import Names
from transforms.per_process import per_process
from transforms.records import PartitionKey, Records
from transforms.source import Detour, Fetcher, Found, Start

_LOGGER = logging.getLogger(__name__)

AT_HORIZON, AT_LATEST, AT_TIME = "TRIM_HORIZON", "LATEST", "AT_TIMESTAMP"

# A clock may be ahead of AWS's, where a time in the future is refused.
_LATEST_MS = 2000
_LIST_SECS = 1.0
_ANEW_SECS = 10.0
_TRY_SECS, _QUICK_SECS = 30.0, 3.0


@dataclass(frozen=True, slots=True)
class KinesisSource:
    """What to read: the `Source` of Kinesis.

    Attributes:
        streams: Names or ARNs.
        table: Name of the lease table.
        aws: Where they are, and who we are.
        starting_position: For shards of a stream of which the table knows nothing.
        starting_timestamp_ms: With AT_TIMESTAMP.
        poll_secs: How often to look for more in a shard that has nothing more.
        expiry_secs: After how long a lease that is not renewed is free.
        member: Which of this machine's processes it is.
        job: Name of the streaming job that reads; see `TableConfig.job`.
    """

    streams: tuple[str, ...]
    table: str
    aws: AwsConfig = AwsConfig()
    starting_position: str = AT_HORIZON
    starting_timestamp_ms: int | None = None
    poll_secs: float = 1.0
    expiry_secs: float = 10.0
    member: int = 0
    job: str = ""

    def fetcher(self) -> KinesisFetcher:
        table = self._table

        def inclusive(key: PartitionKey, position: int) -> bool:
            row = table.row(key)
            return row is not None and row.inclusive and row.position == position

        return KinesisFetcher(self.api, table.reach, self.poll_secs, inclusive)

    def partitions(self, fetcher: Fetcher) -> StreamShards:
        assert isinstance(fetcher, KinesisFetcher)
        return StreamShards(self, fetcher, self._table)

    def store(self) -> LeaseTable:
        if self.job:
            # In this process perhaps nobody else asks what there is.
            per_process(shards_of, self)
        return self._table

    def members(self) -> LeaseTable:
        return self._table

    def as_member(self, number: int) -> KinesisSource:
        return replace(self, member=number)

    def fetch_again(self, key: PartitionKey, offsets: Sequence[int]) -> Records | None:
        return fetch_again(self.api(key[0]), key, offsets)

    @property
    def names(self) -> Names:
        return NAMES

    @property
    def label(self) -> dict[str, str]:
        return {"streams": ", ".join(self.streams)}

    @property
    def ledger(self) -> str:
        return f"lease table {self.table}"

    @property
    def topics(self) -> tuple[str, ...]:
        """Names of the streams."""
        return tuple(map(stream_name, self.streams))

    def api(self, name: str) -> StreamApi:
        """This process's calls for a stream, by its name."""
        (stream,) = [each for each in self.streams if stream_name(each) == name]
        return per_process(_make_api, (self.aws, stream))

    @property
    def _table(self) -> LeaseTable:
        several = len(self.streams) > 1
        return shared_table(
            TableConfig(
                self.table,
                self.aws,
                self.streams[0],
                several,
                self.expiry_secs,
                self.member,
                self.job,
            )
        )


def _make_api(config: tuple[AwsConfig, str]) -> StreamApi:
    return StreamApi(*config)


def shards_of(source: KinesisSource) -> StreamShards:
    """What knows the streams' shards, asked what there are.

    Raises:
        KinesisError: Kinesis does not say.
    """
    shards = source.partitions(source.fetcher())
    shards.find()
    source.members().list_again = shards.find
    return shards


def stream_name(stream: str) -> str:
    """The name in a stream's name or ARN."""
    match = STREAM_ARN.fullmatch(stream)
    return match["name"] if match else stream


def _asked(api: StreamApi, call: Callable[[StreamApi], Any], within_secs: float) -> Any:
    """Ask Kinesis, again and again.

    Raises:
        KinesisError: It does not answer in time, or refuses.
    """
    deadline = time.monotonic() + within_secs
    while True:
        try:
            return call(api)
        except Refused as refused:
            if refused.code == "ResourceNotFoundException":
                raise KinesisError(
                    f"--stream={api.stream} is not found; create it first, or check the name, "
                    f"--aws_region and the account"
                ) from None
            if refused.is_final or time.monotonic() > deadline:
                raise final_error(api.stream, refused) from None
        time.sleep(0.3)


def arn_of(aws: AwsConfig, name: str) -> str:
    """The ARN of a stream.

    Raises:
        KinesisError: Kinesis does not say it.
    """
    summary = _asked(StreamApi(aws, name), StreamApi.summary, _TRY_SECS)
    return str(summary.get("StreamARN", ""))


class StreamShards:
    """Asks Kinesis and the lease table about the shards; the `Partitions` of Kinesis.

    Args:
        source: The streams and the starting position.
        fetcher: Reads the shards.
        table: Says how far they are done.
    """

    def __init__(self, source: KinesisSource, fetcher: KinesisFetcher, table: LeaseTable) -> None:
        self._source = source
        self._fetcher = fetcher
        self._table = table
        self._facts: dict[str, StreamFacts] = {}
        self._hours: dict[str, int] = {}
        self._listed = self._looked = float("-inf")
        self._started_ms = int(time.time() * 1000)

    def find(self, quick: bool = False) -> list[Found]:
        """See `Partitions.find`."""
        if not self._facts:
            self._look(quick)
        if time.monotonic() - self._listed >= _LIST_SECS:
            for name, facts in self._facts.items():
                self._list(name, facts, quick)
            self._listed = time.monotonic()
        found = []
        for name, facts in self._facts.items():
            done = self._table.done(name)
            # What was worked on and is not listed any more goes on until its reader has seen that.
            numbers = facts.shards.keys() | self._table.holds(name)
            for number in sorted(numbers):
                parents = facts.shards[number].parents if number in facts.shards else ()
                kin = tuple((name, parent) for parent in parents)
                row = self._table.row((name, number))
                ended = number in done or (row is not None and row.ended)
                found.append(Found((name, number), kin, ended))
        return found

    def _list(self, name: str, facts: StreamFacts, quick: bool) -> None:
        listed = self._ask(name, StreamApi.list_shards, quick)
        try:
            shards = [read_shard(each) for each in listed]
        except (ValueError, KeyError) as error:
            raise KinesisError(
                f"--stream={name}: its shards cannot be told apart: {error}"
            ) from None
        facts = replace(facts, shards={each.number: each for each in shards})
        self._facts[name] = facts
        self._table.note(facts)

    def _look(self, quick: bool) -> None:
        """Ask what the streams are."""
        for name in self._source.topics:
            summary: dict[str, Any] = self._ask(name, StreamApi.summary, quick)
            created = int(float(summary.get("StreamCreationTimestamp") or 0) * 1000)
            account = [*str(summary.get("StreamARN", "")).split(":"), "", "", "", "", ""][4]
            known = self._facts.get(name, StreamFacts(name))
            self._facts[name] = replace(known, account=account, created_ms=created)
            self._hours[name] = summary.get("RetentionPeriodHours") or 24
            self._table.note(self._facts[name])
        self._looked = time.monotonic()

    def _ask(self, name: str, call: Any, quick: bool) -> Any:
        return _asked(self._source.api(name), call, _QUICK_SECS if quick else _TRY_SECS)

    def problem(self) -> KinesisError | None:
        """See `Partitions.problem`."""
        self._look(quick=False)
        self._table.open()
        return None

    def made_anew(self, keys: Collection[PartitionKey], quick: bool = False) -> set[str]:
        """See `Partitions.made_anew`: a stream was deleted, and made again under its name."""
        if time.monotonic() - self._looked < _ANEW_SECS:
            return set()
        before = {name: facts.created_ms for name, facts in self._facts.items()}
        self._look(quick)
        return {name for name, facts in self._facts.items() if facts.created_ms != before[name]}

    def gone(self, key: PartitionKey) -> KinesisError:
        """See `Partitions.gone`."""
        return KinesisError(f"{shard_id(key[1])} of stream {key[0]} is gone")

    def survey(self, keys: list[PartitionKey]) -> None:
        """See `Partitions.survey`. Rows are made of all shards of a stream that has none, so that
        where it is begun stays what it is whatever crashes."""
        self._table.open()
        deadline = time.monotonic() + _TRY_SECS
        while True:
            try:
                self._table.scan()
                for name, facts in self._facts.items():
                    self._survey(name, facts)
                return
            except Later as later:
                if time.monotonic() > deadline:
                    why = f"{self._source.ledger} does not answer: {later}"
                    raise KinesisError(why) from None
            # What was made of it so far is found again.
            time.sleep(0.3)

    def _survey(self, name: str, facts: StreamFacts) -> None:
        rows = {number: self._table.row((name, number)) for number in facts.shards}
        kept = {number: row for number, row in rows.items() if row}
        marked = [number for number, row in kept.items() if row.unfinished]
        if kept and not marked:
            self._warn_of_loss(name, facts)
            return
        position = self._starting_position()
        if marked:
            # Whoever began was ended by something; it goes on where that was to begin.
            position = kept[marked[0]].position or TRIM_HORIZON
        shards = list(facts.shards.values())
        if self._source.starting_position == AT_LATEST:
            shards = [shard for shard in shards if not shard.closed]
        shards = [shard for shard in shards if shard.number not in kept]
        first = marked[0] if marked else None
        for shard in shards:
            made = self._table.add((name, shard.number), position, first is None)
            if first is None:
                first = shard.number
                if not made:
                    # Another copy is at it just now: with its position, if it comes to its end.
                    self._table.scan()
                    row = self._table.row((name, first))
                    position = (row.position if row else None) or position
        if first is not None:
            self._table.finish((name, first))

    def _starting_position(self) -> int:
        if self._source.starting_position == AT_LATEST:
            return int(time.time() * 1000) - _LATEST_MS
        if self._source.starting_position == AT_TIME:
            return self._source.starting_timestamp_ms or TRIM_HORIZON
        return TRIM_HORIZON

    def _warn_of_loss(self, name: str, facts: StreamFacts) -> None:
        horizon_ms = int(time.time() * 1000) - self._hours.get(name, 24) * 3_600_000
        for number in sorted(facts.shards):
            row = self._table.row((name, number))
            if row and not row.ended and 0 < row.arrival_ms < horizon_ms:
                _LOGGER.warning(
                    "%s-%d: its last committed record is older than the stream's retention of "
                    "%d h: records behind it may be lost",
                    name,
                    number,
                    self._hours.get(name, 24),
                )

    def starts(self, keys: list[PartitionKey]) -> dict[PartitionKey, Start]:
        """See `Partitions.starts`."""
        found = {}
        for key in keys:
            row = self._table.row(key)
            if row is None:
                found[key] = Start(TRIM_HORIZON, True, "", SHARD_END)
                continue
            position = row.position
            if position is None:
                # As the Kinesis Client Library leaves it before its first checkpoint.
                position = self._starting_position()
            found[key] = Start(position, row.position is None, row.note, SHARD_END)
        return found

    def kept(self) -> dict[PartitionKey, tuple[int, str]]:
        """How far shards are done of which the table has something, and what is kept beside it.

        Raises:
            KinesisError: The table or Kinesis does not answer.
        """
        found = self.find(quick=True)
        self._scan()
        rows = {each.key: self._table.row(each.key) for each in found}
        return {
            key: (row.position, row.note)
            for key, row in rows.items()
            if row and row.position is not None
        }

    def _scan(self) -> None:
        try:
            self._table.scan()
        except Later as later:
            raise KinesisError(f"{self._source.ledger} does not answer: {later}") from None

    def unfinished(self, keys: Collection[PartitionKey]) -> dict[PartitionKey, int]:
        """See `Partitions.unfinished`: what others have not done that was there when this run
        began."""
        self._scan()
        done = {name: self._table.done(name) for name in self._facts}
        found = {}
        for key in keys:
            row = self._table.row(key)
            if key[1] in done[key[0]] or key[1] not in self._facts[key[0]].shards:
                continue
            if row is None or self.is_closed(key) or row.reached_ms < self._started_ms:
                found[key] = row.counter if row else 0
        return found

    def restarts(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, int]:
        """See `Partitions.restarts`."""
        return dict(positions)

    def detours(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, Detour]:
        """See `Partitions.detours`: a shard does not know its position."""
        self._looked = float("-inf")
        anew = self.made_anew(positions.keys(), quick=True)
        why = "the shard does not know what was committed: it lies before what retention has left"
        return {
            key: Detour(TRIM_HORIZON, anew="the stream was made anew" if key[0] in anew else why)
            for key in positions
        }

    def is_anew(self, key: PartitionKey) -> bool:
        """Whether the shard's stream was made anew since it was asked last."""
        self._looked = float("-inf")
        return key[0] in self.made_anew([key], quick=True)

    def caught_up(self, key: PartitionKey, position: int) -> bool:
        """See `Partitions.caught_up`."""
        if self.is_closed(key):
            # There is nothing more in it, and what has taken its place counts, too.
            return position == SHARD_END
        target = self._fetcher.target(key)
        return target is not None and position >= target

    def is_closed(self, key: PartitionKey) -> bool:
        shard = self._facts[key[0]].shards.get(key[1])
        return shard is None or shard.closed
