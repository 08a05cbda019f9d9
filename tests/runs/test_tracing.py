"""Whole runs with --trace: one trace from the batch through the function to what is written."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.servers.trace_collector import TraceCollector
from tests.sink import Topics, answer, environment, facts, serve
from transforms.tracing import MAX_LINKS, x_amzn_trace_id

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def attributes(span: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_trace_through_it_all(broker: KafkaBroker, names: Names, workers: int) -> None:
    """The producer's span, the batch, two attempts, the function, the response."""
    told: list[Any] = []

    def fails_once(event: Any, context: LambdaContext) -> Any:
        told.append(context.client_context)
        if len(told) == 1:
            raise ValueError("not yet")
        return answer(event)

    topics = Topics(broker, names, partitions=1)
    broker.produce(topics.source, [(0, b"k", b"1", [("traceparent", PARENT.encode())])])
    with TraceCollector() as collector, serve(fails_once) as server:
        env = environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        topics.run(server, trace="otlp", max_retries=1, workers=workers, env=env)
    topics.assert_exactly_once()
    whole = next(span for span in collector.spans if span.name.startswith("process "))
    attempts = sorted(
        (span for span in collector.spans if span.name.startswith("invoke ")),
        key=lambda span: span.start_time_unix_nano,
    )
    assert [link.span_id.hex() for link in whole.links] == ["00f067aa0ba902b7"]
    assert [attributes(span)["beam_lambda_sink.attempt"] for span in attempts] == [1, 2]
    assert {span.parent_span_id for span in attempts} == {whole.span_id}
    assert attributes(attempts[0])["error.type"] == "ValueError"
    assert attributes(attempts[1])["http.response.status_code"] == 200
    assert attributes(attempts[1])["aws.request_id"]
    parents = [f"00-{span.trace_id.hex()}-{span.span_id.hex()}-" for span in attempts]
    (response,) = broker.read_all(topics.responses)
    assert dict(response.headers)["traceparent"] == told[1].custom["traceparent"].encode()
    assert [context.custom["traceparent"] for context in told] == [
        parent + told[0].custom["traceparent"][-2:] for parent in parents
    ]
    # As X-Ray reads it.
    assert [call.trace_id for call in server.calls if call.invocation_type != "DryRun"] == [
        x_amzn_trace_id(context.custom["traceparent"]) for context in told
    ]


def test_links_are_bounded_and_said_to_be(broker: KafkaBroker, names: Names) -> None:
    topics = Topics(broker, names, partitions=1)
    parents = [f"00-4bf92f3577b34da6a3ce929d0e0e4736-{n:016x}-01" for n in range(1, 201)]
    records = [(0, None, b"1", [("traceparent", parent.encode())]) for parent in parents]
    broker.produce(topics.source, records)
    with TraceCollector() as collector, serve() as server:
        env = environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        topics.run(server, trace="otlp", batch_size=200, batch_window_secs=5, env=env)
    whole = [span for span in collector.spans if span.name.startswith("process ")]
    linked = [link.span_id.hex() for span in whole for link in span.links]
    left_out = [attributes(span).get("beam_lambda_sink.links_left_out", 0) for span in whole]
    assert len(linked) == len(set(linked)) <= MAX_LINKS * len(whole)
    assert len(linked) + sum(left_out) == 200
    assert max(left_out) > 0


def test_without_it_nothing_of_it_is_imported(broker: KafkaBroker, names: Names) -> None:
    """Nor is anything sent, whatever the environment says. Google's clients, which Beam imports
    where they are, know its interface, without what makes and sends spans."""
    topics = Topics(broker, names, partitions=1, count=1)
    with TraceCollector() as collector, serve() as server:
        env = environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, PYTHONPROFILEIMPORTTIME="1")
        ended = topics.run(server, env=env)
    assert "transforms.tracing" in ended.stderr
    for part in ("opentelemetry.sdk", "opentelemetry.exporter"):
        assert part not in ended.stderr
    assert collector.spans == []


def test_an_error_record_carries_the_trace(broker: KafkaBroker, names: Names) -> None:
    def fails(event: Any, context: LambdaContext) -> Any:
        raise ValueError("never")

    topics = Topics(broker, names, partitions=1, count=1)
    with TraceCollector() as collector, serve(fails) as server:
        env = environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        topics.run(server, trace="otlp", env=env, **topics.log_errors)
    (attempt,) = (span for span in collector.spans if span.name.startswith("invoke "))
    (record,) = broker.read_all(topics.errors)
    expected = f"00-{attempt.trace_id.hex()}-{attempt.span_id.hex()}-"
    assert facts(record)["traceparent"].startswith(expected)
