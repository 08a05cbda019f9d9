"""Tracing: spans of batches and invocations, by OpenTelemetry's SDK. No Beam.

OpenTelemetry is imported when a tracer is made, and none is made without `--trace`. Exporter,
sampler and resource are as OpenTelemetry's own environment variables say (`OTEL_*`). Names are
those of its conventions for messaging and for functions as a service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transforms.errors import UsageError
from transforms.per_process import forget, per_process
from transforms.records import Batch, Records

MAX_LINKS = 128
"""As many as OpenTelemetry keeps of a span."""

_HEADERS = ("traceparent", "tracestate")
_LEFT_OUT = "beam_lambda_sink.links_left_out"


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """What is traced for whom.

    Attributes:
        group: The consumer group.
        function: The function's name.
        region: Its region, or None.
    """

    group: str
    function: str
    region: str | None = None


def contexts_of(records: Records) -> list[dict[str, str]]:
    """What the records' headers say of the traces that they are part of, each once. Pure."""
    found: dict[str, dict[str, str]] = {}
    for headers in records.headers:
        carrier: dict[str, str] = {}
        for name, value in headers or ():
            low = name.lower()
            if low in _HEADERS and value is not None and low not in carrier:
                carrier[low] = value.decode("latin-1")
        if "traceparent" in carrier:
            found.setdefault(carrier["traceparent"], carrier)
    return list(found.values())


def x_amzn_trace_id(traceparent: str) -> str:
    """The same context as AWS writes it, for the header of that name. Pure."""
    _, trace, span, flags = traceparent.split("-")
    sampled = int(flags, 16) & 1
    return f"Root=1-{trace[:8]}-{trace[8:]};Parent={span};Sampled={sampled}"


class Invocation:
    """A span of an invocation that is under way.

    Attributes:
        context: What the function is told: `traceparent`, and `tracestate` if there is any.
    """

    def __init__(self, span: Any, context: Mapping[str, str], failed: Any) -> None:
        self.context = context
        self._span = span
        self._failed = failed

    @property
    def traceparent(self) -> str:
        """The context of this span, as W3C has it."""
        return self.context["traceparent"]

    def end(self, error_type: str, facts: Mapping[str, str | int | None]) -> None:
        """Say what it came to.

        Args:
            error_type: Empty if it went well.
            facts: Attributes; those that are None are left out.
        """
        for name, value in facts.items():
            if value is not None:
                self._span.set_attribute(name, value)
        if error_type:
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(self._failed)


class Tracer:
    """Spans of this process's batches. Thread-safe.

    Args:
        config: What is traced.
        provider: Where spans go; injected for tests.

    Raises:
        UsageError: OpenTelemetry is not installed, or its variables do not fit.
    """

    def __init__(self, config: TraceConfig, provider: Any = None) -> None:
        self._config = config
        self._provider = provider or _provider()
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._w3c = TraceContextTextMapPropagator()
        self._tracer = self._provider.get_tracer("beam-lambda-sink")
        # By the batch's own id: a batch cannot be hashed, and is one object while it is worked on.
        self._batches: dict[int, Any] = {}

    def _begin(self, batch: Batch) -> Any:
        span = self._batches.get(id(batch))
        if span is None:
            links, left_out = self._links(batch.records)
            attributes: dict[str, Any] = {
                "messaging.system": "kafka",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": batch.topic,
                "messaging.destination.partition.id": str(batch.partition),
                "messaging.consumer.group.name": self._config.group,
                "messaging.batch.message_count": len(batch),
            }
            if left_out:
                attributes[_LEFT_OUT] = left_out
            span = self._tracer.start_span(
                f"process {batch.topic}",
                # Of no other trace: the records may be of many, and the links say of which.
                context=self._trace.set_span_in_context(self._trace.INVALID_SPAN),
                kind=self._trace.SpanKind.CONSUMER,
                attributes=attributes,
                links=links,
            )
            self._batches[id(batch)] = span
        return span

    def _links(self, records: Records) -> tuple[list[Any], int]:
        links: list[Any] = []
        left_out = 0
        for carrier in contexts_of(records):
            extracted = self._w3c.extract(carrier)
            context = self._trace.get_current_span(extracted).get_span_context()
            # Of those that nobody keeps there is nothing to see.
            if not context.is_valid or not context.trace_flags.sampled:
                continue
            if len(links) < MAX_LINKS:
                links.append(self._trace.Link(context))
            else:
                left_out += 1
        return links, left_out

    @contextmanager
    def invoke(self, batch: Batch, attempt: int, records: int) -> Iterator[Invocation]:
        """A span of one invocation, part of its batch's, which it begins if it is the first.

        Args:
            batch: The batch.
            attempt: The number of this attempt.
            records: How many of the batch's records are sent.
        """
        trace, config = self._trace, self._config
        attributes: dict[str, Any] = {
            "faas.invoked_name": config.function,
            "faas.invoked_provider": "aws",
            "messaging.batch.message_count": records,
            "beam_lambda_sink.attempt": attempt,
        }
        if config.region:
            attributes["faas.invoked_region"] = config.region
        parent = trace.set_span_in_context(self._begin(batch))
        span = self._tracer.start_span(
            f"invoke {config.function}",
            context=parent,
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
        )
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier, context=trace.set_span_in_context(span))
        try:
            yield Invocation(span, carrier, trace.StatusCode.ERROR)
        finally:
            span.end()

    def end(self, batch: Batch, error_type: str) -> None:
        """A batch is finished, or dropped.

        Args:
            batch: The batch; one that was never sent has no span.
            error_type: Of the first of its records that are given up, or empty.
        """
        span = self._batches.pop(id(batch), None)
        if span is None:
            return
        if error_type:
            span.set_attribute("error.type", error_type)
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Export what is there, as long as the exporter takes."""
        self._provider.shutdown()


def _provider() -> Any:
    """Where spans go, as OpenTelemetry's variables say."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError(
            ["--trace=otlp needs OpenTelemetry: pip install 'beam-lambda-sink[otel]'"]
        ) from None
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    try:
        resource = Resource.create({} if named else {"service.name": "beam-lambda-sink"})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise UsageError([f"--trace=otlp: {error}; see OpenTelemetry's OTEL_* variables"]) from None
    return provider


def shared_tracer(config: TraceConfig) -> Tracer:
    """This process's tracer."""
    return per_process(Tracer, config)


def close_tracer(config: TraceConfig) -> None:
    """Export what this process's tracer has, if there is one."""
    tracer = forget(Tracer, config)
    if tracer:
        tracer.close()
