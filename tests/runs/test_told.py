"""Whole runs: what the log says while something goes wrong, and what it never says."""

from __future__ import annotations

import json
import re
import signal
import socket
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import function_error, raw_reply, throttle, unavailable
from tests.conftest import Names
from tests.sink import (
    assert_exactly_once,
    numbered,
    of_partition,
    poison,
    run,
    serve,
    start,
)


def _lines(stderr: str, begin: str) -> list[dict[str, Any]]:
    """The whole lines of a JSON log whose message begins so."""
    whole = [line for line in stderr.splitlines(keepends=True) if line[-1] == "\n"]
    # What is said of a signal is no line of the log.
    objects = [json.loads(line) for line in whole if line[0] == "{"]
    return [each for each in objects if each["message"].startswith(begin)]


def test_nothing_listens_at_the_functions_address(broker: KafkaBroker, names: Names) -> None:
    """The log names the address at once, and each progress line again; retries are counted while
    not one batch has ended."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 20))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with start(
            broker,
            None,
            topics=topic,
            consumer_group=names.group(),
            lambda_endpoint_url=url,
            preflight="false",
            log_format="json",
            until=None,
        ) as sink:
            sink.until(lambda: bool(_lines(sink.stderr, "failed: ")), "the failure is said")
            sink.until(lambda: bool(_lines(sink.stderr, "records: ")), "progress is said")
            sink.send(signal.SIGTERM)
            ended = sink.wait(0)

    failure = _lines(ended.stderr, "failed: ")[0]
    assert url in failure["message"]
    assert failure["level"] == "WARNING"
    assert (failure["topic"], failure["partition"], failure["offsets"]) == (topic, 0, [0, 19])
    assert (failure["kind"], failure["error_type"]) == ("transient", "EndpointConnectionError")
    assert (failure["attempt"], failure["request_id"], failure["held_back"]) == (1, None, 0)
    assert failure["next_try_secs"] >= 0
    progress = _lines(ended.stderr, "records: ")[0]["message"]
    (retries,) = re.findall(r"retries: (\d+)", progress)
    assert int(retries) > 0
    assert re.search(r"oldest unfinished record: \d+ s", progress)
    assert re.search(
        rf"waiting: {topic}-0 \((backoff until \d\d:\d\d:\d\dZ|reply), EndpointConn", progress
    )
    assert re.search(rf"last error: {topic}-0 at offset 0, .*: EndpointConn.*{url}", progress)
    assert ended.summary["last_error"]["error_type"] == "EndpointConnectionError"
    assert ended.summary["retries"] >= int(retries)
    assert ended.summary["lag_max"] == 20


def test_a_function_that_fails_and_recovers(broker: KafkaBroker, names: Names) -> None:
    """One line for each partition when it begins, one when it is over, however often it fails."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, numbered(3, 10))
    faults = [
        unavailable(times=4, when=of_partition(0)),
        throttle(times=3, retry_after_secs=0.01, when=of_partition(1)),
        function_error("ValueError", "no\nsuch item", times=3, when=of_partition(2)),
    ]
    with serve(faults=faults) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            max_retries=5,
            log_format="json",
        )
    assert_exactly_once(broker, names.group(), [topic], responses)
    failures = {each["partition"]: each for each in _lines(ended.stderr, "failed: ")}
    assert len(_lines(ended.stderr, "failed: ")) == 3
    assert [failures[number]["kind"] for number in range(3)] == [
        "transient",
        "throttled",
        "function error",
    ]
    assert failures[2]["error_message"] == r"no\nsuch item"
    assert failures[2]["request_id"]
    assert "\n" not in failures[2]["message"]
    recoveries = {each["partition"]: each for each in _lines(ended.stderr, "recovered: ")}
    assert len(_lines(ended.stderr, "recovered: ")) == 3
    for partition, times in enumerate([4, 3, 3]):
        text = f"{times} failed invocations; failures not logged before: {times - 1}"
        assert text in recoveries[partition]["message"]
    summary = ended.summary
    assert (summary["retries"], summary["throttles"], summary["invocations"]) == (7, 3, 13)
    assert summary["waits"] == []
    assert summary["oldest_age_secs"] is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_halt_is_said_while_the_run_goes_on(
    broker: KafkaBroker, names: Names, workers: int
) -> None:
    """When it happens and not when the run ends, in the words of the last lines; once."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 10))
    with (
        serve(poison("order 1/5")) as server,
        start(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            on_error="fail",
            bisect_on_error=True,
            workers=workers,
            log_format="json",
            until=None,
        ) as sink,
    ):
        sink.until(lambda: bool(_lines(sink.stderr, "halted: ")), "the halt is said")
        broker.produce(topic, [(0, b"k", b"more")] * 5)
        sink.until(lambda: broker.committed(names.group(), topic).get(0) == 15, "0 goes on")
        sink.send(signal.SIGTERM)
        ended = sink.wait(3)

    said, last = _lines(ended.stderr, "halted: ")
    assert said["message"].startswith(last["message"])
    assert said["message"].endswith("the other partitions go on")
    assert (said["level"], said["topic"], said["partition"]) == ("ERROR", topic, 1)
    assert (said["offset"], said["error_type"], said["attempt"]) == (5, "ValueError", 1)
    assert said["request_id"]
    assert said["time"] < last["time"]
    (waits,) = ended.summary["waits"]
    assert (waits["partition"], waits["for"], waits["until"]) == (1, "halted", None)
    assert ended.summary["last_error"]["partition"] == 1
    assert ended.summary["oldest_age_secs"] > 0


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_payload_and_no_reply_is_said(
    broker: KafkaBroker, names: Names, log_format: str
) -> None:
    """Whatever comes back for records that hold a secret: a reply that is none, no answer to the
    batch, an error of the function or around it, a record that cannot be sent."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=5)
    secret = "s3cret-marker"
    record = (secret.encode(), secret.encode(), [("h", secret.encode())])
    broker.produce(topic, [(number, *record) for number in range(5) for _ in range(3)])
    entry = {"payload": {"topic": secret, "partition": 1, "offset": 0, "result": secret}}
    faults = [
        raw_reply(f"{secret}, no JSON".encode(), when=of_partition(0)),
        raw_reply(json.dumps([entry] * 3).encode(), when=of_partition(1)),
        raw_reply(json.dumps({secret: secret}).encode(), when=of_partition(2)),
        unavailable(when=of_partition(3)),
        function_error(when=of_partition(4)),
    ]
    with serve(faults=faults) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            on_error="log",
            error_topic=errors,
            response_topic=names.topic("responses"),
            max_retries=1,
            max_transient_retries=1,
            log_format=log_format,
        )
    assert ended.stderr.count("failed: ") == 5
    assert secret not in ended.stderr + ended.stdout
