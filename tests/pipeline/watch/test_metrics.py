"""Metrics: names and series as Prometheus' own parser reads them, and what a scrape costs."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from pipeline.run.status import PartitionView, Status, Totals
from pipeline.watch.about import About
from pipeline.watch.metrics import exposition, families
from tests import ROOT
from tests.pipeline.watch.test_progress import _halted
from transforms.invoke.failures import MOST_TYPES, Failed, Seen, Trouble
from transforms.kinesis.shards import NAMES as SHARDS
from transforms.tally import Tallied

ABOUT = About("g", "f", topics=("orders",), version="1")
NOTHING = Status.of_nothing(0.0)


def scrape(status: Status, about: About = ABOUT) -> dict[str, dict[tuple[str, ...], float]]:
    body, content_type = exposition(lambda: status, about)(None)
    assert content_type.startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = tuple(sample.labels[name] for name in sorted(sample.labels))
            found.setdefault(sample.name.removeprefix("lambda_sink_"), {})[key] = sample.value
    return found


def test_a_fixed_set_is_there_from_the_start() -> None:
    """Rates of what has not happened yet are 0, not missing."""
    found = scrape(NOTHING)
    assert found["polled_records_total"] == {("orders",): 0}
    assert ("RetryAttemptsExhausted", "orders") in found["error_topic_records_total"]
    assert found["dropped_records_total"].keys() == found["error_topic_records_total"].keys()
    assert len(found["invocations_total"]) == 9
    assert set(found["batches_total"]) == {
        ("alone",),
        ("bytes",),
        ("count",),
        ("end",),
        ("window",),
    }
    assert found["invocation_duration_seconds_count"] == {("error",): 0, ("success",): 0}
    assert found["partitions"][("halted",)] == 0
    assert found["paused"] == {(): 0}
    assert found["errors_total"] == {("_OTHER",): 0}
    assert found["info"] == {("", "f", "g", "DirectRunner", "1"): 1}
    assert "process_resident_memory_bytes" in found
    assert "partition_halted" not in found


def test_hostile_labels_are_labels() -> None:
    """What a function calls its errors can be anything; the text around it stays readable."""
    seen: dict[str, Seen] = {}
    for number in range(MOST_TYPES + 5):
        name = f'E{number}"}}\n lambda_sink_paused 1\\'
        Seen.add(seen, Failed("orders", 0, 1, 2, "function error", name, "m", 1, 7.0 + number))
    status = replace(NOTHING, trouble=Trouble(errors=tuple(seen.values())))
    found = scrape(status)
    assert len(found["errors_total"]) == MOST_TYPES + 1
    assert found["errors_total"][("_OTHER",)] == 5
    assert found["errors_total"][('E0"}\n lambda_sink_paused 1\\',)] == 1
    assert found["paused"] == {(): 0}


def test_openmetrics_too() -> None:
    body, content_type = exposition(lambda: NOTHING, ABOUT)("application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    list(openmetrics_parser.text_string_to_metric_families(body.decode()))


def _many(count: int) -> Status:
    keys = [("orders", number) for number in range(count)]
    return replace(
        NOTHING,
        begun=True,
        lags=dict.fromkeys(keys, 7),
        committed=dict.fromkeys(keys, 3),
        partitions={key: PartitionView("reading", 10, 9, 8, 1, 100) for key in keys},
        trouble=Trouble(oldest_ms=dict.fromkeys(keys, 1000)),
        halted=[_halted("orders", number) for number in range(count // 2)],
    )


def test_series_of_partitions_are_bounded() -> None:
    few, many = scrape(_many(100)), scrape(_many(101))
    assert len(few["partition_offset_lag_records"]) == 100
    assert "partition_offset_lag_records" not in many
    assert many["offset_lag_records"] == {("orders",): 707}
    assert many["offset_lag_max_records"] == {("orders",): 7}
    assert len(scrape(_many(1000))["partition_halted"]) == 100
    assert len(scrape(_many(101), replace(ABOUT, metrics_partitions=200))) == len(few)


def test_a_scrape_of_3000_partitions_is_cheap() -> None:
    """Each with a series of its own; a tenth of a second is far above what it takes, since other
    tests run beside it."""
    answer = exposition(lambda: status, replace(ABOUT, metrics_partitions=3000))
    status = _many(3000)
    took = []
    for _ in range(5):
        started = time.thread_time()
        body, _ = answer(None)
        took.append(time.thread_time() - started)
    assert body.count(b"\nlambda_sink_partition_offset_lag_records{") == 3000
    assert min(took) < 0.1


def test_a_job_elsewhere_counts_without_topics() -> None:
    """Flink and Dataflow tell sums; the names are the same."""
    totals = Totals(Counter({"read.records": 9, "write.responses": 5, "invoke.invocations": 3}))
    found = scrape(replace(NOTHING, totals=totals), replace(ABOUT, runner="FlinkRunner"))
    assert found["polled_records_total"] == {("_ALL",): 9, ("orders",): 0}
    assert found["answered_records_total"][("_ALL",)] == 5
    assert found["invocations_total"][("_ALL",)] == 3


def test_the_books_of_processes_add_up() -> None:
    books = [Tallied({("polled", ("orders",)): n, ("held", ("orders",)): 1}) for n in (3, 4)]
    found = scrape(replace(NOTHING, books=Tallied.join(books)))
    assert found["polled_records_total"] == {("orders",): 7}
    assert found["held_records"] == {("orders",): 2}


@pytest.mark.parametrize("file", ["docs/metrics.md"])
def test_the_docs_have_each_name(file: str) -> None:
    """And no other; with type and labels as they are."""
    listed = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| `(lambda_sink_\w+)` \| (\w+)(?:, ([\w, ]+))? \|", line):
            listed[row[1]] = row[2], tuple((row[3] or "").split(", ") if row[3] else ())
    told: dict[str, tuple[str, tuple[str, ...]]] = {}
    for status in (_labelled(), _of_a_stream()):
        for family in families(status, replace(ABOUT, metrics_partitions=10_000)):
            end = "_total" if family.type == "counter" else ""
            name = family.name + end
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            labels |= set(told.get(name, ("", ()))[1])
            told[name] = family.type, tuple(sorted(labels))
    assert {name: (kind, tuple(sorted(labels))) for name, (kind, labels) in listed.items()} == told


def test_how_far_a_stream_is_behind() -> None:
    """In seconds, of the slowest shard, and not in records."""
    found = scrape(_of_a_stream())
    assert found["behind_latest_seconds"] == {("orders",): 2.5}
    assert found["partition_behind_latest_seconds"] == {("0", "orders"): 2.5, ("1", "orders"): 0}
    assert found["read_calls_total"] == {("orders",): 9}
    assert found["read_throttles_total"] == {("orders",): 2}
    assert found["foreign_hash_total"] == {("orders",): 3}
    assert "offset_lag_records" not in found


def _of_a_stream() -> Status:
    counts = {"read_calls": 9.0, "read_throttles": 2.0, "foreign_hash": 3.0}
    calls = {(name, ("orders",)): count for name, count in counts.items()}
    lags = {("orders", 0): 2500, ("orders", 1): 0}
    return replace(NOTHING, lags=lags, names=SHARDS, tallied=Tallied(calls))


def _labelled() -> Status:
    """A status with a sample of each metric."""
    return replace(_many(4), limit=3, books=Tallied({("held", ("orders",)): 1.0}))
