"""Invoker: an ordered asynchronous call. One per worker process, shared by all DoFn instances.

Each lane of a partition has a queue that is worked strictly in order, one call at a time; different
lanes and partitions run side by side, as many as `transforms.invoke.concurrency` allows, and take
turns if there are more. A lane that waits (backoff, throttle, open breaker) holds no thread. While
a lane's call runs, the thread that made it prepares the next one. It sends that as soon as the
reply says that the function succeeded, and books the batch while the next one is under way
(docs/adr/0002-ordered-asynchronous-call.md). Knows neither Beam nor boto3: the call is injected.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any

from transforms.conditions import AGE_EXCEEDED
from transforms.invoke.breaker import Begun, Breaker, BreakerPolicy
from transforms.invoke.concurrency import ConcurrencyLimit
from transforms.invoke.failures import (
    BACKOFF,
    BREAKER,
    PROCESSING,
    REPEATING,
    THROTTLE,
    Failed,
    FailureLog,
    Seen,
    Stuck,
    Trouble,
    failed,
    failure_line,
    given_up,
    halt_facts,
    halt_log_line,
    recovery_line,
)
from transforms.invoke.outcome import Kind, Outcome
from transforms.invoke.retry import Call, Delivery, RetryPolicy, Step, Wait
from transforms.invoke.window import LaneWindow
from transforms.records import (
    NO_TIMESTAMP,
    Batch,
    CallStats,
    Finished,
    LaneKey,
    PartitionKey,
    Records,
    Responses,
)
from transforms.tally import (
    BATCH_BYTES,
    BATCH_RECORDS,
    BATCH_WAIT,
    BOOKS,
    DURATION,
    FAILED_INVOKE,
    INVOCATIONS,
    INVOKED,
    ITERATOR_AGE,
    LAST_SUCCESS,
    RELEASED,
    RETRIES,
    TALLY,
    Tallied,
)

_LOGGER = logging.getLogger(__name__)

Request = Any
"""A call that is ready to be sent, as the function that prepares it makes it."""

PrepareFunction = Callable[[Batch, Call], Request | None]
"""Gets a call ready to be sent, ahead of its turn; None if it cannot be, and it may raise: then the
call is made without. Calls may be prepared and never made."""

CallFunction = Callable[[Batch, Call, Request | None, Callable[[], None]], Outcome]
"""Makes a call, by what was prepared for it if there is something. What it is given last it runs
once, if it can, between sending and waiting for the reply."""

_Later = deque[Callable[[], None]]
"""What a thread books and counts of its last call while the next one is under way."""

_Begun = tuple[int, Begun]
"""What limit and breaker need to know of a call when it has ended."""

# A prepared request is signed, and a signature is good for some minutes only.
_PREPARED_SECS = 60.0
# A longer wait than any of ours is told: what was asked for, nobody sees otherwise.
_TOLD_SECS = 30.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The first call of a batch, ready to be sent."""

    batch: Batch
    request: Request
    since: tuple[float, float]
    """By the clock, and by the timer, which stands still while a machine is suspended."""


@dataclass(frozen=True, slots=True)
class _HandedOver:
    """A batch that has not ended.

    Attributes:
        batch: The batch.
        since: When it was handed over, by the timer.
        bytes: What it holds: records as Kafka had them, headers included, and their entries.
    """

    batch: Batch
    since: float
    bytes: int


@dataclass(slots=True, eq=False)
class _Partition:
    """The lanes of a partition, which stop together."""

    lanes: dict[int, _Queue] = field(default_factory=dict)
    halted: Finished | None = None
    halted_at: float = 0.0
    retired: bool = False

    @property
    def stopped(self) -> bool:
        """Whether no further call may begin."""
        return self.retired or self.halted is not None


@dataclass(slots=True, eq=False)
class _Queue:
    """One lane: what is waiting, what is being worked on, and where it stands."""

    key: LaneKey
    partition: _Partition
    batches: deque[_HandedOver] = field(default_factory=deque)
    head: _HandedOver | None = None
    """The one that is being worked on."""
    delivery: Delivery | None = None
    steps: Generator[Step, Outcome | None, None] | None = None
    prepared: _Prepared | None = None
    ahead: bool = False
    """Whether the first of those that wait is being called already, and the head only booked."""
    unbooked_bytes: int = 0
    """What the head's reply holds, in that case."""
    scheduled: bool = False
    abandoned: bool = False
    records: int = 0
    bytes: int = 0
    waiting: bool = False
    due: float | None = None
    called: int = 0
    failed: Failed | None = None
    counted: CallStats = field(default_factory=CallStats)
    window: LaneWindow | None = None

    def drop(self) -> None:
        """Forget the batches that have not begun."""
        ahead = [self.batches.popleft()] if self.ahead else []
        BOOKS.count(RELEASED, sum(len(each.batch) for each in self.batches), self.key[0])
        self.batches = deque(ahead)
        begun = [self.head, *ahead] if self.head else ahead
        self.records = sum(len(each.batch) for each in begun)
        self.bytes = sum(each.bytes for each in begun)


@dataclass(frozen=True, slots=True)
class QueueView:
    """A partition's queues, taken together, as the outside may see them.

    Attributes:
        batches: Batches not yet finished, those being worked on included.
        records: Records in them.
        bytes: Bytes they hold: records as Kafka had them, headers included, and their entries.
        halted: Whether a failure stopped the partition.
        waiting: Whether one of its lanes is backing off right now, or waits for the breaker.
        stuck: Whether one of its lanes is, or repeats what has failed.
        finished_bytes: Bytes of what has finished and was not collected.
        busy: Lanes with batches that are not finished.
    """

    batches: int = 0
    records: int = 0
    bytes: int = 0
    halted: bool = False
    waiting: bool = False
    stuck: bool = False
    finished_bytes: int = 0
    busy: frozenset[int] = frozenset()


def always(_: LaneKey) -> bool:
    """Every key belongs to a process that has all of them."""
    return True


class Invoker:
    """Works the queues of all partitions of a process.

    Args:
        prepare: Gets a call ready to be sent.
        call: Invokes the function with a part of a batch and classifies what came back; any
            exception that this raises is taken for a bug and ends the run.
        policy: When to repeat, split and give up.
        max_concurrency: Calls at once, at most.
        clock: Seconds since the epoch, for record age.
        random: Uniform in [0, 1), for jitter.
        timer: Monotonic seconds, for waits.
        min_concurrency: Calls at once that are allowed however often they are throttled.
        breaker: When to stop calling for a while instead of giving records up.
        may_begin: Asked before each call whether its lane still belongs to this process;
            if not, its queue is abandoned.
        max_finished_bytes: No call begins while more than that has finished and was not
            collected.
        ended: Told of each batch that nothing more is done for, and what became of it.
        window_ms: How long tumbling windows last; 0 for none.
    """

    def __init__(
        self,
        prepare: PrepareFunction,
        call: CallFunction,
        policy: RetryPolicy,
        max_concurrency: int,
        clock: Callable[[], float],
        random: Callable[[], float],
        timer: Callable[[], float] = monotonic,
        min_concurrency: int = 1,
        breaker: BreakerPolicy = BreakerPolicy(),
        may_begin: Callable[[LaneKey], bool] = always,
        max_finished_bytes: int = 64 * 2**20,
        ended: Callable[[Batch, Finished], None] | None = None,
        window_ms: int = 0,
    ) -> None:
        self._window_ms = window_ms
        self._tell_ended = ended
        self._call = call
        self._prepare = prepare
        self._policy = policy
        self._max_concurrency = max_concurrency
        self._limit = ConcurrencyLimit(min_concurrency, max_concurrency)
        self._breaker_policy = breaker
        self._breaker = Breaker(breaker, policy.halt)
        self._clock = clock
        self._random = random
        self._timer = timer
        self._may_begin = may_begin
        self._max_finished_bytes = max_finished_bytes
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # The same lock, for the threads: one of them is woken for one task, not all.
        self._task = threading.Condition(lock)
        self._partitions: dict[PartitionKey, _Partition] = {}
        self._ready: deque[_Queue] = deque()
        self._waits: list[tuple[float, int, _Queue]] = []
        self._held: list[_Queue] = []
        self._paused: frozenset[PartitionKey] = frozenset()
        self._parked: list[_Queue] = []
        self._order = itertools.count()
        self._finished: list[Finished] = []
        self._finished_records = 0
        self._finished_bytes: Counter[PartitionKey] = Counter()
        self._finished_total = 0
        self._unbooked_bytes = 0
        self._finished_since: float | None = None
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._working = 0
        self._in_flight = 0
        self._in_flight_max = 0
        self._done_batches = 0
        self._usual_secs = 0.0
        self._stopping = False
        self._broken: BaseException | Outcome | None = None
        self._failures = FailureLog()
        self._last_error: Failed | None = None
        self._seen: dict[str, Seen] = {}
        self._stats = CallStats()
        self._taken_stats = CallStats()

    # -- handing over and collecting ------------------------------------------------------

    def submit(self, batches: Iterable[Batch]) -> None:
        """Append batches to their lanes' queues. Never blocks; see `queue` for room."""
        with self._changed:
            for batch in batches:
                partition = self._partitions.setdefault(batch.key, _Partition())
                if partition.stopped or self._stopping:
                    BOOKS.count(RELEASED, len(batch), batch.topic)
                    continue
                queue = partition.lanes.get(batch.lane)
                if queue is None:
                    queue = _Queue(batch.lane_key, partition, window=self._no_window())
                    partition.lanes[batch.lane] = queue
                # Added up here and not again when it ends: it takes a look at each record.
                payload_bytes = batch.payload_bytes
                size = payload_bytes + batch.records.held_bytes
                queue.batches.append(_HandedOver(batch, self._timer(), size))
                if records := len(batch):
                    TALLY.observe(BATCH_RECORDS, records)
                    TALLY.observe(BATCH_BYTES, payload_bytes)
                queue.records += records
                queue.bytes += size
                self._schedule(queue)

    def allow(self, min_concurrency: int, max_concurrency: int) -> None:
        """Make so many calls at once from here on."""
        with self._changed:
            self._max_concurrency = max_concurrency
            self._limit.bound(min_concurrency, max_concurrency)
            self._wake()

    def collect(self) -> list[Finished]:
        """Take everything that has finished since the last call, in order per lane."""
        with self._changed:
            finished, self._finished = self._finished, []
            self._finished_records = 0
            self._finished_since = None
            self._finished_bytes.clear()
            self._finished_total = 0
            if self._ready:
                self._wake()
            return finished

    def stay(self, batches: int, secs: float) -> None:
        """Wait until so many batches more have finished, if calls are mostly over within the time.

        Never longer than that: others' results and reading go on behind it.
        """
        with self._changed:
            if 0 < self._usual_secs < secs:
                enough = self._done_batches + batches
                self._changed.wait_for(lambda: self._done_batches >= enough, secs)

    def halt(self, finished: Finished) -> None:
        """Stop a partition from outside, since what became of its records cannot be written.

        Args:
            finished: With the failure in `halted`.
        """
        with self._changed:
            partition = self._partitions.setdefault(finished.key, _Partition())
            self._halt(partition, finished)
            self._changed.notify_all()

    def retire(self, key: PartitionKey) -> None:
        """Begin no further call of a partition. What runs ends, what waits is left where it stands,
        with the records it has done; then there are no batches of it any more, and what has
        finished can be collected. `abandon` takes it back."""
        with self._changed:
            partition = self._partitions.setdefault(key, _Partition())
            partition.retired = True
            self._cut_off(partition)
            self._changed.notify_all()

    def has_finished_of(self, key: PartitionKey) -> bool:
        """Whether there is anything of a partition to collect."""
        with self._changed:
            return any(finished.key == key for finished in self._finished)

    def abandon(self, key: LaneKey, lift_halt: bool = True) -> None:
        """Forget a lane: what has not begun never does, what is running counts for nothing.

        What is submitted for it afterwards begins once the call that is running has ended.

        Args:
            key: The lane.
            lift_halt: Whether a halt of its partition is forgotten too.
        """
        topic, partition_number, lane = key
        with self._changed:
            partition = self._partitions.get((topic, partition_number))
            if partition:
                if lift_halt:
                    partition.halted, partition.retired = None, False
                if lane in partition.lanes:
                    self._abandon(partition.lanes[lane])
            dropped = [finished for finished in self._finished if finished.lane_key == key]
            self._finished = [finished for finished in self._finished if finished.lane_key != key]
            records = sum(len(part) for finished in dropped for part in finished.parts)
            BOOKS.count(RELEASED, records, topic)
            self._finished_records -= records
            size = sum(finished.held_bytes for finished in dropped)
            self._finished_bytes[topic, partition_number] -= size
            self._finished_total -= size
            if self._ready:
                self._wake()

    def _abandon(self, queue: _Queue) -> None:
        queue.drop()
        queue.abandoned = queue.delivery is not None
        for line in (self._ready, self._parked):
            if queue in line:
                line.remove(queue)
                queue.scheduled = False
        if queue.delivery and not queue.scheduled:
            # Whoever takes it up finds that it counts for nothing.
            queue.scheduled = True
            self._ready.append(queue)
        queue.prepared = queue.failed = None
        # What is running goes on with the old one, and counts for nothing.
        queue.window = self._no_window()
        self._failures.left(queue.key[:2], queue.key[2])

    def _no_window(self) -> LaneWindow | None:
        return LaneWindow(self._window_ms) if self._window_ms else None

    def wait(self, done: Callable[[Invoker], bool], timeout_secs: float) -> bool:
        """Block until `done`, asked after every change, or the time is over; says which."""
        with self._changed:
            return self._changed.wait_for(lambda: done(self), timeout_secs)

    # -- hands ----------------------------------------------------------------------------

    def pause(self, keys: Collection[PartitionKey]) -> None:
        """Begin no call of these partitions, and go on with all others; what runs ends."""
        with self._changed:
            self._paused = frozenset(keys)
            parked, self._parked = self._parked, []
            for queue in parked:
                (self._parked if self._is_paused(queue) else self._ready).append(queue)
            if self._ready:
                self._wake()

    def _is_paused(self, queue: _Queue) -> bool:
        return bool(self._paused) and queue.key[:2] in self._paused and not queue.abandoned

    def retry(self, keys: Collection[PartitionKey]) -> set[PartitionKey]:
        """Make calls now that these partitions back off from; says which did."""
        with self._changed:
            now = [queue for _, _, queue in self._waits if queue.key[:2] in keys]
            self._waits = [wait for wait in self._waits if wait[2] not in now]
            heapq.heapify(self._waits)
            for queue in now:
                queue.waiting, queue.due = False, None
                self._ready.append(queue)
            if now:
                self._wake()
            return {queue.key[:2] for queue in now}

    def stop_at(self, key: PartitionKey, offset: int | None = None) -> Finished | None:
        """Halt a partition that waits for a repeat, in front of the record it would begin with.

        Args:
            key: The partition.
            offset: That record; None for any.

        Returns:
            The halt; None if it does not wait for that, as while its invocation is running.
        """
        with self._changed:
            partition = self._partitions.get(key)
            for queue in partition.lanes.values() if partition else ():
                delivery, error = queue.delivery, queue.failed
                if not (delivery and error and (queue.waiting or queue in self._parked)):
                    continue
                if offset not in (None, delivery.head_offset):
                    continue
                self._waits = [wait for wait in self._waits if wait[2] is not queue]
                heapq.heapify(self._waits)
                self._held = [each for each in self._held if each is not queue]
                self._parked = [each for each in self._parked if each is not queue]
                queue.waiting = False
                delivery.stop(error.error_type, error.message, error.attempt)
                self._finish(queue, delivery)
                return delivery.finished
            return None

    # -- windows --------------------------------------------------------------------------

    def open_windows(self) -> dict[PartitionKey, int]:
        """Partitions with a tumbling window that is open, and no batches; and when it ends, in
        milliseconds since the epoch."""
        with self._changed:
            return {
                key: queue.window.end_ms
                for key, partition in self._partitions.items()
                if not partition.stopped
                for queue in partition.lanes.values()
                if queue.window
                and queue.window.end_ms is not None
                and not (queue.batches or queue.delivery)
            }

    def close_window(self, key: PartitionKey, closes: str) -> None:
        """End a partition's window that is open.

        Args:
            key: One of `open_windows`.
            closes: As a batch has it.
        """
        with self._changed:
            windows = [queue.window for queue in self._partitions[key].lanes.values()]
            at = windows[0].position if windows and windows[0] else 0
            self.submit([Batch(*key, at, at, Records(), (), closes=closes)])

    # -- what can be seen -----------------------------------------------------------------

    def queue(self, key: PartitionKey) -> QueueView:
        """How one partition stands."""
        with self._changed:
            partition = self._partitions.get(key)
            return _view(partition, self._finished_bytes[key]) if partition else _NOTHING

    @property
    def pending_batches(self) -> int:
        """Batches handed over and not finished, those that a halt dropped left out."""
        with self._changed:
            return sum(_view(partition).batches for partition in self._partitions.values())

    @property
    def has_work(self) -> bool:
        """Whether there are batches that are not finished, those that a halt dropped left out."""
        return not self.is_idle

    @property
    def done_batches(self) -> int:
        """Batches that have finished since the beginning."""
        return self._done_batches

    @property
    def usual_secs(self) -> float:
        """How long a call takes, on average of the last ones."""
        return self._usual_secs

    @property
    def finished_records(self) -> int:
        """Records that are finished and not yet collected."""
        return self._finished_records

    @property
    def is_full(self) -> bool:
        """Whether so much has finished that no call begins before it is collected."""
        return self._finished_total + self._unbooked_bytes > self._max_finished_bytes

    @property
    def finished_age_secs(self) -> float:
        """How long the oldest finished batch has waited to be collected; 0 if there is none."""
        since = self._finished_since
        return 0.0 if since is None else self._timer() - since

    @property
    def has_finished(self) -> bool:
        """Whether there is anything to collect."""
        return bool(self._finished)

    @property
    def halted(self) -> list[Finished]:
        """The batches that stopped their partitions, one of each."""
        with self._changed:
            return [each.halted for each in self._partitions.values() if each.halted]

    @property
    def in_flight(self) -> int:
        """Calls that are running right now."""
        return self._in_flight

    @property
    def in_flight_max(self) -> int:
        """The most calls that have been running at once."""
        return self._in_flight_max

    @property
    def limit(self) -> int:
        """Calls that may run at once, as things are now."""
        return self._limit.allowed

    @property
    def breaker_open(self) -> bool:
        """Whether no calls are made, but for a probe now and then."""
        return self._breaker.is_open

    @property
    def breaker_openings(self) -> int:
        """How often the breaker has opened."""
        return self._breaker.openings

    @property
    def broken(self) -> BaseException | Outcome | None:
        """What stopped all work: a configuration outcome, or an exception of ours."""
        return self._broken

    @property
    def stats(self) -> CallStats:
        """All calls so far, those of batches that are not finished included."""
        with self._changed:
            return replace(self._stats)

    def take_stats(self) -> CallStats:
        """What has been added to `stats` since this was asked last."""
        with self._changed:
            if self._stats == self._taken_stats:
                return CallStats()
            before, self._taken_stats = self._taken_stats, replace(self._stats)
            return self._taken_stats.since(before)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, in line, or waits for its next call."""
        # What moves from one line to another just now would be seen in neither without the lock.
        with self._changed:
            lines = self._ready, self._waits, self._held, self._parked
            return not (self._working or any(lines))

    @property
    def trouble(self) -> Trouble:
        """What does not go well, as things are."""
        with self._changed:
            clock, now = self._clock(), self._timer()
            stuck = []
            for key, partition in self._partitions.items():
                queue = next((each for each in partition.lanes.values() if each.failed), None)
                if queue and queue.failed and not partition.halted:
                    until = None if queue.due is None else clock + queue.due - now
                    error = queue.failed
                    waits_for = _waits_for(queue)
                    stuck.append(
                        Stuck(*key, waits_for, until, error.error_type, error.attempt, error.at)
                    )
            oldest = {key: _oldest_ms(each) for key, each in self._partitions.items()}
            oldest_ms = {key: ms for key, ms in oldest.items() if ms}
            first = min(oldest_ms.values(), default=None)
            return Trouble(
                self._last_error,
                stuck,
                None if first is None else max(0.0, clock - first / 1000),
                oldest_ms,
                {key: each.halted_at for key, each in self._partitions.items() if each.halted},
                tuple(self._seen.values()),
            )

    def books(self) -> tuple[Tallied, Counter[str]]:
        """What this process has counted of records, and how many of each topic are here: handed
        over and not collected. Both of one moment."""
        with self._changed:
            held: Counter[str] = Counter()
            for key, partition in self._partitions.items():
                held[key[0]] += sum(queue.records for queue in partition.lanes.values())
            for finished in self._finished:
                held[finished.topic] += sum(map(len, finished.parts))
            return BOOKS.take(), held

    # -- ending ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin no further call. Running calls end; what they finish can be collected."""
        with self._changed:
            self._stopping = True
            self._task.notify_all()
            self._changed.notify_all()

    def join(self, timeout_secs: float) -> bool:
        """After `stop`: wait until no call is running. False if the time was over first."""
        deadline = self._timer() + timeout_secs
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._timer()))
        with self._changed:
            # What was waiting is left where it stands, with the records it has done.
            waiting = [wait[2] for wait in self._waits]
            for queue in [*self._ready, *self._held, *self._parked, *waiting]:
                if queue.delivery:
                    queue.waiting = False
                    self._finish(queue, queue.delivery)
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def _ending(self) -> bool:
        """Whether no further call may begin."""
        return self._stopping or self._broken is not None

    @property
    def _has_room(self) -> bool:
        """Whether one more queue may be worked on."""
        return self._working < self._limit.allowed and not self.is_full

    def _queues(self) -> list[_Queue]:
        return [queue for each in self._partitions.values() for queue in each.lanes.values()]

    # -- the threads ----------------------------------------------------------------------

    def _schedule(self, queue: _Queue) -> None:
        """Put a queue that has work in line, once. Holds the lock."""
        if queue.batches and not queue.scheduled:
            queue.scheduled = True
            self._ready.append(queue)
            self._wake()

    def _wake(self) -> None:
        """See to it that somebody takes what was put in line. Holds the lock."""
        if self._idle:
            self._task.notify()
        elif len(self._threads) < self._max_concurrency and not self._stopping:
            name = f"invoke-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        later: _Later = deque()
        try:
            queue = self._next()
            while queue:
                queue = self._advance(queue, later)
                if queue is None:
                    _do(later)
                    queue = self._next()
        except BaseException as error:
            _LOGGER.debug("invoke thread failed", exc_info=True)
            with self._changed:
                self._break(error)
        finally:
            _do(later)

    def _next(self, wait: bool = True) -> _Queue | None:
        """A queue to work on, waited for; None when no more work may begin."""
        with self._changed:
            while not self._ending:
                now = self._timer()
                due = self._line_up(now)
                if self._ready and self._has_room:
                    queue = self._ready.popleft()
                    if queue.delivery is None and not queue.batches:
                        # It was abandoned while it stood in line.
                        queue.scheduled = False
                        continue
                    if self._is_paused(queue):
                        self._parked.append(queue)
                        continue
                    self._working += 1
                    if queue.delivery is None:
                        self._start(queue)
                    # Who put it in line may have woken one thread only, for more than one queue;
                    # and somebody else has to be there now when the next wait is over.
                    more = self._ready and self._has_room
                    if more or due < math.inf:
                        self._wake()
                    return queue
                if not wait:
                    break
                self._idle += 1
                self._task.wait(due - now if due < math.inf else None)
                self._idle -= 1
            return None

    def _line_up(self, now: float) -> float:
        """Put what need not wait any longer in line; when to look again. Holds the lock."""
        while self._waits and self._waits[0][0] <= now:
            queue = heapq.heappop(self._waits)[2]
            queue.waiting, queue.due = False, None
            self._ready.append(queue)
        if self._breaker.lets_through(now):
            # Who has called least recently is first, so that not only the same one probes.
            for queue in sorted(self._held, key=lambda queue: queue.called):
                queue.waiting = False
                self._ready.append(queue)
            self._held.clear()
        due = self._waits[0][0] if self._waits else math.inf
        return min(due, self._breaker.probe_at) if self._held else due

    def _start(self, queue: _Queue) -> Iterator[Step]:
        """Begin with a queue's next batch; its steps. Holds the lock."""
        queue.head = queue.batches.popleft()
        batch, window = queue.head.batch, queue.window
        queue.delivery = Delivery(batch, self._policy, self._clock, self._random, window)
        queue.counted = CallStats()
        queue.steps = queue.delivery.steps()
        return queue.steps

    def _advance(self, queue: _Queue, later: _Later) -> _Queue | None:
        """Do what the steps of a queue's head say until it is finished or has to wait.

        Returns the queue to go on with, if there is one: mostly the same, without anybody else
        having been woken for it. Adds to what is done later.
        """
        delivery, steps = queue.delivery, queue.steps
        assert delivery and steps
        # A call that it was put aside with was not made: it may be too late for it by now.
        step = next(steps, None)
        while isinstance(step, Call):
            with self._changed:
                # Asked here and not before: whoever halts the partition must find the queue either
                # put aside, or at a call that has begun.
                if not self._goes_on(queue):
                    break
                if not self._may_begin(queue.key):
                    self._abandon(queue)
                    break
                if self._put_aside(queue):
                    return None
                begun = self._begin(queue)
            self._tally_begin(queue, delivery, later)
            request = self._prepared_for(queue, delivery.batch, step)
            outcome = self._invoke(queue, delivery.batch, step, request, begun, later)
            while ahead := self._call_ahead(queue, step, outcome):
                prepared, begun = ahead
                later.append(partial(self._book, queue, step, outcome, later))
                batch, step = prepared.batch, _first_call(prepared.batch)
                outcome = self._invoke(queue, batch, step, prepared.request, begun, later)
            delivery, steps = queue.delivery, queue.steps
            assert delivery and steps
            call, step = step, _send(steps, outcome)
            self._count(queue, delivery, outcome)
            self._note(queue, delivery, call, outcome, step)
        with self._changed:
            self._working -= 1
            if isinstance(step, Wait) and self._goes_on(queue):
                self._put_off(queue, step.secs)
                return None
            steps.close()
            self._finish(queue, delivery)
            is_halt = queue.partition.halted is delivery.finished
            following = self._next(wait=False)
        self._note_end(delivery, is_halt)
        return following

    def _call_ahead(
        self, queue: _Queue, call: Call, outcome: Outcome
    ) -> tuple[_Prepared, _Begun] | None:
        """Begin the call that was prepared behind one that has just ended the head, if nothing
        speaks against it; the head is booked while it is under way.

        That is a tenth of a millisecond earlier, of each call, and changes nothing else: what goes
        wrong, and what has to wait or take turns, is booked first.
        """
        if outcome.kind is not Kind.SUCCESS or outcome.spared or queue.prepared is None:
            return None
        if self._policy.max_record_age_secs >= 0:
            return None  # what is too old by now is taken out before
        with self._changed:
            head, prepared = queue.head, queue.prepared
            if not (head and prepared and queue.batches) or call.only:
                return None
            if (call.low, call.high) != (0, len(head.batch)) or self._is_old(prepared):
                return None
            now = self._timer()
            self._line_up(now)
            if (
                queue.batches[0].batch is not prepared.batch
                or self._ready
                or self._is_paused(queue)
                or not self._goes_on(queue)
                or not self._breaker.lets_through(now)
                or self._working > self._limit.allowed
                or not self._may_begin(queue.key)
            ):
                return None
            held_bytes = outcome.held_bytes
            self._unbooked_bytes += held_bytes
            if self.is_full:
                self._unbooked_bytes -= held_bytes
                return None
            queue.prepared, queue.ahead, queue.unbooked_bytes = None, True, held_bytes
            return prepared, self._begin(queue)

    def _book(self, queue: _Queue, call: Call, outcome: Outcome, later: _Later) -> None:
        """End the head, in which a call has succeeded, with the next one under way."""
        delivery, steps = queue.delivery, queue.steps
        assert delivery and steps
        step = _send(steps, outcome)
        assert step is None
        self._count(queue, delivery, outcome)
        self._note(queue, delivery, call, outcome, step)
        with self._changed:
            self._finish(queue, delivery)
        assert queue.delivery
        self._tally_begin(queue, queue.delivery, later)

    def _goes_on(self, queue: _Queue) -> bool:
        return not (self._ending or queue.partition.stopped or queue.abandoned)

    def _put_aside(self, queue: _Queue) -> bool:
        """Whether a queue's next call must not begin now; then somebody takes it up later."""
        if self._is_paused(queue):
            self._working -= 1
            self._parked.append(queue)
            return True
        if not self._breaker.lets_through(self._timer()):
            self._working -= 1
            self._put_off(queue)
            return True
        if self._working > self._limit.allowed or self.is_full:
            self._working -= 1
            self._ready.append(queue)
            return True
        return False

    def _put_off(self, queue: _Queue, secs: float = 0.0) -> None:
        """Have a queue wait, for so long or for the breaker. Holds the lock."""
        # What is behind a call that is repeated would wait too long.
        queue.prepared = None
        queue.waiting = True
        now = self._timer()
        if self._breaker.lets_through(now):
            queue.due = now + secs
            heapq.heappush(self._waits, (queue.due, next(self._order), queue))
            if secs > _TOLD_SECS:
                text = "%s-%d waits %d s before its next invocation, as the answer to the last one "
                _LOGGER.warning(text + "asked for (Retry-After)", *queue.key[:2], secs)
        else:
            self._held.append(queue)
        # Somebody has to wait no longer than until then.
        self._task.notify()
        self._changed.notify_all()

    def _begin(self, queue: _Queue) -> _Begun:
        """A call begins. Holds the lock."""
        queue.called = next(self._order)
        self._in_flight += 1
        self._in_flight_max = max(self._in_flight_max, self._in_flight)
        return self._limit.begin(), self._breaker.begin()

    def _prepared_for(self, queue: _Queue, batch: Batch, call: Call) -> Request | None:
        """What was prepared for a call, if it is still good."""
        prepared, queue.prepared = queue.prepared, None
        if prepared is None or prepared.batch is not batch or call != _first_call(batch):
            return None
        return None if self._is_old(prepared) else prepared.request

    def _invoke(
        self,
        queue: _Queue,
        batch: Batch,
        call: Call,
        request: Request | None,
        begun: _Begun,
        later: _Later,
    ) -> Outcome:
        started = self._timer()
        try:
            outcome = self._call(batch, call, request, partial(self._meanwhile, queue, later))
        except BaseException:
            with self._changed:
                self._in_flight -= 1
            raise
        finally:
            # There was no meanwhile if nothing could be sent.
            took_secs = self._timer() - started
            _do(later)
        assert queue.delivery
        queue.delivery.finished.stats.invoke_ms += round(took_secs * 1000)
        later.append(partial(self._tally_end, batch.topic, len(call), outcome, took_secs))
        usual_secs = self._usual_secs or took_secs
        self._usual_secs = usual_secs + (took_secs - usual_secs) / 8
        return self._ended(batch, call, outcome, begun)

    def _tally_begin(self, queue: _Queue, delivery: Delivery, later: _Later) -> None:
        """A call begins; what waited counts with the first one of a batch."""
        if delivery.finished.stats.invocations:
            return
        assert queue.head
        later.append(partial(TALLY.observe, BATCH_WAIT, self._timer() - queue.head.since))
        batch = delivery.batch
        if len(batch) and (stamp := batch.records.timestamps[-1]) != NO_TIMESTAMP:
            age_secs = max(0.0, self._clock() - stamp / 1000)
            later.append(partial(TALLY.observe, ITERATOR_AGE, age_secs))

    def _tally_end(self, topic: str, records: int, outcome: Outcome, took_secs: float) -> None:
        """A call with so many records has ended."""
        TALLY.count(INVOKED, records, topic)
        TALLY.count(INVOCATIONS, 1, outcome.name)
        if outcome.kind is Kind.SUCCESS:
            TALLY.note(LAST_SUCCESS, self._clock())
            TALLY.observe(DURATION, took_secs, "success")
        else:
            TALLY.count(FAILED_INVOKE, len(outcome.failed) or records, topic)
            TALLY.observe(DURATION, took_secs, "error")

    def _meanwhile(self, queue: _Queue, later: _Later) -> None:
        """While a queue's call is under way: what was left for later, and the call behind it."""
        _do(later)
        self._prepare_next(queue)

    def _prepare_next(self, queue: _Queue) -> None:
        """While the call for a queue's head is under way, prepare the one behind it."""
        with self._changed:
            # In a crowd others have their turn first, and it would be too old by then.
            crowd = self._working + len(self._ready) > self._limit.allowed
            if crowd or self._ending or not queue.batches:
                return
            batch = queue.batches[0].batch
        if not len(batch) or batch.rejection:
            # It is finished without a call.
            return
        since = self._clock(), self._timer()
        try:
            request = self._prepare(batch, _first_call(batch))
        except Exception:
            # The reply that is under way has nothing to do with it. If it is still so when the
            # batch has its turn, it is raised there.
            _LOGGER.debug("not prepared ahead", exc_info=True)
            return
        if request is not None:
            queue.prepared = _Prepared(batch, request, since)

    def _is_old(self, prepared: _Prepared) -> bool:
        clock, timer = prepared.since
        # A clock that was put back has signed for a time to come.
        return max(abs(self._clock() - clock), self._timer() - timer) > _PREPARED_SECS

    def _ended(self, batch: Batch, call: Call, outcome: Outcome, begun: _Begun) -> Outcome:
        """A call has ended. Its outcome, with what the breaker makes of it."""
        limit, breaker = begun
        # Lanes of one partition may have batches over the same range, but not with the same record.
        which = (batch.key, call.span(batch.records.offsets)[0])
        kind = outcome.of_function(len(call))
        with self._changed:
            now = self._timer()
            held_back = bool(self._ready) and self._working >= self._limit.allowed
            self._limit.end(limit, kind, self._in_flight, held_back)
            self._in_flight -= 1
            was_open = self._breaker.is_open
            spared = self._breaker.end(breaker, which, kind, now)
            if was_open and not self._breaker.is_open:
                self._line_up(now)
            if self._ready and self._has_room:
                self._wake()
            turned = was_open != self._breaker.is_open
        if turned:
            self._tell(outcome, opened=not was_open)
        return replace(outcome, spared=True) if spared else outcome

    def _tell(self, outcome: Outcome, opened: bool) -> None:
        """Say that the breaker has opened or closed."""
        policy = self._breaker_policy
        if not opened:
            _LOGGER.info("breaker closed: an invocation succeeded")
            return
        _LOGGER.warning(
            "breaker open: %g %% or more of the last %d invocations failed, now with %s; no "
            "records are given up, and one invocation each %g s tries whether it is over",
            policy.failure_rate * 100,
            policy.invocations,
            outcome.error_type,
            policy.wait_secs,
        )

    def _count(self, queue: _Queue, delivery: Delivery, outcome: Outcome) -> None:
        """Add what a call has come to, at once and not when its batch ends."""
        more = delivery.finished.stats.since(queue.counted)
        with self._changed:
            self._stats.add(more)
            queue.counted.add(more)
        TALLY.count(RETRIES, more.retries, outcome.name)

    def _note(
        self, queue: _Queue, delivery: Delivery, call: Call, outcome: Outcome, step: Step | None
    ) -> None:
        """Say that a call has failed, or that its partition is answered again, if it is due."""
        batch = delivery.batch
        if outcome.kind is Kind.SUCCESS:
            queue.failed = None
            if self._failures.is_quiet:
                return
            with self._changed:
                recovery = self._failures.succeeded(batch.key, batch.lane, self._timer())
            if recovery:
                place = {"topic": batch.topic, "partition": batch.partition}
                text = recovery_line(batch.key, recovery)
                _LOGGER.info("%s", text, extra={"facts": place})
            return
        if outcome.kind is Kind.CONFIG:
            return  # it ends the run, which says so
        offsets = call.span(batch.records.offsets)
        failure = failed(batch.key, offsets, outcome, call.attempt, self._clock())
        with self._changed:
            queue.failed = self._last_error = failure
            Seen.add(self._seen, failure)
            if delivery.finished.halted:
                return  # said as that
            held_back = self._failures.failed(
                batch.key, batch.lane, failure.error_type, self._timer()
            )
            waits = not self._breaker.lets_through(self._timer())
        if held_back is None:
            return
        secs = None
        if isinstance(step, Call):
            then = "tried again at once"
        elif isinstance(step, Wait) and waits:
            then = "tried again when the breaker lets it through"
        elif isinstance(step, Wait):
            secs = round(step.secs, 1)
            then = f"tried again in {secs} s"
        else:
            then = "given up"
        more = {"next_try_secs": secs, "held_back": held_back}
        text = failure_line(failure, then, held_back)
        _LOGGER.warning("%s", text, extra={"facts": PROCESSING | failure.facts | more})

    def _note_end(self, delivery: Delivery, is_halt: bool) -> None:
        """Say that a partition was halted, or that records were given up that were not sent."""
        batch, finished = delivery.batch, delivery.finished
        if is_halt and finished.halted:
            with self._changed:
                held_back = self._failures.halted(batch.key)
                self._last_error = given_up(batch.key, finished.halted, self._clock())
                if not finished.halted.attempts:
                    Seen.add(self._seen, self._last_error)
                facts = PROCESSING | self._last_error.facts | halt_facts(finished)
            _LOGGER.error("%s", halt_log_line(finished, held_back), extra={"facts": facts})
        for part in finished.parts:
            if isinstance(part, Responses) or (part.attempts and part.condition != AGE_EXCEEDED):
                continue
            failure = given_up(batch.key, part, self._clock())
            with self._changed:
                self._last_error = failure
                Seen.add(self._seen, failure)
                due = self._failures.given_up(batch.key, failure.error_type, self._timer())
            if due is not None:
                text = failure_line(failure, "given up", due)
                _LOGGER.warning(
                    "%s", text, extra={"facts": PROCESSING | failure.facts | {"held_back": due}}
                )

    def _finish(self, queue: _Queue, delivery: Delivery) -> None:
        """The head is done, halted, or abandoned. Holds the lock."""
        batch, finished = delivery.batch, delivery.finished
        done = 0 if queue.abandoned else sum(map(len, finished.parts))
        BOOKS.count(RELEASED, len(batch) - done, batch.topic)
        queue.failed = queue.due = None
        queue.delivery = queue.steps = None
        queue.scheduled = False
        if self._tell_ended:
            self._tell_ended(batch, finished)
        assert queue.head
        queue.records -= len(batch)
        queue.bytes -= queue.head.bytes
        queue.head = None
        self._done_batches += 1
        counts, ahead = not queue.abandoned, queue.ahead
        if ahead:
            # Its call is under way, and counts as much as this one.
            queue.ahead, queue.scheduled = False, True
            self._unbooked_bytes -= queue.unbooked_bytes
            next(self._start(queue))
        else:
            queue.abandoned = False
        if counts:
            self._add_finished(delivery)
        if delivery.config_error and counts:
            self._break(delivery.config_error)
        elif counts and (finished.halted or queue.partition.halted):
            self._halt(queue.partition, finished)
        elif not (ahead or (counts and queue.partition.retired)):
            self._pass_on(queue)
        self._changed.notify_all()

    def _add_finished(self, delivery: Delivery) -> None:
        """Have it collected. Holds the lock."""
        finished = delivery.finished
        if delivery.window:
            finished.reach = delivery.window.reach(finished)
        self._finished.append(finished)
        self._finished_records += sum(map(len, finished.parts))
        size = finished.held_bytes
        self._finished_bytes[finished.key] += size
        self._finished_total += size
        if self._finished_since is None:
            self._finished_since = self._timer()

    def _pass_on(self, queue: _Queue) -> None:
        """Put a queue in line again; who was at it takes what is first, so nobody is woken."""
        if queue.batches:
            queue.scheduled = True
            self._ready.append(queue)

    def _halt(self, partition: _Partition, finished: Finished) -> None:
        """Begin no further call in any lane; what runs ends. Holds the lock."""
        if partition.halted:
            # Of failures that ended side by side, the first one in the log is what stands there.
            if finished.halted and _failed_at(finished) < _failed_at(partition.halted):
                partition.halted = finished
            return
        partition.halted, partition.halted_at = finished, self._clock()
        self._cut_off(partition)

    def _cut_off(self, partition: _Partition) -> None:
        """Take all that has not begun out of a partition's queues. Holds the lock."""
        queues = partition.lanes.values()
        idle = [queue for queue in self._ready if queue in queues]
        idle += [queue for queue in self._parked if queue in queues]
        idle += [queue for queue in queues if queue.waiting]
        self._ready = deque(queue for queue in self._ready if queue not in idle)
        self._held = [queue for queue in self._held if queue not in idle]
        self._parked = [queue for queue in self._parked if queue not in idle]
        self._waits = [wait for wait in self._waits if wait[2] not in idle]
        heapq.heapify(self._waits)
        for queue in queues:
            queue.drop()
            queue.prepared = None
        for queue in idle:
            queue.scheduled = queue.waiting = False
            queue.due = None
            if queue.delivery:
                self._finish(queue, queue.delivery)

    def _break(self, why: BaseException | Outcome) -> None:
        """Stop everything; the lock is held."""
        self._broken = self._broken or why
        self._task.notify_all()
        self._changed.notify_all()


def _do(later: _Later) -> None:
    while later:
        later.popleft()()


def _first_call(batch: Batch) -> Call:
    return Call(0, len(batch), 1, "")


def _send(steps: Generator[Step, Outcome | None, None], outcome: Outcome) -> Step | None:
    try:
        return steps.send(outcome)
    except StopIteration:
        return None


def _failed_at(finished: Finished) -> int:
    assert finished.halted
    return finished.halted.records.offsets[0]


def _waits_for(queue: _Queue) -> str:
    """What a lane waits for that has failed."""
    if not queue.waiting:
        return REPEATING
    if queue.due is None:
        return BREAKER
    assert queue.failed
    return THROTTLE if queue.failed.kind == Kind.THROTTLED.value else BACKOFF


def _oldest_ms(partition: _Partition) -> int | None:
    """The timestamp of the first record that is not finished; None if there is none."""
    if partition.halted:
        assert partition.halted.halted
        stamps = list(partition.halted.halted.records.timestamps[:1])
    else:
        stamps = [_first_ms(queue) for queue in partition.lanes.values()]
    return min((stamp for stamp in stamps if stamp > NO_TIMESTAMP), default=None)


def _first_ms(queue: _Queue) -> int:
    done, head = 0, []
    if queue.delivery:
        done, head = queue.delivery.finished.next_offset, [queue.delivery.batch]
    for batch in itertools.chain(head, (each.batch for each in queue.batches)):
        place = bisect_left(batch.records.offsets, done)
        if place < len(batch.records):
            return batch.records.timestamps[place]
    return NO_TIMESTAMP


def _is_stuck(queue: _Queue) -> bool:
    return queue.waiting or bool(queue.delivery and queue.delivery.finished.stats.retries)


_NOTHING = QueueView()


def _view(partition: _Partition, finished_bytes: int = 0) -> QueueView:
    batches = records = size = 0
    waiting = stuck = False
    busy = []
    for queue in partition.lanes.values():
        records += queue.records
        size += queue.bytes
        if queue.batches or queue.delivery:
            batches += len(queue.batches) + (queue.delivery is not None)
            busy.append(queue.key[2])
        waiting = waiting or queue.waiting
        stuck = stuck or _is_stuck(queue)
    halted = partition.halted is not None
    if not (busy or records or size or halted or waiting or finished_bytes):
        return _NOTHING
    return QueueView(
        batches, records, size, halted, waiting, stuck, finished_bytes, frozenset(busy)
    )
