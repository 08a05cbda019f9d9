"""Leases: the DynamoDB table that says how far each shard is done, and which copy works on it.

Each write is for the counter that was seen last, so that of two who write one fails and knows. A
lease whose counter stands still for `TableConfig.expiry_secs` is free: no clock is compared with
another. See `rows` for the shape, and `dealing` for who takes what.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import botocore.exceptions as aws_errors

from transforms.errors import KinesisError
from transforms.kinesis import rows as columns
from transforms.kinesis.client import AwsConfig, make_client
from transforms.kinesis.dealing import JOBS, OWNERS, plan, plan_alone
from transforms.kinesis.reach import Reach
from transforms.kinesis.rows import Row, Update, checkpoint, describe, lease_key, read_row
from transforms.kinesis.shards import SHARD_END, TRIM_HORIZON, Shard, done_shards, whole
from transforms.per_process import per_process
from transforms.records import PartitionKey
from transforms.source import Deal

_LOGGER = logging.getLogger(__name__)

# The table is looked at, and a lease renewed, so many times until it would be free.
_LOOKS, _RENEWALS = 5, 3
_LOOK_MOST_SECS = 2.0
# Of a loop that does not ask any more what it has, nothing is renewed.
_SILENT_SECS = 60.0
_KEEP_SECS = 3600.0
_APPEAR_SECS = 60.0
_HEAR_SECS = 0.3
_WRITERS = 8
_MAYBE = frozenset(
    {
        "InternalServerError",
        "ItemCollectionSizeLimitExceededException",
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "ThrottlingException",
        "TransactionConflictException",
    }
)


@dataclass(frozen=True, slots=True)
class TableConfig:
    """Which table, and how leases are kept.

    Attributes:
        name: The table's name.
        aws: Where it is.
        stream: A stream, for the region.
        several: Whether shards of several streams are in it.
        expiry_secs: After how long a lease that is not renewed is free.
        member: Which of this machine's processes it is.
        job: Name of the streaming job whose process it is. All of a job's processes are one owner,
            of all shards; empty for a copy of the program, which shares them with others.
    """

    name: str
    aws: AwsConfig
    stream: str
    several: bool = False
    expiry_secs: float = 10.0
    member: int = 0
    job: str = ""


class Later(Exception):
    """The table does not answer for now; says why."""


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What is known of a stream.

    Attributes:
        name: Its name.
        account: Whose it is.
        created_ms: When it was made.
        shards: By number, all that are listed.
    """

    name: str
    account: str = ""
    created_ms: int = 0
    shards: Mapping[int, Shard] = field(default_factory=dict)


@dataclass(slots=True)
class _Held:
    """A lease that is ours."""

    number: int
    row: Row
    written: float
    taken: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class LeaseTable:
    """The table, and the leases of this copy: `Store` and `Members` in one. Thread-safe.

    Args:
        config: Which table.
        timer: Monotonic seconds.

    Attributes:
        owner: What this copy is called in the table.
        reach: By shard, what its reader has seen.
        list_again: Lists the streams' shards again; of a job's processes most do not otherwise.
    """

    def __init__(self, config: TableConfig, timer: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._timer = timer
        self._client = make_client(config.aws, "dynamodb", config.stream)
        self.owner = f"{OWNERS}{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        if config.job:
            self.owner = f"{JOBS}{config.job}"
        self.list_again: Callable[[], Any] | None = None
        self.reach: dict[PartitionKey, Reach] = {}
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="leases")
        self._changed = threading.Condition()
        self._streams: dict[str, StreamFacts] = {}
        # Rows as they were seen last, and since when their counters stand.
        self._rows: dict[str, Row] = {}
        self._since: dict[str, float] = {}
        self._moved: set[str] = set()
        self._held: dict[PartitionKey, _Held] = {}
        self._numbers = 0
        self._asked = timer()
        self._problem: KinesisError | None = None
        self._thread: threading.Thread | None = None
        self._woken = threading.Event()
        self._closed = False
        self._said = ""

    # -- the table -------------------------------------------------------------------------

    def open(self) -> None:
        """See that there is such a table; makes one.

        Raises:
            KinesisError: There is none, and none can be made; or it is no lease table.
        """
        name = self._config.name
        deadline = self._timer() + _APPEAR_SECS
        made = False
        while True:
            try:
                found = self._call("describe_table", TableName=name)["Table"]
            except Later as later:
                if self._timer() > deadline:
                    raise KinesisError(f"--lease_table={name} cannot be read: {later}") from None
                time.sleep(0.5)
                continue
            except aws_errors.ClientError as error:
                if _code(error) != "ResourceNotFoundException":
                    raise self._failed(error) from None
                if not made:
                    self._make()
                    made = True
                found = {}
            keys = [each["AttributeName"] for each in found.get("KeySchema", ())]
            if found and keys != [columns.KEY]:
                raise KinesisError(
                    f"--lease_table={name} is no lease table: its key is {', '.join(keys)}, and "
                    f"not {columns.KEY}; give another name"
                )
            if found.get("TableStatus") in ("ACTIVE", "UPDATING"):
                return
            if self._timer() > deadline:
                raise KinesisError(f"--lease_table={name} is not ready after {_APPEAR_SECS:.0f} s")
            time.sleep(0.2)

    def _make(self) -> None:
        _LOGGER.info("lease table %s is made", self._config.name)
        try:
            self._call(
                "create_table",
                TableName=self._config.name,
                AttributeDefinitions=[{"AttributeName": columns.KEY, "AttributeType": "S"}],
                KeySchema=[{"AttributeName": columns.KEY, "KeyType": "HASH"}],
                BillingMode="PAY_PER_REQUEST",
            )
        except Later:
            pass  # asked for again
        except aws_errors.ClientError as error:
            if _code(error) != "ResourceInUseException":  # by another copy
                raise self._failed(error) from None

    def scan(self) -> dict[str, Row]:
        """All rows there are, by key.

        Raises:
            Later: The table does not answer.
            KinesisError: It may not be read, or has rows that are none of ours.
        """
        found: dict[str, Row] = {}
        more: dict[str, Any] = {}
        try:
            while True:
                answer = self._call(
                    "scan", TableName=self._config.name, ConsistentRead=True, **more
                )
                for item in answer.get("Items", ()):
                    if row := read_row(item):
                        found[row.key] = row
                if not answer.get("LastEvaluatedKey"):
                    break
                more = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}
        except aws_errors.ClientError as error:
            raise self._failed(error) from None
        except (ValueError, KeyError) as error:
            raise KinesisError(
                f"--lease_table={self._config.name} has a row that is no lease: {error}"
            ) from None
        with self._changed:
            for row in found.values():
                self._see(row)
            self._rows = found
            for key in self._held if self._config.job else ():
                self._hear(key)
        return found

    def _see(self, row: Row) -> None:
        """Note how a row stands, and since when; holds the lock."""
        before = self._rows.get(row.key)
        if before is None or before.counter != row.counter:
            self._since[row.key] = self._timer()
            if before is not None:
                self._moved.add(row.key)
        self._rows[row.key] = row

    def _hear(self, key: PartitionKey) -> None:
        """Take in what another process of this job has written; holds the lock."""
        held = self._held.get(key)
        seen = self._rows.get(held.row.key) if held else None
        if held and seen and seen.owner == self.owner and seen.counter > held.row.counter:
            held.row, held.written = seen, self._timer()

    def look(self, key: PartitionKey) -> Row | None:
        """A shard's row as it is now; see `row`.

        Raises:
            Later: The table does not answer.
            KinesisError: It refuses.
        """
        try:
            found = self._get(self.lease_key(key))
        except aws_errors.ClientError as error:
            raise self._failed(error) from None
        if found:
            with self._changed:
                self._see(found)
                self._hear(key)
            if found.ended:
                # Others may wait for that.
                self._woken.set()
        return self.row(key)

    def _get(self, key: str) -> Row | None:
        item = self._call(
            "get_item",
            TableName=self._config.name,
            Key={columns.KEY: {"S": key}},
            ConsistentRead=True,
        ).get("Item")
        return read_row(item) if item else None

    def _update(self, update: Update) -> Row | None:
        """The row as it is then; None if what must hold for it does not."""
        try:
            answer = self._call("update_item", **update.arguments(self._config.name))
        except aws_errors.ClientError as error:
            if _code(error) == "ConditionalCheckFailedException":
                return None
            raise
        return read_row(answer["Attributes"])

    def _call(self, name: str, **arguments: Any) -> Any:
        try:
            return getattr(self._client, name)(**arguments)
        except aws_errors.ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if _code(error) in _MAYBE or status >= 500:
                raise Later(_said(error)) from None
            raise
        except (aws_errors.NoCredentialsError, aws_errors.PartialCredentialsError) as error:
            raise KinesisError(f"--lease_table={self._config.name}: {error}") from None
        except aws_errors.BotoCoreError as error:
            raise Later(_said(error)) from None

    def _failed(self, error: aws_errors.ClientError) -> KinesisError:
        return KinesisError(f"--lease_table={self._config.name} cannot be used: {_said(error)}")

    # -- what shards there are ---------------------------------------------------------------

    def note(self, facts: StreamFacts) -> None:
        """Say how a stream stands now."""
        with self._changed:
            before = self._streams.get(facts.name)
            self._streams[facts.name] = facts
        if before is None or before.shards.keys() != facts.shards.keys():
            self._woken.set()

    def facts(self, stream: str) -> StreamFacts:
        """How a stream stood last."""
        return self._streams[stream]

    def lease_key(self, key: PartitionKey) -> str:
        """The key of a shard's row."""
        stream, number = key
        if not self._config.several:
            return lease_key(number)
        facts = self._streams[stream]
        return lease_key(number, stream, facts.account, facts.created_ms // 1000)

    def row(self, key: PartitionKey) -> Row | None:
        """A shard's row as it was seen last; None if there is none, or it is of a stream that had
        the name before."""
        held = self._held.get(key)
        row = held.row if held else self._rows.get(self.lease_key(key))
        created = self._streams[key[0]].created_ms
        return row if row and row.created in (0, created) else None

    def done(self, stream: str) -> set[int]:
        """Numbers of a stream's shards of which nothing is to be read any more."""
        facts = self._streams[stream]
        found = {number: self.row((stream, number)) for number in facts.shards}
        kept = {number for number, row in found.items() if row}
        ended = {number for number, row in found.items() if row and row.ended}
        return done_shards(facts.shards.values(), ended, kept)

    def hash_range(self, key: PartitionKey) -> tuple[int, int] | None:
        """The first and the last hash key of a shard; None if that is not known."""
        facts = self._streams.get(key[0])
        shard = facts.shards.get(key[1]) if facts else None
        return (int(shard.low), int(shard.high)) if shard and shard.low and shard.high else None

    def holds(self, stream: str) -> set[int]:
        """Numbers of the shards of a stream that are this copy's."""
        return {number for name, number in list(self._held) if name == stream}

    def add(self, key: PartitionKey, position: int, unfinished: bool = False) -> bool:
        """Make the row of a shard, unless there is one.

        Args:
            key: Which shard.
            position: Where to begin with it.
            unfinished: Whether those of other shards are still to be made.

        Returns:
            Whether it was made here.

        Raises:
            Later: The table does not answer.
            KinesisError: It refuses.
        """
        facts = self._streams[key[0]]
        shard = facts.shards.get(key[1]) or Shard(key[1])
        made = Update(
            self.lease_key(key),
            {
                columns.COUNTER: {"N": "0"},
                columns.SWITCHES: {"N": "0"},
                columns.CREATED: {"N": str(facts.created_ms)},
                **describe(shard),
                **checkpoint(position),
                **({columns.UNFINISHED: {"BOOL": True}} if unfinished else {}),
                **self._place(key),
            },
            # Where a stream had the name before.
            {columns.OWNER, columns.NOTE, columns.TIME, columns.WANTED, columns.ARRIVAL},
            created=facts.created_ms,
        )
        try:
            row = self._update(made)
        except aws_errors.ClientError as error:
            raise self._failed(error) from None
        if row:
            with self._changed:
                self._rows[row.key] = row
                self._since.setdefault(row.key, self._timer())
        return row is not None

    def _place(self, key: PartitionKey) -> dict[str, columns.Attribute]:
        if not self._config.several:
            return {}
        facts = self._streams[key[0]]
        stream = f"{facts.account}:{key[0]}:{facts.created_ms // 1000}"
        return {
            "streamName": {"S": stream},
            "shardId": {"S": self.lease_key(key).rpartition(":")[2]},
        }

    def finish(self, key: PartitionKey) -> None:
        """Say that the rows of all shards are made, beside the one that says they are not.

        Raises:
            Later: The table does not answer.
        """
        if (row := self.row(key)) is None:
            return
        done = Update(
            row.key,
            {columns.COUNTER: {"N": str(row.counter + 1)}},
            {columns.UNFINISHED},
            row.counter,
        )
        if made := self._update(done):
            with self._changed:
                self._rows[row.key] = made

    # -- Members -----------------------------------------------------------------------------

    @property
    def wait_secs(self) -> float:
        """See `Members.wait_secs`: nobody takes what is asked for."""
        return _KEEP_SECS

    def join(self, names: Collection[str]) -> None:
        """See `Members.join`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="leases", daemon=True)
            self._thread.start()

    def deal(self) -> Deal:
        """See `Members.deal`."""
        self.listen()
        self._asked = self._timer()
        with self._changed:
            given = {key: held.number for key, held in self._held.items()}
            leaving = {key for key, held in self._held.items() if self._is_leaving(key, held)}
        return Deal(given, frozenset(leaving))

    def _is_leaving(self, key: PartitionKey, held: _Held) -> bool:
        facts = self._streams[key[0]]
        if held.row.ended:
            return key[1] not in facts.shards
        seen = self._rows.get(held.row.key, held.row)
        # A look at the table that was begun before the lease was taken does not count.
        newest = (row for row in (held.row, seen) if row.counter >= held.row.counter)
        return any(row.wanted not in ("", self.owner) for row in newest)

    def wait(self, timeout_secs: float) -> None:
        """See `Members.wait`."""
        with self._changed:
            self._changed.wait(timeout_secs)

    def take(self, keys: Collection[PartitionKey]) -> None:
        """See `Members.take`."""
        with self._changed:
            for key in keys:
                if held := self._held.get(key):
                    held.taken = True

    def let_go(self, keys: Collection[PartitionKey]) -> None:
        """See `Members.let_go`: whoever asks for it can take it at once."""
        for key in keys:
            with self._changed:
                held = self._held.pop(key, None)
            if held is None:
                continue
            with held.lock, suppress(Later, KinesisError, aws_errors.ClientError):
                # If not, it is free a little later.
                counter = {columns.COUNTER: {"N": str(held.row.counter + 1)}}
                self._update(Update(held.row.key, counter, {columns.OWNER}, held.row.counter))

    def close(self) -> None:
        """See `Members.close`."""
        self._closed = True
        self._woken.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(10)
        self.let_go(list(self._held))

    def listen(self) -> None:
        """See `Store.listen`: says what is wrong with the table."""
        if problem := self._problem:
            if self._config.job:
                # A runner begins a job again in the same process.
                self._problem, self._thread = None, None
                with self._changed:
                    for known in (self._held, self._rows, self._since, self._moved):
                        known.clear()
            raise problem

    def _work(self) -> None:
        expiry = self._config.expiry_secs
        secs = min(_LOOK_MOST_SECS, expiry / _LOOKS)
        # A worker's process may stay when its job has ended.
        silent = expiry if self._config.job else max(_SILENT_SECS, expiry)
        while not self._closed:
            self._woken.clear()
            try:
                if self._timer() - self._asked < silent:
                    self._turn()
                    self._said = ""
            except Later as later:
                self._warn(str(later))
            except KinesisError as error:
                self._problem = error
            except aws_errors.ClientError as error:
                self._problem = self._failed(error)
            except Exception as error:
                # Else the leases would run out one day, and nobody would know why.
                self._problem = KinesisError(f"--lease_table={self._config.name}: {error!r}")
            with self._changed:
                self._changed.notify_all()
            if self._problem:
                return
            self._woken.wait(secs)

    def _warn(self, why: str) -> None:
        if why != self._said:
            _LOGGER.warning("lease table %s is asked again: %s", self._config.name, why)
        self._said = why

    def _turn(self) -> None:
        """Look at the table once, renew, and take what is to be taken."""
        self._renew()
        self.scan()
        open = self._open()
        self._refuse_foreign(open)
        stale = {key for key in open if self._is_stale(key)}
        rows = {key: row for key, (_, row) in open.items()}
        if self._config.job:
            decided = plan_alone(rows, stale, self.owner)
        else:
            decided = plan(rows, stale, self.owner)
        for key in decided.take:
            self._take(*open[key])
        for key in decided.ask:
            row, wanted = open[key][1], {columns.WANTED: {"S": self.owner}}
            self._update(Update(key, wanted, (), row.counter, unless=(columns.WANTED,)))

    def _open(self) -> dict[str, tuple[PartitionKey, Row]]:
        """Rows of the shards that can be worked on now; makes those of children."""
        found: dict[str, tuple[PartitionKey, Row]] = {}
        for stream, facts in list(self._streams.items()):
            done = self.done(stream)
            unfinished = any(row.unfinished for row in self._rows.values())
            for number, shard in facts.shards.items():
                waits = any(p in facts.shards and p not in done for p in shard.parents)
                if number in done or waits:
                    continue
                key = (stream, number)
                row = self.row(key)
                if row is None and not unfinished and key not in self._held:
                    self.add(key, TRIM_HORIZON)
                    row = self.row(key)
                if row and row.owner == self.owner and key not in self._held:
                    # Let go of, though the table was not told.
                    row = replace(row, owner="")
                if row:
                    found[row.key] = (key, row)
        return found

    def _is_stale(self, key: str) -> bool:
        return self._timer() - self._since.get(key, self._timer()) >= self._config.expiry_secs

    def _refuse_foreign(self, open: Mapping[str, tuple[PartitionKey, Row]]) -> None:
        for key, (_, row) in open.items():
            foreign = row.owner and not self._is_ours(row.owner)
            if foreign and key in self._moved and not self._is_stale(key):
                raise self._foreign(row)

    def _is_ours(self, owner: str) -> bool:
        return owner == self.owner if self._config.job else owner.startswith(OWNERS)

    def _foreign(self, row: Row) -> KinesisError:
        why = "is no copy of this program"
        if row.owner.startswith((OWNERS, JOBS)):
            why = "a streaming job shares none"
        return KinesisError(
            f"--lease_table={self._config.name} is in use: {row.owner} has the lease {row.key}, "
            f"and {why}; stop it, or give another table"
        )

    def _take(self, key: PartitionKey, row: Row) -> None:
        switches = {columns.SWITCHES: {"N": "1"}} if row.owner != self.owner else {}
        taken = self._update(
            Update(
                row.key,
                {
                    columns.COUNTER: {"N": str(row.counter + 1)},
                    columns.OWNER: {"S": self.owner},
                    **switches,
                },
                {columns.WANTED, columns.HANDED_BY},
                row.counter,
            )
        )
        if taken is None:
            return
        if row.owner:
            _LOGGER.info("%s-%d: taken over from %s", *key, row.owner)
        with self._changed:
            self._numbers += 1
            self._rows[row.key] = taken
            self._held[key] = _Held(self._numbers, taken, self._timer())

    def _renew(self) -> None:
        due = self._timer() - self._config.expiry_secs / _RENEWALS
        with self._changed:
            keys = [
                key
                for key, held in self._held.items()
                if held.written <= due and not held.row.ended
            ]
        # One that does not answer in time must not cost the others theirs.
        for _ in self._pool.map(self._renew_one, keys):
            pass

    def _renew_one(self, key: PartitionKey) -> None:
        if held := self._held.get(key):
            reached = self._reached(key, held.row.position or 0)
            self._write(key, held, reached)

    def _reached(self, key: PartitionKey, position: int) -> dict[str, columns.Attribute]:
        reach = self.reach.get(key)
        if reach is None:
            return {}
        found: dict[str, columns.Attribute] = {}
        if ms := reach.reached_ms(position):
            found[columns.REACHED] = {"N": str(ms)}
        if ms := reach.arrival_ms(position):
            found[columns.ARRIVAL] = {"N": str(ms)}
        return found

    def _write(
        self,
        key: PartitionKey,
        held: _Held,
        set: Mapping[str, columns.Attribute],
        remove: Collection[str] = (),
    ) -> bool:
        """Change a row that is ours; if it is not any more, it is lost.

        Returns:
            Whether it was ours.

        Raises:
            Later: The table does not answer.
            KinesisError: Who has it is none of ours.
        """
        with held.lock:
            while True:
                counter = held.row.counter
                changed = {columns.COUNTER: {"N": str(counter + 1)}, **set}
                row = self._update(Update(held.row.key, changed, remove, counter))
                if row is None:
                    found = self._get(held.row.key)
                    if found and found.owner == self.owner and found.counter != counter:
                        # Our own, of which no answer came.
                        held.row = found
                        continue
                    with self._changed:
                        if self._held.get(key) is held:
                            del self._held[key]
                        self._changed.notify_all()
                    if found and found.owner and not self._is_ours(found.owner):
                        raise self._foreign(found)
                    return False
                held.row, held.written = row, self._timer()
                return True

    # -- Store -------------------------------------------------------------------------------

    def commit(
        self, positions: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str], late: bool
    ) -> str | None:
        """See `Store.commit`. Of shards that are another copy's by now nothing is kept.

        Raises:
            KinesisError: The table cannot be written, or another program has the shards.
        """
        self.listen()
        wanted = [(key, at, notes.get(key, "")) for key, at in positions.items()]
        problems = list(filter(None, self._each(wanted)))
        if problems and late:
            raise KinesisError(
                f"--lease_table={self._config.name} cannot be written: {problems[0]}"
            )
        return problems[0] if problems else None

    def _each(self, wanted: list[tuple[PartitionKey, int, str]]) -> Iterable[str | None]:
        if len(wanted) == 1:
            return [self._commit_one(*wanted[0])]
        return self._pool.map(lambda each: self._commit_one(*each), wanted)

    def _commit_one(self, key: PartitionKey, position: int, note: str) -> str | None:
        try:
            held = self._held.get(key)
            if self._config.job:
                held = held or self._claim(key)
            elif held is None or not held.taken:
                return None
            why = self._commit_held(key, held, position, note)
        except Later as later:
            return str(later)
        except aws_errors.ClientError as error:
            raise self._failed(error) from None
        if position == SHARD_END:
            self._woken.set()
        return why

    def _claim(self, key: PartitionKey) -> _Held:
        """The lease of a shard that is this job's, or that is free; waits until that is known.

        Raises:
            Later: The table does not answer.
            KinesisError: It is in use.
        """
        while True:
            row = self._get(self.lease_key(key))
            if row is None:
                raise Later(f"there is no lease {self.lease_key(key)}")
            with self._changed:
                self._see(row)
            if row.owner in ("", self.owner) or self._is_stale(row.key):
                break
            if row.key in self._moved:
                raise self._foreign(row)
            # Perhaps of the job that this one goes on for.
            time.sleep(_HEAR_SECS)
        if row.owner != self.owner:
            self._take(key, row)
        with self._changed:
            if row.owner == self.owner and key not in self._held:
                self._numbers += 1
                self._held[key] = _Held(self._numbers, row, self._timer())
            if held := self._held.get(key):
                return held
        raise Later(f"the lease {row.key} is taken by another just now")

    def _commit_held(self, key: PartitionKey, held: _Held, position: int, note: str) -> str | None:
        set: dict[str, columns.Attribute] = {columns.SWITCHES: {"N": "0"}}
        remove = {*columns.PENDING, columns.TIME, columns.NOTE}
        before = held.row.position
        if before is not None and position in (before, whole(before)):
            # Nothing more is done; and what was done in part is written there.
            remove = {columns.NOTE}
        else:
            set |= checkpoint(position)
        if note:
            set[columns.NOTE] = {"S": note}
        created = self._streams[key[0]].created_ms
        set |= self._reached(key, position) | {columns.CREATED: {"N": str(created)}}
        if self._config.job and key not in self.reach:
            # Another process reads it. What is not known must not be taken for old.
            remove |= {columns.ARRIVAL, columns.REACHED}
        if position == SHARD_END:
            children = self._children(key)
            if not children and self.list_again:
                with suppress(KinesisError):
                    self.list_again()
                children = self._children(key)
            if children:
                set["childShardIds"] = {"SS": [lease_key(each) for each in children]}
        if not self._write(key, held, set, remove) and self._config.job:
            return f"the lease {held.row.key} was lost"
        return None

    def _children(self, key: PartitionKey) -> list[int]:
        shards = self._streams[key[0]].shards.values()
        return [each.number for each in shards if key[1] in each.parents]

    def kept(self, key: PartitionKey) -> int | None:
        """See `Store.kept`."""
        try:
            row = self._get(self.lease_key(key))
        except (Later, aws_errors.ClientError, ValueError):
            return None
        return row.position if row else None


def _code(error: aws_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def shared_table(config: TableConfig) -> LeaseTable:
    """This process's table for the config."""
    return per_process(LeaseTable, config)
