"""The command `offsets`: where a group stands in its topics, and to move it while no run is up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from pipeline.options.checks import parse_timestamp, parse_value
from pipeline.options.checks_login import check_login, login_of
from pipeline.options.declare import OPTIONS, Group, Option
from pipeline.options.help import format_group
from pipeline.options.resolve import Parser
from transforms.access import KINDS, Access, AccessError, login_settings, parse_access
from transforms.errors import KafkaError, UsageError
from transforms.kafka.client import KafkaConfig, make_consumer
from transforms.kafka.committer import GroupOffsets
from transforms.kafka.login import put_over
from transforms.kafka.offsets import SourceConfig, SourceOffsets
from transforms.properties import load_properties
from transforms.records import PartitionKey, read_halt

COMMAND = "offsets"
EARLIEST, LATEST = "earliest", "latest"
_SHARED = (
    "kafka_bootstrap_servers",
    "kafka_config_file",
    "kafka_role_arn",
    "kafka_access",
    "aws_web_identity",
    "aws_web_identity_audience",
    "event_source_arn",
    "consumer_group",
    "topics",
)

GROUP = Group(
    "Offsets",
    (
        Option(
            "partition",
            "Only these partitions, comma separated, each as TOPIC-NUMBER.",
            kind="list",
            example="orders-3",
        ),
        Option(
            "to",
            "Where to move the group: earliest, latest, an ISO 8601 time (the first record that is "
            "not older), or an offset. Not given: it is only shown.",
            example="2026-11-01T00:00:00Z",
        ),
        Option(
            "execute",
            "Move it. Without this it is only shown what would be moved.",
            kind="flag",
            default=False,
        ),
        Option(
            "format",
            "Print a table as text, or json.",
            kind="choice",
            default="text",
            choices=("text", "json"),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """How a group stands in a partition.

    Attributes:
        key: The partition.
        start: Its first offset.
        end: Its next one.
        committed: The group's; None if it has none.
        halted: What halted it, if that is kept with the offset.
        to: Where it is to be moved; None for nowhere.
    """

    key: PartitionKey
    start: int
    end: int
    committed: int | None
    halted: str = ""
    to: int | None = None

    @property
    def lag(self) -> int | None:
        """Records behind the committed offset; None without one."""
        return None if self.committed is None else max(0, self.end - self.committed)


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The command's options, and what is wrong with them."""
    options = [*(OPTIONS[name] for name in _SHARED), *GROUP.options]
    parser = Parser()
    for option in options:
        if option.kind == "flag":
            parser.add_argument(f"--{option.name}", nargs="?", const="true")
        else:
            parser.add_argument(f"--{option.name}")
    given, rest = parser.parse_known_args(arguments)
    problems = [f"{argument} is not known to {COMMAND}" for argument in rest]
    values = {o.name: parse_value(o, getattr(given, o.name), problems) for o in options}
    problems += [
        f"--{name} is missing; for example --{name}={OPTIONS[name].example}"
        for name in ("kafka_bootstrap_servers", "consumer_group", "topics")
        if values[name] is None
    ]
    keys = []
    for text in values["partition"] or ():
        topic, _, number = text.rpartition("-")
        if not topic or not number.isdecimal():
            problems.append(f"--partition={text} is not TOPIC-NUMBER, such as orders-3")
        else:
            keys.append((topic, int(number)))
    values["partition"] = keys
    to = values["to"]
    if to and not (to in (EARLIEST, LATEST) or to.isdecimal() or parse_timestamp(to)):
        problems.append(
            f"--to={to} is not {EARLIEST}, {LATEST}, an offset, or an ISO 8601 time such as "
            f"2026-11-01T00:00:00Z"
        )
    if values["execute"] and not to:
        problems.append("--execute needs --to, where to move the group")
    return values, problems


def help_text() -> str:
    """What it can do."""
    usage = f"usage: beam-lambda-sink {COMMAND} --OPTION=VALUE ..."
    about = (
        "Shows where a consumer group stands: end, committed offset and lag of each partition. "
        "With --to it shows where it would be moved, and with --execute it is. That is refused "
        "while the group has members. A streaming job is no member: end it first."
    )
    shared = Group("Source", tuple(OPTIONS[name] for name in _SHARED))
    return "\n".join([usage, "", about, "", *format_group(GROUP), *format_group(shared)])


def connection(values: Mapping[str, Any]) -> KafkaConfig:
    """Where Kafka is, with the login of a run that has the same options.

    Raises:
        UsageError: The login does not fit.
    """
    problems: list[str] = []
    access: tuple[Access, ...] = ()
    try:
        access = parse_access(values["kafka_access"] or (), KINDS)
    except AccessError as error:
        problems.append(f"--kafka_access: {error}")
    file = values["kafka_config_file"]
    settings = put_over(login_settings(access), load_properties(file) if file else {})
    check_login(values, settings, os.environ, problems)
    if problems:
        raise UsageError(problems)
    login = login_of(values, settings, os.environ)
    servers, group = values["kafka_bootstrap_servers"], values["consumer_group"]
    return KafkaConfig(servers, group, file, login, access)


def main(arguments: Sequence[str], show: Callable[[str], None]) -> int:
    """Run the command; returns its exit code.

    Raises:
        SinkError: The options do not fit, or Kafka does not do it.
    """
    values, problems = parse(arguments)
    if problems:
        raise UsageError(problems)
    kafka = connection(values)
    consumer = make_consumer(kafka)
    try:
        offsets = SourceOffsets(SourceConfig(kafka, values["topics"]), consumer)
        rows = _rows(offsets, values)
        show(_text(rows, values) if values["format"] == "text" else _json(rows, values, kafka))
        if values["execute"]:
            # Kafka itself refuses it of who is no member, while there are members.
            moved = {row.key: row.to for row in rows if row.to is not None}
            if why := GroupOffsets(kafka).commit(moved, {}, late=True):
                raise KafkaError(f"--consumer_group={kafka.group} is not moved: {why}")
            if values["format"] == "text":
                show("moved")
    finally:
        consumer.close()
    return 0


def _rows(offsets: SourceOffsets, values: Mapping[str, Any]) -> list[Row]:
    keys = offsets.partitions()
    if wanted := values["partition"]:
        if unknown := sorted(set(wanted).difference(keys)):
            topic, number = unknown[0]
            raise UsageError([f"--partition={topic}-{number} is not there"])
        keys = wanted
    committed = offsets.committed(keys)
    ranges = offsets.ranges(sorted(keys))
    targets = _targets(offsets, ranges, values["to"]) if values["to"] else {}
    rows = []
    for key in sorted(keys):
        at, note = committed.get(key, (None, ""))
        halt = read_halt(note)
        why = f"{halt.halted.condition}, {halt.halted.error_type}" if halt and halt.halted else ""
        rows.append(Row(key, *ranges[key], at, why, targets.get(key)))
    return rows


def _targets(
    offsets: SourceOffsets, ranges: Mapping[PartitionKey, tuple[int, int]], to: str
) -> dict[PartitionKey, int]:
    """Where each partition would be moved: never outside of what it has."""
    if to == EARLIEST:
        return {key: low for key, (low, _) in ranges.items()}
    if to == LATEST:
        return {key: high for key, (_, high) in ranges.items()}
    if to.isdecimal():
        return {key: min(max(low, int(to)), high) for key, (low, high) in ranges.items()}
    moment = parse_timestamp(to)
    assert moment
    return offsets.at_timestamp(ranges, max(0, int(moment.timestamp() * 1000)))


def _text(rows: Sequence[Row], values: Mapping[str, Any]) -> str:
    heads = ["partition", "first", "end", "committed", "lag"]
    moving = values["to"] is not None
    heads += ["moved to"] if moving else []
    heads += ["halted"] if any(row.halted for row in rows) else []
    lines = [heads]
    for row in rows:
        numbers = [row.start, row.end, row.committed, row.lag] + ([row.to] if moving else [])
        line = [f"{row.key[0]}-{row.key[1]}", *("-" if n is None else str(n) for n in numbers)]
        lines.append([*line, row.halted] if "halted" in heads else line)
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    table = [
        "  ".join(
            text.ljust(width)
            if place in (0, heads.index("halted") if "halted" in heads else 0)
            else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    known = [row.lag for row in rows if row.lag is not None]
    table.append(f"lag of all: {sum(known)}")
    if moving and not values["execute"]:
        table.append("nothing is moved: give --execute to move it")
    return "\n".join(table)


def _json(rows: Sequence[Row], values: Mapping[str, Any], kafka: KafkaConfig) -> str:
    listed = [
        {
            "topic": row.key[0],
            "partition": row.key[1],
            "first": row.start,
            "end": row.end,
            "committed": row.committed,
            "lag": row.lag,
            "halted": row.halted or None,
            "to": row.to,
        }
        for row in rows
    ]
    facts = {"group": kafka.group, "execute": values["execute"], "partitions": listed}
    return orjson.dumps(facts).decode()
