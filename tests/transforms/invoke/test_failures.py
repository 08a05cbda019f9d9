"""Failures: what is said of them, when, and what never is."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.invoke.failures import (
    FailureLog,
    Recovery,
    Trouble,
    failed,
    failure_line,
    halt_line,
    halt_log_line,
    recovery_line,
    shown,
)
from transforms.invoke.outcome import Kind, Outcome
from transforms.records import Failure, Finished, Records

A, B = ("orders", 0), ("orders", 1)


# -- when ---------------------------------------------------------------------------------


def test_the_first_failure_is_said_and_then_one_each_window() -> None:
    """With how many were held back since; each partition and error type for itself."""
    log = FailureLog(window_secs=30)
    assert log.failed(A, 0, "ValueError", 0) == 0
    assert [log.failed(A, 0, "ValueError", secs) for secs in (1, 2, 29.9)] == [None] * 3
    assert log.failed(B, 0, "ValueError", 3) == 0
    assert log.failed(A, 0, "KeyError", 3) == 0
    assert log.failed(A, 0, "ValueError", 30) == 3
    assert log.failed(A, 0, "ValueError", 31) is None
    assert log.failed(A, 0, "ValueError", 60) == 1


def test_recovery_is_said_once_with_its_time_and_its_failures() -> None:
    log = FailureLog(window_secs=30)
    for secs in (10, 12, 15):
        log.failed(A, 0, "ValueError", secs)
    assert log.succeeded(B, 0, 16) is None
    assert log.succeeded(A, 0, 17.5) == Recovery(7.5, 3, held_back=2)
    assert log.succeeded(A, 0, 18) is None


def test_who_fails_now_and_then_does_not_fill_the_log() -> None:
    """A recovery is said if its failure was; what was held back comes with what is said next."""
    log = FailureLog(window_secs=30)
    said = 0
    for tenth in range(290):
        said += log.failed(A, 0, "ValueError", tenth / 10) is not None
        said += log.succeeded(A, 0, tenth / 10 + 0.05) is not None
    assert said == 2
    assert log.succeeded(A, 0, 30) == Recovery(0.0, 0, held_back=289)
    assert log.is_quiet


def test_a_partition_has_recovered_when_none_of_its_lanes_fails() -> None:
    log = FailureLog()
    log.failed(A, 1, "ValueError", 0)
    log.failed(A, 2, "ValueError", 1)
    assert log.succeeded(A, 3, 2) is None
    assert log.succeeded(A, 1, 3) is None
    assert log.succeeded(A, 2, 4) == Recovery(4, 2, held_back=1)


def test_a_lane_that_has_left_is_not_waited_for() -> None:
    log = FailureLog()
    log.failed(A, 1, "ValueError", 0)
    log.failed(A, 2, "ValueError", 1)
    log.left(A, 1)
    assert log.succeeded(A, 2, 4) == Recovery(4, 2, held_back=1)


def test_a_halt_takes_what_was_held_back() -> None:
    log = FailureLog()
    for secs in range(4):
        log.failed(A, 0, "ValueError", secs)
    assert log.halted(A) == 3
    assert log.held_back == 0
    assert log.succeeded(A, 0, 5) is None


def test_records_given_up_unsent_are_no_outage_to_recover_from() -> None:
    log = FailureLog()
    assert log.given_up(A, "InvalidJson", 0) == 0
    assert log.given_up(A, "InvalidJson", 1) is None
    assert log.succeeded(A, 0, 2) is None
    assert log.held_back == 1


def test_a_thousand_partitions_share_a_line() -> None:
    """However many fail, and whatever a function calls its errors: memory and log stay small."""
    log = FailureLog(window_secs=30, most_keys=10)
    said = [log.failed(("orders", number), 0, "ValueError", 0) for number in range(1000)]
    said += [log.failed(A, 0, f"Error{number}", 1) for number in range(1000)]
    assert said.count(0) == 11
    assert log.keys == 11
    assert log.failed(("orders", 999), 0, "ValueError", 40) is not None


_STEPS = st.tuples(
    st.sampled_from(["failed", "failed", "given_up", "succeeded", "left", "halted"]),
    st.integers(0, 3),
    st.integers(0, 1),
    st.sampled_from("ab"),
    st.floats(0, 20),
)


@given(st.lists(_STEPS, max_size=60), st.sampled_from([1, 3, 100]))
def test_never_two_lines_in_a_window_and_no_failure_is_lost(steps, most_keys) -> None:
    """Each failure is said, told of by a later line, or still counted."""
    log = FailureLog(window_secs=30, most_keys=most_keys)
    now, happened, told = 0.0, 0, 0
    lines: dict[tuple, list[float]] = defaultdict(list)
    said_failures = said_recoveries = 0
    for what, number, lane, error_type, secs in steps:
        now += secs
        key = ("t", number)
        if what in ("failed", "given_up"):
            happened += 1
            arguments = (key, lane) if what == "failed" else (key,)
            held_back = getattr(log, what)(*arguments, error_type, now)
            if held_back is not None:
                told += 1 + held_back
                said_failures += 1
                lines[key, error_type].append(now)
        elif what == "succeeded":
            if recovery := log.succeeded(key, lane, now):
                told += recovery.held_back
                said_recoveries += 1
        elif what == "left":
            log.left(key, lane)
        else:
            told += log.halted(key)
        assert told + log.held_back == happened
        assert log.keys <= most_keys + 1
    if most_keys == 100:
        for times in lines.values():
            assert all(later - earlier >= 30 for earlier, later in pairwise(times))
    everywhere = sorted(time for times in lines.values() for time in times)
    for time in everywhere:
        assert sum(time <= other < time + 30 for other in everywhere) <= most_keys + 1
    assert said_recoveries <= 2 * said_failures


# -- what ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such item", "no such item"),
        ("two\nlines\r\t\x1b[31mred", r"two\nlines\r\t\x1b[31mred"),
        ("naïve 日本", "naïve 日本"),
        ("\u2028\u202e\ud800", r"\u2028\u202e\ud800"),
        ("x" * 501, "x" * 500 + "..."),
        ("at http://me:secret@host/x", "at http://***@host/x"),
        ("mail me@home, see http://host/", "mail me@home, see http://host/"),
    ],
)
def test_somebody_elses_text_is_one_short_line(text: str, line: str) -> None:
    assert shown(text) == line


@given(st.text(st.characters(), max_size=700))
def test_any_text_can_be_shown(text: str) -> None:
    line = shown(text)
    assert line.isprintable()
    assert len(line) <= 10 * 500 + 3
    line.encode()


def test_a_failure_says_where_what_and_what_next() -> None:
    outcome = Outcome(
        Kind.FUNCTION_ERROR,
        error_type="ValueError",
        message="no such\nitem",
        request_id="r-1",
        payload='{"secret": 1}',
        log_result="c2VjcmV0",
        body=b"secret",
    )
    failure = failed(A, [40, 41, 47], outcome, 2, at=0.0)
    assert failure_line(failure, "tried again in 3.2 s", 14) == (
        r"failed: orders-0 offsets 40 to 47: function error, ValueError: no such\nitem; attempt 2; "
        "tried again in 3.2 s; request id r-1; 14 more failed since the last such line"
    )
    assert failure.facts == {
        "topic": "orders",
        "partition": 0,
        "offsets": [40, 47],
        "kind": "function error",
        "error_type": "ValueError",
        "error_message": r"no such\nitem",
        "attempt": 2,
        "request_id": "r-1",
    }
    alone = failed(A, [40], Outcome(Kind.THROTTLED, "TooManyRequests"), 1, at=0.0)
    assert failure_line(alone, "tried again in 1.0 s", 0) == (
        "failed: orders-0 offset 40: throttled, TooManyRequests; attempt 1; tried again in 1.0 s"
    )


def test_a_halt_has_one_wording() -> None:
    records = Records([70, 72], [1, 2], [b"secret"] * 2, [b"secret"] * 2, [None, None])
    failure = Failure(
        records,
        [b"secret"] * 2,
        "RetryAttemptsExhausted",
        "ValueError",
        "no\nitem",
        3,
        200,
        "",
        request_id="r-1",
    )
    finished = Finished("orders", 2, 60, 70, halted=failure)
    line = r"halted: orders-2 at offset 70: RetryAttemptsExhausted, ValueError: no\nitem"
    assert halt_line(finished) == line
    assert halt_log_line(finished, 4) == (
        f"{line}; attempt 3; request id r-1; failures not logged before: 4; nothing from "
        "there on is committed, the other partitions go on"
    )


@pytest.mark.parametrize(
    ("recovery", "line"),
    [
        (
            Recovery(12.34, 1, 0),
            "recovered: orders-0 is answered again after 12.3 s and 1 failed invocation",
        ),
        (
            Recovery(12.34, 17, 15),
            "recovered: orders-0 is answered again after 12.3 s and 17 failed invocations; "
            "failures not logged before: 15",
        ),
        (
            Recovery(0, 0, 15),
            "recovered: orders-0 is answered again; failures not logged before: 15",
        ),
    ],
)
def test_a_recovery_says_after_what(recovery: Recovery, line: str) -> None:
    assert recovery_line(A, recovery) == line


def test_the_troubles_of_processes_are_joined() -> None:
    """The last error is the latest, the age that of the oldest."""
    outcome = Outcome(Kind.TRANSIENT, "Timeout")
    early, late = (failed(A, [1], outcome, 1, at=at) for at in (5.0, 9.0))
    troubles = [Trouble(late, [], 3.0), Trouble(None, [], None), Trouble(early, [], 8.0)]
    assert Trouble.join(troubles) == Trouble(late, [], 8.0)
    assert Trouble.join([]) == Trouble(stuck=[])
