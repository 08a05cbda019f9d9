"""Rounds: run the bounded pipeline again and again on this machine, and decide when.

A round reads what is due, hands it to the invoker and writes and commits what has finished. The
invoker, the reader and the committer outlive the rounds, so the function is kept busy while one
round ends and the next begins. Why rounds at all: docs/adr/0001-rounds-on-the-directrunner.md.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from time import monotonic, thread_time, time

from pipeline.build import build
from pipeline.options.config import Config
from pipeline.run.graph import Graph
from pipeline.run.hands import (
    LEVEL,
    PAUSE,
    RESUME,
    RETRY,
    REVIVE,
    SKIP,
    Answer,
    Command,
    Inbox,
    Pauses,
    Told,
)
from pipeline.run.limits import (
    LONGEST_WAIT_SECS,
    SHORTEST_WAIT_SECS,
    Held,
    PartitionLimits,
    RoundLimits,
    collect_secs,
    ease_secs,
    state_of,
    wait_secs,
)
from pipeline.run.preflight import preflight
from pipeline.run.status import PartitionView, Standing, Status, Totals, with_calls
from pipeline.watch.logs import set_level
from transforms.commit.committer import shared_committer
from transforms.conditions import SKIPPED
from transforms.errors import SinkError, Stopped, WriteError
from transforms.invoke.failures import Trouble
from transforms.invoke.invoke import InvokeConfig, shared_invoker, why_broken
from transforms.invoke.invoker import Invoker
from transforms.invoke.window import is_over
from transforms.names import spoken
from transforms.read.rounds import Room, Round, shared_reader
from transforms.records import EARLY, FINAL, Finished, PartitionKey
from transforms.schemas.registry import shared_registry
from transforms.source import Found, Members, held_up, startable
from transforms.tally import BOOKS, HELD, POLLED, PULSE, TALLY, Series, Tallied
from transforms.tracing import close_tracer
from transforms.write.write import forget_partition, to_write_again, write_at_once

_LOGGER = logging.getLogger(__name__)

_DISCOVER_SECS = 2.0
# While a partition waits for those whose place it takes.
_SETTLE_SECS = 0.2
_MISSING_LOOKS = 4
_MEND_SECS = 0.5
_LOOK_SECS = 1.0
_LOG_SECS = 60.0
# With many partitions less often: of its time the loop spends such a part on looking.
_LOOK_SHARE = 0.005
_LOOK_MOST_SECS = 5.0
# While partitions are asked for; how often it is looked at what others have; how long a run that
# ends waits to be given something; and for what is nobody's or does not get on elsewhere.
_LEAVE_SECS = 0.02
_OTHERS_SECS = 0.5
_JOIN_SECS = 5.0
OTHERS_MOST_SECS = 60.0
# What may be needed beside the function's own time.
_AFTER_SECS = 10.0
# Of how many rounds what one costs is the mean.
_ROUNDS = 8


def run_or_stop(graph: Graph, totals: Totals) -> None:
    """Run it once; what waits for something in it may end because the run is told to stop.

    Raises:
        SinkError: A step failed.
    """
    try:
        totals.add(graph.run())
    except Stopped as stopped:
        _LOGGER.warning("%s; it goes on there with the next run", stopped)


class _Heard(threading.Event):
    """For what waits inside the steps: until the run is to stop. To wait is not to hang: the group
    keeps what it has given, and nobody takes the loop for dead."""

    def __init__(self, stop: threading.Event, members: Members | None) -> None:
        super().__init__()
        self._stop = stop
        self._members = members

    def wait(self, timeout: float | None = None) -> bool:
        PULSE.beat()
        with suppress(SinkError):  # said by the loop
            if self._members:
                self._members.deal()
        return self._stop.wait(timeout)


def left_elsewhere(keys: Collection[PartitionKey]) -> SinkError:
    """What a run ends with that is to end and waits in vain. Pure."""
    some = ", ".join(f"{topic}-{number}" for topic, number in sorted(keys)[:10])
    some += ", ..." if len(keys) > 10 else ""
    return SinkError(
        f"{some}: not done, and not this run's: nobody in the group has got on there for "
        f"{OTHERS_MOST_SECS:.0f} s; all else is done. Look at the group's other members, then run "
        f"again"
    )


def parted(
    taken: Mapping[PartitionKey, int],
    given: Mapping[PartitionKey, int],
    asked_for: Collection[PartitionKey],
    leaving: Collection[PartitionKey],
) -> tuple[list[PartitionKey], list[PartitionKey]]:
    """What a member has taken and others have by now, and what it is to see off. Pure.

    Args:
        taken: The number of the giving by which each partition was taken.
        given: The same of what it is given now.
        asked_for: What is to go to others, in its own time.
        leaving: What is being seen off. That goes on though it is not asked for any more, since
            nothing is read of it by now; it is taken anew when it has been let go of.
    """
    lost = [key for key, number in taken.items() if given.get(key) != number]
    going = [key for key in taken if key in asked_for or key in leaving]
    return lost, [key for key in going if key not in lost]


def not_done_elsewhere(
    keys: Set[PartitionKey], asked_of: Set[PartitionKey], unfinished: Set[PartitionKey]
) -> frozenset[PartitionKey]:
    """Which partitions of others are not known to be done: an answer says nothing of those that it
    was not asked of. Pure."""
    return frozenset(unfinished & keys | keys - asked_of)


def hear(config: Config, stop: threading.Event) -> None:
    """Have what waits inside the steps, for as long as it takes, end when the run is to stop."""
    if config.write.registry:
        shared_registry(config.write.registry).stop = stop


def drain(invoker: Invoker, config: InvokeConfig, collect: Callable[[], None]) -> None:
    """End what is running, then write and commit what it came to.

    Args:
        invoker: Begins no further call.
        config: What it was made of.
        collect: Runs a round that hands nothing over.

    Raises:
        SinkError: What broke the invoker off, after all that.
    """
    invoker.stop()
    invoker.join(config.function.timeout_secs + 10)
    if invoker.has_finished:
        collect()
    if error := why_broken(invoker, config.function):
        raise error


class Rounds:
    """Runs rounds until told to stop, caught up, or nothing can go on.

    Args:
        config: What to run.
        stop: Set from outside to end after the round that is running.
        started: When the program began, by `timer`.
        limits: What bounds a round.
        timer: Monotonic seconds.
        tell: Called when `Standing` has changed, where it is decided elsewhere when to end.
        pauses: What is paused; None for what the options say.
    """

    def __init__(
        self,
        config: Config,
        stop: threading.Event,
        started: float | None = None,
        limits: RoundLimits = RoundLimits(),
        timer: Callable[[], float] = monotonic,
        tell: Callable[[], None] | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        self._config = config
        self._tell = tell
        self._stop = stop
        self._limits = limits
        self._timer = timer
        self._started = timer() if started is None else started
        self._totals = Totals()
        self._graph = Graph(lambda pipeline: build(pipeline, config))
        self._invoker = shared_invoker(config.invoke)
        self._reader = shared_reader(config.read)
        self._committer = shared_committer(config.commit)
        self._source = config.read.source.partitions(self._reader.fetcher)
        self._members = config.read.source.members()
        # What was taken of what was given, and until when what is asked for may stay.
        self._taken: dict[PartitionKey, int] = {}
        self._leaving: dict[PartitionKey, float] = {}
        # What was let go of, and whether it was lost.
        self._left: dict[PartitionKey, bool] = {}
        self._standing = Standing()
        self._done_since = self._asked = float("-inf")
        self._asked_of: frozenset[PartitionKey] = frozenset()
        self._took = self._joined = float("-inf")
        hear(config, _Heard(stop, self._members))
        self._found: list[Found] = []
        self._surveyed: frozenset[PartitionKey] = frozenset()
        self._missed: Counter[PartitionKey] = Counter()
        self._mended = float("-inf")
        self._discovered = float("-inf")
        self._lags: dict[PartitionKey, int | None] | None = None
        self._looked = float("-inf")
        self._look_secs = 0.0
        self._held: dict[PartitionKey, Held] = {}
        self._limits_now = limits.among((), self._turn_records)
        self._views: dict[PartitionKey, PartitionView] = {}
        self._logged = float("-inf")
        self._draining = False
        self._inbox = Inbox()
        self._pauses = Pauses(config.run.start_paused) if pauses is None else pauses
        self._paused: frozenset[PartitionKey] = frozenset()
        # Halted partitions that are to go on, those with a command behind a record of theirs.
        self._revived: dict[PartitionKey, tuple[Command, Answer]] = {}
        self._books = Tallied()
        # Of what has run in this process before, nothing counts.
        self._books_before, self._tallied_before = BOOKS.take(), TALLY.take()
        self._stats_before = self._invoker.stats
        # When the loop has looked at everything, when it is to look again, and what it knew then.
        self._passed_at = self._pass_at = self._ended_at = float("-inf")
        self._at_ease_until = float("-inf")
        self._done_batches = 0
        # Processor time of a round, of late.
        self._round_secs = 0.0

    def run(self) -> Status:
        """Run to the end.

        Raises:
            SinkError: The run cannot go on; what was finished before is committed.
        """
        try:
            return self._run()
        except BaseException:
            # What has been finished is not to be done again for what came behind it.
            with suppress(SinkError):
                self._committer.flush()
            raise
        finally:
            if self._members:
                self._members.close()
            if trace := self._config.invoke.trace:
                close_tracer(trace)

    def _run(self) -> Status:
        if self._config.run.preflight:
            preflight(self._config, self._source)
        self._discover(at_start=True)
        PULSE.beat()
        self._look()
        ended = False
        while not (self._stop.is_set() or self._invoker.broken or (ended := self._ended())):
            PULSE.beat()
            self._obey()
            came = self._wait()
            # Where a partition ends for now counts in a run that ends there.
            if (came and (self._flush or self._reader.stirred)) or self._is_time():
                self._pass()
        self._draining = True
        self._end_calls()
        drain(self._invoker, self._config.invoke, lambda: self._run_round([]))
        self._settle()
        self._graph.close()
        self._committer.flush()
        self._committer.refresh(now=True)
        self._look()
        if self._standing.done:
            for key, error in self._reader.lost.items():
                if not self._at_target(key):
                    raise error
            there = {each.key for each in self._found}
            for key in sorted(self._standing.elsewhere - there):
                raise self._source.gone(key)
            if ended and self._flush and self._standing.elsewhere:
                raise left_elsewhere(self._standing.elsewhere)
        return self.status()

    def allow(self, min_concurrency: int, max_concurrency: int) -> None:
        """Make so many invocations at once from here on; may be called from another thread."""
        self._invoker.allow(min_concurrency, max_concurrency)

    def status(self) -> Status:
        """How the run stands; may be called from another thread."""
        lags = self._lags
        return Status(
            totals=with_calls(self._totals, self._invoker, self._stats_before),
            in_flight=self._invoker.in_flight,
            lags=lags or {},
            halted=self._invoker.halted,
            committed=dict(self._committer.committed),
            elapsed_secs=self._timer() - self._started,
            limit=self._invoker.limit,
            in_flight_max=self._invoker.in_flight_max,
            breaker_open=self._invoker.breaker_open,
            breaker_openings=self._invoker.breaker_openings,
            begun=lags is not None,
            trouble=self._trouble(),
            names=self._config.read.source.names,
            standing=self._standing,
            books=self._books,
            tallied=TALLY.take().since(self._tallied_before),
            partitions=self._views,
            still_secs=0.0 if lags is None or self._draining else PULSE.still_secs,
            draining=self._draining,
            paused=self._pauses.everywhere,
        )

    def command(self, command: Command) -> Told:
        """Carry something out that an operator has said; called from another thread."""
        return self._inbox.ask(command)

    def _trouble(self) -> Trouble:
        trouble = self._invoker.trouble
        oldest_ms = dict(trouble.oldest_ms)
        for key, view in self._views.items():
            if view.oldest_ms is not None:
                oldest_ms[key] = min(view.oldest_ms, oldest_ms.get(key, view.oldest_ms))
        if not oldest_ms:
            return trouble
        age_secs = max(0.0, time() - min(oldest_ms.values()) / 1000)
        return replace(trouble, oldest_age_secs=age_secs, oldest_ms=oldest_ms)

    # -- one pass of the loop --------------------------------------------------------------

    def _wait(self) -> int:
        """Wait for records, or to be given something. Returns how many have come."""
        if self._members and not self._taken:
            self._members.wait(self._wait_secs())
            return self._reader.fill(0)
        return self._reader.fill(self._wait_secs())

    def _wait_secs(self) -> float:
        """How long to wait for records, with an eye on what else may come."""
        now = self._timer()
        return wait_secs(
            self._pass_at - now,
            self._at_ease_until - now,
            self._invoker.done_batches != self._done_batches,
            now - max(self._passed_at, self._ended_at) if self._invoker.has_work else None,
        )

    def _is_time(self) -> bool:
        """Whether something is to be done although no record has come."""
        now = self._timer()
        if now >= self._pass_at:
            return True
        return now >= self._at_ease_until and self._invoker.done_batches != self._done_batches

    def _pass(self) -> None:
        """Look at everything once, and run a round if one is due."""
        self._passed_at = self._timer()
        if self._invoker.done_batches != self._done_batches:
            self._done_batches, self._ended_at = self._invoker.done_batches, self._passed_at
        self._mend()
        wait_secs = max(_LOOK_SECS, min(_LOOK_MOST_SECS, self._look_secs / _LOOK_SHARE))
        if self._passed_at - self._looked >= wait_secs:
            self._look()
        self._meet()
        self._revive()
        self._close_windows()
        if self._passed_at - self._discovered > (
            _SETTLE_SECS if self._unsettled else _DISCOVER_SECS
        ):
            self._discover(at_start=False)
        held = self._hold()
        self._pause(held)
        limits = self._limits.among(held.values(), self._turn_records)
        self._held, self._limits_now = held, limits
        again = to_write_again(self._config.write)
        # What is written again comes first: else more and more would wait for it.
        rooms = [] if again else self._rooms(held, limits)
        ready = {
            key
            for key, each in held.items()
            if key not in self._paused
            and self._is_ready(key, limits.is_full(each), each.queue.busy)
        }
        self._fetch(held, limits, ready)
        due = {room.key for room in rooms} & ready
        leaving = any(map(self._invoker.has_finished_of, self._leaving))
        if again or leaving or self._due(due, limits):
            self._run_round(rooms)
            self._take_note(held)
        self._committer.refresh()
        windows = (
            self._reader.due_secs(key, each.queue.busy)
            for key, each in held.items()
            if key not in ready and key not in self._paused
        )
        secs = min(
            _LEAVE_SECS if self._leaving else LONGEST_WAIT_SECS,
            min(windows, default=LONGEST_WAIT_SECS),
        )
        now, ease = self._timer(), 0.0
        if self._invoker.has_work or self._invoker.has_finished:
            much = self._has_much(due)
            if self._invoker.has_finished:
                left_secs = collect_secs(much, self._round_secs) - self._invoker.finished_age_secs
                secs = min(secs, max(0.0, left_secs))
            if much:
                # To look at each batch that ends takes the interpreter from a thread that is about
                # to send a request.
                queues = (each.queue for each in held.values())
                ease = ease_secs(queues, self._config.lanes.count, self._invoker.usual_secs)
        self._pass_at = now + max(secs, SHORTEST_WAIT_SECS)
        self._at_ease_until = now + ease

    @property
    def _open_windows(self) -> dict[PartitionKey, int]:
        """Partitions of this process with an open window that nothing keeps from being closed once
        it is over, and when it ends, in milliseconds since the epoch."""
        if not self._config.invoke.window:
            return {}
        lost, here = self._reader.lost, set(self._here) - self._paused
        opened = self._invoker.open_windows()
        return {key: end for key, end in opened.items() if key in here and key not in lost}

    def _close_windows(self) -> None:
        """End windows of which nothing more comes: their shard has ended, they are over and nothing
        has come for long enough, or the run ends with what it has read of them."""
        window, now_ms = self._config.invoke.window, time() * 1000
        for key, end_ms in self._open_windows.items():
            assert window
            if self._reader.waiting(key)[0]:
                continue
            over = is_over(end_ms, window.ms, now_ms) and self._reader.is_at_end(key)
            if over or self._reader.has_ended(key):
                self._invoker.close_window(key, FINAL)
            elif self._at_target(key):
                self._invoker.close_window(key, FINAL if now_ms >= end_ms else EARLY)

    def _take_note(self, keys: Collection[PartitionKey]) -> None:
        """Count the batches that have ended as looked at, if the round has seen to all there is."""
        done = self._invoker.done_batches
        if not self._invoker.has_finished and not any(self._reader.waiting(k)[0] for k in keys):
            self._done_batches, self._ended_at = done, self._timer()

    def _hold(self) -> dict[PartitionKey, Held]:
        """What is held of each partition now. What was read of a halted one is dropped."""
        held = {}
        for key in self._reader.partitions:
            queue = self._invoker.queue(key)
            if queue.halted:
                self._reader.drop(key)
            held[key] = Held(queue, *self._reader.waiting(key))
        return held

    def _rooms(self, held: dict[PartitionKey, Held], limits: PartitionLimits) -> list[Room]:
        """What each partition may hand over now, those left out that may not."""
        rooms = [
            Room(*key, *limits.room(each), flush=limits.is_full(each), busy=each.queue.busy)
            for key, each in held.items()
            if not self._at_target(key) and key not in self._paused
        ]
        return [room for room in rooms if room.records]

    def _fetch(
        self, held: dict[PartitionKey, Held], limits: PartitionLimits, ready: set[PartitionKey]
    ) -> None:
        """Fetch for those partitions of which more may be held."""
        reader = self._reader
        reader.set_wanted(
            key
            for key, each in held.items()
            if not self._at_target(key)
            and key not in self._paused
            and limits.wanted(each, key in ready, reader.is_paused(key))
        )

    def _is_ready(self, key: PartitionKey, full: bool, busy: frozenset[int]) -> bool:
        """Whether enough of a partition was read for a batch."""
        reader = self._reader
        return (full and reader.waiting(key)[0] > 0) or reader.ready(key, self._flush, busy)

    def _due(self, ready: set[PartitionKey], limits: PartitionLimits) -> bool:
        """Whether a round is worth its while now, with partitions that are ready for one."""
        invoker = self._invoker
        if invoker.is_full or any(limits.starving(invoker.queue(key)) for key in ready):
            return True
        if not invoker.has_finished:
            return False
        return (
            invoker.finished_age_secs >= collect_secs(self._has_much(ready), self._round_secs)
            or invoker.finished_records >= self._limits.collect_records
            or not invoker.has_work
        )

    def _has_much(self, ready: set[PartitionKey]) -> bool:
        """Whether much is under way, with partitions that are ready for a round."""
        lanes = len(self._reader.partitions) * self._config.lanes.count
        return bool(ready) or self._invoker.pending_batches > 2 * lanes

    def _run_round(self, rooms: list[Room]) -> None:
        limits = self._limits
        # Each of the first rounds twice the one before: the function gets to work early, and what
        # it has been given lasts until the next round has read.
        records = min(limits.records, limits.first_records << min(self._totals.rounds, 16))
        records = max(records, self._turn_records)
        self._reader.begin(Round(tuple(rooms), records, limits.bytes, self._flush))
        started = thread_time()
        run_or_stop(self._graph, self._totals)
        self._round_secs += (thread_time() - started - self._round_secs) / _ROUNDS

    @property
    def _turn_records(self) -> int:
        """Records of a batch for each lane of a partition."""
        return self._config.read.batch_size * self._config.lanes.count

    @property
    def _flush(self) -> bool:
        """In a run that ends, nothing more is waited for to fill a batch."""
        return self._config.run.until == "caught_up"

    # -- hands -----------------------------------------------------------------------------

    def _obey(self) -> None:
        """Carry out what was told meanwhile."""
        for command, answer in self._inbox.take():
            keys = [key for key in self._here if command.covers(key)]
            if command.action == REVIVE:
                self._begin_revival(command, keys, answer)
            elif command.action == SKIP:
                self._begin_skip(command, keys, answer)
            else:
                self._say(answer, self._do(command, keys))
            self._pass_at = self._timer()

    def _do(self, command: Command, keys: list[PartitionKey]) -> Told:
        match command.action:
            case action if action in (PAUSE, RESUME):
                self._pauses.set(command, action == PAUSE)
                changed = [key for key in keys if (key in self._paused) != self._pauses.has(key)]
                self._pause(self._reader.partitions)
                return Told(True, "paused" if action == PAUSE else "resumed", tuple(changed))
            case action if action == RETRY:
                tried = self._invoker.retry(keys)
                return Told(True, f"{len(tried)} partitions are tried now", tuple(sorted(tried)))
            case action if action == LEVEL:
                set_level(command.level)
                return Told(True, f"logs from {command.level} on")
            case action:
                return Told(False, f"{action} is nothing that can be done")

    def _say(self, answer: Answer, told: Told) -> None:
        answer(replace(told, here=tuple(self._here)))

    @property
    def _here(self) -> list[PartitionKey]:
        """Partitions that are this process's, and not about to be another's."""
        gone = self._leaving.keys() | self._left.keys()
        return sorted(key for key in self._reader.partitions if key not in gone)

    def _pause(self, keys: Collection[PartitionKey]) -> None:
        """Have the invoker know which partitions are paused; they come and go."""
        paused = frozenset(filter(self._pauses.has, keys)) if self._pauses else frozenset()
        if paused != self._paused:
            self._paused = paused
            self._invoker.pause(paused)

    def _begin_revival(self, command: Command, keys: list[PartitionKey], answer: Answer) -> None:
        halted = {finished.key for finished in self._invoker.halted}
        going_on = [key for key in keys if key in halted]
        for key in going_on:
            self._revived.setdefault(key, (command, lambda _: None))
        self._say(answer, Told(True, f"{len(going_on)} halted partitions go on", tuple(going_on)))

    def _begin_skip(self, command: Command, keys: list[PartitionKey], answer: Answer) -> None:
        """Have a record skipped once nothing of its partition is under way any more."""
        why = ""
        if self._config.invoke.window:
            why = (
                "with --tumbling_window_secs no record can be skipped: what its window holds is "
                "not done before that is closed"
            )
        elif not self._config.write.error_topic:
            why = "there is no --error_topic, where a record is written to before it is skipped"
        elif len(keys) != 1 or command.partition is None:
            why = "give the topic and the partition of one record; this run has no such partition"
        elif keys[0] in self._revived:
            why = "the partition is about to go on"
        if why:
            self._say(answer, Told(False, why))
            return
        (key,) = keys
        offset = None
        if command.offset is not None:
            try:
                offset = self._config.read.source.names.read(command.offset)
            except ValueError:
                self._say(answer, Told(False, f"{command.offset} is no record's number"))
                return
        halt = self._halt_of(key) or self._invoker.stop_at(key, offset)
        if halt is None or offset not in (None, self._halted_at(halt)):
            where = f" at offset {spoken(self._halted_at(halt))}" if halt else ""
            waits = "it is halted" if halt else "it is neither halted nor backing off just now"
            said = f"{key[0]}-{key[1]} does not stand in front of that record: {waits}{where}"
            self._say(answer, Told(False, said))
            return
        self._revived[key] = command, answer

    def _halt_of(self, key: PartitionKey) -> Finished | None:
        return next((each for each in self._invoker.halted if each.key == key), None)

    def _halted_at(self, halt: Finished) -> int:
        assert halt.halted
        return halt.halted.records.offsets[0]

    def _revive(self) -> None:
        """Go on with halted partitions, as told, once all that is done of them is committed."""
        if not self._revived:
            return
        here, again = set(self._here), to_write_again(self._config.write)
        for key, (command, answer) in list(self._revived.items()):
            invoker, halt = self._invoker, self._halt_of(key)
            if key not in here or halt is None:
                del self._revived[key]
                self._say(answer, Told(False, f"{key[0]}-{key[1]} is not halted here any more"))
            elif not (
                invoker.queue(key).batches
                or invoker.has_finished_of(key)
                or key in again
                or self._committer.holds(key)
            ):
                del self._revived[key]
                try:
                    said = self._skip(key, halt, command)
                except SinkError as error:
                    self._say(answer, Told(False, str(error), (key,)))
                    if isinstance(error, WriteError):
                        continue
                    # It is not known what became of it, as in a round.
                    raise
                self._go_on(key)
                self._say(answer, Told(True, said, (key,)))

    def _skip(self, key: PartitionKey, halt: Finished, command: Command) -> str:
        """Write the record that is in the way to the error topic, and be done with it."""
        if command.action != SKIP:
            return "goes on"
        failure = halt.halted
        assert failure
        count = len(failure) if command.whole else 1
        failure = replace(
            failure,
            records=failure.records.slice(0, count),
            entries=failure.entries[:count],
            condition=SKIPPED,
        )
        first, last = failure.records.offsets[0], failure.records.offsets[-1]
        marks = list(self._committer.done.marks(key))
        BOOKS.count(POLLED, count, key[0])
        outcome = Finished(*key, marks[halt.lane], last + 1, [failure], lane=halt.lane)
        marks[halt.lane] = max(marks[halt.lane], last + 1)
        at, note = min(marks), self._config.lanes.note(marks)

        def commit() -> bool:
            if self._config.commit.settles:
                return self._committer.settle({key: (at, note)}, {key})
            self._committer.commit({key: at}, {key: note})
            return True

        write_at_once(self._config.write, outcome, commit)
        self._totals.counters["write.errors"] += count
        self._committer.begin(key, marks)
        _LOGGER.warning(
            "%s-%d: skipped as told: offsets %s to %s", *key, spoken(first), spoken(last)
        )
        return (
            f"offsets {spoken(first)} to {spoken(last)} are written to the error topic and skipped"
        )

    def _go_on(self, key: PartitionKey) -> None:
        """Read a halted partition on from where it stands."""
        marks = list(self._committer.done.marks(key))
        self._abandon(key)
        self._reader.begin_anew({key: marks})
        _LOGGER.info("%s-%d: goes on at %s, as told", *key, self._stood(min(marks)))

    # -- beginning and end -----------------------------------------------------------------

    def _discover(self, at_start: bool) -> None:
        """Take in partitions that were not there before."""
        self._discovered = self._timer()
        self._committer.listen()
        try:
            self._found = self._source.find(quick=not at_start)
            keys = [each.key for each in self._found]
            if anew := self._source.made_anew(keys, quick=not at_start):
                self._begin_anew(anew, keys)
            if at_start:
                self._source.survey(keys)
                self._joined = self._timer()
                self._surveyed = frozenset(keys)
            known = set(self._reader.partitions)
            if self._members:
                self._members.join({topic for topic, _ in known.union(keys)})
            else:
                self._take_up([key for key in startable(self._found) if key not in known])
            self._miss(known - set(keys), known)
        except SinkError as error:
            if at_start:
                raise
            # A broker that is away for a moment; asked again with the next turn.
            _LOGGER.debug("partitions are not looked for now: %s", error)

    def _miss(self, missing: set[PartitionKey], known: set[PartitionKey]) -> None:
        """Give partitions up that are not there, looked for again and again: a broker that has just
        begun may not know them yet."""
        for key in known - missing:
            if self._missed.pop(key, 0) >= _MISSING_LOOKS:
                self._reader.find(key)
        for key in missing:
            self._missed[key] += 1
            if self._missed[key] >= _MISSING_LOOKS:
                self._reader.lose(key, self._source.gone(key))

    def _meet(self) -> None:
        """Take up what this member of several is given, and let go of what it is asked for."""
        if not self._members:
            return
        deal = self._members.deal()
        lost, going = parted(self._taken, deal.given, deal.leaving, self._leaving)
        for key in lost:
            self._abandon(key)
            self._leave(key, lost=True)
        for key in going:
            self._see_off(key)
        self._clear_up()
        self._members.let_go(deal.leaving - self._taken.keys())
        fresh = deal.given.keys() - self._taken.keys() - deal.leaving
        if not fresh or self._timer() - self._took < _MEND_SECS:
            return
        keys = [key for key in startable(self._found) if key in fresh]
        if not keys:
            # The group may have found them first.
            self._discovered = min(self._discovered, self._timer() - _DISCOVER_SECS + _SETTLE_SECS)
            return
        for key in self._reader.partitions:
            if key in fresh:
                self._forget(key)
        try:
            self._members.take(keys)
            self._take_up(keys)
            self._taken |= {key: deal.given[key] for key in keys}
        except SinkError as error:
            self._members.let_go(keys)
            self._took = self._timer()
            _LOGGER.debug("partitions are not begun now: %s", error)

    def _see_off(self, key: PartitionKey) -> None:
        """Let go of a partition as soon as what is under way of it has ended and is committed."""
        invoker, now = self._invoker, self._timer()
        if key not in self._leaving:
            self._leaving[key] = now + self._rebalance_wait_secs
            self._reader.drop(key)
            invoker.retire(key)
        calls = invoker.queue(key).batches
        again = key in to_write_again(self._config.write)
        if calls or again or invoker.has_finished_of(key) or self._committer.holds(key):
            if now < self._leaving[key]:
                return
            _LOGGER.warning(
                "%s-%d is let go of before %s, after --rebalance_wait_secs: the next owner goes on "
                "at %s, and may invoke with the same records",
                *key,
                "its invocation has ended" if calls else "all of it is committed",
                self._stood(self._committer.committed.get(key, 0)),
            )
            # The next owner writes what becomes of its records.
            self._abandon(key)
        self._leave(key)

    def _leave(self, key: PartitionKey, lost: bool = False) -> None:
        """Have nothing to do with a partition any more."""
        assert self._members
        self._reader.drop(key)
        self._members.let_go([key])
        del self._taken[key]
        self._leaving.pop(key, None)
        self._left[key] = lost
        # The group takes back what is not there any more, too.
        self._discovered = float("-inf")

    def _clear_up(self) -> None:
        """Forget what was left; if it is not there any more, that is to be said."""
        if not self._left or self._discovered == float("-inf"):
            return
        there = {each.key for each in self._found}
        if lost := [key for key, lost in self._left.items() if lost and key in there]:
            _LOGGER.warning(
                "this member of the group was not heard of in time, so others have %s-%d%s by now; "
                "what is under way of that counts for nothing",
                *lost[0],
                f" and {len(lost) - 1} more partitions" if lost[1:] else "",
            )
        for key in list(self._left):
            if key in there:
                self._forget(key)
            else:
                self._reader.lose(key, self._source.gone(key), dropped=True)
        self._left = {}

    @property
    def _rebalance_wait_secs(self) -> float:
        assert self._members
        wanted = self._config.run.rebalance_wait_secs
        if wanted is None:
            wanted = self._config.invoke.function.timeout_secs + _AFTER_SECS
        return min(wanted, self._members.wait_secs)

    def _forget(self, key: PartitionKey) -> None:
        """Know nothing of a partition any more. What its calls still come to counts for nothing."""
        self._abandon(key)
        self._reader.release(key)
        self._committer.forget(key)
        self._missed.pop(key, None)
        self._left.pop(key, None)

    def _end_calls(self) -> None:
        """Wait for the calls that are running, and be heard of meanwhile."""
        self._invoker.stop()
        deadline = self._timer() + self._config.invoke.function.timeout_secs + _AFTER_SECS
        while self._members and not self._invoker.join(1.0) and self._timer() < deadline:
            self._members.deal()

    def _settle(self) -> None:
        """Write again what could not be seen to its end, and be heard of meanwhile."""
        deadline = self._timer() + OTHERS_MOST_SECS
        while to_write_again(self._config.write) and self._timer() < deadline:
            if self._members:
                given = self._members.deal().given
                for key in [key for key, each in self._taken.items() if given.get(key) != each]:
                    self._abandon(key)
            self._run_round([])
            self._invoker.wait(lambda _: False, _LEAVE_SECS)

    def _take_up(self, keys: list[PartitionKey]) -> None:
        """Begin with partitions, each where it was left, or where a new one begins."""
        if not keys:
            return
        starts = self._source.starts(keys)
        marks = {
            key: self._config.lanes.marks(start.note, start.offset, start.end)
            for key, start in starts.items()
        }
        # Committed at once: what a starting position came to, so that a crash before the first
        # batch is finished does not move it; and what was committed before, by whomever, since
        # the broker counts from then on how long it keeps it.
        self._committer.commit(
            {key: start.offset for key, start in starts.items()},
            {key: self._config.lanes.note(each) for key, each in marks.items()},
        )
        for key, each in marks.items():
            self._committer.begin(key, each)
        self._reader.assign(marks)

    def _begin_anew(self, topics: set[str], found: list[PartitionKey]) -> None:
        """Begin with the first records of topics that were deleted and made anew: the offsets of
        before are those of other records."""
        before = [key for key in self._reader.partitions if key[0] in topics]
        self._restart({key: 0 for key in before if key in found}, "the topic was made anew")
        for key in before:
            if key not in found:
                self._abandon(key)
                self._reader.drop(key)

    def _restart(self, offsets: dict[PartitionKey, int], why: str) -> None:
        """Begin again with partitions, each at the first offset there is from the one given on.
        What is under way of them counts for nothing."""
        starts = self._source.restarts(offsets)
        for key, start in starts.items():
            self._abandon(key)
            self._committer.begin(key, [start] * self._config.lanes.count)
            _LOGGER.warning("%s-%d: %s; going on at %s", *key, why, self._stood(start))
        self._reader.begin_anew(
            {key: [start] * self._config.lanes.count for key, start in starts.items()}
        )
        self._committer.commit(starts)

    def _stood(self, position: int) -> str:
        return self._config.read.source.names.stood(position)

    def _abandon(self, key: PartitionKey) -> None:
        for lane in range(self._config.lanes.count):
            self._invoker.abandon((*key, lane))
        forget_partition(self._config.write, key)

    def _mend(self) -> None:
        """Go on with partitions whose next offset does not exist any more."""
        overtaken = self._reader.overtaken
        if not overtaken or self._timer() - self._mended < _MEND_SECS:
            return
        self._mended = self._timer()
        try:
            for key, detour in self._source.detours(overtaken).items():
                if detour.anew:
                    self._restart({key: detour.position}, detour.anew)
                    continue
                if detour.lost:
                    self._totals.counters["read.offsets_gone"] += detour.lost
                    _LOGGER.warning(
                        "%s-%d: %d offsets from %d on were deleted by the topic's retention before "
                        "they were read; what was read is worked off, then it goes on at %d",
                        *key,
                        detour.lost,
                        overtaken[key],
                        detour.position,
                    )
                self._reader.go_on_at(key, detour.position)
        except SinkError as error:
            _LOGGER.debug("asked again: %s", error)

    def _ended(self) -> bool:
        """Whether nothing more is to come, or nothing more can."""
        standing = self._stand()
        if standing != self._standing:
            self._done_since = self._timer()
            self._standing = standing
            if self._tell:
                self._tell()
        if self._tell or not standing.done or not (self._flush or standing.stopped):
            return False
        if not standing.elsewhere:
            return True
        return self._flush and self._timer() - self._done_since > OTHERS_MOST_SECS

    def _stand(self) -> Standing:
        invoker = self._invoker
        if invoker.has_work or invoker.has_finished or self._revived:
            return Standing()
        if to_write_again(self._config.write) or (self._flush and self._open_windows):
            return Standing()
        halted = {finished.key for finished in invoker.halted}
        lost = self._reader.lost.keys()
        stopped = halted | lost
        if not stopped and not self._flush and self._reader.partitions:
            return Standing()
        if (unsettled := self._unsettled - stopped) and unsettled - held_up(self._found, stopped):
            return Standing()
        going_on = [
            key
            for key in self._reader.partitions
            if key not in halted and key not in lost and not self._reader.is_dropped(key)
        ]
        if going_on and not (self._flush and all(map(self._at_target, going_on))):
            return Standing()
        if not going_on and not stopped and not (self._flush or self._members):
            return Standing()
        if self._members and self._found and not self._reader.partitions and self._may_join:
            # Of several workers others may have all of it.
            keys = frozenset(each.key for each in self._found)
            return Standing(True, elsewhere=keys) if self._tell else Standing()
        return Standing(True, bool(stopped), *self._elsewhere(held_up(self._found, stopped)))

    @property
    def _may_join(self) -> bool:
        """Whether the group has had little time yet to give this member something."""
        return self._timer() - self._joined < _JOIN_SECS

    def _elsewhere(self, held_up: Collection[PartitionKey]) -> tuple[frozenset[PartitionKey], int]:
        """Partitions that are not this process's and, in a run that ends, not done; what is kept of
        them, added up. Without those that are held up by what has stopped here."""
        if not self._members:
            return frozenset(), 0
        here = set(self._reader.partitions) - self._leaving.keys() - self._left.keys()
        keys = self._surveyed.union(each.key for each in self._found) - here - set(held_up)
        if not keys or not self._flush:
            return keys, 0
        if self._timer() - self._asked < _OTHERS_SECS:
            before = self._standing
            if not before.done:
                return keys, 0
            return not_done_elsewhere(keys, self._asked_of, before.elsewhere), before.kept
        self._asked = self._timer()
        try:
            unfinished = self._source.unfinished(keys)
            self._asked_of = keys
            return frozenset(unfinished), sum(unfinished.values())
        except SinkError as error:
            _LOGGER.debug("asked again: %s", error)
            return keys, 0

    def _at_target(self, key: PartitionKey) -> bool:
        """Whether a run that ends has read what was there when it found the partition."""
        return self._flush and self._source.caught_up(key, self._reader.position(key))

    @property
    def _unsettled(self) -> set[PartitionKey]:
        """Partitions that are not begun before others are done, and those others, until the source
        has been seen to know it."""
        read = set(self._reader.partitions)
        return {
            each.key
            for each in self._found
            if not each.ended
            and (self._reader.has_ended(each.key) if each.key in read else not self._members)
        }

    def _look(self) -> None:
        """Note how things stand between two rounds, for `status`.

        Another thread must not ask the fetcher: it would have to wait for a moment in which this
        one does not, and may never meet with one.
        """
        self._looked, started = self._timer(), thread_time()
        reader, committed = self._reader, self._committer.committed
        lag_ms = self._config.read.source.names.lag_ms
        lags: dict[PartitionKey, int | None] = {}
        views: dict[PartitionKey, PartitionView] = {}
        books, here = self._invoker.books()
        for key, records in to_write_again(self._config.write).items():
            here[key[0]] += records
        for key in reader.partitions:
            lags[key] = lag = reader.behind(key, committed[key])
            held = self._held.get(key, Held())
            here[key[0]] += reader.waiting(key)[0]
            views[key] = PartitionView(
                state_of(held, self._limits_now, lag, key in self._paused),
                None if lag is None or lag_ms else committed[key] + lag,
                reader.read_to(key),
                min(self._committer.done.marks(key), default=committed[key]),
                held.queue.records + held.records,
                held.bytes,
                reader.oldest_ms(key),
            )
        self._lags, self._views = lags, views
        books = books.since(self._books_before)
        held_now: dict[Series, float] = {
            (HELD, (topic,)): float(count) for topic, count in here.items()
        }
        self._books = replace(books, counts={**books.counts, **held_now})
        if _LOGGER.isEnabledFor(logging.DEBUG) and self._looked - self._logged > _LOG_SECS:
            self._logged = self._looked
            for key, view in views.items():
                self._log_offsets(key, view, committed[key])
        self._look_secs = thread_time() - started

    def _log_offsets(self, key: PartitionKey, view: PartitionView, committed: int) -> None:
        """As an event source mapping logs them."""
        position = self._config.read.source.names.position
        facts = {
            "event_type": "KAFKA_STATUS_EVENT",
            "topic": key[0],
            "partition": key[1],
            "end_offset": view.end,
            "consumed_offset": position(view.read),
            "processed_offset": position(view.processed),
            "committed_offset": position(committed),
        }
        text = "%s-%d: end %s, consumed %s, processed %s, committed %s"
        offsets = tuple(facts.values())[-4:]
        _LOGGER.debug(text, *key, *offsets, extra={"facts": facts})
