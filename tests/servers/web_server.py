"""What the HTTP servers of the tests have in common: a free port, their threads and their end."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound="WebServer")


class Quiet(BaseHTTPRequestHandler):
    """A handler that logs nothing: what a server was asked is for its owner to keep."""

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    context: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.context:
            connection = self.context.wrap_socket(connection, server_side=True)
        return connection, address


class WebServer:
    """Listens at a free port of 127.0.0.1, and answers from `start` to `close`. A context manager.

    Args:
        handler: Answers requests.
        certificate: File with a key and its certificate, for HTTPS.

    Attributes:
        url: Where it is, without a slash at the end.
    """

    def __init__(
        self, handler: type[BaseHTTPRequestHandler], certificate: Path | None = None
    ) -> None:
        self._server = _Server(("127.0.0.1", 0), handler)
        if certificate:
            self._server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._server.context.load_cert_chain(certificate)
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self: T) -> T:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
