"""Handover: what one keyed state says is pending <-> the process's `Invoker`. No Beam.

In a streaming run the state of each key is the truth: it holds the records of every batch that is
not finished for good. The invoker in the worker's memory may know less (a restart), more (an older
checkpoint was restored in the same process), or something else; `Handover` finds out by counting:
batches of a key, and the chunks they are made of, are numbered as they come, and both sides must
agree on the numbers, and on a token that is drawn anew whenever they did not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from transforms.invoke.invoker import Invoker
from transforms.records import Batch, Finished, LaneKey

LEASE_SECS = 30.0
"""How long calls of a key may begin without a sign of life from its state."""

Marked = tuple[Batch, Any]
"""A batch, and how far it reaches, as the state counts it."""

LET_GO_SECS = 3600.0
"""How long a key's outcomes are kept without one; by then it has moved to another worker."""


@dataclass(slots=True)
class _Desk:
    """One key's batches in this process.

    Attributes:
        token: Which handing over of the key this is.
        head: Number of the oldest batch that is held here.
        tail: Number of the next batch to come.
        chunks: Number of the next chunk to come.
        open: What is held of the batch that is still open.
        marks: How far each of the batches from `head` on reaches, as the state counts it.
        finished: What became of the batches from `head` on, in order.
        renewed: When the key's state was last heard of, by the timer.
        lapsed: Whether a call was not begun, for nothing had been heard for too long: batches that
            are not finished are not held any more, and none begins until they are handed over.
    """

    token: str
    head: int
    tail: int
    chunks: int
    open: Any
    marks: deque[Any]
    finished: deque[Finished] = field(default_factory=deque)
    renewed: float = 0.0
    lapsed: bool = False

    @property
    def done(self) -> int:
        """Number of the first batch that is not finished."""
        return self.head + len(self.finished)


class Handover:
    """Hands batches to the invoker and keeps their outcomes until the state has let go of them.

    Thread-safe. An outcome is kept until `agree` is called with a head behind it: emitting it
    is not enough, since the bundle that does may fail. A state that is not heard of for long
    costs what has finished nothing: only no further call begins.

    Args:
        make: Makes the invoker, given the check whether a key may be worked on.
        timer: Monotonic seconds.
    """

    def __init__(
        self,
        make: Callable[[Callable[[LaneKey], bool]], Invoker],
        timer: Callable[[], float] = monotonic,
    ) -> None:
        self._timer = timer
        self._lock = threading.Lock()
        self._desks: dict[LaneKey, _Desk] = {}
        self._tidied = timer()
        self._drain_until: float | None = None
        self.invoker = make(self._is_leased)

    def agree(self, key: LaneKey, token: str, head: int, tail: int, chunks: int = 0) -> int | None:
        """From which number on the batches up to `tail` have to be handed over again.

        Outcomes before `head` are dropped: the state has let go of them. Renews the lease.

        Returns:
            `tail` if all are held here. A lower number if the others are not held any more: hand
            them over with `resume`. None if the key is not known as the state has it: it was
            forgotten; hand over all that is pending, with another token, with `begin`.
        """
        with self._lock:
            self._tidy()
            desk = self._desks.get(key)
            stands = (token, tail, chunks)
            same = desk and (desk.token, desk.tail, desk.chunks) == stands
            if desk and same and desk.head <= head <= desk.done:
                for _ in range(head - desk.head):
                    desk.finished.popleft()
                    desk.marks.popleft()
                desk.head = head
                desk.renewed = self._timer()
                if not desk.lapsed:
                    return tail
                self._collect()
                return desk.done
            self._forget(key)
            return None

    def begin(
        self,
        key: LaneKey,
        token: str,
        head: int,
        batches: Sequence[Marked],
        chunks: int = 0,
        open: Any = None,
    ) -> None:
        """Hand a key over, with all that is pending of it; the first batch has this number."""
        with self._lock:
            marks = deque(mark for _, mark in batches)
            tail, now = head + len(batches), self._timer()
            self._desks[key] = _Desk(token, head, tail, chunks, open, marks, renewed=now)
            self.invoker.submit(batch for batch, _ in batches)

    def resume(self, key: LaneKey, batches: Sequence[Marked], open: Any = None) -> None:
        """Hand over again what `agree` said is not held any more."""
        with self._lock:
            desk = self._desks[key]
            # What came after the lapse was put in line too, without being begun. What another
            # lane has halted stays so.
            self.invoker.abandon(key, lift_halt=False)
            desk.renewed, desk.lapsed = self._timer(), False
            desk.tail, desk.open = desk.done + len(batches), open
            held = list(desk.marks)[: len(desk.finished)]
            desk.marks = deque([*held, *(mark for _, mark in batches)])
            self.invoker.submit(batch for batch, _ in batches)

    def submit(self, key: LaneKey, batch: Batch, mark: Any = None) -> None:
        """Hand over one more batch of a key that was agreed on.

        If its lease has lapsed since then, the batch does not begin, and `agree` tells.
        """
        with self._lock:
            if desk := self._desks.get(key):
                desk.tail += 1
                desk.marks.append(mark)
                self.invoker.submit([batch])

    def open(self, key: LaneKey) -> Any:
        """What was kept of the open batch of a key that was agreed on."""
        with self._lock:
            desk = self._desks.get(key)
            return desk.open if desk else None

    def keep(self, key: LaneKey, chunks: int, open: Any) -> None:
        """Keep what is open of a key that was agreed on, now that so many chunks have come."""
        with self._lock:
            if desk := self._desks.get(key):
                desk.chunks, desk.open = chunks, open

    def mark(self, key: LaneKey, number: int) -> Any:
        """How far a batch reaches that is held here."""
        with self._lock:
            desk = self._desks[key]
            return desk.marks[number - desk.head]

    def finished(self, key: LaneKey, head: int) -> list[Finished]:
        """What became of the key's batches from this number on, as far as they are finished."""
        with self._lock:
            self._collect()
            desk = self._desks.get(key)
            return list(desk.finished)[head - desk.head :] if desk else []

    def renew(self, key: LaneKey) -> bool:
        """A sign of life from the key's state; False if it came too late for what is pending."""
        with self._lock:
            desk = self._desks.get(key)
            if desk:
                desk.renewed = self._timer()
            return bool(desk and not desk.lapsed)

    def forget(self, key: LaneKey) -> None:
        """Begin no further call of a key; what is running is nobody's any more."""
        with self._lock:
            self._forget(key)

    def drains(self, wait_secs: float) -> float:
        """When a drain is to end that begins now, or has begun before, by the timer.

        Keys are drained one behind the other, and all together may take so long.
        """
        with self._lock:
            if self._drain_until is None:
                self._drain_until = self._timer() + wait_secs
            return self._drain_until

    def goes_on(self) -> None:
        """More has come: whatever a drain was begun for before is no reason to be short now."""
        self._drain_until = None

    def is_over(self, deadline: float) -> bool:
        """Whether a time is over, by the timer."""
        return self._timer() >= deadline

    def _collect(self) -> None:
        for finished in self.invoker.collect():
            if desk := self._desks.get(finished.lane_key):
                desk.finished.append(finished)

    def _tidy(self) -> None:
        """Let go of keys that have moved to another worker."""
        now = self._timer()
        if now - self._tidied < LEASE_SECS:
            return
        self._tidied = now
        for key, desk in list(self._desks.items()):
            if now - desk.renewed > LET_GO_SECS:
                self._forget(key)

    def _forget(self, key: LaneKey) -> None:
        self._desks.pop(key, None)
        self.invoker.abandon(key)

    def _is_leased(self, key: LaneKey) -> bool:
        # Without the lock, since the invoker asks under its own. Once it says no it does so until
        # the key is handed over again: what was in line is gone, so what is behind must not begin.
        desk = self._desks.get(key)
        if desk and not desk.lapsed:
            desk.lapsed = self._timer() - desk.renewed > LEASE_SECS
        return bool(desk and not desk.lapsed)
