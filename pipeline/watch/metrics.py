"""Metrics: a run's `Status` -> what Prometheus reads.

Names, labels and units are an interface: dashboards and alerts depend on them, and docs/metrics.md
is held to them. Each series of a fixed set is there from the start, with 0. Made when it is asked
for, of the same numbers as progress and summary, so that one process answers for all workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from pipeline.run.status import STATES, Status
from pipeline.watch.about import About
from transforms import conditions, tally
from transforms.invoke.failures import OTHER, halt_facts
from transforms.invoke.outcome import NAMES as OUTCOMES
from transforms.records import CLOSED_BY
from transforms.tally import BOUNDS, Histogram, Labels, Series, Tallied

PREFIX = "lambda_sink_"

_ALL = "_ALL"
"""A label where it is not known what it should say: on Flink and Dataflow."""
# So many topics have each condition from the start; with more, those that there were.
_TOPICS_WITH_CONDITIONS = 50
# Halts that are named.
_NAMED_HALTS = 100


def exposition(
    status: Callable[[], Status], about: About
) -> Callable[[str | None], tuple[bytes, str]]:
    """What answers a scrape.

    Args:
        status: How the run stands.
        about: What it is.

    Returns:
        Takes an Accept header; gives a body and its content type.
    """

    class Collected:
        def collect(self) -> Iterable[Metric]:
            return families(status(), about)

        def describe(self) -> Iterable[Metric]:
            return ()

    registry = CollectorRegistry()
    registry.register(Collected())
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)

    def answer(accept: str | None) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept or "")
        return encode(registry), content_type

    return answer


def families(status: Status, about: About) -> Iterator[Metric]:
    """All metrics of a run. Pure."""
    topics = sorted(
        {
            *about.topics,
            *(topic for topic, _ in status.lags),
            *(labels[0] for (name, labels) in status.books.counts if labels),
        }
    )
    yield _gauge(
        "info",
        "What runs; always 1.",
        {(about.group, about.function, about.runner, about.version, about.envelope): 1},
        ("group", "function", "runner", "version", "envelope"),
    )
    yield from _books(status if about.is_here else _elsewhere(status), topics)
    yield from _calls(status, topics)
    yield from _batches(status)
    yield from _places(status, about, topics)
    yield from _state(status)


def _elsewhere(status: Status) -> Status:
    """A job's status with what it counts, which is without topics."""
    totals = status.totals
    counts: dict[Series, float] = {
        (tally.POLLED, (_ALL,)): totals["read.records"],
        (tally.FILTERED, (_ALL,)): totals["filter.filtered"],
        (tally.ANSWERED, (_ALL,)): totals["write.responses"],
        (tally.ERROR_TOPIC, (_ALL, _ALL)): totals["write.errors"],
    }
    return replace(status, books=Tallied(counts))


def _books(status: Status, topics: Sequence[str]) -> Iterator[Metric]:
    books = status.books
    by_topic = {(topic,): 0.0 for topic in topics}
    listed = (
        (tally.POLLED, "Records read."),
        (tally.FILTERED, "Records that no filter matched."),
        (tally.ANSWERED, "Records that the function has answered."),
        (
            tally.RELEASED,
            "Records read and let go of unfinished, behind a halt or with their partition; they "
            "are not committed and are read again.",
        ),
    )
    for name, text in listed:
        yield _counter(f"{name}_records", text, by_topic | books.by(name), ("topic",))
    few = topics if len(topics) <= _TOPICS_WITH_CONDITIONS else ()
    by_condition = {(topic, each): 0.0 for topic in few for each in conditions.CONDITIONS}
    for name, text in (
        (tally.DROPPED, "Records given up and written to no topic."),
        (tally.ERROR_TOPIC, "Records given up and written to the error topic."),
    ):
        counts = by_condition | books.by(name)
        yield _counter(f"{name}_records", text, counts, ("topic", "condition"))
    text = "Records read and neither at their end nor let go of."
    yield _gauge("held_records", text, by_topic | books.by(tally.HELD), ("topic",))


def _calls(status: Status, topics: Sequence[str]) -> Iterator[Metric]:
    tallied, totals = status.tallied, status.totals
    by_topic = {(topic,): 0.0 for topic in topics}
    for name, text in (
        ("polled_bytes", "Bytes read: keys, values and headers."),
        ("invoked_records", "Records in invocations; a repeat counts again."),
        ("failed_invoke_records", "Records in invocations that failed."),
        ("committed_records", "Offsets that the group's committed ones went on by, gaps included."),
    ):
        found = tallied.by(name.removesuffix("_records"))
        yield _counter(name, text, by_topic | found, ("topic",))
    for name, text in (
        (tally.READ_CALLS, "Calls of GetRecords and SubscribeToShard; for streams only."),
        (tally.READ_THROTTLES, "Reads of a stream that were refused as too many."),
        (
            tally.FOREIGN_HASH,
            "Records of aggregates whose partition key is another shard's by now.",
        ),
    ):
        yield _counter(name, text, tallied.by(name), ("topic",))
    outcomes: dict[Labels, float] = {(name,): 0.0 for name in OUTCOMES}
    found = tallied.by(tally.INVOCATIONS)
    if not found and (elsewhere := totals["invoke.invocations"]):
        found = {(_ALL,): elsewhere}
    yield _counter("invocations", "Invocations that have ended.", outcomes | found, ("outcome",))
    text = "Failures, by the function's error type or ours; the first 20 types, then _OTHER."
    seen: dict[Labels, float] = {(each.error_type,): each.count for each in status.trouble.errors}
    yield _counter("errors", text, {(OTHER,): 0.0} | seen, ("error_type",))
    retries = {(name,): 0.0 for name in OUTCOMES if name != "success"}
    found = tallied.by(tally.RETRIES)
    if not found and (elsewhere := totals["invoke.retries"]):
        found = {(_ALL,): elsewhere}
    text = "Invocations repeated, by the outcome before."
    yield _counter("retries", text, retries | found, ("kind",))
    for name, text, count in (
        ("bisections", "Batches split.", totals["invoke.bisections"]),
        (tally.POLLING_ERRORS, "Times that a partition could not be read.", None),
        (tally.COMMIT_ERRORS, "Commits that were not taken.", None),
        (tally.DELIVERY_ERRORS, "Error records that were not taken.", None),
    ):
        yield _counter(name, text, {(): tallied.total(name) if count is None else count})
    yield _counter(
        "schema_errors",
        "Records that their schema does not read.",
        {
            (conditions.SCHEMA_NOT_FOUND,): totals["decode.schemas_not_found"],
            (conditions.DESERIALIZATION_ERROR,): totals["decode.deserialization_errors"],
        },
        ("condition",),
    )
    yield _histogram(
        "invocation_duration_seconds",
        "How long an invocation took, network and cold start included.",
        tallied,
        tally.DURATION,
        [("success",), ("error",)],
        ("outcome",),
    )
    text = "Age of a batch's last record when the batch was first sent."
    yield _histogram("iterator_age_seconds", text, tallied, tally.ITERATOR_AGE)


def _batches(status: Status) -> Iterator[Metric]:
    tallied, totals = status.tallied, status.totals
    yield _histogram("batch_records", "Records of a batch.", tallied, tally.BATCH_RECORDS)
    yield _histogram("batch_bytes", "Bytes of a batch's payload.", tallied, tally.BATCH_BYTES)
    text = "How long a batch waited for its first invocation, from when it was closed."
    yield _histogram("batch_wait_seconds", text, tallied, tally.BATCH_WAIT)
    closed: dict[Labels, float] = {(by,): totals[f"batch.closed_by_{by}"] for by in CLOSED_BY}
    yield _counter("batches", "Batches, by what closed them.", closed, ("closed_by",))


def _places(status: Status, about: About, topics: Sequence[str]) -> Iterator[Metric]:
    lags = {key: lag for key, lag in status.lags.items() if lag is not None}
    behind, lags = (lags, {}) if status.names.lag_ms else ({}, lags)
    sums: dict[Labels, float] = {}
    most: dict[Labels, float] = {}
    for (topic, _), lag in lags.items():
        sums[(topic,)] = sums.get((topic,), 0) + lag
        most[(topic,)] = max(most.get((topic,), 0), lag)
    text = "Records behind what is committed, over all partitions of a topic."
    yield _gauge("offset_lag_records", text, sums, ("topic",))
    text = "Records behind what is committed, of the partition with the most."
    yield _gauge("offset_lag_max_records", text, most, ("topic",))
    each: dict[Labels, float] = {}
    if len(status.lags) <= about.metrics_partitions:
        each = {(topic, str(number)): lag for (topic, number), lag in lags.items()}
    text = "Records behind what is committed, where there are few partitions."
    yield _gauge("partition_offset_lag_records", text, each, ("topic", "partition"))
    latest: dict[Labels, float] = {}
    for (stream, _), ms in behind.items():
        latest[(stream,)] = max(latest.get((stream,), 0), ms / 1000)
    text = "How much older what is committed is than the newest record, of the slowest shard."
    yield _gauge("behind_latest_seconds", text, latest, ("topic",))
    each = {}
    if len(status.lags) <= about.metrics_partitions:
        each = {(stream, str(shard)): ms / 1000 for (stream, shard), ms in behind.items()}
    text = "The same of each shard, where there are few."
    yield _gauge("partition_behind_latest_seconds", text, each, ("topic", "partition"))
    oldest: dict[Labels, float] = {}
    for (topic, _), ms in status.trouble.oldest_ms.items():
        oldest[(topic,)] = min(oldest.get((topic,), ms / 1000), ms / 1000)
    text = "Timestamp of the oldest record that is read and not finished; age is time() minus it."
    yield _gauge("oldest_record_timestamp_seconds", text, oldest, ("topic",))
    states = Counter(view.state for view in status.partitions.values())
    if not about.is_here:
        states["halted"] = len(status.halted)
        states["reading"] = max(0, len(status.lags) - states["halted"])
    yield _gauge(
        "partitions",
        "Partitions, by how they stand.",
        {(state,): states[state] for state in STATES},
        ("state",),
    )
    halts: dict[Labels, float] = {}
    for finished in sorted(status.halted, key=lambda finished: finished.key)[:_NAMED_HALTS]:
        facts = halt_facts(finished)
        halts[facts["topic"], str(facts["partition"]), facts["condition"]] = 1
    text = "1 for each halted partition, and absent for all others."
    yield _gauge("partition_halted", text, halts, ("topic", "partition", "condition"))


def _state(status: Status) -> Iterator[Metric]:
    views, times = status.partitions.values(), status.tallied.times
    error = status.trouble.last_error
    numbers = (
        ("invocations_in_flight", "Invocations running now.", status.in_flight),
        ("concurrency_limit", "Invocations that may run at once now.", status.limit),
        ("breaker_open", "Whether nothing is invoked but for a probe now and then.", None),
        ("paused", "Whether nothing is read and nothing is begun, as told.", None),
        ("queued_records", "Records held here.", sum(view.records for view in views)),
        ("queued_bytes", "Bytes that they take.", sum(view.bytes for view in views)),
        ("last_success_timestamp_seconds", "", times.get(tally.LAST_SUCCESS, 0)),
        ("last_error_timestamp_seconds", "", error.at if error else 0),
        ("last_commit_timestamp_seconds", "", times.get(tally.LAST_COMMIT, 0)),
    )
    flags = {"breaker_open": status.breaker_open, "paused": status.paused}
    for name, text, number in numbers:
        text = text or "When that was last so, in seconds since 1970; 0 for never."
        value = float(flags[name]) if name in flags else number
        yield _gauge(name, text, {} if value is None else {(): value})


def _counter(
    name: str, text: str, counts: Mapping[Labels, float], labels: Sequence[str] = ()
) -> Metric:
    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), counts)


def _gauge(
    name: str, text: str, counts: Mapping[Labels, float], labels: Sequence[str] = ()
) -> Metric:
    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), counts)


def _filled(family: Any, counts: Mapping[Labels, float]) -> Metric:
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _histogram(
    name: str,
    text: str,
    tallied: Tallied,
    which: str,
    series: Sequence[Labels] = ((),),
    labels: Sequence[str] = (),
) -> Metric:
    bounds = BOUNDS[which]
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    for values in series:
        found = tallied.histograms.get((which, values), Histogram((0,) * (len(bounds) + 1), 0.0))
        les = [*(f"{bound:g}" if bound < 1e6 else str(int(bound)) for bound in bounds), "+Inf"]
        family.add_metric(values, list(zip(les, accumulate(found.counts))), found.sum)
    return family
