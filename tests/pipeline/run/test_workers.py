"""Parts of what there is for all workers, and how what they say is put together. No processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.options.config import Config
from pipeline.run.status import READING, PartitionView, Standing, Status, Totals
from pipeline.run.workers import member_of, merge, part_of
from transforms.invoke.failures import BACKOFF, Failed, Seen, Stuck, Trouble
from transforms.records import Failure, Finished, Records
from transforms.tally import ANSWERED, COMMITTED, HELD, POLLED, RELEASED, Tallied

COUNTS = st.integers(1, 16)


@given(COUNTS, st.integers(0, 1000))
def test_parts_are_the_total(count: int, total: int) -> None:
    """And none is larger by two than another."""
    parts = [part_of(total, index, count) for index in range(count)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


@given(st.integers(1, 64), st.data())
def test_all_together_invoke_no_more_than_one_would(count: int, data: st.DataObject) -> None:
    """And each of them may invoke."""
    high = data.draw(st.integers(count, 1000))
    low = data.draw(st.integers(1, high))
    config = Config.from_options(
        {
            "kafka_bootstrap_servers": "broker-1:9092",
            "topics": "orders",
            "consumer_group": "group",
            "function": "process-orders",
            "workers": str(count),
            "max_concurrency": str(high),
            "min_concurrency": str(low),
        }
    )
    parts = [member_of(config, index, count) for index in range(count)]
    most = [part.invoke.function.max_concurrency for part in parts]
    least = [part.invoke.min_concurrency for part in parts]
    assert sum(most) == high
    assert all(1 <= each <= own for each, own in zip(least, most, strict=True))
    assert [part.read.source for part in parts] == [
        config.source.as_member(index) for index in range(count)
    ]
    assert all(part.commit.source == part.read.source for part in parts)


def _halt(partition: int) -> Finished:
    records = Records([7], [0], [None], [None], [None])
    failure = Failure(records, (), "RetryAttemptsExhausted", "ValueError", "no", 1, 200, "Error")
    return Finished("orders", partition, 7, 7, halted=failure)


def test_a_partition_that_two_workers_say_is_halted_is_halted_once() -> None:
    """One had it before the other, and has not reported since."""
    further = replace(_halt(1), start=9, next_offset=9)
    nothing = Status.of_nothing(0)
    statuses = [replace(nothing, halted=each) for each in ([_halt(1)], [further, _halt(2)])]
    for order in (statuses, statuses[::-1]):
        together = merge(order, 1)
        assert {each.key: each.next_offset for each in together.halted} == {
            ("orders", 1): 9,
            ("orders", 2): 7,
        }
        assert len(together.halted) == 2


def test_what_workers_say_is_added_up() -> None:
    """Sums, and what is known of each partition; one that has not begun counts for nothing."""
    statuses = [
        Status(
            totals=Totals(Counter({"write.responses": 5, "invoke.retries": 1}), 2),
            in_flight=3,
            lags={("orders", 0): 4},
            halted=[],
            committed={("orders", 0): 11},
            elapsed_secs=1,
            limit=10,
            in_flight_max=5,
            begun=True,
        ),
        Status(
            totals=Totals(Counter({"write.responses": 2, "write.errors": 1}), 3),
            in_flight=1,
            lags={("orders", 1): None},
            halted=[_halt(1)],
            committed={("orders", 1): 7},
            elapsed_secs=2,
            limit=9,
            in_flight_max=4,
            breaker_open=True,
            breaker_openings=2,
            begun=True,
        ),
    ]

    together = merge(statuses, 6.5)

    assert together.totals.counters == {
        "write.responses": 7,
        "write.errors": 1,
        "invoke.retries": 1,
    }
    assert (together.totals.rounds, together.totals.records) == (5, 8)
    assert (together.in_flight, together.in_flight_max, together.limit) == (4, 9, 19)
    assert together.lags == {("orders", 0): 4, ("orders", 1): None}
    assert together.committed == {("orders", 0): 11, ("orders", 1): 7}
    assert [finished.key for finished in together.halted] == [("orders", 1)]
    assert (together.breaker_open, together.breaker_openings) == (True, 2)
    assert (together.elapsed_secs, together.begun) == (6.5, True)
    assert not merge([*statuses, Status.of_nothing(0)], 7).begun


def test_what_a_worker_has_done_that_was_taken_away_stays() -> None:
    """Counters never fall; what it held is read again by whoever has its partitions now."""
    failure = Failed("orders", 1, 5, 5, "function error", "ValueError", "no", 2, 100.0)
    stuck = Stuck("orders", 1, BACKOFF, None, "ValueError")
    gone = Status(
        totals=Totals(Counter({"write.responses": 5}), 2),
        in_flight=0,
        lags={("orders", 1): 4},
        halted=[_halt(1)],
        committed={("orders", 1): 11},
        elapsed_secs=1,
        begun=True,
        trouble=Trouble(failure, [stuck], 50.0, errors=[Seen("ValueError", 3, 90.0, failure)]),
        books=Tallied(
            {(POLLED, ("orders",)): 9, (ANSWERED, ("orders",)): 5, (HELD, ("orders",)): 4}
        ),
        tallied=Tallied({(COMMITTED, ("orders",)): 5.0}),
        partitions={("orders", 1): PartitionView(READING, 15, 15, 11)},
        draining=True,
        still_secs=500.0,
    )
    stays = replace(
        Status.of_nothing(1),
        begun=True,
        books=Tallied({(POLLED, ("orders",)): 2, (ANSWERED, ("orders",)): 2}),
    )

    together = merge([stays], 6.5, [gone])

    assert together.totals["write.responses"] == 5
    assert together.committed == {("orders", 1): 11}
    assert together.books.by(POLLED) == {("orders",): 11}
    assert together.books.by(ANSWERED) == {("orders",): 7}
    assert together.books.by(RELEASED) == {("orders",): 4}
    assert together.books.by(HELD) == {}
    assert together.tallied.by(COMMITTED) == {("orders",): 5}
    assert [(each.error_type, each.count) for each in together.trouble.errors] == [
        ("ValueError", 3)
    ]
    assert together.trouble.last_error == failure
    assert (together.trouble.stuck, together.trouble.oldest_age_secs) == ([], None)
    assert (together.lags, together.partitions, together.halted) == ({}, {}, [])
    assert (together.draining, together.still_secs, together.workers) == (False, 0.0, 1)


def test_a_run_drains_when_all_workers_do() -> None:
    """One that leaves while the others go on is no reason not to be ready."""
    goes_on, drains = (replace(Status.of_nothing(0), draining=each) for each in (False, True))
    assert not merge([goes_on, drains], 1).draining
    assert merge([drains, drains], 1).draining


def test_a_run_is_done_when_all_workers_are_and_each_partition_was_somebody_s() -> None:
    """One that is on its way from one to another is elsewhere for all of them."""

    def standing(*standings: Standing) -> Standing:
        statuses = [replace(Status.of_nothing(0), standing=each) for each in standings]
        return merge(statuses, 1).standing

    one, two, three = (("orders", number) for number in range(3))
    first = Standing(True, False, frozenset({two, three}))
    second = Standing(True, True, frozenset({one, three}))
    assert standing(first, second) == Standing(True, True, frozenset({three}))
    second = Standing(True, False, frozenset({one}))
    assert standing(first, second) == Standing(True)
    assert not standing(first, Standing()).done
