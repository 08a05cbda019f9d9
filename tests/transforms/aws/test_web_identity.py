"""AWS credentials without keys: Google's token, the role it is exchanged for, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.exceptions import MetadataRetrievalError
from moto import mock_aws

from tests.servers.web_server import Quiet, WebServer
from transforms.aws.answers import Fault
from transforms.aws.function import FunctionConfig, LambdaFunction, Request
from transforms.aws.web_identity import google_token
from transforms.errors import FunctionConfigError

ROLE = "arn:aws:iam::123456789012:role/invoke"
CONFIG = FunctionConfig(
    "f",
    region="eu-central-1",
    role_arn=ROLE,
    web_identity="google",
    token_audience="orders",
    endpoint_url="http://127.0.0.1:1",
)


class _Server:
    """A server whose answers are `answer`'s, for each request: status, headers, body."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, list[str]]]] = []
        server = self

        class Handler(Quiet):
            def _handle(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                query = parse_qs(parts.query or body)
                server.asked.append((parts.path, dict(self.headers), query))
                status, headers, content = server.answer(query)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

            do_GET = do_POST = _handle

        self._http = WebServer(Handler)
        self.address = self._http.url.removeprefix("http://")
        self._http.start()

    def answer(self, query: dict[str, list[str]]) -> tuple[int, dict[str, str], str]:
        raise NotImplementedError

    def close(self) -> None:
        self._http.close()


class Metadata(_Server):
    """Google's metadata server.

    Attributes:
        failures: How many requests are answered with 503 first.
        flavor: What says that it is Google's.
    """

    failures = 0
    flavor = "Google"

    def answer(self, query: dict[str, list[str]]) -> tuple[int, dict[str, str], str]:
        if self.failures:
            self.failures -= 1
            return 503, {}, "not yet"
        token = f"token-{len(self.asked)}-for-{query['audience'][0]}\n"
        return 200, {"Metadata-Flavor": self.flavor}, token


class Sts(_Server):
    """AWS's token service.

    Attributes:
        lifetime_secs: Of the credentials.
        refusal: Code that requests are refused with.
    """

    lifetime_secs = 3600.0
    refusal = ""

    def answer(self, query: dict[str, list[str]]) -> tuple[int, dict[str, str], str]:
        xml = {"Content-Type": "text/xml"}
        if self.refusal:
            error = f"<Type>Sender</Type><Code>{self.refusal}</Code><Message>no</Message>"
            return 400, xml, f"<ErrorResponse><Error>{error}</Error></ErrorResponse>"
        until = datetime.now(timezone.utc) + timedelta(seconds=self.lifetime_secs)
        number = len(self.asked)
        credentials = (
            f"<AccessKeyId>ASIAROLE{number}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
            f"<SessionToken>session-{number}</SessionToken><Expiration>{until.isoformat()}</Expiration>"
        )
        result = (
            f"<Credentials>{credentials}</Credentials><AssumedRoleUser><AssumedRoleId>A:b"
            f"</AssumedRoleId><Arn>{ROLE}</Arn></AssumedRoleUser>"
        )
        kind = "AssumeRoleWithWebIdentity"
        return 200, xml, f"<{kind}Response><{kind}Result>{result}</{kind}Result></{kind}Response>"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    server = Metadata()
    monkeypatch.setenv("GCE_METADATA_HOST", server.address)
    # The token must not go where a proxy may read it.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    yield server
    server.close()


@pytest.fixture
def sts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sts]:
    server = Sts()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{server.address}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no keys on this machine, and nobody to give any."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


# -- the token -------------------------------------------------------------------------------------


def test_the_token_is_asked_for_as_google_wants_it(metadata: Metadata) -> None:
    assert google_token("orders") == "token-1-for-orders"
    ((path, headers, query),) = metadata.asked
    assert path == "/computeMetadata/v1/instance/service-accounts/default/identity"
    assert headers["Metadata-Flavor"] == "Google"
    assert query == {"audience": ["orders"], "format": ["full"]}


def test_a_machine_that_has_just_started_is_waited_for(metadata: Metadata) -> None:
    metadata.failures = 2
    slept: list[float] = []
    assert google_token("orders", slept.append) == "token-3-for-orders"
    assert slept == [1.0, 2.0]


def test_after_some_attempts_it_is_given_up(metadata: Metadata) -> None:
    metadata.failures = 99
    with pytest.raises(MetadataRetrievalError, match="gives no identity token: HTTP Error 503"):
        google_token("orders", lambda _: None)
    assert len(metadata.asked) == 4


def test_another_server_of_that_name_is_not_believed(metadata: Metadata) -> None:
    metadata.flavor = "Other"
    with pytest.raises(MetadataRetrievalError, match="is not Google's metadata server"):
        google_token("orders", lambda _: None)


def test_without_a_metadata_server_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with pytest.raises(MetadataRetrievalError, match=r"127\.0\.0\.1:1 gives no identity token"):
        google_token("orders", lambda _: None)


# -- the role --------------------------------------------------------------------------------------


def _key_of(request: Request | Fault) -> str:
    assert isinstance(request, Request), request
    return request.head.headers["Authorization"].partition("Credential=")[2].partition("/")[0]


def test_the_token_is_exchanged_for_the_role_without_a_signature(
    metadata: Metadata, sts: Sts
) -> None:
    function = LambdaFunction(CONFIG)
    request = function.prepare(b"{}")
    ((_, headers, asked),) = sts.asked
    assert asked["Action"] == ["AssumeRoleWithWebIdentity"]
    assert asked["RoleArn"] == [ROLE]
    assert asked["RoleSessionName"] == ["beam-lambda-sink"]
    assert asked["WebIdentityToken"] == ["token-1-for-orders"]
    assert "Authorization" not in headers
    assert _key_of(request) == "ASIAROLE1"
    assert isinstance(request, Request)
    assert request.head.headers["X-Amz-Security-Token"] == "session-1"


def test_credentials_serve_until_shortly_before_they_expire(metadata: Metadata, sts: Sts) -> None:
    function = LambdaFunction(CONFIG)
    assert {_key_of(function.prepare(b"{}")) for _ in range(50)} == {"ASIAROLE1"}
    assert len(metadata.asked) == len(sts.asked) == 1


def test_credentials_are_renewed_with_a_new_token(metadata: Metadata, sts: Sts) -> None:
    """Those that are about to expire serve for no further request."""
    sts.lifetime_secs = 60.0
    function = LambdaFunction(CONFIG)
    keys = [_key_of(function.prepare(b"{}")) for _ in range(3)]
    assert keys == ["ASIAROLE1", "ASIAROLE2", "ASIAROLE3"]
    tokens = [asked["WebIdentityToken"][0] for _, _, asked in sts.asked]
    assert tokens == [f"token-{number}-for-orders" for number in (1, 2, 3)]


@mock_aws
def test_moto_s_token_service_takes_the_exchange(metadata: Metadata) -> None:
    """Not only ours: an implementation of AWS's that checks the request's form."""
    request = LambdaFunction(CONFIG).prepare(b"{}")
    assert _key_of(request).startswith("ASIA")
    assert isinstance(request, Request)
    assert request.head.headers["X-Amz-Security-Token"]


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        ("InvalidIdentityToken", "check the trust policy of --aws_role_arn: accounts.google.com"),
        ("AccessDenied", "check --aws_role_arn and its trust policy"),
    ],
)
def test_a_refusal_of_aws_says_what_to_look_at(
    metadata: Metadata, sts: Sts, refusal: str, advice: str
) -> None:
    sts.refusal = refusal
    with pytest.raises(FunctionConfigError) as raised:
        LambdaFunction(CONFIG).check()
    assert str(raised.value) == f"--function=f cannot be invoked: {refusal}: no; {advice}"
    assert "token-1" not in str(raised.value)


def test_away_from_google_cloud_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setattr("transforms.aws.web_identity._DELAY_SECS", 0.0)
    with pytest.raises(FunctionConfigError) as raised:
        LambdaFunction(CONFIG).check()
    said = str(raised.value)
    assert said.startswith("--function=f cannot be invoked: MetadataRetrievalError: ")
    assert "--aws_web_identity=google needs a machine of Google Cloud" in said
    assert "\n" not in said


def test_an_outage_of_the_metadata_server_is_a_passing_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An invocation waits for it, as for any network."""
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setattr("transforms.aws.web_identity._DELAY_SECS", 0.0)
    result = LambdaFunction(CONFIG).prepare(b"{}")
    assert isinstance(result, Fault)
    assert result.status_code == 0
