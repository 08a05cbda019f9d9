"""Conditions: why a record was given up, as its error record and the log name it."""

from __future__ import annotations

RETRIES_EXHAUSTED = "RetryAttemptsExhausted"
AGE_EXCEEDED = "MaximumRecordAgeExceeded"
SIZE_EXCEEDED = "MaximumPayloadSizeExceeded"
INVALID_REPLY = "InvalidReply"
BATCH_ITEM_FAILURE = "BatchItemFailure"
"""No condition but an error type: a reply named the record; the function itself has not failed."""
INVALID_CONTENT = "InvalidRequestContent"
RESPONSE_REFUSED = "ResponseRefused"
"""The function has answered, and Kafka does not take the answer."""
INVALID_RECORD = "InvalidRecord"
SCHEMA_NOT_FOUND, DESERIALIZATION_ERROR = "SCHEMA_NOT_FOUND", "DESERIALIZATION_ERROR"
SKIPPED = "SkippedByOperator"

CONDITIONS = (
    RETRIES_EXHAUSTED,
    AGE_EXCEEDED,
    SIZE_EXCEEDED,
    INVALID_REPLY,
    INVALID_CONTENT,
    RESPONSE_REFUSED,
    INVALID_RECORD,
    SCHEMA_NOT_FOUND,
    DESERIALIZATION_ERROR,
    SKIPPED,
)
"""All of them."""
