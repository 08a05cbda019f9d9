"""What is wrong with a Dockerfile, as far as it can be told without building it.

assert problems(path.read_text(), context=folder_it_is_built_in) == []
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FLAGS: dict[str, set[str]] = {
    "ADD": {"checksum", "chmod", "chown", "exclude", "keep-git-dir", "link", "unpack"},
    "ARG": set(),
    "CMD": set(),
    "COPY": {"chmod", "chown", "exclude", "from", "link", "parents"},
    "ENTRYPOINT": set(),
    "ENV": set(),
    "EXPOSE": set(),
    "FROM": {"platform"},
    "HEALTHCHECK": {"interval", "retries", "start-interval", "start-period", "timeout"},
    "LABEL": set(),
    "ONBUILD": set(),
    "RUN": {"mount", "network", "security"},
    "SHELL": set(),
    "STOPSIGNAL": set(),
    "USER": set(),
    "VOLUME": set(),
    "WORKDIR": set(),
}
"""Every instruction, and the flags that it has."""

_IMAGE = re.compile(
    r"(?P<name>[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*)(:(?P<tag>[\w][\w.-]{0,127}))?"
    r"(?P<digest>@sha256:[0-9a-f]{64})?"
)
_URL = re.compile(r"https?://|git@|.+\.git(#|$)")


class Instruction(NamedTuple):
    """One instruction, its continued lines put together."""

    line: int
    name: str
    flags: dict[str, str]
    rest: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions, without comments and empty lines."""
    begun, parts = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        begun = begun or number
        continued = line.rstrip().endswith("\\")
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not continued:
            yield _instruction(begun, " ".join(filter(None, parts)))
            begun, parts = 0, []
    if parts:
        yield Instruction(begun, "", {}, "the last line goes on, and nothing follows")


def _instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    flags = {}
    while flag := re.match(r"--([a-z-]+)(?:=(\S*))?\s*", rest):
        flags[flag[1]] = flag[2] or ""
        rest = rest[flag.end() :]
    return Instruction(line, name, flags, rest.strip())


def images(text: str) -> list[str]:
    """The images it is made of: those of FROM and of COPY --from, without its own stages."""
    found, stages = [], set()
    for instruction in instructions(text):
        words = instruction.rest.split()
        image = words[:1] if instruction.name == "FROM" else [instruction.flags.get("from", "")]
        found += [name for name in image if name and name not in stages and not name.isdecimal()]
        if instruction.name == "FROM" and len(words) == 3:
            stages.add(words[2])
    return found


def problems(text: str, context: Path) -> list[str]:
    """One line for each problem.

    Args:
        text: The Dockerfile.
        context: The folder it is built in, with the files that COPY takes.
    """
    return [
        f"line {instruction.line}: {problem}"
        for instruction, problem in _Check(context).check(list(instructions(text)))
    ]


class _Check:
    def __init__(self, context: Path) -> None:
        self._context = context
        self._stages: list[str] = []
        self._arguments: dict[str, str] = {}

    def check(self, found: list[Instruction]) -> Iterator[tuple[Instruction, str]]:
        if not any(instruction.name == "FROM" for instruction in found):
            yield Instruction(1, "", {}, ""), "there is no FROM"
        for instruction in found:
            for problem in self._problems(instruction):
                yield instruction, problem

    def _problems(self, instruction: Instruction) -> Iterator[str]:
        name, rest = instruction.name, instruction.rest
        if not name:
            yield rest
            return
        if name not in _FLAGS:
            yield f"{name} is no instruction"
            return
        for flag in instruction.flags.keys() - _FLAGS[name]:
            yield f"{name} knows no --{flag}"
        if not rest:
            yield f"{name} says nothing"
        elif not self._stages and name not in ("FROM", "ARG"):
            yield f"{name} comes before FROM"
        else:
            check = getattr(self, f"_{name.lower()}", None)
            yield from check(instruction) if check else ()

    def _from(self, instruction: Instruction) -> Iterator[str]:
        words = instruction.rest.split()
        image = re.sub(r"\$\{?(\w+)\}?", self._argument, words[0])
        if image not in self._stages:
            yield from _image_problems(image)
        if words[1:] and (len(words) != 3 or words[1] != "AS"):
            yield "FROM is FROM IMAGE, or FROM IMAGE AS STAGE"
        if len(words) == 3 and words[2] in self._stages:
            yield f"there are two stages {words[2]}"
        self._stages.append(words[2] if len(words) == 3 else str(len(self._stages)))

    def _argument(self, reference: re.Match[str]) -> str:
        return self._arguments.get(reference[1], reference[0])

    def _arg(self, instruction: Instruction) -> Iterator[str]:
        name, separator, value = instruction.rest.partition("=")
        if not re.fullmatch(r"\w+", name):
            yield f"{name} is no name for an argument"
        elif separator and not self._stages:
            self._arguments[name] = value.strip("\"'")

    def _copy(self, instruction: Instruction) -> Iterator[str]:
        origin = instruction.flags.get("from")
        if origin is None:
            yield from self._sources(instruction)
        elif origin not in self._stages[:-1] and not self._is_number(origin):
            yield from _image_problems(origin)

    def _is_number(self, origin: str) -> bool:
        return origin.isdecimal() and int(origin) < len(self._stages) - 1

    def _add(self, instruction: Instruction) -> Iterator[str]:
        if _URL.match(instruction.rest):
            if "checksum" not in instruction.flags:
                yield f"{instruction.rest.split()[0]} is fetched without --checksum"
        else:
            yield from self._sources(instruction)

    def _sources(self, instruction: Instruction) -> Iterator[str]:
        rest = instruction.rest
        words = json.loads(rest) if rest.startswith("[") else rest.split()
        if len(words) < 2:
            yield f"{instruction.name} needs a source and a destination"
            return
        *sources, destination = words
        files = []
        for source in sources:
            if ".." in Path(source).parts:
                yield f"{source} is outside of the folder it is built in"
                continue
            matching = sorted(self._context.glob(source.removeprefix("/") or "*"))
            if not matching:
                yield f"{source} is not there"
            files += matching
        many = len(sources) > 1 or len(files) > 1 or any("*" in source for source in sources)
        if many and not destination.endswith("/"):
            yield f"{destination} takes several files, so it has to end with /"

    def _run(self, instruction: Instruction) -> Iterator[str]:
        if instruction.rest.startswith("["):
            yield from _exec_problems(instruction)
            return
        try:
            shlex.split(instruction.rest)
        except ValueError as error:
            yield f"RUN: {error}"

    def _env(self, instruction: Instruction) -> Iterator[str]:
        for word in shlex.split(instruction.rest):
            if not re.match(r"[A-Za-z_]\w*=", word):
                yield f"{word} is not of the form NAME=VALUE"

    _label = _env

    def _workdir(self, instruction: Instruction) -> Iterator[str]:
        if not instruction.rest.startswith(("/", "$")):
            yield f"WORKDIR {instruction.rest} is not an absolute path"

    def _user(self, instruction: Instruction) -> Iterator[str]:
        if len(instruction.rest.split()) != 1:
            yield f"USER {instruction.rest} is not one user"

    def _expose(self, instruction: Instruction) -> Iterator[str]:
        for port in instruction.rest.split():
            if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(/(tcp|udp))?", port):
                yield f"{port} is no port"

    def _entrypoint(self, instruction: Instruction) -> Iterator[str]:
        yield from _exec_problems(instruction)

    _cmd = _shell = _entrypoint


def _exec_problems(instruction: Instruction) -> Iterator[str]:
    """A shell between Docker and the program would take the signals."""
    try:
        words = json.loads(instruction.rest)
    except ValueError:
        words = None
    if not words or not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        yield f'{instruction.name} is not in exec form, ["program", "argument"]'


def _image_problems(image: str) -> Iterator[str]:
    parts = _IMAGE.fullmatch(image)
    if not parts:
        yield f"{image} is neither an image nor a stage before"
    elif not parts["digest"] and parts["tag"] in (None, "latest"):
        yield f"{image} has no version"
