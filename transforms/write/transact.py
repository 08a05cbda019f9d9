"""Transact: Finished -> Progress, all of a bundle in one transaction, which Commit ends.

Why, and what a transaction cannot do: docs/adr/0032-exactly-once.md.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from apache_beam.utils.windowed_value import WindowedValue
from confluent_kafka import Producer

from transforms.errors import WriteError
from transforms.kafka.transaction import Transaction, shared_transaction
from transforms.per_process import per_process
from transforms.records import (
    Failure,
    Finished,
    LaneKey,
    PartitionKey,
    Responses,
    halt_name,
)
from transforms.tally import BOOKS, DELIVERY_ERRORS, RELEASED, TALLY, Series
from transforms.write.produce import (
    WITHOUT_ORIGINAL,
    HaltPartition,
    Owner,
    ProduceFn,
    WriteConfig,
    Written,
    error_writer,
    make_halted,
    records_of,
    response_writer,
)
from transforms.write.topic_writer import OF_THE_COUNT, Delivered, Refused, TopicWriter

_LOGGER = logging.getLogger(__name__)

_PATIENCE_SECS, _AGAIN_SECS = 300.0, 0.5


class _Tally:
    """A counter of what is written in transactions: what is not to be seen was not counted."""

    def __init__(self, counter: Any, counted: Counter[str], name: str) -> None:
        self._counter, self._counted, self._name = counter, counted, name

    def inc(self, count: int = 1) -> None:
        self._counter.inc(count)
        self._counted[self._name] += count

    def take_back(self) -> None:
        self._counter.inc(-self._counted.pop(self._name, 0))


_Place = tuple[LaneKey, int]
"""Which batch it is: its lane, and where it begins."""


@dataclass(slots=True)
class Kept:
    """What is to be written, until it can be seen, and what is known of it from other tries.

    Attributes:
        finished: In order per lane.
        counted: What was counted of it.
        books: What becomes of its records, in the books once it can be seen.
        refused: By batch, the responses that are refused: the offsets they answer, and why.
        omitted: By batch and offset, how much is left out of the error record.
        stopped: By batch, the failures whose error records are refused whatever is left out.
        recounted: Whether it was tried again since the topics' partitions had changed.
        written: Whether Kafka has all of it, in a transaction.
        since: Since when nothing gets through, None while it does.
        again_at: When it is worth another try.
    """

    finished: list[Finished] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    books: Counter[Series] = field(default_factory=Counter)
    refused: dict[_Place, list[tuple[Sequence[int], Any]]] = field(default_factory=dict)
    omitted: dict[_Place, dict[int, int]] = field(default_factory=dict)
    stopped: dict[_Place, list[Failure]] = field(default_factory=dict)
    recounted: bool = False
    written: bool = False
    since: float | None = None
    again_at: float = 0.0

    def forget(self, key: PartitionKey) -> None:
        """Nothing of a partition is to be written: it will be read again."""
        records = sum(records_of(each) for each in self.finished if each.key == key)
        BOOKS.count(RELEASED, records, key[0])
        self.finished = [finished for finished in self.finished if finished.key != key]
        if not self.finished:
            self._begin_anew()

    def settle(self) -> None:
        """All of it can be seen."""
        for (name, labels), count in self.books.items():
            BOOKS.count(name, count, *labels)
        self.counted.clear()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.finished = []
        self.books.clear()
        for known in (self.refused, self.omitted, self.stopped):
            known.clear()
        self.recounted = self.written = False
        self.since, self.again_at = None, 0.0

    def put_off(self, error: WriteError) -> None:
        """Try again soon.

        Raises:
            WriteError: It was tried for long enough.
        """
        now = time.monotonic()
        self.since = self.since or now
        if now - self.since > _PATIENCE_SECS:
            raise error
        self.again_at = now + _AGAIN_SECS


def make_kept(_: WriteConfig) -> Kept:
    return Kept()


class TransactFn(ProduceFn):
    """All of a bundle in one transaction. What Kafka refuses makes an end of it, so what is at
    fault is found first, in transactions that are not to be seen, and all the rest is written again
    by what is known then.

    Args:
        config: Where outcomes go.
        halt: Told of partitions that are halted here.
        kept: What is kept from bundle to bundle; None for what this process keeps of the config.
    """

    def __init__(self, config: WriteConfig, halt: HaltPartition, kept: Kept | None = None) -> None:
        super().__init__(config, halt)
        self._own = kept
        assert config.transaction
        self._transaction_config = config.transaction
        self._counters = {
            "responses": self._responses,
            "errors": self._errors,
            "error_records": self._error_records,
            "refusals": self._refusals,
        }
        self._tallies: dict[str, _Tally] = {}
        self._producer: Producer | None = None

    @property
    def _kept(self) -> Kept:
        return self._own or per_process(make_kept, self._config)

    @property
    def _transaction(self) -> Transaction:
        return shared_transaction(self._transaction_config)

    def start_bundle(self) -> None:
        super().start_bundle()
        self._tallies = {
            name: _Tally(counter, self._kept.counted, name)
            for name, counter in self._counters.items()
        }
        self._responses = self._tallies["responses"]
        self._errors = self._tallies["errors"]
        self._error_records = self._tallies["error_records"]
        self._refusals = self._tallies["refusals"]

    def process(self, finished: Finished) -> None:
        self._kept.finished.append(finished)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        kept = self._kept
        if not kept.finished or time.monotonic() < kept.again_at:
            return
        if kept.written:
            kept.put_off(WriteError("transactions do not come to their end, see the log"))
        try:
            while not self._write_all():
                pass
        except WriteError as error:
            self._abort()
            _LOGGER.debug("nothing can be written now", exc_info=True)
            kept.put_off(error)
            return
        kept.written = True
        progress = list(self._progress())
        if not progress:
            # Nothing of it is done: it will be read again.
            self._abort()
            kept.settle()
        yield from progress

    def _write_all(self) -> bool:
        """Write everything. Says whether Kafka takes it, all but what is known to be refused."""
        kept = self._kept
        for tally in self._tallies.values():
            tally.take_back()
        kept.books.clear()
        self._all_written = []
        self._delivered, self._errors_delivered = Delivered(), Delivered()
        halted = per_process(make_halted, self._config)
        for key in {finished.key for finished in kept.finished} & halted:
            kept.forget(key)
        problem: WriteError | None = None
        self._begin(kept.settle)
        try:
            for finished in list(kept.finished):
                self._write(finished)
        except WriteError as error:
            # After the first message that is refused no others are taken.
            problem = error
        self._acknowledge()
        refused = [self._delivered.refused, self._errors_delivered.refused]
        if any(refused):
            self._abort()
            self._learn(*refused)
            return False
        for failure in (*self._delivered.failures, *self._errors_delivered.failures):
            problem = problem or WriteError(f"Kafka has not acknowledged all records: {failure}")
        if problem:
            raise problem
        return True

    def _acknowledge(self) -> None:
        config = self._config
        if config.response_topic:
            response_writer(config).acknowledge()
        elif config.error_topic:
            error_writer(config).acknowledge()

    def _begin(self, then: Callable[[], None] = lambda: None) -> None:
        self._transaction.begin(then)
        if self._producer is not self._transaction.producer:
            self._producer = self._transaction.producer
            self._forget_writers()

    def _abort(self) -> None:
        self._transaction.abort()
        self._producer = None
        self._forget_writers()

    def _book(self, name: str, records: int, *labels: str) -> None:
        self._kept.books[name, labels] += records

    def _write(self, finished: Finished) -> None:
        """Write what became of a batch; what is not written of it will be read again."""
        books = self._kept.books
        before = books.total()
        if finished.key not in per_process(make_halted, self._config):
            self._write_parts(finished)
        self._book(RELEASED, records_of(finished) - books.total() + before, finished.topic)

    def _write_parts(self, finished: Finished) -> None:
        place = (finished.lane_key, finished.start)
        kept = self._kept
        written = Written(
            finished.key,
            finished.start,
            _whole(finished),
            finished.lane,
            halt_name(finished),
            list(kept.refused.get(place, ())),
        )
        self._all_written.append(written)
        for failure in kept.stopped.get(place, ())[:1]:
            self._stop_at(written, failure)
        refused = {offset for offsets, _ in written.refused for offset in offsets}
        self._see_to_responses(written)
        for part in finished.parts:
            if isinstance(part, Responses):
                chosen = [o < written.next_offset and o not in refused for o in part.offsets]
                if any(chosen):
                    self._write_responses(written, _responses_where(part, chosen))
            elif rest := _failure_where(
                part, [o < written.next_offset for o in part.records.offsets]
            ):
                self._write_failure(written, rest)

    def _write_failure(self, written: Written, failure: Failure, omitted: int = 0) -> None:
        place = ((*written.key, written.lane), written.start)
        known = self._kept.omitted.get(place, {})
        levels = [known.get(offset, omitted) for offset in failure.records.offsets]
        for level in sorted({*levels}):
            if part := _failure_where(failure, [each == level for each in levels]):
                super()._write_failure(written, part, level)

    def _learn(self, responses: list[Refused], errors: list[Refused]) -> None:
        """Find out what is at fault of the messages that were refused, or shared a request with one
        that is."""
        kept, config = self._kept, self._config
        for each in (*responses, *errors):
            if each.error.code() in OF_THE_COUNT:
                if kept.recounted:
                    raise WriteError(f"topics cannot be written: {each.error.str()}")
                kept.recounted = True
                return
        found = False
        for refused in self._at_fault(responses, response_writer):
            found = True
            written, answered = refused.owner
            place = ((*written.key, written.lane), written.start)
            kept.refused.setdefault(place, []).append((answered[refused.key], refused.error))
        for refused in self._at_fault(errors, error_writer):
            found = True
            self._leave_out(refused)
        if not found and not self._transaction.write_smaller():
            raise WriteError(
                f"topics {config.response_topic}, {config.error_topic} cannot be written: "
                f"{(responses + errors)[0].error.str()}"
            )

    def _leave_out(self, refused: Refused) -> None:
        """An error record is refused: next time with less in it, or not at all."""
        TALLY.count(DELIVERY_ERRORS, 1)
        owner: Owner = refused.owner
        failure, written = owner.failure, owner.written
        place = ((*written.key, written.lane), written.start)
        if owner.omitted < WITHOUT_ORIGINAL:
            levels = self._kept.omitted.setdefault(place, {})
            levels |= dict.fromkeys(failure.records.offsets, owner.omitted + 1)
            return
        why = f"topic {self._config.error_topic} refuses the error record: {refused.error.str()}"
        stopped = self._kept.stopped.setdefault(place, [])
        stopped.append(replace(failure, message=why, error_type=refused.error.name()))
        stopped.sort(key=lambda each: each.records.offsets[0])

    def _at_fault(
        self, refused: list[Refused], writer: Callable[[WriteConfig], TopicWriter]
    ) -> Iterator[Refused]:
        parts = [refused] if refused else []
        while parts:
            part = parts.pop()
            delivered = Delivered()
            self._begin()
            try:
                for each in part:
                    writer(self._config).write(
                        each.source_partition,
                        each.key,
                        each.value,
                        each.headers,
                        delivered,
                        each,
                    )
            except WriteError:
                _LOGGER.debug("no more is taken after a message that is refused")
            writer(self._config).acknowledge()
            self._abort()
            again = delivered.refused
            if not again and delivered.failures:
                raise WriteError(f"Kafka has not acknowledged all: {delivered.failures[0]}")
            if len(again) == 1:
                yield again[0].owner
                if rest := [each for each in part if each is not again[0].owner]:
                    parts.append(rest)
            elif again:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]


def _whole(finished: Finished) -> int:
    """How far a batch is done without a response that answers records on both sides of that."""
    bound = finished.next_offset
    for part in reversed(finished.parts):
        if isinstance(part, Responses) and part.body is not None:
            first, last = part.offsets[0], part.offsets[-1]
            bound = first if first < bound <= last else bound
    return bound


def _responses_where(part: Responses, chosen: Sequence[bool]) -> Responses:
    if all(chosen):
        return part
    offsets = list(compress(part.offsets, chosen))
    results = None if part.results is None else list(compress(part.results, chosen))
    return replace(part, offsets=offsets, results=results)


def _failure_where(failure: Failure, chosen: Sequence[bool]) -> Failure | None:
    if all(chosen):
        return failure
    if not any(chosen):
        return None
    entries = list(compress(failure.entries, chosen)) if failure.entries else ()
    return replace(failure, records=failure.records.where(chosen), entries=entries)
