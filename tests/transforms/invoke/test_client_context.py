"""Client context: what the function is told about a call, within what Lambda takes."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from transforms.invoke.client_context import MAX_BYTES, client_context
from transforms.invoke.retry import Call
from transforms.records import Batch, Records


def _batch(offsets=(41, 43, 44, 90), topic: str = "orders", partition: int = 3) -> Batch:
    count = len(offsets)
    records = Records(offsets, [1] * count, [None] * count, [b"v"] * count, [None] * count)
    return Batch(topic, partition, offsets[0], offsets[-1] + 1, records, [b"1"] * count)


def _custom(batch: Batch, call: Call) -> dict[str, str]:
    context = json.loads(base64.b64decode(client_context(batch, call), validate=True))
    assert list(context) == ["custom"]
    return context["custom"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call(0, 4, 1, ""), ("41", "91", "1", "")),
        (Call(1, 3, 3, "ValueError"), ("43", "45", "3", "ValueError")),
        (Call(3, 4, 2, "E503"), ("90", "91", "2", "E503")),
        (Call(0, 4, 2, "BatchItemFailure", (0, 3)), ("41", "91", "2", "BatchItemFailure")),
    ],
)
def test_what_the_function_is_told(call: Call, expected: tuple[str, ...]) -> None:
    """Where the records are from, their range, the attempt, and the reason for it."""
    first_offset, next_offset, attempt, reason = expected
    assert _custom(_batch(), call) == {
        "topic": "orders",
        "partition": "3",
        "first_offset": first_offset,
        "next_offset": next_offset,
        "attempt": attempt,
        "reason": reason,
    }


@given(
    topic=st.text("abc._-XYZ09", min_size=1, max_size=249),
    partition=st.integers(0, 2**31 - 1),
    offset=st.integers(0, 2**63 - 2),
    attempt=st.integers(1, 10**12),
    reason=st.text(max_size=2000),
)
@example("x" * 249, 2**31 - 1, 2**63 - 2, 10**12, "\x00" * 4000)
@example("x" * 249, 2**31 - 1, 2**63 - 2, 10**12, "\U0001f600" * 4000)
@example("x" * 249, 2**31 - 1, 2**63 - 2, 10**12, "\ud800" * 4000)
@settings(deadline=None)
def test_it_always_fits(topic, partition, offset, attempt, reason) -> None:
    """Whatever a function calls its errors; and every field is a string."""
    batch = _batch((offset,), topic, partition)
    call = Call(0, 1, attempt, reason)
    assert len(client_context(batch, call)) <= MAX_BYTES
    custom = _custom(batch, call)
    assert all(type(value) is str for value in custom.values())
    assert (custom["topic"], custom["first_offset"]) == (topic, str(offset))
    assert custom["next_offset"] == str(offset + 1)
