"""MSK: tokens for a login with IAM. No Beam, and no Kafka.

A token is a request to Kafka's address at AWS that is signed in advance, as base64. The brokers let
AWS check the signature. AWS's own package makes the same ones, byte for byte.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import boto3
import botocore.exceptions as aws_errors
from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.session import Session

from transforms.aws.credentials import QUICK, Identity, session_of
from transforms.hidden import without_request

TOKEN_SECS = 900
# librdkafka asks for another one after four fifths of what it is told, and ten seconds after a
# failure; it logs in with what it has after nine tenths of a connection's time. On a busy machine
# all of this comes late.
SHARE = 0.6

_AGENT = "beam-lambda-sink"
_SOURCES = (
    "the environment (AWS_ACCESS_KEY_ID), the shared files (AWS_PROFILE), web identity, container "
    "and instance"
)


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """Whose tokens, and for where.

    Attributes:
        region: Of the cluster.
        identity: Who we are.
        sts_region: Where a role is assumed; None for the cluster's region.
    """

    region: str
    identity: Identity = Identity()
    sts_region: str | None = None


class TokenError(Exception):
    """There is no token, or no answer; says why in half a line, with nothing secret in it."""


def sign(credentials: Any, region: str, agent: str = _AGENT) -> str:
    """A token, good for `TOKEN_SECS` from now on or as long as the credentials are.

    Args:
        credentials: Keys, and the token of a session if it is one.
        region: Of the cluster.
        agent: Who asks; not signed.
    """
    request = AWSRequest(
        method="GET",
        url=f"https://kafka.{region}.amazonaws.com/",
        params={"Action": "kafka-cluster:Connect"},
    )
    SigV4QueryAuth(credentials, "kafka-cluster", region, expires=TOKEN_SECS).add_auth(request)
    request.params = {"User-Agent": agent}
    url = request.prepare().url.encode("utf-8")
    return base64.urlsafe_b64encode(url).decode("ascii").rstrip("=")


def bootstrap_brokers(arn: str, identity: Identity) -> dict[str, str]:
    """What MSK says of a cluster: by the kind of login, its brokers as host:port list.

    Raises:
        TokenError: It does not say.
    """
    region = arn.split(":")[3]
    try:
        session = session_of(identity, region, QUICK)
        client = boto3.Session(botocore_session=session).client("kafka", region)
        answer = client.get_bootstrap_brokers(ClusterArn=arn)
    except aws_errors.ClientError as error:
        found = error.response.get("Error", {})
        said = without_request(f"{found.get('Code')}: {found.get('Message')}")
        text = " ".join(said.split())
        raise TokenError(f"{text}; it needs the right kafka:GetBootstrapBrokers") from None
    except (aws_errors.BotoCoreError, OSError, ValueError) as error:
        raise TokenError(_why(error, identity)) from None
    prefix = "BootstrapBrokerString"
    return {n.removeprefix(prefix): t for n, t in answer.items() if n.startswith(prefix)}


class Tokens:
    """Makes tokens, with credentials that are looked for once and renewed from then on.

    Thread-safe. For one process: it is made where the client is that logs in.

    Args:
        config: Whose, and for where.
        open_session: Finds credentials; injected for tests, as is the next.
        timer: Seconds since the epoch.
    """

    def __init__(
        self,
        config: TokenConfig,
        open_session: Callable[..., Session] = session_of,
        timer: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._open_session = open_session
        self._timer = timer
        self._lock = threading.Lock()
        self._credentials: Any = None

    def make(self) -> tuple[str, float]:
        """A token, and when to have another one, in seconds since the epoch.

        Raises:
            TokenError: There are no credentials, or they cannot be renewed, or are over.
        """
        config = self.config
        try:
            credentials = self._find()
            frozen = credentials.get_frozen_credentials()
        except Exception as error:
            # Whatever a provider of credentials raises: botocore itself has a RuntimeError.
            raise TokenError(_why(error, config.identity)) from None
        now = self._timer()
        # Only botocore knows it, and tells nobody; keys that do not expire have none.
        ends: datetime | None = getattr(credentials, "_expiry_time", None)
        left = ends.timestamp() - now if ends else TOKEN_SECS
        if ends and left <= 0:
            at = ends.astimezone(timezone.utc).isoformat(timespec="seconds")
            raise TokenError(f"the AWS credentials expired at {at}, and are not renewed")
        if not frozen.access_key or not frozen.secret_key:
            raise TokenError("the AWS credentials are empty")
        return sign(frozen, config.region), now + SHARE * min(TOKEN_SECS, left)

    def _find(self) -> Any:
        with self._lock:
            if self._credentials is None:
                config = self.config
                region = config.sts_region or config.region
                found = self._open_session(config.identity, region, QUICK).get_credentials()
                if found is None:
                    raise aws_errors.NoCredentialsError
                self._credentials = found
            return self._credentials


def _why(error: Exception, identity: Identity) -> str:
    text = " ".join(without_request(str(error)).split()).rstrip(".")
    if isinstance(error, aws_errors.NoCredentialsError):
        return f"there are no AWS credentials; asked were {_SOURCES}"
    if identity.role_arn and isinstance(error, aws_errors.ClientError):
        return f"the role {identity.role_arn} cannot be assumed: {text}"
    return f"AWS credentials cannot be had: {text}"
