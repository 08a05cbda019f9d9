"""LambdaServer: AWS Lambda's Invoke API on a local port, for the demo and the tests.

Functions are Python handlers. One given as ``FILE.py:HANDLER`` runs in worker
processes, as many as there are executions at once; a worker is used again, is
killed when the function's timeout is over, and may crash without harm to the
server. One given as a callable runs in the server's own thread: quick, but its
timeout is only told to the handler, never enforced.

Not imitated: IAM policies, retries and destinations of ``Event`` invocations,
published versions (every version and alias runs the same code), the burst rate
of new execution environments.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pipeline.local.faults import Fault, FaultPlan

MAX_SYNC_REQUEST_BYTES = 6_291_456
MAX_EVENT_REQUEST_BYTES = 1_048_576
MAX_RESPONSE_BYTES = 6_291_556
MAX_CLIENT_CONTEXT_BYTES = 3_583
MAX_BODY_BYTES = 67_108_864  # more is not even read
LOG_TAIL_BYTES = 4_096
# Lambda allows 10 s; a worker here starts a Python interpreter too, on a machine that may be busy.
INIT_SECS = 30.0
CLOSE_SECS = 5.0

_ARN_PREFIX = "arn:aws:lambda:us-east-1:000000000000:function:"
_PATH = re.compile(r"/2015-03-31/functions/([^/]+)/invocations")
_TARGET = re.compile(
    r"(?:arn:aws[\w-]*:lambda:[\w-]+:\d{12}:function:|\d{12}:function:)?"
    r"([a-zA-Z0-9_-]{1,64})(?::(\$LATEST|[a-zA-Z0-9_-]+))?"
)
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/([^/]+)/aws4_request,"
    r"\s*SignedHeaders=([^,]+),\s*Signature=([0-9a-f]{64})"
)

Handler = Callable[[Any, "LambdaContext"], Any]


@dataclass(frozen=True)
class FunctionSpec:
    """A function to serve.

    Attributes:
        name: As in ``FunctionName``, up to 64 letters, digits, ``-`` and ``_``.
        handler: ``FILE.py:HANDLER``, the file relative to the working directory,
            or a callable ``(event, context) -> reply``.
        timeout_secs: Longest run of one execution, in seconds, up to 900.
        concurrency: Executions at once, at least 1. More are throttled.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str
    handler: str | Handler
    timeout_secs: float = 3.0
    concurrency: int = 10

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", self.name):
            raise ValueError(
                f"function name {self.name!r} is not valid; use 1 to 64 letters, digits, - and _"
            )
        if isinstance(self.handler, str):
            file, _, attribute = self.handler.rpartition(":")
            if not file.endswith(".py") or not attribute.isidentifier():
                raise ValueError(
                    f"handler {self.handler!r} of function {self.name!r} is not valid;"
                    " give it as FILE.py:HANDLER"
                )
        if not 0 < self.timeout_secs <= 900:
            raise ValueError(
                f"timeout_secs of function {self.name!r} must be over 0 and at most 900,"
                f" got {self.timeout_secs}"
            )
        if self.concurrency < 1:
            raise ValueError(
                f"concurrency of function {self.name!r} must be at least 1, got {self.concurrency}"
            )

    @classmethod
    def parse(cls, text: str) -> FunctionSpec:
        """Read ``NAME=FILE.py:HANDLER[,timeout_secs=SECONDS][,concurrency=COUNT]``.

        Raises:
            ValueError: One line with what is wrong, the value and what to do.
        """
        name, equals, rest = text.partition("=")
        handler, *settings = rest.split(",")
        if not equals:
            raise ValueError(f"function {text!r} has no '='; give it as NAME=FILE.py:HANDLER")
        readers: dict[str, Callable[[str], Any]] = {"timeout_secs": float, "concurrency": int}
        values: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in readers:
                raise ValueError(
                    f"function {text!r} has an unknown setting {key!r};"
                    f" use {' or '.join(readers)}, as in timeout_secs=2"
                )
            try:
                values[key] = readers[key](value)
            except ValueError:
                raise ValueError(
                    f"{key} of function {name!r} must be a number, got {value!r}"
                ) from None
        return cls(name, handler, **values)


@dataclass(frozen=True)
class Call:
    """One request to a function, as it ended.

    Attributes:
        function: Name asked for, without ARN and qualifier.
        qualifier: Version or alias asked for, or None.
        invocation_type: ``RequestResponse``, ``Event`` or ``DryRun``.
        payload: Body of the request.
        status: HTTP status answered; 0 if the connection was dropped.
        function_error: Value of ``X-Amz-Function-Error``, or None. For an
            ``Event``, whose caller never sees it, what the execution came to.
        started: When the request was read, by ``time.monotonic()``, in seconds.
        ended: When the answer was ready, or an ``Event``'s execution over.
        client_context: ``X-Amz-Client-Context`` as sent, base64, or None.
        error_type: Name of the exception answered, or None.
        trace_id: ``X-Amzn-Trace-Id`` as sent, or None.
    """

    function: str
    qualifier: str | None
    invocation_type: str
    payload: bytes
    status: int
    function_error: str | None
    started: float
    ended: float
    client_context: str | None
    error_type: str | None = None
    trace_id: str | None = None


@dataclass(frozen=True)
class ClientContext:
    """What the caller sent as ``ClientContext``."""

    client: Any = None
    custom: Any = None
    env: Any = None


@dataclass(frozen=True)
class LambdaContext:
    """Second argument of a handler.

    Attributes:
        deadline: When the timeout is over, by this process's ``time.monotonic()``.
    """

    aws_request_id: str
    function_name: str
    function_version: str
    invoked_function_arn: str
    deadline: float
    client_context: ClientContext | None = None
    memory_limit_in_mb: str = "128"
    identity: None = None
    log_group_name: str = "/aws/lambda/local"
    log_stream_name: str = "local"

    def get_remaining_time_in_millis(self) -> int:
        """Return the time left before the timeout, in milliseconds, at least 0."""
        return max(0, int((self.deadline - time.monotonic()) * 1000))


@dataclass(frozen=True)
class _Request:
    """An HTTP POST; header names are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Invocation:
    """What a request asks for, before anything of it is checked."""

    request_id: str
    started: float
    function: str
    qualifier: str | None
    invocation_type: str
    wants_log: bool
    client_context: str | None
    payload: bytes
    trace_id: str | None

    @property
    def version(self) -> str:
        if self.qualifier is None or self.qualifier == "$LATEST":
            return "$LATEST"
        return self.qualifier if self.qualifier.isdigit() else "1"

    @property
    def arn(self) -> str:
        """ARN of the function, with the qualifier asked for."""
        qualified = f"{self.function}:{self.qualifier}" if self.qualifier else self.function
        return f"{_ARN_PREFIX}{qualified}"


@dataclass(frozen=True)
class _Task:
    """One execution, as handed to a worker process."""

    request_id: str
    function_name: str
    function_version: str
    invoked_function_arn: str
    client_context: ClientContext | None
    payload: bytes
    timeout_secs: float

    def context(self) -> LambdaContext:
        return LambdaContext(
            self.request_id,
            self.function_name,
            self.function_version,
            self.invoked_function_arn,
            time.monotonic() + self.timeout_secs,
            self.client_context,
        )


@dataclass(frozen=True)
class _Result:
    """Outcome of one execution; ``body`` is the reply, or the JSON error if ``failed``."""

    body: bytes
    failed: bool = False
    log: bytes = b""


class _ApiError(Exception):
    """An answer other than the function's, with its HTTP status."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        *,
        reason: str = "",
        retry_after_secs: float | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.reason = reason
        self.retry_after_secs = retry_after_secs
        self.body = body

    def reply(self) -> _Reply:
        content = {"Type": "User" if self.status < 500 else "Service", "message": str(self)}
        if self.reason:
            content["Reason"] = self.reason
        headers: list[tuple[str, str]] = []
        if self.error_type:
            headers.append(("x-amzn-ErrorType", self.error_type))
        if self.retry_after_secs is not None:
            headers.append(("Retry-After", f"{self.retry_after_secs:g}"))
        return _Reply(self.status, self.body or json.dumps(content).encode(), tuple(headers))


class _ConnectionDropped(Exception):
    """The connection is to be closed without an answer."""

    def __init__(self, result: _Result | None = None) -> None:
        super().__init__()
        self.result = result


class LambdaServer:
    """Serve functions on ``url`` until ``close``. A context manager.

    Guarantees: no more executions of a function at once than its
    ``concurrency`` (a request over it is throttled, an ``Event`` waits); a call
    is in ``calls`` before its answer is sent; ``close`` ends every process and
    thread the server started, but for the thread of a callable handler that
    does not return.

    Args:
        functions: The functions to serve.
        port: Port to listen on; 0 takes a free one.
        faults: Faults in force from the start.
        host: Address to listen on. Handlers run with this user's rights for
            whoever can reach it, so keep it a loopback address.
        credentials: Secret access key by access key id. If given, requests must
            be signed with one of them; if not, any signature is accepted.
        record_calls: Keep every call in ``calls``. Turn off for long runs.

    Attributes:
        url: For ``endpoint_url`` of an AWS client.

    Raises:
        ValueError: If two functions have one name, a handler's file is missing
            or the port is out of range.
        OSError: If the port cannot be listened on.
    """

    def __init__(
        self,
        functions: Iterable[FunctionSpec],
        port: int = 0,
        faults: Iterable[Fault] = (),
        host: str = "127.0.0.1",
        credentials: Mapping[str, str] | None = None,
        record_calls: bool = True,
    ) -> None:
        self._functions: dict[str, _Function] = {}
        for spec in functions:
            if spec.name in self._functions:
                raise ValueError(f"function {spec.name!r} is given twice; give each name once")
            self._functions[spec.name] = _Function(spec)
        self._faults = FaultPlan(faults)
        self._credentials = credentials
        self._record_calls = record_calls
        self._calls: list[Call] = []
        self._in_flight = 0
        self._in_flight_max = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._event_threads: set[threading.Thread] = set()
        if not 0 <= port <= 65_535:
            raise ValueError(f"port must be from 0 to 65535, got {port}")
        try:
            self._http = _HttpServer((host, port), self._answer)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._http.start()
        self.url = f"http://{host}:{self._http.server_address[1]}"

    def __enter__(self) -> LambdaServer:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def calls(self) -> list[Call]:
        """Every call so far, in the order they ended; a copy."""
        with self._changed:
            return self._calls.copy()

    @property
    def in_flight_max(self) -> int:
        """The most executions there have been at once, over all functions."""
        with self._changed:
            return self._in_flight_max

    def wait_for_calls(self, count: int, timeout_secs: float = 10.0) -> list[Call]:
        """Return the calls once there are ``count``, ``Event`` executions included.

        Raises:
            TimeoutError: If there are fewer after ``timeout_secs``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._calls) >= count, timeout_secs):
                raise TimeoutError(
                    f"{len(self._calls)} of {count} calls ended within {timeout_secs} seconds"
                )
            return self._calls.copy()

    def add_fault(self, fault: Fault) -> None:
        """Put a fault behind those already in force."""
        self._faults.add(fault)

    def clear_faults(self) -> None:
        """Take back every fault."""
        self._faults.clear()

    def close(self) -> None:
        """Stop listening, break off what is running, wait for threads. May be called again."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
            event_threads = list(self._event_threads)
        self._http.stop()
        for function in self._functions.values():
            function.runner.close()
        _join([*self._http.threads(), *event_threads], CLOSE_SECS)

    def _answer(self, request: _Request, request_id: str) -> _Reply | None:
        """Answer a request, or return None to have the connection dropped."""
        invocation = _read_invocation(request, request_id)
        result: _Result | None = None
        reply: _Reply | None = None
        error_type: str | None = None
        try:
            function = self._admit(request, invocation)
            if invocation.invocation_type == "Event":
                # Its call is recorded once it has been executed.
                dropped = self._accept_event(function, invocation)
                return None if dropped else _Reply(HTTPStatus.ACCEPTED)
            if invocation.invocation_type == "DryRun":
                self._dry_run(invocation)
                reply = _Reply(HTTPStatus.NO_CONTENT)
            else:
                result = self._invoke(function, invocation)
                reply = _sync_reply(invocation, result)
        except _ApiError as error:
            reply, error_type = error.reply(), error.error_type
        except _ConnectionDropped as drop:
            result = drop.result
        self._record(invocation, reply.status if reply else 0, result, error_type)
        return reply

    def _admit(self, request: _Request, invocation: _Invocation) -> _Function:
        """Return the function a request is for, or raise what is wrong with the request."""
        _check_signature(request, self._credentials)
        function = self._functions.get(invocation.function)
        if function is None:
            raise _ApiError(
                HTTPStatus.NOT_FOUND,
                "ResourceNotFoundException",
                f"Function not found: {_ARN_PREFIX}{invocation.function}",
            )
        if invocation.invocation_type == "Event":
            limit, too_large = MAX_EVENT_REQUEST_BYTES, len(request.body) > MAX_EVENT_REQUEST_BYTES
        else:
            limit, too_large = MAX_SYNC_REQUEST_BYTES, len(request.body) >= MAX_SYNC_REQUEST_BYTES
        if too_large:
            raise _request_too_large(limit)
        _check_json(request.body)
        return function

    def _dry_run(self, invocation: _Invocation) -> None:
        with self._changed:
            fault = self._pick_fault(invocation)
        if fault is not None:
            self._closing.wait(fault.delay_secs)
            if fault.prevents_execution:
                _raise_fault(fault)

    def _invoke(self, function: _Function, invocation: _Invocation) -> _Result:
        with self._changed:
            if function.running >= function.spec.concurrency:
                raise _ApiError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "TooManyRequestsException",
                    "Rate Exceeded.",
                    reason="ReservedFunctionConcurrentInvocationLimitExceeded",
                    retry_after_secs=1.0,
                )
            fault = self._pick_fault(invocation)
            if fault is None or not fault.prevents_execution:
                self._take_slot(function)
        if fault is not None and fault.prevents_execution:
            self._closing.wait(fault.delay_secs)
            _raise_fault(fault)
        result = self._execute(function, invocation, fault)
        if fault is not None and fault.kind == "drop_connection":
            raise _ConnectionDropped(result)
        return result

    def _accept_event(self, function: _Function, invocation: _Invocation) -> bool:
        """Queue an event; return whether its connection is to be dropped nevertheless."""
        with self._changed:
            fault = self._pick_fault(invocation)
        if fault is not None and fault.prevents_execution:
            self._closing.wait(fault.delay_secs)
            _raise_fault(fault)
        with self._changed:
            if self._closing.is_set():
                raise _ConnectionDropped
            function.events.append((invocation, fault))
            if function.event_threads < function.spec.concurrency:
                function.event_threads += 1
                thread = threading.Thread(target=self._run_events, args=(function,), daemon=True)
                self._event_threads.add(thread)
                thread.start()
        return fault is not None and fault.kind == "drop_connection"

    def _run_events(self, function: _Function) -> None:
        """Execute accepted events until there are none left."""
        while (accepted := self._next_event(function)) is not None:
            invocation, fault = accepted
            try:
                result = self._execute(function, invocation, fault)
            except _ConnectionDropped:
                continue
            dropped = fault is not None and fault.kind == "drop_connection"
            self._record(invocation, 0 if dropped else HTTPStatus.ACCEPTED, result, None)

    def _next_event(self, function: _Function) -> tuple[_Invocation, Fault | None] | None:
        """Wait for a slot and take it; None, and one thread less, if nothing is left to do."""

        def free() -> bool:
            return self._closing.is_set() or function.running < function.spec.concurrency

        with self._changed:
            while function.events and not self._closing.is_set():
                if free():
                    self._take_slot(function)
                    return function.events.popleft()
                self._changed.wait_for(free)
            function.event_threads -= 1
            self._event_threads.discard(threading.current_thread())
            return None

    def _pick_fault(self, invocation: _Invocation) -> Fault | None:
        return self._faults.pick(
            invocation.payload, invocation.function, self._in_flight + 1, invocation.invocation_type
        )

    def _take_slot(self, function: _Function) -> None:
        function.running += 1
        self._in_flight += 1
        self._in_flight_max = max(self._in_flight_max, self._in_flight)

    def _execute(
        self, function: _Function, invocation: _Invocation, fault: Fault | None
    ) -> _Result:
        """Run a function, whose slot is taken and is given back here."""
        try:
            result = self._run(function, invocation, fault)
        finally:
            with self._changed:
                function.running -= 1
                self._in_flight -= 1
                self._changed.notify_all()
        # A worker killed by close looks like a crash, which it was not.
        if self._closing.is_set():
            raise _ConnectionDropped
        if len(result.body) > MAX_RESPONSE_BYTES:
            message = (
                f"Response payload size ({len(result.body)} bytes) exceeded maximum allowed"
                f" payload size ({MAX_RESPONSE_BYTES} bytes)."
            )
            return _failure("Function.ResponseSizeTooLarge", message, invocation, result.log)
        return result

    def _run(self, function: _Function, invocation: _Invocation, fault: Fault | None) -> _Result:
        if fault is not None:
            self._closing.wait(fault.delay_secs)
            if fault.kind == "reply":
                return _Result(fault.body)
            if fault.kind == "function_error":
                return _failure(fault.error_type, fault.message or fault.error_type, invocation)
        task = _Task(
            request_id=invocation.request_id,
            function_name=invocation.function,
            function_version=invocation.version,
            invoked_function_arn=invocation.arn,
            client_context=_read_client_context(invocation),
            payload=invocation.payload or b"{}",
            timeout_secs=function.spec.timeout_secs,
        )
        started = time.monotonic()
        result = function.runner.run(task)
        millis = (time.monotonic() - started) * 1000
        log = (
            f"START RequestId: {task.request_id} Version: {task.function_version}\n".encode()
            + result.log
            + f"END RequestId: {task.request_id}\n"
            f"REPORT RequestId: {task.request_id}\tDuration: {millis:.2f} ms\t"
            f"Billed Duration: {int(millis) + 1} ms\tMemory Size: 128 MB\t"
            "Max Memory Used: 128 MB\n".encode()
        )
        return _Result(result.body, result.failed, log)

    def _record(
        self,
        invocation: _Invocation,
        status: int,
        result: _Result | None,
        error_type: str | None,
    ) -> None:
        if not self._record_calls:
            return
        call = Call(
            function=invocation.function,
            qualifier=invocation.qualifier,
            invocation_type=invocation.invocation_type,
            payload=invocation.payload,
            status=int(status),
            function_error="Unhandled" if result is not None and result.failed else None,
            started=invocation.started,
            ended=time.monotonic(),
            client_context=invocation.client_context,
            error_type=error_type,
            trace_id=invocation.trace_id,
        )
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()


def _read_invocation(request: _Request, request_id: str) -> _Invocation:
    """Take a request apart, or raise if it is none to a function."""
    started = time.monotonic()
    url = urlsplit(request.path)
    path = _PATH.fullmatch(url.path)
    target = _TARGET.fullmatch(unquote(path[1])) if path else None
    if path is None:
        raise _ApiError(
            HTTPStatus.NOT_FOUND, "UnknownOperationException", "Only Invoke is served here."
        )
    invocation_type = request.headers.get("x-amz-invocation-type", "RequestResponse")
    if target is None or invocation_type not in ("RequestResponse", "Event", "DryRun"):
        value = unquote(path[1]) if target is None else invocation_type
        raise _ApiError(
            HTTPStatus.BAD_REQUEST, "ValidationException", f"Value {value!r} is not valid."
        )
    qualifier = parse_qs(url.query).get("Qualifier", [target[2]])[0]
    if target[2] not in (None, qualifier):
        raise _ApiError(
            HTTPStatus.BAD_REQUEST,
            "InvalidParameterValueException",
            "The derived qualifier from the function name does not match the specified qualifier.",
        )
    return _Invocation(
        request_id=request_id,
        started=started,
        function=target[1],
        qualifier=qualifier,
        invocation_type=invocation_type,
        wants_log=request.headers.get("x-amz-log-type") == "Tail",
        client_context=request.headers.get("x-amz-client-context"),
        payload=request.body,
        trace_id=request.headers.get("x-amzn-trace-id"),
    )


def _read_client_context(invocation: _Invocation) -> ClientContext | None:
    # The documentation gives it to synchronous invocations only.
    if invocation.client_context is None or invocation.invocation_type != "RequestResponse":
        return None
    try:
        if len(invocation.client_context) > MAX_CLIENT_CONTEXT_BYTES:
            raise ValueError("too long")
        content = json.loads(base64.b64decode(invocation.client_context, validate=True))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise _ApiError(
            HTTPStatus.BAD_REQUEST,
            "InvalidRequestContentException",
            f"Client context must be a base64-encoded JSON object of at most"
            f" {MAX_CLIENT_CONTEXT_BYTES} bytes: {error}",
        ) from error
    return ClientContext(content.get("client"), content.get("custom"), content.get("env"))


def _check_json(body: bytes) -> None:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"Unrecognized token {constant!r}")

    if not body:
        return
    try:
        json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _ApiError(
            HTTPStatus.BAD_REQUEST,
            "InvalidRequestContentException",
            f"Could not parse request body into json: {error}",
        ) from error


def _check_signature(request: _Request, credentials: Mapping[str, str] | None) -> None:
    """Raise unless a request is signed, and if there are credentials, with one of them.

    Source: Signature Version 4 in the IAM user guide. How old a signature is
    and which region it is for are not looked at.
    """
    authorization = request.headers.get("authorization", "")
    if not authorization.startswith("AWS4-HMAC-SHA256 "):
        raise _forbidden("MissingAuthenticationTokenException", "Missing Authentication Token")
    if credentials is None:
        return
    parts = _AUTHORIZATION.fullmatch(authorization)
    if parts is None:
        raise _forbidden("IncompleteSignatureException", "Authorization header is incomplete.")
    access_key_id, date, region, service, signed_headers, signature = parts.groups()
    secret = credentials.get(access_key_id)
    if secret is None:
        raise _forbidden(
            "UnrecognizedClientException", "The security token included in the request is invalid."
        )
    url = urlsplit(request.path)
    headers = "".join(
        f"{name}:{' '.join(request.headers.get(name, '').split())}\n"
        for name in signed_headers.split(";")
    )
    canonical_request = "\n".join(
        [
            "POST",
            quote(url.path, safe="/~"),
            "&".join(sorted(url.query.split("&"))),
            headers,
            signed_headers,
            hashlib.sha256(request.body).hexdigest(),
        ]
    )
    text = "\n".join(
        [
            "AWS4-HMAC-SHA256",
            request.headers.get("x-amz-date", ""),
            f"{date}/{region}/{service}/aws4_request",
            hashlib.sha256(canonical_request.encode()).hexdigest(),
        ]
    )
    key = f"AWS4{secret}".encode()
    for step in (date, region, service, "aws4_request", text):
        key = hmac.digest(key, step.encode(), "sha256")
    if not hmac.compare_digest(key.hex(), signature):
        raise _forbidden(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided.",
        )


def _forbidden(error_type: str, message: str) -> _ApiError:
    return _ApiError(HTTPStatus.FORBIDDEN, error_type, message)


def _request_too_large(limit_bytes: int) -> _ApiError:
    return _ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "RequestTooLargeException",
        f"Request must be smaller than {limit_bytes} bytes for the InvokeFunction operation",
    )


def _raise_fault(fault: Fault) -> NoReturn:
    if fault.kind == "drop_connection":
        raise _ConnectionDropped
    raise _ApiError(
        fault.status,
        fault.error_type,
        fault.message or fault.error_type,
        reason=fault.reason,
        retry_after_secs=fault.retry_after_secs,
        body=fault.body,
    )


def _sync_reply(invocation: _Invocation, result: _Result) -> _Reply:
    headers = [("X-Amz-Executed-Version", invocation.version)]
    if result.failed:
        headers.append(("X-Amz-Function-Error", "Unhandled"))
    if invocation.wants_log:
        tail = base64.b64encode(result.log[-LOG_TAIL_BYTES:]).decode()
        headers.append(("X-Amz-Log-Result", tail))
    return _Reply(HTTPStatus.OK, result.body, tuple(headers))


class _HasRequestId(Protocol):
    @property
    def request_id(self) -> str: ...


def _failure(
    error_type: str,
    message: str,
    source: _HasRequestId,
    log: bytes = b"",
    stack: Iterable[str] = (),
) -> _Result:
    content = {
        "errorMessage": message,
        "errorType": error_type,
        "requestId": source.request_id,
        "stackTrace": list(stack),
    }
    return _Result(json.dumps(content).encode(), failed=True, log=log)


def _join(threads: Iterable[threading.Thread], timeout_secs: float) -> None:
    deadline = time.monotonic() + timeout_secs
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


# How a function runs.


class _Runner(Protocol):
    def run(self, task: _Task) -> _Result:
        """Execute a function once; called from several threads at a time."""

    def close(self) -> None:
        """End what is running."""


class _Function:
    """A function with its executions; the server's lock guards the counts."""

    def __init__(self, spec: FunctionSpec) -> None:
        self.spec = spec
        self.runner: _Runner = (
            _WorkerRunner(spec.name, spec.handler)
            if isinstance(spec.handler, str)
            else _InlineRunner(spec.handler)
        )
        self.running = 0
        self.events: deque[tuple[_Invocation, Fault | None]] = deque()
        self.event_threads = 0


@dataclass(frozen=True)
class _HandlerError:
    """What a handler's exception, or its reply that is no JSON, comes to."""

    error_type: str
    message: str
    stack: tuple[str, ...] = ()


def _call_handler(handler: Handler, task: _Task) -> bytes | _HandlerError:
    try:
        reply = handler(json.loads(task.payload), task.context())
    except Exception as error:
        # The first frame is this function's.
        stack = traceback.format_tb(error.__traceback__)[1:]
        return _HandlerError(type(error).__name__, str(error), tuple(stack))
    try:
        return json.dumps(reply).encode()
    except (TypeError, ValueError, RecursionError) as error:
        return _HandlerError("Runtime.MarshalError", f"Unable to marshal response: {error}")


class _InlineRunner:
    """Run a callable in the calling thread."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def run(self, task: _Task) -> _Result:
        outcome = _call_handler(self._handler, task)
        if isinstance(outcome, _HandlerError):
            return _failure(outcome.error_type, outcome.message, task, stack=outcome.stack)
        return _Result(outcome)

    def close(self) -> None:
        """Do nothing: a thread cannot be made to end."""


class _WorkerRunner:
    """Run a handler's file in worker processes, each with one execution at a time."""

    def __init__(self, function_name: str, handler: str) -> None:
        file, _, attribute = handler.rpartition(":")
        path = Path(file).resolve()
        if not path.is_file():
            raise ValueError(
                f"handler file {str(path)!r} of function {function_name!r} does not exist;"
                " give FILE.py:HANDLER with a path from the working directory"
            )
        self._setup = _WorkerSetup(function_name, str(path), attribute)
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False

    def run(self, task: _Task) -> _Result:
        log = bytearray()
        worker = self._take()
        try:
            outcome = worker.run(task, log)
        except TimeoutError as error:
            self._retire(worker)
            return self._broken_off("Sandbox.Timedout", str(error), task, log)
        except (EOFError, OSError):
            code = self._retire(worker, grace_secs=1.0)
            return self._broken_off("Runtime.ExitError", _exit_message(code), task, log)
        if worker.warm:
            self._put_back(worker)
        else:
            self._retire(worker)
        if isinstance(outcome, _HandlerError):
            stack = "".join(outcome.stack)
            _keep_tail(log, f"[ERROR] {outcome.error_type}: {outcome.message}\n{stack}".encode())
            return _failure(outcome.error_type, outcome.message, task, bytes(log), outcome.stack)
        return _Result(outcome, log=bytes(log))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            workers, idle = list(self._workers), list(self._idle)
            self._workers.clear()
            self._idle.clear()
        for worker in workers:
            worker.end()
        # The others' connections are in use, by threads which now read their end.
        for worker in idle:
            worker.connection.close()

    @staticmethod
    def _broken_off(error_type: str, message: str, task: _Task, log: bytearray) -> _Result:
        text = f"RequestId: {task.request_id} Error: {message}"
        _keep_tail(log, f"{text}\n".encode())
        return _failure(error_type, text, task, bytes(log))

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.connection.close()
                self._workers.discard(worker)
            if self._closed:
                raise _ConnectionDropped
            worker = _Worker(self._setup)
            self._workers.add(worker)
            return worker

    def _put_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.connection.close()

    def _retire(self, worker: _Worker, grace_secs: float = 0.0) -> int:
        code = worker.end(grace_secs)
        worker.connection.close()
        with self._lock:
            self._workers.discard(worker)
        return code


def _exit_message(code: int) -> str:
    if code < 0:
        return f"Runtime exited with error: signal: {signal.strsignal(-code) or -code}"
    if code > 0:
        return f"Runtime exited with error: exit status {code}"
    return "Runtime exited without providing a reason"


def _keep_tail(log: bytearray, more: bytes) -> None:
    log += more
    del log[:-LOG_TAIL_BYTES]


# A worker process. Both ends of its connection are here: the server sends a
# _WorkerSetup and then tasks; the worker sends any number of bytes it logged
# (_Logged), None once the handler is loaded, and one outcome per task.


@dataclass(frozen=True)
class _WorkerSetup:
    function_name: str
    file: str
    attribute: str


@dataclass(frozen=True)
class _Logged:
    text: bytes


class _Worker:
    """The server's end of a worker process, just started and not yet ready.

    Attributes:
        warm: Whether the handler is loaded.
    """

    # Not multiprocessing's Process: it would import the caller's main module again,
    # which in a Beam program takes seconds.
    _BOOT = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
        " from pipeline.local.lambda_server import run_worker; run_worker(int(sys.argv[2]))"
    )

    def __init__(self, setup: _WorkerSetup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self._BOOT, json.dumps(sys.path), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self.warm = False
        self._setup = setup

    def run(self, task: _Task, log: bytearray) -> bytes | _HandlerError:
        """Return the outcome of one execution, and add what is logged to ``log``.

        Raises:
            TimeoutError: If it takes too long. The process is of no more use.
            EOFError, OSError: If the process ended.
        """
        if not self.warm:
            self.connection.send(self._setup)
            outcome = self._receive(INIT_SECS, "Initialization", log)
            if isinstance(outcome, _HandlerError):
                return outcome
            self.warm = True
        self.connection.send(task)
        return self._receive(task.timeout_secs, "Task", log)

    def end(self, grace_secs: float = 0.0) -> int:
        """Kill the process if it does not end within ``grace_secs``; return its exit code."""
        try:
            return self.process.wait(grace_secs)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _receive(self, timeout_secs: float, what: str, log: bytearray) -> Any:
        deadline = time.monotonic() + timeout_secs
        while (left := deadline - time.monotonic()) > 0 and self.connection.poll(left):
            message = self.connection.recv()
            if not isinstance(message, _Logged):
                return message
            _keep_tail(log, message.text)
        raise TimeoutError(f"{what} timed out after {timeout_secs:.2f} seconds")


class _LogPipe(io.RawIOBase):
    """Send what a handler prints at once, so that a crash does not lose it."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        text = bytes(data)
        self._send(_Logged(text))
        return len(text)


def run_worker(file_descriptor: int) -> None:
    """Load a handler and run it, task by task, until the server's end is closed."""
    # Ctrl-C reaches every process of the terminal; the server ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(file_descriptor)
    os.set_inheritable(file_descriptor, False)
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            connection.send(message)

    sys.stdout = sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_LogPipe(send)), "utf-8", "backslashreplace", line_buffering=True
    )
    logging.basicConfig(format="[%(levelname)s]\t%(message)s", stream=sys.stdout)
    try:
        setup: _WorkerSetup = connection.recv()
        os.environ["AWS_LAMBDA_FUNCTION_NAME"] = setup.function_name
        handler = _load_handler(setup)
        if isinstance(handler, _HandlerError):
            return send(handler)
        send(None)
        while True:
            outcome = _call_handler(handler, connection.recv())
            sys.stdout.flush()
            send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The server is gone, so what is still to be printed has no reader.
        os._exit(0)


def _load_handler(setup: _WorkerSetup) -> Handler | _HandlerError:
    path = Path(setup.file)
    name = path.stem if path.stem not in sys.modules else f"lambda_{path.stem}"
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        error_type = type(error).__name__
        if isinstance(error, ImportError):
            error_type = "Runtime.ImportModuleError"
        elif isinstance(error, SyntaxError):
            error_type = "Runtime.UserCodeSyntaxError"
        message = f"Unable to import module {path.stem!r}: {error}"
        return _HandlerError(error_type, message, tuple(traceback.format_tb(error.__traceback__)))
    handler: Handler | None = getattr(module, setup.attribute, None)
    if handler is None:
        return _HandlerError(
            "Runtime.HandlerNotFound", f"Handler {setup.attribute!r} missing on module {name!r}"
        )
    return handler


# HTTP.


class _HttpServer(socketserver.TCPServer):
    """Serve each connection in a thread of its own."""

    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self, address: tuple[str, int], answer: Callable[[_Request, str], _Reply | None]
    ) -> None:
        super().__init__(address, _HttpHandler)
        self.answer = answer
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def start(self) -> None:
        self._acceptor.start()

    def stop(self) -> None:
        """Stop listening and cut the connections; their threads then come to their end."""
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections.values():
                _cut(connection)

    def threads(self) -> list[threading.Thread]:
        with self._lock:
            return [self._acceptor, *self._connections]

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        with self._lock:
            self._connections[thread] = request
        thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away, or a connection cut by stop, is no error here.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]
                self.shutdown_request(request)


def _cut(connection: socket.socket) -> None:
    # Not an error if the client was quicker.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # Buffered, so that head and body of an answer go out together.
    wbufsize = -1
    server: _HttpServer

    def do_POST(self) -> None:
        request_id = str(uuid.uuid4())
        try:
            reply = self.server.answer(self._read_request(), request_id)
        except _ApiError as error:
            reply = error.reply()
        if reply is None:
            self.close_connection = True
        else:
            self._send(reply, request_id)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server refuses by itself as Lambda would, with a typed error."""
        self.close_connection = True
        text = message or HTTPStatus(code).phrase
        self._send(_ApiError(code, "UnknownOperationException", text).reply(), str(uuid.uuid4()))

    def handle_expect_100(self) -> bool:
        accepted = super().handle_expect_100()
        self.wfile.flush()
        return accepted

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: ``LambdaServer.calls`` is the record."""

    def _read_request(self) -> _Request:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise _ApiError(
                HTTPStatus.LENGTH_REQUIRED, "ValidationException", "Content-Length is required."
            )
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise _request_too_large(MAX_SYNC_REQUEST_BYTES)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError("the client went away in the middle of its request")
        return _Request(self.path, headers, body)

    def _send(self, reply: _Reply, request_id: str) -> None:
        self.send_response_only(reply.status)
        self.send_header("x-amzn-RequestId", request_id)
        self.send_header("Content-Type", "application/json")
        if reply.status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)
        self.wfile.flush()
