"""Read: a Round of the process's reader -> RecordChunk. The bounded reader of one process's rounds.

One reader per process reads all partitions and outlives the rounds, so its source's fetcher fetches
ahead while a round runs. What it has and a round does not take (no room, or a batch that is not due
yet) stays with it, unread as far as the pipeline is concerned.
"""

from __future__ import annotations

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import apache_beam as beam
from apache_beam import coders

from transforms.coding import SizedPickleCoder
from transforms.errors import SinkError
from transforms.lanes import Lanes
from transforms.per_process import per_process
from transforms.records import (
    BY_BYTES,
    BY_END,
    BY_WINDOW,
    LaneKey,
    PartitionKey,
    RecordChunk,
    Records,
)
from transforms.source import Fetched, Fetcher, Message, Source
from transforms.tally import BOOKS, POLLED, POLLED_BYTES, POLLING_ERRORS, RELEASED, TALLY

_LOGGER = logging.getLogger(__name__)

# Large, since what Beam does for an element costs as much as a hundred records do.
_CHUNK_RECORDS = 10_000


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """How records are read.

    Attributes:
        source: What is read.
        batch_size: Records per batch: chunks are cut so that batches come out whole.
        batch_bytes: Bytes at which records are due without a full batch.
        batch_window_secs: How long a record may wait for its batch to fill.
        lanes: How a partition's records are divided; each lane's batches are to come out whole.
    """

    source: Source
    batch_size: int = 100
    batch_bytes: int = 6_291_455
    batch_window_secs: float = 0.5
    lanes: Lanes = Lanes()


@dataclass(frozen=True, slots=True)
class Room:
    """How much of a partition a round may take.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        records: How many.
        bytes: Of keys, values and headers.
        flush: Take incomplete batches too: no more of it is read before.
        busy: Lanes whose call is running: an incomplete batch can grow as long as that goes on.
    """

    topic: str
    partition: int
    records: int
    bytes: int
    flush: bool = False
    busy: frozenset[int] = frozenset()

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Round:
    """One round's reading.

    Attributes:
        rooms: Per partition what may be taken; partitions not named are left alone.
        records: Limit for all partitions together.
        bytes: Limit for all partitions together.
        flush: Take incomplete batches too, once a partition has nothing more.
    """

    rooms: tuple[Room, ...]
    records: int
    bytes: int
    flush: bool = False


_NOTHING = Round((), 0, 0)


def releasable(
    records: int, bytes: int, waited_secs: float, ended: bool, busy: bool, config: ReadConfig
) -> int:
    """How many of a lane's waiting records may be batched now.

    Whole batches always. The rest when it has enough bytes; or when its window is over or nothing
    more will come (`ended`), and no call of its lane is running (`busy`), behind which it would
    only wait. So with a window of 0 batches grow with the load by themselves.
    """
    due = bytes >= config.batch_bytes
    if not busy:
        due = due or ended or waited_secs >= config.batch_window_secs
    return records if due else records - records % config.batch_size


def turns(places: Sequence[int], last: int) -> list[int]:
    """The order in which those at these places have their turns: first who stands behind the last
    one that was served. Pure.

    Args:
        places: Where they stand, rising.
        last: Where the last one stands that was served; it need not be among them.
    """
    behind = bisect_right(places, last)
    return [*range(behind, len(places)), *range(behind)]


@dataclass(slots=True)
class _Lane:
    """What the reader holds of one lane of a partition."""

    number: int
    start: int
    messages: list[Message] = field(default_factory=list)
    bytes: int = 0
    since: float = 0.0


@dataclass(slots=True)
class _Partition:
    """What the reader holds of one partition."""

    key: PartitionKey
    place: int
    lanes: list[_Lane]
    next_offset: int
    at_end: bool = False
    ended: bool = False
    paused: bool = False
    dropped: bool = False
    overtaken: bool = False
    lost: SinkError | None = None
    served: int = -1

    @property
    def start(self) -> int:
        """Everything below it was handed out, in every lane."""
        return min(lane.start for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Records that were not handed out yet."""
        return sum(len(lane.messages) for lane in self.lanes)

    @property
    def bytes(self) -> int:
        """Their bytes."""
        return sum(lane.bytes for lane in self.lanes)


class RoundReader:
    """Reads all partitions of a process and hands out chunks, round by round.

    Args:
        config: What is read, and when records are due.
        timer: Monotonic seconds.

    Attributes:
        fetcher: Brings the records.
        stirred: Whether the last fetch brought more than ends that were known.
    """

    def __init__(self, config: ReadConfig, timer: Callable[[], float] = monotonic) -> None:
        self._config = config
        self._timer = timer
        self.fetcher: Fetcher = config.source.fetcher()
        self._partitions: dict[PartitionKey, _Partition] = {}
        self._round = _NOTHING
        self._served = -1
        self._places = itertools.count()
        self.stirred = False

    # -- what the rounds' loop needs -------------------------------------------------------

    @property
    def partitions(self) -> list[PartitionKey]:
        return list(self._partitions)

    def assign(self, marks: dict[PartitionKey, list[int]]) -> None:
        """Begin to read partitions, each lane at its offset, besides those already read."""
        for key, offsets in marks.items():
            lanes = [_Lane(number, offset) for number, offset in enumerate(offsets)]
            self._partitions[key] = _Partition(key, next(self._places), lanes, min(offsets))
        self.fetcher.assign({key: min(offsets) for key, offsets in marks.items()})

    def release(self, key: PartitionKey) -> None:
        """Know a partition no more."""
        self._let_go(self._partitions.pop(key))
        self.fetcher.unassign([key])

    def position(self, key: PartitionKey) -> int:
        """Everything below it was handed out."""
        return self._partitions[key].start

    def behind(self, key: PartitionKey, position: int) -> int | None:
        """How far a partition's end is from a position, as the last fetch saw it; None if that is
        not known."""
        return self.fetcher.behind(key, position)

    def has_ended(self, key: PartitionKey) -> bool:
        """Whether a partition was handed out up to where it ends for good."""
        partition = self._partitions[key]
        return partition.ended and partition.start == partition.next_offset

    def is_at_end(self, key: PartitionKey) -> bool:
        """Whether all that the last fetch saw of a partition was handed out."""
        partition = self._partitions[key]
        return partition.at_end and not partition.waiting and not partition.lost

    def ready(self, key: PartitionKey, flush: bool, busy: frozenset[int] = frozenset()) -> bool:
        """Whether a round would get something of this partition now.

        Args:
            key: The partition.
            flush: Whether incomplete batches are due once it has nothing more.
            busy: Lanes of which only whole batches count.
        """
        partition = self._partitions[key]
        if not partition.waiting:
            # A tail of offsets without records still has to be committed.
            return partition.start < partition.next_offset
        flush = (flush and partition.at_end) or partition.ended
        return any(self._due(lane, flush, lane.number in busy) for lane in partition.lanes)

    def read_to(self, key: PartitionKey) -> int:
        """Everything below it was fetched."""
        return self._partitions[key].next_offset

    def oldest_ms(self, key: PartitionKey) -> int | None:
        """The timestamp of the oldest record of a partition that was read and not handed out."""
        lanes = self._partitions[key].lanes
        firsts = (lane.messages[0].timestamp() for lane in lanes if lane.messages)
        return min((stamp for kind, stamp in firsts if kind), default=None)

    def waiting(self, key: PartitionKey) -> tuple[int, int]:
        """Records of a partition that were read and not handed out, and their bytes."""
        partition = self._partitions[key]
        return partition.waiting, partition.bytes

    def begin_anew(self, marks: dict[PartitionKey, list[int]]) -> None:
        """Begin again with partitions, each lane at its offset; what was read is dropped."""
        for key, offsets in marks.items():
            lanes = [_Lane(number, offset) for number, offset in enumerate(offsets)]
            before = self._partitions[key]
            self._let_go(before)
            self._partitions[key] = _Partition(key, before.place, lanes, min(offsets))
            self.fetcher.assign_again(key, min(offsets))

    def go_on_at(self, key: PartitionKey, offset: int) -> None:
        """Fetch a partition from this offset on, or from where it stands if that is behind it; what
        was read of it stays."""
        partition = self._partitions[key]
        partition.next_offset = max(partition.next_offset, offset)
        partition.overtaken = partition.paused = False
        self.fetcher.assign_again(key, partition.next_offset)

    @property
    def overtaken(self) -> dict[PartitionKey, int]:
        """Partitions whose next offset does not exist any more, and that offset. Nothing is fetched
        of them before `go_on_at` or `begin_anew`."""
        return {p.key: p.next_offset for p in self._partitions.values() if p.overtaken}

    @property
    def lost(self) -> dict[PartitionKey, SinkError]:
        """Partitions of which nothing can be read for now, and why; those left out of which records
        are left that were read before."""
        return {p.key: p.lost for p in self._partitions.values() if p.lost and not p.waiting}

    def lose(self, key: PartitionKey, error: SinkError, dropped: bool = False) -> None:
        """Say that a partition is not there any more, and how that is said.

        Args:
            key: The partition.
            error: How.
            dropped: Whether to say it of one that is not read any more.
        """
        partition = self._partitions[key]
        if dropped or not partition.dropped:
            self._trouble(partition, error)

    def find(self, key: PartitionKey) -> None:
        """Say that a partition is there."""
        self._partitions[key].lost = None

    def is_dropped(self, key: PartitionKey) -> bool:
        """Whether a partition is read no more."""
        return self._partitions[key].dropped

    def due_secs(self, key: PartitionKey, busy: frozenset[int] = frozenset()) -> float:
        """How long until the window of what waits of a partition is over; infinite if none does.

        Args:
            key: The partition.
            busy: Lanes that do not count: there it is not the window that is waited for.
        """
        lanes = self._partitions[key].lanes
        waiting = [each.since for each in lanes if each.messages and each.number not in busy]
        if not waiting:
            return math.inf
        return max(0.0, min(waiting) + self._config.batch_window_secs - self._timer())

    def is_paused(self, key: PartitionKey) -> bool:
        """Whether nothing is fetched of a partition now."""
        return self._partitions[key].paused

    def drop(self, key: PartitionKey) -> None:
        """Read a partition no more; what was read and not handed out is forgotten."""
        partition = self._partitions[key]
        if not partition.dropped:
            partition.dropped = True
            self._forget(partition)

    def _let_go(self, partition: _Partition) -> None:
        """What was read of a partition and not handed out comes to no end here."""
        BOOKS.count(RELEASED, partition.waiting, partition.key[0])

    def _forget(self, partition: _Partition) -> None:
        self._let_go(partition)
        for lane in partition.lanes:
            lane.messages, lane.bytes = [], 0
        partition.next_offset = partition.start

    def set_wanted(self, keys: Iterable[PartitionKey]) -> None:
        """Fetch for these partitions only. What has been fetched of the others and not been taken
        in is thrown away by the client, and fetched again once they are wanted."""
        wanted = {key for key in keys if not self._partitions[key].dropped}
        pause = [p for p in self._partitions.values() if not p.paused and p.key not in wanted]
        resume = [p for p in self._partitions.values() if p.paused and p.key in wanted]
        if pause:
            self.fetcher.pause([p.key for p in pause])
        if resume:
            self.fetcher.resume([p.key for p in resume])
        for partition in pause + resume:
            partition.paused = not partition.paused

    def fill(self, timeout_secs: float) -> int:
        """Take in what has been fetched; waits for the first of it. Returns how much it was.

        Raises:
            SinkError: Nothing can be read any more.
        """
        count, fetched = self.fetcher.fetch(timeout_secs)
        self.stirred = False
        for each in fetched:
            self._take_in(each)
        return count

    def close(self) -> None:
        """Leave the source."""
        self.fetcher.close()

    # -- what a round needs ----------------------------------------------------------------

    def begin(self, round: Round) -> None:
        """Say what the next `take` may hand out."""
        self._round = round

    def take(self) -> Iterator[RecordChunk]:
        """Hand out chunks, in order per partition, until the round is full or nothing is due."""
        round, self._round = self._round, _NOTHING
        partitions = [self._partitions[room.key] for room in round.rooms]
        room_for = min(round.records, sum(room.records for room in round.rooms))
        # On with what has been fetched meanwhile; what is still to come must not be waited for.
        while sum(partition.waiting for partition in partitions) < room_for:
            if self.fill(0) < self.fetcher.most:
                break
        records, size = round.records, round.bytes
        begun: set[LaneKey] = set()
        # Partitions, and lanes in them, take turns: a short round favours none.
        rooms = sorted(round.rooms, key=lambda room: self._partitions[room.key].place)
        places = [self._partitions[room.key].place for room in rooms]
        for turn in turns(places, self._served):
            room, partition = rooms[turn], self._partitions[rooms[turn].key]
            room_records, room_bytes = room.records, room.bytes
            flush = room.flush or partition.ended or (round.flush and partition.at_end)
            for number in turns(range(len(partition.lanes)), partition.served):
                lane = partition.lanes[number]
                limit = min(records, room_records), min(size, room_bytes)
                busy = number in room.busy and not room.flush
                handed_out = self._hand_out(partition, lane, *limit, flush, busy)
                for (next_offset, messages, chunk_bytes, by), last in _with_last(handed_out):
                    count = len(messages)
                    room_records, room_bytes = room_records - count, room_bytes - chunk_bytes
                    records, size = records - count, size - chunk_bytes
                    self._served, partition.served = partition.place, number
                    yield self._chunk(partition, lane, next_offset, messages, begun, last, by)
            for lane in partition.lanes:
                if not lane.messages and lane.start < partition.next_offset:
                    # No record of this lane, and yet its offsets have to be committed.
                    yield self._chunk(partition, lane, partition.next_offset, [], begun)

    def _hand_out(
        self, partition: _Partition, lane: _Lane, records: int, size: int, flush: bool, busy: bool
    ) -> Iterator[_Part]:
        config = self._config
        step = max(1, _CHUNK_RECORDS // config.batch_size) * config.batch_size
        due = self._due(lane, flush, busy)
        if due > records:
            # A batch is better begun in the next round than cut in two.
            due = records - records % config.batch_size
        by = BY_BYTES if lane.bytes >= config.batch_bytes else BY_END if flush else BY_WINDOW
        taken = taken_bytes = 0
        while taken < due and taken_bytes < size:
            high = min(taken + step, due)
            messages = lane.messages[taken:high]
            if len(lane.messages) - high < len(messages):
                # The mostly few that stay tell what the many hold.
                total = lane.bytes - taken_bytes - self.fetcher.bytes(lane.messages[high:])
            else:
                total = self.fetcher.bytes(messages)
            count, chunk_bytes = self._within(messages, total, size - taken_bytes)
            cut_short = count < len(messages)
            if cut_short and taken and count < config.batch_size:
                break
            taken, taken_bytes = taken + count, taken_bytes + chunk_bytes
            is_last = taken == len(lane.messages)
            next_offset = partition.next_offset if is_last else messages[count - 1].offset() + 1
            yield next_offset, messages[:count], chunk_bytes, by
            if cut_short:
                break
        if taken:
            del lane.messages[:taken]
            lane.bytes -= taken_bytes
            lane.since = self._timer()

    def _within(self, messages: list[Any], total: int, limit_bytes: int) -> tuple[int, int]:
        """How many records of so many bytes fit into a limit, at least one, and their bytes.

        In whole batches, if there is one.
        """
        if total <= limit_bytes:
            return len(messages), total
        count = total = 0
        for message in messages:
            size = self.fetcher.bytes([message])
            if count and total + size > limit_bytes:
                break
            count, total = count + 1, total + size
        batch_size = self._config.batch_size
        if count > batch_size and count % batch_size:
            count -= count % batch_size
            total = self.fetcher.bytes(messages[:count])
        return count, total

    def _chunk(
        self,
        partition: _Partition,
        lane: _Lane,
        next_offset: int,
        messages: list[Any],
        begun: set[LaneKey],
        last: bool = True,
        closed_by: str = "",
    ) -> RecordChunk:
        """A lane's next chunk; its first one of the round if it is not among those begun: the state
        before it is gone."""
        start, lane.start = lane.start, next_offset
        records = self.fetcher.records(messages) if messages else Records()
        key = (*partition.key, lane.number)
        first = key not in begun
        begun.add(key)
        return RecordChunk(
            *partition.key, start, next_offset, records, first, lane.number, last, closed_by
        )

    def _due(self, lane: _Lane, flush: bool, busy: bool) -> int:
        waited_secs = self._timer() - lane.since
        return releasable(len(lane.messages), lane.bytes, waited_secs, flush, busy, self._config)

    # -- what the fetcher brings -----------------------------------------------------------

    def _take_in(self, fetched: Fetched) -> None:
        partition = self._partitions.get(fetched.key)
        if partition is None or partition.dropped:
            return
        known = fetched.end is not None and fetched.end <= partition.next_offset
        if not known or fetched.ended or partition.lost:
            self.stirred = True
        if fetched.messages:
            self._take_in_all(partition, fetched.messages)
        if fetched.problem:
            if fetched.overtaken:
                partition.overtaken = True
            else:
                self._trouble(partition, fetched.problem)
        if fetched.end is not None:
            partition.lost = None
            if fetched.end >= partition.next_offset:
                partition.next_offset = fetched.end
                partition.at_end = True
                partition.ended = fetched.ended

    def _take_in_all(self, partition: _Partition, messages: Sequence[Any]) -> None:
        # A resumed partition may repeat what was fetched before it was paused.
        first = messages[0].offset()
        if first < partition.next_offset:
            messages = [m for m in messages if m.offset() >= partition.next_offset]
            if not messages:
                return
        for lane, own in zip(partition.lanes, self._divide(messages)):
            if own and own[0].offset() < lane.start:
                # This lane is ahead of the others by what an earlier run has done.
                own = [m for m in own if m.offset() >= lane.start]
            if own and not lane.messages:
                lane.since = self._timer()
            size = self.fetcher.bytes(own)
            lane.messages += own
            lane.bytes += size
            BOOKS.count(POLLED, len(own), partition.key[0])
            TALLY.count(POLLED_BYTES, size, partition.key[0])
        partition.next_offset = messages[-1].offset() + 1
        partition.at_end = False
        partition.lost = None

    def _divide(self, messages: Sequence[Any]) -> list[list[Any]]:
        """By lane."""
        lanes = self._config.lanes
        if lanes.count == 1:
            return [list(messages)]
        divided: list[list[Any]] = [[] for _ in range(lanes.count)]
        add = [own.append for own in divided]
        keys, offsets = self.fetcher.keys(messages), self.fetcher.offsets(messages)
        for message, lane in zip(messages, lanes.of(keys, offsets)):
            add[lane](message)
        return divided

    def _trouble(self, partition: _Partition, error: SinkError) -> None:
        TALLY.count(POLLING_ERRORS, 1)
        if partition.lost is None:
            _LOGGER.warning("%s-%d: %s; the others go on", *partition.key, error)
        partition.lost = error


_Part = tuple[int, list[Any], int, str]
"""What becomes a chunk: where its range ends, its messages, their bytes, what closes its batch."""


def _with_last(parts: Iterator[_Part]) -> Iterator[tuple[_Part, bool]]:
    """Each part, and whether it is the last one of its lane in a round."""
    before: _Part | None = None
    for each in parts:
        if before:
            yield before, False
        before = each
    if before:
        yield before, True


def shared_reader(config: ReadConfig) -> RoundReader:
    """This process's reader for the config."""
    return per_process(RoundReader, config)


class ReadRound(beam.PTransform):
    """Read what the process's reader was told to hand out next (`RoundReader.begin`).

    Bounded. Delivery: a record is read again by a later run unless its offset was committed.
    Order: offsets rise per partition. Parallelism: one reader per process, all partitions.
    The round is not part of the graph, so that one graph serves all rounds of a run.

    Args:
        config: What is read, and when records are due.
    """

    def __init__(self, config: ReadConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[RecordChunk]:
        return (
            root
            | "Begin" >> beam.Impulse()
            | "Take" >> beam.ParDo(_TakeFn(self._config)).with_output_types(RecordChunk)
        )

    def display_data(self) -> dict[str, Any]:
        return self._config.source.label


class _TakeFn(beam.DoFn):
    def __init__(self, config: ReadConfig) -> None:
        self._config = config
        self._records = beam.metrics.Metrics.counter("read", "records")
        self._bytes = beam.metrics.Metrics.counter("read", "value_bytes")

    def process(self, _: bytes) -> Iterator[RecordChunk]:
        chunk = None
        for chunk in shared_reader(self._config).take():
            self._records.inc(len(chunk.records))
            self._bytes.inc(sum(map(len, filter(None, chunk.records.values))))
            yield chunk
        if chunk is None:
            # The steps behind it run only if something reaches them, and a round without new
            # records still has to collect what earlier ones began.
            yield RecordChunk("", 0, 0, 0, Records(), lane=0)


coders.registry.register_coder(RecordChunk, SizedPickleCoder)
