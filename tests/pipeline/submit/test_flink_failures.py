"""What goes wrong with a job server or with a job on Flink: one line, and no stack trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.portability.portable_runner import PipelineResult

from pipeline.options.config import Config
from pipeline.submit import flink
from pipeline.submit.streaming import StreamRun, ended_on_purpose
from tests import sink
from transforms.errors import FunctionConfigError, JobError, UsageError

NOWHERE = "127.0.0.1:1"


@pytest.fixture
def lost() -> Iterator[Any]:
    """A job whose job server is gone."""
    with grpc.insecure_channel(NOWHERE) as channel:
        service = beam_job_api_pb2_grpc.JobServiceStub(channel)
        yield PipelineResult(service, "job-7", iter(()), iter(()))


def test_a_job_server_that_is_not_there() -> None:
    options = {
        "kafka_bootstrap_servers": NOWHERE,
        "topics": "orders",
        "consumer_group": "g",
        "function": "f",
        "preflight": "false",
        "summary": "none",
        "runner": "PortableRunner",
        "job_endpoint": NOWHERE,
        "job-server-timeout": 1,
    }
    with sink.Sink(sink.command_line(options), sink.environment()) as run:
        ended = run.wait(1)
    (line,) = [each for each in ended.stderr.splitlines() if each.startswith("error: ")]
    assert line == (
        f"error: the job cannot be submitted: the job server at --job_endpoint={NOWHERE} does not "
        f"answer"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (RuntimeError("Java must be\n  installed"), JobError, "submitted: Java must be installed"),
        (ValueError("--parallelism: x"), UsageError, "take the options: --parallelism: x"),
        (FunctionConfigError("ours"), FunctionConfigError, "ours"),
    ],
)
def test_what_beam_has_against_a_job(raised: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said), flink.submission():
        raise raised


def test_a_job_server_that_refuses_a_job_has_answered() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    # It has no service of that name.
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(JobError, match="the job server at --job_endpoint=x refuses it: Method"),
            flink.submission("x"),
        ):
            beam_job_api_pb2_grpc.JobServiceStub(channel).Prepare(
                beam_job_api_pb2.PrepareJobRequest()
            )
    finally:
        server.stop(None)


def test_a_fault_of_the_program_stays_one() -> None:
    with pytest.raises(KeyError), flink.submission():
        raise KeyError("x")


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            "Pipeline orders_7 failed in state FAILED: java.lang.RuntimeException: x\n"
            "transforms.errors.FunctionConfigError: --function=f cannot be invoked: gone",
            FunctionConfigError,
            "--function=f cannot be invoked: gone",
        ),
        (
            "Pipeline orders_7 failed in state FAILED: java.io.IOException: No space left.",
            JobError,
            "the job orders_7 has failed: java.io.IOException: No space left; Flink's own log says "
            "more",
        ),
    ],
)
def test_a_job_that_has_failed(text: str, kind: type[Exception], said: str) -> None:
    error = flink.failure(RuntimeError(text), "orders_7")
    assert (type(error), str(error)) == (kind, said)


def test_a_job_that_is_cancelled_by_flinks_own_means_has_not_failed() -> None:
    said = "org.apache.flink.runtime.client.JobCancellationException: Job was cancelled."
    error = RuntimeError(f"Pipeline orders_7 failed in state FAILED: {said}")
    assert ended_on_purpose(SimpleNamespace(state="FAILED"), error) == "CANCELLED"
    assert ended_on_purpose(SimpleNamespace(state="FAILED"), RuntimeError("gone")) == ""


def test_a_job_server_that_is_gone(lost: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its numbers are not known, nor how the job ends; the job goes on without it."""
    config = Config.from_options(
        {
            "kafka_bootstrap_servers": NOWHERE,
            "topics": "orders",
            "consumer_group": "g",
            "function": "f",
        },
        runner="PortableRunner",
    )
    run = StreamRun(config, "PortableRunner", ["--runner=PortableRunner"], threading.Event(), 0.0)
    run._result = lost
    run._ask_at = float("inf")
    assert not run.status().halted
    (warning,) = caplog.messages
    assert warning.startswith("the numbers of the job job-7 are not known: ")
    assert "\n" not in warning
    assert ended_on_purpose(lost) == ""
    with pytest.raises(grpc.RpcError) as raised:
        assert lost.state
    error = flink.failure(raised.value, "job-7")
    assert isinstance(error, JobError) and "\n" not in str(error)
