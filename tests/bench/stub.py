"""A stub of the Lambda Invoke endpoint, cheap enough not to be what a benchmark measures.

``python -m tests.bench.stub --port 0 --latency_ms 20`` prints ``http://127.0.0.1:PORT`` on its
first line and serves until it is ended. ``--measure`` prints instead how many records/s it answers.

It does no more HTTP/1.1 than its clients need: keep-alive, pipelining, bodies with a
``Content-Length``. Besides ``POST /2015-03-31/functions/NAME/invocations`` it answers
``GET /stats`` (see `Stats`), and ``POST /reset`` sets those numbers back to zero.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass

import orjson

INVOKE_PATH = re.compile(rb"/2015-03-31/functions/[^/ ]+/invocations(\?|$)")

# A reply entry is the opening of the request entry and a constant. Cutting that opening out costs
# 0.5 us a record, a JSON parser 1.3 us or more. It must not be found inside a record's own value:
# in a JSON string its quotes are escaped, and the records of this benchmark do not nest it.
COORDINATES = re.compile(
    rb'"payload": ?(\{"timestamp": ?(?:\d+|null), ?"topic": ?"[^"]*",'
    rb' ?"partition": ?\d+, ?"offset": ?\d+)'
)
ENTRY_OPENING = b'{"payload":'
ENTRY_END = b',"result":{"ok":true}}}'
ENTRY_SEPARATOR = ENTRY_END + b"," + ENTRY_OPENING

NOTHING_FAILED = b'{"batchItemFailures":[]}'

REQUEST_ID = b"x-amzn-RequestId: 00000000-0000-4000-8000-000000000000\r\n"
OK_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b"X-Amz-Executed-Version: $LATEST\r\n" + REQUEST_ID + b"Content-Length: %d\r\n\r\n"
)
ACCEPTED = b"HTTP/1.1 202 Accepted\r\n" + REQUEST_ID + b"Content-Length: 0\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n" + REQUEST_ID + b"\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
LENGTH_REQUIRED = b"HTTP/1.1 411 Length Required\r\nContent-Length: 0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass
class Stats:
    """What was served since the start or the last reset.

    The times are seconds of CLOCK_MONOTONIC: ``first`` when the first counted request was whole,
    ``last`` when the latest reply to one was written. Dry runs are not counted.
    """

    calls: int = 0
    records: int = 0
    request_bytes: int = 0
    first: float = 0.0
    last: float = 0.0


def answer(body: bytes) -> tuple[bytes, int]:
    """Return the function's reply to a request body, and the number of its records."""
    if body.startswith(b"{"):
        # The event of an event source mapping. Its keys and values are base64: no quotes in them.
        return NOTHING_FAILED, body.count(b'"offset":') or body.count(b'"sequenceNumber":')
    found = COORDINATES.findall(body)
    if found:
        return b"[" + ENTRY_OPENING + ENTRY_SEPARATOR.join(found) + ENTRY_END + b"]", len(found)
    # Other white space or another order of the fields: slower, but right.
    names = ("timestamp", "topic", "partition", "offset")
    entries = [entry["payload"] for entry in orjson.loads(body)]
    reply = [{"payload": {n: e[n] for n in names} | {"result": {"ok": True}}} for e in entries]
    return orjson.dumps(reply), len(reply)


class Endpoint(asyncio.BufferedProtocol):
    """One connection.

    Args:
        stats: What to count in.
        latency_secs: From a request's arrival to its reply.
        into: Where to receive; shared by all connections, as it is emptied at once. Else each read
            would ask the kernel for new memory, which costs more than all the rest of it.
    """

    def __init__(self, stats: Stats, latency_secs: float, into: memoryview) -> None:
        self._stats = stats
        self._into = into
        self._latency_secs = latency_secs
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._body_start = 0  # 0 while the head of the request is not whole
        self._body_end = 0
        self._head: list[bytes] = []
        self._late: deque[bytes] = deque()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._into

    def buffer_updated(self, nbytes: int) -> None:
        self._buffer += self._into[:nbytes]
        while self._head_is_whole() and len(self._buffer) >= self._body_end:
            body = bytes(memoryview(self._buffer)[self._body_start : self._body_end])
            del self._buffer[: self._body_end]
            self._body_start = 0
            self._serve(body)

    def _head_is_whole(self) -> bool:
        if self._body_start:
            return True
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *fields = bytes(self._buffer[:end]).split(b"\r\n")
        length = 0
        invocation_type = b"requestresponse"
        for field in fields:
            name, _, value = field.partition(b":")
            name = name.lower()
            if name == b"content-length":
                length = int(value)
            elif name == b"x-amz-invocation-type":
                invocation_type = value.strip().lower()
            elif name == b"expect":
                self._transport.write(CONTINUE)
            elif name == b"transfer-encoding":
                self._transport.write(LENGTH_REQUIRED)
                self._transport.close()
                return False
        method, _, rest = first.partition(b" ")
        self._head = [method, rest.partition(b" ")[0], invocation_type]
        self._body_start = end + 4
        self._body_end = self._body_start + length
        return True

    def _serve(self, body: bytes) -> None:
        method, path, invocation_type = self._head
        if method == b"POST" and INVOKE_PATH.match(path):
            self._invoke(invocation_type, body)
        elif method == b"GET" and path == b"/stats":
            text = orjson.dumps(asdict(self._stats))
            self._transport.write(OK_HEAD % len(text) + text)
        elif method == b"POST" and path == b"/reset":
            self._stats.__init__()  # type: ignore[misc]
            self._transport.write(NO_CONTENT)
        else:
            self._transport.write(NOT_FOUND)

    def _invoke(self, invocation_type: bytes, body: bytes) -> None:
        if invocation_type == b"dryrun":
            self._transport.write(NO_CONTENT)
            return
        arrived = self._loop.time()
        reply, records = answer(body)
        stats = self._stats
        stats.calls += 1
        stats.records += records
        stats.request_bytes += len(body)
        stats.first = stats.first or arrived
        if invocation_type == b"event":
            stats.last = arrived
            self._transport.write(ACCEPTED)
            return
        self._late.append(OK_HEAD % len(reply) + reply)
        if self._latency_secs:
            # From the arrival, so that the work of building the reply is inside the latency.
            self._loop.call_at(arrived + self._latency_secs, self._reply)
        else:
            self._reply()

    def _reply(self) -> None:
        # From a queue, as timers that are due at the same instant may fire in any order.
        self._transport.write(self._late.popleft())
        self._stats.last = self._loop.time()


async def serve(port: int, latency_secs: float) -> None:
    """Serve until SIGTERM or SIGINT; print the URL when connections are accepted."""
    loop = asyncio.get_running_loop()
    stats = Stats()
    into = memoryview(bytearray(256 * 1024))
    server = await loop.create_server(
        lambda: Endpoint(stats, latency_secs, into), "127.0.0.1", port, backlog=1024
    )
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await ended.wait()
    server.close()


def run(port: int, latency_secs: float) -> None:
    """Serve in this process."""
    # select() waits to the microsecond, epoll as asyncio calls it in whole milliseconds rounded up:
    # that would add 0.5 ms to a latency on average. The connections are few enough for it.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        loop.run_until_complete(serve(port, latency_secs))
    finally:
        loop.close()


def start_calibrated(latency_ms: float, batch: int) -> tuple[subprocess.Popen[str], str]:
    """Start a stub whose calls take `latency_ms` as its client sees it, not as its timer does.

    Waking up, the sockets and the reply add about 0.6 ms to what the timer is set to; a client
    that costs next to nothing measures how much, and the timer is set that much shorter.
    """
    process, url = start(latency_ms)
    try:
        excess_ms = measure(url, batch)["call_ms"] - latency_ms
    finally:
        process.terminate()
        process.wait()
    return start(latency_ms - min(max(excess_ms, 0.0), 1.5))


def start(latency_ms: float = 0.0) -> tuple[subprocess.Popen[str], str]:
    """Start a stub as a process of its own; return it and its URL. The caller ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.stub", "--port=0", f"--latency_ms={latency_ms}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"the stub ended with {process.wait()} before it served")
    return process, url


def measure(url: str, batch: int, secs: float = 1.0) -> dict[str, float]:
    """Return what the stub at `url` answers to a client that costs next to nothing.

    That client has four connections, as a topic of four partitions, keeps one request under way on
    each and only counts the reply's bytes. ``records_per_sec`` is over `secs`; ``call_ms`` is how
    long a call takes when it is alone.
    """
    entries = [
        {
            "payload": {
                "timestamp": 1_700_000_000_000 + i,
                "topic": "bench",
                "partition": 1,
                "offset": 1_000_000 + i,
                "key": f"key-{i}",
                "value": orjson.dumps({"id": i, "padding": "x" * 180}).decode(),
            }
        }
        for i in range(batch)
    ]
    body = orjson.dumps(entries)
    reply, _ = answer(body)
    wanted = len(OK_HEAD % len(reply)) + len(reply)
    request = (
        b"POST /2015-03-31/functions/bench/invocations HTTP/1.1\r\nHost: stub\r\n"
        b"X-Amz-Invocation-Type: RequestResponse\r\nContent-Length: %d\r\n\r\n%b"
    ) % (len(body), body)
    host, _, port = url.removeprefix("http://").partition(":")
    into = bytearray(wanted)
    connections = [socket.create_connection((host, int(port))) for _ in range(4)]
    try:
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def read(connection: socket.socket) -> None:
            if connection.recv_into(into, wanted, socket.MSG_WAITALL) != wanted:
                raise RuntimeError("the stub closed a connection")

        alone = []
        for _ in range(20):
            begin = time.perf_counter()
            connections[0].sendall(request)
            read(connections[0])
            alone.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for connection in connections:
            connection.sendall(request)
        calls = 0
        while time.perf_counter() - begin < secs:
            for connection in connections:
                read(connection)
                connection.sendall(request)
                calls += 1
        elapsed = time.perf_counter() - begin
        for connection in connections:
            read(connection)
    finally:
        for connection in connections:
            connection.close()
    return {
        "batch": batch,
        "request_bytes": len(body),
        "records_per_sec": round(calls * batch / elapsed),
        "call_ms": round(sorted(alone)[len(alone) // 2] * 1000, 3),
    }


def main() -> None:
    """Serve, or measure a stub of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--latency_ms", type=float, default=0.0, help="from request to reply")
    parser.add_argument("--measure", action="store_true", help="print records/s and end")
    options = parser.parse_args()
    if not options.measure:
        run(options.port, options.latency_ms / 1000)
        return
    process, url = start(options.latency_ms)
    try:
        for batch in (100, 1000):
            print(orjson.dumps(measure(url, batch)).decode())
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
