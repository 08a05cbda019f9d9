"""Hands: requests that tell a run something -> commands. Only with the token, and logged."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson

from pipeline.options.levels import LEVELS
from pipeline.run.hands import ACTIONS, LEVEL, SKIP, Command, Told
from pipeline.watch.server import Answer, Request, Route, Server, as_json

_LOGGER = logging.getLogger(__name__)

_NUMBER = re.compile(r"\d{1,129}(:\d{1,8})?", re.ASCII)
_NAMES: Mapping[str, tuple[type, ...]] = {
    "topic": (str,),
    "partition": (int,),
    # A stream's numbers are texts.
    "offset": (int, str),
    "whole": (bool,),
    "level": (str,),
}


def serve_hands(server: Server, tell: Callable[[Command], Told], token: str) -> None:
    """Have a server take commands.

    Args:
        server: Where.
        tell: Carries one out.
        token: What has to be given; empty refuses all.
    """
    for action in ACTIONS:
        server.post(f"/api/{action}", _route(action, tell, token))


def _route(action: str, tell: Callable[[Command], Told], token: str) -> Route:
    def answer(request: Request) -> Answer:
        if refused := refusal(request, token):
            return refused
        try:
            command = parse(action, request.body)
        except ValueError as error:
            return as_json({"done": False, "said": str(error)}, 400)
        told = tell(command)
        _LOGGER.warning("%s", _line(command, told, request.client), extra={"facts": _facts(told)})
        return as_json(_facts(told), 200 if told.done else 409)

    return answer


def refusal(request: Request, token: str) -> Answer | None:
    """Why a request may tell nothing; None if it may. Pure."""
    if not token:
        text = "nothing can be told: the run has no token (--http_token_file)"
        return as_json({"done": False, "said": text}, 403)
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and urlsplit_host(origin) != host:
        return as_json({"done": False, "said": "another page may tell nothing"}, 403)
    # What a page of another origin cannot send without asking.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    given = request.headers.get("authorization", "")
    # Compared as a whole, whatever it begins with: how long it takes tells nothing.
    right = hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode())
    if not right:
        text = "the token is not the run's"
        refused = as_json({"done": False, "said": text}, 401)
        return Answer(
            refused.body, refused.content_type, 401, headers={"WWW-Authenticate": "Bearer"}
        )
    if kind != "application/json":
        return as_json({"done": False, "said": "send it as application/json"}, 415)
    return None


def urlsplit_host(origin: str) -> str:
    """Host and port of an origin; empty if it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def parse(action: str, body: bytes) -> Command:
    """The command that a request's body says. Pure.

    Raises:
        ValueError: It says none, in one sentence.
    """
    try:
        given: Any = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        raise ValueError("the body is not JSON") from None
    if not isinstance(given, dict):
        raise ValueError("the body is no JSON object")
    for name, value in given.items():
        kinds = _NAMES.get(name)
        if kinds is None:
            raise ValueError(f"give {', '.join(_NAMES)}, and nothing else")
        if value is not None and type(value) not in kinds:
            raise ValueError(f"{name} is of another type")
    if type(given.get("offset")) is str and not _NUMBER.fullmatch(given["offset"]):
        raise ValueError("offset is no record's number")
    command = Command(action, **{name: value for name, value in given.items() if value is not None})
    if command.partition is not None and command.topic is None:
        raise ValueError("a partition needs its topic")
    if action == LEVEL and command.level not in LEVELS:
        raise ValueError(f"level is one of {', '.join(LEVELS)}")
    if action == SKIP and command.partition is None:
        raise ValueError("give topic and partition")
    return command


def _line(command: Command, told: Told, client: str) -> str:
    where = "everything" if command.topic is None else f"topic {command.topic!r}"
    if command.partition is not None:
        where += f" partition {command.partition}"
    if command.offset is not None:
        where += f" offset {command.offset}"
    if command.level:
        where = command.level
    outcome = "done" if told.done else "not done"
    return f"told by {client}: {command.action}, {where}: {outcome}: {told.said}"


def _facts(told: Told) -> dict[str, Any]:
    return {
        "done": told.done,
        "said": told.said,
        "partitions": [f"{topic}-{number}" for topic, number in told.partitions],
        "here": [f"{topic}-{number}" for topic, number in told.here],
    }
