"""Site: the page that shows a run, served or as one file. Its files are in `page/`."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from pipeline.run.status import Status
from pipeline.watch import api
from pipeline.watch.about import About
from pipeline.watch.history import History, Sample, as_columns
from pipeline.watch.server import Answer, Route, Server, as_json
from transforms.errors import UsageError

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "uPlot.min.css": "text/css; charset=utf-8",
    "uPlot.iife.min.js": "text/javascript; charset=utf-8",
    "uPlot.LICENSE.txt": "text/plain; charset=utf-8",
}
_SHOWN = 50


def serve_page(
    server: Server, status: Callable[[], Status], about: About, history: History
) -> None:
    """Have a server show the page of a run."""
    for name, content_type in _TYPES.items():
        path = "/" if name == "index.html" else f"/{name}"
        server.get(path, _file(name, content_type))
    # A browser asks for it, and says so where there is none.
    server.get("/favicon.ico", lambda _: Answer(status=204))
    server.get("/api/history", lambda _: as_json(as_columns(history.samples)))

    def say(now: Status, sample: Sample) -> bytes:
        facts = worst(api.facts_of(now, about))
        del facts["configuration"]
        return b"data: " + orjson.dumps({"facts": facts, "sample": sample}) + b"\n\n"

    def events(_: Any) -> Answer:
        lines = (said or b": nothing new\n\n" for said in history.stream(say))
        return Answer(content_type="text/event-stream", stream=lines)

    server.get("/api/events", events)


def _file(name: str, content_type: str) -> Route:
    body = (_FOLDER / name).read_bytes()
    return lambda _: Answer(body, content_type)


def worst(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with the partitions first that are worst off, and no more than are shown."""
    ranks = {"halted": 0, "backing_off": 1, "full": 2, "paused": 3}
    rows = sorted(
        facts["partitions"],
        key=lambda row: (ranks.get(row["state"], 4), -(row["lag"] or 0), row["oldest"] or "~"),
    )
    return facts | {"partitions": rows[:_SHOWN], "partition_count": len(rows)}


# -- as one file -----------------------------------------------------------------------------------


def check_report(path: str) -> None:
    """See whether a report can be written.

    Raises:
        UsageError: It cannot.
    """
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError([f"--report={path} cannot be written: {error.strerror}"]) from None


def write_report(path: str, status: Status, about: About, history: History) -> None:
    """Write the page as one file, as things are.

    Raises:
        UsageError: It cannot be written.
    """
    text = report(status, about, history.samples)
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.replace(part, path)
    except OSError as error:
        raise UsageError([f"--report={path} cannot be written: {error.strerror}"]) from None


def report(status: Status, about: About, samples: list[Sample]) -> str:
    """The page with everything in it: styles, code, numbers. Pure but for its files."""
    facts = worst(api.facts_of(replace(status, draining=False), about))
    if facts["state"] == "running":
        facts["state"] = "ended"
    facts["at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    data = orjson.dumps({"facts": facts, "history": as_columns(samples)}).decode()
    # No text in it can end the element that it is in.
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = (_FOLDER / "index.html").read_text(encoding="utf-8")
    code = [_read(name) for name in ("uPlot.iife.min.js", "page.js")]
    styles = [_read(name) for name in ("uPlot.min.css", "page.css")]
    allowed = " ".join(f"'sha256-{_hash(text)}'" for text in code)
    styled = " ".join(f"'sha256-{_hash(text)}'" for text in styles)
    policy = f"default-src 'none'; script-src {allowed}; style-src {styled}; base-uri 'none'"
    for name, text in zip(("uPlot.min.css", "page.css"), styles):
        page = page.replace(f'<link rel="stylesheet" href="{name}">', f"<style>{text}</style>")
    licence = _read("uPlot.LICENSE.txt").replace("--", "- -")
    page = page.replace(
        '<meta charset="utf-8">',
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
    )
    page = page.replace(
        '<script src="uPlot.iife.min.js"></script>',
        f'<script type="application/json" id="data">{data}</script>\n<!-- uPlot: {licence} -->\n'
        f"<script>{code[0]}</script>",
    )
    return page.replace('<script src="page.js"></script>', f"<script>{code[1]}</script>")


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
