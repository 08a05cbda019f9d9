"""Progress: the summary, the last lines, and logs that a machine can read."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

from pipeline.run.status import Status, Totals
from pipeline.watch import logs
from pipeline.watch.progress import (
    Progress,
    halted_text,
    print_summary,
    progress_table,
    progress_text,
    summary,
    summary_text,
)
from transforms.invoke.failures import BACKOFF, BREAKER, THROTTLE, Failed, Stuck, Trouble
from transforms.records import Failure, Finished, Records

COUNTERS = Counter(
    {
        "batch.batches": 12,
        "batch.records": 1300,
        "invoke.invocations": 20,
        "invoke.retries": 3,
        "invoke.bisections": 4,
        "invoke.throttles": 5,
        "write.responses": 1234,
        "write.errors": 6,
    }
)


def _halted(topic: str = "orders", partition: int = 2, message: str = "no such item") -> Finished:
    records = Records([70, 72], [1, 2], [None, None], [b"secret", b"secret"], [None, None])
    failure = Failure(
        records=records,
        entries=[b"1", b"2"],
        condition="RetryAttemptsExhausted",
        error_type="ValueError",
        message=message,
        attempts=1,
        status_code=200,
        function_error="Unhandled",
    )
    return Finished(topic, partition, 60, 70, halted=failure)


def _status(**more) -> Status:
    fields = {
        "totals": Totals(Counter(COUNTERS), rounds=2),
        "in_flight": 7,
        "lags": {("orders", 0): 100, ("orders", 2): 11, ("orders", 3): None},
        "halted": [],
        "committed": {("orders", 10): 5, ("orders", 2): 70, ("a", 0): 1},
        "elapsed_secs": 2.00049,
        "limit": 8,
        "in_flight_max": 9,
        "breaker_openings": 2,
    }
    return Status(**(fields | more))


FIELDS = [
    "records",
    "batches",
    "invocations",
    "responses",
    "errors",
    "retries",
    "bisections",
    "throttles",
    "concurrency",
    "workers",
    "breaker",
    "filtered",
    "halted",
    "last_error",
    "waits",
    "lag_max",
    "oldest_age_secs",
    "committed",
    "elapsed_secs",
]


def test_the_summary_has_exactly_these_fields() -> None:
    """Scripts read the summary, so its fields and what they count are fixed."""
    facts = summary(_status(halted=[_halted()]))
    assert list(facts) == FIELDS
    assert facts == {
        "records": 1240,
        "batches": 12,
        "invocations": 20,
        "responses": 1234,
        "errors": 6,
        "retries": 3,
        "bisections": 4,
        "throttles": 5,
        "concurrency": {"limit": 8, "in_flight_max": 9},
        "workers": 1,
        "breaker": {"open": False, "openings": 2},
        "filtered": 0,
        "halted": [
            {
                "topic": "orders",
                "partition": 2,
                "offset": 70,
                "condition": "RetryAttemptsExhausted",
                "error_type": "ValueError",
                "message": "no such item",
            }
        ],
        "last_error": None,
        "waits": [
            {
                "topic": "orders",
                "partition": 2,
                "for": "halted",
                "until": None,
                "error_type": "ValueError",
            }
        ],
        "lag_max": 100,
        "oldest_age_secs": None,
        "committed": {"a-0": 1, "orders-2": 70, "orders-10": 5},
        "elapsed_secs": 2.0,
    }
    assert list(facts["committed"]) == ["a-0", "orders-2", "orders-10"]


def test_filtered_records_have_come_to_their_end() -> None:
    """They count as records; lines name them where there are any."""
    status = _status(totals=Totals(COUNTERS + Counter({"filter.filtered": 60}), rounds=2))
    facts = summary(status)
    assert (facts["records"], facts["filtered"]) == (1300, 60)
    for text in (summary_text(status), progress_text(status)):
        assert text.startswith("records: 1300")
        assert text.endswith(", filtered: 60")
    assert "filtered" not in summary_text(_status()) + progress_text(_status())


def test_a_run_that_did_nothing_has_a_summary_too() -> None:
    """Zeros, not gaps, and no division by zero seconds."""
    status = _status(totals=Totals(), committed={}, lags={}, elapsed_secs=0.0)
    facts = summary(status)
    assert list(facts) == FIELDS
    assert facts["records"] == facts["batches"] == facts["retries"] == 0
    assert facts["halted"] == []
    assert "records: 0 in 0.0 s" in summary_text(status)


def test_the_summary_for_people_is_one_line() -> None:
    """The same numbers, in one line."""
    text = summary_text(_status())
    assert "\n" not in text
    for part in ("records: 1240 in 2.0 s (620/s)", "answered: 1234", "errors: 6", "batches: 12"):
        assert part in text
    for part in ("invocations: 20", "retries: 3", "bisections: 4", "throttles: 5"):
        assert part in text


def test_halted_partitions_say_which_where_and_how_to_go_on() -> None:
    """One line for each, then what to do; the records themselves are not shown."""
    lines = halted_text(
        _status(halted=[_halted(), _halted("pay", 0, "a\n  long\nstory")]), "group g1"
    )
    assert lines[0] == (
        "halted: orders-2 at offset 70: RetryAttemptsExhausted, ValueError: no such item"
    )
    assert lines[1] == (
        r"halted: pay-0 at offset 70: RetryAttemptsExhausted, ValueError: a\n  long\nstory"
    )
    assert len(lines) == 3
    for part in ("group g1", "same command again", "--on_error=log", "--error_topic"):
        assert part in lines[2]
    assert "--bisect_on_error" in lines[2]
    assert "secret" not in "".join(lines)


def test_no_halted_partition_no_lines() -> None:
    """A run that went well ends with its summary."""
    assert halted_text(_status(), "group g1") == []


def test_a_long_message_is_cut() -> None:
    """A function's stack trace does not fill the screen."""
    lines = halted_text(_status(halted=[_halted(message="x" * 10_000)]), "group g1")
    assert len(lines[0]) < 700


@pytest.mark.parametrize("format", ["text", "json", "none"])
@pytest.mark.parametrize("halted", [False, True])
def test_the_summary_is_printed_as_asked_for(format: str, halted: bool, capsys) -> None:
    """stdout has the summary in its format and nothing else; stderr what is halted."""
    status = _status(halted=[_halted()] if halted else [])
    print_summary(status, format, "group g1")
    out, err = capsys.readouterr()
    if format == "none":
        assert out == ""
    else:
        assert len(out.splitlines()) == 1
    if format == "json":
        assert json.loads(out) == summary(status)
    if format == "text":
        assert out == summary_text(status) + "\n"
    assert err.splitlines() == halted_text(status, "group g1")


def test_the_progress_line() -> None:
    """What a log shows of a run that goes on; a lag not known yet counts as none."""
    text = progress_text(_status())
    assert "\n" not in text
    for part in ("records: 1240", "batches: 12", "in flight: 7 of 8,", "retries: 3"):
        assert part in text
    assert "lag: 111 (largest: orders-0 100), partitions: 3" in text


def test_an_outage_shows_in_line_table_and_summary() -> None:
    """What failed last, where, what the stuck partitions wait for, and how old what waits is."""
    error = Failed(
        "orders", 0, 100, 109, "transient", "Timeout", "[red]slow", 3, 1e9, request_id="r-1"
    )
    stuck = [
        Stuck("orders", 0, BACKOFF, 1e9 + 5, "Timeout"),
        Stuck("orders", 3, BREAKER, None, "Timeout"),
        *(Stuck("pay", number, THROTTLE, 1e9 + 1, "TooMany") for number in range(20)),
    ]
    status = _status(trouble=Trouble(error, stuck, 61.26), halted=[_halted()])
    text = (
        "oldest unfinished record: 61 s, halted: orders-2, "
        "waiting: orders-0 (backoff until 01:46:45Z, Timeout) orders-3 (breaker, Timeout) "
        "pay-0 (throttle until 01:46:41Z, TooMany) pay-1 (throttle until 01:46:41Z, TooMany) "
        "pay-2 (throttle until 01:46:41Z, TooMany) and 17 more, "
        "last error: orders-0 at offset 100, 01:46:40Z: Timeout: [red]slow"
    )
    assert progress_text(status).endswith(f", partitions: 3, {text}")
    assert summary_text(status).endswith(f", throttles: 5, {text}")
    assert str(progress_table(status).caption).splitlines()[1] == text
    facts = summary(status)
    assert facts["last_error"] == {"time": "2001-09-09T01:46:40.000+00:00"} | error.facts
    assert facts["oldest_age_secs"] == 61.26
    assert len(facts["waits"]) == 23
    assert facts["waits"][0] == {
        "topic": "orders",
        "partition": 0,
        "for": "backoff",
        "until": "2001-09-09T01:46:45.000+00:00",
        "error_type": "Timeout",
    }


def test_a_limit_that_is_not_known_is_not_shown() -> None:
    """Workers elsewhere have their own."""
    status = _status(limit=None)
    assert "in flight: 7," in progress_text(status)
    assert next(iter(progress_table(status).columns[2].cells)) == "7"
    assert summary(status)["concurrency"]["limit"] is None


def test_an_open_breaker_is_shown() -> None:
    """In the line and in the table, beside what runs in spite of it."""
    status = _status(in_flight=1, breaker_open=True)
    assert "in flight: 1 of 8 (breaker open)," in progress_text(status)
    assert next(iter(progress_table(status).columns[2].cells)) == "1 of 8 (breaker open)"
    assert summary(status)["breaker"] == {"open": True, "openings": 2}


def test_the_live_table_shows_the_halted_partition() -> None:
    """A terminal sees the numbers, the lags, and which partition stands still."""
    table = progress_table(_status(halted=[_halted()]))
    assert [column.header for column in table.columns] == [
        "records",
        "batches",
        "in flight",
        "retries",
        "errors",
        "records/s",
        "secs",
    ]
    assert [next(iter(column.cells)) for column in table.columns] == [
        "1,240",
        "12",
        "7 of 8",
        "3",
        "6",
        "620",
        "2.0",
    ]
    assert str(table.caption).splitlines() == [
        "lag: orders-0 100  orders-2 halted  orders-3 0",
        "halted: orders-2",
    ]


def test_the_live_table_shows_the_largest_lags_only() -> None:
    """A thousand partitions do not fit a terminal."""
    lags = {("t", partition): partition for partition in range(1000)}
    caption = str(progress_table(_status(lags=lags)).caption)
    assert caption.count("t-") == 20
    assert "t-999 999" in caption
    assert "t-0 0" not in caption


@pytest.mark.parametrize("live", [False, True])
def test_showing_progress_begins_and_ends_with_the_run(live: bool) -> None:
    """Around a run, whatever it ends with; an error goes through."""
    with pytest.raises(KeyError), Progress(_status, live):
        raise KeyError


# -- logs ---------------------------------------------------------------------------------


def test_json_logs_parse(capsys) -> None:
    """Each line is one object, whatever is in the message, with the stack in a field."""
    logs.configure("json")
    logger = logging.getLogger("transforms.read.rounds")
    logger.info("%s records, %s", 5, 'quo"te\nand a second line ü')
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["level"] == "INFO"
    assert first["logger"] == "transforms.read.rounds"
    assert first["message"] == '5 records, quo"te\nand a second line ü'
    assert first["time"].endswith("+00:00")
    assert set(first) == {"time", "level", "logger", "message"}
    assert second["level"] == "ERROR"
    assert "ValueError: bad" in second["exception"]


def test_json_logs_keep_the_facts_beside_the_message(capsys) -> None:
    """As fields; none of them takes the place of a line's own."""
    logs.configure("json")
    facts = {"topic": "orders", "offsets": [1, 2], "message": "of the function"}
    logging.getLogger("transforms").warning("failed", extra={"facts": facts})
    line = json.loads(capsys.readouterr().err)
    assert (line["topic"], line["offsets"], line["message"]) == ("orders", [1, 2], "failed")


def test_text_logs_are_lines(capsys) -> None:
    """Time, level and message; nothing on stdout."""
    logs.configure("text")
    logging.getLogger("pipeline.run.rounds").warning("something")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.rstrip().endswith("WARNING something")


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize(
    ("logger", "level", "shown"),
    [
        ("transforms.write.write", logging.INFO, True),
        ("pipeline.run.rounds", logging.INFO, True),
        ("transforms.write.write", logging.DEBUG, False),
        ("somebody.else", logging.INFO, False),
        ("somebody.else", logging.WARNING, True),
        ("apache_beam.runners", logging.ERROR, False),
        ("botocore.retries", logging.WARNING, False),
        ("librdkafka", logging.WARNING, False),
        ("librdkafka", logging.ERROR, False),
        ("librdkafka", logging.CRITICAL, True),
    ],
)
def test_what_is_shown(capsys, format, logger, level, shown) -> None:
    """Ours from INFO on, everybody else's from WARNING on, and no stack of Beam's."""
    logs.configure(format)
    logging.getLogger(logger).log(level, "a line")
    assert ("a line" in capsys.readouterr().err) is shown
