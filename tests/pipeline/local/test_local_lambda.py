"""The local Lambda server, as an unchanged boto3 client sees it."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError

from pipeline.local.faults import (
    Fault,
    FaultPlan,
    drop_connection,
    function_error,
    load_faults,
    parse_faults,
    raw_reply,
    slow,
    throttle,
    unavailable,
)
from pipeline.local.lambda_server import FunctionSpec, LambdaContext, LambdaServer

WAIT_SECS = 10.0
# One for all: it keeps the service's model, which takes long to load.
SESSION = boto3.Session()
ARN = "arn:aws:lambda:us-east-1:000000000000:function"

HANDLERS = """
import os, sys, time
from helper import GREETING

calls = 0

def main(event, context):
    global calls
    calls += 1
    print("printed", event.get("print", "nothing"))
    do = event.get("do")
    if do == "raise":
        raise ValueError("no good: é")
    if do == "hang":
        time.sleep(60)
    if do == "die":
        os._exit(7)
    if do == "exit":
        sys.exit()
    if do == "kill":
        os.kill(os.getpid(), 9)
    if do == "large":
        return "x" * event["size"]
    if do == "set":
        return {1, 2}
    return {"pid": os.getpid(), "calls": calls, "greeting": GREETING,
            "name": os.environ["AWS_LAMBDA_FUNCTION_NAME"]}
"""


def echo(event: Any, context: LambdaContext) -> Any:
    return event


def client_of(server: LambdaServer, key: str = "test", secret: str = "test", **config: Any) -> Any:
    return SESSION.client(
        "lambda",
        endpoint_url=server.url,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        config=Config(retries={"total_max_attempts": 1}, max_pool_connections=32, **config),
    )


def invoke(client: Any, event: Any = None, name: str = "echo", **request: Any) -> Any:
    """Invoke, and return boto3's answer with ``Payload`` read."""
    payload = event if isinstance(event, bytes) else json.dumps(event).encode()
    answer = client.invoke(FunctionName=name, Payload=payload, **request)
    answer["Payload"] = answer["Payload"].read()
    return answer


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the response of the ClientError that a call raises."""
    with pytest.raises(ClientError) as raised:
        call()
    return raised.value.response


def status_of(response: dict[str, Any]) -> int:
    return response["ResponseMetadata"]["HTTPStatusCode"]


@pytest.fixture(scope="module")
def handlers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of handlers that imports a module beside it."""
    folder = tmp_path_factory.mktemp("handlers")
    (folder / "helper.py").write_text("GREETING = 'hello'\n")
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "broken.py").write_text("import no_such_module_at_all\n")
    return folder / "handlers.py"


@pytest.fixture
def server() -> Iterator[LambdaServer]:
    with LambdaServer([FunctionSpec("echo", echo), FunctionSpec("other", echo)]) as server:
        yield server


@pytest.fixture(scope="module")
def process_server(handlers: Path) -> Iterator[LambdaServer]:
    spec = FunctionSpec("main", f"{handlers}:main", timeout_secs=30.0, concurrency=4)
    with LambdaServer([spec]) as server:
        yield server


# What is asked for, and how.


def test_a_reply_comes_back_unchanged(server: LambdaServer) -> None:
    """RequestResponse answers 200 with the handler's reply as JSON and no function error."""
    answer = invoke(client_of(server), {"a": [1, None, "é"]})
    assert json.loads(answer["Payload"]) == {"a": [1, None, "é"]}
    assert answer["StatusCode"] == 200
    assert answer["ExecutedVersion"] == "$LATEST"
    assert "FunctionError" not in answer
    assert "LogResult" not in answer
    assert len(answer["ResponseMetadata"]["RequestId"]) == 36


def test_no_payload_is_an_empty_event(server: LambdaServer) -> None:
    """A request without a body gives the handler an empty object."""
    assert client_of(server).invoke(FunctionName="echo")["Payload"].read() == b"{}"


@pytest.mark.parametrize(
    ("name", "request_of", "version", "qualifier"),
    [
        ("echo", {}, "$LATEST", None),
        ("echo", {"Qualifier": "$LATEST"}, "$LATEST", "$LATEST"),
        ("echo", {"Qualifier": "7"}, "7", "7"),
        ("echo", {"Qualifier": "live"}, "1", "live"),
        ("echo:live", {}, "1", "live"),
        ("echo:live", {"Qualifier": "live"}, "1", "live"),
        ("echo:$LATEST", {}, "$LATEST", "$LATEST"),
        (f"{ARN}:echo", {}, "$LATEST", None),
        (f"{ARN}:echo:12", {}, "12", "12"),
        ("000000000000:function:echo", {}, "$LATEST", None),
    ],
)
def test_a_function_is_found_by_every_form_of_its_name(
    server: LambdaServer,
    name: str,
    request_of: dict[str, str],
    version: str,
    qualifier: str | None,
) -> None:
    """Name, ARN, version and alias reach the function; the version executed is named."""
    answer = invoke(client_of(server), 1, name, **request_of)
    assert (answer["Payload"], answer["ExecutedVersion"]) == (b"1", version)
    assert [(call.function, call.qualifier) for call in server.calls] == [("echo", qualifier)]


def test_two_different_qualifiers_are_refused(server: LambdaServer) -> None:
    """A qualifier in the name that is not the one in ``Qualifier`` is a 400."""
    response = error_of(lambda: invoke(client_of(server), 1, "echo:1", Qualifier="2"))
    assert response["Error"]["Code"] == "InvalidParameterValueException"
    assert status_of(response) == 400


def test_the_context_describes_the_invocation() -> None:
    """The context has the request's id, the names, the time left and the client context."""
    seen: list[LambdaContext] = []

    def handler(event: Any, context: LambdaContext) -> None:
        seen.append(context)

    sent = base64.b64encode(json.dumps({"custom": {"trace": "t1"}}).encode()).decode()
    with LambdaServer([FunctionSpec("f", handler, timeout_secs=20)]) as server:
        answer = invoke(client_of(server), {}, "f", Qualifier="live", ClientContext=sent)
        invoke(client_of(server), {}, "f")
        assert [call.client_context for call in server.calls] == [sent, None]
    assert answer["Payload"] == b"null"
    first, second = seen
    assert first.aws_request_id == answer["ResponseMetadata"]["RequestId"]
    assert first.aws_request_id != second.aws_request_id
    assert (first.function_name, first.function_version) == ("f", "1")
    assert first.invoked_function_arn == f"{ARN}:f:live"
    assert first.memory_limit_in_mb == "128"
    assert 0 <= first.get_remaining_time_in_millis() <= 20_000
    assert first.client_context is not None
    assert first.client_context.custom == {"trace": "t1"}
    assert second.client_context is None


def test_a_client_context_must_be_json(server: LambdaServer) -> None:
    """A client context that is no base64 of a JSON object is a 400."""
    client = client_of(server)
    for sent in ("!", base64.b64encode(b"[1]").decode()):
        response = error_of(lambda sent=sent: invoke(client, {}, ClientContext=sent))
        assert response["Error"]["Code"] == "InvalidRequestContentException"
    assert server.in_flight_max == 1
    assert invoke(client, 1)["Payload"] == b"1"


def test_an_event_is_executed_after_its_answer() -> None:
    """Event answers 202 with no payload while the handler has not ended."""
    released = threading.Event()

    def handler(event: Any, context: LambdaContext) -> None:
        assert released.wait(WAIT_SECS)
        raise ValueError("only in the record")

    with LambdaServer([FunctionSpec("f", handler)]) as server:
        answer = invoke(client_of(server), {"n": 1}, "f", InvocationType="Event")
        assert (answer["StatusCode"], answer["Payload"]) == (202, b"")
        assert server.calls == []
        released.set()
        (call,) = server.wait_for_calls(1)
    assert (call.invocation_type, call.status, call.payload) == ("Event", 202, b'{"n": 1}')
    assert call.function_error == "Unhandled"
    assert call.started <= call.ended


def test_events_over_the_concurrency_wait() -> None:
    """Events are accepted over the limit, and executed no more at once than it says."""
    with LambdaServer(
        [FunctionSpec("echo", echo, concurrency=2)], faults=[slow(0.02, times=None)]
    ) as server:
        client = client_of(server)
        for number in range(8):
            assert invoke(client, number, InvocationType="Event")["StatusCode"] == 202
        calls = server.wait_for_calls(8)
        assert sorted(call.payload for call in calls) == [b"%d" % n for n in range(8)]
        assert server.in_flight_max <= 2


def test_an_event_waits_for_the_slot_of_a_synchronous_call() -> None:
    """With concurrency 1, an event accepted during a call is executed after it."""
    entered, released = threading.Event(), threading.Event()

    def handler(event: Any, context: LambdaContext) -> None:
        entered.set()
        assert released.wait(WAIT_SECS)

    with (
        LambdaServer([FunctionSpec("f", handler, concurrency=1)]) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        client = client_of(server)
        running = pool.submit(invoke, client, "first", "f")
        assert entered.wait(WAIT_SECS)
        for _ in range(3):
            answer = invoke(client, "later", "f", InvocationType="Event")
            assert answer["StatusCode"] == 202
        released.set()
        assert running.result()["StatusCode"] == 200
        calls = server.wait_for_calls(4)
        assert server.in_flight_max == 1
    assert sorted(call.status for call in calls) == [200, 202, 202, 202]


def test_a_dry_run_executes_nothing(server: LambdaServer) -> None:
    """DryRun answers 204, is recorded, runs nothing, and finds a missing function."""
    client = client_of(server)
    answer = invoke(client, {}, InvocationType="DryRun")
    assert (answer["StatusCode"], answer["Payload"]) == (204, b"")
    response = error_of(lambda: invoke(client, {}, "absent", InvocationType="DryRun"))
    assert response["Error"]["Code"] == "ResourceNotFoundException"
    assert server.in_flight_max == 0
    assert [(c.invocation_type, c.status) for c in server.calls] == [
        ("DryRun", 204),
        ("DryRun", 404),
    ]
    # The connection is still in step after an answer without a body.
    assert invoke(client, 5)["Payload"] == b"5"


# What is refused.


def test_an_unknown_function_is_404(server: LambdaServer) -> None:
    """ResourceNotFoundException names the function."""
    client = client_of(server)
    with pytest.raises(client.exceptions.ResourceNotFoundException, match="function:absent"):
        invoke(client, {}, "absent")
    (call,) = server.calls
    assert (call.status, call.error_type) == (404, "ResourceNotFoundException")


@pytest.mark.parametrize("body", [b"{nope", b"\xff\xfe\xfd", b'{"a": NaN}', b"[" * 200_000])
def test_a_body_that_is_no_json_is_400(server: LambdaServer, body: bytes) -> None:
    """InvalidRequestContentException, and the handler does not run."""
    client = client_of(server)
    with pytest.raises(client.exceptions.InvalidRequestContentException, match="into json"):
        invoke(client, body)
    assert server.in_flight_max == 0


@pytest.mark.parametrize(
    ("invocation_type", "largest"), [("RequestResponse", 6_291_455), ("Event", 1_048_576)]
)
def test_a_body_over_the_limit_is_413(
    server: LambdaServer, invocation_type: str, largest: int
) -> None:
    """The largest body is taken and one byte more is RequestTooLargeException."""
    client = client_of(server)
    body = b'"' + b"x" * (largest - 2) + b'"'
    assert invoke(client, body, InvocationType=invocation_type)["StatusCode"] in (200, 202)
    with pytest.raises(client.exceptions.RequestTooLargeException, match="smaller than") as raised:
        invoke(client, body + b" ", InvocationType=invocation_type)
    assert status_of(raised.value.response) == 413
    assert sorted(c.status for c in server.wait_for_calls(2))[-1] == 413


def test_a_reply_over_the_limit_is_a_function_error() -> None:
    """The largest reply comes back and one byte more is Function.ResponseSizeTooLarge."""
    spec = FunctionSpec("f", lambda event, context: "x" * (event - 2))
    with LambdaServer([spec]) as server:
        client = client_of(server)
        assert len(invoke(client, 6_291_556, "f")["Payload"]) == 6_291_556
        answer = invoke(client, 6_291_557, "f")
    assert answer["FunctionError"] == "Unhandled"
    assert json.loads(answer["Payload"])["errorType"] == "Function.ResponseSizeTooLarge"


def test_more_executions_than_the_concurrency_are_throttled() -> None:
    """The request over the limit is a 429 with Reason and Retry-After; later ones pass."""
    entered, released = threading.Semaphore(0), threading.Event()

    def handler(event: Any, context: LambdaContext) -> Any:
        entered.release()
        assert released.wait(WAIT_SECS)
        return event

    spec = FunctionSpec("f", handler, concurrency=2)
    with LambdaServer([spec]) as server, ThreadPoolExecutor(2) as pool:
        client = client_of(server)
        running = [pool.submit(invoke, client, n, "f") for n in range(2)]
        for _ in running:
            assert entered.acquire(timeout=WAIT_SECS)
        with pytest.raises(client.exceptions.TooManyRequestsException) as raised:
            invoke(client, 3, "f")
        released.set()
        assert sorted(future.result()["Payload"] for future in running) == [b"0", b"1"]
        assert invoke(client, 4, "f")["Payload"] == b"4"
        assert server.in_flight_max == 2
    response = raised.value.response
    assert status_of(response) == 429
    assert response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
    assert response["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "1"


def test_an_unsigned_request_is_403(server: LambdaServer) -> None:
    """Without a signature the answer is MissingAuthenticationTokenException."""
    url = f"{server.url}/2015-03-31/functions/echo/invocations"
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(url, data=b"{}", timeout=WAIT_SECS)
    with raised.value as answer:
        assert answer.code == 403
        assert answer.headers["x-amzn-ErrorType"] == "MissingAuthenticationTokenException"
        assert len(answer.headers["x-amzn-RequestId"]) == 36
        assert json.load(answer)["Type"] == "User"


def test_credentials_are_checked_when_given() -> None:
    """Only a request signed with the right secret of a known key passes."""
    credentials = {"AKIDKNOWN": "right"}
    with LambdaServer([FunctionSpec("echo", echo)], credentials=credentials) as server:
        known = client_of(server, "AKIDKNOWN", "right")
        assert invoke(known, 1)["Payload"] == b"1"
        assert invoke(known, 2, f"{ARN}:echo", Qualifier="$LATEST")["Payload"] == b"2"
        for key, secret, error_type in (
            ("AKIDOTHER", "right", "UnrecognizedClientException"),
            ("AKIDKNOWN", "wrong", "InvalidSignatureException"),
        ):
            client = client_of(server, key, secret)
            response = error_of(lambda client=client: invoke(client, 1))
            assert response["Error"]["Code"] == error_type
            assert status_of(response) == 403
        assert [call.status for call in server.calls] == [200, 200, 403, 403]


@pytest.mark.parametrize(("method", "status"), [("GET", 501), ("POST", 404)])
def test_anything_but_invoke_is_refused_with_a_typed_error(
    server: LambdaServer, method: str, status: int
) -> None:
    """Another path or method answers JSON, not a page of http.server's."""
    request = urllib.request.Request(f"{server.url}/other", b"{}", method=method)
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=WAIT_SECS)
    with raised.value as answer:
        assert answer.code == status
        assert answer.headers["x-amzn-ErrorType"] == "UnknownOperationException"
        assert "message" in json.load(answer)


# Handlers.


def test_an_exception_is_an_unhandled_function_error() -> None:
    """It answers 200 with FunctionError, the type, the message and the handler's stack."""

    def handler(event: Any, context: LambdaContext) -> None:
        raise KeyError("lost")

    with LambdaServer([FunctionSpec("f", handler)]) as server:
        answer = invoke(client_of(server), {}, "f")
        assert server.calls[0].function_error == "Unhandled"
    error = json.loads(answer["Payload"])
    assert (answer["StatusCode"], answer["FunctionError"]) == (200, "Unhandled")
    assert (error["errorType"], error["errorMessage"]) == ("KeyError", "'lost'")
    assert error["requestId"] == answer["ResponseMetadata"]["RequestId"]
    assert len(error["stackTrace"]) == 1
    assert "in handler" in error["stackTrace"][0]


def test_a_worker_is_used_again(process_server: LambdaServer, handlers: Path) -> None:
    """Calls one after the other run in one process, beside the modules of its folder."""
    client = client_of(process_server)
    first, second = (json.loads(invoke(client, {}, "main")["Payload"]) for _ in range(2))
    assert first["pid"] == second["pid"] != os.getpid()
    assert second["calls"] == first["calls"] + 1
    assert (first["greeting"], first["name"]) == ("hello", "main")


def test_a_worker_reports_an_exception_and_lives_on(process_server: LambdaServer) -> None:
    """The error's body is as for a callable, and the process serves the next call."""
    client = client_of(process_server)
    before = json.loads(invoke(client, {}, "main")["Payload"])
    answer = invoke(client, {"do": "raise"}, "main", LogType="Tail")
    error = json.loads(answer["Payload"])
    assert answer["FunctionError"] == "Unhandled"
    assert (error["errorType"], error["errorMessage"]) == ("ValueError", "no good: é")
    assert "line 13, in main" in error["stackTrace"][0]
    assert "[ERROR] ValueError: no good: é" in base64.b64decode(answer["LogResult"]).decode()
    assert json.loads(invoke(client, {}, "main")["Payload"])["pid"] == before["pid"]


def test_a_reply_that_is_no_json_is_a_marshal_error(process_server: LambdaServer) -> None:
    """A set cannot be JSON, and the answer says so."""
    answer = invoke(client_of(process_server), {"do": "set"}, "main")
    assert answer["FunctionError"] == "Unhandled"
    assert json.loads(answer["Payload"])["errorType"] == "Runtime.MarshalError"


def test_the_log_is_given_when_asked_for(process_server: LambdaServer) -> None:
    """LogType Tail gives START, what was printed, END and REPORT; at most 4 KB of it."""
    client = client_of(process_server)
    answer = invoke(client, {"print": "this"}, "main", LogType="Tail")
    log = base64.b64decode(answer["LogResult"]).decode()
    request_id = answer["ResponseMetadata"]["RequestId"]
    start, printed, end, report = log.splitlines()
    assert start == f"START RequestId: {request_id} Version: $LATEST"
    assert printed == "printed this"
    assert end == f"END RequestId: {request_id}"
    assert report.startswith(f"REPORT RequestId: {request_id}\tDuration: ")
    answer = invoke(client, {"print": "é" * 5000}, "main", LogType="Tail")
    tail = base64.b64decode(answer["LogResult"])
    assert len(tail) == 4096
    assert b"REPORT RequestId" in tail
    assert "LogResult" not in invoke(client, {"print": "this"}, "main")


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("die", "Runtime exited with error: exit status 7"),
        ("exit", "Runtime exited without providing a reason"),
        ("kill", "Runtime exited with error: signal: Killed"),
    ],
)
def test_a_crash_is_a_function_error_and_the_next_call_works(
    process_server: LambdaServer, do: str, message: str
) -> None:
    """Runtime.ExitError with what was printed before, then a new process takes over."""
    client = client_of(process_server)
    before = json.loads(invoke(client, {}, "main")["Payload"])
    answer = invoke(client, {"do": do, "print": "last words"}, "main", LogType="Tail")
    error = json.loads(answer["Payload"])
    assert (answer["StatusCode"], answer["FunctionError"]) == (200, "Unhandled")
    assert error["errorType"] == "Runtime.ExitError"
    assert error["errorMessage"].endswith(f"Error: {message}")
    log = base64.b64decode(answer["LogResult"]).decode()
    assert "printed last words\n" in log
    assert message in log
    after = json.loads(invoke(client, {}, "main")["Payload"])
    assert (after["pid"] != before["pid"], after["calls"]) == (True, 1)


def test_an_execution_is_killed_at_the_timeout(handlers: Path) -> None:
    """Sandbox.Timedout comes at the timeout, and a new process serves the next call."""
    spec = FunctionSpec("main", f"{handlers}:main", timeout_secs=0.5)
    with LambdaServer([spec]) as server:
        client = client_of(server)
        before = json.loads(invoke(client, {}, "main")["Payload"])
        answer = invoke(client, {"do": "hang"}, "main", LogType="Tail")
        hung = server.calls[-1]
        with pytest.raises(ProcessLookupError):
            os.kill(before["pid"], 0)
        after = json.loads(invoke(client, {}, "main")["Payload"])
    error = json.loads(answer["Payload"])
    assert answer["FunctionError"] == hung.function_error == "Unhandled"
    assert error["errorType"] == "Sandbox.Timedout"
    assert error["errorMessage"].endswith("Task timed out after 0.50 seconds")
    assert b"printed nothing" in base64.b64decode(answer["LogResult"])
    assert 0.5 <= hung.ended - hung.started < 30
    assert after["pid"] != before["pid"]


def test_a_handler_that_cannot_be_loaded_is_a_function_error(handlers: Path) -> None:
    """A failing import and a missing handler each have their own error type."""
    specs = [
        FunctionSpec("broken", f"{handlers.parent}/broken.py:main"),
        FunctionSpec("absent", f"{handlers}:no_such_handler"),
    ]
    with LambdaServer(specs) as server:
        client = client_of(server)
        broken, absent = (invoke(client, {}, spec.name) for spec in specs)
    assert broken["FunctionError"] == absent["FunctionError"] == "Unhandled"
    assert json.loads(broken["Payload"])["errorType"] == "Runtime.ImportModuleError"
    assert "no_such_module_at_all" in json.loads(broken["Payload"])["errorMessage"]
    assert json.loads(absent["Payload"])["errorType"] == "Runtime.HandlerNotFound"


def test_sixteen_calls_run_at_once() -> None:
    """Sixteen executions meet, each gets its own reply, and none is lost from the record."""
    meeting = threading.Barrier(16)

    def handler(event: Any, context: LambdaContext) -> Any:
        meeting.wait(WAIT_SECS)
        return event

    spec = FunctionSpec("f", handler, concurrency=16)
    with LambdaServer([spec]) as server, ThreadPoolExecutor(16) as pool:
        client = client_of(server)
        replies = list(pool.map(lambda n: invoke(client, n, "f")["Payload"], range(64)))
        assert replies == [b"%d" % n for n in range(64)]
        assert server.in_flight_max == 16
        assert sorted(int(call.payload) for call in server.calls) == list(range(64))


def test_workers_run_at_once(process_server: LambdaServer) -> None:
    """Four concurrent calls to a file's handler all come back whole."""
    client = client_of(process_server)
    with ThreadPoolExecutor(4) as pool:
        sizes = list(
            pool.map(
                lambda n: len(invoke(client, {"do": "large", "size": n}, "main")["Payload"]),
                [1_000_000 + n for n in range(12)],
            )
        )
    assert sizes == [1_000_002 + n for n in range(12)]


def test_calls_are_not_kept_when_not_wanted() -> None:
    """Without record_calls the server serves and remembers nothing."""
    with LambdaServer([FunctionSpec("echo", echo)], record_calls=False) as server:
        assert invoke(client_of(server), 1)["Payload"] == b"1"
        assert server.calls == []
        with pytest.raises(TimeoutError, match="0 of 1 calls"):
            server.wait_for_calls(1, timeout_secs=0)


# Close.


def test_close_ends_processes_threads_and_connections(handlers: Path) -> None:
    """A hanging worker, an idle one and an open connection are all gone after close."""
    before = set(threading.enumerate())
    specs = [
        FunctionSpec("hanging", f"{handlers}:main", timeout_secs=60),
        FunctionSpec("idle", f"{handlers}:main"),
        FunctionSpec("echo", echo),
    ]
    server = LambdaServer(specs)
    client = client_of(server)
    pids = [json.loads(invoke(client, {}, f)["Payload"])["pid"] for f in ("hanging", "idle")]
    assert invoke(client, {"do": "hang"}, "hanging", InvocationType="Event")["StatusCode"] == 202
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle:
        # The connections are accepted in turn, so after this the idle one is.
        assert invoke(client_of(server), 1)["Payload"] == b"1"
        server.close()
        server.close()
        idle.settimeout(WAIT_SECS)
        assert idle.recv(1) == b""
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert set(threading.enumerate()) <= before
    # The execution broken off did not end, so it is no call.
    assert [call.invocation_type for call in server.calls] == ["RequestResponse"] * 3


# Faults.


def test_an_error_fault_hits_the_number_of_times_asked_for(server: LambdaServer) -> None:
    """429, 500 and 502 come in the order given, each typed, and then the function runs."""
    server.add_fault(throttle(retry_after_secs=2.5))
    server.add_fault(unavailable(times=2))
    server.add_fault(unavailable(502, "EC2ThrottledException", message="slow down"))
    client = client_of(server)
    seen = []
    for _ in range(4):
        response = error_of(lambda: invoke(client, {}))
        headers = response["ResponseMetadata"]["HTTPHeaders"]
        seen.append((status_of(response), response["Error"]["Code"], headers.get("retry-after")))
    assert seen == [
        (429, "TooManyRequestsException", "2.5"),
        (500, "ServiceException", None),
        (500, "ServiceException", None),
        (502, "EC2ThrottledException", None),
    ]
    assert response["Error"]["Message"] == "slow down"
    assert server.in_flight_max == 0
    assert invoke(client, 1)["Payload"] == b"1"
    assert [call.error_type for call in server.calls] == [code for _, code, _ in seen] + [None]


def test_a_fault_may_always_hit_until_cleared(server: LambdaServer) -> None:
    """times None hits every request; clear_faults ends it."""
    server.add_fault(unavailable(503, "ServiceUnavailableException", times=None))
    client = client_of(server)
    assert [status_of(error_of(lambda: invoke(client, {}))) for _ in range(3)] == [503] * 3
    server.clear_faults()
    assert invoke(client, 1)["Payload"] == b"1"


def test_a_fault_hits_only_what_it_is_for(server: LambdaServer) -> None:
    """when sees the payload and the function's name; a DryRun is hit only on request."""
    server.add_fault(unavailable(when=lambda body, name: b"bad" in body and name == "other"))
    server.add_fault(
        Fault(status=403, error_type="AccessDeniedException", invocation_types=("DryRun",))
    )
    client = client_of(server)
    assert invoke(client, "bad", "echo")["StatusCode"] == 200
    assert invoke(client, "good", "other")["StatusCode"] == 200
    assert status_of(error_of(lambda: invoke(client, "bad", "other"))) == 500
    assert invoke(client, "bad", "other")["StatusCode"] == 200
    response = error_of(lambda: invoke(client, {}, InvocationType="DryRun"))
    assert response["Error"]["Code"] == "AccessDeniedException"
    assert invoke(client, {}, InvocationType="DryRun")["StatusCode"] == 204


def test_a_fault_may_hit_above_a_number_in_flight() -> None:
    """With one execution running, above_in_flight 1 hits the second and not the first."""
    entered, released = threading.Event(), threading.Event()

    def handler(event: Any, context: LambdaContext) -> Any:
        entered.set()
        assert released.wait(WAIT_SECS)
        return event

    faults = [throttle(times=None, above_in_flight=1)]
    with (
        LambdaServer([FunctionSpec("f", handler)], faults=faults) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        client = client_of(server)
        first = pool.submit(invoke, client, 1, "f")
        assert entered.wait(WAIT_SECS)
        assert status_of(error_of(lambda: invoke(client, 2, "f"))) == 429
        released.set()
        assert first.result()["Payload"] == b"1"
        assert invoke(client, 3, "f")["Payload"] == b"3"


@pytest.mark.parametrize("executed", [False, True])
def test_a_dropped_connection_may_come_before_or_after_the_execution(executed: bool) -> None:
    """The client sees no answer; the handler ran only if the fault says so."""
    events: list[Any] = []
    with LambdaServer([FunctionSpec("f", lambda event, context: events.append(event))]) as server:
        server.add_fault(drop_connection(executed=executed))
        client = client_of(server)
        with pytest.raises(ConnectionClosedError):
            invoke(client, "first", "f")
        assert events == (["first"] if executed else [])
        assert invoke(client, "second", "f")["StatusCode"] == 200
        assert [call.status for call in server.calls] == [0, 200]


def test_a_dropped_event_is_recorded_once(server: LambdaServer) -> None:
    """An event whose answer is lost is executed, and is one call with status 0."""
    server.add_fault(drop_connection(executed=True))
    client = client_of(server)
    with pytest.raises(ConnectionClosedError):
        invoke(client, 1, InvocationType="Event")
    assert invoke(client, 2, InvocationType="Event")["StatusCode"] == 202
    calls = server.wait_for_calls(2)
    assert sorted((call.payload, call.status) for call in calls) == [(b"1", 0), (b"2", 202)]


def test_a_slow_execution_takes_its_slot_for_longer(server: LambdaServer) -> None:
    """delay_secs passes before the reply, which is then the function's own."""
    server.add_fault(slow(0.2))
    started = time.monotonic()
    assert invoke(client_of(server), 1)["Payload"] == b"1"
    assert time.monotonic() - started >= 0.2
    (call,) = server.calls
    assert call.ended - call.started >= 0.2
    assert server.in_flight_max == 1


def test_a_raw_reply_replaces_the_functions(server: LambdaServer) -> None:
    """The body arrives byte for byte, JSON or not, as a success."""
    server.add_fault(raw_reply(b"\x00 no json"))
    answer = invoke(client_of(server), 1)
    assert (answer["StatusCode"], answer["Payload"]) == (200, b"\x00 no json")
    assert "FunctionError" not in answer


def test_a_function_error_is_answered_without_running_the_function(server: LambdaServer) -> None:
    """The answer is as if the handler had raised."""
    server.add_fault(function_error("Flaky", "try again"))
    answer = invoke(client_of(server), 1)
    error = json.loads(answer["Payload"])
    assert answer["FunctionError"] == server.calls[0].function_error == "Unhandled"
    assert (error["errorType"], error["errorMessage"]) == ("Flaky", "try again")


def test_an_error_may_have_the_body_of_a_proxy(server: LambdaServer) -> None:
    """An error without a type and with a body that is no JSON is still a ClientError."""
    server.add_fault(unavailable(502, "", body=b"<html>Bad Gateway</html>"))
    response = error_of(lambda: invoke(client_of(server), 1))
    assert status_of(response) == 502


def test_close_does_not_wait_for_a_delay() -> None:
    """A request held back by a long delay ends when the server closes."""
    server = LambdaServer([FunctionSpec("echo", echo)], faults=[slow(3600.0)])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(invoke, client_of(server), 1)
        with pytest.raises(TimeoutError):
            server.wait_for_calls(1, timeout_secs=0.1)
        server.close()
        assert isinstance(waiting.exception(WAIT_SECS), Exception)


def test_a_plan_hands_out_each_fault_its_number_of_times() -> None:
    """Under eight threads a fault of 100 times is given exactly 100 times."""
    plan = FaultPlan([unavailable(times=100)])
    with ThreadPoolExecutor(8) as pool:
        picked = list(pool.map(lambda _: plan.pick(b"", "f"), range(400)))
    assert sum(fault is not None for fault in picked) == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "explode"}, "kind must be one of"),
        ({"status": 200}, "status must be from 400 to 599"),
        ({"times": 0}, "times must be at least 1"),
        ({"delay_secs": -1.0}, "delay_secs must be from 0"),
        ({"delay_secs": float("nan")}, "delay_secs must be from 0"),
        ({"retry_after_secs": -1.0}, "retry_after_secs must be from 0"),
        ({"above_in_flight": -1}, "above_in_flight must be at least 0"),
        ({"invocation_types": ("Sync",)}, "invocation_types must be of"),
    ],
)
def test_a_fault_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    """The message names the field and what it may be."""
    with pytest.raises(ValueError, match=message):
        Fault(**values)


def test_faults_are_read_from_json(tmp_path: Path) -> None:
    """Every field has its JSON form; contains and function stand for when."""
    path = tmp_path / "faults.json"
    path.write_text(
        json.dumps(
            [
                {"status": 429, "error_type": "TooManyRequestsException", "times": None},
                {"kind": "reply", "body": "é", "contains": "k1", "function": "f"},
                {"kind": "delay", "delay_secs": 1, "invocation_types": ["DryRun"]},
            ]
        )
    )
    always, reply, delay = load_faults(path)
    assert always == Fault(status=429, error_type="TooManyRequestsException", times=None)
    assert (reply.kind, reply.body, reply.times) == ("reply", "é".encode(), 1)
    assert reply.when is not None
    assert [reply.when(b"k1", "f"), reply.when(b"k2", "f"), reply.when(b"k1", "g")] == [
        True,
        False,
        False,
    ]
    assert delay.invocation_types == ("DryRun",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"must be a list of objects, got \{\}"),
        ([1], "fault 1 must be an object, got 1"),
        ([{}, {"stauts": 500}], "fault 2: unknown field 'stauts'; use some of kind, status"),
        ([{"times": True}], "fault 1: times must be a whole number or null, got true"),
        ([{"body": 1}], "fault 1: body must be text, got 1"),
        ([{"status": 99}], "fault 1: status must be from 400 to 599, got 99"),
        ([{"delay_secs": 10**400}], "fault 1: delay_secs must be from 0"),
    ],
)
def test_wrong_json_faults_are_refused_in_one_line(content: Any, message: str) -> None:
    """The message counts the objects from 1 and names the field."""
    with pytest.raises(ValueError, match=message) as raised:
        parse_faults(content)
    assert "\n" not in str(raised.value)


# Configuration and the command line.


def test_a_function_is_read_from_text() -> None:
    """NAME=FILE:HANDLER with settings gives the spec; without, the defaults hold."""
    assert FunctionSpec.parse("f=a/b.py:main") == FunctionSpec("f", "a/b.py:main", 3.0, 10)
    assert FunctionSpec.parse("f=b.py:main,timeout_secs=2.5,concurrency=4") == FunctionSpec(
        "f", "b.py:main", 2.5, 4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f", "'f' has no '='; give it as NAME=FILE.py:HANDLER"),
        ("=a.py:main", "function name '' is not valid"),
        ("a b=a.py:main", "function name 'a b' is not valid"),
        ("f=a:main", "'a:main' of function 'f' is not valid; give it as FILE.py:HANDLER"),
        ("f=a.py", "'a.py' of function 'f' is not valid"),
        ("f=a.py:main,timeout=2", "unknown setting 'timeout'; use timeout_secs or concurrency"),
        ("f=a.py:main,timeout_secs=soon", "timeout_secs of function 'f' must be a number"),
        ("f=a.py:main,timeout_secs=nan", "timeout_secs of function 'f' must be over 0"),
        ("f=a.py:main,timeout_secs=901", "must be over 0 and at most 900, got 901"),
        ("f=a.py:main,concurrency=0", "concurrency of function 'f' must be at least 1, got 0"),
        ("f=a.py:main,concurrency=1.5", "concurrency of function 'f' must be a number"),
    ],
)
def test_a_wrong_function_text_is_refused_in_one_line(text: str, message: str) -> None:
    """The message says what is wrong, shows the value and says what to do."""
    with pytest.raises(ValueError) as raised:
        FunctionSpec.parse(text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_two_functions_of_one_name_are_refused() -> None:
    """The second would never be called."""
    with pytest.raises(ValueError, match="'f' is given twice"):
        LambdaServer([FunctionSpec("f", echo), FunctionSpec("f", echo)])


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.local", "lambda", *arguments]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_line_serves_until_a_signal(
    handlers: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """It prints the url, injects faults, serves, and exits 0 with its workers gone."""
    faults = tmp_path / "faults.json"
    faults.write_text('[{"status": 500}]')
    process = subprocess.Popen(
        command_line("--function", f"main={handlers}:main", "--port", "0", "--faults", str(faults)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split(" ")[0]
        assert line.startswith("http://127.0.0.1:")
        assert f"--endpoint-url {url} --function-name main" in line
        client = SESSION.client(
            "lambda",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(retries={"total_max_attempts": 1}),
        )
        assert status_of(error_of(lambda: invoke(client, {}, "main"))) == 500
        pid = json.loads(invoke(client, {}, "main")["Payload"])["pid"]
        process.send_signal(number)
        rest, errors = process.communicate(timeout=WAIT_SECS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest, errors) == (0, "", "")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--function"),
        (["--function", "f"], "'f' has no '='"),
        (["--function", "f=absent.py:main"], "does not exist"),
        (["--function", "f=HERE:main", "--port", "x"], "invalid int value: 'x'"),
        (["--function", "f=HERE:main", "--port", "70000"], "port"),
        (["--function", "f=HERE:main", "--faults", "absent.json"], "cannot read faults file"),
        (["--function", "f=HERE:main", "--faults", "HERE"], "is not JSON"),
    ],
)
def test_a_misused_command_line_is_told_in_one_line(
    handlers: Path, arguments: list[str], message: str
) -> None:
    """Exit code 2, one line on stderr, and no stack trace."""
    done = subprocess.run(
        command_line(*(text.replace("HERE", str(handlers)) for text in arguments)),
        capture_output=True,
        text=True,
        timeout=WAIT_SECS,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_told_in_one_line(server: LambdaServer, handlers: Path) -> None:
    """The port of another server is refused with the system's reason."""
    port = server.url.rsplit(":", 1)[1]
    done = subprocess.run(
        command_line("--function", f"main={handlers}:main", "--port", port),
        capture_output=True,
        text=True,
        timeout=WAIT_SECS,
    )
    assert done.returncode == 2
    assert port in done.stderr
    assert done.stderr.count("\n") == 1
