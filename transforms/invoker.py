"""Invoker: an ordered asynchronous call. One per worker process, shared by all DoFn instances.

Each partition has a queue that is worked strictly in order, one call at a time; different
partitions run side by side up to `max_concurrency` calls. A partition that waits (backoff,
throttle) holds no thread. While a partition's call runs, its next one is prepared as far as that
goes without sending it (docs/adr/0002-ordered-asynchronous-call.md). Knows neither Beam nor boto3:
the call is injected.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, sleep

from transforms.outcome import Outcome
from transforms.records import Batch, Finished, PartitionKey
from transforms.retry import Call, Delivery, RetryPolicy, Step, Wait

_LOGGER = logging.getLogger(__name__)

CallFunction = Callable[[Batch, Call], Outcome]

Hold = Callable[[], bool]
"""Blocks until it is decided whether a prepared call may be sent."""

AheadFunction = Callable[[Batch, Call, Hold], Outcome | None]
"""Prepares a call, then sends it if the `Hold` says so; None if it does not."""

# A prepared request is signed, and a signature is good for some minutes only.
_AHEAD_SECS = 60.0
# What the thread of the call that was just let go needs to get its bytes out.
_YIELD_SECS = 0.001


@dataclass(slots=True, eq=False)
class _Ahead:
    """A call that is prepared while the one before it still runs."""

    batch: Batch
    begun: bool = False
    decided: threading.Event = field(default_factory=threading.Event)
    go: bool = False


@dataclass(slots=True)
class _Queue:
    """One partition: what is waiting, what is being worked on, and where it stands."""

    key: PartitionKey
    batches: deque[Batch] = field(default_factory=deque)
    delivery: Delivery | None = None
    steps: Generator[Step, Outcome, None] | None = None
    step: Step | None = None
    ahead: _Ahead | None = None
    scheduled: bool = False
    halted: Finished | None = None
    records: int = 0
    bytes: int = 0
    waiting: Wait | None = None


@dataclass(frozen=True, slots=True)
class QueueView:
    """A partition's queue as the outside may see it.

    Attributes:
        batches: Batches not yet finished, the one being worked on included.
        records: Records in them.
        bytes: Bytes of their payloads.
        halted: Whether a failure stopped the partition.
        waiting: Whether it is backing off right now.
    """

    batches: int = 0
    records: int = 0
    bytes: int = 0
    halted: bool = False
    waiting: bool = False


class Invoker:
    """Works the queues of all partitions of a process.

    Args:
        call: Invokes the function with a part of a batch and classifies what came back; any
            exception it raises is taken for a bug and ends the run.
        policy: When to repeat, split and give up.
        max_concurrency: Calls at once.
        clock: Seconds since the epoch, for record age.
        random: Uniform in [0, 1), for jitter.
        timer: Monotonic seconds, for waits.
        ahead: Prepares a call; None if calls cannot be prepared.
        sleep: Blocks a thread for some seconds.
    """

    def __init__(
        self,
        call: CallFunction,
        policy: RetryPolicy,
        max_concurrency: int,
        clock: Callable[[], float],
        random: Callable[[], float],
        timer: Callable[[], float] = monotonic,
        ahead: AheadFunction | None = None,
        sleep: Callable[[float], None] = sleep,
    ) -> None:
        self._call = call
        self._call_ahead = ahead
        self._policy = policy
        self._max_concurrency = max_concurrency
        self._clock = clock
        self._random = random
        self._timer = timer
        self._sleep = sleep
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # The same lock, for the threads: one of them is woken for one task, not all.
        self._task = threading.Condition(lock)
        self._queues: dict[PartitionKey, _Queue] = {}
        self._ready: deque[_Queue] = deque()
        self._waits: list[tuple[float, int, _Queue]] = []
        self._order = itertools.count()
        self._finished: list[Finished] = []
        self._finished_records = 0
        self._finished_since: float | None = None
        self._threads: list[threading.Thread] = []
        self._to_prepare: deque[_Queue] = deque()
        self._idle = 0
        self._working = 0
        self._in_flight = 0
        self._stopping = False
        self._broken: BaseException | Outcome | None = None

    # -- handing over and collecting ------------------------------------------------------

    def submit(self, batches: Iterable[Batch]) -> None:
        """Append batches to their partitions' queues. Never blocks; see `queue` for room."""
        with self._changed:
            for batch in batches:
                queue = self._queues.setdefault(batch.key, _Queue(batch.key))
                if queue.halted or self._stopping:
                    continue
                queue.batches.append(batch)
                queue.records += len(batch)
                queue.bytes += batch.payload_bytes
                self._schedule(queue)

    def collect(self) -> list[Finished]:
        """Take everything that has finished since the last call, in order per partition."""
        with self._changed:
            finished, self._finished = self._finished, []
            self._finished_records = 0
            self._finished_since = None
            return finished

    def wait(self, done: Callable[[Invoker], bool], timeout_secs: float) -> bool:
        """Block until `done`, asked after every change, or the time is over; says which."""
        with self._changed:
            return self._changed.wait_for(lambda: done(self), timeout_secs)

    # -- what can be seen -----------------------------------------------------------------

    def queue(self, key: PartitionKey) -> QueueView:
        """How one partition stands."""
        with self._changed:
            queue = self._queues.get(key)
            return _view(queue) if queue else QueueView()

    @property
    def pending_batches(self) -> int:
        """Batches handed over and not finished, those of halted partitions left out."""
        with self._changed:
            return sum(_view(queue).batches for queue in self._queues.values())

    @property
    def finished_records(self) -> int:
        """Records that are finished and not yet collected."""
        return self._finished_records

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
        """The batches that stopped their partitions."""
        with self._changed:
            return [queue.halted for queue in self._queues.values() if queue.halted]

    @property
    def in_flight(self) -> int:
        """Calls that are running right now."""
        return self._in_flight

    @property
    def broken(self) -> BaseException | Outcome | None:
        """What stopped all work: a configuration outcome, or an exception of ours."""
        return self._broken

    # -- ending ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin no further call. Running calls end; what they finish can be collected."""
        with self._changed:
            self._stopping = True
            self._drop_prepared()
            self._task.notify_all()
            self._changed.notify_all()

    def join(self, timeout_secs: float) -> bool:
        """After `stop`: wait until no call is running. False if the time was over first."""
        deadline = self._timer() + timeout_secs
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._timer()))
        with self._changed:
            # What was backing off is left where it stands, with the records it has done.
            for queue in self._queues.values():
                if queue.waiting and queue.delivery:
                    queue.waiting = None
                    self._finish(queue, queue.delivery)
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def _ending(self) -> bool:
        """Whether no further call may begin."""
        return self._stopping or self._broken is not None

    # -- the threads ----------------------------------------------------------------------

    def _schedule(self, queue: _Queue) -> None:
        """Put a queue that has work in line, once. Holds the lock."""
        if queue.scheduled:
            self._prepare(queue)
        elif queue.batches:
            queue.scheduled = True
            self._ready.append(queue)
            self._wake()

    def _prepare(self, queue: _Queue, wake: bool = True) -> None:
        """Have the next call of a queue that is being worked on prepared. Holds the lock."""
        if queue.ahead or queue.waiting or not (queue.delivery and queue.batches):
            return
        if self._call_ahead:
            queue.ahead = _Ahead(queue.batches[0])
            self._to_prepare.append(queue)
            if wake:
                self._wake()

    def _wake(self) -> None:
        """See to it that somebody takes what was put in line. Holds the lock."""
        most = self._max_concurrency * (2 if self._call_ahead else 1)
        if self._idle:
            self._task.notify()
        elif len(self._threads) < most and not self._stopping:
            name = f"invoke-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while task := self._next():
            try:
                task()
            except BaseException as error:
                _LOGGER.debug("invoke thread failed", exc_info=True)
                with self._changed:
                    self._break(error)
                return

    def _next(self) -> Callable[[], None] | None:
        """Wait for something to do; None when no more work may begin."""
        with self._changed:
            while True:
                if self._ending:
                    return None
                now = self._timer()
                while self._waits and self._waits[0][0] <= now:
                    queue = heapq.heappop(self._waits)[2]
                    queue.waiting = None
                    self._ready.append(queue)
                task = self._take()
                if task:
                    # Who put it in line may have woken one thread only, for more than one task.
                    if self._ready or self._to_prepare:
                        self._wake()
                    return task
                self._idle += 1
                self._task.wait(self._waits[0][0] - now if self._waits else None)
                self._idle -= 1

    def _take(self) -> Callable[[], None] | None:
        """What is first in line and may begin, if there is anything. Holds the lock."""
        if self._ready and self._working < self._max_concurrency:
            self._working += 1
            return partial(self._advance, self._ready.popleft())
        while self._to_prepare:
            queue = self._to_prepare.popleft()
            if queue.ahead and not queue.ahead.begun:
                queue.ahead.begun = True
                return partial(self._run_ahead, queue, queue.ahead)
        return None

    def _advance(self, queue: _Queue) -> None:
        """Take up the head of a queue, where it was left or anew."""
        if queue.delivery is None:
            with self._changed:
                self._start(queue)
        assert queue.delivery and queue.steps
        step, queue.step = queue.step or next(queue.steps, None), None
        self._follow(queue, queue.delivery, queue.steps, step)

    def _start(self, queue: _Queue) -> None:
        """Begin with a queue's next batch. Holds the lock."""
        batch = queue.batches.popleft()
        queue.delivery = Delivery(batch, self._policy, self._clock, self._random)
        queue.steps = queue.delivery.steps()

    def _follow(
        self,
        queue: _Queue,
        delivery: Delivery,
        steps: Generator[Step, Outcome, None],
        step: Step | None,
    ) -> None:
        """Do what the steps of a batch say until it is finished or has to wait."""
        while isinstance(step, Call) and not self._ending:
            with self._changed:
                self._prepare(queue)
            step = _send(steps, self._invoke(delivery, step))
        with self._changed:
            self._working -= 1
            if isinstance(step, Wait) and not self._ending:
                # A call prepared behind one that is repeated would wait too long.
                self._decide(queue, go=False)
                queue.waiting = step
                due = self._timer() + step.secs
                heapq.heappush(self._waits, (due, next(self._order), queue))
                # Somebody has to wait no longer than until then.
                self._task.notify()
                self._changed.notify_all()
                return
            steps.close()
            self._finish(queue, delivery)

    def _run_ahead(self, queue: _Queue, ahead: _Ahead) -> None:
        """Prepare a call; once the one before it has ended well, send it and go on from there."""
        assert self._call_ahead
        call = Call(0, len(ahead.batch), 1, "")
        # The call before it was let go just now; its thread must get to send first.
        if not ahead.decided.is_set():
            self._sleep(_YIELD_SECS)
        started = self._timer()

        def hold() -> bool:
            nonlocal started
            if not ahead.decided.wait(_AHEAD_SECS):
                with self._changed:
                    if queue.ahead is ahead:
                        self._decide(queue, go=False)
            started = self._timer()
            return ahead.go

        try:
            outcome = self._call_ahead(ahead.batch, call, hold)
        finally:
            with self._changed:
                if queue.ahead is ahead:
                    # It failed before there was anything to send: to be found out in its turn.
                    self._decide(queue, go=False)
                self._in_flight -= ahead.go
        if not ahead.go:
            return
        delivery, steps = queue.delivery, queue.steps
        assert delivery and steps
        if outcome is None:
            outcome = self._invoke(delivery, call)
        else:
            delivery.finished.stats.invoke_ms += round((self._timer() - started) * 1000)
        self._follow(queue, delivery, steps, _send(steps, outcome))

    def _drop_prepared(self) -> None:
        for queue in self._queues.values():
            self._decide(queue, go=False)

    def _decide(self, queue: _Queue, go: bool) -> None:
        """Let a prepared call go, or drop it. Holds the lock."""
        ahead, queue.ahead = queue.ahead, None
        if ahead:
            ahead.go = go
            ahead.decided.set()

    def _pass_on(self, queue: _Queue) -> None:
        """Go on with the next batch, by its prepared call if there is one. Holds the lock."""
        ahead = queue.ahead
        if ahead and ahead.begun and not self._ending:
            self._start(queue)
            assert queue.steps
            queue.step = next(queue.steps, None)
            queue.scheduled = True
            if queue.step == Call(0, len(ahead.batch), 1, ""):
                queue.step = None
                self._working += 1
                self._in_flight += 1
                self._decide(queue, go=True)
                self._prepare(queue, wake=False)
            else:
                self._decide(queue, go=False)
                self._ready.append(queue)
                self._wake()
            return
        # Nobody has come to prepare it yet: the usual way is as quick.
        self._decide(queue, go=False)
        self._schedule(queue)

    def _invoke(self, delivery: Delivery, call: Call) -> Outcome:
        with self._changed:
            self._in_flight += 1
        started = self._timer()
        try:
            return self._call(delivery.batch, call)
        finally:
            delivery.finished.stats.invoke_ms += round((self._timer() - started) * 1000)
            with self._changed:
                self._in_flight -= 1

    def _finish(self, queue: _Queue, delivery: Delivery) -> None:
        """The head is done, halted, or abandoned. Holds the lock."""
        batch, finished = delivery.batch, delivery.finished
        queue.delivery = queue.steps = None
        queue.scheduled = False
        queue.records -= len(batch)
        queue.bytes -= batch.payload_bytes
        self._finished.append(finished)
        self._finished_records += sum(map(len, finished.parts))
        if self._finished_since is None:
            self._finished_since = self._timer()
        if delivery.config_error:
            self._break(delivery.config_error)
        elif finished.halted:
            queue.halted = finished
            queue.batches.clear()
            queue.records = queue.bytes = 0
            self._decide(queue, go=False)
        else:
            self._pass_on(queue)
        self._changed.notify_all()

    def _break(self, why: BaseException | Outcome) -> None:
        """Stop everything; the lock is held."""
        self._broken = self._broken or why
        self._drop_prepared()
        self._task.notify_all()
        self._changed.notify_all()


def _send(steps: Generator[Step, Outcome, None], outcome: Outcome) -> Step | None:
    try:
        return steps.send(outcome)
    except StopIteration:
        return None


def _view(queue: _Queue) -> QueueView:
    return QueueView(
        batches=len(queue.batches) + (queue.delivery is not None),
        records=queue.records,
        bytes=queue.bytes,
        halted=queue.halted is not None,
        waiting=queue.waiting is not None,
    )
