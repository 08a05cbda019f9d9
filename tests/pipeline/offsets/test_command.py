"""The command `offsets`, on the real broker: it shows a group, and moves it while no run is up."""

from __future__ import annotations

import json
import re
import signal
import time
from datetime import datetime, timezone

import pytest

from pipeline import cli
from pipeline.local.broker import KafkaBroker
from pipeline.offsets.command import _SHARED as OURS
from pipeline.offsets.command import connection, help_text, parse
from tests.conftest import Names
from tests.pipeline.options.given import IAM_PROPERTIES, MSK, REQUIRED, ROLE, SECRET, config_of
from tests.sink import Topics, answer, commit, numbered, serve
from transforms.errors import UsageError

_GIVEN = ("--kafka_bootstrap_servers=a:1", "--consumer_group=g", "--topics=t")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--to=yesterday"], "--to=yesterday is not earliest, latest, an offset"),
        (["--to=-1"], "--to=-1 is not earliest"),
        (["--execute"], "--execute needs --to"),
        (["--partition=orders"], "--partition=orders is not TOPIC-NUMBER"),
        (["--functon=x"], "--functon=x is not known to offsets"),
    ],
)
def test_what_does_not_fit(arguments: list[str], problem: str) -> None:
    _, problems = parse([*_GIVEN, *arguments])
    assert [each[: len(problem)] for each in problems] == [problem]
    assert len(parse(arguments)[1]) == 4
    assert "--execute" in help_text()


@pytest.mark.parametrize(
    "login",
    [
        {},
        {"kafka_config_file": IAM_PROPERTIES},
        {"kafka_config_file": IAM_PROPERTIES, "kafka_role_arn": ROLE, "aws_web_identity": "google"},
        {"kafka_access": "IAM_AUTH", "event_source_arn": MSK, "envelope": "kafka_event"},
        {"kafka_access": f"SASL_SCRAM_512_AUTH={SECRET}"},
    ],
)
def test_it_logs_in_as_a_run_does(login: dict[str, str]) -> None:
    """With the same options it reaches the same cluster."""
    given = {name: text for name, text in (REQUIRED | login).items() if name in OURS}
    values, problems = parse([f"--{name}={text}" for name, text in given.items()])
    assert problems == []
    assert connection(values) == config_of(**login).kafka


def test_a_login_that_does_not_fit_is_refused() -> None:
    values, _ = parse([*_GIVEN, "--kafka_access=NO_AUTH=x", f"--kafka_role_arn={ROLE}"])
    with pytest.raises(UsageError) as raised:
        connection(values)
    assert [text.split(" ")[0] for text in raised.value.problems] == [
        "--kafka_access:",
        "--kafka_role_arn",
    ]


def _offsets(
    capsys: pytest.CaptureFixture[str], topics: Topics, *arguments: str, code: int = 0
) -> str:
    given = [
        "offsets",
        f"--kafka_bootstrap_servers={topics.broker.bootstrap_servers}",
        f"--consumer_group={topics.group}",
        f"--topics={topics.source}",
        *arguments,
    ]
    assert cli.main(given) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_it_shows_and_moves_a_group(
    broker: KafkaBroker,
    names: Names,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    """A dry run moves nothing; a time, an offset, the ends; one partition by itself."""
    topics = Topics(broker, names, partitions=2, count=5)
    assert "is not there" in _offsets(capsys, topics, "--partition=no-1", code=2)
    shown = _offsets(capsys, topics)
    assert re.search(rf"{topics.source}-0 +0 +5 +- +-", shown)
    commit(broker, topics.group, topics.source, {0: 3, 1: 4})
    facts = json.loads(_offsets(capsys, topics, "--format=json"))
    assert [(row["committed"], row["lag"]) for row in facts["partitions"]] == [(3, 2), (4, 1)]

    shown = _offsets(capsys, topics, "--to=earliest")
    assert "nothing is moved" in shown
    assert broker.committed(topics.group, topics.source) == {0: 3, 1: 4}
    _offsets(capsys, topics, "--to=earliest", f"--partition={topics.source}-1", "--execute")
    assert broker.committed(topics.group, topics.source) == {0: 3, 1: 0}
    _offsets(capsys, topics, "--to=1000", "--execute")
    assert broker.committed(topics.group, topics.source) == {0: 5, 1: 5}
    _offsets(capsys, topics, "--to=2", "--execute")
    assert broker.committed(topics.group, topics.source) == {0: 2, 1: 2}
    time.sleep(1.1)
    moment = datetime.now(timezone.utc).isoformat()
    broker.produce(topics.source, numbered(1, 3))
    _offsets(capsys, topics, f"--to={moment}", "--execute")
    assert broker.committed(topics.group, topics.source) == {0: 5, 1: 5}
    _offsets(capsys, topics, "--to=latest", "--execute")
    assert broker.committed(topics.group, topics.source) == {0: 8, 1: 5}


def test_a_group_of_a_run_is_not_moved(
    broker: KafkaBroker,
    names: Names,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    topics = Topics(broker, names, partitions=1, count=5)
    with serve(answer) as server, topics.start(server, until=None) as sink:
        sink.until(lambda: broker.committed(topics.group, topics.source) == {0: 5}, "all is done")
        said = _offsets(capsys, topics, "--to=earliest", "--execute", code=1)
        assert "the group has active members" in said
        sink.send(signal.SIGTERM)
        sink.wait()
    assert broker.committed(topics.group, topics.source) == {0: 5}
