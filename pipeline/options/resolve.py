"""Resolve: command line, file and defaults -> `Resolved`, with every problem found.

The command line wins over the file of --config, the file over the defaults of its system, and those
over ours.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.migrate import config_file
from pipeline.migrate.carried import OWN, Carried, Value
from pipeline.options import checks_dataflow
from pipeline.options.config import Config
from pipeline.options.declare import (
    DATAFLOW_RUNNER,
    DIRECT_RUNNERS,
    OPTIONS,
    STREAM_RUNNERS,
    KafkaLambdaOptions,
)
from pipeline.options.msk import Ask, complete
from pipeline.options.streams import with_arns
from transforms.aws.msk import bootstrap_brokers
from transforms.errors import UsageError, one_line
from transforms.properties import load_properties

_LOGGER = logging.getLogger(__name__)

COMMAND_LINE = "command line"

# Given on the command line, the first of them leaves no room for what a file says of the second.
_IN_PLACE_OF = (
    ("topics", "topics_regex"),
    ("topics_regex", "topics"),
    ("error_topic", "on_failure_destination"),
    ("on_failure_destination", "error_topic"),
    ("stream", "topics"),
    ("stream", "topics_regex"),
    ("topics", "stream"),
    ("topics_regex", "stream"),
    ("starting_position", "starting_timestamp"),
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a command line and the file it names come to.

    Attributes:
        values: By option, what was given and where; options left to their default are not there.
        carried: What the file of --config came to, None without one.
        properties: Names of the settings in --kafka_config_file.
        runner: The name of the runner.
        beam_arguments: The arguments that are Beam's.
        explain: Whether --explain is on.
        problems: Why it cannot run, one line each.
        config: The checked options, None with problems.
    """

    values: Mapping[str, Value]
    carried: Carried | None
    properties: tuple[str, ...]
    runner: str
    beam_arguments: tuple[str, ...]
    explain: bool
    problems: tuple[str, ...]
    config: Config | None


def parse_arguments(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read the command line, and the file it names.

    Args:
        arguments: Without the program's name.

    Returns:
        The checked options, and the name of the runner.

    Raises:
        UsageError: With every problem found, options nobody knows among them.
    """
    resolved = resolve(arguments)
    if resolved.config is None:
        raise UsageError(resolved.problems)
    return resolved.config, resolved.runner


def resolve(
    arguments: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    read: Callable[[str], str] = config_file.read_text,
    ask: Ask = bootstrap_brokers,
) -> Resolved:
    """Read the command line and the file it names, and say what they come to.

    Args:
        arguments: Without the program's name.
        environ: Environment variables.
        read: Gets the text of the file.
        ask: Asks MSK for the brokers of a cluster.

    Raises:
        UsageError: The command line or the file cannot be read at all.
        KinesisError: Kinesis does not say the ARN of a stream.
    """
    ours, rest = _parser().parse_known_args(arguments)
    given = {name: text for name, text in vars(ours).items() if text is not None}
    # A misspelt option must not be passed over.
    beam, problems = parse_beam(rest)
    if beam and beam.template_location:
        # But the parameters of a template were checked before it was launched, and what else its
        # launcher gives is none of the user's doing.
        for problem in problems:
            _LOGGER.warning("%s; it is passed over", problem)
        problems = []
    runner = _runner(rest)
    if runner not in DIRECT_RUNNERS + STREAM_RUNNERS:
        supported = ", ".join(DIRECT_RUNNERS[:1] + STREAM_RUNNERS)
        problems.append(f"--runner={runner} is not supported; use one of {supported}")
    carried = None
    if path := given.get("config"):
        carried = config_file.load(path, given, OPTIONS, environ, read)
        problems += [f"--config={path}: {note.name}: {note.why}" for note in carried.refused]
    values, unasked = complete(_merge(given, carried), carried, ask)
    problems += unasked
    if runner in STREAM_RUNNERS and carried and carried.system != OWN:
        # There the runner has processes of its own, and another system's pollers say nothing of it.
        for name in ("workers", "max_workers"):
            if name not in given:
                values.pop(name, None)
    config = None
    try:
        config = Config.from_options(
            {name: value.text for name, value in values.items()}, runner=runner
        )
    except UsageError as error:
        # Why there are none is said already.
        missing = "--kafka_bootstrap_servers is missing" if unasked else " "
        told = [problem for problem in error.problems if not problem.startswith(missing)]
        problems += _with_origins(told, values, carried)
    if beam and runner in DIRECT_RUNNERS and beam.direct_num_workers != 1:
        problems.append(
            f"--direct_num_workers={beam.direct_num_workers} has no effect; use --workers"
        )
    if beam and runner == DATAFLOW_RUNNER:
        problems += checks_dataflow.problems(
            beam, values.get("kafka_config_file", Value("", "")).text
        )
    if config and not problems and given.get("explain") != "true":
        config = with_arns(config)
    properties: tuple[str, ...] = ()
    if path := values.get("kafka_config_file", Value("", "")).text:
        with suppress(UsageError):  # among the problems already
            properties = tuple(load_properties(path, environ))
    return Resolved(
        values,
        carried,
        properties,
        runner,
        tuple(rest),
        explain=given.get("explain") == "true",
        problems=tuple(map(one_line, problems)),
        config=None if problems else config,
    )


def _merge(given: Mapping[str, str], carried: Carried | None) -> dict[str, Value]:
    """The command line over the file over its system's defaults."""
    values = {name: Value(text, COMMAND_LINE) for name, text in given.items()}
    if carried is None:
        return values
    taken = {other for option, other in _IN_PLACE_OF if option in given}
    for name, value in (carried.defaults | carried.values).items():
        if name not in given and name not in taken:
            values[name] = value
    # An empty value takes back what the file says.
    return {
        name: value
        for name, value in values.items()
        if value.text or not (name in carried.values or name in carried.defaults)
    }


def _with_origins(
    problems: Sequence[str], values: Mapping[str, Value], carried: Carried | None
) -> list[str]:
    """Problems of options that a file says, with the words of the file."""
    if carried is None:
        return list(problems)
    answered = {option for note in carried.refused for option in note.answers}
    told = []
    for problem in problems:
        named = re.match(r"--(\w+)", problem)
        name = named[1] if named else ""
        needed = re.search(r" needs --(\w+)", problem)
        if (name in answered and "is missing" in problem) or (needed and needed[1] in answered):
            continue  # what is refused says how to give it
        value = values.get(name)
        if value and value.origin != COMMAND_LINE:
            where = "" if carried.system == OWN else f"{value.origin} "
            problem += f" ({where}in {carried.file})"
        told.append(problem)
    return told


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of all options and the end of the program."""

    def __init__(self) -> None:
        super().__init__(prog="beam-lambda-sink", allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError([message.removeprefix("argument ")])


@cache
def _parser() -> argparse.ArgumentParser:
    parser = Parser()
    KafkaLambdaOptions._add_argparse_args(parser)
    return parser


def _beam_parser() -> argparse.ArgumentParser:
    return _parser_of(tuple(PipelineOptions.__subclasses__()))


@cache
def _parser_of(classes: tuple[type[PipelineOptions], ...]) -> argparse.ArgumentParser:
    parser = Parser()
    for subclass in {cls.__name__: cls for cls in classes}.values():
        if subclass is not KafkaLambdaOptions:
            subclass._add_argparse_args(parser)  # type: ignore[arg-type]
    return parser


def parse_beam(rest: Sequence[str]) -> tuple[argparse.Namespace | None, list[str]]:
    """Beam's options by name, and what neither we nor Beam know. Pure."""
    try:
        beam, unknown = _beam_parser().parse_known_args(list(rest))
    except UsageError as error:
        return None, list(error.problems)
    unknown = [argument for argument in unknown if not _is_flinks(argument)]
    names = [f"--{name}" for name in OPTIONS]
    problems = []
    for before, argument in zip(["", *unknown], unknown):
        if before.startswith("--") and "=" not in before and not argument.startswith("-"):
            continue  # the value of an option that is reported already
        name = argument.split("=", 1)[0]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists all"
        problems.append(f"{name} is not an option{hint}")
    return beam, problems


_FLINK_OPTIONS = frozenset(
    {
        "checkpointing_interval",
        "checkpointing_mode",
        "checkpoint_timeout_millis",
        "execution_mode_for_batch",
        "execution_retry_delay",
        "externalized_checkpoints_enabled",
        "fail_on_checkpointing_errors",
        "finish_bundle_before_checkpointing",
        "flink_conf_dir",
        "latency_tracking_interval",
        "max_bundle_size",
        "max_bundle_time_mills",
        "min_pause_between_checkpoints",
        "num_concurrent_checkpoints",
        "number_of_execution_retries",
        "object_reuse",
        "retain_externalized_checkpoints_on_cancellation",
        "savepoint_path",
        "shutdown_sources_after_idle_ms",
        "state_backend",
        "state_backend_storage_path",
        "tolerable_checkpoint_failure_number",
        "unaligned_checkpoint_enabled",
    }
)
"""Options of Flink's runner that only its Java half knows, by the names that Python gives them."""


def _is_flinks(argument: str) -> bool:
    return argument.startswith("--") and argument[2:].split("=", 1)[0] in _FLINK_OPTIONS


def _runner(rest: Sequence[str]) -> str:
    parser = Parser()
    parser.add_argument("--runner", default="DirectRunner")
    return str(parser.parse_known_args(list(rest))[0].runner)
