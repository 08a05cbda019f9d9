"""Whole runs: what records may look like, and what a log may look like around them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from confluent_kafka import Producer

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.faults import slow
from tests.conftest import Names
from tests.raw_records import RawRecord, send
from tests.sink import (
    Invocation,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    by_partition,
    facts,
    invocations,
    numbered,
    offsets_called,
    originals,
    records_of,
    run,
    serve,
)

TIMESTAMP = 1_700_000_000_000
MIB = 2**20


def test_records_of_every_kind_reach_the_function(broker: KafkaBroker, names: Names) -> None:
    """JSON as JSON to the last digit, text as text, the rest as base64; tombstones and no keys."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1, max_message_bytes=2 * MIB)
    broker.create_topic(responses, partitions=1, max_message_bytes=2 * MIB)
    large = b"x" * MIB
    headers = [("trace", b"a1"), ("trace", b'{"a": 1}'), ("raw", b"\xff\x00"), ("none", None)]
    records = [
        NewRecord(0, b"customer-1", None, (), TIMESTAMP),
        NewRecord(0, None, b"text", (), TIMESTAMP),
        NewRecord(0, b"", b"", (), TIMESTAMP),
        NewRecord(0, b"\xff\xfe", b"\x80binary\x00", headers, TIMESTAMP),
        NewRecord(0, b'{"id": 7}', b'{"n": 12345678901234567890123, "f": 1.10}', (), TIMESTAMP),
        NewRecord(0, b"17", b"true", (), TIMESTAMP),
        NewRecord(0, b"k", 'Zoë "quoted"\n\u2028\x00\U0001f600'.encode(), (), TIMESTAMP),
        NewRecord(0, b"large", large, (), TIMESTAMP),
        NewRecord(0, b"large", large, (), TIMESTAMP),
    ]
    broker.produce(topic, records)
    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            include_headers=True,
        )
        (call,) = invocations(server)
        (payload,) = (c.payload for c in server.calls if c.invocation_type == "RequestResponse")

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    seen = [(entry["key"], entry["value"]) for entry in call.entries]
    assert seen == [
        ("customer-1", None),
        (None, "text"),
        ("", ""),
        (text(b"\xff\xfe"), text(b"\x80binary\x00")),
        ({"id": 7}, {"n": 12345678901234567890123, "f": 1.1}),
        (17, True),
        ("k", 'Zoë "quoted"\n\u2028\x00\U0001f600'),
        ("large", large.decode()),
        ("large", large.decode()),
    ]
    assert b'"value":{"n": 12345678901234567890123, "f": 1.10}' in payload
    assert [entry["timestamp"] for entry in call.entries] == [TIMESTAMP] * 9
    assert [entry["headers"] for entry in call.entries] == [
        [
            {"key": "trace", "value": "a1"},
            {"key": "trace", "value": {"a": 1}},
            {"key": "raw", "value": text(b"\xff\x00")},
            {"key": "none", "value": None},
        ]
        if record.headers
        else []
        for record in records
    ]
    results = [json.loads(r.value or b"")["result"] for r in broker.read_all(responses)]
    assert results == [value for _, value in seen]
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)


def _entry(topic: str, partition: int, offset: int, value: str) -> bytes:
    """A record without a key as the function gets it."""
    fields = {
        "timestamp": TIMESTAMP,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "key": None,
        "value": value,
    }
    return json.dumps({"payload": fields}, separators=(",", ":")).encode()


def _payload(topic: str, partition: int, values: list[str], first: int = 0) -> bytes:
    entries = (_entry(topic, partition, first + n, value) for n, value in enumerate(values))
    return b"[" + b",".join(entries) + b"]"


def test_a_header_name_that_is_no_text_costs_nothing(broker: KafkaBroker, names: Names) -> None:
    """Clients of other languages write any bytes; Java reads them as U+FFFD, and so does a run. The
    record is sent like any other, and put with its headers into its error record if it fails."""
    topic, errors, group = names.topic(), names.topic("errors"), names.group()
    broker.create_topic(topic, partitions=1)
    broker.create_topic(errors, partitions=1)
    headers = [(b"caf\xe9", b"1"), (b"trace", b"2")]
    sent = [RawRecord(b"k", b"%d" % n, headers if n == 1 else ()) for n in range(3)]
    send(broker, topic, 0, sent)
    options: dict[str, Any] = {"topics": topic, "consumer_group": group, "batch_size": 1}
    options |= {"on_error": "log", "error_topic": errors, "max_retries": 0}

    def fails_with_headers(event: Any, context: Any) -> None:
        if any(entry["headers"] for entry in records_of(event)):
            raise ValueError("cannot process this order")

    with serve(fails_with_headers) as server:
        run(broker, server, envelope="kafka_event", **options)
        calls = invocations(server)
    (read,) = [entry["headers"] for call in calls for entry in call.entries if entry["headers"]]
    assert read == [{"\ufffd": [49]}, {"trace": [50]}]
    assert offsets_called(server) == [[0], [1], [2]]
    assert broker.committed(group, topic) == {0: 3}
    (error,) = broker.read_all(errors)
    (original,) = originals(error)
    assert [header["name"] for header in original["headers"]] == ["\ufffd", "trace"]


def test_payloads_are_bounded_to_the_byte(broker: KafkaBroker, names: Names) -> None:
    """A batch of exactly --batch_bytes is one call; one byte more and its last record waits.

    A record that is too large by itself costs itself only: an error record, and no call.
    """
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=3)
    fitting = ["a" * 10, "b" * 20, "c" * 30, "d" * 40]
    limit = len(_payload(topic, 0, fitting))
    alone = "e" * (limit - len(_payload(topic, 2, [""])))
    values = {
        0: fitting * 2,
        1: [*fitting[:3], "d" * 41],
        2: ["before", alone, alone + "e", "after"],
    }
    broker.produce(
        topic,
        [
            NewRecord(partition, None, value.encode(), (), TIMESTAMP)
            for partition, column in values.items()
            for value in column
        ],
    )
    with serve() as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            batch_bytes=limit,
            batch_window_secs=300,
        )
        called = [offsets_called(server, partition) for partition in range(3)]
        payloads = [c.payload for c in server.calls if c.invocation_type == "RequestResponse"]

    assert called == [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 1, 2], [3]],
        [[0], [1], [3]],
    ]
    assert sorted(map(len, payloads))[-3:] == [limit] * 3
    assert _payload(topic, 0, fitting) in payloads
    (error,) = broker.read_all(errors)
    assert facts(error)["lambda.condition"] == "MaximumPayloadSizeExceeded"
    assert facts(error)["lambda.error.type"] == "MaximumPayloadSizeExceeded"
    assert facts(error)["lambda.attempts"] == "0"
    message = facts(error)["lambda.error.message"]
    assert f"{limit + 1} bytes" in message
    assert f"{limit} (--batch_bytes)" in message
    (original,) = originals(error)
    assert (original["partition"], original["offset"]) == (2, 2)
    assert original["value"] == alone.encode() + b"e"
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)
    assert_answers_match(broker, [topic], responses)
    assert (ended.summary["records"], ended.summary["errors"]) == (16, 1)


def test_offsets_without_a_record_are_passed_over(broker: KafkaBroker, names: Names) -> None:
    """Aborted transactions, the markers of transactions and what compaction removed.

    None of it reaches the function, none of it is waited for, and the committed offset reaches
    the end of the log also where no record is behind the last gap, or none is there at all.
    """
    ledger, accounts = names.topic("ledger"), names.topic("accounts")
    responses = names.topic("responses")
    broker.create_topic(ledger, partitions=2)
    good, bad = ([NewRecord(0, None, b"%s" % word) for _ in range(30)] for word in (b"g", b"b"))
    broker.produce(ledger, bad, transaction="abort")
    broker.produce(ledger, good, transaction="commit")
    broker.produce(ledger, bad, transaction="abort")
    broker.produce(ledger, good)
    broker.produce(ledger, bad, transaction="abort")
    broker.produce(ledger, [record._replace(partition=1) for record in bad], transaction="abort")
    broker.create_topic(
        accounts,
        partitions=1,
        cleanup_policy="compact",
        segment_ms=1000,
        min_cleanable_dirty_ratio=0.01,
    )
    # Every tenth key is there once only, so that gaps of nine are between what is kept.
    keys = (b"only %d" % n if n % 10 == 0 else b"%d" % (n % 7) for n in range(90))
    broker.produce(accounts, [(0, key, b"change", (), TIMESTAMP) for key in keys])
    broker.produce(accounts, [(0, b"last", b"change", (), TIMESTAMP + 10_000)])
    kept = broker.compact_wait(accounts, fewer_than=91)
    assert len(kept) == 17

    # Slow, so that ranges without a record come behind a call that is running.
    with serve(faults=[slow(0.2, times=None)]) as server:
        run(
            broker,
            server,
            topics=f"{ledger},{accounts}",
            consumer_group=names.group(),
            response_topic=responses,
            batch_size=8,
        )
        calls = invocations(server)

    assert_exactly_once(broker, names.group(), [ledger, accounts], responses)
    assert_caught_up(broker, names.group(), ledger)
    assert_caught_up(broker, names.group(), accounts)
    assert_rising(broker, responses)
    assert_one_at_a_time(calls)
    _assert_whole_batches(calls, 8)
    assert {entry["value"] for call in calls if call.topic == ledger for entry in call.entries} == {
        "g"
    }
    found = by_partition(answered(broker, responses))
    assert found[accounts, 0] == [record.offset for record in kept]
    assert len(found[ledger, 0]) == 60
    assert (ledger, 1) not in found


def _assert_whole_batches(calls: list[Invocation], size: int) -> None:
    """A gap ends no batch: all but a partition's last one are full."""
    sizes: dict[Any, list[int]] = {}
    for call in calls:
        sizes.setdefault(call.key, []).append(len(call.offsets))
    for column in sizes.values():
        assert column[:-1] == [size] * (len(column) - 1), sizes


def test_an_open_transaction_is_left_for_a_later_run(broker: KafkaBroker, names: Names) -> None:
    """A run that ends does not wait for it, and commits nothing of it; the next one goes on there.

    Also not what was written behind it: it comes later, and so after it.
    """
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 10))
    writer = Producer(
        {"bootstrap.servers": broker.bootstrap_servers, "transactional.id": names.group("writer")}
    )
    writer.init_transactions(30)
    writer.begin_transaction()
    for _ in range(5):
        writer.produce(topic, b"in a transaction", partition=0)
    assert writer.flush(30) == 0
    broker.produce(topic, numbered(2, 3, "behind it"))
    with serve() as server:
        run(broker, server, topics=topic, consumer_group=group, response_topic=responses)
        assert broker.committed(group, topic) == {0: 10, 1: 13}
        assert len(answered(broker, responses)) == 23
        writer.commit_transaction(30)
        ended = run(broker, server, topics=topic, consumer_group=group, response_topic=responses)
        calls = invocations(server)

    assert ended.stderr == ""
    assert_caught_up(broker, group, topic)
    assert_exactly_once(broker, group, [topic], responses)
    assert_rising(broker, responses)
    assert_in_order(calls)


def test_values_that_must_be_json_and_are_not_are_rejected(
    broker: KafkaBroker, names: Names
) -> None:
    """With --value_format=json each of them is an error record and never sent; order is kept."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=1)
    values = [b'{"a":1}', b"{broken", b"[2]", None, b"\xff", b"text", b'"text"']
    broker.produce(topic, [NewRecord(0, None, value, (), TIMESTAMP) for value in values])
    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            value_format="json",
            max_retries=3,
        )
        assert offsets_called(server) == [[0], [2, 3], [6]]

    records = broker.read_all(errors)
    for record, offset in zip(records, [1, 4, 5], strict=True):
        (original,) = originals(record)
        assert (original["offset"], original["value"]) == (offset, values[offset])
        assert facts(record)["lambda.error.type"] == "InvalidJson"
        assert facts(record)["lambda.condition"] == "InvalidRecord"
        assert facts(record)["lambda.attempts"] == "0"
        value = json.loads(record.value or b"")
        assert (value["statusCode"], value["functionError"]) == (0, "InvalidJson")
    results = [json.loads(r.value or b"")["result"] for r in broker.read_all(responses)]
    assert results == [{"a": 1}, [2], None, "text"]
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)


def test_json_that_not_every_parser_reads_is_json(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """Half of a surrogate pair and large numbers: compared, sent as they are, and answered."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1)
    values = [
        rb'{"status":"paid","name":"cut \ud83d"}',
        b'{"status":"new","n":1e400}',
        b'{"status":"paid","n":%d}' % 10**400,
        b'{"status":"paid","\\udc00":-0.50}',
    ]
    broker.produce(topic, [NewRecord(0, None, value, (), TIMESTAMP) for value in values])
    filters = tmp_path / "filters.json"
    pattern = json.dumps({"value": {"status": ["paid"]}})
    filters.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            value_format="json",
            filter_criteria=filters,
            filter_unparsable="drop",
        )
        assert offsets_called(server) == [[0, 2, 3]]
        sent = server.calls[-1].payload
    results = [json.loads(r.value or b"")["result"] for r in broker.read_all(responses)]
    for index, result in zip((0, 2, 3), results, strict=True):
        assert b'"value":' + values[index] + b"}}" in sent
        assert result == json.loads(values[index])
    assert_caught_up(broker, names.group(), topic)


def test_a_record_too_large_for_lambda_is_kept_whole_in_its_error_record(
    broker: KafkaBroker, names: Names
) -> None:
    """Over 6 MiB as JSON, under it in Kafka: no call, and the original is not shortened."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=1, max_message_bytes=10 * MIB)
    broker.create_topic(errors, partitions=1, max_message_bytes=10 * MIB)
    large = b"\xff" * (5 * MIB)
    broker.produce(topic, [(0, b"k", b"a"), (0, b"k", large), (0, b"k", b"b")])
    with serve() as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            error_topic=errors,
            on_error="log",
        )
        assert offsets_called(server) == [[0], [2]]

    (error,) = broker.read_all(errors)
    assert facts(error)["lambda.condition"] == "MaximumPayloadSizeExceeded"
    assert facts(error)["lambda.input.payload.omitted"] == "true"
    assert json.loads(error.value or b"")["inputPayload"] is None
    assert originals(error)[0]["value"] == large
    assert_caught_up(broker, names.group(), topic)
