"""Workers: the rounds in several processes, each a member of the consumer group.

One interpreter runs one thread at a time, so one process uses little more than one processor. The
workers are forked from a process that has imported everything and made nothing: they share its
memory, and begin as soon as one would. They know nothing of each other; the group gives a partition
to one of them, so what holds for a partition holds as before. They stay until all of them are done:
who left before would hand over what it has stopped at.
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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

from pipeline.options.config import Config
from pipeline.run.hands import ANSWER_SECS, LEVEL, Command, Told
from pipeline.run.rounds import OTHERS_MOST_SECS, Rounds, Standing, Status, Totals
from pipeline.watch.logs import set_level
from transforms.errors import SinkError, WorkerError
from transforms.invoke.failures import Trouble
from transforms.names import NUMBERS
from transforms.records import Finished
from transforms.tally import Tallied

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
    """

    status: Status
    ended: bool = False
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker says to a command.

    Attributes:
        number: Of the command.
        told: What came of it.
    """

    number: int
    told: Told


def merge(statuses: Sequence[Status], elapsed_secs: float) -> Status:
    """How the runs of all workers stand together. Pure."""
    counters: Counter[str] = Counter()
    lags: dict[Any, int | None] = {}
    committed: dict[Any, int] = {}
    for status in statuses:
        counters.update(status.totals.counters)
        lags |= status.lags
        # One may have had a partition before another.
        committed |= {k: max(at, committed.get(k, at)) for k, at in status.committed.items()}
    standings = [status.standing for status in statuses]
    elsewhere = [standing.elsewhere for standing in standings]
    return Status(
        totals=Totals(counters, sum(status.totals.rounds for status in statuses)),
        in_flight=sum(status.in_flight for status in statuses),
        lags=lags,
        halted=[finished for status in statuses for finished in status.halted],
        committed=committed,
        elapsed_secs=elapsed_secs,
        limit=sum(status.limit or 0 for status in statuses),
        # Not all of them need to have had their most at the same moment: it was that many or less.
        in_flight_max=sum(status.in_flight_max for status in statuses),
        breaker_open=any(status.breaker_open for status in statuses),
        breaker_openings=sum(status.breaker_openings for status in statuses),
        begun=all(status.begun for status in statuses),
        trouble=Trouble.join([status.trouble for status in statuses]),
        names=next((status.names for status in statuses), NUMBERS),
        standing=Standing(
            all(standing.done for standing in standings),
            any(standing.stopped for standing in standings),
            elsewhere[0].intersection(*elsewhere) if elsewhere else frozenset(),
        ),
        books=Tallied.join(status.books for status in statuses),
        tallied=Tallied.join(status.tallied for status in statuses),
        partitions={key: view for status in statuses for key, view in status.partitions.items()},
        still_secs=max((status.still_secs for status in statuses), default=0.0),
        draining=any(status.draining for status in statuses),
        paused=bool(statuses) and all(status.paused for status in statuses),
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

    process: BaseProcess
    connection: Connection
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

    Forks when it is made, so nothing that has threads or connections may have been made before.

    Args:
        config: What to run; `config.run.workers` says in how many processes.
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
        self._stop = stop
        self._started = started
        self._timer = timer
        self._told = False
        self._ends = config.run.until == "caught_up"
        self._done_since: float | None = None
        self._error: BaseException | None = None
        self._workers: list[_Worker] = []
        # Commands come from other threads than the one that ends all.
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._replies: dict[int, queue.SimpleQueue[Told]] = {}
        fork = multiprocessing.get_context("fork")
        count = config.run.workers
        for index in range(count):
            ours, theirs = fork.Pipe()
            # What is open here is open there too, and would hide from the others that we are gone.
            others = [ours, *(worker.connection for worker in self._workers)]
            process = fork.Process(
                target=_work,
                args=(member_of(config, index, count), index, started, theirs, others),
                name=f"worker-{index}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, reported=timer()))

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
                if self._stop.is_set() or self._error or self._all_done():
                    self._tell_all()
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
        now = self._timer()
        statuses = [worker.status(now) for worker in self._workers]
        return merge(statuses, now - self._started)

    def command(self, command: Command) -> Told:
        """Have each worker carry something out; called from another thread."""
        number = next(self._numbers)
        replies = self._replies[number] = queue.SimpleQueue()
        asked = 0
        for worker in self._workers:
            with suppress(OSError), self._sending:  # it has ended
                if not worker.report.ended:
                    worker.connection.send((number, command))
                    asked += 1
        if command.action == LEVEL:
            set_level(command.level)
        told: list[Told] = []
        deadline = self._timer() + ANSWER_SECS + _LOOK_SECS
        with suppress(queue.Empty):
            for _ in range(asked):
                told.append(replies.get(timeout=max(0.0, deadline - self._timer())))
        del self._replies[number]
        return Told.join(told)

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
            with suppress(OSError), self._sending:  # it has ended
                worker.connection.send(_STOP)

    def _all_done(self) -> bool:
        """Whether nothing more is to come, or nothing more can; see `Rounds`."""
        status = self.status()
        standing = status.standing
        if not (status.begun and standing.done and (self._ends or standing.stopped)):
            self._done_since = None
            return False
        if not standing.elsewhere:
            return True
        if self._done_since is None:
            self._done_since = self._timer()
        return self._ends and self._timer() - self._done_since > OTHERS_MOST_SECS


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
    config: Config, index: int, started: float, connection: Connection, others: list[Connection]
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

    def status() -> Status:
        return _slim(runs[0].status()) if runs else Status.of_nothing(0)

    def listen() -> None:
        while True:
            try:
                if connection.poll(_REPORT_SECS):
                    if (heard := connection.recv()) == _STOP:
                        stop.set()
                    else:
                        threading.Thread(target=obey, args=heard, daemon=True).start()
                line.say(Report(status()))
            except (EOFError, OSError):
                # Nobody is there any more. Who runs us again must not find us at work.
                os._exit(1)

    def obey(number: int, command: Command) -> None:
        told = runs[0].command(command) if runs else Told(False, "the run has not begun yet")
        with suppress(OSError):  # noticed by who listens
            line.say(Reply(number, told))

    def tell() -> None:
        with suppress(OSError):  # noticed by who listens
            line.say(Report(status()))

    threading.Thread(target=listen, name="listen", daemon=True).start()
    try:
        runs.append(Rounds(config, stop, started, tell=tell))
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
