"""Jars from Maven Central, for the servers that tests and the demo start.

Each ``*.pom.xml`` in this folder names what one server needs. Maven fetches it once; it is kept
outside the checkout, in ``$BEAM_LAMBDA_SINK_CACHE`` (default ``~/.cache/beam-lambda-sink``):

    python -m pipeline.local.jars fetch kafka     # 45 MB
    python -m pipeline.local.jars fetched kafka   # exit code 0 if they are there, else 1
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.local.processes import ServerError

_POMS = Path(__file__).parent

NOT_HANDED_ON = Path("gradle", "wrapper")
"""Beam's job server hands every jar of its classpath to each job, 190 MB, except those it takes for
a part of Gradle by such a folder. Here the whole cluster has the same jars already."""


def names() -> list[str]:
    """What can be fetched."""
    return sorted(path.name.removesuffix(".pom.xml") for path in _POMS.glob("*.pom.xml"))


def cache_folder() -> Path:
    """Where all that was fetched is kept."""
    cache = os.environ.get("BEAM_LAMBDA_SINK_CACHE") or Path.home() / ".cache/beam-lambda-sink"
    return Path(cache).absolute()


def jar_folder(name: str) -> Path:
    """The folder a server's jars are kept in; it exists only when it is complete.

    Another content of the pom is another folder.
    """
    content = hashlib.sha256(_pom(name).read_bytes()).hexdigest()
    return cache_folder() / f"{name}-{content[:12]}" / NOT_HANDED_ON


def classpath(name: str) -> str:
    """A server's jars as Java's ``-cp`` takes them; fetches them if need be (`fetch`)."""
    return f"{fetch(name)}/*"


def fetch(name: str) -> Path:
    """Return the folder with a server's jars; fetch them with Maven if it is not there yet.

    Raises:
        ServerError: Maven is missing or failed; its output is in the message.
    """
    copy = ["-f", str(_pom(name)), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    return fetch_with_maven(jar_folder(name), f"the {name} jars", copy)


def fetch_with_maven(folder: Path, what: str, arguments: Sequence[str]) -> Path:
    """Return a folder that Maven fills, once; it exists only when it is complete.

    Args:
        folder: Where to put it.
        what: Its name, for messages.
        arguments: Maven's, without the one for the folder.

    Raises:
        ServerError: Maven is missing or failed; its output is in the message.
    """
    if folder.is_dir():
        return folder
    if shutil.which("mvn") is None:
        raise ServerError(f"Maven (mvn) is needed to fetch {what} and is not on the PATH")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        maven = subprocess.run(
            ["mvn", "-q", "-B", *arguments, f"-DoutputDirectory={partial}"],
            cwd=partial,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if maven.returncode != 0:
            raise ServerError(f"Maven could not fetch {what}:\n{maven.stdout[-4000:]}")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            # Somebody else was faster; what they fetched is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _pom(name: str) -> Path:
    return _POMS / f"{name}.pom.xml"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if jars are not there or cannot be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.local.jars",
        description="fetch the jars of local servers, or say by the exit code if they are there",
    )
    parser.add_argument("command", choices=("fetch", "fetched"))
    parser.add_argument(
        "names", nargs="+", choices=names(), metavar="NAME", help=", ".join(names())
    )
    options = parser.parse_args(arguments)
    if options.command == "fetched":
        return 0 if all(jar_folder(name).is_dir() for name in options.names) else 1
    try:
        for name in options.names:
            fetch(name)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
