"""Whole runs: error records as an event source mapping writes them."""

from __future__ import annotations

import base64
import json
from typing import Any

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.lambda_server import LambdaContext
from tests.conftest import Names
from tests.sink import (
    FUNCTION,
    assert_caught_up,
    assert_exactly_once,
    coordinates,
    facts,
    failed,
    records_of,
    run,
    serve,
)


def test_each_failed_record_is_written_with_its_key(broker: KafkaBroker, names: Names) -> None:
    """Keys go where Java's producers put them, records without one take turns; none is lost."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=2)
    broker.create_topic(errors, partitions=3)
    keys = [b"foo", b"bar", b"foo", None, b"bar", None, None, b"foo"]
    records = [NewRecord(p, key, b"bad %d" % n) for p in range(2) for n, key in enumerate(keys)]
    broker.produce(topic, records)

    def handler(event: Any, context: LambdaContext) -> None:
        if any(base64.b64decode(r["value"]).startswith(b"bad") for r in records_of(event)):
            raise ValueError("cannot process this order")

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            envelope="kafka_event",
            on_error="log",
            error_topic=errors,
            error_record="aws",
            max_retries=1,
        )
    sources = {coordinates(record): record for record in broker.read_all(topic)}
    assert len(failed(broker, errors)) == len(sources) == 16
    assert_exactly_once(broker, names.group(), [topic], errors=errors)
    assert_caught_up(broker, names.group(), topic)

    homes: dict[bytes | None, list[int]] = {}
    seen: dict[tuple[bytes | None, int], list[int]] = {}
    for written in broker.read_all(errors):
        value = json.loads(written.value or b"")
        (event_records,) = value["payload"]["records"].values()
        (record,) = event_records
        source = sources[record["topic"], record["partition"], record["offset"]]
        assert written.key == source.key
        assert base64.b64decode(record["value"]) == source.value
        assert value["payload"]["eventSource"] == "SelfManagedKafka"
        assert value["KafkaBatchInfo"]["recordInfo"]["offset"] == str(source.offset)
        assert value["KafkaBatchInfo"]["bootstrapServers"] == broker.bootstrap_servers
        assert value["requestContext"]["condition"] == "RetriesExhausted"
        assert value["requestContext"]["functionArn"] == FUNCTION
        assert value["requestContext"]["approximateInvokeCount"] == 2
        assert value["requestContext"]["requestId"]
        assert value["responseContext"]["statusCode"] == 200
        assert facts(written)["lambda.error.message"] == "cannot process this order"
        homes.setdefault(written.key, []).append(written.partition)
        seen.setdefault((written.key, source.partition), []).append(source.offset)
    # murmur2 of the key, without its sign, modulo the partitions.
    assert set(homes[b"foo"]) == {_java_partition(b"foo", 3)}
    assert set(homes[b"bar"]) == {_java_partition(b"bar", 3)}
    assert sorted(homes[None]) == [0, 0, 1, 1, 2, 2]
    for (key, _), offsets in seen.items():
        assert key is None or offsets == sorted(offsets)


def _java_partition(key: bytes, partitions: int) -> int:
    """As `org.apache.kafka.common.utils.Utils.murmur2` has it."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if rest := key[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return ((h ^ h >> 15) & 0x7FFFFFFF) % partitions
