"""Whole runs that log in to a real broker, the way MSK and others want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.local.processes import wait_until
from tests.bench.tokens import run_on
from tests.conftest import Names
from tests.servers.credential_process import profile
from tests.servers.secure_broker import NO_RIGHTS, NO_RIGHTS_SECRET, REGION, SecureBroker
from tests.sink import ACCESS_KEY, SECRET_KEY, Topics, environment, serve
from transforms.kafka.client import IamLogin, KafkaConfig
from transforms.kafka.login import AwsLogin
from transforms.kafka.offsets import SourceConfig
from transforms.kafka.streaming import KafkaStream


def properties(broker: SecureBroker, folder: Path, *more: str, region: str = REGION) -> Path:
    """A properties file for a login with IAM."""
    lines = [
        "security.protocol=SASL_SSL",
        "sasl.mechanism=AWS_MSK_IAM",
        f"ssl.ca.location={broker.ca}",
        f"aws.msk.region={region}",
        *more,
    ]
    path = folder / "kafka.properties"
    path.write_text("\n".join(lines))
    return path


def iam(broker: SecureBroker, names: Names, folder: Path, **options: Any) -> Topics:
    """Topics of runs that log in with IAM."""
    if "kafka_config_file" not in options:
        options["kafka_config_file"] = properties(broker, folder)
    options.setdefault("count", 20)
    return Topics(broker, names, kafka_bootstrap_servers=broker.iam, **options)


def test_every_client_logs_in_with_iam(secure: SecureBroker, names: Names, tmp_path: Path) -> None:
    """Read, responses, error records, offsets, of two processes."""
    topics = iam(secure, names, tmp_path, workers=2)
    with serve() as server:
        ended = topics.run(server, on_error="log", error_topic=topics.errors)
    topics.assert_exactly_once()
    topics.assert_caught_up()
    assert not [line for line in ended.stderr.splitlines() if "kafka:" in line]


def test_tokens_are_renewed_while_it_runs(
    secure: SecureBroker, names: Names, tmp_path: Path
) -> None:
    """Credentials, and with them tokens and connections, end every few seconds; nobody notices.

    For ten minutes and longer: ``python -m tests.bench.tokens``.
    """
    # Much shorter ones may be renewed within a second, and a broker refuses two logins in one.
    result = run_on(secure, names, tmp_path, secs=30, token_secs=15)
    assert result.wrong == []
    # The reader, the writer and what commits, each more than once.
    assert result.logins >= 8


def test_a_wrong_region_is_one_line(secure: SecureBroker, names: Names, tmp_path: Path) -> None:
    """The broker says no more than that access is denied."""
    file = properties(secure, tmp_path, region="eu-west-1")
    topics = iam(secure, names, tmp_path, count=0, kafka_config_file=file)
    with serve() as server:
        ended = topics.run(server, code=1)
    (error,) = ended.errors
    assert "Access denied" in error
    assert "the right kafka-cluster:Connect, the cluster has to be in eu-west-1" in error
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((ACCESS_KEY, SECRET_KEY, -60), "Kafka login with IAM: "),
        ((), "Kafka login with IAM: AWS credentials cannot be had: Error when retrieving "),
    ],
)
def test_no_credentials_are_one_line(
    secure: SecureBroker, names: Names, tmp_path: Path, arguments: tuple[Any, ...], said: str
) -> None:
    """Those that are over, and a program that gives none, with what it says itself."""
    config = profile(tmp_path, *arguments)
    topics = iam(
        secure,
        names,
        tmp_path,
        count=0,
        kafka_config_file=properties(secure, tmp_path, "aws.msk.profile=msk"),
        env=environment(AWS_CONFIG_FILE=str(config)),
    )
    with serve() as server:
        ended = topics.run(server, code=1)
    (error,) = ended.errors
    assert error.startswith(f"error: {said}")
    assert ("the vault is sealed" if not arguments else "expired") in error
    assert "Traceback" not in ended.stderr
    assert SECRET_KEY not in ended.stderr


def test_missing_rights_are_named(secure: SecureBroker, names: Names, tmp_path: Path) -> None:
    """Who may connect and nothing more is told what to ask for."""
    env = environment(AWS_ACCESS_KEY_ID=NO_RIGHTS, AWS_SECRET_ACCESS_KEY=NO_RIGHTS_SECRET)
    topics = iam(secure, names, tmp_path, count=0, env=env)
    with serve() as server:
        (error,) = topics.run(server, code=1).errors
        assert "or the right kafka-cluster:DescribeTopic of it" in error


def test_a_streaming_run_logs_in_with_iam(
    secure: SecureBroker, names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds partitions, what reads one and what commits, as workers elsewhere make them."""
    for name, text in environment().items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, text)
    monkeypatch.setattr(IamLogin, "used", False)
    topics = iam(secure, names, tmp_path)
    kafka = KafkaConfig(
        secure.iam, topics.group, str(topics.options["kafka_config_file"]), AwsLogin()
    )
    stream = KafkaStream(SourceConfig(kafka, (topics.source,)), bounded=True)
    before = secure.accepted()
    found = stream.find(None)
    assert found == {(topics.source, 0): (0, 20), (topics.source, 1): (0, 20)}
    assert secure.committed(topics.group, topics.source) == {0: 0, 1: 0}
    assert secure.accepted() > before
    with stream.lend((topics.source, 1)) as reader:
        reader.go_to(0)
        wait_until(lambda: reader.read(0.1)[1] == 20, "the partition is not read")
        reader.close()
