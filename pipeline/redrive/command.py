"""The command `redrive`: its options, how it ends, and what it says."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from pipeline.options.checks import parse_timestamp, parse_value
from pipeline.options.config import Config
from pipeline.options.declare import DIRECT_RUNNERS, Group, Option
from pipeline.options.explain import explain
from pipeline.options.help import format_group, format_help
from pipeline.options.resolve import Parser
from pipeline.options.resolve import resolve as resolve_options
from pipeline.redrive.run import Redrive
from pipeline.run.status import Status
from pipeline.signals import DONE, HALTED, stop_on_signals
from pipeline.watch import logs
from pipeline.watch.logs import say
from pipeline.watch.progress import Progress, halted_text, summary
from transforms.errors import UsageError
from transforms.interpreter import tune_interpreter
from transforms.kafka.offsets import SourceConfig
from transforms.redrive.selection import Selection
from transforms.redrive.steps import RedriveConfig

COMMAND = "redrive"
GROUP = Group(
    "Redrive",
    (
        Option(
            "since",
            "Only error records written at this ISO 8601 time or later; UTC if it names no zone.",
            example="2026-11-01T00:00:00Z",
        ),
        Option(
            "condition",
            "Only error records with one of these conditions, comma separated.",
            kind="list",
            example="RetryAttemptsExhausted",
        ),
        Option(
            "error_type",
            "Only error records with one of these error types, comma separated.",
            kind="list",
            example="ValueError",
        ),
        Option(
            "limit",
            "Error records to redrive at most.",
            kind="int",
            unit="error records",
            low=1,
        ),
        Option(
            "dry_run",
            "Count what would be redriven, by condition, error type and partition. Nothing is "
            "invoked, written or committed.",
            kind="flag",
            default=False,
        ),
        Option(
            "first_redrive",
            "There has been no redrive of this error topic by this group, or its error records may "
            "be redriven once more: begin at the first one. Without it a redrive does not begin "
            "where its group has no offset.",
            kind="flag",
            default=False,
        ),
        Option(
            "redrive_group",
            "Consumer group that remembers what is redriven. Not given: --consumer_group, or "
            "--lease_table, with -redrive behind it.",
            example="orders-to-lambda-redrive",
        ),
    ),
)


def make_config(config: Config, values: Mapping[str, Any]) -> RedriveConfig:
    """What to redrive, of the pipeline's options and the command's own."""
    assert config.write.error_topic
    since = parse_timestamp(values["since"]) if values["since"] else None
    group = values["redrive_group"] or f"{config.kafka.group}-redrive"
    return RedriveConfig(
        kafka=replace(config.kafka, group=group),
        error_topic=config.write.error_topic,
        selection=Selection(
            max(0, int(since.timestamp() * 1000)) if since else None,
            values["condition"] or (),
            values["error_type"] or (),
        ),
        topics=config.source.topics,
        topics_regex=(
            config.source.topics_regex if isinstance(config.source, SourceConfig) else None
        ),
        lanes=config.lanes,
        limit=values["limit"],
        refresh_secs=config.commit.refresh_secs,
    )


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Divide the command line.

    Args:
        arguments: Without the program's name and the command's.

    Returns:
        The values of the command's own options, what is wrong with them, and all the rest.
    """
    parser = Parser()
    for option in GROUP.options:
        if option.kind == "flag":
            parser.add_argument(f"--{option.name}", nargs="?", const="true")
        else:
            parser.add_argument(f"--{option.name}", action="append")
    own, rest = parser.parse_known_args(arguments)
    problems: list[str] = []
    values = {}
    for option in GROUP.options:
        given = getattr(own, option.name)
        if isinstance(given, list):
            # What may be a list may be given more than once.
            given = ",".join(given) if option.kind == "list" else given[-1]
        values[option.name] = parse_value(option, given, problems)
    if values["since"] and parse_timestamp(values["since"]) is None:
        problems.append(
            f"--since={values['since']} is not an ISO 8601 time, such as 2026-11-01T00:00:00Z"
        )
    return values, problems, rest


def help_text() -> str:
    """The command's own options, then those of a run."""
    usage = f"usage: beam-lambda-sink {COMMAND} --error_topic=TOPIC --OPTION=VALUE ..."
    about = "Puts the original records of an error topic through the pipeline again."
    of_a_run = format_help().splitlines()[2:]
    return "\n".join([usage, "", about, "", *format_group(GROUP), *of_a_run])


def main(arguments: Sequence[str], started: float) -> int:
    """The command.

    Args:
        arguments: Without the program's name and the command's.
        started: When the program began, in monotonic seconds.

    Returns:
        The exit code.

    Raises:
        SinkError: The options do not fit, or it cannot go on.
    """
    values, problems, rest = parse(arguments)
    resolved = resolve_options(rest)
    logs.configure_as(resolved.values)
    problems += resolved.problems
    if "error_topic" not in resolved.values:
        problems.append("--error_topic is missing: it is what is redriven")
    if resolved.runner not in DIRECT_RUNNERS:
        problems.append(f"--runner={resolved.runner}: {COMMAND} runs on the DirectRunner")
    if resolved.config and resolved.config.run.workers > 1:
        problems.append(
            f"--workers={resolved.config.run.workers}: {COMMAND} runs in one process; give "
            f"--workers=1"
        )
    if resolved.config and resolved.config.write.transaction:
        problems.append(
            f"--delivery=exactly_once: {COMMAND} writes at least once; give "
            f"--delivery=at_least_once"
        )
    if resolved.config and resolved.config.invoke.window:
        problems.append(
            f"--tumbling_window_secs={resolved.config.invoke.window.secs}: {COMMAND} has no "
            f"windows; give --tumbling_window_secs=0"
        )
    if resolved.explain:
        logs.show(explain(resolved))
    if problems or resolved.config is None:
        raise UsageError(problems)
    if resolved.explain:
        return DONE
    # Whatever is in an error topic is old; being so must not put it there again.
    policy = replace(resolved.config.invoke.policy, max_record_age_secs=-1)
    config = replace(resolved.config, invoke=replace(resolved.config.invoke, policy=policy))
    redrive = make_config(config, values)
    stop = threading.Event()
    stop_on_signals(stop)
    tune_interpreter()
    run = Redrive(config, redrive, stop, values["dry_run"], values["first_redrive"], started)
    with Progress(run.status, live=False):
        status = run.run()
    _say(config.run.summary, run, status, values["dry_run"])
    for line in halted_text(status, f"group {redrive.kafka.group}"):
        say(line)
    return HALTED if status.halted else DONE


def _say(format: str, run: Redrive, status: Status, dry_run: bool) -> None:
    counts, redriven = run.counts, run.redriven
    if format == "json":
        facts = counts.facts() | {"redriven": redriven, "dry_run": dry_run}
        logs.show(orjson.dumps({**summary(status), COMMAND: facts}).decode())
    elif format == "text" and dry_run:
        logs.show(counts.text())
    elif format == "text":
        taken = counts.taken
        logs.show(
            f"error records: {taken.error_records}, redriven: {redriven}, records in them: "
            f"{taken.records}, answered: {status.totals['write.responses']}, failed again: "
            f"{status.totals['write.errors']}\n{counts.left_text()}"
        )
