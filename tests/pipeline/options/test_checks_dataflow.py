"""Dataflow: what keeps a job from being submitted."""

from __future__ import annotations

import pytest

from pipeline.options import checks_dataflow
from tests.pipeline.options.given import beam_of, job_problems_of
from tests.servers.dataflow_service import ROOT


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"project": "example.com:my-project"},
        {"region": "northamerica-northeast1"},
        {"temp_location": None, "staging_location": "gs://b-1.example.com/"},
        {"job_name": "a", "staging_location": "gs://bucket/x/y"},
        {"job_name": "a" * 63},
        {"sdk_container_image": None, "setup_file": str(ROOT / "pyproject.toml")},
        {"sdk_container_image": None, "extra_package": "dist/x.whl"},
    ],
)
def test_what_a_job_can_be_made_of(given: dict[str, str | None]) -> None:
    assert job_problems_of(**given) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"project": None}, "--project is missing; for example --project=my-project"),
        ({"project": "123456"}, "--project=123456 is a project's number; give its ID"),
        ({"project": "My Project"}, "--project=My Project is not the ID of a project"),
        ({"region": None}, "--region is missing; for example --region=europe-west1"),
        ({"region": "us-central1-a"}, "--region=us-central1-a is not a region, such as"),
        ({"temp_location": None}, "--temp_location is missing; for example"),
        ({"temp_location": "bucket/x"}, "--temp_location=bucket/x is not a folder such as gs://"),
        ({"temp_location": "gs://bucket"}, "--temp_location=gs://bucket is not a folder"),
        ({"staging_location": "gs://B/x"}, "--staging_location=gs://B/x is not a folder"),
        (
            {"temp_location": "/no/such/folder", "dataflow_endpoint": "http://localhost:1"},
            "--temp_location=/no/such/folder is not there; create it first",
        ),
        ({"job_name": "Orders"}, "--job_name=Orders is not the name of a job"),
        ({"job_name": "orders-"}, "--job_name=orders- is not the name of a job"),
        ({"job_name": "a" * 64}, "is not the name of a job: up to 63"),
        ({"sdk_container_image": None}, "--sdk_container_image is missing: the image that"),
        (
            {"sdk_container_image": None, "setup_file": "/no/pyproject.toml"},
            "--setup_file=/no/pyproject.toml is not there",
        ),
    ],
)
def test_what_keeps_a_job_from_being_submitted(given: dict[str, str | None], said: str) -> None:
    (problem,) = job_problems_of(**given)
    assert said in problem
    assert "\n" not in problem


def test_a_setup_file_without_its_folder_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam fails over it with a message about a file without a name."""
    monkeypatch.chdir(ROOT)
    (problem,) = job_problems_of(sdk_container_image=None, setup_file="pyproject.toml")
    assert problem == "--setup_file=pyproject.toml needs its folder: --setup_file=./pyproject.toml"


@pytest.mark.parametrize("path", ["gs://bucket/kafka.properties", "secretmanager://p/kafka"])
def test_the_workers_can_read_what_is_in_the_cloud(path: str) -> None:
    assert job_problems_of(path, sdk_container_image=None, extra_package="x.whl") == []


def test_a_file_of_this_machine_is_for_an_image_only() -> None:
    assert job_problems_of("/etc/kafka.properties") == []
    (problem,) = job_problems_of(
        "kafka.properties", sdk_container_image=None, extra_package="x.whl"
    )
    assert problem.startswith("--kafka_config_file=kafka.properties is a file of this machine")
    assert "secretmanager://" in problem and "gs://" in problem


def test_without_google_s_libraries_it_is_said_how_to_get_them() -> None:
    (problem,) = checks_dataflow.problems(beam_of(), None, lambda: False, lambda: None)
    assert problem == (
        "--runner=DataflowRunner needs Google's libraries: pip install 'beam-lambda-sink[gcp]'"
    )
