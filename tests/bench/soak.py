"""A long run with everything at once that has ever cost records, memory or a partition's turn.

``python -m tests.bench.soak [--secs 300] [--partitions 2000] [--stuck 20] [--halted 20] ...``,
also ``./run.sh bench --soak``.

A filter that drops whole rounds, lanes with bursts of keys, aborted transactions, large replies, a
function that throttles and is unavailable now and then. After the first part of the time some
partitions get stuck (the function is unavailable for them from then on), some halt (it fails in
them), and these get a share of the load of their own, so that their backlogs grow.

At the end it says what is to be known of such a run:

* every record exactly once in responses, filtered or not committed, and none of it twice;
* the largest resident set of the process;
* what the other partitions were answered per second, before and after some were stuck;
* how long a record of theirs waited from its timestamp to its invocation.

A lost record or one with two outcomes is exit code 1, and so is a missed aim with ``--strict``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Producer

from pipeline.local.broker import KafkaBroker
from pipeline.local.faults import Fault, throttle, unavailable
from tests.bench.topics import Topics
from tests.sink import serve, start

STEP_SECS = 0.25
BURST = 5  # records of one key, one behind the other
_PLACE = re.compile(rb'"partition":(\d+),')


@dataclass(frozen=True)
class Load:
    """What is written and how the function behaves.

    Attributes:
        secs: Seconds of load; the first third is without stuck and halted partitions. A tenth
            more comes first and is not measured.
        partitions: Of the topic; the first ones get stuck, the next ones halt.
        stuck: How many get stuck.
        halted: How many halt.
        rate: Records written per second.
        reply_bytes: Of each record's answer.
        lanes: Invocations at once inside a partition.
        throttled: Share of the invocations that are answered 429.
        unavailable: Share that is answered 503.
        name: Of the topic and the consumer group.
    """

    secs: float = 300.0
    partitions: int = 2000
    stuck: int = 20
    halted: int = 20
    rate: int = 200
    reply_bytes: int = 20_000
    lanes: int = 4
    throttled: float = 0.01
    unavailable: float = 0.005
    name: str = "soak"

    @property
    def responses(self) -> str:
        """The response topic."""
        return f"{self.name}-responses"

    @property
    def bad(self) -> int:
        """The partitions below this one get stuck or halt."""
        return self.stuck + self.halted


@dataclass
class Phase:
    """What the healthy partitions got in a part of the time."""

    started: float = 0.0
    ended: float = 0.0
    waits: list[float] = field(default_factory=list)

    @property
    def pace(self) -> float:
        """Records answered per second."""
        return len(self.waits) / max(self.ended - self.started, 1e-9)

    def wait(self, share: float) -> float:
        """The wait in seconds that this share of the records did not exceed."""
        waits = sorted(self.waits)
        return waits[min(int(len(waits) * share), len(waits) - 1)] if waits else 0.0


@dataclass
class Result:
    """What a soak came to.

    Attributes:
        written: Records that were committed to the topic.
        answered: Of these with one response.
        filtered: Of these that the filter does not let through, below what is committed.
        uncommitted: Of these without an outcome, at or behind what is committed.
        ahead: Of `answered`, those behind a record of another lane that is not committed.
        wrong: What is not as it has to be, one line each.
        peak_mb: Largest resident set, in MB (10^6 bytes).
        without: While all partitions were healthy.
        beside: While some were stuck or halted.
        drain_secs: From the end of the load until the healthy partitions were committed.
    """

    written: int = 0
    answered: int = 0
    filtered: int = 0
    uncommitted: int = 0
    ahead: int = 0
    wrong: list[str] = field(default_factory=list)
    peak_mb: float = 0.0
    without: Phase = field(default_factory=Phase)
    beside: Phase = field(default_factory=Phase)
    drain_secs: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


class _Function:
    """The function, and the faults it is called with."""

    def __init__(self, load: Load, random_seed: int = 1) -> None:
        self._load = load
        self._random = random.Random(random_seed)
        self._padding = "x" * load.reply_bytes
        self._lock = threading.Lock()
        self.phase: Phase | None = None
        self.goes_wrong = False

    def __call__(self, event: Any, context: Any) -> Any:
        now = time.time()
        records = [entry["payload"] for entry in event]
        if self.goes_wrong and self._load.stuck <= records[0]["partition"] < self._load.bad:
            raise ValueError("cannot process this record")
        with self._lock:
            if self.phase and records[0]["partition"] >= self._load.bad:
                self.phase.waits += [now - record["timestamp"] / 1000 for record in records]
        names = ("timestamp", "topic", "partition", "offset")
        return [
            {"payload": {name: record[name] for name in names} | {"result": self._padding}}
            for record in records
        ]

    def faults(self) -> list[Fault]:
        def is_stuck(payload: bytes, name: str) -> bool:
            found = _PLACE.search(payload)
            return self.goes_wrong and found is not None and int(found[1]) < self._load.stuck

        def now_and_then(share: float) -> Any:
            return lambda payload, name: self._random.random() < share

        return [
            unavailable(503, times=None, when=is_stuck),
            throttle(times=None, when=now_and_then(self._load.throttled)),
            unavailable(503, times=None, when=now_and_then(self._load.unavailable)),
        ]


class _Writer:
    """Writes the load, step after step."""

    def __init__(self, servers: str, load: Load, random_seed: int = 2) -> None:
        self._load = load
        self._random = random.Random(random_seed)
        self._plain = Producer({"bootstrap.servers": servers, "linger.ms": 5})
        self._aborting = Producer({"bootstrap.servers": servers, "transactional.id": load.name})
        self._aborting.init_transactions(60)
        self._steps = 0

    def run(self, secs: float) -> None:
        """Write at the load's rate for so long."""
        began, done = time.monotonic(), 0
        while (passed := time.monotonic() - began) < secs:
            while done * STEP_SECS <= passed:
                self._step()
                done += 1
            time.sleep(STEP_SECS / 5)
        if self._plain.flush(60):
            raise RuntimeError("not all records were written")

    def _step(self) -> None:
        """Every third step only what the filter drops; every seventh is aborted besides."""
        self._steps += 1
        dropped = self._steps % 3 == 0
        self._bursts(self._plain, dropped, round(self._load.rate * STEP_SECS))
        if self._steps % 7 == 0:
            self._aborting.begin_transaction()
            self._bursts(self._aborting, dropped, 4 * BURST)
            self._aborting.abort_transaction(60)

    def _bursts(self, producer: Producer, dropped: bool, records: int) -> None:
        for number in range(max(records // BURST, 1)):
            # A quarter is for those that get stuck or halt: their backlogs are long.
            bad = self._load.bad and number % 4 == 0
            partition = self._random.randrange(
                *((0, self._load.bad) if bad else (self._load.bad, self._load.partitions))
            )
            key = b"key-%d" % self._random.randrange(20)
            value = b'{"status":"%s","note":"%s"}' % (b"new" if dropped else b"paid", b"x" * 200)
            for _ in range(BURST):
                producer.produce(self._load.name, value, key, partition)
            producer.poll(0)


def soak(load: Load) -> Result:
    """Run it on a broker of its own."""
    with tempfile.TemporaryDirectory() as folder, KafkaBroker(heap_mb=2048) as broker:
        broker.create_topic(load.responses, 8)
        # A few at a time: each time is waited for, and the machine may be busy.
        broker.create_topic(load.name, min(load.partitions, 100))
        for total in range(200, load.partitions + 100, 100):
            broker.add_partitions(load.name, min(total, load.partitions))
        return run_on(broker, load, Path(folder))


def run_on(broker: KafkaBroker, load: Load, folder: Path) -> Result:
    """Run it on a broker that has the topics."""
    pattern = json.dumps({"value": {"status": ["paid"]}})
    filters = folder / "filters.json"
    filters.write_text(json.dumps({"Filters": [{"Pattern": pattern}]}))
    result = Result()
    function = _Function(load)
    with (
        serve(function, function.faults(), record_calls=False) as server,
        start(
            broker,
            server,
            topics=load.name,
            response_topic=load.responses,
            consumer_group=load.name,
            filter_criteria=filters,
            parallelization_factor=load.lanes,
            batch_size=10,
            until="forever",
        ) as sink,
    ):
        writer = _Writer(broker.bootstrap_servers, load)
        first = Phase()
        function.phase = first
        broker.produce(load.name, [(load.partitions - 1, None, b'{"status":"paid"}')])
        sink.until(lambda: bool(first.waits), "nothing is invoked", 120)
        writer.run(load.secs / 10)
        for phase, secs in ((result.without, load.secs / 3), (result.beside, load.secs * 2 / 3)):
            function.goes_wrong = phase is result.beside
            phase.started = time.monotonic()
            function.phase = phase
            writer.run(secs)
            phase.ended = time.monotonic()
            sink.until(lambda: True, "the load was over")  # it still runs
        function.phase = None
        result.peak_mb = _peak_mb(sink.process.pid)
        ends = broker.end_offsets(load.name)

        def is_done() -> bool:
            committed = broker.committed(load.name, load.name)
            return all(
                committed.get(partition, 0) >= end
                for partition, end in ends.items()
                if partition >= load.bad
            )

        began = time.monotonic()
        try:
            sink.until(is_done, "the healthy partitions are not committed", 120)
        except Exception as error:
            result.wrong.append(str(error).splitlines()[0])
        result.drain_secs = time.monotonic() - began
        result.peak_mb = _peak_mb(sink.process.pid)
        sink.send(signal.SIGTERM)
        ended = sink.wait(None)
        if ended.code != (3 if load.halted else 0):
            result.wrong.append(f"the exit code is {ended.code}: {ended.stderr[-500:]}")
        result.summary = json.loads(ended.stdout) if ended.stdout.strip() else {}
    _count(broker, load, result)
    return result


def _count(broker: KafkaBroker, load: Load, result: Result) -> None:
    """What became of each record."""
    responses: Counter[tuple[int, int]] = Counter()
    topics = Topics(broker.bootstrap_servers)
    for message in topics.read(load.responses):
        key = json.loads(message.key() or b"")
        responses[key["partition"], key["offset"]] += 1
    committed = broker.committed(load.name, load.name)
    for record in broker.read_all(load.name, timeout=300):
        place = (record.partition, record.offset)
        count = responses.pop(place, 0)
        finished = record.offset < committed.get(record.partition, 0)
        dropped = b'"new"' in (record.value or b"")
        result.written += 1
        if count > 1 or (count and dropped):
            result.wrong.append(f"{place} has {count} responses, filtered: {dropped}")
        elif finished and not dropped and not count:
            result.wrong.append(f"{place} is committed and has no response")
        result.answered += bool(count)
        result.ahead += bool(count) and not finished
        result.filtered += finished and dropped
        result.uncommitted += not finished and not count
    if responses:
        result.wrong.append(f"{len(responses)} responses to records that do not exist")


def _peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def missed(result: Result, memory_mb: float, pace: float, wait_secs: float) -> list[str]:
    """The aims that were missed, one line each."""
    found = []
    if result.peak_mb > memory_mb:
        found.append(f"{result.peak_mb:.0f} MB, {memory_mb:.0f} at most")
    share = result.beside.pace / max(result.without.pace, 1e-9)
    if share < pace:
        found.append(f"{share:.0%} of the pace without stuck partitions, {pace:.0%} at least")
    if result.beside.wait(1) > wait_secs:
        found.append(f"a record waited {result.beside.wait(1):.1f} s, {wait_secs:g} at most")
    return found


def report(load: Load, result: Result) -> None:
    """Print it."""
    print(
        f"{load.secs:g} s, {load.partitions} partitions ({load.stuck} stuck, {load.halted} halted),"
        f" {load.rate} records/s, {load.lanes} lanes, replies of {load.reply_bytes} bytes a record"
    )
    print(
        f"records: {result.written} written = {result.answered} answered"
        f" + {result.filtered} filtered + {result.uncommitted} not committed"
        f" ({result.ahead} answered ahead of what is committed)"
    )
    print(f"wrong: {len(result.wrong)}")
    for line in result.wrong[:20]:
        print(f"  {line}")
    print(f"peak RSS: {result.peak_mb:.0f} MB")
    for name, phase in (("all healthy", result.without), ("beside stuck", result.beside)):
        mean = statistics.fmean(phase.waits) if phase.waits else 0.0
        print(
            f"{name}: {phase.pace:.1f} records/s of the healthy partitions; waits: mean {mean:.2f},"
            f" median {phase.wait(0.5):.2f}, 99 % {phase.wait(0.99):.2f},"
            f" largest {phase.wait(1):.2f} s"
        )
    print(f"healthy partitions were committed {result.drain_secs:.1f} s after the load")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak")
    for name, default in vars(Load()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--memory_mb", type=float, default=700.0, help="aim")
    parser.add_argument("--pace", type=float, default=0.9, help="aim, of the pace without stuck")
    parser.add_argument("--wait_secs", type=float, default=30.0, help="aim, of a healthy record")
    parser.add_argument("--strict", action="store_true", help="a missed aim is exit code 1 too")
    options = vars(parser.parse_args(arguments))
    aims = {name: options.pop(name) for name in ("memory_mb", "pace", "wait_secs")}
    strict = options.pop("strict")
    # Ends by an exception, so that the processes made here are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    load = Load(**options)
    result = soak(load)
    report(load, result)
    lines = missed(result, **aims)
    for line in lines:
        print(f"missed: {line}")
    return 1 if result.wrong or (strict and lines) else 0


if __name__ == "__main__":
    sys.exit(main())
