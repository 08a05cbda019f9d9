"""AWS Lambda: one payload -> `Reply` or `Fault`.

boto3 finds credentials, region and endpoint, and signs; the request itself goes out and comes back
by `transforms.aws.http`, at a third of boto3's price (docs/adr/0012-lean-invocations.md). There is
one attempt: retries are ours (`transforms.invoke.retry`), and a read timeout repeated by the client
would run the function twice unseen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.exceptions as aws_errors
import urllib3.exceptions as http_errors
from botocore.config import Config

from transforms.aws.answers import (
    NO_LAMBDA,
    REPLY_TOO_LARGE,
    Fault,
    Reply,
    is_out_of_time,
    is_throttled,
    read_refusal,
    read_wait,
)
from transforms.aws.credentials import Identity, session_of
from transforms.aws.http import MAX_BODY_BYTES, Endpoint, Head, Response
from transforms.aws.signed import (
    CONFIG_ERRORS,
    no_reply,
    proxy_of,
    signed_headers,
    template,
    tls_of,
)
from transforms.errors import FunctionConfigError
from transforms.hidden import without_request

MAX_SYNC_BYTES = 6_291_455
"""A synchronous request has to be smaller than 6,291,456 bytes."""
MAX_ASYNC_BYTES = 1_048_576

FUNCTION = re.compile(
    r"(?:(?P<arn>arn:aws[a-zA-Z-]*:lambda:(?P<region>[a-z0-9-]+):\d{12}:function|"
    r"\d{12}:function|function):)?"
    r"(?P<name>[a-zA-Z0-9_.-]{1,64})(?::(?P<qualifier>\$LATEST|[a-zA-Z0-9_-]{1,128}))?"
)


@dataclass(frozen=True, slots=True)
class FunctionConfig:
    """Which function, and how to reach it. Holds no credentials: those come from AWS's own chain.

    Attributes:
        function: Name, ARN, ``name:version`` or ``name:alias``.
        invocation_type: ``sync`` (wait for the reply) or ``async`` (Lambda queues the event).
        region: AWS region; None for the ARN's, else the chain's.
        role_arn: Role to assume, or None.
        web_identity: Whose token the role is assumed with, ``google``; None for the chain's
            credentials.
        token_audience: Audience of that token.
        endpoint_url: Another endpoint than AWS's, or None.
        timeout_secs: The function's own timeout; the client waits 5 s longer.
        max_concurrency: Calls at once, so connections in the pool.
        log_tail: Whether replies carry the end of the function's log.
    """

    function: str
    invocation_type: str = "sync"
    region: str | None = None
    role_arn: str | None = None
    web_identity: str | None = None
    token_audience: str = "sts.amazonaws.com"
    endpoint_url: str | None = None
    timeout_secs: int = 900
    max_concurrency: int = 100
    log_tail: bool = False


def make_client(config: FunctionConfig) -> Any:
    """A boto3 Lambda client: it knows where to send an invocation, and how to sign it.

    Raises:
        FunctionConfigError: Region, profile or endpoint are missing or malformed.
    """
    match = FUNCTION.fullmatch(config.function)
    # botocore itself reads AWS_DEFAULT_REGION only; AWS's other SDKs, and so people, AWS_REGION.
    region = config.region or (match["region"] if match else None) or os.environ.get("AWS_REGION")
    settings = Config(user_agent="beam-lambda-sink", parameter_validation=False)
    try:
        identity = Identity(config.role_arn, config.web_identity, config.token_audience)
        session = session_of(identity, region)
        return boto3.Session(botocore_session=session, region_name=region).client(
            "lambda", endpoint_url=config.endpoint_url, config=settings
        )
    except (aws_errors.BotoCoreError, ValueError) as error:
        raise FunctionConfigError(advice(config, type(error).__name__, str(error))) from None


@dataclass(frozen=True, slots=True)
class Request:
    """An invocation that is signed and can be sent; a signature is good for five minutes.

    Attributes:
        head: Its head.
        payload: Its body.
    """

    head: Head
    payload: bytes


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
        # Has to be kept: the signer does not.
        self._client = make(config)
        match = FUNCTION.fullmatch(config.function)
        qualifier = match["qualifier"] if match else None
        name = config.function.removesuffix(f":{qualifier}") if qualifier else config.function
        arguments: dict[str, Any] = {"FunctionName": name}
        if qualifier:
            arguments["Qualifier"] = qualifier
        if config.invocation_type == "async":
            arguments["InvocationType"] = "Event"
        elif config.log_tail:
            arguments["LogType"] = "Tail"
        self._success = 202 if config.invocation_type == "async" else 200
        try:
            self._template = template(self._client, "Invoke", arguments)
            self._proxy = proxy_of(self._template.url)
            self._endpoint = Endpoint(
                self._template.url,
                connections=config.max_concurrency,
                connect_secs=5,
                send_secs=60,
                read_secs=config.timeout_secs + 5,
                tls=tls_of(self._template.url),
                proxy_url=self._proxy,
            )
        except (aws_errors.BotoCoreError, http_errors.HTTPError, OSError, ValueError) as error:
            raise FunctionConfigError(advice(config, type(error).__name__, str(error))) from None

    def invoke(self, payload: bytes, client_context: str | None = None) -> Reply | Fault:
        """One invocation, one attempt; the reply is read to its end.

        Args:
            payload: The event, as JSON.
            client_context: Base64 of a JSON object for the function's context, or None.
        """
        request = self.prepare(payload, client_context)
        return request if isinstance(request, Fault) else self.send(request)

    def prepare(
        self, payload: bytes, client_context: str | None = None, trace_id: str | None = None
    ) -> Request | Fault:
        """The first half of `invoke`: make the request and sign it. Sends nothing to Lambda.

        Args:
            payload: The event, as JSON.
            client_context: Base64 of a JSON object for the function's context, or None.
            trace_id: The trace that it is part of, as AWS writes it, or None.
        """
        more = {"X-Amz-Client-Context": client_context} if client_context else {}
        if trace_id:
            more["X-Amzn-Trace-Id"] = trace_id
        return self._prepare(payload, more)

    def send(self, request: Request, meanwhile: Callable[[], None] | None = None) -> Reply | Fault:
        """The second half of `invoke`.

        Args:
            request: What to send.
            meanwhile: Done once the request is on its way, before the reply is waited for. What
                it raises is raised here, or taken for a failure of the connection.
        """
        return self._send(request, self._success, meanwhile)

    def _send(
        self, request: Request, success: int, meanwhile: Callable[[], None] | None = None
    ) -> Reply | Fault:
        def body() -> Iterator[bytes]:
            yield request.payload
            if meanwhile:
                meanwhile()

        try:
            response = self._endpoint.post(request.head, body())
        except http_errors.HTTPError as error:
            return no_reply(error, self._template.url, self._proxy)
        return _answered(response, success)

    def check(self) -> None:
        """A DryRun: is there such a function, and may we invoke it? Runs nothing.

        Raises:
            FunctionConfigError: It cannot be invoked, or Lambda cannot be reached.
        """
        request = self._prepare(b"", {"X-Amz-Invocation-Type": "DryRun"})
        result = request if isinstance(request, Fault) else self._send(request, 204)
        if isinstance(result, Fault) and not is_throttled(result):
            raise FunctionConfigError(advice(self._config, result.code, result.message))

    def _prepare(self, payload: bytes, more_headers: dict[str, str]) -> Request | Fault:
        try:
            headers = signed_headers(self._template, more_headers, payload)
        except aws_errors.ClientError as error:
            # Of STS, when a role is assumed.
            return _refused(error)
        except CONFIG_ERRORS as error:
            return Fault(400, type(error).__name__, str(error))
        except Exception as error:
            # Whatever a provider of credentials raises (a token file that is being replaced, a
            # metadata server in trouble), nothing is wrong with the records.
            return Fault(0, type(error).__name__, str(error))
        return Request(self._endpoint.head(headers), payload)


def _answered(response: Response, success: int) -> Reply | Fault:
    """What an answer says, where Lambda says that all went well with one status only."""
    status, headers = response.status, response.headers
    if status >= 400:
        return read_refusal(status, headers, response.body)
    if status != success:
        problem = f"the endpoint answers with HTTP {status}, Lambda would with {success}"
        return Fault(status, NO_LAMBDA, problem)
    if response.cut:
        problem = f"the reply is larger than {MAX_BODY_BYTES} bytes"
        return Fault(status, REPLY_TOO_LARGE, problem, request_id=headers.get("x-amzn-RequestId"))
    return Reply(
        status_code=status,
        payload=response.body,
        function_error=headers.get("X-Amz-Function-Error"),
        log_result=headers.get("X-Amz-Log-Result"),
        executed_version=headers.get("X-Amz-Executed-Version"),
        request_id=headers.get("x-amzn-RequestId"),
    )


def _refused(error: aws_errors.ClientError) -> Fault:
    """What STS said, or another service that credentials come from."""
    response: Any = error.response
    metadata = response.get("ResponseMetadata", {})
    details = response.get("Error", {})
    return Fault(
        status_code=metadata.get("HTTPStatusCode", 0),
        code=str(details.get("Code", "Unknown")),
        message=without_request(str(details.get("Message") or error)),
        retry_after_secs=read_wait(metadata.get("HTTPHeaders", {}).get("retry-after")),
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
    "InvalidIdentityToken": "check the trust policy of --aws_role_arn: accounts.google.com",
    "MetadataRetrievalError": "--aws_web_identity=google needs a machine of Google Cloud; from "
    "elsewhere --preflight=false leaves the check out",
    "EndpointConnectionError": _NETWORK,
    "ConnectTimeoutError": _NETWORK,
    "SendTimeoutError": _NETWORK,
    NO_LAMBDA: "check --lambda_endpoint_url, and proxies on the way",
}


def advice(config: FunctionConfig, code: str, message: str) -> str:
    """One line for the user: which function, what AWS says, what to do."""
    what = " ".join(message.split()).rstrip(".")
    advised = "check this machine's clock" if is_out_of_time(message) else _ADVICE.get(code)
    todo = f"; {advised}" if advised else ""
    return f"--function={config.function} cannot be invoked: {code}: {what}{todo}"
