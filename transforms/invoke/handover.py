"""Handover: what one keyed state says is pending <-> the process's `Invoker`. No Beam.

In a streaming run the state of each key is the truth: it holds every batch that is not finished
for good. The invoker in the worker's memory may know less (a restart), more (an older checkpoint
was restored in the same process), or something else; `Handover` finds out by counting: batches of a
key are numbered as they come, and both sides must agree on the numbers, and on a token that is
drawn anew whenever they did not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from transforms.invoke.invoker import Invoker
from transforms.records import Batch, Finished, LaneKey

LEASE_SECS = 30.0
"""How long a key is worked on without a sign of life from its state."""


@dataclass(slots=True)
class _Desk:
    """One key's batches in this process.

    Attributes:
        token: Which handing over of the key this is.
        head: Number of the oldest batch that is held here.
        tail: Number of the next batch to come.
        finished: What became of the batches from `head` on, in order.
        renewed: When the key's state was last heard of, by the timer.
    """

    token: str
    head: int
    tail: int
    finished: deque[Finished] = field(default_factory=deque)
    renewed: float = 0.0


class Handover:
    """Hands batches to the invoker and keeps their outcomes until the state has let go of them.

    Thread-safe. An outcome is kept until `agree` is called with a head behind it: emitting it
    is not enough, since the bundle that does may fail.

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
        self.invoker = make(self._is_leased)

    def agree(self, key: LaneKey, token: str, head: int, tail: int) -> bool:
        """Whether exactly the batches from `head` up to `tail` are held here; renews the lease.

        Outcomes before `head` are dropped: the state has let go of them. If the answer is False,
        the key was forgotten, and its batches have to be handed over again with another token.
        """
        with self._lock:
            desk = self._desks.get(key)
            if (
                desk
                and (desk.token, desk.tail) == (token, tail)
                and desk.head <= head <= desk.head + len(desk.finished)
            ):
                for _ in range(head - desk.head):
                    desk.finished.popleft()
                desk.head = head
                desk.renewed = self._timer()
                return True
            self._desks.pop(key, None)
            self.invoker.abandon(key)
            return False

    def begin(self, key: LaneKey, token: str, head: int, batches: Sequence[Batch]) -> None:
        """Hand a key over, with all that is pending of it; the first batch has this number."""
        with self._lock:
            self._desks[key] = _Desk(token, head, head + len(batches), renewed=self._timer())
            self.invoker.submit(batches)

    def submit(self, key: LaneKey, batch: Batch) -> None:
        """Hand over one more batch of a key that is agreed on."""
        with self._lock:
            self._desks[key].tail += 1
            self.invoker.submit([batch])

    def finished(self, key: LaneKey, head: int) -> list[Finished]:
        """What became of the key's batches from this number on, as far as they are finished."""
        with self._lock:
            for finished in self.invoker.collect():
                if desk := self._desks.get(finished.lane_key):
                    desk.finished.append(finished)
            desk = self._desks.get(key)
            return list(desk.finished)[head - desk.head :] if desk else []

    def renew(self, key: LaneKey) -> None:
        """A sign of life from the key's state."""
        with self._lock:
            if desk := self._desks.get(key):
                desk.renewed = self._timer()

    def _is_leased(self, key: LaneKey) -> bool:
        # Without the lock, since the invoker asks under its own; a dict can be read at any time.
        desk = self._desks.get(key)
        if desk and self._timer() - desk.renewed <= LEASE_SECS:
            return True
        self._desks.pop(key, None)
        return False
