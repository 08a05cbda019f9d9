"""Refusals: what a runner has against a job, as one line. Whichever runner it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transforms.errors import JobError, SinkError, UsageError

_LOGGER = logging.getLogger(__name__)

_MOST = 500


@contextmanager
def refusals(service_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Have what Beam or a service says of a job that is submitted here be one line each.

    Args:
        service_errors: What a call to the service may end with.

    Raises:
        UsageError: Beam does not take the options.
        JobError: The service does not take the job, or what it needs cannot be made.
    """
    refused: tuple[type[Exception], ...] = (OSError, RuntimeError, *service_errors)
    try:
        yield
    except SinkError:
        raise
    except ValueError as error:
        _LOGGER.debug("the job cannot be submitted", exc_info=True)
        raise UsageError([f"Beam does not take the options: {line(error)}"]) from None
    except refused as error:
        _LOGGER.debug("the job cannot be submitted", exc_info=True)
        raise JobError(f"the job cannot be submitted: {line(error)}") from None


def line(error: object) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split()).rstrip(".")[:_MOST]
