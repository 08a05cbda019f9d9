"""Logs: to stderr, as text or one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import orjson

from pipeline.options.levels import LEVELS


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, tz=timezone.utc)
        facts = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # What the message says, for machines.
        said = getattr(record, "facts", {})
        facts |= {name: value for name, value in said.items() if name not in facts}
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(facts).decode()
        except TypeError:
            # A number of more than 64 bits, which hardly anything else could read either.
            return json.dumps(json.loads(json.dumps(facts), parse_int=_as_read))


def _as_read(digits: str) -> int | str:
    return int(digits) if len(digits) < 19 else digits


class _Stderr:
    """Whatever stderr is now: the live table puts itself in front of it while it is shown."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


_OURS = ("pipeline", "transforms")


def set_level(level: str) -> None:
    """From which level on our own lines are shown."""
    for ours in _OURS:
        logging.getLogger(ours).setLevel(level)


def configure(format: str, level: str = "INFO") -> None:
    """Send all logs to stderr. Ours from a level on, everybody else's from WARNING on."""
    handler = logging.StreamHandler(_Stderr())
    if format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # Said by Beam at import where its Google Cloud extra is not installed; it is not needed here.
    handler.addFilter(lambda record: "apitools not found" not in record.getMessage())
    # A failed round is reported by us, in one line; Beam would log the whole stack before.
    for quiet in ("apache_beam", "botocore", "urllib3"):
        logging.getLogger(quiet).setLevel(logging.CRITICAL)
    set_level(level)
    # One line per attempt to connect; `transforms.kafka.client.ErrorLog` says it once in a while.
    logging.getLogger("librdkafka").setLevel(logging.CRITICAL)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def configure_as(values: Mapping[str, Any]) -> None:
    """Send the logs as the options say, wherever they say it; text is what they begin with."""
    given = {name: values[name].text for name in ("log_format", "log_level") if name in values}
    if given:
        level = given.get("log_level", "INFO")
        configure(given.get("log_format", "text"), level if level in LEVELS else "INFO")


def show(text: str) -> None:
    """Print on stdout what the user asked for.

    How a run ended stays the same if nobody takes it, or if its encoding lacks a character.
    """
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError):
        # What is still in its buffer must not fail again at the end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def say(line: str) -> None:
    """Print one of a run's last words on stderr: as it is, or as a log line if those are JSON."""
    if any(isinstance(handler.formatter, _JsonFormatter) for handler in logging.root.handlers):
        logging.getLogger("pipeline").error("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)
