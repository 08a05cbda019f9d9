"""Write: Finished -> Progress, once its responses and error records are acknowledged by Kafka.

Each bundle by itself (`transforms.write.produce`), or with `--delivery=exactly_once` in a
transaction that Commit ends (`transforms.write.transact`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import apache_beam as beam

from transforms.errors import WriteError
from transforms.kafka.transaction import shared_transaction
from transforms.per_process import per_process
from transforms.records import Finished, PartitionKey, Progress
from transforms.write.produce import (
    HaltPartition,
    ProduceFn,
    WriteConfig,
    make_halted,
    records_of,
)
from transforms.write.transact import Kept, TransactFn, make_kept


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


def write_at_once(config: WriteConfig, finished: Finished, commit: Callable[[], bool]) -> None:
    """Write what became of records of a stopped partition, outside any pipeline, and commit it.

    Args:
        config: Where outcomes go.
        finished: What became of them. Nothing else of its partition is under way.
        commit: Commits it, once it is acknowledged; with `config.transaction` it ends that, as
            Commit does. Says whether it is to be seen.

    Raises:
        WriteError: It is not written, as far as anybody can see.
        SinkError: It is not known whether it is committed.
    """
    forget_partition(config, finished.key)
    kept = Kept()
    write: ProduceFn
    if config.transaction:
        write = TransactFn(config, _halt_nothing, kept)
    else:
        write = ProduceFn(config, _halt_nothing)
    write.start_bundle()
    write.process(finished)
    try:
        progress = [each.value for each in write.finish_bundle()]
        if any(each.halted for each in progress):
            raise WriteError(f"topic {config.error_topic} does not take the error record")
        if not progress or not commit():
            raise WriteError("what was written cannot be seen, the log says why")
    finally:
        if config.transaction and kept.finished:
            shared_transaction(config.transaction).abort()
            kept.forget(finished.key)


def _halt_nothing(_: Finished) -> None:
    """For a partition that is halted."""


def forget_partition(config: WriteConfig, key: PartitionKey) -> None:
    """A partition is begun again, or is another process's: what stopped it stops it no more, and
    what is to be written of it again is not."""
    per_process(make_halted, config).discard(key)
    if config.transaction:
        per_process(make_kept, config).forget(key)


def to_write_again(config: WriteConfig) -> Counter[PartitionKey]:
    """Partitions of which something is to be written again, with the next bundle, and of how many
    records."""
    records: Counter[PartitionKey] = Counter()
    if config.transaction:
        for finished in per_process(make_kept, config).finished:
            records[finished.key] += records_of(finished)
    return records
