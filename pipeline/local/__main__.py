"""``python -m pipeline.local``: run one of the stand-ins until it is interrupted."""

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


if __name__ == "__main__":
    sys.exit(main())
