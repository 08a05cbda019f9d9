"""Java's spelling of a login with IAM -> ours. Pure.

Every guide to MSK shows these lines of a properties file::

    security.protocol=SASL_SSL
    sasl.mechanism=AWS_MSK_IAM
    sasl.jaas.config=software.amazon.msk.auth.iam.IAMLoginModule required awsRoleArn="arn:...";
    sasl.client.callback.handler.class=software.amazon.msk.auth.iam.IAMClientCallbackHandler

The class of the last line is of no use here. What the third says are settings whose names begin
with ``aws.msk.``.
"""

from __future__ import annotations

import re

MECHANISM = "AWS_MSK_IAM"
PREFIX = "aws.msk."

ROLE = f"{PREFIX}role.arn"
SESSION_NAME = f"{PREFIX}role.session.name"
STS_REGION = f"{PREFIX}sts.region"
PROFILE = f"{PREFIX}profile"
REGION = f"{PREFIX}region"

SETTINGS = (REGION, ROLE, SESSION_NAME, STS_REGION, PROFILE)

HANDLERS = ("sasl.client.callback.handler.class", "sasl.login.callback.handler.class")

_JAAS = "sasl.jaas.config"
_AMAZON = "software.amazon.msk.auth.iam."
_MODULE = re.compile(rf"{re.escape(_AMAZON)}IAMLoginModule\s+(required|requisite|sufficient)\b(.*)")
# With `IAMOAuthBearerLoginCallbackHandler` the module is the one of Kafka itself.
_BEARER = re.compile(
    r"org\.apache\.kafka\.common\.security\.oauthbearer\.OAuthBearerLoginModule\s+required\b(.*)"
)
_PAIR = re.compile(r"\s*(\w+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s;\"']+))")

_OPTIONS = {
    "awsRoleArn": ROLE,
    "awsRoleSessionName": SESSION_NAME,
    "awsStsRegion": STS_REGION,
    "awsProfileName": PROFILE,
}
# How Java's library asks and what it prints: the chain here has its own way.
_DROPPED = frozenset({"awsDebugCreds", "awsMaxRetries", "awsMaxBackOffTimeMs"})


def translate(name: str, value: str) -> dict[str, str] | None:
    """What a line for Java's library for MSK is here.

    Args:
        name: The setting, without a prefix.
        value: Its value.

    Returns:
        Settings of ours, none for a line that is of no use; None if it is no such line.

    Raises:
        ValueError: It says something that is not known here; says what, never a value.
    """
    if name in HANDLERS and value.startswith(_AMAZON):
        bearer = value.startswith(f"{_AMAZON}IAMOAuthBearer")
        return {"sasl.mechanism": MECHANISM} if bearer else {}
    if name != _JAAS:
        return None
    if found := _BEARER.match(value):
        # Of Amazon's when its handler stands beside it; it says nothing by itself.
        return {} if not found[1].strip(" ;") else None
    found = _MODULE.match(value)
    if not found:
        return None
    settings: dict[str, str] = {}
    rest = found[2].strip()
    while rest.strip(" ;"):
        pair = _PAIR.match(rest)
        if not pair:
            raise ValueError('it is not of the form name="value" behind the module\'s name')
        option, *values = pair.groups()
        if option in _OPTIONS:
            settings[_OPTIONS[option]] = next(text for text in values if text is not None)
        elif option not in _DROPPED:
            raise ValueError(
                f"{option} is not known here; known are {', '.join(_OPTIONS)}, and credentials "
                f"come from AWS's default chain"
            )
        rest = rest[pair.end() :]
    return settings
