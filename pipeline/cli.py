"""The command line: parse, run, and say how it ended.

Exit codes: 0 done (also when told to stop), 1 the run failed, 2 the options do not fit, 3 a
partition is halted.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from time import monotonic
from types import FrameType

from pipeline import logs

DONE, FAILED, USAGE, HALTED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    started = monotonic()
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Before Beam is imported: it logs while it is.
    wants_json = "--log_format=json" in arguments or ("--log_format", "json") in pairwise(arguments)
    logs.configure("json" if wants_json else "text")
    from pipeline.options import format_help, parse_arguments
    from transforms.errors import SinkError, UsageError

    if "--help" in arguments or "-h" in arguments:
        print(format_help())
        return DONE
    try:
        config, runner = parse_arguments(arguments)
        if runner not in ("DirectRunner", "direct"):
            raise UsageError(
                [f"--runner={runner} is not supported by this version; use DirectRunner"]
            )
        return _run(config, started)
    except SinkError as error:
        for line in str(error).splitlines():
            logs.say(f"error: {line}")
        return error.exit_code


def _run(config: object, started: float) -> int:
    from pipeline.options import Config
    from pipeline.progress import Progress, print_summary
    from pipeline.rounds import Rounds, Status

    assert isinstance(config, Config)
    stop = threading.Event()
    _stop_on_signals(stop)
    _tune_interpreter()
    live = sys.stderr.isatty() and config.run.log_format == "text"
    rounds = None
    try:
        rounds = Rounds(config, stop, started)
        with Progress(rounds.status, live):
            status = rounds.run()
    except BaseException:
        if config.run.summary == "json":
            status = rounds.status() if rounds else Status.of_nothing(monotonic() - started)
            print_summary(status, "json", config.kafka.group)
        raise
    print_summary(status, config.run.summary, config.kafka.group)
    return HALTED if status.halted else DONE


def _tune_interpreter() -> None:
    """Settings for a process that does nothing but run the pipeline."""
    # What the imports left stays for good; searching it for garbage again and again costs a tenth
    # of the run.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    # A thread whose reply has come wants to send the next request at once, not after the 5 ms that
    # a busy thread may go on by default.
    sys.setswitchinterval(0.0005)


def _stop_on_signals(stop: threading.Event) -> None:
    """The first SIGTERM or SIGINT ends the run after its round, the second one at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()
        name = signal.Signals(number).name
        os.write(2, f"{name}: finishing what is running; again to stop at once\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
