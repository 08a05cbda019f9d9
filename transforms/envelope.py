"""Envelope: Records -> what AWS's own event sources hand to a function. Pure.

``kafka_event`` is the event of a Kafka event source mapping: one object, its records under
``records`` by topic-partition. ``pipes`` is EventBridge Pipes' array, in which each record says
itself where it comes from. Both have keys and values as base64 and header bytes as signed numbers.
``kinesis_event`` is the event of a mapping of a Kinesis stream. The connector's envelope is in
`transforms.batch.payload`.
"""

from __future__ import annotations

import time
from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from transforms.names import SUB_BITS
from transforms.records import ARRAY, NO_TIMESTAMP, PREFIX_BYTES, Decoded, Frame, Header, Records

CONFLUENT, KAFKA_EVENT, PIPES, KINESIS_EVENT = ENVELOPES = (
    "confluent",
    "kafka_event",
    "pipes",
    "kinesis_event",
)
WINDOWED = (KAFKA_EVENT, KINESIS_EVENT)

_RECORDS = Frame(b'{"Records":[', b"]}")


@dataclass(frozen=True, slots=True)
class WindowFacts:
    """What a function is told of the tumbling window that its records are in.

    Attributes:
        start_ms: Where it begins, in milliseconds since the epoch.
        end_ms: Where it ends.
        state: What the function has returned last in this window, as JSON text.
        final: Whether nothing more comes of it.
        early: Whether it ends early: the same window may go on with an empty state.
    """

    start_ms: int
    end_ms: int
    state: bytes
    final: bool = False
    early: bool = False


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands around the records.

    Attributes:
        name: One of `ENVELOPES`; `WINDOWED` ones can have windows.
        bootstrap_servers: As the event shows them, a comma separated list.
        event_source_arn: ARN of the MSK cluster, or None for any other Kafka.
        source_format: Whether what has a schema is sent as the bytes it is, without the schema's
            id, and not as the JSON that was made of it.
        stream_arns: Streams' names and their ARNs.
        invoke_identity_arn: Of the role that a mapping would invoke with.
    """

    name: str = CONFLUENT
    bootstrap_servers: str = ""
    event_source_arn: str | None = None
    source_format: bool = False
    stream_arns: tuple[tuple[str, str], ...] = ()
    invoke_identity_arn: str = ""

    @property
    def source(self) -> dict[str, str]:
        """The fields that say which cluster the records are from."""
        source = {"eventSource": "aws:kafka" if self.event_source_arn else "SelfManagedKafka"}
        if self.event_source_arn:
            source["eventSourceArn"] = self.event_source_arn
        return source | {"bootstrapServers": self.bootstrap_servers}

    def frame(self, topic: str, partition: int, window: WindowFacts | None = None) -> Frame:
        """Head and tail of a payload with records of one partition, and maybe of one window."""
        if window:
            return self._window_frame(topic, partition, window)
        if self.name == KINESIS_EVENT:
            return _RECORDS
        if self.name != KAFKA_EVENT:
            return ARRAY
        key = orjson.dumps(f"{topic}-{partition}")
        head = orjson.dumps(self.source)[:-1] + b',"records":{' + key + b":["
        return Frame(head, b"]}}")

    def _window_frame(self, topic: str, partition: int, window: WindowFacts) -> Frame:
        """What AWS has beside the records of a stream; for a topic the same, with another place."""
        frame = self.frame(topic, partition)
        place = {"topicPartition": f"{topic}-{partition}"}
        if self.name == KINESIS_EVENT:
            place = {"shardId": _shard_id(partition), "eventSourceARN": self._arn(topic)}
        times = {"start": _iso(window.start_ms), "end": _iso(window.end_ms)}
        flags = {
            "isFinalInvokeForWindow": window.final,
            "isWindowTerminatedEarly": window.early,
        }
        tail = b',"window":%b,"state":%b,%b' % (
            orjson.dumps(times),
            window.state,
            orjson.dumps(place | flags)[1:],
        )
        return Frame(frame.head, frame.tail[:-1] + tail)

    def _arn(self, stream: str) -> str:
        return dict(self.stream_arns).get(stream, stream)


def _shard_id(shard: int) -> str:
    return f"shardId-{shard:012d}"


def _iso(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms // 1000))


def encode_event_records(
    topic: str, partition: int, records: Records, envelope: Envelope
) -> list[bytes]:
    """Each record as one entry of the envelope's list.

    A record without a key has no ``key``, a tombstone no ``value``; what a schema made of them
    (`Records.decoded`) is sent in their place, with the schema beside it.
    """
    if envelope.name == KINESIS_EVENT:
        return _stream_records(topic, partition, records, envelope)
    place: dict[str, Any] = {"topic": topic, "partition": partition}
    if envelope.name == PIPES:
        place = envelope.source | {"eventSourceKey": f"{topic}-{partition}"} | place
    head = orjson.dumps(place)[:-1].replace(b"%", b"%%")
    entry = head + b',"offset":%d,"timestamp":%d,"timestampType":"%b"%b%b,"headers":%b}'
    keys, values = records.keys, records.values
    if any(records.decoded):
        source = envelope.source_format
        by_schema = [made or Decoded() for made in records.decoded]
        keys = [_sent(data, made.key, source) for data, made in zip(keys, by_schema)]
        values = [_sent(data, made.value, source) for data, made in zip(values, by_schema)]
    columns = (
        records.offsets,
        records.timestamps,
        _timestamp_types(records),
        _base64_fields(b"key", keys),
        _base64_fields(b"value", values),
        _headers(records.headers),
    )
    entries = [entry % row for row in zip(*columns)]
    for index, made in enumerate(records.decoded):
        if made and (made.key_schema or made.value_schema):
            entries[index] = entries[index][:-1] + _schema_fields(made) + b"}"
    return entries


def _stream_records(stream: str, shard: int, records: Records, envelope: Envelope) -> list[bytes]:
    arn, shard_id = envelope._arn(stream), _shard_id(shard)
    rest = {
        "eventSource": "aws:kinesis",
        "eventVersion": "1.0",
        "eventID": f"{shard_id}:",
        "eventName": "aws:kinesis:record",
        "invokeIdentityArn": envelope.invoke_identity_arn,
        "awsRegion": [*arn.split(":"), "", "", ""][3],
        "eventSourceARN": arn,
    }
    head, _, tail = orjson.dumps(rest)[1:].replace(b"%", b"%%").partition(f'{shard_id}:"'.encode())
    entry = (
        b'{"kinesis":{"kinesisSchemaVersion":"1.0","partitionKey":%b,"sequenceNumber":"%b",'
        b'"data":"%b","approximateArrivalTimestamp":%b},'
        + head
        + shard_id.encode()
        + b':%b"'
        + tail
    )
    # Records of an aggregate have its number, as Lambda gives it to them.
    numbers = [b"%d" % (each >> SUB_BITS) for each in records.offsets]
    return [
        entry % row
        for row in zip(
            [orjson.dumps((key or b"").decode(errors="replace")) for key in records.keys],
            numbers,
            [b2a_base64(data or b"", newline=False) for data in records.values],
            [repr(ms / 1000).encode() for ms in records.timestamps],
            numbers,
        )
    ]


def _sent(data: bytes | None, json: bytes | None, source: bool) -> bytes | None:
    """What is sent of a key or value: itself if no schema was used, which has made no JSON."""
    if json is None or data is None:
        return data
    return data[PREFIX_BYTES:] if source else json


def _timestamp_types(records: Records) -> Sequence[bytes]:
    if not any(records.log_append) and NO_TIMESTAMP not in records.timestamps:
        return [b"CREATE_TIME"] * len(records)
    log_append = records.log_append or [False] * len(records)
    return [
        b"NO_TIMESTAMP_TYPE"
        if ms == NO_TIMESTAMP
        else b"LOG_APPEND_TIME"
        if by_broker
        else b"CREATE_TIME"
        for ms, by_broker in zip(records.timestamps, log_append)
    ]


def _base64_fields(name: bytes, column: Sequence[bytes | None]) -> list[bytes]:
    head = b',"' + name + b'":"'
    return [
        b"" if data is None else head + b2a_base64(data, newline=False) + b'"' for data in column
    ]


def _headers(column: Sequence[Sequence[Header] | None]) -> Sequence[bytes]:
    if not any(column):
        return [b"[]"] * len(column)
    return [_signed(headers) if headers else b"[]" for headers in column]


def _signed(headers: Sequence[Header]) -> bytes:
    """Headers as Java sees them: bytes are signed there. One without a value is empty."""
    return orjson.dumps(
        [{name: memoryview(value or b"").cast("b").tolist()} for name, value in headers]
    )


def _schema_fields(made: Decoded) -> bytes:
    return b"".join(
        b',"%b":%b' % (name, orjson.dumps({"dataFormat": schema[0], "schemaId": schema[1]}))
        for name, schema in (
            (b"keySchemaMetadata", made.key_schema),
            (b"valueSchemaMetadata", made.value_schema),
        )
        if schema
    )
