"""Contiguous: how far a partition is finished without a gap, in each of its lanes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transforms.records import LaneKey, PartitionKey, Progress


class ContiguousOffsets:
    """The offset of a partition below which everything is done, in all of its lanes. Pure.

    Ranges may arrive in any order; one whose predecessor in its lane is missing is held back, so
    the mark never passes unfinished records. So are all ranges of a partition of which is not known
    yet where it begins.
    """

    def __init__(self) -> None:
        self._marks: dict[PartitionKey, list[int]] = {}
        self._held: dict[LaneKey, dict[int, int]] = {}

    def begin(self, key: PartitionKey, marks: Sequence[int]) -> None:
        """Say where each lane of a partition begins."""
        self._marks[key] = list(marks)
        for lane in range(len(marks)):
            self._advance(key, lane)

    def forget(self, key: PartitionKey) -> None:
        """Know nothing of a partition any more."""
        for lane in range(len(self._marks.pop(key, ()))):
            self._held.pop((*key, lane), None)

    def marks(self, key: PartitionKey) -> Sequence[int]:
        """How far each lane of a partition is done; empty until `begin`."""
        return self._marks.get(key, ())

    def waits(self, key: PartitionKey) -> bool:
        """Whether a finished range of a partition that has begun waits for one before it."""
        return any(self._held.get((*key, lane)) for lane in range(len(self.marks(key))))

    def skip(self, key: PartitionKey, offset: int) -> None:
        """Say that everything below an offset is done, in all lanes of a partition."""
        self.begin(key, [max(mark, offset) for mark in self._marks[key]])

    def keep(self, key: PartitionKey) -> tuple[list[int], list[tuple[int, int, int]]]:
        """A partition's marks, and what is held back of it, as (lane, start, end)."""
        held = [
            (lane[2], *each)
            for lane, ranges in self._held.items()
            if lane[:2] == key
            for each in ranges.items()
        ]
        return list(self.marks(key)), held

    @staticmethod
    def kept(
        key: PartitionKey, marks: Sequence[int], held: Iterable[tuple[int, int, int]]
    ) -> ContiguousOffsets:
        """What `keep` has said of a partition."""
        offsets = ContiguousOffsets()
        for lane, start, end in held:
            offsets._held.setdefault((*key, lane), {})[start] = end
        if marks:
            offsets.begin(key, marks)
        return offsets

    def add(self, progress: Progress) -> int | None:
        """Take in a finished range; returns the partition's mark if it moved."""
        key, lane = (progress.topic, progress.partition), progress.lane
        held = self._held.setdefault((*key, lane), {})
        held[progress.start] = max(progress.next_offset, held.get(progress.start, 0))
        if not (marks := self._marks.get(key)):
            return None
        before = min(marks)
        self._advance(key, lane)
        return after if (after := min(marks)) > before else None

    def _advance(self, key: PartitionKey, lane: int) -> None:
        held, marks = self._held.get((*key, lane), {}), self._marks[key]
        while ready := [start for start in held if start <= marks[lane]]:
            for start in ready:
                marks[lane] = max(marks[lane], held.pop(start))
