"""Invoke: what the step shows of the invoker behind it, in Beam's metrics."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from tests.sink import ACCESS_KEY, FUNCTION, SECRET_KEY, serve
from transforms.aws import FunctionConfig
from transforms.breaker import BreakerPolicy
from transforms.invoke import InvokeConfig, InvokeLambda, make_invoker, shared_invoker
from transforms.per_process import forget
from transforms.records import Batch, Records
from transforms.reply import NONE
from transforms.retry import RetryPolicy


def _batch(partition: int) -> Batch:
    records = Records([0], [1], [None], [b"v"], [None])
    return Batch("t", partition, 0, 1, records, [b"{}"])


def _fails(event: object, context: object) -> object:
    raise ValueError


def test_the_limit_and_the_breaker_are_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with serve(_fails) as server:
        config = InvokeConfig(
            FunctionConfig(
                FUNCTION, region="us-east-1", endpoint_url=server.url, max_concurrency=7
            ),
            RetryPolicy(halt=False),
            reply=NONE,
            breaker=BreakerPolicy(1.0, invocations=2, wait_secs=3600),
        )

        def gauges(*partitions: int) -> dict[str, int]:
            pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
            batches = beam.Create([_batch(partition) for partition in partitions])
            _ = pipeline | batches.with_output_types(Batch) | InvokeLambda(config)
            result = pipeline.run()
            result.wait_until_finish()
            found = result.metrics().query()["gauges"]
            return {gauge.key.metric.name: gauge.committed.value for gauge in found}

        try:
            gauges(0, 1)
            assert shared_invoker(config).wait(lambda invoker: invoker.breaker_open, 60)
            assert gauges(2) == {"in_flight": 0, "concurrency_limit": 7, "breaker_open": 1}
        finally:
            invoker = forget(make_invoker, config)
            assert invoker
            invoker.stop()
            invoker.join(60)
