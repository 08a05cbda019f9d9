"""Ctl: the command that tells a run something, from a shell."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.options.levels import LEVELS
from pipeline.options.token import VARIABLE, read_token
from transforms.errors import SinkError, UsageError

_URL = "http://127.0.0.1:9464"
_ACTIONS = {
    "status": "print how the run stands, as JSON",
    "pause": "read and begin nothing more; what runs is finished and committed",
    "resume": "go on with what was paused",
    "retry": "end a back-off: invoke now",
    "skip": "write the record that a partition stands in front of to the error topic, and go on",
    "resume-halted": "go on with halted partitions; their record is tried again",
    "log-level": "log from a level on",
}
_SECS = 60.0


class CtlError(SinkError):
    """The run does not answer, or does not do it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beam-lambda-sink ctl",
        description="Tell a run that was started with --http something. A run reaches the "
        "partitions that it has itself; of several in a group tell each.",
    )
    parser.add_argument("--url", default=_URL, help=f"where the run answers (default: {_URL})")
    parser.add_argument(
        "--http_token_file",
        help=f"file with the run's token (default: {VARIABLE} of the environment)",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text in _ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text)
        if action == "log-level":
            one.add_argument("level", choices=LEVELS)
        elif action != "status":
            one.add_argument("--topic", help="this topic only")
            one.add_argument(
                "--partition", required=action == "skip", help="this partition only, as orders-3"
            )
        if action == "skip":
            one.add_argument("--offset", type=_offset, help="only if that is the record in the way")
            one.add_argument(
                "--whole", action="store_true", help="with all records that failed together"
            )
    return parser


def _offset(text: str) -> int | str:
    """A record's number; a stream's are too large for JSON, and have a colon where it is a part."""
    number = int(text.partition(":")[0])
    return number if text.isdecimal() and number < 2**63 else text


def options() -> set[str]:
    """Names of all that it takes."""
    parser = _parser()
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    strings = (text for each in parsers for text in each._option_string_actions)
    return {text.removeprefix("--") for text in strings if text.startswith("--")}


def main(arguments: Sequence[str], show: Callable[[str], None]) -> int:
    """Run the command; returns its exit code.

    Raises:
        SinkError: It was not done.
    """
    given = vars(_parser().parse_args(list(arguments)))
    url, action = given.pop("url").rstrip("/"), given.pop("action")
    file = given.pop("http_token_file")
    if action == "status":
        show(json.dumps(_ask(f"{url}/api/status"), indent=2))
        return 0
    token = read_token(file)
    if not token:
        raise UsageError([f"there is no token; give --http_token_file, or {VARIABLE}"])
    body = {name: value for name, value in given.items() if value not in (None, False)}
    if "partition" in body:
        topic, _, number = body["partition"].rpartition("-")
        if not topic or not number.isdecimal():
            raise UsageError(
                [f"--partition={body['partition']} is not TOPIC-NUMBER, such as orders-3"]
            )
        body |= {"topic": topic, "partition": int(number)}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    told = _ask(f"{url}/api/{action}", json.dumps(body).encode(), headers)
    show(told["said"])
    for name, text in (("partitions", "changed"), ("here", "this run has")):
        if told.get(name):
            show(f"{text}: {' '.join(told[name])}")
    return 0


def _ask(url: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> Any:
    request = urllib.request.Request(url, body, dict(headers))
    # Not by the proxy of the environment, which is for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        try:
            said = json.loads(error.read())["said"]
        except (ValueError, KeyError, TypeError):
            said = f"HTTP {error.code}"
        raise CtlError(f"not done: {said}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise CtlError(f"--url={url.partition('/api')[0]} does not answer: {why}") from None
