"""Flink: what its job server has against a job, or a job has failed of, as one line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from transforms.errors import JobError, SinkError, UsageError, from_runner

_LOGGER = logging.getLogger(__name__)

_FAILED = re.compile(r"Pipeline \S+ failed in state \w+: ")
_MOST = 500


def service_errors() -> tuple[type[Exception], ...]:
    """What a call to the job server may end with."""
    return grpc.RpcError, grpc.FutureTimeoutError


@contextmanager
def submission(job_endpoint: str = "") -> Iterator[None]:
    """What Beam or the job server has against a job as one line.

    Args:
        job_endpoint: Where the job server is; empty if Beam starts one.

    Raises:
        UsageError: Beam does not take the options.
        JobError: The job server does not take the job, or does not answer.
    """
    try:
        yield
    except SinkError:
        raise
    except service_errors() as error:
        _LOGGER.debug("the job cannot be submitted", exc_info=True)
        where = f" at --job_endpoint={job_endpoint}" if job_endpoint else ""
        why = line(error)
        why = f"the job server{where} does not answer{f': {why}' if why else ''}"
        raise JobError(f"the job cannot be submitted: {why}") from None
    except ValueError as error:
        _LOGGER.debug("the job cannot be submitted", exc_info=True)
        raise UsageError([f"Beam does not take the options: {line(error)}"]) from None
    except (OSError, RuntimeError) as error:
        _LOGGER.debug("the job cannot be submitted", exc_info=True)
        raise JobError(f"the job cannot be submitted: {line(error)}") from None


def failure(error: BaseException, job: str) -> BaseException:
    """Why a job has failed: an error of ours that its text tells of, else the text's first line."""
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


def line(error: object) -> str:
    """What an error says, as one line; of a call, what it says itself."""
    if isinstance(error, grpc.Call):
        error = error.details()
    return " ".join(str(error or "").split()).rstrip(".")[:_MOST]
