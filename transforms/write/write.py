"""Write: Finished -> Progress, once its responses and error records are acknowledged by Kafka.

Each bundle by itself (`transforms.write.produce`), or with `--delivery=exactly_once` in a
transaction that Commit ends (`transforms.write.transact`).
"""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from transforms.per_process import per_process
from transforms.records import Finished, PartitionKey, Progress
from transforms.write.produce import HaltPartition, ProduceFn, WriteConfig, make_halted
from transforms.write.transact import TransactFn, make_kept


class WriteToKafka(beam.PTransform):
    """Write responses and error records, then say how far each partition is done.

    At least once; order per lane of a source partition is kept in the response topic. An element's
    `Progress` comes out only when all its records are acknowledged; a failed delivery fails
    the bundle. Failures of halted partitions are not written: their records will be read again.

    A response that Kafka refuses (too large, for example) makes a failure of what it answers. An
    error record that it refuses goes without its largest parts. What cannot be written even so
    halts the partition in front of the record.

    With `config.transaction` all of a bundle is in one transaction, which is open when the bundle
    has ended: the step behind ends it. What is not to be seen after all is written again with the
    next bundle (`to_write_again`).

    Args:
        config: Where outcomes go.
        halt: Told of partitions that are halted here.
    """

    def __init__(self, config: WriteConfig, halt: HaltPartition = lambda _: None) -> None:
        super().__init__()
        self._config = config
        self._halt = halt

    def expand(self, finished: beam.PCollection[Finished]) -> beam.PCollection[Progress]:
        kind = TransactFn if self._config.transaction else ProduceFn
        produce = beam.ParDo(kind(self._config, self._halt))
        return finished | "Produce" >> produce.with_output_types(Progress)

    def display_data(self) -> dict[str, Any]:
        return {
            "response_topic": self._config.response_topic or "",
            "error_topic": self._config.error_topic or "",
        }


def forget_partition(config: WriteConfig, key: PartitionKey) -> None:
    """A partition is begun again, or is another process's: what stopped it stops it no more, and
    what is to be written of it again is not."""
    per_process(make_halted, config).discard(key)
    if config.transaction:
        per_process(make_kept, config).forget(key)


def to_write_again(config: WriteConfig) -> set[PartitionKey]:
    """Partitions of which something is to be written again, with the next bundle."""
    if config.transaction is None:
        return set()
    return {finished.key for finished in per_process(make_kept, config).finished}
