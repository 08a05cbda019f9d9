"""Endpoint: what `--http` answers of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.run.hands import Command, Told
from pipeline.run.status import Status
from pipeline.watch import api, metrics
from pipeline.watch.about import About
from pipeline.watch.hands import serve_hands
from pipeline.watch.history import History
from pipeline.watch.server import Answer, Request, Server, as_json
from pipeline.watch.site import serve_page


def serve(
    server: Server,
    status: Callable[[], Status],
    about: About,
    history: History,
    tell: Callable[[Command], Told],
    token: str = "",
) -> None:
    """Have a server answer for a run.

    Args:
        server: Where.
        status: How the run stands; asked for by any thread.
        about: What it is.
        history: How it went.
        tell: Tells the run something, by any thread.
        token: What who tells it something has to give; empty if nobody can.
    """
    serve_hands(server, tell, token)
    serve_page(server, status, about, history)
    exposition = metrics.exposition(status, about)

    def scrape(request: Request) -> Answer:
        body, content_type = exposition(request.headers.get("accept"))
        return Answer(body, content_type)

    def probe(
        which: Callable[[Status], tuple[bool, dict[str, Any]]],
    ) -> Callable[[Request], Answer]:
        def answer(_: Request) -> Answer:
            good, facts = which(status())
            return as_json(facts, 200 if good else 503)

        return answer

    server.get("/metrics", scrape)
    server.get("/livez", probe(api.live))
    server.get("/readyz", probe(api.ready))
    server.get("/healthz", probe(api.ready))
    server.get("/api/status", lambda _: as_json(api.facts_of(status(), about)))
    server.get("/version", lambda _: as_json({"version": about.version}))
