"""Login: how clients log in with IAM, and what contradicts a login. Pure: no client, no clock.

librdkafka has no `AWS_MSK_IAM`. What it has, `OAUTHBEARER`, MSK takes too, with the tokens of
`transforms.aws.msk`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transforms.aws.credentials import Identity
from transforms.aws.msk import TokenConfig
from transforms.java_login import (
    MECHANISM,
    PREFIX,
    PROFILE,
    REGION,
    ROLE,
    SESSION_NAME,
    SETTINGS,
    STS_REGION,
)

_MECHANISMS = ("sasl.mechanism", "sasl.mechanisms")
_PROTOCOL = "security.protocol"
_SASL_SSL = "SASL_SSL"

_BROKER = re.compile(
    r"(?:\w+://)?[^:/\s]+\.kafka(?:-serverless)?\.(?P<region>[a-z0-9-]+)"
    r"\.amazonaws\.com(?:\.cn)?:(?P<port>\d+)"
)
_ARN = re.compile(r"arn:aws[a-zA-Z-]*:kafka:([a-z0-9-]+):")

# What MSK listens for at which port: in its network, from outside, and with IPv6.
IAM_LOGIN, TLS_LOGIN = "IAM", "SSL"
_PLAIN, _SCRAM = "PLAINTEXT", "SASL_SSL with SCRAM-SHA-512"
PORTS = {
    **dict.fromkeys((9092, 20092), _PLAIN),
    **dict.fromkeys((9094, 9194, 20094), TLS_LOGIN),
    **dict.fromkeys((9096, 9196, 20096), _SCRAM),
    **dict.fromkeys((9098, 9198, 20098), IAM_LOGIN),
}

_LINES = {
    _PLAIN: "no security.protocol",
    TLS_LOGIN: "security.protocol=SSL",
    _SCRAM: "security.protocol=SASL_SSL, sasl.mechanism=SCRAM-SHA-512, sasl.username and "
    "sasl.password",
    IAM_LOGIN: f"security.protocol=SASL_SSL and sasl.mechanism={MECHANISM}",
}


@dataclass(frozen=True, slots=True)
class AwsLogin:
    """What options say of a login with IAM; the properties file says the rest.

    Attributes:
        role_arn: Role to assume for Kafka, or None.
        web_identity: Whose token it is assumed with; see `Identity`.
        token_audience: Audience of that token.
        region: Of the cluster, where neither the properties file nor the brokers' names say it.
    """

    role_arn: str | None = None
    web_identity: str | None = None
    token_audience: str = "sts.amazonaws.com"
    region: str | None = None


class LoginError(ValueError):
    """Settings of a login do not fit; says what in one line, never a secret."""


def mechanism_of(settings: Mapping[str, Any]) -> str:
    """The SASL mechanism of a client, by either of its names."""
    return next((str(settings[name]).strip() for name in _MECHANISMS if name in settings), "")


def put_over(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others over them, where the mechanism may go by either of its names."""
    if any(name in more for name in _MECHANISMS):
        settings = {name: value for name, value in settings.items() if name not in _MECHANISMS}
    return {**settings, **more}


def uses_iam(settings: Mapping[str, Any]) -> bool:
    """Whether a client's settings say that it logs in with IAM."""
    return mechanism_of(settings) == MECHANISM


def region_of_servers(servers: str) -> str | None:
    """The region that the brokers' names have; None if they have none, or several."""
    found = [_BROKER.fullmatch(server.strip()) for server in servers.split(",")]
    regions = {match["region"] for match in found if match}
    return regions.pop() if len(regions) == 1 else None


def region_of_arn(arn: str | None) -> str | None:
    """The region in a cluster's ARN."""
    found = _ARN.match(arn or "")
    return found[1] if found else None


def take_iam(
    settings: Mapping[str, Any], login: AwsLogin
) -> tuple[dict[str, Any], TokenConfig | None]:
    """A client's settings as librdkafka has them, and whose tokens it is to log in with.

    Args:
        settings: With what is meant for us among them.
        login: What options say.

    Raises:
        LoginError: They do not fit.
    """
    ours = {name: str(value) for name, value in settings.items() if name.startswith(PREFIX)}
    theirs = {name: value for name, value in settings.items() if name not in ours}
    if unknown := sorted(ours.keys() - set(SETTINGS)):
        raise LoginError(f"{unknown[0]} is not known; known are {', '.join(SETTINGS)}")
    if not uses_iam(settings):
        if ours:
            raise LoginError(f"{min(ours)} goes with sasl.mechanism={MECHANISM} only")
        return theirs, None
    protocol = str(theirs.get(_PROTOCOL, _SASL_SSL))
    if protocol.upper() != _SASL_SSL:
        raise LoginError(
            f"sasl.mechanism={MECHANISM} needs {_PROTOCOL}={_SASL_SSL}, not {protocol}"
        )
    region = ours.get(REGION) or region_of_servers(str(theirs["bootstrap.servers"]))
    region = region or login.region
    if not region:
        raise LoginError(
            f"sasl.mechanism={MECHANISM} needs the region of the cluster, which the names of the "
            f"brokers do not tell; give {REGION}=... in --kafka_config_file"
        )
    identity = Identity(
        ours.get(ROLE) or login.role_arn,
        login.web_identity if (ours.get(ROLE) or login.role_arn) else None,
        login.token_audience,
        **({"session_name": ours[SESSION_NAME]} if SESSION_NAME in ours else {}),
        profile=ours.get(PROFILE),
    )
    theirs = {name: value for name, value in theirs.items() if name not in _MECHANISMS}
    theirs |= {_PROTOCOL: _SASL_SSL, "sasl.mechanism": "OAUTHBEARER"}
    return theirs, TokenConfig(region, identity, ours.get(STS_REGION))


def login_at(servers: str) -> str | None:
    """What MSK has at the ports of brokers; None if they are not MSK's, or of several kinds."""
    found = [_BROKER.fullmatch(server.strip()) for server in servers.split(",")]
    logins = {PORTS.get(int(match["port"])) if match else None for match in found}
    return logins.pop() if len(logins) == 1 else None


def contradictions(servers: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong about brokers of MSK whose port is for another login than the settings'.

    Brokers by other names than MSK's may have any port.
    """
    ours = _login_of(settings)
    told = set()
    for server in servers.split(","):
        found = _BROKER.fullmatch(server.strip())
        wanted = PORTS.get(int(found["port"])) if found else None
        if wanted and ours and wanted != ours and wanted not in told:
            told.add(wanted)
            right = ", ".join(str(port) for port, login in PORTS.items() if login == ours)
            instead = f"; the ports of {ours} are {right}" if right else ""
            yield (
                f"{server.strip()}: MSK has {wanted} at this port, and the settings are those of "
                f"{ours}; give {_LINES[wanted]} in --kafka_config_file{instead}"
            )


def _login_of(settings: Mapping[str, Any]) -> str | None:
    """Which of MSK's logins the settings are; None if they may be any."""
    protocol = str(settings.get(_PROTOCOL, "")).upper()
    mechanism = mechanism_of(settings)
    if mechanism == MECHANISM:
        return IAM_LOGIN
    # With tokens of somebody else's making it is up to them.
    if mechanism == "OAUTHBEARER":
        return None
    if protocol == _SASL_SSL:
        return _SCRAM if mechanism.startswith("SCRAM") else f"SASL_SSL with {mechanism or 'GSSAPI'}"
    return {"": _PLAIN, "PLAINTEXT": _PLAIN, "SSL": TLS_LOGIN}.get(protocol, protocol)


def explain_refusal(text: str, tokens: TokenConfig) -> str:
    """What a broker says of a login with IAM, with what to look at.

    Args:
        text: What it says, as one line.
        tokens: Whose tokens it was.
    """
    low = text.lower()
    if "too many connects" in low:
        return f"{text}; MSK takes so many connections a second only, it is tried again"
    if "mechanism" in low and ("not supported" in low or "not enabled" in low):
        return f"{text}; is it the port of IAM, 9098 (9198 from outside)?"
    if "access denied" in low or "invalid_token" in low or "authentication fail" in low:
        role = tokens.identity.role_arn
        who = f"the role {role} needs" if role else "the AWS credentials need"
        return (
            f"{text}; {who} the right kafka-cluster:Connect, the cluster has to be in "
            f"{tokens.region}, the credentials may have expired, or this machine's clock is off"
        )
    return text
