"""Tokens of a token server: which settings are ours to ask with, and what comes of its answers."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.web_server import Quiet, WebServer
from transforms.aws.msk import SHARE, TokenError
from transforms.kafka.oidc import TokenRequest, ask, take_oidc

SETTINGS = {
    "bootstrap.servers": "b:9092",
    "security.protocol": "SASL_SSL",
    "sasl.mechanism": "OAUTHBEARER",
    "sasl.oauthbearer.method": "oidc",
    "sasl.oauthbearer.token.endpoint.url": "https://tokens.example/get",
    "sasl.oauthbearer.client.id": "orders",
    "sasl.oauthbearer.client.secret": "s3cret/+=",
}
OURS = TokenRequest("https://tokens.example/get", "orders", "s3cret/+=")


def test_what_a_token_server_is_asked() -> None:
    """librdkafka sees nothing of it but what is the broker's; and what nobody knows, to refuse."""
    more = {
        "sasl.oauthbearer.scope": "kafka",
        "sasl.oauthbearer.extensions": "logicalCluster=lkc-1,identityPoolId=pool-a",
        "https.ca.pem": "PEM",
        "sasl.oauthbearer.clinet.id": "x",
        "linger.ms": "1",
    }
    rest, request = take_oidc({**SETTINGS, **more})
    assert rest == {
        "bootstrap.servers": "b:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "OAUTHBEARER",
        "sasl.oauthbearer.clinet.id": "x",
        "linger.ms": "1",
    }
    assert request == TokenRequest(
        OURS.url,
        "orders",
        "s3cret/+=",
        "kafka",
        (("logicalCluster", "lkc-1"), ("identityPoolId", "pool-a")),
        None,
        "PEM",
    )
    assert "s3cret" not in repr(request)


@pytest.mark.parametrize(
    "change",
    [
        {"sasl.mechanism": "PLAIN"},
        {"sasl.oauthbearer.method": "default"},
        {"sasl.oauthbearer.client.secret": ""},
        {"sasl.oauthbearer.token.endpoint.url": "file:///etc/passwd"},
        {"sasl.oauthbearer.grant.type": "urn:ietf:params:oauth:grant-type:jwt-bearer"},
        {"sasl.oauthbearer.metadata.authentication.type": "aws_iam"},
    ],
)
def test_what_is_librdkafkas_stays_with_it(change: dict[str, str]) -> None:
    settings = {**SETTINGS, **change}
    assert take_oidc(settings) == (settings, None)


class _Server(WebServer):
    """Gives one answer."""

    def __init__(self) -> None:
        self.status, self.answer, self.headers = 200, b"", {}
        self.got: list[str] = []
        owner = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                owner.got.append(self.headers["Authorization"])
                owner.got.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(owner.status)
                for name, text in owner.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(owner.answer)))
                self.end_headers()
                self.wfile.write(owner.answer)

        super().__init__(Handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with _Server() as running:
        yield running


def _jwt(secs: float) -> str:
    claims = json.dumps({"exp": time.time() + secs}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.x"


@pytest.mark.parametrize(
    ("answer", "secs"),
    [
        ({"access_token": "abc", "expires_in": 100}, 100),
        ({"access_token": "abc", "expires_in": "100"}, 100),
        ({"access_token": _jwt}, 3600),
        ({"access_token": "abc", "expires_in": 1e300}, 24 * 3600),
    ],
)
def test_a_token_and_how_long_it_is_used(server: _Server, answer: Any, secs: float) -> None:
    if callable(answer["access_token"]):
        answer = {"access_token": answer["access_token"](secs)}
    server.answer = json.dumps(answer).encode()
    request = TokenRequest(server.url, "orders", "s3cret", "kafka all")
    token, until = ask(request)
    assert token == answer["access_token"]
    assert until - time.time() == pytest.approx(SHARE * secs, abs=60)
    login, form = server.got
    assert login == f"Basic {base64.b64encode(b'orders:s3cret').decode()}"
    assert form == "grant_type=client_credentials&scope=kafka+all"


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (401, {"error": "invalid_client", "error_description": "no\nsuch"}, "answers 401 invalid"),
        (400, {"error": ["x"], "who": "s3cret"}, "answers 400"),
        (503, b"<html>s3cret", "answers 503"),
        (302, b"", "answers 302"),
        (200, b"<html>s3cret", "gives no token, or one that is over"),
        (200, {"access_token": "abc"}, "gives no token, or one that is over"),
        (200, {"access_token": "abc", "expires_in": 0}, "gives no token, or one that is over"),
        (200, b'{"access_token": "abc", "expires_in": NaN}', "gives no token, or one that is"),
        (200, b"[" * 100_000, "gives no token, or one that is over"),
    ],
)
def test_no_token_is_one_line_without_the_secret(
    server: _Server, status: int, answer: Any, said: str
) -> None:
    """Nor is the secret sent elsewhere."""
    server.status = status
    server.headers = {"Location": f"{server.url}/elsewhere"} if status == 302 else {}
    server.answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    with pytest.raises(TokenError) as raised:
        ask(TokenRequest(server.url, "orders", "s3cret"))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "s3cret" not in str(raised.value)
    assert len(server.got) == 2


def test_a_token_server_that_is_away() -> None:
    with pytest.raises(TokenError, match=r"the token server 127\.0\.0\.1:1 does not answer: "):
        ask(TokenRequest("http://127.0.0.1:1/", "orders", "s3cret"))
