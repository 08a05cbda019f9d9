"""HTTP: one POST after the other to one URL, over connections that are kept. Knows nothing of AWS.

urllib3 makes the connections, keeps them and says what went wrong with them: TLS, proxies,
timeouts, connections that were closed in between. The exchange itself is done here, in as few calls
as it takes: urllib3's is general, and three times as dear
(docs/adr/0012-lean-invocations.md).
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import make_headers, parse_url

# A reply of up to so many bytes is read at once.
_READ_BYTES = 64 * 1024
# The head of nearly every reply. What is written otherwise http.client reads, which takes five
# times as long: it reads headers as if they were those of a mail.
_PLAIN_HEAD = re.compile(rb"HTTP/1\.1 (20[02]) [ -~]*\r\n((?:[A-Za-z0-9-]+:[ -~]*\r\n)+)\r\n")
_NO_RETRIES = urllib3.Retry(False)


class Response(NamedTuple):
    """A reply; the headers' names are found in upper and lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Endpoint:
    """A URL to POST to. Thread-safe.

    Args:
        url: The URL.
        connections: How many connections are kept at most.
        connect_secs: How long making one may take.
        read_secs: How long a reply may take to go on.
        tls: What to trust, for https.
        proxy_url: The proxy to go through, or None.
    """

    def __init__(
        self,
        url: str,
        connections: int,
        connect_secs: float,
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
            ],
            "ssl_context": tls,
        }
        if proxy_url:
            login = parse_url(proxy_url).auth
            proxy_headers = make_headers(proxy_basic_auth=login) if login else None
            manager: urllib3.PoolManager = urllib3.ProxyManager(
                proxy_url, proxy_headers=proxy_headers, **settings
            )
        else:
            manager = urllib3.PoolManager(**settings)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        self._pool = manager.connection_from_url(url)
        parts = urlsplit(url)
        # A proxy that does not tunnel is told the whole URL.
        told_whole = proxy_url and parts.scheme == "http"
        self._target = url if told_whole else parts._replace(scheme="", netloc="").geturl()

    def post(self, headers: Mapping[str, str], body: Iterable[bytes]) -> Response:
        """Send a request, once, and read the reply to its end.

        Args:
            headers: All headers, also `Host` and `Content-Length`.
            body: The chunks of the body; what it does after the last one is done while the reply
                is under way.

        Raises:
            urllib3.exceptions.HTTPError: There is no reply, or no whole one.
        """
        response = self._pool.urlopen(
            "POST",
            self._target,
            body,
            headers,
            retries=_NO_RETRIES,
            redirect=False,
            assert_same_host=False,
        )
        return Response(response.status, response.headers, response.data or b"")


class _Connection(HTTPConnection):
    """Sends and reads by itself what its pool tells it to."""

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
        lines = [f"{method} {url} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        chunks = iter(body)
        # In one go: two packets may wait for each other.
        self.sock.sendall(head + next(chunks, b""))
        for chunk in chunks:
            self.sock.sendall(chunk)

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        if self.sock.gettimeout() != self.timeout:
            self.sock.settimeout(self.timeout)
        reader: Any = self.sock.makefile("rb", buffering=_READ_BYTES)
        with reader:
            return _read_plain(reader) or self._read_any(reader)

    def _read_any(self, reader: io.BufferedReader) -> urllib3.HTTPResponse:
        # It only asks what it is given for a file to read from.
        response = http.client.HTTPResponse(_Readable(reader), method="POST")  # type: ignore[arg-type]
        try:
            response.begin()
            if response.length is None and not response.chunked:
                # It would end with the connection: no telling a whole one from half of one.
                raise http.client.HTTPException("the reply does not say how long it is")
            body = response.read()
        finally:
            response.close()
        if response.will_close:
            self.close()
        headers = urllib3.HTTPHeaderDict(response.getheaders())
        return urllib3.HTTPResponse(body, headers, response.status, preload_content=False)


def _read_plain(reader: io.BufferedReader) -> urllib3.HTTPResponse | None:
    """Read a reply with a head as most have it; of any other, read nothing."""
    head = _PLAIN_HEAD.match(reader.peek())
    if not head:
        return None
    headers = urllib3.HTTPHeaderDict()
    for line in head[2].decode("ascii").splitlines():
        name, _, value = line.partition(":")
        headers.add(name, value.lstrip(" "))
    size = headers.get("content-length", "")
    has_size = size.isdecimal() and len(size) < 10
    closes = "close" in headers.get("connection", "").lower()
    if not has_size or closes or "transfer-encoding" in headers:
        return None
    reader.read(head.end())
    body = reader.read(int(size))
    if len(body) < int(size):
        raise http.client.IncompleteRead(body, int(size) - len(body))
    return urllib3.HTTPResponse(body, headers, int(head[1]), preload_content=False)


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
