"""The demo: the whole pipeline on this machine, without AWS and without Kafka.

Starts a Kafka broker in this process and a local Lambda endpoint with `demo_function.py`, writes
orders, one of them broken, runs the pipeline on them as its command line would, and shows what
came out. With the runner `flink` the broker is a real one, and the pipeline runs on a Flink session
cluster, all as processes of their own. With the source `kinesis` the orders are in a stream of a
Kinesis in this process, whose shards split while it is read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from pipeline.local.kafka import LocalKafka, NewRecord
from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import FunctionSpec, LambdaServer

MAX_RECORDS = 50_000
"""More would not stay in `LocalKafka`, which keeps 5 MiB per partition."""

RUNNERS = ("direct", "flink")

FUNCTION = "settle-orders"
ORDERS, RESULTS, ERRORS = "orders", "orders-results", "orders-errors"

_INTERRUPTED = 130
_MORE_SECS = 0.5
_SHOWN_RESPONSES = 3
_SHARDS_MOST = 8
_PARTITIONS = 4  # of a topic in LocalKafka; each has at most one invocation running
_ITEMS = ("notebook", "desk lamp", "backpack", "water bottle", "headphones", "umbrella", "mug")


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the demo runs on.

    Attributes:
        kafka: The broker.
        arguments: What the pipeline is told of its runner and of where it reads.
        said: The same for people.
        kinesis: Where the orders are; None if they are in a topic.
    """

    kafka: LocalKafka | KafkaBroker
    arguments: tuple[str, ...]
    said: str
    kinesis: LocalKinesis | None = None

    @property
    def what(self) -> str:
        """Where the orders are, for people."""
        return "Stream" if self.kinesis else "Topic"

    def send(self, records: Iterable[NewRecord]) -> None:
        """Send orders to where the pipeline reads."""
        if self.kinesis is None:
            self.produce(ORDERS, records)
            return
        pairs = [((record.key or b"").decode(), record.value or b"") for record in records]
        half = len(pairs) // 2
        self.kinesis.put(ORDERS, pairs[:half])
        if len(self.kinesis.open_shards(ORDERS)) < _SHARDS_MOST:
            self.kinesis.split(ORDERS, self.kinesis.open_shards(ORDERS)[0])
        self.kinesis.put(ORDERS, pairs[half:])

    def produce(self, topic: str, records: Iterable[NewRecord]) -> None:
        if isinstance(self.kafka, LocalKafka):
            self.kafka.produce(topic, records)
        else:
            # -1 lets the partitioner choose by the key.
            self.kafka.produce(topic, [(-1, record.key, record.value) for record in records])

    def read_all(self, topic: str) -> Sequence[Any]:
        """Records with key, value and headers, whichever broker has them."""
        return self.kafka.read_all(topic)


_FROM_TOPIC = (f"--topics={ORDERS}", "--consumer_group=demo")


@contextlib.contextmanager
def _stage(runner: str, source: str) -> Iterator[_Stage]:
    if source == "kinesis":
        with LocalKafka() as kafka, LocalKinesis() as kinesis:
            kinesis.create_stream(ORDERS, 2)
            arguments = (
                f"--stream={ORDERS}",
                "--lease_table=demo",
                f"--kinesis_endpoint_url={kinesis.url}",
                f"--dynamodb_endpoint_url={kinesis.url}",
                "--stream_poll_secs=0.2",
            )
            said = "Kinesis, Kafka and Lambda run inside this command."
            yield _Stage(kafka, arguments, said, kinesis)
        return
    if runner == "direct":
        with LocalKafka() as kafka:
            yield _Stage(kafka, _FROM_TOPIC, "Kafka and Lambda run inside this command.")
        return
    with KafkaBroker() as broker, FlinkCluster() as cluster:
        for topic in (ORDERS, RESULTS, ERRORS):
            broker.create_topic(topic, _PARTITIONS)
        yield _Stage(
            broker,
            ("--runner=FlinkRunner", *cluster.runner_options(), "--parallelism=2", *_FROM_TOPIC),
            f"Kafka and Flink (http://{cluster.address}) are processes of their own, Lambda runs "
            "inside this command.",
        )


def run_demo(
    records: int,
    summary: str,
    runner: str = "direct",
    http: str | None = None,
    source: str = "kafka",
) -> int:
    """Run it once.

    Args:
        records: Orders to send, from 1 to `MAX_RECORDS`; one of them is broken.
        summary: ``text`` shows everything on stdout; ``json`` has only the pipeline's summary
            there, one line, and the rest on stderr.
        runner: One of `RUNNERS`.
        http: Where to show the page; then it goes on with more orders until it is interrupted.
        source: Where the orders are, `kafka` or `kinesis`.

    Returns:
        The pipeline's exit code; 130 if interrupted before or after the pipeline.
    """
    if source == "kinesis" and runner != "direct":
        raise ValueError("--source=kinesis goes with --runner=direct only")
    out = sys.stderr if summary == "json" else sys.stdout
    spec = FunctionSpec(
        FUNCTION,
        f"{Path(__file__).with_name('demo_function.py')}:handler",
        timeout_secs=30,
        concurrency=_PARTITIONS,
    )
    try:
        with (
            LambdaServer([spec], record_calls=False) as server,
            _own_environment(),
            _stage(runner, source) as stage,
        ):
            return _run(stage, server.url, records, summary, out, http)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _run(
    stage: _Stage, lambda_url: str, records: int, summary: str, out: TextIO, http: str | None
) -> int:
    broken = records // 2 + 1
    stage.send(make_orders(records, broken))
    arguments = [
        f"--kafka_bootstrap_servers={stage.kafka.bootstrap_servers}",
        *stage.arguments,
        f"--function={FUNCTION}",
        f"--lambda_endpoint_url={lambda_url}",
        "--aws_region=us-east-1",
        "--batch_size=100",
        "--max_retries=1",
        "--bisect_on_error",
        "--on_error=log",
        f"--error_topic={ERRORS}",
        f"--response_topic={RESULTS}",
        f"--http={http}" if http else "--until=caught_up",
        f"--summary={summary}",
    ]
    _say(
        out,
        f"{stage.what} {ORDERS} has {_count(records, 'order')}. Order {broken} has no amount: the "
        "function fails on it.",
        f"{stage.said} Now the pipeline, by its command line:",
        "",
        "  ./run.sh run \\",
        *(f"    {argument} \\" for argument in arguments[:-1]),
        f"    {arguments[-1]}",
        "",
    )
    with _more_orders(stage, records) if http else contextlib.nullcontext():
        code, printed = _run_pipeline(arguments)
    if summary == "json":
        print(printed, end="", flush=True)
    if code == 0:
        _say(out, *_report(stage))
    if summary == "text" and printed:
        _say(out, "", "Summary", f"  {printed.rstrip()}")
    return code


def make_orders(count: int, broken: int) -> Iterator[NewRecord]:
    """Orders 1 to `count`, the same each time; `broken` is the number of the one without amount."""
    for number in range(1, count + 1):
        quantity = number % 3 + 1
        order = {
            "order": number,
            "item": _ITEMS[number % len(_ITEMS)],
            "quantity": quantity,
            "amount": round(quantity * (5 + number * 7919 % 9500 / 100), 2),
            "currency": "EUR",
        }
        if number == broken:
            del order["amount"]
        # A prime, so that no customer buys only one thing.
        key = f"customer-{number * 31 % 997}"
        yield NewRecord(key.encode(), json.dumps(order).encode())


@contextlib.contextmanager
def _more_orders(stage: _Stage, sent: int) -> Iterator[None]:
    """Meanwhile send more orders, now fewer and now more of them, some broken."""
    ended = threading.Event()

    def send() -> None:
        number = sent
        while not ended.wait(_MORE_SECS):
            count = round(60 + 50 * math.sin(number / 700))
            orders = make_orders(number + count, number // 1000 * 1000 + 7)
            stage.send(itertools.islice(orders, number, None))
            number += count

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _run_pipeline(arguments: list[str]) -> tuple[int, str]:
    """Run the command line; returns its exit code and what it printed on stdout."""
    # Here, not above: it is what takes a second or two, and there is something to read by now.
    from pipeline import cli

    # The command line takes the signals over, and means to keep them.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return cli.main(arguments), printed.getvalue()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Credentials that open nothing, and no way to the user's own or to their proxy."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_"):
            del os.environ[name]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


# -- what is shown ---------------------------------------------------------------------------


def _report(stage: _Stage) -> list[str]:
    """What the pipeline wrote: some responses, and every error record."""
    # Only now: these come with the pipeline's imports.
    from transforms.names import NUMBERS, TEXTS
    from transforms.original import ORIGINAL_HEADER, TEXT_ORIGINAL_HEADER, decode_original

    responses = stage.read_all(RESULTS)
    shown = responses[:_SHOWN_RESPONSES]
    more = ", the first of them:" if len(shown) < len(responses) else ""
    lines = [f"Topic {RESULTS}: {_count(len(responses), 'response')}{more}"]
    keys = [(record.key or b"").decode() for record in shown]
    for key, record in zip(keys, shown, strict=True):
        result = _compact(json.loads(record.value or b"")["result"])
        lines.append(_cut(f"  {key:{max(map(len, keys))}}  {result}"))
    errors = stage.read_all(ERRORS)
    lines += ["", f"Topic {ERRORS}: {_count(len(errors), 'error record')}"]
    texts = stage.kinesis is not None
    header, names = (TEXT_ORIGINAL_HEADER, TEXTS) if texts else (ORIGINAL_HEADER, NUMBERS)
    for record in errors:
        originals = [value for name, value in record.headers if name == header]
        rest = [(name, value) for name, value in record.headers if name != header]
        lines += [
            *_section("key", json.loads(record.key or b"{}").items()),
            *_section("value", json.loads(record.value or b"{}").items()),
            *_section("headers", ((name, (value or b"").decode()) for name, value in rest)),
        ]
        for original in originals:
            fields = decode_original(original or b"", names)
            lines += _section(f"header {header}", fields.items())
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _section(title: str, fields: Iterable[tuple[str, Any]]) -> list[str]:
    """A title, and below it one line per field, the values aligned."""
    pairs = [(name, _text(value)) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {title}", *(_cut(f"    {name:{width}}  {value}") for name, value in pairs)]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if isinstance(value, str) else _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _cut(line: str) -> str:
    """The line, no wider than the terminal."""
    width = shutil.get_terminal_size((100, 0)).columns
    return line if len(line) <= width else line[: width - 1] + "…"


def _say(out: TextIO, *lines: str) -> None:
    print(*lines, sep="\n", file=out, flush=True)
