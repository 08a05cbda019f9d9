"""Selection: what is read of error records, and which of them are taken."""

from __future__ import annotations

from typing import Any

import pytest

from tests.error_records import error_record
from transforms.original import ORIGINAL_HEADER, encode_originals
from transforms.records import NO_TIMESTAMP, RecordChunk, Records
from transforms.redrive.ledger import to_chunk
from transforms.redrive.selection import (
    Selection,
    error_records,
    read_originals,
)


def test_what_is_read_of_an_error_record() -> None:
    """Its facts, and its originals byte for byte."""
    records = Records(
        [7, 9],
        [1000, NO_TIMESTAMP],
        [b"\xff", None],
        [None, b"{}"],
        [[("a", b"1"), ("a", None)], None],
    )
    headers = [
        ("lambda.condition", b"InvalidReply"),
        ("lambda.error.type", b"TypeError"),
        *((ORIGINAL_HEADER, data) for data in encode_originals("orders", 3, records)),
        ("other", None),
    ]
    chunk = RecordChunk("errors", 2, 5, 6, Records([5], [77], [None], [b"x"], [headers]))
    (found,) = error_records(chunk)
    assert (found.partition, found.offset, found.timestamp_ms) == (2, 5, 77)
    assert (found.condition, found.error_type) == ("InvalidReply", "TypeError")

    originals = read_originals(found)
    assert originals
    again = to_chunk(("orders", 3), originals)
    assert (again.start, again.next_offset, again.first) == (7, 10, True)
    assert [list(column) for column in again.records._columns()[:5]] == [
        list(column) for column in records._columns()[:5]
    ]


@pytest.mark.parametrize(
    "headers",
    [
        None,
        [],
        [("lambda.condition", b"\xff")],
        [(ORIGINAL_HEADER, b"")],
        [(ORIGINAL_HEADER, None)],
        [(ORIGINAL_HEADER, b"text of somebody else")],
        [(ORIGINAL_HEADER, b"\xff" * 30)],
    ],
)
def test_an_error_record_without_originals(headers: Any) -> None:
    """Somebody else's, or broken: it is no reason to fail."""
    chunk = RecordChunk("errors", 0, 0, 1, Records([0], [0], [None], [None], [headers]))
    (found,) = error_records(chunk)
    assert read_originals(found) is None


@pytest.mark.parametrize(
    ("selection", "taken"),
    [
        (Selection(), True),
        (Selection(since_ms=1000), True),
        (Selection(since_ms=1001), False),
        (Selection(conditions=("RetryAttemptsExhausted", "x")), True),
        (Selection(conditions=("x",)), False),
        (Selection(error_types=("ValueError",)), True),
        (Selection(error_types=("TypeError",)), False),
        (Selection(conditions=("RetryAttemptsExhausted",), error_types=("TypeError",)), False),
    ],
)
def test_which_error_records_are_selected(selection: Selection, taken: bool) -> None:
    """All that is asked for has to hold."""
    assert selection.takes(error_record(0)) is taken
