"""Alerts and dashboard: each metric in them exists, and Prometheus' grammar reads each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml

from pipeline.watch.about import About
from pipeline.watch.metrics import families
from tests import ROOT
from tests.pipeline.test_templates import _StrictLoader
from tests.pipeline.watch.test_metrics import _labelled

FOLDER = ROOT / "templates" / "monitoring"
LABELS = {"job", "namespace", "pod", "instance", "le"}
"""What Prometheus and Kubernetes add, and a histogram's buckets."""


def _yaml(name: str) -> Any:
    with (FOLDER / name).open(encoding="utf-8") as file:
        return yaml.load(file, _StrictLoader)


def _dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))


def _expressions() -> Iterator[str]:
    for group in _yaml("prometheusrule.yaml")["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in _dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def _known() -> dict[str, set[str]]:
    """Labels of each series that a run may have."""
    known: dict[str, set[str]] = {"up": {"job"}, "process_resident_memory_bytes": {"job"}}
    for family in families(_labelled(), About("g", "f", topics=("orders",))):
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    return known


def _selectors(node: Any) -> Iterator[Any]:
    """Each selector in an expression, wherever in it."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    for name in ("expr", "lhs", "rhs", "param"):
        if (inner := getattr(node, name, None)) is not None:
            yield from _selectors(inner)
    for inner in getattr(node, "args", None) or ():
        yield from _selectors(inner)


@pytest.mark.parametrize("expression", sorted(set(_expressions())))
def test_an_expression_is_about_what_there_is(expression: str) -> None:
    text = expression.replace("$__rate_interval", "5m")
    known = _known()
    selectors = list(_selectors(promql_parser.parse(text)))
    assert selectors, expression
    for selector in selectors:
        labels = known[selector.name] | LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
    for grouped in re.findall(r"by \(([\w, ]+)\)", text):
        labels = LABELS.union(*(known[selector.name] for selector in selectors))
        assert set(grouped.split(", ")) <= labels


def test_the_alerts_are_all_described() -> None:
    """Each has a summary, a severity, and a first look in the docs."""
    (group,) = _yaml("prometheusrule.yaml")["spec"]["groups"]
    docs = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    for rule in group["rules"]:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["alert"] in docs


def test_the_pod_monitor_finds_the_deployment() -> None:
    spec = _yaml("podmonitor.yaml")["spec"]
    with (ROOT / "templates" / "direct" / "deployment.yaml").open(encoding="utf-8") as file:
        pod = yaml.load(file, _StrictLoader)["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]


def test_the_dashboard_is_one() -> None:
    """What Grafana asks of a dashboard of this schema, as far as it can be seen in it."""
    dashboard = _dashboard()
    assert dashboard["schemaVersion"] == 39
    assert dashboard["uid"] == "beam-lambda-sink"
    assert "id" not in dashboard
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] in ("stat", "timeseries", "table")
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__rate_interval"} == variables.keys()
    known = _known()
    for each in variables.values():
        if each["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", each["definition"]
            ).groups()  # type: ignore[union-attr]
            assert label in known[metric] | LABELS
