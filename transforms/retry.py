"""Retry: one batch -> the invocations it takes, in turn, and what became of its records.

Pure: `Delivery.steps` is a generator that says what to do next (`Call` a part of the batch, or
`Wait`) and is sent each call's outcome. Who calls, on which thread and with which client, is the
business of `transforms.invoker`. The rules, by the outcome of a call:

==============  ==========================================================================
SUCCESS         the records are answered; on to the next part
FUNCTION_ERROR  with bisect and more than one record: split in halves at once, left half to its
                end first; else up to `max_retries` more calls, then the records failed
POISON          never repeated; split as above, or failed
TOO_LARGE       always split, by size; a single record failed
THROTTLED       wait as told, or back off; counts in no limit
TRANSIENT       back off, up to `max_transient_retries` more calls, then the records failed
CONFIG          nothing of this batch is finished; the run has to end
==============  ==========================================================================

Before each call, records older than `max_record_age_secs` are taken out as failed. A failed record
goes on to the error output, or, with `halt`, stops its partition there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from transforms.outcome import Kind, Outcome
from transforms.records import NO_TIMESTAMP, Batch, Failure, Finished, Responses

RETRIES_EXHAUSTED = "RetryAttemptsExhausted"
AGE_EXCEEDED = "MaximumRecordAgeExceeded"
SIZE_EXCEEDED = "MaximumPayloadSizeExceeded"
INVALID_REPLY = "InvalidReply"
INVALID_CONTENT = "InvalidRequestContent"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Attributes:
        max_retries: Calls after the first one that failed in the function; -1 for no limit.
        max_transient_retries: The same for failures around the function; -1 for no limit.
        max_record_age_secs: Age by record timestamp above which a record fails; -1 for no limit.
        bisect: Split a batch in which the function failed, until the bad record stands alone.
        halt: A failed record stops its partition instead of going to the error output.
        wait_initial_secs: Upper bound of the first wait; doubles with each repeat.
        wait_throttled_secs: The same for throttles that do not say how long to wait.
        wait_max_secs: Upper bound of any wait that Lambda did not ask for.
    """

    max_retries: int = 0
    max_transient_retries: int = -1
    max_record_age_secs: int = -1
    bisect: bool = False
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
        attempt: 1 for the first call of exactly these records; throttled calls do not count.
        reason: Error type of the call before, empty for the first.
    """

    low: int
    high: int
    attempt: int
    reason: str


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
        finished: What became of the records so far; complete once `steps` has ended.
        config_error: Set if the function cannot be invoked as configured.
    """

    batch: Batch
    policy: RetryPolicy
    clock: Callable[[], float]
    random: Callable[[], float]
    finished: Finished = field(init=False)
    config_error: Outcome | None = None

    def __post_init__(self) -> None:
        batch = self.batch
        self.finished = Finished(batch.topic, batch.partition, batch.start, batch.start)

    def steps(self) -> Generator[Step, Outcome, None]:
        """Say what to do next; each `Call` wants its outcome sent back, `Wait` nothing.

        May be abandoned at any step: `finished` then holds, and its `next_offset` covers, just
        the records that are done.
        """
        batch = self.batch
        if batch.rejection:
            self._fail(0, len(batch), 0, batch.rejection.condition, _rejected(batch))
            return
        parts = [(0, len(batch))]
        while parts:
            low, high = parts.pop()
            ended = yield from self._part(low, high, parts)
            if not ended:
                return
        # An empty batch, or a range that ends in offsets without a record.
        self.finished.next_offset = batch.next_offset

    def _part(
        self, low: int, high: int, parts: list[tuple[int, int]]
    ) -> Generator[Step, Outcome, bool]:
        """Work on one part until it is done or split; False if the batch ends here."""
        policy, stats = self.policy, self.finished.stats
        attempts = function_errors = transients = throttles = 0
        reason = ""
        while low < high:
            old_low, old_high = self._too_old(low, high)
            if old_low < old_high:
                if old_low > low:
                    parts.append((old_low, high))
                    high = old_low
                else:
                    if not self._fail(low, old_high, attempts, AGE_EXCEEDED, self._age_outcome()):
                        return False
                    low = old_high
                continue

            outcome = yield Call(low, high, attempts + 1, reason)
            stats.invocations += 1
            attempts += outcome.kind is not Kind.THROTTLED
            reason = outcome.error_type
            match outcome.kind:
                case Kind.SUCCESS:
                    offsets = self.batch.records.offsets[low:high]
                    self.finished.parts.append(Responses(offsets, outcome.results))
                    self._done(high)
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
                        return self._fail(low, high, attempts, RETRIES_EXHAUSTED, outcome)
                    stats.retries += 1
                    wait = policy.backoff_secs(transients, policy.wait_initial_secs, self.random)
                    transients += 1
                    yield Wait(max(wait, outcome.retry_after_secs or 0.0))
                    continue
                case Kind.TOO_LARGE:
                    if high - low == 1:
                        return self._fail(low, high, attempts, SIZE_EXCEEDED, outcome)
                    middle = self._middle_by_size(low, high)
                case Kind.FUNCTION_ERROR if not policy.bisect or high - low == 1:
                    if not allows(policy.max_retries, function_errors):
                        invalid = outcome.error_type == INVALID_REPLY
                        condition = INVALID_REPLY if invalid else RETRIES_EXHAUSTED
                        return self._fail(low, high, attempts, condition, outcome)
                    stats.retries += 1
                    wait = policy.backoff_secs(
                        function_errors, policy.wait_initial_secs, self.random
                    )
                    function_errors += 1
                    yield Wait(wait)
                    continue
                case Kind.POISON if not policy.bisect or high - low == 1:
                    return self._fail(low, high, attempts, INVALID_CONTENT, outcome)
                case _:
                    middle = (low + high) // 2
            stats.bisections += 1
            parts.append((middle, high))
            parts.append((low, middle))
            return True
        return True

    def _done(self, high: int) -> None:
        offsets = self.batch.records.offsets
        # Up to the next record rather than past the last one: a gap holds nothing to wait for.
        self.finished.next_offset = offsets[high] if high < len(offsets) else self.batch.next_offset

    def _fail(self, low: int, high: int, attempts: int, condition: str, outcome: Outcome) -> bool:
        """Give up on some records; False if that stops the partition."""
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
        )
        if self.policy.halt:
            self.finished.halted = failure
            return False
        self.finished.parts.append(failure)
        self._done(high)
        return True

    def _too_old(self, low: int, high: int) -> tuple[int, int]:
        """The first run of records that are too old, as indexes; empty if there is none."""
        if self.policy.max_record_age_secs < 0:
            return high, high
        oldest_ms = (self.clock() - self.policy.max_record_age_secs) * 1000
        timestamps = self.batch.records.timestamps

        def old(index: int) -> bool:
            return NO_TIMESTAMP != timestamps[index] < oldest_ms

        first = next((index for index in range(low, high) if old(index)), high)
        last = next((index for index in range(first, high) if not old(index)), high)
        return first, last

    def _age_outcome(self) -> Outcome:
        limit = self.policy.max_record_age_secs
        return Outcome(
            Kind.FUNCTION_ERROR,
            error_type=AGE_EXCEEDED,
            message=f"older than --max_record_age_secs={limit} when its turn came",
        )

    def _middle_by_size(self, low: int, high: int) -> int:
        """The index that halves the bytes, with at least one record on each side."""
        entries = self.batch.entries
        half = sum(len(entry) for entry in entries[low:high]) / 2
        size = 0
        for index in range(low, high - 1):
            size += len(entries[index])
            if size >= half:
                return index + 1
        return high - 1


def _rejected(batch: Batch) -> Outcome:
    assert batch.rejection
    return Outcome(
        Kind.POISON, error_type=batch.rejection.error_type, message=batch.rejection.message
    )
