"""Lending: readers of single partitions, kept between the bundles that ask for them. No Beam."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Generic, Protocol, TypeVar

from transforms.records import PartitionKey

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


AHEAD = ReadAhead()


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
