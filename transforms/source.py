"""Source: what the program may ask of whatever records are read from. No Beam, and no client.

A `Source` is a value: it says what is read, travels with the steps' configurations to each process,
and makes there what does the work. That is three things. `Partitions` knows which partitions there
are, where to begin with each, and when one is caught up. A `Fetcher` brings records. A `Store`
keeps how far they are done. Where several processes may share a source there is a fourth: `Members`
says which partitions are this process's; they come and go while it runs.

A position is an int, as large as the source needs: where reading goes on, so the last record's
number + 1. The numbers of a partition rise; they may have holes of any size. A partition may end
for good. Others take its place then: its children, begun only once all of it is done.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transforms.errors import SinkError
from transforms.names import Names
from transforms.records import PartitionKey, Records


@dataclass(frozen=True, slots=True)
class Found:
    """A partition that there is.

    Attributes:
        key: Which one.
        parents: Those whose place it has taken, as far as there is anything left to know of them.
        ended: Whether it has come to its end and all of it is done: nothing is to be read of it.
    """

    key: PartitionKey
    parents: tuple[PartitionKey, ...] = ()
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin with a partition.

    Attributes:
        offset: Its first offset to read.
        resolved: Whether it came from the starting position.
        note: What was committed together with the offset.
        end: The partition's next offset.
    """

    offset: int
    resolved: bool
    note: str = ""
    end: int = 0


@dataclass(frozen=True, slots=True)
class Detour:
    """How to go on with a partition whose next position does not exist any more.

    Attributes:
        position: Where to go on.
        lost: Positions that were passed over: what held there is gone.
        anew: Why everything that was read and is under way counts for nothing; empty if it counts.
    """

    position: int
    lost: int = 0
    anew: str = ""


class Message(Protocol):
    """A record as the source's client has it."""

    def offset(self) -> int: ...

    def timestamp(self) -> tuple[int, int]:
        """What kind of time it is, 0 for none, and milliseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetcher brings of one partition: records, an end, or why there are none.

    Attributes:
        key: Which one.
        messages: Its next records, in order.
        end: Where the partition ends for now, behind all that was fetched of it before.
        ended: Whether it ends there for good.
        problem: Why it cannot be read for now.
        overtaken: Whether that is because the position does not exist any more.
    """

    key: PartitionKey
    messages: Sequence[Any] = ()
    end: int | None = None
    ended: bool = False
    problem: SinkError | None = None
    overtaken: bool = False


class Fetcher(Protocol):
    """Fetches ahead, for all partitions that it was given. Used by one thread.

    Attributes:
        most: Records that one `fetch` brings at most.
    """

    most: int

    def assign(self, positions: Mapping[PartitionKey, int]) -> None:
        """Fetch more partitions, from these positions on."""

    def assign_again(self, key: PartitionKey, position: int) -> None:
        """Fetch a partition from here on, and not from where it stands; nothing is paused then."""

    def unassign(self, keys: Collection[PartitionKey]) -> None:
        """Fetch these no more."""

    def pause(self, keys: Collection[PartitionKey]) -> None:
        """Fetch nothing of these. What was fetched of them may be thrown away."""

    def resume(self, keys: Collection[PartitionKey]) -> None:
        """Fetch these again, from behind what was handed out. Records may be repeated."""

    def fetch(self, timeout_secs: float) -> tuple[int, Iterable[Fetched]]:
        """What has been fetched; waits for the first of it.

        Returns:
            How much it is, anything else than records counted too; and what it is, in order.

        Raises:
            SinkError: Nothing can be read any more.
        """

    def behind(self, key: PartitionKey, position: int) -> int | None:
        """How far the end is from a position, in what the source counts; None if not known."""

    def close(self) -> None:
        """Leave the source."""

    # Many at once: a call for each record would cost as much as all the rest.

    def keys(self, messages: Sequence[Any]) -> Iterable[bytes | None]:
        """The records' keys."""

    def offsets(self, messages: Sequence[Any]) -> Iterable[int]:
        """The records' numbers."""

    def records(self, messages: list[Any]) -> Records:
        """The records as columns."""

    def bytes(self, messages: list[Any]) -> int:
        """About what the records hold: keys, values and headers."""


class Partitions(Protocol):
    """Knows the source's partitions."""

    def find(self, quick: bool = False) -> list[Found]:
        """All partitions that there are.

        Args:
            quick: Whether to give up soon: it is asked again.

        Raises:
            SinkError: The source cannot be reached.
        """

    def problem(self) -> SinkError | None:
        """What is missing of what is to be read, for the user; None if all of it is there."""

    def made_anew(self, keys: Collection[PartitionKey], quick: bool = False) -> set[str]:
        """Names under which there are other partitions than when it was asked before."""

    def gone(self, key: PartitionKey) -> SinkError:
        """What to say of a partition that is not there any more."""

    def survey(self, keys: list[PartitionKey]) -> None:
        """Note how the partitions stand that there are at the start, whoever works them: where to
        begin with those of which nothing is kept, and what counts as caught up. Partitions that are
        found later begin at their first record."""

    def starts(self, keys: list[PartitionKey]) -> dict[PartitionKey, Start]:
        """Where to begin with partitions: where they were left, or else by `survey`."""

    def unfinished(self, keys: Collection[PartitionKey]) -> dict[PartitionKey, int]:
        """Which of these are not kept as caught up, whoever works them; and where each is."""

    def restarts(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, int]:
        """The first position there is of each, from the one given on; caught up is counted anew."""

    def detours(self, positions: Mapping[PartitionKey, int]) -> dict[PartitionKey, Detour]:
        """How to go on where a position does not exist any more."""

    def caught_up(self, key: PartitionKey, position: int) -> bool:
        """Whether below a position is all that was there when the partition was begun."""


class Store(Protocol):
    """Keeps positions, durably."""

    def commit(
        self, positions: Mapping[PartitionKey, int], notes: Mapping[PartitionKey, str], late: bool
    ) -> str | None:
        """Keep positions, each with a note beside it.

        Args:
            positions: By partition.
            notes: What to keep with them, where there is anything.
            late: Whether it has been tried for long enough.

        Returns:
            Why they were not kept, if it is worth another try.

        Raises:
            SinkError: They cannot be kept.
        """

    def kept(self, key: PartitionKey) -> int | None:
        """The position that is kept of a partition; None if there is none, or it is not known."""

    def listen(self) -> None:
        """Take in what the connections have said, where nobody else does."""


@runtime_checkable
class TransactionalStore(Store, Protocol):
    """A store that is kept by what outcomes are written to."""

    def settle(
        self,
        positions: Mapping[PartitionKey, int],
        notes: Mapping[PartitionKey, str],
        written: Collection[PartitionKey],
    ) -> str | None:
        """Keep positions together with what was written since it was called before, or neither.

        Args:
            positions: By partition.
            notes: What to keep with them, where there is anything.
            written: Partitions of which something was written.

        Returns:
            Why neither is kept.

        Raises:
            SinkError: It is not known.
        """


@dataclass(frozen=True, slots=True)
class Deal:
    """Which partitions are this process's now.

    Attributes:
        given: By partition, a number that is another one each time it is given.
        leaving: Those of them that are asked for.
    """

    given: Mapping[PartitionKey, int]
    leaving: frozenset[PartitionKey] = frozenset()


class Members(Protocol):
    """Deals partitions out among the processes that share a source's store.

    Used by one thread. What is given may be asked for: then nothing further is begun with it, and
    `let_go` says that all is committed, or that it is left to the next owner. It may be lost, too:
    then it is not in the deal any more, or under another number. The store keeps nothing of
    partitions that were not taken since they were given.

    Attributes:
        wait_secs: How long one may keep what is asked for, at most.
    """

    @property
    def wait_secs(self) -> float: ...

    def join(self, names: Collection[str]) -> None:
        """Have partitions dealt out of what has these names; they may be others each time."""

    def deal(self) -> Deal:
        """How things stand. Asked again and again: who does not ask loses its partitions.

        Raises:
            SinkError: This process cannot be a member.
        """

    def wait(self, timeout_secs: float) -> None:
        """Wait until something changes."""

    def take(self, keys: Collection[PartitionKey]) -> None:
        """Positions of these are kept from here on."""

    def let_go(self, keys: Collection[PartitionKey]) -> None:
        """Nothing more comes of these."""

    def close(self) -> None:
        """Leave; others get what was given."""


class Source(Hashable, Protocol):
    """What is read. A value: frozen, picklable, equal to any other that says the same."""

    def fetcher(self) -> Fetcher:
        """A new fetcher."""

    def partitions(self, fetcher: Fetcher) -> Partitions:
        """What knows the partitions; asks over the connection of one of its own fetchers."""

    def store(self) -> Store:
        """A new store of positions."""

    def members(self) -> Members | None:
        """What deals the partitions out; None if all of them are this process's."""

    def as_member(self, number: int) -> Source:
        """The same, for one of several processes of this machine."""

    def fetch_again(self, key: PartitionKey, offsets: Sequence[int]) -> Records | None:
        """Records as the source has them; None if they are not all there any more."""

    @property
    def names(self) -> Names:
        """How its numbers are written outside."""

    @property
    def label(self) -> dict[str, str]:
        """What a graph shows of it."""

    @property
    def ledger(self) -> str:
        """Where positions are kept, for log lines."""


def startable(found: Iterable[Found]) -> list[PartitionKey]:
    """Partitions that may be read: all that have not ended, those left out of which a parent has
    something left. Pure."""
    found = list(found)
    open = {each.key for each in found if not each.ended}
    return [each.key for each in found if not each.ended and open.isdisjoint(each.parents)]


def held_up(found: Iterable[Found], stopped: Collection[PartitionKey]) -> set[PartitionKey]:
    """Partitions that will not be begun, since one that they descend from is stopped. Pure."""
    parents = {each.key: each.parents for each in found if not each.ended}
    held: set[PartitionKey] = set()
    more = True
    while more:
        more = False
        for key, above in parents.items():
            if key not in held and any(each in stopped or each in held for each in above):
                held.add(key)
                more = True
    return held
