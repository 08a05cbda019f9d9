"""Committer: makes durable how far partitions are done, once per process. Knows no source."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from transforms.commit.contiguous import ContiguousOffsets
from transforms.lanes import Lanes
from transforms.per_process import per_process
from transforms.records import PartitionKey
from transforms.source import Source, TransactionalStore
from transforms.tally import COMMIT_ERRORS, COMMITTED, LAST_COMMIT, PULSE, TALLY

_LOGGER = logging.getLogger(__name__)

_RETRY_SECS = 60.0
REFRESH_SECS = 3600
INTERVAL_SECS = 0.1


@dataclass(frozen=True, slots=True)
class CommitConfig:
    """What is committed.

    Attributes:
        source: What keeps them.
        lanes: How a partition's records are divided.
        refresh_secs: How often each partition's offset is committed again, be it where it was. No
            consumer is a member of the group, so the broker forgets an offset
            (`offsets.retention.minutes`) by when it was committed last, even while we run. None in
            a streaming run that ends: there each is committed once more at the end, and a timer
            that is set far ahead would keep the run from ending.
        interval_secs: How long, at least, is between two commits of what rounds have finished.
        behind: Whether a streaming run does not wait for its commits either, but for some.
        settles: Whether positions are kept together with what is written of their records.
    """

    source: Source
    lanes: Lanes = Lanes()
    refresh_secs: float | None = REFRESH_SECS
    interval_secs: float = INTERVAL_SECS
    settles: bool = False
    behind: bool = False


class Committer:
    """Commits positions: at once, or soon by a thread of its own; and again from time to time.

    Args:
        config: Where to, and how often to commit again.
        timer: Monotonic seconds.

    Attributes:
        done: How far the partitions are done.
        committed: By partition, the offset that was committed last.
    """

    def __init__(self, config: CommitConfig, timer: Callable[[], float] = time.monotonic) -> None:
        self._ledger = config.source.ledger
        self._store = config.source.store()
        # The distance between two numbers says nothing then.
        self._sparse = config.source.names.texts
        self._refresh_secs = math.inf if config.refresh_secs is None else config.refresh_secs
        self._interval_secs = config.interval_secs
        self._timer = timer
        self._refresh_at = timer() + self._refresh_secs
        self._notes: dict[PartitionKey, str] = {}
        # One commit at a time, so that an older one never comes behind a newer one.
        self._one = threading.Lock()
        self._changed = threading.Condition()
        self._put: dict[PartitionKey, tuple[int, str]] = {}
        self._working: dict[PartitionKey, tuple[int, str]] = {}
        self._thread: threading.Thread | None = None
        self._flushing = False
        self._problem: BaseException | None = None
        self.done = ContiguousOffsets()
        self.committed: dict[PartitionKey, int] = {}

    def begin(self, key: PartitionKey, marks: Sequence[int]) -> None:
        """Say where each lane of a partition begins; nothing is committed by that."""
        self.done.begin(key, marks)
        self.committed[key] = min(marks)

    def forget(self, key: PartitionKey) -> None:
        """Commit nothing more of a partition, until `begin`."""
        # A commit that is under way is waited for: it must not come behind another owner's.
        with self._one, self._changed:
            self._put.pop(key, None)
            self._working.pop(key, None)
            self._notes.pop(key, None)
            self.committed.pop(key, None)
            self.done.forget(key)
            self._changed.notify_all()

    def holds(self, key: PartitionKey) -> bool:
        """Whether something of a partition was put and is not committed yet."""
        with self._changed:
            return key in self._put or key in self._working

    def commit(
        self,
        next_offsets: Mapping[PartitionKey, int],
        metadata: Mapping[PartitionKey, str] = MappingProxyType({}),
    ) -> None:
        """Commit, and wait for the answer. Repeats while the store is away, up to a minute.

        Args:
            next_offsets: By partition.
            metadata: What to keep with the offsets, where there is anything.

        Raises:
            SinkError: They cannot be kept, or the source's store stays away.
        """
        self._commit({key: (at, metadata.get(key, "")) for key, at in next_offsets.items()})

    def _commit(self, put: dict[PartitionKey, tuple[int, str]]) -> None:
        """Commit what is in it each time that is tried: `forget` takes out of it."""
        deadline = self._timer() + _RETRY_SECS
        while put:
            with self._one:
                offsets = {key: offset for key, (offset, _) in put.items()}
                notes = {key: note for key, (_, note) in put.items()}
                why = self._store.commit(offsets, notes, self._timer() >= deadline)
                if why is None:
                    self._take_note(offsets, notes)
                    return
            TALLY.count(COMMIT_ERRORS, 1)
            # Whoever waits for it has not come to a stop.
            PULSE.beat()
            _LOGGER.warning("commit to %s is repeated: %s", self._ledger, why)
            time.sleep(0.5)

    def _take_note(
        self, offsets: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str]
    ) -> None:
        """They are committed. Holds the lock."""
        for key, offset in offsets.items():
            if not self._sparse:
                TALLY.count(COMMITTED, offset - self.committed.get(key, offset), key[0])
        TALLY.note(LAST_COMMIT, time.time())
        self.committed.update(offsets)
        self._notes.update(notes)

    def settle(
        self,
        next_offsets: Mapping[PartitionKey, tuple[int, str]],
        written: Collection[PartitionKey],
    ) -> bool:
        """Commit together with what was written, and wait for the answer.

        Args:
            next_offsets: By partition, each with what to keep beside it.
            written: Partitions of which something was written.

        Returns:
            Whether it is done; else nothing is to be seen of what was written.

        Raises:
            SinkError: It is not known.
        """
        assert isinstance(self._store, TransactionalStore)
        offsets = {key: offset for key, (offset, _) in next_offsets.items()}
        notes = {key: note for key, (_, note) in next_offsets.items()}
        with self._one:
            why = self._store.settle(offsets, notes, written)
            if why is None:
                self._take_note(offsets, notes)
                return True
        TALLY.count(COMMIT_ERRORS, 1)
        _LOGGER.warning("what was written is not to be seen, and is written again: %s", why)
        return False

    def put(self, next_offsets: Mapping[PartitionKey, tuple[int, str]]) -> None:
        """Have offsets committed soon, by a thread of the committer's own.

        Nobody waits for the answer; offsets that come meanwhile take the place of those before.

        Args:
            next_offsets: By partition, each with what to keep beside it.

        Raises:
            SinkError: What was put before could not be committed.
        """
        with self._changed:
            self._raise_problem()
            first = not self._put
            self._put.update(next_offsets)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="commit", daemon=True)
                self._thread.start()
            if first:
                # Later ones find the thread at its work, or waiting for its interval to be over.
                self._changed.notify_all()

    def flush(self) -> None:
        """Commit what was put, and wait for the answer.

        Raises:
            SinkError: It could not be committed.
        """
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._put or self._working) or self._problem)
            self._flushing = False
            self._raise_problem()

    def _raise_problem(self) -> None:
        if problem := self._problem:
            raise problem

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._put)
                    self._working, self._put = self._put, {}
                self._commit(self._working)
                with self._changed:
                    self._working = {}
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._flushing, self._interval_secs)
        except BaseException as error:
            with self._changed:
                self._problem = error
                self._changed.notify_all()

    def refresh(self, now: bool = False) -> None:
        """Commit all that was committed again, if it is time to.

        A store that does not take it is warned of, and asked again within a minute: nothing that
        was finished depends on it.

        Args:
            now: Whether it is time, whenever it was done last.

        Raises:
            SinkError: Offsets cannot be kept, or what was put could not be committed.
        """
        with self._changed:
            self._raise_problem()
        if not self._notes or not (now or self._timer() >= self._refresh_at):
            return
        with self._one:
            positions = {key: self.committed[key] for key in self._notes}
            why = self._store.commit(positions, self._notes, late=False)
        wait_secs = self._refresh_secs
        if why is not None:
            TALLY.count(COMMIT_ERRORS, 1)
            _LOGGER.warning("offsets of %s are not committed again: %s", self._ledger, why)
            wait_secs = min(_RETRY_SECS, wait_secs)
        self._refresh_at = self._timer() + wait_secs

    def kept(self, key: PartitionKey) -> int | None:
        """Where a partition stands, whoever has committed it; None if that is not known."""
        with self._one:
            return self._store.kept(key)

    def listen(self) -> None:
        """Take in what the connections have said: nobody else does, and it would pile up."""
        self._store.listen()


def shared_committer(config: CommitConfig) -> Committer:
    """This process's committer for the config."""
    return per_process(Committer, config)
