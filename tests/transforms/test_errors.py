"""Errors: what the user sees of them, also when a runner wraps them."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from transforms.errors import (
    FunctionConfigError,
    KafkaError,
    SinkError,
    UsageError,
    WriteError,
    from_runner,
)

RUN_ERRORS = [KafkaError, WriteError, FunctionConfigError]


@pytest.mark.parametrize(
    ("kind", "code"),
    [(SinkError, 1), (KafkaError, 1), (WriteError, 1), (FunctionConfigError, 1), (UsageError, 2)],
)
def test_exit_codes(kind: type[SinkError], code: int) -> None:
    """2 for options that do not fit, 1 for a run that failed."""
    assert issubclass(kind, SinkError)
    assert kind.exit_code == code


def test_a_usage_error_holds_all_problems() -> None:
    """One line each, as text and one by one."""
    error = UsageError(["a", "b"])
    assert error.problems == ("a", "b")
    assert str(error) == "a\nb"


@pytest.mark.parametrize("kind", RUN_ERRORS)
def test_the_step_s_name_is_left_out(kind: type[SinkError]) -> None:
    """A runner in this process adds where it happened; the user reads what happened."""
    wrapped = kind("broker is away [while running 'Write/Produce-ptransform-12']")
    error = from_runner(wrapped)
    assert type(error) is kind
    assert str(error) == "broker is away"


@pytest.mark.parametrize("kind", RUN_ERRORS)
def test_an_error_that_comes_as_text_is_found_again(kind: type[SinkError]) -> None:
    """Out of a worker's stack trace comes the last error of ours, in one line."""
    trace = (
        "Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in process\n'
        "transforms.errors.SomethingElse: no\n"
        "transforms.errors.KafkaError: the first one\n"
        "During handling of the above exception, another exception occurred:\n"
        f"transforms.errors.{kind.__name__}: broker is away [while running 'Write/Produce']\n"
        "\nmore text\n"
    )
    error = from_runner(RuntimeError(trace))
    assert type(error) is kind
    assert str(error) == "broker is away"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("no error of ours"), OSError()]
)
def test_any_other_error_stays_what_it_is(error: Exception) -> None:
    """A bug is not dressed up as a message for the user."""
    assert from_runner(error) is error


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", RUN_ERRORS)
def test_an_error_in_a_step_comes_back_from_the_runner(kind: type[SinkError]) -> None:
    """Raised inside a pipeline and caught around it, it is the same error again."""
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    _ = pipeline | beam.Create([1]) | beam.Map(lambda _: _raise(kind("broker is away")))
    with pytest.raises(Exception) as raised:
        pipeline.run().wait_until_finish()
    error = from_runner(raised.value)
    assert type(error) is kind
    assert str(error) == "broker is away"


def test_a_usage_error_in_a_step_keeps_its_problems() -> None:
    """A settings file that is gone when a step reads it is reported as it is."""
    problems = ("--kafka_config_file=x cannot be read", "another one")
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([]))
    _ = pipeline | beam.Create([1]) | beam.Map(lambda _: _raise(UsageError(problems)))
    with pytest.raises(Exception) as raised:
        pipeline.run().wait_until_finish()
    error = from_runner(raised.value)
    assert isinstance(error, UsageError)
    assert error.problems == problems


def test_a_problem_is_one_line_whatever_it_shows() -> None:
    """A value of the user's may hold anything."""
    from transforms.errors import UsageError

    assert UsageError(["a\x1eb\nc\ud800"]).problems == ("a\\x1eb\\nc\\ud800",)
