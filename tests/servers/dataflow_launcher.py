"""What is documented of launching a Flex Template: the service's checks, and the launcher's call.

An emulation: the launcher's own program, and what else the service checks, are Google's. The file
that the program is in, and the environment, are those of the image's Dockerfile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.cloud import dataflow
from google.protobuf import json_format

from tests.docker_image import Dockerfile
from tests.servers.dataflow_service import ROOT, DataflowService, Submitted


def template_spec(image: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The file that ``gcloud dataflow flex-template build`` writes for a Python template."""
    return {
        "defaultEnvironment": {},
        "image": image,
        "metadata": metadata,
        "sdkInfo": {"language": "PYTHON"},
    }


def parse_spec(spec: dict[str, Any]) -> dataflow.ContainerSpec:
    """By Google's own definition; a field or a value that it does not know is refused."""
    message = dataflow.ContainerSpec()
    json_format.ParseDict(spec, message._pb)
    return message


class Refused(Exception):
    """The service does not launch the template."""


class LaunchFailed(Exception):
    """The program ended with an exit code that is not 0; what it said."""


def check(spec: dict[str, Any], given: Mapping[str, str]) -> None:
    """The parameters against the template's metadata.

    Raises:
        Refused: With all that does not fit.
    """
    declared = {one.name: one for one in parse_spec(spec).metadata.parameters}
    problems = [f"Unrecognized parameter: {name}" for name in given if name not in declared]
    types = dataflow.ParameterType
    for name, one in declared.items():
        if name not in given:
            if not one.is_optional:
                problems.append(f"Missing required parameter: {name}")
            continue
        value = given[name]
        problems += [
            f"{name}: Parameter didn't match regex '{regex}'"
            for regex in one.regexes
            if not re.fullmatch(regex, value)
        ]
        options = [option.value for option in one.enum_options]
        wrong = {
            types.ENUM: value not in options,
            types.BOOLEAN: value not in ("true", "false"),
            types.NUMBER: not re.fullmatch(r"-?\d+(\.\d+)?", value),
            types.GCS_READ_FILE: not value.startswith("gs://"),
        }
        if wrong.get(one.param_type):
            problems.append(f"{name}: {value} is no {types(one.param_type).name}")
    if problems:
        raise Refused("\n".join(problems))


class Launcher:
    """Launches a template on a service of this machine.

    Args:
        service: Where to.
        folder: In place of the buckets, and where the program runs.
        environ: Added to the environment.

    Attributes:
        secs: How long the last program took.
        said: What it said.
    """

    def __init__(
        self, service: DataflowService, folder: Path, environ: Mapping[str, str] = {}
    ) -> None:
        self._service = service
        self._folder = folder
        self._environ = environ
        self.secs = 0.0
        self.said = ""

    def launch(
        self, spec: dict[str, Any], given: Mapping[str, str], more: Sequence[str] = ()
    ) -> Submitted:
        """Check the parameters, run the program, and start the job that it has written.

        Args:
            spec: The template.
            given: Its parameters.
            more: Flags that come from the launch's environment.

        Raises:
            Refused: The parameters do not fit.
            LaunchFailed: The program failed.
        """
        check(spec, given)
        launches = self._folder / "template_launches" / str(len(self._service.submitted))
        launches.mkdir(parents=True)
        job_file = launches / "job_object"
        command = [
            sys.executable,
            str(program_file()),
            "--runner=DataflowRunner",
            "--project=demo-project",
            "--region=europe-west1",
            "--job_name=launched",
            f"--staging_location={self._folder}",
            f"--temp_location={self._folder}",
            f"--template_location={job_file}",
            '--labels={\n   "goog-dataflow-provided-template-name" : "sink",\n'
            '   "goog-dataflow-provided-template-type" : "flex"\n}\n',
            *more,
            *(f"--{name}={value}" for name, value in given.items()),
            # For this machine only.
            "--no_auth",
            f"--dataflow_endpoint={self._service.url}",
        ]
        before = time.monotonic()
        program = subprocess.run(
            command,
            # Not the checkout: in the image the program is installed.
            cwd=launches,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self._environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.secs = time.monotonic() - before
        self.said = program.stdout + program.stderr
        if program.returncode:
            raise LaunchFailed(program.stderr)
        job = json.loads(job_file.read_text())
        request = urllib.request.Request(
            f"{self._service.url}/v1b3/projects/demo-project/locations/europe-west1/jobs",
            data=json.dumps(job).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
            return Submitted(self._service.submitted[-1])


def program_file() -> Path:
    """The file in this checkout that is, in the image, what the launcher is told to run."""
    dockerfile = Dockerfile.read(ROOT / "templates" / "dataflow" / "Dockerfile")
    path = dockerfile.environment["FLEX_TEMPLATE_PYTHON_PY_FILE"]
    return ROOT / dockerfile.copied[path]
