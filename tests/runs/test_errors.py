"""Whole runs: each way an invocation fails, and each thing that may become of its records."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker, NewRecord
from pipeline.local.faults import Fault, drop_connection, raw_reply, slow, throttle, unavailable
from tests.conftest import Names
from tests.sink import (
    FUNCTION,
    answer,
    answered,
    assert_answers_match,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    facts,
    failed,
    invocations,
    numbered,
    of_partition,
    offsets_called,
    originals,
    poison,
    run,
    serve,
)
from tests.transforms.aws.test_http import peer

WHOLE = [0, 1, 2, 3]
TIMESTAMP = 1_700_000_000_000


# Each class of failure


def test_failures_around_the_function_are_repeated_and_lose_nothing(
    broker: KafkaBroker, names: Names
) -> None:
    """No retries of function errors are allowed here, and none of these needs one.

    Throttled (waits as told), 500, 502, connection dropped before and after the function ran,
    no answer in time, a proxy's answers of any form: the same records again. Too large: halves.
    Each partition has its own.
    """
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=10)
    broker.produce(topic, numbered(10, 4))
    faults = [
        throttle(retry_after_secs=1.0, times=2, when=of_partition(0)),
        unavailable(500, times=3, when=of_partition(1)),
        unavailable(502, "EC2ThrottledException", times=2, when=of_partition(2)),
        drop_connection(times=2, when=of_partition(3)),
        drop_connection(executed=True, times=1, when=of_partition(4)),
        Fault(status=413, error_type="RequestTooLargeException", when=of_partition(5)),
        unavailable(503, "", body=b"<html>no JSON</html>", when=of_partition(6)),
        slow(7.0, when=of_partition(7)),
        unavailable(503, "", body=b"Dienst nicht verf\xfcgbar", when=of_partition(8)),
        unavailable(504, "", body=b"null", when=of_partition(9)),
    ]
    with serve(faults=faults) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            function_timeout_secs=1,
        )
        # The call nobody waits for any more is still running.
        server.wait_for_calls(ended.summary["invocations"] + 1, 60)
        calls = invocations(server)

    assert [offsets_called(server, partition) for partition in range(10)] == [
        [WHOLE] * 3,
        [WHOLE] * 4,
        [WHOLE] * 3,
        [WHOLE] * 3,
        [WHOLE] * 2,
        [WHOLE, [0, 1], [2, 3]],
        [WHOLE] * 2,
        [WHOLE] * 2,
        [WHOLE] * 2,
        [WHOLE] * 2,
    ]
    throttled = [call for call in calls if call.partition == 0]
    for call, repeated in pairwise(throttled):
        assert repeated.started - call.ended >= 1.0
    assert_in_order(call for call in calls if call.partition != 7)
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_caught_up(broker, names.group(), topic)
    assert_answers_match(broker, [topic], responses)
    summary = ended.summary
    assert (summary["throttles"], summary["bisections"], summary["errors"]) == (2, 1, 0)
    assert summary["retries"] == 3 + 2 + 2 + 1 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(("status", "preflight", "expected"), [(200, True, 204), (201, False, 200)])
def test_a_server_that_is_no_lambda_ends_the_run(
    broker: KafkaBroker, names: Names, status: int, preflight: bool, expected: int
) -> None:
    """Whatever it answers to everything: one line, and nothing is committed."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 4))
    page = b"HTTP/1.1 %d Fine\r\nContent-Length: 9\r\n\r\nIt works!" % status
    with peer(*[page] * 20) as web:
        ended = run(
            broker,
            None,
            code=1,
            topics=topic,
            consumer_group=names.group(),
            lambda_endpoint_url=f"http://127.0.0.1:{web.port}",
            no_preflight=None if preflight else True,
        )
    (error,) = ended.errors
    assert f"answers with HTTP {status}, Lambda would with {expected}" in error
    assert "--lambda_endpoint_url" in error
    assert not broker.committed(names.group(), topic).get(0)


FRAGILE = """
import os, pathlib, time

def main(event, context):
    partition = event[0]["payload"]["partition"]
    mark = pathlib.Path(__file__).with_name(f"called-{partition}")
    if partition == 2 or not mark.exists():
        mark.touch()
        if partition == 0:
            time.sleep(60)
        os._exit(7)
    return [{"payload": {**entry["payload"], "result": "ok"}} for entry in event]
"""


def test_a_function_that_times_out_or_dies_is_called_again(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """Both are errors of the function: they count as retries, and end in an error record."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, numbered(3, 4))
    (tmp_path / "fragile.py").write_text(FRAGILE)
    with serve(f"{tmp_path}/fragile.py:main", timeout_secs=2) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            max_retries=1,
        )
        called = [offsets_called(server, partition) for partition in range(3)]
        assert_one_at_a_time(invocations(server))
        ends = {call.error_type or call.function_error for call in server.calls}

    assert called == [[WHOLE] * 2] * 3
    assert ends == {None, "Unhandled"}
    assert failed(broker, errors) == [(topic, 2, offset) for offset in WHOLE]
    (error,) = broker.read_all(errors)
    assert facts(error)["lambda.error.type"] == "Runtime.ExitError"
    assert facts(error)["lambda.condition"] == "RetryAttemptsExhausted"
    assert facts(error)["lambda.attempts"] == "2"
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)
    assert ended.summary["retries"] == 3


def test_content_lambda_refuses_is_not_sent_again(broker: KafkaBroker, names: Names) -> None:
    """However many retries are allowed: split until it stands alone, then given up."""
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 4))
    refused = Fault(
        status=400,
        error_type="InvalidRequestContentException",
        message="Could not parse request body into json",
        times=None,
        when=lambda payload, name: b"order 0/2" in payload,
    )
    with serve(faults=[refused]) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            max_retries=5,
            bisect_on_error=True,
        )
        assert offsets_called(server) == [WHOLE, [0, 1], [2, 3], [2], [3]]

    (error,) = broker.read_all(errors)
    assert facts(error)["lambda.condition"] == "InvalidRequestContent"
    assert facts(error)["lambda.error.type"] == "InvalidRequestContentException"
    assert json.loads(error.value or b"")["statusCode"] == 400
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)


@pytest.mark.parametrize(
    ("status", "error_type", "todo"),
    [
        (404, "ResourceNotFoundException", "check --function and --aws_region"),
        (403, "AccessDeniedException", "lambda:InvokeFunction"),
    ],
)
def test_a_function_that_goes_away_ends_the_run(
    broker: KafkaBroker, names: Names, status: int, error_type: str, todo: str
) -> None:
    """One line says why, exit code 1; what was finished before is written and committed."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 1000))
    gone = Fault(
        status=status,
        error_type=error_type,
        message="it is gone",
        times=None,
        when=lambda payload, name: b"order 0/500" in payload,
    )
    with serve(faults=[gone]) as server:
        ended = run(
            broker,
            server,
            code=1,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            batch_size=10,
            on_error="log",
        )
        asked_for_bad_one = [call for call in invocations(server) if not call.answered]

    (line,) = ended.errors
    assert f"--function={FUNCTION}" in line
    assert f"{error_type}: it is gone" in line
    assert todo in line
    assert "Traceback" not in ended.stderr
    assert [call.offsets[0] for call in asked_for_bad_one] == [500]
    assert broker.committed(names.group(), topic)[0] == 500
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert ended.summary["records"] == len(answered(broker, responses))


# What becomes of failed records


@pytest.mark.parametrize("bisect", [True, False], ids=["bisect", "whole batch"])
def test_fail_stops_one_partition_and_a_later_run_goes_on_there(
    broker: KafkaBroker, names: Names, bisect: bool
) -> None:
    """The partition stops before the bad record, or before its batch if nothing isolates it.

    The others run to their end. Exit code 3; the last lines name partition and offset and say
    how to go on. Once the function is mended the same command begins there and finishes.
    """
    topic, responses = names.topic(), names.topic("responses")
    group = names.group()
    broker.create_topic(topic, partitions=3)
    broker.produce(topic, numbered(3, 100))
    options: dict[str, Any] = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "batch_size": 8,
        "on_error": "fail",
        "bisect_on_error": bisect or None,
    }
    halted_at = 45 if bisect else 40

    with serve(poison("order 1/45")) as server:
        ended = run(broker, server, code=3, **options)
        sent = {offset for offsets in offsets_called(server, 1) for offset in offsets}

    assert broker.committed(group, topic) == {0: 100, 1: halted_at, 2: 100}
    assert_exactly_once(broker, group, [topic], responses)
    assert max(sent) < 48  # nothing behind the batch that failed
    *_, halt, todo = ended.stderr.splitlines()
    assert halt.startswith(f"halted: {topic}-1 at offset {halted_at}: RetryAttemptsExhausted, ")
    assert halt.endswith("ValueError: cannot process this order")
    assert group in todo
    assert "--on_error=log" in todo
    (fact,) = ended.summary["halted"]
    assert (fact["topic"], fact["partition"], fact["offset"]) == (topic, 1, halted_at)
    assert ended.summary["committed"][f"{topic}-1"] == halted_at

    with serve() as server:
        run(broker, server, **options)
        calls = invocations(server)

    assert {call.key for call in calls} == {(topic, 1)}
    assert_in_order(calls, {(topic, 1): halted_at})
    assert_exactly_once(broker, group, [topic], responses)
    assert_caught_up(broker, group, topic)
    assert_rising(broker, responses)


def test_log_writes_error_records_that_hold_everything(broker: KafkaBroker, names: Names) -> None:
    """Key and value as the Confluent connector has them; the facts and the originals in headers.

    The originals are the records byte for byte, whatever the payload made of them.
    """
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    broker.create_topic(topic, partitions=2)
    odd = NewRecord(
        1, b"\x00key\xff", b"\xfe\x00value", [("h", b"\xff"), ("h", None), ("i", b"")], TIMESTAMP
    )
    bare = NewRecord(1, None, None, (), TIMESTAMP + 1)
    broker.produce(topic, [odd, bare, NewRecord(0, b"k", b"good", (), TIMESTAMP)])

    def handler(event: Any, context: Any) -> Any:
        if event[0]["payload"]["partition"] == 1:
            raise KeyError("no such customer")
        return answer(event)

    with serve(handler) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            max_retries=1,
            function=f"{FUNCTION}:live",
        )
        (payload, repeated) = (call.payload for call in server.calls if call.function_error)

    assert payload == repeated
    (error,) = broker.read_all(errors)
    assert json.loads(error.key or b"") == {
        "topic": topic,
        "partition": 1,
        "startOffset": 0,
        "endOffset": 2,
    }
    value = json.loads(error.value or b"")
    request_id = facts(error)["lambda.request.id"]
    assert request_id in base64.b64decode(value.pop("logResult")).decode()
    function_reply = json.loads(value.pop("payload"))
    assert function_reply["errorType"] == "KeyError"
    assert function_reply["errorMessage"] == "'no such customer'"
    assert function_reply["requestId"] == request_id
    assert value == {
        "functionName": f"{FUNCTION}:live",
        "inputPayload": payload.decode(),
        "statusCode": 200,
        "functionError": "Unhandled",
        "executedVersion": "1",
    }
    assert facts(error) == {
        "lambda.error.type": "KeyError",
        "lambda.error.message": "'no such customer'",
        "lambda.condition": "RetryAttemptsExhausted",
        "lambda.attempts": "2",
        "lambda.function": f"{FUNCTION}:live",
        "lambda.executed.version": "1",
        "lambda.request.id": request_id,
        "lambda.first.timestamp": "2023-11-14T22:13:20.000Z",
        "lambda.last.timestamp": "2023-11-14T22:13:20.001Z",
    }
    assert originals(error) == [
        {
            "topic": topic,
            "partition": 1,
            "offset": offset,
            "timestamp": record.timestamp,
            "key": record.key,
            "value": record.value,
            "headers": [{"name": name, "value": data} for name, data in record.headers],
        }
        for offset, record in enumerate([odd, bare])
    ]
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)
    assert ended.summary["errors"] == 2


@pytest.mark.parametrize("on_error", ["log", "ignore"])
def test_without_an_error_topic_the_run_goes_on(
    broker: KafkaBroker, names: Names, on_error: str
) -> None:
    """log: one line with the facts of each failure; ignore: none. Never anything of a record."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 40, prefix="confidential"))
    with serve(poison("confidential 0/13", "confidential 0/27")) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            on_error=on_error,
            bisect_on_error=True,
            batch_size=10,
        )

    lost = [(topic, 0, 13), (topic, 0, 27)]
    assert_exactly_once(broker, names.group(), [topic], responses, elsewhere=lost)
    assert_caught_up(broker, names.group(), topic)
    assert_rising(broker, responses)
    assert ended.summary["errors"] == 2
    # Beside what is said of the invocation.
    lines = [line for line in ended.stderr.splitlines() if f"{topic}-0@" in line]
    if on_error == "log":
        for line, (_, _, offset) in zip(lines, lost, strict=True):
            assert f"{topic}-0@{offset}-{offset} failed: " in line
            known = json.loads(line.partition("failed: ")[2])
            assert known["error.type"] == "ValueError"
            assert known["error.message"] == "cannot process this order"
            assert known["condition"] == "RetryAttemptsExhausted"
            assert known["attempts"] == "1"
            assert known["request.id"]
    else:
        assert lines == []
    assert "confidential" not in ended.stderr + ended.stdout


# Replies that do not answer the batch


def test_a_reply_that_does_not_answer_the_batch_is_an_error(
    broker: KafkaBroker, names: Names
) -> None:
    """Garbage, an object, null, too few, someone else's: InvalidReply, never a response.

    It counts as an error of the function, so it is tried again; a bad reply once does no harm.
    """
    topic, responses, errors = names.topic(), names.topic("responses"), names.topic("errors")
    bad = {
        0: (b"<html>oops</html>", "the reply is not JSON"),
        1: (b'{"statusCode":200}', "the reply is an object, not an array"),
        2: (b"null", "the reply is null, not an array"),
        3: (b"", "the reply is not JSON"),
        4: (b"[]", "the reply has 0 entries, 2 records were sent"),
        5: (b'["a","b"]', "entry 0 of the reply lacks payload.topic"),
        6: (_answers(topic, 6, 1, 0), f"entry 0 of the reply answers another record than {topic}"),
        7: (_answers(topic, 6, 0, 1), f"entry 0 of the reply answers another record than {topic}"),
    }
    broker.create_topic(topic, partitions=9)
    broker.produce(topic, numbered(9, 2))
    broker.create_topic(responses, partitions=1)
    faults = [
        raw_reply(body, times=2, when=of_partition(partition))
        for partition, (body, _) in bad.items()
    ]
    once = raw_reply(b"null", times=1, when=of_partition(8))
    with serve(faults=[*faults, once]) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            max_retries=1,
        )
        called = [offsets_called(server, partition) for partition in range(9)]

    assert called == [[[0, 1]] * 2] * 9
    assert answered(broker, responses) == [(topic, 8, 0), (topic, 8, 1)]
    records = {
        json.loads(error.key or b"")["partition"]: error for error in broker.read_all(errors)
    }
    assert records.keys() == bad.keys()
    for partition, (_, message) in bad.items():
        known = facts(records[partition])
        assert known["lambda.error.type"] == "InvalidReply"
        assert known["lambda.condition"] == "InvalidReply"
        assert known["lambda.error.message"].startswith(message), known
        assert known["lambda.attempts"] == "2"
        value = json.loads(records[partition].value or b"")
        assert value["functionError"] == "InvalidReply"
        assert json.loads(value["payload"])["errorType"] == "InvalidReply"
        assert len(originals(records[partition])) == 2
    assert_exactly_once(broker, names.group(), [topic], responses, errors)
    assert_caught_up(broker, names.group(), topic)
    assert ended.summary["errors"] == 16


def _answers(topic: str, partition: int, *offsets: int) -> bytes:
    return json.dumps(
        [
            {"payload": {"topic": topic, "partition": partition, "offset": offset, "result": 1}}
            for offset in offsets
        ]
    ).encode()


def test_replies_nobody_asked_for_are_not_looked_at(broker: KafkaBroker, names: Names) -> None:
    """Without a response topic a function may return what it likes; its errors still count."""
    topic, errors = names.topic(), names.topic("errors")
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 10))

    def handler(event: Any, context: Any) -> None:
        if event[0]["payload"]["partition"] == 1:
            raise ValueError("cannot process this order")

    with serve(handler) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            error_topic=errors,
            on_error="log",
        )

    assert failed(broker, errors) == [(topic, 1, offset) for offset in range(10)]
    assert_caught_up(broker, names.group(), topic)
    assert (ended.summary["responses"], ended.summary["errors"]) == (10, 10)


def test_a_reply_that_is_too_large_is_got_in_parts(broker: KafkaBroker, names: Names) -> None:
    """More than 6 MiB is an error of the function; smaller batches have smaller replies."""
    topic, responses = names.topic(), names.topic("responses")
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 4))
    broker.create_topic(responses, partitions=1, max_message_bytes=3_000_000)

    def handler(event: Any, context: Any) -> Any:
        return [{"payload": entry["payload"] | {"result": "x" * 2_000_000}} for entry in event]

    with serve(handler) as server:
        run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            response_topic=responses,
            bisect_on_error=True,
        )
        assert offsets_called(server) == [WHOLE, [0, 1], [2, 3]]

    sizes = [len(json.loads(r.value or b"")["result"]) for r in broker.read_all(responses)]
    assert sizes == [2_000_000] * 4
    assert_exactly_once(broker, names.group(), [topic], responses)
    assert_rising(broker, responses)
    assert_caught_up(broker, names.group(), topic)
