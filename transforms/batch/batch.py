"""Batch: ((topic, partition, lane), RecordChunk) -> Batch.

A stateful DoFn per lane puts chunks in offset order, encodes each record once, and closes batches
by count, by exact payload bytes, and at the window's end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import time
from typing import Any

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
from apache_beam.utils.timestamp import Timestamp

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
        window_secs: How long a streaming run keeps a batch open. None in a bounded run: its end
            closes all batches, and it must not declare a timer of real time.
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
    first: bool = False,
) -> Batch:
    """Make one batch of its pieces, in whatever order they come. A state bag promises none.

    Args:
        key: The lane.
        pieces: At least one.
        rejection: Set if the batch must not be sent.
        frame: What stands around the entries.
        start: Where its range begins, if that is before its first piece.
        first: Whether the lane begins with it.
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
    return Batch(topic, partition, start, end, records, entries, rejection, frame, lane, first)


class BatchByPartition(beam.PTransform):
    """Batch the records of one lane of a partition in offset order.

    Works on bounded and unbounded input in the global window. Order: offsets rise within a
    batch and from batch to batch of a lane; a chunk that arrives before its predecessor
    waits for it. Holds at most one open batch per lane in state; it is closed when it is
    full, where the partition ends for good, after `window_secs` in a streaming run, and by the
    window's end, so also by a drain.
    Records that were batched before are dropped and counted.

    Args:
        config: What a batch may hold.
        clock: Seconds since the epoch, for `window_secs`.
    """

    def __init__(self, config: BatchConfig, clock: Callable[[], float] = time) -> None:
        super().__init__()
        self._config = config
        self._clock = clock

    def expand(
        self, chunks: beam.PCollection[tuple[LaneKey, RecordChunk]]
    ) -> beam.PCollection[Batch]:
        streaming = self._config.window_secs is not None
        buffer = (
            _StreamBufferFn(self._config, self._clock) if streaming else _BufferFn(self._config)
        )
        return chunks | "Buffer" >> beam.ParDo(buffer).with_output_types(Batch)

    def display_data(self) -> dict[str, Any]:
        return {"max_records": self._config.max_records, "max_bytes": self._config.max_bytes}


class _BufferFn(beam.DoFn):
    OPEN = ReadModifyWriteStateSpec("batch_open", coders.PickleCoder())
    PIECES = BagStateSpec("batch_pieces", coders.PickleCoder())
    EARLY = BagStateSpec("batch_early", coders.PickleCoder())
    # Fires at the end of a bounded run and at a drain, so an open batch is never dropped.
    WINDOW_END = TimerSpec("batch_window_end", beam.TimeDomain.WATERMARK)

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        counter = beam.metrics.Metrics.counter
        self._records = counter("batch", "records")
        self._batches = counter("batch", "batches")
        self._duplicates = counter("batch", "duplicates")
        self._out_of_order = counter("batch", "out_of_order")
        self._closed_by = {
            BY_COUNT: counter("batch", "closed_by_count"),
            BY_BYTES: counter("batch", "closed_by_bytes"),
            BY_WINDOW: counter("batch", "closed_by_window"),
            BY_END: counter("batch", "closed_by_end"),
            ALONE: counter("batch", "closed_by_alone"),
        }
        self._base64_fields = counter("batch", "base64_fields")
        self._batch_records = beam.metrics.Metrics.distribution("batch", "batch_records")
        self._batch_bytes = beam.metrics.Metrics.distribution("batch", "batch_bytes")

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
        if chunk.first and state.base < 0:
            state = OpenBatch(chunk.start, chunk.start, chunk.start, early=state.early)
        if chunk.start > state.next_offset and not chunk.first:
            early.add(chunk)
            open_state.write(replace(state, early=state.early + 1))
            return
        if state.next_offset < chunk.start:
            hole = (state.next_offset, chunk.start)
            state = replace(state, holes=(*state.holes, hole)[-_HOLES:])
        state = yield from self._add(chunk, state, pieces)
        last = chunk.last
        if state.early:
            waiting = sorted(early.read(), key=lambda waiter: waiter.start)
            early.clear()
            while waiting and waiting[0].start <= state.next_offset:
                last = last or waiting[0].last
                state = yield from self._add(waiting.pop(0), state, pieces)
            for waiter in waiting:
                early.add(waiter)
            state = replace(state, early=len(waiting))
        if last:
            # Nothing more comes to fill it, and where its partition ends others wait for it.
            yield from self._close(element[0], state, pieces)
            state = _closed(state)
        open_state.write(state)

    @on_timer(WINDOW_END)
    def close_all(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(PIECES),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
    ) -> Iterator[Batch]:
        state: OpenBatch | None = open_state.read()
        if state is None:
            return
        # Nothing more can come: what still waits for a predecessor goes as it is, but no batch's
        # range covers the hole before it, so that nothing behind the hole is committed.
        for chunk in sorted(early.read(), key=lambda waiter: waiter.start):
            if chunk.start > state.next_offset:
                yield from self._close(key, state, pieces)
                base = chunk.start if state.base < 0 else state.base
                state = OpenBatch(base, chunk.start, chunk.start)
            state = yield from self._add(chunk, state, pieces)
        yield from self._close(key, state, pieces)
        early.clear()
        open_state.clear()

    def _alone(self, chunk: RecordChunk) -> Iterator[Batch]:
        """The batches of a chunk that needs no state: the last one ends where the chunk does."""
        if len(chunk.records):
            state = OpenBatch(chunk.start, chunk.start, chunk.start)
            yield from self._pieces(chunk, state, None)
        else:
            frame = self._config.format.envelope.frame(chunk.topic, chunk.partition)
            piece = Piece(chunk.start, chunk.next_offset, chunk.records, ())
            yield assemble(chunk.lane_key, [piece], frame=frame, first=True)

    def _close(
        self, key: LaneKey, state: OpenBatch, pieces: BagRuntimeState, by: str = BY_END
    ) -> Iterator[Batch]:
        """End the open batch where it stands."""
        if state.start < state.next_offset:
            held = list(pieces.read())
            # A range of offsets that hold no record is passed on too: it has to be committed.
            end = Piece(state.next_offset, state.next_offset, Records(), ())
            start = Piece(state.start, state.start, Records(), ())
            frame = self._config.format.envelope.frame(key[0], key[1])
            first = state.start == state.base
            yield self._count(assemble(key, [start, *held, end], frame=frame, first=first), by)
        pieces.clear()

    def _add(
        self, chunk: RecordChunk, state: OpenBatch, pieces: BagRuntimeState
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
                yield from self._pieces(before, OpenBatch(-1, chunk.start, chunk.start), None)
            filled, state = yield from self._fill(chunk, state)
            self._duplicates.inc(known - late - filled)
            if chunk.next_offset <= state.next_offset:
                return state
            unseen = chunk.records.slice(known, len(offsets))
            chunk = replace(chunk, start=state.next_offset, records=unseen)
        return (yield from self._pieces(chunk, state, pieces))

    def _fill(
        self, chunk: RecordChunk, state: OpenBatch
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
            yield from self._pieces(part, OpenBatch(-1, start, start), None)
            self._out_of_order.inc(len(records))
            filled += len(records)
            left += [hole for hole in ((low, start), (end, high)) if hole[0] < hole[1]]
        return filled, replace(state, holes=tuple(left))

    def _pieces(
        self, chunk: RecordChunk, state: OpenBatch, pieces: BagRuntimeState | None
    ) -> Generator[Batch, None, OpenBatch]:
        """Encode a chunk and cut it; what stays open goes to `pieces`, or, if None, closes too.

        The batch that begins at the state's base is the lane's first one.
        """
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
                first = batch_start == state.base
                if part.rejection:
                    by = ALONE
                elif open_records + high - low >= self._config.max_records:
                    by = BY_COUNT
                else:
                    by = BY_BYTES if part.close else chunk.closed_by
                batch = assemble(
                    chunk.lane_key, together, part.rejection, frame, batch_start, first
                )
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


class _StreamBufferFn(_BufferFn):
    """The same for input without an end: an open batch waits for so long and no longer."""

    # Another name than in a bounded run: no two timers of the code share one.
    WINDOW_END = TimerSpec("batch_drain", beam.TimeDomain.WATERMARK)
    DUE = TimerSpec("batch_due", beam.TimeDomain.REAL_TIME)

    def __init__(self, config: BatchConfig, clock: Callable[[], float]) -> None:
        super().__init__(config)
        self._clock = clock

    def process(  # type: ignore[override]
        self,
        element: tuple[LaneKey, RecordChunk],
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(_BufferFn.OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(_BufferFn.PIECES),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(_BufferFn.EARLY),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        due: RuntimeTimer = beam.DoFn.TimerParam(DUE),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Batch]:
        before: OpenBatch | None = open_state.read()
        yield from super().process(element, open_state, pieces, early, window_end, window)
        state: OpenBatch | None = open_state.read()
        if not state or state.start == state.next_offset:
            return
        if not before or before.start == before.next_offset or before.start != state.start:
            # Opened by this chunk; a batch that was open already is due when it was before.
            assert self._config.window_secs is not None
            due.set(Timestamp.of(self._clock() + self._config.window_secs))

    @on_timer(WINDOW_END)
    def close_all(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(_BufferFn.OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(_BufferFn.PIECES),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(_BufferFn.EARLY),  # type: ignore[assignment]
        due: RuntimeTimer = beam.DoFn.TimerParam(DUE),  # type: ignore[assignment]
    ) -> Iterator[Batch]:
        # Flink's drain waits for every timer that is set, and fires none of real time any more.
        due.clear()
        yield from super().close_all(key, open_state, pieces, early)

    @on_timer(DUE)
    def close_due(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        open_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(_BufferFn.OPEN),  # type: ignore[assignment]
        pieces: BagRuntimeState = beam.DoFn.StateParam(_BufferFn.PIECES),  # type: ignore[assignment]
    ) -> Iterator[Batch]:
        state: OpenBatch | None = open_state.read()
        if state is None:
            return
        yield from self._close(key, state, pieces, BY_WINDOW)
        open_state.write(_closed(state))


def _closed(state: OpenBatch) -> OpenBatch:
    """The state once the open batch has gone."""
    return replace(state, start=state.next_offset, records=0, entry_bytes=0)


coders.registry.register_coder(Batch, SizedPickleCoder)
