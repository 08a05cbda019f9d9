"""Helm's own engine, in a process of its own: it is Go, and our tests fork.

Standard input has a list of jobs as JSON, each values and what to do with them; standard output has
what came of each: rendered files, or the error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RELEASE, NAMESPACE = "orders", "sinks"


def run(chart: Path, *jobs: dict[str, Any]) -> list[Any]:
    """Render a chart, once with each of these values: files by path, or a text if it is refused."""
    ended = subprocess.run(
        [sys.executable, __file__, str(chart)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    found: list[Any] = json.loads(ended.stdout)
    return found


def lint(chart: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    """What Helm has to say against a chart with these values."""
    (found,) = run(chart, {"lint": True, "values": values})
    return list(found)


def _do(helm: Any, path: str, job: dict[str, Any]) -> Any:
    values = job["values"]
    if job.get("lint"):
        return helm.lint(path, values, strict=True, namespace=NAMESPACE)["messages"]
    try:
        with helm.Chart.load(path) as chart:
            chart.validate_schema(values)
            return chart.render(values, name=RELEASE, namespace=NAMESPACE)
    except helm.HelmError as error:
        return str(error)


def _main() -> None:
    import helm_python

    jobs = json.load(sys.stdin)
    json.dump([_do(helm_python, sys.argv[1], job) for job in jobs], sys.stdout)


if __name__ == "__main__":
    _main()
