"""The command line: parse, run, and say how it ended.

Exit codes: 0 done (also when told to stop), 1 the run failed, 2 the options do not fit, 3 a
partition is halted.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from time import monotonic
from typing import TYPE_CHECKING

from pipeline.signals import DONE, HALTED, stop_on_signals
from pipeline.watch import logs

if TYPE_CHECKING:
    from pipeline.options.config import Config
    from pipeline.options.resolve import Resolved
    from pipeline.run.rounds import Rounds
    from pipeline.run.workers import Workers
    from pipeline.submit.streaming import StreamRun
    from pipeline.watch.server import Server

_LOGGER = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    started = monotonic()
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Before Beam is imported: it logs while it is.
    wants_json = "--log_format=json" in arguments or ("--log_format", "json") in pairwise(arguments)
    logs.configure("json" if wants_json else "text")
    if arguments[:1] == ["ctl"]:
        return _ctl(arguments[1:])
    with _importing():
        from pipeline.options.explain import explain
        from pipeline.options.help import format_help
        from pipeline.options.resolve import resolve
        from transforms.errors import SinkError, UsageError

    wants_help = "--help" in arguments or "-h" in arguments
    if arguments[:1] == ["redrive"]:
        from pipeline.redrive import command as redrive

        if wants_help:
            logs.show(redrive.help_text())
            return DONE
    elif arguments[:1] == ["offsets"]:
        from pipeline.offsets import command as offsets

        if wants_help:
            logs.show(offsets.help_text())
            return DONE
    elif wants_help:
        logs.show(format_help())
        return DONE
    try:
        if arguments[:1] == ["redrive"]:
            return redrive.main(arguments[1:], started)
        if arguments[:1] == ["offsets"]:
            return offsets.main(arguments[1:], logs.show)
        resolved = resolve(arguments)
        logs.configure_as(resolved.values)
        if resolved.explain:
            logs.show(explain(resolved))
        if resolved.config is None:
            raise UsageError(resolved.problems)
        for warning in resolved.config.warnings:
            _LOGGER.warning("%s", warning)
        if resolved.explain:
            return DONE
        if resolved.carried and (left := len(resolved.carried.notes)):
            _LOGGER.info(
                "--config=%s: %d settings are not carried over and change nothing; --explain lists "
                "them",
                resolved.carried.file,
                left,
            )
        return _run(resolved, started)
    except SinkError as error:
        for line in str(error).splitlines():
            logs.say(f"error: {line}")
        return error.exit_code


def _ctl(arguments: Sequence[str]) -> int:
    """Tell a run something; this takes none of what a run does."""
    from pipeline.watch import ctl
    from transforms.errors import SinkError

    try:
        return ctl.main(arguments, logs.show)
    except SinkError as error:
        for line in str(error).splitlines():
            logs.say(f"error: {line}")
        return error.exit_code


def _run(resolved: Resolved, started: float) -> int:
    with _importing():
        from pipeline.options.declare import DIRECT_RUNNERS
        from pipeline.run.rounds import Rounds
        from pipeline.run.status import Status
        from pipeline.watch.progress import Progress, print_summary
        from transforms.interpreter import tune_interpreter

    config = resolved.config
    assert config
    stop = threading.Event()
    direct = resolved.runner in DIRECT_RUNNERS
    status: Status | None
    stop_on_signals(stop, "finishing what is running" if direct else "leaving the job")
    tune_interpreter(config.lanes.count)
    # Before workers are forked: then nothing has begun if the address is taken.
    server = _server(config)
    live = sys.stderr.isatty() and config.run.log_format == "text"
    run: Rounds | Workers | StreamRun | None = None
    try:
        if direct and max(config.run.workers, config.run.max_workers or 1) > 1:
            from pipeline.run.workers import Workers

            run = Workers(config, stop, started)
        elif direct:
            run = Rounds(config, stop, started)
        else:
            from pipeline.submit.streaming import StreamRun

            run = StreamRun(config, resolved.runner, resolved.beam_arguments, stop, started)
        with _watching(resolved, run, server), Progress(run.status, live):
            status = run.run()
        if status is None:
            return DONE
    except BaseException:
        if config.run.summary == "json":
            status = run.status() if run else Status.of_nothing(monotonic() - started)
            print_summary(status, "json", config.read.source.ledger)
        raise
    print_summary(status, config.run.summary, config.read.source.ledger)
    return HALTED if status.halted else DONE


def _server(config: Config) -> Server | None:
    """What answers for the run, if anything is to."""
    if config.run.report:
        with _importing():
            from pipeline.watch.site import check_report

        check_report(config.run.report)
    if config.run.http is None:
        return None
    with _importing():
        from pipeline.watch.server import Server

    return Server(*config.run.http)


@contextmanager
def _watching(
    resolved: Resolved, run: Rounds | Workers | StreamRun, server: Server | None
) -> Iterator[None]:
    """Answer for the run while it goes on, and write its report when it ends, however it does."""
    config = resolved.config
    assert config
    if not (server or config.run.report):
        yield
        return
    with _importing():
        from pipeline.options.explain import listed
        from pipeline.watch.about import About
        from pipeline.watch.endpoint import serve
        from pipeline.watch.history import History
        from pipeline.watch.site import write_report
        from transforms.errors import UsageError

    about = About.of(config, resolved.runner, listed(resolved))
    with History(run.status) as history:
        if server:
            serve(server, run.status, about, history, run.command, config.run.http_token)
            _LOGGER.info("listening: %s/metrics; the page is at %s/", server.url, server.url)
        try:
            with server or nullcontext():
                yield
        finally:
            if config.run.report:
                try:
                    write_report(config.run.report, run.status(), about, history)
                except UsageError as error:
                    # How the run ended stays what it was.
                    logs.say(f"error: {error}")


@contextmanager
def _importing() -> Iterator[None]:
    """What is imported stays: to look for garbage among it, again and again, only takes time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
