"""Whole runs: what failed is redriven, once, and nothing of it is lost."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.lambda_server import LambdaContext, LambdaServer
from tests import ROOT
from tests.conftest import Names
from tests.sink import (
    FUNCTION,
    SAME_MEMBER,
    Coordinates,
    Ended,
    Sink,
    Topics,
    answer,
    answered,
    arguments,
    assert_answers_match,
    assert_caught_up,
    assert_one_at_a_time,
    environment,
    failed,
    invocations,
    numbered,
    originals,
    serve,
)


class Failing(Topics):
    """Topics with records that have failed, and redrives of them."""

    def __init__(self, broker: KafkaBroker, names: Names, partitions: int = 2) -> None:
        super().__init__(broker, names, partitions, batch_size=10)
        self.options |= self.log_errors

    def fail(self, handler: Callable[[Any, LambdaContext], Any], **options: Any) -> None:
        """Run with a function that fails some."""
        with serve(handler) as server:
            self.run(server, **options)
        self.assert_caught_up()

    def start_redrive(self, server: LambdaServer | None, **options: Any) -> Sink:
        """Start a redrive."""
        options = {**self.options, "first_redrive": True, **options}
        given = arguments(self.broker, server, **options)
        return Sink(["redrive", *given], environment())

    def redrive(self, server: LambdaServer | None, code: int = 0, **options: Any) -> Ended:
        """Redrive to the end."""
        with self.start_redrive(server, **options) as sink:
            return sink.wait(code)


def broken(event: Any, context: LambdaContext) -> Any:
    """Fails each batch with a record whose number ends in 3, with one of two errors."""
    for entry in event:
        value = entry["payload"]["value"]
        if value.endswith("3"):
            raise (ValueError if int(value.split("/")[1]) < 50 else TypeError)(value)
    return answer(event)


def test_what_failed_is_redriven_once(broker: KafkaBroker, names: Names) -> None:
    """Counted first, then redriven through the mended function, then nothing is left."""
    topics = Failing(broker, names)
    broker.produce(topics.source, numbered(2, 100))
    topics.fail(broken, bisect_on_error=True)
    bad = topics.missing()
    assert len(bad) == 20 == len(failed(broker, topics.errors))

    with serve(answer) as server:
        counted = topics.redrive(server, dry_run=True).summary["redrive"]
        assert not server.calls
        # A dry run remembers nothing: the same again.
        assert topics.redrive(None, dry_run=True).summary["redrive"] == counted

        ended = topics.redrive(server)
        calls = invocations(server)
        assert {call.key: Counter(call.offsets) for call in calls}.keys() == {
            (topics.source, 0),
            (topics.source, 1),
        }
        sent = [(c.topic, c.partition, offset) for c in calls for offset in c.offsets]
        assert sorted(sent) == sorted(bad)
        assert_one_at_a_time(calls)
        assert [len(call.offsets) for call in calls] == [10, 10]

        again = topics.redrive(server)
        assert len(invocations(server)) == len(calls)

    assert (counted["error_records"], counted["records"], counted["dry_run"]) == (20, 20, True)
    assert counted["error_types"] == {
        name: {"error_records": 10, "records": 10} for name in ("TypeError", "ValueError")
    }
    assert counted["conditions"] == {"RetryAttemptsExhausted": {"error_records": 20, "records": 20}}
    assert counted["partitions"].keys() == {f"{topics.source}-{n}" for n in (0, 1)}
    facts = ended.summary
    assert (facts["redrive"]["error_records"], facts["responses"], facts["errors"]) == (20, 20, 0)
    assert again.summary["redrive"]["error_records"] == again.summary["records"] == 0

    assert topics.missing() == set()
    assert_answers_match(broker, [topics.source], topics.responses)
    assert_caught_up(broker, f"{topics.group}-redrive", topics.errors)
    topics.assert_caught_up()


def test_the_example_in_the_docs(broker: KafkaBroker, names: Names, tmp_path: Path) -> None:
    """Its commands, one after the other, print what it shows."""
    topics = Failing(broker, names)
    broker.produce(topics.source, numbered(2, 100))
    topics.fail(broken, bisect_on_error=True)
    page = (ROOT / "docs" / "redrive.md").read_text(encoding="utf-8")

    def blocks(language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)

    with serve(answer) as server:
        own = {
            "kafka_bootstrap_servers": broker.bootstrap_servers,
            "topics": topics.source,
            "consumer_group": topics.group,
            "function": FUNCTION,
            "response_topic": topics.responses,
            "error_topic": topics.errors,
        }
        lines = blocks("yaml")[0].splitlines()
        shown = dict(line.split(": ", 1) for line in lines)
        assert shown.keys() >= own.keys()
        config = tmp_path / "pipeline.yaml"
        config.write_text("".join(f"{name}: {text}\n" for name, text in (shown | own).items()))
        commands = "".join(blocks("sh")).splitlines()
        printed = blocks("text")
        assert len(commands) == len(printed) == 3
        for command, expected in zip(commands, printed):
            given = command.replace("pipeline.yaml", str(config)).split()[2:]
            with Sink([*given, f"--lambda_endpoint_url={server.url}"], environment()) as sink:
                found = sink.wait().stdout.replace(f"{topics.source}-", "orders-")
            assert [line.split() for line in found.splitlines()] == [
                line.split() for line in expected.splitlines()
            ]
    assert topics.missing() == set()


def test_what_fails_again_is_a_new_error_record(broker: KafkaBroker, names: Names) -> None:
    """The run does not feed on it; the next one does."""
    topics = Failing(broker, names, partitions=1)
    broker.produce(topics.source, numbered(1, 30))
    topics.fail(broken)
    before = broker.end_offsets(topics.errors)[0]
    assert before == 3
    for count in (1, 2):
        with serve(broken) as server:
            facts = topics.redrive(server, bisect_on_error=True).summary
            # Whole batches in the first place; then only what is still bad.
            assert facts["errors"] == 3
            assert facts["redrive"]["error_records"] == 3
        assert broker.end_offsets(topics.errors)[0] == before + 3 * count
    assert len(topics.missing()) == 3


def test_a_selection_leaves_the_others_for_later(broker: KafkaBroker, names: Names) -> None:
    """By error type, by limit, then all: each error record once, none left out in the end."""
    topics = Failing(broker, names)
    broker.produce(topics.source, numbered(2, 100))
    topics.fail(broken, bisect_on_error=True)
    sent: Counter[Coordinates] = Counter()

    def redriven(**options: Any) -> dict[str, Any]:
        with serve(answer) as server:
            facts = topics.redrive(server, **options).summary["redrive"]
            for call in invocations(server):
                sent.update((call.topic, call.partition, offset) for offset in call.offsets)
        return facts

    facts = redriven(error_type="TypeError", limit=4)
    assert facts["error_records"] == 4
    assert facts["left"]["not_selected"] == 10 and facts["left"]["over_limit"] == 6
    facts = redriven(error_type="TypeError")
    assert (facts["error_records"], facts["left"]["before"]) == (6, 4)
    assert redriven(condition="InvalidReply")["error_records"] == 0
    assert redriven(since="2999-01-01T00:00:00Z")["error_records"] == 0
    assert len(topics.missing()) == 10
    facts = redriven(since="2020-01-01T00:00:00Z")
    assert facts["error_records"] == 10
    assert redriven()["error_records"] == 0
    assert set(sent.values()) == {1} and len(sent) == 20
    assert topics.missing() == set()
    assert_caught_up(broker, f"{topics.group}-redrive", topics.errors)


def test_only_what_the_pipeline_reads_is_redriven(broker: KafkaBroker, names: Names) -> None:
    """An error topic may serve other pipelines, and hold what is nobody's."""
    topics, other = Failing(broker, names, partitions=1), Failing(broker, Names(), partitions=1)
    broker.produce(topics.errors, [(0, b"key", b"a response, or whatever")])
    broker.produce(topics.source, numbered(1, 10))
    broker.produce(other.source, numbered(1, 10))
    topics.fail(broken)
    other.options["error_topic"] = topics.errors
    other.fail(broken)
    with serve(answer) as server:
        facts = topics.redrive(server).summary["redrive"]
        assert {call.topic for call in invocations(server)} == {topics.source}
    assert facts["error_records"] == 1
    assert facts["left"]["other_topics"] == facts["left"]["without_originals"] == 1
    # What is nobody's is passed over, what is another pipeline's holds the mark.
    assert broker.committed(f"{topics.group}-redrive", topics.errors) == {0: 2}
    with serve(answer) as server:
        facts = topics.redrive(server, topics=other.source).summary["redrive"]
    assert (facts["error_records"], facts["left"]["before"]) == (1, 0)
    assert_caught_up(broker, f"{topics.group}-redrive", topics.errors)
    assert topics.missing() == set()


def test_where_no_redrive_is_known_one_begins_only_if_told_to(
    broker: KafkaBroker, names: Names
) -> None:
    """A group without offsets is new, or the broker has forgotten what was redriven."""
    topics = Failing(broker, names)
    broker.produce(topics.source, [(0, None, b"order 0/3")])
    topics.fail(broken)
    with serve(answer) as server:
        ended = topics.redrive(server, 2, first_redrive=None)
        (error,) = ended.errors
        assert f"--redrive_group={topics.group}-redrive has no offsets" in error
        assert "--first_redrive" in error
        ended = topics.redrive(server, first_redrive=None, dry_run=True)
        assert ended.summary["redrive"]["error_records"] == 1
        assert "--first_redrive" in ended.stderr
        assert not invocations(server)
        assert broker.committed(f"{topics.group}-redrive", topics.errors) == {}
        # Once it is known, with the flag or without it nothing is redriven twice.
        assert topics.redrive(server).summary["redrive"]["error_records"] == 1
        for flag in (None, True):
            facts = topics.redrive(server, first_redrive=flag).summary["redrive"]
            assert facts["error_records"] == 0
        assert len(invocations(server)) == 1


def test_one_process_redrives(broker: KafkaBroker, names: Names) -> None:
    """More are refused, not taken and ignored."""
    topics = Failing(broker, names)
    ended = topics.redrive(None, 2, workers=4)
    assert ended.errors == ["error: --workers=4: redrive runs in one process; give --workers=1"]
    windows = {"envelope": "kafka_event", "response_topic": None, "tumbling_window_secs": 60}
    (error,) = topics.redrive(None, 2, **windows).errors
    assert error.startswith("error: --tumbling_window_secs=60: redrive has no windows")
    ended = topics.redrive(None, 2, delivery="exactly_once")
    (error,) = ended.errors
    assert error.startswith("error: --delivery=exactly_once: redrive writes at least once")


def test_a_record_in_two_error_records_is_sent_once(broker: KafkaBroker, names: Names) -> None:
    """As after a crash between writing an error record and committing."""
    topics = Failing(broker, names, partitions=1)
    broker.produce(topics.source, numbered(1, 10))
    topics.fail(broken)
    (record,) = broker.read_all(topics.errors)
    broker.produce(topics.errors, [(0, record.key, record.value, record.headers)])
    with serve(answer) as server:
        facts = topics.redrive(server).summary["redrive"]
        assert [call.offsets for call in invocations(server)] == [tuple(range(10))]
    assert (facts["error_records"], facts["repeated"]) == (2, 10)
    assert_caught_up(broker, f"{topics.group}-redrive", topics.errors)


def test_a_halted_partition_costs_only_itself(broker: KafkaBroker, names: Names) -> None:
    """With --on_error=fail; the next redrive begins with the record that halted it."""
    topics = Failing(broker, names)
    broker.produce(topics.source, numbered(2, 50))
    topics.fail(broken, bisect_on_error=True)

    def stubborn(event: Any, context: LambdaContext) -> Any:
        if any(entry["payload"]["value"] == "order 1/23" for entry in event):
            raise ValueError("still")
        return answer(event)

    with serve(stubborn) as server:
        ended = topics.redrive(server, 3, on_error="fail", batch_size=1)
    assert f"halted: {topics.source}-1 at offset 23" in ended.stderr
    assert {offset for _, partition, offset in topics.missing() if partition == 0} == set()
    assert {offset for _, partition, offset in topics.missing()} == {23, 33, 43}
    with serve(answer) as server:
        assert topics.redrive(server).summary["redrive"]["error_records"] == 3
    assert topics.missing() == set()


@pytest.mark.slow
def test_a_crash_loses_nothing(broker: KafkaBroker, names: Names) -> None:
    """Killed with calls under way: what was not committed is redriven by the next run."""
    topics = Failing(broker, names)
    broker.produce(topics.source, numbered(2, 400))
    topics.fail(broken, bisect_on_error=True)
    bad = topics.missing()
    assert len(bad) == 80
    hold = threading.Event()

    def slow(event: Any, context: LambdaContext) -> Any:
        if any(entry["payload"]["value"] == "order 1/253" for entry in event):
            hold.wait(60)
        return answer(event)

    with serve(slow) as server:
        with topics.start_redrive(server, batch_size=5, kafka_config_file=SAME_MEMBER) as sink:
            sink.until(
                lambda: len(bad & set(answered(broker, topics.responses))) >= 40,
                "the other partition was not redriven",
            )
            sink.kill()
        hold.set()
    assert topics.missing()
    with serve(answer) as server:
        facts = topics.redrive(server, kafka_config_file=SAME_MEMBER).summary["redrive"]
    assert facts["error_records"] >= len(bad) - 75
    assert topics.missing() == set()
    with serve(answer) as server:
        assert topics.redrive(server).summary["redrive"]["error_records"] == 0


def test_redriven_as_the_pipeline_is(broker: KafkaBroker, names: Names) -> None:
    """Its envelope, its lanes, keys, headers and timestamps; age is no reason to give up again."""
    topics = Failing(broker, names, partitions=1)
    topics.options.pop("response_topic")
    topics.options |= {"envelope": "kafka_event", "parallelization_factor": 3}
    records = [(0, b"k%d" % n, b"\xff%d" % n, [("h", b"\x00")], 1_000 + n) for n in range(12)]
    broker.produce(topics.source, records)

    def fails(event: Any, context: LambdaContext) -> None:
        raise ValueError("all of them")

    events: list[dict[str, Any]] = []
    topics.fail(fails, max_record_age_secs=-1)
    with serve(lambda event, context: events.append(event)) as server:
        topics.redrive(server, max_record_age_secs=60)
    found = [record for event in events for record in event["records"][f"{topics.source}-0"]]
    assert sorted(record["offset"] for record in found) == list(range(12))
    assert {record["timestamp"] - record["offset"] for record in found} == {1_000}
    assert all(record["headers"] == [{"h": [0]}] for record in found)


def test_a_group_of_another_program_is_not_used(broker: KafkaBroker, names: Names) -> None:
    """Its metadata is not overwritten."""
    from confluent_kafka import Consumer, TopicPartition

    topics = Failing(broker, names, partitions=1)
    broker.produce(topics.errors, [(0, None, b"x")])
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "theirs"})
    mark = TopicPartition(topics.errors, 0, 0, metadata="their own")
    consumer.commit(offsets=[mark], asynchronous=False)
    ended = topics.redrive(None, 1, redrive_group="theirs", preflight="false", first_redrive=None)
    assert ended.errors == [
        "error: --redrive_group=theirs is in use by another program; give another one"
    ]
    (found,) = consumer.committed([TopicPartition(topics.errors, 0)], timeout=10)
    assert found.metadata == "their own"
    consumer.close()


def test_an_error_topic_that_is_not_there(broker: KafkaBroker, names: Names) -> None:
    """One line, and exit code 1; without one at all it is 2."""
    topics = Failing(broker, names, partitions=1)
    missing = names.topic("missing")
    (error,) = topics.redrive(None, 1, error_topic=missing, preflight="false").errors
    assert f"--error_topic={missing} not found" in error
    ended = topics.redrive(None, 2, error_topic=None, on_error=None)
    assert "error: --error_topic is missing: it is what is redriven" in ended.errors


def test_an_error_record_keeps_its_originals_when_it_comes_again(
    broker: KafkaBroker, names: Names
) -> None:
    """Byte for byte, so that it can be redriven as often as it takes."""
    topics = Failing(broker, names, partitions=1)
    broker.produce(topics.source, [(0, b"\xff", None, [("a", None)], 5), (0, None, b"3")])
    always = serve(lambda event, context: json.loads("{"))
    with always as server:
        topics.run(server)
        topics.redrive(server)
    first, second = map(originals, broker.read_all(topics.errors))
    assert first == second and len(first) == 2


def test_a_redrive_that_waits_for_a_registry_hears_sigterm(
    broker: KafkaBroker, names: Names
) -> None:
    """It ends as a run does, and the next redrive takes what this one has not redriven."""
    topics = Failing(broker, names, partitions=1)
    # What a producer with a registry writes: nobody knows the schema before it answers.
    broker.produce(topics.source, [(0, None, b"\0\0\0\0\x01\x02")])
    topics.fail(lambda event, context: json.loads("{"))
    (bad,) = topics.missing()
    nobody = "http://127.0.0.1:9"
    with serve(answer) as server:
        options = {"schema_registry_url": nobody, "preflight": "false"}
        with topics.start_redrive(server, **options) as sink:
            sink.until(lambda: "waiting for it" in sink.stderr, "it does not wait")
            sink.send(signal.SIGTERM)
            ended = sink.wait(0)
        assert "before the run was told to stop" in ended.stderr
        assert ended.errors == []
        assert ended.summary["redrive"]["redriven"] == 0
        assert not invocations(server)
        assert topics.redrive(server, first_redrive=None).summary["redrive"]["redriven"] == 1
        (call,) = invocations(server)
        assert (call.topic, call.partition, *call.offsets) == bad
    assert topics.missing() == set()
