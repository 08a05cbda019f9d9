"""API: liveness, readiness, and what is shown of a run, which is never a record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.run.status import PartitionView, Status
from pipeline.watch import site
from pipeline.watch.about import About
from pipeline.watch.api import facts_of, live, partitions_of, ready, state_word
from pipeline.watch.history import MOST, NAMES, quantile, sample
from tests.pipeline.watch.test_metrics import NOTHING, _many
from tests.pipeline.watch.test_progress import _halted
from transforms.invoke.failures import Failed, Seen, Stuck, Trouble
from transforms.tally import Histogram, Tallied

ABOUT = About("g", "f", configuration=(("topics", "orders", "command line"),))
RUNNING = replace(NOTHING, begun=True, lags={("orders", 2): 3}, committed={("orders", 2): 70})


@pytest.mark.parametrize(
    ("changes", "is_live", "is_ready", "word"),
    [
        ({"begun": False}, True, False, "starting"),
        ({}, True, True, "running"),
        ({"still_secs": 119.0}, True, True, "running"),
        ({"still_secs": 121.0}, False, True, "running"),
        ({"breaker_open": True}, True, True, "breaker open"),
        ({"halted": [_halted()]}, True, True, "halted 1 of 1"),
        ({"paused": True}, True, True, "paused"),
        ({"draining": True}, True, False, "draining"),
    ],
)
def test_liveness_and_readiness(
    changes: dict[str, object], is_live: bool, is_ready: bool, word: str
) -> None:
    """A loop that stands still is restarted; a halt, a pause and an outage are no reason to be."""
    status = replace(RUNNING, **changes)  # type: ignore[arg-type]
    assert (live(status)[0], ready(status)[0], state_word(status)) == (is_live, is_ready, word)
    json.dumps([live(status)[1], ready(status)[1]])


def _troubled() -> Status:
    failed = Failed("orders", 0, 1, 2, "function error", "E", "s3cret of a record", 3, 9.0, "id")
    trouble = Trouble(
        failed,
        [Stuck("orders", 0, "backoff", 99.0, "E", 3, 9.0)],
        errors=(Seen("E", 1, 9.0, failed),),
        halted_at={("orders", 2): 5.0},
    )
    halted = _halted(message="s3cret of a record")
    lags = {("orders", 0): 1, ("orders", 2): 3}
    return replace(RUNNING, lags=lags, trouble=trouble, halted=[halted])


def test_messages_are_shown_only_if_that_was_asked_for() -> None:
    """A function may quote a record in its message."""
    shown = json.dumps(facts_of(_troubled(), ABOUT))
    assert "s3cret" not in shown
    assert "secret" not in shown.lower()
    with_messages = json.dumps(facts_of(_troubled(), replace(ABOUT, page_show="messages")))
    assert with_messages.count("s3cret of a record") == 3


def test_a_row_has_four_offsets_and_what_is_waited_for() -> None:
    view = PartitionView("reading", 10, 9, 8, 1, 100)
    status = replace(_troubled(), partitions={("orders", 0): view})
    first, second = partitions_of(status)
    assert [first[name] for name in ("end", "read", "processed", "committed")] == [10, 9, 8, None]
    assert (first["state"], first["waits_for"], first["attempt"]) == ("backing_off", "backoff", 3)
    assert first["next_try"].startswith("1970-01-01T00:01:39")
    # Without more than a job elsewhere tells.
    assert (second["state"], second["end"], second["committed"]) == ("halted", 73, 70)


def test_how_to_go_on_depends_on_whether_it_can_be_told() -> None:
    (halt,) = facts_of(_troubled(), ABOUT)["halted"]
    assert "--on_error=log" in halt["go_on"][0]
    (halt,) = facts_of(_troubled(), replace(ABOUT, has_hands=True))["halted"]
    assert halt["go_on"][1].endswith("ctl skip --partition=orders-2 --offset=70")


def test_the_page_has_the_worst_first_and_not_all() -> None:
    facts = site.worst(facts_of(_many(300), ABOUT))
    assert (len(facts["partitions"]), facts["partition_count"]) == (50, 300)
    assert {row["state"] for row in facts["partitions"]} == {"halted"}
    assert len(facts["halted"]) == 100


def test_a_report_holds_hostile_text_as_text() -> None:
    """Whatever a topic, a group or an error is called."""
    hostile = "</script><script>alert(1)</script><!--"
    failed = Failed(hostile, 0, 1, 2, hostile, hostile, hostile, 3, 9.0, hostile)
    trouble = Trouble(failed, errors=(Seen(hostile, 1, 9.0, failed),))
    about = replace(ABOUT, group=hostile, page_show="messages")
    page = site.report(replace(RUNNING, trouble=trouble), about, [])
    assert "alert(1)</script>" not in page
    data = page.partition('id="data">')[2].partition("</script>")[0]
    facts = json.loads(data)["facts"]
    assert facts["group"] == hostile
    assert facts["errors"][0]["error_type"] == hostile
    assert "unsafe-inline" not in page
    assert 'src="' not in page


# -- history -------------------------------------------------------------------------------


def test_a_sample_is_what_happened_since_the_one_before() -> None:
    counts = {("polled", ("orders",)): 50.0}
    durations = Histogram((0, 0, 10, *([0] * 14)), 0.2)
    tallied = Tallied({("invocations", ("success",)): 10}, {("duration", ("success",)): durations})
    now = replace(_many(2), books=Tallied(counts), tallied=tallied, in_flight=3, limit=8)
    taken = dict(zip(NAMES, sample(NOTHING, now, 2.0, 5.0)))
    assert (taken["lag"], taken["lag_max"], taken["records_in"]) == (14, 7, 25)
    assert (taken["in_flight"], taken["limit"]) == (3, 8)
    assert taken["outcome_success"] == 5
    assert 0.01 < taken["p50"] < taken["p99"] <= 0.025
    assert dict(zip(NAMES, sample(now, now, 1.0, 6.0)))["p50"] is None
    assert MOST == 900


def test_quantiles() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile(Histogram((0, 0, 0, 0), 0), bounds, 0.5) is None
    assert quantile(Histogram((10, 0, 0, 0), 0), bounds, 0.5) == 0.5
    assert quantile(Histogram((0, 0, 10, 0), 0), bounds, 0.5) == 3.0
    assert quantile(Histogram((0, 0, 0, 5), 0), bounds, 0.5) == 4.0
    assert quantile(Histogram((5, 5, 0, 0), 0), bounds, 0.99) == pytest.approx(1.98)
