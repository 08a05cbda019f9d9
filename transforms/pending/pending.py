"""Pending: ((topic, partition, lane), RecordChunk) -> Finished. Batch and Invoke, when streaming.

One keyed step instead of two, so that records cross to it once. In state are the chunks as they
came that are not finished, as bytes, and the lane's `Place`. What is made of them, entries and
payloads, is in the process only, and is made again for a process that does not have it. The rules
are those of the rounds: `Batcher` says where batches end, the process's `Invoker` works them in
order.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.coders.coders import LengthPrefixCoder
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

from transforms.batch.batch import (
    APART,
    BEHIND_A_GAP,
    IN_ORDER,
    BatchConfig,
    Batcher,
    OpenBatch,
    Piece,
    is_open,
)
from transforms.columns import decode_chunk, encode_chunk
from transforms.interpreter import collect_rarely
from transforms.invoke.handover import Handover, Marked
from transforms.invoke.invoke import (
    HALTS,
    Counters,
    Gauges,
    InvokeConfig,
    forget_handover,
    shared_handover,
    why_broken,
)
from transforms.pending.place import (
    KeptChunk,
    Mark,
    Place,
    decode_kept,
    decode_place,
    encode_place,
)
from transforms.records import (
    BY_WINDOW,
    NO_TIMESTAMP,
    Batch,
    Finished,
    LaneKey,
    RecordChunk,
    Records,
    halt_name,
)
from transforms.spread import place_of, salt_of

SaltedKey = tuple[int, str, int, int]
"""A lane's key as runners see it, behind its salt; see `transforms.spread`."""

_LOGGER = logging.getLogger(__name__)

# How often what has finished is looked for. Each look is a bundle of its own.
_COLLECT_SECS = 0.1
# How long a bundle may stay for what it has handed over, if calls are mostly over within that time:
# each look later costs a bundle's time. Only where records are young: behind a backlog it is the
# next ones that would wait.
_STAY_SECS = 0.01
_YOUNG_SECS = 1.0
# Bytes of one key's batches that may wait in memory; above it the input has to wait too. The native
# reader stops long before, so that a stuck partition does not stop the others.
_KEY_BYTES = 64 * 2**20
# The coder that Beam takes for a `SaltedKey`, as it goes to a runner that does not know it.
_KEY_CODER = LengthPrefixCoder(
    coders.TupleCoder(
        (coders.VarIntCoder(), coders.StrUtf8Coder(), coders.VarIntCoder(), coders.VarIntCoder())
    )
)


class BatchAndInvoke(beam.PTransform):
    """Batch the records of each lane, invoke the function and emit what became of them.

    Bounded and unbounded, in the global window. Order: offsets rise within a batch and from batch
    to batch of a lane; a chunk that arrives before its predecessor waits for it, and results come
    out in the order of the batches. A batch is closed when it is full, after `window_secs`, and by
    a drain, which waits for everything or as long as it may. At least once: what is not finished is
    kept in state, and invoked again if its process is lost. Records that were batched before are
    dropped and counted.

    Args:
        batch: What a batch may hold; `window_secs` is needed.
        invoke: How batches reach the function; `streaming` is needed.
    """

    def __init__(self, batch: BatchConfig, invoke: InvokeConfig) -> None:
        super().__init__()
        self._batch = batch
        self._invoke = invoke

    def expand(
        self, chunks: beam.PCollection[tuple[LaneKey, RecordChunk]]
    ) -> beam.PCollection[Finished]:
        packed = beam.Map(pack).with_output_types(tuple[SaltedKey, bytes])
        pending = beam.ParDo(_PendingFn(self._batch, self._invoke)).with_output_types(Finished)
        return chunks | "Pack" >> packed | "Pending" >> pending

    def display_data(self) -> dict[str, Any]:
        return {
            "max_records": self._batch.max_records,
            "max_bytes": self._batch.max_bytes,
            "function": self._invoke.function.function,
        }


def pack(element: tuple[LaneKey, RecordChunk]) -> tuple[SaltedKey, bytes]:
    """As bytes from here on: what comes is what is kept, without being encoded again."""
    key, chunk = element
    return salted(key), encode_chunk(chunk)


@lru_cache(100_000)
def salted(key: LaneKey) -> SaltedKey:
    """A lane's key with its salt."""
    return salt_of(lambda each: _KEY_CODER.encode((each, *key)), place_of(*key)), *key


class _Pieces:
    """The open batch's pieces, in memory; a copy, until its bundle keeps it."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._pieces = list(pieces)

    def read(self) -> list[Piece]:
        return self._pieces

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)

    def clear(self) -> None:
        self._pieces = []


class _Early:
    """Chunks that wait for their predecessor, as their bag has them."""

    def __init__(self, key: LaneKey, bag: BagRuntimeState) -> None:
        self._key = key
        self._bag = bag

    def read(self) -> list[RecordChunk]:
        return [decode_chunk(self._key, data) for data in self._bag.read()]

    def add(self, chunk: RecordChunk) -> None:
        self._bag.add(encode_chunk(chunk))

    def clear(self) -> None:
        self._bag.clear()


class _Log:
    """Keeps each chunk in state as it is batched, and knows how far a batch of it reaches."""

    def __init__(self, place: Place, bag: BagRuntimeState, chunk: RecordChunk, data: bytes) -> None:
        self.chunks = place.chunks
        self._bag = bag
        self._came = chunk
        self._data = data
        self._how = IN_ORDER
        self._reached = place.open.start

    def __call__(self, chunk: RecordChunk, how: int) -> None:
        data = self._data if chunk is self._came else encode_chunk(chunk)
        self._bag.add(KeptChunk(self.chunks, how, data).encode())
        self._how = how
        self.chunks += 1

    def mark(self, batch: Batch) -> Mark:
        if self._how != APART:
            self._reached = batch.next_offset
        return Mark(self.chunks - 1, batch.next_offset, self._reached)


_Bags = tuple[BagRuntimeState, BagRuntimeState]


class _PendingFn(beam.DoFn):
    # The forms of these bytes are `transforms.pending.place` and `transforms.columns`, no classes.
    PLACE = ReadModifyWriteStateSpec("pending_place", coders.BytesCoder())
    CHUNKS_0 = BagStateSpec("pending_chunks_0", coders.BytesCoder())
    CHUNKS_1 = BagStateSpec("pending_chunks_1", coders.BytesCoder())
    # Chunks that have overtaken others on the way to here.
    EARLY = BagStateSpec("pending_early", coders.BytesCoder())
    COLLECT = TimerSpec("pending_collect", beam.TimeDomain.REAL_TIME)
    # Closes the open batch when it has waited long enough.
    DUE = TimerSpec("pending_due", beam.TimeDomain.REAL_TIME)
    # Fires at a drain and when a bounded run has read all, so that nothing pending is left behind.
    WINDOW_END = TimerSpec("pending_window_end", beam.TimeDomain.WATERMARK)

    def __init__(
        self,
        batch: BatchConfig,
        invoke: InvokeConfig,
        share: Callable[[InvokeConfig], Handover] = shared_handover,
        clock: Callable[[], float] = time.time,
    ) -> None:
        assert batch.window_secs is not None
        self._window_secs = batch.window_secs
        self._config = invoke
        self._share = share
        self._clock = clock
        self._batcher = Batcher(batch)
        self._again = Batcher(batch, counts=False)
        metrics = beam.metrics.Metrics
        self._gauges = Gauges()
        self._counters = Counters()
        self._dropped = metrics.counter("invoke", "behind_a_halt")
        self._handed_over_again = metrics.counter("invoke", "handed_over_again")
        self._left = metrics.counter("invoke", "left_by_a_drain")
        self._iterator_age_ms = metrics.distribution("invoke", "iterator_age_ms")

    def setup(self) -> None:
        collect_rarely()

    def process(
        self,
        element: tuple[SaltedKey, bytes],
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        chunks_0: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_0),  # type: ignore[assignment]
        chunks_1: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_1),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
        due: RuntimeTimer = beam.DoFn.TimerParam(DUE),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Finished]:
        salted_key, data = element
        key = salted_key[1:]
        chunk = decode_chunk(key, data)
        if chunk.start == chunk.next_offset:
            return
        kept = place_state.read()
        if kept is None:
            window_end.set(window.end)
        place = Place() if kept is None else decode_place(kept)
        if place.halted:
            # Not committed, so a new run reads it again.
            self._dropped.inc(len(chunk.records))
            if place.open.early:
                early.clear()
                place = replace(place, open=replace(place.open, early=0))
                place_state.write(encode_place(place))
            return
        bags = (chunks_0, chunks_1)
        opened = place.open
        self._share(self._config).goes_on()
        place = self._agree(key, place, bags)
        before = place.tail
        log = _Log(place, bags[place.newer], chunk, data)
        pieces = _Pieces(self._share(self._config).open(key))
        batches = self._batcher.take(chunk, place.open, pieces, _Early(key, early), log)
        place = self._hand_over(key, place, batches, log, pieces)
        invoker = self._share(self._config).invoker
        if self._is_young(chunk):
            if not self._window_secs:
                # At once, without a timer, which would cost a bundle's time.
                batches = self._batcher.close(key, place.open, pieces, BY_WINDOW)
                place = self._hand_over(key, place, batches, log, pieces)
            if place.tail > before:
                invoker.stay(place.tail - before, _STAY_SECS)
        place = yield from self._emit(key, place, bags)
        while invoker.queue(key[:2]).bytes > _KEY_BYTES and not place.halted:
            invoker.wait(lambda invoker: invoker.has_finished, 1.0)
            place = self._renew(key, place, bags)
            place = yield from self._emit(key, place, bags)
        was_open = is_open(opened) and opened.start == place.open.start
        if is_open(place.open) and not was_open and not place.halted:
            # Opened by this chunk; a batch that was open already is due when it was before.
            due.set(Timestamp.of(self._clock() + self._window_secs))
        self._set(collect, place, place_state)

    @on_timer(COLLECT)
    def collect(
        self,
        salted_key: SaltedKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        chunks_0: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_0),  # type: ignore[assignment]
        chunks_1: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_1),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
    ) -> Iterator[Finished]:
        place = _going_on(place_state)
        if place is None:
            return
        key, bags = salted_key[1:], (chunks_0, chunks_1)
        place = self._agree(key, place, bags)
        place = yield from self._emit(key, place, bags)
        self._set(collect, replace(place, collecting=False), place_state)

    @on_timer(DUE)
    def close_due(
        self,
        salted_key: SaltedKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        chunks_0: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_0),  # type: ignore[assignment]
        chunks_1: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_1),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
    ) -> Iterator[Finished]:
        place = _going_on(place_state)
        if place is None:
            return
        key, bags = salted_key[1:], (chunks_0, chunks_1)
        place = self._agree(key, place, bags)
        pieces = _Pieces(self._share(self._config).open(key))
        before = place.tail
        batches = self._batcher.close(key, place.open, pieces, BY_WINDOW)
        place = self._hand_over(key, place, batches, _no_more(place, bags), pieces)
        if place.tail > before:
            self._share(self._config).invoker.stay(1, _STAY_SECS)
        place = yield from self._emit(key, place, bags)
        self._set(collect, place, place_state)

    @on_timer(WINDOW_END)
    def end(
        self,
        salted_key: SaltedKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        chunks_0: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_0),  # type: ignore[assignment]
        chunks_1: BagRuntimeState = beam.DoFn.StateParam(CHUNKS_1),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
        due: RuntimeTimer = beam.DoFn.TimerParam(DUE),  # type: ignore[assignment]
    ) -> Iterator[Finished]:
        # Flink's drain waits for every timer that is set, and fires none of real time any more.
        collect.clear()
        due.clear()
        place = _going_on(place_state)
        if place is None:
            return
        key, bags = salted_key[1:], (chunks_0, chunks_1)
        place = self._agree(key, place, bags)
        log, pieces = _no_more(place, bags), _Pieces(self._share(self._config).open(key))
        batches = self._batcher.end(key, place.open, pieces, _Early(key, early), log)
        place = self._hand_over(key, place, batches, log, pieces)
        handover, wait_secs = self._share(self._config), self._config.drain_wait_secs
        until = math.inf if wait_secs is None else handover.drains(wait_secs)
        while True:
            place = yield from self._emit(key, place, bags)
            if place.halted or place.head == place.tail:
                break
            if handover.is_over(until):
                self._leave(key, place)
                break
            place = self._renew(key, place, bags)
            handover.invoker.wait(lambda invoker: invoker.has_finished, 0.1)
        place_state.write(encode_place(place))

    def _leave(self, key: LaneKey, place: Place) -> None:
        """Say what a drain has not waited for: it is not committed, and stays in the state."""
        self._share(self._config).forget(key)
        self._left.inc(place.tail - place.head)
        begin = place.done.reached if place.done.reached >= 0 else max(place.open.base, 0)
        _LOGGER.warning(
            "%s-%d: the drain ends after --drain_wait_secs=%g with %d batches that are not "
            "finished, of offsets %d to %d: they are not committed, a job that begins at the "
            "group's offsets reads them again",
            *(*key[:2], self._config.drain_wait_secs, place.tail - place.head),
            *(begin, place.open.next_offset - 1),
        )

    def _hand_over(
        self,
        key: LaneKey,
        place: Place,
        batches: Generator[Batch, None, OpenBatch],
        log: _Log,
        pieces: _Pieces,
    ) -> Place:
        """Hand over each batch as soon as it is made; what is open is kept."""
        handover = self._share(self._config)
        tail = place.tail
        try:
            while True:
                batch = next(batches)
                handover.submit(key, batch, log.mark(batch))
                self._observe_age(batch)
                tail += 1
        except StopIteration as end:
            state: OpenBatch = end.value
        handover.keep(key, log.chunks, tuple(pieces.read()))
        return replace(place, tail=tail, chunks=log.chunks, open=state)

    def _agree(self, key: LaneKey, place: Place, bags: _Bags) -> Place:
        """See to it that this process holds what the state says is pending, and open."""
        handover = self._share(self._config)
        held = handover.agree(key, place.token, place.head, place.tail, place.chunks)
        if held == place.tail:
            return place
        done = place.done
        if held is not None and held > place.head:
            done = handover.mark(key, held - 1)
        batches, pieces, state = self._make_again(key, place, done, bags)
        self._handed_over_again.inc(len(batches))
        if held is None:
            token, first = uuid.uuid4().hex, place.head
            handover.begin(key, token, first, batches, place.chunks, pieces)
        else:
            token, first = place.token, held
            handover.resume(key, batches, pieces)
        return replace(place, token=token, tail=first + len(batches), open=state)

    def _make_again(
        self, key: LaneKey, place: Place, done: Mark, bags: _Bags
    ) -> tuple[list[Marked], tuple[Piece, ...], OpenBatch]:
        """Batch what is kept behind a mark: the batches, and what is open.

        What was closed is closed again, in batches as they are made now. What is open stays so.
        """
        chunks: list[tuple[KeptChunk, RecordChunk]] = []
        if place.kept < place.chunks:
            kept = (decode_kept(data) for bag in bags for data in bag.read())
            for each in sorted(kept, key=lambda each: each.number):
                chunk = decode_chunk(key, each.data)
                if each.number == done.chunk:
                    chunk = _behind(chunk, done.offset)
                if each.number >= done.chunk and chunk.start < chunk.next_offset:
                    chunks.append((each, chunk))
        opened, pieces = place.open.start, _Pieces()
        begin = done.reached
        if begin < 0:
            begin = chunks[0][1].start if chunks else opened
        state = replace(place.open, start=begin, next_offset=begin, records=0, entry_bytes=0)
        batches: list[Marked] = []

        def note(made: Generator[Batch, None, OpenBatch], number: int, how: int) -> OpenBatch:
            reached = state.start
            try:
                while True:
                    batch = next(made)
                    if how != APART:
                        reached = batch.next_offset
                    batches.append((batch, Mark(number, batch.next_offset, reached)))
            except StopIteration as end:
                left: OpenBatch = end.value
                return state if how == APART else left

        before = done.chunk
        for each, chunk in chunks:
            if each.how != IN_ORDER:
                state = note(self._again.close(key, state, pieces), before, IN_ORDER)
            if each.how == APART:
                state = note(self._again.put_apart(chunk), each.number, APART)
                before = each.number
                continue
            if each.how == BEHIND_A_GAP:
                state = replace(state, start=chunk.start, next_offset=chunk.start)
            for part in _split(chunk, opened):
                if part.start == opened:
                    state = note(self._again.close(key, state, pieces), before, IN_ORDER)
                state = note(self._again.put(part, state, pieces), each.number, IN_ORDER)
                before = each.number
        if not is_open(place.open):
            state = note(self._again.close(key, state, pieces), before, IN_ORDER)
        return batches, tuple(pieces.read()), state

    def _renew(self, key: LaneKey, place: Place, bags: _Bags) -> Place:
        """Keep a key going inside a bundle, also if the bundle has taken too long for its lease."""
        handover = self._share(self._config)
        return place if handover.renew(key) else self._agree(key, place, bags)

    def _emit(self, key: LaneKey, place: Place, bags: _Bags) -> Generator[Finished, None, Place]:
        """Emit what has finished, and let go of it in the state."""
        handover = self._share(self._config)
        self._gauges.set(handover.invoker)
        # Asked first: then what halted it, if that was in this lane, is among what is finished.
        halted = handover.invoker.queue(key[:2]).halted
        all_finished = handover.finished(key, place.head)
        self._counters.take(handover.invoker)
        head = place.head
        for finished in all_finished:
            yield finished
            head += 1
            if finished.halted:
                beam.metrics.Metrics.counter(HALTS, halt_name(finished)).inc()
                halted = True
                break
        if head > place.head:
            place = replace(place, head=head, done=handover.mark(key, head - 1))
        if halted:
            # It may be another lane's failure; what is not finished here will be read again.
            place = replace(place, head=place.tail, halted=True)
        elif error := why_broken(handover.invoker, self._config.function):
            # The next attempt in this process begins with an invoker that is whole.
            forget_handover(self._config)
            raise error
        place, cleared = place.let_go()
        for bag in cleared:
            bags[bag].clear()
        return place

    def _set(
        self, collect: RuntimeTimer, place: Place, place_state: ReadModifyWriteRuntimeState
    ) -> None:
        """Come back while anything is pending, and once more, to let go of what was emitted."""
        if not place.collecting and not place.halted and place.head < place.tail:
            collect.set(Timestamp.of(self._clock() + _COLLECT_SECS))
            place = replace(place, collecting=True)
        place_state.write(encode_place(place))

    def _is_young(self, chunk: RecordChunk) -> bool:
        """Whether a chunk's last record was written just now, as far as it says."""
        timestamps = chunk.records.timestamps
        return bool(timestamps) and timestamps[-1] / 1000 > self._clock() - _YOUNG_SECS

    def _observe_age(self, batch: Batch) -> None:
        """Lambda's IteratorAge: how old the last record of a batch is when it is handed over."""
        timestamps = batch.records.timestamps
        if timestamps and timestamps[-1] != NO_TIMESTAMP:
            age_ms = round(self._clock() * 1000) - timestamps[-1]
            self._iterator_age_ms.update(max(0, age_ms))


def _going_on(place_state: ReadModifyWriteRuntimeState) -> Place | None:
    """The place of a lane that has begun and is not halted."""
    kept = place_state.read()
    place = None if kept is None else decode_place(kept)
    return None if place is None or place.halted else place


def _no_more(place: Place, bags: _Bags) -> _Log:
    """The log of a lane of which no chunk has come now."""
    return _Log(place, bags[place.newer], _NO_CHUNK, b"")


_NO_CHUNK = RecordChunk("", 0, 0, 0, Records())


def _behind(chunk: RecordChunk, offset: int) -> RecordChunk:
    """What a chunk holds from an offset on."""
    if offset <= chunk.start:
        return chunk
    return _split(chunk, min(offset, chunk.next_offset))[-1]


def _split(chunk: RecordChunk, offset: int) -> Sequence[RecordChunk]:
    """A chunk in two, if the offset is inside."""
    if not chunk.start < offset <= chunk.next_offset:
        return (chunk,)
    offsets = chunk.records.offsets
    at = bisect_left(offsets, offset)
    return (
        replace(chunk, next_offset=offset, records=chunk.records.slice(0, at)),
        replace(chunk, start=offset, records=chunk.records.slice(at, len(offsets))),
    )
