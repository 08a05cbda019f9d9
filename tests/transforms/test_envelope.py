"""Envelope: AWS's own shapes of a Kafka event, field by field."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.batch.payload import PayloadFormat, encode_records
from transforms.envelope import ENVELOPES, KAFKA_EVENT, KINESIS_EVENT, Envelope, WindowFacts
from transforms.names import joined
from transforms.records import NO_TIMESTAMP, Decoded, Records

MSK = "arn:aws:kafka:us-east-1:123456789012:cluster/orders/5a7c-2"
SERVERS = "b-1.example:9092,b-2.example:9092"
EVENT, MSK_EVENT = Envelope("kafka_event", SERVERS), Envelope("kafka_event", SERVERS, MSK)
PIPES, MSK_PIPES = Envelope("pipes", SERVERS), Envelope("pipes", SERVERS, MSK)
both = pytest.mark.parametrize("envelope", [EVENT, PIPES], ids=["kafka_event", "pipes"])


def _records(**columns) -> Records:
    """One record, but for what is given."""
    count = len(next(iter(columns.values()), [0]))
    whole = {
        "offsets": list(range(15, 15 + count)),
        "timestamps": [1545084650987] * count,
        "keys": [b"c-7"] * count,
        "values": [b"Hello, this is a test."] * count,
        "headers": [[("headerKey", b"headerValue")]] * count,
    }
    return Records(**(whole | columns))


def _payload(envelope: Envelope, records: Records, topic: str = "mytopic", partition: int = 0):
    encoded = encode_records(topic, partition, records, PayloadFormat(envelope=envelope))
    assert not encoded.rejections
    return json.loads(envelope.frame(topic, partition).join(encoded.entries))


def _entries(envelope: Envelope, records: Records) -> list[dict]:
    payload = _payload(envelope, records)
    return payload if isinstance(payload, list) else payload["records"]["mytopic-0"]


RECORD = {
    "topic": "mytopic",
    "partition": 0,
    "offset": 15,
    "timestamp": 1545084650987,
    "timestampType": "CREATE_TIME",
    "key": "Yy03",
    "value": "SGVsbG8sIHRoaXMgaXMgYSB0ZXN0Lg==",
    "headers": [{"headerKey": [104, 101, 97, 100, 101, 114, 86, 97, 108, 117, 101]}],
}


@pytest.mark.parametrize(
    ("envelope", "expected"),
    [
        (
            EVENT,
            {
                "eventSource": "SelfManagedKafka",
                "bootstrapServers": SERVERS,
                "records": {"mytopic-0": [RECORD]},
            },
        ),
        (
            MSK_EVENT,
            {
                "eventSource": "aws:kafka",
                "eventSourceArn": MSK,
                "bootstrapServers": SERVERS,
                "records": {"mytopic-0": [RECORD]},
            },
        ),
        (
            PIPES,
            [
                {
                    "eventSource": "SelfManagedKafka",
                    "bootstrapServers": SERVERS,
                    "eventSourceKey": "mytopic-0",
                    **RECORD,
                }
            ],
        ),
        (
            MSK_PIPES,
            [
                {
                    "eventSource": "aws:kafka",
                    "eventSourceArn": MSK,
                    "bootstrapServers": SERVERS,
                    "eventSourceKey": "mytopic-0",
                    **RECORD,
                }
            ],
        ),
    ],
)
def test_a_payload_of_one_record(envelope: Envelope, expected) -> None:
    """The whole payload, nothing more and nothing less."""
    assert _payload(envelope, _records()) == expected


@both
def test_records_stand_in_order(envelope: Envelope) -> None:
    """One entry per record, in the order of the offsets."""
    entries = _entries(envelope, _records(offsets=[3, 4, 90], values=[b"a", b"b", b"c"]))
    assert [(entry["offset"], b64decode(entry["value"])) for entry in entries] == [
        (3, b"a"),
        (4, b"b"),
        (90, b"c"),
    ]


@both
def test_what_is_not_there_has_no_field(envelope: Envelope) -> None:
    """No key, no `key`; a tombstone has no `value`. Empty is not the same as not there."""
    records = _records(keys=[None, b"", b"k"], values=[b"", None, None])
    entries = _entries(envelope, records)
    found = [{name: e[name] for name in ("key", "value") if name in e} for e in entries]
    assert found == [{"value": ""}, {"key": ""}, {"key": "aw=="}]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, []),
        ([], []),
        ([("a", b"\x00\x7f\x80\xff")], [{"a": [0, 127, -128, -1]}]),
        ([("a", "\u00eb".encode())], [{"a": [-61, -85]}]),
        ([("a", b"1"), ("b", b""), ("a", b"2")], [{"a": [49]}, {"b": []}, {"a": [50]}]),
        ([("a", None)], [{"a": []}]),
        ([("%d", b"%"), ('qu"ote', b"x")], [{"%d": [37]}, {'qu"ote': [120]}]),
    ],
)
@both
def test_headers_are_signed_bytes_each_in_its_place(envelope, headers, expected) -> None:
    """Names may repeat, and each header is a map of its own."""
    (entry,) = _entries(envelope, _records(headers=[headers]))
    assert entry["headers"] == expected


@pytest.mark.parametrize(
    ("timestamps", "log_append", "expected"),
    [
        ([5, 6], (), [(5, "CREATE_TIME"), (6, "CREATE_TIME")]),
        ([5, 6], [True, True], [(5, "LOG_APPEND_TIME"), (6, "LOG_APPEND_TIME")]),
        ([5, 6], [False, True], [(5, "CREATE_TIME"), (6, "LOG_APPEND_TIME")]),
        ([5, 6], [None, True], [(5, "CREATE_TIME"), (6, "LOG_APPEND_TIME")]),
        ([NO_TIMESTAMP, 6], (), [(-1, "NO_TIMESTAMP_TYPE"), (6, "CREATE_TIME")]),
        ([NO_TIMESTAMP, 6], [False, True], [(-1, "NO_TIMESTAMP_TYPE"), (6, "LOG_APPEND_TIME")]),
    ],
)
@both
def test_who_set_the_timestamp(envelope, timestamps, log_append, expected) -> None:
    """The producer, the broker, or nobody: named as Kafka names it."""
    entries = _entries(envelope, _records(timestamps=timestamps, log_append=log_append))
    assert [(entry["timestamp"], entry["timestampType"]) for entry in entries] == expected


@both
def test_a_schema_s_text_takes_the_record_s_place(envelope: Envelope) -> None:
    """Decoded parts are sent in base64 too, with the schema beside them; the others as they are."""
    decoded = [
        Decoded(b'"k"', b'{"id":1}', ("AVRO", "7"), ("PROTOBUF", "8")),
        Decoded(value=b"raw", value_schema=("JSON", "9")),
        Decoded(key_schema=("AVRO", "7")),
        None,
        Decoded(),
    ]
    entries = _entries(
        envelope, _records(keys=[b"\x00"] * 5, values=[b"\x01"] * 5, decoded=decoded)
    )
    sent = [(b64decode(entry["key"]), b64decode(entry["value"])) for entry in entries]
    assert sent == [(b'"k"', b'{"id":1}'), (b"\x00", b"raw"), *[(b"\x00", b"\x01")] * 3]
    names = ("keySchemaMetadata", "valueSchemaMetadata")
    assert [{name: entry[name] for name in names if name in entry} for entry in entries] == [
        {
            "keySchemaMetadata": {"dataFormat": "AVRO", "schemaId": "7"},
            "valueSchemaMetadata": {"dataFormat": "PROTOBUF", "schemaId": "8"},
        },
        {"valueSchemaMetadata": {"dataFormat": "JSON", "schemaId": "9"}},
        {"keySchemaMetadata": {"dataFormat": "AVRO", "schemaId": "7"}},
        {},
        {},
    ]


def test_the_connector_s_envelope_has_a_schema_s_text_as_json() -> None:
    """It is put in as it is, neither parsed again nor counted as base64."""
    decoded = [Decoded(b'{"k":1}', b'{"v":10.00}'), None, Decoded(value=b"[1]")]
    records = _records(keys=[b"\xff"] * 3, values=[b"\xff"] * 3, decoded=decoded)
    encoded = encode_records("t", 0, records, PayloadFormat())
    parts = [json.loads(entry)["payload"] for entry in encoded.entries]
    assert [(part["key"], part["value"]) for part in parts] == [
        ({"k": 1}, {"v": 10.0}),
        ("/w==", "/w=="),
        ("/w==", [1]),
    ]
    assert b'{"v":10.00}' in encoded.entries[0]
    assert encoded.base64_fields == 3
    strict = encode_records("t", 0, records, PayloadFormat("json", "json"))
    assert sorted(strict.rejections) == [1, 2]


@pytest.mark.parametrize("topic", ["a%b", "%d%%", 'qu"ote', "back\\slash", "a.b-c_d"])
@pytest.mark.parametrize("name", ["kafka_event", "pipes"])
def test_names_are_data(topic: str, name: str) -> None:
    """No character of a topic's or a broker's name is taken for something else."""
    envelope = Envelope(name, "100%d:1", MSK + "%s")
    payload = _payload(envelope, _records(), topic, 3)
    entry = payload[0] if name == "pipes" else payload["records"][f"{topic}-3"][0]
    source = payload[0] if name == "pipes" else payload
    assert (entry["topic"], entry["partition"]) == (topic, 3)
    assert (source["bootstrapServers"], source["eventSourceArn"]) == ("100%d:1", MSK + "%s")


fields = st.none() | st.binary(max_size=12)
rows = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.integers(-1, 2**50),
        fields,
        fields,
        st.none() | st.lists(st.tuples(st.text(max_size=4), fields), max_size=3),
        st.booleans(),
    ),
    max_size=8,
)


@given(
    rows=rows,
    name=st.sampled_from([each for each in ENVELOPES if each != KINESIS_EVENT]),
    arn=st.sampled_from([None, MSK]),
    part=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
@settings(deadline=None, max_examples=200)
def test_any_records_come_out_as_they_went_in(rows, name, arn, part) -> None:
    """And a payload's size is known before it is made, of any part of the batch."""
    offset = 0
    offsets = [offset := offset + row[0] for row in rows]
    records = Records(
        offsets,
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
        [row[4] for row in rows],
        log_append=[row[5] for row in rows],
    )
    envelope = Envelope(name, SERVERS, arn)
    entries = encode_records("t", 1, records, PayloadFormat(envelope=envelope)).entries
    frame = envelope.frame("t", 1)
    low, high = sorted(part)
    some = entries[low:high]
    assert len(frame.join(some)) == frame.payload_bytes(sum(map(len, some)), len(some))
    payload = json.loads(frame.join(some))
    if name == "confluent":
        assert [entry["payload"]["offset"] for entry in payload] == offsets[low:high]
        return
    found = payload["records"]["t-1"] if name == "kafka_event" else payload
    back = replace(
        records.slice(low, high),
        offsets=[entry["offset"] for entry in found],
        timestamps=[entry["timestamp"] for entry in found],
        keys=[b64decode(e["key"]) if "key" in e else None for e in found],
        values=[b64decode(e["value"]) if "value" in e else None for e in found],
        headers=[
            [
                (key, bytes(byte % 256 for byte in value))
                for header in entry["headers"]
                for key, value in header.items()
            ]
            for entry in found
        ],
    )
    as_it_was = replace(
        records.slice(low, high),
        headers=[
            [(key, value or b"") for key, value in headers or ()]
            for headers in records.headers[low:high]
        ],
    )
    assert back == as_it_was


def test_the_event_of_a_stream() -> None:
    """As AWS's documents show it, to the order of the names."""
    arn = "arn:aws:kinesis:us-east-2:123456789012:stream/lambda-stream"
    number = 49590338271490256608559692538361571095921575989136588898
    records = Records(
        # The second one is within an aggregate.
        [joined(number), joined(10**129 - 1, 3)],
        [1545084650987, 1545084651000],
        [b"1", b'"%d"'],
        [b"Hello, this is a test.", b""],
        [None, None],
    )
    envelope = Envelope(
        KINESIS_EVENT,
        stream_arns=(("lambda-stream", arn),),
        invoke_identity_arn="arn:aws:iam::123456789012:role/lambda-role",
    )
    format = PayloadFormat(envelope=envelope)
    entries = encode_records("lambda-stream", 6, records, format).entries
    payload = envelope.frame("lambda-stream", 6).join(entries)
    assert payload.startswith(
        b'{"Records":[{"kinesis":{"kinesisSchemaVersion":"1.0","partitionKey":"1","sequenceNumber":'
        b'"49590338271490256608559692538361571095921575989136588898","data":'
        b'"SGVsbG8sIHRoaXMgaXMgYSB0ZXN0Lg==","approximateArrivalTimestamp":1545084650.987},'
        b'"eventSource":"aws:kinesis","eventVersion":"1.0","eventID":"shardId-000000000006:'
        b'49590338271490256608559692538361571095921575989136588898","eventName":'
        b'"aws:kinesis:record","invokeIdentityArn":"arn:aws:iam::123456789012:role/lambda-role",'
        b'"awsRegion":"us-east-2","eventSourceARN":"' + arn.encode() + b'"},'
    )
    second = json.loads(payload)["Records"][1]
    assert second["eventID"] == "shardId-000000000006:" + "9" * 129
    assert second["kinesis"]["partitionKey"] == '"%d"'
    assert second["kinesis"]["data"] == ""


def test_a_window_stands_beside_the_records() -> None:
    facts = WindowFacts(1_607_497_440_000, 1_607_497_500_000, b'{"n":12345678901234567890}', True)
    stream = Envelope(KINESIS_EVENT, stream_arns=(("s", "arn:aws:kinesis:eu-west-1:1:stream/s"),))
    assert stream.frame("s", 7, facts).join([b"1", b"2"]) == (
        b'{"Records":[1,2],"window":{"start":"2020-12-09T07:04:00Z","end":"2020-12-09T07:05:00Z"},'
        b'"state":{"n":12345678901234567890},"shardId":"shardId-000000000007",'
        b'"eventSourceARN":"arn:aws:kinesis:eu-west-1:1:stream/s",'
        b'"isFinalInvokeForWindow":true,"isWindowTerminatedEarly":false}'
    )
    topic = Envelope(KAFKA_EVENT, "b:1").frame("o", 3, replace(facts, final=False, early=True))
    assert topic.join([]) == (
        b'{"eventSource":"SelfManagedKafka","bootstrapServers":"b:1","records":{"o-3":[]},'
        b'"window":{"start":"2020-12-09T07:04:00Z","end":"2020-12-09T07:05:00Z"},'
        b'"state":{"n":12345678901234567890},"topicPartition":"o-3",'
        b'"isFinalInvokeForWindow":false,"isWindowTerminatedEarly":true}'
    )
