"""Reach: what a shard's reader has seen, so that a position can be said in time. No Beam."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from transforms.kinesis.shards import SHARD_END

# So many answers are told apart at most: where another process has the lease, nobody here asks,
# and so lets go of them, for days.
_MOST_SEEN = 1000


class _Seen(NamedTuple):
    """Of an answer with records, or several, the first and the last one."""

    first: int
    first_ms: int
    last: int
    last_ms: int


class Reach:
    """How a shard was seen. Noted by its reader, asked by other threads.

    Attributes:
        target: The position at which there was nothing more for the first time since it is read;
            None before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[_Seen] = deque()
        self._done: tuple[int, int] = (0, 0)  # last number and arrival of what is behind us
        self._position: int | None = None
        self._behind_ms = 0
        self._tip: tuple[int, int] | None = None
        self.target: int | None = None

    @property
    def answers(self) -> int:
        """How many it tells apart."""
        return len(self._seen)

    def note(self, messages: Sequence[Any], position: int, behind_ms: int, asked_ms: int) -> None:
        """Take in an answer.

        Args:
            messages: Its records.
            position: Behind them.
            behind_ms: How much older than the newest record they are; 0 if there is no more.
            asked_ms: When it was asked for.
        """
        with self._lock:
            if messages:
                first, last = messages[0], messages[-1]
                self._seen.append(_Seen(first.number, first.ms, last.number, last.ms))
                if len(self._seen) > _MOST_SEEN:
                    self._coarsen()
            self._position, self._behind_ms = position, behind_ms
            if behind_ms == 0 or position == SHARD_END:
                self._tip = (position, asked_ms)
                if self.target is None:
                    self.target = position

    def behind_ms(self, position: int) -> int | None:
        """How much older than the shard's newest record is what comes first behind a position;
        None before the first answer."""
        with self._lock:
            if self._position is None:
                return None
            self._pass(position)
            if not self._seen:
                return self._behind_ms
            oldest = self._seen[0]
            newest_ms = self._seen[-1].last_ms + self._behind_ms
            from_ms = oldest.first_ms if position <= oldest.first else oldest.last_ms
            # Something is there, so it is not nothing.
            return max(1, newest_ms - from_ms)

    def arrival_ms(self, position: int) -> int:
        """When about the last record below a position arrived; 0 if that is not known."""
        with self._lock:
            self._pass(position)
            if self._seen and self._seen[0].first < position:
                return self._seen[0].first_ms
            return self._done[1]

    def reached_ms(self, position: int) -> int:
        """When there was nothing behind a position; 0 if that is not known."""
        with self._lock:
            return self._tip[1] if self._tip and position >= self._tip[0] else 0

    def _coarsen(self) -> None:
        """Take two answers for one: times between them are told as that of the first or last."""
        seen = [*self._seen]
        pairs = zip(seen[::2], seen[1::2])
        joined = [_Seen(*a[:2], *b[2:]) for a, b in pairs]
        self._seen = deque(joined + seen[len(joined) * 2 :])

    def _pass(self, position: int) -> None:
        while self._seen and self._seen[0].last < position:
            passed = self._seen.popleft()
            self._done = passed.last, passed.last_ms
