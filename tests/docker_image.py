"""What an image would hold, read from its Dockerfile; what it does not know it refuses."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

_KNOWN = ("FROM", "RUN", "COPY", "ADD", "WORKDIR", "ENV", "ENTRYPOINT")


@dataclass
class Stage:
    """One FROM and what follows it.

    Attributes:
        image: What it begins with.
        name: After AS, or empty.
        instructions: Each word and what stands behind it, in order.
    """

    image: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Dockerfile:
    """The file.

    Attributes:
        stages: In order; the last one is the image.
        environment: What the image sets.
        copied: Files and folders of the context, by where they are in the image.
        from_stages: Of what is copied from other stages: stage, source and target.
        fetched: What is fetched, by where it is in the image.
        runs: Commands of the image.
        entrypoint: Of the image.
    """

    stages: list[Stage] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    from_stages: list[tuple[str, str, str]] = field(default_factory=list)
    fetched: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        """Parse a file.

        Raises:
            ValueError: With the line that is not understood.
        """
        return cls.parse(path.read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> Dockerfile:
        """Parse a text; see `read`."""
        made = cls()
        folder = "/"
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
            if not line.strip():
                continue
            word, _, rest = line.partition(" ")
            rest = rest.strip()
            if word not in _KNOWN or not rest:
                raise ValueError(f"not understood: {line}")
            if word == "FROM":
                parts = re.fullmatch(r"(\S+)(?: AS ([a-z]+))?", rest)
                if not parts:
                    raise ValueError(f"not understood: {line}")
                made.stages.append(Stage(parts[1], parts[2] or ""))
                continue
            if not made.stages:
                raise ValueError(f"before any FROM: {line}")
            made.stages[-1].instructions.append((word, rest))
            if word == "WORKDIR":
                folder = posixpath.join(folder, rest)
            elif word in ("COPY", "ADD"):
                made._copy(word, rest, folder)
            elif word == "ENV":
                for pair in shlex.split(rest):
                    name, separator, value = pair.partition("=")
                    if not separator:
                        raise ValueError(f"not NAME=VALUE: {line}")
                    made.environment[name] = value
            elif word == "RUN":
                made.runs.append(" ".join(rest.split()))
            elif word == "ENTRYPOINT":
                # Its other form would put a shell between the signals and the program.
                made.entrypoint = json.loads(rest)
        return made

    def _copy(self, word: str, rest: str, folder: str) -> None:
        words = shlex.split(rest)
        stage = ""
        if words[0].startswith("--from="):
            stage = words.pop(0).removeprefix("--from=")
        if len(words) < 2 or any(one.startswith("--") for one in words):
            raise ValueError(f"not understood: {word} {rest}")
        *sources, target = words
        into = target.endswith("/")
        if len(sources) > 1 and not into:
            raise ValueError(f"several sources need a folder: {word} {rest}")
        for source in sources:
            at = posixpath.normpath(posixpath.join(folder, target))
            if into:
                at = posixpath.join(at, posixpath.basename(source))
            if stage:
                self.from_stages.append((stage, source, at))
            elif word == "ADD":
                self.fetched[at] = source
            else:
                self.copied[at] = source
