"""The templates for Flink, and the page on it, fit one another, the program and the schemas."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml
from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions
from apache_beam.runners.portability.flink_runner import FlinkJarJobServer
from apache_beam.transforms.environments import python_sdk_dependencies

from pipeline.local import flink
from pipeline.local.flink import FlinkRest
from pipeline.local.jars import cache_folder, fetch_with_maven
from pipeline.options.resolve import Resolved, resolve
from pipeline.submit.streaming import FLINK_CONF, runner_options
from tests import ROOT, dockerfile
from tests.pipeline.test_docs import blocks, codes, rows
from tests.pipeline.test_templates import _StrictLoader
from transforms.invoke import invoke
from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.properties import parse_properties

FLINK = ROOT / "templates" / "flink"
README = FLINK / "README.md"
PAGE = ROOT / "docs" / "flink.md"
DOCKERFILE = (FLINK / "Dockerfile").read_text(encoding="utf-8")
BEAM = importlib.metadata.version("apache-beam")

# The oldest with sidecars, and the newest there is a schema for.
KUBERNETES = ("1.29", kubernetes_validate.latest_version())
OPERATOR = "org.apache.flink:flink-kubernetes-operator-api:1.10.0"

MOUNTED = "/etc/beam-lambda-sink/kafka.properties"
ENVIRONMENT = {"KAFKA_USERNAME": "someone", "KAFKA_PASSWORD": "a=secret"}

Manifest = dict[str, Any]


def _load(name: str) -> list[Manifest]:
    with (FLINK / name).open(encoding="utf-8") as file:
        return list(yaml.load_all(file, _StrictLoader))


def _file_names() -> list[str]:
    return sorted(path.name for path in FLINK.glob("*.yaml"))


MANIFESTS = [
    pytest.param(manifest, id=f"{name}-{manifest['kind']}")
    for name in _file_names()
    for manifest in _load(name)
]
OBJECTS = {
    (manifest["kind"], manifest["metadata"]["name"]): manifest
    for name in _file_names()
    if name != "kustomization.yaml"
    for manifest in _load(name)
}
CLUSTER = OBJECTS["FlinkDeployment", "beam-lambda-sink"]["spec"]
CONFIGURATION = CLUSTER["flinkConfiguration"]
SUBMIT = OBJECTS["Job", "beam-lambda-sink-submit"]["spec"]
SUBMIT_POD = SUBMIT["template"]["spec"]
TASK_POD = CLUSTER["taskManager"]["podTemplate"]["spec"]
(SUBMIT_CONTAINER,) = SUBMIT_POD["containers"]
(GUARD,) = SUBMIT_POD["initContainers"]
(WORKERS,) = TASK_POD["initContainers"]
OURS = (SUBMIT_CONTAINER, GUARD, WORKERS)
ARGUMENTS: list[str] = SUBMIT_CONTAINER["args"]
GIVEN = dict(argument[2:].split("=", 1) for argument in ARGUMENTS if "=" in argument)


# -- schemas ---------------------------------------------------------------------------------------


def _validate(manifest: Manifest) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_fits_the_schema_of_kubernetes(manifest: Manifest) -> None:
    if manifest["kind"] not in ("FlinkDeployment", "Kustomization"):
        _validate(manifest)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    wrong = {**OBJECTS["Job", "beam-lambda-sink-submit"], "spec": {**SUBMIT, "backofLimit": 0}}
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        _validate(wrong)


@pytest.mark.parametrize("part", ["", "taskManager"])
def test_the_pods_of_flink_fit_the_schema_of_kubernetes(part: str) -> None:
    template = (CLUSTER[part] if part else CLUSTER)["podTemplate"]
    _validate({"apiVersion": "v1", "kind": "Pod", **template})
    # The one that Flink and the operator put their own into, in every layer.
    assert [container["name"] for container in template["spec"]["containers"]] == [
        "flink-main-container"
    ]


def test_the_cluster_has_the_fields_of_a_session_cluster() -> None:
    """And no `job`: that would make it an application cluster, with a jar of its own."""
    deployment = OBJECTS["FlinkDeployment", "beam-lambda-sink"]
    assert set(deployment) == {"apiVersion", "kind", "metadata", "spec"}
    assert deployment["apiVersion"] == "flink.apache.org/v1beta1"
    assert set(CLUSTER) == {
        "image",
        "flinkVersion",
        "mode",
        "serviceAccount",
        "flinkConfiguration",
        "podTemplate",
        "jobManager",
        "taskManager",
    }
    assert all(isinstance(value, str) for value in CONFIGURATION.values())
    for name in ("jobManager", "taskManager"):
        assert set(CLUSTER[name]) <= {"replicas", "resource", "podTemplate"}
        assert re.fullmatch(r"\d+m", CLUSTER[name]["resource"]["memory"])
        assert isinstance(CLUSTER[name]["resource"]["cpu"], int | float)


def _strict(schema: Any) -> Any:
    """The same schema, without room for what it does not name."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items()}
    if strict.get("type") == "object" and "properties" in strict:
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.mark.slow
@pytest.mark.flink
def test_the_cluster_fits_the_schema_of_the_operator() -> None:
    """Not only valid: what the schema does not name, Kubernetes would drop in silence."""
    _, artifact, version = OPERATOR.split(":")
    copy = ["dependency:copy", f"-Dartifact={OPERATOR}"]
    folder = fetch_with_maven(cache_folder() / f"{artifact}-{version}", "the operator's API", copy)
    with zipfile.ZipFile(folder / f"{artifact}-{version}.jar") as jar:
        definition = yaml.safe_load(
            jar.read("META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml")
        )
    (served,) = definition["spec"]["versions"]
    assert served["name"] == "v1beta1"
    schema = served["schema"]["openAPIV3Schema"]["properties"]["spec"]
    validator = jsonschema_rs.validator_for(_strict(schema))
    assert [error.message for error in validator.iter_errors(CLUSTER)] == []
    for wrong in ({"flinkVersion": "v1_1"}, {"flinkVersions": "v1_19"}, {"podTemplate": {"x": 1}}):
        assert not validator.is_valid({**CLUSTER, **wrong})


# -- the parts fit one another ---------------------------------------------------------------------


def test_the_kustomization_has_all_that_is_there_for_good() -> None:
    (kustomization,) = _load("kustomization.yaml")
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert {*kustomization["resources"], "submit.yaml", "kustomization.yaml"} == set(_file_names())
    assert len(OBJECTS) == len(MANIFESTS) - 1, "a kind and a name are there twice"


def _names(node: Any, *path: str) -> Iterator[str]:
    """All that is found at the end of a path, anywhere."""
    if isinstance(node, dict):
        inner: Any = node
        for name in path:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, str):
            yield inner
        for child in node.values():
            yield from _names(child, *path)
    elif isinstance(node, list):
        for child in node:
            yield from _names(child, *path)


def _made() -> set[tuple[str, str]]:
    """What README.md says how to make."""
    text = README.read_text(encoding="utf-8")
    kinds = {"secret generic": "Secret", "serviceaccount": "ServiceAccount"}
    return {
        (kinds[kind], name)
        for kind, name in re.findall(r"create (secret generic|serviceaccount) (\S+)", text)
    }


def test_every_name_that_is_used_is_there() -> None:
    everything = list(OBJECTS.values())
    used = {("ConfigMap", name) for name in _names(everything, "configMap", "name")}
    used |= {("Secret", name) for name in _names(everything, "secretRef", "name")}
    used |= {("ServiceAccount", name) for name in _names(everything, "serviceAccountName")}
    used |= {("ServiceAccount", name) for name in _names(everything, "serviceAccount")}
    used |= {("Role", name) for name in _names(everything, "roleRef", "name")}
    accounts = OBJECTS["RoleBinding", "beam-lambda-sink"]["subjects"]
    used |= {(account["kind"], account["name"]) for account in accounts}
    there = set(OBJECTS) | _made()
    assert used <= there
    unused = there - used - {(kind, name) for kind, name in there if kind in _NOT_REFERRED_TO}
    assert not unused
    # Flink needs its rights in Kubernetes, the program that submits needs none.
    assert {account["name"] for account in accounts} == {CLUSTER["serviceAccount"]}
    assert SUBMIT_POD["automountServiceAccountToken"] is False


_NOT_REFERRED_TO = {"FlinkDeployment", "Job", "NetworkPolicy", "RoleBinding"}


@pytest.mark.parametrize("pod", [SUBMIT_POD, TASK_POD, CLUSTER["podTemplate"]["spec"]])
def test_every_mount_has_its_volume(pod: Manifest) -> None:
    containers = pod.get("initContainers", []) + pod["containers"]
    mounted = {mount["name"] for c in containers for mount in c.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    names = [container["name"] for container in containers]
    assert len(set(names)) == len(names)


def test_the_worker_gets_the_settings_and_secrets_that_the_program_gets() -> None:
    """Both read the properties file, at the same path and with the same variables."""
    assert GIVEN["kafka_config_file"] == MOUNTED
    for name in ("volumeMounts", "envFrom", "image"):
        assert WORKERS[name] == SUBMIT_CONTAINER[name]
    assert TASK_POD["volumes"] == SUBMIT_POD["volumes"]
    (mount,), (volume,) = WORKERS["volumeMounts"], TASK_POD["volumes"]
    settings = OBJECTS["ConfigMap", volume["configMap"]["name"]]["data"]
    assert [f"{mount['mountPath']}/{name}" for name in settings] == [MOUNTED]


def test_the_properties_need_just_the_environment_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OBJECTS["ConfigMap", "beam-lambda-sink-kafka"]["data"]["kafka.properties"]
    assert set(re.findall(r"\$\{env:(\w+)\}", text)) == set(ENVIRONMENT)
    readme = README.read_text(encoding="utf-8")
    assert set(re.findall(r"--from-literal=(\w+)=", readme)) == set(ENVIRONMENT)
    assert parse_properties(text, ENVIRONMENT)["sasl.password"] == "a=secret"
    # librdkafka takes them; nobody listens there, a client is made without a connection.
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "kafka.properties"
    file.write_text(text)
    make_consumer(KafkaConfig("127.0.0.1:1", "group", str(file))).close()


def test_the_ports_are_those_that_are_asked_for() -> None:
    ports = [port["containerPort"] for port in WORKERS["ports"]]
    assert GIVEN["environment_type"] == "EXTERNAL"
    assert GIVEN["environment_config"] == f"localhost:{ports[0]}"
    assert [WORKERS["startupProbe"]["tcpSocket"]["port"]] == ports
    # Beam's boot program has no other.
    assert ports == [50000]
    assert WORKERS["command"] == ["/opt/apache/beam/boot", "--worker_pool"]

    (main,) = CLUSTER["podTemplate"]["spec"]["containers"]
    (metrics,) = [port["containerPort"] for port in main["ports"]]
    assert CONFIGURATION["metrics.reporter.prom.port"] == str(metrics)
    policy = OBJECTS["NetworkPolicy", "beam-lambda-sink-taskmanager"]["spec"]
    assert policy["ingress"][1] == {"ports": [{"port": metrics, "protocol": "TCP"}]}
    # What Flink calls its pods.
    assert policy["podSelector"]["matchLabels"] == {
        "app": "beam-lambda-sink",
        "component": "taskmanager",
    }


def test_the_program_asks_the_service_of_the_cluster() -> None:
    """The operator names it after the FlinkDeployment."""
    assert GIVEN["flink_master"] == "beam-lambda-sink-rest:8081"
    assert GUARD["command"][-1] == f"http://{GIVEN['flink_master']}"
    assert f"service/{GIVEN['flink_master'].split(':')[0]} 8081" in README.read_text()


def test_the_pool_is_there_before_flink_and_comes_back() -> None:
    """A sidecar: an init container that is restarted always."""
    assert WORKERS["restartPolicy"] == "Always"
    assert {"workers"} == {container["name"] for container in TASK_POD["initContainers"]}


def test_a_job_is_never_submitted_a_second_time_by_itself() -> None:
    assert SUBMIT["backoffLimit"] == 0
    assert (SUBMIT["parallelism"], SUBMIT["completions"]) == (1, 1)
    assert SUBMIT_POD["restartPolicy"] == "Never"
    assert "podFailurePolicy" not in SUBMIT and "ttlSecondsAfterFinished" not in SUBMIT
    # A name, so that it cannot be created beside one that is there.
    assert set(OBJECTS["Job", "beam-lambda-sink-submit"]["metadata"]) == {"name"}


@pytest.fixture
def overview() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A JobManager that knows these jobs; its address."""
    jobs: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/jobs/overview"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"jobs": jobs}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", jobs
    server.shutdown()
    thread.join()
    server.server_close()


def _guard(address: str) -> subprocess.CompletedProcess[str]:
    program, *arguments, _ = GUARD["command"]
    assert program == "python"
    return subprocess.run(
        [sys.executable, *arguments, address],
        capture_output=True,
        text=True,
        env={"no_proxy": "*"},
    )


def test_nothing_is_submitted_while_a_job_is_there(
    overview: tuple[str, list[dict[str, str]]],
) -> None:
    address, jobs = overview
    assert _guard(address).returncode == 0
    jobs += [{"jid": state, "state": state} for state in ("FINISHED", "FAILED", "CANCELED")]
    assert _guard(address).returncode == 0
    jobs.append({"jid": "a1b2", "state": "RESTARTING"})
    refused = _guard(address)
    assert refused.returncode == 1
    assert refused.stderr == "not submitted, there is a job already: a1b2\n"


def test_nothing_is_submitted_while_flink_cannot_be_asked() -> None:
    assert _guard("http://127.0.0.1:1").returncode == 1


def test_no_container_of_ours_may_do_more_than_it_has_to() -> None:
    for container in OURS:
        assert container["securityContext"] == {
            "runAsUser": 65532,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    for pod in (SUBMIT_POD, CLUSTER["podTemplate"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True


# -- they fit the program --------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The properties file, and the variables that it needs."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    text = OBJECTS["ConfigMap", "beam-lambda-sink-kafka"]["data"]["kafka.properties"]
    (tmp_path / "kafka.properties").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _resolve(arguments: list[str]) -> Resolved:
    """As the program takes a command line, with the properties file where it is here."""
    resolved = resolve([argument.replace(MOUNTED, "kafka.properties") for argument in arguments])
    assert resolved.problems == ()
    return resolved


def test_the_options_of_the_job_fit_the_program(files: Path) -> None:
    resolved = _resolve(ARGUMENTS)
    assert resolved.runner == "FlinkRunner"
    assert resolved.config and resolved.config.stream
    assert resolved.config.run.until == "forever"
    added = runner_options(resolved.runner, resolved.beam_arguments, bounded=False)
    assert {name.split("=")[0] for name in added} >= {"--streaming", "--checkpointing_interval"}


def test_nothing_is_staged(files: Path) -> None:
    """What is staged lies in the pod that submits, where no TaskManager can read it."""
    beams = list(_resolve(ARGUMENTS).beam_arguments)
    assert python_sdk_dependencies(PipelineOptions(beams)) == []
    experiment = "--experiments=disable_logging_submission_environment"
    beams.remove(experiment)
    assert python_sdk_dependencies(PipelineOptions(beams)) != []
    assert experiment in blocks(README, "sh")[4]


def test_what_has_to_outlive_the_cluster_is_in_one_place_outside_of_it() -> None:
    names = ("high-availability.storageDir", "state.checkpoints.dir", "state.savepoints.dir")
    folders = [CONFIGURATION[name].rsplit("/", 1) for name in names]
    assert {bucket for bucket, _ in folders} == {"s3://example-bucket/beam-lambda-sink"}
    assert [folder for _, folder in folders] == ["ha", "checkpoints", "savepoints"]
    assert CONFIGURATION["high-availability.type"] == "kubernetes"
    text = (FLINK / "submit.yaml").read_text(encoding="utf-8")
    assert f"# - --savepoint_path={CONFIGURATION['state.savepoints.dir']}/" in text
    assert folders[0][0] in README.read_text(encoding="utf-8")


def test_the_settings_of_flink_that_matter_are_those_of_the_tests() -> None:
    ours = {**flink._CLUSTER_CONFIG, **flink._MEMORY_CONFIG}
    assert CONFIGURATION["state.backend.type"] == ours["state.backend.type"]
    assert CONFIGURATION["env.java.opts.all"].split() == list(flink._OPENS)
    # By a wrong name a setting has no effect, and nobody says so.
    named = set(CONFIGURATION) - {"env.java.opts.all"}
    assert named == {
        "high-availability.type",
        "high-availability.storageDir",
        "state.backend.type",
        "state.checkpoints.dir",
        "state.savepoints.dir",
        "state.checkpoints.num-retained",
        "restart-strategy.type",
        "restart-strategy.exponential-delay.initial-backoff",
        "restart-strategy.exponential-delay.max-backoff",
        "restart-strategy.exponential-delay.reset-backoff-threshold",
        "taskmanager.numberOfTaskSlots",
        "taskmanager.memory.managed.size",
        "taskmanager.memory.task.off-heap.size",
        "metrics.reporter.prom.factory.class",
        "metrics.reporter.prom.port",
    }


def test_the_cluster_may_grow_by_whole_taskmanagers() -> None:
    """The rescaling that README.md describes starts one more."""
    slots = int(CONFIGURATION["taskmanager.numberOfTaskSlots"])
    assert int(GIVEN["parallelism"]) == slots
    assert re.findall(r"Rescale, (\d) to (\d)", README.read_text()) == [
        (str(slots), str(2 * slots))
    ]


# -- versions and the image ------------------------------------------------------------------------


def test_there_is_one_version_of_flink() -> None:
    version = GIVEN["flink_version"]
    assert version in FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS
    assert CLUSTER["flinkVersion"] == f"v{version.replace('.', '_')}"
    image = re.fullmatch(rf"flink:({re.escape(version)}\.\d+)-scala_2\.12-java17", CLUSTER["image"])
    assert image
    (main,) = CLUSTER["podTemplate"]["spec"]["containers"]
    assert main["env"] == [
        {"name": "ENABLE_BUILT_IN_PLUGINS", "value": f"flink-s3-fs-presto-{image[1]}.jar"}
    ]
    # The one that the tests run.
    pom = (ROOT / "pipeline" / "local" / "flink.pom.xml").read_text(encoding="utf-8")
    assert re.findall(r"<artifactId>beam-runners-flink-([\d.]+)</artifactId>", pom) == [version]


def test_the_job_server_of_the_image_is_the_one_that_beam_would_fetch() -> None:
    options = PipelineOptions([f"--flink_version={GIVEN['flink_version']}"])
    wanted = FlinkJarJobServer(options).path_to_jar().rsplit("/", 1)[1]
    assert wanted == f"beam-runners-flink-{GIVEN['flink_version']}-job-server-{BEAM}.jar"
    (artifact,) = re.findall(r"-Dartifact=org\.apache\.beam:(\S+)", DOCKERFILE)
    assert "{}-{}.jar".format(*artifact.split(":")) == wanted
    (copied,) = re.findall(r"^COPY --from=job-server (\S+) (\S+)$", DOCKERFILE, re.MULTILINE)
    assert copied == (f"/job-server/{wanted}", GIVEN["flink_job_server_jar"])


def test_the_image_has_one_version_of_beam_and_starts_what_the_manifests_ask_for() -> None:
    assert set(re.findall(r"_sdk:([\d.]+) |apache-beam==([\d.]+) ", DOCKERFILE)) == {
        (BEAM, ""),
        ("", BEAM),
    }
    python = re.findall(r"python:?(3\.\d+)", DOCKERFILE)
    assert len(python) == 2 and len(set(python)) == 1
    lines = DOCKERFILE.splitlines()
    assert (
        f"COPY --from=apache/beam_python{python[0]}_sdk:{BEAM} /opt/apache/beam/boot "
        + (WORKERS["command"][0])
        in lines
    )
    # As its own user, and the program takes the Job's arguments as they are.
    assert lines[-2:] == [f"USER {WORKERS['securityContext']['runAsUser']}", _entrypoint()]
    assert "command" not in SUBMIT_CONTAINER
    assert "ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1" in lines


def _entrypoint() -> str:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (script,) = re.findall(r'^([\w-]+) = "pipeline\.cli:main"$', pyproject, re.MULTILINE)
    return f'ENTRYPOINT ["{script}"]'


def test_the_dockerfile_has_no_problems(tmp_path: Path) -> None:
    """In the folder that README.md builds it in, with the wheel that is made there."""
    (tmp_path / "beam_lambda_sink-0.1.0-py3-none-any.whl").touch()
    assert dockerfile.problems(DOCKERFILE, tmp_path) == []
    build = shlex.split(next(line for line in _commands(README) if line.startswith("docker build")))
    assert build[2:4] == ["-f", "templates/flink/Dockerfile"]
    assert build[-1] == "dist"  # where `python -m build` puts it


def test_there_is_one_image_of_ours() -> None:
    (image,) = {container["image"] for container in OURS}
    name, _, tag = image.rpartition(":")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{tag}"' in pyproject
    named = set(re.findall(rf"{re.escape(name)}:\S+", README.read_text(encoding="utf-8")))
    assert named == {image}


# -- the commands of the pages ---------------------------------------------------------------------


def _commands(page: Path) -> list[str]:
    return "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", [README, PAGE], ids=lambda page: page.parent.name)
def test_every_command_line_of_the_pipeline_fits(page: Path, files: Path) -> None:
    runners = []
    for line in _commands(page):
        for program in ("beam-lambda-sink ", "./run.sh run "):
            if line.startswith(program):
                runners.append(_resolve(shlex.split(line.removeprefix(program))).runner)
    assert runners == (["FlinkRunner"] if page == README else ["FlinkRunner", "PortableRunner"])


def test_every_option_that_is_named_is_one(files: Path) -> None:
    """Those of other programs stand in commands of their own."""
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"`--([a-z_]+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)))
    for name in named - {"parallelism", "savepoint_path", "flink_version"}:
        assert not [p for p in resolve([f"--{name}=1"]).problems if "is not an option" in p], name
    assert named


def test_every_file_and_object_of_a_command_is_there() -> None:
    lines = _commands(README)
    for line in lines:
        if line.startswith("kubectl"):
            for target in re.findall(r"-[fk] (\S+)", line):
                assert (ROOT / target).exists(), target
    text = "\n".join(lines)
    kinds = {"job": "Job", "flinkdeployment": "FlinkDeployment"}
    named = re.findall(r"\b(job|flinkdeployment)[/ ]([a-z][a-z-]+)", text)
    assert len(named) == 3
    assert all((kinds[kind], name) in OBJECTS for kind, name in named)
    for target in re.findall(r"\]\(([^)#\s]+)\)", README.read_text(encoding="utf-8")):
        assert (FLINK / target).exists(), target
    listed = re.findall(r"^\| \[(\S+)\]", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*_file_names(), "Dockerfile"])


class _Recorder(FlinkRest):
    """What the tests on the cluster send, with answers made up."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1")
        self.sent: set[tuple[str, str, str]] = set()

    def request(self, method: str, path: str, body: Any = None) -> Any:
        self.sent.add((method, path, "" if body is None else json.dumps(body)))
        return {
            "jobs": [],
            "request-id": "$REQUEST",
            "status": {"id": "COMPLETED"},
            "operation": {"location": "file:/savepoint"},
            "state": "FINISHED",
            "latest": {"completed": {"external_path": "file:/checkpoint"}},
        }


def test_the_rest_calls_are_those_that_the_tests_make() -> None:
    rest = _Recorder()
    rest.jobs()
    rest.stop("$JOB")
    rest.stop("$JOB", drain=True)
    rest.cancel("$JOB")
    rest.latest_checkpoint("$JOB")
    written = set()
    for line in _commands(README):
        if not line.startswith("curl"):
            continue
        words = shlex.split(line)
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        body = words[words.index("-d") + 1] if "-d" in words else ""
        assert ("Content-Type: application/json" in words) == bool(body)
        (url,) = [word for word in words if word.startswith("$FLINK")]
        written.add((method, url.removeprefix("$FLINK"), body))
    assert written == rest.sent


# -- docs/flink.md ---------------------------------------------------------------------------------


def test_the_page_says_what_is_set_for_the_user() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("| option | value | why |\n")[2]
    listed = dict(re.findall(r"^\| `(--\w+)` \| (\w*)", text.partition("\n\n")[0], re.MULTILINE))
    added = {
        option
        for runner in ("FlinkRunner", "PortableRunner")
        for option in runner_options(runner, [], bounded=True, environ={})
    }
    values = {name: value for name, _, value in (option.partition("=") for option in added)}
    assert values.pop("--flink_conf_dir") == str(FLINK_CONF)
    assert listed.pop("--flink_conf_dir")
    assert listed == values


def test_the_page_has_every_metric() -> None:
    """Of the steps of a streaming run, whichever reader it has."""
    found = {f"invoke.{name}" for name in invoke._STATS}
    for path in (ROOT / "transforms").glob("**/*.py"):
        if path.parent.name != "redrive" and path != ROOT / "transforms/read/rounds.py":
            text = path.read_text(encoding="utf-8")
            made = r'\b(?:counter|gauge|distribution)\("(\w+)", "(\w+)"\)'
            found |= {f"{space}.{name}" for space, name in re.findall(made, text)}
    listed = [name for row in rows(PAGE, "metrics") for cell in row for name in codes(cell)]
    assert len(set(listed)) == len(listed)
    assert set(listed) == found
    named = set(re.findall(r"`((?:read|batch|invoke|write|commit)\.\w+)`", README.read_text()))
    assert named <= found
