"""The errors of the pipeline, and what becomes of each.

::

    SinkError                 one line for the user: what, the value, what to do
    ├── UsageError            a wrong option or settings file            exit code 2
    ├── KafkaError            broker unreachable, topic missing, ...     exit code 1
    ├── KinesisError          stream or lease table unreachable, ...     exit code 1
    ├── WriteError            a response or error record not delivered   exit code 1
    ├── FunctionConfigError   no such function, access denied, ...       exit code 1
    ├── RegistryError         the schema registry refuses to answer      exit code 1
    ├── JobError              a job that is not taken, or failed         exit code 1
    ├── WorkerError           a process of the run has ended by itself   exit code 1
    ├── StateError            a savepoint that a later version wrote     exit code 1
    └── Stopped               told to stop while a step waited           exit code 0

Errors of single invocations are no exceptions but values: see `transforms.invoke.outcome`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class SinkError(Exception):
    """Base of all errors whose text is meant for the user. Never holds a payload or a secret."""

    exit_code = 1


def one_line(text: str) -> str:
    """A text with what would not print, or would begin a new line, written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(SinkError):
    """Options that do not fit. Holds all problems found, one line each."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        # A runner makes an error anew from its text.
        problems = problems.splitlines() if isinstance(problems, str) else problems
        problems = [one_line(problem) for problem in problems]
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class KafkaError(SinkError):
    """Kafka cannot be reached, or lacks what the pipeline needs."""


class KinesisError(SinkError):
    """A stream or its lease table cannot be reached, or lacks what the pipeline needs."""


class WriteError(SinkError):
    """A response or error record was not acknowledged; nothing behind it was committed."""


class FunctionConfigError(SinkError):
    """The function cannot be invoked as configured; trying again would not help."""


class RegistryError(SinkError):
    """The schema registry refuses to answer; trying again would not help."""


class JobError(SinkError):
    """The service that is to run the job does not take it, or the job has failed there."""


class WorkerError(SinkError):
    """One of the processes of a run has ended before its time."""


class StateError(SinkError):
    """What a job has kept cannot be read by this version of the program."""


class Stopped(SinkError):
    """A step gave up waiting, since the run is to end. Nothing is lost: it was not committed."""

    exit_code = 0


_STEP = re.compile(r" \[while running .*", re.DOTALL)
_RAISED = re.compile(
    r"transforms\.errors\."
    r"(UsageError|KafkaError|KinesisError|WriteError|FunctionConfigError|RegistryError|StateError"
    r"|Stopped): (.*)"
)


def from_runner(error: BaseException) -> BaseException:
    """The error of ours that a runner wraps, without what it adds; any other error as it is.

    A runner in the same process adds the step's name to the text; others hand over no more than
    a worker's stack trace as text.
    """
    if isinstance(error, SinkError):
        return type(error)(_STEP.sub("", str(error)))
    raised = _RAISED.findall(str(error))
    return globals()[raised[-1][0]](_STEP.sub("", raised[-1][1])) if raised else error
