"""Names: how the numbers of a source's records are written outside of the program. Pure.

Inside they are ints of any size. A JSON number, an Avro long and a Connect int64 hold 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Names:
    """How numbers of records are written.

    Attributes:
        texts: Whether as texts, in JSON too; and whether a position, which is the number of no
            record, is never written: then the last record below it stands for it.
        ended: The position behind which a partition that has ended for good has nothing; None
            where partitions do not end.
        first: Below it, where numbers are texts, a position says where to begin, and not which
            record is done.
        alone: Whether a reply names a record by its number alone; then what says nothing at all is
            success, too.
        lag_ms: Whether how far one is behind is told in milliseconds, and not in records.
    """

    texts: bool = False
    ended: int | None = None
    first: int = 1
    alone: bool = False
    lag_ms: bool = False

    def number(self, number: int) -> int | str:
        """A record's number."""
        return str(number) if self.texts else number

    def numbers(self, numbers: Sequence[int]) -> Sequence[int | str]:
        """Numbers of several records."""
        return list(map(str, numbers)) if self.texts else numbers

    def position(self, position: int) -> int | str | None:
        """A position: the number of the last record below it where numbers are texts; None where
        there is none below it, and ``ended`` where nothing is behind it."""
        if not self.texts:
            return position
        if position == self.ended:
            return "ended"
        return str(position - 1) if position >= self.first else None


NUMBERS = Names()
"""As JSON numbers."""

TEXTS = Names(texts=True)
"""As texts."""
