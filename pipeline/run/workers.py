"""Workers: the rounds in several processes, each a member of the consumer group.

One interpreter runs one thread at a time, so one process uses little more than one processor. The
workers are forked from a process that has imported everything and made nothing: they share its
memory, and begin as soon as one would. They know nothing of each other; the group gives a partition
to one of them, so what holds for a partition holds as before. They stay until all of them are done:
who left before would hand over what it has stopped at. With `--max_workers` some come and go as
`pipeline.run.scaling` says.
"""

from __future__ import annotations

import itertools
import logging
import logging.handlers
import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic, process_time
from typing import TYPE_CHECKING, Any

from pipeline.options.config import Config
from pipeline.run.hands import ANSWER_SECS, LEVEL, PAUSE, RESUME, Command, Pauses, Told
from pipeline.run.rounds import OTHERS_MOST_SECS, Rounds, left_elsewhere
from pipeline.run.scaling import LOOK_SECS, Look, Machine, wanted_workers
from pipeline.run.status import Standing, Status, Totals
from pipeline.watch.logs import set_level
from transforms.errors import SinkError, WorkerError
from transforms.invoke.failures import Trouble
from transforms.names import NUMBERS
from transforms.records import Finished, PartitionKey
from transforms.tally import HELD, RELEASED, Series, Tallied

_LOGGER = logging.getLogger(__name__)

_REPORT_SECS = 0.5
_LOOK_SECS = 0.2
_STOP = "stop"


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of itself.

    Attributes:
        status: How its run stands.
        ended: Whether that is its last word.
        error: What ended its run, None if it came to its end.
        used_secs: Processor time that it has used.
    """

    status: Status
    ended: bool = False
    error: BaseException | None = None
    used_secs: float = 0.0


@dataclass(frozen=True, slots=True)
class Order:
    """A command that a worker is to carry out.

    Attributes:
        number: Tells it from others.
        command: The command.
    """

    number: int
    command: Command


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker says to an order.

    Attributes:
        number: Of the order.
        told: What came of it.
    """

    number: int
    told: Told


if TYPE_CHECKING:
    # What a worker is told: to stop, how many invocations at once there may be, from and to, or
    # what an operator says.
    Message = str | tuple[int, int] | Order


def merge(statuses: Sequence[Status], elapsed_secs: float, left: Sequence[Status] = ()) -> Status:
    """How the runs of all workers stand together. Pure.

    Args:
        statuses: Of those that there are.
        elapsed_secs: Since the program began.
        left: Of those that were taken away: what they have done counts.
    """
    left = [_done_by(status) for status in left]
    counters: Counter[str] = Counter()
    lags: dict[Any, int | None] = {}
    committed: dict[Any, int] = {}
    halted: dict[PartitionKey, Finished] = {}
    for status in (*left, *statuses):
        counters.update(status.totals.counters)
        lags |= status.lags
        # One may have had a partition before another.
        committed |= {k: max(at, committed.get(k, at)) for k, at in status.committed.items()}
    for status in statuses:
        # So may one whose last report is older: a partition is halted once, where it got furthest.
        for finished in status.halted:
            other = halted.get(finished.key, finished)
            halted[finished.key] = max(other, finished, key=lambda each: each.next_offset)
    standings = [status.standing for status in statuses]
    elsewhere = [standing.elsewhere for standing in standings]
    return Status(
        totals=Totals(counters, sum(status.totals.rounds for status in (*left, *statuses))),
        in_flight=sum(status.in_flight for status in statuses),
        lags=lags,
        halted=list(halted.values()),
        committed=committed,
        elapsed_secs=elapsed_secs,
        limit=sum(status.limit or 0 for status in statuses),
        # Not all of them need to have had their most at the same moment: it was that many or less.
        in_flight_max=sum(status.in_flight_max for status in statuses),
        breaker_open=any(status.breaker_open for status in statuses),
        breaker_openings=sum(status.breaker_openings for status in (*left, *statuses)),
        begun=all(status.begun for status in statuses),
        trouble=Trouble.join([status.trouble for status in (*left, *statuses)]),
        names=next((status.names for status in statuses), NUMBERS),
        standing=Standing(
            all(standing.done for standing in standings),
            any(standing.stopped for standing in standings),
            elsewhere[0].intersection(*elsewhere) if elsewhere else frozenset(),
            sum(standing.kept for standing in standings),
        ),
        workers=len(statuses),
        books=Tallied.join(status.books for status in (*left, *statuses)),
        tallied=Tallied.join(status.tallied for status in (*left, *statuses)),
        partitions={key: view for status in statuses for key, view in status.partitions.items()},
        still_secs=max((status.still_secs for status in statuses), default=0.0),
        # One that leaves while the others go on is not all of them.
        draining=bool(statuses) and all(status.draining for status in statuses),
        paused=bool(statuses) and all(status.paused for status in statuses),
    )


def _done_by(status: Status) -> Status:
    """What counts of a worker that was taken away: others have its partitions, and read again what
    it held."""
    trouble, books = status.trouble, Counter[Series]()
    for (name, labels), count in status.books.counts.items():
        books[RELEASED if name == HELD else name, labels] += count  # type: ignore[assignment]
    return replace(
        status,
        lags={},
        trouble=Trouble(trouble.last_error, errors=trouble.errors),
        books=Tallied(books),
    )


def part_of(total: int, index: int, count: int) -> int:
    """One of `count` parts of so many things; all parts together are the total. Pure."""
    return total // count + (index < total % count)


def member_of(config: Config, index: int, count: int) -> Config:
    """A worker's config: all of them together invoke no more at once than one process would."""
    invoke = config.invoke
    function = invoke.function
    source = config.read.source.as_member(index)
    most = part_of(function.max_concurrency, index, count)
    return replace(
        config,
        read=replace(config.read, source=source),
        write=replace(
            config.write,
            transaction=config.write.transaction
            and replace(config.write.transaction, number=index),
        ),
        commit=replace(config.commit, source=source),
        invoke=replace(
            invoke,
            function=replace(function, max_concurrency=most),
            min_concurrency=max(1, part_of(invoke.min_concurrency, index, count)),
        ),
    )


@dataclass(slots=True)
class _Worker:
    """One of the processes, as the first one sees it."""

    index: int
    process: BaseProcess
    connection: Connection
    leaves: bool = False
    report: Report = field(default_factory=lambda: Report(Status.of_nothing(0)))
    reported: float = 0.0

    def status(self, now: float) -> Status:
        """How its run stands; who says nothing any more does not turn."""
        status = self.report.status
        if self.report.ended or not status.begun:
            return status
        return replace(status, still_secs=status.still_secs + now - self.reported)


class Workers:
    """Runs the rounds in processes of their own.

    Forks when it is made, so nothing that has connections may have been made before.

    Args:
        config: What to run; `config.run.workers` says in how many processes, and
            `config.run.max_workers` in how many at most.
        stop: Set from outside to end.
        started: When the program began, by `timer`.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        stop: threading.Event,
        started: float,
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config
        self._most = max(config.run.workers, config.run.max_workers or 0)
        self._machine = Machine()
        self._look_at = timer() + LOOK_SECS
        self._look: Look | None = None
        self._used_secs: dict[int, float] = {}
        self._left: list[Status] = []
        self._stop = stop
        self._started = started
        self._timer = timer
        self._told = False
        self._ends = config.run.until == "caught_up"
        self._done_since = self._started
        self._standing = Standing()
        self._error: BaseException | None = None
        self._begun = False
        self._workers: list[_Worker] = []
        # Other threads look and give commands while this one adds workers and ends them.
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._replies: dict[int, queue.SimpleQueue[Told]] = {}
        self._pauses = Pauses(config.run.start_paused)
        for _ in range(config.run.workers):
            self._add(config.run.workers)

    def _add(self, count: int) -> None:
        """Fork one more, of so many. It begins with what is paused by then."""
        fork = multiprocessing.get_context("fork")
        taken = {worker.index for worker in self._workers}
        index = min({*range(len(taken) + 1)} - taken)
        ours, theirs = fork.Pipe()
        # What is open here is open there too, and would hide from the others that we are gone.
        others = [ours, *(worker.connection for worker in self._workers)]
        process = fork.Process(
            target=_work,
            args=(
                member_of(self._config, index, count),
                index,
                self._started,
                theirs,
                others,
                self._pauses,
            ),
            name=f"worker-{index}",
            daemon=True,
        )
        with self._lock, warnings.catch_warnings():
            # There are threads that show the run by then, and they are nothing to the worker.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
            self._workers.append(_Worker(index, process, ours, reported=self._timer()))
        theirs.close()

    def run(self) -> Status:
        """Wait for the end of all workers.

        Raises:
            SinkError: One of them cannot go on; the others have ended what was running.
        """
        try:
            while running := [each for each in self._workers if not each.report.ended]:
                ready = wait([worker.connection for worker in running], _LOOK_SECS)
                for worker in running:
                    if worker.connection in ready:
                        self._take_in(worker)
                self._say_goodbye()
                if self._stop.is_set() or self._error or self._all_done():
                    self._tell_all()
                elif self._most > self._config.run.workers and self._timer() >= self._look_at:
                    self._scale()
        finally:
            for worker in self._workers:
                if not worker.report.ended:
                    worker.process.kill()
                worker.process.join()
        if self._error:
            raise self._error
        return self.status()

    def status(self) -> Status:
        """How all of them stand together; may be called from another thread."""
        status = self._merged()
        # It stays so while one more worker begins.
        self._begun = self._begun or status.begun
        return replace(status, begun=self._begun)

    def _merged(self) -> Status:
        with self._lock:
            workers, left = list(self._workers), list(self._left)
        now = self._timer()
        return merge([worker.status(now) for worker in workers], now - self._started, left)

    def command(self, command: Command) -> Told:
        """Have each worker carry something out; called from another thread."""
        number = next(self._numbers)
        replies = self._replies[number] = queue.SimpleQueue()
        with self._lock:
            if command.action in (PAUSE, RESUME):
                self._pauses.set(command, command.action == PAUSE)
            elif command.action == LEVEL:
                set_level(command.level)
            asked = [
                worker
                for worker in self._workers
                if not (worker.leaves or worker.report.ended)
                and self._send(worker, Order(number, command))
            ]
        told: list[Told] = []
        deadline = self._timer() + ANSWER_SECS + _LOOK_SECS
        with suppress(queue.Empty):
            for _ in asked:
                told.append(replies.get(timeout=max(0.0, deadline - self._timer())))
        del self._replies[number]
        return Told.join(told)

    # -- more and fewer of them ------------------------------------------------------------

    def _scale(self) -> None:
        """Have as many as are wanted."""
        self._look_at = self._timer() + LOOK_SECS
        if any(worker.leaves for worker in self._workers):
            return
        look, before = self._look_around(), self._look
        self._look = look
        count = len(self._workers)
        wanted, why = wanted_workers(look, before, count, self._config.run.workers, self._most)
        if wanted == count:
            return
        _LOGGER.info("workers: %d in place of %d: %s", wanted, count, why)
        for _ in range(count, wanted):
            self._add(wanted)
        for worker in self._workers[wanted:]:
            worker.leaves = True
            self._tell(worker, _STOP)
        self._share_out(wanted)

    def _look_around(self) -> Look:
        status, used = self._merged(), 0.0
        for worker in self._workers:
            secs = worker.report.used_secs
            used += max(0.0, secs - self._used_secs.get(worker.index, 0.0))
            self._used_secs[worker.index] = secs
        known = [lag for lag in status.lags.values() if lag is not None]
        calls = status.limit or 0
        return Look(
            lag=sum(known) if known and status.begun else None,
            partitions=len(status.lags),
            used=used / LOOK_SECS,
            idle=self._machine.idle(),
            # As many as may run are running, or a call waits for the breaker.
            held_back=status.in_flight >= calls or status.breaker_open,
        )

    def _share_out(self, count: int) -> None:
        """Say to each how many invocations at once are its part."""
        stay = [worker for worker in self._workers if not worker.leaves]
        for place, worker in enumerate(stay):
            part = member_of(self._config, place, count).invoke
            self._tell(worker, (part.min_concurrency, part.function.max_concurrency))

    def _say_goodbye(self) -> None:
        """Count only what they have done, of those that were taken away."""
        for worker in [each for each in self._workers if each.leaves and each.report.ended]:
            with self._lock:
                self._left.append(worker.report.status)
                self._workers.remove(worker)
            self._used_secs.pop(worker.index, None)
            worker.process.join()
            worker.connection.close()

    def _tell(self, worker: _Worker, message: Message) -> None:
        with self._lock:
            self._send(worker, message)

    def _send(self, worker: _Worker, message: Message) -> bool:
        """Whether it was there to be told. Holds the lock."""
        try:
            worker.connection.send(message)
        except OSError:
            return False
        return True

    def _take_in(self, worker: _Worker) -> None:
        try:
            said: Report | Reply | logging.LogRecord = worker.connection.recv()
        except (EOFError, OSError):
            said = self._died(worker)
        if isinstance(said, logging.LogRecord):
            logging.getLogger(said.name).handle(said)
            return
        if isinstance(said, Reply):
            if replies := self._replies.get(said.number):
                replies.put(said.told)
            return
        worker.report, worker.reported = said, self._timer()
        if said.error and self._error is None:
            self._error = said.error

    def _died(self, worker: _Worker) -> Report:
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        error = WorkerError(
            f"{worker.process.name} was ended {how}, not by the run; nothing is lost, run again "
            f"(SIGKILL: the machine may be short of memory, each worker takes some; see --workers)"
        )
        return Report(worker.report.status, ended=True, error=error)

    def _tell_all(self) -> None:
        if self._told:
            return
        self._told = True
        for worker in self._workers:
            self._tell(worker, _STOP)

    def _all_done(self) -> bool:
        """Whether nothing more is to come, or nothing more can; see `Rounds`."""
        status = self._merged()
        standing = status.standing
        if not (status.begun and standing.done and (self._ends or standing.stopped)):
            self._standing = Standing()
            return False
        if not standing.elsewhere:
            return True
        if standing != self._standing:
            self._standing, self._done_since = standing, self._timer()
        if not (self._ends and self._timer() - self._done_since > OTHERS_MOST_SECS):
            return False
        self._error = self._error or left_elsewhere(standing.elsewhere)
        return True


class _Line(logging.handlers.QueueHandler):
    """What a worker says to the first process: reports, and what it would have logged, since there
    is one table to keep it clear of, and one stream for its lines."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)  # type: ignore[arg-type]
        self._said = threading.Lock()
        self._ended = False

    def say(self, what: Report | Reply | logging.LogRecord) -> None:
        """Send it, unless the last word was said.

        Raises:
            OSError: Nobody is there any more.
        """
        with self._said:
            if not self._ended:
                self._ended = isinstance(what, Report) and what.ended
                self.queue.send(what)  # type: ignore[attr-defined]

    def enqueue(self, record: logging.LogRecord) -> None:
        """For `QueueHandler`."""
        with suppress(OSError):  # noticed by who listens
            self.say(record)


def _work(
    config: Config,
    index: int,
    started: float,
    connection: Connection,
    others: list[Connection],
    pauses: Pauses,
) -> None:
    """The life of a worker."""
    for other in others:
        other.close()
    # Who stops us all is told first, and tells us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = _Line(connection)
    logging.root.handlers = [line]
    stop = threading.Event()
    error: BaseException | None = None
    runs: list[Rounds] = []
    begun = threading.Event()
    allowed: list[tuple[int, int]] = []

    def status() -> Status:
        return _slim(runs[0].status()) if runs else Status.of_nothing(0)

    def listen() -> None:
        while True:
            try:
                told = connection.recv() if connection.poll(_REPORT_SECS) else None
                if isinstance(told, Order):
                    # Who carries it out may take its time.
                    threading.Thread(target=obey, args=(told,), daemon=True).start()
                elif told == _STOP:
                    stop.set()
                elif told:
                    allowed[:] = [told]
                if allowed and runs:
                    runs[0].allow(*allowed.pop())
                line.say(Report(status(), used_secs=process_time()))
            except (EOFError, OSError):
                # Nobody is there any more. Who runs us again must not find us at work.
                os._exit(1)

    def obey(order: Order) -> None:
        begun.wait()
        told = runs[0].command(order.command)
        with suppress(OSError):  # noticed by who listens
            line.say(Reply(order.number, told))

    def tell() -> None:
        with suppress(OSError):  # noticed by who listens
            line.say(Report(status(), used_secs=process_time()))

    threading.Thread(target=listen, name="listen", daemon=True).start()
    try:
        runs.append(Rounds(config, stop, started, tell=tell, pauses=pauses))
        begun.set()
        runs[0].run()
    except SinkError as raised:
        error = raised
    except BaseException as raised:
        _LOGGER.exception("a bug in worker %d", index)
        error = WorkerError(f"worker-{index} failed: {type(raised).__name__}: {raised}")
    with suppress(OSError):
        line.say(Report(status(), ended=True, error=error))


def _slim(status: Status) -> Status:
    """A status without what nobody looks at from outside: the records behind a halt's first."""
    return replace(status, halted=[_without_records(finished) for finished in status.halted])


def _without_records(finished: Finished) -> Finished:
    failure = finished.halted
    assert failure
    return replace(
        finished,
        parts=[],
        halted=replace(failure, records=failure.records.slice(0, 1), entries=()),
    )
