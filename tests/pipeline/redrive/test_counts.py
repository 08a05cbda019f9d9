"""Counts: what a redrive found."""

from __future__ import annotations

from pipeline.redrive.counts import Counts
from tests.error_records import error_record, original


def test_counts_for_people_and_programs() -> None:
    """The same numbers in both."""
    counts = Counts()
    counts.take(error_record(0), [original(1), original(2)])
    counts.take(error_record(1, condition="InvalidReply"), [original(1, partition=4)])
    counts.left["not_selected"] = 2
    facts = counts.facts()
    assert (facts["error_records"], facts["records"]) == (2, 3)
    assert facts["conditions"]["InvalidReply"] == {"error_records": 1, "records": 1}
    assert facts["error_types"] == {"ValueError": {"error_records": 2, "records": 3}}
    assert facts["partitions"]["orders-0"] == {"error_records": 1, "records": 2}
    text = counts.text()
    assert "error records: 2, records in them: 3" in text
    assert "left where they are: not selected: 2" in text
    assert "left where they are: none" in Counts().text()
