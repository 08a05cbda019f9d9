"""The command redrive: its options, and what becomes of them."""

from __future__ import annotations

import pytest

from pipeline.options.declare import OPTIONS
from pipeline.redrive.command import GROUP, make_config, parse
from tests.pipeline.options.given import config_of
from transforms.redrive.selection import (
    Selection,
)


def test_the_command_s_own_options_are_not_those_of_a_run() -> None:
    """So that each is looked for in one place only."""
    assert not {option.name for option in GROUP.options} & set(OPTIONS)


def test_the_command_line_is_divided() -> None:
    """Lists may be given more than once; the rest is left as it is."""
    values, problems, rest = parse(
        ["--condition=a,b", "--topics=t", "--condition", "c", "--dry_run", "--limit=3", "--x"]
    )
    assert (values["condition"], values["dry_run"], values["limit"]) == (("a", "b", "c"), True, 3)
    assert (values["since"], values["redrive_group"]) == (None, None)
    assert problems == [] and rest == ["--topics=t", "--x"]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("--limit=0", "--limit=0 is not allowed; give from 1"),
        ("--limit=many", "not a whole number"),
        ("--since=yesterday", "--since=yesterday is not an ISO 8601 time"),
        ("--dry_run=perhaps", "--dry_run=perhaps is not allowed"),
        ("--redrive_group=", "--redrive_group is empty"),
    ],
)
def test_what_does_not_fit(argument: str, part: str) -> None:
    """One line each, as for any option."""
    (problem,) = parse([argument])[1]
    assert part in problem


def test_what_the_options_become() -> None:
    """The group is one of its own, so that the main run's offsets are left alone."""
    config = config_of(error_topic="errors", on_error="log", parallelization_factor="2")
    values = parse(["--since=2026-11-01", "--condition=a", "--limit=3"])[0]
    made = make_config(config, values)
    assert made.kafka.group == "g-redrive" and made.kafka.bootstrap_servers == "broker:9092"
    assert made.error_topic == "errors" and made.topics == ("orders",)
    assert made.selection == Selection(1_793_491_200_000, ("a",), ())
    assert made.lanes.count == 2 and made.limit == 3
    assert make_config(config, parse(["--redrive_group=x"])[0]).kafka.group == "x"
