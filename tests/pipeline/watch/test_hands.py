"""Hands over HTTP: who may tell a run something, and what is no command."""

from __future__ import annotations

import http.client
import json
import logging
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.run.hands import ACTIONS, Command, Told
from pipeline.watch.hands import parse, refusal, serve_hands
from pipeline.watch.server import Request, Server

TOKEN = "0123456789abcdef"
RIGHT = {
    "authorization": f"Bearer {TOKEN}",
    "content-type": "application/json",
    "host": "127.0.0.1:9464",
}


class Asked:
    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.server = Server("127.0.0.1", 0)
        serve_hands(self.server, self._tell, TOKEN)

    def _tell(self, command: Command) -> Told:
        self.commands.append(command)
        return Told(command.topic != "no", "said", (("orders", 1),), (("orders", 0),))

    def post(self, action: str, body: Any, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=30)
        given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"} | headers
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/api/{action}", body, given)
        answered = connection.getresponse()
        told = answered.status, json.loads(answered.read())
        connection.close()
        return told


@pytest.fixture
def asked() -> Iterator[Asked]:
    asked = Asked()
    with asked.server:
        yield asked


def test_a_command_is_carried_out_and_logged(
    asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    status, told = asked.post("skip", {"topic": "orders", "partition": 1, "offset": 7})
    assert (status, told["done"], told["partitions"]) == (200, True, ["orders-1"])
    assert told["here"] == ["orders-0"]
    assert asked.commands == [Command("skip", "orders", 1, 7)]
    assert "told by 127.0.0.1: skip, topic 'orders' partition 1 offset 7: done" in caplog.text
    assert asked.post("pause", {"topic": "no"})[0] == 409
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, None),
        ({"origin": "http://127.0.0.1:9464"}, None),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[bad"}, 403),
        ({"origin": ""}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, None),
        ({"authorization": ""}, 401),
        ({"authorization": TOKEN}, 401),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"authorization": f"Bearer {TOKEN} "}, 401),
        ({"authorization": "Bearer \udcff"}, 401),
    ],
)
def test_who_may(changes: dict[str, str], status: int | None) -> None:
    refused = refusal(Request("/api/pause", RIGHT | changes), TOKEN)
    assert (refused and refused.status) == status


def test_without_a_token_nobody_may() -> None:
    for given in ("", "Bearer ", "Bearer"):
        refused = refusal(Request("/api/pause", RIGHT | {"authorization": given}), "")
        assert refused and refused.status == 403


@pytest.mark.parametrize(
    ("action", "body", "problem"),
    [
        ("pause", b"[", "the body is not JSON"),
        ("pause", b"[]", "the body is no JSON object"),
        ("pause", b'{"topics": "a"}', "give topic, partition"),
        ("pause", b'{"topic": 1}', "topic is of another type"),
        ("pause", b'{"topic": "a", "partition": true}', "partition is of another type"),
        ("pause", b'{"partition": 1}', "a partition needs its topic"),
        ("log-level", b"{}", "level is one of"),
        ("log-level", b'{"level": "TRACE"}', "level is one of"),
        ("skip", b'{"topic": "a"}', "give topic and partition"),
        ("skip", b'{"topic": "a", "partition": 0, "offset": "<b>"}', "offset is no record's"),
        ("skip", b'{"topic": "a", "partition": 0, "offset": "7:"}', "offset is no record's"),
    ],
)
def test_what_is_no_command(action: str, body: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("[", r"\[")):
        parse(action, body)


def test_what_is_a_command() -> None:
    assert parse("pause", b"") == Command("pause")
    assert parse("retry", b'{"topic": "a", "partition": null}') == Command("retry", "a")
    assert parse("skip", b'{"topic": "a", "partition": 0, "whole": true}') == Command(
        "skip", "a", 0, whole=True
    )
    # A stream's number is too large for JSON, and may have a place within an aggregate.
    number = f"{10**55}:3"
    body = json.dumps({"topic": "a", "partition": 0, "offset": number}).encode()
    assert parse("skip", body) == Command("skip", "a", 0, number)


def test_ten_thousand_commands_that_are_none(
    asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is told, nothing traced, and nothing grows."""
    caplog.set_level(logging.DEBUG)
    rand = random.Random(5)
    words: list[Any] = [None, 1, -1, True, "a" * 100, "<script>", [], {}, 2**70, "\x00", 1.5]
    names = ["topic", "partition", "offset", "whole", "level", "x", "", "<b>"]
    memory = []
    tracemalloc.start()
    try:
        for turn in range(10_000):
            body: Any = {rand.choice(names): rand.choice(words) for _ in range(rand.randrange(4))}
            if turn % 3 == 0:
                body = rand.randbytes(rand.randrange(40))
            wrong = {"Authorization": f"Bearer {rand.random()}"} if turn % 2 else {}
            status, told = asked.post(rand.choice(["skip", "log-level"]), body, **wrong)
            assert status in (400, 401), (status, told)
            if turn % 2500 == 2499:
                memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert memory[-1] < memory[0] + 500_000
    assert asked.commands == []
    assert "Traceback" not in caplog.text


def test_each_action_has_an_address(asked: Asked) -> None:
    for action in ACTIONS:
        asked.post(action, {"topic": "a", "partition": 1, "level": "INFO"})
    assert [command.action for command in asked.commands] == list(ACTIONS)
