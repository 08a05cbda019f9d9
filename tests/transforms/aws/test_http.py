"""HTTP: what goes out byte for byte, what may come back, and through which doors."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3.exceptions as http_errors
from botocore.httpsession import create_urllib3_context
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from transforms.aws.http import MAX_BODY_BYTES, Endpoint, SendTimeoutError

GUARD_SECS = 20.0

HEADERS = {"Host": "there", "Content-Length": "4"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """Takes connections one after the other and gives each request the next of its replies.

    Attributes:
        received: The requests, whole.
        connections: How many were made.
        closed: Set once it has closed a connection behind a reply.
    """

    def __init__(self, replies: list[bytes], tls: ssl.SSLContext | None = None) -> None:
        self._replies = replies
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        self.received: list[bytes] = []
        self.connections = 0
        self.closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self.connections += 1
                if self._tls:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                    self._open.append(connection)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.received.append(request)
            if self._replies:
                self.reply(connection, self._replies.pop(0))
        connection.close()

    def reply(self, connection: socket.socket, reply: bytes) -> None:
        connection.sendall(reply.removesuffix(CLOSE))
        if reply.endswith(CLOSE):
            with contextlib.suppress(OSError):  # the client may have been faster
                connection.shutdown(socket.SHUT_RDWR)
            self.closed.set()

    def close(self) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()


CLOSE = b"<closes>"
"""At the end of a reply: the connection is closed behind it."""


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            piece = connection.recv(1 << 16)
        except OSError:
            return b""
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")), 0
    )
    while len(body) < length:
        piece = connection.recv(1 << 16)
        if not piece:
            return b""
        body += piece
    return head + b"\r\n\r\n" + body


@contextmanager
def peer(*replies: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    server = Peer(list(replies), tls)
    try:
        yield server
    finally:
        server.close()


def endpoint(port: int, scheme: str = "http", host: str = "127.0.0.1", **more) -> Endpoint:
    settings = {"connections": 2} | dict.fromkeys(
        ("connect_secs", "send_secs", "read_secs"), GUARD_SECS
    )
    return Endpoint(f"{scheme}://{host}:{port}/a%20b?c=d", **(settings | more))


def test_what_goes_out() -> None:
    """The target, the headers and the body, as they were given, in one piece."""
    with peer(OK) as server:
        there = endpoint(server.port)
        there.post(there.head(HEADERS), [b"bo", b"dy"])
    assert server.received == [
        b"POST /a%20b?c=d HTTP/1.1\r\nHost: there\r\nContent-Length: 4\r\n\r\nbody"
    ]


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
            b"abcde",
        ),
        (b"HTTP/1.1 200\r\ncontent-length:2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000, b"x" * 300_000),
    ],
    ids=["length", "empty", "none", "continue", "chunked", "terse", "large"],
)
def test_replies_on_a_connection_that_is_kept(reply: bytes, body: bytes) -> None:
    """However a reply says where it ends, the next request goes over the same connection."""
    with peer(reply, OK) as server:
        there = endpoint(server.port)
        assert there.post(there.head(HEADERS), [b"body"]).body == body
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert server.connections == 1


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    ],
    ids=["close", "old"],
)
def test_replies_on_a_connection_that_ends(reply: bytes, body: bytes) -> None:
    """The reply is whole, and the next request goes over a new connection."""
    with peer(reply, OK) as server:
        there = endpoint(server.port)
        assert there.post(there.head(HEADERS), [b"body"]).body == body
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize("size", [2, 300_000], ids=["at once", "in pieces"])
def test_what_comes_behind_a_reply_answers_nothing(size: int) -> None:
    """A server that says more than it was asked for: the next request goes another way."""
    body = b"o" * size
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body
    more = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext"
    with peer(OK, reply + more, OK) as server:
        there = endpoint(server.port)
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert there.post(there.head(HEADERS), [b"body"]).body == body
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert server.connections == 2


def test_status_and_headers() -> None:
    """Headers are found whatever their case; no status is an error of this layer, none followed."""
    reply = (
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nX-Some: Thing\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    with peer(reply) as server:
        there = endpoint(server.port)
        response = there.post(there.head(HEADERS), [b"body"])
    assert response.status == 302
    assert response.headers["x-sOME"] == "Thing"


@pytest.mark.parametrize(
    "unusual",
    [b"", b"X-Folded: a\r\n b\r\n", b"X-Latin: \xe9\r\n", b"X Y: z\r\n"],
    ids=["nothing", "folded", "latin", "space"],
)
def test_a_head_is_read_alike_whoever_reads_it(unusual: bytes) -> None:
    """Headers of a head as most are, and of one that takes a reader for all there is."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nConnection: keep-alive\r\nX-Two: a\r\n"
        b"x-two:  b: c \r\nX-None:\r\n"
    )
    with peer(head + unusual + b"\r\nok") as server:
        there = endpoint(server.port)
        response = there.post(there.head(HEADERS), [b"body"])
    assert (response.status, response.body) == (200, b"ok")
    assert response.headers["X-Two"] == "a, b: c "
    assert response.headers["X-None"] == ""
    assert response.headers["Content-Length"] == "2"


def test_a_connection_that_the_other_side_closed_in_between() -> None:
    """It is found out before anything is sent on it."""
    with peer(OK + CLOSE, OK) as server:
        there = endpoint(server.port)
        for _ in range(2):
            assert there.post(there.head(HEADERS), [b"body"]).status == 200
            # Until what the server did is known here.
            server.closed.wait(GUARD_SECS)
        assert server.connections == 2


@pytest.mark.parametrize(
    "reply",
    [
        CLOSE,
        b"HTTP/1.1 200 OK\r\nContent-Le" + CLOSE,
        b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\nok" + CLOSE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab" + CLOSE,
        b"HTTP/1.1 200 OK\r\n\r\nmaybe all, maybe not" + CLOSE,
        b"this is not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n0\r\n\r\n" + CLOSE,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nok" + CLOSE,
    ],
    ids=[
        "nothing",
        "half a head",
        "half a body",
        "half a chunk",
        "no length",
        "something else",
        "a chunk of less than nothing",
        "half of what is too large",
    ],
)
@pytest.mark.parametrize("before", [0, 1], ids=["new", "kept"])
def test_no_whole_reply(reply: bytes, before: int) -> None:
    """Never taken for an answer, sent once only, and the next request is none the worse."""
    with peer(*[OK] * before, reply, OK) as server:
        there = endpoint(server.port)
        for _ in range(before):
            there.post(there.head(HEADERS), [b"body"])
        with pytest.raises(http_errors.ProtocolError):
            there.post(there.head(HEADERS), [b"body"])
        assert len(server.received) == before + 1
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize("before", [0, 1], ids=["new", "kept"])
def test_a_reply_that_does_not_come(before: int) -> None:
    """It is waited for as long as was said, whatever the connection has been through."""
    with peer(*[OK] * before) as silent:
        there = endpoint(silent.port, read_secs=0.2)
        for _ in range(before):
            there.post(there.head(HEADERS), [b"body"])
        with pytest.raises(http_errors.ReadTimeoutError):
            there.post(there.head(HEADERS), [b"body"])


def _pieces(count: int) -> bytes:
    return b"10000\r\n" + b"x" * 0x10000 + b"\r\n" if count else b"0\r\n\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 17000000\r\n\r\n" + b"x" * 17_000_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + _pieces(1) * 260 + _pieces(0),
        b"HTTP/1.1 503 Busy\r\nContent-Length: 999999999999\r\n\r\n" + b"x" * 17_000_000,
    ],
    ids=["length", "chunked", "without an end"],
)
@pytest.mark.parametrize("before", [0, 1], ids=["new", "kept"])
def test_a_reply_that_is_too_large(reply: bytes, before: int) -> None:
    """So much of it is read, and the connection with the rest is not used again."""
    with peer(*[OK] * before, reply, OK) as server:
        there = endpoint(server.port)
        for _ in range(before):
            there.post(there.head(HEADERS), [b"body"])
        response = there.post(there.head(HEADERS), [b"body"])
        assert (len(response.body), response.cut) == (MAX_BODY_BYTES, True)
        response = there.post(there.head(HEADERS), [b"body"])
        assert (response.body, response.cut) == (b"ok", False)
        assert server.connections == 2


@pytest.mark.parametrize(
    ("sent", "body", "cut"),
    [
        (gzip.compress(b"ok"), b"ok", False),
        (gzip.compress(b"x" * 20_000_000), b"x" * MAX_BODY_BYTES, True),
        (gzip.compress(b"ok")[:-3], gzip.compress(b"ok")[:-3], False),
        (b"no gzip", b"no gzip", False),
    ],
    ids=["whole", "large", "half", "none"],
)
def test_a_reply_that_somebody_compressed(sent: bytes, body: bytes, cut: bool) -> None:
    """Nobody asked for it; what can be read is read."""
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(sent)
    with peer(head + sent, head + sent) as server:
        there = endpoint(server.port)
        for _ in range(2):
            response = there.post(there.head(HEADERS), [b"body"])
            assert (response.body, response.cut) == (body, cut)


# -- how long things take -----------------------------------------------------------------

LARGE = b"x" * 8_000_000


class SlowReader(Peer):
    """Reads little by little, or no more after some bytes."""

    def __init__(self, tls: ssl.SSLContext | None = None, most: int = len(LARGE)) -> None:
        self._most = most
        self.let_go = threading.Event()
        super().__init__([], tls)
        # Else the system takes most of it at once.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

    def _serve(self, connection: socket.socket) -> None:
        read = 0
        while read < self._most:
            piece = len(connection.recv(1 << 17))
            time.sleep(piece / len(LARGE))
            read += piece
        if self._most == len(LARGE):
            connection.sendall(OK)
        self.let_go.wait(GUARD_SECS)

    def close(self) -> None:
        self.let_go.set()
        super().close()


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def _slow(
    server: SlowReader, scheme: str, trusting: ssl.SSLContext, **more: float
) -> Callable[[], bytes]:
    there = endpoint(server.port, scheme, "localhost", tls=trusting, **more)
    headers = HEADERS | {"Content-Length": str(len(LARGE))}
    return lambda: there.post(there.head(headers), [LARGE]).body


def test_sending_may_take_longer_than_connecting(
    scheme: str, server_side: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """As long as the other side takes something, however slowly; each has its own time."""
    server = SlowReader(server_side if scheme == "https" else None)
    try:
        post = _slow(server, scheme, trusting, connect_secs=0.3)
        started = time.monotonic()
        assert post() == b"ok"
        assert time.monotonic() - started > 0.3
    finally:
        server.close()


def test_sending_that_stands_still(
    scheme: str, server_side: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    """Given up in its own time, which is neither that of connecting nor that of reading."""
    server = SlowReader(server_side if scheme == "https" else None, most=1000)
    try:
        post = _slow(server, scheme, trusting, send_secs=0.3)
        with pytest.raises(SendTimeoutError):
            post()
    finally:
        server.close()


@pytest.mark.parametrize("before", [0, 1], ids=["new", "kept"])
def test_a_reply_that_comes_without_an_end(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Given up after a time, though each byte of it comes soon enough."""
    monkeypatch.setattr("transforms.aws.http._REPLY_SECS", 0.3)
    served = threading.Event()

    class Trickle(Peer):
        def reply(self, connection: socket.socket, reply: bytes) -> None:
            if reply == OK:
                connection.sendall(reply)
                return
            with contextlib.suppress(OSError):
                while not served.wait(0.02):
                    connection.sendall(reply[:1])
                    reply = reply[1:] or b"x"

    server = Trickle([OK] * before + [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"])
    try:
        there = endpoint(server.port)
        for _ in range(before):
            there.post(there.head(HEADERS), [b"body"])
        with pytest.raises(http_errors.ReadTimeoutError):
            there.post(there.head(HEADERS), [b"body"])
    finally:
        served.set()
        server.close()


def test_a_connection_says_that_it_is_there() -> None:
    """Sooner than it is forgotten by what lies between: after 350 s on AWS."""
    with peer(OK) as server:
        there = endpoint(server.port)
        there.post(there.head(HEADERS), [b"body"])
        connection = there._take_kept()
        assert connection
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30)):
            found = connection.sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            assert found == value
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_nobody_there() -> None:
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(http_errors.NewConnectionError):
        there = endpoint(port)
        there.post(there.head(HEADERS), [b"body"])


@pytest.mark.parametrize("before", [0, 1], ids=["new", "kept"])
def test_a_refusal_before_the_body_was_read(before: int) -> None:
    """A server that answers and closes while it is still being sent to: the answer counts."""
    reply = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for _ in range(before):
                    read_request(connection)
                    connection.sendall(OK)
                connection.recv(100)
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
                # Until the client gives up: closing with bytes unread would reset the connection.
                while connection.recv(1 << 16):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        body = b"x" * 8_000_000
        headers = HEADERS | {"Content-Length": str(len(body))}
        there = endpoint(listener.getsockname()[1])
        for _ in range(before):
            there.post(there.head(HEADERS), [b"body"])
        response = there.post(there.head(headers), [body])
        thread.join(GUARD_SECS)
    assert (response.status, response.body) == (413, b"big")


def test_what_the_body_does_after_its_last_chunk() -> None:
    """It is done when all has been sent, while the reply is waited for."""
    order: list[str] = []
    sent = threading.Event()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            read_request(connection)
            order.append("received")
            sent.set()
            assert done.wait(GUARD_SECS)
            order.append("answered")
            connection.sendall(OK)

    done = threading.Event()

    def body() -> Iterator[bytes]:
        yield b"body"
        assert sent.wait(GUARD_SECS)
        order.append("meanwhile")
        done.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        there = endpoint(listener.getsockname()[1])
        assert there.post(there.head(HEADERS), body()).body == b"ok"
        thread.join(GUARD_SECS)
    assert order == ["received", "meanwhile", "answered"]


def test_many_at_once() -> None:
    """Threads share it; more than it keeps connections for is no error."""
    with peer(*[OK] * 40) as server:
        there = endpoint(server.port, connections=2)
        bodies: list[bytes] = []

        def work() -> None:
            for _ in range(5):
                bodies.append(there.post(there.head(HEADERS), [b"body"]).body)

        run_together(work, 8)
    assert bodies == [b"ok"] * 40


def run_together(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_SECS)


# -- TLS ----------------------------------------------------------------------------------


def make_certificate(folder: Path) -> Path:
    """A file with a key and a self-signed certificate for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def trusting(certificate: Path) -> ssl.SSLContext:
    context = create_urllib3_context()
    context.load_verify_locations(certificate)
    return context


def test_tls(server_side: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """A certificate that is trusted, and is for the host; the connection is kept."""
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000
    with peer(OK, large, tls=server_side) as server:
        there = endpoint(server.port, "https", "localhost", tls=trusting)
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
        assert len(there.post(there.head(HEADERS), [b"body"]).body) == 300_000
        assert server.connections == 1


def test_tls_of_somebody_else(server_side: ssl.SSLContext) -> None:
    """A certificate that nobody vouches for is refused before anything is sent."""
    with peer(OK, tls=server_side) as server:
        there = endpoint(server.port, "https", "localhost", tls=create_urllib3_context())
        with pytest.raises(http_errors.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            there.post(there.head(HEADERS), [b"body"])
        assert not server.received


def test_tls_for_another_host(server_side: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """A trusted certificate for another name is refused too."""
    with peer(OK, tls=server_side) as server:
        there = endpoint(server.port, "https", "127.0.0.1", tls=trusting)
        with pytest.raises(http_errors.SSLError, match="match"):
            there.post(there.head(HEADERS), [b"body"])
        assert not server.received


# -- proxies ------------------------------------------------------------------------------


def test_a_proxy_for_http() -> None:
    """It is told the whole URL, and who asks."""
    with peer(OK) as proxy:
        there = endpoint(1, host="there", proxy_url=f"http://me:secret@127.0.0.1:{proxy.port}")
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
    (request,) = proxy.received
    assert request.startswith(b"POST http://there:1/a%20b?c=d HTTP/1.1\r\nHost: there\r\n")
    assert b"\r\nproxy-authorization: Basic bWU6c2VjcmV0\r\n" in request


@pytest.mark.parametrize(
    ("login", "sent"),
    [
        ("me:p%40ss%2Fword", b"bWU6cEBzcy93b3Jk"),  # me:p@ss/word
        ("me:%E2%82%AC", b"bWU64oKs"),  # me:€
        ("me", b"bWU="),
    ],
)
def test_what_a_proxy_is_told_of_who_asks(login: str, sent: bytes) -> None:
    """As it is meant, not as a URL has to have it."""
    with peer(OK) as proxy:
        there = endpoint(1, host="there", proxy_url=f"http://{login}@127.0.0.1:{proxy.port}")
        assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
    assert b"\r\nproxy-authorization: Basic " + sent + b"\r\n" in proxy.received[0]


class Tunnel:
    """A proxy that answers CONNECT and then passes on what it gets."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self.asked.append(read_request(connection))
        target = socket.create_connection(("127.0.0.1", self._target))
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=self._pass_on, args=[target, connection], daemon=True).start()
        self._pass_on(connection, target)

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                to.sendall(data)
        except OSError:
            pass
        to.close()


def test_a_proxy_for_https(server_side: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    """It makes a tunnel, through which TLS goes to the server itself; the tunnel is kept."""
    with peer(OK, OK, tls=server_side) as server:
        tunnel = Tunnel(server.port)
        proxy = f"http://me:secret@127.0.0.1:{tunnel.port}"
        there = endpoint(server.port, "https", "localhost", tls=trusting, proxy_url=proxy)
        for _ in range(2):
            assert there.post(there.head(HEADERS), [b"body"]).body == b"ok"
    (asked,) = tunnel.asked
    assert asked.startswith(f"CONNECT localhost:{server.port} HTTP/1.".encode())
    assert b"roxy-authorization: Basic bWU6c2VjcmV0" in asked.replace(b"Proxy-A", b"proxy-a")
    assert server.received[0].startswith(b"POST /a%20b?c=d HTTP/1.1\r\n")
    assert b"roxy-" not in server.received[0]


def test_no_proxy_there() -> None:
    """Said of the proxy, not of the server behind it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    there = endpoint(1, "https", "there", proxy_url=f"http://127.0.0.1:{port}")
    with pytest.raises(http_errors.ProxyError):
        there.post(there.head(HEADERS), [b"body"])
