"""The client: names, credentials, and what is sent when."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from moto import mock_aws

from pipeline.local.lambda_server import FunctionSpec, LambdaServer
from transforms.aws import FunctionConfig, LambdaFunction, make_client
from transforms.errors import FunctionConfigError
from transforms.outcome import Reply


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of nobody, and no profile of whoever runs the tests."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDCALLER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


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


def test_a_prepared_call_waits_for_its_turn() -> None:
    """Nothing reaches the function before the hold lets go; then the reply comes as always."""
    asked, let_go = threading.Event(), threading.Event()

    def hold() -> bool:
        asked.set()
        return let_go.wait(30)

    results: list[Any] = []
    with LambdaServer([FunctionSpec("f", lambda event, context: event)]) as server:
        function = LambdaFunction(FunctionConfig("f", region="us-east-1", endpoint_url=server.url))
        caller = threading.Thread(
            target=lambda: results.append(function.invoke_ahead(b"[1]", hold))
        )
        caller.start()
        assert asked.wait(30)
        assert not server.calls
        let_go.set()
        caller.join(30)
        (result,) = results
        assert isinstance(result, Reply)
        assert result.payload == b"[1]"
        assert len(server.calls) == 1


def test_a_prepared_call_that_is_dropped_sends_nothing() -> None:
    """It is None, the function is not invoked, and the next call of the thread goes out."""
    with LambdaServer([FunctionSpec("f", lambda event, context: event)]) as server:
        function = LambdaFunction(FunctionConfig("f", region="us-east-1", endpoint_url=server.url))
        assert function.invoke_ahead(b"[1]", lambda: False) is None
        assert isinstance(function.invoke(b"[2]"), Reply)
        assert [call.payload for call in server.calls] == [b"[2]"]
