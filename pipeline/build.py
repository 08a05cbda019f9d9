"""The pipeline: from Kafka to Lambda and back, step by step."""

from __future__ import annotations

from functools import partial
from typing import Any

import apache_beam as beam

from pipeline.options.config import Config
from transforms.batch.batch import BatchByPartition
from transforms.batch.key import KeyByLane
from transforms.commit.commit import CommitOffsets
from transforms.decode.decode import DecodeRecords
from transforms.filter.filter import FilterRecords
from transforms.invoke.invoke import InvokeLambda, halt_partition
from transforms.kafka.beam_reader import BeamReadConfig, ReadRows
from transforms.pending.pending import BatchAndInvoke
from transforms.read.rounds import ReadRound
from transforms.read.streaming import ReadPartitions
from transforms.write.write import WriteToKafka


def build(
    pipeline: beam.Pipeline,
    config: Config,
    read: beam.PTransform | None = None,
    commit: beam.PTransform | None = None,
) -> beam.PCollection[Any]:
    """Wire the pipeline; see `transforms` for what each step takes and gives.

    Args:
        pipeline: Where to.
        config: Of the steps.
        read: Another beginning than a reader of the source topics.
        commit: Another end than the group's offsets.
    """
    chunks = pipeline | "Read" >> (read or _reader(config))
    begun = told = None
    if config.stream is not None:
        chunks, begun = chunks
        if isinstance(config.stream, BeamReadConfig):
            told = frozenset(key for key, _ in config.stream.starts)
    if config.decode:
        chunks = chunks | "Decode" >> DecodeRecords(config.decode)
    if config.filter:
        chunks = chunks | "Filter" >> FilterRecords(config.filter)
    keyed = chunks | "Key" >> KeyByLane(config.lanes)
    if config.stream is None:
        batches = keyed | "Batch" >> BatchByPartition(config.batch)
        finished = batches | "Invoke" >> InvokeLambda(config.invoke)
    else:
        finished = keyed | "BatchAndInvoke" >> BatchAndInvoke(config.batch, config.invoke)
    return (
        finished
        | "Write" >> WriteToKafka(config.write, partial(halt_partition, config.invoke))
        | "Commit" >> (commit or CommitOffsets(config.commit, begun, told))
    )


def _reader(config: Config) -> beam.PTransform:
    """Which reader it is: the one of the rounds, or, in a streaming run, the one asked for."""
    if config.stream is None:
        return ReadRound(config.read)
    if isinstance(config.stream, BeamReadConfig):
        return ReadRows(config.stream)
    return ReadPartitions(config.stream)
