"""Logins with IAM: from settings to whose tokens, and ports that contradict them."""

from __future__ import annotations

from typing import Any

import pytest

from transforms.aws.credentials import Identity
from transforms.aws.msk import TokenConfig
from transforms.kafka.login import (
    PORTS,
    AwsLogin,
    LoginError,
    contradictions,
    explain_refusal,
    put_over,
    region_of_arn,
    region_of_servers,
    take_iam,
)

MSK = "b-1.orders.a1b2c3.c2.kafka.eu-west-1.amazonaws.com"
SERVERLESS = "boot-a1b2c3.c1.kafka-serverless.us-east-1.amazonaws.com"
CHINA = "b-1.orders.a1b2c3.c2.kafka.cn-north-1.amazonaws.com.cn"
ROLE, OTHER = "arn:aws:iam::123456789012:role/read", "arn:aws:iam::123456789012:role/other"
IAM = {"security.protocol": "SASL_SSL", "sasl.mechanism": "AWS_MSK_IAM"}


@pytest.mark.parametrize(
    ("servers", "region"),
    [
        (f"{MSK}:9098", "eu-west-1"),
        (f"{MSK}:9098, {MSK}:9098", "eu-west-1"),
        (f"SASL_SSL://{MSK}:9098", "eu-west-1"),
        (f"{SERVERLESS}:9098", "us-east-1"),
        (f"{CHINA}:9098", "cn-north-1"),
        (f"{MSK}:9098,{SERVERLESS}:9098", None),
        ("kafka.eu-west-1.example.com:9098", None),
        (f"{MSK}.example.com:9098", None),
        ("127.0.0.1:9098", None),
    ],
)
def test_the_region_in_the_names_of_brokers(servers: str, region: str | None) -> None:
    """A name that is not MSK's says nothing, whatever it looks like."""
    assert region_of_servers(servers) == region


def test_the_region_in_an_arn() -> None:
    assert region_of_arn("arn:aws:kafka:eu-central-1:123456789012:cluster/o/5a") == "eu-central-1"
    assert region_of_arn(None) is None


NO_OPTIONS = AwsLogin()


def taken(servers: str = f"{MSK}:9098", login: AwsLogin = NO_OPTIONS, **more: str) -> Any:
    """Whose tokens; an underscore stands for each dot in the name of a setting."""
    own = {name.replace("_", "."): text for name, text in more.items()}
    return take_iam({**IAM, "bootstrap.servers": servers, **own}, login)[1]


def test_settings_become_those_that_librdkafka_has() -> None:
    """Nothing of ours is left among them; without IAM they stay what they are."""
    ours = {"bootstrap.servers": f"{MSK}:9098", "sasl.mechanisms": "AWS_MSK_IAM", "linger.ms": "1"}
    theirs, tokens = take_iam({**ours, "aws.msk.region": "eu-west-2"}, NO_OPTIONS)
    assert theirs == {
        "bootstrap.servers": f"{MSK}:9098",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "OAUTHBEARER",
        "linger.ms": "1",
    }
    assert tokens == TokenConfig("eu-west-2")
    plain = {"bootstrap.servers": "b:9092", "sasl.mechanism": "PLAIN"}
    assert take_iam(plain, NO_OPTIONS) == (plain, None)


@pytest.mark.parametrize("other", ["sasl.mechanism", "sasl.mechanisms"])
def test_the_mechanism_goes_by_either_name(other: str) -> None:
    """What is over it wins, whichever of them it has."""
    assert put_over(IAM, {other: "PLAIN"}) == {"security.protocol": "SASL_SSL", other: "PLAIN"}
    assert put_over({other: "PLAIN"}, {"linger.ms": "1"}) == {other: "PLAIN", "linger.ms": "1"}


def test_where_the_region_is_from() -> None:
    """What the file says, the names of the brokers, the options, in this order."""
    login = AwsLogin(region="eu-west-3")
    assert taken(login=login, aws_msk_region="eu-west-2").region == "eu-west-2"
    assert taken(login=login).region == "eu-west-1"
    assert taken("10.0.0.1:9098", login).region == "eu-west-3"
    with pytest.raises(LoginError, match=r"needs the region .* give aws\.msk\.region="):
        taken("10.0.0.1:9098")


def test_who_we_are() -> None:
    """The role of the options, unless the settings of this client have another one."""
    assert taken().identity == Identity()
    login = AwsLogin(ROLE, "google", "orders")
    assert taken(login=login).identity == Identity(ROLE, "google", "orders")
    assert taken(login=login, aws_msk_role_arn=OTHER).identity.role_arn == OTHER
    # The identity of Google assumes roles and is nobody by itself.
    assert taken(login=AwsLogin(None, "google")).identity.web_identity is None
    named = taken(aws_msk_role_session_name="me", aws_msk_profile="p", aws_msk_sts_region="r")
    assert named.identity == Identity(session_name="me", profile="p")
    assert named.sts_region == "r"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**IAM, "security.protocol": "SASL_PLAINTEXT"}, "needs security.protocol=SASL_SSL, not S"),
        ({**IAM, "aws.msk.secret": "s3cret"}, "aws.msk.secret is not known; known are aws.msk.reg"),
        ({"aws.msk.region": "x"}, "aws.msk.region goes with sasl.mechanism=AWS_MSK_IAM only"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, str], said: str) -> None:
    with pytest.raises(LoginError) as raised:
        take_iam({"bootstrap.servers": f"{MSK}:9098", **settings}, NO_OPTIONS)
    assert said in str(raised.value)
    assert "s3cret" not in str(raised.value)


LOGINS: dict[str, dict[str, str]] = {
    "PLAINTEXT": {},
    "SSL": {"security.protocol": "ssl"},
    "SASL_SSL with SCRAM-SHA-512": {
        "security.protocol": "SASL_SSL",
        "sasl.mechanisms": "SCRAM-SHA-512",
    },
    "IAM": IAM,
}


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("port", PORTS)
def test_each_port_of_msk_is_for_one_login(login: str, port: int) -> None:
    found = list(contradictions(f"{MSK}:{port}", LOGINS[login]))
    if PORTS[port] == login:
        assert found == []
    else:
        assert len(found) == 1
        assert f"{MSK}:{port}: MSK has {PORTS[port]} at this port" in found[0]
        right = next(str(port) for port, other in PORTS.items() if other == login)
        assert f"the ports of {login} are {right}" in found[0]


@pytest.mark.parametrize(
    ("servers", "settings"),
    [
        ("10.0.0.1:9092", IAM),
        (f"{MSK}.example.com:9092", IAM),
        (f"{MSK}:14001", IAM),
        (f"{MSK}:9098", {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}),
    ],
)
def test_what_may_be_meant(servers: str, settings: dict[str, str]) -> None:
    """Names and ports that are not MSK's own, and tokens that somebody else makes."""
    assert list(contradictions(servers, settings)) == []


def test_many_brokers_are_one_line() -> None:
    assert len(list(contradictions(f"{MSK}:9092,{MSK}:9092,{MSK}:9094", IAM))) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SASL authentication error: [1]: Access denied", "the right kafka-cluster:Connect"),
        ("SASL authentication error: [1]: Access denied", f"the role {ROLE} needs"),
        ("SASL mechanism OAUTHBEARER not supported by broker", "the port of IAM, 9098"),
        ("[1]: Too many connects", "it is tried again"),
    ],
)
def test_what_a_refusal_means(text: str, said: str) -> None:
    found = explain_refusal(text, TokenConfig("eu-west-1", Identity(ROLE)))
    assert found.startswith(text)
    assert said in found
    assert explain_refusal("Disconnected", TokenConfig("eu-west-1")) == "Disconnected"
