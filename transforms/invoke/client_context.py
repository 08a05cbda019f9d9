"""Client context: which records a call holds, and why they are sent again, for the function. Pure.

The function finds it in its context, so that it can recognize what it has seen before. Lambda
takes 3583 bytes, as base64.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping

import orjson

from transforms.invoke.retry import Call
from transforms.names import NUMBERS, Names
from transforms.records import Batch

MAX_BYTES = 3583
# A function may give its errors any name; this much of it, escaped, always fits.
_REASON_CHARACTERS = 256


def client_context(
    batch: Batch, call: Call, names: Names = NUMBERS, trace: Mapping[str, str] | None = None
) -> str:
    """The value of Lambda's `ClientContext`: base64 of ``{"custom": {...}}``.

    All fields are strings: runtimes of typed languages read nothing else, and Go's refuses the
    invocation.

    Args:
        batch: The batch.
        call: Which of its records are sent.
        names: How records' numbers are written.
        trace: The trace that the call is part of, as headers of W3C; None if it is not traced.
    """
    first, last = call.span(batch.records.offsets)
    custom = {
        "topic": batch.topic,
        "partition": str(batch.partition),
        "first_offset": names.text(first),
        # A source without dense numbers knows of no next one.
        **({"last_offset": names.text(last)} if names.texts else {"next_offset": str(last + 1)}),
        "attempt": str(call.attempt),
        "reason": call.reason[:_REASON_CHARACTERS].encode(errors="replace").decode(),
    }
    if trace:
        # The state of a trace may be long, and is worth less than the rest.
        for more in (dict(trace), {"traceparent": trace["traceparent"]}):
            if len(text := _encoded(custom | more)) <= MAX_BYTES:
                return text
    return _encoded(custom)


def _encoded(custom: dict[str, str]) -> str:
    return b64encode(orjson.dumps({"custom": custom})).decode()
