"""Whole runs that log in to a real broker, the way MSK and others want it."""

from __future__ import annotations

import base64
import json
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.local.lambda_server import LambdaServer
from pipeline.local.processes import wait_until
from tests.bench.tokens import run_on
from tests.conftest import Names
from tests.servers.aws_server import AwsServer
from tests.servers.credential_process import profile
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import (
    NO_RIGHTS,
    NO_RIGHTS_SECRET,
    PASSWORD,
    REGION,
    SCOPE,
    USER,
    Authority,
    SecureBroker,
)
from tests.servers.token_server import CLIENT, CLIENT_SECRET, TokenServer
from tests.sink import (
    ACCESS_KEY,
    FUNCTION,
    MEMBERS,
    SECRET_KEY,
    Ended,
    Sink,
    Topics,
    environment,
    numbered,
    serve,
)
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
    found, _ = stream.find(None, {})
    assert found == {(topics.source, 0): (0, 20), (topics.source, 1): (0, 20)}
    assert secure.committed(topics.group, topics.source) == {0: 0, 1: 0}
    assert secure.accepted() > before
    with stream.lend((topics.source, 1)) as reader:
        reader.go_to(0)
        wait_until(lambda: reader.read(0.1)[1] == 20, "the partition is not read")
        reader.close()


# -- what event source mappings name, with secrets in Secrets Manager ------------------------


class Mapped:
    """Runs from a mapping as AWS prints it, with ways in, and no option for a login.

    Args:
        broker: The broker.
        names: Of topics and group.
        folder: For the mapping.
        servers: Where it leads, or the ARN of a cluster of MSK.
        access: By type, its URI.
    """

    def __init__(
        self,
        broker: SecureBroker,
        names: Names,
        folder: Path,
        servers: str,
        access: dict[str, str],
    ) -> None:
        self.topics = Topics(broker, names, count=20)
        self._file = folder / "mapping.json"
        group = {"ConsumerGroupId": self.topics.group}
        source: dict[str, Any] = {
            "SelfManagedEventSource": {"Endpoints": {"KAFKA_BOOTSTRAP_SERVERS": [servers]}},
            "SelfManagedKafkaEventSourceConfig": group,
        }
        if servers.startswith("arn:"):
            source = {"EventSourceArn": servers, "AmazonManagedKafkaEventSourceConfig": group}
        self._file.write_text(
            json.dumps(
                {
                    "UUID": "5a7c",
                    "FunctionArn": f"arn:aws:lambda:{REGION}:123456789012:function:{FUNCTION}",
                    "Topics": [self.topics.source],
                    "StartingPosition": "TRIM_HORIZON",
                    **source,
                    "SourceAccessConfigurations": [
                        {"Type": kind, "URI": uri} for kind, uri in access.items()
                    ],
                }
            )
        )

    def arguments(self, server: LambdaServer, **more: Any) -> list[str]:
        given = {
            "config": self._file,
            "lambda_endpoint_url": server.url,
            "until": "caught_up",
            "summary": "json",
            **more,
        }
        return [f"--{name}={value}" for name, value in given.items()]

    def run(self, env: dict[str, str], code: int = 0, **more: Any) -> Ended:
        with serve(_silent) as server, Sink(self.arguments(server, **more), env) as sink:
            return sink.wait(code)


def _silent(event: Any, context: Any) -> None:
    """A function whose replies nobody looks at."""


def ca(broker: SecureBroker, manager: SecretsManager) -> dict[str, str]:
    return {"SERVER_ROOT_CA_CERTIFICATE": manager.keep(certificate=broker.ca.read_text())}


@pytest.mark.parametrize("kind", ["256", "512", "plain"])
def test_a_password_from_a_mapping(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path, kind: str
) -> None:
    """SCRAM and PLAIN over TLS, through to committed offsets; nobody is shown the password."""
    password = PASSWORD if kind == "plain" else f"pass-{uuid.uuid4().hex}"
    if kind != "plain":
        secure.set_password(kind, password)
    name = "BASIC_AUTH" if kind == "plain" else f"SASL_SCRAM_{kind}_AUTH"
    access = {name: manager.keep(username=USER, password=password), **ca(secure, manager)}
    servers = secure.plain if kind == "plain" else secure.scram
    mapped = Mapped(secure, names, tmp_path, servers, access)
    ended = mapped.run(manager.env)
    mapped.topics.assert_caught_up()
    assert password not in ended.stderr + ended.stdout


@pytest.mark.parametrize("password", [None, "password-of-the-key"])
def test_a_certificate_from_a_mapping(
    secure: SecureBroker,
    manager: SecretsManager,
    names: Names,
    tmp_path: Path,
    password: str | None,
) -> None:
    """With its key, plain or encrypted, neither of which is in any file."""
    certificate, key = secure.authority.issue(USER, password)
    secret = {"certificate": certificate, "privateKey": key}
    if password:
        secret["privateKeyPassword"] = password
    access = {"CLIENT_CERTIFICATE_TLS_AUTH": manager.keep(**secret), **ca(secure, manager)}
    mapped = Mapped(secure, names, tmp_path, secure.mtls, access)
    ended = mapped.run(manager.env)
    mapped.topics.assert_caught_up()
    assert "PRIVATE KEY" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("grant", ["client_credentials", "jwt"])
def test_a_token_server_from_a_mapping(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path, grant: str
) -> None:
    """With a client's secret, and with an assertion that is signed with a key."""
    certificate, key = secure.authority.issue("tokens")
    file = tmp_path / "tokens.pem"
    file.write_text(key + certificate)
    secret = {"oauthClientId": CLIENT, "oauthIdpCaCertificate": secure.ca.read_text()}
    cluster = f"lkc-{grant.replace('_', '-')}"
    access = {
        "OAUTHBEARER_SCOPE": SCOPE,
        "OAUTHBEARER_LOGICAL_CLUSTER": cluster,
        "OAUTHBEARER_IDENTITY_POOL": "pool-1",
    }
    if grant == "jwt":
        secret |= {"oauthClientEmail": "a@b.example", "oauthPrivateKey": key}
        access["OAUTHBEARER_AUDIENCE"] = "the-tokens"
    else:
        secret["oauthClientSecret"] = CLIENT_SECRET
    with TokenServer(file) as tokens:
        secret["oauthTokenEndpointUrl"] = tokens.url
        access |= {"OAUTHBEARER_AUTH": manager.keep(**secret), **ca(secure, manager)}
        mapped = Mapped(secure, names, tmp_path, secure.oidc, access)
        ended = mapped.run(manager.env)
    mapped.topics.assert_caught_up()
    assert CLIENT_SECRET not in ended.stderr + ended.stdout
    assert tokens.asked
    assert f"{{identityPoolId=pool-1, logicalCluster={cluster}}}" in secure.extensions()
    if grant == "jwt":
        claims = tokens.asked[0]["assertion"].split(".")[1]
        said = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        assert said["iss"] == said["sub"] == "a@b.example"
        assert said["aud"] == "the-tokens"


@contextmanager
def going_on(mapped: Mapped, env: dict[str, str]) -> Iterator[tuple[Sink, Callable[[], None]]]:
    """A run that has committed what there was, and what writes more and waits for its offsets."""
    topics = mapped.topics
    done = 20

    def more() -> None:
        nonlocal done
        topics.broker.produce(topics.source, numbered(2, 20))
        done += 20
        sink.until(lambda: committed() == {0: done, 1: done}, "the others are not committed")

    committed = partial(topics.broker.committed, topics.group, topics.source)
    with serve(_silent) as server, Sink(mapped.arguments(server, until="forever"), env) as sink:
        sink.until(lambda: committed() == {0: 20, 1: 20}, "the first are not committed")
        yield sink, more


@pytest.mark.parametrize("kind", ["512", "plain"])
def test_a_password_is_rotated_while_it_runs(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path, kind: str
) -> None:
    """The new one is fetched when the old one is refused; nothing is lost, nobody starts again.
    The secret may come after the password."""
    secure.set_password(kind, "the-first")
    arn = manager.keep(username=USER, password="the-first")
    name = "BASIC_AUTH" if kind == "plain" else "SASL_SCRAM_512_AUTH"
    servers = secure.plain if kind == "plain" else secure.scram
    mapped = Mapped(secure, names, tmp_path, servers, {name: arn, **ca(secure, manager)})
    try:
        with going_on(mapped, manager.env) as (sink, more):
            secure.set_password(kind, "the-second")
            sink.until(lambda: "WARNING kafka: " in sink.stderr, "nothing is refused")
            manager.change(arn, username=USER, password="the-second")
            sink.until(lambda: "logging in with the one that is new" in sink.stderr, "no new login")
            more()
            sink.send(signal.SIGTERM)
            ended = sink.wait()
    finally:
        secure.set_password(kind, PASSWORD)
    assert "the-first" not in ended.stderr
    assert "the-second" not in ended.stderr


def test_the_secret_for_a_token_server_is_rotated_while_it_runs(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path
) -> None:
    """The new one is fetched when the server gives no token for the old one; it may come later."""
    certificate, key = secure.authority.issue("tokens")
    file = tmp_path / "tokens.pem"
    file.write_text(key + certificate)
    secret = {"oauthClientId": CLIENT, "oauthIdpCaCertificate": secure.ca.read_text()}
    with TokenServer(file, secs=12) as tokens:
        tokens.quotes = True
        secret["oauthTokenEndpointUrl"] = tokens.url
        arn = manager.keep(**secret, oauthClientSecret=CLIENT_SECRET)
        access = {"OAUTHBEARER_SCOPE": SCOPE, "OAUTHBEARER_AUTH": arn, **ca(secure, manager)}
        mapped = Mapped(secure, names, tmp_path, secure.oidc, access)
        with going_on(mapped, manager.env) as (sink, more):
            tokens.secret = "the-second"
            sink.until(lambda: tokens.refused > 0, "nothing is refused")
            said = f"login with OIDC: the token server {tokens.url.split('/')[2]} answers 401"
            sink.until(lambda: said in sink.stderr, "it is not said")
            manager.change(arn, **secret, oauthClientSecret=tokens.secret)
            sink.until(
                lambda: "asked with the secret that is new" in sink.stderr, "it is not asked"
            )
            more()
            asked = len(tokens.asked)
            # So long that no token of before is good any more.
            sink.until(lambda: len(tokens.asked) > asked + 6, "no more tokens are asked for")
            more()
            sink.send(signal.SIGTERM)
            ended = sink.wait()
    for shown in (CLIENT_SECRET, "the-second", base64.b64encode(b"the-second").decode()[:-1]):
        assert shown not in ended.stderr + ended.stdout


def test_a_certificate_is_taken_at_the_next_start(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path
) -> None:
    """A client that runs cannot take another one. That there is one is said when the old one is
    refused, and the next run goes on where this one was."""

    def secret(authority: Authority) -> dict[str, str]:
        certificate, key = authority.issue(USER)
        return {"certificate": certificate, "privateKey": key}

    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder)
    arn = manager.keep(**secret(secure.authority))
    access = {"CLIENT_CERTIFICATE_TLS_AUTH": arn, **ca(secure, manager)}
    topics = Topics(
        secure,
        names,
        count=20,
        kafka_bootstrap_servers=secure.mtls,
        kafka_access=",".join(f"{kind}={uri}" for kind, uri in access.items()),
        kafka_config_file=MEMBERS,
        env=manager.env,
    )
    try:
        with serve() as server, topics.start(server, until="forever") as sink:
            sink.until(lambda: not topics.missing(), "the first are not answered")
            secure.stop()
            secure.trust(other)
            secure.start()
            manager.change(arn, **secret(other))
            said = "there is another ssl.certificate.pem, ssl.key.pem by now, which is taken when"
            sink.until(lambda: said in sink.stderr, "nothing is said of it")
            sink.send(signal.SIGTERM)
            ended = sink.wait(None)
        secure.produce(topics.source, numbered(2, 20))
        with serve() as server:
            topics.run(server)
        topics.assert_caught_up()
    finally:
        secure.stop()
        secure.trust(secure.authority)
        secure.start()
    assert "PRIVATE KEY" not in ended.stderr


# -- what STS and MSK say ------------------------------------------------------------------------

CLUSTER = f"arn:aws:kafka:{REGION}:123456789012:cluster/orders/5a7c-1"
ROLE = "arn:aws:iam::123456789012:role/read-orders"


def test_a_token_of_sts_from_a_mapping(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path
) -> None:
    """IAM_OAUTHBEARER_AUTH: for the audience, and another one before it ends."""
    audience = {"IAM_OAUTHBEARER_AUTH": "", "OAUTHBEARER_AUDIENCE": "https://kafka.example"}
    mapped = Mapped(secure, names, tmp_path, secure.oidc, {**audience, **ca(secure, manager)})
    with AwsServer(secs=20) as aws:
        env = manager.env | {"AWS_ENDPOINT_URL_STS": aws.url}
        with going_on(mapped, env) as (sink, more):
            begun = len(aws.asked)
            # Each of the run's clients again.
            sink.until(lambda: len(aws.asked) >= 2 * begun, "no other token is asked for")
            more()
            sink.send(signal.SIGTERM)
            ended = sink.wait()
    assert {form["Action"] for form in aws.asked} == {"GetWebIdentityToken"}
    assert {form["Audience.member.1"] for form in aws.asked} == {"https://kafka.example"}
    assert "eyJ" not in ended.stderr


def test_the_role_for_kafka_is_assumed_again(
    secure: SecureBroker, names: Names, tmp_path: Path
) -> None:
    """Its credentials end every 20 s, and with them tokens and connections."""
    with AwsServer(secs=20) as aws, serve() as server:
        env = environment(AWS_ENDPOINT_URL_STS=aws.url)
        topics = iam(secure, names, tmp_path, env=env, kafka_role_arn=ROLE, until="forever")
        with topics.start(server) as sink:
            sink.until(lambda: len(topics.missing()) == 0, "the first are not answered")
            begun, logins = len(aws.asked), secure.accepted()
            sink.until(lambda: len(aws.asked) >= begun + 3, "the role is not assumed again")
            sink.until(lambda: secure.accepted() >= logins + 3, "nobody logs in again")
            secure.produce(topics.source, numbered(2, 20))
            sink.until(lambda: len(topics.missing()) == 0, "the others are not answered")
            sink.send(signal.SIGTERM)
            sink.wait()
    topics.assert_exactly_once()
    assert {(form["Action"], form["RoleArn"]) for form in aws.asked} == {("AssumeRole", ROLE)}


@pytest.mark.parametrize("login", ["iam", "scram"])
def test_a_mapping_of_msk_needs_nothing_else(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path, login: str
) -> None:
    """MSK names the brokers: those for the secret that the mapping has, or, where it has none and
    there are some, those for IAM. Only whom to trust is said, too: no authority of the tests signs
    for AWS."""
    brokers = {
        "bootstrapBrokerStringTls": "127.0.0.1:1",
        "bootstrapBrokerStringSaslIam": secure.iam,
        "bootstrapBrokerStringSaslScram": secure.scram,
    }
    access = ca(secure, manager)
    if login == "scram":
        secure.set_password("512", PASSWORD)
        access["SASL_SCRAM_512_AUTH"] = manager.keep(username=USER, password=PASSWORD)
    mapped = Mapped(secure, names, tmp_path, CLUSTER, access)
    before = secure.accepted()
    with AwsServer(brokers=brokers) as aws:
        mapped.run(manager.env | {"AWS_ENDPOINT_URL_KAFKA": aws.url})
    mapped.topics.assert_caught_up()
    assert set(aws.clusters) == {CLUSTER}
    assert (secure.accepted() > before) == (login == "iam")


def test_settings_in_secrets_manager(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path
) -> None:
    """--kafka_config_file names a secret with all of them, as JSON."""
    certificate, key = secure.authority.issue(USER)
    arn = manager.keep(
        **{
            "security.protocol": "SSL",
            "ssl.ca.pem": secure.ca.read_text(),
            "ssl.certificate.pem": certificate,
            "ssl.key.pem": key,
        }
    )
    topics = Topics(secure, names, count=20, kafka_bootstrap_servers=secure.mtls, env=manager.env)
    with serve() as server:
        topics.run(server, kafka_config_file=f"aws-secretsmanager://{arn}")
    topics.assert_exactly_once()
    topics.assert_caught_up()


def test_a_secret_that_is_not_there(
    secure: SecureBroker, manager: SecretsManager, names: Names, tmp_path: Path
) -> None:
    arn = f"arn:aws:secretsmanager:{REGION}:123456789012:secret:none-Ab12Cd"
    mapped = Mapped(secure, names, tmp_path, secure.scram, {"SASL_SCRAM_512_AUTH": arn})
    (error,) = mapped.run(manager.env, code=2).errors
    assert f"{arn} cannot be read: ResourceNotFoundException" in error
