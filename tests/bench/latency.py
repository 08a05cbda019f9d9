"""How soon a record is answered: the pipeline beside a loop by hand that answers each as it comes.

``./run.sh bench --latency [--quick] [--repeat 3]``

A latency is the time from the moment a record was due to be written to the timestamp of its
response, which the client that writes it sets when it is handed the response, in whole milliseconds
(with ``--appended`` the broker's own, when it has it). A process of its own writes the records in
ticks of 10 ms (`tests.bench.generator`): it costs little, and above 100 records/s makes records up
to 10 ms late. That is part of each latency, for all alike; the tables have it beside them. Source
and responses are read when a run is over, never while it goes on.

Every run is a fresh process with fresh topics and a fresh group. When its first record is answered
the load begins; after the warm-up the seconds that count begin, and its processor's time is that of
its whole process tree in them. Each time another competitor has the first turn. A competitor that
is still further behind at the end than it was at the beginning cannot follow: then there is no
latency. Responses that are wrong, or two to one record, end the benchmark with exit code 1.

The loop by hand has no batches and no window, so its figures with a window are those without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import orjson
from confluent_kafka import Message

from pipeline.local.processes import free_ports
from tests.bench import stub
from tests.bench.common import (
    CREDENTIALS,
    HAND_WRITTEN,
    PIPELINE,
    chosen,
    cpu_secs,
    in_turn,
    on_broker,
    serving,
    table,
    verdict,
)
from tests.bench.generator import TICK_SECS, Generated
from tests.bench.topics import Topics, WrongResult, answered
from tests.bench.watch import watching

COMPETITORS = (PIPELINE, HAND_WRITTEN)

Place = tuple[int, int]
"""Partition and offset of a record."""

_RATES = (10.0, 100.0, 1000.0, 5000.0)
_PARTITIONS = 4
_MANY_PARTITIONS, _MANY_RATE = 200, 100.0
_IDLE_PARTITIONS = (4, 1000)
_IDLE_SECS = 20.0

_WARM_UP_SECS = 3.0
_START_SECS = 60.0
# Behind the last record: what is answered later counts as not answered.
_DRAIN_SECS = 20.0
# Nobody who follows is so far behind that it takes longer than this to catch up.
_BEHIND_SECS = 2.0
_END_SECS = 90.0
# What a run takes beside its load: start, end, reading what it left. For the estimate only.
_AROUND_SECS = 6.0


class Load(NamedTuple):
    """What a competitor is given to do; rate in records/s, times in ms and s."""

    rate: float
    partitions: int
    latency_ms: float
    window_secs: float

    def __str__(self) -> str:
        return (
            f"{self.rate:g}/s, {self.partitions} partitions, function {self.latency_ms:g} ms, "
            f"window {self.window_secs:g} s"
        )


class Timed(NamedTuple):
    """A record of the seconds that count; times in ms since the epoch.

    Attributes:
        due: When it was to be written.
        written: When it was; whole milliseconds.
        answered: The timestamp of its response; infinity if there is none.
    """

    due: float
    written: float
    answered: float

    @property
    def latency(self) -> float:
        """Milliseconds."""
        return self.answered - self.due


@dataclass(frozen=True)
class Aim:
    """A bound on a figure of the pipeline; `window_secs` None is its worst of all with a window."""

    text: str
    figure: str
    at_most: float
    rate: float | None = None
    partitions: int = _PARTITIONS
    window_secs: float | None = 0.0


AIMS = (
    Aim("100/s: p50 <= 10 ms", "p50", 10, 100),
    Aim("100/s: p50 <= 3 x the loop's", "p50_ratio", 3, 100),
    Aim("100/s: p99 <= 50 ms", "p99", 50, 100),
    Aim("100/s: CPU <= 1.3 x the loop's", "cpu_ratio", 1.3, 100),
    Aim("10/s: p50 <= 12 ms", "p50", 12, 10),
    Aim("1,000/s: p50 <= 15 ms", "p50", 15, 1000),
    Aim("1,000/s: p99 <= 60 ms", "p99", 60, 1000),
    Aim("5,000/s: p50 <= 25 ms", "p50", 25, 5000),
    Aim("5,000/s: p99 <= 150 ms", "p99", 150, 5000),
    Aim("5,000/s: no growing lag", "cannot_follow", 0, 5000),
    Aim("100/s over 200 partitions: p50 <= 15 ms", "p50", 15, 100, _MANY_PARTITIONS),
    Aim("window 0.5 s: p95 <= 530 ms, at every load", "p95", 530, window_secs=0.5),
)
IDLE_AIMS = {4: 0.5, 1000: 5.0}
# Of ten seconds one and the same loop takes 14 to 22 % of a core here: where a ratio of them is an
# aim, so many times the runs.
_TIMES_COMPARED = 3


@dataclass(frozen=True)
class Run:
    """The figures of one run; ms and percent of a core. Infinite where it could not follow.

    Attributes:
        records: Those that count.
        unanswered: Those of them without a response.
        late_p50: How much later than due they were written; so p99.
        generator_percent: The processor's time of what wrote them.
        growth: The median latency of their last third, less that of the first.
        records_per_call: Of all that were sent.
    """

    load: Load
    who: str
    records: int
    unanswered: int
    p50: float
    p95: float
    p99: float
    max: float
    late_p50: float
    late_p99: float
    cpu_percent: float
    generator_percent: float
    growth: float
    follows: bool
    records_per_call: float


@dataclass(frozen=True)
class Idle:
    """The processor's time of a competitor that has nothing to do, in percent of a core."""

    who: str
    partitions: int
    cpu_percent: float


# -- rules -------------------------------------------------------------------------------------


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest of some rising figures that so many percent of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def match(
    written: Mapping[Place, tuple[float, float]],
    responses: Iterable[tuple[Place, float]],
    begin_ms: float,
    end_ms: float,
) -> list[Timed]:
    """The records that were due in a time, by when they were.

    Args:
        written: Per record when it was due and when it was written.
        responses: For each response the record it answers and its timestamp.
        begin_ms: From then on.
        end_ms: Until just before then.

    Raises:
        WrongResult: A response to no record, or a second one.
    """
    stamps: dict[Place, float] = {}
    for place, stamp in responses:
        if place not in written:
            raise WrongResult(f"a response to {place}, where no record is")
        if place in stamps:
            raise WrongResult(f"more than one response to {place}")
        stamps[place] = stamp
    return sorted(
        Timed(due, at, stamps.get(place, math.inf))
        for place, (due, at) in written.items()
        if begin_ms <= due < end_ms
    )


def growth_of(timed: Sequence[Timed], window_ms: float = 0.0) -> tuple[float, bool]:
    """How much the median latency has grown from the first third to the last, in ms, and whether
    that says that the records came faster than they were answered. Where in a window they come may
    shift meanwhile."""
    third = max(1, len(timed) // 3)
    first = statistics.median(each.latency for each in timed[:third])
    last = statistics.median(each.latency for each in timed[-third:])
    if math.isinf(last):
        return math.inf, True
    # Twice as late, and by more than what one slow second of a machine comes to.
    return last - first, last > 2 * first and last - first > 100 + window_ms


def figures(
    load: Load,
    who: str,
    timed: Sequence[Timed],
    cpu_percent: float,
    generator_percent: float,
    records_per_call: float,
    behind: bool = False,
) -> Run:
    """What a run comes to; `behind` if it was given up because it did not follow.

    Raises:
        WrongResult: There is no record that counts.
    """
    if not timed:
        raise WrongResult(f"{load}: no record was due in the seconds that count")
    latencies = sorted(each.latency for each in timed)
    late = sorted(each.written - each.due for each in timed)
    growth, grows = growth_of(timed, load.window_secs * 1000)
    unanswered = sum(map(math.isinf, latencies))
    return Run(
        load,
        who,
        len(timed),
        unanswered,
        *(percentile(latencies, percent) for percent in (50, 95, 99, 100)),
        percentile(late, 50),
        percentile(late, 99),
        round(cpu_percent, 2),
        generator_percent,
        growth,
        not (behind or grows or unanswered),
        round(records_per_call, 1),
    )


def loads_of(options: argparse.Namespace) -> list[Load]:
    """The loads that were asked for."""
    if options.rates or options.partitions:
        pairs = list(product(options.rates or _RATES, options.partitions or (_PARTITIONS,)))
    else:
        pairs = [*((rate, _PARTITIONS) for rate in _RATES), (_MANY_RATE, _MANY_PARTITIONS)]
    quick = (0.0,) if options.quick else (0.0, 20.0)
    return [
        Load(rate, int(partitions), latency_ms, window_secs)
        for latency_ms in options.latency_ms or quick
        for window_secs in options.window or (0.0, 0.5)
        for rate, partitions in pairs
    ]


def turns_of(load: Load, repeat: int) -> int:
    """How often a load is run: more often where it is an aim to be as good as the loop by hand."""
    compared = any(
        aim.figure.endswith("_ratio")
        and (aim.rate, aim.partitions, aim.window_secs)
        == (load.rate, load.partitions, load.window_secs)
        and not load.latency_ms
        for aim in AIMS
    )
    return repeat * (_TIMES_COMPARED if compared else 1)


def idle_of(options: argparse.Namespace) -> list[int]:
    """The partitions with which idle time is measured."""
    if options.idle is None:
        return [] if options.rates or options.partitions else list(_IDLE_PARTITIONS)
    return [int(partitions) for partitions in options.idle if partitions]


def _peer_of(load: Load, loads: list[Load]) -> Load:
    """The load whose run by hand is beside this one: the first that differs in the window only."""
    without = load._replace(window_secs=0.0)
    return next(other for other in loads if other._replace(window_secs=0.0) == without)


def summarize(runs: list[Run], loads: list[Load]) -> list[dict[str, Any]]:
    """A row for each load and competitor: medians over its runs; of the maxima the largest."""
    rows = []
    for load in loads:
        own: dict[str, dict[str, Any]] = {}
        for who in COMPETITORS:
            at = load if who == PIPELINE else _peer_of(load, loads)
            found = [run for run in runs if (run.load, run.who) == (at, who)]
            if not found:
                continue
            names = ("p50", "p95", "p99", "late_p50", "late_p99", "cpu_percent")
            middle = {
                name: statistics.median(getattr(run, name) for run in found) for name in names
            }
            own[who] = {
                **load._asdict(),
                "who": who,
                **middle,
                "max": max(run.max for run in found),
                "p50_range": [find(run.p50 for run in found) for find in (min, max)],
                "generator_percent": max(run.generator_percent for run in found),
                "records_per_call": statistics.median(run.records_per_call for run in found),
                "runs": len(found),
                "cannot_follow": int(not all(run.follows for run in found)),
                "p50_ratio": None,
                "cpu_ratio": None,
            }
        if len(own) == len(COMPETITORS) and not own[HAND_WRITTEN]["cannot_follow"]:
            mine, peer = own[PIPELINE], own[HAND_WRITTEN]
            # Less than the half millisecond that timestamps are exact to says nothing.
            mine["p50_ratio"] = round(mine["p50"] / max(peer["p50"], 0.5), 2)
            mine["cpu_ratio"] = round(mine["cpu_percent"] / max(peer["cpu_percent"], 0.1), 2)
        rows += own.values()
    return rows


def judge(rows: list[dict[str, Any]], idle: list[Idle]) -> list[dict[str, Any]]:
    """For each aim the pipeline's figure and whether it holds; None where it was not measured.

    A pipeline that could not follow misses whatever is aimed at there.
    """
    verdicts = []
    for aim in AIMS:
        found = [
            math.inf if row["cannot_follow"] else row[aim.figure]
            for row in rows
            if row["who"] == PIPELINE
            and row["latency_ms"] == 0
            and aim.window_secs == row["window_secs"]
            and (aim.rate is None or (aim.rate, aim.partitions) == (row["rate"], row["partitions"]))
        ]
        known = [figure for figure in found if figure is not None]
        verdicts.append(_verdict(aim.text, max(known, default=None), aim.at_most))
    for partitions, at_most in IDLE_AIMS.items():
        shares = [
            each.cpu_percent
            for each in idle
            if (each.who, each.partitions) == (PIPELINE, partitions)
        ]
        text = f"idle, {partitions:,} partitions: CPU <= {at_most:g} % of a core"
        middle = statistics.median(shares) if shares else None
        verdicts.append(_verdict(text, middle, at_most))
    return verdicts


def _verdict(text: str, figure: float | None, at_most: float) -> dict[str, Any]:
    holds = None if figure is None else figure <= at_most
    return {"aim": text, "figure": figure, "holds": holds}


# -- measuring ---------------------------------------------------------------------------------


def command_of(
    who: str,
    servers: str,
    topic: str,
    responses: str,
    endpoint: str,
    window_secs: float,
    workers: int,
) -> list[str]:
    """A competitor's command line; it runs until SIGTERM. Its group is named as its topic."""
    if who == PIPELINE:
        return [
            *(sys.executable, "-m", "pipeline", "--runner=DirectRunner", "--summary=none"),
            f"--kafka_bootstrap_servers={servers}",
            f"--topics={topic}",
            f"--consumer_group={topic}",
            "--starting_position=TRIM_HORIZON",
            "--function=bench",
            f"--lambda_endpoint_url={endpoint}",
            "--aws_region=us-east-1",
            f"--batch_window_secs={window_secs:g}",
            f"--workers={workers}",
            f"--response_topic={responses}",
        ]
    return [
        *(sys.executable, "-m", "tests.bench.handwritten", "--each"),
        f"--bootstrap_servers={servers}",
        f"--topic={topic}",
        f"--response_topic={responses}",
        f"--group={topic}",
        f"--endpoint={endpoint}",
    ]


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A competitor; at the end it is told to end, and its exit code has to be 0.

    Raises:
        WrongResult: It ended with another one, or not at all.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | CREDENTIALS
        )

        def failed(what: object) -> WrongResult:
            output.seek(0)
            text = output.read().decode(errors="replace")
            return WrongResult(f"{' '.join(command)}\n{what}:\n{text}")

        try:
            try:
                yield process
            except WrongResult as error:
                raise failed(error) from None
            process.terminate()
            try:
                code = process.wait(_END_SECS)
            except subprocess.TimeoutExpired:
                raise failed(f"did not end in {_END_SECS:g} s") from None
            if code:
                raise failed(f"ended with {code}")
        finally:
            process.kill()
            process.wait()


class Bench:
    """A broker and what runs beside it.

    Args:
        topics: Those of the broker.
        secs: How long the load goes on that counts.
        warm_up_secs: How long it does before.
        appended: Whether a response's timestamp is the broker's.
        workers: Processes of the pipeline.
        watched: Whether the pipeline's page is open all the time.
    """

    def __init__(
        self,
        topics: Topics,
        secs: float,
        warm_up_secs: float,
        appended: bool,
        workers: int = 1,
        watched: bool = False,
    ) -> None:
        self._servers = topics.bootstrap_servers
        self._secs = secs
        self._warm_up_secs = warm_up_secs
        self._appended = appended
        self._workers = workers
        self._watched = watched
        self.topics = topics

    def measure(self, load: Load, who: str, url: str) -> Run:
        """Let a competitor run under a load; its figures after the results are checked.

        Raises:
            WrongResult: What is left is not what should be.
        """
        topic, responses = self._make_topics(load.partitions)
        command = self._command(who, topic, responses, url, load.window_secs)
        http = "127.0.0.1:{}".format(*free_ports(1)) if self._watched and who == PIPELINE else ""
        command += [f"--http={http}"] if http else []
        _reset(url)
        with running(command) as process, watching(http) if http else nullcontext():
            first = self._wait_for_first(process, topic, url)
            start_ms, shares, generated = self._generate(load, topic, process)
            behind = not self._wait_for_all(process, generated.records, load.rate, responses, url)
        stats = _stats(url)
        if not behind:
            self.topics.check_committed(topic, topic)
        written = {}
        for message in self.topics.read(topic):
            due = float(orjson.loads(message.value())["due"])
            written[message.partition(), message.offset()] = (due, _stamp_of(message))
        if len(written) != generated.records + first:
            raise WrongResult(f"{len(written)} records, not {generated.records} and {first}")
        answers = (
            (answered(topic, message), _stamp_of(message))
            for message in self.topics.read(responses)
        )
        begin_ms = start_ms + 1000 * self._warm_up_secs
        timed = match(written, answers, begin_ms, begin_ms + 1000 * self._secs)
        self._delete(topic, responses)
        per_call = stats.records / max(1, stats.calls)
        return figures(load, who, timed, shares, generated.cpu_percent, per_call, behind)

    def idle(self, partitions: int, who: str, url: str, secs: float) -> Idle:
        """What a competitor costs that has answered one record and gets no other."""
        topic, responses = self._make_topics(partitions)
        command = self._command(who, topic, responses, url, 0)
        _reset(url)
        with running(command) as process:
            self._wait_for_first(process, topic, url)
            time.sleep(self._warm_up_secs)
            begin, before = time.monotonic(), self._cpu_secs(process)
            time.sleep(secs)
            used, elapsed = self._cpu_secs(process) - before, time.monotonic() - begin
            _raise_if_ended(process)
        self._delete(topic, responses)
        return Idle(who, partitions, round(100 * used / elapsed, 2))

    def _command(
        self, who: str, topic: str, responses: str, url: str, window_secs: float
    ) -> list[str]:
        return command_of(who, self._servers, topic, responses, url, window_secs, self._workers)

    def _cpu_secs(self, process: subprocess.Popen[bytes]) -> float:
        """The processor's time so far of those who do the work."""
        return cpu_secs(process.pid)

    def _make_topics(self, partitions: int) -> tuple[str, str]:
        topic = f"bench-{uuid.uuid4().hex[:12]}"
        stamp = {"message.timestamp.type": "LogAppendTime" if self._appended else "CreateTime"}
        self.topics.create(topic, partitions, {"message.timestamp.type": "CreateTime"})
        self.topics.create(f"{topic}-out", _PARTITIONS, stamp)
        return topic, f"{topic}-out"

    def _delete(self, *names: str) -> None:
        for name in names:
            self.topics.delete(name)

    def _wait_for_first(self, process: subprocess.Popen[bytes], topic: str, url: str) -> int:
        """Write a record that does not count, and wait until the function had it; returns 1."""
        self.topics.write(topic, b"first", b'{"due":0}')
        deadline = time.monotonic() + _START_SECS
        while not _stats(url).records:
            _raise_if_ended(process)
            if time.monotonic() > deadline:
                raise WrongResult(f"not begun after {_START_SECS:g} s")
            time.sleep(0.05)
        return 1

    def _generate(
        self, load: Load, topic: str, process: subprocess.Popen[bytes]
    ) -> tuple[float, float, Generated]:
        """Let the generator write; when it began (ms), the competitor's share of a core in the
        seconds that count (percent), and what the generator says."""
        command = [
            *(sys.executable, "-m", "tests.bench.generator"),
            f"--bootstrap_servers={self._servers}",
            f"--topic={topic}",
            f"--partitions={load.partitions}",
            f"--rate={load.rate}",
            f"--secs={self._warm_up_secs + self._secs}",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as generator:
            try:
                assert generator.stdout is not None
                line = generator.stdout.readline()
                if not line:
                    raise WrongResult("the generator did not begin")
                start_ms = float(line)
                time.sleep(max(0.0, start_ms / 1000 + self._warm_up_secs - time.time()))
                begin, before = time.monotonic(), self._cpu_secs(process)
                time.sleep(self._secs)
                used, elapsed = self._cpu_secs(process) - before, time.monotonic() - begin
                _raise_if_ended(process)
                result = generator.stdout.readline()
            except BaseException:
                generator.kill()
                raise
        if generator.returncode:
            raise WrongResult(f"the generator ended with {generator.returncode}")
        return start_ms, 100 * used / elapsed, Generated(**json.loads(result))

    def _wait_for_all(
        self,
        process: subprocess.Popen[bytes],
        records: int,
        rate: float,
        responses: str,
        url: str,
    ) -> bool:
        """Wait until all is answered, and not longer than it is worth; whether all is."""
        if records + 1 - _stats(url).records > max(1.0, _BEHIND_SECS * rate):
            return False
        deadline = time.monotonic() + _DRAIN_SECS
        # Only then may it be told to end: that would hurry it.
        while _stats(url).records <= records or self.topics.count(responses) <= records:
            _raise_if_ended(process)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True


def _stamp_of(message: Message) -> float:
    """A record's timestamp, in ms: the middle of the millisecond that Kafka has."""
    return float(message.timestamp()[1]) + 0.5


def _raise_if_ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        raise WrongResult(f"ended by itself with {process.returncode}")


def _reset(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/reset", method="POST")).close()


def _stats(url: str) -> stub.Stats:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return stub.Stats(**json.load(reply))


def bench(servers: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do it all on the broker at `servers`; return what `--json` writes."""
    loads, idle_partitions = loads_of(options), idle_of(options)
    everybody = [who for who in COMPETITORS if chosen(who, list(COMPETITORS), options.only)]
    turns = [
        (load, [who for who in everybody if who == PIPELINE or _peer_of(load, loads) == load])
        for load in loads
    ]
    count = sum(turns_of(load, options.repeat) * len(whos) for load, whos in turns)
    secs = count * (_WARM_UP_SECS + options.secs + _AROUND_SECS)
    secs += len(idle_partitions) * len(everybody) * (_WARM_UP_SECS + _IDLE_SECS + _AROUND_SECS)
    print(f"{count} runs, about {math.ceil(secs / 60)} minutes", file=sys.stderr)
    topics = Topics(servers)
    measuring = Bench(
        topics, options.secs, _WARM_UP_SECS, options.appended, options.workers, options.watched
    )
    runs: list[Run] = []
    idle: list[Idle] = []
    with ExitStack() as stack:
        stack.callback(topics.delete_all)
        latencies = dict.fromkeys([0.0, *(load.latency_ms for load in loads)])
        urls = {each: stack.enter_context(serving(each, 1)) for each in latencies}
        # Untimed: fills the disk cache and writes the .pyc files, and fails early.
        warm_up = Bench(topics, 1, 1, options.appended, options.workers)
        for who in everybody:
            print(f"warming up: {who}", file=sys.stderr)
            warm_up.measure(Load(100, _PARTITIONS, 0, 0), who, urls[0.0])
        for load, whos in turns:
            for turn in range(turns_of(load, options.repeat)):
                for who in in_turn(whos, turn):
                    run = measuring.measure(load, who, urls[load.latency_ms])
                    runs.append(run)
                    said = _ms(run.p50) if run.follows else "cannot follow"
                    print(
                        f"{load}: {who}: p50 {said}, p99 {_ms(run.p99)}, {run.cpu_percent} %",
                        file=sys.stderr,
                    )
        for partitions in idle_partitions:
            for who in everybody:
                idle.append(measuring.idle(partitions, who, urls[0.0], _IDLE_SECS))
                print(f"idle, {partitions}: {who}: {idle[-1].cpu_percent} %", file=sys.stderr)
    rows = summarize(runs, loads)
    return {
        "secs": options.secs,
        "repeat": options.repeat,
        "appended": options.appended,
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "rows": rows,
        "idle": [asdict(each) for each in idle],
        "aims": judge(rows, idle),
        "runs": [asdict(run) for run in runs],
    }


# -- saying it ---------------------------------------------------------------------------------


def _ms(figure: float | None) -> str:
    if figure is None or math.isinf(figure):
        return "-"
    return f"{figure:,.1f}" if figure < 100 else f"{figure:,.0f}"


def report(result: dict[str, Any]) -> str:
    """A result as text."""
    titles = (
        *("records/s", "partitions", "function ms", "window s", "who", "p50 ms", "range", "p95"),
        *("p99", "max", "p50 of loop's", "CPU %", "CPU of loop's", "records/call", "late p50, p99"),
    )
    lines = []
    for row in result["rows"]:
        lost = row["cannot_follow"]
        names = ("p50", "p50_range", "p95", "p99", "max")
        p50, between, p95, p99, most = (row[name] for name in names)
        timed = [_ms(p50), "-".join(map(_ms, between)), _ms(p95), _ms(p99), _ms(most)]
        lines.append(
            (
                f"{row['rate']:,g}",
                str(row["partitions"]),
                f"{row['latency_ms']:g}",
                f"{row['window_secs']:g}",
                row["who"],
                *(["cannot follow", "", "", "", ""] if lost else timed),
                "" if row["p50_ratio"] is None else f"{row['p50_ratio']:.2f}",
                f"{row['cpu_percent']:.1f}",
                "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.2f}",
                f"{row['records_per_call']:.1f}",
                f"{_ms(row['late_p50'])}, {_ms(row['late_p99'])}",
            )
        )
    generator = max((row["generator_percent"] for row in result["rows"]), default=0.0)
    where = "the broker appended it" if result["appended"] else "its client was handed it"
    text = [
        table(titles, lines, names=5),
        f"\nms: from when a record was due to when {where}; medians over {result['repeat']} runs "
        f"of {result['secs']:g} s each, where a ratio is an aim over {_TIMES_COMPARED} times as "
        "many, of the maxima the largest.\nTimestamps are whole "
        "milliseconds; the middle of each is taken.\nLate: how much "
        f"later than due the records were written, in ticks of {1000 * TICK_SECS:g} ms; that is "
        "part of every latency.\nCPU: of one core, user and system, of the whole process tree, in "
        "the same seconds.\nThe generator, a process of its own, took "
        f"{generator:.1f} % of a core at most (the bound is 10).",
    ]
    if result["idle"]:
        text.append("\nWithout records:")
        for each in result["idle"]:
            share = f"{each['cpu_percent']:.2f} % of a core"
            text.append(f"  {each['partitions']:,} partitions: {each['who']}: {share}")
    text += [
        "\nFor the README:\n",
        markdown(result),
        "\nAims, with a function that answers at once:",
    ]
    for each in result["aims"]:
        figure = "" if each["figure"] is None else f" ({_figure(each['figure'])})"
        text.append(f"{verdict(each['holds'])}: {each['aim']}{figure}")
    if generator >= 10:
        text.append("MISSED: the generator below 10 % of a core: these figures are partly its own")
    return "\n".join(text)


def _figure(figure: float) -> str:
    return "cannot follow" if math.isinf(figure) else f"{figure:.4g}"


def markdown(result: dict[str, Any]) -> str:
    """The table that a README has: a line for each load, without what is for judging a run."""
    titles = ("load", "pipeline: p50 / p95 / p99", "CPU", "loop by hand: p50 / p95 / p99", "CPU")
    by_load: dict[Load, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        load = Load(*(row[name] for name in Load._fields))
        by_load.setdefault(load, {})[row["who"]] = row
    lines = []
    for load, own in by_load.items():
        cells = []
        for who in COMPETITORS:
            if who not in own:
                cells += ["", ""]
                continue
            row = own[who]
            ms = " / ".join(f"{row[name]:,.0f}" for name in ("p50", "p95", "p99"))
            cells += [
                "cannot follow" if row["cannot_follow"] else f"{ms} ms",
                f"{row['cpu_percent']:.0f} %",
            ]
        words = [f"{load.rate:,g}/s"]
        words += [f"{load.partitions} partitions"] if load.partitions != _PARTITIONS else []
        words += [f"function {load.latency_ms:g} ms"] if load.latency_ms else []
        words += [f"window {load.window_secs:g} s"] if load.window_secs else []
        lines.append((", ".join(words), *cells))
    return table(titles, lines, names=1)


def _finite(value: Any) -> Any:
    """A result as JSON can say it: what is infinite is null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


def main(arguments: list[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench --latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"type": _numbers, "metavar": "N,N"}
    parser.add_argument(
        "--quick", action="store_true", help="only what the aims are about: function instant"
    )
    parser.add_argument("--rates", **several, help="records per second; 10,100,1000,5000")
    parser.add_argument(
        "--partitions", **several, help="of the topic; 4, and besides 100 records/s over 200"
    )
    parser.add_argument("--latency_ms", **several, help="the function's; 0,20")
    parser.add_argument("--window", **several, help="--batch_window_secs; 0,0.5")
    parser.add_argument(
        "--idle",
        **several,
        help="partitions of runs without records; 4,1000, none with --rates or --partitions",
    )
    parser.add_argument("--secs", type=float, default=10, help="seconds that count, of each run")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians are shown")
    parser.add_argument("--workers", type=int, default=1, help="processes of the pipeline")
    parser.add_argument("--watched", action="store_true", help="the pipeline's page is open")
    parser.add_argument("--appended", action="store_true", help="until the broker has the response")
    parser.add_argument("--only", action="append", choices=COMPETITORS, help="one competitor")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--bootstrap_servers", help="a running broker, instead of starting one")
    options = parser.parse_args(arguments)
    try:
        with on_broker(options) as servers:
            result = bench(servers, options)
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        return 1
    print(report(result))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(_finite(result), file, indent=2)
            file.write("\n")
    return 0
