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
    """Gives a token to who knows the secret, or brings an assertion. A context manager.

    Args:
        certificate: File with its key and its certificate.
        secs: How long a token is good for.

    Attributes:
        asked: The forms it was sent.
        refused: How many of them got no token.
        secret: What it is to be asked with.
        quotes: Whether it says of a login that it refuses what it was.
        url: Where tokens are.
    """

    def __init__(self, certificate: Path, secs: float = 60) -> None:
        self.asked: list[dict[str, str]] = []
        self.refused = 0
        self.secret = CLIENT_SECRET
        self.quotes = False
        owner = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {name: values[0] for name, values in parse_qs(body).items()}
                owner.asked.append(form)
                login = base64.b64encode(f"{CLIENT}:{owner.secret}".encode()).decode()
                given = str(self.headers.get("Authorization"))
                good = given == f"Basic {login}" or "assertion" in form
                answer: dict[str, object] = {
                    "access_token": token(secs=secs),
                    "token_type": "bearer",
                    "expires_in": secs,
                }
                if not good:
                    owner.refused += 1
                    answer = {"error": "invalid_client"}
                    if owner.quotes:
                        plain = base64.b64decode(given.removeprefix("Basic ")).decode()
                        answer["error_description"] = f"{given} is {plain}"
                content = json.dumps(answer).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler, certificate)
        self.url += "/token"
