"""What may be shown of what others write."""

from __future__ import annotations

import base64
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.hidden import HIDDEN, hide, quiet, without_request

KEY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\nBKcwggSjAgEAAoIB\n-----END"
NAMES = (
    "sasl.password",
    "ssl.key.password",
    "ssl.keystore.password",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.assertion.private.key.passphrase",
    "sasl.oauthbearer.assertion.private.key.pem",
    "ssl.key.pem",
    "basic.auth.user.info",
    "bearer.auth.token",
)
_SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=4, max_size=40)


@given(st.sampled_from(NAMES), _SECRETS, st.text(max_size=20), st.text(max_size=20))
def test_what_is_quoted_is_hidden(name: str, secret: str, before: str, behind: str) -> None:
    """As it is, and as a login by HTTP has it; the rest of the text stays."""
    assert "*" in secret or secret not in hide(f"{before}{secret}{behind}", {name: secret})
    if "*" not in secret and secret not in "refused: , ":
        encoded = base64.b64encode(secret.encode()).decode()
        said = hide(f"refused: {secret}, {encoded}", {name: secret, "client.id": "refused"})
        assert said == f"refused: {HIDDEN}, {HIDDEN}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"bad key: {KEY}", "bad key: ***"),
        (f"bad key: {' '.join(KEY.split())}", "bad key: ***"),
        ("bad line: MIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "bad line: ***"),
        ("no PLAIN for orders", "no PLAIN for orders"),
    ],
)
def test_a_key_is_hidden_by_its_lines(text: str, shown: str) -> None:
    settings = {"ssl.key.pem": KEY, "sasl.mechanism": "PLAIN", "sasl.username": "orders"}
    assert hide(text, settings) == shown


def test_the_password_of_a_login_is_hidden_without_its_user() -> None:
    assert hide("no s3cret here", {"basic.auth.user.info": "orders:s3cret"}) == "no *** here"


def test_a_request_that_aws_quotes_is_left_out() -> None:
    """It has the token of the session in it."""
    said = "The request signature we calculated does not match. Check your AWS Secret Access Key."
    echo = "\n\nThe Canonical String for this request should have been\n'POST\n/\n\nx-amz-security-"
    assert without_request(said + echo + "token:IQoJb3JpZ2lu'") == said
    assert without_request("Rate exceeded") == "Rate exceeded"


def test_a_worker_that_logs_all_logs_no_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beam's workers log from any level on; a level that somebody has set stays."""
    loggers = [logging.getLogger(name) for name in ("botocore", "boto3")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    with caplog.at_level(logging.WARNING):
        quiet()
    assert [logger.level for logger in loggers] == [logging.NOTSET] * 2
    with caplog.at_level(logging.DEBUG):
        quiet()
    assert [logger.level for logger in loggers] == [logging.INFO] * 2
