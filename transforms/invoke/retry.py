"""Retry: one batch -> the invocations it takes, in turn, and what became of its records.

Pure: `Delivery.steps` is a generator that says what to do next (`Call` a part of the batch, or
`Wait`) and is sent each call's outcome. Who calls, on which thread and with which client, is the
business of `transforms.invoke.invoker`. The rules, by the outcome of a call:

==============  ==========================================================================
SUCCESS         the records are answered; on to the next part
PARTIAL         the records that did not fail are answered: those before the first one named,
                or, with `named`, all that are not named. If the one at the head is among them,
                the rest has 1 + `max_retries` calls of its own; else it is called again, up to
                `max_retries` more times. Then the record at its head failed, and the named
                ones right behind it that were tried as often. With bisect the record at the
                head is at once called alone, then the rest
FUNCTION_ERROR  with bisect and more than one record: split in halves at once, left half to its
                end first; else up to `max_retries` more calls, then the records failed
POISON          never repeated; split as above, or failed
TOO_LARGE       always split, by size; a single record failed
THROTTLED       wait as told, or back off; counts in no limit
TRANSIENT       back off, up to `max_transient_retries` more calls, then the records failed
CONFIG          nothing of this batch is finished; the run has to end
==============  ==========================================================================

Before each call, records older than `max_record_age_secs` are taken out as failed. A failed record
goes on to the error output, or, with `halt`, stops its partition there. Where an outcome is marked
`spared` (`transforms.invoke.breaker`), a batch is split as above, but no record fails: back off and
call again, which counts in no limit.

With windows (`transforms.invoke.window`) a batch is divided where another one begins. The one
before is closed first, by a call without records that is repeated until it succeeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

from transforms.conditions import (
    AGE_EXCEEDED,
    INVALID_CONTENT,
    INVALID_REPLY,
    RETRIES_EXHAUSTED,
    SIZE_EXCEEDED,
    SKIPPED,
)
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.window import LaneWindow, Turn
from transforms.records import EARLY, NO_TIMESTAMP, Batch, Failure, Finished, Responses

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Attributes:
        max_retries: Calls after the first one that failed in the function; -1 for no limit.
        max_transient_retries: The same for failures around the function; -1 for no limit.
        max_record_age_secs: Age by record timestamp above which a record fails; -1 for no limit.
        bisect: Split a batch in which the function failed, until the bad record stands alone.
        named: After a partial failure only the records that the function named are called
            again; else all from the first one named on.
        halt: A failed record stops its partition instead of going to the error output.
        wait_initial_secs: Upper bound of the first wait; doubles with each repeat.
        wait_throttled_secs: The same for throttles that do not say how long to wait.
        wait_max_secs: Upper bound of any wait that Lambda did not ask for.
    """

    max_retries: int = 0
    max_transient_retries: int = -1
    max_record_age_secs: int = -1
    bisect: bool = False
    named: bool = False
    halt: bool = True
    wait_initial_secs: float = 0.2
    wait_throttled_secs: float = 1.0
    wait_max_secs: float = 20.0

    def backoff_secs(self, repeats: int, initial_secs: float, random: Callable[[], float]) -> float:
        """Exponential backoff with full jitter: anything from 0 to the doubled bound."""
        return random() * min(self.wait_max_secs, initial_secs * 2.0 ** min(repeats, 60))


def allows(limit: int, repeats: int) -> bool:
    """Whether one more repeat is within the limit; -1 is no limit."""
    return limit < 0 or repeats < limit


@dataclass(frozen=True, slots=True)
class Call:
    """Invoke the function with the batch's records from index `low` to `high`, exclusive.

    Attributes:
        low: First record's index in the batch.
        high: One behind the last record's index.
        attempt: 1 for the first call of these records as a batch, or as what is left of one;
            throttled calls do not count.
        reason: Error type of the last call that held these records, empty if there was none.
        only: The records' indexes, if they are not all from `low` to `high`.
        turn: What it says of its window, None without windows. One that ends it has no records.
    """

    low: int
    high: int
    attempt: int
    reason: str
    only: tuple[int, ...] = ()
    turn: Turn | None = None

    def __len__(self) -> int:
        return len(self.only) or self.high - self.low

    def pick(self, column: Sequence[T]) -> Sequence[T]:
        """What a column of the batch has for the call's records."""
        return [column[index] for index in self.only] or column[self.low : self.high]

    def span(self, offsets: Sequence[int]) -> tuple[int, int]:
        """The first and the last of a batch's numbers that are the call's; if it has no records,
        those of its window."""
        if self.turn and self.turn.closes:
            return self.turn.first, self.turn.last
        return offsets[self.low], offsets[self.high - 1]


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for this batch and its partition for so many seconds."""

    secs: float


Step = Call | Wait


@dataclass(slots=True)
class Delivery:
    """One batch on its way: the steps to take, and what is finished so far.

    Attributes:
        batch: The batch.
        policy: When to repeat, split, and give up.
        clock: Seconds since the epoch, for the records' age.
        random: Uniform in [0, 1), for the jitter.
        window: The lane's windows; None without. It goes from one delivery to the next.
        finished: What became of the records so far; complete once `steps` has ended.
        config_error: Set if the function cannot be invoked as configured.
    """

    batch: Batch
    policy: RetryPolicy
    clock: Callable[[], float]
    random: Callable[[], float]
    window: LaneWindow | None = None
    finished: Finished = field(init=False)
    config_error: Outcome | None = None
    _at: int = field(init=False, default=0)
    _windows: Sequence[int] = field(init=False, default=())

    def __post_init__(self) -> None:
        batch = self.batch
        self.finished = Finished(
            batch.topic, batch.partition, batch.start, batch.start, lane=batch.lane
        )

    def steps(self) -> Generator[Step, Outcome | None, None]:
        """Say what to do next; each `Call` wants its outcome sent back, `Wait` nothing.

        A `Call` that gets no outcome was not made; the next step says what to do now.

        May be abandoned at any step: `finished` then holds, and its `next_offset` covers, just
        the records that are done.
        """
        batch = self.batch
        if batch.rejection:
            self._fail(range(len(batch)), 0, batch.rejection.condition, _rejected(batch))
            return
        if batch.closes:
            yield from self._close_window(batch.closes == EARLY)
            return
        parts: list[tuple[Sequence[int], str]] = []
        if self.window:
            self._windows = self._divide(self.window)
            runs = groupby(range(len(batch)), key=lambda index: self._windows[index])
            parts += [(tuple(indexes), "") for _, indexes in runs]
            parts.reverse()
        else:
            parts.append((range(len(batch)), ""))
        while parts:
            ended = yield from self._part(*parts.pop(), parts)
            if not ended:
                return
        self._answer(len(batch))
        # An empty batch, or a range that ends in offsets without a record.
        self.finished.next_offset = batch.next_offset
        if self.window and self.window.is_full:
            yield from self._close_window(early=True)

    @property
    def head_offset(self) -> int:
        """The offset of the first record that is not done."""
        return self.batch.records.offsets[self._at]

    def stop(self, error_type: str, message: str, attempts: int) -> None:
        """Halt in front of that record, between two steps, since somebody says so."""
        self.finished.halted = Failure(
            records=self.batch.records.slice(self._at, self._at + 1),
            entries=self.batch.entries[self._at : self._at + 1],
            condition=SKIPPED,
            error_type=error_type,
            message=message,
            attempts=attempts,
            status_code=0,
            function_error=error_type,
            frame=self.batch.frame,
        )

    def _part(
        self, indexes: Sequence[int], reason: str, parts: list[tuple[Sequence[int], str]]
    ) -> Generator[Step, Outcome | None, bool]:
        """Work on one part until it is done or split; False if the batch ends here.

        Args:
            indexes: The part's records, rising; a range unless some of them were answered.
            reason: Error type of the last call that held them.
            parts: What follows, the next one last.
        """
        policy, stats = self.policy, self.finished.stats
        attempts = transients = throttles = spared = 0
        # By record: the calls that named it, and those that failed as a whole with it at the head;
        # those since the head was last done.
        failures: Counter[int] = Counter()
        while indexes:
            # What is left out in front was answered when its neighbours were named.
            self._answer(indexes[0])
            first, last = self._too_old(indexes)
            if first < last:
                if first:
                    parts.append((indexes[first:], reason))
                    indexes = indexes[:first]
                else:
                    old = indexes[:last]
                    if not self._fail(old, attempts, AGE_EXCEEDED, self._age_outcome()):
                        return False
                    indexes = indexes[last:]
                    if indexes:
                        failures[indexes[0]] = max(failures[indexes[0]], failures[old[0]])
                continue

            call = _call(indexes, attempts + 1, reason)
            if self.window:
                start_ms = self._windows[indexes[0]]
                if not (yield from self._leave_window(self.window, start_ms)):
                    return False
                call = replace(call, turn=self._turn(self.window, start_ms, call))
            outcome = yield call
            if outcome is None:
                continue
            if self.window and self._is_ahead(outcome):
                assert outcome.state is not None
                self.window.keep(outcome.state)
            stats.invocations += 1
            attempts += outcome.kind is not Kind.THROTTLED
            reason = outcome.error_type
            splits = outcome.kind is not Kind.TRANSIENT and policy.bisect and len(indexes) > 1
            if outcome.spared and not splits:
                stats.retries += 1
                wait = self._back_off(spared)
                spared += 1
                yield Wait(max(wait.secs, outcome.retry_after_secs or 0.0))
                continue
            match outcome.kind:
                case Kind.SUCCESS:
                    self._answer(indexes[-1] + 1, outcome)
                    return True
                case Kind.CONFIG:
                    self.config_error = outcome
                    return False
                case Kind.THROTTLED:
                    stats.throttles += 1
                    backoff = policy.backoff_secs(
                        throttles, policy.wait_throttled_secs, self.random
                    )
                    throttles += 1
                    yield Wait(max(backoff, outcome.retry_after_secs or 0.0))
                    continue
                case Kind.TRANSIENT:
                    if not allows(policy.max_transient_retries, transients):
                        return self._fail(indexes, attempts, RETRIES_EXHAUSTED, outcome)
                    stats.retries += 1
                    wait = self._back_off(transients)
                    transients += 1
                    yield Wait(max(wait.secs, outcome.retry_after_secs or 0.0))
                    continue
                case Kind.TOO_LARGE:
                    if len(indexes) == 1:
                        return self._fail(indexes, attempts, SIZE_EXCEEDED, outcome)
                    middle = self._middle_by_size(indexes)
                case Kind.PARTIAL:
                    was_alone = len(indexes) == 1
                    failed = [indexes[place] for place in outcome.failed]
                    if outcome.failed[0]:
                        # As AWS does it: the call that named the new head is none of its own.
                        self._answer(failed[0])
                        failures.clear()
                        attempts = transients = throttles = 0
                    else:
                        failures.update(failed)
                    indexes = failed if policy.named else indexes[outcome.failed[0] :]
                    if policy.bisect and not was_alone:
                        if len(indexes) > 1:
                            stats.bisections += 1
                            parts.append((indexes[1:], reason))
                        parts.append((indexes[:1], reason))
                        return True
                    spent = self._spent(indexes, failed, failures)
                    if spent:
                        given_up, indexes = indexes[:spent], indexes[spent:]
                        if not self._fail(given_up, attempts, RETRIES_EXHAUSTED, outcome):
                            return False
                        if indexes:
                            attempts, transients, throttles = failures[indexes[0]], 0, 0
                    if indexes and indexes[0] in failed:
                        stats.retries += 1
                        yield self._back_off(max(0, failures[indexes[0]] - 1))
                    continue
                case Kind.FUNCTION_ERROR if not policy.bisect or len(indexes) == 1:
                    repeats = failures[indexes[0]]
                    failures[indexes[0]] += 1
                    if not allows(policy.max_retries, repeats):
                        invalid = outcome.error_type == INVALID_REPLY
                        condition = INVALID_REPLY if invalid else RETRIES_EXHAUSTED
                        return self._fail(indexes, attempts, condition, outcome)
                    stats.retries += 1
                    yield self._back_off(repeats)
                    continue
                case Kind.POISON if not policy.bisect or len(indexes) == 1:
                    return self._fail(indexes, attempts, INVALID_CONTENT, outcome)
                case _:
                    middle = len(indexes) // 2
            stats.bisections += 1
            parts.append((indexes[middle:], reason))
            parts.append((indexes[:middle], reason))
            return True
        return True

    def _divide(self, window: LaneWindow) -> list[int]:
        """By record, where its window begins."""
        clock_ms, least_ms, windows = round(self.clock() * 1000), -1, []
        for timestamp_ms in self.batch.records.timestamps:
            least_ms = window.of(timestamp_ms, least_ms, clock_ms)
            windows.append(least_ms)
        return windows

    def _is_ahead(self, outcome: Outcome) -> bool:
        """Whether the state that a reply has is one behind records that it has answered: else they
        would be in it again when they are repeated."""
        if outcome.kind is Kind.PARTIAL:
            return outcome.failed[0] > 0 or self.policy.named
        return outcome.kind is Kind.SUCCESS

    def _leave_window(
        self, window: LaneWindow, start_ms: int
    ) -> Generator[Step, Outcome | None, bool]:
        """Close the open window if the next records are in another one, or its state is too large;
        False if the batch ends here."""
        if not window.is_done_before(start_ms):
            return True
        return (yield from self._close_window(early=window.is_in(start_ms)))

    def _turn(self, window: LaneWindow, start_ms: int, call: Call) -> Turn:
        numbers = call.span(self.batch.records.offsets)
        clock_ms = round(self.clock() * 1000)
        return window.sends(start_ms, *numbers, self.finished.next_offset, clock_ms)

    def _close_window(self, early: bool) -> Generator[Step, Outcome | None, bool]:
        """Call until the open window has ended; False if the batch ends here."""
        window, stats, policy = self.window, self.finished.stats, self.policy
        assert window
        attempts = repeats = throttles = 0
        reason = ""
        while window.is_open:
            turn = window.closing(early)
            outcome = yield Call(self._at, self._at, attempts + 1, reason, turn=turn)
            if outcome is None:
                continue
            stats.invocations += 1
            attempts += outcome.kind is not Kind.THROTTLED
            reason = outcome.error_type
            if outcome.kind is Kind.SUCCESS:
                break
            if outcome.kind is Kind.CONFIG:
                self.config_error = outcome
                return False
            if outcome.kind is Kind.THROTTLED:
                stats.throttles += 1
                secs = policy.backoff_secs(throttles, policy.wait_throttled_secs, self.random)
                throttles += 1
            else:
                stats.retries += 1
                secs = self._back_off(repeats).secs
                repeats += 1
            yield Wait(max(secs, outcome.retry_after_secs or 0.0))
        window.close(early)
        return True

    def _back_off(self, repeats: int) -> Wait:
        policy = self.policy
        return Wait(policy.backoff_secs(repeats, policy.wait_initial_secs, self.random))

    def _spent(
        self, indexes: Sequence[int], failed: Iterable[int], failures: Mapping[int, int]
    ) -> int:
        """How many of the records from the head on have just failed with no repeat left."""
        failed, limit = set(failed), self.policy.max_retries
        for count, index in enumerate(indexes):
            if index not in failed or allows(limit, failures[index] - 1):
                return count
        return len(indexes)

    def _answer(self, high: int, outcome: Outcome | None = None) -> None:
        """The records up to index `high` that are in no part of `finished` yet are answered."""
        if self._at < high:
            offsets = self.batch.records.offsets[self._at : high]
            results, body = (outcome.results, outcome.body) if outcome else (None, None)
            trace = outcome.trace if outcome else None
            self.finished.parts.append(Responses(offsets, results, body, trace))
            self._done(high)

    def _done(self, high: int) -> None:
        self._at = high
        offsets = self.batch.records.offsets
        if high == len(offsets):
            self.finished.next_offset = self.batch.next_offset
        elif high:
            self.finished.next_offset = offsets[high - 1] + 1

    def _fail(
        self, indexes: Sequence[int], attempts: int, condition: str, outcome: Outcome
    ) -> bool:
        """Give up on some records; False if that stops the partition."""
        for low, high in _runs(indexes):
            self._answer(low)
            failure = Failure(
                records=self.batch.records.slice(low, high),
                entries=self.batch.entries[low:high],
                condition=condition,
                error_type=outcome.error_type,
                message=outcome.message,
                attempts=attempts,
                status_code=outcome.status_code,
                function_error=outcome.function_error or outcome.error_type,
                log_result=outcome.log_result,
                payload=outcome.payload,
                executed_version=outcome.executed_version,
                request_id=outcome.request_id,
                frame=self.batch.frame,
                trace=outcome.trace,
            )
            if self.policy.halt:
                self.finished.halted = failure
                return False
            self.finished.parts.append(failure)
            self._done(high)
        return True

    def _too_old(self, indexes: Sequence[int]) -> tuple[int, int]:
        """The first run of records that are too old, as places; empty if there is none."""
        count = len(indexes)
        if self.policy.max_record_age_secs < 0:
            return count, count
        oldest_ms = (self.clock() - self.policy.max_record_age_secs) * 1000
        timestamps = self.batch.records.timestamps

        def old(place: int) -> bool:
            return NO_TIMESTAMP != timestamps[indexes[place]] < oldest_ms

        first = next((place for place in range(count) if old(place)), count)
        last = next((place for place in range(first, count) if not old(place)), count)
        return first, last

    def _age_outcome(self) -> Outcome:
        limit = self.policy.max_record_age_secs
        return Outcome(
            Kind.FUNCTION_ERROR,
            error_type=AGE_EXCEEDED,
            message=f"older than --max_record_age_secs={limit} when its turn came",
        )

    def _middle_by_size(self, indexes: Sequence[int]) -> int:
        """The place that halves the bytes, with at least one record on each side."""
        sizes = [len(self.batch.entries[index]) for index in indexes]
        half, size = sum(sizes) / 2, 0
        for place in range(len(sizes) - 1):
            size += sizes[place]
            if size >= half:
                return place + 1
        return len(sizes) - 1


def _call(indexes: Sequence[int], attempt: int, reason: str) -> Call:
    low, high = indexes[0], indexes[-1] + 1
    only = tuple(indexes) if len(indexes) < high - low else ()
    return Call(low, high, attempt, reason, only)


def _runs(indexes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising indexes as ranges without a hole."""
    low = 0
    for high in range(1, len(indexes) + 1):
        if high == len(indexes) or indexes[high] > indexes[high - 1] + 1:
            yield indexes[low], indexes[high - 1] + 1
            low = high


def _rejected(batch: Batch) -> Outcome:
    assert batch.rejection
    return Outcome(
        Kind.POISON, error_type=batch.rejection.error_type, message=batch.rejection.message
    )
