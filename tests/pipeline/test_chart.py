"""The Helm chart, by Helm's own engine: what it makes is valid, and the program takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipeline.options.chart import LEFT_OUT
from pipeline.options.declare import OPTIONS
from pipeline.options.resolve import parse_arguments
from pipeline.watch.about import version
from tests import ROOT, helm
from tests.pipeline.options.given import TOKEN
from tests.pipeline.test_templates import DIRECT, DRAIN_SECS, MOUNTED, _StrictLoader

CHART = ROOT / "templates" / "helm"
MONITORING = ROOT / "templates" / "monitoring"
LEAST = {
    "kafka_bootstrap_servers": "broker:9092",
    "consumer_group": "g",
    "function": "f",
    "topics": "orders",
}
NAME = f"{helm.RELEASE}-beam-lambda-sink"
# Kinds of operators, which Kubernetes' own schemas do not have.
CUSTOM = ("PodMonitor", "PrometheusRule")


def _values(name: str) -> dict[str, Any]:
    return dict(yaml.load((CHART / "ci" / f"{name}-values.yaml").read_text(), _StrictLoader))


def _documents(files: Any) -> dict[str, dict[str, Any]]:
    """What was rendered, by kind."""
    assert isinstance(files, dict), files
    found = {}
    for path, text in files.items():
        for document in yaml.load_all(text, _StrictLoader) if path.endswith(".yaml") else ():
            if document:
                assert document["kind"] not in found
                found[document["kind"]] = document
    return found


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    """What Helm makes of each file of values in ci/, and of the least that there is."""
    jobs = {"deployment": _values("deployment"), "all": _values("all"), "least": {"config": LEAST}}
    found = helm.run(CHART, *({"values": values} for values in jobs.values()))
    return {name: _documents(files) for name, files in zip(jobs, found)}


def _container(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("name", ["deployment", "all", "least"])
def test_what_is_rendered_is_valid(rendered: dict[str, Any], name: str) -> None:
    """By Kubernetes' own schemas; each has the labels by which it is found."""
    for kind, document in rendered[name].items():
        if kind not in CUSTOM:
            version = kubernetes_validate.latest_version()
            kubernetes_validate.validate(document, version, strict=True)
        assert document["metadata"]["name"].startswith(NAME)
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == helm.RELEASE
    kinds = {"Deployment", "ServiceAccount", "PodDisruptionBudget"}
    if name == "all":
        kinds |= {"Secret", "Service", "Ingress", "HorizontalPodAutoscaler", "ConfigMap", *CUSTOM}
    assert set(rendered[name]) == kinds


@pytest.mark.parametrize("name", ["deployment", "all", "least"])
def test_the_program_takes_the_arguments(
    rendered: dict[str, Any], name: str, tmp_path: Path
) -> None:
    deployment = rendered[name]["Deployment"]
    file = tmp_path / "kafka.properties"
    file.write_text("")
    arguments = [
        each.replace(MOUNTED, str(file)).replace("/run/secrets/beam-lambda-sink/token", TOKEN)
        for each in _container(deployment)["args"]
    ]
    config, runner = parse_arguments(arguments)
    assert runner == "DirectRunner"
    assert config.run.http and config.run.http[0] == "0.0.0.0"
    pod = deployment["spec"]["template"]["spec"]
    stop_secs = pod["terminationGracePeriodSeconds"]
    assert stop_secs > config.invoke.function.timeout_secs + DRAIN_SECS
    if name == "all":
        assert config.source.topics == ("orders", "bills.2")
        assert config.kafka.group == "a: group"
        assert (config.batch.max_bytes, config.read.batch_window_secs) == (1_000_000, 0.25)
        assert (config.invoke.policy.max_retries, config.run.preflight) == (-1, False)
        assert config.run.http_token


def test_it_makes_the_deployment_that_stands_beside_it(rendered: dict[str, Any]) -> None:
    """The same copies, probes, limits and arguments as without Helm."""
    made = rendered["deployment"]["Deployment"]["spec"]
    with (DIRECT / "deployment.yaml").open(encoding="utf-8") as opened:
        plain = yaml.load(opened, _StrictLoader)["spec"]
    ours, theirs = (_container({"spec": spec}) for spec in (made, plain))
    arguments = {each.removesuffix("=true") for each in ours.pop("args")}
    assert arguments == set(theirs.pop("args"))
    assert ours.pop("imagePullPolicy") == "IfNotPresent"
    assert ours == theirs
    for spec in (made, plain):
        for part in (spec, spec["template"]):
            part.pop("metadata", None)
        spec.pop("selector")
        spec["template"]["spec"].pop("containers")
        spec["template"]["spec"].pop("serviceAccountName")
    assert made == plain


def test_the_parts_find_each_other(rendered: dict[str, Any]) -> None:
    found = rendered["all"]
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == found["Deployment"]["metadata"]["name"]
    assert "replicas" not in found["Deployment"]["spec"]
    volumes = {each["name"]: each["secret"] for each in pod["spec"]["volumes"]}
    assert volumes["kafka"]["secretName"] == found["Secret"]["metadata"]["name"]
    assert found["Secret"]["stringData"]["kafka.properties"] == _values("all")["kafkaProperties"]
    assert pod["spec"]["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    (rule,) = found["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"]["name"] == found["Service"]["metadata"]["name"]
    (endpoint,) = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in _container(found["Deployment"])["ports"]]


def test_alerts_and_dashboard_are_those_beside_it(rendered: dict[str, Any]) -> None:
    """To the letter: what Prometheus and Grafana replace, Helm leaves as it is."""
    found = rendered["all"]
    with (MONITORING / "prometheusrule.yaml").open(encoding="utf-8") as opened:
        assert found["PrometheusRule"]["spec"] == yaml.load(opened, _StrictLoader)["spec"]
    with (MONITORING / "podmonitor.yaml").open(encoding="utf-8") as opened:
        monitor = yaml.load(opened, _StrictLoader)["spec"]
    ours = found["PodMonitor"]["spec"]
    assert ours["podMetricsEndpoints"] == monitor["podMetricsEndpoints"]
    (text,) = found["ConfigMap"]["data"].values()
    assert json.loads(text) == json.loads((MONITORING / "dashboard.json").read_text("utf-8"))
    assert found["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_helm_has_nothing_against_it() -> None:
    found = helm.lint(CHART, _values("all"))
    assert [each for each in found if "icon is recommended" not in each["error"]] == []


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "config"),
    ({"config": {}}, "kafka_bootstrap_servers"),
    ({"config": LEAST | {"topics_regex": "o.*"}}, "oneOf"),
    ({"config": LEAST | {"batch_sise": 5}}, "batch_sise"),
    ({"config": LEAST | {"batch_size": 0}}, "batch_size"),
    ({"config": LEAST | {"batch_size": "5"}}, "batch_size"),
    ({"config": LEAST | {"on_error": "explode"}}, "on_error"),
    ({"config": LEAST | {"max_retries": -2}}, "max_retries"),
    ({"config": LEAST | {"response_topic": "no topic"}}, "response_topic"),
    ({"config": LEAST | {"http": "9464"}}, "http"),
    ({"config": LEAST, "replicas": 3}, "replicas"),
    ({"config": LEAST, "http": {"port": 70000}}, "port"),
    ({"config": LEAST, "image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
)


def test_values_that_do_not_fit_are_refused() -> None:
    """Before anything is rendered, with the name that is wrong."""
    found = helm.run(CHART, *({"values": values} for values, _ in REFUSED))
    for (values, part), said in zip(REFUSED, found):
        assert isinstance(said, str), f"{values} is rendered"
        assert part in said


def test_it_has_the_options_and_the_version() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert set(schema["properties"]["config"]["properties"]) == set(OPTIONS) - set(LEFT_OUT)
    values = yaml.load((CHART / "values.yaml").read_text("utf-8"), _StrictLoader)
    assert set(schema["properties"]) - {"global"} == set(values)
    chart = yaml.load((CHART / "Chart.yaml").read_text("utf-8"), _StrictLoader)
    assert chart["version"] == chart["appVersion"] == version()
