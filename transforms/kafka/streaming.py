"""Kafka as the source of streaming runs: finds partitions and lends readers of them. No Beam.

What a runner asks for when is in `transforms.read.streaming`, which knows no Kafka.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from transforms.commit.committer import CommitConfig, shared_committer
from transforms.errors import KafkaError
from transforms.kafka.client import make_consumer
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.kafka.partition_reader import PartitionReader
from transforms.kafka.shared_consumer import SharedConsumer
from transforms.per_process import per_process
from transforms.read.lending import Lending, ReadAhead
from transforms.records import PartitionKey, read_halt

_LOGGER = logging.getLogger(__name__)


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

    find_secs: ClassVar[int] = 5

    @property
    def label(self) -> dict[str, str]:
        """See `StreamSource.label`."""
        return {"bootstrap_servers": self.source.kafka.bootstrap_servers}

    def find(
        self, known: frozenset[PartitionKey] | None, asked: Mapping[PartitionKey, int]
    ) -> tuple[dict[PartitionKey, tuple[int, int]], Mapping[PartitionKey, int]]:
        """See `StreamSource.find`. Nothing is asked: partitions do not end."""
        try:
            return per_process(PartitionFinder, self.source).look(known), asked
        except KafkaError as error:
            if known is None:
                raise
            # Who is to be asked is away for a moment; asked again with the next turn.
            _LOGGER.warning("new partitions cannot be looked for: %s", error)
            return {}, asked

    def lend(self, key: PartitionKey) -> AbstractContextManager[PartitionReader]:
        """See `Lending.lend`."""
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


class PartitionReaders(Lending[PartitionReader]):
    """The readers of a worker process, of one consumer."""

    def __init__(self, config: KafkaStream) -> None:
        self._config = config
        self._consumer = SharedConsumer(config.source.kafka)
        super().__init__(self._reader)

    def _reader(self, key: PartitionKey) -> PartitionReader:
        config = self._config
        return PartitionReader(
            config.source.kafka, self._consumer, key, config.ahead, config.bounded, self.__len__
        )
