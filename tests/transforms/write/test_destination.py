"""Destination: error records in AWS's form, one for each failed record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from transforms.batch.payload import PayloadFormat, encode_records
from transforms.envelope import Envelope
from transforms.invoke import retry
from transforms.names import TEXTS, joined
from transforms.original import ORIGINAL_HEADER, TEXT_ORIGINAL_HEADER, decode_original
from transforms.records import NO_TIMESTAMP, Decoded, Failure, Records
from transforms.write.destination import batch_document, destination_records
from transforms.write.formats import ErrorRecord

MSK = "arn:aws:kafka:us-east-1:123456789012:cluster/orders/5a7c-2"
SERVERS = "b-1.example:9098"
EVENT = Envelope("kafka_event", SERVERS, MSK)
NOW_MS = 1_573_755_365_568
TIMESTAMP = 1_573_755_364_835

RECORDS = Records(
    [100, 102],
    [TIMESTAMP, NO_TIMESTAMP],
    [b"test-key", None],
    [b"test-value", None],
    [[("trace", b"\xff"), ("trace", b"\x01")], None],
)


def _failure(records: Records = RECORDS, **changes) -> Failure:
    entries = encode_records("my-topic", 0, records, PayloadFormat()).entries
    facts = {
        "condition": retry.RETRIES_EXHAUSTED,
        "error_type": "ValueError",
        "message": "bad",
        "attempts": 3,
        "status_code": 200,
        "function_error": "Unhandled",
        "log_result": "bG9n",
        "payload": '{"errorMessage":"bad"}',
        "executed_version": "$LATEST",
        "request_id": "e4b46cbf",
    }
    return Failure(records, entries, **(facts | changes))


def _written(
    failure: Failure, event: Envelope = EVENT, max_bytes: int = 10**6
) -> list[ErrorRecord]:
    parts = destination_records("my-topic", 0, failure, "my-function", event, max_bytes, NOW_MS)
    return [record for _, record in parts]


def test_what_aws_writes() -> None:
    """The whole record: what is known of the failure, and the event with that one record."""
    first, second = _written(_failure())
    assert first.key == b"test-key"
    event = {
        "eventSource": "aws:kafka",
        "eventSourceArn": MSK,
        "bootstrapServers": SERVERS,
        "records": {
            "my-topic-0": [
                {
                    "topic": "my-topic",
                    "partition": 0,
                    "offset": 100,
                    "timestamp": TIMESTAMP,
                    "timestampType": "CREATE_TIME",
                    "key": "dGVzdC1rZXk=",
                    "value": "dGVzdC12YWx1ZQ==",
                    "headers": [{"trace": [-1]}, {"trace": [1]}],
                }
            ]
        },
    }
    assert json.loads(first.value) == {
        "requestContext": {
            "requestId": "e4b46cbf",
            "functionArn": "my-function",
            "condition": "RetriesExhausted",
            "approximateInvokeCount": 3,
        },
        "responseContext": {
            "statusCode": 200,
            "executedVersion": "$LATEST",
            "functionError": "Unhandled",
        },
        "version": "1.0",
        "timestamp": "2019-11-14T18:16:05.568Z",
        "KafkaBatchInfo": {
            "batchSize": 1,
            "eventSourceArn": MSK,
            "bootstrapServers": SERVERS,
            "payloadSize": len(first.value.split(b',"payload":', 1)[1]) - 1,
            "recordInfo": {"offset": "100", "timestamp": "2019-11-14T18:16:04.835Z"},
        },
        "payload": event,
    }
    assert second.key is None
    value = json.loads(second.value)
    assert value["KafkaBatchInfo"]["recordInfo"] == {"offset": "102", "timestamp": None}
    (record,) = value["payload"]["records"]["my-topic-0"]
    assert "key" not in record and "value" not in record


def test_each_record_has_its_own_original_and_facts() -> None:
    """So that it can be put back, whatever form the value has."""
    for written, offset, key in zip(_written(_failure()), (100, 102), (b"test-key", None)):
        (original,) = [value for name, value in written.headers if name == ORIGINAL_HEADER]
        record = decode_original(original)
        assert (record["topic"], record["offset"], record["key"]) == ("my-topic", offset, key)
        facts = {name: value for name, value in written.headers if name != ORIGINAL_HEADER}
        assert facts["lambda.condition"] == b"RetryAttemptsExhausted"
        assert facts["lambda.error.type"] == b"ValueError"
        assert facts["lambda.attempts"] == b"3"
        assert ("lambda.first.timestamp" in facts) == (offset == 100)
        assert "lambda.input.payload.omitted" not in facts


def test_a_self_managed_kafka_has_no_arn() -> None:
    """Neither in the facts nor in the event."""
    first, _ = _written(_failure(), Envelope("kafka_event", SERVERS))
    value = json.loads(first.value)
    assert "eventSourceArn" not in value["KafkaBatchInfo"]
    assert value["payload"]["eventSource"] == "SelfManagedKafka"


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (retry.RETRIES_EXHAUSTED, "RetriesExhausted"),
        (retry.INVALID_REPLY, "RetriesExhausted"),
        (retry.AGE_EXCEEDED, "RecordAgeExceeded"),
        (retry.SIZE_EXCEEDED, "MaximumPayloadSizeExceeded"),
        (retry.INVALID_CONTENT, "InvalidRequestContent"),
        ("SCHEMA_NOT_FOUND", "SCHEMA_NOT_FOUND"),
    ],
)
def test_the_condition_in_aws_s_words(condition: str, expected: str) -> None:
    """Where AWS has one; the header keeps ours."""
    first, _ = _written(_failure(condition=condition))
    assert json.loads(first.value)["requestContext"]["condition"] == expected
    assert ("lambda.condition", condition.encode()) in first.headers


@pytest.mark.parametrize(
    "changes",
    [
        {"status_code": 0, "attempts": 2},
        {"status_code": 413, "condition": retry.SIZE_EXCEEDED},
    ],
)
def test_no_answer_no_response_context(changes) -> None:
    """Never answered, or too large to be asked: null."""
    first, _ = _written(_failure(**changes))
    assert json.loads(first.value)["responseContext"] is None


@pytest.mark.parametrize("attempts", [0, 2])
def test_a_record_that_was_too_old_says_nothing_of_an_answer(attempts: int) -> None:
    """Not even that there was none, also where it had been tried before."""
    changes = {"status_code": 0, "attempts": attempts, "condition": retry.AGE_EXCEEDED}
    first, _ = _written(_failure(**changes))
    assert "responseContext" not in json.loads(first.value)


def test_a_record_that_a_reply_named() -> None:
    """The function itself has not failed; an error of its own may have any name."""
    for error, expected in (("BatchItemFailure", None), ("Unhandled", "Unhandled")):
        changes = {"error_type": "BatchItemFailure", "function_error": error}
        first, _ = _written(_failure(**changes))
        response = json.loads(first.value)["responseContext"]
        assert response == {
            "statusCode": 200,
            "executedVersion": "$LATEST",
            "functionError": expected,
        }


def test_what_a_schema_made_of_it_is_in_the_event() -> None:
    """The payload is what the function of an event source mapping would have got."""
    decoded = [Decoded(value=b'{"v":1}', value_schema=("AVRO", "7")), None]
    first, second = _written(_failure(replace(RECORDS, decoded=decoded)))
    (record,) = json.loads(first.value)["payload"]["records"]["my-topic-0"]
    assert record["value"] == "eyJ2IjoxfQ=="
    assert record["valueSchemaMetadata"] == {"dataFormat": "AVRO", "schemaId": "7"}
    assert "valueSchemaMetadata" not in json.loads(second.value)["payload"]["records"]["my-topic-0"]


def test_a_record_too_large_for_the_topic_goes_without_its_event() -> None:
    """The original is kept, and a header says what is left out; the others are whole."""
    large = Records([1, 2], [1, 2], [b"k", b"k"], [b"x" * 3000, b"x"], [None, None])
    first, second = _written(_failure(large), max_bytes=6000)
    assert json.loads(first.value)["payload"] is None
    assert json.loads(first.value)["KafkaBatchInfo"]["payloadSize"] > 4000
    assert ("lambda.input.payload.omitted", b"true") in first.headers
    assert [decode_original(v)["value"] for n, v in first.headers if n == ORIGINAL_HEADER] == [
        b"x" * 3000
    ]
    assert json.loads(second.value)["payload"]
    assert all(record.size_bytes <= 6000 for record in (first, second))


def test_what_aws_writes_of_a_stream() -> None:
    """Where the record is, in the words of Kinesis; and the original with its number as a text."""
    number = 49590338271490256608559692538361571095921575989136588898
    records = Records([joined(number)], [TIMESTAMP], [b"key"], [b"data"], [None])
    arn = "arn:aws:kinesis:us-east-2:123456789012:stream/my-topic"
    event = Envelope("kinesis_event", stream_arns=(("my-topic", arn),))
    (record,) = _written(_failure(records), event)
    value = json.loads(record.value)
    assert record.key == b"key"
    assert list(value) == [
        "requestContext",
        "responseContext",
        "version",
        "timestamp",
        "KinesisBatchInfo",
        "payload",
    ]
    assert value["KinesisBatchInfo"] == {
        "shardId": "shardId-000000000000",
        "startSequenceNumber": str(number),
        "endSequenceNumber": str(number),
        "approximateArrivalOfFirstRecord": "2019-11-14T18:16:04.835Z",
        "approximateArrivalOfLastRecord": "2019-11-14T18:16:04.835Z",
        "batchSize": 1,
        "streamArn": arn,
    }
    assert value["payload"]["Records"][0]["kinesis"]["sequenceNumber"] == str(number)
    (original,) = [data for name, data in record.headers if name == TEXT_ORIGINAL_HEADER]
    assert decode_original(original, TEXTS)["offset"] == str(number)


def test_what_aws_sends_to_a_queue() -> None:
    """Of a whole batch, and in the order of AWS's fields; the event goes with it to a bucket."""
    document, payload = batch_document("my-topic", 0, _failure(), "my-function", EVENT, NOW_MS)
    assert list(document) == [
        "requestContext",
        "responseContext",
        "version",
        "timestamp",
        "KafkaBatchInfo",
    ]
    assert document["requestContext"] == {
        "requestId": "e4b46cbf",
        "functionArn": "my-function",
        "condition": "RetryAttemptsExhausted",
        "approximateInvokeCount": 3,
    }
    assert document["KafkaBatchInfo"] == {
        "batchSize": 2,
        "eventSourceArn": MSK,
        "bootstrapServers": SERVERS,
        "payloadSize": len(payload),
        "recordsInfo": {
            "my-topic-0": {
                "firstRecordOffset": "100",
                "lastRecordOffset": "102",
                "firstRecordTimestamp": "2019-11-14T18:16:04.835Z",
                "lastRecordTimestamp": None,
            }
        },
    }
    assert [each["offset"] for each in json.loads(payload)["records"]["my-topic-0"]] == [100, 102]


def test_what_aws_sends_to_a_queue_of_a_stream() -> None:
    """A record that was too old has no answer of the function."""
    number = 49590338271490256608559692538361571095921575989136588898
    numbers = [joined(number), joined(number + 7, 2)]
    records = Records(numbers, [TIMESTAMP] * 2, [b"k"] * 2, [b"d"] * 2, [None] * 2)
    event = Envelope("kinesis_event", stream_arns=(("my-topic", "arn"),))
    failure = _failure(records, condition=retry.AGE_EXCEEDED)
    document, payload = batch_document("my-topic", 6, failure, "my-function", event, NOW_MS)
    assert list(document) == ["requestContext", "version", "timestamp", "KinesisBatchInfo"]
    assert document["requestContext"]["condition"] == "RecordAgeExceeded"
    assert document["KinesisBatchInfo"] == {
        "shardId": "shardId-000000000006",
        "startSequenceNumber": str(number),
        "endSequenceNumber": str(number + 7),
        "approximateArrivalOfFirstRecord": "2019-11-14T18:16:04.835Z",
        "approximateArrivalOfLastRecord": "2019-11-14T18:16:04.835Z",
        "batchSize": 2,
        "streamArn": "arn",
    }
    assert len(json.loads(payload)["Records"]) == 2
