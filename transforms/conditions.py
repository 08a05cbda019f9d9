"""Conditions: why a record was given up, as its error record and the log name it."""

from __future__ import annotations

RETRIES_EXHAUSTED = "RetryAttemptsExhausted"
AGE_EXCEEDED = "MaximumRecordAgeExceeded"
SIZE_EXCEEDED = "MaximumPayloadSizeExceeded"
INVALID_REPLY = "InvalidReply"
INVALID_CONTENT = "InvalidRequestContent"
