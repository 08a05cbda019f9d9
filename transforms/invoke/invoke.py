"""Invoke: Batch -> Finished, through the process's one ordered `Invoker`.

The DoFns only hand over and collect; nothing in a bundle waits for the function. In rounds the
invoker outlives them and the committed offsets are the truth; in a streaming run every batch that
is not finished is kept in state, and a timer collects (`transforms.invoke.handover`).
"""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import apache_beam as beam
from apache_beam import coders
from apache_beam.transforms.userstate import (
    BagRuntimeState,
    BagStateSpec,
    ReadModifyWriteRuntimeState,
    ReadModifyWriteStateSpec,
    RuntimeTimer,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp
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
from transforms.invoke.reply import CONFLUENT, NONE, Answer, read_reply
from transforms.invoke.retry import Call, RetryPolicy
from transforms.names import NUMBERS, Names
from transforms.per_process import forget, per_process
from transforms.records import NO_TIMESTAMP, Batch, Failure, Finished, LaneKey, halt_name
from transforms.tracing import TraceConfig, shared_tracer, x_amzn_trace_id

_STATS = ("invocations", "retries", "bisections", "throttles", "invoke_ms")

# How often it is looked at what does not go well.
_LOOK_SECS = 0.5
# How long a round may stay for what it has handed over. It is what others' results and records may
# have to wait longer for it, so there is no staying where calls mostly take longer.
_STAY_SECS = 0.01
# How often what has finished is looked for. Each look is a bundle of its own.
_COLLECT_SECS = 0.1
# Payload bytes of one key that may wait in memory; above it the input has to wait too. The native
# reader stops long before, so that a stuck partition does not stop the others.
_KEY_BYTES = 64 * 2**20
# Batches that may be done with and still be in the bag: to take them out, all are written anew.
_KEPT = 16

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


def shared_function(config: FunctionConfig) -> LambdaFunction:
    """This process's client for the function."""
    return per_process(LambdaFunction, config)


def make_invoker(config: InvokeConfig, may_begin: Callable[[LaneKey], bool] = always) -> Invoker:
    """An invoker over boto3; made once per process through `shared_invoker`."""
    function = shared_function(config.function)

    def outcome(batch: Batch, step: Call, result: Reply | Fault) -> Outcome:
        if isinstance(result, Fault):
            return classify_fault(result)
        if config.reply == NONE:
            return classify_reply(result, None)
        offsets = config.names.numbers(step.pick(batch.records.offsets))

        def read(body: bytes) -> Answer:
            return read_reply(
                config.reply, body, batch.topic, batch.partition, offsets, config.names.alone
            )

        return classify_reply(result, read)

    def prepare(
        batch: Batch, step: Call, trace: Mapping[str, str] | None = None
    ) -> Request | Fault:
        names = config.names
        context = client_context(batch, step, names, trace) if config.client_context else None
        payload = batch.frame.join(step.pick(batch.entries))
        trace_id = x_amzn_trace_id(trace["traceparent"]) if trace else None
        return function.prepare(payload, context, trace_id)

    def prepare_ahead(batch: Batch, step: Call) -> Request | None:
        if tracer:
            # A span begins with its call, and the request names it.
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
    )


def shared_invoker(config: InvokeConfig) -> Invoker:
    """This process's invoker for the config."""
    return per_process(make_invoker, config)


def _make_handover(config: InvokeConfig) -> Handover:
    return Handover(partial(make_invoker, config))


def shared_handover(config: InvokeConfig) -> Handover:
    """This process's handover for the config, in a streaming run."""
    return per_process(_make_handover, config)


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

    In bounded rounds of one process a batch handed over in one round may come out in a later
    one, since the invoker outlives them. In a streaming run batches are kept in state until
    they are finished; a drain waits for all of them. Order: results of a partition come out in
    the order of its batches. At least once: a batch is invoked again if its outcome was not
    durable when the process ended. Retries, splits and errors: `transforms.invoke.retry`.
    """

    def __init__(self, config: InvokeConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, batches: beam.PCollection[Batch]) -> beam.PCollection[Finished]:
        if not self._config.streaming:
            hand_over = beam.ParDo(_HandOverFn(self._config)).with_output_types(Finished)
            return batches | "HandOver" >> hand_over
        keyed = batches | "ByLane" >> beam.Map(_keyed).with_output_types(tuple[LaneKey, Batch])
        pending = beam.ParDo(_PendingFn(self._config)).with_output_types(Finished)
        return keyed | "Pending" >> pending

    def display_data(self) -> dict[str, Any]:
        return {"function": self._config.function.function}


class _Gauges:
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


class _Counters:
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
        self._gauges = _Gauges()
        self._counters = _Counters()

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


def _keyed(batch: Batch) -> tuple[LaneKey, Batch]:
    return batch.lane_key, batch


@dataclass(frozen=True, slots=True)
class Place:
    """How far a key has come. Batches are numbered in the order of their offsets.

    Attributes:
        token: Which handing over to a process this is; see `transforms.invoke.handover`.
        kept: Number of the first batch in the bag; those before `head` are done with.
        head: Number of the first batch whose outcome has not been emitted.
        tail: Number of the next batch to come.
        halted: Whether a failure stopped the partition.
        collecting: Whether the timer is set.
        next_offset: Where the last batch that was handed over ends; -1 before the first.
        early: Batches that wait for their predecessor.
    """

    token: str = ""
    kept: int = 0
    head: int = 0
    tail: int = 0
    halted: bool = False
    collecting: bool = False
    next_offset: int = -1
    early: int = 0


class _PendingFn(beam.DoFn):
    PLACE = ReadModifyWriteStateSpec("invoke_place", coders.PickleCoder())
    PENDING = BagStateSpec("invoke_pending", coders.PickleCoder())
    # Batches that have overtaken others on the way to here.
    EARLY = BagStateSpec("invoke_early", coders.PickleCoder())
    COLLECT = TimerSpec("invoke_collect", beam.TimeDomain.REAL_TIME)
    # Fires at a drain and when a bounded run has read all, so that nothing pending is left behind.
    WINDOW_END = TimerSpec("invoke_window_end", beam.TimeDomain.WATERMARK)

    def __init__(
        self,
        config: InvokeConfig,
        share: Callable[[InvokeConfig], Handover] = shared_handover,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._share = share
        self._clock = clock
        metrics = beam.metrics.Metrics
        self._gauges = _Gauges()
        self._counters = _Counters()
        self._dropped = metrics.counter("invoke", "behind_a_halt")
        self._handed_over_again = metrics.counter("invoke", "handed_over_again")
        self._iterator_age_ms = metrics.distribution("invoke", "iterator_age_ms")

    def process(
        self,
        element: tuple[LaneKey, Batch],
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        pending: BagRuntimeState = beam.DoFn.StateParam(PENDING),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
        window_end: RuntimeTimer = beam.DoFn.TimerParam(WINDOW_END),  # type: ignore[assignment]
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[Finished]:
        key, batch = element
        place: Place | None = place_state.read()
        if place is None:
            window_end.set(window.end)
            place = Place()
        if place.halted:
            # Not committed, so a new run reads it again.
            self._dropped.inc(len(batch))
            if place.early:
                early.clear()
                place_state.write(replace(place, early=0))
            return
        if batch.first and place.next_offset < 0:
            place = replace(place, next_offset=batch.start)
        if batch.start > place.next_offset:
            early.add(batch)
            place_state.write(replace(place, early=place.early + 1))
            return
        place = self._agree(key, place, pending)
        place = self._submit(key, batch, place, pending)
        if place.early:
            waiting = sorted(early.read(), key=attrgetter("start"))
            early.clear()
            while waiting and waiting[0].start <= place.next_offset:
                place = self._submit(key, waiting.pop(0), place, pending)
            for waiter in waiting:
                early.add(waiter)
            place = replace(place, early=len(waiting))
        handover = self._share(self._config)
        place = yield from self._emit(key, place, pending)
        while handover.invoker.queue(key[:2]).bytes > _KEY_BYTES and not place.halted:
            handover.invoker.wait(lambda invoker: invoker.has_finished, 1.0)
            place = self._renew(key, place, pending)
            place = yield from self._emit(key, place, pending)
        self._set(collect, place, place_state)

    @on_timer(COLLECT)
    def collect(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        pending: BagRuntimeState = beam.DoFn.StateParam(PENDING),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
    ) -> Iterator[Finished]:
        place: Place | None = place_state.read()
        if place is None or place.halted:
            return
        place = self._agree(key, place, pending)
        place = yield from self._emit(key, place, pending)
        self._set(collect, replace(place, collecting=False), place_state)

    @on_timer(WINDOW_END)
    def collect_all(
        self,
        key: LaneKey = beam.DoFn.KeyParam,  # type: ignore[assignment]
        place_state: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(PLACE),  # type: ignore[assignment]
        pending: BagRuntimeState = beam.DoFn.StateParam(PENDING),  # type: ignore[assignment]
        early: BagRuntimeState = beam.DoFn.StateParam(EARLY),  # type: ignore[assignment]
        collect: RuntimeTimer = beam.DoFn.TimerParam(COLLECT),  # type: ignore[assignment]
    ) -> Iterator[Finished]:
        # Flink's drain waits for every timer that is set, and fires none of real time any more.
        collect.clear()
        place: Place | None = place_state.read()
        if place is None:
            return
        if not place.halted:
            place = self._agree(key, place, pending)
            if place.early:
                # Nothing more can come: what waits goes as it is. No range covers the hole before
                # it, so nothing behind that is committed.
                for batch in sorted(early.read(), key=attrgetter("start")):
                    place = self._submit(key, batch, place, pending)
                place = replace(place, early=0)
                early.clear()
        handover = self._share(self._config)
        while not place.halted and place.head < place.tail:
            place = yield from self._emit(key, place, pending)
            place = self._renew(key, place, pending)
            handover.invoker.wait(lambda invoker: invoker.has_finished, 0.1)
        place_state.write(place)

    def _submit(self, key: LaneKey, batch: Batch, place: Place, pending: BagRuntimeState) -> Place:
        """Hand one more batch over, and keep it in the state."""
        pending.add((place.tail, batch))
        self._share(self._config).submit(key, batch)
        self._observe_age(batch)
        next_offset = max(place.next_offset, batch.next_offset)
        return replace(place, tail=place.tail + 1, next_offset=next_offset)

    def _agree(self, key: LaneKey, place: Place, pending: BagRuntimeState) -> Place:
        """See to it that this process holds what the state says is pending."""
        handover = self._share(self._config)
        held = handover.agree(key, place.token, place.head, place.tail)
        if held == place.tail:
            return place
        first = place.head if held is None else held
        numbered = sorted(pending.read(), key=itemgetter(0)) if first < place.tail else []
        batches = [batch for number, batch in numbered if number >= first]
        self._handed_over_again.inc(len(batches))
        if held is None:
            place = replace(place, token=uuid.uuid4().hex)
            handover.begin(key, place.token, place.head, batches)
        else:
            handover.resume(key, batches)
        return place

    def _renew(self, key: LaneKey, place: Place, pending: BagRuntimeState) -> Place:
        """Keep a key going inside a bundle, also if the bundle has taken too long for its lease."""
        handover = self._share(self._config)
        return place if handover.renew(key) else self._agree(key, place, pending)

    def _emit(
        self, key: LaneKey, place: Place, pending: BagRuntimeState
    ) -> Generator[Finished, None, Place]:
        """Emit what has finished, and let go of it in the state."""
        handover = self._share(self._config)
        self._gauges.set(handover.invoker)
        # Asked first: then what halted it, if that was in this lane, is among what is finished.
        halted = handover.invoker.queue(key[:2]).halted
        all_finished = handover.finished(key, place.head)
        self._counters.take(handover.invoker)
        for finished in all_finished:
            yield finished
            place = replace(place, head=place.head + 1)
            if finished.halted:
                beam.metrics.Metrics.counter(HALTS, halt_name(finished)).inc()
                pending.clear()
                return replace(place, head=place.tail, kept=place.tail, halted=True)
        if halted:
            # Another lane's failure; what is not finished here will be read again.
            pending.clear()
            return replace(place, head=place.tail, kept=place.tail, halted=True)
        if error := why_broken(handover.invoker, self._config.function):
            # The next attempt in this process begins with an invoker that is whole.
            forget(_make_handover, self._config)
            raise error
        return self._shrink(place, pending)

    def _shrink(self, place: Place, pending: BagRuntimeState) -> Place:
        """Take what is done with out of the bag: at once if that is all, else when it is most."""
        if place.head == place.tail:
            if place.kept < place.tail:
                pending.clear()
        elif place.head - place.kept > max(_KEPT, place.tail - place.head):
            rest = [numbered for numbered in pending.read() if numbered[0] >= place.head]
            pending.clear()
            for numbered in rest:
                pending.add(numbered)
        else:
            return place
        return replace(place, kept=place.head)

    def _set(
        self, collect: RuntimeTimer, place: Place, place_state: ReadModifyWriteRuntimeState
    ) -> None:
        """Come back while anything is pending, and once more, to let go of what was emitted."""
        if not place.collecting and not place.halted and place.head < place.tail:
            collect.set(Timestamp.of(self._clock() + _COLLECT_SECS))
            place = replace(place, collecting=True)
        place_state.write(place)

    def _observe_age(self, batch: Batch) -> None:
        """Lambda's IteratorAge: how old the last record of a batch is when it is handed over."""
        timestamps = batch.records.timestamps
        if timestamps and timestamps[-1] != NO_TIMESTAMP:
            age_ms = round(self._clock() * 1000) - timestamps[-1]
            self._iterator_age_ms.update(max(0, age_ms))


coders.registry.register_coder(Finished, SizedPickleCoder)
