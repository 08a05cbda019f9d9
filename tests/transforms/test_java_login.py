"""The login with IAM as guides to MSK show it, in Java's spelling, through to ours."""

from __future__ import annotations

import pytest

from transforms.errors import UsageError
from transforms.java_login import translate
from transforms.properties import parse_properties

ROLE = "arn:aws:iam::123456789012:role/read"
MODULE = "software.amazon.msk.auth.iam.IAMLoginModule required"
GUIDE = f"""
# Sets up TLS for encryption and SASL for authN.
security.protocol = SASL_SSL
sasl.mechanism = AWS_MSK_IAM
sasl.jaas.config = {MODULE};
sasl.client.callback.handler.class = software.amazon.msk.auth.iam.IAMClientCallbackHandler
"""
BEARER = """
sasl.mechanism=OAUTHBEARER
security.protocol=SASL_SSL
sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required;
sasl.login.callback.handler.class=software.amazon.msk.auth.iam.IAMOAuthBearerLoginCallbackHandler
"""
IAM = {"security.protocol": "SASL_SSL", "sasl.mechanism": "AWS_MSK_IAM"}


@pytest.mark.parametrize("text", [GUIDE, BEARER, BEARER.replace("mechanism=", "mechanisms=")])
def test_lines_of_the_guides(text: str) -> None:
    """Both ways of Amazon's library come to the same."""
    assert parse_properties(text, {}) == IAM


def test_a_login_of_one_topics_producer() -> None:
    """A prefix stays in front of what the line comes to."""
    text = GUIDE + f'error.sasl.jaas.config={MODULE} awsRoleArn="{ROLE}";'
    assert parse_properties(text, {}) == {**IAM, "error.aws.msk.role.arn": ROLE}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (";", {}),
        (" awsDebugCreds=true;", {}),
        (f' awsRoleArn="{ROLE}" ;', {"aws.msk.role.arn": ROLE}),
        (f" awsRoleArn='{ROLE}'", {"aws.msk.role.arn": ROLE}),
        (
            f' awsRoleArn={ROLE} awsRoleSessionName="me" awsStsRegion="eu-west-1" '
            f'awsMaxRetries="7";',
            {
                "aws.msk.role.arn": ROLE,
                "aws.msk.role.session.name": "me",
                "aws.msk.sts.region": "eu-west-1",
            },
        ),
        (' awsProfileName="msk client";', {"aws.msk.profile": "msk client"}),
    ],
)
def test_what_the_module_is_told(options: str, settings: dict[str, str]) -> None:
    assert translate("sasl.jaas.config", MODULE + options) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sasl.jaas.config", "org.apache.kafka.common.security.plain.PlainLoginModule required;"),
        ("sasl.jaas.config", "s3cret"),
        ("sasl.login.callback.handler.class", "org.example.Handler"),
        ("sasl.username", "software.amazon.msk.auth.iam.IAMLoginModule required;"),
    ],
)
def test_other_lines_are_left_alone(name: str, value: str) -> None:
    assert translate(name, value) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (' awsRoleSecretAccessKey="s3cret";', "awsRoleSecretAccessKey is not known here"),
        (" s3cret", "it is not of the form"),
    ],
)
def test_what_is_not_known_is_named_without_its_value(options: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_properties(f"sasl.jaas.config={MODULE}{options}", {})
    assert f"line 1 (sasl.jaas.config): {said}" in str(raised.value)
    assert "s3cret" not in str(raised.value)
