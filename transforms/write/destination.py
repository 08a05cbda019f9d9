"""Destination: failures -> error records as an AWS on-failure destination gets them. Pure.

One Kafka record for each failed record, with the source record's key, as an event source mapping
writes them to a Kafka topic. The headers are those of `transforms.write.formats`, the original
among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from transforms.conditions import (
    AGE_EXCEEDED,
    BATCH_ITEM_FAILURE,
    INVALID_REPLY,
    RETRIES_EXHAUSTED,
    SIZE_EXCEEDED,
)
from transforms.envelope import KINESIS_EVENT, Envelope, encode_event_records
from transforms.names import NUMBERS, TEXTS, parted
from transforms.records import NO_TIMESTAMP, Failure
from transforms.write.formats import (
    INPUT_OMITTED,
    ORIGINAL_OMITTED,
    ErrorRecord,
    error_headers,
    iso,
)

ERROR_RECORDS = CONFLUENT, AWS = ("confluent", "aws")

# What AWS has other words for; the header has ours.
_CONDITIONS = {
    RETRIES_EXHAUSTED: "RetriesExhausted",
    INVALID_REPLY: "RetriesExhausted",
    AGE_EXCEEDED: "RecordAgeExceeded",
}


# A queue is told so of whatever the function's fault is.
_BATCH_CONDITIONS = {INVALID_REPLY: RETRIES_EXHAUSTED, AGE_EXCEEDED: "RecordAgeExceeded"}


def destination_records(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    event: Envelope,
    max_bytes: int,
    now_ms: int,
    with_original: bool = True,
) -> Iterator[tuple[Failure, ErrorRecord]]:
    """Error records for one failure, one for each of its records.

    Args:
        topic: Where the records came from.
        partition: Where the records came from.
        failure: The records and the facts.
        function: The function's name or ARN.
        event: How the records stand in `payload`: as ``kafka_event`` or ``kinesis_event``.
        max_bytes: Size above which a record goes without its `payload`; its original is kept.
        now_ms: The time, in milliseconds since the epoch.
        with_original: Whether the source record is in the headers.

    Yields:
        Each error record with the part of the failure that it holds.
    """
    for index in range(len(failure)):
        one = replace(
            failure,
            records=failure.records.slice(index, index + 1),
            entries=failure.entries[index : index + 1],
        )
        left_out: tuple[str, ...] = () if with_original else (ORIGINAL_OMITTED,)
        whole = _record(topic, partition, one, function, event, now_ms, left_out)
        if whole.size_bytes > max_bytes:
            left_out = (INPUT_OMITTED, *left_out)
            whole = _record(topic, partition, one, function, event, now_ms, left_out)
        yield one, whole


def batch_document(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    event: Envelope,
    now_ms: int,
) -> tuple[dict[str, Any], bytes]:
    """What AWS sends to a queue of one failed batch, and the event that failed.

    Args:
        topic: Where the records came from.
        partition: Where the records came from.
        failure: The records and the facts.
        function: The function's name or ARN.
        event: How the records stand in the event: as ``kafka_event`` or ``kinesis_event``.
        now_ms: The time, in milliseconds since the epoch.
    """
    records = failure.records
    entries = encode_event_records(topic, partition, records, event)
    payload = event.frame(topic, partition).join(entries)
    document = _facts(failure, function, _BATCH_CONDITIONS, now_ms)
    first, last = (_number(records.offsets[at], event) for at in (0, -1))
    first_time, last_time = (_time(records.timestamps[at]) for at in (0, -1))
    if event.name == KINESIS_EVENT:
        document["KinesisBatchInfo"] = _stream_info(
            topic, partition, event, (first, first_time), (last, last_time), len(records)
        )
    else:
        document["KafkaBatchInfo"] = {
            "batchSize": len(records),
            **{name: text for name, text in event.source.items() if name != "eventSource"},
            "payloadSize": len(payload),
            "recordsInfo": {
                f"{topic}-{partition}": {
                    "firstRecordOffset": first,
                    "lastRecordOffset": last,
                    "firstRecordTimestamp": first_time,
                    "lastRecordTimestamp": last_time,
                }
            },
        }
    return document, payload


def place_of(topic: str, partition: int, event: Envelope) -> str:
    """What stands for a partition in the name of an object."""
    if event.name == KINESIS_EVENT:
        return f"shardId-{partition:012d}"
    return f"{topic}-{partition}"


def _facts(
    failure: Failure, function: str, conditions: Mapping[str, str], now_ms: int
) -> dict[str, Any]:
    return {
        "requestContext": {
            "requestId": failure.request_id,
            "functionArn": function,
            "condition": conditions.get(failure.condition, failure.condition),
            "approximateInvokeCount": failure.attempts,
        },
        **_response(failure),
        "version": "1.0",
        "timestamp": iso(now_ms),
    }


def _number(number: int, event: Envelope) -> str:
    # As AWS has it: without a place within an aggregate.
    return str(parted(number)[0] if event.name == KINESIS_EVENT else number)


def _time(ms: int) -> str | None:
    return None if ms == NO_TIMESTAMP else iso(ms)


def _stream_info(
    stream: str,
    shard: int,
    event: Envelope,
    first: tuple[str, str | None],
    last: tuple[str, str | None],
    count: int,
) -> dict[str, Any]:
    return {
        "shardId": f"shardId-{shard:012d}",
        "startSequenceNumber": first[0],
        "endSequenceNumber": last[0],
        "approximateArrivalOfFirstRecord": first[1],
        "approximateArrivalOfLastRecord": last[1],
        "batchSize": count,
        "streamArn": dict(event.stream_arns).get(stream, stream),
    }


def _record(
    topic: str,
    partition: int,
    failure: Failure,
    function: str,
    event: Envelope,
    now_ms: int,
    left_out: Sequence[str],
) -> ErrorRecord:
    records = failure.records
    entries = encode_event_records(topic, partition, records, event)
    payload = event.frame(topic, partition).join(entries)
    facts = _facts(failure, function, _CONDITIONS, now_ms)
    one = number, time = _number(records.offsets[0], event), _time(records.timestamps[0])
    names = NUMBERS
    if event.name == KINESIS_EVENT:
        names = TEXTS
        facts["KinesisBatchInfo"] = _stream_info(topic, partition, event, one, one, 1)
    else:
        facts["KafkaBatchInfo"] = {
            "batchSize": 1,
            **{name: text for name, text in event.source.items() if name != "eventSource"},
            "payloadSize": len(payload),
            "recordInfo": {"offset": number, "timestamp": time},
        }
    shown = b"null" if INPUT_OMITTED in left_out else payload
    value = orjson.dumps(facts)[:-1] + b',"payload":' + shown + b"}"
    headers = error_headers(topic, partition, failure, function, left_out, names)
    return ErrorRecord(records.keys[0], value, headers)


def _response(failure: Failure) -> dict[str, Any]:
    """What the function answered; null if it did not, and nothing of a record that was too old."""
    if failure.condition == AGE_EXCEEDED:
        return {}
    if not failure.status_code or failure.condition == SIZE_EXCEEDED:
        return {"responseContext": None}
    named = failure.function_error == BATCH_ITEM_FAILURE
    return {
        "responseContext": {
            "statusCode": failure.status_code,
            "executedVersion": failure.executed_version,
            "functionError": None if named else failure.function_error,
        }
    }
