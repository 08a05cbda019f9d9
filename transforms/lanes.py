"""Lanes: how a partition's records are divided, those of one record key kept in order. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from transforms.records import RecordChunk

# With the version of the rule that divides, and of the note: a new one needs another number.
_NOTE = "lanes/2"


@dataclass(frozen=True, slots=True)
class Lanes:
    """How a partition's records are divided.

    Attributes:
        count: Lanes per partition; 1 keeps each partition in one order.
        run: Records without a key that go to the same lane one after the other: so many as make
            a batch, so that they fill one instead of a little of each lane's.
    """

    count: int = 1
    run: int = 1

    def of(self, keys: Iterable[bytes | None], offsets: Iterable[int]) -> list[int]:
        """Each record's lane; the same in every process, whenever it is read.

        The upper bits of the checksum are what counts: a producer that chose the partition by
        the same checksum modulo their number has left no choice in the lower ones.
        """
        count, run = self.count, self.run
        return [
            offset // run % count if key is None else crc32(key) * count >> 32
            for key, offset in zip(keys, offsets)
        ]

    def note(self, marks: Sequence[int]) -> str:
        """How far each lane is done, to be kept beside the lowest of them; empty if all are equal.

        Kafka keeps up to 4 KB with a committed offset. The offset is in the note, too: who copies
        a group's offsets to another cluster translates them and leaves the notes as they are.
        """
        lowest = min(marks)
        if max(marks) == lowest:
            return ""
        ahead = ",".join(str(mark - lowest) for mark in marks)
        return f"{_NOTE} {self.count} {self.run} {lowest} {ahead}"

    def marks(self, note: str, offset: int, end: int) -> list[int]:
        """What a `note` says that was kept beside `offset`: where each lane goes on.

        A note of lanes that were divided otherwise says nothing about these, nor does one that was
        written beside another offset or reaches behind the partition's end: then all go on at the
        offset.
        """
        marks = [offset] * self.count
        begin = f"{_NOTE} {self.count} {self.run} {offset} "
        if self.count > 1 and note.startswith(begin):
            ahead = note[len(begin) :].split(",")
            if len(ahead) == self.count and all(map(str.isdecimal, ahead)):
                marks = [offset + int(each) for each in ahead]
        return marks if max(marks) <= end else [offset] * self.count

    def split(self, chunk: RecordChunk) -> Iterator[RecordChunk]:
        """A chunk for each lane over the same range, so that each lane's ranges have no hole."""
        if self.count == 1 or chunk.lane is not None:
            yield chunk if chunk.lane is not None else replace(chunk, lane=0)
            return
        lanes = self.of(chunk.records.keys, chunk.records.offsets)
        for lane in range(self.count):
            records = chunk.records.where([each == lane for each in lanes])
            yield replace(chunk, records=records, lane=lane)
