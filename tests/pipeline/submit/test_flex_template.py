"""The Flex Template: its parameters, its specification, launches, its image and its scripts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam
import pytest
import yaml
from apache_beam.utils.subprocess_server import JavaJarServer
from google.cloud import dataflow
from google.protobuf.json_format import ParseError
from packaging.specifiers import SpecifierSet

from pipeline.options.declare import OF_TOPICS, OPTIONS
from pipeline.options.resolve import parse_arguments
from pipeline.submit import flex_template
from tests.docker_image import Dockerfile
from tests.pipeline.submit.test_dataflow_job import STEPS
from tests.servers.dataflow_launcher import (
    Launcher,
    LaunchFailed,
    Refused,
    check,
    parse_spec,
    program_file,
    template_spec,
)
from tests.servers.dataflow_service import ROOT, DataflowService, Submitted
from tests.servers.google_service import Google

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEMPLATE = ROOT / "templates" / "dataflow"
IMAGE = "europe-west1-docker.pkg.dev/my-project/beam/beam-lambda-sink:0.1.0"
METADATA = json.loads((TEMPLATE / "metadata.json").read_text(encoding="utf-8"))
SPEC = template_spec(IMAGE, METADATA)
PARAMETERS = {one["name"]: one for one in METADATA["parameters"]}

GIVEN = {
    "kafka_bootstrap_servers": "127.0.0.1:1",
    "topics": "orders,payments",
    "consumer_group": "orders-to-lambda",
    "function": "process-orders:live",
    "sdk_container_image": IMAGE,
    "preflight": "false",
}


# -- the parameters --------------------------------------------------------------------------------


def test_every_option_is_a_parameter_or_left_out_for_a_reason() -> None:
    beams = {"sdk_container_image"}
    assert set(PARAMETERS) - beams == set(OPTIONS) - set(flex_template.LEFT_OUT)
    assert set(flex_template.LEFT_OUT) < set(OPTIONS)
    assert all(flex_template.LEFT_OUT.values())


def test_a_parameter_is_required_where_its_option_is() -> None:
    required = {name for name, one in PARAMETERS.items() if not one.get("isOptional")}
    options = {name for name, option in OPTIONS.items() if option.required}
    # Where a stream is read there may be no Kafka.
    assert required == options - set(OF_TOPICS) | {"sdk_container_image"}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_defaults_and_examples_are_taken(name: str) -> None:
    """By the service as by the program."""
    one = PARAMETERS[name]
    declared = next(
        option
        for group in flex_template.template_groups()
        for option in group.options
        if option.name == name
    )
    example = flex_template._EXAMPLE_OF.get(name, declared.example)
    values = [one.get("defaultValue"), example, *(o["value"] for o in one.get("enumOptions", ()))]
    for value in filter(None, values):
        check({**SPEC, "metadata": {**METADATA, "parameters": [one]}}, {name: value})


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_helps_are_in_words_of_parameters(name: str) -> None:
    """No dashes, no word of options that are none here."""
    one = PARAMETERS[name]
    assert "--" not in one["helpText"]
    assert one["label"][0].isupper()
    for left_out in flex_template.LEFT_OUT.keys() - {
        "config",
        "workers",
    }:  # also plain words
        assert not re.search(rf"\b{left_out}\b", one["helpText"])


def test_regular_expressions_are_of_a_kind_that_all_know() -> None:
    """The service's, the console's and Python's: no named groups, no looking around."""
    for name, one in PARAMETERS.items():
        for regex in one.get("regexes", ()):
            assert regex.startswith("^(") and regex.endswith(")$"), name
            assert not re.search(r"\(\?(?!:)|\\[AZzbB<>pPkKGQE]|[*+?}][+]", regex), name


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "function",
            ["f", "f:$LATEST", "arn:aws:lambda:eu-west-1:123456789012:function:f:l"],
            ["f f"],
        ),
        ("topics", ["a", "a,b", "a, b"], ["a b", "", "a;b"]),
        ("schema_validation", ["KEY", "KEY,VALUE", "NONE"], ["key", "KEY;VALUE"]),
        ("batch_size", ["100"], ["-1", "1.5", "many"]),
        ("max_retries", ["-1", "3"], ["1.5", ""]),
        ("batch_window_secs", ["0.5", "3"], ["-1", "fast"]),
        ("bisect_on_error", ["true", "false"], ["yes", "True", ""]),
        ("on_error", ["log"], ["Log", ""]),
        ("kafka_config_file", ["gs://b/k", "secretmanager://p/s", "/etc/k"], ["k.properties"]),
        ("filter_criteria", ["gs://b/f.json"], ["/etc/f.json"]),
        ("aws_role_arn", ["arn:aws:iam::123456789012:role/r"], ["role/r"]),
        ("lambda_endpoint_url", ["https://vpce-1.lambda"], ["vpce-1", "http://u:p@h"]),
        ("sdk_container_image", [IMAGE], ["beam", ""]),
    ],
)
def test_values_that_the_service_takes(name: str, right: list[str], wrong: list[str]) -> None:
    spec = {**SPEC, "metadata": {**METADATA, "parameters": [PARAMETERS[name]]}}
    for value in right:
        check(spec, {name: value})
    for value in wrong:
        with pytest.raises(Refused, match=name):
            check(spec, {name: value})


# -- the specification -----------------------------------------------------------------------------


def test_the_specification_is_one_by_google_s_own_definition() -> None:
    spec = parse_spec(SPEC)
    assert spec.sdk_info.language == dataflow.SDKInfo.Language.PYTHON
    assert spec.metadata.streaming and spec.metadata.supports_at_least_once
    by_name = {one.name: one for one in spec.metadata.parameters}
    assert list(by_name) == list(PARAMETERS)
    types = dataflow.ParameterType
    expected = {
        "topics": types.TEXT,
        "batch_size": types.NUMBER,
        "batch_window_secs": types.NUMBER,
        "bisect_on_error": types.BOOLEAN,
        "on_error": types.ENUM,
        "filter_criteria": types.GCS_READ_FILE,
    }
    assert {name: by_name[name].param_type for name in expected} == expected
    assert [option.value for option in by_name["on_error"].enum_options] == [
        "fail",
        "log",
        "ignore",
    ]
    assert by_name["batch_size"].default_value == "100"
    assert by_name["batch_size"].group_name == "Batching"


@pytest.mark.parametrize(
    "change",
    [{"parameterType": "TEXT"}, {"paramType": "KAFKA_BOOTSTRAP"}, {"isOptional": "perhaps"}],
)
def test_what_google_does_not_know_is_refused(change: dict[str, Any]) -> None:
    """Else the test above would say little."""
    one = PARAMETERS["topics"] | change
    with pytest.raises(ParseError):
        parse_spec({**SPEC, "metadata": {**METADATA, "parameters": [one]}})
    with pytest.raises(ParseError):
        parse_spec({**SPEC, "_comment": "x"})


# -- launches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[DataflowService]:
    with DataflowService() as running:
        yield running


@pytest.fixture(scope="module")
def google() -> Iterator[Google]:
    with Google() as running:
        running.contents["projects/my-project/secrets/kafka/versions/latest"] = (
            b"security.protocol=SASL_SSL\nsasl.mechanisms=PLAIN\nsasl.username=u\n"
            b"sasl.password=marked-password\n"
        )
        running.contents["filters.json"] = b'{"Filters": [{"Pattern": {"topic": ["orders"]}}]}'
        running.contents["kafka.properties"] = b"response.linger.ms=7\n"
        yield running


@pytest.fixture
def launcher(service: DataflowService, google: Google, tmp_path: Path) -> Launcher:
    return Launcher(service, tmp_path, google.environment)


def test_a_launch_becomes_a_job(launcher: Launcher) -> None:
    from_environment = [
        "--service_account_email=sink@my-project.iam.gserviceaccount.com",
        "--max_num_workers=3",
        "--machine_type=n2-standard-2",
        "--subnetwork=regions/europe-west1/subnetworks/default",
        "--no_use_public_ips",
        "--enable_streaming_engine",
        "--experiments=use_runner_v2",
    ]
    config = "secretmanager://projects/my-project/secrets/kafka/versions/latest"
    given = GIVEN | {"kafka_config_file": config}
    job = launcher.launch(SPEC, given, from_environment)
    # It is the service that starts the job: the program says nothing of one, and ends.
    assert launcher.secs < 60
    assert "records:" not in launcher.said and "submitted:" not in launcher.said
    assert job.request["type"] == "JOB_TYPE_STREAMING"
    assert job.request["name"] == "launched"
    assert job.request["labels"] == {
        "goog-dataflow-provided-template-name": "sink",
        "goog-dataflow-provided-template-type": "flex",
        "beam-lambda-sink": "0_1_0",
    }
    assert job.images == [IMAGE]
    assert job.environment["serviceOptions"] == ["streaming_mode_at_least_once"]
    assert job.environment["serviceAccountEmail"].startswith("sink@")
    assert job.pool["autoscalingSettings"]["maxNumWorkers"] == 3
    assert job.pool["ipConfiguration"] == "WORKER_IP_PRIVATE"
    read = job.steps["Read/ReadPartition"].pickled
    assert b"payments" in read and config.encode() in read
    # What the secret holds was read, and stays where it is.
    assert "marked-password" not in launcher.said
    assert b"marked-password" not in b"".join(step.pickled for step in job.steps.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topic": "orders"}, ["Unrecognized parameter: topic"]),
        ({"function": None}, ["Missing required parameter: function"]),
        ({"sdk_container_image": None}, ["Missing required parameter: sdk_container_image"]),
        (
            {"kafka_bootstrap_servers": "broker"},
            ["kafka_bootstrap_servers: Parameter didn't match"],
        ),
        ({"on_error": "retry"}, ["on_error: retry is no ENUM"]),
        ({"include_headers": "yes"}, ["include_headers: yes is no BOOLEAN"]),
        ({"batch_size": "many"}, ["batch_size: many is no NUMBER"]),
        ({"filter_criteria": "f.json"}, ["filter_criteria: f.json is no GCS_READ_FILE"]),
        ({"function": None, "x": "1"}, ["Unrecognized parameter: x", "Missing required"]),
    ],
)
def test_the_service_refuses_what_the_metadata_forbids(
    launcher: Launcher, change: dict[str, str | None], said: list[str]
) -> None:
    given = {name: value for name, value in (GIVEN | change).items() if value is not None}
    with pytest.raises(Refused) as raised:
        launcher.launch(SPEC, given)
    for part in said:
        assert part in str(raised.value)
    assert launcher.said == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"topics_regex": "o.*"},
            ["give exactly one of --topics, --topics_regex and --stream, not several"],
        ),
        ({"batch_size": "10001"}, ["--batch_size=10001 is not allowed; give 1 to 10000"]),
        (
            {"kafka_config_file": "gs://my-bucket/gone", "max_concurrency": "0"},
            [
                "--max_concurrency=0 is not allowed",
                "--kafka_config_file=gs://my-bucket/gone cannot",
            ],
        ),
        (
            {"response_topic": "orders"},
            ["--response_topic=orders is also read from (--topics): the pipeline would feed on"],
        ),
        ({"preflight": "true"}, ["Kafka at 127.0.0.1:1 cannot be reached"]),
    ],
)
def test_what_only_the_program_can_find_fails_the_launch(
    launcher: Launcher,
    service: DataflowService,
    tmp_path: Path,
    change: dict[str, str],
    said: list[str],
) -> None:
    before = len(service.submitted)
    with pytest.raises(LaunchFailed) as raised:
        launcher.launch(SPEC, GIVEN | change)
    errors = [line for line in str(raised.value).splitlines() if line.startswith("error: ")]
    assert len(errors) == len(said)
    for part in said:
        assert any(part in error for error in errors), errors
    assert "Traceback" not in str(raised.value)
    assert not list(tmp_path.rglob("job_object"))
    assert len(service.submitted) == before


ALL = {
    **GIVEN,
    "kafka_config_file": "gs://my-bucket/kafka.properties",
    "kafka_access": "TLS",
    "commit_refresh_secs": "1800",
    "commit_interval_secs": "0.5",
    "drain_wait_secs": "300",
    "starting_position": "AT_TIMESTAMP",
    "starting_timestamp": "2026-01-01T00:00:00Z",
    "kafka_reader": "native",
    "filter_criteria": "gs://my-bucket/filters.json",
    "filter_unparsable": "drop",
    "invocation_type": "sync",
    "aws_region": "eu-central-1",
    "aws_role_arn": "arn:aws:iam::123456789012:role/invoke-orders",
    "aws_web_identity": "google",
    "aws_web_identity_audience": "orders",
    "lambda_endpoint_url": "https://vpce-1.lambda.eu-central-1.vpce.amazonaws.com",
    "function_timeout_secs": "60",
    "batch_size": "500",
    "batch_bytes": "1000000",
    "batch_window_secs": "2.5",
    "parallelization_factor": "2",
    "max_concurrency": "50",
    "min_concurrency": "2",
    "envelope": "kafka_event",
    "event_source_arn": "arn:aws:kafka:eu-central-1:123456789012:cluster/orders/5a7c-2",
    "key_format": "base64",
    "value_format": "base64",
    "include_headers": "true",
    "reply": "batch_item_failures",
    "partial_failure": "named",
    "client_context": "false",
    "schema_registry_url": "https://registry.example.com:8081",
    "schema_registry_access": "BASIC_AUTH=arn:aws:secretsmanager:eu-central-1:123456789012:"
    "secret:registry-Ab12Cd",
    "schema_validation": "NONE",
    "event_record_format": "SOURCE",
    "max_retries": "3",
    "max_transient_retries": "9",
    "max_record_age_secs": "3600",
    "bisect_on_error": "true",
    "on_error": "log",
    "breaker_failure_rate": "0.5",
    "breaker_invocations": "10",
    "breaker_wait_secs": "5",
    "error_topic": "orders-errors",
    "response_format": "avro",
    "error_format": "json",
    "error_record": "aws",
    "until": "caught_up",
    "trace": "otlp",
}
# Cannot stand beside what is above.
OTHERS = {
    "topics_regex": ("topics", "pay[a-z]{1,9}"),
    "response_topic": ("reply", "orders-results"),
    "on_failure_destination": ("error_topic", "arn:aws:sqs:us-east-1:123456789012:failed"),
}


# For a launch that reads a stream.
STREAMED = {
    "stream": "arn:aws:kinesis:eu-central-1:123456789012:stream/orders",
    "lease_table": "orders-to-lambda",
    "lease_secs": "20",
    "stream_poll_secs": "0.5",
    "consumer_name": "orders-to-lambda",
    "deaggregate": "true",
    "stream_role_arn": "arn:aws:iam::123456789012:role/read-orders",
    "kinesis_endpoint_url": "https://vpce-1.kinesis.eu-central-1.vpce.amazonaws.com",
    "dynamodb_endpoint_url": "https://vpce-1.dynamodb.eu-central-1.vpce.amazonaws.com",
    "invoke_identity_arn": "arn:aws:iam::123456789012:role/invoke-orders",
}


# With IAM only, for which AWS would be asked at the launch; and in place of a name.
LEFT = {"kafka_role_arn", "consumer_arn"}


def test_a_launch_with_every_parameter(launcher: Launcher) -> None:
    assert set(ALL) | set(OTHERS) | set(STREAMED) | LEFT == set(PARAMETERS)
    job = launcher.launch(SPEC, ALL)
    _assert_arrived(job, ALL)
    for name, (instead_of, value) in OTHERS.items():
        gone = (instead_of, "partial_failure", "error_record")
        left = {key: text for key, text in ALL.items() if key not in gone}
        other = launcher.launch(SPEC, left | {name: value})
        assert value.encode() in b"".join(step.pickled for step in other.steps.values())


def test_a_launch_that_reads_a_stream(launcher: Launcher) -> None:
    """Without Kafka; with the steps that a job always has, so that it can be updated."""
    given = {name: text for name, text in GIVEN.items() if name not in ("topics", *OF_TOPICS)}
    more = {"envelope": "kinesis_event", "aws_web_identity": "google"}
    job = launcher.launch(SPEC, given | STREAMED | more)
    assert set(job.labels) < set(STEPS.read_text(encoding="utf-8").splitlines())
    assert {"Read/FindPartitions", "Read/ReadPartition", "Commit/CommitPartition"} <= set(job.steps)
    held = b"".join(step.pickled for step in job.steps.values())
    for name, text in STREAMED.items():
        assert not name.endswith(("arn", "url", "table")) or text.encode() in held, name
    for name in ("Read/FindPartitions", "Read/ReadPartition", "Commit/CommitPartition"):
        assert STREAMED["stream"].encode() in job.steps[name].pickled


def _assert_arrived(job: Submitted, given: dict[str, str]) -> None:
    """What the steps of a job hold is what the same options on a command line come to."""
    held = b"".join(step.pickled for step in job.steps.values())
    for name in ("aws_role_arn", "event_source_arn", "error_topic", "schema_registry_url"):
        assert given[name].encode() in held, name
    assert b'{"topic":["orders"]}' in held
    assert {"Filter/ByCriteria", "Read/FindPartitions"} <= set(job.steps)


def test_the_program_takes_the_parameters_as_its_options(
    google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value is where it is used, as the tests of the options have it for all."""
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    config, _ = parse_arguments(
        [f"--{name}={value}" for name, value in ALL.items()]
        + ["--runner=DataflowRunner", "--project=demo-project", "--region=europe-west1"]
        + ["--temp_location=gs://bucket/dataflow"]
    )
    assert config.batch.max_records == 500
    assert config.invoke.function.token_audience == "orders"
    assert config.invoke.policy.named and config.invoke.policy.bisect


# -- the image -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return Dockerfile.read(TEMPLATE / "Dockerfile")


@pytest.mark.parametrize(
    "text",
    [
        "RUN true",
        "FROM a:1\nRUM true",
        "FROM a:1 as b",
        "FROM a:1\nENTRYPOINT boot",
        "FROM a:1\nENV A b",
        "FROM a:1\nCOPY a b c",
        "FROM a:1\nCOPY --link a b",
        "FROM a:1\nCOPY a",
    ],
)
def test_the_parser_is_strict(text: str) -> None:
    with pytest.raises(ValueError):
        Dockerfile.parse(text)


def test_every_image_it_begins_with_is_pinned(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages:
        assert re.fullmatch(r"[a-z0-9./_-]+:[\w.-]+", stage.image), stage.image
        assert not stage.image.endswith(":latest")


def test_python_and_beam_are_of_one_version_everywhere(dockerfile: Dockerfile) -> None:
    """Of that which the tests run with, and which the project allows."""
    beam, launcher, image = (stage.image for stage in dockerfile.stages)
    found = [
        re.search(pattern, text)
        for pattern, text in (
            (r"beam_python(\d)\.(\d+)_sdk:", beam),
            (r"/python(\d)(\d+)-template-launcher-base:", launcher),
            (r"^python:(\d)\.(\d+)-slim", image),
        )
    ]
    (version,) = {".".join(match.groups()) for match in found if match}
    assert None not in found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{version}.0")
    assert beam.endswith(f":{apache_beam.__version__}")
    (install,) = [run for run in dockerfile.runs if "pip install" in run]
    assert f" apache-beam=={apache_beam.__version__} " in install
    (extras,) = re.findall(r'"\.\[([a-z,-]+)\]"', install)
    assert {"gcp"} <= set(extras.split(",")) <= set(project["optional-dependencies"])
    assert install.endswith("&& pip check")


def test_all_that_is_copied_exists(dockerfile: Dockerfile) -> None:
    for source in dockerfile.copied.values():
        assert (ROOT / source).exists(), source
        assert not source.startswith(("/", "..")), source
    names = {stage.name for stage in dockerfile.stages[:-1]}
    assert {stage for stage, _, _ in dockerfile.from_stages} == names == {"beam", "launcher"}
    # To where those who start it look for it.
    assert {target for _, source, target in dockerfile.from_stages if source == target} == {
        "/opt/apache/beam",
        "/opt/google/dataflow/python_template_launcher",
    }


def test_what_starts_a_worker_is_beam_s_and_what_is_launched_is_there(
    dockerfile: Dockerfile,
) -> None:
    assert dockerfile.entrypoint == ["/opt/apache/beam/boot"]
    # No other of the launcher's variables: the image has all that the program needs.
    assert dockerfile.environment == {"FLEX_TEMPLATE_PYTHON_PY_FILE": "/template/main.py"}
    assert program_file() == TEMPLATE / "main.py"
    # Not where packages lie that would hide those that are installed.
    (*_, (_, folder)) = [one for one in dockerfile.stages[-1].instructions if one[0] == "WORKDIR"]
    assert folder == "/template"


def test_the_expansion_service_is_where_beam_looks_for_it(
    dockerfile: Dockerfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to fetch when a job is launched, nor anybody to fetch it from."""
    ((at, url),) = dockerfile.fetched.items()
    wanted = JavaJarServer.path_to_beam_jar("sdks:java:io:expansion-service:shadowJar")
    assert url.rpartition("/")[2] == wanted.rpartition("/")[2]
    assert url.startswith("https://")
    # The home of root, whom the image runs as.
    folder = Path(at).parent
    assert str(folder) == os.path.join(
        JavaJarServer.JAR_CACHE.replace(os.path.expanduser("~"), "/root")
    )
    here = tmp_path / "jars"
    here.mkdir()
    (here / Path(at).name).write_bytes(b"a jar")
    assert JavaJarServer.local_jar(wanted, cache_dir=str(here)) == str(here / Path(at).name)


def test_there_is_a_java_for_it(dockerfile: Dockerfile) -> None:
    (install,) = [run for run in dockerfile.runs if "apt-get install" in run]
    assert {"openjdk-17-jre-headless", "ca-certificates"} <= set(install.split())
    assert install.startswith("apt-get update && ")
    assert install.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.slow
def test_what_is_copied_is_enough_to_install(dockerfile: Dockerfile, tmp_path: Path) -> None:
    """The package as the image gets it, built from what is copied and nothing else."""
    source, target = tmp_path / "source", tmp_path / "wheel"
    for at, name in dockerfile.copied.items():
        if at.startswith("/opt/beam-lambda-sink/"):
            copy = source / Path(at).relative_to("/opt/beam-lambda-sink")
            copy.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy)
            else:
                shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"pipeline/cli.py", "pipeline/submit/dataflow.py", "transforms/text_file.py"} <= names


def test_cloud_build_builds_that_file_and_nothing_else() -> None:
    build = yaml.safe_load((TEMPLATE / "cloudbuild.yaml").read_text(encoding="utf-8"))
    assert set(build) == {"steps", "images", "timeout"}
    (step,) = build["steps"]
    assert set(step) == {"name", "args"}
    file = step["args"][step["args"].index("--file") + 1]
    assert (ROOT / file).samefile(TEMPLATE / "Dockerfile")
    assert step["args"][-1] == "."
    assert build["images"] == ["$_IMAGE"] and "$_IMAGE" in step["args"]


def _tool(name: str) -> str:
    """A checker of the dev extra."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
    if not found:
        pytest.skip(f"there is no {name} for this machine")
    return found


def test_hadolint_has_nothing_against_the_image() -> None:
    done = subprocess.run(
        [_tool("hadolint"), str(TEMPLATE / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# -- the scripts -----------------------------------------------------------------------------------

SCRIPTS = ("build.sh", "launch.sh", "common.sh")
BUILD = {
    "PROJECT": "my-project",
    "IMAGE": IMAGE,
    "TEMPLATE": "gs://my-bucket/templates/beam-lambda-sink.json",
}
LAUNCH = BUILD | {
    "REGION": "europe-west1",
    "STAGING_LOCATION": "gs://my-bucket/dataflow",
    "JOB_NAME": "orders-to-lambda",
}
LAUNCHED = [f"{name}={value}" for name, value in GIVEN.items() if name != "sdk_container_image"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_scripts(name: str) -> None:
    script = TEMPLATE / name
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    executable = bool(script.stat().st_mode & stat.S_IXUSR)
    assert executable == script.read_text(encoding="utf-8").startswith("#!")


def test_shellcheck_has_nothing_against_the_scripts() -> None:
    done = subprocess.run(
        [_tool("shellcheck"), "--external-sources", *(f"templates/dataflow/{s}" for s in SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


class Gcloud:
    """A gcloud that notes how it is called, on a PATH with what the scripts need beside it.

    And nothing else: a machine may have the real one.
    """

    def __init__(self, folder: Path) -> None:
        self._calls = folder / "calls"
        self._bin = folder / "bin"
        self._bin.mkdir()
        for name in ("bash", "env", "dirname", "cat"):
            found = shutil.which(name)
            assert found
            (self._bin / name).symlink_to(found)
        (self._bin / "python3").symlink_to(sys.executable)
        program = self._bin / "gcloud"
        program.write_text(
            f'#!{sys.executable}\nimport json, sys\nwith open({str(self._calls)!r}, "a") as file:\n'
            '    file.write(json.dumps(sys.argv[1:]) + "\\n")\n'
        )
        program.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [json.loads(line) for line in lines]

    def remove(self) -> None:
        (self._bin / "gcloud").unlink()

    def run(
        self, script: str, variables: dict[str, str], *arguments: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(TEMPLATE / script), *arguments],
            env={"PATH": str(self._bin), **variables},
            cwd=self._bin,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def gcloud(tmp_path: Path) -> Gcloud:
    return Gcloud(tmp_path)


def test_build_calls_cloud_build_and_writes_the_template(gcloud: Gcloud) -> None:
    done = gcloud.run("build.sh", BUILD)
    assert done.returncode == 0, done.stderr
    submit, template = gcloud.calls
    assert submit == [
        *("builds", "submit", str(ROOT), "--project=my-project"),
        f"--config={TEMPLATE}/cloudbuild.yaml",
        f"--substitutions=_IMAGE={IMAGE}",
    ]
    assert template == [
        *("dataflow", "flex-template", "build", BUILD["TEMPLATE"], "--project=my-project"),
        f"--image={IMAGE}",
        "--sdk-language=PYTHON",
        f"--metadata-file={TEMPLATE}/metadata.json",
    ]


def _parameters(call: list[str]) -> dict[str, str]:
    """As gcloud reads them: what stands between the first two ^ separates them."""
    (text,) = [one.removeprefix("--parameters=") for one in call if one.startswith("--parameters=")]
    _, separator, pairs = text.split("^", 2)
    return dict(pair.split("=", 1) for pair in pairs.split(separator))


def test_launch_hands_over_all_that_is_given(gcloud: Gcloud) -> None:
    more = {
        "SERVICE_ACCOUNT": "sink@my-project.iam.gserviceaccount.com",
        "SUBNETWORK": "regions/europe-west1/subnetworks/default",
        "PUBLIC_IPS": "false",
        "MACHINE_TYPE": "n2-standard-2",
        "NUM_WORKERS": "1",
        "MAX_WORKERS": "4",
    }
    done = gcloud.run("launch.sh", LAUNCH | more, "--update", *LAUNCHED)
    assert done.returncode == 0, done.stderr
    (call,) = gcloud.calls
    assert _parameters(call) == GIVEN
    assert [one for one in call if not one.startswith("--parameters=")] == [
        *("dataflow", "flex-template", "run", "orders-to-lambda"),
        "--project=my-project",
        "--region=europe-west1",
        f"--template-file-gcs-location={BUILD['TEMPLATE']}",
        "--staging-location=gs://my-bucket/dataflow",
        "--temp-location=gs://my-bucket/dataflow",
        "--enable-streaming-engine",
        "--service-account-email=sink@my-project.iam.gserviceaccount.com",
        "--subnetwork=regions/europe-west1/subnetworks/default",
        "--disable-public-ips",
        "--worker-machine-type=n2-standard-2",
        "--num-workers=1",
        "--max-workers=4",
        "--update",
    ]


@pytest.mark.parametrize("regex", ["a,b", "(a|b)~c", "[a;b]|~c#", "a=b^c"])
def test_values_arrive_whatever_is_in_them(gcloud: Gcloud, regex: str) -> None:
    given = [one for one in LAUNCHED if not one.startswith("topics=")]
    done = gcloud.run("launch.sh", LAUNCH, *given, f"topics_regex={regex}")
    assert done.returncode == 0, done.stderr
    assert _parameters(gcloud.calls[0])["topics_regex"] == regex


@pytest.mark.parametrize(("script", "variables"), [("build.sh", BUILD), ("launch.sh", LAUNCH)])
def test_a_dry_run_only_shows_the_commands(
    gcloud: Gcloud, script: str, variables: dict[str, str]
) -> None:
    arguments = LAUNCHED if script == "launch.sh" else []
    called = gcloud.run(script, variables, *arguments)
    calls = gcloud.calls
    assert calls
    gcloud.remove()
    shown = gcloud.run(script, variables, "--dry_run", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert gcloud.calls == calls
    assert [shlex.split(line)[1:] for line in shown.stdout.splitlines()] == calls
    assert shown.stdout == called.stdout


@pytest.mark.parametrize(
    ("script", "variables", "arguments"),
    [("build.sh", BUILD, []), ("launch.sh", LAUNCH, LAUNCHED)],
)
def test_every_variable_that_is_missing_is_named(
    gcloud: Gcloud, script: str, variables: dict[str, str], arguments: list[str]
) -> None:
    done = gcloud.run(script, {}, *arguments)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert [line.split()[1] for line in said] == sorted(variables, key=_order(said))
    assert all(" is not set; give " in line for line in said)
    for name in variables:
        left = {other: value for other, value in variables.items() if other != name}
        (line,) = gcloud.run(script, left, *arguments).stderr.splitlines()
        assert line.startswith(f"error: {name} is not set; give ")
    assert gcloud.calls == []


def _order(said: list[str]) -> Any:
    return [line.split()[1] for line in said].index


@pytest.mark.parametrize(
    ("script", "change", "said"),
    [
        ("build.sh", {"PROJECT": "My Project"}, "PROJECT=My Project is not the ID of a project"),
        ("build.sh", {"IMAGE": "beam-lambda-sink"}, "IMAGE=beam-lambda-sink is not an image with"),
        ("build.sh", {"IMAGE": "a/b"}, "IMAGE=a/b is not an image with a tag"),
        (
            "build.sh",
            {"TEMPLATE": "my-bucket/x.json"},
            "TEMPLATE=my-bucket/x.json is not a template",
        ),
        ("build.sh", {"TEMPLATE": "gs://b/x"}, "TEMPLATE=gs://b/x is not a template's place"),
        ("launch.sh", {"REGION": "us-central1-a"}, "REGION=us-central1-a is not a region"),
        ("launch.sh", {"STAGING_LOCATION": "bucket"}, "STAGING_LOCATION=bucket is not a folder"),
        ("launch.sh", {"JOB_NAME": "Orders"}, "JOB_NAME=Orders is not a job's name"),
        ("launch.sh", {"JOB_NAME": "a" * 64}, "is not a job's name"),
        (
            "launch.sh",
            {"SERVICE_ACCOUNT": "me@example.com"},
            "SERVICE_ACCOUNT=me@example.com is not",
        ),
        ("launch.sh", {"SUBNETWORK": "default"}, "SUBNETWORK=default is not a subnetwork"),
        ("launch.sh", {"PUBLIC_IPS": "no"}, "PUBLIC_IPS=no is not true or false"),
        ("launch.sh", {"MACHINE_TYPE": "N2"}, "MACHINE_TYPE=N2 is not a machine type"),
        ("launch.sh", {"MAX_WORKERS": "0"}, "MAX_WORKERS=0 is not a number of workers"),
        ("launch.sh", {"NUM_WORKERS": "x"}, "NUM_WORKERS=x is not a number of workers"),
    ],
)
def test_a_variable_that_does_not_fit_is_named(
    gcloud: Gcloud, script: str, change: dict[str, str], said: str
) -> None:
    variables, arguments = (BUILD, []) if script == "build.sh" else (LAUNCH, LAUNCHED)
    done = gcloud.run(script, variables | change, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert gcloud.calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["topic=x"], ["topic is not a parameter of the template; README.md lists them"]),
        (["topics=x"], ["topics is given twice; give it once"]),
        (["on_error=retry"], ["on_error=retry is not allowed; give one of fail, log, ignore"]),
        (["batch_size=many"], ["batch_size=many is not of the form"]),
        (["--updat"], ["--updat is neither PARAMETER=VALUE nor --dry_run nor --update"]),
        (["sdk_container_image=x/y"], ["sdk_container_image is set from IMAGE; leave it out"]),
        (["topic=x", "batch_size=-1"], ["topic is not a parameter", "batch_size=-1 is not"]),
        # A value is no command.
        (["error_topic=$(touch hacked)"], ["error_topic=$(touch hacked) is not of the form"]),
    ],
)
def test_launch_checks_the_parameters_as_the_service_does(
    gcloud: Gcloud, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    done = gcloud.run("launch.sh", LAUNCH, *LAUNCHED, *arguments)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(said)
    for part in said:
        assert any(part in line for line in lines), lines
    assert gcloud.calls == []
    assert not list(tmp_path.rglob("hacked"))


def test_a_value_that_leaves_no_separator_is_said_so(gcloud: Gcloud) -> None:
    done = gcloud.run("launch.sh", LAUNCH, *LAUNCHED, "starting_timestamp=~;|#!%")
    assert done.stderr == (
        "error: the parameters have all of ~ ; | # ! % in them; leave one of these out\n"
    )


def test_launch_names_every_required_parameter(gcloud: Gcloud) -> None:
    done = gcloud.run("launch.sh", LAUNCH)
    named = [line.split()[1] for line in done.stderr.splitlines()]
    assert named == ["function"]
    assert all(" is missing; " in line for line in done.stderr.splitlines())


@pytest.mark.parametrize("script", ["build.sh", "launch.sh"])
def test_without_gcloud_it_is_said_so(gcloud: Gcloud, script: str) -> None:
    gcloud.remove()
    variables, arguments = (BUILD, []) if script == "build.sh" else (LAUNCH, LAUNCHED)
    done = gcloud.run(script, variables, *arguments)
    assert done.returncode == 2
    assert done.stderr == "error: gcloud is not on the PATH; install the Google Cloud CLI\n"


@pytest.mark.parametrize("script", ["build.sh", "launch.sh"])
def test_help_names_every_variable(gcloud: Gcloud, script: str) -> None:
    done = gcloud.run(script, {}, "--help")
    assert done.returncode == 0
    named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", done.stdout))
    used = set(re.findall(r"^check\w* ([A-Z_]+)", (TEMPLATE / script).read_text(), re.MULTILINE))
    assert used <= named


# -- what the README shows -------------------------------------------------------------------------


def _commands(script: str) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and arguments of each call of a script in the README."""
    text = (TEMPLATE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if f"templates/dataflow/{script}" in words:
            at = words.index(f"templates/dataflow/{script}")
            found.append((dict(word.split("=", 1) for word in words[:at]), words[at + 1 :]))
    return found


def test_the_readme_s_commands_lead_to_a_job(
    gcloud: Gcloud, launcher: Launcher, tmp_path: Path
) -> None:
    """Built, launched, checked as the service does, and submitted."""
    ((variables, arguments),) = _commands("build.sh")
    assert arguments == ["--dry_run"]
    assert gcloud.run("build.sh", variables).returncode == 0
    built = dict(word.lstrip("-").split("=", 1) for word in gcloud.calls[1] if "=" in word)
    metadata = json.loads(Path(built["metadata-file"]).read_text(encoding="utf-8"))
    spec = template_spec(built["image"], metadata)

    ((variables, arguments),) = _commands("launch.sh")
    done = gcloud.run("launch.sh", variables, *arguments)
    assert done.returncode == 0, done.stderr
    parameters = _parameters(gcloud.calls[-1])
    check(spec, parameters)
    # The launcher of this machine finds neither that Kafka nor that function.
    job = launcher.launch(spec, parameters | {"preflight": "false"})
    assert job.images == [built["image"]]


def test_the_readme_s_command_without_a_template_fits() -> None:
    text = (TEMPLATE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith("beam-lambda-sink ")]
    config, runner = parse_arguments(shlex.split(line)[1:])
    assert runner == "DataflowRunner"
    assert config.invoke.function.web_identity == "google"


def test_the_trust_policy_is_for_the_audience_that_is_the_default() -> None:
    text = (TEMPLATE / "README.md").read_text(encoding="utf-8")
    ((policy),) = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (statement,) = json.loads(policy)["Statement"]
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    assert statement["Principal"] == {"Federated": "accounts.google.com"}
    equals = statement["Condition"]["StringEquals"]
    assert equals["accounts.google.com:oaud"] == OPTIONS["aws_web_identity_audience"].default
