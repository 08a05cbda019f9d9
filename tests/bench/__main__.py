"""The benchmark: the pipeline beside the same job written by hand, on this machine's broker.

``python -m tests.bench [--records 400000] [--partitions 4] [--record_bytes 200] [--repeat 1]``
With ``--runner=flink``: `tests.bench.flink`. With ``--latency``: `tests.bench.latency`.
With ``--soak``: `tests.bench.soak`. With ``--streams``: `tests.bench.streams`.

The client, the broker and the stub share the machine's processors: on two of them, with other work
beside it, six runs of the same code gave 37,000 to 61,000 records/s. For figures to quote use
``--repeat 3`` or more, and look at the range beside the median; CPU per record varies least.

Every run is a fresh process, timed from its start to its exit, with a fresh response topic and
consumer group; the competitors take turns, and a scenario with those that are multiples of it.
After each run every response is read and checked. A wrong result ends the benchmark with exit code
1; a missed aim is only reported: a figure is the machine's as much as the program's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.local.processes import free_ports
from tests.bench import stub
from tests.bench.common import (
    CREDENTIALS,
    HAND_WRITTEN,
    HAND_WRITTEN_ORJSON,
    PIPELINE,
    chosen,
    in_turn,
    on_broker,
    serving,
    table,
    verdict,
)
from tests.bench.topics import Topics, WrongResult
from tests.bench.watch import watching
from transforms.lanes import Lanes

WARM_UP_RECORDS = 2000


@dataclass(frozen=True)
class Scenario:
    """What the competitors are given to do.

    Attributes:
        name: What it is called in the tables and for `--only`.
        batch_size: Records per call.
        latency_ms: The function's.
        lanes: Invocations at once inside a partition.
        workers: Processes of the pipeline.
        mapping: Whether the function is one of an event source mapping: it gets that one's event
            and says which records it failed in; there are no responses.
        delivery: What is promised of responses.
        watched: Whether its page is open all the time, and its metrics are read each second.
        beside: Name of the scenario that this one is a multiple of, the same with one lane, at
            least once or unseen.
        times: How many times the records; a faster run has to last as long to be measured.
    """

    name: str
    batch_size: int
    latency_ms: float = 0.0
    lanes: int = 1
    workers: int = 1
    mapping: bool = False
    delivery: str = "at_least_once"
    watched: bool = False
    beside: str | None = None
    times: int = 1

    @property
    def alone(self) -> bool:
        """Whether the loop by hand has no such thing, so that the pipeline is by itself."""
        return self.lanes > 1 or self.workers > 1 or self.mapping or bool(self.beside)


@dataclass(frozen=True)
class Source:
    """A filled topic."""

    topic: str
    partitions: int
    records: int


@dataclass(frozen=True)
class Job:
    """One run: everything a command line is made of."""

    bootstrap_servers: str
    topic: str
    response_topic: str
    group: str
    endpoint: str
    scenario: Scenario
    http: str = ""


@dataclass(frozen=True)
class Aim:
    """A bound on one figure of the pipeline; `scenario` None means its worst over all of them."""

    text: str
    scenario: str | None
    figure: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass
class Run:
    """The figures of one run.

    Attributes:
        secs: From the start of the process to its exit.
        calling_secs: From the first call the stub got to its last reply: without start-up and end.
        peak_mb: The largest resident set, in MB (10^6 bytes), of the process or a child of it.
        cpu_secs: User and system time of the process and its children.
        calls: Invocations.
        request_bytes: The bytes of their payloads.
    """

    scenario: str
    who: str
    records: int
    secs: float
    calling_secs: float
    peak_mb: float
    cpu_secs: float
    calls: int
    request_bytes: int


SCENARIOS = (
    Scenario("batch 1000", 1000, times=3),
    Scenario(
        "batch 1000, exactly once", 1000, delivery="exactly_once", beside="batch 1000", times=3
    ),
    Scenario("batch 100", 100, times=3),
    Scenario("batch 100, page open", 100, watched=True, beside="batch 100", times=3),
    Scenario("batch 100, 20 ms", 100, latency_ms=20),
    Scenario("batch 100, 20 ms, 10 lanes", 100, 20, lanes=10, beside="batch 100, 20 ms", times=3),
    Scenario(
        "batch 100, 20 ms, 10 lanes, 2 workers",
        100,
        20,
        lanes=10,
        workers=2,
        beside="batch 100, 20 ms",
        times=3,
    ),
    Scenario("mapping, batch 100, 20 ms, 2 workers", 100, 20, workers=2, mapping=True),
    Scenario(
        "mapping, batch 100, 20 ms, 2 workers, 10 lanes",
        100,
        20,
        lanes=10,
        workers=2,
        mapping=True,
        beside="mapping, batch 100, 20 ms, 2 workers",
        times=3,
    ),
)

AIMS = (
    Aim("batch 1000: >= 1.3 x the loop with orjson", "batch 1000", "orjson_ratio", at_least=1.3),
    Aim(
        "batch 1000, while calling: exactly once >= 0.85 x at least once",
        "batch 1000, exactly once",
        "of_one_lane",
        at_least=0.85,
    ),
    Aim("batch 100: >= 1.5 x the loop with orjson", "batch 100", "orjson_ratio", at_least=1.5),
    Aim(
        "batch 100, while calling: page open >= 0.98 x unseen",
        "batch 100, page open",
        "of_one_lane",
        at_least=0.98,
    ),
    Aim(
        "batch 100, 20 ms: >= 85 % of what strict order allows",
        "batch 100, 20 ms",
        "percent_of_limit",
        at_least=85,
    ),
    Aim(
        "batch 100, 20 ms, while calling: >= 97 % of what the stub and strict order allow",
        "batch 100, 20 ms",
        "calling_percent_of_stub",
        at_least=97,
    ),
    Aim(
        "batch 100, 20 ms, while calling: 10 lanes and 2 workers >= 5.5 x 1 lane and 1 worker",
        "batch 100, 20 ms, 10 lanes, 2 workers",
        "of_one_lane",
        at_least=5.5,
    ),
    Aim(
        "mapping, batch 100, 20 ms, 2 workers, while calling: 10 lanes >= 5 x 1 lane",
        "mapping, batch 100, 20 ms, 2 workers, 10 lanes",
        "of_one_lane",
        at_least=5,
    ),
    Aim("peak < 500 MB in every scenario", None, "peak_mb", at_most=500),
)


def pipeline_command(job: Job) -> list[str]:
    """The pipeline on the DirectRunner, over what is in the topic now."""
    scenario = job.scenario
    form = (
        ["--envelope=kafka_event", "--reply=batch_item_failures"]
        if scenario.mapping
        else [f"--response_topic={job.response_topic}"]
    )
    return [
        *(sys.executable, "-m", "pipeline", "--runner=DirectRunner", "--until=caught_up"),
        f"--kafka_bootstrap_servers={job.bootstrap_servers}",
        f"--topics={job.topic}",
        f"--consumer_group={job.group}",
        "--starting_position=TRIM_HORIZON",
        "--function=bench",
        f"--lambda_endpoint_url={job.endpoint}",
        "--aws_region=us-east-1",
        f"--batch_size={scenario.batch_size}",
        f"--parallelization_factor={scenario.lanes}",
        f"--workers={scenario.workers}",
        f"--delivery={scenario.delivery}",
        *form,
        *([f"--http={job.http}"] if job.http else []),
        "--summary=json",
    ]


def handwritten_command(job: Job) -> list[str]:
    """The hand-written loop."""
    return [
        *(sys.executable, "-m", "tests.bench.handwritten"),
        f"--bootstrap_servers={job.bootstrap_servers}",
        f"--topic={job.topic}",
        f"--response_topic={job.response_topic}",
        f"--group={job.group}",
        f"--endpoint={job.endpoint}",
        f"--batch_size={job.scenario.batch_size}",
    ]


COMPETITORS: dict[str, Callable[[Job], list[str]]] = {
    PIPELINE: pipeline_command,
    HAND_WRITTEN: handwritten_command,
    HAND_WRITTEN_ORJSON: lambda job: [*handwritten_command(job), "--orjson"],
}


def execute(command: list[str]) -> tuple[float, resource.struct_rusage]:
    """Run a command to its end; return its seconds and its own resource usage."""
    with tempfile.TemporaryFile() as output:
        begin = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | CREDENTIALS
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait()
        secs = time.monotonic() - begin
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise WrongResult(f"{' '.join(command)}\nended with {process.returncode}:\n{text}")
    return secs, usage


def measure(topics: Topics, source: Source, scenario: Scenario, who: str, url: str) -> Run:
    """Let one competitor do one scenario; return its figures after the results are checked."""
    fresh = f"bench-{uuid.uuid4().hex[:12]}"
    responses = f"{fresh}-out"
    http = "127.0.0.1:{}".format(*free_ports(1)) if scenario.watched else ""
    job = Job(topics.bootstrap_servers, source.topic, responses, fresh, url, scenario, http)
    topics.create(responses, source.partitions)
    urllib.request.urlopen(urllib.request.Request(f"{url}/reset", method="POST")).close()
    with watching(http) if http else nullcontext():
        secs, usage = execute(COMPETITORS[who](job))
    with urllib.request.urlopen(f"{url}/stats") as reply:
        stats = stub.Stats(**json.load(reply))
    if not scenario.mapping:
        topics.check(source.topic, responses, Lanes(scenario.lanes, scenario.batch_size))
    if stats.records != source.records:
        raise WrongResult(f"the function got {stats.records} records of {source.records}")
    topics.check_committed(source.topic, job.group)
    topics.delete(responses)
    return Run(
        scenario=scenario.name,
        who=who,
        records=source.records,
        secs=round(secs, 3),
        calling_secs=round(stats.last - stats.first, 3),
        peak_mb=round(usage.ru_maxrss * 1024 / 1e6, 1),
        cpu_secs=round(usage.ru_utime + usage.ru_stime, 3),
        calls=stats.calls,
        request_bytes=stats.request_bytes,
    )


def summarize(
    runs: list[Run], scenarios: list[Scenario], partitions: int, call_ms: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per scenario and competitor: the medians over its runs, and the peak's maximum.

    Args:
        runs: What was measured.
        scenarios: In the order of the rows.
        partitions: Of the topic.
        call_ms: By scenario, how long a call takes for a client that only counts bytes.
    """
    rows: list[dict[str, Any]] = []
    for scenario in scenarios:
        limit = stub_limit = None
        if scenario.latency_ms:
            at_once = partitions * scenario.lanes * scenario.batch_size
            limit = at_once / (scenario.latency_ms / 1000)
            stub_limit = at_once / (call_ms[scenario.name] / 1000)
        by_who: dict[str, list[Run]] = {}
        for run in runs:
            if run.scenario == scenario.name:
                by_who.setdefault(run.who, []).append(run)
        rates = {
            who: statistics.median(run.records / run.secs for run in own)
            for who, own in by_who.items()
        }
        peer, faster_peer = rates.get(HAND_WRITTEN), rates.get(HAND_WRITTEN_ORJSON)
        one_lane = [
            run.records / run.calling_secs
            for run in runs
            if (run.scenario, run.who) == (scenario.beside, PIPELINE)
        ]
        for who in filter(rates.__contains__, COMPETITORS):
            own, rate = by_who[who], rates[who]
            calling = statistics.median(run.records / run.calling_secs for run in own)
            rows.append(
                {
                    "scenario": scenario.name,
                    "who": who,
                    "records_per_sec": round(rate),
                    "records_per_sec_range": [
                        round(find(run.records / run.secs for run in own)) for find in (min, max)
                    ],
                    "calling_records_per_sec": round(calling),
                    "ratio": round(rate / peer, 3) if peer else None,
                    "orjson_ratio": round(rate / faster_peer, 3) if faster_peer else None,
                    "of_one_lane": (
                        round(calling / statistics.median(one_lane), 2) if one_lane else None
                    ),
                    "percent_of_limit": round(100 * rate / limit, 1) if limit else None,
                    "calling_percent_of_limit": round(100 * calling / limit, 1) if limit else None,
                    "calling_percent_of_stub": (
                        round(100 * calling / stub_limit, 1) if stub_limit else None
                    ),
                    "peak_mb": max(run.peak_mb for run in own),
                    "cpu_us_per_record": round(
                        statistics.median(run.cpu_secs / run.records for run in own) * 1e6, 2
                    ),
                    "records_per_call": round(own[0].records / own[0].calls, 1),
                    "request_bytes_per_record": round(own[0].request_bytes / own[0].records),
                }
            )
    return rows


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each aim the pipeline's figure and whether it holds; None where it was not measured."""
    verdicts = []
    for aim in AIMS:
        figures = [
            row[aim.figure]
            for row in rows
            if row["who"] == PIPELINE
            and aim.scenario in (None, row["scenario"])
            and row[aim.figure] is not None
        ]
        if len(figures) < (len(SCENARIOS) if aim.scenario is None else 1):
            figures = []
        figure = max(figures, default=None) if aim.at_least is None else min(figures, default=None)
        holds = None
        if figure is not None:
            holds = figure >= aim.at_least if aim.at_least is not None else figure < aim.at_most
        verdicts.append({"aim": aim.text, "figure": figure, "holds": holds})
    return verdicts


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    titles = (
        *("scenario", "who", "records/s", "range", "of hand-written", "of orjson"),
        *("of the one beside", "while calling", "% of limit", "peak MB", "CPU us/record"),
    )
    lines = []
    for row in rows:
        percent = row["percent_of_limit"]
        lines.append(
            (
                row["scenario"],
                row["who"],
                f"{row['records_per_sec']:,}",
                "{:,}-{:,}".format(*row["records_per_sec_range"]),
                "" if row["ratio"] is None else f"{row['ratio']:.2f}",
                "" if row["orjson_ratio"] is None else f"{row['orjson_ratio']:.2f}",
                "" if row["of_one_lane"] is None else f"{row['of_one_lane']:.2f}",
                f"{row['calling_records_per_sec']:,}",
                ""
                if percent is None
                else (
                    f"{percent} ({row['calling_percent_of_limit']}, "
                    f"{row['calling_percent_of_stub']})"
                ),
                f"{row['peak_mb']:.0f}",
                f"{row['cpu_us_per_record']:.1f}",
            )
        )
    print(table(titles, lines))


def families(scenarios: list[Scenario]) -> list[list[Scenario]]:
    """Each scenario with those that are multiples of it: they take turns, since a machine is not
    always as fast."""
    by_name: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        by_name.setdefault(scenario.beside or scenario.name, []).append(scenario)
    return list(by_name.values())


def bench(servers: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do it all on the broker at `servers`; return what `--json` writes."""
    scenarios = [s for s in SCENARIOS if chosen(s.name, [x.name for x in SCENARIOS], options.only)]
    competitors = [who for who in COMPETITORS if chosen(who, list(COMPETITORS), options.only)]
    all_times = sorted({scenario.times for scenario in scenarios})
    topics = Topics(servers)
    runs: list[Run] = []
    stubs: dict[str, list[dict[str, float]]] = {scenario.name: [] for scenario in scenarios}
    partitions = options.partitions
    try:
        small, *sources = (
            Source(f"bench-{uuid.uuid4().hex[:12]}", partitions, records)
            for records in (WARM_UP_RECORDS, *(options.records * times for times in all_times))
        )
        source_of = dict(zip(all_times, sources))
        for each in (small, *sources):
            topics.create(each.topic, partitions)
            topics.fill(each.topic, partitions, each.records, options.record_bytes)
        # Untimed: fills the disk cache and writes the .pyc files, and fails early.
        for who in competitors:
            print(f"warming up: {who}", file=sys.stderr)
            with serving(0) as url:
                measure(topics, small, scenarios[0], who, url)
        for group in families(scenarios):
            for turn in range(options.repeat):
                for scenario in group:
                    with serving(scenario.latency_ms, scenario.batch_size) as url:
                        stubs[scenario.name].append(stub.measure(url, scenario.batch_size))
                        for who in in_turn(competitors, turn):
                            if scenario.alone and who != PIPELINE:
                                continue
                            run = measure(topics, source_of[scenario.times], scenario, who, url)
                            runs.append(run)
                            print(
                                f"{scenario.name}: {who}: {run.records / run.secs:,.0f} records/s",
                                file=sys.stderr,
                            )
    finally:
        topics.delete_all()
    ceilings = {
        name: {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        for name, measured in stubs.items()
    }
    call_ms = {name: ceiling["call_ms"] for name, ceiling in ceilings.items()}
    rows = summarize(runs, scenarios, partitions, call_ms)
    return {
        "records": options.records,
        "partitions": partitions,
        "record_bytes": options.record_bytes,
        "repeat": options.repeat,
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        # No process started from here can be shown with a smaller peak than this one's.
        "least_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        "rows": rows,
        "aims": judge(rows),
        "stub": [{"scenario": name, **ceiling} for name, ceiling in ceilings.items()],
        "runs": [asdict(run) for run in runs],
    }


def report(result: dict[str, Any]) -> None:
    """Print a result."""
    show(result["rows"])
    print(
        "\nrecords/s: from the start of the process to its exit. While calling: from its first call"
        " to the last reply; so are the multiples of 1 lane.\n% of limit: of partitions x batch /"
        " latency; in brackets the same while calling, and beside what a client that only counts"
        " bytes makes.\nPeak: of the largest process; this "
        f"benchmark's own {result['least_peak_mb']:.0f} MB are the least it can show."
    )
    print("\nThe stub alone, with a client that only counts bytes:")
    for ceiling in result["stub"]:
        print(
            f"  {ceiling['scenario']}: {ceiling['records_per_sec']:,.0f} records/s, "
            f"{ceiling['call_ms']:.3f} ms a call"
        )
    print()
    for each in result["aims"]:
        figure = "" if each["figure"] is None else f" ({each['figure']:g})"
        print(f"{verdict(each['holds'])}: {each['aim']}{figure}")


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--runner",
        choices=("direct", "flink"),
        default="direct",
        help="flink: both readers on a Flink cluster, beside the DirectRunner",
    )
    parser.add_argument(
        "--records", type=int, help="records in the topic; 400000, and 1000000 for flink"
    )
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--record_bytes", type=int, default=200, help="bytes of a record's value")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument(
        "--only",
        action="append",
        choices=[
            *(scenario.name for scenario in SCENARIOS),
            *COMPETITORS,
            *("DirectRunner", "Flink, native reader", "Flink, Beam's reader"),
        ],
        help="a scenario or a competitor; may be given more than once",
    )
    parser.add_argument(
        "--batch", type=int, action="append", help="flink: records per call; 1000, then 100"
    )
    parser.add_argument(
        "--flink_option",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="flink: given to the pipeline there; may be given more than once",
    )
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--bootstrap_servers", help="a running broker, instead of starting one")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="how soon a record is answered; the other options then are those of --latency --help",
    )
    parser.add_argument(
        "--soak",
        action="store_true",
        help="minutes of everything at once; the other options then are those of --soak --help",
    )
    parser.add_argument(
        "--streams",
        action="store_true",
        help="a stream beside a topic; the other options then are those of --streams --help",
    )
    # Ends by an exception, so that the processes and topics made here are cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if "--latency" in sys.argv[1:]:
        from tests.bench import latency

        return latency.main([word for word in sys.argv[1:] if word != "--latency"])
    if "--soak" in sys.argv[1:]:
        from tests.bench import soak

        return soak.main([word for word in sys.argv[1:] if word != "--soak"])
    if "--streams" in sys.argv[1:]:
        from tests.bench import streams

        return streams.main([word for word in sys.argv[1:] if word != "--streams"])
    options = parser.parse_args()
    if options.runner == "flink":
        from tests.bench import flink

        options.records = options.records or 1_000_000
        return flink.bench(options)
    options.records = options.records or 400_000
    try:
        with on_broker(options) as servers:
            result = bench(servers, options)
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        return 1
    report(result)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
