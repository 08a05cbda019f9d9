"""Client: calls of Kinesis, one attempt each, and a client of DynamoDB. No Beam.

boto3 knows where to send a call and how to sign it; it goes out and comes back by
`transforms.aws.http`: botocore's parser takes eight times as long for the records of an answer, and
its own retries would hide throttles.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import boto3
import botocore.exceptions as aws_errors
import orjson
import urllib3
import urllib3.exceptions as http_errors
from botocore.config import Config
from urllib3.util import parse_url

from transforms.aws.answers import Fault, is_throttled, read_refusal
from transforms.aws.credentials import Identity, session_of
from transforms.aws.http import Endpoint
from transforms.aws.signed import (
    CONFIG_ERRORS,
    Template,
    no_reply,
    proxy_of,
    signed_headers,
    template,
    tls_of,
)
from transforms.errors import KinesisError
from transforms.kinesis.frames import Frame, Frames
from transforms.kinesis.shards import STREAM_ARN

_CONNECTIONS = 128
_CONNECT_SECS, _SEND_SECS, _READ_SECS = 5, 30, 30
# An idle shard's subscription is heard of every few seconds.
_SILENT_SECS = 35
_PIECE_BYTES = 64 * 1024
_AWAITED_MS, _ON_ITS_WAY_MS = 50, 1000
CUT = "AnswerTooLarge"
"""Code of an answer that is larger than what is read of one."""

_THROTTLED = frozenset(
    {
        "LimitExceededException",
        "KMSThrottlingException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ThrottlingException",
    }
)
_FINAL = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "KMSAccessDeniedException",
        "KMSDisabledException",
        "KMSInvalidStateException",
        "KMSNotFoundException",
        "KMSOptInRequired",
        "KMSOptInRequiredException",
        "MissingAuthenticationTokenException",
        "UnrecognizedClientException",
        "ValidationException",
    }
)
_CONFIG_NAMES = frozenset(each.__name__ for each in CONFIG_ERRORS)
_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
_ADVICE = {
    "AccessDenied": "check --stream_role_arn and its trust policy",
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "NoRegionError": "set --aws_region, or AWS_REGION",
    "ProfileNotFound": "check AWS_PROFILE",
    "UnrecognizedClientException": "the AWS credentials are not valid",
    "InvalidSignatureException": "the AWS credentials are not valid",
    "InvalidClientTokenId": "the AWS credentials are not valid",
    "ExpiredTokenException": "the AWS credentials have expired",
}


@dataclass(frozen=True, slots=True)
class AwsConfig:
    """Where AWS is and who we are to it, for streams and their lease table. Holds no credentials.

    Attributes:
        region: AWS region; None for that of a stream's ARN, else the chain's.
        role_arn: Role to assume, or None.
        web_identity: Whose token the role is assumed with, ``google``; None for the chain's
            credentials.
        token_audience: Audience of that token.
        kinesis_url: Another endpoint than AWS's, or None.
        dynamodb_url: The same of the lease table.
    """

    region: str | None = None
    role_arn: str | None = None
    web_identity: str | None = None
    token_audience: str = "sts.amazonaws.com"
    kinesis_url: str | None = None
    dynamodb_url: str | None = None


def make_client(config: AwsConfig, service: str, stream: str) -> Any:
    """A boto3 client of ``kinesis`` or ``dynamodb``.

    Args:
        config: Where, and who we are.
        service: Which.
        stream: A stream's name or ARN: its region counts where none is configured.

    Raises:
        KinesisError: Region, profile or endpoint are missing or malformed.
    """
    match = STREAM_ARN.fullmatch(stream)
    region = (match["region"] if match else None) or config.region or os.environ.get("AWS_REGION")
    url = config.kinesis_url if service == "kinesis" else config.dynamodb_url
    settings = Config(
        user_agent="beam-lambda-sink",
        parameter_validation=False,
        connect_timeout=_CONNECT_SECS,
        read_timeout=10,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
    )
    try:
        identity = Identity(config.role_arn, config.web_identity, config.token_audience)
        session = session_of(identity, region)
        return boto3.Session(botocore_session=session, region_name=region).client(
            service, endpoint_url=url, config=settings
        )
    except (aws_errors.BotoCoreError, ValueError) as error:
        what = f"--stream={stream} cannot be read"
        raise KinesisError(_line(what, type(error).__name__, str(error))) from None


class Refused(Exception):
    """A call that did not succeed.

    Attributes:
        fault: What was answered, or why nothing was.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.code)
        self.fault = fault

    @property
    def code(self) -> str:
        return self.fault.code

    @property
    def is_throttle(self) -> bool:
        """Whether there were only too many calls."""
        return is_throttled(self.fault) or self.code in _THROTTLED

    @property
    def is_final(self) -> bool:
        """Whether to repeat it would not help."""
        return self.code in _FINAL or self.code in _CONFIG_NAMES

    def __str__(self) -> str:
        return f"{self.fault.code}: {' '.join(self.fault.message.split())}".rstrip(": .")


def final_error(stream: str, refused: Refused) -> KinesisError:
    """What a run ends with that may not read its stream, or cannot."""
    return KinesisError(_line(f"--stream={stream} cannot be read", refused.code, str(refused)))


def _line(what: str, code: str, why: str) -> str:
    said = why if why.startswith(code) else f"{code}: {' '.join(why.split()).rstrip('.')}"
    todo = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return f"{what}: {said}{todo}"


class Heard(NamedTuple):
    """An event of a subscription.

    Attributes:
        event: What it says.
        asked_ms: It was not sent before about this time.
    """

    event: dict[str, Any]
    asked_ms: int


class Subscription:
    """What a shard sends by itself, until it ends: a context, and an iterator of events.

    Args:
        response: Whose body it is.
        url: Where it comes from.
        proxy: The proxy that it comes through, or None.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse, url: str, proxy: str | None) -> None:
        self._response = response
        self._url = url
        self._proxy = proxy
        self._asked_ms = _now_ms()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # The connection with it: there is more to come on it.
        self._response.close()

    def __iter__(self) -> Iterator[Heard]:
        """Each event. It ends where the subscription does, whatever has ended it in order.

        Raises:
            Refused: It says an error, is silent for too long, or is cut off.
        """
        frames = Frames()
        try:
            for piece in self._pieces():
                for frame in frames.feed(piece):
                    if event := self._read(frame):
                        yield Heard(event, self._asked_ms)
        except http_errors.HTTPError as error:
            raise Refused(no_reply(error, self._url, self._proxy)) from None
        except ValueError as error:
            raise Refused(Fault(200, "NotKinesis", f"{self._url}: {error}")) from None

    def _pieces(self) -> Iterator[bytes]:
        pieces = (
            self._response.read_chunked()
            if self._response.chunked
            else iter(lambda: self._response.read1(_PIECE_BYTES), b"")
        )
        while True:
            waiting_ms = _now_ms()
            piece = next(pieces, b"")
            if not piece:
                return
            if _now_ms() - waiting_ms > _AWAITED_MS:
                # It was not there yet; what is was sent who knows when.
                self._asked_ms = max(self._asked_ms, waiting_ms - _ON_ITS_WAY_MS)
            yield piece

    def _read(self, frame: Frame) -> dict[str, Any] | None:
        kind = frame.headers.get(":message-type")
        if kind == "event":
            if frame.headers.get(":event-type") == "SubscribeToShardEvent":
                event = orjson.loads(frame.payload)
                if isinstance(event, dict):
                    return event
            return None
        code = frame.headers.get(":exception-type") or frame.headers.get(":error-code") or "Unknown"
        said = frame.headers.get(":error-message", "")
        if frame.payload:
            answer = orjson.loads(frame.payload)
            said = str(answer.get("message", said)) if isinstance(answer, dict) else said
        raise Refused(Fault(200, code[:1].upper() + code[1:], said))


class StreamApi:
    """Calls for one stream. Thread-safe.

    Args:
        config: Where, and who we are.
        stream: Its name or ARN, as it was given: other accounts' are known by ARN only.
    """

    def __init__(self, config: AwsConfig, stream: str) -> None:
        self.stream = stream
        self._client = make_client(config, "kinesis", stream)
        self._by_arn = STREAM_ARN.fullmatch(stream) is not None
        self._lock = threading.Lock()
        self._templates: dict[str, tuple[Template, Endpoint, str | None]] = {}
        self._pool: urllib3.PoolManager | None = None

    @property
    def named(self) -> dict[str, str]:
        """The stream, as a call names it."""
        return {"StreamARN" if self._by_arn else "StreamName": self.stream}

    def call(self, operation: str, arguments: dict[str, Any], named: bool = True) -> dict[str, Any]:
        """One call, one attempt.

        Args:
            operation: As AWS names it.
            arguments: Of the call.
            named: Whether it may name the stream; an ARN is told to GetRecords too.

        Raises:
            Refused: There is no answer, or it is an error.
        """
        if named and (operation != "GetRecords" or self._by_arn):
            arguments = self.named | arguments
        body = orjson.dumps(arguments)
        try:
            made, endpoint, proxy = self._template(operation, arguments)
            headers = signed_headers(made, {}, body)
        except (aws_errors.BotoCoreError, aws_errors.ClientError) as error:
            raise Refused(_fault_of(error)) from None
        except (http_errors.HTTPError, OSError, ValueError) as error:
            raise Refused(Fault(0, type(error).__name__, str(error))) from None
        try:
            response = endpoint.post(endpoint.head(headers), [body])
        except http_errors.HTTPError as error:
            raise Refused(no_reply(error, made.url, proxy)) from None
        if response.status >= 400:
            raise Refused(read_refusal(response.status, response.headers, response.body))
        if response.cut:
            raise Refused(Fault(response.status, CUT, "the answer is larger than what is read"))
        try:
            answer = orjson.loads(response.body or b"{}")
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            what = f"{made.url} answers with what Kinesis does not"
            raise Refused(Fault(response.status, "NotKinesis", what))
        return answer

    def _template(
        self, operation: str, arguments: dict[str, Any]
    ) -> tuple[Template, Endpoint, str | None]:
        if found := self._templates.get(operation):
            return found
        with self._lock:
            # A second template would end what another thread is signing with the first.
            if found := self._templates.get(operation):
                return found
            made = template(self._client, operation, arguments)
            proxy = proxy_of(made.url)
            known = {each.url: endpoint for each, endpoint, _ in self._templates.values()}
            endpoint = known.get(made.url) or Endpoint(
                made.url,
                _CONNECTIONS,
                _CONNECT_SECS,
                _SEND_SECS,
                _READ_SECS,
                tls_of(made.url),
                proxy,
            )
            self._templates[operation] = found = made, endpoint, proxy
            return found

    def subscribe(self, arguments: dict[str, Any]) -> Subscription:
        """Have a shard send its records by itself.

        Raises:
            Refused: It does not.
        """
        body = orjson.dumps(arguments)
        try:
            made, _, proxy = self._template("SubscribeToShard", arguments)
            headers = signed_headers(made, {}, body)
        except (aws_errors.BotoCoreError, aws_errors.ClientError) as error:
            raise Refused(_fault_of(error)) from None
        except (http_errors.HTTPError, OSError, ValueError) as error:
            raise Refused(Fault(0, type(error).__name__, str(error))) from None
        try:
            response = self._streaming(made.url, proxy).urlopen(
                "POST",
                made.url,
                body=body,
                headers=headers,
                preload_content=False,
                decode_content=False,
                retries=urllib3.Retry(False),
                redirect=False,
            )
            if response.status >= 400:
                fault = read_refusal(response.status, response.headers, response.read())
                raise Refused(fault)
        except http_errors.HTTPError as error:
            raise Refused(no_reply(error, made.url, proxy)) from None
        kind = response.headers.get("content-type", "")
        if "vnd.amazon.eventstream" not in kind:
            response.close()
            what = f"{made.url} answers with {kind[:60] or 'nothing'} and not with events"
            raise Refused(Fault(response.status, "NotKinesis", what))
        return Subscription(response, made.url, proxy)

    def _streaming(self, url: str, proxy: str | None) -> urllib3.PoolManager:
        with self._lock:
            if self._pool is None:
                settings: dict[str, Any] = {
                    "maxsize": _CONNECTIONS,
                    "timeout": urllib3.Timeout(connect=_CONNECT_SECS, read=_SILENT_SECS),
                    "ssl_context": tls_of(url),
                }
                self._pool = (
                    urllib3.ProxyManager(proxy, proxy_headers=_login(proxy), **settings)
                    if proxy
                    else urllib3.PoolManager(**settings)
                )
            return self._pool

    def consumer(self, name: str) -> dict[str, Any]:
        """What Kinesis says of a consumer of the stream.

        Raises:
            Refused: It knows none of that name, or says nothing.
        """
        arn = self.stream if self._by_arn else self.summary().get("StreamARN", "")
        arguments = {"StreamARN": arn, "ConsumerName": name}
        answer = self.call("DescribeStreamConsumer", arguments, named=False)
        found: dict[str, Any] = answer.get("ConsumerDescription", {})
        return found

    def list_shards(self) -> list[dict[str, Any]]:
        """All shards that there are, as they are listed.

        By hand: boto3's paginator names the stream beside the token, which AWS refuses.

        Raises:
            Refused: They cannot be listed.
        """
        shards: list[dict[str, Any]] = []
        answer = self.call("ListShards", {})
        while True:
            shards += answer.get("Shards", ())
            token = answer.get("NextToken")
            if not token:
                return shards
            answer = self.call("ListShards", {"NextToken": token}, named=False)

    def summary(self) -> dict[str, Any]:
        """What Kinesis says of the stream.

        Raises:
            Refused: It says nothing.
        """
        answer = self.call("DescribeStreamSummary", {})
        summary: dict[str, Any] = answer.get("StreamDescriptionSummary", {})
        return summary


def _login(proxy: str) -> dict[str, str] | None:
    login = parse_url(proxy).auth
    return urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None


def _now_ms() -> int:
    return int(time.time() * 1000)


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, aws_errors.ClientError):
        # Of STS, when a role is assumed.
        details: Any = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return Fault(status, str(details.get("Code", "Unknown")), str(details.get("Message", "")))
    status = 400 if isinstance(error, CONFIG_ERRORS) else 0
    return Fault(status, type(error).__name__, str(error))
