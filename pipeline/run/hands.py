"""Hands: what an operator can tell a run while it goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from transforms.records import PartitionKey

PAUSE, RESUME, RETRY, SKIP, REVIVE, LEVEL = ACTIONS = (
    "pause",
    "resume",
    "retry",
    "skip",
    "resume-halted",
    "log-level",
)

ANSWER_SECS = 10.0
"""How long who tells something waits for the answer."""


@dataclass(frozen=True, slots=True)
class Command:
    """One thing told.

    Attributes:
        action: One of `ACTIONS`.
        topic: Where; None for everywhere.
        partition: Of the topic; None for all of them.
        offset: With `SKIP`, the record that is meant; None for whichever is in the way.
        whole: With `SKIP`, whether all records go that failed together with it.
        level: With `LEVEL`, one of `pipeline.options.levels.LEVELS`.
    """

    action: str
    topic: str | None = None
    partition: int | None = None
    offset: int | str | None = None
    whole: bool = False
    level: str = ""

    def covers(self, key: PartitionKey) -> bool:
        """Whether it is about a partition."""
        return self.topic in (None, key[0]) and self.partition in (None, key[1])


@dataclass(frozen=True, slots=True)
class Told:
    """What came of a command.

    Attributes:
        done: Whether it was carried out.
        said: The same for people.
        partitions: Those it changed something for.
        here: Those that the run has.
    """

    done: bool
    said: str
    partitions: tuple[PartitionKey, ...] = ()
    here: tuple[PartitionKey, ...] = ()

    @staticmethod
    def join(all_told: Iterable[Told]) -> Told:
        """What the workers of a run said together: done if one did it."""
        all_told = list(all_told)
        done = any(told.done for told in all_told)
        said = dict.fromkeys(told.said for told in all_told if told.done is done)
        return Told(
            done,
            "; ".join(said) or "nobody has answered",
            tuple(sorted(key for told in all_told for key in told.partitions)),
            tuple(sorted(key for told in all_told for key in told.here)),
        )


@dataclass(slots=True)
class Pauses:
    """What is paused. The rule that is closest to a partition counts; a wider one that is given
    later takes its place.

    Attributes:
        everywhere: Whether all is, but for what was resumed by itself.
    """

    everywhere: bool = False
    _rules: dict[tuple[str, int | None], bool] = field(default_factory=dict)

    def set(self, command: Command, paused: bool) -> None:
        """Pause or resume what a command is about."""
        topic, partition = command.topic, command.partition
        if topic is None:
            self.everywhere = paused
            self._rules.clear()
            return
        if partition is None:
            for rule in [rule for rule in self._rules if rule[0] == topic]:
                del self._rules[rule]
        self._rules[topic, partition] = paused

    def has(self, key: PartitionKey) -> bool:
        """Whether a partition is paused."""
        of_topic = self._rules.get((key[0], None), self.everywhere)
        return self._rules.get(key, of_topic)

    def __bool__(self) -> bool:
        return self.everywhere or any(self._rules.values())


Answer = Callable[[Told], None]


class Inbox:
    """Hands commands from any thread to the one that runs the rounds."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Command, Answer]] = queue.SimpleQueue()

    def ask(self, command: Command, secs: float = ANSWER_SECS) -> Told:
        """Have a command carried out, and wait for what came of it."""
        answered = threading.Event()
        found: list[Told] = []

        def answer(told: Told) -> None:
            found.append(told)
            answered.set()

        self._asked.put((command, answer))
        if answered.wait(secs):
            return found[0]
        text = f"no answer within {secs:g} s: the run is busy; it is carried out once it can be"
        return Told(False, text)

    def take(self) -> list[tuple[Command, Answer]]:
        """What was asked since the last time."""
        taken = []
        while True:
            try:
                taken.append(self._asked.get_nowait())
            except queue.Empty:
                return taken
