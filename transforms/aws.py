"""AWS Lambda: one payload -> `Reply` or `Fault`. The only file that knows boto3.

Retries are ours (`transforms.retry`), so botocore makes one attempt; a read timeout repeated by
the client would run the function twice unseen.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import boto3
import botocore.exceptions as aws_errors
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.session import Session, get_session

from transforms.errors import FunctionConfigError
from transforms.outcome import Fault, Kind, Reply, classify_fault

MAX_SYNC_BYTES = 6_291_455
"""A synchronous request has to be smaller than 6,291,456 bytes."""
MAX_ASYNC_BYTES = 1_048_576

FUNCTION = re.compile(
    r"(?:(?P<arn>arn:aws[a-zA-Z-]*:lambda:(?P<region>[a-z0-9-]+):\d{12}:function|"
    r"\d{12}:function|function):)?"
    r"(?P<name>[a-zA-Z0-9_.-]{1,64})(?::(?P<qualifier>\$LATEST|[a-zA-Z0-9_-]{1,128}))?"
)

# Of what the client raises before anything is sent, this is for the user to mend.
_CONFIG_ERRORS = (
    aws_errors.NoCredentialsError,
    aws_errors.PartialCredentialsError,
    aws_errors.NoRegionError,
    aws_errors.ProfileNotFound,
    aws_errors.ConfigNotFound,
    aws_errors.ConfigParseError,
    aws_errors.InvalidConfigError,
    aws_errors.ParamValidationError,
    aws_errors.InvalidRegionError,
    aws_errors.UnauthorizedSSOTokenError,
)


@dataclass(frozen=True, slots=True)
class FunctionConfig:
    """Which function, and how to reach it. Holds no credentials: those come from AWS's own chain.

    Attributes:
        function: Name, ARN, ``name:version`` or ``name:alias``.
        invocation_type: ``sync`` (wait for the reply) or ``async`` (Lambda queues the event).
        region: AWS region; None for the ARN's, else the chain's.
        role_arn: Role to assume with the chain's credentials, or None.
        endpoint_url: Another endpoint than AWS's, or None.
        timeout_secs: The function's own timeout; the client waits 5 s longer.
        max_concurrency: Calls at once, so connections in the pool.
        log_tail: Whether replies carry the end of the function's log.
    """

    function: str
    invocation_type: str = "sync"
    region: str | None = None
    role_arn: str | None = None
    endpoint_url: str | None = None
    timeout_secs: int = 900
    max_concurrency: int = 100
    log_tail: bool = False


def make_client(config: FunctionConfig) -> Any:
    """A boto3 Lambda client; safe to share between threads.

    Raises:
        FunctionConfigError: Region, profile or endpoint are missing or malformed.
    """
    match = FUNCTION.fullmatch(config.function)
    # botocore itself reads AWS_DEFAULT_REGION only; AWS's other SDKs, and so people, AWS_REGION.
    region = config.region or (match["region"] if match else None) or os.environ.get("AWS_REGION")
    settings = Config(
        max_pool_connections=config.max_concurrency,
        # The default one is rebuilt for each request, at a tenth of the whole call's cost.
        user_agent="beam-lambda-sink",
        parameter_validation=False,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=5,
        read_timeout=config.timeout_secs + 5,
    )
    try:
        session = get_session()
        if config.role_arn:
            session = _assume(session, config.role_arn, region)
        return boto3.Session(botocore_session=session, region_name=region).client(
            "lambda", endpoint_url=config.endpoint_url, config=settings
        )
    except (aws_errors.BotoCoreError, ValueError) as error:
        raise FunctionConfigError(advice(config, type(error).__name__, str(error))) from None


def _assume(source: Session, role_arn: str, region: str | None) -> Session:
    """A session whose credentials are the role's, renewed before they expire."""
    credentials = source.get_credentials()
    if credentials is None:
        raise aws_errors.NoCredentialsError
    fetcher = AssumeRoleCredentialFetcher(
        client_creator=partial(source.create_client, region_name=region),
        source_credentials=credentials,
        role_arn=role_arn,
        extra_args={"RoleSessionName": "beam-lambda-sink"},
    )
    assumed = get_session()
    # There is no public way to hand a session credentials that renew themselves.
    assumed._credentials = DeferredRefreshableCredentials(
        fetcher.fetch_credentials, method="assume-role"
    )
    return assumed


class _NotSent(Exception):
    """A prepared request that was not to be sent after all."""


class LambdaFunction:
    """Invokes one function. Thread-safe.

    Args:
        config: Which function and how.
        make: Makes the client; injected for tests.
    """

    def __init__(
        self, config: FunctionConfig, make: Callable[[FunctionConfig], Any] = make_client
    ) -> None:
        self._config = config
        self._client = make(config)
        match = FUNCTION.fullmatch(config.function)
        qualifier = match["qualifier"] if match else None
        name = config.function.removesuffix(f":{qualifier}") if qualifier else config.function
        self._arguments: dict[str, Any] = {"FunctionName": name}
        if qualifier:
            self._arguments["Qualifier"] = qualifier
        self._local = threading.local()
        self._client.meta.events.register("before-send.lambda.Invoke", self._before_send)

    def invoke(self, payload: bytes) -> Reply | Fault:
        """One invocation, one attempt; the reply is read to its end."""
        return self._invoke(**self._payload(payload))

    def invoke_ahead(self, payload: bytes, hold: Callable[[], bool]) -> Reply | Fault | None:
        """The same in two steps: made and signed at once, sent when `hold` returns True.

        Returns:
            The answer, or None if `hold` returned False, and then nothing was sent.
        """
        self._local.hold = hold
        try:
            return self._invoke(**self._payload(payload))
        except _NotSent:
            return None
        finally:
            self._local.hold = None

    def _before_send(self, **_: Any) -> None:
        """boto3's last event before a request leaves: the place to wait."""
        hold = getattr(self._local, "hold", None)
        if hold and not hold():
            raise _NotSent

    def _payload(self, payload: bytes) -> dict[str, Any]:
        if self._config.invocation_type == "async":
            return {"InvocationType": "Event", "Payload": payload}
        if self._config.log_tail:
            return {"LogType": "Tail", "Payload": payload}
        return {"Payload": payload}

    def check(self) -> None:
        """A DryRun: is there such a function, and may we invoke it? Runs nothing.

        Raises:
            FunctionConfigError: It cannot be invoked, or Lambda cannot be reached.
        """
        result = self._invoke(InvocationType="DryRun")
        if isinstance(result, Fault) and classify_fault(result).kind is not Kind.THROTTLED:
            raise FunctionConfigError(advice(self._config, result.code, result.message))

    def _invoke(self, **arguments: Any) -> Reply | Fault:
        try:
            response = self._client.invoke(**self._arguments, **arguments)
            body = response["Payload"].read()
        except aws_errors.ClientError as error:
            return _fault(error)
        except _CONFIG_ERRORS as error:
            return Fault(400, type(error).__name__, str(error))
        except aws_errors.BotoCoreError as error:
            return Fault(0, type(error).__name__, str(error))
        return Reply(
            status_code=response["StatusCode"],
            payload=body,
            function_error=response.get("FunctionError"),
            log_result=response.get("LogResult"),
            executed_version=response.get("ExecutedVersion"),
            request_id=response["ResponseMetadata"].get("RequestId"),
        )


def _fault(error: aws_errors.ClientError) -> Fault:
    response: Any = error.response
    metadata = response.get("ResponseMetadata", {})
    details = response.get("Error", {})
    try:
        retry_after = float(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
    except ValueError:
        retry_after = None
    return Fault(
        status_code=metadata.get("HTTPStatusCode", 0),
        code=details.get("Code", "Unknown"),
        message=details.get("Message") or str(error),
        retry_after_secs=retry_after,
        request_id=metadata.get("RequestId"),
    )


_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
_INVALID = "the AWS credentials are not valid"
_NETWORK = "check the network and --lambda_endpoint_url"
_ADVICE = {
    "ResourceNotFoundException": "check --function and --aws_region",
    "AccessDeniedException": "the credentials need lambda:InvokeFunction on it",
    "UnrecognizedClientException": _INVALID,
    "InvalidSignatureException": _INVALID,
    "InvalidClientTokenId": _INVALID,
    "MissingAuthenticationTokenException": _INVALID,
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "NoRegionError": "set --aws_region, or AWS_REGION",
    "ProfileNotFound": "check AWS_PROFILE",
    "AccessDenied": "check --aws_role_arn and its trust policy",
    "EndpointConnectionError": _NETWORK,
    "ConnectTimeoutError": _NETWORK,
}


def advice(config: FunctionConfig, code: str, message: str) -> str:
    """One line for the user: which function, what AWS says, what to do."""
    what = " ".join(message.split()).rstrip(".")
    todo = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return f"--function={config.function} cannot be invoked: {code}: {what}{todo}"
