"""Whole runs: fewer calls at once where they are throttled, and none during an outage."""

from __future__ import annotations

import json
import signal
import statistics
import time
from itertools import pairwise
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import Fault, parse_faults, throttle
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.pipeline.test_docs import CONCURRENCY, blocks, example
from tests.sink import (
    Invocation,
    answer,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    failed,
    invocations,
    numbered,
    poison,
    run,
    serve,
    start,
)


def _faults(mark: str) -> list[Fault]:
    return parse_faults(json.loads(blocks(CONCURRENCY, "json", after=mark)[0]))


class Topics:
    """The topics of a run, with as many records in each partition of the source."""

    def __init__(self, broker: KafkaBroker, names: Names, partitions: int, count: int) -> None:
        self.source, self.group = names.topic(), names.group()
        self.responses, self.errors = names.topic("responses"), names.topic("errors")
        broker.create_topic(self.source, partitions=partitions)
        broker.produce(self.source, numbered(partitions, count))
        for topic in (self.responses, self.errors):
            broker.create_topic(topic, partitions=partitions)

    @property
    def options(self) -> dict[str, str]:
        return {
            "topics": self.source,
            "consumer_group": self.group,
            "response_topic": self.responses,
        }


# -- throttling ---------------------------------------------------------------------------


def _answer_after_100_ms(event: Any, context: LambdaContext) -> Any:
    time.sleep(0.1)
    return answer(event, context)


def _running(calls: list[Invocation], at: Invocation) -> int:
    """How many of the calls were running when this one began, itself among them."""
    return sum(call.started <= at.started < call.ended for call in calls)


def test_throttled_calls_settle_below_what_the_function_takes(
    broker: KafkaBroker, names: Names
) -> None:
    """With a function that takes 8 at once: 4 to 8 run, hardly one is throttled, none is lost."""
    topics = Topics(broker, names, partitions=24, count=250)
    with serve(_answer_after_100_ms, _faults("throttle.json"), concurrency=1000) as server:
        ended = run(broker, server, **topics.options, **example(CONCURRENCY, "throttled run"))
        calls = invocations(server)
        assert server.in_flight_max == 8

    assert_exactly_once(broker, topics.group, [topics.source], topics.responses)
    assert_caught_up(broker, topics.group, topics.source)
    assert_one_at_a_time(calls)
    assert_in_order(calls)
    accepted = [call for call in calls if call.answered]
    assert len(accepted) == 24 * 25
    # From when it has had time to settle, to where there are not enough batches left for all.
    settled = accepted[len(accepted) // 3 : len(accepted) * 9 // 10]
    running = [_running(accepted, call) for call in settled]
    # Fewer now and then: on a busy machine a call may begin long after the one before it.
    assert statistics.median(running) >= 4, running
    assert max(running) <= 8
    since = [c for c in calls if settled[0].started <= c.started <= settled[-1].started]
    assert sum(not call.answered for call in since) <= 0.05 * len(since)
    summary = ended.summary
    assert (summary["errors"], summary["retries"]) == (0, 0)
    assert summary["throttles"] == len(calls) - len(accepted) > 0
    assert 4 <= summary["concurrency"]["limit"] <= 9
    assert 8 < summary["concurrency"]["in_flight_max"] <= 24
    assert summary["breaker"] == {"open": False, "openings": 0}


def test_the_least_is_kept_however_often_it_is_throttled(broker: KafkaBroker, names: Names) -> None:
    """As a floor for functions whose limit others use up now and then."""
    topics = Topics(broker, names, partitions=6, count=20)
    faults = [throttle(times=None, above_in_flight=1, retry_after_secs=0.1)]
    with serve(_answer_after_100_ms, faults) as server:
        ended = run(broker, server, **topics.options, batch_size=5, min_concurrency=3)
    assert_exactly_once(broker, topics.group, [topics.source], topics.responses)
    assert_caught_up(broker, topics.group, topics.source)
    assert ended.summary["errors"] == 0
    assert ended.summary["throttles"] > 0
    assert ended.summary["concurrency"]["limit"] >= 3


# -- outages ------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["log", "fail"])
def test_an_outage_is_waited_for(broker: KafkaBroker, names: Names, on_error: str) -> None:
    """The error topic gets what failed before the breaker opened; with fail nothing halts."""
    topics = Topics(broker, names, partitions=4, count=400)
    options = topics.options | example(CONCURRENCY, "breaker run")
    # Without halves what a call gives up is easily counted.
    options |= {"on_error": on_error, "bisect_on_error": None}
    options["error_topic"] = topics.errors if on_error == "log" else None
    with serve(faults=_faults("outage.json")) as server:
        with start(broker, server, **options) as sink:
            sink.until(lambda: "breaker open" in sink.stderr, "the breaker did not open")
            # Three probes that fail, all by themselves.
            opened = len(invocations(server))
            sink.until(lambda: len(invocations(server)) >= opened + 3, "no probes")
            given_up = failed(broker, topics.errors)
            server.clear_faults()
            ended = sink.wait()
            assert "breaker closed" in sink.stderr
        calls = invocations(server)

    # Fewer than 20 calls of 10 records each.
    assert len(given_up) <= (190 if on_error == "log" else 0)
    assert failed(broker, topics.errors) == given_up
    assert_exactly_once(broker, topics.group, [topics.source], topics.responses, topics.errors)
    assert_caught_up(broker, topics.group, topics.source)
    assert_rising(broker, topics.responses)
    assert_one_at_a_time(calls)
    summary = ended.summary
    assert summary["breaker"] == {"open": False, "openings": 1}
    assert summary["halted"] == []
    assert summary["errors"] == len(given_up)


def test_while_it_is_open_there_is_one_probe_at_a_time(broker: KafkaBroker, names: Names) -> None:
    """And between two of them the wait."""
    topics = Topics(broker, names, partitions=8, count=100)
    options = topics.options | example(CONCURRENCY, "breaker run") | {"error_topic": topics.errors}
    with serve(faults=_faults("outage.json")) as server:
        with start(broker, server, **options) as sink:
            sink.until(lambda: "breaker open" in sink.stderr, "the breaker did not open")
            # 20 open it, and 7 more may have been running then; the others are probes.
            sink.until(lambda: len(invocations(server)) >= 30, "no probes")
            sink.send(signal.SIGTERM)
            ended = sink.wait()
        calls = invocations(server)
    for before, probe in pairwise(calls[-3:]):
        assert probe.started - before.ended >= 1.0
    assert ended.summary["breaker"]["open"] is True
    # Ended while it was open: nothing is lost, and the next run does the rest.
    assert_exactly_once(broker, topics.group, [topics.source], topics.responses, topics.errors)
    with serve() as server:
        run(broker, server, **options)
    assert_exactly_once(broker, topics.group, [topics.source], topics.responses, topics.errors)
    assert_caught_up(broker, topics.group, topics.source)


def test_bad_records_open_no_breaker(broker: KafkaBroker, names: Names) -> None:
    """One after the other in one partition, while the others go on: each costs only itself."""
    topics = Topics(broker, names, partitions=3, count=320)
    options = topics.options | example(CONCURRENCY, "breaker run") | {"error_topic": topics.errors}
    options["batch_size"] = 32
    bad = [f"order 1/{number}" for number in (0, 32, 64, 95, 200)]
    with serve(poison(*bad)) as server:
        ended = run(broker, server, **options)
    assert ended.summary["breaker"] == {"open": False, "openings": 0}
    assert sorted(failed(broker, topics.errors)) == [
        (topics.source, 1, number) for number in (0, 32, 64, 95, 200)
    ]
    assert_exactly_once(broker, topics.group, [topics.source], topics.responses, topics.errors)
    assert_caught_up(broker, topics.group, topics.source)
    assert_answers_match(broker, [topics.source], topics.responses)
    assert len(answered(broker, topics.responses)) == 3 * 320 - 5
