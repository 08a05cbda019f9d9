"""Kinesis as the source of streaming runs: finds shards and lends readers of them. No Beam.

What a runner asks for when is in `transforms.read.streaming`, which knows no Kinesis.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import monotonic
from typing import ClassVar

from transforms.commit.committer import CommitConfig, shared_committer
from transforms.errors import KinesisError, SinkError
from transforms.kinesis.fetch import Message
from transforms.kinesis.leases import Later
from transforms.kinesis.shards import SHARD_END, TRIM_HORIZON
from transforms.kinesis.stream import KinesisSource, shards_of
from transforms.per_process import per_process
from transforms.read.lending import AHEAD, Ahead, Lending, ReadAhead
from transforms.records import END_NOTE, PartitionKey, Records, read_halt
from transforms.source import Found, Start, held_up, startable

_LOGGER = logging.getLogger(__name__)

# Each question costs, so it is asked only where there is no room left.
_ASK_COMMITTED_SECS = 1.0
# So much longer than a lease lasts without its owner.
_TAKE_SECS = 10.0


@dataclass(frozen=True, slots=True)
class KinesisStream:
    """The streams of a streaming run; see `transforms.read.streaming.StreamSource`.

    Attributes:
        source: What to read, and from where on.
        ahead: How far shards may be read ahead of what is committed.
    """

    source: KinesisSource
    ahead: ReadAhead = ReadAhead()
    bounded: ClassVar[bool] = False
    find_secs: ClassVar[int] = 1

    @property
    def label(self) -> dict[str, str]:
        """See `StreamSource.label`."""
        return self.source.label

    def find(
        self, known: frozenset[PartitionKey] | None, asked: Mapping[PartitionKey, int]
    ) -> tuple[dict[PartitionKey, tuple[int, int]], Mapping[PartitionKey, int]]:
        """See `StreamSource.find`."""
        return per_process(ShardFinder, self.source).look(known, asked)

    def lend(self, key: PartitionKey) -> AbstractContextManager[ShardReader]:
        """See `Lending.lend`."""
        return per_process(ShardReaders, self).lend(key)


class ShardFinder:
    """What looks for shards in a worker process, and keeps the job's leases. One does, of a job."""

    def __init__(self, source: KinesisSource) -> None:
        self._source = source
        self._table = source.members()
        self._shards = per_process(shards_of, source)
        self._surveyed = False

    def look(
        self, known: frozenset[PartitionKey] | None, asked: Mapping[PartitionKey, int]
    ) -> tuple[dict[PartitionKey, tuple[int, int]], dict[PartitionKey, int]]:
        """See `StreamSource.find`.

        Raises:
            KinesisError: The lease table is in use, or cannot be used. At the first look also if
                Kinesis does not answer.
        """
        try:
            if not self._surveyed:
                self._shards.survey([])
                self._surveyed = True
            found = self._shards.find(quick=known is not None)
        except KinesisError as error:
            if known is None:
                raise
            _LOGGER.warning("new shards cannot be looked for: %s", error)
            return {}, dict(asked)
        self._table.join(())
        given = self._table.deal().given
        if known is None:
            given = self._wait(startable(found))
        known = known or frozenset()
        asked = self._ask([each for each in found if each.key in known], asked)
        ended = {key for key, number in asked.items() if not number}
        # What descends from what the job's state has, and is not in it, is begun anew, whatever is
        # kept of it: that is from before the job was restored, and what it was behind is repeated.
        behind = held_up([replace(each, ended=False) for each in found], known) - known
        standing = [
            replace(each, ended=each.key in ended)
            if each.key in known
            else replace(each, ended=each.ended and each.key not in behind)
            for each in found
        ]
        again = {each.key for each in found if each.ended} & behind
        keys = [
            key for key in startable(standing) if key not in known and key in again | given.keys()
        ]
        starts = self._shards.starts(keys)
        starts |= {key: Start(TRIM_HORIZON, True, starts[key].note) for key in behind & set(keys)}
        # As Kafka's: a starting position is durable from now on, and an earlier halt is over.
        shared_committer(CommitConfig(self._source)).commit(
            {
                key: start.offset
                for key, start in starts.items()
                if start.resolved or read_halt(start.note)
            }
        )
        return {key: (start.offset, start.offset) for key, start in starts.items()}, asked

    def _wait(self, keys: list[PartitionKey]) -> Mapping[PartitionKey, int]:
        """Wait for the leases of a job that begins; what is not had by then is begun later."""
        until = monotonic() + self._source.expiry_secs + _TAKE_SECS
        while True:
            given = self._table.deal().given
            if given.keys() >= set(keys) or monotonic() > until:
                return given
            self._table.wait(0.2)

    def _ask(
        self, found: list[Found], asked: Mapping[PartitionKey, int]
    ) -> dict[PartitionKey, int]:
        """What is asked by now about known shards: whether what the table says of their end is of
        what the job's state has come to.

        The number is that of a writing of the row. If it has been written since without an answer,
        that was before the question, or it was answered that the end is not reached.
        """
        now: dict[PartitionKey, int] = {}
        for each in found:
            if asked.get(each.key) == 0:
                now[each.key] = 0
            elif self._shards.is_closed(each.key):
                try:
                    row = self._table.look(each.key)
                except Later:
                    row = None
                    if each.key in asked:
                        now[each.key] = asked[each.key]
                if row and row.ended:
                    answered = row.note == f"{END_NOTE}{asked.get(each.key)}"
                    now[each.key] = 0 if answered else row.counter
        return now


class ShardReader:
    """Reads one shard in this process; see `transforms.read.streaming.PartitionReader`.

    Args:
        source: What is read.
        key: The shard.
        ahead: How far it may be read ahead of what is committed.
        sharers: How many shards share what this process may hold.
        timer: Monotonic seconds.

    Attributes:
        lock: For who reads it now.
        used: When it was last asked for, by the timer.
        closed: Whether it can be read no more.
        offsets_lost: How often what was read last was lost to retention; of how many records is
            not known.
        errors: How often this shard, and no other, could not be read.
        end: 0: what is left is not said in numbers.
        ended: Whether it has ended behind what was read last.
        is_halted: Is asked of runs only that end.
    """

    end = 0
    is_halted = False

    def __init__(
        self,
        source: KinesisSource,
        key: PartitionKey,
        ahead: ReadAhead = AHEAD,
        sharers: Callable[[], int] = lambda: 1,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self.lock = threading.Lock()
        self.used = timer()
        self.closed = self.ended = False
        self.offsets_lost = self.errors = 0
        self._key = key
        self._limits = ahead
        self._sharers = sharers
        self._timer = timer
        self._shards = per_process(shards_of, source)
        self._table = source.members()
        self._fetcher = source.fetcher()
        self._position = -1
        self._asked = float("-inf")
        self._left: list[Message] = []
        self._closes = False
        self._ahead = Ahead(ahead)

    def go_to(self, offset: int) -> bool:
        """Read on from this position; what was fetched ahead serves if it is where it stands.

        Returns:
            Whether it stood elsewhere.
        """
        self.used = self._timer()
        if offset == self._position:
            return False
        committed = self._committed(offset)
        self._ahead.clear()
        if committed is not None and committed < offset:
            # How much was read before a restart is not known. It must neither be forgotten each
            # time, nor keep all else away: an open batch of it may wait for more to come.
            self._ahead.add(offset, self._limits.records // 2, self._limits.bytes // 2)
        self._begin(offset, again=self._position >= 0)
        return True

    def _begin(self, offset: int, again: bool) -> None:
        if again:
            self._fetcher.assign_again(self._key, offset)
        else:
            self._fetcher.assign({self._key: offset})
        self._position = offset
        self._left, self._closes, self.ended = [], False, False

    def read(self, timeout_secs: float) -> tuple[Records, int]:
        """The next records, and the position behind them; that of before if there is nothing.

        Args:
            timeout_secs: How long to wait for records that have not been fetched yet.

        Raises:
            KinesisError: The shard cannot be read any more.
        """
        if not self._left and not self._closes:
            try:
                self._fetch(timeout_secs)
            except KinesisError:
                # Whoever tries again begins with another.
                self.close()
                raise
        most = self._limits.chunk_records
        messages, self._left = self._left[:most], self._left[most:]
        position = messages[-1].number + 1 if messages else self._position
        if self._closes and not self._left:
            position, self.ended = SHARD_END, True
        if position > self._position:
            self._ahead.add(position, len(messages), self._fetcher.bytes(messages))
            self._position = position
        return self._fetcher.records(messages), position

    def _fetch(self, timeout_secs: float) -> None:
        for fetched in self._fetcher.fetch(timeout_secs)[1]:
            # What was lost and begun again may be told twice.
            self._left += [each for each in fetched.messages if each.number >= self._position]
            if fetched.ended:
                self._closes = True
            elif fetched.problem:
                self._see_to(fetched.problem, fetched.overtaken)
                return

    def _see_to(self, problem: SinkError, overtaken: bool) -> None:
        """Go on where a shard cannot be read, or does not know its position."""
        if overtaken and self._shards.is_anew(self._key):
            raise KinesisError(
                f"--stream={self._key[0]} was made anew: begin a job without the savepoint or the "
                f"checkpoint of this one"
            )
        if not overtaken:
            self.errors += 1
            _LOGGER.warning("%s-%d: %s; the others go on", *self._key, problem)
            return
        text = "%s-%d: %s; it goes on with the oldest record there is"
        _LOGGER.warning(text, *self._key, problem)
        self.offsets_lost += 1
        self._fetcher.assign_again(self._key, TRIM_HORIZON)

    def may_read(self) -> bool:
        """Whether the shard is not too far ahead of what is committed."""
        if self._within():
            return True
        if self._timer() - self._asked >= _ASK_COMMITTED_SECS:
            committed = self._committed(self._position)
            if committed is not None:
                self._ahead.done(committed)
        return self._within()

    def _within(self) -> bool:
        limit = min(self._limits.bytes, self._limits.process_bytes // self._sharers())
        return self._ahead.records < self._limits.records and self._ahead.bytes < limit

    def _committed(self, reached: int) -> int | None:
        """What is committed; None if that is not known, or ahead of what is read: from before the
        job was restored."""
        self._asked = self._timer()
        try:
            row = self._table.look(self._key)
        except Later as later:
            _LOGGER.warning("%s-%d: the lease table does not answer: %s", *self._key, later)
            return None
        position = row.position if row else None
        return position if position is not None and position <= reached else None

    def close(self) -> None:
        """Read it no more."""
        self.closed = True
        if self._position >= 0:
            self._fetcher.unassign([self._key])


class ShardReaders(Lending[ShardReader]):
    """The readers of a worker process."""

    def __init__(self, config: KinesisStream) -> None:
        self._config = config
        super().__init__(self._reader)

    def _reader(self, key: PartitionKey) -> ShardReader:
        config = self._config
        return ShardReader(config.source, key, config.ahead, self.__len__)
