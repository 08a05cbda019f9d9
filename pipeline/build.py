"""The pipeline: from Kafka to Lambda and back, step by step."""

from __future__ import annotations

from typing import Any

import apache_beam as beam

from pipeline.options import Config
from transforms.batch import BatchByPartition
from transforms.commit import CommitOffsets
from transforms.invoke import InvokeLambda
from transforms.key import KeyByPartition
from transforms.read import ReadRound
from transforms.write import WriteToKafka


def build(pipeline: beam.Pipeline, config: Config) -> beam.PCollection[Any]:
    """Wire the pipeline; see `transforms` for what each step takes and gives."""
    return (
        pipeline
        | "Read" >> ReadRound(config.read)
        | "Key" >> KeyByPartition()
        | "Batch" >> BatchByPartition(config.batch)
        | "Invoke" >> InvokeLambda(config.invoke)
        | "Write" >> WriteToKafka(config.write)
        | "Commit" >> CommitOffsets(config.kafka)
    )
