"""HTTP: one POST after the other to one URL, over connections that are kept. Knows nothing of AWS.

urllib3 makes the connections, keeps them and says what went wrong with them: TLS, proxies,
timeouts, connections that were closed in between. The exchange itself is done here, in as few calls
as it takes, and on a connection that is open without urllib3: it is general, and three times as
dear (docs/adr/0012-lean-invocations.md).
"""

from __future__ import annotations

import errno
import http.client
import io
import math
import queue
import re
import socket
import ssl
import struct
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import urllib3
import urllib3.exceptions as http_errors
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url, wait_for_read, wait_for_write

# A reply of up to so many bytes is read at once, and of a larger one so many at a time.
_READ_BYTES, _MOST_BYTES = 64 * 1024, 2**20
# How long a reply may take from its first byte to its last, however little of it comes at a time:
# longer than the slowest connection needs for the largest one.
_REPLY_SECS = 900.0
# The head of nearly every reply. What is written otherwise http.client reads, which takes five
# times as long: it reads headers as if they were those of a mail.
_PLAIN_HEAD = re.compile(rb"HTTP/1\.1 (20[02]) [ -~]*\r\n((?:[A-Za-z0-9-]+:[ -~]*\r\n)+)\r\n")
_NO_RETRIES = urllib3.Retry(False)
# The kernel waits for a plain socket by itself, and ends that when the time is over.
_KERNEL_WAITS = sys.platform == "linux" and struct.calcsize("l") == 8
# A connection is open if TCP says so where all that came was one reply, so short a time ago. Of any
# other it is also asked whether more has come.
_FRESH_SECS = 1.0
_ESTABLISHED = 1
# What lies between here and a server (a NAT gateway, a load balancer, a VPC endpoint) forgets a
# connection on which nothing goes for 350 s, and tells nobody. The system's own is two hours.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 30}

MAX_BODY_BYTES = 16 * 2**20
"""A longer body is cut off: more than twice of what Lambda lets a function return."""


class SendTimeoutError(http_errors.TimeoutError):
    """The other side takes no more of a request."""


class Response(NamedTuple):
    """A reply; the headers' names are found in upper and lower case.

    Attributes:
        status: The status.
        headers: The headers.
        body: The body, plain also where it was sent as gzip.
        cut: Whether the body was longer than `MAX_BODY_BYTES`; the rest is missing.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    cut: bool = False


class Head(NamedTuple):
    """The head of a request, ready to be sent.

    Attributes:
        headers: All headers, also `Host` and `Content-Length`.
        text: The whole head.
    """

    headers: Mapping[str, str]
    text: bytes


class Endpoint:
    """A URL to POST to. Thread-safe.

    Args:
        url: The URL.
        connections: How many connections are kept at most.
        connect_secs: How long making one may take.
        send_secs: How long sending a request may stand still.
        read_secs: How long a reply may take to begin, and to go on.
        tls: What to trust, for https.
        proxy_url: The proxy to go through, or None.
    """

    def __init__(
        self,
        url: str,
        connections: int,
        connect_secs: float,
        send_secs: float,
        read_secs: float,
        tls: ssl.SSLContext | None = None,
        proxy_url: str | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "maxsize": connections,
            "timeout": urllib3.Timeout(connect=connect_secs, read=read_secs),
            "socket_options": [
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                *(
                    (socket.IPPROTO_TCP, getattr(socket, name), secs)
                    for name, secs in _KEEPALIVE.items()
                    if hasattr(socket, name)
                ),
            ],
            "ssl_context": tls,
        }
        if proxy_url:
            login = parse_url(proxy_url).auth
            proxy_headers = {"proxy-authorization": _basic(login)} if login else None
            manager: urllib3.PoolManager = urllib3.ProxyManager(
                proxy_url, proxy_headers=proxy_headers, **settings
            )
        else:
            manager = urllib3.PoolManager(**settings)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        self._pool = manager.connection_from_url(url)
        # Handed to each connection that is made.
        self._pool.conn_kw["send_secs"] = send_secs
        parts = urlsplit(url)
        # A proxy that does not tunnel is told the whole URL.
        told_whole = proxy_url and parts.scheme == "http"
        # For such a proxy the pool adds headers to each request.
        self._kept_by = None if told_whole else self._pool.pool
        self._target = url if told_whole else parts._replace(scheme="", netloc="").geturl()

    def head(self, headers: Mapping[str, str]) -> Head:
        """Get a head ready, ahead of its turn."""
        return Head(headers, _head_text("POST", self._target, headers))

    def post(self, head: Head, body: Iterable[bytes]) -> Response:
        """Send a request, once, and read the reply to its end.

        Args:
            head: Of this endpoint.
            body: The chunks of the body; what it does after the last one is done while the reply
                is under way.

        Raises:
            urllib3.exceptions.HTTPError: There is no reply, or no whole one.
        """
        if connection := self._take_kept():
            return _plain(self._exchange(connection, head, body))
        response = self._pool.urlopen(
            "POST",
            self._target,
            body,
            head.headers,
            retries=_NO_RETRIES,
            redirect=False,
            assert_same_host=False,
        )
        cut = getattr(response, "cut", False)
        return _plain(Response(response.status, response.headers, response.data or b"", cut))

    def _take_kept(self) -> _Connection | None:
        """An open connection, out of the pool; None if the pool has to make one."""
        if not self._kept_by:
            return None
        try:
            connection = self._kept_by.get(block=False)
        except queue.Empty:
            return None
        if connection and connection.is_open:
            return connection
        self._put_back(connection)
        return None

    def _put_back(self, connection: _Connection | None) -> None:
        assert self._kept_by
        try:
            self._kept_by.put(connection, block=False)
        except queue.Full:
            if connection:
                connection.close()

    def _exchange(self, connection: _Connection, head: Head, body: Iterable[bytes]) -> Response:
        """As the pool does it, on a connection that is open; failures have the same names."""
        whole = False
        try:
            try:
                connection.post(head.text, body)
            except OSError as error:
                # Whoever closed it may have answered before.
                if error.errno not in (errno.EPIPE, errno.EPROTOTYPE, errno.ECONNRESET):
                    raise
            try:
                response = connection.read()
            except TimeoutError as error:
                why = f"Read timed out. (read timeout={connection.timeout})"
                raise http_errors.ReadTimeoutError(self._pool, self._target, why) from error
            whole = True
            return response
        except ssl.SSLError as error:
            raise http_errors.SSLError(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise http_errors.ProtocolError("Connection aborted.", error) from error
        finally:
            if not whole:
                connection.close()
            self._put_back(connection)


class _Connection(HTTPConnection):
    """Sends and reads by itself what its pool tells it to."""

    def __init__(self, *arguments: Any, send_secs: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._send_secs = send_secs
        self._waiting: _Waiting | None = None
        # When a reply has come at once, and nothing with it.
        self._clean_at = -math.inf

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        sock, is_fresh = self.sock, monotonic() - self._clean_at < _FRESH_SECS
        if not (is_fresh and _KERNEL_WAITS and isinstance(sock, socket.socket)):
            return self.is_connected
        # To ask for more lets go of the interpreter, right before a request is sent.
        try:
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED
        except OSError:
            return False

    def close(self) -> None:
        self._waiting = None
        super().close()

    def _awaited(self) -> _Waiting:
        if not self._waiting:
            self._waiting = _Waiting(self.sock, self._send_secs)
        return self._waiting

    def request(
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.sock is None:
            self.connect()
        self.post(_head_text(method, url, headers or {}), body)

    def post(self, head: bytes, body: Iterable[bytes]) -> None:
        """Send a request over a connection that is open."""
        chunks = iter(body)
        waiting = self._awaited()
        # In one go: two packets may wait for each other.
        self._send(waiting, head + next(chunks, b""))
        for chunk in chunks:
            self._send(waiting, chunk)

    def _send(self, waiting: _Waiting, data: bytes) -> None:
        rest = memoryview(data)
        try:
            # Not `sendall`, whose time is for all of it, however long that takes on its way.
            while rest:
                rest = rest[waiting.send(rest) :]
        except TimeoutError as error:
            raise SendTimeoutError(f"nothing was taken for {self._send_secs:g} s") from error

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        status, headers, body, cut = self.read()
        response = urllib3.HTTPResponse(body, headers, status, preload_content=False)
        response.cut = cut  # type: ignore[attr-defined]
        return response

    def read(self) -> Response:
        """Read a reply to its end."""
        self._clean_at = -math.inf
        waiting = self._awaited()
        waiting.read_within(self.timeout)
        first = waiting.recv(_READ_BYTES)
        head = _plain_head(first)
        if not head:
            return self._read_any(_Received(waiting, first))
        status, headers, start = head
        size = int(headers["content-length"])
        body = first[start : start + size]
        if len(body) < size:
            body = _Received(waiting, first).whole(body, size)
        elif len(first) > start + size:
            # Nothing was asked that this could answer.
            self.close()
        else:
            self._clean_at = monotonic()
        return Response(status, headers, body)

    def _read_any(self, received: _Received) -> Response:
        reader: Any = io.BufferedReader(received, _READ_BYTES)
        # It only asks what it is given for a file to read from.
        response = http.client.HTTPResponse(_Readable(reader), method="POST")  # type: ignore[arg-type]
        try:
            response.begin()
            if response.length is None and not response.chunked:
                # It would end with the connection: no telling a whole one from half of one.
                raise http.client.HTTPException("the reply does not say how long it is")
            body, cut = _read_body(response)
        except ValueError as error:
            # Numbers in the head and between chunks are read without looking at them before.
            raise http.client.HTTPException(f"the reply is no HTTP: {error}") from error
        finally:
            response.close()
        if response.will_close or cut:
            self.close()
        headers = urllib3.HTTPHeaderDict(response.getheaders())
        return Response(response.status, headers, body, cut)


def _head_text(method: str, url: str, headers: Mapping[str, Any]) -> bytes:
    lines = [f"{method} {url} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _read_body(response: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """A body up to what is read of one, and whether that is not all of it."""
    if response.length is not None and response.length <= MAX_BODY_BYTES:
        return response.read(), False
    body = bytearray()
    while len(body) <= MAX_BODY_BYTES:
        piece = response.read(_READ_BYTES)
        if not piece:
            if response.length:
                raise http.client.IncompleteRead(bytes(body), response.length)
            return bytes(body), False
        body += piece
    return bytes(body[:MAX_BODY_BYTES]), True


def _plain(response: Response) -> Response:
    """The reply with its body as it was before somebody on the way compressed it, unasked."""
    if response.headers.get("content-encoding", "").strip().lower() not in ("gzip", "x-gzip"):
        return response
    reader = zlib.decompressobj(wbits=31)
    try:
        body = reader.decompress(response.body, MAX_BODY_BYTES)
    except zlib.error:
        # It says so and is not.
        return response
    if not reader.eof and not reader.unconsumed_tail:
        return response
    return response._replace(body=body, cut=response.cut or bool(reader.unconsumed_tail))


def _basic(login: str) -> str:
    """What a URL has before its host, as a proxy wants it."""
    return "Basic " + b64encode(unquote(login).encode()).decode()


def _plain_head(data: bytes) -> tuple[int, _Headers, int] | None:
    """Status and headers of a reply with a head as most have it, and where its body begins."""
    head = _PLAIN_HEAD.match(data)
    if not head:
        return None
    headers = _Headers()
    lines = head[2].decode("ascii").split("\r\n")
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.lstrip(" ")
    if len(headers) < len(lines) - 1 or "transfer-encoding" in headers:
        return None
    size = headers.get("content-length", "")
    if not size.isdecimal() or len(size) > 9 or int(size) > MAX_BODY_BYTES:
        return None
    if "close" in headers.get("connection", "").lower():
        return None
    return int(head[1]), headers, head.end()


class _Headers(dict[str, str]):
    """Headers by their names in lower case, each of which is there once."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class _Waiting:
    """A socket that is waited for only when it has nothing to give, or takes nothing.

    A plain one the kernel waits for. To look at a socket first lets go of the interpreter once
    more, and to get it back takes up to a millisecond where others are at work.

    Args:
        sock: The socket; TLS inside of TLS waits by itself.
        send_secs: How long each time to send some.

    Raises:
        TimeoutError: That was not long enough.
    """

    def __init__(self, sock: Any, send_secs: float | None) -> None:
        self._sock = sock
        self._send_secs = send_secs
        self._read_secs: float | None = None
        is_socket = isinstance(sock, socket.socket)
        # What TLS asks of a socket that has no time of its own it asks again for ever.
        self._by_kernel = is_socket and _KERNEL_WAITS and not isinstance(sock, ssl.SSLSocket)
        self._by_itself = not is_socket
        if self._by_kernel:
            sock.settimeout(None)
            self._tell_kernel(socket.SO_SNDTIMEO, send_secs)
        elif is_socket:
            sock.settimeout(0.0)

    def read_within(self, secs: float | None) -> None:
        """How long each time to receive some; None for ever, as it is at first."""
        if secs != self._read_secs:
            self._read_secs = secs
            if self._by_kernel:
                self._tell_kernel(socket.SO_RCVTIMEO, secs)

    def _tell_kernel(self, which: int, secs: float | None) -> None:
        micros = 0 if secs is None else max(1, round(secs * 1_000_000))
        timeval = struct.pack("ll", *divmod(micros, 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, which, timeval)

    def send(self, data: memoryview) -> int:
        """Send some of it; how much."""
        return self._ask(self._sock.send, data, wait_for_write, self._send_secs)

    def recv(self, size: int) -> bytes:
        """Receive so many bytes at most; none at the end."""
        return self._ask(self._sock.recv, size, wait_for_read, self._read_secs)

    def _ask(
        self, ask: Callable[[Any], Any], about: Any, wait: Callable[..., bool], secs: float | None
    ) -> Any:
        if self._by_itself and self._sock.gettimeout() != secs:
            self._sock.settimeout(secs)
        while True:
            try:
                return ask(about)
            except BlockingIOError:
                ready = not self._by_kernel and wait(self._sock, secs)
            except ssl.SSLWantReadError:
                ready = wait_for_read(self._sock, secs)
            except ssl.SSLWantWriteError:
                ready = wait_for_write(self._sock, secs)
            if not ready:
                raise TimeoutError("timed out")


class _Received(io.RawIOBase):
    """What a socket receives, until it has taken too long since the first of it.

    Args:
        sock: The socket.
        first: What it has received.
    """

    def __init__(self, sock: _Waiting, first: bytes) -> None:
        self._sock = sock
        self.first = first
        self._unread = memoryview(first)
        self._until = monotonic() + _REPLY_SECS

    def whole(self, body: bytes, size: int) -> bytes:
        """A body that begins so and has so many bytes; the rest is what is received next."""
        pieces, missing = [body], size - len(body)
        while missing:
            piece = self._next(missing)
            if not piece:
                raise http.client.IncompleteRead(b"".join(pieces), missing)
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: Any = self._unread[: len(buffer)]
        if data:
            self._unread = self._unread[len(data) :]
        elif self.first:
            data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        if monotonic() > self._until:
            raise TimeoutError("timed out")
        return self._sock.recv(min(size, _MOST_BYTES))


class _Readable:
    """What stands for a socket that is read through a file already."""

    def __init__(self, reader: io.BufferedReader) -> None:
        self._reader = reader

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._reader


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
