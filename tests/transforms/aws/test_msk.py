"""Tokens for MSK: equal to those of AWS's own package, and for how long they are good."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

import botocore.auth
import botocore.exceptions as aws_errors
import pytest
from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
from botocore.credentials import CredentialProvider, Credentials, RefreshableCredentials
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from transforms.aws.credentials import Identity
from transforms.aws.msk import SHARE, TOKEN_SECS, TokenConfig, TokenError, Tokens, sign

NOW = datetime(2026, 11, 2, 3, 4, 5, tzinfo=timezone.utc)
ROLE = "arn:aws:iam::123456789012:role/read"


@pytest.fixture(scope="module", autouse=True)
def _same_clock() -> Iterator[None]:
    """Both sign at the same moment."""
    patch = pytest.MonkeyPatch()
    patch.setattr(botocore.auth, "get_current_datetime", lambda remove_tzinfo=True: NOW)
    yield
    patch.undo()


class _Given(CredentialProvider):
    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def load(self) -> Credentials:
        return self._credentials


_TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)


@given(
    st.builds(Credentials, _TEXT, _TEXT, st.none() | _TEXT),
    st.sampled_from(["us-east-1", "eu-central-1", "cn-north-1", "us-gov-west-1", "me-central-1"]),
)
def test_tokens_are_those_of_the_package_of_aws(credentials: Credentials, region: str) -> None:
    """To the byte, with and without the token of a session."""
    theirs, _ = MSKAuthTokenProvider.generate_auth_token_from_credentials_provider(
        region, _Given(credentials)
    )
    agent = MSKAuthTokenProvider.__get_user_agent__()
    assert sign(credentials, region, agent) == theirs


def test_what_a_token_says() -> None:
    """It names who asks, and holds no secret."""
    token = sign(Credentials("AKID", "s3cret"), "eu-west-1")
    url = urlsplit(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode())
    query = parse_qs(url.query)
    assert url.netloc == "kafka.eu-west-1.amazonaws.com"
    assert query["Action"] == ["kafka-cluster:Connect"]
    assert query["X-Amz-Expires"] == ["900"]
    assert query["User-Agent"] == ["beam-lambda-sink"]
    assert "s3cret" not in url.query


class _Sessions:
    """Opens sessions whose credentials end after so many seconds; counts how often."""

    def __init__(self, *lives: float | None) -> None:
        self._lives = list(lives)
        self.opened = 0
        self.now = NOW

    def __call__(self, identity: Identity, region: str | None, settings: Any) -> Session:
        self.opened += 1
        session = Session()
        session._credentials = self._credentials()
        return session

    def _credentials(self) -> Any:
        life = self._lives.pop(0)
        if life is None:
            return Credentials("AKID", "secret")
        return RefreshableCredentials.create_from_metadata(
            self._fetched(life),
            lambda: self._fetched(self._lives.pop(0) or 0),
            "test",
            advisory_timeout=0,
            mandatory_timeout=0,
        )

    def _fetched(self, life: float) -> dict[str, str]:
        at = datetime.now(timezone.utc) + timedelta(seconds=life)
        return {
            "access_key": f"AKID{life:.0f}",
            "secret_key": "secret",
            "token": "session",
            "expiry_time": at.isoformat(),
        }


@pytest.mark.parametrize(
    ("life", "good_for"),
    [(None, TOKEN_SECS), (3600, TOKEN_SECS), (60, 60), (640, 640)],
)
def test_a_token_is_renewed_long_before_it_or_its_credentials_are_over(
    life: float | None, good_for: float
) -> None:
    """How soon another one is there is up to a busy machine, and to who gives credentials."""
    sessions = _Sessions(life)
    now = datetime.now(timezone.utc).timestamp()
    _, until = Tokens(TokenConfig("us-east-1"), sessions, lambda: now).make()
    assert until - now == pytest.approx(SHARE * good_for, abs=2)


def test_credentials_are_looked_for_once_and_renewed() -> None:
    """The second token is that of new credentials, of the same session."""
    sessions = _Sessions(-1, 1800, 3600)
    tokens = Tokens(TokenConfig("us-east-1"), sessions)
    texts = [base64.urlsafe_b64decode(tokens.make()[0] + "==").decode() for _ in range(2)]
    assert all("AKID1800" in text for text in texts)
    assert sessions.opened == 1


def test_credentials_that_are_over() -> None:
    """They are not signed with; it is said when they ended."""
    now = datetime.now(timezone.utc).timestamp()
    sessions = _Sessions(3600)
    tokens = Tokens(TokenConfig("us-east-1"), sessions, lambda: now + 7200)
    with pytest.raises(TokenError, match=r"expired at 20\d\d-.*, and are not renewed"):
        tokens.make()


def _failing(error: Exception) -> Any:
    def fail(*_: Any) -> Session:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "role", "said"),
    [
        (aws_errors.NoCredentialsError(), None, "there are no AWS credentials; asked were the env"),
        (aws_errors.ProfileNotFound(profile="x"), None, "cannot be had: The config profile (x)"),
        (
            aws_errors.ClientError(
                {"Error": {"Code": "AccessDenied", "Message": "not\nyou"}}, "AssumeRole"
            ),
            ROLE,
            f"the role {ROLE} cannot be assumed: An error occurred (AccessDenied)",
        ),
    ],
)
def test_why_there_is_no_token(error: Exception, role: str | None, said: str) -> None:
    """One line, which names what was tried."""
    tokens = Tokens(TokenConfig("us-east-1", Identity(role)), _failing(error))
    with pytest.raises(TokenError) as raised:
        tokens.make()
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
