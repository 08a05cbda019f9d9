"""Whole runs: order within a partition, whatever goes wrong around it."""

from __future__ import annotations

import random

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import drop_connection, function_error, slow, throttle, unavailable
from tests.conftest import Names
from tests.sink import (
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    by_partition,
    failed,
    invocations,
    numbered,
    of_partition,
    offsets_called,
    poison,
    run,
    serve,
    start,
)


def test_order_is_kept_under_concurrency_and_faults(broker: KafkaBroker, names: Names) -> None:
    """With every kind of trouble at random, each partition is worked strictly in order.

    Each record is answered once, the answers of a partition rise in the response topic, and no
    two calls of a partition overlap, while partitions do run side by side.
    """
    topics = [names.topic("orders"), names.topic("payments")]
    for topic in topics:
        broker.create_topic(topic, partitions=4)
        broker.produce(topic, numbered(4, 700, topic))
    broker.create_topic(names.topic("responses"), partitions=3)
    chance = random.Random(20)

    def now_and_then(payload: bytes, name: str) -> bool:
        return chance.random() < 0.03

    faults = [
        throttle(retry_after_secs=0.05, times=None, when=now_and_then),
        throttle(retry_after_secs=None, times=5, when=now_and_then),
        unavailable(500, times=None, when=now_and_then),
        unavailable(502, "ENILimitReachedException", times=None, when=now_and_then),
        drop_connection(times=None, when=now_and_then),
        drop_connection(executed=True, times=None, when=now_and_then),
        function_error("Sandbox.Timedout", times=None, when=now_and_then),
        slow(0.02, times=None),
    ]
    with serve(faults=faults) as server:
        ended = run(
            broker,
            server,
            topics=",".join(topics),
            consumer_group=names.group(),
            response_topic=names.topic("responses"),
            batch_size=20,
            max_concurrency=5,
            max_retries=-1,
            bisect_on_error=True,
        )
        calls = invocations(server)
        in_flight_max = server.in_flight_max

    assert_exactly_once(broker, names.group(), topics, responses=names.topic("responses"))
    for topic in topics:
        assert_caught_up(broker, names.group(), topic)
    assert_rising(broker, names.topic("responses"))
    assert_answers_match(broker, topics, names.topic("responses"))
    assert_one_at_a_time(calls)
    due = assert_in_order(calls)
    assert due == {(topic, partition): 700 for topic in topics for partition in range(4)}
    assert 2 <= in_flight_max <= 5
    summary = ended.summary
    assert (summary["records"], summary["responses"], summary["errors"]) == (5600, 5600, 0)
    assert min(summary["retries"], summary["bisections"], summary["throttles"]) > 0
    assert summary["invocations"] == len(calls)


def test_one_bad_record_of_eight_costs_nine_calls(broker: KafkaBroker, names: Names) -> None:
    """Halves are tried left to right, the bad record alone twice more, and only it is lost."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 8))
    with serve(poison("order 0/5")) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            batch_size=8,
            max_retries=2,
            bisect_on_error=True,
        )
        calls = offsets_called(server)

    assert calls == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [4, 5],
        [4],
        [5],
        [5],
        [5],
        [6, 7],
    ]
    assert failed(broker, errors) == [(topic, 0, 5)]
    assert_rising(broker, responses)
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)
    summary = ended.summary
    assert (summary["responses"], summary["errors"]) == (7, 1)
    assert (summary["invocations"], summary["retries"], summary["bisections"]) == (9, 2, 3)


def test_an_outage_of_one_partition_costs_only_that_partition(
    broker: KafkaBroker, names: Names
) -> None:
    """The others are answered and committed to their end while it fails; then it catches up."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=4)
    broker.produce(topic, numbered(4, 2000))
    broker.create_topic(responses, partitions=4)
    with serve(faults=[unavailable(500, times=None, when=of_partition(1))]) as server:
        with start(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            batch_size=50,
        ) as sink:
            sink.until(
                lambda: (
                    broker.committed(names.group(), topic).items()
                    >= {0: 2000, 2: 2000, 3: 2000}.items()
                ),
                "the partitions without an outage are not committed",
            )
            during = by_partition(answered(broker, responses))
            committed = broker.committed(names.group(), topic).get(1, 0)
            tried = offsets_called(server, 1)
            server.clear_faults()
            sink.wait()
        calls = invocations(server)

    assert during == {(topic, partition): list(range(2000)) for partition in (0, 2, 3)}
    assert committed == 0
    assert len(tried) > 1
    assert all(offsets == list(range(50)) for offsets in tried)
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)
    assert_rising(broker, responses)
    assert_one_at_a_time(calls)
    assert_in_order(calls)
