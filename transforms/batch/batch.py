"""Batch: ((topic, partition, lane), RecordChunk) -> Batch.

`Batcher` puts a lane's chunks in offset order, encodes each record once, and closes batches by
count and by exact payload bytes; what lies between two chunks is kept by the stateful DoFn that
asks it. In rounds that is the one here, in a streaming run that of `transforms.pending.pending`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.userstate import (
    BagRuntimeState,
    BagStateSpec,
    ReadModifyWriteRuntimeState,
    ReadModifyWriteStateSpec,
    RuntimeTimer,
    TimerSpec,
    on_timer,
)

from transforms.batch.payload import PayloadFormat, encode_records
from transforms.coding import SizedPickleCoder
from transforms.conditions import SIZE_EXCEEDED
from transforms.records import (
    ALONE,
    ARRAY,
    BY_BYTES,
    BY_COUNT,
    BY_END,
    BY_WINDOW,
    Batch,
    Frame,
    LaneKey,
    RecordChunk,
    Records,
    Rejection,
)

# Holes that are remembered per lane. Many are none: transactions and compaction leave them.
_HOLES = 100


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """What a batch may hold.

    Attributes:
        max_records: Records per batch, 1 to 10000.
        max_bytes: Bytes of the whole encoded payload, brackets and commas included.
        format: How keys and values become JSON.
        window_secs: How long a streaming run keeps a batch open. None in a bounded run, whose end
            closes all batches.
    """

    max_records: int = 100
    max_bytes: int = 6_291_455
    format: PayloadFormat = PayloadFormat()
    window_secs: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Encoded records that stay together: a part of a chunk, all in the same batch."""

    start: int
    next_offset: int
    records: Records
    entries: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """The batch that is still open, without its records.

    Attributes:
        base: First offset this key ever saw; a record below it is late, not a duplicate. -1 until
            it is known.
        start: Where the open batch's range begins.
        next_offset: Up to where the partition's records have arrived without a hole.
        records: Records in the open batch.
        entry_bytes: Their entries' sizes, added up.
        early: Chunks that wait for their predecessor.
        holes: Ranges that chunks which do not tell their predecessor have jumped over, the newest
            ones: what comes of them is late, not a duplicate.
    """

    base: int
    start: int
    next_offset: int
    records: int = 0
    entry_bytes: int = 0
    early: int = 0
    holes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a piece ends: after record `high`; `close` says whether its batch ends there too."""

    low: int
    high: int
    close: bool
    rejection: Rejection | None = None


def too_large(entry_bytes: int, max_bytes: int, frame: Frame = ARRAY) -> Rejection:
    """Why a record that fits into no batch is not sent."""
    return Rejection(
        SIZE_EXCEEDED,
        SIZE_EXCEEDED,
        f"the record alone makes a payload of {frame.payload_bytes(entry_bytes, 1)} bytes; "
        f"the limit is {max_bytes} (--batch_bytes)",
    )


def cut(
    sizes: Sequence[int],
    rejections: dict[int, Rejection],
    open_records: int,
    open_bytes: int,
    config: BatchConfig,
    frame: Frame = ARRAY,
) -> Iterator[Cut]:
    """Divide a chunk's records among the open batch and new ones.

    Args:
        sizes: Bytes of each record's entry.
        rejections: By index, records that must stand alone and not be sent.
        open_records: Records that are in the open batch already; more than the limit if that was
            higher when they came (a savepoint was resumed with another).
        open_bytes: Bytes of their entries.
        config: The limits.
        frame: What the payload has besides the entries.

    Yields:
        Cuts in order, without a hole. A close before the first record has `high == low`.
    """
    if not sizes:
        return
    low, count, size = 0, open_records, open_bytes
    everything = frame.payload_bytes(open_bytes + sum(sizes), open_records + len(sizes))
    if not rejections and everything <= config.max_bytes:
        # Not even all of it together is too much: only the count can close a batch.
        room = max(0, config.max_records - open_records)
        for high in range(room, len(sizes) + 1, config.max_records):
            yield Cut(low, high, close=True)
            low = high
        if low < len(sizes):
            yield Cut(low, len(sizes), close=False)
        return
    for index, entry_bytes in enumerate(sizes):
        rejection = rejections.get(index)
        if rejection is None and frame.payload_bytes(entry_bytes, 1) > config.max_bytes:
            rejection = too_large(entry_bytes, config.max_bytes, frame)
        together = frame.payload_bytes(size + entry_bytes, count + 1)
        full = count >= config.max_records or together > config.max_bytes
        if count and (rejection or full):
            yield Cut(low, index, close=True)
            low, count, size = index, 0, 0
        if rejection:
            yield Cut(index, index + 1, close=True, rejection=rejection)
            low = index + 1
            continue
        count += 1
        size += entry_bytes
        if count == config.max_records:
            yield Cut(low, index + 1, close=True)
            low, count, size = index + 1, 0, 0
    if low < len(sizes):
        yield Cut(low, len(sizes), close=False)


def assemble(
    key: LaneKey,
    pieces: Iterable[Piece],
    rejection: Rejection | None = None,
    frame: Frame = ARRAY,
    start: int | None = None,
) -> Batch:
    """Make one batch of its pieces, in whatever order they come. A state bag promises none.

    Args:
        key: The lane.
        pieces: At least one.
        rejection: Set if the batch must not be sent.
        frame: What stands around the entries.
        start: Where its range begins, if that is before its first piece.
    """
    ordered = sorted(pieces, key=lambda piece: piece.start)
    if len(ordered) == 1:
        records, entries = ordered[0].records, ordered[0].entries
    else:
        records = Records.join(piece.records for piece in ordered)
        entries = [entry for piece in ordered for entry in piece.entries]
    topic, partition, lane = key
    if start is None:
        start = ordered[0].start
    end = ordered[-1].next_offset
    return Batch(topic, partition, start, end, records, entries, rejection, frame, lane)


class Bag(Protocol):
    """What is kept between two chunks, in no order: a state, or a list in memory."""

    def read(self) -> Iterable[Any]: ...

    def add(self, value: Any) -> None: ...

    def clear(self) -> None: ...


IN_ORDER, APART, BEHIND_A_GAP = range(3)
"""How a chunk is batched: behind the one before it; by itself, since it comes late; or in order
again, behind offsets that no batch's range covers."""

Log = Callable[[RecordChunk, int], None]
"""Told of each chunk, or part of one, right before it is batched, and how it is."""


def is_open(state: OpenBatch) -> bool:
    """Whether there is an open batch, be it a range of offsets without records."""
    return state.start < state.next_offset


class _Uncounted:
    def inc(self, n: int = 1) -> None: ...

    def update(self, value: int) -> None: ...


def _uncounted(namespace: str, name: str) -> Any:
    return _Uncounted()


class Batcher:
    """Makes batches of one lane's chunks, in offset order. Keeps nothing itself: the caller has the
    `OpenBatch`, the pieces of the open batch, and the chunks that wait for their predecessor.

    Args:
        config: What a batch may hold.
        counts: Whether what is batched counts in the metrics; not if it is batched again.
    """

    def __init__(self, config: BatchConfig, counts: bool = True) -> None:
        self._config = config
        counter = beam.metrics.Metrics.counter if counts else _uncounted
        distribution = beam.metrics.Metrics.distribution if counts else _uncounted
        self._records: Any = counter("batch", "records")
        self._batches: Any = counter("batch", "batches")
        self._duplicates: Any = counter("batch", "duplicates")
        self._out_of_order: Any = counter("batch", "out_of_order")
        self._closed_by: dict[str, Any] = {
            BY_COUNT: counter("batch", "closed_by_count"),
            BY_BYTES: counter("batch", "closed_by_bytes"),
            BY_WINDOW: counter("batch", "closed_by_window"),
            BY_END: counter("batch", "closed_by_end"),
            ALONE: counter("batch", "closed_by_alone"),
        }
        self._base64_fields: Any = counter("batch", "base64_fields")
        self._batch_records: Any = distribution("batch", "batch_records")
        self._batch_bytes: Any = distribution("batch", "batch_bytes")

    def take(
        self, chunk: RecordChunk, state: OpenBatch, pieces: Bag, early: Bag, log: Log | None = None
    ) -> Generator[Batch, None, OpenBatch]:
        """Batch a chunk, and what has waited for it, or let it wait for what it has overtaken.

        Args:
            chunk: With a range.
            state: What is open.
            pieces: The open batch's.
            early: Chunks that wait, as many as `state` says.
            log: If given, batches come in the order of what it is told: one of late records closes
                the open one before it.

        Returns:
            What is open afterwards.
        """
        if chunk.first and state.base < 0:
            state = OpenBatch(chunk.start, chunk.start, chunk.start, early=state.early)
        if chunk.start > state.next_offset and not chunk.first:
            early.add(chunk)
            return replace(state, early=state.early + 1)
        if state.next_offset < chunk.start:
            hole = (state.next_offset, chunk.start)
            state = replace(state, holes=(*state.holes, hole)[-_HOLES:])
        state = yield from self._add(chunk, state, pieces, log)
        last = chunk.last
        if state.early:
            waiting = sorted(early.read(), key=lambda waiter: waiter.start)
            early.clear()
            while waiting and waiting[0].start <= state.next_offset:
                last = last or waiting[0].last
                state = yield from self._add(waiting.pop(0), state, pieces, log)
            for waiter in waiting:
                early.add(waiter)
            state = replace(state, early=len(waiting))
        if last:
            # Nothing more comes to fill it, and where its partition ends others wait for it.
            state = yield from self.close(chunk.lane_key, state, pieces)
        return state

    def end(
        self, key: LaneKey, state: OpenBatch, pieces: Bag, early: Bag, log: Log | None = None
    ) -> Generator[Batch, None, OpenBatch]:
        """Close all, since nothing more can come.

        What still waits for a predecessor goes as it is, but no batch's range covers the hole
        before it, so that nothing behind the hole is committed.
        """
        if state.early:
            for chunk in sorted(early.read(), key=lambda waiter: waiter.start):
                how = IN_ORDER
                if chunk.start > state.next_offset:
                    yield from self.close(key, state, pieces)
                    base = chunk.start if state.base < 0 else state.base
                    state, how = OpenBatch(base, chunk.start, chunk.start), BEHIND_A_GAP
                state = yield from self._add(chunk, state, pieces, log, how)
            early.clear()
        state = yield from self.close(key, state, pieces)
        return replace(state, early=0)

    def close(
        self, key: LaneKey, state: OpenBatch, pieces: Bag, by: str = BY_END
    ) -> Generator[Batch, None, OpenBatch]:
        """End the open batch where it stands."""
        if is_open(state):
            held = list(pieces.read())
            # A range of offsets that hold no record is passed on too: it has to be committed.
            end = Piece(state.next_offset, state.next_offset, Records(), ())
            start = Piece(state.start, state.start, Records(), ())
            frame = self._config.format.envelope.frame(key[0], key[1])
            yield self._count(assemble(key, [start, *held, end], frame=frame), by)
        pieces.clear()
        return replace(state, start=state.next_offset, records=0, entry_bytes=0)

    def _add(
        self,
        chunk: RecordChunk,
        state: OpenBatch,
        pieces: Bag,
        log: Log | None,
        how: int = IN_ORDER,
    ) -> Generator[Batch, None, OpenBatch]:
        """Put a chunk's records behind what is there; returns the new state."""
        offsets = chunk.records.offsets
        if chunk.start < state.next_offset:
            late = bisect_left(offsets, state.base)
            known = bisect_left(offsets, state.next_offset)
            if late:
                # Never seen, and from before the beginning: invoked by themselves, not lost.
                self._out_of_order.inc(late)
                end = min(chunk.next_offset, state.base)
                records = chunk.records.slice(0, late)
                before = replace(chunk, next_offset=end, records=records)
                state = yield from self._apart(before, state, pieces, log)
            filled, state = yield from self._fill(chunk, state, pieces, log)
            self._duplicates.inc(known - late - filled)
            if chunk.next_offset <= state.next_offset:
                return state
            unseen = chunk.records.slice(known, len(offsets))
            chunk = replace(chunk, start=state.next_offset, records=unseen)
        if log:
            log(chunk, how)
        return (yield from self.put(chunk, state, pieces))

    def _fill(
        self, chunk: RecordChunk, state: OpenBatch, pieces: Bag, log: Log | None
    ) -> Generator[Batch, None, tuple[int, OpenBatch]]:
        """Batch what a chunk holds of the holes by itself; how many records, and the new state."""
        filled, left = 0, []
        for low, high in state.holes:
            start, end = max(low, chunk.start), min(high, chunk.next_offset)
            if start >= end:
                left.append((low, high))
                continue
            begin, behind = (bisect_left(chunk.records.offsets, each) for each in (start, end))
            records = chunk.records.slice(begin, behind)
            part = replace(chunk, start=start, next_offset=end, records=records)
            state = yield from self._apart(part, state, pieces, log)
            self._out_of_order.inc(len(records))
            filled += len(records)
            left += [hole for hole in ((low, start), (end, high)) if hole[0] < hole[1]]
        return filled, replace(state, holes=tuple(left))

    def _apart(
        self, chunk: RecordChunk, state: OpenBatch, pieces: Bag, log: Log | None
    ) -> Generator[Batch, None, OpenBatch]:
        """Batch by itself what comes late; returns the new state."""
        if log and len(chunk.records):
            state = yield from self.close(chunk.lane_key, state, pieces)
            log(chunk, APART)
        yield from self.put_apart(chunk)
        return state

    def put_apart(self, chunk: RecordChunk) -> Generator[Batch, None, OpenBatch]:
        """Batch a chunk by itself: the last batch ends where it does."""
        state = OpenBatch(chunk.start, chunk.start, chunk.start)
        return (yield from self.put(chunk, state, None))

    def put(
        self, chunk: RecordChunk, state: OpenBatch, pieces: Bag | None
    ) -> Generator[Batch, None, OpenBatch]:
        """Encode a chunk and cut it; what stays open goes to `pieces`, or, if None, closes too."""
        records, offsets = chunk.records, chunk.records.offsets
        encoded = encode_records(chunk.topic, chunk.partition, records, self._config.format)
        self._records.inc(len(records))
        if encoded.base64_fields:
            self._base64_fields.inc(encoded.base64_fields)
        rejections = encoded.rejections
        if any(records.rejections):
            earlier = enumerate(records.rejections)
            rejections |= {index: rejection for index, rejection in earlier if rejection}
        # What they were for is in the entries now; the records are kept as Kafka had them.
        if len(records.decoded) or len(records.rejections):
            records = replace(records, decoded=(), rejections=())
        frame = self._config.format.envelope.frame(chunk.topic, chunk.partition)
        sizes = list(map(len, encoded.entries))
        open_records, open_bytes = state.records, state.entry_bytes
        batch_start = state.start if open_records else min(state.start, chunk.start)
        start = chunk.start
        for part in cut(sizes, rejections, open_records, open_bytes, self._config, frame):
            low, high = part.low, part.high
            # Behind its last record, not in front of the next: that one's number says nothing.
            end = start if low == high else offsets[high - 1] + 1
            if high == len(offsets):
                end = chunk.next_offset
            piece = Piece(start, end, records.slice(low, high), encoded.entries[low:high])
            start = end
            if part.close or pieces is None:
                held = list(pieces.read()) if pieces and open_records else []
                if held and pieces:
                    pieces.clear()
                together = [*held, piece]
                if part.rejection:
                    by = ALONE
                elif open_records + high - low >= self._config.max_records:
                    by = BY_COUNT
                else:
                    by = BY_BYTES if part.close else chunk.closed_by
                batch = assemble(chunk.lane_key, together, part.rejection, frame, batch_start)
                yield self._count(batch, by)
                batch_start, open_records, open_bytes = end, 0, 0
            else:
                pieces.add(piece)
                open_records += high - low
                open_bytes += sum(sizes[low:high])
        return replace(
            state,
            start=batch_start,
            next_offset=chunk.next_offset,
            records=open_records,
            entry_bytes=open_bytes,
        )

    def _count(self, batch: Batch, by: str) -> Batch:
        if len(batch):
            self._batches.inc()
            self._closed_by[by or BY_END].inc()
            self._batch_records.update(len(batch))
            self._batch_bytes.update(batch.payload_bytes)
        return batch


class BatchByPartition(beam.PTransform):
    """Batch the records of one lane of a partition in offset order.

    Bounded, in the global window. Order: offsets rise within a batch and from batch to batch of a
    lane; a chunk that arrives before its predecessor waits for it. Holds at most one open batch per
    lane in state; it is closed when it is full, where the partition ends for good, and by the
    window's end. Records that were batched before are dropped and counted.

    Args:
        config: What a batch may hold.
    """

    def __init__(self, config: BatchConfig) -> None:
        super().__init__()
        self._config = config

    def expand(
        self, chunks: beam.PCollection[tuple[LaneKey, RecordChunk]]
    ) -> beam.PCollection[Batch]:
        return chunks | "Buffer" >> beam.ParDo(_BufferFn(self._config)).with_output_types(Batch)

    def display_data(self) -> dict[str, Any]:
        return {"max_records": self._config.max_records, "max_bytes": self._config.max_bytes}


class _BufferFn(beam.DoFn):
    OPEN = ReadModifyWriteStateSpec("batch_open", coders.PickleCoder())
    PIECES = BagStateSpec("batch_pieces", coders.PickleCoder())
    EARLY = BagStateSpec("batch_early", coders.PickleCoder())
    # Fires at the end of a bounded run, so an open batch is never dropped.
    WINDOW_END = TimerSpec("batch_window_end", beam.TimeDomain.WATERMARK)

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self._batcher = Batcher(config)

    def process(
        self,
        element: tuple[LaneKey, RecordChunk],
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(PIECES),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Batch]:
        chunk = element[1]
        if chunk.start == chunk.next_offset:
            return
        if chunk.first and chunk.last:
            # All there is of its lane: nothing has to be kept, and nothing to be closed later.
            yield from self._alone(chunk)
            return
        state: OpenBatch | None = open_state.read()
        if state is None:
            window_end.set(window.end)
            state = OpenBatch(-1, -1, -1)
        open_state.write((yield from self._batcher.take(chunk, state, pieces, early)))

    @on_timer(WINDOW_END)
    def close_all(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(PIECES),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
    ) -> Iterator[Batch]:
        state: OpenBatch | None = open_state.read()
        if state is not None:
            yield from self._batcher.end(key, state, pieces, early)
            open_state.clear()

    def _alone(self, chunk: RecordChunk) -> Iterator[Batch]:
        """The batches of a chunk that needs no state: the last one ends where the chunk does."""
        if len(chunk.records):
            yield from self._batcher.put_apart(chunk)
        else:
            frame = self._config.format.envelope.frame(chunk.topic, chunk.partition)
            piece = Piece(chunk.start, chunk.next_offset, chunk.records, ())
            yield assemble(chunk.lane_key, [piece], frame=frame)


coders.registry.register_coder(Batch, SizedPickleCoder)
