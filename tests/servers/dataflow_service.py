"""Dataflow's REST API on this machine, as far as Beam uses it, and what was submitted to it.

It takes any job: what is tested is what a client sends, not what Google makes of it. Beam speaks
REST only to an endpoint with `localhost` in it, asks for no credentials then, and takes folders for
buckets.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2 as beam_pb2

from pipeline.local.processes import wait_until
from tests import ROOT
from tests.servers.web_server import Quiet, WebServer

_PATH = re.compile(
    r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs"
    r"(?:/(?P<job>[^/]+)(?:/(?P<what>messages|metrics))?)?"
)
_SHOWN = ("id", "projectId", "name", "type", "location", "currentState", "createTime")


@dataclass
class DataflowService:
    """The service; a context manager.

    Attributes:
        submitted: The jobs that came, as they came.
        calls: Method and path of each request.
        jobs: All jobs by id, in the order of their creation.
        page_size: Jobs on a page of the list.
        refusal: Status and message that every submission is answered with.
        taken: Whether each submission is answered with the job of another one.
        ending: State that every new job is in once it has been submitted.
        messages: What the log of every job says, as errors.
        counters: Counters of every job: (namespace, name) to its value.
    """

    submitted: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    page_size: int = 2
    refusal: tuple[int, str] | None = None
    taken: bool = False
    ending: str = "JOB_STATE_RUNNING"
    messages: list[str] = field(default_factory=list)
    counters: dict[tuple[str, str], int] = field(default_factory=dict)

    def __enter__(self) -> DataflowService:
        service = self

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                service.calls.append((self.command, self.path))
                status, answer = service._answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _handle

        self._server = WebServer(Handler)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        """For ``--dataflow_endpoint``."""
        return self._server.url.replace("127.0.0.1", "localhost")

    def add(self, name: str, state: str = "JOB_STATE_RUNNING") -> str:
        """A job that is there already; its id."""
        return str(self._add({"name": name}, state)["id"])

    def _add(self, job: dict[str, Any], state: str) -> dict[str, Any]:
        number = len(self.jobs) + 1
        made = job | {
            "id": f"2026-01-01_00_00_00-{number}",
            "currentState": state,
            "createTime": "2026-01-01T00:00:00Z",
        }
        self.jobs[made["id"]] = made
        return made

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = urlsplit(path)
        found = _PATH.fullmatch(parts.path)
        if not found:
            return _error(404, f"no {path}")
        if method == "POST" and not found["job"]:
            return self._create(json.loads(body), found["project"], found["region"])
        if not found["job"]:
            return 200, self._list(parse_qs(parts.query))
        job = self.jobs.get(found["job"])
        if job is None:
            return _error(404, f"no job {found['job']}")
        if found["what"] == "messages":
            return 200, {"jobMessages": list(self._messages())}
        if found["what"] == "metrics":
            return 200, {"metrics": list(self._metrics())}
        return 200, {name: job[name] for name in _SHOWN if name in job}

    def _create(self, job: dict[str, Any], project: str, region: str) -> tuple[int, Any]:
        if self.refusal:
            return _error(*self.refusal)
        self.submitted.append(job)
        made = self._add(job | {"projectId": project, "location": region}, self.ending)
        answer = {name: made[name] for name in (*_SHOWN, "clientRequestId") if name in made}
        if self.taken:
            answer["clientRequestId"] = "another"
        return 200, answer | {"currentState": "JOB_STATE_RUNNING"}

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        begin = int(query.get("pageToken", ["0"])[0])
        jobs = list(self.jobs.values())
        page = jobs[begin : begin + self.page_size]
        answer: dict[str, Any] = {"jobs": [{n: j[n] for n in _SHOWN if n in j} for j in page]}
        if begin + self.page_size < len(jobs):
            answer["nextPageToken"] = str(begin + self.page_size)
        return answer

    def _messages(self) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(self.messages):
            time = f"2026-01-01T00:00:0{number}Z"
            importance = "JOB_MESSAGE_ERROR"
            yield {"id": text, "time": time, "messageText": text, "messageImportance": importance}

    def _metrics(self) -> Iterator[dict[str, Any]]:
        for (namespace, name), value in self.counters.items():
            for tentative in ({}, {"tentative": "true"}):
                context = {"step": "s1", "namespace": namespace, **tentative}
                structured = {"origin": "user", "name": name, "context": context}
                yield {"name": structured, "scalar": value}


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": status, "message": message, "status": "REFUSED"}}


def submit(
    service: DataflowService, staging: Path, *arguments: str, environ: Mapping[str, str] = {}
) -> tuple[Submitted, subprocess.CompletedProcess[str]]:
    """Run the program until its job has been submitted, and let it leave the job alone.

    Args:
        service: Where to.
        staging: A folder, in place of a bucket.
        arguments: What is given besides what all jobs need.
        environ: Added to the environment.
    """
    command = [sys.executable, "-m", "pipeline", *job_arguments(service, staging), *arguments]
    before = len(service.submitted)
    with subprocess.Popen(
        command,
        env={**os.environ, **environ},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            wait_until(
                lambda: len(service.submitted) > before or program.poll() is not None,
                "nothing is submitted",
                240,
            )
            program.send_signal(signal.SIGTERM)
            out, err = program.communicate(timeout=120)
        except BaseException:
            program.kill()
            raise
    assert len(service.submitted) > before, err
    ended = subprocess.CompletedProcess(command, program.returncode, out, err)
    return Submitted(service.submitted[-1]), ended


def job_arguments(service: DataflowService, staging: Path) -> list[str]:
    """What every job needs, on this service."""
    return [
        "--runner=DataflowRunner",
        "--project=demo-project",
        "--region=europe-west1",
        f"--staging_location={staging}",
        "--no_auth",
        f"--dataflow_endpoint={service.url}",
        # Nobody listens there, and nobody asks.
        "--kafka_bootstrap_servers=127.0.0.1:1",
        "--preflight=false",
        "--topics=orders",
        "--consumer_group=orders-to-lambda",
        "--function=process-orders:live",
    ]


# -- what was submitted ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A ParDo of the pipeline.

    Attributes:
        name: Its full label.
        payload: What the proto says of it.
        environment: Id of its environment.
    """

    name: str
    payload: beam_pb2.ParDoPayload
    environment: str

    @property
    def states(self) -> dict[str, str]:
        """Kind of each state by its name."""
        specs = self.payload.state_specs.items()
        return {name: str(spec.WhichOneof("spec")) for name, spec in specs}

    @property
    def timers(self) -> dict[str, str]:
        """Time domain of each timer by its name."""
        domain = beam_pb2.TimeDomain.Enum.Name
        specs = self.payload.timer_family_specs.items()
        return {name: domain(spec.time_domain) for name, spec in specs}

    @property
    def pickled(self) -> bytes:
        """The DoFn as it is pickled, names and values of its configuration in it."""
        return unpacked(self.payload.do_fn.payload)


@dataclass(frozen=True)
class Submitted:
    """A job request, and the pipeline that was staged for it.

    Attributes:
        request: The body, from JSON.
    """

    request: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        return dict(self.request["environment"])

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.environment["workerPools"]
        return dict(pool)

    @property
    def options(self) -> dict[str, Any]:
        """The pipeline options that the workers get."""
        return dict(self.environment["sdkPipelineOptions"]["options"])

    @property
    def images(self) -> list[str]:
        return [image["containerImage"] for image in self.pool["sdkHarnessContainerImages"]]

    @cached_property
    def pipeline(self) -> beam_pb2.Pipeline:
        return beam_pb2.Pipeline.FromString(Path(self.options["pipelineUrl"]).read_bytes())

    @property
    def labels(self) -> list[str]:
        """Full labels of all steps, of those inside others too."""
        (root,) = self.pipeline.root_transform_ids
        steps = self.pipeline.components.transforms.items()
        return sorted(step.unique_name for name, step in steps if name != root)

    @cached_property
    def steps(self) -> dict[str, Step]:
        """The ParDos by name."""
        return {
            transform.unique_name: Step(
                transform.unique_name,
                beam_pb2.ParDoPayload.FromString(transform.spec.payload),
                transform.environment_id,
            )
            for transform in self.pipeline.components.transforms.values()
            if transform.spec.urn == common_urns.primitives.PAR_DO.urn
        }

    @property
    def container_images(self) -> dict[str, str]:
        """Image of each environment of the pipeline."""
        found = {}
        for name, environment in self.pipeline.components.environments.items():
            assert environment.urn == common_urns.environments.DOCKER.urn
            found[name] = beam_pb2.DockerPayload.FromString(environment.payload).container_image
        return found


def unpacked(pickled: bytes) -> bytes:
    """What Beam has pickled, without its packing."""
    content = base64.b64decode(pickled)
    return bz2.decompress(content) if content.startswith(b"BZh") else zlib.decompress(content)


def everything_in(content: bytes) -> Iterator[bytes]:
    """The bytes, and all that is packed in them: archives, and texts in base64, zlib or bz2."""
    yield content
    if content.startswith(b"\x1f\x8b"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive.getmembers():
                if file := archive.extractfile(member):
                    yield file.read()
        return
    for text in re.findall(rb"[A-Za-z0-9+/]{16,}={0,2}", content):
        # What stands before it may look like a part of it.
        for skipped in range(4):
            try:
                inner = base64.b64decode(text[skipped:])
            except binascii.Error:
                continue
            yield inner
            for decompress in (zlib.decompress, bz2.decompress):
                try:
                    yield from everything_in(decompress(inner))
                except (OSError, ValueError, zlib.error):
                    continue


_SNAPPY = b"\x82SNAPPY\x00"


def unsnapped(payload: bytes) -> bytes:
    """A payload of Beam's Java half: what it has packed with Snappy, in the place where it is.

    By its public format (github.com/google/snappy), in the blocks of the Java library.
    """
    before, mark, rest = payload.partition(_SNAPPY)
    if not mark:
        return payload
    at = 8  # two numbers of versions
    out = bytearray()
    while at + 4 <= len(rest):
        size = int.from_bytes(rest[at : at + 4], "big")
        if not 0 < size <= len(rest) - at - 4:
            break
        out += _unsnap_block(rest[at + 4 : at + 4 + size])
        at += 4 + size
    return before + bytes(out) + rest[at:]


def _unsnap_block(block: bytes) -> bytes:
    at = 0
    while block[at] & 0x80:  # the length, which the end of the block says too
        at += 1
    at += 1
    out = bytearray()
    while at < len(block):
        tag, kind = block[at], block[at] & 3
        at += 1
        if kind == 0:
            size = (tag >> 2) + 1
            if size > 60:
                width = size - 60
                size = int.from_bytes(block[at : at + width], "little") + 1
                at += width
            out += block[at : at + size]
            at += size
            continue
        if kind == 1:
            size, back = (tag >> 2 & 7) + 4, (tag >> 5 << 8) + block[at]
            at += 1
        else:
            width = 2 if kind == 2 else 4
            size, back = (tag >> 2) + 1, int.from_bytes(block[at : at + width], "little")
            at += width
        for _ in range(size):
            out.append(out[-back])
    return bytes(out)
