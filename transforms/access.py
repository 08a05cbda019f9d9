"""Access: logins as event source mappings name them -> settings of clients. Pure.

A mapping has a list of types, each with a URI: the ARN of a secret in AWS Secrets Manager, or,
where nothing is secret, a text. We keep the types and the ARNs. What is in a secret goes from there
to the client in each process, and nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from transforms.hidden import HIDDEN
from transforms.java_login import MECHANISM

SECRET_ARN = re.compile(r"arn:aws[a-zA-Z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:\S+")

BASIC, SCRAM_256, SCRAM_512 = "BASIC_AUTH", "SASL_SCRAM_256_AUTH", "SASL_SCRAM_512_AUTH"
CERTIFICATE, AUTHORITY = "CLIENT_CERTIFICATE_TLS_AUTH", "SERVER_ROOT_CA_CERTIFICATE"
OAUTH, SCOPE, AUDIENCE = "OAUTHBEARER_AUTH", "OAUTHBEARER_SCOPE", "OAUTHBEARER_AUDIENCE"
IAM, IAM_OAUTH = "IAM_AUTH", "IAM_OAUTHBEARER_AUTH"
TLS = "TLS"
"""No type of AWS's: TLS and no login, which a mapping of MSK without a secret may mean."""
EXTENSIONS = {
    "OAUTHBEARER_LOGICAL_CLUSTER": "logicalCluster",
    "OAUTHBEARER_IDENTITY_POOL": "identityPoolId",
}
NETWORK = ("VPC_SUBNET", "VPC_SECURITY_GROUP")

WITH_SECRET = (BASIC, SCRAM_256, SCRAM_512, CERTIFICATE, AUTHORITY, OAUTH)
_WITH_TEXT = (SCOPE, AUDIENCE, *EXTENSIONS)
_WITH_NOTHING = (IAM, IAM_OAUTH, TLS)
KINDS = (*WITH_SECRET, *_WITH_TEXT, *_WITH_NOTHING)
REGISTRY_KINDS = (BASIC, CERTIFICATE, AUTHORITY)
# Of these there can be one.
_LOGINS = (BASIC, SCRAM_256, SCRAM_512, CERTIFICATE, OAUTH, IAM, IAM_OAUTH, TLS)

_LIKE_A_KIND = re.compile(r"[A-Z]+(_[A-Z0-9]+)+")
_MECHANISMS = {BASIC: "PLAIN", SCRAM_256: "SCRAM-SHA-256", SCRAM_512: "SCRAM-SHA-512"}
_BEARER = "sasl.oauthbearer."
_JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"

Secret = Mapping[str, str]
"""What is in a secret, by name."""


@dataclass(frozen=True, slots=True)
class Access:
    """One way in, or a part of one. All of it may be told to anybody.

    Attributes:
        kind: AWS's name of the type.
        uri: The ARN of a secret or a text; empty where the type needs none.
    """

    kind: str
    uri: str = ""


class AccessError(ValueError):
    """Something is wrong about a way in; says what in one line, never what is in a secret."""


def parse_access(texts: Iterable[str], kinds: Iterable[str] = KINDS) -> tuple[Access, ...]:
    """What an option says, as ``TYPE=URI`` each.

    Raises:
        AccessError: A type is not known, stands twice, or its URI is not what the type needs.
    """
    found: list[Access] = []
    known = tuple(kinds)
    for text in texts:
        kind, _, uri = (part.strip() for part in text.partition("="))
        if kind not in known:
            raise AccessError(f"{_shown(kind)} is not known; give one of {', '.join(known)}")
        if any(kind == other.kind for other in found):
            raise AccessError(f"{kind} is given twice")
        if kind in WITH_SECRET and not SECRET_ARN.fullmatch(uri):
            # It may be the secret itself.
            raise AccessError(
                f"{kind} needs the ARN of a secret in AWS Secrets Manager, as {kind}=arn:aws:"
                f"secretsmanager:REGION:ACCOUNT:secret:NAME"
            )
        if kind in _WITH_TEXT and not uri:
            raise AccessError(f"{kind} needs a text, as {kind}=TEXT")
        found.append(Access(kind, "" if kind in _WITH_NOTHING else uri))
    logins = [access.kind for access in found if access.kind in _LOGINS]
    if len(logins) > 1:
        raise AccessError(f"{' and '.join(logins)} are two logins; give one")
    names = {access.kind for access in found}
    if needing := sorted(names & {SCOPE, *EXTENSIONS} if OAUTH not in names else ()):
        raise AccessError(f"{needing[0]} goes with {OAUTH} only")
    if AUDIENCE in names and not names & {OAUTH, IAM_OAUTH}:
        raise AccessError(f"{AUDIENCE} goes with {OAUTH} or {IAM_OAUTH} only")
    if IAM_OAUTH in names and AUDIENCE not in names:
        raise AccessError(f"{IAM_OAUTH} needs {AUDIENCE}, too")
    return tuple(found)


def has_login(text: str) -> bool:
    """Whether what an option says has a login, and not only what belongs to one."""
    return any(part.partition("=")[0].strip() in _LOGINS for part in text.split(","))


def shown_access(text: str) -> str:
    """What an option says, without what may be a secret in the place of its ARN."""
    return ",".join(map(_shown, text.split(",")))


def _shown(text: str) -> str:
    kind, _, uri = (part.strip() for part in text.partition("="))
    if kind not in KINDS:
        return kind if _LIKE_A_KIND.fullmatch(text) else HIDDEN
    is_told = not uri or kind not in WITH_SECRET or SECRET_ARN.fullmatch(uri)
    return text if is_told else f"{kind}={HIDDEN}"


def login_settings(access: Iterable[Access], region: str | None = None) -> dict[str, str]:
    """What the types alone say of a login, without any secret: enough to tell what contradicts it.

    Args:
        access: The ways in.
        region: Of AWS, for the tokens of `IAM_OAUTH`.
    """
    settings: dict[str, str] = {}
    texts = {each.kind: each.uri for each in access}
    for kind in texts:
        if kind in _MECHANISMS:
            settings |= {"security.protocol": "SASL_SSL", "sasl.mechanism": _MECHANISMS[kind]}
        elif kind in (CERTIFICATE, TLS):
            settings["security.protocol"] = "SSL"
        elif kind == IAM:
            settings |= {"security.protocol": "SASL_SSL", "sasl.mechanism": MECHANISM}
        elif kind in (OAUTH, IAM_OAUTH):
            settings |= {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "OAUTHBEARER",
                f"{_BEARER}method": "oidc",
            }
    if SCOPE in texts:
        settings[f"{_BEARER}scope"] = texts[SCOPE]
    extensions = [f"{name}={texts[kind]}" for kind, name in EXTENSIONS.items() if kind in texts]
    if extensions:
        settings[f"{_BEARER}extensions"] = ",".join(extensions)
    if IAM_OAUTH in texts:
        where = f"region={region}," if region else ""
        settings[f"{_BEARER}metadata.authentication.type"] = "aws_iam"
        settings[f"{_BEARER}config"] = where + "audience=" + texts[AUDIENCE].replace(",", "\\,")
    return settings


def kafka_settings(
    access: Iterable[Access], read: Callable[[str], str], region: str | None = None
) -> dict[str, str]:
    """Settings of a Kafka client; PEM goes in as text, so that no file has it.

    Args:
        access: The ways in.
        read: Gets the text of a secret by its ARN.
        region: Of AWS, for the tokens of `IAM_OAUTH`.

    Raises:
        AccessError: A secret has not what its type needs.
    """
    access = tuple(access)
    settings = login_settings(access, region)
    audience = next((each.uri for each in access if each.kind == AUDIENCE), None)
    for each in access:
        if each.kind not in WITH_SECRET:
            continue
        secret = _Secret(each, read(each.uri))
        if each.kind in _MECHANISMS:
            settings["sasl.username"] = secret.get("username")
            settings["sasl.password"] = secret.get("password")
        elif each.kind == CERTIFICATE:
            settings["ssl.certificate.pem"] = secret.get("certificate")
            settings["ssl.key.pem"] = secret.get("privateKey")
            if password := secret.find("privateKeyPassword"):
                settings["ssl.key.password"] = password
        elif each.kind == AUTHORITY:
            settings["ssl.ca.pem"] = secret.get("certificate")
        else:
            settings |= _oauth(secret, audience)
    return settings


def registry_settings(
    access: Iterable[Access], read: Callable[[str], str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Settings of a client of a schema registry, and those whose value is PEM for a file.

    Raises:
        AccessError: A secret has not what its type needs.
    """
    settings: dict[str, str] = {}
    files: dict[str, str] = {}
    for each in access:
        secret = _Secret(each, read(each.uri))
        if each.kind == BASIC:
            user = f"{secret.get('username')}:{secret.get('password')}"
            settings["basic.auth.user.info"] = user
        elif each.kind == CERTIFICATE:
            files["ssl.certificate.location"] = secret.get("certificate")
            files["ssl.key.location"] = secret.get("privateKey")
            if password := secret.find("privateKeyPassword"):
                settings["ssl.key.password"] = password
        else:
            files["ssl.ca.location"] = secret.get("certificate")
    return settings, files


def _oauth(secret: _Secret, audience: str | None) -> dict[str, str]:
    settings = {
        f"{_BEARER}token.endpoint.url": secret.get("oauthTokenEndpointUrl"),
        f"{_BEARER}client.id": secret.get("oauthClientId"),
    }
    if authority := secret.find("oauthIdpCaCertificate"):
        settings["https.ca.pem"] = authority
    if key := secret.find("oauthPrivateKey"):
        who = secret.find("oauthClientEmail") or secret.get("oauthClientId")
        settings |= {
            f"{_BEARER}grant.type": _JWT_GRANT,
            f"{_BEARER}assertion.private.key.pem": key,
            f"{_BEARER}assertion.claim.iss": who,
            f"{_BEARER}assertion.claim.sub": who,
            f"{_BEARER}assertion.claim.aud": audience or secret.get("oauthTokenEndpointUrl"),
        }
        if secs := secret.find("oauthTokenExpirationSeconds"):
            settings[f"{_BEARER}assertion.claim.exp.seconds"] = secs
        return settings
    if audience:
        raise AccessError(
            f"{AUDIENCE}: with a client's secret librdkafka asks for no audience; have the token "
            f"endpoint add it, and leave the type out"
        )
    settings[f"{_BEARER}client.secret"] = secret.get("oauthClientSecret")
    return settings


class _Secret:
    """A secret's content: JSON, names and texts."""

    def __init__(self, access: Access, text: str) -> None:
        self._name = f"{access.kind}: the secret {access.uri}"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise AccessError(f"{self._name} is not a JSON object")
        self._content = content

    def find(self, name: str) -> str | None:
        value = self._content.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise AccessError(f"{self._name} has {name}, and it is not a text")
        return str(value)

    def get(self, name: str) -> str:
        found = self.find(name)
        if found is None:
            raise AccessError(f"{self._name} has no {name}")
        return found
