"""Logins as event source mappings name them, through to settings of clients."""

from __future__ import annotations

import json
from typing import Any

import pytest

from transforms.access import (
    Access,
    AccessError,
    kafka_settings,
    login_settings,
    parse_access,
    registry_settings,
)

ARN = "arn:aws:secretsmanager:us-east-1:123456789012:secret:orders-Ab12Cd"
USER = {"username": "u", "password": "s3cret"}
CERTIFICATE = {"certificate": "CERT", "privateKey": "KEY"}
OAUTH = {"oauthTokenEndpointUrl": "https://t", "oauthClientId": "c", "oauthClientSecret": "s3cret"}
JWT = {
    "oauthTokenEndpointUrl": "https://t",
    "oauthClientId": "c",
    "oauthClientEmail": "e@x",
    "oauthPrivateKey": "KEY",
    "oauthTokenExpirationSeconds": 300,
    "oauthIdpCaCertificate": "CA",
}
SASL = {"security.protocol": "SASL_SSL"}
BEARER = {**SASL, "sasl.mechanism": "OAUTHBEARER", "sasl.oauthbearer.method": "oidc"}
LOGIN = {"sasl.username": "u", "sasl.password": "s3cret"}


def of(*texts: str, **secret: Any) -> dict[str, str]:
    return kafka_settings(parse_access(texts), lambda arn: json.dumps(secret), "eu-west-1")


@pytest.mark.parametrize(
    ("texts", "secret", "settings"),
    [
        ([f"BASIC_AUTH={ARN}"], USER, {**SASL, "sasl.mechanism": "PLAIN", **LOGIN}),
        (
            [f"SASL_SCRAM_256_AUTH={ARN}"],
            USER,
            {**SASL, "sasl.mechanism": "SCRAM-SHA-256", **LOGIN},
        ),
        (
            [f"SASL_SCRAM_512_AUTH={ARN}"],
            USER,
            {**SASL, "sasl.mechanism": "SCRAM-SHA-512", **LOGIN},
        ),
        (
            [f"CLIENT_CERTIFICATE_TLS_AUTH={ARN}", f"SERVER_ROOT_CA_CERTIFICATE={ARN}"],
            {**CERTIFICATE, "privateKeyPassword": "s3cret"},
            {
                "security.protocol": "SSL",
                "ssl.certificate.pem": "CERT",
                "ssl.key.pem": "KEY",
                "ssl.key.password": "s3cret",
                "ssl.ca.pem": "CERT",
            },
        ),
        (
            [
                f"OAUTHBEARER_AUTH={ARN}",
                "OAUTHBEARER_SCOPE=a b",
                "OAUTHBEARER_LOGICAL_CLUSTER=lkc-1",
                "OAUTHBEARER_IDENTITY_POOL=pool-2",
            ],
            OAUTH,
            {
                **BEARER,
                "sasl.oauthbearer.token.endpoint.url": "https://t",
                "sasl.oauthbearer.client.id": "c",
                "sasl.oauthbearer.client.secret": "s3cret",
                "sasl.oauthbearer.scope": "a b",
                "sasl.oauthbearer.extensions": "logicalCluster=lkc-1,identityPoolId=pool-2",
            },
        ),
        (
            [f"OAUTHBEARER_AUTH={ARN}", "OAUTHBEARER_AUDIENCE=them"],
            JWT,
            {
                **BEARER,
                "sasl.oauthbearer.token.endpoint.url": "https://t",
                "sasl.oauthbearer.client.id": "c",
                "sasl.oauthbearer.grant.type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
                "sasl.oauthbearer.assertion.private.key.pem": "KEY",
                "sasl.oauthbearer.assertion.claim.iss": "e@x",
                "sasl.oauthbearer.assertion.claim.sub": "e@x",
                "sasl.oauthbearer.assertion.claim.aud": "them",
                "sasl.oauthbearer.assertion.claim.exp.seconds": "300",
                "https.ca.pem": "CA",
            },
        ),
        (["IAM_AUTH=x"], {}, {**SASL, "sasl.mechanism": "AWS_MSK_IAM"}),
        (
            ["IAM_OAUTHBEARER_AUTH", "OAUTHBEARER_AUDIENCE=a,b"],
            {},
            {
                **BEARER,
                "sasl.oauthbearer.metadata.authentication.type": "aws_iam",
                "sasl.oauthbearer.config": "region=eu-west-1,audience=a\\,b",
            },
        ),
        (["TLS"], {}, {"security.protocol": "SSL"}),
        ([], {}, {}),
    ],
)
def test_each_type_becomes_settings(
    texts: list[str], secret: dict[str, Any], settings: dict[str, str]
) -> None:
    assert of(*texts, **secret) == settings
    # What needs no secret is known without one.
    plain = login_settings(parse_access(texts), "eu-west-1")
    assert plain.items() <= settings.items()
    assert "s3cret" not in str(plain)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["NEW_AUTH=x"], "NEW_AUTH is not known; give one of BASIC_AUTH"),
        (["BASIC_AUTH=s3cret"], "BASIC_AUTH needs the ARN of a secret"),
        (["OAUTHBEARER_SCOPE="], "OAUTHBEARER_SCOPE needs a text"),
        (["OAUTHBEARER_SCOPE=x"], "OAUTHBEARER_SCOPE goes with OAUTHBEARER_AUTH only"),
        (["OAUTHBEARER_AUDIENCE=x"], "goes with OAUTHBEARER_AUTH or IAM_OAUTHBEARER_AUTH only"),
        (["IAM_OAUTHBEARER_AUTH"], "IAM_OAUTHBEARER_AUTH needs OAUTHBEARER_AUDIENCE"),
        ([f"BASIC_AUTH={ARN}", "IAM_AUTH"], "BASIC_AUTH and IAM_AUTH are two logins"),
        (["IAM_AUTH", "IAM_AUTH"], "IAM_AUTH is given twice"),
    ],
)
def test_what_does_not_fit(texts: list[str], said: str) -> None:
    with pytest.raises(AccessError) as raised:
        parse_access(texts)
    assert said in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3cret", "is not a JSON object"),
        ('["s3cret"]', "is not a JSON object"),
        ('{"username": "u"}', "has no password"),
        ('{"username": "u", "password": ""}', "has no password"),
        ('{"username": "u", "password": ["s3cret"]}', "has password, and it is not a text"),
    ],
)
def test_a_secret_that_has_not_what_it_needs(text: str, said: str) -> None:
    """The secret's ARN is named, and nothing of what is in it."""
    with pytest.raises(AccessError) as raised:
        kafka_settings([Access("BASIC_AUTH", ARN)], lambda arn: text)
    assert f"BASIC_AUTH: the secret {ARN} {said}" in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_an_audience_that_a_clients_secret_cannot_ask_for() -> None:
    with pytest.raises(AccessError, match="librdkafka asks for no audience"):
        of(f"OAUTHBEARER_AUTH={ARN}", "OAUTHBEARER_AUDIENCE=x", **OAUTH)


def test_settings_of_a_registry() -> None:
    """Certificates are apart: its client takes them from files only."""
    access = [Access("BASIC_AUTH", "b"), Access("CLIENT_CERTIFICATE_TLS_AUTH", "c")]
    secrets = {"b": json.dumps(USER), "c": json.dumps(CERTIFICATE)}
    assert registry_settings(access, secrets.__getitem__) == (
        {"basic.auth.user.info": "u:s3cret"},
        {"ssl.certificate.location": "CERT", "ssl.key.location": "KEY"},
    )
