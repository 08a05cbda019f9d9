"""Spans of batches and invocations, and what they are linked to."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tests import ROOT
from transforms.aws.function import FunctionConfig, LambdaFunction, Request
from transforms.invoke.client_context import MAX_BYTES, client_context
from transforms.invoke.retry import Call
from transforms.records import Batch, Records
from transforms.tracing import MAX_LINKS, TraceConfig, Tracer, contexts_of, x_amzn_trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def parent(span: int, sampled: bool = True) -> bytes:
    return f"00-{TRACE}-{span:016x}-{'01' if sampled else '00'}".encode()


def batch_of(*headers: Any) -> Batch:
    count = len(headers)
    records = Records(range(count), [0] * count, [None] * count, [b"1"] * count, headers)
    return Batch("orders", 3, 0, count, records, [b"1"] * count)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracer(TraceConfig("g", "f", "us-east-1"), provider)


def test_a_batch_and_its_attempts(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    """Two invocations are parts of one batch, which is linked to its records and part of none."""
    batch = batch_of([("traceparent", parent(1))], None, [("TraceParent", parent(2))])
    told = []
    for attempt, error in ((1, "Unhandled"), (2, "")):
        with tracer.invoke(batch, attempt, 3) as invocation:
            told.append(invocation.traceparent)
            invocation.end(error, {"aws.request_id": f"r{attempt}", "faas.invoked_version": None})
    tracer.end(batch, "")
    first, second, whole = spans.get_finished_spans()
    assert whole.name == "process orders" and whole.kind is SpanKind.CONSUMER
    assert whole.parent is None
    assert [link.context.span_id for link in whole.links] == [1, 2]
    assert whole.attributes["messaging.destination.partition.id"] == "3"
    assert whole.attributes["messaging.consumer.group.name"] == "g"
    assert whole.attributes["messaging.batch.message_count"] == 3
    for span, traceparent, attempt in ((first, told[0], 1), (second, told[1], 2)):
        assert span.name == "invoke f" and span.kind is SpanKind.CLIENT
        assert span.parent.span_id == whole.context.span_id
        assert span.attributes["beam_lambda_sink.attempt"] == attempt
        assert span.attributes["aws.request_id"] == f"r{attempt}"
        context = span.context
        assert traceparent.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-0")
    assert first.attributes["error.type"] == "Unhandled" and not first.status.is_ok
    assert "error.type" not in second.attributes


def test_what_is_not_linked(tracer: Tracer, spans: InMemorySpanExporter) -> None:
    """Contexts that nobody keeps, that are none, or are there already; and more than fit."""
    batch = batch_of(
        [("traceparent", parent(1, sampled=False))],
        [("traceparent", b"nonsense")],
        [("traceparent", None)],
        *([("traceparent", parent(2 + number % 200))] for number in range(400)),
    )
    with tracer.invoke(batch, 1, len(batch)):
        pass
    tracer.end(batch, "Unhandled")
    (whole,) = (span for span in spans.get_finished_spans() if span.kind is SpanKind.CONSUMER)
    assert len(whole.links) == MAX_LINKS
    assert whole.attributes["beam_lambda_sink.links_left_out"] == 200 - MAX_LINKS
    assert whole.attributes["error.type"] == "Unhandled"


def test_a_batch_that_is_never_sent_has_no_span(
    tracer: Tracer, spans: InMemorySpanExporter
) -> None:
    tracer.end(batch_of(None), "TooLarge")
    assert spans.get_finished_spans() == ()


def test_the_contexts_of_records() -> None:
    """Each once, whatever the case of the header's name; the state goes with its parent."""
    headers = [("TRACEPARENT", b"a"), ("tracestate", b"s"), ("traceparent", b"late")]
    records = batch_of(headers, [("traceparent", b"a")], [("tracestate", b"alone")]).records
    assert contexts_of(records) == [{"traceparent": "a", "tracestate": "s"}]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_context_as_aws_writes_it(sampled: bool) -> None:
    assert x_amzn_trace_id(parent(7, sampled).decode()) == (
        f"Root=1-4bf92f35-77b34da6a3ce929d0e0e4736;Parent=0000000000000007;Sampled={int(sampled)}"
    )


def test_the_request_names_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a header that is not signed, since whoever is on the way may change it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    function = LambdaFunction(FunctionConfig("f", region="us-east-1"))
    trace_id = x_amzn_trace_id(parent(7).decode())
    request = function.prepare(b"{}", None, trace_id)
    assert isinstance(request, Request)
    assert request.head.headers["X-Amzn-Trace-Id"] == trace_id
    assert "x-amzn-trace-id" not in request.head.headers["Authorization"]


def test_the_function_is_told_as_much_of_the_trace_as_fits() -> None:
    """The state of a trace goes first where there is no room."""
    call, batch = Call(0, 1, 1, ""), batch_of(None)
    for state, kept in (("a=1", {"traceparent", "tracestate"}), ("a" * 4000, {"traceparent"})):
        context = client_context(
            batch, call, trace={"traceparent": parent(1).decode(), "tracestate": state}
        )
        assert len(context) <= MAX_BYTES
        custom = json.loads(b64decode(context))["custom"]
        assert {name for name in custom if name.startswith("trace")} == kept


def test_nothing_is_imported_without_it() -> None:
    """What makes invokers knows of tracing, and not of OpenTelemetry."""
    code = (
        "import sys, transforms.tracing\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
