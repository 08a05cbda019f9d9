"""A Kinesis stream beside a topic: what the pipeline spends on a record of either, and whether it
keeps the limits of the API.

``./run.sh bench --streams [--secs 20] [--shards 8] [--rate 1000] [--repeat 1]``

Each shard, or partition, gets so many records in a second, and the function is called with 100 of
them. The Kinesis is ours, in a process of its own that holds all to AWS's limits: five reads and
2 MiB of each shard in a second, 1,000 records and 1 MiB into it. It counts what it refuses. The
peer is the same pipeline with botocore to make the calls and to read the answers.

The seconds that count begin once all that was there has been answered; a competitor's time is that
of its whole process tree in them.
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.local.kinesis import LocalKinesis, partition_keys
from pipeline.local.processes import wait_until
from tests.bench.common import chosen, cpu_secs, on_broker, serving, table, verdict
from tests.bench.latency import running
from tests.bench.topics import Topics, WrongResult

STREAM, BATCH = "bench", 100
_TICK_SECS = 0.05
_WARM_UP_SECS = 5.0

KAFKA, KINESIS, SUBSCRIBED, BOTOCORE = "Kafka", "Kinesis", "Kinesis, fan-out", "Kinesis, botocore"
COMPETITORS = (KAFKA, KINESIS, SUBSCRIBED, BOTOCORE)
AT_MOST = 1.5


@dataclass(frozen=True)
class Run:
    """What one competitor did in the seconds that count.

    Attributes:
        who: Of `COMPETITORS`.
        records: How many were answered.
        calls: How many invocations that took.
        cpu_micros: Processor's time for each.
        reads: Calls of the API that the server got, all run.
        refused: Those that it refused, all run, by their limit.
    """

    who: str
    records: int
    calls: int
    cpu_micros: float
    reads: int = 0
    refused: dict[str, int] | None = None


# -- the server, a process of its own ----------------------------------------------------------


def serve(options: argparse.Namespace) -> None:
    """Serve, write as fast as is asked for, and say what was refused when standard input ends."""
    with LocalKinesis() as kinesis:
        kinesis.create_stream(STREAM, options.shards)
        kinesis.register_consumer(STREAM, "fast")
        print(kinesis.url, flush=True)
        keys = [partition_keys(options.shards, shard, 20) for shard in range(options.shards)]
        value = b"x" * options.record_bytes
        begin = time.monotonic()
        written = [0] * options.shards
        while not select.select([sys.stdin], [], [], _TICK_SECS)[0]:
            # A little less than a shard takes, so that its limit does not depend on the clock.
            due = int((time.monotonic() - begin) * options.rate * 0.99)
            for shard, own in enumerate(keys):
                while written[shard] < due:
                    some = range(written[shard], min(due, written[shard] + 50))
                    placed = kinesis.put_within_limits(STREAM, [(own[n % 20], value) for n in some])
                    written[shard] += len(placed) - placed.count(None)
                    if None in placed:
                        break
        reads = ("GetRecords", "SubscribeToShard", "GetShardIterator", "ListShards")
        calls = {name: kinesis.calls[name] for name in reads}
        print(json.dumps({"calls": calls, "refused": dict(kinesis.refused)}), flush=True)


@contextmanager
def _kinesis(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    command = [
        *(sys.executable, "-m", "tests.bench.streams", "--serve"),
        f"--shards={options.shards}",
        f"--rate={options.rate}",
        f"--record_bytes={options.record_bytes}",
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def end() -> Any:
            stdin.close()
            return json.loads(stdout.readline())

        try:
            yield stdout.readline().strip(), end
        finally:
            process.terminate()


# -- the competitors ---------------------------------------------------------------------------


def by_botocore(arguments: list[str]) -> int:
    """The pipeline, with botocore in place of what makes calls of Kinesis and reads the answers."""
    import botocore.exceptions as aws_errors

    from pipeline.cli import main as run_pipeline
    from transforms.aws.answers import Fault
    from transforms.kinesis import client, fetch

    def call(
        self: Any, operation: str, arguments: dict[str, Any], named: bool = True
    ) -> dict[str, Any]:
        if named and (operation != "GetRecords" or self._by_arn):
            arguments = self.named | arguments
        method = "".join("_" + c.lower() if c.isupper() else c for c in operation).lstrip("_")
        try:
            return dict(getattr(self._client, method)(**arguments))
        except aws_errors.ClientError as error:
            found = error.response["Error"]
            raise client.Refused(Fault(400, found["Code"], found["Message"])) from None

    def read(listed: Any) -> list[fetch.Message]:
        return [
            fetch.Message(
                int(each["SequenceNumber"]) << fetch.SUB_BITS,
                each["PartitionKey"].encode(),
                each["Data"],
                round(each["ApproximateArrivalTimestamp"].timestamp() * 1000),
            )
            for each in listed
        ]

    summary = client.StreamApi.summary

    def plain(self: Any) -> dict[str, Any]:
        found = summary(self)
        return found | {"StreamCreationTimestamp": found["StreamCreationTimestamp"].timestamp()}

    client.StreamApi.call = call  # type: ignore[method-assign]
    client.StreamApi.summary = plain  # type: ignore[method-assign]
    fetch.read_messages = read
    return run_pipeline(arguments)


def _command(who: str, more: list[str]) -> list[str]:
    runs = ["tests.bench.streams", "--by_botocore"] if who == BOTOCORE else ["pipeline"]
    return [
        *(sys.executable, "-m", *runs, "--runner=DirectRunner", "--summary=none"),
        "--function=bench",
        "--aws_region=us-east-1",
        f"--batch_size={BATCH}",
        "--reply=batch_item_failures",
        *more,
    ]


def measure(who: str, servers: str, options: argparse.Namespace) -> Run:
    """Let one competitor run; its figures."""
    fresh = f"bench-{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        url = stack.enter_context(serving(0.0))
        more = [f"--lambda_endpoint_url={url}", "--starting_position=TRIM_HORIZON"]
        if who == KAFKA:
            topics = Topics(servers)
            topics.create(fresh, options.shards)
            stack.callback(topics.delete_all)
            secs = options.secs + 60
            generator = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.bench.generator"),
                    f"--bootstrap_servers={servers}",
                    f"--topic={fresh}",
                    f"--partitions={options.shards}",
                    f"--rate={options.rate * options.shards * 0.99}",
                    f"--secs={secs}",
                    f"--record_bytes={options.record_bytes}",
                ],
                stdout=subprocess.DEVNULL,
            )
            stack.callback(generator.wait)
            stack.callback(generator.kill)
            more += [f"--kafka_bootstrap_servers={servers}", f"--topics={fresh}"]
            more += [f"--consumer_group={fresh}", "--envelope=kafka_event"]
            more += ["--commit_interval_secs=1"]
        else:
            address, end = stack.enter_context(_kinesis(options))
            more += [f"--kinesis_endpoint_url={address}", f"--dynamodb_endpoint_url={address}"]
            more += [f"--stream={STREAM}", f"--lease_table={fresh}", "--envelope=kinesis_event"]
            if who == SUBSCRIBED:
                more += ["--consumer_name=fast"]
        with running(_command(who, more)) as process:
            wait_until(lambda: _stats(url)["calls"] > 0, f"{who} does not begin", 180)
            time.sleep(_WARM_UP_SECS)
            begin, spent = _stats(url), cpu_secs(process.pid)
            time.sleep(options.secs)
            spent = cpu_secs(process.pid) - spent
            stats = _stats(url)
        records = stats["records"] - begin["records"]
        calls = stats["calls"] - begin["calls"]
        if records < 0.5 * options.rate * options.shards * options.secs:
            raise WrongResult(f"{who} cannot follow: {records} records")
        told = end() if who != KAFKA else {"calls": {}, "refused": {}}
    micros = round(spent / records * 1e6, 2)
    return Run(who, records, calls, micros, sum(told["calls"].values()), told["refused"])


def _stats(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/stats") as reply:
        return json.load(reply)


# -- the report --------------------------------------------------------------------------------


def report(runs: list[Run]) -> dict[str, Any]:
    """Print what was measured; the same for machines."""
    rows = []
    middle: dict[str, float] = {}
    for who in COMPETITORS:
        found = [run for run in runs if run.who == who]
        if not found:
            continue
        middle[who] = statistics.median(run.cpu_micros for run in found)
        refused: dict[str, int] = {}
        for run in found:
            for name, count in (run.refused or {}).items():
                refused[name] = refused.get(name, 0) + count
        rows.append(
            {
                "who": who,
                "cpu_micros": middle[who],
                "of_kafka": round(middle[who] / middle[KAFKA], 2) if KAFKA in middle else None,
                "records_per_call": round(
                    statistics.median(run.records / max(1, run.calls) for run in found), 1
                ),
                "reads": sum(run.reads for run in found),
                "refused": refused,
                "runs": len(found),
            }
        )
    titles = ["who", "CPU us/record", "of Kafka's", "records/call", "reads", "refused", "runs"]
    lines = [
        [
            row["who"],
            f"{row['cpu_micros']:g}",
            "" if row["of_kafka"] is None else f"{row['of_kafka']:g}",
            f"{row['records_per_call']:g}",
            str(row["reads"]),
            " ".join(f"{name} {count}" for name, count in row["refused"].items()) or "0",
            str(row["runs"]),
        ]
        for row in rows
    ]
    print(table(titles, lines, names=1))
    own = next((row for row in rows if row["who"] == KINESIS), None)
    ratio = own["of_kafka"] if own else None
    # Whoever writes too fast after a pause has nothing to do with who reads.
    reads = own and {name: count for name, count in own["refused"].items() if name != "PutRecords"}
    share = own and sum((reads or {}).values()) / max(1, own["reads"])
    aims = [
        (f"CPU per record <= {AT_MOST:g} x Kafka's", ratio, AT_MOST),
        ("refused <= 0.1 % of the reads", share, 0.001),
    ]
    print()
    for text, figure, at_most in aims:
        holds = None if figure is None else figure <= at_most
        print(f"{verdict(holds)}: {text}" + ("" if figure is None else f" ({figure:g})"))
    return {"rows": rows}


def main(arguments: list[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench --streams", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--secs", type=float, default=20, help="seconds that count")
    parser.add_argument("--shards", type=int, default=8, help="shards, and partitions")
    parser.add_argument("--rate", type=float, default=1000, help="records/s of each")
    parser.add_argument("--record_bytes", type=int, default=200, help="bytes of a record's value")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument("--only", action="append", choices=COMPETITORS, help="may be given again")
    parser.add_argument("--json", help="write the result to this file too")
    parser.add_argument("--bootstrap_servers", help="a running broker, instead of starting one")
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options)
        return 0
    runs = []
    competitors = [who for who in COMPETITORS if chosen(who, list(COMPETITORS), options.only)]
    try:
        with ExitStack() as stack:
            servers = ""
            if KAFKA in competitors:
                servers = stack.enter_context(on_broker(options))
            for _ in range(options.repeat):
                for who in competitors:
                    run = measure(who, servers, options)
                    print(f"{run.who}: {run.cpu_micros:g} us/record", file=sys.stderr)
                    runs.append(run)
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        return 1
    result = report(runs)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    return 0


if __name__ == "__main__":
    if "--by_botocore" in sys.argv:
        sys.exit(by_botocore([word for word in sys.argv[1:] if word != "--by_botocore"]))
    sys.exit(main(sys.argv[1:]))
