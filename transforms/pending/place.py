"""Place: what the state of one lane says, besides the records that are not finished. Pure.

The chunks of a lane are numbered as they are batched, and so are the batches that come of them. A
`Mark` says how far in the chunks a batch reaches; `Place` how far the lane has come.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from struct import Struct
from typing import Any, NamedTuple

from transforms.batch.batch import OpenBatch, is_open
from transforms.facts import check_version, number, unversioned, versioned

_VERSION = 1
_CHUNK = Struct("<BqB")
_NOTHING_OPEN = OpenBatch(-1, -1, -1)


class Mark(NamedTuple):
    """How far a lane is done.

    Attributes:
        chunk: Number of a chunk: all before it are done.
        offset: Of that chunk, what is below this offset.
        reached: Where the last range ends that was batched in order: the next one begins there.
            -1 before the first.
    """

    chunk: int = 0
    offset: int = -1
    reached: int = -1


@dataclass(frozen=True, slots=True)
class Place:
    """How far a lane has come.

    Attributes:
        token: Which handing over to a process this is; see `transforms.invoke.handover`.
        head: Number of the first batch whose outcome has not been emitted.
        tail: Number of the next batch to come.
        done: How far that is in the chunks.
        chunks: Number of the next chunk.
        split: Number of the first chunk in the newer bag.
        kept: Number of the first chunk in the older bag.
        older: Which of the two bags it is.
        halted: Whether a failure stopped the partition.
        collecting: Whether the timer that looks for outcomes is set.
        open: The batch that is still open, by its counts.
    """

    token: str = ""
    head: int = 0
    tail: int = 0
    done: Mark = Mark()
    chunks: int = 0
    split: int = 0
    kept: int = 0
    older: int = 0
    halted: bool = False
    collecting: bool = False
    open: OpenBatch = _NOTHING_OPEN

    @property
    def newer(self) -> int:
        """The bag that further chunks go to."""
        return 1 - self.older

    def let_go(self) -> tuple[Place, tuple[int, ...]]:
        """Which bags hold nothing any more that is needed, and the place without them.

        Chunks go to one bag while the other one is used up, so that what is kept is never read, but
        for a process that does not have it, nor written again.
        """
        if self.halted or (self.head == self.tail and not is_open(self.open)):
            bags = [self.older] * (self.kept < self.split) + [self.newer] * (
                self.split < self.chunks
            )
            return replace(self, kept=self.chunks, split=self.chunks), tuple(bags)
        cleared: tuple[int, ...] = ()
        place = self
        if place.kept < place.split <= place.done.chunk:
            cleared = (place.older,)
            place = replace(place, kept=place.split)
        if place.kept == place.split < place.chunks:
            place = replace(place, older=place.newer, split=place.chunks)
        return place, cleared


def encode_place(place: Place) -> bytes:
    """For the state."""
    facts: dict[str, Any] = {
        "token": place.token,
        "batches": [place.head, place.tail],
        "done": list(map(number, place.done)),
        "chunks": [place.kept, place.split, place.chunks, place.older],
        "open": [
            *map(number, (place.open.base, place.open.start, place.open.next_offset)),
            place.open.records,
            place.open.entry_bytes,
            place.open.early,
        ],
        "holes": [list(map(number, hole)) for hole in place.open.holes],
    }
    facts |= {name: True for name in ("halted", "collecting") if getattr(place, name)}
    return versioned(_VERSION, facts)


def decode_place(data: bytes) -> Place:
    """A fact that bytes from before do not have is as it is at the beginning.

    Raises:
        StateError: A later version has written it.
    """
    facts = unversioned(_VERSION, data, "the places of lanes")
    head, tail = facts["batches"]
    kept, split, chunks, older = facts["chunks"]
    base, start, next_offset, records, entry_bytes, early = map(int, facts["open"])
    holes = tuple((int(low), int(high)) for low, high in facts["holes"])
    return Place(
        facts["token"],
        head,
        tail,
        Mark(*map(int, facts["done"])),
        chunks,
        split,
        kept,
        older,
        facts.get("halted", False),
        facts.get("collecting", False),
        OpenBatch(base, start, next_offset, records, entry_bytes, early, holes),
    )


class KeptChunk(NamedTuple):
    """A chunk as the state has it.

    Attributes:
        number: Its number.
        how: How it is batched; see `transforms.batch.batch.IN_ORDER`.
        data: What `transforms.columns.encode_chunk` has made of it.
    """

    number: int
    how: int
    data: bytes

    def encode(self) -> bytes:
        return _CHUNK.pack(_VERSION, self.number, self.how) + self.data


def decode_kept(data: bytes) -> KeptChunk:
    """See `KeptChunk.encode`.

    Raises:
        StateError: A later version has written it.
    """
    check_version(_VERSION, data, "records")
    _, number, how = _CHUNK.unpack_from(data)
    return KeptChunk(number, how, data[_CHUNK.size :])
