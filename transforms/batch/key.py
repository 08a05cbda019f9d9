"""Key: RecordChunk -> ((topic, partition, lane), RecordChunk).

The key is what order is kept by: one stateful buffer and one queue of invocations per key. With
more than one lane a partition's records are divided by their own keys, so that those of one record
key stay in order while others do not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import apache_beam as beam

from transforms.lanes import Lanes
from transforms.records import LaneKey, RecordChunk


class KeyByLane(beam.PTransform):
    """Key chunks by topic, partition and lane. Bounded and unbounded.

    A chunk that is divided already passes as it is; of any other come as many as there are
    lanes, in the order of the lanes.
    """

    def __init__(self, lanes: Lanes = Lanes()) -> None:
        super().__init__()
        self._lanes = lanes

    def expand(
        self, chunks: beam.PCollection[RecordChunk]
    ) -> beam.PCollection[tuple[LaneKey, RecordChunk]]:
        return chunks | "ByLane" >> beam.ParDo(_SplitFn(self._lanes)).with_output_types(
            tuple[LaneKey, RecordChunk]
        )


class _SplitFn(beam.DoFn):
    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def process(self, chunk: RecordChunk) -> Iterator[tuple[LaneKey, RecordChunk]]:
        for part in self._lanes.split(chunk):
            yield part.lane_key, part
