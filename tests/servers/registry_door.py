"""A door in front of a schema registry: lets in who has a login, and no one else."""

from __future__ import annotations

import base64
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from tests.servers.web_server import Quiet, WebServer


class RegistryDoor(WebServer):
    """Passes requests on to a registry. A context manager.

    Args:
        registry: Where the registry is.
        certificate: File with a key and its certificate, for HTTPS.

    Attributes:
        login: ``user:password`` that it takes by now; None for anybody.
        refused: How many requests it has refused for their login.
        quotes: Whether it says, when it refuses, what it was sent.
        url: In place of the registry's.
    """

    def __init__(self, registry: str, certificate: Path | None = None) -> None:
        self.login: str | None = None
        self.refused = 0
        self.quotes = False
        self._certificate = certificate
        owner = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                self._pass_on(None)

            def do_POST(self) -> None:
                self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def _pass_on(self, body: bytes | None) -> None:
                given = self.headers.get("Authorization", "")
                if owner.login is not None and given != _basic(owner.login):
                    owner.refused += 1
                    said = base64.b64decode(given.removeprefix("Basic ")).decode()
                    quoted = f": {given}, {said}" if owner.quotes else ""
                    text = f'{{"error_code": 40101, "message": "Unauthorized{quoted}"}}'
                    self._answer(401, text.encode())
                    return
                kind = self.headers.get("Content-Type", "application/json")
                request = urllib.request.Request(
                    registry + self.path, body, {"Content-Type": kind}, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as answered:
                        self._answer(answered.status, answered.read())
                except urllib.error.HTTPError as error:
                    self._answer(error.code, error.read())

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler, certificate)

    def trust(self, ca: Path) -> None:
        """From now on take certificates of this authority only."""
        assert self._certificate
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.context = context


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"
