"""Status: how a run stands. Progress, summary, metrics and the page show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from transforms.invoke.failures import Trouble
from transforms.invoke.invoker import Invoker
from transforms.names import NUMBERS, Names
from transforms.records import CallStats, Finished, PartitionKey
from transforms.tally import Tallied


@dataclass(slots=True)
class Totals:
    """Sums over all rounds, by the metrics' names."""

    counters: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def __getitem__(self, name: str) -> int:
        return self.counters[name]

    def add(self, counted: Counter[str]) -> None:
        """What was counted in one more round."""
        self.counters.update(counted)
        self.rounds += 1

    @property
    def records(self) -> int:
        """Records that have come to their end."""
        return self["write.responses"] + self["write.errors"] + self["filter.filtered"]


def with_calls(totals: Totals, invoker: Invoker, before: CallStats) -> Totals:
    """Totals with all calls that have ended. What the rounds count of them, they do when a batch is
    finished, which while a function is away may be never.

    Args:
        totals: Sums over all rounds.
        invoker: Makes the calls.
        before: What it had counted when the run began.
    """
    counters = Counter(totals.counters)
    for name, count in asdict(invoker.stats.since(before)).items():
        counters[f"invoke.{name}"] = count
    return Totals(counters, totals.rounds)


READING, IDLE, FULL = "reading", "idle", "full"
BACKING_OFF, PAUSED, HALTED = "backing_off", "paused", "halted"
STATES = (READING, IDLE, FULL, BACKING_OFF, PAUSED, HALTED)


class PartitionView(NamedTuple):
    """How a partition stands. One of each is made, and sent to the first process, again and again.

    Attributes:
        state: One of `STATES`.
        end: Its next offset, as the last fetch saw it; None if that is not known yet.
        read: Everything below it was read.
        processed: Everything below it is done, committed or not.
        records: Records that are held of it: read and not done.
        bytes: About what they hold.
        oldest_ms: Timestamp of the oldest of those that were read and not handed over.
    """

    state: str
    end: int | None
    read: int
    processed: int
    records: int = 0
    bytes: int = 0
    oldest_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run is from its end, as it sees that by itself.

    Attributes:
        done: Whether all that it has of the source is done, or stopped.
        stopped: Whether something of it is stopped.
        elsewhere: Partitions that it does not have and that are not known to be done.
        kept: What is kept of those, added up: as long as it rises somebody gets on with them.
    """

    done: bool = False
    stopped: bool = False
    elsewhere: frozenset[PartitionKey] = frozenset()
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """How a run stands; what progress and summary show.

    Attributes:
        totals: Sums over all rounds.
        in_flight: Invocations running now.
        lags: Per partition, records behind what is committed; None if not known yet.
        halted: Batches that stopped their partitions.
        committed: The group's offsets as far as this run knows them.
        elapsed_secs: Since the program began.
        limit: Invocations that may run at once now; None if other processes invoke, each with
            its own limit and breaker.
        in_flight_max: The most that have been running at once.
        breaker_open: Whether nothing is invoked now, but for a probe from time to time.
        breaker_openings: How often it came to that.
        begun: Whether the partitions are known.
        trouble: What does not go well, as things are.
        names: How records' numbers are written.
        standing: How far it is from its end.
        workers: How many processes it is in.
        books: What became of the records that were read, and how many are held, by topic; all of
            one moment, between two rounds.
        tallied: What else was counted.
        partitions: How each partition stands.
        still_secs: How long the loop has not turned.
        draining: Whether nothing more is begun.
        paused: Whether all is paused.
    """

    totals: Totals
    in_flight: int
    lags: dict[PartitionKey, int | None]
    halted: list[Finished]
    committed: dict[PartitionKey, int]
    elapsed_secs: float
    limit: int | None = None
    in_flight_max: int = 0
    breaker_open: bool = False
    breaker_openings: int = 0
    begun: bool = False
    trouble: Trouble = Trouble()
    names: Names = NUMBERS
    standing: Standing = Standing()
    workers: int = 1
    books: Tallied = Tallied()
    tallied: Tallied = Tallied()
    partitions: Mapping[PartitionKey, PartitionView] = field(default_factory=dict)
    still_secs: float = 0.0
    draining: bool = False
    paused: bool = False

    @staticmethod
    def of_nothing(elapsed_secs: float) -> Status:
        """How a run stands that could not begin."""
        return Status(Totals(), 0, {}, [], {}, elapsed_secs)
