"""The demo as its user runs it, and the Kafka that it runs on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.local.demo import make_orders
from pipeline.local.demo_function import handler
from pipeline.local.kafka import LocalKafka, NewRecord, StoredRecord
from tests import ROOT


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.local", "demo", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("records", [1, 300])
def test_json_summary_is_all_there_is_on_stdout(records: int) -> None:
    demo = run_demo("--records", str(records), "--summary=json")

    assert demo.returncode == 0, demo.stderr
    [line] = demo.stdout.splitlines()
    summary = json.loads(line)
    assert summary["records"] == summary["responses"] + summary["errors"] == records
    assert summary["errors"] == 1
    assert summary["halted"] == []
    assert sum(summary["committed"].values()) == records
    assert "--summary=json" in demo.stderr  # the command it ran


def test_text_shows_command_responses_error_record_and_summary() -> None:
    # Whatever AWS settings and proxy the user has, the demo gets to its own endpoint.
    demo = run_demo(
        "--records=300",
        AWS_PROFILE="no-such-profile",
        AWS_SESSION_TOKEN="secret-token",
        HTTP_PROXY="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
        COLUMNS="120",
    )

    assert demo.returncode == 0, demo.stderr
    # The broken order, in whichever call it was first.
    said = [line.split()[3] for line in demo.stderr.splitlines()]
    assert set(said) <= {"failed:", "recovered:"}
    assert "order 151 has no amount" in demo.stderr
    assert "./run.sh run \\\n    --kafka_bootstrap_servers=127.0.0.1:" in demo.stdout
    assert "Topic orders-results: 299 responses" in demo.stdout
    first = r'"offset":0}  {"order":\d+,"status":"accepted","total":'
    assert re.search(first, demo.stdout), demo.stdout
    assert "Topic orders-errors: 1 error record\n" in demo.stdout
    shown = dict(re.findall(r"^    ([\w.]+) +(\S.*)$", demo.stdout, re.MULTILINE))
    # The key's offsets, and the original's: the broken order's place in the topic.
    assert int(shown["endOffset"]) == int(shown["startOffset"]) + 1
    assert shown["offset"] == shown["startOffset"]
    assert shown["functionName"] == "settle-orders"
    assert shown["lambda.error.message"] == "order 151 has no amount"
    assert json.loads(shown["value"])["order"] == 151
    assert "records: 300 in" in demo.stdout.splitlines()[-1]


def test_orders_in_a_stream() -> None:
    """Its shards split; where a record is, is told with the stream's numbers."""
    demo = run_demo("--records=300", "--source=kinesis", COLUMNS="200")

    assert demo.returncode == 0, demo.stderr
    assert "Stream orders has 300 orders" in demo.stdout
    assert "    --stream=orders \\\n    --lease_table=demo" in demo.stdout
    assert "Topic orders-results: 299 responses" in demo.stdout
    assert re.search(r'"offset":"495\d{53}"}  {"order":\d+,"status":"accepted"', demo.stdout)
    shown = dict(re.findall(r"^    ([\w.]+) +(\S.*)$", demo.stdout, re.MULTILINE))
    assert shown["firstOffset"] == shown["lastOffset"] == shown["offset"]
    assert json.loads(shown["value"])["order"] == 151
    assert "records: 300 in" in demo.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [["--records=0"], ["--records", "many"], ["--records=50001"], ["--summary=xml"], ["--what"]],
)
def test_wrong_arguments_end_with_one_line(arguments: list[str]) -> None:
    demo = run_demo(*arguments)

    assert demo.returncode == 2
    assert demo.stdout == ""
    assert len(demo.stderr.splitlines()) == 1


# -- orders and function ---------------------------------------------------------------------


def entry_of(record: NewRecord) -> dict[str, object]:
    assert record.key and record.value
    place = {"timestamp": 1, "topic": "orders", "partition": 2, "offset": 3}
    return {"payload": {**place, "key": record.key.decode(), "value": json.loads(record.value)}}


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_exactly_one_order_makes_the_function_fail(count: int) -> None:
    broken = count // 2 + 1
    failed = []
    for number, record in enumerate(make_orders(count, broken), 1):
        try:
            [reply] = handler([entry_of(record)], None)
        except ValueError as error:
            failed.append((number, str(error)))
        else:
            assert reply["payload"]["offset"] == 3
            assert reply["payload"]["result"]["order"] == number
    assert failed == [(broken, f"order {broken} has no amount")]


# -- LocalKafka ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kafka() -> Iterator[LocalKafka]:
    with LocalKafka() as running:
        yield running


def test_records_come_back_as_they_were_written(kafka: LocalKafka) -> None:
    kafka.produce(
        "as-written",
        [
            NewRecord(b"key", b"value", (("h", b"1"), ("h", b"2"), ("none", None)), partition=1),
            NewRecord(None, None, partition=1),
            NewRecord(b"", b"", (("empty", b""),), partition=0),
            NewRecord(b"\x00\xff", b"\xff\x00", partition=1),
        ],
    )

    assert kafka.read_all("as-written") == [
        StoredRecord(0, 0, b"", b"", (("empty", b""),)),
        StoredRecord(1, 0, b"key", b"value", (("h", b"1"), ("h", b"2"), ("none", None))),
        StoredRecord(1, 1, None, None),
        StoredRecord(1, 2, b"\x00\xff", b"\xff\x00"),
    ]


def test_a_key_has_one_partition_and_keeps_its_order(kafka: LocalKafka) -> None:
    kafka.produce("by-key", (NewRecord(b"%d" % (n % 7), b"%d" % n) for n in range(700)))

    records = kafka.read_all("by-key")
    assert len(records) == 700
    for key in {record.key for record in records}:
        of_key = [record for record in records if record.key == key]
        assert len({record.partition for record in of_key}) == 1
        assert [int(record.value or b"") for record in of_key] == list(range(int(key), 700, 7))


def test_reading_an_unknown_topic_does_not_make_it(kafka: LocalKafka) -> None:
    assert kafka.read_all("never-made") == []

    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "g"})
    assert "never-made" not in consumer.list_topics(timeout=10).topics
    consumer.close()


def test_another_client_commits_and_sees_its_offsets(kafka: LocalKafka) -> None:
    kafka.produce("committed", [NewRecord(b"k", b"v", partition=3)] * 5)
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "commits"})
    place = TopicPartition("committed", 3)
    try:
        assert consumer.get_watermark_offsets(place, timeout=10) == (0, 5)
        assert consumer.committed([place], timeout=10)[0].offset < 0
        consumer.commit(offsets=[TopicPartition("committed", 3, 4)], asynchronous=False)
        assert consumer.committed([place], timeout=10)[0].offset == 4
    finally:
        consumer.close()
