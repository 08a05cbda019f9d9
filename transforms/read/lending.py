"""Lending: readers of single partitions, kept between the bundles that ask for them. No Beam."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Generic, Protocol, TypeVar

from transforms.records import PartitionKey

CHUNK_RECORDS = 4_000
"""Records that a reader hands out at once, at most. Behind the reader each chunk costs Beam and the
keyed step the same, however many records it has; much larger ones do not stay in the caches."""
CHUNK_BYTES = 2**20

_UNUSED_SECS = 120.0


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """How far partitions may be read ahead of what is committed of them.

    Attributes:
        records: Records of a partition.
        bytes: Bytes of a partition.
        process_bytes: Bytes of all partitions that a worker process reads.
    """

    records: int = 100_000
    bytes: int = 32 * 2**20
    process_bytes: int = 512 * 2**20

    @property
    def chunk_records(self) -> int:
        """Records that are read at once, at most."""
        return max(1, min(CHUNK_RECORDS, self.records // 10))

    @property
    def chunk_bytes(self) -> int:
        """Their bytes, at most; one record may be larger."""
        return min(CHUNK_BYTES, self.bytes // 10)


AHEAD = ReadAhead()

_PARTS = 64


class Ahead:
    """What was read of a partition and is not known to be committed, by parts.

    However little is read at a time, parts are few: one takes more until it is a 64th of what may
    be read ahead. A part counts until all of it is committed.

    Args:
        limits: How far the partition may be read ahead.

    Attributes:
        records: Records of all parts.
        bytes: Their bytes.
    """

    def __init__(self, limits: ReadAhead) -> None:
        self._part_records = limits.records // _PARTS
        self._part_bytes = limits.bytes // _PARTS
        # Where each part ends, its records and bytes.
        self._parts: deque[tuple[int, int, int]] = deque()
        self.records = self.bytes = 0

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self._parts)

    def clear(self) -> None:
        """Nothing was read."""
        self._parts.clear()
        self.records = self.bytes = 0

    def add(self, position: int, records: int, bytes: int) -> None:
        """More was read, up to a position."""
        self.records += records
        self.bytes += bytes
        if self._parts:
            _, some, size = self._parts[-1]
            some, size = some + records, size + bytes
            if some <= self._part_records and size <= self._part_bytes:
                self._parts[-1] = position, some, size
                return
        self._parts.append((position, records, bytes))

    def add_before(self, position: int, records: int, bytes: int) -> None:
        """As much was read before all that is known of, up to a position."""
        self.records += records
        self.bytes += bytes
        self._parts.appendleft((position, records, bytes))

    def done(self, position: int) -> None:
        """All up to a position is committed."""
        while self._parts and self._parts[0][0] <= position:
            _, records, size = self._parts.popleft()
            self.records -= records
            self.bytes -= size


class Lent(Protocol):
    """A reader.

    Attributes:
        lock: For who reads it now.
        used: When it was last asked for, by the timer.
        closed: Whether it can be read no more.
    """

    lock: threading.Lock
    used: float
    closed: bool

    def close(self) -> None: ...


R = TypeVar("R", bound=Lent)


class Lending(Generic[R]):
    """The readers of a worker process; one for each partition that it was given lately.

    Args:
        make: Makes a partition's.
    """

    def __init__(self, make: Callable[[PartitionKey], R]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._readers: dict[PartitionKey, R] = {}

    def __len__(self) -> int:
        return len(self._readers)

    @contextmanager
    def lend(self, key: PartitionKey) -> Iterator[R]:
        """A partition's reader, for the caller alone."""
        while True:
            reader = self._get(key)
            with reader.lock:
                # Not if it was closed while the caller stood still.
                if not reader.closed:
                    yield reader
                    return

    def _get(self, key: PartitionKey) -> R:
        with self._lock:
            for other, reader in list(self._readers.items()):
                # Another process reads it now, or nobody does.
                unused = other != key and monotonic() - reader.used > _UNUSED_SECS
                if unused and reader.lock.acquire(blocking=False):
                    del self._readers[other]
                    reader.close()
                    reader.lock.release()
            if key not in self._readers or self._readers[key].closed:
                self._readers[key] = self._make(key)
            self._readers[key].used = monotonic()
            return self._readers[key]
