"""Whole runs with filters: who is sent, and that all others are counted and committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from tests.conftest import Names
from tests.sink import (
    Coordinates,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_one_at_a_time,
    assert_rising,
    by_partition,
    facts,
    invocations,
    offsets_called,
    originals,
    poison,
    run,
    serve,
)

PAID = {"value": {"status": ["paid"]}}


def _file(folder: Path, *patterns: Any) -> str:
    """Criteria as AWS prints them, each pattern a text."""
    filters = [{"Pattern": json.dumps(pattern)} for pattern in patterns]
    file = folder / "filters.json"
    file.write_text(json.dumps({"FilterCriteria": {"Filters": filters}}), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("lanes", [1, 4])
def test_each_record_is_answered_or_an_error_or_filtered(
    broker: KafkaBroker, names: Names, tmp_path: Path, lanes: int
) -> None:
    """By value, key and headers, in four partitions with a poison record in each."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=4)
    records, kept, filtered = [], set(), set[Coordinates]()
    for partition in range(4):
        for number in range(300):
            status = ("new", "paid", "sent")[number % 3]
            headers = [("source", b"web" if number % 7 else b"shop")]
            value = json.dumps({"id": f"{partition}/{number}", "status": status}).encode()
            records.append(NewRecord(partition, b"c-%d" % (number % 10), value, headers))
            matches = status == "paid" or number % 7 == 0 or number % 10 == 4
            (kept if matches else filtered).add((topic, partition, number))
    broker.produce(topic, records)
    handler = poison(*({"id": f"{partition}/40", "status": "paid"} for partition in range(4)))
    with serve(handler) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            bisect_on_error=True,
            filter_criteria=_file(
                tmp_path, PAID, {"headers": {"source": ["shop"]}}, {"key": [{"suffix": "-4"}]}
            ),
            batch_size=20,
            parallelization_factor=lanes,
        )
        calls = invocations(server)

    assert {(c.topic, c.partition, offset) for c in calls for offset in c.offsets} == kept
    assert_exactly_once(broker, names.group(), [topic], responses, errors, elsewhere=filtered)
    assert_caught_up(broker, names.group(), topic)
    if lanes == 1:
        assert_rising(broker, responses)
        assert_one_at_a_time(calls)
    summary = ended.summary
    assert (summary["filtered"], summary["errors"]) == (len(filtered), 4)
    assert summary["records"] == 1200 == len(kept) + len(filtered)


def test_a_log_of_which_nothing_is_sent_is_committed(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """No call, no error record, and a second run finds nothing left."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, [(n % 2, None, b'{"status": "new"}') for n in range(3000)])
    criteria = _file(tmp_path, PAID)
    with serve() as server:
        first = run(broker, server, topics=topic, consumer_group=group, filter_criteria=criteria)
        again = run(broker, server, topics=topic, consumer_group=group, filter_criteria=criteria)
        assert invocations(server) == []
    assert_caught_up(broker, group, topic)
    assert (first.summary["records"], first.summary["filtered"]) == (3000, 3000)
    assert (again.summary["records"], again.summary["filtered"]) == (0, 0)


VALUES = [b'{"status": "paid"}', b'{"status": "new"}', b"text", None, b"\xff", b"17", b'"paid"']


@pytest.mark.parametrize(
    ("mode", "sent", "rejected"),
    [(None, [0, 2, 3, 4, 5, 6], []), ("drop", [0], []), ("error", [0], [2, 3, 4, 5, 6])],
)
def test_what_cannot_be_compared(
    broker: KafkaBroker,
    names: Names,
    tmp_path: Path,
    mode: str | None,
    sent: list[int],
    rejected: list[int],
) -> None:
    """Sent by default; else dropped, or an error record with all that was in it."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, [NewRecord(0, b"k", value, [("h", b"1")]) for value in VALUES])
    with serve() as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            filter_criteria=_file(tmp_path, PAID),
            filter_unparsable=mode,
        )
        assert [offset for call in offsets_called(server) for offset in call] == sent

    found = broker.read_all(errors) if rejected else []
    for record, offset in zip(found, rejected, strict=True):
        (original,) = originals(record)
        assert (original["offset"], original["value"]) == (offset, VALUES[offset])
        assert original["headers"] == [{"name": "h", "value": b"1"}]
        assert facts(record)["lambda.condition"] == "InvalidRecord"
        assert facts(record)["lambda.error.type"] == "FilterUnparsable"
        assert "--filter_unparsable=error" in facts(record)["lambda.error.message"]
        assert facts(record)["lambda.attempts"] == "0"
    filtered = [(topic, 0, n) for n in range(len(VALUES)) if n not in (*sent, *rejected)]
    assert_exactly_once(
        broker,
        names.group(),
        [topic],
        responses,
        errors if rejected else None,
        elsewhere=filtered,
    )
    assert_caught_up(broker, names.group(), topic)
    summary = ended.summary
    assert (summary["records"], summary["filtered"], summary["errors"]) == (
        len(VALUES),
        len(filtered),
        len(rejected),
    )


def test_a_halted_partition_goes_on_behind_its_last_finished_record(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """What was filtered in front of the record that failed is filtered again by the next run."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=2)
    words = ["keep", "skip", "skip", "bad", "skip", "keep", "skip"]
    broker.produce(topic, [(p, None, w.encode()) for w in words for p in range(2)])
    options = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "filter_criteria": _file(
            tmp_path, {"value": [{"anything-but": "skip"}], "partition": [0]}, {"value": ["keep"]}
        ),
        "bisect_on_error": True,
    }
    with serve(poison("bad")) as server:
        ended = run(broker, server, code=3, **options)
    assert [halt["offset"] for halt in ended.summary["halted"]] == [3]
    assert broker.committed(group, topic) == {0: 1, 1: 7}
    with serve() as server:
        ended = run(broker, server, **options)
        assert offsets_called(server) == [[3, 5]]
    assert ended.summary["filtered"] == 4
    found = by_partition(answered(broker, responses))
    assert found == {(topic, 0): [0, 3, 5], (topic, 1): [0, 5]}
    assert_caught_up(broker, group, topic)
    assert_answers_match(broker, [topic], responses)


def test_criteria_that_do_not_fit_end_the_run_before_it_begins(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """Exit code 2 and a line for each filter, without a stack trace."""
    file = _file(tmp_path, {"value": {"n": [{"numric": [">", 1]}]}}, PAID, {"data": ["x"]})
    ended = run(
        broker,
        None,
        code=2,
        topics=names.topic(),
        consumer_group=names.group(),
        filter_criteria=file,
    )
    first, second = ended.errors
    assert f'--filter_criteria={file}: filter 1: value.n[0]: "numric" is not an operator' in first
    assert f"--filter_criteria={file}: filter 3: data is not known; there are value," in second
    assert "Traceback" not in ended.stderr
