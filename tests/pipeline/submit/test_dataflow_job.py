"""A job as it is submitted to Dataflow: the request, and the pipeline that was staged with it.

The service is an emulation (tests/servers/dataflow_service.py), so this is what the client sends.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apache_beam
import pytest
from apache_beam.internal import pickler

from tests.conftest import Names
from tests.servers.aws_server import AwsServer
from tests.servers.dataflow_service import (
    ROOT,
    DataflowService,
    Submitted,
    everything_in,
    job_arguments,
    submit,
)
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import SecureBroker
from tests.sink import SECRET_KEY
from tests.transforms.aws.test_web_identity import Metadata

STEPS = Path(__file__).with_name("dataflow_steps.txt")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
IMAGE = "europe-west1-docker.pkg.dev/demo-project/beam/beam-lambda-sink:0.1.0"

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMARKEDACCESSKEY1",
    "AWS_SECRET_ACCESS_KEY": "marked-secret-key",
    "AWS_SESSION_TOKEN": "marked-session-token",
    "KAFKA_PASSWORD": "marked-kafka-password",
}
PROPERTIES = """
security.protocol=SASL_SSL
sasl.mechanisms=PLAIN
sasl.username=someone
sasl.password=${env:KAFKA_PASSWORD}
response.sasl.password=marked-response-password
schema.registry.basic.auth.user.info=user:marked-registry-login
"""
TOKEN = "expires-99999999999999-marked-session"
MARKS = [
    *SECRETS.values(),
    "marked-response-password",
    "marked-registry-login",
]


@pytest.fixture(scope="module")
def service() -> Iterator[DataflowService]:
    with DataflowService() as running:
        yield running


@pytest.fixture(scope="module")
def staging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staging")


@pytest.fixture(scope="module")
def ended(
    service: DataflowService, staging: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Submitted, subprocess.CompletedProcess[str]]:
    """A job with all that has steps of its own, and secrets wherever one can be."""
    folder = tmp_path_factory.mktemp("files")
    properties, filters = folder / "kafka.properties", folder / "filters.json"
    properties.write_text(PROPERTIES)
    filters.write_text('{"Filters": [{"Pattern": "{\\"topic\\": [\\"orders\\"]}"}]}')
    return submit(
        service,
        staging,
        f"--kafka_config_file={properties}",
        f"--filter_criteria={filters}",
        "--schema_registry_url=http://127.0.0.1:1",
        "--response_topic=orders-results",
        "--on_error=log",
        "--error_topic=orders-errors",
        "--aws_region=eu-central-1",
        "--aws_role_arn=arn:aws:iam::123456789012:role/invoke-orders",
        "--aws_web_identity=google",
        f"--sdk_container_image={IMAGE}",
        "--max_num_workers=4",
        "--service_account_email=sink@demo-project.iam.gserviceaccount.com",
        environ=SECRETS,
    )


@pytest.fixture(scope="module")
def job(ended: tuple[Submitted, subprocess.CompletedProcess[str]]) -> Submitted:
    return ended[0]


# -- the request -----------------------------------------------------------------------------------


def test_it_is_a_streaming_job_as_this_pipeline_needs_it(job: Submitted) -> None:
    environment = job.environment
    # JOB_TYPE_STREAMING, by the number that Google's client sends.
    assert job.request["type"] == 2
    assert environment["version"]["job_type"] == "FNAPI_STREAMING"
    assert {"use_runner_v2", "enable_streaming_engine", "enable_windmill_service"} <= set(
        environment["experiments"]
    )
    assert environment["serviceOptions"] == ["streaming_mode_at_least_once"]
    assert job.options["save_main_session"] is False
    assert job.request["name"] == "beam-lambda-sink-orders-to-lambda"
    assert job.request["labels"] == {"beam-lambda-sink": "0_1_0"}


def test_what_is_given_to_the_service_arrives(job: Submitted) -> None:
    assert job.images == [IMAGE]
    assert job.pool["workerHarnessContainerImage"] == IMAGE
    assert job.pool["autoscalingSettings"]["maxNumWorkers"] == 4
    assert job.environment["serviceAccountEmail"] == "sink@demo-project.iam.gserviceaccount.com"


def test_with_an_image_nothing_of_the_program_is_staged(job: Submitted) -> None:
    names = {package["name"] for package in job.pool["packages"]}
    # A list of versions, for people.
    assert names <= {"submission_environment_dependencies.txt"}


def test_the_program_leaves_the_job_alone(
    ended: tuple[Submitted, subprocess.CompletedProcess[str]],
) -> None:
    _, program = ended
    assert program.returncode == 0, program.stderr
    assert "goes on" in program.stderr
    assert "Traceback" not in program.stderr
    assert program.stdout.startswith("records: ")


# -- the pipeline ----------------------------------------------------------------------------------


def test_the_steps_have_the_names_they_always_had(job: Submitted) -> None:
    """A job is updated to one whose steps have the same names; a change here ends that."""
    assert job.labels == STEPS.read_text(encoding="utf-8").splitlines()


def test_steps_that_hold_back_give_it_all_at_a_drain(job: Submitted) -> None:
    """What fires when the watermark passes the window's end, as a drain has it."""
    steps = job.steps
    holding = {name: step for name, step in steps.items() if step.timers}
    assert set(holding) == {"BatchAndInvoke/Pending", "Commit/CommitPartition"}
    for step in holding.values():
        assert set(step.timers.values()) == {"EVENT_TIME", "PROCESSING_TIME"}
    assert steps["BatchAndInvoke/Pending"].states == {
        "pending_place": "read_modify_write_spec",
        "pending_chunks_0": "bag_spec",
        "pending_chunks_1": "bag_spec",
        "pending_early": "bag_spec",
    }
    assert steps["Commit/CommitPartition"].states == {"commit_done": "read_modify_write_spec"}
    assert set(job.pipeline.requirements) == {
        "beam:requirement:pardo:stateful:v1",
        "beam:requirement:pardo:splittable_dofn:v1",
    }


def test_what_is_kept_and_what_crosses_is_bytes_of_our_own_forms(job: Submitted) -> None:
    """No pickle of a class: that would be lost with the class, or its place."""
    components = job.pipeline.components

    def kind(id: str) -> str:
        """The coder's urn; of one of ours its class."""
        spec = components.coders[id].spec
        ours = re.search(rb"_[A-Z]\w+Coder(?=\$)", spec.payload)
        return ours[0].decode() if ours else spec.urn

    for step in job.steps.values():
        for spec in step.payload.state_specs.values():
            id = spec.bag_spec.element_coder_id or spec.read_modify_write_spec.coder_id
            assert kind(id) == "beam:coder:bytes:v1", step.name
    crossing = {}
    for transform in components.transforms.values():
        if (step := job.steps.get(transform.unique_name)) and step.payload.state_specs:
            (pcollection,) = transform.inputs.values()
            coder = components.coders[components.pcollections[pcollection].coder_id]
            crossing[step.name] = kind(coder.component_coder_ids[1])
    assert crossing == dict.fromkeys(
        ["BatchAndInvoke/Pending", "Commit/CommitPartition"], "beam:coder:bytes:v1"
    )
    restrictions = {
        name: [
            kind(id)
            for id in components.coders[step.payload.restriction_coder_id].component_coder_ids
        ]
        for name, step in job.steps.items()
        if step.payload.restriction_coder_id
    }
    assert restrictions == {
        "Read/FindPartitions": ["_FindingCoder", "_WatermarkCoder"],
        "Read/ReadPartition": ["_RangeCoder", "_WatermarkCoder"],
    }


def test_timers_of_different_steps_have_different_names(job: Submitted) -> None:
    """Runners lose timers of fused steps that share one."""
    names = [name for step in job.steps.values() for name in step.timers]
    assert len(set(names)) == len(names) == 5


def test_the_native_reader_has_what_it_reads(job: Submitted) -> None:
    find, read = job.steps["Read/FindPartitions"], job.steps["Read/ReadPartition"]
    for step in (find, read):
        assert step.payload.restriction_coder_id
        for part in (b"127.0.0.1:1", b"orders", b"orders-to-lambda", b"TRIM_HORIZON"):
            assert part in step.pickled
        assert b"/kafka.properties" in step.pickled


def test_a_drain_stops_reading(job: Submitted) -> None:
    """The service cuts the restrictions down, by a capability of the workers."""
    (environment,) = job.pipeline.components.environments.values()
    assert "beam:transform:sdf_truncate_sized_restrictions:v1" in environment.capabilities


def test_every_step_runs_in_the_image(job: Submitted) -> None:
    assert set(job.container_images.values()) == {IMAGE}
    environments = {step.environment for step in job.steps.values()}
    assert environments <= set(job.container_images)


def test_our_classes_are_named_and_not_copied(job: Submitted) -> None:
    """So workers run the code of their image, and an update of it is an update of the job."""
    for name, step in job.steps.items():
        assert b"transforms." in step.pickled, name
        assert b"__main__" not in step.pickled, name


# -- secrets ---------------------------------------------------------------------------------------


def test_no_secret_is_in_the_request_or_in_what_is_staged(job: Submitted, staging: Path) -> None:
    contents = [json.dumps(job.request).encode()]
    contents += [path.read_bytes() for path in staging.rglob("*") if path.is_file()]
    found = b"\n".join(part for content in contents for part in everything_in(content))
    # That it looks everywhere: a value of a packed DoFn, and its class.
    assert b"arn:aws:iam::123456789012:role/invoke-orders" in found
    assert b"_PendingFn" in found
    assert [mark for mark in MARKS if mark.encode() in found] == []


def test_no_secret_is_in_the_log(
    ended: tuple[Submitted, subprocess.CompletedProcess[str]],
) -> None:
    _, program = ended
    said = program.stdout + program.stderr
    assert [mark for mark in MARKS if mark in said] == []


def test_a_worker_has_what_it_needs_to_log_in_and_no_token(
    service: DataflowService,
    secure: SecureBroker,
    manager: SecretsManager,
    names: Names,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing but the job's finder of partitions and AWS's chain a worker is let in by a
    broker that takes IAM, though who submits has a token of its own by then."""
    topic = names.topic()
    secure.create_topic(topic, 2)
    trusted = manager.keep(certificate=secure.ca.read_text())
    job, program = submit(
        service,
        tmp_path,
        f"--kafka_bootstrap_servers={secure.iam}",
        f"--kafka_access=IAM_AUTH,SERVER_ROOT_CA_CERTIFICATE={trusted}",
        f"--topics={topic}",
        f"--sdk_container_image={IMAGE}",
        environ=manager.env | {"AWS_SESSION_TOKEN": TOKEN},
    )
    for name, text in manager.env.items():
        if name.startswith("AWS_") and name != "AWS_DEFAULT_REGION":
            monkeypatch.setenv(name, text)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    before = secure.accepted()
    find, *_ = pickler.loads(job.steps["Read/FindPartitions"].payload.do_fn.payload)
    starts, _ = find._config.source.find(None, {})
    assert starts == {(topic, 0): (0, 0), (topic, 1): (0, 0)}
    assert secure.accepted() > before
    sent = [json.dumps(job.request).encode()]
    sent += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    found = b"\n".join(part for content in sent for part in everything_in(content))
    assert trusted.encode() in found
    # Of a token: its beginning, what is in it; and what it would be made with.
    marks = ["aHR0cHM6Ly9rYWZrYS4", "X-Amz-Signature", SECRET_KEY, TOKEN, "BEGIN CERTIFICATE"]
    assert [mark for mark in marks if mark.encode() in found] == []
    assert [mark for mark in marks if mark in program.stdout + program.stderr] == []


def test_the_role_for_kafka_goes_to_all_workers(service: DataflowService, tmp_path: Path) -> None:
    """And whose identity it is assumed with, to what reads, writes and commits."""
    role = "arn:aws:iam::123456789012:role/read-orders"
    properties = tmp_path / "kafka.properties"
    properties.write_text("security.protocol=SASL_SSL\nsasl.mechanism=AWS_MSK_IAM\n")
    with closing(Metadata()) as google, AwsServer() as aws:
        job, _ = submit(
            service,
            tmp_path,
            f"--kafka_config_file={properties}",
            f"--kafka_role_arn={role}",
            "--aws_web_identity=google",
            "--event_source_arn=arn:aws:kafka:eu-west-1:123456789012:cluster/orders/5a7c-1",
            "--envelope=kafka_event",
            "--response_topic=orders-results",
            "--reply=any",
            f"--sdk_container_image={IMAGE}",
            environ={"GCE_METADATA_HOST": google.address, "AWS_ENDPOINT_URL_STS": aws.url},
        )
    assert {form["Action"] for form in aws.asked} == {"AssumeRoleWithWebIdentity"}
    steps = ("Read/FindPartitions", "Read/ReadPartition", "Write/Produce", "Commit/CommitPartition")
    for name in steps:
        for part in (role, "google", "eu-west-1"):
            assert part.encode() in job.steps[name].pickled, (name, part)


# -- without an image ------------------------------------------------------------------------------


def test_from_a_checkout_the_workers_install_its_package(
    service: DataflowService, tmp_path: Path
) -> None:
    job, _ = submit(service, tmp_path, "--job_name=another", "--labels=team=orders")
    assert job.images == [
        f"gcr.io/cloud-dataflow/v1beta3/beam_python{PYTHON}_sdk:{apache_beam.__version__}"
    ]
    assert "workflow.tar.gz" in {package["name"] for package in job.pool["packages"]}
    assert job.request["name"] == "another"
    assert job.request["labels"] == {"team": "orders", "beam-lambda-sink": "0_1_0"}
    parts = list(everything_in((tmp_path / "workflow.tar.gz").read_bytes()))
    for file in ("pipeline/cli.py", "transforms/invoke/invoke.py"):
        assert (ROOT / file).read_bytes() in parts
    # What is neither decoded nor filtered has no step for it.
    skipped = {"Decode", "Filter"}
    steps = STEPS.read_text(encoding="utf-8").splitlines()
    assert job.labels == [step for step in steps if step.split("/")[0] not in skipped]


# -- how a job ends --------------------------------------------------------------------------------


def _run(service: DataflowService, staging: Path) -> subprocess.CompletedProcess[str]:
    """To the end of the job."""
    command = [sys.executable, "-m", "pipeline", *job_arguments(service, staging)]
    return subprocess.run(
        [*command, f"--sdk_container_image={IMAGE}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_job_that_somebody_drains_has_not_failed(tmp_path: Path) -> None:
    """And its counters tell of a halted partition, which has an exit code of its own."""
    counters = {("write", "responses"): 7, ("halted", "orders|1|41|BatchFailed|ValueError"): 1}
    with DataflowService(ending="JOB_STATE_DRAINED", counters=counters) as service:
        program = _run(service, tmp_path)
    assert "the job 2026-01-01_00_00_00-1 was ended: DRAINED" in program.stderr
    assert "Traceback" not in program.stderr
    assert program.returncode == 3
    assert program.stdout.startswith("records: 7 ")
    assert "halted: orders-1 at offset 41" in program.stderr


@pytest.mark.slow
def test_a_job_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    trace = (
        "Traceback (most recent call last):\n  File x\n"
        "transforms.errors.FunctionConfigError: --function=f cannot be invoked: gone"
    )
    with DataflowService(ending="JOB_STATE_FAILED", messages=[trace]) as service:
        program = _run(service, tmp_path)
    assert program.returncode == 1
    assert program.stderr.splitlines()[-1] == "error: --function=f cannot be invoked: gone"
