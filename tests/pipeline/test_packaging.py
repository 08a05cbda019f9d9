"""The wheel is what a worker gets: it has to hold all of the package, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a Python command; its output, or a failure that shows it."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=left_out)
    target = tmp_path_factory.mktemp("wheel")
    # Without isolation, as Beam does it when it stages the package, and without a download.
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", target, source, cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the wheel is installed in. What it depends on is in the environment."""
    target = tmp_path_factory.mktemp("installed")
    _run(
        *("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"),
        *("--no-index", "--target", target, wheel),
        cwd=target,
    )
    return target


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """Every file of the packages is in, and no test or template."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("pipeline", "transforms")
        for pattern in ("*.py", "*.pom.xml", "py.typed", "page/*", "flink_conf/*")
        for path in (ROOT / package).rglob(pattern)
    }
    assert names == files


def test_the_license_and_the_dependencies_are_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: apache-beam<2.78,>=2.77" in text


def test_the_installed_package_is_imported_without_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    """Both packages come from the wheel, and both belong to this distribution alone."""
    code = (
        "import importlib.metadata, pipeline, transforms\n"
        "owners = importlib.metadata.packages_distributions()\n"
        "for package in (pipeline, transforms):\n"
        # Twice when the checkout is installed in the environment too.
        "    print(package.__file__, *set(owners[package.__name__]))\n"
    )

    printed = _run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()

    assert printed == [
        f"{installed / 'pipeline' / '__init__.py'} beam-lambda-sink",
        f"{installed / 'transforms' / '__init__.py'} beam-lambda-sink",
    ]


def test_the_installed_pipeline_shows_its_options(installed: Path, tmp_path: Path) -> None:
    printed = _run("-m", "pipeline", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "--kafka_bootstrap_servers" in printed


def test_the_console_command_is_there(installed: Path, tmp_path: Path) -> None:
    """`beam-lambda-sink` is the same as `python -m pipeline`."""
    script = installed / "bin" / "beam-lambda-sink"
    printed = _run(script, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "--kafka_bootstrap_servers" in printed
