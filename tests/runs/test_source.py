"""Whole runs on another source than Kafka: numbers of 56 digits, shards that end, and children.

The program runs in this process, since the source is a list in its memory; the function and the
broker that takes the responses are real.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.lambda_server import LambdaContext, LambdaServer
from pipeline.local.processes import wait_until
from pipeline.options.config import Config
from pipeline.options.resolve import parse_arguments
from pipeline.run.rounds import Rounds
from pipeline.run.status import Status
from pipeline.watch.logs import _JsonFormatter
from pipeline.watch.progress import summary
from tests import sink
from tests.conftest import Names
from tests.servers.memory_source import ENDED, STREAMS, MemorySource, Shard, Stream
from transforms.commit.committer import Committer
from transforms.invoke.invoke import make_invoker
from transforms.original import TEXT_ORIGINAL_HEADER, decode_original
from transforms.per_process import forget
from transforms.read.rounds import RoundReader


class Function:
    """Answers each record with its value, and notes what is committed when it is called."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name
        self.sent: list[tuple[int, list[str]]] = []
        self.contexts: list[dict[str, str]] = []
        self.too_early: list[int] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        shard = event[0]["payload"]["partition"]
        for parent in self._stream.shards[shard].parents:
            if self._stream.table.get((self._name, parent), (0, ""))[0] != ENDED:
                self.too_early.append(shard)
        self.sent.append((shard, [entry["payload"]["offset"] for entry in event]))
        assert context.client_context
        self.contexts.append(context.client_context.custom)
        if any("bad" in entry["payload"]["value"] for entry in event):
            raise ValueError("cannot process this")
        return sink.answer(event)

    def answered(self) -> dict[int, list[str]]:
        """By shard, what was sent alone or with others, the first time."""
        by_shard: dict[int, list[str]] = {}
        for shard, numbers in self.sent:
            own = by_shard.setdefault(shard, [])
            own += [number for number in numbers if number not in own]
        return by_shard


@pytest.fixture
def name() -> Iterator[str]:
    yield "stream"
    STREAMS.clear()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in sink.environment().items():
        monkeypatch.setenv(key, value)


def _config(broker: KafkaBroker, server: LambdaServer, name: str, **options: Any) -> Config:
    """The config of a user, with another source in it."""
    options = {"topics": "none", "consumer_group": "none"} | options
    config, _ = parse_arguments(sink.arguments(broker, server, **options))
    source = MemorySource(name)
    return replace(
        config,
        read=replace(config.read, source=source),
        commit=replace(config.commit, source=source),
        batch=replace(config.batch, format=replace(config.batch.format, names=source.names)),
        invoke=replace(config.invoke, names=source.names),
        write=replace(config.write, names=source.names, source=source),
    )


def _run(config: Config, until: Callable[[], bool] | None = None) -> Status:
    """Run to the end, or until something holds."""
    stop = threading.Event()
    if until:

        def watch() -> None:
            try:
                wait_until(until, "it did not come about", 60)
            finally:
                stop.set()

        threading.Thread(target=watch).start()
    # As in a process of its own.
    forget(RoundReader, config.read)
    forget(Committer, config.commit)
    forget(make_invoker, config.invoke)
    return Rounds(config, stop).run()


def _family() -> Stream:
    """Shard 0 is split into 2 and 3; 3 and 1 are merged into 4, which has nothing but a child."""
    return Stream(
        {
            0: Shard().add(230),
            1: Shard().add(90),
            2: Shard((0,)).add(120),
            3: Shard((0,)).add(40),
            4: Shard((3, 1), closed=True),
            5: Shard((4,)).add(75),
        }
    )


@pytest.mark.parametrize("lanes", [1, 3])
def test_shards_are_worked_in_order_of_descent(
    broker: KafkaBroker, names: Names, name: str, lanes: int
) -> None:
    """Each record once, by its own number, a child only once all of its parents is committed."""
    name = f"{names.topic('stream')}-{lanes}"
    stream = STREAMS[name] = _family()
    for number in (0, 1, 3):
        stream.shards[number].closed = True
    bad = stream.shards[1].rows[33]
    stream.shards[1].rows[33] = replace(bad, data=b"bad")
    responses, errors = names.topic(f"responses{lanes}"), names.topic(f"errors{lanes}")
    for topic in (responses, errors):
        broker.create_topic(topic, 3)
    function = Function(stream, name)
    with sink.serve(function) as server:
        config = _config(
            broker,
            server,
            name,
            batch_size=20,
            response_topic=responses,
            error_topic=errors,
            on_error="log",
            max_retries=0,
            bisect_on_error=True,
            parallelization_factor=lanes,
        )
        status = _run(config)
        calls = len(function.sent)
        again = _run(config)

    numbers = {n: [str(row.number) for row in s.rows] for n, s in stream.shards.items()}
    assert {key: sorted(own, key=int) for key, own in function.answered().items()} == {
        key: own for key, own in numbers.items() if own
    }
    if lanes == 1:
        assert function.answered() == {key: own for key, own in numbers.items() if own}
    assert function.too_early == []
    assert stream.begun[:6] == [0, 1, *sorted(stream.begun[2:4]), 4, 5]
    # What was done is not done again.
    assert len(function.sent) == calls
    assert again.totals.records == 0

    answered = [json.loads(each.key or b"") for each in broker.read_all(responses)]
    assert all(each["topic"] == name for each in answered)
    assert sorted((each["partition"], each["offset"]) for each in answered) == sorted(
        (key, number)
        for key, own in numbers.items()
        for number in own
        if (key, number) != (1, str(bad.number))
    )
    (error,) = broker.read_all(errors)
    assert json.loads(error.key or b"") == {
        "topic": name,
        "partition": 1,
        "firstOffset": str(bad.number),
        "lastOffset": str(bad.number),
    }
    (original,) = [data for header, data in error.headers if header == TEXT_ORIGINAL_HEADER]
    read = decode_original(original or b"", MemorySource.names)
    assert (read["offset"], read["value"]) == (str(bad.number), b"bad")
    for (_, sent), custom in zip(function.sent, function.contexts):
        assert (custom["first_offset"], custom["last_offset"]) == (sent[0], sent[-1])

    facts = json.loads(orjson.dumps(summary(status)))
    ended = dict.fromkeys((f"{name}-{shard}" for shard in (0, 1, 3, 4)), "ended")
    assert facts["committed"] == ended | {f"{name}-{n}": numbers[n][-1] for n in (2, 5)}
    assert facts["last_error"]["offsets"] == [str(bad.number), str(bad.number)]
    assert facts["lag_max"] == 0


def test_a_shard_s_end_closes_its_batch(broker: KafkaBroker, names: Names) -> None:
    """However long a batch may wait for more: none comes, and children wait for the end."""
    name = names.topic("stream")
    stream = STREAMS[name] = Stream(
        {0: Shard(closed=True).add(7), 1: Shard((0,), closed=True).add(3), 2: Shard((1,)).add(5)}
    )
    function = Function(stream, name)
    with sink.serve(function) as server:
        config = _config(
            broker,
            server,
            name,
            until="forever",
            batch_size=100,
            batch_window_secs=300,
            response_topic=None,
        )
        _run(config, lambda: stream.table.get((name, 1), (0, ""))[0] == ENDED)
    assert [(shard, len(sent)) for shard, sent in function.sent] == [(0, 7), (1, 3)]


def test_a_halted_shard_says_where(
    broker: KafkaBroker, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """Its children are not begun, and the others go on; all is told in the source's numbers."""
    name = names.topic("stream")
    stream = STREAMS[name] = Stream(
        {0: Shard(closed=True).add(30), 1: Shard().add(30), 2: Shard((0,)).add(10)}
    )
    bad = stream.shards[0].rows[20]
    stream.shards[0].rows[20] = replace(bad, data=b"bad")
    function = Function(stream, name)
    with sink.serve(function) as server:
        config = _config(broker, server, name, batch_size=1, max_retries=0, response_topic=None)
        status = _run(config)
    (halted,) = json.loads(orjson.dumps(summary(status)))["halted"]
    assert (halted["partition"], halted["offset"]) == (0, str(bad.number))
    assert stream.table[name, 0][0] == stream.shards[0].rows[19].number + 1
    assert stream.table[name, 1][0] == stream.shards[1].rows[-1].number + 1
    assert (name, 2) not in stream.table
    # The log for machines takes what the invoker says of it.
    said = [json.loads(_JsonFormatter().format(record)) for record in caplog.records]
    assert [str(bad.number)] * 2 in [facts.get("offsets") for facts in said]
