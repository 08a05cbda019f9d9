"""Whatever answers an invocation: the real invoker and client, and a server without taste.

Each batch ends in an outcome, or the run does with one clear line; never a stack trace, never a
wait without an end. More inputs: see tests/examples.py.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from tests.transforms.aws.test_http import read_request
from tests.transforms.test_json_text import documents
from transforms.aws.function import FunctionConfig
from transforms.envelope import Envelope
from transforms.errors import FunctionConfigError
from transforms.invoke.invoke import InvokeConfig, make_invoker, why_broken
from transforms.invoke.reply import REPLIES
from transforms.invoke.retry import RetryPolicy
from transforms.records import Batch, Failure, Finished, Records, Responses
from transforms.write.destination import destination_records
from transforms.write.formats import FORMATS, error_records, response_values

GUARD_SECS = 30.0
OFFSETS = (7, 9, 12)


@dataclass
class Answers:
    """A server that gives each connection's first request the same bytes, and closes."""

    answer: bytes = b""
    listener: socket.socket = field(
        default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=50)
    )

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                try:
                    read_request(connection)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    # Else what it has not read may take the answer with it.
                    connection.recv(1 << 16)
                except OSError:
                    pass


@pytest.fixture(scope="module")
def server() -> Iterator[Answers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIDCALLER")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        for name in ("http_proxy", "HTTP_PROXY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        answers = Answers()
        yield answers
        answers.listener.close()


def _batch() -> Batch:
    count = len(OFFSETS)
    records = Records(OFFSETS, [1] * count, [None] * count, [b"v"] * count, [None] * count)
    return Batch("t", 3, OFFSETS[0], OFFSETS[-1] + 1, records, [b"1"] * count)


def _invoke(server: Answers, answer: bytes, mode: str) -> Finished | str:
    """One batch, one call: what became of it, or the line that the run ends with."""
    server.answer = answer
    function = FunctionConfig("f", region="us-east-1", endpoint_url=server.url, timeout_secs=1)
    policy = RetryPolicy(max_transient_retries=0, halt=False)
    config = InvokeConfig(function, policy, mode)
    invoker = make_invoker(config)
    try:
        invoker.submit([_batch()])
        assert invoker.wait(
            # After a throttle it waits, and would call again.
            lambda i: bool(i.broken) or not i.pending_batches or i.queue(("t", 3)).waiting,
            GUARD_SECS,
        )
    finally:
        invoker.stop()
        assert invoker.join(GUARD_SECS)
    error = why_broken(invoker, function)
    if error:
        assert isinstance(error, FunctionConfigError), repr(error)
        return str(error)
    (finished,) = invoker.collect()
    return finished


def _check(result: Finished | str) -> None:
    """It can be told, or written; and what is done has its result."""
    if isinstance(result, str):
        assert result.startswith("--function=f cannot be invoked: ")
        assert "\n" not in result
        result.encode()
        assert result.isprintable()
        return
    done = [
        offset
        for part in result.parts
        for offset in (part.offsets if isinstance(part, Responses) else part.records.offsets)
    ]
    assert done == list(OFFSETS[: len(done)])
    # It was throttled, or a part of it would have been called again.
    assert len(done) == len(OFFSETS) or result.stats.throttles or result.stats.retries
    for part in result.parts:
        if isinstance(part, Failure):
            _check_failure(part)
        elif part.results is not None:
            for text in part.results:
                assert json.loads(text)["topic"] == "t"
            for format in FORMATS:
                assert len(response_values(part.results, format)) == len(part)


def _check_failure(failure: Failure) -> None:
    event = Envelope("kafka_event", "b:1")
    for format in FORMATS:
        list(error_records("t", 3, failure, "f", format, 10**9))
    list(destination_records("t", 3, failure, "f", event, 10**9, 0))


def _write_object(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


# -- answers of any form ------------------------------------------------------------------

names = st.sampled_from(
    [
        b"x-amzn-ErrorType",
        b"X-Amz-Function-Error",
        b"x-amzn-RequestId",
        b"X-Amz-Log-Result",
        b"X-Amz-Executed-Version",
        b"Retry-After",
        b"Content-Encoding",
        b"Content-Type",
        b"Content-Length",
        b"Transfer-Encoding",
        b"Connection",
    ]
)
lines = st.binary(max_size=12).map(lambda data: data.replace(b"\r", b"").replace(b"\n", b""))
values = lines | st.sampled_from(
    [
        b"Unhandled",
        b"ServiceException:http://x/",
        b"a.b#InvalidSignatureException",
        b"gzip",
        b"chunked",
        b"close",
        b"inf",
        b"nan",
        b"1795726008000",
        b"-1",
        b"0",
        b"99999999999999999999",
        b"\xff\xfe\x1b[31m",
        b"x" * 70_000,
    ]
)
errors = st.fixed_dictionaries(
    {},
    optional={
        "message": documents | st.just('"Signature expired: a"'),
        "Message": documents,
        "__type": documents,
        "code": documents,
        "errorType": documents,
        "errorMessage": documents,
    },
).map(_write_object)
bodies = (
    st.binary(max_size=40)
    | errors.map(str.encode)
    | documents.map(str.encode)
    | errors.map(lambda text: gzip.compress(text.encode()))
    | st.sampled_from([b"<html>no</html>", b"\r\n", b"[" * 2000])
)
statuses = (
    st.sampled_from([200, 200, 200, 202, 204, 400, 403, 404, 413, 429, 500, 503])
    | st.integers(100, 999)
).map(b"HTTP/1.1 %d Some".__mod__) | st.sampled_from(
    [b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 -1 X", b"HTTP/1.1 99999 X", b"HTTP/2 200", b""]
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """From what Lambda might say to what no server would."""
    head = [draw(statuses | lines)] if draw(st.booleans()) else [b"HTTP/1.1 200 OK"]
    head += [
        name + b": " + value
        for name, value in draw(st.lists(st.tuples(names | lines, values), max_size=4))
    ]
    body = draw(bodies)
    framing = draw(st.sampled_from(["length", "length", "wrong", "chunked", "odd", "none"]))
    if framing == "length":
        head.append(b"Content-Length: %d" % len(body))
    elif framing == "wrong":
        head.append(b"Content-Length: %d" % (len(body) + draw(st.integers(-3, 3))))
    elif framing != "none":
        head.append(b"Transfer-Encoding: chunked")
        size = b"%x" % len(body)
        if framing == "odd":
            size = draw(lines | st.sampled_from([b"-5", b"ffffffffffffffff", b"0x1", b" 1;a=b"]))
        body = size + b"\r\n" + body + b"\r\n0\r\n\r\n"
    answer = b"\r\n".join([*head, b"", body])
    if draw(st.integers(0, 9)) == 0:
        answer = answer[: draw(st.integers(0, len(answer)))]
    return answer


@given(answer=answers(), mode=st.sampled_from(REPLIES))
@examples(200)
def test_any_answer_is_an_outcome_or_one_clear_line(
    server: Answers, answer: bytes, mode: str
) -> None:
    _check(_invoke(server, answer, mode))


# -- replies of any form ------------------------------------------------------------------


def _one_of(right: Any) -> st.SearchStrategy[str]:
    """A field as it has to be, mostly."""
    text = json.dumps(right)
    return st.sampled_from([text] * 12) | documents


def _object(**fields: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.fixed_dictionaries(fields).map(_write_object)


def _entry(offset: int) -> st.SearchStrategy[str]:
    payload = _object(
        topic=_one_of("t"), partition=_one_of(3), offset=_one_of(offset), result=documents
    )
    return _object(payload=payload) | _object(payload=payload, more=documents)


def _failure(offset: int) -> st.SearchStrategy[str]:
    place = _object(partition=_one_of("t-3"), offset=_one_of(offset))
    return _object(itemIdentifier=place)


answered = st.tuples(*map(_entry, OFFSETS)).map(lambda entries: f"[{', '.join(entries)}]")
named = _object(
    batchItemFailures=st.lists(st.sampled_from(OFFSETS).flatmap(_failure), max_size=3).map(
        lambda failures: f"[{','.join(failures)}]"
    )
)


@given(
    body=answered | named | documents,
    mode=st.sampled_from(REPLIES),
    place=st.none() | st.integers(0, 400),
    other=st.sampled_from([b"", b'"', b"\\", b"\xff", b"0", b"]", b" ", b"\\ud83d"]),
)
@examples(200)
def test_any_reply_is_an_outcome(
    server: Answers, body: str, mode: str, place: int | None, other: bytes
) -> None:
    data = body.encode()
    if place is not None:
        place %= len(data)
        data = data[:place] + other + data[place + 1 :]
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
    result = _invoke(server, answer, mode)
    assert isinstance(result, Finished)
    _check(result)
