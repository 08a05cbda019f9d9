"""A server that gives out tokens, as OpenID Connect has it, and keeps what it was asked."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from urllib.parse import parse_qs

from tests.servers.secure_broker import SCOPE, TOKEN_SECRET, USER
from tests.servers.web_server import Quiet, WebServer

CLIENT, CLIENT_SECRET = "orders-client", "secret-of-the-client"


def _part(content: object) -> str:
    text = json.dumps(content).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def token(subject: str = USER, secs: float = 60) -> str:
    """A token of a subject, good for so many seconds."""
    now = int(time.time())
    claims = {"sub": subject, "scope": SCOPE, "iat": now, "exp": now + int(secs)}
    text = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims)}"
    signature = hmac.new(TOKEN_SECRET.encode(), text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


class TokenServer(WebServer):
    """Gives a token to who knows `CLIENT_SECRET`, or brings an assertion. A context manager.

    Args:
        certificate: File with its key and its certificate.

    Attributes:
        asked: The forms it was sent.
        url: Where tokens are.
    """

    def __init__(self, certificate: Path) -> None:
        self.asked: list[dict[str, str]] = []
        owner = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {name: values[0] for name, values in parse_qs(body).items()}
                owner.asked.append(form)
                login = base64.b64encode(f"{CLIENT}:{CLIENT_SECRET}".encode()).decode()
                known = self.headers.get("Authorization") == f"Basic {login}"
                good = known or "assertion" in form
                answer = {"access_token": token(), "token_type": "bearer", "expires_in": 60}
                content = json.dumps(answer if good else {"error": "invalid_client"}).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler, certificate)
        self.url += "/token"
