"""Whole runs: stopping, what is printed, and what a user is told when it cannot work."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import slow, throttle
from tests.conftest import Names
from tests.sink import (
    ACCESS_KEY,
    SECRET_KEY,
    Ended,
    answered,
    assert_caught_up,
    assert_exactly_once,
    assert_in_order,
    assert_one_at_a_time,
    assert_rising,
    environment,
    invocations,
    numbered,
    poison,
    run,
    serve,
    start,
)

# Stopping


def test_a_signal_ends_a_run_with_its_work_committed(broker: KafkaBroker, names: Names) -> None:
    """SIGTERM and SIGINT: exit code 0, and the next run repeats nothing and skips nothing."""
    topic, responses, group = names.topic(), names.topic("responses"), names.group()
    broker.create_topic(topic, partitions=4)
    broker.create_topic(responses, partitions=4)
    broker.produce(topic, numbered(4, 2000))
    options: dict[str, Any] = {
        "topics": topic,
        "consumer_group": group,
        "response_topic": responses,
        "batch_size": 10,
    }
    with serve(faults=[slow(0.05, times=None)]) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            wanted = len(server.calls) + 50
            with start(broker, server, until="forever", **options) as sink:
                sink.until(lambda n=wanted: len(server.calls) >= n, "no calls")
                sink.send(number)
                ended = sink.wait()
            assert f"{number.name}: finishing what is running" in ended.stderr
            assert_exactly_once(broker, group, [topic], responses)
            # What the function had answered when the run ended was not thrown away.
            calls = invocations(server)
            assert len(answered(broker, responses)) == sum(len(call.offsets) for call in calls)
            assert sum(ended.summary["committed"].values()) == sum(
                broker.committed(group, topic).values()
            )
        assert len(answered(broker, responses)) < 8000
        server.clear_faults()
        run(broker, server, **options)
        calls = invocations(server)

    assert_exactly_once(broker, group, [topic], responses)
    assert_caught_up(broker, group, topic)
    assert_rising(broker, responses)
    assert_one_at_a_time(calls)
    assert_in_order(calls)


def test_a_second_signal_ends_a_run_at_once(broker: KafkaBroker, names: Names) -> None:
    """For a function that does not answer: the run is gone, and nothing is committed."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 10))
    with (
        serve(faults=[slow(600, times=None)]) as server,
        start(broker, server, topics=topic, consumer_group=names.group()) as sink,
    ):
        sink.until(lambda: server.in_flight_max > 0, "no call")
        sink.send(signal.SIGTERM)
        sink.until(lambda: "again to stop at once" in sink.stderr, "nothing is said")
        sink.send(signal.SIGTERM)
        sink.wait(128 + signal.SIGTERM)

    assert broker.committed(names.group(), topic).get(0, 0) == 0


# What is printed


def test_json_for_programs(broker: KafkaBroker, names: Names) -> None:
    """--summary=json is one line of stdout; with --log_format=json so is each line of the log."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 25))
    faults = [throttle(retry_after_secs=0.01, times=3)]
    with serve(poison("order 1/7"), faults) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            log_format="json",
            on_error="log",
            batch_size=10,
            max_retries=1,
        )
        calls = len(invocations(server))

    summary = ended.summary
    assert summary.pop("elapsed_secs") > 0
    # It was throttled; how far that lowered the limit is a matter of time, and so is whether the
    # two partitions ever were invoked for at once.
    assert summary["concurrency"].pop("limit") >= 1
    assert 1 <= summary["concurrency"].pop("in_flight_max") <= 2
    # The function's or a throttle, whichever came last.
    assert summary.pop("last_error")["topic"] == topic
    assert summary == {
        "concurrency": {},
        "breaker": {"open": False, "openings": 0},
        "records": 50,
        "batches": 6,
        "invocations": calls,
        "responses": 40,
        "errors": 10,
        "retries": 1,
        "bisections": 0,
        "throttles": 3,
        "filtered": 0,
        "halted": [],
        "waits": [],
        "workers": 1,
        "lag_max": 0,
        "oldest_age_secs": None,
        "committed": {f"{topic}-0": 25, f"{topic}-1": 25},
    }
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    failures = [line for line in lines if line["level"] == "ERROR"]
    assert len(failures) == 1
    assert f"{topic}-1@0-9 failed" in failures[0]["message"]
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}
        assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_events_are_committed_once_lambda_has_them(broker: KafkaBroker, names: Names) -> None:
    """Asynchronous: in order, throttles waited for; what the function does is Lambda's affair.

    The summary for people is one line.
    """
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    broker.produce(topic, numbered(2, 25))
    faults = [throttle(retry_after_secs=0.01, times=3)]
    with serve(poison("order 1/7"), faults, concurrency=1) as server:
        ended = run(
            broker,
            server,
            topics=topic,
            consumer_group=names.group(),
            invocation_type="async",
            batch_size=10,
            summary="text",
        )
        # 3 refused ones and the 6 that are executed, sooner or later; the check comes first.
        calls = [call for call in server.wait_for_calls(10) if call.invocation_type != "DryRun"]
        executed = [i for i in invocations(server) if i.answered or i.offsets[0] == 0]

    assert {call.invocation_type for call in calls} == {"Event"}
    assert sum(call.status == 429 for call in calls) == 3
    assert len({(call.key, call.offsets) for call in executed}) == 6
    assert_caught_up(broker, names.group(), topic)
    (line,) = ended.stdout.splitlines()
    assert re.match(r"records: 50 in [\d.]+ s \([\d,]+/s\), answered: 50, errors: 0, ", line)
    said = [line.split()[3] for line in ended.stderr.splitlines()]
    assert set(said) == {"failed:", "recovered:"}  # what was throttled


# What a user is told

KAFKA_SECRET = "kafka-password-for-tests"
CONFIG = """
# a comment
sasl.password=${env:KAFKA_PASSWORD}
ssl.key.password=literal-kafka-password-for-tests
"""


@dataclass(frozen=True)
class Case:
    """A run that cannot work.

    Attributes:
        options: Options besides the usual ones, which would work; None leaves one out.
        says: What the message must hold: what is wrong, the value, and what to do.
        code: The exit code.
        config: What is in the Kafka settings file.
        env: Environment variables other than the usual ones.
    """

    options: dict[str, Any]
    says: tuple[str, ...]
    code: int = 1
    config: str = CONFIG
    env: Mapping[str, str | None] = field(default_factory=dict)


# Bound for as long as the tests run, so that no other server gets the port, and nobody listens.
_BOUND = socket.socket()
_BOUND.bind(("127.0.0.1", 0))
PORT = _BOUND.getsockname()[1]
CASES = {
    "no such function": Case(
        {"function": "no-such-function"},
        (
            "--function=no-such-function",
            "ResourceNotFoundException",
            "check --function and --aws_region",
        ),
    ),
    "wrong secret key": Case(
        {},
        ("InvalidSignatureException", "the AWS credentials are not valid"),
        env={"AWS_SECRET_ACCESS_KEY": "another-secret-key-for-tests"},
    ),
    "unknown access key": Case(
        {},
        ("UnrecognizedClientException", "the AWS credentials are not valid"),
        env={"AWS_ACCESS_KEY_ID": "AKIDNOBODY"},
    ),
    "no credentials": Case(
        {},
        ("NoCredentialsError", "AWS_PROFILE", "AWS_ACCESS_KEY_ID"),
        env={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    "half of the credentials": Case(
        {},
        ("PartialCredentialsError", "missing: AWS_SECRET_ACCESS_KEY", "set AWS_PROFILE"),
        env={"AWS_SECRET_ACCESS_KEY": None},
    ),
    "no region": Case(
        {},
        ("NoRegionError", "--aws_region"),
        env={"AWS_DEFAULT_REGION": None},
    ),
    "no such profile": Case(
        {},
        ("ProfileNotFound", "nobody", "AWS_PROFILE"),
        env={"AWS_PROFILE": "nobody"},
    ),
    "no endpoint": Case(
        {"lambda_endpoint_url": f"http://127.0.0.1:{PORT}"},
        (
            "EndpointConnectionError",
            f"http://127.0.0.1:{PORT}",
            "check the network and --lambda_endpoint_url",
        ),
    ),
    "no broker": Case(
        {"kafka_bootstrap_servers": f"127.0.0.1:{PORT}"},
        (f"Kafka at 127.0.0.1:{PORT} cannot be reached", "check --kafka_bootstrap_servers"),
    ),
    "broker without SASL": Case(
        {},
        ("cannot be reached", "--kafka_config_file"),
        config=CONFIG + "security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\n"
        "sasl.username=someone\n",
    ),
    "no such topic": Case(
        {"topics": "no-such-topic"},
        ("--topics: no-such-topic not found", "create it first, or check the name"),
    ),
    "no topic matches": Case(
        {"topics": None, "topics_regex": "no-such-topic-.*"},
        ("--topics_regex=no-such-topic-.* matches no topic", "--no_preflight waits for one"),
    ),
    "response topic is read": Case(
        {"topics": "orders,results", "response_topic": "results"},
        ("--response_topic=results is also read from", "write to another topic"),
        code=2,
    ),
    "no config file": Case(
        {"kafka_config_file": "/no/such/kafka.properties"},
        ("--kafka_config_file=/no/such/kafka.properties", "No such file"),
        code=2,
    ),
    "line without a value": Case(
        {},
        ("kafka.properties: line 2 is not of the form name=value",),
        code=2,
        config="\nsasl.password literal-kafka-password-for-tests\n",
    ),
    "no such variable": Case(
        {},
        ("line 1 (sasl.password)", "needs the environment variable 'NO_SUCH_VARIABLE'"),
        code=2,
        config="sasl.password=${env:NO_SUCH_VARIABLE}\n",
    ),
    "unknown Kafka setting": Case(
        {},
        ("Kafka settings", "sasl.pasword", "--kafka_config_file"),
        code=2,
        config="sasl.pasword=${env:KAFKA_PASSWORD}\n",
    ),
    "malformed Kafka setting": Case(
        {},
        ("Kafka settings", '"SASL_SLS"', "security.protocol", "--kafka_config_file"),
        code=2,
        config=CONFIG + "security.protocol=SASL_SLS\n",
    ),
    "misspelt option": Case(
        {"bach_size": 10},
        ("--bach_size is not an option; did you mean --batch_size?",),
        code=2,
    ),
    "value out of range": Case(
        {"batch_size": 0},
        ("--batch_size=0 is not allowed; give 1 to 10000",),
        code=2,
    ),
}


@pytest.fixture(scope="module")
def refused(
    broker: KafkaBroker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """How each of the cases ended. Some take long to give up, so they run side by side."""
    names = Names()
    broker.create_topic(names.topic(), partitions=1)
    broker.produce(names.topic(), numbered(1, 3))

    def attempt(case: Case, folder: Path) -> Ended:
        (folder / "kafka.properties").write_text(case.config)
        options = {
            "topics": names.topic(),
            "consumer_group": names.group(),
            "kafka_config_file": str(folder / "kafka.properties"),
            **case.options,
        }
        variables = {"KAFKA_PASSWORD": KAFKA_SECRET, **case.env}
        return run(broker, server, code=None, env=environment(**variables), **options)

    with (
        serve(credentials={ACCESS_KEY: SECRET_KEY}) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        yield {
            name: pool.submit(attempt, case, tmp_path_factory.mktemp("case"))
            for name, case in CASES.items()
        }
        # Those nobody has asked for are not begun any more.
        pool.shutdown(cancel_futures=True)
        assert not any(call.invocation_type != "DryRun" for call in server.calls)
    assert broker.committed(names.group(), names.topic()) == {}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_said_in_one_line(refused: dict[str, Future[Ended]], name: str) -> None:
    """What, the value and what to do; the exit code; no stack trace, and never a secret."""
    case, ended = CASES[name], refused[name].result()
    assert ended.code == case.code, ended
    assert len(ended.errors) == 1, ended.stderr
    for part in case.says:
        assert part in ended.errors[0]
    output = ended.stdout + ended.stderr
    assert "Traceback" not in output
    for secret in (KAFKA_SECRET, "literal-kafka-password", SECRET_KEY, "another-secret-key"):
        assert secret not in output


def test_the_region_may_be_given_as_the_message_says(
    broker: KafkaBroker, names: Names, refused: dict[str, Future[Ended]]
) -> None:
    """The environment variable that is named when there is no region is one that works."""
    (line,) = refused["no region"].result().errors
    (variable,) = re.findall(r"\bAWS_[A-Z_]*REGION\b", line)
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    broker.produce(topic, numbered(1, 3))
    env = environment(**{"AWS_DEFAULT_REGION": None, variable: "eu-central-1"})
    with serve() as server:
        run(broker, server, env=env, topics=topic, consumer_group=names.group())
    assert_caught_up(broker, names.group(), topic)
