"""Progress: what a run shows while it works, and its last summary."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import orjson
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.run.status import Status
from pipeline.watch.logs import say, show
from transforms.invoke.failures import Failed, Stuck, halt_facts, halt_line
from transforms.names import Names, spoken
from transforms.records import Finished, PartitionKey

_LOGGER = logging.getLogger(__name__)

LOG_SECS = 10.0
_SHOWN_PARTITIONS = 20
# Of those in trouble a line names so many.
_NAMED = 5
_HALTED = "halted"


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
        "workers": status.workers,
        "breaker": {"open": status.breaker_open, "openings": status.breaker_openings},
        "filtered": totals["filter.filtered"],
        "halted": [_halt(finished, status.names) for finished in status.halted],
        "last_error": _last_error(status.trouble.last_error, status.names),
        "waits": _waits(status),
        "lag_max": max((lag for lag in status.lags.values() if lag is not None), default=None),
        **({"lag_unit": "ms"} if status.names.lag_ms else {}),
        "oldest_age_secs": _rounded(status.trouble.oldest_age_secs),
        "committed": {
            f"{topic}-{partition}": status.names.position(offset)
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
        f"{_filtered_text(status)}{trouble_text(status)}"
    )


def _filtered_text(status: Status) -> str:
    """What a line adds where records were filtered out."""
    filtered = status.totals["filter.filtered"]
    return f", filtered: {filtered}" if filtered else ""


def _halt(finished: Finished, names: Names) -> dict[str, Any]:
    facts = halt_facts(finished)
    return facts | {"offset": names.number(facts["offset"])}


def _last_error(error: Failed | None, names: Names) -> dict[str, Any] | None:
    if error is None:
        return None
    offsets = names.numbers(error.facts["offsets"])
    return {"time": when(error.at)} | error.facts | {"offsets": offsets}


def _waits(status: Status) -> list[dict[str, Any]]:
    """Per partition that does not get on, what it waits for."""
    stuck = [
        {
            "topic": each.topic,
            "partition": each.partition,
            "for": each.waits_for,
            "until": None if each.until is None else when(each.until),
            "error_type": each.error_type,
        }
        for each in status.trouble.stuck
    ]
    halted = [
        {
            "topic": finished.topic,
            "partition": finished.partition,
            "for": _HALTED,
            "until": None,
            "error_type": halt_facts(finished)["error_type"],
        }
        for finished in status.halted
    ]
    return stuck + halted


def when(secs: float) -> str:
    """A moment as ISO 8601, of seconds since the epoch."""
    return datetime.fromtimestamp(secs, timezone.utc).isoformat(timespec="milliseconds")


def _rounded(secs: float | None) -> float | None:
    return None if secs is None else round(secs, 3)


def _clock(secs: float) -> str:
    return f"{datetime.fromtimestamp(secs, timezone.utc):%H:%M:%SZ}"


def trouble_text(status: Status) -> str:
    """What a line adds where something does not go well; empty where all does."""
    trouble = status.trouble
    parts = []
    if trouble.oldest_age_secs is not None:
        parts.append(f"oldest unfinished record: {trouble.oldest_age_secs:.0f} s")
    if status.halted:
        parts.append(f"halted: {_named([_name(finished.key) for finished in status.halted])}")
    if trouble.stuck:
        parts.append(f"waiting: {_named([_wait_text(stuck) for stuck in trouble.stuck])}")
    if error := trouble.last_error:
        said = f": {error.message}" if error.message else ""
        parts.append(
            f"last error: {error.topic}-{error.partition} at offset {spoken(error.first)}, "
            f"{_clock(error.at)}: {error.error_type}{said}"
        )
    return "".join(f", {part}" for part in parts)


def _wait_text(stuck: Stuck) -> str:
    until = "" if stuck.until is None else f" until {_clock(stuck.until)}"
    return f"{stuck.topic}-{stuck.partition} ({stuck.waits_for}{until}, {stuck.error_type})"


def _name(key: PartitionKey) -> str:
    return f"{key[0]}-{key[1]}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return " ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def halted_text(status: Status, ledger: str) -> list[str]:
    """The last lines of a run with halted partitions: which, where, and how to go on."""
    lines = [halt_line(finished) for finished in status.halted]
    if lines:
        lines.append(
            f"Nothing from there on is committed to {ledger}. Mend the function and run the "
            f"same command again; or go on without such records: --on_error=log "
            f"--error_topic=TOPIC, with --bisect_on_error to lose only the bad ones"
        )
    return lines


def progress_text(status: Status) -> str:
    """One line for the log."""
    totals = status.totals
    return (
        f"records: {totals.records}, batches: {totals['batch.batches']}, in flight: "
        f"{_in_flight(status)}, retries: {totals['invoke.retries']}, errors: "
        f"{totals['write.errors']}, {_lag_text(status)}, "
        f"partitions: {len(status.lags)}"
        f"{_filtered_text(status)}{trouble_text(status)}"
    )


def _lag_text(status: Status) -> str:
    lags = [lag or 0 for lag in status.lags.values()]
    if status.names.lag_ms:
        # Times are not added up: they run at once.
        return f"behind: {max(lags, default=0)} ms{_largest_lag(status)}"
    return f"lag: {sum(lags)}{_largest_lag(status)}"


def _largest_lag(status: Status) -> str:
    lags = {key: lag for key, lag in status.lags.items() if lag}
    if len(lags) < 2:
        return ""
    key = max(lags, key=lambda key: lags[key])
    return f" (largest: {_name(key)} {lags[key]})"


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
    what = "behind, ms" if status.names.lag_ms else "lag"
    lines = [f"{what}: {shown}"] if shown else []
    if trouble := trouble_text(status):
        lines.append(trouble.removeprefix(", "))
    if lines:
        # Somebody else's text: not to be read as markup.
        table.caption = Text("\n".join(lines))
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


def print_summary(status: Status, format: str, ledger: str) -> None:
    """Print how the run ended: the summary on stdout, halted partitions last on stderr."""
    if format == "json":
        show(orjson.dumps(summary(status)).decode())
    elif format == "text":
        show(summary_text(status))
    for line in halted_text(status, ledger):
        say(line)
