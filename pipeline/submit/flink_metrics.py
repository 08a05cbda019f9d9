"""Flink metrics: what a running job counts, asked of the JobManager's REST API.

Beam's own answer for a job on Flink comes at its end only. Flink counts anew when it restarts a
job's tasks, so these are the numbers since then.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

_TIMEOUT_SECS = 5.0
_STEPS = ("read", "filter", "batch", "invoke", "write", "commit")
# Whatever scope stands before it, a metric ends with Beam's namespace and name.
_METRIC = re.compile(rf"(?:^|\.)({'|'.join(_STEPS)})_([a-z_]+)$")
# So many characters of names in one address; servers take some thousands.
_QUERY_CHARACTERS = 3000

IN_FLIGHT = "invoke.in_flight"
OLDEST_AGE_SECS = "invoke.oldest_age_secs"
_GAUGES = frozenset({IN_FLIGHT, OLDEST_AGE_SECS})

Get = Callable[[str], Any]


def metric_name(id: str) -> str | None:
    """Beam's name of one of our metrics, of the name that Flink gives it. Pure."""
    found = _METRIC.search(id)
    return f"{found[1]}.{found[2]}" if found else None


def queries(ids: Iterable[str]) -> list[list[str]]:
    """Metrics as they fit into one question each. Pure."""
    groups: list[list[str]] = [[]]
    size = 0
    for id in ids:
        length = len(urllib.parse.quote(id, safe="")) + 1
        if groups[-1] and size + length > _QUERY_CHARACTERS:
            groups.append([])
            size = 0
        groups[-1].append(id)
        size += length
    return [group for group in groups if group]


def get_json(address: str) -> Get:
    """Asks the API at host:port. Raises OSError or ValueError if there is no answer."""
    # Not by the proxy of the environment, which is for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(path: str) -> Any:
        with opener.open(f"http://{address}{path}", timeout=_TIMEOUT_SECS) as answer:
            return json.loads(answer.read())

    return get


def job_counters(get: Get, beam_name: str) -> Counter[str] | None:
    """What a job has counted, summed over its subtasks; None if there is no such job.

    Args:
        get: Asks the API.
        beam_name: Beam's id of the job, which begins with the job's name.

    Raises:
        OSError: There is no answer.
        ValueError: It is not what was asked for.
    """
    jobs = [job for job in get("/jobs/overview")["jobs"] if beam_name.startswith(f"{job['name']}_")]
    if not jobs:
        return None
    job = max(jobs, key=lambda each: int(each["start-time"]))["jid"]
    counters: Counter[str] = Counter()
    for task in get(f"/jobs/{job}")["vertices"]:
        path = f"/jobs/{job}/vertices/{task['id']}/subtasks/metrics"
        ids = [metric["id"] for metric in get(path)]
        for group in queries(id for id in ids if metric_name(id)):
            asked = ",".join(urllib.parse.quote(id, safe="") for id in group)
            for metric in get(f"{path}?get={asked}&agg=sum,max"):
                name = metric_name(metric["id"])
                if name in _GAUGES:
                    # Each subtask tells the same number, that of its process; the oldest counts.
                    counters[name] = max(counters[name], int(metric["max"]))
                elif name:
                    counters[name] += int(metric["sum"])
    return counters
