"""Progress: what a run shows while it works, and its last summary."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import orjson
from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.run.rounds import Status
from pipeline.watch.logs import say
from transforms.records import Finished

_LOGGER = logging.getLogger(__name__)

LOG_SECS = 10.0
_SHOWN_PARTITIONS = 20


def summary(status: Status) -> dict[str, Any]:
    """The run in numbers; `responses` counts the records that the function answered for."""
    totals = status.totals
    return {
        "records": totals.records,
        "batches": totals["batch.batches"],
        "invocations": totals["invoke.invocations"],
        "responses": totals["write.responses"],
        "errors": totals["write.errors"],
        "retries": totals["invoke.retries"],
        "bisections": totals["invoke.bisections"],
        "throttles": totals["invoke.throttles"],
        "concurrency": {"limit": status.limit, "in_flight_max": status.in_flight_max},
        "breaker": {"open": status.breaker_open, "openings": status.breaker_openings},
        "filtered": totals["filter.filtered"],
        "halted": [_halt(finished) for finished in status.halted],
        "committed": {
            f"{topic}-{partition}": offset
            for (topic, partition), offset in sorted(status.committed.items())
        },
        "elapsed_secs": round(status.elapsed_secs, 3),
    }


def summary_text(status: Status) -> str:
    """The same for people, in one line."""
    facts = summary(status)
    secs = facts["elapsed_secs"]
    rate = facts["records"] / secs if secs else 0
    return (
        f"records: {facts['records']} in {secs:.1f} s ({rate:,.0f}/s), answered: "
        f"{facts['responses']}, errors: {facts['errors']}, batches: {facts['batches']}, "
        f"invocations: {facts['invocations']}, retries: {facts['retries']}, bisections: "
        f"{facts['bisections']}, throttles: {facts['throttles']}"
        f"{_filtered_text(status)}"
    )


def _filtered_text(status: Status) -> str:
    """What a line adds where records were filtered out."""
    filtered = status.totals["filter.filtered"]
    return f", filtered: {filtered}" if filtered else ""


def _halt(finished: Finished) -> dict[str, Any]:
    assert finished.halted
    failure = finished.halted
    return {
        "topic": finished.topic,
        "partition": finished.partition,
        "offset": failure.records.offsets[0],
        "condition": failure.condition,
        "error_type": failure.error_type,
        "message": failure.message[:500],
    }


def halted_text(status: Status, group: str) -> list[str]:
    """The last lines of a run with halted partitions: which, where, and how to go on."""
    lines = []
    for finished in status.halted:
        facts = _halt(finished)
        message = " ".join(str(facts["message"]).split())
        lines.append(
            f"halted: {facts['topic']}-{facts['partition']} at offset {facts['offset']}: "
            f"{facts['condition']}, {facts['error_type']}: {message}"
        )
    if lines:
        lines.append(
            f"Nothing from there on is committed to group {group}. Mend the function and run the "
            f"same command again; or go on without such records: --on_error=log "
            f"--error_topic=TOPIC, with --bisect_on_error to lose only the bad ones"
        )
    return lines


def progress_text(status: Status) -> str:
    """One line for the log."""
    totals = status.totals
    lag = sum(lag or 0 for lag in status.lags.values())
    return (
        f"records: {totals.records}, batches: {totals['batch.batches']}, in flight: "
        f"{_in_flight(status)}, retries: {totals['invoke.retries']}, errors: "
        f"{totals['write.errors']}, lag: {lag}, partitions: {len(status.lags)}"
        f"{_filtered_text(status)}"
    )


def _in_flight(status: Status) -> str:
    limit = "" if status.limit is None else f" of {status.limit}"
    return f"{status.in_flight}{limit}{' (breaker open)' if status.breaker_open else ''}"


def progress_table(status: Status) -> Table:
    """The live table of a terminal."""
    totals = status.totals
    table = Table(box=None, pad_edge=False)
    for name in ("records", "batches", "in flight", "retries", "errors", "records/s", "secs"):
        table.add_column(name, justify="right")
    secs = status.elapsed_secs
    table.add_row(
        f"{totals.records:,}",
        f"{totals['batch.batches']:,}",
        _in_flight(status),
        str(totals["invoke.retries"]),
        str(totals["write.errors"]),
        f"{totals.records / secs if secs else 0:,.0f}",
        f"{secs:.1f}",
    )
    lags = sorted(status.lags.items(), key=lambda item: -(item[1] or 0))[:_SHOWN_PARTITIONS]
    halted = {finished.key for finished in status.halted}
    shown = "  ".join(
        f"{topic}-{partition} {'halted' if (topic, partition) in halted else f'{lag or 0:,}'}"
        for (topic, partition), lag in sorted(lags)
    )
    if shown:
        table.caption = f"lag: {shown}"
        table.caption_justify = "left"
    return table


class Progress:
    """Shows a run while it works: a live table on a terminal, a log line each 10 s elsewhere.

    Args:
        status: Asked for the current numbers.
        live: Whether stderr is a terminal worth a table.
    """

    def __init__(self, status: Callable[[], Status], live: bool) -> None:
        self._status = status
        self._done = threading.Event()
        self._live: Live | None = None
        if live:
            self._live = Live(
                get_renderable=lambda: progress_table(status()),
                console=Console(stderr=True),
                refresh_per_second=4,
                transient=True,
            )
        self._thread = threading.Thread(target=self._log, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._live:
            self._live.stop()
        else:
            self._thread.join()

    def _log(self) -> None:
        while not self._done.wait(LOG_SECS):
            _LOGGER.info("%s", progress_text(self._status()))


def print_summary(status: Status, format: str, group: str) -> None:
    """Print how the run ended: the summary on stdout, halted partitions last on stderr."""
    if format == "json":
        print(orjson.dumps(summary(status)).decode(), flush=True)
    elif format == "text":
        print(summary_text(status), flush=True)
    for line in halted_text(status, group):
        say(line)
