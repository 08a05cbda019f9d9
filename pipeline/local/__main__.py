"""``python -m pipeline.local``: the demo, or one of the stand-ins by itself."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import NoReturn

from pipeline.local.faults import load_faults
from pipeline.local.lambda_server import FunctionSpec, LambdaServer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with 2 and one line, without the usage that argparse would print."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 when ended by a signal, 2 if misused."""
    parser = _Parser(prog="python -m pipeline.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    server = commands.add_parser("lambda", help="serve AWS Lambda's Invoke API")
    server.add_argument(
        "--function",
        action="append",
        required=True,
        metavar="NAME=FILE.py:HANDLER[,timeout_secs=3][,concurrency=10]",
        help="a function to serve; may be given several times",
    )
    server.add_argument("--port", type=int, default=9200, help="0 takes a free one (default 9200)")
    server.add_argument("--faults", metavar="FILE.json", help="faults to inject")
    server.set_defaults(run=_run_lambda)
    demo = commands.add_parser("demo", help="the whole pipeline, without AWS and without Kafka")
    demo.add_argument(
        "--records",
        type=_record_count,
        default=2000,
        metavar="N",
        help="orders to send, one of them broken (default 2000)",
    )
    demo.add_argument(
        "--summary",
        choices=("text", "json"),
        default="text",
        help="json: only the pipeline's summary on stdout, as one line",
    )
    demo.add_argument(
        "--runner",
        choices=("direct", "flink"),
        default="direct",
        help="flink: a real Kafka broker and a Flink session cluster; needs Java 17",
    )
    demo.add_argument(
        "--source",
        choices=("kafka", "kinesis"),
        default="kafka",
        help="kinesis: orders are in a stream whose shards split while it is read",
    )
    demo.add_argument(
        "--http",
        nargs="?",
        const="127.0.0.1:9464",
        metavar="HOST:PORT",
        help="show the page there (default 127.0.0.1:9464) and send orders until Ctrl-C",
    )
    demo.set_defaults(run=_run_demo)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (OSError, ValueError) as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2


def _run_lambda(options: argparse.Namespace) -> int:
    functions = [FunctionSpec.parse(text) for text in options.function]
    faults = load_faults(options.faults) if options.faults else []
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    with LambdaServer(functions, options.port, faults, record_calls=False) as server:
        print(
            f"{server.url} serves Lambda; try: aws lambda invoke --endpoint-url {server.url}"
            f" --function-name {functions[0].name} --cli-binary-format raw-in-base64-out"
            " --payload '{}' /dev/stdout",
            flush=True,
        )
        interrupted.wait()
    return 0


def _record_count(text: str) -> int:
    from pipeline.local.demo import MAX_RECORDS

    if not text.isdecimal() or not 1 <= int(text) <= MAX_RECORDS:
        raise argparse.ArgumentTypeError(f"give a number from 1 to {MAX_RECORDS}, not {text!r}")
    return int(text)


def _run_demo(options: argparse.Namespace) -> int:
    from pipeline.local.demo import run_demo

    return run_demo(options.records, options.summary, options.runner, options.http, options.source)


if __name__ == "__main__":
    sys.exit(main())
