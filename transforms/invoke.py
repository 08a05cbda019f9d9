"""Invoke: Batch -> Finished, through the process's one ordered `Invoker`.

The DoFn only hands over and collects; nothing in a bundle waits for the function.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from transforms.aws import FunctionConfig, LambdaFunction
from transforms.invoker import Hold, Invoker
from transforms.outcome import Fault, Outcome, Reply, classify_fault, classify_reply
from transforms.payload import join_entries
from transforms.per_process import per_process
from transforms.records import Batch, Finished
from transforms.reply import parse_reply
from transforms.retry import Call, RetryPolicy


@dataclass(frozen=True, slots=True)
class InvokeConfig:
    """How batches reach the function.

    Attributes:
        function: Which function.
        policy: When to repeat, split and give up.
        check_reply: Whether the reply must answer each record; else it is read and dropped.
    """

    function: FunctionConfig
    policy: RetryPolicy = RetryPolicy()
    check_reply: bool = True


def shared_function(config: FunctionConfig) -> LambdaFunction:
    """This process's client for the function."""
    return per_process(LambdaFunction, config)


def make_invoker(config: InvokeConfig) -> Invoker:
    """An invoker over boto3; made once per process through `shared_invoker`."""
    function = shared_function(config.function)

    def outcome(batch: Batch, step: Call, result: Reply | Fault) -> Outcome:
        if isinstance(result, Fault):
            return classify_fault(result)
        offsets = batch.records.offsets[step.low : step.high]
        parse = partial(parse_reply, topic=batch.topic, partition=batch.partition, offsets=offsets)
        return classify_reply(result, parse if config.check_reply else None)

    def call(batch: Batch, step: Call) -> Outcome:
        result = function.invoke(join_entries(batch.entries[step.low : step.high]))
        return outcome(batch, step, result)

    def ahead(batch: Batch, step: Call, hold: Hold) -> Outcome | None:
        payload = join_entries(batch.entries[step.low : step.high])
        result = function.invoke_ahead(payload, hold)
        return None if result is None else outcome(batch, step, result)

    return Invoker(
        call,
        config.policy,
        config.function.max_concurrency,
        clock=time.time,
        random=random.random,
        ahead=ahead,
    )


def shared_invoker(config: InvokeConfig) -> Invoker:
    """This process's invoker for the config."""
    return per_process(make_invoker, config)


class InvokeLambda(beam.PTransform):
    """Invoke the function with each batch and emit what became of it.

    For bounded rounds in one process: a batch handed over in one round may come out in a later
    one, since the invoker outlives them. Order: results of a partition come out in the order
    of its batches. At least once: a batch is invoked again if the process ends before its
    offsets are committed. Retries, splits and errors: `transforms.retry`.
    """

    def __init__(self, config: InvokeConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Finished]:
        return batches | "HandOver" >> beam.ParDo(_HandOverFn(self._config)).with_output_types(
            Finished
        )

    def display_data(self) -> dict[str, Any]:
        return {"function": self._config.function.function}


class _HandOverFn(beam.DoFn):
    def __init__(self, config: InvokeConfig) -> None:
        self._config = config
        counter = beam.metrics.Metrics.counter
        self._counters = {
            name: counter("invoke", name)
            for name in ("invocations", "retries", "bisections", "throttles", "invoke_ms")
        }

    def process(self, batch: Batch) -> None:
        shared_invoker(self._config).submit([batch])

    def finish_bundle(self) -> Iterator[WindowedValue]:
        window = GlobalWindow()
        for finished in shared_invoker(self._config).collect():
            for name, counter in self._counters.items():
                counter.inc(getattr(finished.stats, name))
            yield WindowedValue(finished, window.max_timestamp(), (window,))


coders.registry.register_coder(Finished, coders.PickleCoder)
