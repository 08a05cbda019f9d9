"""Ledger: which error records are under way, which are redriven, and how that is kept. Pure."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from transforms.lanes import Lanes
from transforms.records import Header, LaneKey, PartitionKey, Progress, RecordChunk, Records
from transforms.redrive.selection import ErrorRecord, Original

_MARK = "redriven:1:"


METADATA_BYTES = 4096
"""What a broker takes with an offset, unless its `offset.metadata.max.bytes` says more."""


_SAFE_METADATA_BYTES = 3500
"""Above it no more is taken: what is done in part takes more room than what is done."""


def to_chunk(key: PartitionKey, originals: Iterable[Original]) -> RecordChunk:
    """Originals of one partition, each of another offset, as if they were read from it."""
    ordered = sorted(originals, key=lambda original: int(original["offset"]))
    records = Records(
        [original["offset"] for original in ordered],
        [original["timestamp"] for original in ordered],
        [original["key"] for original in ordered],
        [original["value"] for original in ordered],
        [_headers(original) for original in ordered],
    )
    start, end = records.offsets[0], records.offsets[-1] + 1
    return RecordChunk(*key, start, end, records, first=True)


def _headers(original: Original) -> list[Header] | None:
    return [(header["name"], header["value"]) for header in original["headers"]] or None


class OffsetSet:
    """Offsets of one partition, a bit each: a million in a row take some 200 kB. Pure."""

    _BLOCK = 1024

    def __init__(self, offsets: Iterable[int] = ()) -> None:
        self._blocks: dict[int, int] = {}
        for offset in offsets:
            self.add(offset)

    def add(self, offset: int) -> None:
        block, bit = divmod(offset, self._BLOCK)
        self._blocks[block] = self._blocks.get(block, 0) | 1 << bit

    def __contains__(self, offset: int) -> bool:
        block, bit = divmod(offset, self._BLOCK)
        return bool(self._blocks.get(block, 0) >> bit & 1)

    def forget(self, end: int) -> None:
        """Let go of offsets below this one, all but some of them."""
        for block in [block for block in self._blocks if (block + 1) * self._BLOCK <= end]:
            del self._blocks[block]

    def bits(self, begin: int) -> int:
        """The offsets from `begin` on: its lowest bit stands for `begin`."""
        first = begin // self._BLOCK
        last = max(self._blocks, default=first - 1)
        size = self._BLOCK // 8
        parts = (self._blocks.get(n, 0).to_bytes(size, "little") for n in range(first, last + 1))
        return int.from_bytes(b"".join(parts), "little") >> begin % self._BLOCK

    def add_bits(self, begin: int, bits: int) -> None:
        """Take in offsets, the lowest bit standing for `begin`."""
        first, shift = divmod(begin, self._BLOCK)
        size = self._BLOCK // 8
        whole = bits << shift
        data = whole.to_bytes(-(-whole.bit_length() // self._BLOCK) * size, "little")
        for place in range(0, len(data), size):
            if block := int.from_bytes(data[place : place + size], "little"):
                number = first + place // size
                self._blocks[number] = self._blocks.get(number, 0) | block


class Redriven:
    """Which error records of a partition are redriven. Pure.

    Args:
        begin: The committed offset, or where the partition begins.
        metadata: What was committed with it.
        first: The first offset that is still there.

    Attributes:
        position: Up to where error records have been looked at, exclusive.

    Raises:
        ValueError: The metadata is somebody else's.
    """

    def __init__(self, begin: int, metadata: str = "", first: int = 0) -> None:
        self.position = max(begin, first)
        self._left: int | None = None
        self._taken: set[int] = set()
        # Of those below the mark nobody asks any more.
        self._done = OffsetSet()
        if metadata:
            if not metadata.startswith(_MARK):
                raise ValueError("not written by a redrive")
            try:
                bits = zlib.decompress(b64decode(metadata.removeprefix(_MARK)))
            except zlib.error as error:
                raise ValueError(str(error)) from None
            self._done.add_bits(begin, int.from_bytes(bits, "little"))

    def look(self, next_offset: int) -> None:
        """All error records below an offset have been taken, left or were redriven before."""
        self.position = max(self.position, next_offset)

    def leave(self, offset: int) -> None:
        """An error record is left where it is, for another redrive."""
        self._left = offset if self._left is None else min(self._left, offset)

    def skip(self, next_offset: int) -> None:
        """Leave all below an offset without looking at them."""
        for offset in range(self.position, next_offset):
            if offset not in self._done:
                self.leave(offset)
                break
        self.look(next_offset)

    def take(self, offset: int) -> None:
        """An error record is to be redriven."""
        self._taken.add(offset)

    def add(self, offset: int) -> None:
        """An error record that was taken is redriven."""
        self._taken.discard(offset)
        self._done.add(offset)

    def __contains__(self, offset: int) -> bool:
        return offset in self._done

    def commit(self, more: Iterable[int] = ()) -> tuple[int, str]:
        """The offset to commit and its metadata.

        Args:
            more: Error records to count as redriven, to see what that would come to.
        """
        also = OffsetSet(more)
        end = self.position if self._left is None else min(self.position, self._left)
        self._done.forget(min(end, min(self._taken, default=end)))
        mark = min((each for each in self._taken if each not in also), default=end)
        mark = min(mark, end)
        # The record at the mark is not redriven.
        bits = (self._done.bits(mark) | also.bits(mark)) & ~1
        if not bits:
            return mark, ""
        data = bits.to_bytes(-(-bits.bit_length() // 8), "little")
        return mark, _MARK + b64encode(zlib.compress(data, 9)).decode()


class Ledger:
    """What is under way in this process, and what of it is redriven. Holds no client.

    Args:
        lanes: How a partition's records are divided.

    Attributes:
        partitions: Which error records are redriven, by partition of the error topic.
        redriven: How many were redriven by this process.
    """

    def __init__(self, lanes: Lanes = Lanes()) -> None:
        self._lanes = lanes
        self.partitions: dict[int, Redriven] = {}
        self.redriven = 0
        self._chunks: list[RecordChunk] = []
        self._sent: dict[LaneKey, list[int]] = {}
        self._finished: dict[PartitionKey, OffsetSet] = {}
        self._waiting: dict[tuple[PartitionKey, int], list[tuple[int, int]]] = {}
        self._missing: dict[tuple[int, int], int] = {}

    def begin(self, records: Iterable[tuple[ErrorRecord, Sequence[Original]]]) -> int:
        """Have the originals of error records handed out by the next `take`.

        An original is handed out once in a run, however often it is in the topic. What was
        handed out before must have come to its end, or to none because its partition is halted.

        Returns:
            How many originals will be handed out.
        """
        fresh: dict[PartitionKey, dict[int, Original]] = {}
        for record, originals in records:
            owner = (record.partition, record.offset)
            missing = 0
            for original in originals:
                key, offset = (original["topic"], original["partition"]), original["offset"]
                if offset in self._finished.setdefault(key, OffsetSet()):
                    continue
                missing += 1
                waiting = self._waiting.setdefault((key, offset), [])
                if not waiting:
                    fresh.setdefault(key, {})[offset] = original
                waiting.append(owner)
            if missing:
                self._missing[owner] = missing
            else:
                self._redriven(owner)
        self._sent = {}
        for key, by_offset in fresh.items():
            for chunk in self._lanes.split(to_chunk(key, by_offset.values())):
                self._sent[chunk.lane_key] = list(chunk.records.offsets)
                self._chunks.append(chunk)
        return sum(map(len, fresh.values()))

    def take(self) -> list[RecordChunk]:
        """What is to be sent."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def finish(self, progress: Progress) -> None:
        """The originals of a range have come to their end, and that is acknowledged."""
        key = (progress.topic, progress.partition)
        offsets = self._sent.get((*key, progress.lane), [])
        low = bisect_left(offsets, progress.start)
        high = bisect_left(offsets, progress.next_offset)
        for offset in offsets[low:high]:
            self._finished[key].add(offset)
            for owner in self._waiting.pop((key, offset), ()):
                self._missing[owner] -= 1
                if not self._missing[owner]:
                    del self._missing[owner]
                    self._redriven(owner)

    def _redriven(self, owner: tuple[int, int]) -> None:
        partition, offset = owner
        self.partitions[partition].add(offset)
        self.redriven += 1

    def has_room_for(self, records: Iterable[ErrorRecord]) -> bool:
        """Whether it could be remembered that these are redriven, too."""
        more: dict[int, list[int]] = {}
        for record in records:
            more.setdefault(record.partition, []).append(record.offset)
        return all(
            len(self.partitions[partition].commit(offsets)[1]) <= _SAFE_METADATA_BYTES
            for partition, offsets in more.items()
        )
