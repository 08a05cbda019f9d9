"""Kafka as the source of streaming runs: finds partitions and lends readers of them. No Beam.

What a runner asks for when is in `transforms.read.streaming`, which knows no Kafka.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import monotonic

from transforms.commit.committer import CommitConfig, shared_committer
from transforms.kafka.client import make_consumer
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.kafka.partition_reader import PartitionReader, ReadAhead
from transforms.kafka.shared_consumer import SharedConsumer
from transforms.per_process import per_process
from transforms.records import PartitionKey, read_halt

_UNUSED_SECS = 120.0


@dataclass(frozen=True, slots=True)
class KafkaStream:
    """The topics of a streaming run; see `transforms.read.streaming.StreamSource`.

    Attributes:
        source: What to read, and from where on.
        bounded: Whether the run ends where the partitions ended when they were found.
        ahead: How far partitions may be read ahead of what is committed.
    """

    source: SourceConfig
    bounded: bool = False
    ahead: ReadAhead = ReadAhead()

    @property
    def address(self) -> str:
        """Where it is, for a runner's page of the job."""
        return self.source.kafka.bootstrap_servers

    def find(self, known: frozenset[PartitionKey] | None) -> dict[PartitionKey, tuple[int, int]]:
        """See `PartitionFinder.look`."""
        return per_process(PartitionFinder, self.source).look(known)

    def lend(self, key: PartitionKey) -> AbstractContextManager[PartitionReader]:
        """See `PartitionReaders.lend`."""
        return per_process(PartitionReaders, self).lend(key)


class PartitionFinder:
    """What looks for partitions in a worker process."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self._source = SourceOffsets(config, make_consumer(config.kafka))

    def look(self, known: frozenset[PartitionKey] | None) -> dict[PartitionKey, tuple[int, int]]:
        """Where partitions that are not known yet begin and end.

        Args:
            known: Those that were found before; None at the first look.

        Raises:
            KafkaError: The brokers cannot be asked.
        """
        keys = [key for key in self._source.partitions() if key not in (known or ())]
        if not keys:
            return {}
        if known is None:
            self._source.survey(keys)
        starts = self._source.starts(keys)
        # What a starting position came to is committed at once, so that a restart before the
        # first batch is finished does not move it. And an earlier run's halt is over.
        shared_committer(CommitConfig(self._config)).commit(
            {
                key: start.offset
                for key, start in starts.items()
                if start.resolved or read_halt(start.note)
            }
        )
        ends = self._source.ranges(keys)
        return {key: (starts[key].offset, ends[key][1]) for key in keys}


class PartitionReaders:
    """The readers of a worker process; one for each partition that it was given lately."""

    def __init__(self, config: KafkaStream) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._readers: dict[PartitionKey, PartitionReader] = {}
        self._consumer = SharedConsumer(config.source.kafka)

    def __len__(self) -> int:
        return len(self._readers)

    @contextmanager
    def lend(self, key: PartitionKey) -> Iterator[PartitionReader]:
        """A partition's reader, for the caller alone."""
        while True:
            reader = self._get(key)
            with reader.lock:
                # Not if it was closed while the caller stood still.
                if not reader.closed:
                    yield reader
                    return

    def _get(self, key: PartitionKey) -> PartitionReader:
        with self._lock:
            for other, reader in list(self._readers.items()):
                # Another process reads it now, or nobody does.
                unused = other != key and monotonic() - reader.used > _UNUSED_SECS
                if unused and reader.lock.acquire(blocking=False):
                    del self._readers[other]
                    reader.close()
                    reader.lock.release()
            if key not in self._readers:
                config = self._config
                self._readers[key] = PartitionReader(
                    config.source.kafka,
                    self._consumer,
                    key,
                    config.ahead,
                    config.bounded,
                    self.__len__,
                )
            self._readers[key].used = monotonic()
            return self._readers[key]
