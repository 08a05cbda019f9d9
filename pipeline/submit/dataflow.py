"""Dataflow: what a job there needs besides the options of the pipeline itself.

Google's libraries are an extra, so they are imported where they are used, once they are known to be
there. Why it is done so: docs/adr/0014-dataflow.md.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions
from apache_beam.runners.runner import PipelineState

from transforms.errors import JobError, SinkError, UsageError, from_runner
from transforms.text_file import GCS_FORM, SECRET_FORM, is_remote

_LOGGER = logging.getLogger(__name__)

RUNNER = "DataflowRunner"

LABEL = "beam-lambda-sink"
"""Label of all jobs of this program; its value is the version."""

_STREAMING_MODE = "streaming_mode_"
_AT_LEAST_ONCE = "streaming_mode_at_least_once"

_PROJECT_ID = re.compile(r"([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]*[a-z0-9]")
_REGION = re.compile(r"[a-z]+-[a-z]+[0-9]+")
_LOCATION = re.compile(r"gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/\S*")
_JOB_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MOST_IN_A_JOB_NAME = 63


def has_libraries() -> bool:
    """Whether Google's libraries are installed."""
    try:
        return find_spec("google.cloud.dataflow") is not None
    except ModuleNotFoundError:
        return False


def own_project() -> Path | None:
    """The pyproject.toml of this program, where it runs from a checkout."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    return path if path.is_file() else None


# -- checks ----------------------------------------------------------------------------------------


def problems(
    beam: argparse.Namespace,
    config_file: str | None,
    libraries: Callable[[], bool] = has_libraries,
    project: Callable[[], Path | None] = own_project,
) -> list[str]:
    """What keeps a job from being submitted, or its workers from working; one line each.

    Args:
        beam: Beam's options.
        config_file: What --kafka_config_file names.
        libraries: Whether Google's are installed; injected for tests, as is the next.
        project: The pyproject.toml to build the workers' package from.
    """
    found = []
    if not libraries():
        found.append(
            f"--runner={RUNNER} needs Google's libraries: pip install 'beam-lambda-sink[gcp]'"
        )
    found += _check_place(beam)
    found += _check_locations(beam)
    found += _check_code(beam, project())
    if config_file and not is_remote(config_file) and not _image(beam):
        found.append(
            f"--kafka_config_file={config_file} is a file of this machine, which Dataflow's "
            f"workers do not have; put it into Secret Manager ({SECRET_FORM}) or Cloud Storage "
            f"({GCS_FORM})"
        )
    return found


def _check_place(beam: argparse.Namespace) -> list[str]:
    found = []
    project, region, name = beam.project, beam.region, beam.job_name
    if not project:
        found.append("--project is missing; for example --project=my-project")
    elif project.isdecimal():
        found.append(f"--project={project} is a project's number; give its ID")
    elif not _PROJECT_ID.fullmatch(project):
        found.append(f"--project={project} is not the ID of a project, such as my-project")
    if not region:
        found.append("--region is missing; for example --region=europe-west1")
    elif not _REGION.fullmatch(region):
        found.append(f"--region={region} is not a region, such as europe-west1")
    if name and not (_JOB_NAME.fullmatch(name) and len(name) <= _MOST_IN_A_JOB_NAME):
        found.append(
            f"--job_name={name} is not the name of a job: up to {_MOST_IN_A_JOB_NAME} lower case "
            f"letters, digits and -, the first a letter and the last not -"
        )
    return found


def _check_locations(beam: argparse.Namespace) -> list[str]:
    found = []
    if not beam.temp_location and not beam.staging_location:
        found.append(
            "--temp_location is missing; for example --temp_location=gs://my-bucket/dataflow"
        )
    for name in ("temp_location", "staging_location"):
        location = getattr(beam, name)
        if not location:
            continue
        if location.startswith("gs://") or not _is_local(beam):
            if not _LOCATION.fullmatch(location):
                found.append(f"--{name}={location} is not a folder such as gs://my-bucket/dataflow")
        elif not os.path.isdir(location):
            found.append(f"--{name}={location} is not there; create it first")
    return found


def _check_code(beam: argparse.Namespace, project: Path | None) -> list[str]:
    """Whether the workers will have this program."""
    setup = beam.setup_file
    if setup and not os.path.isfile(setup):
        return [f"--setup_file={setup} is not there"]
    if setup and not os.path.dirname(setup):
        return [f"--setup_file={setup} needs its folder: --setup_file=./{setup}"]
    if _brings_code(beam) or project:
        return []
    return [
        "--sdk_container_image is missing: the image that the workers run, with this program in "
        "it, as templates/dataflow builds it"
    ]


def _image(beam: argparse.Namespace) -> str | None:
    return beam.sdk_container_image or beam.worker_harness_container_image


def _brings_code(beam: argparse.Namespace) -> bool:
    return bool(_image(beam) or beam.setup_file or beam.extra_packages)


def _is_local(beam: argparse.Namespace) -> bool:
    """Whether the service is an emulation on this machine, which Beam lets use local folders."""
    return urlsplit(beam.dataflow_endpoint or "").netloc.startswith("localhost")


# -- options ---------------------------------------------------------------------------------------


def added_options(
    beam: argparse.Namespace,
    group: str,
    project: Callable[[], Path | None] = own_project,
) -> list[str]:
    """Options for this pipeline that the user has not given. Pure but for `project`.

    Streaming Engine and Runner v2 are not among them: Beam asks for both by itself.

    Args:
        beam: Beam's options as the user gave them.
        group: The consumer group; by default the job is called after it, so that the service
            refuses a second job of the same group in that region.
        project: The pyproject.toml to build the workers' package from.
    """
    added = []
    services = beam.dataflow_service_options or []
    if not any(option.startswith(_STREAMING_MODE) for option in services):
        # Kafka and the function see at least once in any case; exactly once inside costs more.
        added.append(f"--dataflow_service_options={_AT_LEAST_ONCE}")
    if beam.save_main_session is None:
        # All classes can be imported, and Beam would send whatever the main module holds.
        added.append("--no_save_main_session")
    labels = beam.labels or []
    if not any(LABEL in label for label in labels):
        version = re.sub(r"[^a-z0-9_-]", "_", metadata.version("beam-lambda-sink").lower())
        added.append(f"--labels={LABEL}={version}")
    if not beam.job_name:
        added.append(f"--job_name={job_name(group)}")
    if not beam.temp_location:
        added.append(f"--temp_location={beam.staging_location}")
    if not _brings_code(beam) and (found := project()):
        added.append(f"--setup_file={found}")
    return added


def job_name(group: str) -> str:
    """A job's name for a consumer group: what is no letter, digit or - becomes -.

    Where the name does not say all of the group's, a checksum does, for no two groups to share one.
    """
    whole = f"{LABEL}-{group}"
    name = re.sub(r"[^a-z0-9]+", "-", whole.lower())
    if name == whole and _JOB_NAME.fullmatch(name) and len(name) <= _MOST_IN_A_JOB_NAME:
        return name
    checksum = "-" + hashlib.sha256(group.encode()).hexdigest()[:8]
    return name[: _MOST_IN_A_JOB_NAME - len(checksum)].rstrip("-") + checksum


# -- the job ---------------------------------------------------------------------------------------


def _list_jobs(options: PipelineOptions) -> Iterable[Any]:
    """All jobs of the project and region that have not ended, whatever page they are on."""
    from apache_beam.runners.dataflow.internal.apiclient import DataflowApplicationClient
    from google.cloud import dataflow

    cloud = options.view_as(GoogleCloudOptions)
    request = dataflow.ListJobsRequest(
        project_id=cloud.project,
        location=cloud.region,
        filter=dataflow.ListJobsRequest.Filter.ACTIVE,
    )
    return DataflowApplicationClient(options)._jobs_client.list_jobs(request)


def check_update(
    options: PipelineOptions, list_jobs: Callable[[PipelineOptions], Iterable[Any]] = _list_jobs
) -> None:
    """Whether there is a job for --update to replace. Beam 2.77 would look for it without end.

    Raises:
        UsageError: There is none.
    """
    cloud = options.view_as(GoogleCloudOptions)
    if not cloud.update:
        return
    for job in list_jobs(options):
        if job.name == cloud.job_name and job.current_state.name in (
            "JOB_STATE_RUNNING",
            "JOB_STATE_DRAINING",
        ):
            return
    raise UsageError(
        [
            f"--update: no job named {cloud.job_name} runs in {cloud.project}, {cloud.region}; "
            f"check --job_name, or leave --update out to start one"
        ]
    )


@contextmanager
def submission() -> Iterator[None]:
    """What Google or Beam has against a job as one line each.

    Raises:
        UsageError: Beam does not take the options.
        JobError: The service does not take the job, or what it needs cannot be staged.
    """
    from google.auth.exceptions import DefaultCredentialsError

    try:
        yield
    except SinkError:
        raise
    except DefaultCredentialsError:
        raise JobError(
            "there are no Google credentials: run gcloud auth application-default login, or set "
            "GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except ValueError as error:
        raise UsageError(["Beam does not take the options: " + _line(error)]) from None
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, *service_errors())):
            raise
        raise JobError("the job cannot be submitted: " + _line(error)) from None


def service_errors() -> tuple[type[Exception], ...]:
    """What a call to the service may end with."""
    if not has_libraries():
        return ()
    from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return GoogleAPIError, GoogleAuthError, DataflowJobAlreadyExistsError


def ended_on_purpose(result: Any) -> bool:
    """Whether somebody has drained, updated or cancelled the job; Beam takes each for a failure."""
    ends = (PipelineState.DRAINED, PipelineState.UPDATED, PipelineState.CANCELLED)
    return getattr(result, "state", None) in ends


def failure(error: BaseException, job: str) -> BaseException:
    """Why a job has failed: an error of ours that its text tells of, else its last line."""
    ours = from_runner(error)
    if isinstance(ours, SinkError):
        return ours
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return JobError(f"the job {job} has failed: {last}; its log in Cloud Logging says more")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:500]
