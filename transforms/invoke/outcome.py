"""Outcome: what came back from one invocation -> what it means. Pure; no Beam, no boto3.

Lambda's Invoke answers with HTTP 200 also when the function failed; then the reply carries
`X-Amz-Function-Error`. Its value says nothing reliable, so only its presence counts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import orjson

from transforms.aws.answers import REPLY_TOO_LARGE, Fault, Reply, is_out_of_time, is_throttled
from transforms.conditions import BATCH_ITEM_FAILURE, INVALID_REPLY
from transforms.invoke.reply import Answer, InvalidReplyError
from transforms.json_text import loads, writable
from transforms.records import reply_bytes


class Kind(enum.Enum):
    """The classes that differ in what has to be done next (`transforms.invoke.retry`)."""

    SUCCESS = "success"
    PARTIAL = "partial failure"
    """The function ran, and names the records that it failed in."""
    FUNCTION_ERROR = "function error"
    """The function ran and failed, or its reply does not answer the batch."""
    POISON = "poison"
    """Lambda refused the content of this payload; repeating it cannot help."""
    TOO_LARGE = "too large"
    THROTTLED = "throttled"
    TRANSIENT = "transient"
    """Network, timeouts, 5xx: nothing is wrong with the records."""
    CONFIG = "configuration"


_NAMES = {
    Kind.SUCCESS: "success",
    Kind.PARTIAL: "partial",
    Kind.FUNCTION_ERROR: "function_error",
    Kind.THROTTLED: "throttled",
    Kind.TRANSIENT: "transient",
    Kind.TOO_LARGE: "too_large",
    Kind.POISON: "invalid_request",
    Kind.CONFIG: "refused",
}
NAMES = (*_NAMES.values(), "invalid_reply")
"""What an outcome is called where outcomes are counted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One invocation, classified.

    Attributes:
        kind: What has to be done next.
        error_type: The cause; empty for a success.
        message: One sentence about it.
        status_code: HTTP status, 0 if there was no answer.
        function_error: As the reply had it, or the error type.
        log_result: Base64 of the log's end.
        payload: The function's error JSON.
        executed_version: Version of the function that ran.
        request_id: AWS request id.
        retry_after_secs: What a throttle asked for.
        results: Per record its result as JSON text; None where replies are not kept so.
        body: The reply as it came, where it is kept as a whole.
        failed: With PARTIAL, the failed ones among the records that were sent, by index, rising.
        spared: Whether no record may be given up because of it (`transforms.invoke.breaker`).
        trace: The invocation's `traceparent`, if it was traced.
        state: The window's state that the function has returned, if there are windows.
    """

    kind: Kind
    error_type: str = ""
    message: str = ""
    status_code: int = 0
    function_error: str = ""
    log_result: str | None = None
    payload: str | None = None
    executed_version: str | None = None
    request_id: str | None = None
    retry_after_secs: float | None = None
    results: Sequence[bytes] | None = None
    body: bytes | None = None
    failed: Sequence[int] = ()
    spared: bool = False
    trace: str | None = None
    state: bytes | None = None

    @property
    def name(self) -> str:
        """One of `NAMES`."""
        if self.kind is Kind.FUNCTION_ERROR and self.error_type == INVALID_REPLY:
            return "invalid_reply"
        return _NAMES[self.kind]

    @property
    def held_bytes(self) -> int:
        """About what it holds of a reply that answers records, in bytes."""
        return reply_bytes(self.results, self.body)

    def of_function(self, sent: int) -> Kind:
        """What a call of so many records says about the function itself.

        After a partial failure it works, unless it failed in all of them.
        """
        if self.kind is not Kind.PARTIAL:
            return self.kind
        return Kind.SUCCESS if len(self.failed) < sent else Kind.FUNCTION_ERROR


_TRANSIENT_STATUS = frozenset({408, 410, 500, 502, 503, 504})

# 409 and 502 stand for conditions that pass and for settings that are wrong; the code decides.
_TRANSIENT_CODES = frozenset(
    {
        "RequestTimeout",
        "RequestTimeoutException",
        "ResourceConflictException",
        "SnapStartNotReadyException",
    }
)
_CONFIG_CODES = frozenset(
    {
        "EC2AccessDeniedException",
        "InvalidRuntimeException",
        "InvalidSecurityGroupIDException",
        "InvalidSubnetIDException",
        "InvalidZipFileException",
        "KMSAccessDeniedException",
        "KMSDisabledException",
        "KMSInvalidStateException",
        "KMSNotFoundException",
    }
)
# An expired session token passes as soon as the provider chain has fetched the next one.
_EXPIRED_CODES = frozenset({"ExpiredTokenException", "ExpiredToken", "RequestExpired"})
_TOO_LARGE_CODES = frozenset(
    {
        "RequestTooLargeException",
        "RequestEntityTooLargeException",
        "SerializedRequestEntityTooLargeException",
    }
)


def classify_fault(fault: Fault) -> Outcome:
    """What an invocation that was refused, or never answered, means."""
    return Outcome(
        _kind_of(fault),
        error_type=fault.code,
        message=fault.message,
        status_code=fault.status_code,
        function_error=fault.code,
        request_id=fault.request_id,
        retry_after_secs=fault.retry_after_secs,
    )


def _kind_of(fault: Fault) -> Kind:
    status, code = fault.status_code, fault.code
    if status == 0 or code in _EXPIRED_CODES or is_out_of_time(fault.message):
        return Kind.TRANSIENT
    if code == REPLY_TOO_LARGE:
        # The function has run, and would be run again for nothing.
        return Kind.FUNCTION_ERROR
    if is_throttled(fault):
        return Kind.THROTTLED
    if status == 413 or code in _TOO_LARGE_CODES:
        return Kind.TOO_LARGE
    if code == "InvalidRequestContentException":
        return Kind.POISON
    if code in _CONFIG_CODES:
        return Kind.CONFIG
    if status in _TRANSIENT_STATUS or status >= 500 or code in _TRANSIENT_CODES:
        return Kind.TRANSIENT
    return Kind.CONFIG


def classify_reply(reply: Reply, read: Callable[[bytes], Answer] | None) -> Outcome:
    """What an answered invocation means.

    Args:
        reply: The answer.
        read: Says what the body says about the batch, or raises `InvalidReplyError`. None if
            the body is not looked at.
    """
    if reply.function_error is not None:
        error_type, message = _function_error(reply.payload)
        return Outcome(
            Kind.FUNCTION_ERROR,
            error_type=error_type,
            message=message,
            status_code=reply.status_code,
            function_error=reply.function_error,
            log_result=reply.log_result,
            payload=reply.payload.decode(errors="replace"),
            executed_version=reply.executed_version,
            request_id=reply.request_id,
        )
    try:
        answer = read(reply.payload) if read else Answer()
    except InvalidReplyError as error:
        return _failed(Kind.FUNCTION_ERROR, reply, INVALID_REPLY, str(error))
    if answer.failed:
        message = "the function returned the record's offset in batchItemFailures"
        outcome = _failed(Kind.PARTIAL, reply, BATCH_ITEM_FAILURE, message)
        return replace(outcome, failed=answer.failed, state=answer.state)
    return Outcome(
        Kind.SUCCESS,
        status_code=reply.status_code,
        executed_version=reply.executed_version,
        request_id=reply.request_id,
        results=answer.results,
        body=answer.body,
        state=answer.state,
    )


def _failed(kind: Kind, reply: Reply, error_type: str, message: str) -> Outcome:
    """The outcome of a reply that is no error to Lambda, but one to us."""
    facts = {"errorMessage": message, "errorType": error_type}
    return Outcome(
        kind,
        error_type=error_type,
        message=message,
        status_code=reply.status_code,
        function_error=error_type,
        log_result=reply.log_result,
        payload=orjson.dumps(facts).decode(),
        executed_version=reply.executed_version,
        request_id=reply.request_id,
    )


def _function_error(payload: bytes) -> tuple[str, str]:
    """The error's type and message, as far as the function's error JSON has them."""
    try:
        error = loads(payload)
    except ValueError:
        error = None
    if not isinstance(error, dict):
        error = {}
    error_type, message = error.get("errorType") or "Unknown", error.get("errorMessage") or ""
    return writable(str(error_type)), writable(str(message))
