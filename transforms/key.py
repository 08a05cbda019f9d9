"""Key: RecordChunk -> ((topic, partition), RecordChunk).

The key is what order is kept by: one stateful buffer and one queue of invocations per key.
"""

from __future__ import annotations

import apache_beam as beam

from transforms.records import PartitionKey, RecordChunk


def partition_key(chunk: RecordChunk) -> tuple[PartitionKey, RecordChunk]:
    """Key a chunk by where it comes from."""
    return (chunk.topic, chunk.partition), chunk


class KeyByPartition(beam.PTransform):
    """Key chunks by topic-partition. Bounded and unbounded; one element out per element in."""

    def expand(
        self, chunks: beam.PCollection[RecordChunk]
    ) -> beam.PCollection[tuple[PartitionKey, RecordChunk]]:
        return chunks | "ByPartition" >> beam.Map(partition_key).with_output_types(
            tuple[PartitionKey, RecordChunk]
        )
