"""Whole runs that are watched: what `--http` answers while they go on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow, unavailable
from tests.conftest import Names
from tests.sink import (
    TRANSACTIONS,
    Sink,
    Topics,
    answer,
    numbered,
    of_partition,
    poison,
    serve,
)

BOOKS = ("filtered", "answered", "dropped", "error_topic", "released")


class Watched:
    """What a run that is started with `--http=0` answers."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        sink.until(lambda: bool(self._urls()), "it says where it listens")
        (self.url,) = self._urls()

    def _urls(self) -> list[str]:
        return re.findall(r"listening: (http://\S+)/metrics", self._sink.stderr)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answered:
                return answered.status, answered.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Samples by name and labels' values, these in the order of the labels' names."""
        found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for family in text_string_to_metric_families(self.get("/metrics")[1].decode()):
            for sample in family.samples:
                name = sample.name.removeprefix("lambda_sink_")
                found[name][tuple(sample.labels.values())] = sample.value
        return found

    def until(self, holds: Callable[[dict[str, dict[tuple[str, ...], float]]], bool]) -> None:
        self._sink.until(lambda: holds(balanced(self.scrape())), "the metrics say so")


def balanced(scraped: dict[str, dict[tuple[str, ...], float]]) -> dict[str, Any]:
    """A scrape, in which each record that was read is somewhere, topic by topic."""
    polled, here = (_by_topic(scraped[f"{name}_records{end}"]) for name, end in _TWO)
    for name in BOOKS:
        here.update(_by_topic(scraped[f"{name}_records_total"]))
    assert {t: n for t, n in polled.items() if n} == {t: n for t, n in here.items() if n}
    return scraped


_TWO = (("polled", "_total"), ("held", ""))


def _by_topic(series: dict[tuple[str, ...], float]) -> Counter[str]:
    found: Counter[str] = Counter()
    for labels, number in series.items():
        found[labels[-1]] += int(number)
    return found


def total(scraped: dict[str, dict[tuple[str, ...], float]], name: str) -> float:
    return sum(scraped[name].values())


@pytest.fixture
def filters(tmp_path: Any) -> Iterator[str]:
    file = tmp_path / "filters.json"
    file.write_text(
        '{"Filters": [{"Pattern": "{\\"value\\": [{\\"anything-but\\": \\"drop\\"}]}"}]}'
    )
    yield str(file)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_books_balance_in_each_scrape(
    broker: KafkaBroker, names: Names, filters: str, workers: int
) -> None:
    """With records that are filtered, answered, given up to the error topic, and away for a while;
    whichever process they are in."""
    topics = Topics(broker, names, partitions=4, filter_criteria=filters, http=0)
    with (
        serve(
            lambda event, _: (time.sleep(0.02), poison("order 1/7")(event, _))[1],
            faults=[unavailable(times=6, when=of_partition(2))],
        ) as server,
        topics.start(
            server,
            until=None,
            batch_size=5,
            bisect_on_error=True,
            workers=workers,
            **topics.log_errors,
        ) as sink,
    ):
        watched = Watched(sink)
        # What moves is read twice.
        sink.until(lambda: topics.is_dealt(workers), "all have partitions")
        broker.produce(topics.source, numbered(4, 60))
        broker.produce(topics.source, [(number, b"k", b"drop") for number in range(4)] * 5)
        watched.until(lambda each: total(each, "answered_records_total") == 239)
        broker.produce(topics.source, numbered(4, 10, "more"))
        watched.until(
            lambda each: (
                total(each, "committed_records_total") == 300
                and total(each, "polled_records_total") == 300
                and each["offset_lag_records"] == {(topics.source,): 0}
                and each["partitions"][("idle",)] == 4
            )
        )
        status, body = watched.get("/readyz")
        assert (status, json.loads(body)["ready"]) == (200, True)
        assert watched.get("/livez")[0] == 200
        scraped = watched.scrape()
        facts = watched.json("/api/status")
        sink.send(signal.SIGTERM)
        ended = sink.wait()
    assert scraped["filtered_records_total"] == {(topics.source,): 20}
    assert scraped["polled_records_total"] == {(topics.source,): 300}
    errors = {each: n for each, n in scraped["error_topic_records_total"].items() if n}
    assert errors == {("RetryAttemptsExhausted", topics.source): 1}
    assert total(scraped, "dropped_records_total") == 0
    outcomes = {name: n for (name,), n in scraped["invocations_total"].items()}
    assert outcomes["transient"] == 6
    assert outcomes["function_error"] >= 2
    assert sum(outcomes.values()) == ended.summary["invocations"]
    assert scraped["retries_total"][("transient",)] == 6
    assert scraped["errors_total"][("ValueError",)] == outcomes["function_error"]
    assert total(scraped, "batches_total") == ended.summary["batches"]
    assert scraped["batch_records_count"][()] == ended.summary["batches"]
    assert scraped["batch_records_sum"][()] == 280
    assert scraped["batches_total"][("count",)] > 0
    count = scraped["invocation_duration_seconds_count"]
    assert count[("success",)] == outcomes["success"]
    assert total(scraped, "invocation_duration_seconds_count") == sum(outcomes.values())
    assert scraped["iterator_age_seconds_sum"][()] > 0
    assert scraped["iterator_age_seconds_count"] == scraped["batch_wait_seconds_count"]
    assert scraped["offset_lag_records"] == {(topics.source,): 0}
    assert scraped["partitions"][("idle",)] == 4
    assert facts["state"] == "running"
    assert facts["numbers"]["read"] == 300
    assert [row["partition"] for row in facts["partitions"]] == [0, 1, 2, 3]
    for row in facts["partitions"]:
        assert row["end"] == row["read"] == row["processed"] == row["committed"] == 75
    (error,) = [each for each in facts["errors"] if each["error_type"] == "ValueError"]
    assert "message" not in error
    assert error["request_id"]
    options = {each["option"]: each for each in facts["configuration"]}
    assert options["batch_size"] == {"option": "batch_size", "value": "5", "origin": "command line"}


def test_what_is_written_again_is_counted_once(broker: KafkaBroker, names: Names) -> None:
    """In transactions: some are given up since Kafka refuses a response in them, others since the
    broker is away, for so long that partitions may be read again. The books balance all the while,
    and each end is in them once."""
    topics = Topics(
        broker,
        names,
        partitions=2,
        responses={"max_message_bytes": "20000"},
        delivery="exactly_once",
        kafka_config_file=TRANSACTIONS,
        http=0,
    )
    large = {(0, 70), (1, 3), (1, 150)}
    records = [
        (p, b"k", b"x" * 30_000 if (p, n) in large else b"order %d/%d" % (p, n))
        for n in range(200)
        for p in range(2)
    ]
    with (
        serve(faults=[slow(0.02, times=None)]) as server,
        topics.start(server, until=None, batch_size=10, **topics.log_errors) as sink,
    ):
        watched = Watched(sink)
        broker.produce(topics.source, records)
        watched.until(lambda each: total(each, "answered_records_total") > 100)
        broker.kill()
        broker.start()
        watched.until(lambda each: total(each, "committed_records_total") == 400)
        watched.until(lambda each: each["partitions"][("idle",)] == 2)
        scraped = balanced(watched.scrape())
        sink.send(signal.SIGTERM)
        ended = sink.wait()
    assert total(scraped, "answered_records_total") == 397
    errors = {each: n for each, n in scraped["error_topic_records_total"].items() if n}
    assert errors == {("ResponseRefused", topics.source): 3}
    assert (ended.summary["responses"], ended.summary["errors"]) == (397, 3)
    topics.assert_exactly_once()


def test_a_halt_and_a_back_off_are_seen(broker: KafkaBroker, names: Names) -> None:
    """Each where it is; what is behind a halt was let go of, and nothing is lost from the books."""
    topics = Topics(broker, names, partitions=3, count=20, http=0)
    with (
        serve(
            poison("order 1/5"), faults=[unavailable(times=None, when=of_partition(2))]
        ) as server,
        topics.start(server, until=None, batch_size=4, bisect_on_error=True) as sink,
    ):
        watched = Watched(sink)
        watched.until(
            lambda each: (
                ("RetryAttemptsExhausted", "1", topics.source) in each["partition_halted"]
                and each["partitions"][("backing_off",)] == 1
                # What is answered is not committed yet.
                and each["partitions"][("idle",)] == 1
                and total(each, "answered_records_total") == 25
                and each["offset_lag_max_records"][(topics.source,)] == 20
            )
        )
        scraped = balanced(watched.scrape())
        facts = watched.json("/api/status")
        ready = watched.get("/readyz")
        sink.send(signal.SIGTERM)
        sink.wait(3)
    assert scraped["released_records_total"][(topics.source,)] > 0
    assert scraped["partition_offset_lag_records"][("1", topics.source)] == 15
    assert 0 < time.time() - scraped["oldest_record_timestamp_seconds"][(topics.source,)] < 3600
    assert ready[0] == 200
    assert b"halted: 1 of 3" in ready[1]
    assert facts["state"] == "halted 1 of 3"
    assert facts["reason"].startswith(f"PROBLEM: {topics.source}-1 is halted at offset 5")
    (halt,) = facts["halted"]
    assert (halt["partition"], halt["offset"], halt["error_type"]) == (1, 5, "ValueError")
    assert halt["since"]
    assert "message" not in halt
    rows = {row["partition"]: row for row in facts["partitions"]}
    assert (rows[0]["state"], rows[1]["state"]) == ("idle", "halted")
    assert (rows[2]["state"], rows[2]["error_type"]) == ("backing_off", "ServiceException")
    assert rows[2]["attempt"] >= 1
    assert rows[2]["waits_for"] in ("backoff", "reply")


def test_a_worker_that_stands_still_does_not_live(broker: KafkaBroker, names: Names) -> None:
    """Its silence counts: the first process alone would go on to answer."""
    topics = Topics(broker, names, partitions=2, count=5, http=0, workers=2)
    with serve(answer) as server, topics.start(server, until=None) as sink:
        watched = Watched(sink)
        watched.until(lambda each: total(each, "committed_records_total") == 10)
        first = watched.json("/livez")["loop_still_secs"]
        (child, *_) = _children(sink.process.pid)
        os.kill(child, signal.SIGSTOP)
        try:
            sink.until(
                lambda: watched.json("/livez")["loop_still_secs"] > first + 3, "it stands still"
            )
        finally:
            os.kill(child, signal.SIGCONT)
        sink.until(lambda: watched.json("/livez")["loop_still_secs"] < 3, "it turns again")
        sink.send(signal.SIGTERM)
        sink.wait()


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in listed]


def test_an_address_that_is_taken_is_refused_before_anything_begins(
    broker: KafkaBroker, names: Names
) -> None:
    topics = Topics(broker, names, count=1)
    with socket.socket() as taken, serve(answer) as server:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = topics.run(server, code=2, http=port, workers=2, summary="none")
    (error,) = ended.errors
    assert error.startswith(f"error: --http=127.0.0.1:{port} cannot be listened at: ")
