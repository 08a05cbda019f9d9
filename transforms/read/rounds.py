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
from collections import deque
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
# Of a lane for which nothing is under way so much comes before any lane's rest, if that is so many
# times as much: a lane with two chunks in a round costs what a hundred records do, and needs state.
_FIRST_RECORDS, _REST = 200, 10
# A round takes in so much, at most, for partitions of which nothing has come yet: a client hands
# out a whole response of the broker, partition by partition.
_LOOK_RECORDS = 40_000


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


def fair_level(dues: Iterable[int], records: int) -> int:
    """How many records each lane gets at most, so that all together get so many, if they have them,
    and nobody gets less for the sake of one who has more. Pure.

    Args:
        dues: What each of them has, 0 or more.
        records: How many there are for all.
    """
    rising = sorted(filter(None, dues))
    for place, due in enumerate(rising):
        if due * (len(rising) - place) > records:
            return records // (len(rising) - place)
        records -= due
    return rising[-1] if rising else 0


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
        while self._looks_for_more(round, partitions, room_for):
            if self.fill(0) < self.fetcher.most:
                break
        left = _Left(round.records, round.bytes)
        # Partitions, and lanes in them, take turns: a short round favours none.
        has_any = (
            room
            for room, partition in zip(round.rooms, partitions)
            if any(lane.messages or lane.start < partition.next_offset for lane in partition.lanes)
        )
        rooms = sorted(has_any, key=lambda room: self._partitions[room.key].place)
        places = [self._partitions[room.key].place for room in rooms]
        rooms = [rooms[turn] for turn in turns(places, self._served)]
        shares = [self._shares(room, round.flush) for room in rooms]
        of_rooms = [_Left(room.records, room.bytes) for room in rooms]
        dues = [min(share.due, room.records) for room, own in zip(rooms, shares) for share in own]
        level = max(1, fair_level(dues, round.records))
        # In whole batches. Who is behind when all is handed out has the next round's first turn.
        level += -level % self._config.batch_size
        first = []
        few, step = self._whole_batches(_FIRST_RECORDS), self._whole_batches(_CHUNK_RECORDS)
        for room, of_room, own in zip(rooms, of_rooms, shares):
            for share in own:
                if share.lane.number not in room.busy:
                    most = min(share.due, level)
                    most = few if most > _REST * few else most
                    self._hand_out(share, step, most, left, of_room)
                    first += [share] if share.parts else []
        for of_room, own in zip(of_rooms, shares):
            for share in own:
                self._hand_out(share, step, level - share.taken, left, of_room)
                if share.parts:
                    self._served, share.partition.served = share.partition.place, share.lane.number
                share.take(self._timer())
        begun: set[LaneKey] = set()
        for share in first:
            yield self._chunk(share, begun)
        for own in shares:
            for share in own:
                while share.parts:
                    yield self._chunk(share, begun)
            for share in own:
                if not share.lane.messages and share.lane.start < share.partition.next_offset:
                    # No record of this lane, and yet its offsets have to be committed.
                    share.parts.append((share.partition.next_offset, []))
                    share.closed_by = ""
                    yield self._chunk(share, begun)

    def _looks_for_more(
        self, round: Round, partitions: Sequence[_Partition], room_for: int
    ) -> bool:
        """Whether more of what has been fetched is worth to be taken in before a round begins."""
        waiting = sum(partition.waiting for partition in partitions)
        if waiting >= max(room_for, _LOOK_RECORDS):
            return False
        return waiting < room_for or any(
            not (room.busy or each.waiting or each.at_end or each.paused or each.lost)
            for room, each in zip(round.rooms, partitions)
        )

    def _shares(self, room: Room, flush: bool) -> list[_Share]:
        """What is due of a partition, by lane, in turn."""
        partition, config = self._partitions[room.key], self._config
        flush = room.flush or partition.ended or (flush and partition.at_end)
        shares = []
        for number in turns(range(len(partition.lanes)), partition.served):
            lane = partition.lanes[number]
            due = self._due(lane, flush, number in room.busy and not room.flush)
            by = BY_BYTES if lane.bytes >= config.batch_bytes else BY_END if flush else BY_WINDOW
            shares.append(_Share(partition, lane, due, by))
        return shares

    def _whole_batches(self, records: int) -> int:
        """So many records, in whole batches, and one at least."""
        batch_size = self._config.batch_size
        return max(1, records // batch_size) * batch_size

    def _hand_out(
        self, share: _Share, step: int, records: int, left: _Left, of_room: _Left
    ) -> None:
        """Add to what is handed out of a lane, in parts of so many records.

        Args:
            share: Of the lane.
            step: Records of a part.
            records: How many are added at most.
            left: What the round has left; less by what is added.
            of_room: What its partition has left.
        """
        partition, lane, batch_size = share.partition, share.lane, self._config.batch_size
        records = min(records, left.records, of_room.records)
        due = share.due - share.taken
        if due > records:
            # A batch is better begun in the next round than cut in two.
            due = records - records % batch_size
        end = share.taken + due
        while share.taken < end and (size := min(left.bytes, of_room.bytes)) > 0:
            high = min(share.taken + step, end)
            messages = lane.messages[share.taken : high]
            if len(lane.messages) - high < len(messages):
                # The mostly few that stay tell what the many hold.
                total = lane.bytes - share.bytes - self.fetcher.bytes(lane.messages[high:])
            else:
                total = self.fetcher.bytes(messages)
            count, chunk_bytes = self._within(messages, total, size)
            cut_short = count < len(messages)
            if cut_short and share.taken and count < batch_size:
                break
            share.taken, share.bytes = share.taken + count, share.bytes + chunk_bytes
            left.less(count, chunk_bytes)
            of_room.less(count, chunk_bytes)
            is_last = share.taken == len(lane.messages)
            next_offset = partition.next_offset if is_last else messages[count - 1].offset() + 1
            share.parts.append((next_offset, messages[:count]))
            if cut_short:
                break

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

    def _chunk(self, share: _Share, begun: set[LaneKey]) -> RecordChunk:
        """A lane's next chunk; its first one of the round if it is not among those begun: the state
        before it is gone."""
        partition, lane = share.partition, share.lane
        next_offset, messages = share.parts.popleft()
        start, lane.start = lane.start, next_offset
        records = self.fetcher.records(messages) if messages else Records()
        key = (*partition.key, lane.number)
        is_first, is_last = key not in begun, not share.parts
        begun.add(key)
        return RecordChunk(
            *partition.key,
            start,
            next_offset,
            records,
            is_first,
            lane.number,
            is_last,
            share.closed_by,
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


@dataclass(slots=True)
class _Left:
    """What may still be handed out."""

    records: int
    bytes: int

    def less(self, records: int, bytes: int) -> None:
        self.records -= records
        self.bytes -= bytes


@dataclass(slots=True)
class _Share:
    """What a round hands out of a lane.

    Attributes:
        partition: The lane's partition.
        lane: The lane.
        due: Its records that may be handed out.
        closed_by: What closes its last batch.
        parts: What becomes a chunk each: where its range ends, and its messages.
        taken: Records in the parts.
        bytes: Their bytes.
    """

    partition: _Partition
    lane: _Lane
    due: int
    closed_by: str
    parts: deque[tuple[int, list[Any]]] = field(default_factory=deque)
    taken: int = 0
    bytes: int = 0

    def take(self, now: float) -> None:
        """Take what is handed out from the lane."""
        if self.taken:
            del self.lane.messages[: self.taken]
            self.lane.bytes -= self.bytes
            self.lane.since = now


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
