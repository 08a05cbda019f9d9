"""Carried: what the configuration of another system comes to here. Pure.

A table of `Row`s says what becomes of each setting of a system; docs/coming-from.md is made from
the same rows. Whatever a file holds ends in exactly one place: an option's value, a note on why it
is not carried over, or a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OWN = "the file"
"""The system of a file that holds options by their own names."""


class Value(NamedTuple):
    """An option's value as text, and where it came from in the words of the file."""

    text: str
    origin: str


class Note(NamedTuple):
    """A setting that is not carried over.

    Attributes:
        name: Its name in the file. Its value is never kept: it may be a secret.
        why: The reason, and what to do about it.
        answers: Options that settle it if given on the command line.
    """

    name: str
    why: str
    answers: tuple[str, ...] = ()


@dataclass(slots=True)
class Carried:
    """What a file comes to.

    Attributes:
        system: Whose configuration it is, as the explanation calls it.
        file: The file's name.
        given: The options of the command line, which win over the file.
        environ: Environment variables.
        values: By option, what the file says.
        defaults: By option, what the file leaves to its system's own default.
        notes: What is not carried over, and changes nothing.
        refused: What would change what the function gets or what becomes of its records.
    """

    system: str
    file: str
    given: Mapping[str, str]
    environ: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    defaults: dict[str, Value] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    refused: list[Note] = field(default_factory=list)

    def take(self, option: str, text: str, name: str) -> None:
        """The file's setting `name` says what the option is."""
        self.values[option] = Value(text, name)

    def assume(self, option: str, text: str) -> None:
        """The file leaves the option to its system's default."""
        self.defaults[option] = Value(text, f"default of {self.system}")

    def note(self, name: str, why: str) -> None:
        """A setting is left out, and nothing changes by that."""
        self.notes.append(Note(name, why))

    def refuse(self, name: str, why: str, *answers: str) -> None:
        """A setting cannot be carried over; settled by any of the options `answers`."""
        settled = [option for option in answers if self.given.get(option)]
        if settled:
            self.note(name, f"--{settled[0]} is given instead")
        else:
            self.refused.append(Note(name, why, answers))

    def in_force(self, option: str) -> str | None:
        """What the option will be, None if that is left to its default here."""
        if option in self.given:
            return self.given[option]
        found = self.values.get(option) or self.defaults.get(option)
        return found.text if found else None


Take = Callable[[Carried, str, Any], None]
"""Does what becomes of a setting, given its name and its value: a text, or what is nested."""


class Row(NamedTuple):
    """What becomes of a setting of another system, or of several of a kind.

    Attributes:
        names: As that system calls them; a ``*`` stands for anything.
        here: What becomes of them, for the docs.
        take: Does it; None where another setting's turn looks at it.
        default: That system's default, for the docs.
        option: The option that its value is, if it is one.
    """

    names: tuple[str, ...]
    here: str
    take: Take | None = None
    default: str = ""
    option: str = ""


def single(value: Any) -> str:
    """A setting's value that is one text.

    Raises:
        ValueError: It is something nested.
    """
    if not isinstance(value, str):
        raise ValueError("it is not a single value")
    return value


def becomes(
    names: str, option: str, default: str = "", convert: Callable[[Any], str] = single
) -> Row:
    """A row of settings that are an option.

    Args:
        names: The settings, separated by spaces.
        option: The option.
        default: The other system's default.
        convert: Makes the option's value; what it raises as ValueError is why it is refused.
    """

    def take(carried: Carried, name: str, value: Any) -> None:
        try:
            carried.take(option, convert(value), name)
        except ValueError as error:
            carried.refuse(name, str(error), option)

    return Row(tuple(names.split()), f"--{option}", take, default, option)


def unneeded(names: str, why: str) -> Row:
    """A row of settings that are left out, and change nothing."""

    def take(carried: Carried, name: str, text: Any) -> None:
        if text:
            carried.note(name, why)

    return Row(tuple(names.split()), f"not needed: {why}", take)


def refused(names: str, why: str, harmless: Iterable[str] = (), answers: str = "") -> Row:
    """A row of settings that are refused unless they are empty or have a harmless value."""
    harmless = tuple(harmless)

    def take(carried: Carried, name: str, text: Any) -> None:
        if text and text not in harmless:
            carried.refuse(name, why, *answers.split())

    return Row(tuple(names.split()), f"refused: {why}", take)


def looked_up(names: str, here: str, default: str = "", option: str = "") -> Row:
    """A row of settings that are looked at together with others."""
    return Row(tuple(names.split()), here, None, default, option)


def find_row(rows: Iterable[Row], name: str) -> Row | None:
    """The row of a setting: the one with its very name, else the one with the longest pattern."""
    best: tuple[int, Row] | None = None
    for row in rows:
        for pattern in row.names:
            if pattern == name:
                return row
            matches = "*" in pattern and re.fullmatch(
                ".*".join(map(re.escape, pattern.split("*"))), name
            )
            if matches and (best is None or len(pattern) > best[0]):
                best = len(pattern), row
    return best[1] if best else None
