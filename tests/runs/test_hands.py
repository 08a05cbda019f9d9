"""Whole runs that are told something while they go on, by the command for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import unavailable
from tests import ROOT
from tests.conftest import Names
from tests.runs.test_http import Watched, balanced, total
from tests.runs.test_workers import IN_SECONDS
from tests.sink import (
    TRANSACTIONS,
    Sink,
    Topics,
    answer,
    answered,
    arguments,
    environment,
    facts,
    failed,
    numbered,
    of_partition,
    poison,
    serve,
)

TOKEN = "a-token-of-this-test"


class Told(Watched):
    """A run that is told something with `ctl`."""

    def ctl(self, *arguments: str, code: int = 0, token: str = TOKEN) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "pipeline", "ctl", f"--url={self.url}", *arguments],
            cwd=ROOT,
            env=environment(BEAM_LAMBDA_SINK_TOKEN=token),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr


def _options(tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return {"http": 0, "http_token_file": file, "until": None}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_is_paused_and_resumed(
    broker: KafkaBroker, names: Names, tmp_path: Path, workers: int
) -> None:
    """From the start, then a partition, then all. Paused means: nothing is begun, what runs is
    finished and committed."""
    topics = Topics(broker, names, partitions=3, count=10, preflight="false", **_options(tmp_path))
    with (
        serve(lambda event, _: (time.sleep(0.3), answer(event))[1]) as server,
        topics.start(server, start_paused=True, batch_size=5, workers=workers) as sink,
    ):
        run = Told(sink)
        run.until(lambda each: each["partitions"][("paused",)] == 3)
        sink.until(lambda: run.json("/api/status")["state"] == "paused", "all have begun")
        assert server.calls == []
        said = run.ctl("resume", f"--partition={topics.source}-1")
        assert f"changed: {topics.source}-1" in said
        assert f"{topics.source}-1" in said.partition("this run has")[2]
        run.until(lambda each: total(each, "committed_records_total") == 10)
        assert {number for _, number, _ in answered(broker, topics.responses)} == {1}
        run.ctl("resume")
        run.until(lambda each: total(each, "committed_records_total") == 30)
        broker.produce(topics.source, numbered(3, 50, "more"))
        sink.until(lambda: len(server.calls) > 8, "it is at work")
        run.ctl("pause")
        run.until(
            lambda each: (
                each["paused"] == {(): 1}
                and each["invocations_in_flight"] == {(): 0}
                and total(each, "committed_records_total") == total(each, "answered_records_total")
            )
        )
        calls = len(server.calls)
        time.sleep(1)
        assert len(server.calls) == calls
        assert sum(broker.committed(topics.group, topics.source).values()) == len(
            answered(broker, topics.responses)
        )
        run.ctl("resume")
        run.until(lambda each: total(each, "committed_records_total") == 180)
        sink.send(signal.SIGTERM)
        sink.wait()
    topics.assert_exactly_once()


def test_workers_that_come_later_are_paused_too(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """They begin as the others stand, and what they have done stays in the books when they go; the
    run is ready all the while."""
    options = _options(tmp_path) | {"workers": 1, "max_workers": 3, "start_paused": True}
    options |= {"preflight": "false"}
    topics = Topics(broker, names, partitions=4, count=30, **options)
    with (
        serve() as server,
        Sink(
            arguments(broker, server, **topics.options), environment(), ("-c", IN_SECONDS)
        ) as sink,
    ):
        run = Told(sink)

        def has(workers: int) -> bool:
            return bool(run.json("/api/status")["workers"] == workers) and ready()

        def ready() -> bool:
            assert run.get("/readyz")[0] == 200
            return True

        run.until(lambda each: each["partitions"][("paused",)] == 4)
        sink.until(lambda: has(3), "none has come")
        sink.until(lambda: ready() and topics.is_dealt(3), "none has partitions")
        run.until(lambda each: each["partitions"][("paused",)] == 4)
        assert server.calls == []
        run.ctl("resume")
        run.until(lambda each: ready() and total(each, "committed_records_total") == 120)
        sink.until(lambda: has(1), "none has gone")
        run.until(lambda each: each["partitions"][("idle",)] == 4)
        scraped = balanced(run.scrape())
        sink.send(signal.SIGTERM)
        sink.wait()
    assert total(scraped, "answered_records_total") == 120
    topics.assert_exactly_once()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"workers": 2},
        {"delivery": "exactly_once", "kafka_config_file": TRANSACTIONS},
    ],
    ids=["one", "two", "exactly-once"],
)
def test_a_halted_partition_goes_on(
    broker: KafkaBroker, names: Names, tmp_path: Path, how: dict[str, object]
) -> None:
    """Once the function is mended; or behind its record, which is in the error topic then: with
    exactly once in a transaction together with the offset."""
    bad = {"order 1/5", "order 2/3"}
    topics = Topics(broker, names, partitions=3, count=10, **_options(tmp_path), **how)

    def handler(event: object, context: object) -> object:
        return poison(*bad)(event, context)

    with (
        serve(handler) as server,
        topics.start(
            server,
            on_error="fail",
            error_topic=topics.errors,
            batch_size=4,
            bisect_on_error=True,
        ) as sink,
    ):
        run = Told(sink)
        run.until(lambda each: each["partitions"][("halted",)] == 2)
        assert "is halted at offset 5" in run.ctl(
            "skip", f"--partition={topics.source}-1", "--offset=4", code=1
        )
        bad.discard("order 2/3")
        assert f"changed: {topics.source}-2" in run.ctl(
            "resume-halted", f"--partition={topics.source}-2"
        )
        said = run.ctl("skip", f"--partition={topics.source}-1", "--offset=5")
        assert "offsets 5 to 5 are written to the error topic and skipped" in said
        run.until(
            lambda each: (
                total(each, "committed_records_total") == 30
                and each["partitions"][("idle",)] == 3
                and total(each, "error_topic_records_total") == 1
            )
        )
        scraped = balanced(run.scrape())
        sink.send(signal.SIGTERM)
        ended = sink.wait()
    assert scraped["error_topic_records_total"][("SkippedByOperator", topics.source)] == 1
    assert ended.summary["halted"] == []
    assert ended.summary["errors"] == 1
    assert failed(broker, topics.errors) == [(topics.source, 1, 5)]
    (record,) = broker.read_all(topics.errors)
    assert "SkippedByOperator" in facts(record).values()
    topics.assert_exactly_once()
    topics.assert_caught_up()


def test_a_record_that_is_repeated_for_ever_is_skipped(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """And one that waits for long is tried at once."""
    topics = Topics(broker, names, partitions=2, count=6, **_options(tmp_path))
    with (
        serve(poison("order 1/2"), faults=[unavailable(times=7, when=of_partition(0))]) as server,
        topics.start(
            server, max_retries=-1, batch_size=1, error_topic=topics.errors, on_error="log"
        ) as sink,
    ):
        run = Told(sink)
        run.until(lambda each: each["partitions"][("backing_off",)] == 1)
        sink.until(
            lambda: (
                run.ctl("retry") != "" and broker.committed(topics.group, topics.source).get(0) == 6
            ),
            "0 is tried again and again",
        )
        command = ["skip", f"--partition={topics.source}-1", "--offset=2"]
        for _ in range(100):
            ended = subprocess.run(
                [sys.executable, "-m", "pipeline", "ctl", f"--url={run.url}", *command],
                cwd=ROOT,
                env=environment(BEAM_LAMBDA_SINK_TOKEN=TOKEN),
                capture_output=True,
                text=True,
            )
            if ended.returncode == 0:
                break
        run.until(lambda each: total(each, "committed_records_total") == 12)
        sink.send(signal.SIGTERM)
        sink.wait()
    assert failed(broker, topics.errors) == [(topics.source, 1, 2)]
    topics.assert_exactly_once()


def test_who_has_not_the_token_tells_nothing(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    topics = Topics(broker, names, count=1, **_options(tmp_path))
    with serve(answer) as server, topics.start(server, log_format="json") as sink:
        run = Told(sink)
        assert "the token is not the run's" in run.ctl("pause", code=1, token="x" * 20)
        assert json.loads(run.ctl("status"))["state"] in ("starting", "running")
        run.ctl("log-level", "DEBUG")
        sink.until(lambda: "KAFKA_STATUS_EVENT" in sink.stderr, "it logs more")
        assert TOKEN not in sink.stderr
        sink.send(signal.SIGTERM)
        sink.wait()
