"""Help: every option with its facts."""

from __future__ import annotations

import pytest

from pipeline.cli import main
from pipeline.options.declare import GROUPS, OPTIONS
from pipeline.options.help import format_help
from tests.pipeline.options.given import BOUNDS


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_ends_with_0(argument: str, capsys) -> None:
    """Help goes to stdout, whatever else is given."""
    assert main(["--nonsense", argument]) == 0
    assert capsys.readouterr().out == format_help() + "\n"


@pytest.mark.parametrize("name", list(OPTIONS))
def test_help_names_each_option_with_its_facts(name: str) -> None:
    """Name, what it does, unit, range and default."""
    option = OPTIONS[name]
    text = format_help()
    after = text.split(f"  --{name}\n", 1)[1].split("\n  --", 1)[0].split("\n\n", 1)[0]
    shown = " ".join(after.split())
    assert " ".join(option.help.split()) in shown
    assert f"default: {option.default_text}" in shown
    if option.unit:
        assert f"unit: {option.unit}" in shown
    if option.kind in ("int", "float"):
        low, high, special = BOUNDS[name]
        assert f"{low} to {high}" in shown
        assert special is None or f"{special} (no limit) or" in shown
    for choice in option.choices:
        assert choice in shown
    if option.kind == "flag":
        assert "true | false" in shown


def test_help_fits_a_terminal_and_has_the_groups() -> None:
    """80 columns, and the options under their titles."""
    lines = format_help().splitlines()
    assert max(map(len, lines)) <= 80
    for group in GROUPS:
        assert group.title in lines
