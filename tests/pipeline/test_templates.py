"""The templates parse, and fit the program they start."""

from __future__ import annotations

import re
import shlex
import stat
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.options.resolve import parse_arguments
from tests import ROOT
from transforms.kafka.client import KafkaConfig, client_settings, make_consumer, make_producer
from transforms.properties import parse_properties

DIRECT = ROOT / "templates" / "direct"
PROPERTIES = DIRECT / "kafka.properties"
MOUNTED = "/etc/beam-lambda-sink/kafka.properties"

ENVIRONMENT = {"KAFKA_USERNAME": "someone", "KAFKA_PASSWORD": "a=secret"}

# What an end takes behind --function_timeout_secs: see pipeline.run.rounds.
DRAIN_SECS = 10


class _StrictLoader(yaml.SafeLoader):
    """Refuses a name that is there twice, where YAML would take the last one."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [loader.construct_object(name) for name, _ in node.value]
    assert len(set(names)) == len(names), f"twice in {names}"
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@pytest.fixture
def deployment() -> dict[str, Any]:
    with (DIRECT / "deployment.yaml").open(encoding="utf-8") as file:
        return yaml.load(file, _StrictLoader)


def _documents(name: str) -> list[dict[str, Any]]:
    with (DIRECT / name).open(encoding="utf-8") as file:
        return list(yaml.load_all(file, _StrictLoader))


def _unit(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, strict=True, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    with (DIRECT / name).open(encoding="utf-8") as file:
        parser.read_file(file)
    return parser


def _check_arguments(arguments: list[str], stop_secs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken together as the program does, with this folder's file where it will be mounted."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert f"--kafka_config_file={MOUNTED}" in arguments
    here = [argument.replace(MOUNTED, str(PROPERTIES)) for argument in arguments]
    config, runner = parse_arguments(here)
    assert runner == "DirectRunner"
    assert stop_secs > config.invoke.function.timeout_secs + DRAIN_SECS
    assert config.run.until == "forever"


@pytest.mark.parametrize("name", ["beam-lambda-sink.service", "beam-lambda-sink@.service"])
def test_the_unit_fits_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = _unit(name)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"].replace("\\\n", " "))
    assert Path(program).is_absolute() and Path(program).name == "beam-lambda-sink"
    # systemd would replace them.
    assert not set("%$") & set(service["ExecStart"])
    _check_arguments(arguments, int(service["TimeoutStopSec"]), monkeypatch)
    assert service["KillSignal"] == "SIGTERM"
    # What another start would not mend: pipeline.cli.
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]


def test_the_deployment_fits_the_program(
    deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    spec = deployment["spec"]
    # Who has partitions gives them up only when another is there.
    assert spec["replicas"] == 2
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    _check_arguments(container["args"], pod["terminationGracePeriodSeconds"], monkeypatch)


def test_the_units_differ_in_the_instance_only() -> None:
    one, several = _unit("beam-lambda-sink.service"), _unit("beam-lambda-sink@.service")
    instance = several["Service"].pop("Environment")
    assert several["Unit"].pop("Description") == one["Unit"].pop("Description") + ", instance %i"
    assert one == several
    name, value = instance.split("=")
    assert "%i" in value
    properties = PROPERTIES.read_text(encoding="utf-8")
    assert f"#group.instance.id=${{env:{name}}}" in properties
    settings = parse_properties(
        properties.replace("#group.instance", "group.instance"), ENVIRONMENT | {name: "m-1"}
    )
    assert settings["group.instance.id"] == "m-1"


def test_what_scales_fits_the_deployment(deployment: dict[str, Any]) -> None:
    """And the options that it has of the group."""
    name = deployment["metadata"]["name"]
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    given = dict(each.removeprefix("--").partition("=")[::2] for each in container["args"])
    (budget,) = _documents("disruption-budget.yaml")
    assert (budget["apiVersion"], budget["kind"]) == ("policy/v1", "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1 < deployment["spec"]["replicas"]
    assert budget["spec"]["selector"] == deployment["spec"]["selector"]

    (scaler,) = _documents("autoscaler.yaml")
    assert (scaler["apiVersion"], scaler["kind"]) == ("autoscaling/v2", "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": name,
    }
    (metric,) = scaler["spec"]["metrics"]
    # A share of what is requested, so that has to be there.
    assert metric["resource"]["name"] in container["resources"]["requests"]
    assert scaler["spec"]["minReplicas"] == deployment["spec"]["replicas"]

    login, scaled = _documents("keda.yaml")
    assert [each["kind"] for each in (login, scaled)] == ["TriggerAuthentication", "ScaledObject"]
    assert scaled["spec"]["scaleTargetRef"] == {"name": name}
    (environment,) = container["envFrom"]
    for each in login["spec"]["secretTargetRef"]:
        assert each["name"] == environment["secretRef"]["name"]
        assert each["key"] in ENVIRONMENT
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"]["name"] == login["metadata"]["name"]
    facts = trigger["metadata"]
    assert facts["bootstrapServers"] == given["kafka_bootstrap_servers"]
    assert facts["consumerGroup"] == given["consumer_group"]
    assert facts["topic"] == given["topics"]
    assert "starting_position" not in given and facts["offsetResetPolicy"] == "earliest"
    settings = parse_properties(PROPERTIES.read_text(encoding="utf-8"), ENVIRONMENT)
    assert (
        settings["sasl.mechanisms"].replace("-", "_").replace("SHA_", "SHA").lower()
        == (facts["sasl"])
    )
    assert settings["security.protocol"] == "SASL_SSL" and facts["tls"] == "enable"


def test_the_parts_of_the_deployment_fit_each_other(deployment: dict[str, Any]) -> None:
    """Labels, volumes, and the Secrets that templates/README.md says how to make."""
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    assert mount["mountPath"] == str(Path(MOUNTED).parent)
    assert volume["secret"]["defaultMode"] == stat.S_IRUSR | stat.S_IRGRP

    readme = (DIRECT.parent / "README.md").read_text(encoding="utf-8")
    made = re.findall(r"create (?:secret generic|serviceaccount) (\S+)", readme)
    (environment,) = container["envFrom"]
    assert set(made) == {
        environment["secretRef"]["name"],
        volume["secret"]["secretName"],
        pod["serviceAccountName"],
    }
    assert set(re.findall(r"--from-literal=(\w+)=", readme)) == set(ENVIRONMENT)


def test_the_properties_need_just_the_environment_that_is_given() -> None:
    text = PROPERTIES.read_text(encoding="utf-8")
    settings = parse_properties(text, ENVIRONMENT)
    assert settings["sasl.username"] == "someone"
    assert settings["sasl.password"] == "a=secret"
    assert set(re.findall(r"\$\{env:(\w+)\}", text)) - {"NAME", "INSTANCE"} == set(ENVIRONMENT)


def test_librdkafka_takes_the_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # Nobody listens there; a client is made without a connection.
    config = KafkaConfig("127.0.0.1:1", "group", str(PROPERTIES))
    make_consumer(config).close()
    for prefix in ("response.", "error."):
        settings = client_settings(config, prefix)
        assert settings["compression.type"] == "lz4"
        make_producer(settings)
