"""Dataflow: what is added to a job's options, and what is made of errors.

What is checked before: tests/pipeline/options/test_checks_dataflow.py. Jobs as they are submitted:
test_dataflow_job.py; the template: test_flex_template.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, StandardOptions
from apache_beam.runners.runner import PipelineState
from google.api_core.exceptions import PermissionDenied
from google.auth.exceptions import DefaultCredentialsError

from pipeline.build import build
from pipeline.options.resolve import parse_arguments, resolve
from pipeline.submit import dataflow
from pipeline.submit.streaming import ended_on_purpose, runner_options
from tests.pipeline.options.given import IMAGE, JOB, job_problems_of
from tests.servers.dataflow_service import ROOT, DataflowService, job_arguments
from transforms.errors import FunctionConfigError, JobError, UsageError
from transforms.read.streaming import (
    Finding,
    FoundPartition,
    _FindProvider,
    _ReadProvider,
)


def test_the_program_without_google_s_libraries() -> None:
    """As a whole, in an interpreter that finds none; and the DirectRunner needs none."""
    hidden = "import sys; sys.modules['google.cloud.dataflow'] = None; "
    call = "from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--kafka_bootstrap_servers=127.0.0.1:1", "--topics=t", "--consumer_group=g"]
    direct = subprocess.run(
        [sys.executable, "-c", hidden + call, *arguments, "--function=f", "--explain"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert direct.returncode == 0, direct.stderr
    given = [f"--{name}={value}" for name, value in JOB.items()]
    program = subprocess.run(
        [sys.executable, "-c", hidden + call, *arguments, *given, "--runner=DataflowRunner"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert program.returncode == 2
    # With all other problems, each in a line; what else is said is Google's, on an old Python.
    assert [line for line in program.stderr.splitlines() if line.startswith("error: ")] == [
        "error: --function is missing; for example --function=process-orders:live",
        "error: --runner=DataflowRunner needs Google's libraries: pip install "
        "'beam-lambda-sink[gcp]'",
    ]


def test_all_problems_are_told_at_once() -> None:
    resolved = resolve(["--runner=DataflowRunner", "--topics=orders", "--regoin=europe-west1"])
    named = [problem.split()[0] for problem in resolved.problems]
    assert named == [
        "--regoin",
        "--kafka_bootstrap_servers",
        "--consumer_group",
        "--function",
        "--project",
        "--region",
        "--temp_location",
    ]


def test_what_a_template_s_launcher_adds_is_none_of_the_user_s_doing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [f"--{name}={value}" for name, value in JOB.items()]
    arguments += ["--kafka_bootstrap_servers=b:1", "--topics=t", "--consumer_group=g"]
    arguments += ["--function=f", "--runner=DataflowRunner", "--something_new=1"]
    with pytest.raises(UsageError, match="--something_new is not an option"):
        parse_arguments(arguments)
    parse_arguments([*arguments, "--template_location=gs://bucket/job_object"])
    assert "--something_new is not an option" in caplog.text


# -- options ---------------------------------------------------------------------------------------


def _added(**given: str | None) -> list[str]:
    arguments = [f"--{name}={value}" for name, value in (JOB | given).items() if value]
    made = runner_options("DataflowRunner", arguments, bounded=False, group="orders")
    assert made[: len(arguments)] == arguments
    return made[len(arguments) :]


def test_a_job_gets_what_this_pipeline_needs() -> None:
    assert _added() == [
        "--streaming",
        "--dataflow_service_options=streaming_mode_at_least_once",
        "--no_save_main_session",
        "--labels=beam-lambda-sink=0_1_0",
        "--job_name=beam-lambda-sink-orders",
    ]


@pytest.mark.parametrize(
    ("given", "kept_out"),
    [
        (
            {"dataflow_service_options": "streaming_mode_exactly_once"},
            "--dataflow_service_options=streaming_mode_at_least_once",
        ),
        ({"labels": "beam-lambda-sink=mine"}, "--labels=beam-lambda-sink=0_1_0"),
        ({"labels": '{"beam-lambda-sink": "mine"}'}, "--labels=beam-lambda-sink=0_1_0"),
        ({"job_name": "mine"}, "--job_name=beam-lambda-sink-orders"),
    ],
)
def test_what_is_given_is_left_alone(given: dict[str, str | None], kept_out: str) -> None:
    assert kept_out in _added()
    assert kept_out not in _added(**given)


def test_other_options_of_the_service_and_labels_are_kept_beside_ours() -> None:
    added = _added(dataflow_service_options="enable_prime", labels="team=orders")
    assert "--dataflow_service_options=streaming_mode_at_least_once" in added
    assert "--labels=beam-lambda-sink=0_1_0" in added


def test_the_main_session_may_be_asked_for() -> None:
    made = runner_options("DataflowRunner", ["--save_main_session"], bounded=False)
    assert "--no_save_main_session" not in made


def test_temporary_files_go_where_the_staged_ones_go() -> None:
    added = _added(temp_location=None, staging_location="gs://bucket/staging")
    assert "--temp_location=gs://bucket/staging" in added


def test_a_checkout_is_what_the_workers_install() -> None:
    assert f"--setup_file={ROOT / 'pyproject.toml'}" in _added(sdk_container_image=None)
    for given in ({"extra_package": "x.whl"}, {"setup_file": "./pyproject.toml"}):
        added = _added(sdk_container_image=None, **given)
        assert not any(option.startswith("--setup_file") for option in added)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("orders", "beam-lambda-sink-orders"),
        ("x" * 46, "beam-lambda-sink-" + "x" * 46),
        ("Orders_to.Lambda", "beam-lambda-sink-orders-to-lambda-A"),
        ("ä", "beam-lambda-sink-A"),
        ("x" * 100, "beam-lambda-sink-" + "x" * 37 + "-A"),
        ("x" * 36 + "--" + "y" * 50, "beam-lambda-sink-" + "x" * 36 + "-A"),
    ],
)
def test_a_job_is_called_after_its_group(group: str, name: str) -> None:
    # A: a checksum, where the name alone could be another group's too.
    name = name.replace("-A", "-" + hashlib.sha256(group.encode()).hexdigest()[:8])
    assert dataflow.job_name(group) == name
    assert job_problems_of(job_name=name) == []


def test_beam_s_own_checks_for_the_service_pass() -> None:
    """All of them, which an endpoint on this machine is spared; nothing is staged or sent."""
    arguments = [f"--{name}={value}" for name, value in JOB.items()]
    arguments += ["--runner=DataflowRunner", "--dry_run=true"]
    options = PipelineOptions(runner_options("DataflowRunner", arguments, False, "orders"))
    pipeline = beam.Pipeline(options=options)
    ours = ["--kafka_bootstrap_servers=b:1", "--topics=t", "--consumer_group=g", "--function=f"]
    config, _ = parse_arguments([*arguments, *ours])
    build(pipeline, config)
    result = pipeline.run()
    # On the service Beam would by itself send the main module along.
    assert options.view_as(SetupOptions).save_main_session is False
    assert options.view_as(StandardOptions).streaming
    assert result.job.proto.name == "beam-lambda-sink-orders"
    assert len(result.job.proto_pipeline.components.environments) == 1


# -- updates ---------------------------------------------------------------------------------------


@pytest.fixture
def service() -> Iterator[DataflowService]:
    with DataflowService() as running:
        yield running


def _update(service: DataflowService, folder: Path, name: str, *more: str) -> PipelineOptions:
    arguments = [*job_arguments(service, folder), f"--job_name={name}", *more]
    return PipelineOptions(arguments)


def test_the_running_job_is_found_on_whatever_page_it_is(
    service: DataflowService, tmp_path: Path
) -> None:
    for number in range(7):
        service.add(f"other-{number}")
    service.add("orders", "JOB_STATE_RUNNING")
    dataflow.check_update(_update(service, tmp_path, "orders", "--update"))
    assert len(service.calls) == 4


@pytest.mark.parametrize("state", ["JOB_STATE_DRAINED", "JOB_STATE_CANCELLED", "JOB_STATE_DONE"])
def test_no_running_job_is_one_line_and_no_endless_search(
    service: DataflowService, tmp_path: Path, state: str
) -> None:
    for number in range(3):
        service.add(f"other-{number}")
    service.add("orders", state)
    with pytest.raises(UsageError) as raised:
        dataflow.check_update(_update(service, tmp_path, "orders", "--update"))
    assert raised.value.problems == (
        "--update: no job named orders runs in demo-project, europe-west1; check --job_name, or "
        "leave --update out to start one",
    )
    assert len(service.calls) == 2


def test_without_update_nobody_is_asked(service: DataflowService, tmp_path: Path) -> None:
    dataflow.check_update(_update(service, tmp_path, "orders"))
    assert service.calls == []


def _program(
    service: DataflowService, folder: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *job_arguments(service, folder)]
    return subprocess.run(
        [*command, f"--sdk_container_image={IMAGE}", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_program_refuses_an_update_of_nothing(service: DataflowService, tmp_path: Path) -> None:
    program = _program(service, tmp_path, "--update")
    assert program.returncode == 2
    (error,) = [line for line in program.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: --update: no job named beam-lambda-sink-orders-to-lambda runs")
    assert service.submitted == []


def test_an_update_names_the_job_it_replaces(service: DataflowService, tmp_path: Path) -> None:
    """Written as a template's launcher has it, which is enough to see the request."""
    job = service.add("beam-lambda-sink-orders-to-lambda")
    program = _program(
        service, tmp_path, "--update", f"--template_location={tmp_path / 'job_object'}"
    )
    assert program.returncode == 0, program.stderr
    assert f'"replaceJobId": "{job}"' in (tmp_path / "job_object").read_text()


# -- a drain ---------------------------------------------------------------------------------------


def test_a_drain_cuts_down_what_has_no_end_and_nothing_else() -> None:
    """What a runner asks of a restriction when it drains: what is still to be read of it."""
    bounded = FoundPartition("t", 0, 5, 10, bounded=True)
    unbounded = FoundPartition("t", 0, 5, 10, bounded=False)
    reads = _ReadProvider()
    assert reads.truncate(bounded, reads.initial_restriction(bounded)) is not None
    assert reads.truncate(unbounded, reads.initial_restriction(unbounded)) is None
    finds = _FindProvider()
    assert finds.truncate(Finding(True), Finding(True)) is not None
    assert finds.truncate(Finding(False), Finding(False)) is None


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionDenied("who are you"), "the job cannot be submitted: 403 who are you"),
        (OSError("Could not upload to GCS path gs://b"), "the job cannot be submitted: Could not"),
        (RuntimeError("Failed to\n build"), "the job cannot be submitted: Failed to build"),
        (DefaultCredentialsError("x"), "there are no Google credentials: run gcloud auth"),
    ],
)
def test_what_google_has_against_a_job_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(JobError) as raised, dataflow.submission():
        raise error
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_options_that_beam_refuses_are_a_mistake_of_use() -> None:
    with (
        pytest.raises(UsageError, match="Beam does not take the options: Invalid"),
        dataflow.submission(),
    ):
        raise ValueError("Invalid\n value")


def test_a_bug_is_not_made_a_mistake_of_the_user_s() -> None:
    with pytest.raises(KeyError), dataflow.submission():
        raise KeyError("x")
    with pytest.raises(FunctionConfigError), dataflow.submission():
        raise FunctionConfigError("ours")


@pytest.mark.parametrize("status", [400, 403, 409])
def test_the_program_says_what_the_service_refuses(
    service: DataflowService, tmp_path: Path, status: int
) -> None:
    service.refusal = (status, "this is refused")
    program = _program(service, tmp_path)
    assert program.returncode == 1
    said = program.stderr.splitlines()
    assert said[-1].startswith(f"error: the job cannot be submitted: {status} ")
    assert said[-1].endswith("this is refused")
    assert "Traceback" not in program.stderr


def test_a_second_job_of_a_group_is_not_begun(service: DataflowService, tmp_path: Path) -> None:
    service.taken = True
    program = _program(service, tmp_path)
    assert program.returncode == 1
    last = program.stderr.splitlines()[-1]
    assert last.startswith("error: the job cannot be submitted: There is already active job named")
    assert "beam-lambda-sink-orders-to-lambda" in last


@dataclass
class Result:
    state: str


@pytest.mark.parametrize(
    ("state", "on_purpose"),
    [
        (PipelineState.DRAINED, True),
        (PipelineState.UPDATED, True),
        (PipelineState.CANCELLED, True),
        (PipelineState.FAILED, False),
        (PipelineState.DONE, False),
    ],
)
def test_who_drains_updates_or_cancels_a_job_means_to(state: str, on_purpose: bool) -> None:
    assert bool(ended_on_purpose(Result(state))) == on_purpose
    assert not ended_on_purpose(SimpleNamespace())


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            "Dataflow pipeline failed. State: FAILED, Error:\nTraceback\n  File x\n"
            "transforms.errors.FunctionConfigError: --function=f cannot be invoked: gone",
            FunctionConfigError,
            "--function=f cannot be invoked: gone",
        ),
        (
            "Dataflow pipeline failed. State: FAILED, Error:\nWorkflow failed.\n\n",
            JobError,
            "the job 7 has failed: Workflow failed.; its log in Cloud Logging says more",
        ),
        ("", JobError, "the job 7 has failed: RuntimeError; its log in Cloud Logging says more"),
    ],
)
def test_a_failed_job_says_why_in_one_line(text: str, kind: type[Exception], said: str) -> None:
    error = dataflow.failure(RuntimeError(text), "7")
    assert type(error) is kind
    assert str(error) == said
