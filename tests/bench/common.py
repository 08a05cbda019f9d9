"""What all parts of the benchmark share: the competitors' names, what they run beside, tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from pipeline.local.broker import KafkaBroker
from tests.bench import stub

PIPELINE = "pipeline"
HAND_WRITTEN = "hand-written"
HAND_WRITTEN_ORJSON = "hand-written, orjson"

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_EC2_METADATA_DISABLED": "true",
}

_TICKS = os.sysconf("SC_CLK_TCK")


def chosen(name: str, group: list[str], only: list[str] | None) -> bool:
    """Whether `--only` leaves `name` in: it names it, or none of its group."""
    named = [other for other in group if other in (only or ())]
    return name in named or not named


@contextmanager
def on_broker(options: argparse.Namespace) -> Iterator[str]:
    """The broker that was named, or one of its own; yield its address."""
    broker: AbstractContextManager[KafkaBroker | None] = nullcontext()
    if not options.bootstrap_servers:
        broker = KafkaBroker(compiled_well=True)
    with broker as started:
        yield started.bootstrap_servers if started else options.bootstrap_servers


@contextmanager
def serving(latency_ms: float, batch: int = 100) -> Iterator[str]:
    """A stub with a latency, as a client sees it; yield its URL."""
    process, url = stub.start_calibrated(latency_ms, batch) if latency_ms else stub.start()
    try:
        yield url
    finally:
        process.terminate()
        process.wait()


def in_turn(whos: list[str], turn: int) -> list[str]:
    """Each time another one begins, so that none is always the one after a pause."""
    first = turn % max(1, len(whos))
    return whos[first:] + whos[:first]


def children_of(pid: int) -> list[int]:
    """The living children of a process; none of one that is gone."""
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return found
    for thread in threads:
        try:
            found += map(int, (thread / "children").read_text().split())
        except FileNotFoundError:
            continue
    return found


def cpu_secs(pid: int | None) -> float:
    """Processor's time of a process, its living children, and those it has waited for."""
    if pid is None:
        return 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    # utime, stime, cutime, cstime: fields 14 to 17 of the line.
    own = sum(map(int, fields[11:15])) / _TICKS
    return own + sum(map(cpu_secs, children_of(pid)))


def table(titles: Sequence[str], lines: Sequence[Sequence[str]], names: int = 2) -> str:
    """Lines as a table that is Markdown too; the first columns are `names`, the others numbers."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    rule = [
        "-" * width if index < names else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    text = []
    for line in (titles, rule, *lines):
        cells = (
            cell.ljust(width) if index < names else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def verdict(holds: bool | None) -> str:
    """What a report says of an aim."""
    return {None: "not measured", True: "holds", False: "MISSED"}[holds]
