"""Faults: rules that say which request to the local Lambda server goes wrong, and how.

Nothing here knows HTTP. A ``Fault`` is a value; a ``FaultPlan`` holds the ones
in force and hands out each the number of times it asks for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

FaultKind = Literal["error", "drop_connection", "delay", "reply", "function_error"]
InvocationType = Literal["RequestResponse", "Event", "DryRun"]


@dataclass(frozen=True)
class Fault:
    """One way a request goes wrong, and the requests it applies to.

    Attributes:
        kind: ``error`` answers with ``status`` and does not run the function.
            ``drop_connection`` closes the connection without an answer.
            ``delay`` runs the function after ``delay_secs``.
            ``reply`` answers 200 with ``body`` in place of the function's reply.
            ``function_error`` answers 200 and marks the call as failed.
        status: HTTP status of an ``error``, 400 to 599.
        error_type: Name of the exception of an ``error`` (empty: the answer
            names none), or ``errorType`` of a ``function_error``.
        message: Text of the error. Empty: ``error_type`` again.
        reason: ``Reason`` of a 429. Empty: left out.
        retry_after_secs: Value of the ``Retry-After`` header, in seconds.
        body: Bytes of a ``reply``. With ``error``, sent in place of the JSON
            error, as a proxy's HTML page would be.
        executed: With ``drop_connection``, run the function first, so that only
            its reply is lost.
        delay_secs: Seconds to wait first. Any kind may have it.
        times: How many requests it applies to; None for every one.
        when: Applies only if ``when(payload, function_name)`` is true. Called
            with the server's lock held, so it must be quick.
        above_in_flight: Applies only if this request would make the number of
            executions at once, over all functions, greater than this.
        invocation_types: The invocation types it applies to.

    Raises:
        ValueError: If a value is out of range.
    """

    kind: FaultKind = "error"
    status: int = 500
    error_type: str = "ServiceException"
    message: str = ""
    reason: str = ""
    retry_after_secs: float | None = None
    body: bytes = b""
    executed: bool = False
    delay_secs: float = 0.0
    times: int | None = 1
    when: Callable[[bytes, str], bool] | None = None
    above_in_flight: int | None = None
    invocation_types: tuple[InvocationType, ...] = ("RequestResponse", "Event")

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            known = ", ".join(get_args(FaultKind))
            raise ValueError(f"kind must be one of {known}, got {self.kind!r}")
        if not 400 <= self.status <= 599:
            raise ValueError(f"status must be from 400 to 599, got {self.status}")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times must be at least 1, or None for always, got {self.times}")
        _check_secs("delay_secs", self.delay_secs)
        if self.retry_after_secs is not None:
            _check_secs("retry_after_secs", self.retry_after_secs)
        if self.above_in_flight is not None and self.above_in_flight < 0:
            raise ValueError(f"above_in_flight must be at least 0, got {self.above_in_flight}")
        for invocation_type in self.invocation_types:
            if invocation_type not in get_args(InvocationType):
                known = ", ".join(get_args(InvocationType))
                raise ValueError(f"invocation_types must be of {known}, got {invocation_type!r}")

    @property
    def prevents_execution(self) -> bool:
        """Whether the function does not run, and no execution is counted."""
        return self.kind == "error" or (self.kind == "drop_connection" and not self.executed)

    def applies_to(
        self, payload: bytes, function_name: str, in_flight: int, invocation_type: str
    ) -> bool:
        """Say whether a request is one this fault is for, whatever ``times`` says."""
        return (
            invocation_type in self.invocation_types
            and (self.above_in_flight is None or in_flight > self.above_in_flight)
            and (self.when is None or self.when(payload, function_name))
        )


def throttle(
    *,
    retry_after_secs: float | None = 1.0,
    reason: str = "ReservedFunctionConcurrentInvocationLimitExceeded",
    **where: Any,
) -> Fault:
    """Return a 429 fault; ``where`` takes any other field of ``Fault``."""
    return Fault(
        status=429,
        error_type="TooManyRequestsException",
        message="Rate Exceeded.",
        reason=reason,
        retry_after_secs=retry_after_secs,
        **where,
    )


def unavailable(status: int = 500, error_type: str = "ServiceException", **where: Any) -> Fault:
    """Return a fault of the service itself, 500 to 599."""
    return Fault(status=status, error_type=error_type, **where)


def drop_connection(*, executed: bool = False, **where: Any) -> Fault:
    """Return a fault that closes the connection, before or after the function ran."""
    return Fault(kind="drop_connection", executed=executed, **where)


def slow(delay_secs: float, **where: Any) -> Fault:
    """Return a fault that makes an execution ``delay_secs`` longer."""
    return Fault(kind="delay", delay_secs=delay_secs, **where)


def raw_reply(body: bytes, **where: Any) -> Fault:
    """Return a fault that answers 200 with exactly ``body``, which need not be JSON."""
    return Fault(kind="reply", body=body, **where)


def function_error(error_type: str = "RuntimeError", message: str = "", **where: Any) -> Fault:
    """Return a fault that answers as if the function had raised ``error_type``."""
    return Fault(kind="function_error", error_type=error_type, message=message, **where)


class FaultPlan:
    """The faults in force. Safe to use from several threads.

    A request gets the first fault, in the order given, that applies to it and
    has some of its ``times`` left.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Fault, int | None]] = [(fault, fault.times) for fault in faults]

    def add(self, fault: Fault) -> None:
        """Put a fault behind those already in force."""
        with self._lock:
            self._left.append((fault, fault.times))

    def clear(self) -> None:
        """Take back every fault."""
        with self._lock:
            self._left.clear()

    def pick(
        self,
        payload: bytes,
        function_name: str,
        in_flight: int = 1,
        invocation_type: str = "RequestResponse",
    ) -> Fault | None:
        """Return the fault of a request and count it, or None.

        Args:
            payload: Body of the request.
            function_name: Name without ARN and qualifier.
            in_flight: Executions at once, this request included.
            invocation_type: ``RequestResponse``, ``Event`` or ``DryRun``.
        """
        with self._lock:
            for index, (fault, left) in enumerate(self._left):
                if not fault.applies_to(payload, function_name, in_flight, invocation_type):
                    continue
                if left == 1:
                    del self._left[index]
                elif left is not None:
                    self._left[index] = (fault, left - 1)
                return fault
        return None


def load_faults(path: str | Path) -> list[Fault]:
    """Read faults from a JSON file, see ``parse_faults``.

    Raises:
        ValueError: One line with the file, what is wrong and what to do.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read faults file {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"faults file {str(path)!r} is not JSON: {error}") from error
    try:
        return parse_faults(content)
    except ValueError as error:
        raise ValueError(f"faults file {str(path)!r}: {error}") from error


def parse_faults(content: object) -> list[Fault]:
    """Make faults of a list of JSON objects.

    An object has the fields of ``Fault``, except that ``body`` is text and that
    ``when`` is replaced by ``contains`` (text to be found in the payload) and
    ``function`` (name of the function). ``"times": null`` means always.

    Raises:
        ValueError: One line that names the object, counted from 1, and the field.
    """
    if not isinstance(content, list):
        raise ValueError(f"must be a list of objects, got {_shown(content)}")
    return [_parse_fault(index, item) for index, item in enumerate(content, start=1)]


_JSON_TYPES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "kind": (str, "text"),
    "status": (int, "a whole number"),
    "error_type": (str, "text"),
    "message": (str, "text"),
    "reason": (str, "text"),
    "retry_after_secs": ((int, float, type(None)), "a number or null"),
    "body": (str, "text"),
    "executed": (bool, "true or false"),
    "delay_secs": ((int, float), "a number"),
    "times": ((int, type(None)), "a whole number or null"),
    "above_in_flight": ((int, type(None)), "a whole number or null"),
    "invocation_types": (list, "a list"),
    "contains": (str, "text"),
    "function": (str, "text"),
}


def _parse_fault(index: int, item: object) -> Fault:
    if not isinstance(item, dict):
        raise ValueError(f"fault {index} must be an object, got {_shown(item)}")
    for field, value in item.items():
        if field not in _JSON_TYPES:
            raise ValueError(
                f"fault {index}: unknown field {field!r}; use some of {', '.join(_JSON_TYPES)}"
            )
        types, wanted = _JSON_TYPES[field]
        # JSON's true is an int in Python.
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ValueError(f"fault {index}: {field} must be {wanted}, got {_shown(value)}")
    fields = dict(item)
    contains = fields.pop("contains", None)
    function_name = fields.pop("function", None)
    if contains is not None or function_name is not None:
        fields["when"] = _matcher(contains, function_name)
    if "body" in fields:
        fields["body"] = fields["body"].encode("utf-8", "surrogatepass")
    if "invocation_types" in fields:
        fields["invocation_types"] = tuple(fields["invocation_types"])
    try:
        return Fault(**fields)
    except ValueError as error:
        raise ValueError(f"fault {index}: {error}") from error


def _matcher(contains: str | None, function_name: str | None) -> Callable[[bytes, str], bool]:
    wanted = (contains or "").encode("utf-8", "surrogatepass")

    def matches(payload: bytes, name: str) -> bool:
        return wanted in payload and function_name in (None, name)

    return matches


def _check_secs(field: str, value: float) -> None:
    if not 0 <= value <= 86_400:
        raise ValueError(f"{field} must be from 0 to 86400 seconds, got {value}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
