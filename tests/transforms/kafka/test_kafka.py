"""Kafka settings: what the properties file may say, and that its values stay secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.local.processes import wait_until
from transforms.errors import UsageError
from transforms.kafka import client
from transforms.kafka.client import KafkaConfig, client_settings, make_producer
from transforms.properties import load_properties, parse_properties


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("\n  \n\t\n", {}),
        ("# a comment\n! another\n  # and one more", {}),
        ("a=b", {"a": "b"}),
        ("  a  =  b  ", {"a": "b"}),
        ("a=", {"a": ""}),
        ("a=b=c==", {"a": "b=c=="}),
        ("a=b # no comment", {"a": "b # no comment"}),
        ("a=1\na=2", {"a": "2"}),
        ("sasl.password: c2VjcmV0==", {"sasl.password": "c2VjcmV0=="}),
        ("a:b=c\nd = e:f", {"a": "b=c", "d": "e:f"}),
        ("a=1\r\nb=2\r\n", {"a": "1", "b": "2"}),
        ("response.linger.ms=5\nerror.acks.x=1", {"response.linger.ms": "5", "error.acks.x": "1"}),
        ("schema.registry.url=http://x", {"schema.registry.url": "http://x"}),
        ("a=${env:ONE}", {"a": "1"}),
        ("a=<${env:ONE}${env:TWO}>", {"a": "<12>"}),
        ("a=${env:NESTED}", {"a": "${env:ONE}"}),
        ("a=${ONE} $ONE", {"a": "${ONE} $ONE"}),
        ("a=${env:EMPTY}", {"a": ""}),
        ("# ${env:NOWHERE}", {}),
        # Each output may be on another cluster; the source's brokers are an option.
        ("response.bootstrap.servers=h:1", {"response.bootstrap.servers": "h:1"}),
        ("error.bootstrap.servers=h:1", {"error.bootstrap.servers": "h:1"}),
        ("ssl.keystore.location=/k.p12", {"ssl.keystore.location": "/k.p12"}),
    ],
)
def test_what_a_properties_file_says(text: str, expected: dict) -> None:
    """Lines of name=value; comments and empty lines are passed over, the environment filled in."""
    environ = {"ONE": "1", "TWO": "2", "NESTED": "${env:ONE}", "EMPTY": ""}
    assert parse_properties(text, environ) == expected


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("s3cret", ["line 1", "name=value"]),
        ("=s3cret", ["line 1", "name=value"]),
        (": s3cret", ["line 1", "name=value"]),
        ("sasl.password s3cret==", ["line 1", "name=value"]),
        ("sasl.password\ts3cret:x", ["line 1", "name=value"]),
        ("a=s3cret${env:NOWHERE}", ["line 1", "(a)", "'NOWHERE'"]),
        ("a=${env:}", ["line 1", "environment variable"]),
        ("group.id=s3cret", ["line 1", "group.id", "--consumer_group"]),
        ("bootstrap.servers=s3cret", ["bootstrap.servers", "--kafka_bootstrap_servers"]),
        ("metadata.broker.list=s3cret", ["broker.list", "--kafka_bootstrap_servers"]),
        ("enable.auto.commit=s3cret", ["enable.auto.commit"]),
        ("enable.auto.offset.store=s3cret", ["enable.auto.offset.store"]),
        ("auto.offset.reset=s3cret", ["auto.offset.reset", "--starting_position"]),
        ("enable.idempotence=s3cret", ["enable.idempotence", "always on"]),
        ("response.enable.idempotence=s3cret", ["response.enable.idempotence", "always on"]),
        ("acks=s3cret", ["acks", "always all"]),
        ("error.acks=s3cret", ["error.acks", "always all"]),
        ("request.required.acks=s3cret", ["request.required.acks", "always all"]),
        ("transactional.id=s3cret", ["transactional.id"]),
        ("enable.partition.eof=s3cret", ["enable.partition.eof"]),
        ("sasl.jaas.config=s3cret", ["Java", "sasl.username and sasl.password"]),
        ("response.sasl.jaas.config=s3cret", ["Java", "sasl.username"]),
        ("ssl.truststore.location=s3cret.jks", ["Java", "ssl.ca.location"]),
        ("ssl.truststore.password=s3cret", ["Java", "ssl.ca.location"]),
        ("ssl.keystore.location=s3cret.jks", ["Java", "ssl.key.location"]),
        ("sasl.login.callback.handler.class=s3cret", ["Java", "sasl.oauthbearer.method=oidc"]),
    ],
)
def test_what_a_properties_file_must_not_say(line: str, parts: list[str]) -> None:
    """Each problem names the line and what to do instead, and never shows a value."""
    with pytest.raises(UsageError) as raised:
        parse_properties(line, {})
    (problem,) = raised.value.problems
    for part in parts:
        assert part in problem
    assert "s3cret" not in problem


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    """One look at the messages is enough to mend the whole file."""
    text = "# fine\nnonsense\nacks=1\nok=1\na=${env:A}${env:B}\nsasl.jaas.config=x"
    with pytest.raises(UsageError) as raised:
        parse_properties(text, {})
    lines = [problem.split(" ")[1] for problem in raised.value.problems]
    assert lines == ["2", "3", "5", "5", "6"]


def test_settings_as_json() -> None:
    """As a manager of secrets may have them: checked the same, and PEM keeps its lines."""
    text = '{"ssl.key.pem": "-----BEGIN\\nx", "linger.ms": 5, "sasl.password": "${env:P}"}'
    assert parse_properties(text, {"P": "p"}) == {
        "ssl.key.pem": "-----BEGIN\nx",
        "linger.ms": "5",
        "sasl.password": "p",
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"acks": "1"}', "setting 1 sets acks, which the pipeline owns"),
        ('{"a": "b", "sasl.password": ["s3cret"]}', "setting 2 (sasl.password) is neither a text"),
        ('{"sasl.password": "s3cret"', "it is not JSON, in line 1"),
    ],
)
def test_json_that_does_not_fit(text: str, part: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_properties(text, {})
    (problem,) = raised.value.problems
    assert part in problem
    assert "s3cret" not in problem


class _Refused:
    """What librdkafka says of a login that a broker refuses."""

    def code(self) -> int:
        return int(KafkaError._AUTHENTICATION)

    def str(self) -> str:
        return "SASL authentication error: no"


class _Client:
    def __init__(self) -> None:
        self.logins: list[tuple[str, str]] = []

    def set_sasl_credentials(self, user: str, password: str) -> None:
        self.logins.append((user, password))


def test_a_refused_password_is_looked_for_anew(tmp_path: Path) -> None:
    """In whatever the settings are from; the client is given it if it is another one."""
    config = _config(tmp_path, "sasl.username=u\nsasl.password=old")
    settings, now = client_settings(config), [100.0]
    log = client.ErrorLog(
        again=lambda: client_settings(config), timer=lambda: now[0], run=lambda work: work()
    )
    ours = _Client()
    log.expect(settings)
    log.watch(ours)
    log(_Refused())
    assert ours.logins == []
    _config(tmp_path, "sasl.username=u\nsasl.password=new")
    log(_Refused())
    assert ours.logins == [], "not looked for again and again"
    now[0] += 60
    log(_Refused())
    log(_Refused())
    assert ours.logins == [("u", "new")]


class _Login(client.TokenLogin):
    """Gives a token that is good for so long; the next one says that it is."""

    kind = "test"

    def __init__(self, secs: float) -> None:
        super().__init__()
        self.secs, self.made = secs, 0

    def _make(self) -> tuple[Any, ...]:
        self.made += 1
        return f"token-{self.made}", client.time() + self.secs


def test_clients_that_ask_at_once_get_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that end soon are fetched anew for each token, which takes its time."""
    now = [1000.0]
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(client, clock, lambda: now[0])
    login = _Login(20)
    assert login("") == ("token-1", 1020)
    now[0] += 1
    login.check()
    assert login("") == ("token-1", 1020)
    now[0] += 1
    assert login("") == ("token-2", 1022)


def test_clients_that_nobody_polls_ask_for_tokens() -> None:
    """A producer that has nothing to write, a consumer that only commits, who asks now and then."""
    kinds = (client._Consumer, client._Producer, client._Admin)
    logins = [_Login(2) for _ in kinds]
    settings = {
        "bootstrap.servers": "127.0.0.1:1",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "OAUTHBEARER",
        "log_level": 0,
    }
    clients = [
        client._client(
            kind,
            {**settings, "oauth_cb": login}
            | ({"group.id": "g"} if kind is client._Consumer else {}),
        )
        for kind, login in zip(kinds, logins)
    ]
    begun = [login.made for login in logins]
    wait_until(
        lambda: all(login.made >= first + 2 for login, first in zip(logins, begun)),
        "a client does not ask",
        60,
    )
    clients[0].close()


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8}){0,3}", fullmatch=True).filter(
            lambda name: name != "acks" and not name.endswith(".acks")
        ),
        st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters="${}")),
        max_size=6,
    )
)
@settings(deadline=None)
def test_any_setting_comes_through_as_it_is(wanted: dict) -> None:
    """Names and values that are not ours to decide are not touched."""
    text = "\n".join(f"{name} = {value}" for name, value in wanted.items())
    assert parse_properties(text, {}) == wanted


@given(st.text(max_size=60), st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
@settings(deadline=None)
def test_any_text_is_read_or_refused(text: str, environ: dict) -> None:
    """Whatever is in the file, the answer is settings or a list of problems."""
    try:
        found = parse_properties(text, environ)
    except UsageError as error:
        assert error.problems
    else:
        assert all(isinstance(value, str) for value in found.values())


# -- files --------------------------------------------------------------------------------


def _config(tmp_path: Path, text: str) -> KafkaConfig:
    file = tmp_path / "kafka.properties"
    file.write_text(text)
    return KafkaConfig("main:9092", "g", str(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The option, the path and the reason, in one line."""
    path = tmp_path / "none.properties"
    with pytest.raises(UsageError) as raised:
        load_properties(str(path))
    assert raised.value.problems == (
        f"--kafka_config_file={path} cannot be read: No such file or directory",
    )


def test_a_folder_and_a_file_of_bytes_are_named(tmp_path: Path) -> None:
    """What is no text file is refused in one line too."""
    (tmp_path / "bytes").write_bytes(b"a=\xff")
    for path, reason in ((tmp_path, "directory"), (tmp_path / "bytes", "not UTF-8")):
        with pytest.raises(UsageError) as raised:
            load_properties(str(path))
        (problem,) = raised.value.problems
        assert str(path) in problem
        assert reason in problem


def test_problems_in_a_file_name_the_file(tmp_path: Path) -> None:
    """Each line says which file it is about."""
    config = _config(tmp_path, "a\nb")
    with pytest.raises(UsageError) as raised:
        load_properties(config.config_file or "")
    assert [problem.split(": ")[0] for problem in raised.value.problems] == [
        f"--kafka_config_file={config.config_file}"
    ] * 2


def test_the_environment_fills_in_a_file(tmp_path: Path) -> None:
    """Secrets come from the environment that is handed in."""
    config = _config(tmp_path, "sasl.password=${env:PASSWORD}")
    found = load_properties(config.config_file or "", {"PASSWORD": "p"})
    assert found == {"sasl.password": "p"}


# -- clients ------------------------------------------------------------------------------

FILE = """
security.protocol=SSL
linger.ms=7
client.id=mine
socket.keepalive.enable=false
response.linger.ms=8
response.bootstrap.servers=response:9092
error.linger.ms=9
error.message.max.bytes=500
schema.registry.url=http://registry
"""


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", {"bootstrap.servers": "main:9092", "linger.ms": "7"}),
        ("response.", {"bootstrap.servers": "response:9092", "linger.ms": "8"}),
        (
            "error.",
            {"bootstrap.servers": "main:9092", "linger.ms": "9", "message.max.bytes": "500"},
        ),
    ],
)
def test_each_client_gets_its_settings(tmp_path: Path, prefix: str, expected: dict) -> None:
    """Common settings go to all, those with a prefix to one, and over the common ones."""
    common = {"security.protocol": "SSL", "client.id": "mine", "socket.keepalive.enable": "false"}
    assert client_settings(_config(tmp_path, FILE), *filter(None, [prefix])) == common | expected


def test_without_a_file_there_is_a_default() -> None:
    """The brokers, a name to find us by, and connections that say that they are there."""
    assert client_settings(KafkaConfig("h:1", "g"), "error.") == {
        "bootstrap.servers": "h:1",
        "client.id": "beam-lambda-sink",
        "socket.keepalive.enable": True,
    }


def test_a_config_says_nothing_of_what_is_in_the_file(tmp_path: Path) -> None:
    """A config may be logged and pickled: it has the file's name, not its values."""
    config = _config(tmp_path, "sasl.password=s3cret")
    assert "s3cret" not in repr(config)


def test_the_file_says_how_much_is_fetched_ahead(tmp_path: Path, monkeypatch) -> None:
    """What the reader sets is a default; what a guarantee stands on is not."""
    monkeypatch.setattr(client, "_client", lambda kind, settings: settings)
    config = _config(tmp_path, "queued.min.messages=7")
    defaults = {"queued.min.messages": 50_000, "fetch.queue.backoff.ms": 20}
    settings: Any = client.make_consumer(config, **defaults)
    assert settings["queued.min.messages"] == "7"
    assert settings["fetch.queue.backoff.ms"] == 20
    assert settings["auto.offset.reset"] == "error"


@pytest.mark.parametrize(
    "wrong",
    [{"no.such.setting": "1"}, {"linger.ms": "soon"}, {"request.required.acks": "0"}],
)
def test_settings_that_librdkafka_refuses_are_one_line(wrong: dict) -> None:
    """The message is librdkafka's own, and says where to look."""
    with pytest.raises(UsageError) as raised:
        make_producer({"bootstrap.servers": "127.0.0.1:1", **wrong})
    text = str(raised.value)
    assert "\n" not in text
    assert "--kafka_config_file" in text


def test_a_refused_value_from_the_environment_is_not_shown(monkeypatch) -> None:
    """librdkafka quotes what it refuses, and that may have been a secret."""
    monkeypatch.setenv("A_SECRET", "s3cret")
    with pytest.raises(UsageError) as raised:
        make_producer({"bootstrap.servers": "127.0.0.1:1", "batch.size": "s3cret"})
    assert "batch.size" in str(raised.value)
    assert "s3cret" not in str(raised.value)
