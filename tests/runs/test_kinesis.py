"""Whole runs on streams: the process as a user starts it, against our own Kinesis, which keeps the
limits of AWS; see test_kinesis_others.py for servers that nobody here wrote."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_lambda_powertools.utilities.batch import (
    BatchProcessor,
    EventType,
    process_partial_response,
)
from aws_lambda_powertools.utilities.data_classes.kinesis_stream_event import KinesisStreamRecord

from pipeline.local.broker import KafkaBroker
from pipeline.local.kinesis import LocalKinesis, partition_keys
from pipeline.local.lambda_server import LambdaContext
from tests import sink
from tests.conftest import Names
from tests.kinesis import (
    STREAM,
    TABLE,
    Function,
    Watched,
    arguments_of,
    by_key,
    came_by_key,
    checkpoints_past_what_came,
    owners,
    put,
    rows_of,
    run_on,
    start_on,
)
from tests.servers.moto_server import moto_server


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        yield running


def test_a_stream_is_done_and_not_again(kinesis: LocalKinesis) -> None:
    arn = kinesis.create_stream(STREAM, 2)
    texts = put(kinesis, 300)
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, batch_size=40, invoke_identity_arn="arn:aws:iam::1:role/r")
        calls = len(function.calls)
        again = run_on(kinesis, server)
    assert sorted(function.texts()) == sorted(texts)
    for number in (0, 1):
        stored = kinesis.records(STREAM, number)
        assert function.first()[number] == [each.data.decode() for each in stored]
    assert ended.summary["records"] == 300
    assert (len(function.calls), again.summary["records"]) == (calls, 0)
    # As a mapping has it.
    event = function.events[0]
    record = event["Records"][0]
    shard = int(record["eventID"][8:20])
    stored = kinesis.records(STREAM, shard)[0]
    assert list(event) == ["Records"]
    assert json.dumps(record) == json.dumps(
        {
            "kinesis": {
                "kinesisSchemaVersion": "1.0",
                "partitionKey": stored.key,
                "sequenceNumber": str(stored.number),
                "data": record["kinesis"]["data"],
                "approximateArrivalTimestamp": stored.ms / 1000,
            },
            "eventSource": "aws:kinesis",
            "eventVersion": "1.0",
            "eventID": f"shardId-{shard:012d}:{stored.number}",
            "eventName": "aws:kinesis:record",
            "invokeIdentityArn": "arn:aws:iam::1:role/r",
            "awsRegion": "us-east-1",
            "eventSourceARN": arn,
        }
    )
    # As the Kinesis Client Library has it.
    for number in (0, 1):
        row = rows_of(kinesis)[f"shardId-{number:012d}"]
        assert row["checkpoint"] == {"S": str(kinesis.records(STREAM, number)[-1].number)}
        assert row["checkpointSubSequenceNumber"] == {"N": "0"}
        assert "leaseOwner" not in row and int(row["leaseCounter"]["N"]) > 1
    assert not kinesis.refused


def test_shards_split_and_merge_while_they_are_read(kinesis: LocalKinesis) -> None:
    """A chain of reshards, one of them with a shard in between that has nothing."""
    kinesis.create_stream(STREAM, 2)
    # 0 -> 2, 3; 1 and 3 -> 4; 4 -> 5, 6; 5 and 6 -> 7
    function = Watched(kinesis)
    with sink.serve(function) as server:
        with start_on(kinesis, server, until="forever", batch_size=25) as run:
            texts = put(kinesis, 200, "first")
            run.until(lambda: bool(function.calls), "nothing came")
            kinesis.split(STREAM, 0)
            texts += put(kinesis, 100, "second")
            kinesis.merge(STREAM, 1, 3)
            kinesis.split(STREAM, 4)
            kinesis.merge(STREAM, 5, 6)
            texts += put(kinesis, 100, "third")
            run.until(lambda: len(function.texts()) == 400, "not all of it came")
            run.send(signal.SIGTERM)
            run.wait(0)
        ended = run_on(kinesis, server)
    assert sorted(function.texts()) == sorted(texts)
    assert came_by_key(function) == by_key(kinesis, 8)
    assert function.too_early == []
    assert ended.summary["records"] == 0
    rows = rows_of(kinesis)
    done = {key for key, row in rows.items() if row["checkpoint"] == {"S": "SHARD_END"}}
    assert done == {f"shardId-{number:012d}" for number in (0, 1, 3, 4, 5, 6)}
    assert rows["shardId-000000000004"]["parentShardId"] == {
        "SS": ["shardId-000000000001", "shardId-000000000003"]
    }
    assert rows["shardId-000000000004"]["childShardIds"] == {
        "SS": ["shardId-000000000005", "shardId-000000000006"]
    }
    assert not kinesis.refused


@pytest.mark.parametrize("lanes", [1, 3])
def test_what_a_crash_leaves_is_done(kinesis: LocalKinesis, lanes: int) -> None:
    """Killed again and again, with a reshard in between: all of it comes, in order."""
    kinesis.create_stream(STREAM, 2)
    function = Function(secs=0.02)
    options = {"batch_size": 10, "lease_secs": 1, "parallelization_factor": lanes}
    texts = put(kinesis, 150, "first")
    with sink.serve(function) as server:
        for turn in range(3):
            enough = len(function.calls) + 3 + turn
            with start_on(kinesis, server, until="forever", **options) as run:
                run.until(partial(function.has, enough), "nothing came")
                if turn == 1:
                    kinesis.split(STREAM, 1)
                    texts += put(kinesis, 150, "second")
                run.kill()
            assert checkpoints_past_what_came(kinesis, function) == []
        ended = run_on(kinesis, server, **options)
    assert sorted(function.texts()) == sorted(texts), ended.stdout + ended.stderr
    assert came_by_key(function) == by_key(kinesis, 4)
    assert ended.summary["lag_max"] == 0


# The poison message: of 300 records the 83rd fails, with batches of 200.


def _poison(kinesis: LocalKinesis, ms: int | None = None) -> tuple[list[str], str]:
    kinesis.create_stream(STREAM, 1)
    texts = [f"order {index}" for index in range(300)]
    texts[82] = "bad 82"
    kinesis.put(STREAM, [("key", each.encode()) for each in texts], ms)
    return texts, str(kinesis.records(STREAM, 0)[82].number)


def test_without_limits_a_poison_message_blocks_its_shard(kinesis: LocalKinesis) -> None:
    _poison(kinesis)
    function = Function()
    options = {"until": "forever", "batch_size": 200, "max_retries": -1}
    with sink.serve(function) as server, start_on(kinesis, server, **options) as run:
        run.until(partial(function.has, 3), "it was not tried again")
        run.kill()
    # The good ones of its batch come again each time, the ones behind it never.
    assert {len(numbers) for _, numbers, _ in function.calls} == {200}
    assert "order 250" not in function.texts()
    assert rows_of(kinesis)["shardId-000000000000"]["checkpoint"] == {"S": "TRIM_HORIZON"}


def test_retries_limit_a_poison_message_and_lose_its_batch(kinesis: LocalKinesis) -> None:
    texts, _ = _poison(kinesis)
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, batch_size=200, max_retries=2, on_error="log")
    assert [len(numbers) for _, numbers, _ in function.calls] == [200, 200, 200, 100]
    assert function.texts() == texts
    assert ended.summary["errors"] == 200
    assert '"condition":"RetriesExhausted"' in ended.stderr or "failed" in ended.stderr


def test_age_limits_a_poison_message(kinesis: LocalKinesis) -> None:
    """What is too old is given up uncalled; what came later is not."""
    kinesis.create_stream(STREAM, 1)
    kinesis.put(STREAM, [("key", b"bad 0")] * 10, ms=int(time.time() * 1000) - 600_000)
    kinesis.put(STREAM, [("key", b"order 1")])
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(
            kinesis, server, batch_size=200, max_retries=-1, max_record_age_secs=60, on_error="log"
        )
    assert function.texts() == ["order 1"]
    assert ended.summary["errors"] == 10


def test_a_poison_message_s_batch_is_told_to_a_queue(kinesis: LocalKinesis) -> None:
    """And while it cannot be told, nothing of it is committed."""
    texts, _ = _poison(kinesis)
    stored = kinesis.records(STREAM, 0)
    options = {
        "batch_size": 200,
        "max_retries": 1,
        "on_error": "log",
        "on_failure_destination": "arn:aws:sqs:us-east-1:123456789012:failed-of-stream",
        "preflight": "false",
    }
    function = Function()
    with moto_server() as url:
        with sink.serve(function) as server:
            arguments = arguments_of(kinesis, server, **options)
            env = sink.environment(AWS_ENDPOINT_URL_SQS=url)
            with sink.Sink(arguments, env) as run:
                (error,) = run.wait(1).errors
            assert (
                "--on_failure_destination=arn:aws:sqs:us-east-1:123456789012:failed-of-stream"
                in error
            )
            row = rows_of(kinesis)["shardId-000000000000"]
            assert row["checkpoint"] == {"S": "TRIM_HORIZON"}
            sqs = boto3.client(
                "sqs",
                endpoint_url=url,
                region_name="us-east-1",
                aws_access_key_id="a",
                aws_secret_access_key="b",
            )
            queue = sqs.create_queue(QueueName="failed-of-stream")["QueueUrl"]
            with sink.Sink(arguments, env) as run:
                run.wait(0)
        (message,) = sqs.receive_message(QueueUrl=queue)["Messages"]
    document = json.loads(message["Body"])
    assert document["requestContext"]["condition"] == "RetryAttemptsExhausted"
    assert document["requestContext"]["approximateInvokeCount"] == 2
    info = document["KinesisBatchInfo"]
    assert (info["batchSize"], info["shardId"]) == (200, "shardId-000000000000")
    assert info["startSequenceNumber"] == str(stored[0].number)
    assert info["endSequenceNumber"] == str(stored[199].number)
    assert function.texts() == texts


def test_bisecting_loses_the_poison_message_alone(kinesis: LocalKinesis) -> None:
    texts, number = _poison(kinesis)
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(
            kinesis, server, batch_size=200, max_retries=1, bisect_on_error=True, on_error="log"
        )
    assert ended.summary["errors"] == 1
    assert [n for _, n, _ in function.calls if number in n][-2:] == [[number]] * 2
    assert {text for _, _, data in function.calls[:-1] for text in data} <= set(texts)
    assert set(function.texts()) == set(texts)


def test_a_partial_failure_is_a_checkpoint(kinesis: LocalKinesis) -> None:
    """The lowest number named; and after progress the attempts are counted afresh."""
    texts, number = _poison(kinesis)
    function = Function(names_failures=True)
    with sink.serve(function) as server:
        ended = run_on(
            kinesis,
            server,
            batch_size=200,
            max_retries=1,
            on_error="log",
            reply="batch_item_failures",
        )
    # With its batch; then twice with what is behind it; then that without it.
    assert [len(numbers) for _, numbers, _ in function.calls[:4]] == [200, 118, 118, 117]
    assert [numbers[0] for _, numbers, _ in function.calls[1:3]] == [number] * 2
    assert function.texts() == texts
    assert ended.summary["errors"] == 1


def test_what_says_nothing_is_success(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 1)
    put(kinesis, 5)
    replies = iter(["", [], None, {}, {"batchItemFailures": None}])
    with sink.serve(lambda event, context: next(replies)) as server:
        ended = run_on(kinesis, server, batch_size=1, reply="batch_item_failures")
    assert (ended.summary["records"], ended.summary["retries"]) == (5, 0)


# Where a run begins.


def test_latest_is_where_the_first_run_began(kinesis: LocalKinesis) -> None:
    """Whatever has ended it before a record was done; closed shards are left out."""
    kinesis.create_stream(STREAM, 1)
    old = int(time.time() * 1000) - 60_000
    kinesis.put(STREAM, [("a", b"old")], ms=old)
    kinesis.split(STREAM, 0)
    kinesis.put(STREAM, [(key, b"old") for key in "abcdef"], ms=old)
    function = Function()
    options = {"starting_position": "LATEST", "lease_secs": 1}
    with sink.serve(function) as server:
        with start_on(kinesis, server, until="forever", **options) as run:
            run.until(lambda: len(kinesis.tables.get(TABLE, ())) == 2, "there are no rows")
            run.until(
                lambda: all("leaseOwner" in row for row in rows_of(kinesis).values()), "not begun"
            )
            run.kill()
        kinesis.split(STREAM, 1)
        texts = put(kinesis, 20, "new")
        run_on(kinesis, server, **options)
    assert sorted(function.texts()) == sorted(texts)


def test_at_a_time(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 1)
    for minute in range(3):
        kinesis.put(STREAM, [("a", b"m%d" % minute)], ms=1_700_000_000_000 + 60_000 * minute)
    function = Function()
    with sink.serve(function) as server:
        run_on(
            kinesis,
            server,
            starting_position="AT_TIMESTAMP",
            starting_timestamp="2023-11-14T22:14:20Z",
        )
    assert function.texts() == ["m1", "m2"]


def _kcl_row(number: int, checkpoint: str, **more: Any) -> dict[str, Any]:
    return {
        "leaseKey": {"S": f"shardId-{number:012d}"},
        "leaseOwner": {"S": "worker-1"},
        "leaseCounter": {"N": "77"},
        "checkpoint": {"S": checkpoint},
        "checkpointSubSequenceNumber": {"N": "0"},
        "ownerSwitchesSinceCheckpoint": {"N": "1"},
        **more,
    }


def test_a_table_of_the_client_library_is_taken_over(kinesis: LocalKinesis) -> None:
    """Its worker is silent. A number within an aggregate comes again, and a child has its parent
    done; a parent whose row was cleared away is not read again."""
    kinesis.create_stream(STREAM, 3)
    put(kinesis, 120)
    kinesis.split(STREAM, 2)
    kinesis.put(STREAM, [(f"key-{i}", b"later") for i in range(30)])
    first, second = (kinesis.records(STREAM, number) for number in (0, 1))
    kinesis.create_table(TABLE)
    rows = [
        _kcl_row(0, str(first[4].number)),
        _kcl_row(1, str(second[4].number), checkpointSubSequenceNumber={"N": "3"}),
        _kcl_row(3, "TRIM_HORIZON"),
        _kcl_row(4, "TRIM_HORIZON"),
    ]
    for row in rows:
        kinesis.tables[TABLE][row["leaseKey"]["S"]] = row
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server)
    came = function.first()
    assert came[0] == [each.data.decode() for each in first[5:]]
    assert came[1] == [each.data.decode() for each in second[4:]]
    assert set(came) == {0, 1} | {n for n in (3, 4) if kinesis.records(STREAM, n)}


def test_a_worker_of_the_client_library_ends_the_run(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 1)
    put(kinesis, 20)
    kinesis.create_table(TABLE)
    row = kinesis.tables[TABLE]["shardId-000000000000"] = _kcl_row(0, "TRIM_HORIZON")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.2):
            row["leaseCounter"] = {"N": str(int(row["leaseCounter"]["N"]) + 1)}

    threading.Thread(target=renew).start()
    try:
        with sink.serve(Function()) as server:
            run = run_on(kinesis, server, code=1, until="forever")
    finally:
        ended.set()
    (error,) = run.errors
    assert "--lease_table=orders-to-lambda is in use: worker-1 has the lease" in error


# Several copies.


def test_copies_share_the_shards(kinesis: LocalKinesis) -> None:
    """One that comes is given its share, what one that goes had is taken at once; nothing comes
    twice, and what a copy had that was killed is taken when its leases have run out."""
    kinesis.create_stream(STREAM, 4)
    function = Function()
    texts = put(kinesis, 200, "first")
    options = {"until": "forever", "lease_secs": 3}
    with sink.serve(function) as server, start_on(kinesis, server, **options) as first:
        first.until(lambda: sorted(owners(kinesis).values()) == [4], "not begun")
        with start_on(kinesis, server, **options) as second:
            second.until(lambda: sorted(owners(kinesis).values()) == [2, 2], "not shared")
            texts += put(kinesis, 200, "second")
            second.until(lambda: len(function.texts()) == 400, "not all of it came")
            second.send(signal.SIGTERM)
            second.wait(0)
        first.until(lambda: sorted(owners(kinesis).values()) == [4], "not taken back")
        texts += put(kinesis, 100, "third")
        first.until(lambda: len(function.texts()) == 500, "not all of it came")
        assert sum(len(data) for _, _, data in function.calls) == 500
        with start_on(kinesis, server, **options) as second:
            second.until(lambda: sorted(owners(kinesis).values()) == [2, 2], "not shared")
            second.kill()
        first.until(lambda: sorted(owners(kinesis).values()) == [4], "not taken over")
        kinesis.split(STREAM, 0)
        texts += put(kinesis, 100, "fourth")
        first.until(lambda: len(function.texts()) == 600, "not all of it came")
        first.send(signal.SIGTERM)
        first.wait(0)
    assert sorted(function.texts()) == sorted(texts)
    assert came_by_key(function) == by_key(kinesis, 6)


def test_workers_share_the_shards(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 4)
    texts = put(kinesis, 300)
    kinesis.split(STREAM, 1)
    texts += put(kinesis, 300, "second")
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(kinesis, server, workers=2)
    assert sorted(function.texts()) == sorted(texts)
    assert came_by_key(function) == by_key(kinesis, 6)
    assert ended.summary["records"] == 600


# What goes wrong.


def test_throttles_and_expired_iterators_are_waited_out(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 1)
    texts = put(kinesis, 100)
    function = Function()
    kinesis.refuse("GetRecords", "ProvisionedThroughputExceededException", 2)
    kinesis.refuse("GetShardIterator", "ProvisionedThroughputExceededException", 1)
    kinesis.refuse("ListShards", "LimitExceededException", 1)
    kinesis.refuse("DescribeStreamSummary", "InternalFailure", 1)
    kinesis.refuse("UpdateItem", "ProvisionedThroughputExceededException", 2)
    with sink.serve(function) as server, start_on(kinesis, server, until="forever") as run:
        run.until(lambda: len(function.texts()) == 100, "not all of it came")
        kinesis.refuse("GetRecords", "ExpiredIteratorException", 1)
        texts += put(kinesis, 10, "later")
        run.until(lambda: len(function.texts()) == 110, "not all of it came")
        kinesis.refuse("GetRecords", "InternalFailure", 2)
        texts += put(kinesis, 10, "last")
        run.until(lambda: len(function.texts()) == 120, "not all of it came")
        run.send(signal.SIGTERM)
        run.wait(0)
    assert function.texts() == texts


@pytest.mark.parametrize(
    ("operation", "code", "said"),
    [
        ("GetRecords", "KMSAccessDeniedException", "--stream=orders cannot be read: KMSAccess"),
        ("UpdateItem", "AccessDeniedException", "--lease_table=orders-to-lambda cannot be used"),
    ],
)
def test_what_nobody_can_wait_out_ends_the_run(
    kinesis: LocalKinesis, operation: str, code: str, said: str
) -> None:
    kinesis.create_stream(STREAM, 1)
    put(kinesis, 10)
    kinesis.refuse(operation, code, -1)
    with sink.serve(Function()) as server:
        ended = run_on(kinesis, server, code=1, until="forever")
    (error,) = ended.errors
    assert said in error


def test_a_stream_that_is_not_there_is_named(kinesis: LocalKinesis) -> None:
    with sink.serve(Function()) as server:
        ended = run_on(kinesis, server, code=1)
    (error,) = ended.errors
    assert error.startswith("error: --stream=orders is not found; create it first")


def test_what_retention_has_taken_is_said(kinesis: LocalKinesis) -> None:
    """The committed number is not there any more: it goes on at the oldest record."""
    kinesis.create_stream(STREAM, 1)
    texts = put(kinesis, 30)
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server)
        texts += put(kinesis, 30, "second")
        kinesis.trim(STREAM, 0, 40)
        ended = run_on(kinesis, server)
    assert function.texts() == texts[:30] + texts[40:]
    assert "lies before what retention has left" in ended.stderr


def test_a_stream_made_anew_begins_at_its_first_record(kinesis: LocalKinesis) -> None:
    """While no run is up, and while one is."""
    kinesis.create_stream(STREAM, 1)
    texts = put(kinesis, 30)
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server)
        kinesis.create_stream(STREAM, 2)
        texts += put(kinesis, 30, "second")
        with start_on(kinesis, server, until="forever") as run:
            run.until(lambda: len(function.texts()) == 60, "not all of it came")
            kinesis.create_stream(STREAM, 1)
            texts += put(kinesis, 30, "third")
            run.until(lambda: len(function.texts()) == 90, "not all of it came")
            run.send(signal.SIGTERM)
            run.wait(0)
    assert sorted(function.texts()) == sorted(texts)


def test_a_stream_that_is_deleted_ends_the_run(kinesis: LocalKinesis) -> None:
    """Where it is made again it begins at its first record."""
    kinesis.create_stream(STREAM, 1)
    texts = put(kinesis, 20)
    function = Function()
    with sink.serve(function) as server:
        with start_on(kinesis, server, until="forever") as run:
            run.until(partial(function.got, 20), "not all of it came")
            kinesis.delete_stream(STREAM)
            (error,) = run.wait(1).errors
        kinesis.create_stream(STREAM, 1)
        texts += put(kinesis, 20, "again")
        run_on(kinesis, server)
    assert "stream orders is gone" in error
    assert function.texts() == texts


def test_a_loss_to_retention_is_said(kinesis: LocalKinesis) -> None:
    """What is committed is older than what the stream keeps."""
    kinesis.create_stream(STREAM, 1)
    kinesis.put(STREAM, [("a", b"old")], ms=int(time.time() * 1000) - 30 * 3_600_000)
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server)
        kinesis.put(STREAM, [("a", b"new")])
        ended = run_on(kinesis, server)
    assert function.texts() == ["old", "new"]
    assert "orders-0: its last committed record is older than the stream's retention of 24 h" in (
        ended.stderr
    )


def test_a_mapping_s_settings_and_function_run_unchanged(
    kinesis: LocalKinesis, tmp_path: Path
) -> None:
    """As AWS shows the mapping, and as powertools for Lambda processes its batches."""
    arn = kinesis.create_stream(STREAM, 1)
    mapping = tmp_path / "mapping.json"
    mapping.write_text(
        json.dumps(
            {
                "UUID": "14e0db71-5d35-4eb5-b481-8945cf9d10c2",
                "StartingPosition": "TRIM_HORIZON",
                "BatchSize": 8,
                "MaximumBatchingWindowInSeconds": 0,
                "ParallelizationFactor": 1,
                "EventSourceArn": arn,
                "FunctionArn": sink.FUNCTION,
                "LastModified": "2026-11-01T00:00:00+00:00",
                "LastProcessingResult": "OK",
                "State": "Disabled",
                "StateTransitionReason": "User action",
                "DestinationConfig": {"OnFailure": {}},
                "MaximumRecordAgeInSeconds": -1,
                "BisectBatchOnFunctionError": True,
                "MaximumRetryAttempts": 2,
                "TumblingWindowInSeconds": 0,
                "FunctionResponseTypes": ["ReportBatchItemFailures"],
            }
        )
    )
    texts = [f"order {index}" for index in range(20)]
    kinesis.put(STREAM, [(f"key-{i % 3}", text.encode()) for i, text in enumerate(texts)])
    tried: list[str] = []
    processor = BatchProcessor(event_type=EventType.KinesisDataStreams)

    def process(record: KinesisStreamRecord) -> None:
        text = record.kinesis.data_as_text()
        tried.append(text)
        if text == "order 12" or (text == "order 5" and tried.count(text) == 1):
            raise ValueError("cannot process this")

    def handler(event: Any, context: LambdaContext) -> Any:
        return process_partial_response(event, process, processor, context)  # type: ignore[arg-type]

    given = {
        "config": mapping,
        "stream_poll_secs": 0.2,
        "aws_region": "us-east-1",
        "kinesis_endpoint_url": kinesis.url,
        "dynamodb_endpoint_url": kinesis.url,
        "until": "caught_up",
        "summary": "json",
    }
    with sink.serve(handler) as server:
        arguments = sink.command_line({**given, "lambda_endpoint_url": server.url})
        with sink.Sink(arguments, sink.environment()) as run:
            ended = run.wait(0)
    assert ended.summary["errors"] == 1
    assert list(dict.fromkeys(tried)) == texts
    # Again from the lowest that is named; after that progress its retries are counted afresh.
    assert tried[:11] == [*texts[:8], *texts[5:8]]
    assert tried.count("order 12") == 4
    (table,) = kinesis.tables
    assert table == "beam-lambda-sink-14e0db71-5d35-4eb5-b481-8945cf9d10c2"


def test_a_halted_shard_keeps_its_children_back(kinesis: LocalKinesis, tmp_path: Path) -> None:
    """All that is told of it has the stream's numbers, on the page too."""
    kinesis.create_stream(STREAM, 2)
    zero, one = (partition_keys(2, number, 1)[0] for number in (0, 1))
    kinesis.put(STREAM, [(zero, b"good"), (zero, b"bad"), (one, b"other")])
    kinesis.split(STREAM, 0)
    kinesis.put(STREAM, [(zero, b"child")])
    function = Function()
    with sink.serve(function) as server:
        ended = run_on(
            kinesis,
            server,
            code=3,
            batch_size=1,
            report=tmp_path / "run.html",
            log_format="json",
            log_level="DEBUG",
        )
    assert sorted(function.texts()) == ["bad", "good", "other"]
    assert "is committed to lease table orders-to-lambda. Mend" in ended.stderr
    assert ended.summary["lag_unit"] == "ms"
    (halted,) = ended.summary["halted"]
    number = kinesis.records(STREAM, 0)[1].number
    assert (halted["topic"], halted["partition"], halted["offset"]) == (STREAM, 0, str(number))
    assert f'"offset":"{number}"' in (tmp_path / "run.html").read_text()


def test_filters_are_for_data(kinesis: LocalKinesis, tmp_path: Path) -> None:
    """What is no JSON is dropped, as AWS does it; what is dropped is committed."""
    kinesis.create_stream(STREAM, 1)
    kinesis.put(STREAM, [("a", b'{"n":1}'), ("a", b'{"n":2}'), ("a", b"text")])
    criteria = tmp_path / "filters.json"
    criteria.write_text(json.dumps({"Filters": [{"Pattern": '{"data":{"n":[2]}}'}]}))
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server, filter_criteria=criteria)
    assert function.texts() == ['{"n":2}']
    last = kinesis.records(STREAM, 0)[-1].number
    assert rows_of(kinesis)["shardId-000000000000"]["checkpoint"] == {"S": str(last)}


def test_responses_and_errors_go_to_topics(
    kinesis: LocalKinesis, broker: KafkaBroker, names: Names
) -> None:
    """With keys that name the record as the stream does."""
    kinesis.create_stream(STREAM, 1)
    kinesis.put(STREAM, [("a", b"good"), ("a", b"bad"), ("a", b"better")])
    numbers = [str(each.number) for each in kinesis.records(STREAM, 0)]
    responses, errors = names.topic("responses"), names.topic("errors")
    for topic in (responses, errors):
        broker.create_topic(topic, 1)

    def function(event: Any, context: LambdaContext) -> Any:
        if any(each["payload"]["value"] == "bad" for each in event):
            raise ValueError("cannot process this")
        return sink.answer(event)

    options = {
        "envelope": None,
        "kafka_bootstrap_servers": broker.bootstrap_servers,
        "response_topic": responses,
        "error_topic": errors,
        "on_error": "log",
    }
    with sink.serve(function) as server:
        run_on(kinesis, server, bisect_on_error=True, **options)
    assert [json.loads(each.key or b"") for each in broker.read_all(responses)] == [
        {"topic": STREAM, "partition": 0, "offset": numbers[0]},
        {"topic": STREAM, "partition": 0, "offset": numbers[2]},
    ]
    (error,) = broker.read_all(errors)
    assert json.loads(error.key or b"") == {
        "topic": STREAM,
        "partition": 0,
        "firstOffset": numbers[1],
        "lastOffset": numbers[1],
    }
    # And once the function is mended, from there into it again.
    with sink.serve(sink.answer) as server:
        arguments = arguments_of(kinesis, server, **options, until=None)
        redrive = ["redrive", "--first_redrive", *arguments]
        with sink.Sink(redrive, sink.environment()) as run:
            run.wait(0)
    last = broker.read_all(responses)[-1]
    assert json.loads(last.key or b"") == {"topic": STREAM, "partition": 0, "offset": numbers[1]}
    assert json.loads(last.value or b"")["result"] == "bad"


def test_several_streams_in_one_table(kinesis: LocalKinesis) -> None:
    """With the keys that the client library gives to several."""
    kinesis.create_stream(STREAM, 1)
    arn = kinesis.create_stream("payments", 1)
    kinesis.put(STREAM, [("a", b"order")])
    kinesis.put("payments", [("a", b"payment")])
    function = Function()
    with sink.serve(function) as server:
        run_on(kinesis, server, stream=f"{STREAM},{arn}")
        run_on(kinesis, server, stream=f"{STREAM},{arn}")
    assert sorted(data for _, _, [data] in function.calls) == ["order", "payment"]
    assert sorted(key.split(":")[1] for key in rows_of(kinesis)) == [STREAM, "payments"]
    assert {row["shardId"]["S"] for row in rows_of(kinesis).values()} == {"shardId-000000000000"}
