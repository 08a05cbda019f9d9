"""The client: names, credentials, and what is sent when."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import re
import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from moto import mock_aws

from pipeline.local.faults import Fault as Fails
from pipeline.local.faults import drop_connection, throttle, unavailable
from pipeline.local.lambda_server import FunctionSpec, LambdaServer
from tests.sink import FUNCTION, serve
from tests.transforms.aws.test_http import OK, make_certificate, peer
from transforms.aws.answers import Fault, Reply
from transforms.aws.function import FunctionConfig, LambdaFunction, Request, make_client
from transforms.errors import FunctionConfigError
from transforms.invoke.invoke import InvokeConfig, make_invoker
from transforms.invoke.outcome import Kind, classify_fault
from transforms.invoke.reply import NONE
from transforms.invoke.retry import RetryPolicy
from transforms.records import Batch, Records


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of nobody, and no profile of whoever runs the tests."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDCALLER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    for name in ("http_proxy", "https_proxy", "no_proxy", "aws_ca_bundle", "requests_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class _Sent(Exception):
    """Ends a request where it would leave the process."""


@mock_aws
def test_the_role_is_what_signs() -> None:
    """With a role, a request carries the credentials that STS gave for it, not the caller's."""
    role = "arn:aws:iam::123456789012:role/invoke"
    client = make_client(FunctionConfig("f", region="us-east-1", role_arn=role))
    sent: list[Any] = []

    def capture(request: Any, **_: Any) -> None:
        sent.append(request)
        raise _Sent

    client.meta.events.register_first("before-send.lambda.Invoke", capture)
    with pytest.raises(_Sent):
        client.invoke(FunctionName="f", Payload=b"{}")
    (request,) = sent
    authorization = request.headers["Authorization"].decode()
    assert "Credential=ASIA" in authorization
    assert "AKIDCALLER" not in authorization
    assert request.headers["X-Amz-Security-Token"]


def test_a_role_needs_somebody_to_assume_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials of the caller it is said at once, with what to do."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    role = "arn:aws:iam::123456789012:role/invoke"
    with pytest.raises(FunctionConfigError, match=r"NoCredentialsError.*AWS_PROFILE"):
        make_client(FunctionConfig("f", region="us-east-1", role_arn=role))


@pytest.mark.parametrize(
    ("config", "environment", "region"),
    [
        (FunctionConfig("f", region="eu-west-1"), "us-east-2", "eu-west-1"),
        (FunctionConfig("arn:aws:lambda:eu-west-3:123456789012:function:f"), None, "eu-west-3"),
        (FunctionConfig("f"), "us-east-2", "us-east-2"),
    ],
)
def test_the_region(
    monkeypatch: pytest.MonkeyPatch, config: FunctionConfig, environment: str | None, region: str
) -> None:
    """The option, then the ARN, then the environment."""
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.delenv("AWS_REGION", raising=False)
    if environment:
        monkeypatch.setenv("AWS_REGION", environment)
    assert make_client(config).meta.region_name == region


def test_a_prepared_call_is_sent_when_it_is_sent() -> None:
    """Preparing reaches nobody; and a request that was prepared may be left."""
    with LambdaServer([FunctionSpec("f", echo)]) as server:
        function = here(server.url)
        left, request = function.prepare(b"[1]"), function.prepare(b"[2]")
        assert isinstance(left, Request)
        assert isinstance(request, Request)
        assert not server.calls
        reply = function.send(request)
        assert isinstance(reply, Reply)
        assert reply.payload == b"[2]"
        assert [call.payload for call in server.calls] == [b"[2]"]


def test_what_is_done_meanwhile() -> None:
    """It begins when the function has the event, and the reply is there when it is over."""
    running, done = threading.Event(), threading.Event()

    def handler(event: Any, context: Any) -> Any:
        running.set()
        return [event, done.wait(30)]

    def meanwhile() -> None:
        assert running.wait(30)
        done.set()

    with LambdaServer([FunctionSpec("f", handler)]) as server:
        function = here(server.url)
        request = function.prepare(b"1")
        assert isinstance(request, Request)
        reply = function.send(request, meanwhile)
    assert isinstance(reply, Reply)
    assert json.loads(reply.payload) == [1, True]


# -- as boto3 would do it -----------------------------------------------------------------


def echo(event: Any, context: Any) -> Any:
    return event


def here(url: str, function: str = "f", **more: Any) -> LambdaFunction:
    return LambdaFunction(FunctionConfig(function, "sync", "us-east-1", **more, endpoint_url=url))


def boto3_client(url: str | None, region: str = "us-east-1") -> Any:
    # Not the default session, which keeps the credentials of the test before.
    return boto3.Session().client(
        "lambda",
        region_name=region,
        endpoint_url=url,
        config=Config(retries={"total_max_attempts": 1}, read_timeout=5, connect_timeout=5),
    )


@pytest.mark.parametrize(
    ("function", "endpoint", "region", "arguments"),
    [
        ("f", None, "us-east-1", {}),
        ("f", None, "cn-north-1", {}),
        ("f", "http://127.0.0.1:9", "eu-west-1", {}),
        ("f", "https://vpce-1.lambda.eu-west-1.vpce.amazonaws.com/", "eu-west-1", {}),
        ("f:$LATEST", None, "us-east-1", {"FunctionName": "f", "Qualifier": "$LATEST"}),
        (
            "arn:aws-cn:lambda:cn-north-1:123456789012:function:f:live",
            None,
            "cn-north-1",
            {
                "FunctionName": "arn:aws-cn:lambda:cn-north-1:123456789012:function:f",
                "Qualifier": "live",
            },
        ),
    ],
)
@pytest.mark.parametrize("token", [None, "temporary"])
@pytest.mark.parametrize(
    ("more", "more_arguments"),
    [
        ({}, {}),
        ({"invocation_type": "async"}, {"InvocationType": "Event"}),
        ({"log_tail": True}, {"LogType": "Tail"}),
    ],
)
def test_a_request_is_the_one_of_boto3(
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    endpoint: str | None,
    region: str,
    arguments: dict[str, str],
    token: str | None,
    more: dict[str, Any],
    more_arguments: dict[str, str],
) -> None:
    """The same URL, headers and signature, but for what only boto3's own retries need."""
    now = datetime.datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: now)
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    sent: list[Any] = []

    def capture(request: Any, **_: Any) -> None:
        sent.append(request)
        raise _Sent

    context = base64.b64encode(b'{"custom":{"a":"b"}}').decode()
    client = boto3_client(endpoint, region)
    client.meta.events.register_first("before-send.lambda.Invoke", capture)
    with pytest.raises(_Sent):
        client.invoke(
            **({"FunctionName": "f"} | arguments | more_arguments),
            Payload=b"[1]",
            ClientContext=context,
        )
    (theirs,) = sent

    config = FunctionConfig(function, region=region, endpoint_url=endpoint, **more)
    ours = LambdaFunction(config).prepare(b"[1]", context)
    assert isinstance(ours, Request)
    parts = urlsplit(theirs.url)
    target = parts._replace(scheme="", netloc="").geturl()
    assert ours.head.text.startswith(f"POST {target} HTTP/1.1\r\n".encode())
    assert ours.payload == theirs.body
    headers = {
        name: value if isinstance(value, str) else value.decode()
        for name, value in theirs.headers.items()
        if not name.startswith("amz-sdk-")
    }
    # Signed by boto3 and added by its HTTP client.
    assert "SignedHeaders=host;" in headers["Authorization"]
    headers |= {"Host": theirs.url.split("/")[2], "Accept-Encoding": "identity"}
    headers["User-Agent"] = ours.head.headers["User-Agent"]
    assert parts.netloc == headers["Host"]
    assert ours.head.headers == headers
    assert ours.head.headers["User-Agent"].startswith("beam-lambda-sink ")


FAILURES = [
    throttle(),
    throttle(retry_after_secs=None),
    unavailable(),
    unavailable(502, "EC2ThrottledException"),
    Fails(status=503, error_type="", body=b"<html>busy</html>"),
    Fails(status=413, error_type="RequestTooLargeException", message="too large"),
    Fails(status=403, error_type="AccessDeniedException", message="no: é"),
    Fails(status=404, error_type="ResourceNotFoundException", message=""),
    Fails(status=504, error_type="", body=b""),
    drop_connection(),
    drop_connection(executed=True),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda fails: f"{fails.kind}-{fails.status}")
def test_a_failure_has_the_name_that_boto3_gives_it(failure: Fails) -> None:
    """Status, code, message, and how long to wait."""
    with LambdaServer([FunctionSpec("f", echo)]) as server:
        server.add_fault(failure)
        client = boto3_client(server.url)
        with pytest.raises((ClientError, BotoCoreError)) as raised:
            client.invoke(FunctionName="f", Payload=b"[1]")
        server.add_fault(failure)
        fault = here(server.url).invoke(b"[1]")
    assert isinstance(fault, Fault)
    error = raised.value
    if isinstance(error, ClientError):
        response: Any = error.response
        assert fault.status_code == response["ResponseMetadata"]["HTTPStatusCode"]
        assert fault.code == response["Error"]["Code"]
        said = str(error).replace(" (reached max retries: 0)", "")
        assert fault.message == (response["Error"]["Message"] or said)
        headers = response["ResponseMetadata"]["HTTPHeaders"]
        # boto3 does not look for it beside a page that is no JSON.
        assert bool(fault.request_id) == ("x-amzn-requestid" in headers)
        wait = headers.get("retry-after")
        assert fault.retry_after_secs == (float(wait) if wait else None)
    else:
        assert (fault.status_code, fault.code) == (0, type(error).__name__)
        assert fault.message == str(error)


def _refusal(status: int, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        (
            _refusal(503, "Dienst nicht verfügbar".encode("latin-1")),
            "503",
            "Dienst nicht verf\ufffdg",
        ),
        (_refusal(503, b'"Service is away"'), "503", "Service is away"),
        (_refusal(503, b"null"), "503", "Service Unavailable"),
        (_refusal(504, b"504"), "504", "Gateway Timeout"),
        (_refusal(503, b'["a", 1]'), "503", "Service Unavailable"),
        (_refusal(429, b'"Too many"'), "429", "Too many"),
        (_refusal(502, b"<!DOCTYPE html><p>no"), "502", "Bad Gateway"),
        (_refusal(403, b'{"message":{"detail":"denied"}}'), "403", r"An error occurred \(403\)"),
        (_refusal(403, b'{"message":"no","__type":7,"code":[]}'), "403", "no"),
        (_refusal(400, b'{"Message":"no","__type":"com.x#Some:y"}'), "Some", "no"),
        (_refusal(400, rb'{"__type":"\ud800\u001b[1m"}'), "??[1m", r"An error occurred \(\?\?\[1m"),
        (_refusal(503, rb'{"message":"\ud83d"}'), "503", r"\?"),
        (_refusal(503, gzip.compress(b"busy", mtime=0), b"Content-Encoding: gzip"), "503", "busy"),
        (_refusal(503, b"\x1f\x8b no", b"Content-Encoding: gzip"), "503", "\ufffd no"),
        (_refusal(500, b"[" * 100_000), "500", r"\["),
        (_refusal(500, b"9" * 100_000), "500", "Internal Server Error"),
        (_refusal(503, b"", b"x-amzn-ErrorType: \xe9\xff:x"), "éÿ", "Service Unavailable"),
        (_refusal(599, b"x" * 20_000_000), "599", "x{1000}$"),
    ],
)
def test_a_refusal_s_text_may_have_any_form(reply: bytes, code: str, message: str) -> None:
    """The status decides; the text is for people, and can be written anywhere."""
    status = int(reply[9:12])
    with peer(reply) as server:
        fault = here(f"http://127.0.0.1:{server.port}").invoke(b"[1]")
    assert isinstance(fault, Fault)
    assert (fault.status_code, fault.code) == (status, code)
    assert re.match(message, fault.message)
    f"{fault.code}{fault.message}".encode()
    kind = classify_fault(fault).kind
    passing = Kind.THROTTLED if status == 429 else Kind.TRANSIENT
    assert kind is (Kind.CONFIG if status < 429 else passing)


@pytest.mark.parametrize(
    ("asked", "secs"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("86400", 300.0),
        ("1795726008000", 300.0),
        ("inf", 300.0),
        ("9" * 400, 300.0),
        ("-1", None),
        ("nan", None),
        ("Fri, 27 Nov 2026 01:00:00 GMT", None),
        ("", None),
    ],
)
def test_how_long_an_answer_can_ask_to_wait(asked: str, secs: float | None) -> None:
    """Five minutes at most; what is no time to wait is not asked for."""
    with peer(_refusal(429, b"{}", b"Retry-After: " + asked.encode())) as server:
        fault = here(f"http://127.0.0.1:{server.port}").invoke(b"[1]")
    assert isinstance(fault, Fault)
    assert fault.retry_after_secs == secs


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 300, 302])
@pytest.mark.parametrize("type", ["sync", "async"])
def test_whoever_answers_otherwise_is_no_lambda(status: int, type: str) -> None:
    """What is no answer of Lambda's is no success, and no reason to try again."""
    reply = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status
    with peer(reply, reply) as server:
        url = f"http://127.0.0.1:{server.port}"
        function = LambdaFunction(FunctionConfig("f", type, "us-east-1", endpoint_url=url))
        result = function.invoke(b"[1]")
        if status == {"sync": 200, "async": 202}[type]:
            assert isinstance(result, Reply)
        else:
            assert isinstance(result, Fault)
            assert classify_fault(result).kind is Kind.CONFIG
        if status == 204:
            function.check()
        else:
            with pytest.raises(
                FunctionConfigError,
                match=rf"--function=f cannot be invoked: NotLambda: .*HTTP {status}, Lambda would "
                r"with 204; check --lambda_endpoint_url",
            ):
                function.check()


def test_a_reply_that_is_too_large_to_be_one() -> None:
    """The function has failed: it would be called again for nothing, for ever."""
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + b"x" * 20_000_000
    with peer(reply) as server:
        fault = here(f"http://127.0.0.1:{server.port}").invoke(b"[1]")
    assert isinstance(fault, Fault)
    assert (fault.status_code, fault.code) == (200, "ReplyTooLarge")
    assert classify_fault(fault).kind is Kind.FUNCTION_ERROR


@pytest.mark.parametrize(
    "said", ["Signature expired: a is now earlier", "Signature not yet current"]
)
def test_a_signature_of_another_time(said: str) -> None:
    """A clock that is wrong, or was: passing, and at the start said with what to do."""
    body = json.dumps({"message": said}).encode()
    reply = _refusal(403, body, b"x-amzn-ErrorType: InvalidSignatureException")
    with peer(reply, reply) as server:
        function = here(f"http://127.0.0.1:{server.port}")
        fault = function.invoke(b"[1]")
        assert isinstance(fault, Fault)
        assert classify_fault(fault).kind is Kind.TRANSIENT
        with pytest.raises(FunctionConfigError, match=f"{said}.*; check this machine's clock"):
            function.check()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Credentials were refreshed, but the refreshed credentials are still expired."
        ),
        FileNotFoundError(2, "No such file or directory", "/var/run/token"),
        ConnectionResetError(104, "reset"),
        ValueError("the provider gives nonsense"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_credentials_raise_is_a_fault_of_that_call(error: Exception) -> None:
    """It passes; and it is no business of the call whose reply is under way meanwhile."""
    calls: list[int] = []
    with serve(lambda event, context: calls.append(event)) as server:
        config = FunctionConfig(FUNCTION, region="us-east-1", endpoint_url=server.url)
        function = LambdaFunction(config)
        signer = function._template.signer
        sign, failures = signer.sign, [error, error]

        def fail(*arguments: Any) -> None:
            # All that is signed but the first, which a reply is waited for, for a time.
            if calls and failures:
                raise failures.pop()
            sign(*arguments)

        signer.sign = fail
        fault: Any = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transforms.invoke.invoke.shared_function", lambda _: function)
            invoker = make_invoker(InvokeConfig(config, RetryPolicy(), NONE))
        invoker.submit(_batches(3))
        assert invoker.wait(lambda i: bool(i.broken) or not i.pending_batches, 30)
        assert invoker.broken is None
        assert not failures
        assert calls == [[0], [1], [2]]
        invoker.stop()
        invoker.join(30)
        failures.append(error)
        fault = function.prepare(b"[1]")
    assert isinstance(fault, Fault)
    assert (fault.status_code, fault.code) == (0, type(error).__name__)
    assert classify_fault(fault).kind is Kind.TRANSIENT


def _batches(count: int) -> list[Batch]:
    return [
        Batch("t", 0, n, n + 1, Records([n], [1], [None], [b"v"], [None]), [b"%d" % n])
        for n in range(count)
    ]


def test_what_a_reply_carries() -> None:
    """Payload, version, request id, the end of the log; and an error of the function."""

    def handler(event: Any, context: Any) -> Any:
        if event == "fail":
            raise ValueError("no good")
        return [event, context.client_context and context.client_context.custom]

    with LambdaServer([FunctionSpec("f", handler)]) as server:
        function = here(server.url, log_tail=True)
        context = base64.b64encode(b'{"custom":{"a":"b"}}').decode()
        reply = function.invoke('"é"'.encode(), context)
        failed = function.invoke(b'"fail"')
    assert isinstance(reply, Reply)
    assert json.loads(reply.payload) == ["é", {"a": "b"}]
    assert (reply.status_code, reply.function_error) == (200, None)
    assert reply.executed_version == "$LATEST"
    assert reply.request_id
    assert reply.log_result
    assert isinstance(failed, Reply)
    assert failed.function_error
    assert json.loads(failed.payload)["errorType"] == "ValueError"


def test_an_event_is_accepted() -> None:
    """Lambda says so with 202 and nothing else."""
    with LambdaServer([FunctionSpec("f", echo)]) as server:
        config = FunctionConfig("f", "async", "us-east-1", endpoint_url=server.url)
        reply = LambdaFunction(config).invoke(b"[1]")
        assert isinstance(reply, Reply)
        assert (reply.status_code, reply.payload) == (202, b"")
        (call,) = server.wait_for_calls(1)
        assert call.payload == b"[1]"


def test_signatures_are_accepted() -> None:
    """By a server that computes them itself; and a wrong secret is not."""
    with LambdaServer([FunctionSpec("f", echo)], credentials={"AKIDCALLER": "secret"}) as server:
        context = base64.b64encode(b"{}").decode()
        for function in (here(server.url), here(server.url, "f:$LATEST", log_tail=True)):
            function.check()
            assert isinstance(function.invoke(b"[1]", context), Reply)
    with LambdaServer([FunctionSpec("f", echo)], credentials={"AKIDCALLER": "other"}) as server:
        fault = here(server.url).invoke(b"[1]")
        assert isinstance(fault, Fault)
        assert (fault.status_code, fault.code) == (403, "InvalidSignatureException")


def test_a_check_runs_nothing() -> None:
    """A DryRun over the way that invocations go."""
    events: list[Any] = []
    with LambdaServer([FunctionSpec("f", lambda event, context: events.append(event))]) as server:
        here(server.url).check()
        assert not events
        with pytest.raises(FunctionConfigError, match=r"ResourceNotFoundException.*--function and"):
            here(server.url, "g").check()


def test_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is sent, and no reason to try again."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fault = here("http://127.0.0.1:9").prepare(b"[1]")
    assert isinstance(fault, Fault)
    assert (fault.status_code, fault.code) == (400, "NoCredentialsError")


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_certificates_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """Trusted in the place of the usual ones."""
    certificate = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with peer(OK, tls=tls) as server:
        url = f"https://localhost:{server.port}"
        fault = here(url).invoke(b"[1]")
        assert isinstance(fault, Fault)
        assert fault.code == "SSLError"
        monkeypatch.setenv(variable, str(certificate))
        reply = here(url).invoke(b"[1]")
        assert isinstance(reply, Reply)
        assert reply.payload == b"ok"


def test_certificates_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is named at the start, not at the first invocation."""
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(FunctionConfigError, match=r"FileNotFoundError.*"):
        here("https://localhost:9")


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:{}", "127.0.0.1:{}", "//127.0.0.1:{}"])
def test_a_proxy_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """It is gone through, but for the hosts that are excepted."""
    with peer(OK) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.format(server.port))
        monkeypatch.setenv("http_proxy", proxy.format(server.port))
        reply = here("http://there:9").invoke(b"[1]")
        assert isinstance(reply, Reply)
        assert server.received[0].startswith(b"POST http://there:9/2015-03-31/functions/f/invoc")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with LambdaServer([FunctionSpec("f", echo)]) as direct:
            assert isinstance(here(direct.url).invoke(b"[1]"), Reply)
        assert len(server.received) == 1


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, without the password."""
    monkeypatch.setenv("https_proxy", "http://me:secret@127.0.0.1:9")
    fault = here("https://there").invoke(b"[1]")
    assert isinstance(fault, Fault)
    assert fault.code == "ProxyConnectionError"
    assert "127.0.0.1:9" in fault.message
    assert "secret" not in fault.message
