"""Names: how the numbers of a source's records are written outside of the program. Pure.

Inside they are ints of any size. A JSON number, an Avro long and a Connect int64 hold 64 bits.

A record of a stream may hold several that were put into it as one: an aggregate. Then they have its
number in common, and a sub-number each. Inside, the two are one int, the sub-number in the lowest
`SUB_BITS`; outside a sub-number stands behind a colon, 0 for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUB_BITS = 24
"""More than an aggregate's records can be: it has 10 MiB at most, and each takes some bytes."""
_SUBS = (1 << SUB_BITS) - 1


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
        subs: Whether numbers have sub-numbers.
    """

    texts: bool = False
    ended: int | None = None
    first: int = 1
    alone: bool = False
    lag_ms: bool = False
    subs: bool = False

    def number(self, number: int) -> int | str:
        """A record's number."""
        return self.text(number) if self.texts else number

    def numbers(self, numbers: Sequence[int]) -> Sequence[int | str]:
        """Numbers of several records."""
        return self.as_texts(numbers) if self.texts else numbers

    def text(self, number: int) -> str:
        """A record's number, as a text."""
        return self.as_texts([number])[0]

    def as_texts(self, numbers: Sequence[int]) -> list[str]:
        """Numbers of several records, as texts."""
        if not self.subs:
            return list(map(str, numbers))
        return [
            f"{each >> SUB_BITS}:{sub}" if (sub := each & _SUBS) else str(each >> SUB_BITS)
            for each in numbers
        ]

    def read(self, text: int | str) -> int:
        """The number that is written so.

        Raises:
            ValueError: It is none.
        """
        if not self.subs:
            return int(text)
        number, _, sub = str(text).partition(":")
        return joined(int(number), int(sub or 0))

    def position(self, position: int) -> int | str | None:
        """A position: the number of the last record below it where numbers are texts; None where
        there is none below it, and ``ended`` where nothing is behind it."""
        if not self.texts:
            return position
        if position == self.ended:
            return "ended"
        return self.text(position - 1) if position >= self.first else None

    def stood(self, position: int) -> str:
        """A position in a line of the log: where numbers are texts, behind which record it lies."""
        if not self.texts:
            return str(position)
        if position == self.ended:
            return "its end"
        at = self.position(position)
        return "its beginning" if at is None else f"the record behind {at}"


def spoken(number: int) -> str:
    """A record's number in a line of the log, where its source is not known: Kafka's have 64 bits,
    and those of streams have more."""
    return str(number) if number < 2**63 else TEXTS.text(number)


def joined(number: int, sub: int = 0) -> int:
    """A number and a sub-number as one.

    Raises:
        ValueError: The sub-number is too large.
    """
    if not 0 <= sub < _SUBS:
        raise ValueError(f"{sub} is no sub-number")
    return number << SUB_BITS | sub


def parted(number: int) -> tuple[int, int]:
    """The number and the sub-number in one."""
    return number >> SUB_BITS, number & _SUBS


NUMBERS = Names()
"""As JSON numbers."""

TEXTS = Names(texts=True, subs=True)
"""As texts, with sub-numbers."""
