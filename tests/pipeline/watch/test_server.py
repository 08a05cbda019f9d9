"""Server: answers, refusals, and what a stranger can send."""

from __future__ import annotations

import errno
import http.client
import json
import os
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from pipeline.watch.server import Answer, Request, Server, as_json
from transforms.errors import UsageError


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.1", 0)
    server.get("/hello", lambda request: as_json({"client": request.client}))
    server.get("/fails", _fail)
    server.post("/take", lambda request: Answer(request.body))
    with server:
        yield server


def _fail(_: Request) -> Answer:
    raise RuntimeError("s3cret")


def _ask(server: Server, method: str, path: str, **more: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request(method, path, **more)  # type: ignore[arg-type]
    return connection.getresponse()


def _raw(server: Server, data: bytes) -> bytes:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except OSError as error:
            # Who is turned away may hear of it at any of these.
            if error.errno not in {errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE}:
                raise
        return answer


def test_answers(server: Server) -> None:
    """With headers that keep a browser from doing more with it than showing it."""
    answered = _ask(server, "GET", "/hello?x=1")
    assert (answered.status, json.loads(answered.read())) == (200, {"client": "127.0.0.1"})
    assert "default-src 'none'" in answered.headers["Content-Security-Policy"]
    assert "unsafe" not in answered.headers["Content-Security-Policy"]
    assert answered.headers["X-Content-Type-Options"] == "nosniff"
    assert "Python" not in str(answered.headers)
    head = _ask(server, "HEAD", "/hello")
    assert (head.status, head.read()) == (200, b"")
    assert _ask(server, "POST", "/take", body=b"x").read() == b"x"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("POST", "/hello", 405),
        ("GET", "/take", 405),
        ("PUT", "/hello", 501),
        ("DELETE", "/hello", 501),
    ],
)
def test_refusals(server: Server, method: str, path: str, status: int) -> None:
    answered = _ask(server, method, path)
    assert answered.status == status
    assert b"Traceback" not in answered.read()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "70000"},
        {"Content-Length": "-1"},
        {"Content-Length": "1e3"},
        {"Content-Length": "9" * 5000},
        {"Transfer-Encoding": "chunked"},
    ],
)
def test_a_body_that_is_too_much_is_not_read(server: Server, headers: dict[str, str]) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    assert b" 413 " in _raw(server, f"POST /take HTTP/1.1\r\n{lines}\r\n".encode())


def test_an_address_that_is_none_of_ours(server: Server) -> None:
    assert b" 400 " in _raw(server, b"GET http://[bad/hello HTTP/1.1\r\n\r\n")


def test_a_bug_is_logged_and_not_answered(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    answered = _ask(server, "GET", "/fails")
    assert (answered.status, b"s3cret" in answered.read()) == (500, False)
    assert "s3cret" in caplog.text


def test_ten_thousand_strange_requests_leave_nothing(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No trace, no thread, no file; and it answers as before."""
    _ask(server, "GET", "/hello").read()
    rand = random.Random(7)
    parts = [b"GET ", b"POST ", b"/take", b"/hello", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"\x00"]
    parts += [b"Content-Length: 5", b"Host: a", b": ", b"%00", b"A" * 300, b"\xff\xfe", b"HTTP/9"]
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    for _ in range(10_000):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"".join(rand.choices(parts, k=rand.randrange(1, 9))))
    assert _ask(server, "GET", "/hello").status == 200
    for _ in range(300):
        if threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files + 2:
            break
        threading.Event().wait(0.1)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    assert not caplog.text
    assert capfd.readouterr() == ("", "")


def test_too_many_connections_are_turned_away(server: Server) -> None:
    """Those that are there keep what they have; others are served once they are gone."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    held = [socket.create_connection((host, int(port)), timeout=30) for _ in range(64)]
    for connection in held:
        connection.sendall(b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in connection.recv(65536)
    assert _raw(server, b"GET /hello HTTP/1.1\r\n\r\n") == b""
    for connection in held:
        connection.close()
    for _ in range(300):
        if _raw(server, b"GET /hello HTTP/1.1\r\n\r\n"):
            return
        threading.Event().wait(0.1)
    raise AssertionError("nobody is served any more")


def test_where_nobody_can_listen(server: Server) -> None:
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", int(server.url[-5:]))):
        with pytest.raises(UsageError, match="cannot be listened at"):
            Server(host, port)


def test_ipv6() -> None:
    try:
        server = Server("::1", 0)
    except UsageError:
        return  # a machine without it
    server.get("/hello", lambda _: as_json(1))
    with server:
        assert _ask(server, "GET", "/hello").status == 200
