"""Invoke: Batch -> Finished, through the process's one ordered `Invoker`.

The DoFn only hands over and collects; nothing in a bundle waits for the function. In rounds the
invoker outlives it and the committed offsets are the truth. In a streaming run what is not finished
is kept in state, by the step in `transforms.pending.pending`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from transforms.aws.answers import Fault, Reply
from transforms.aws.function import FunctionConfig, LambdaFunction, Request, advice
from transforms.coding import SizedPickleCoder
from transforms.errors import FunctionConfigError
from transforms.invoke.breaker import BreakerPolicy
from transforms.invoke.client_context import client_context
from transforms.invoke.handover import Handover
from transforms.invoke.invoker import Invoker, always
from transforms.invoke.outcome import Outcome, classify_fault, classify_reply
from transforms.invoke.reply import CONFLUENT, NONE, Answer, parse_state, read_reply
from transforms.invoke.retry import Call, RetryPolicy
from transforms.invoke.window import WindowConfig
from transforms.names import NUMBERS, Names
from transforms.per_process import forget, per_process
from transforms.records import Batch, Failure, Finished, LaneKey
from transforms.tracing import TraceConfig, shared_tracer, x_amzn_trace_id

_STATS = ("invocations", "retries", "bisections", "throttles", "invoke_ms")

# How often it is looked at what does not go well.
_LOOK_SECS = 0.5
# How long a round may stay for what it has handed over. It is what others' results and records may
# have to wait longer for it, so there is no staying where calls mostly take longer.
_STAY_SECS = 0.01

_WINDOW = GlobalWindow()
_WINDOW_END = _WINDOW.max_timestamp()


@dataclass(frozen=True, slots=True)
class InvokeConfig:
    """How batches reach the function.

    Attributes:
        function: Which function.
        policy: When to repeat, split and give up.
        reply: What the reply has to be, one of `transforms.invoke.reply.REPLIES`.
        streaming: Whether pending batches are kept in state, for input without an end.
        min_concurrency: Calls at once that are allowed however often they are throttled.
        breaker: When to stop calling for a while instead of giving records up.
        client_context: Whether the function is told which call this is; for sync only.
        names: How records' numbers are written to the function.
        trace: What is traced, None for nothing.
        drain_wait_secs: How long a drain of a streaming run waits for what is pending; None until
            it is done.
        window: The tumbling windows, None for none; in rounds only.
    """

    function: FunctionConfig
    policy: RetryPolicy = RetryPolicy()
    reply: str = CONFLUENT
    streaming: bool = False
    min_concurrency: int = 1
    breaker: BreakerPolicy = BreakerPolicy()
    client_context: bool = True
    names: Names = NUMBERS
    trace: TraceConfig | None = None
    drain_wait_secs: float | None = None
    window: WindowConfig | None = None


def shared_function(config: FunctionConfig) -> LambdaFunction:
    """This process's client for the function."""
    return per_process(LambdaFunction, config)


def make_invoker(config: InvokeConfig, may_begin: Callable[[LaneKey], bool] = always) -> Invoker:
    """An invoker over boto3; made once per process through `shared_invoker`."""
    function, window = shared_function(config.function), config.window

    def outcome(batch: Batch, step: Call, result: Reply | Fault) -> Outcome:
        if isinstance(result, Fault):
            return classify_fault(result)
        # The state behind the last call of a window is nobody's, and functions leave it out.
        if step.turn.closes if step.turn else config.reply == NONE:
            return classify_reply(result, None)
        offsets = config.names.numbers(step.pick(batch.records.offsets))

        def read(body: bytes) -> Answer:
            state = parse_state(body) if step.turn else None
            answer = read_reply(
                config.reply, body, batch.topic, batch.partition, offsets, config.names.alone
            )
            return answer if state is None else replace(answer, state=state)

        return classify_reply(result, read)

    def prepare(
        batch: Batch, step: Call, trace: Mapping[str, str] | None = None
    ) -> Request | Fault:
        names = config.names
        context = client_context(batch, step, names, trace) if config.client_context else None
        frame = batch.frame
        if window and step.turn:
            frame = window.envelope.frame(batch.topic, batch.partition, step.turn.facts)
        payload = frame.join(step.pick(batch.entries))
        trace_id = x_amzn_trace_id(trace["traceparent"]) if trace else None
        return function.prepare(payload, context, trace_id)

    def prepare_ahead(batch: Batch, step: Call) -> Request | None:
        if tracer or window:
            # A span begins with its call, and the request names it; and a window's state is what
            # the call before it has returned.
            return None
        request = prepare(batch, step)
        # What is wrong is found out, and counts, when the call is made.
        return None if isinstance(request, Fault) else request

    def call(
        batch: Batch, step: Call, request: Request | None, meanwhile: Callable[[], None]
    ) -> Outcome:
        made = request or prepare(batch, step)
        result = made if isinstance(made, Fault) else function.send(made, meanwhile)
        return outcome(batch, step, result)

    tracer = shared_tracer(config.trace) if config.trace else None

    def traced_call(
        batch: Batch, step: Call, request: Request | None, meanwhile: Callable[[], None]
    ) -> Outcome:
        assert tracer
        with tracer.invoke(batch, step.attempt, len(step)) as invocation:
            made = prepare(batch, step, invocation.context)
            result = made if isinstance(made, Fault) else function.send(made, meanwhile)
            found = outcome(batch, step, result)
            facts = {
                "http.response.status_code": result.status_code or None,
                "aws.request_id": result.request_id,
                "faas.invoked_version": getattr(result, "executed_version", None),
            }
            invocation.end(found.error_type, facts)
        return replace(found, trace=invocation.traceparent)

    def ended(batch: Batch, finished: Finished) -> None:
        if tracer:
            failures = (part for part in finished.parts if isinstance(part, Failure))
            failure = finished.halted or next(failures, None)
            tracer.end(batch, failure.error_type if failure else "")

    return Invoker(
        prepare_ahead,
        traced_call if tracer else call,
        config.policy,
        config.function.max_concurrency,
        clock=time.time,
        random=random.random,
        may_begin=may_begin,
        min_concurrency=config.min_concurrency,
        breaker=config.breaker,
        ended=ended if tracer else None,
        window_ms=window.ms if window else 0,
    )


def shared_invoker(config: InvokeConfig) -> Invoker:
    """This process's invoker for the config."""
    return per_process(make_invoker, config)


def _make_handover(config: InvokeConfig) -> Handover:
    return Handover(partial(make_invoker, config))


def shared_handover(config: InvokeConfig) -> Handover:
    """This process's handover for the config, in a streaming run."""
    return per_process(_make_handover, config)


def forget_handover(config: InvokeConfig) -> None:
    """The next to ask for this process's handover gets one that is whole."""
    forget(_make_handover, config)


def halt_partition(config: InvokeConfig, finished: Finished) -> None:
    """Have this process invoke nothing more of a partition; see `Invoker.halt`."""
    invoker = shared_handover(config).invoker if config.streaming else shared_invoker(config)
    invoker.halt(finished)


def why_broken(invoker: Invoker, function: FunctionConfig) -> BaseException | None:
    """The error that stopped all work, if one did."""
    broken = invoker.broken
    if isinstance(broken, Outcome):
        return FunctionConfigError(advice(function, broken.error_type, broken.message))
    return broken


class InvokeLambda(beam.PTransform):
    """Invoke the function with each batch and emit what became of it.

    In bounded rounds of one process: a batch handed over in one round may come out in a later
    one, since the invoker outlives them. Order: results of a partition come out in the order of
    its batches. At least once: a batch is invoked again if its outcome was not durable when the
    process ended. Retries, splits and errors: `transforms.invoke.retry`.
    """

    def __init__(self, config: InvokeConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Finished]:
        hand_over = beam.ParDo(_HandOverFn(self._config)).with_output_types(Finished)
        return batches | "HandOver" >> hand_over

    def display_data(self) -> dict[str, Any]:
        return {"function": self._config.function.function}


class Gauges:
    """Calls that are running in this process, and what holds more of them back, as it is now."""

    def __init__(self) -> None:
        gauge = beam.metrics.Metrics.gauge
        self._limit = gauge("invoke", "concurrency_limit")
        self._in_flight = gauge("invoke", "in_flight")
        self._breaker_open = gauge("invoke", "breaker_open")
        self._stuck = gauge("invoke", "stuck_partitions")
        self._oldest_age_secs = gauge("invoke", "oldest_age_secs")
        self._looked = -math.inf

    def set(self, invoker: Invoker) -> None:
        self._limit.set(invoker.limit)
        self._in_flight.set(invoker.in_flight)
        self._breaker_open.set(int(invoker.breaker_open))
        # To look at all partitions takes time; and what is told last stays.
        if invoker.is_idle or time.monotonic() - self._looked > _LOOK_SECS:
            self._looked = time.monotonic()
            trouble = invoker.trouble
            self._stuck.set(len(trouble.stuck))
            self._oldest_age_secs.set(round(trouble.oldest_age_secs or 0))


class Counters:
    """What calls come to, counted when they have ended and not when their batch is finished."""

    def __init__(self) -> None:
        counter = beam.metrics.Metrics.counter
        self._counters = {name: counter("invoke", name) for name in _STATS}

    def take(self, invoker: Invoker) -> None:
        """Add what was not added yet, by whichever instance in this process."""
        stats = invoker.take_stats()
        for name, counter in self._counters.items():
            if more := getattr(stats, name):
                counter.inc(more)


class _HandOverFn(beam.DoFn):
    _invoker: Invoker

    def __init__(self, config: InvokeConfig) -> None:
        self._config = config
        self._gauges = Gauges()
        self._counters = Counters()

    def start_bundle(self) -> None:
        # For the whole bundle: to look it up costs more than to hand a batch over.
        self._invoker = shared_invoker(self._config)
        self._handed_over = 0

    def process(self, batch: Batch) -> Iterator[Finished]:
        self._invoker.submit([batch])
        self._handed_over += 1
        # Not only at the end, so that Kafka gets results while further batches are made.
        yield from self._collect()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        self._gauges.set(self._invoker)
        if self._handed_over:
            # What is finished at once is written in the same round.
            self._invoker.stay(self._handed_over, _STAY_SECS)
        for finished in self._collect():
            yield WindowedValue(finished, _WINDOW_END, (_WINDOW,))

    def _collect(self) -> Iterator[Finished]:
        finished = self._invoker.collect()
        self._counters.take(self._invoker)
        yield from finished


HALTS = "halted"
"""Namespace of the counters whose names say where a partition was halted."""


coders.registry.register_coder(Finished, SizedPickleCoder)
