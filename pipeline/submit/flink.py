"""Flink: what its job server has against a job, or a job has failed of, as one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from pipeline.submit.refusals import line, refusals
from transforms.errors import JobError, SinkError, from_runner

_LOGGER = logging.getLogger(__name__)

_FAILED = re.compile(r"Pipeline \S+ failed in state \w+: ")
_CANCELLED = "JobCancellationException: Job was cancelled"
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def service_errors() -> tuple[type[Exception], ...]:
    """What a call to the job server may end with."""
    return grpc.RpcError, grpc.FutureTimeoutError


@contextmanager
def submission(job_endpoint: str = "") -> Iterator[None]:
    """What Beam or the job server has against a job as one line each; see `refusals`.

    Args:
        job_endpoint: Where the job server is; empty if Beam starts one.
    """
    with refusals():
        try:
            yield
        except service_errors() as error:
            _LOGGER.debug("the job server", exc_info=True)
            where = f" at --job_endpoint={job_endpoint}" if job_endpoint else ""
            answered = isinstance(error, grpc.Call) and error.code() not in _SILENT
            what = f"the job server{where} {'refuses it' if answered else 'does not answer'}"
            why = call_line(error)
            raise JobError(
                f"the job cannot be submitted: {what}{f': {why}' if why else ''}"
            ) from None


def failure(error: BaseException, job: str) -> BaseException:
    """Why a job has failed: an error of ours that its text tells of, else all it says."""
    ours = from_runner(error)
    if isinstance(ours, SinkError) or not isinstance(error, Exception):
        return ours
    _LOGGER.debug("the job %s has failed", job, exc_info=error)
    if isinstance(error, service_errors()):
        return JobError(
            f"how the job {job} goes on is not known: its job server does not answer any more; "
            f"look at Flink's own page"
        )
    text = _FAILED.sub("", str(error)) or type(error).__name__
    return JobError(f"the job {job} has failed: {line(text)}; Flink's own log says more")


def is_cancelled(error: BaseException | None) -> bool:
    """Whether a job has ended since it was cancelled by Flink's own means; its job server calls
    that failed."""
    return _CANCELLED in str(error)


def call_line(error: BaseException) -> str:
    """What an error says, as one line; of a call to the job server, what that says itself."""
    return line((error.details() if isinstance(error, grpc.Call) else error) or "")
