"""Invoke: the real invoker over the real client, and what the step shows of it in metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from pipeline.local.lambda_server import LambdaServer
from tests.sink import ACCESS_KEY, FUNCTION, SECRET_KEY, serve
from transforms.aws.function import FunctionConfig
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.invoke import (
    InvokeConfig,
    InvokeLambda,
    make_invoker,
    shared_invoker,
)
from transforms.invoke.invoker import Invoker
from transforms.invoke.reply import NONE
from transforms.invoke.retry import RetryPolicy
from transforms.per_process import forget
from transforms.records import Batch, Finished, Records, Rejection, Responses


def _batch(partition: int) -> Batch:
    records = Records([0], [1], [None], [b"v"], [None])
    return Batch("t", partition, 0, 1, records, [b"{}"])


def _fails(event: object, context: object) -> object:
    raise ValueError


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


# -- the invoker over the client ----------------------------------------------------------

GUARD_SECS = 30.0


class Gate:
    """A function that answers once it is let, and notes what it was called with."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.events: list[Any] = []

    def __call__(self, event: Any, context: Any) -> Any:
        self.events.append(event)
        assert self.open.wait(GUARD_SECS)


def _at(start: int, *offsets: int, end: int | None = None) -> Batch:
    """A batch of partition 0 of "t"; the function sees its offsets."""
    count = len(offsets)
    records = Records(offsets, [1] * count, [None] * count, [b"v"] * count, [None] * count)
    entries = [b"%d" % offset for offset in offsets]
    return Batch("t", 0, start, offsets[-1] + 1 if end is None else end, records, entries)


def _refused(offset: int) -> Batch:
    return replace(_at(offset, offset), rejection=Rejection("InvalidRecord", "InvalidJson", "no"))


BEHIND_A_CALL = {
    "an empty range": [_at(0, 0), _at(1, 1), _at(2, end=5), _at(5, 5)],
    "empty ranges": [_at(0, 0), _at(1, end=3), _at(3, end=5), _at(5, 5)],
    "a refused record": [_at(0, 0), _refused(1), _at(2, 2), _refused(3), _at(4, end=5)],
    "nothing but empty ranges": [_at(0, end=2), _at(2, end=4)],
}

behind_a_call = pytest.mark.parametrize("batches", BEHIND_A_CALL.values(), ids=BEHIND_A_CALL)


def _config(server: LambdaServer, **more: Any) -> InvokeConfig:
    function = FunctionConfig(FUNCTION, region="us-east-1", endpoint_url=server.url)
    return InvokeConfig(function, RetryPolicy(halt=False), reply=NONE, **more)


@contextmanager
def _invoker(config: InvokeConfig) -> Iterator[Invoker]:
    invoker = make_invoker(config)
    try:
        yield invoker
    finally:
        invoker.stop()
        assert invoker.join(GUARD_SECS)


def _check(batches: list[Batch], finished: list[Finished], calls: list[Any]) -> None:
    places = [(each.start, each.next_offset) for each in finished]
    assert places == [(each.start, each.next_offset) for each in batches]
    sent = [list(each.records.offsets) for each in batches if len(each) and not each.rejection]
    assert calls == sent
    answered = [
        list(part.offsets)
        for each in finished
        for part in each.parts
        if isinstance(part, Responses)
    ]
    assert answered == sent


@behind_a_call
def test_whatever_stands_behind_a_call_the_call_is_answered(batches: list[Batch]) -> None:
    """What is prepared while a reply is under way breaks neither the reply nor the run."""
    gate = Gate()
    with serve(gate) as server, _invoker(_config(server)) as invoker:
        invoker.submit(batches)
        gate.open.set()
        assert invoker.wait(lambda i: bool(i.broken) or not i.pending_batches, GUARD_SECS)
        assert invoker.broken is None
        _check(batches, invoker.collect(), gate.events)


# -- metrics ------------------------------------------------------------------------------


def test_the_limit_and_the_breaker_are_gauges() -> None:
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
            assert shared_invoker(config).wait(
                lambda invoker: invoker.breaker_open and bool(invoker.trouble.stuck), 60
            )
            found = gauges(2)
            assert found.pop("oldest_age_secs") > 1e9  # its timestamp is that of 1970
            assert found == {
                "in_flight": 0,
                "concurrency_limit": 7,
                "breaker_open": 1,
                "stuck_partitions": 1,
            }
        finally:
            invoker = forget(make_invoker, config)
            assert invoker
            invoker.stop()
            invoker.join(60)
