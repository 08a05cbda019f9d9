"""Whole runs with tumbling windows: states handed on, closed once, begun anew after a crash."""

from __future__ import annotations

import json
import signal
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaContext, LambdaServer
from tests import sink
from tests.conftest import Names
from tests.runs.test_hands import TOKEN, Told

STREAM, TABLE = "orders", "orders-to-lambda"
SIZE_MS = 60_000


class Function:
    """Its state is what it has seen. Notes its events, and by shard and window what the state was
    at the end of it."""

    def __init__(self, secs: float = 0.0) -> None:
        self._secs = secs
        self.lock = threading.Lock()
        self.events: list[dict[str, Any]] = []
        self.finals: list[tuple[str, str, list[str]]] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        time.sleep(self._secs)
        state = event["state"]
        with self.lock:
            self.events.append(event)
            if event["isFinalInvokeForWindow"]:
                place = event.get("shardId") or event["topicPartition"]
                self.finals.append((place, event["window"]["start"], state["seen"]))
                return None
        return {"state": {"seen": state.get("seen", []) + texts_of(event)}}

    def last(self) -> dict[tuple[str, str], list[str]]:
        """By shard and window, the state at its end; the last one, where there were several."""
        with self.lock:
            return {(place, start): seen for place, start, seen in self.finals}

    def has(self, calls: int) -> bool:
        return len(self.events) >= calls


def texts_of(event: dict[str, Any]) -> list[str]:
    """What an event's records hold."""
    if "Records" in event:
        return [b64decode(each["kinesis"]["data"]).decode() for each in event["Records"]]
    (records,) = event["records"].values()
    return [b64decode(each["value"]).decode() for each in records]


def start_of(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((ms - ms % SIZE_MS) // 1000))


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        yield running


def start(kinesis: LocalKinesis, server: LambdaServer, **options: Any) -> sink.Sink:
    given = {
        "stream": STREAM,
        "lease_table": TABLE,
        "lease_secs": 1,
        "stream_poll_secs": 0.2,
        "kinesis_endpoint_url": kinesis.url,
        "dynamodb_endpoint_url": kinesis.url,
        "function": sink.FUNCTION,
        "lambda_endpoint_url": server.url,
        "envelope": "kinesis_event",
        "reply": "batch_item_failures",
        "tumbling_window_secs": SIZE_MS // 1000,
        "until": "caught_up",
        "summary": "json",
        **options,
    }
    return sink.Sink(sink.command_line(given), sink.environment())


def put(kinesis: LocalKinesis, windows: int, each: int, first_ms: int) -> list[str]:
    """So many records in each of so many windows."""
    texts = []
    for number in range(windows * each):
        ms = first_ms + number // each * SIZE_MS + number % each
        texts.append(f"order {number}")
        kinesis.put(STREAM, [(f"key-{number % 9}", texts[-1].encode())], ms)
    return texts


def expected(kinesis: LocalKinesis, shards: int) -> dict[tuple[str, str], list[str]]:
    """By shard and window, what it has, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for number in range(shards):
        for each in kinesis.records(STREAM, number):
            place = f"shardId-{number:012d}", start_of(each.ms)
            found.setdefault(place, []).append(each.data.decode())
    return found


def checkpoint(kinesis: LocalKinesis, shard: int) -> str:
    return kinesis.tables[TABLE].get(f"shardId-{shard:012d}", {}).get("checkpoint", {}).get("S", "")


def long_ago() -> int:
    """Where a window began whose time is over."""
    ms = round(time.time() * 1000) - 20 * SIZE_MS
    return ms - ms % SIZE_MS


def test_each_window_of_a_stream_is_closed_once_with_all_it_has(kinesis: LocalKinesis) -> None:
    arn, first_ms = kinesis.create_stream(STREAM, 2), long_ago()
    put(kinesis, 3, 40, first_ms)
    function = Function()
    with sink.serve(function) as server, start(kinesis, server, batch_size=7) as run:
        ended = run.wait()
    assert function.last() == expected(kinesis, 2)
    assert len(function.finals) == len(function.last()) == 6
    assert not any(event["isWindowTerminatedEarly"] for event in function.events)
    for number in (0, 1):
        assert checkpoint(kinesis, number) == str(kinesis.records(STREAM, number)[-1].number)
    assert (ended.summary["records"], ended.summary["errors"]) == (120, 0)
    # As a mapping has it.
    first, final = function.events[0], next(e for e in function.events if not e["Records"])
    for event in (first, final):
        shard = event["shardId"]
        assert json.dumps(event | {"Records": []}) == json.dumps(
            {
                "Records": [],
                "window": {"start": event["window"]["start"], "end": event["window"]["end"]},
                "state": event["state"],
                "shardId": shard,
                "eventSourceARN": arn,
                "isFinalInvokeForWindow": event is final,
                "isWindowTerminatedEarly": False,
            }
        )
    assert first["state"] == {}
    assert first["window"]["start"] == start_of(first_ms)
    assert first["window"]["end"] == start_of(first_ms + SIZE_MS)


def test_a_crash_begins_the_windows_anew_that_it_has_cut_off(kinesis: LocalKinesis) -> None:
    """Killed again and again; what is committed is never past a window that was not closed."""
    kinesis.create_stream(STREAM, 2)
    put(kinesis, 4, 30, long_ago())
    function = Function(secs=0.02)
    with sink.serve(function) as server:
        for turn in range(3):
            enough = len(function.events) + 6 + turn
            options = {"until": "forever", "batch_size": 4, "commit_interval_secs": 0.1}
            with start(kinesis, server, **options) as run:
                run.until(partial(function.has, enough), "nothing came")
                run.kill()
            closed = {text for _, _, seen in function.finals for text in seen}
            for number in (0, 1):
                text = checkpoint(kinesis, number)
                for each in kinesis.records(STREAM, number):
                    if text.isdecimal() and each.number <= int(text):
                        assert each.data.decode() in closed
        with start(kinesis, server, batch_size=4) as run:
            run.wait()
    assert function.last() == expected(kinesis, 2)
    # What was closed and committed is not closed again; what was only closed may be, alike.
    for place, begun, seen in function.finals:
        assert seen == function.last()[place, begun]


def test_a_shard_that_ends_closes_its_window(kinesis: LocalKinesis) -> None:
    """Long before that is over; the children begin with windows of their own."""
    kinesis.create_stream(STREAM, 1)
    function = Function()
    options = {"until": "forever", "tumbling_window_secs": 900}
    with sink.serve(function) as server, start(kinesis, server, **options) as run:
        kinesis.put(STREAM, [(f"key-{n}", b"first %d" % n) for n in range(9)])
        run.until(partial(function.has, 1), "nothing came")
        assert checkpoint(kinesis, 0) == "TRIM_HORIZON"
        kinesis.split(STREAM, 0)
        kinesis.put(STREAM, [(f"key-{n}", b"second %d" % n) for n in range(9)])
        run.until(
            lambda: sum(len(texts_of(e)) for e in list(function.events)) == 18, "not all of it came"
        )
        assert [place for place, _, _ in function.finals] == ["shardId-000000000000"]
        assert checkpoint(kinesis, 0) == "SHARD_END"
        # What is not over is not done, and stays so if the run is told to end.
        run.send(signal.SIGTERM)
        run.wait()
    assert {checkpoint(kinesis, number) for number in (1, 2)} == {"TRIM_HORIZON"}
    assert len(function.finals) == 1


def test_a_state_that_is_too_large_ends_its_window_early(kinesis: LocalKinesis) -> None:
    kinesis.create_stream(STREAM, 1)
    put(kinesis, 1, 4, long_ago())
    events: list[Any] = []

    def function(event: Any, context: LambdaContext) -> Any:
        events.append(event)
        return {"state": {"of": len(events), "text": "x" * 2**20}}

    with sink.serve(function) as server, start(kinesis, server, batch_size=2) as run:
        run.wait()
    shape = [
        (len(e["Records"]), e["state"].get("of"), e["isWindowTerminatedEarly"]) for e in events
    ]
    assert shape == [(2, None, False), (0, 1, True), (2, None, False), (0, 3, True)]
    assert not any(event["isFinalInvokeForWindow"] for event in events)
    assert len({json.dumps(event["window"]) for event in events}) == 1
    assert checkpoint(kinesis, 0) == str(kinesis.records(STREAM, 0)[-1].number)


def test_a_reply_without_a_state_fails_its_call(kinesis: LocalKinesis) -> None:
    """And one that names a record goes on behind it, with its state."""
    kinesis.create_stream(STREAM, 1)
    put(kinesis, 1, 6, long_ago())
    numbers = [str(each.number) for each in kinesis.records(STREAM, 0)]
    sent: list[tuple[list[str], int]] = []

    def function(event: Any, context: LambdaContext) -> Any:
        own = [each["kinesis"]["sequenceNumber"] for each in event["Records"]]
        count = event["state"].get("count", 0)
        sent.append((own, count))
        if len(sent) == 1:
            return {"batchItemFailures": []}
        named = [{"itemIdentifier": number} for number in own if number == numbers[4]]
        done = own.index(numbers[4]) if named else len(own)
        return {"state": {"count": count + done}, "batchItemFailures": named}

    options = {"max_retries": 1, "on_error": "log"}
    with sink.serve(function) as server, start(kinesis, server, **options) as run:
        ended = run.wait()
    assert sent == [
        (numbers, 0),
        (numbers, 0),
        (numbers[4:], 4),
        (numbers[4:], 4),
        (numbers[5:], 4),
        ([], 5),
    ]
    assert ended.summary["errors"] == 1
    assert 'no object as "state"' not in ended.stdout
    assert 'has no object as "state"' in ended.stderr


# Kafka, which AWS has no windows for


def windows_of(topics: sink.Topics) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in topics.broker.read_all(topics.source):
        place = f"{record.topic}-{record.partition}", start_of(record.timestamp)
        found.setdefault(place, []).append((record.value or b"").decode())
    return found


def topics_of(broker: KafkaBroker, names: Names, **options: Any) -> sink.Topics:
    return sink.Topics(
        broker,
        names,
        envelope="kafka_event",
        reply="batch_item_failures",
        response_topic=None,
        tumbling_window_secs=SIZE_MS // 1000,
        **options,
    )


def test_windows_of_a_topic(broker: KafkaBroker, names: Names) -> None:
    """Killed in the middle: the offsets stay where the open window began, and it is begun anew."""
    topics = topics_of(broker, names, batch_size=4, kafka_config_file=sink.SAME_MEMBER)
    first_ms = long_ago()
    broker.produce(
        topics.source,
        [
            NewRecord(p, b"k", b"order %d/%d" % (p, n), timestamp=first_ms + n // 20 * SIZE_MS + n)
            for n in range(60)
            for p in range(2)
        ],
    )
    function = Function(secs=0.02)
    with sink.serve(function) as server:
        with topics.start(server, until="forever") as run:
            run.until(lambda: len(function.finals) >= 2, "no window was closed")
            run.kill()
        committed = broker.committed(topics.group, topics.source)
        assert set(committed.values()) <= {0, 20, 40}
        closed = {text for _, _, seen in function.finals for text in seen}
        for record in broker.read_all(topics.source):
            if record.offset < committed.get(record.partition, 0):
                assert (record.value or b"").decode() in closed
        topics.run(server)
    assert function.last() == windows_of(topics)
    for place, begun, seen in function.finals:
        assert seen == function.last()[place, begun]
    topics.assert_caught_up()
    event = function.events[0]
    place = f"{topics.source}-{event['topicPartition'][-1]}"
    assert list(event) == [
        "eventSource",
        "bootstrapServers",
        "records",
        "window",
        "state",
        "topicPartition",
        "isFinalInvokeForWindow",
        "isWindowTerminatedEarly",
    ]
    assert (event["topicPartition"], list(event["records"])) == (place, [place])


def test_a_window_of_which_nothing_more_comes_is_closed_when_it_is_over(
    broker: KafkaBroker, names: Names
) -> None:
    topics = topics_of(broker, names)
    broker.produce(topics.source, [NewRecord(0, None, b"order")])
    function = Function()
    options = {"until": "forever", "tumbling_window_secs": 2}
    with sink.serve(function) as server, topics.start(server, **options) as run:
        run.until(lambda: bool(function.finals), "it was not closed")
        run.until(
            lambda: broker.committed(topics.group, topics.source).get(0) == 1, "not committed"
        )
        run.send(signal.SIGTERM)
        run.wait()
    assert [seen for _, _, seen in function.finals] == [["order"]]


def test_a_run_that_ends_ends_its_windows_early(broker: KafkaBroker, names: Names) -> None:
    """And is done with what it has read, as without windows."""
    topics = topics_of(broker, names)
    broker.produce(topics.source, [NewRecord(p, None, b"order") for p in range(2)])
    function = Function()
    with sink.serve(function) as server:
        topics.run(server, tumbling_window_secs=900)
    flags = [(e["isFinalInvokeForWindow"], e["isWindowTerminatedEarly"]) for e in function.events]
    assert sorted(flags) == [(False, False)] * 2 + [(False, True)] * 2
    topics.assert_caught_up()


def test_an_error_record_that_is_not_taken_keeps_its_window_back(
    broker: KafkaBroker, names: Names
) -> None:
    """Its partition is halted in front of it, and what its window has is not committed."""
    topics = topics_of(
        broker, names, errors={"max_message_bytes": "300"}, batch_size=2, bisect_on_error=True
    )
    first_ms = long_ago()
    broker.produce(
        topics.source,
        [
            NewRecord(0, None, b"bad" if n == 33 else b"order %d" % n, timestamp=first_ms + ms)
            for n in range(40)
            for ms in [n // 20 * SIZE_MS + n]
        ],
    )
    inner = Function()

    def function(event: Any, context: LambdaContext) -> Any:
        if "bad" in texts_of(event):
            raise ValueError("cannot process this order")
        return inner(event, context)

    with sink.serve(function) as server:
        topics.run(server, code=3, **topics.log_errors)
    assert broker.committed(topics.group, topics.source)[0] == 20


def test_a_halted_partition_begins_its_window_anew(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """And cannot be brought past a record that its window has: what it holds would be lost."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    topics = topics_of(broker, names, batch_size=5, http=0, http_token_file=token)
    first_ms = long_ago()
    values = [b"order %d" % n for n in range(25)]
    broker.produce(
        topics.source,
        [
            NewRecord(0, None, value, timestamp=first_ms + n // 20 * SIZE_MS + n)
            for n, value in enumerate(values)
        ],
    )
    inner, bad = Function(), {"order 12"}

    def function(event: Any, context: LambdaContext) -> Any:
        if bad & set(texts_of(event)):
            raise ValueError("cannot process this order")
        return inner(event, context)

    options = {"until": "forever", "error_topic": topics.errors}
    with sink.serve(function) as server, topics.start(server, **options) as run:
        told = Told(run)
        told.until(lambda each: each["partitions"].get(("halted",)) == 1)
        place = f"--partition={topics.source}-0"
        assert "no record can be skipped" in told.ctl("skip", place, code=1)
        assert broker.committed(topics.group, topics.source)[0] == 0
        bad.clear()
        assert "changed" in told.ctl("resume-halted", place)
        run.until(lambda: len(inner.finals) == 2, "the windows were not closed")
        run.until(lambda: broker.committed(topics.group, topics.source)[0] == 25, "not committed")
        run.send(signal.SIGTERM)
        run.wait()
    assert [seen for _, _, seen in inner.finals] == [
        [value.decode() for value in own] for own in (values[:20], values[20:])
    ]
