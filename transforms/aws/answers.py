"""Answers: what Lambda, or somebody before it, has answered to one request. Pure; no boto3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http.client import responses as _PHRASES
from typing import Any

from transforms.hidden import without_request
from transforms.json_text import loads


@dataclass(frozen=True, slots=True)
class Reply:
    """Invoke answered with 200 or 202."""

    status_code: int
    payload: bytes = b""
    function_error: str | None = None
    log_result: str | None = None
    executed_version: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Invoke did not answer, or refused.

    Attributes:
        status_code: HTTP status, 0 if there was no answer.
        code: AWS's error code, or the name of the client's exception.
        message: What AWS or the client says about it.
        retry_after_secs: What a `Retry-After` header asked for.
        request_id: AWS request id, if there was an answer.
    """

    status_code: int
    code: str
    message: str
    retry_after_secs: float | None = None
    request_id: str | None = None


NO_LAMBDA = "NotLambda"
"""Code of an answer that Lambda does not give: somebody else is at that address."""

REPLY_TOO_LARGE = "ReplyTooLarge"
"""Code of a reply that is larger than any function may return."""

MAX_WAIT_SECS = 300.0
"""What a `Retry-After` header can ask for at most."""

_CODE_CHARACTERS, _TEXT_CHARACTERS = 128, 1000


# STS, which a role is assumed from, and AWS's common errors throttle with status 400.
_THROTTLED_CODES = frozenset(
    {
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)


def is_throttled(fault: Fault) -> bool:
    """Whether a refusal only says that there are too many requests."""
    return fault.status_code == 429 or fault.code in _THROTTLED_CODES


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Fault:
    """What an answer with an error status says, of Lambda or of a proxy before it.

    The status decides what it means. The rest is for people, may have any form, and is named as
    boto3 names it.

    Args:
        status: From 400 on.
        headers: Their names are found in upper and lower case.
        body: Lambda's error as JSON, or a page of somebody else's.
    """
    parsed = _parse(body)
    error = parsed if isinstance(parsed, dict) else {}
    named = [headers.get("x-amzn-errortype"), *map(error.get, ("code", "Code", "__type"))]
    code = next((name for name in named if name and isinstance(name, str)), str(status))
    code = _clean(code.split(":", 1)[0].rsplit("#", 1)[-1], _CODE_CHARACTERS) or str(status)
    said = [*map(error.get, ("message", "Message")), parsed]
    message = next((text for text in said if text and isinstance(text, str)), "")
    if not message and not error and status >= 500:
        message = _PHRASES.get(status, "")
    return Fault(
        status,
        code,
        _clean(message, _TEXT_CHARACTERS)
        or f"An error occurred ({code}) when calling the Invoke operation: ",
        read_wait(headers.get("retry-after")),
        headers.get("x-amzn-requestid"),
    )


def read_wait(text: str | None) -> float | None:
    """How many seconds a `Retry-After` header asks for, as far as that is a time to wait."""
    try:
        secs = float(text or "")
    except ValueError:
        return None
    return min(secs, MAX_WAIT_SECS) if secs >= 0 else None


def _parse(body: bytes) -> Any:
    """A JSON text's value, or another text as it is; a page for a browser says nothing."""
    try:
        return loads(body)
    except ValueError:
        return "" if body.lstrip().startswith(b"<") else body.decode(errors="replace")


def _clean(text: str, characters: int) -> str:
    """Text that can be written anywhere, on one line, and is not too much of it."""
    line = " ".join(without_request(text)[:characters].split())
    return "".join(each if each.isprintable() else "?" for each in line)


def is_out_of_time(message: str) -> bool:
    """Whether a refusal is for the time at which a request was signed, by what it says."""
    return message.startswith(("Signature expired", "Signature not yet current"))
