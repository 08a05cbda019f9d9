"""Dataflow: what a job there needs besides the options of the pipeline itself.

Google's libraries are an extra, so they are imported where they are used, once they are known to be
there. Why it is done so: docs/adr/0014-dataflow.md.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from pipeline.options.checks_dataflow import (
    JOB_NAME,
    MOST_IN_A_JOB_NAME,
    brings_code,
    has_libraries,
    own_project,
)
from pipeline.submit.refusals import refusals
from transforms.errors import JobError, SinkError, UsageError, from_runner

_LOGGER = logging.getLogger(__name__)

LABEL = "beam-lambda-sink"
"""Label of all jobs of this program; its value is the version."""

_STREAMING_MODE = "streaming_mode_"
_AT_LEAST_ONCE = "streaming_mode_at_least_once"

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
    if not brings_code(beam) and (found := project()):
        added.append(f"--setup_file={found}")
    return added


def job_name(group: str) -> str:
    """A job's name for a consumer group: what is no letter, digit or - becomes -.

    Where the name does not say all of the group's, a checksum does, for no two groups to share one.
    """
    whole = f"{LABEL}-{group}"
    name = re.sub(r"[^a-z0-9]+", "-", whole.lower())
    if name == whole and JOB_NAME.fullmatch(name) and len(name) <= MOST_IN_A_JOB_NAME:
        return name
    checksum = "-" + hashlib.sha256(group.encode()).hexdigest()[:8]
    return name[: MOST_IN_A_JOB_NAME - len(checksum)].rstrip("-") + checksum


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
    """What Google or Beam has against a job as one line each; see `refusals`."""
    from google.auth.exceptions import DefaultCredentialsError

    with refusals(service_errors()):
        try:
            yield
        except DefaultCredentialsError:
            raise JobError(
                "there are no Google credentials: run gcloud auth application-default login, or "
                "set GOOGLE_APPLICATION_CREDENTIALS"
            ) from None


def service_errors() -> tuple[type[Exception], ...]:
    """What a call to the service may end with."""
    if not has_libraries():
        return ()
    from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return GoogleAPIError, GoogleAuthError, DataflowJobAlreadyExistsError


def failure(error: BaseException, job: str) -> BaseException:
    """Why a job has failed: an error of ours that its text tells of, else its last line."""
    ours = from_runner(error)
    if isinstance(ours, SinkError):
        return ours
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return JobError(f"the job {job} has failed: {last}; its log in Cloud Logging says more")
