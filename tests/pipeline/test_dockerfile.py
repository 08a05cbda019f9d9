"""The check of Dockerfiles finds what is wrong, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dockerfile import images, problems

GOOD = """\
# syntax=docker/dockerfile:1
ARG PYTHON=3.11
FROM maven:3.9 AS build
RUN mvn -q \\
      # a comment in between
      package
FROM python:${PYTHON}-slim
COPY --from=build /out/a.jar /opt/a.jar
COPY --from=registry.example.com:5000/team/beam:2.77.0 /boot /boot
COPY *.whl /tmp/
ENV A=1 B="two words"
WORKDIR /srv
EXPOSE 8080 9000/udp
USER 65532
ENTRYPOINT ["program", "--option"]
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    (tmp_path / "a.whl").touch()
    (tmp_path / "b.whl").touch()
    return tmp_path


def test_a_good_one_has_no_problems(context: Path) -> None:
    assert problems(GOOD, context) == []
    assert images(GOOD) == [
        "maven:3.9",
        "python:${PYTHON}-slim",
        "registry.example.com:5000/team/beam:2.77.0",
    ]


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("RUN mvn", "RUNS mvn", "line 4: RUNS is no instruction"),
        ("RUN mvn", "run mvn", "line 4: run is no instruction"),
        ("package\n", "'package\n", "line 4: RUN: No closing quotation"),
        ("maven:3.9 ", "maven ", "line 3: maven has no version"),
        ("maven:3.9 ", "maven:latest ", "line 3: maven:latest has no version"),
        ("ARG PYTHON=3.11\n", "", "line 6: python:${PYTHON}-slim is neither an image nor a stage"),
        ("AS build", "build", "line 3: FROM is FROM IMAGE, or FROM IMAGE AS STAGE"),
        ("FROM maven", "RUN true\nFROM maven", "line 3: RUN comes before FROM"),
        ("--from=build", "--from=biuld", "line 8: biuld has no version"),
        ("--from=build", "--form=build", "line 8: COPY knows no --form"),
        ("*.whl", "*.wheel", "line 10: *.wheel is not there"),
        ("*.whl", "../a.whl", "line 10: ../a.whl is outside of the folder it is built in"),
        ("*.whl /tmp/", "*.whl /tmp", "line 10: /tmp takes several files, so it has to end with /"),
        ("*.whl /tmp/", "a.whl", "line 10: COPY needs a source and a destination"),
        ("A=1", "A 1", "line 11: A is not of the form NAME=VALUE"),
        ("/srv", "srv", "line 12: WORKDIR srv is not an absolute path"),
        ("8080", "http", "line 13: http is no port"),
        ("USER 65532", "USER", "line 14: USER says nothing"),
        ('["program", "--option"]', "program --option", "line 15: ENTRYPOINT is not in exec form"),
        ('["program", "--option"]', "['program']", "line 15: ENTRYPOINT is not in exec form"),
        ('["program", "--option"]\n', "\\\n", "line 15: the last line goes on"),
    ],
)
def test_what_is_wrong_is_found(context: Path, good: str, bad: str, problem: str) -> None:
    assert GOOD.count(good) == 1
    found = problems(GOOD.replace(good, bad), context)
    assert [line for line in found if line.startswith(problem)], found


def test_no_from_is_a_problem(context: Path) -> None:
    assert problems("# nothing\n", context) == ["line 1: there is no FROM"]


def test_what_is_downloaded_has_a_checksum(context: Path) -> None:
    start = "FROM python:3.11\nADD "
    url = "https://example.com/a.jar /opt/"
    assert problems(start + url, context) == [
        "line 2: https://example.com/a.jar is fetched without --checksum"
    ]
    assert problems(f"{start}--checksum=sha256:{'0' * 64} {url}", context) == []
