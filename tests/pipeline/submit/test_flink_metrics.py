"""What a running job counts, asked of something that answers as a JobManager does."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.submit.flink_metrics import job_counters, metric_name, queries


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("[3]{Invoke__Write__Commit}.invoke_in_flight", "invoke.in_flight"),
        ("0.[2]{Batch__Invoke}.batch_batch_records", "batch.batch_records"),
        ("write_responses", "write.responses"),
        ("[3]{Invoke__Write__Commit}.rewrite_responses", None),
        ("numRecordsIn", None),
        ("[1]Commit/CommitPartition.currentInputWatermark", None),
    ],
)
def test_our_metrics_are_known_by_their_ends(id: str, name: str | None) -> None:
    assert metric_name(id) == name


@given(st.lists(st.text(min_size=1, max_size=400), max_size=40))
def test_questions_are_short_and_leave_nothing_out(ids: list[str]) -> None:
    groups = queries(ids)
    assert [id for group in groups for id in group] == ids
    assert all(len(group) == 1 or sum(map(len, group)) <= 3000 for group in groups)


class JobManager:
    """Two tasks, and jobs of the same name, of which the older one has ended."""

    METRICS = {
        "t1": {"[2]{Read}.read_records": (70, 40), "numRecordsIn": (9, 9)},
        "t2": {
            "[3]{Invoke}.invoke_invocations": (7, 4),
            "[3]{Invoke}.invoke_in_flight": (6, 3),
            "[3]{Invoke}.invoke_oldest_age_secs": (80, 50),
            "[4]{Write}.write_responses": (60, 40),
        },
    }

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, path: str) -> Any:
        self.asked.append(path)
        if path == "/jobs/overview":
            return {
                "jobs": [
                    {"jid": "old", "name": "orders", "start-time": 1},
                    {"jid": "new", "name": "orders", "start-time": 2},
                    {"jid": "other", "name": "payments", "start-time": 3},
                ]
            }
        if path == "/jobs/new":
            return {"vertices": [{"id": task} for task in self.METRICS]}
        task = path.split("/")[4]
        metrics = self.METRICS[task]
        _, _, query = path.partition("?get=")
        if not query:
            return [{"id": id} for id in metrics]
        ids = [unquote(id) for id in query.removesuffix("&agg=sum,max").split(",")]
        return [
            {"id": id, "sum": float(metrics[id][0]), "max": float(metrics[id][1])} for id in ids
        ]


def test_counters_are_summed_and_what_runs_is_not() -> None:
    """Each subtask tells of its process's calls in flight: that is one number, not several."""
    manager = JobManager()
    assert job_counters(manager, "orders_5b3e") == {
        "read.records": 70,
        "invoke.invocations": 7,
        "invoke.in_flight": 3,
        "invoke.oldest_age_secs": 50,
        "write.responses": 60,
    }
    assert not any("numRecordsIn" in path for path in manager.asked)


def test_a_job_that_is_not_there_has_none() -> None:
    assert job_counters(JobManager(), "orders-2_5b3e") is None
