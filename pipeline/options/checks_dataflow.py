"""Checks of Beam's options for Dataflow: place, folders, and whether workers get this program."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.options.declare import DATAFLOW_RUNNER
from transforms.text_file import GCS_FORM, SECRET_FORM, is_remote

_PROJECT_ID = re.compile(r"([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]*[a-z0-9]")
_REGION = re.compile(r"[a-z]+-[a-z]+[0-9]+")
_LOCATION = re.compile(r"gs://[a-z0-9][a-z0-9._-]*[a-z0-9]/\S*")
JOB_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MOST_IN_A_JOB_NAME = 63


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
            f"--runner={DATAFLOW_RUNNER} needs Google's libraries: "
            f"pip install 'beam-lambda-sink[gcp]'"
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
    if name and not (JOB_NAME.fullmatch(name) and len(name) <= MOST_IN_A_JOB_NAME):
        found.append(
            f"--job_name={name} is not the name of a job: up to {MOST_IN_A_JOB_NAME} lower case "
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
    if brings_code(beam) or project:
        return []
    return [
        "--sdk_container_image is missing: the image that the workers run, with this program in "
        "it, as templates/dataflow builds it"
    ]


def _image(beam: argparse.Namespace) -> str | None:
    return beam.sdk_container_image or beam.worker_harness_container_image


def brings_code(beam: argparse.Namespace) -> bool:
    return bool(_image(beam) or beam.setup_file or beam.extra_packages)


def _is_local(beam: argparse.Namespace) -> bool:
    """Whether the service is an emulation on this machine, which Beam lets use local folders."""
    return urlsplit(beam.dataflow_endpoint or "").netloc.startswith("localhost")
