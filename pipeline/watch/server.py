"""Server: the HTTP endpoint beside a run. Knows requests and answers, and nothing of runs.

It is small on purpose: it stands in the process that does the work. So many connections at once,
each with a time limit; what comes in is short or refused; nothing that goes wrong with a request
leaves a trace, or a connection.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import orjson

from transforms.errors import UsageError

_LOGGER = logging.getLogger(__name__)

_CONNECTIONS = 64
_SECS = 10.0
_BODY_BYTES = 65_536

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked.

    Attributes:
        path: Without a query.
        headers: By name, in any case.
        body: Of a POST.
        client: Who asks, as an address.
    """

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    client: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered.

    Attributes:
        body: The whole of it.
        content_type: Of that.
        status: HTTP status.
        stream: In place of the body what comes bit by bit, until nobody listens any more.
        headers: Besides those of every answer.
    """

    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    stream: Iterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[Request], Answer]


def as_json(facts: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(orjson.dumps(facts, option=orjson.OPT_APPEND_NEWLINE), "application/json", status)


def as_text(text: str, status: int) -> Answer:
    """An answer in one line."""
    return Answer(f"{text}\n".encode(), status=status)


class Server:
    """Listens as soon as it is made, and answers inside its context.

    Processes that are forked meanwhile do not listen.

    Args:
        host: Where to listen: an address of this machine, or a name of one.
        port: 0 for any that is free.

    Raises:
        UsageError: It cannot listen there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._routes: dict[tuple[str, str], Route] = {}
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            kind = type("_Http", (_Http,), {"address_family": family})
            self._http: _Http = kind((host, port), self._routes)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError([f"--http={shown} cannot be listened at: {why}"]) from None
        os.register_at_fork(after_in_child=self._http.socket.close)
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.1,), name="http", daemon=True
        )

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host, port = self._http.server_address[:2]
        host = str(host)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def get(self, path: str, route: Route) -> None:
        """Answer a GET, and a HEAD, of a path."""
        self._routes["GET", path] = route

    def post(self, path: str, route: Route) -> None:
        """Answer a POST to a path."""
        self._routes["POST", path] = route

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.ended.set()
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], routes: Mapping[tuple[str, str], Route]) -> None:
        self.routes = routes
        self.ended = threading.Event()
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not as the base does, which asks for this host's name, and may wait for it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Who asks has gone, mostly; what went wrong here was answered.
        _LOGGER.debug("request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "beam-lambda-sink", ""
    timeout = _SECS
    server: _Http

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET", with_body=False)

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str, with_body: bool = True) -> None:
        answer = self._answer_of(method)
        headers = _HEADERS | {"Content-Type": answer.content_type} | dict(answer.headers)
        if answer.stream is None:
            headers["Content-Length"] = str(len(answer.body))
        else:
            self.close_connection = True
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        self.wfile.write(answer.body)
        for part in answer.stream or ():
            self.wfile.write(part)
            if self.server.ended.is_set():
                break

    def _answer_of(self, method: str) -> Answer:
        try:
            path = urlsplit(self.path).path
        except ValueError:
            self.close_connection = True
            return as_text("no such address", 400)
        body = self._body()
        if body is None:
            self.close_connection = True
            return as_text(
                f"give a body of up to {_BODY_BYTES} bytes, with its Content-Length", 413
            )
        route = self.server.routes.get((method, path))
        if route is None:
            known = any(each == path for _, each in self.server.routes)
            return as_text("not that way", 405) if known else as_text("there is nothing here", 404)
        try:
            return route(Request(path, dict(self._lowered()), body, str(self.client_address[0])))
        except Exception:
            _LOGGER.exception("a bug: %s cannot be answered", path)
            return as_text("this could not be answered; the log says why", 500)

    def _body(self) -> bytes | None:
        """What comes with the request; None if it is too much, or nobody knows how much it is."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            return None
        if len(length) > 9 or int(length) > _BODY_BYTES:
            return None
        return self.rfile.read(int(length))

    def _lowered(self) -> Iterator[tuple[str, str]]:
        for name, value in self.headers.items():
            yield name.lower(), value

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For what is no request: without a page that would say it back."""
        self.close_connection = True
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody wants a line for each scrape."""
