"""Registry: what its answers mean, and that one which is out of reach is waited for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka.schema_registry import SchemaRegistryError

from transforms.errors import RegistryError, Stopped, UsageError
from transforms.schemas.registry import (
    MAX_ID,
    RegistryConfig,
    SchemaRegistry,
    check_settings,
    registry_settings,
)
from transforms.schemas.schema import AVRO, PROTOBUF, SchemaText

URL = "http://registry:8081"
CONFIG = RegistryConfig(URL)

REFUSED = OSError("Connection refused")
MISSING = SchemaRegistryError(404, 40403, "Schema not found")


def _schema(text: str, type: str | None = None, *references: Any) -> Any:
    return SimpleNamespace(schema_str=text, schema_type=type, references=list(references))


class _Client:
    """A client that answers with what it is given, an error by raising it."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def _answer(self, *question: Any) -> Any:
        self.asked.append(question)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def clear_caches(self) -> None:
        pass

    def get_schema(self, id: int, fmt: str | None = None) -> Any:
        return self._answer("schema", id, fmt)

    def get_version(self, subject: str, version: int, deleted: bool, fmt: str | None) -> Any:
        return SimpleNamespace(schema=self._answer("version", subject, version, fmt))

    def get_latest_version(self, subject: str) -> Any:
        return self._answer("latest", subject)

    def register_schema(self, subject: str, schema: Any, normalize: bool) -> Any:
        return self._answer("register", subject, schema.schema_str, schema.schema_type, normalize)

    def lookup_schema(self, subject: str, schema: Any, normalize: bool) -> Any:
        return self._answer("lookup", subject, schema.schema_str, schema.schema_type, normalize)


class _Stop:
    """An event nobody waits for: each wait moves the clock."""

    def __init__(self, after: float = 1e9) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self._after = after

    def wait(self, secs: float) -> bool:
        self.waits.append(secs)
        self.now += secs
        return self.now >= self._after


def _registry(
    *answers: Any, stop_after: float = 1e9, file: str | None = None
) -> tuple[SchemaRegistry, _Client, _Stop]:
    client, stop = _Client(*answers), _Stop(stop_after)
    made: Callable[..., Any] = lambda config, settings: client  # noqa: E731
    registry = SchemaRegistry(
        RegistryConfig(URL, file), made, timer=lambda: stop.now, random=lambda: 1.0
    )
    registry.stop = stop  # type: ignore[assignment]
    return registry, client, stop


def _file(folder: Path, *lines: str) -> str:
    path = folder / "kafka.properties"
    path.write_text("\n".join(lines))
    return str(path)


# -- schemas ------------------------------------------------------------------------------


def test_a_schema() -> None:
    """Avro is what a registry means when it names no format."""
    registry, client, _ = _registry(_schema('"int"'))
    assert registry.schema(7) == SchemaText(AVRO, '"int"')
    assert client.asked == [("schema", 7, None)]


def test_protobuf_is_asked_for_as_a_descriptor() -> None:
    """Its text would have to be compiled; what it imports is asked for alike."""
    reference = SimpleNamespace(name="item.proto", subject="item", version=3)
    registry, client, _ = _registry(
        _schema("text", PROTOBUF), _schema("AAAA", PROTOBUF, reference), _schema("BBBB", PROTOBUF)
    )
    item = SchemaText(PROTOBUF, "BBBB")
    assert registry.schema(7) == SchemaText(PROTOBUF, "AAAA", (("item.proto", item),))
    assert client.asked == [
        ("schema", 7, None),
        ("schema", 7, "serialized"),
        ("version", "item", 3, "serialized"),
    ]


def test_references_in_a_circle() -> None:
    """No registry should have them; they are followed once and not without end."""
    itself = SimpleNamespace(name="a.json", subject="a", version=1)
    registry, client, _ = _registry(_schema("{}", "JSON", itself))
    assert registry.schema(7) == SchemaText("JSON", "{}", (("a.json", SchemaText("JSON", "{}")),))
    assert len(client.asked) == 2


def test_a_schema_that_is_missing_is_not_asked_for_again_and_again() -> None:
    """But after a while, since another node of the registry may have come to know of it."""
    registry, client, stop = _registry(MISSING)
    assert registry.schema(7) is registry.schema(7) is None
    assert len(client.asked) == 1
    stop.now += 60
    client.answers = [_schema('"int"')]
    assert registry.schema(7) is not None


def test_ids_that_no_registry_has_are_not_asked_for() -> None:
    """Some registries answer such a question in a way that means nothing."""
    registry, client, _ = _registry(_schema('"int"'))
    assert registry.schema(MAX_ID + 1) is registry.schema(2**32 - 1) is None
    assert not client.asked


def test_what_is_kept_of_missing_ids_is_bounded() -> None:
    """Garbage may name any id."""
    registry, _, _ = _registry(MISSING)
    for id in range(2_500):
        assert registry.schema(id) is None
    assert len(registry._missing) <= 1_000


# -- out of reach -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        TimeoutError(),
        ValueError("Expecting value: line 1"),
        SchemaRegistryError(500, 50001, "Error in the backend data store"),
        SchemaRegistryError(502, -1, "Unknown Schema Registry Error: b'<html>'"),
        SchemaRegistryError(503, -1, ""),
        SchemaRegistryError(429, 42901, "Too many requests"),
        SchemaRegistryError(408, -1, "Timeout"),
        # A proxy's: the registry itself says which kind of thing is missing.
        SchemaRegistryError(404, -1, "Not Found"),
        SchemaRegistryError(404, None, "Not Found"),  # type: ignore[arg-type]
        SchemaRegistryError(404, 404, "HTTP 404 Not Found"),
    ],
)
def test_it_is_waited_for(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """However long it takes; with a warning at once and every 10 s, and a word when it is over."""
    registry, client, stop = _registry(*[error] * 20, _schema('"int"'))
    with caplog.at_level(logging.WARNING):
        assert registry.schema(7) == SchemaText(AVRO, '"int"')
    assert len(client.asked) == 21
    assert stop.waits[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0] and stop.waits[-1] == 5.0
    *warnings, last = [record.getMessage() for record in caplog.records]
    assert 5 <= len(warnings) <= stop.now / 10 + 1
    assert all("waiting for it, no record is given up" in warning for warning in warnings)
    assert last == f"schema registry at {URL}: it answers again"


def test_one_that_has_just_come_up_is_not_believed_to_know_all() -> None:
    """It may answer before it has loaded its schemas; a record is not given up for that."""
    registry, client, _ = _registry(REFUSED, MISSING, MISSING, _schema('"int"'))
    assert registry.schema(7) == SchemaText(AVRO, '"int"')
    assert len(client.asked) == 4


def test_what_is_missing_for_longer_than_that_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    registry, client, stop = _registry(REFUSED, MISSING)
    with caplog.at_level(logging.WARNING):
        assert registry.schema(7) is None
        asked = len(client.asked)
        assert stop.now > 10
        assert registry.schema(8) is None
    assert len(client.asked) == asked + 1
    assert caplog.messages[-1] == f"schema registry at {URL}: it answers again"


def test_nothing_is_waited_for_once_the_run_is_to_end() -> None:
    """What was asked for is left to the next run."""
    registry, _, stop = _registry(REFUSED, stop_after=7)
    with pytest.raises(Stopped, match="did not answer for schema 7 before the run was told to"):
        registry.schema(7)
    assert 7 <= stop.now < 13


def test_the_wait_ends_when_the_run_is_told_to_stop() -> None:
    """At once, and not when the wait would have been over."""
    registry, _, _ = _registry(REFUSED)
    registry.stop = threading.Event()
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            registry.schema(7)
        except Stopped as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    registry.stop.set()
    thread.join(60)
    assert len(failed) == 1


@pytest.mark.parametrize(("status", "code"), [(401, 401), (403, 40301), (400, -1), (422, 42201)])
def test_what_only_a_person_can_mend_ends_the_run(status: int, code: int) -> None:
    """One line with the address, the reason and where to look."""
    registry, client, stop = _registry(SchemaRegistryError(status, code, "no\nentry"))
    with pytest.raises(RegistryError) as raised:
        registry.schema(7)
    text = str(raised.value)
    assert f"--schema_registry_url={URL} does not give schema 7: no entry (HTTP {status})" in text
    assert "schema.registry.* in --kafka_config_file" in text
    assert len(client.asked) == 1 and not stop.waits


@pytest.mark.parametrize("answer", [MISSING, _schema('"int"')])
def test_the_check_takes_any_answer_of_a_registry(answer: Any) -> None:
    """It asks for what will be asked for later, by an id that nothing has."""
    registry, client, _ = _registry(answer)
    registry.check()
    assert client.asked == [("schema", MAX_ID, None)]


@pytest.mark.parametrize(
    "error",
    [
        REFUSED,
        SchemaRegistryError(401, 401, "Unauthorized"),
        SchemaRegistryError(404, -1, "Not Found"),
        SchemaRegistryError(503, -1, "away"),
    ],
)
def test_the_check_waits_for_nothing(error: Exception) -> None:
    """Before anything is read the user is there to hear of it."""
    registry, _, stop = _registry(error)
    with pytest.raises(RegistryError, match=f"--schema_registry_url={URL} does not give"):
        registry.check()
    assert not stop.waits


# -- logins -------------------------------------------------------------------------------

NO_LOGIN = SchemaRegistryError(401, 401, "Unauthorized: u:s3cret, Basic dTpzM2NyZXQ=")


def _login(folder: Path, password: str) -> str:
    return _file(folder, f"schema.registry.basic.auth.user.info=u:{password}")


def test_a_login_that_was_good_may_be_refused_for_a_while(tmp_path: Path) -> None:
    """Who changes a password changes the secret a little later. What is quoted is not told."""
    file = _login(tmp_path, "s3cret")
    registry, _, stop = _registry(_schema('"int"'), NO_LOGIN, file=file)
    registry.schema(7)
    with pytest.raises(RegistryError, match=r"schema 8: Unauthorized: \*\*\*, Basic \*\*\* \(HTTP"):
        registry.schema(8)
    assert 120 <= stop.now < 126


def test_another_login_is_taken_when_there_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By all who ask, though one of them finds it."""
    file, asking = _login(tmp_path, "s3cret"), threading.Barrier(2)

    class _Old(_Client):
        def get_schema(self, id: int, fmt: str | None = None) -> Any:
            asking.wait(60)
            _login(tmp_path, "new")
            asking.wait(60)
            raise NO_LOGIN

    new = _Client(_schema('"int"'))
    made: list[Any] = []

    def make(config: RegistryConfig, settings: Any) -> Any:
        made.append(settings.client["basic.auth.user.info"])
        return new if made[1:] else _Old()

    registry = SchemaRegistry(RegistryConfig(URL, file), make)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda id=id: found.append(registry.schema(id))) for id in (7, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [SchemaText(AVRO, '"int"')] * 2
    assert made == ["u:s3cret", "u:new"]
    assert "no answer for schema" in caplog.text and "s3cret" not in caplog.text


# -- subjects -----------------------------------------------------------------------------


def test_a_schema_is_registered() -> None:
    """Which is how Connect's converter has it too."""
    registry, client, _ = _registry(5)
    assert registry.subject_schema("t-key", '"string"') == (5, '"string"')
    assert client.asked == [("register", "t-key", '"string"', "AVRO", False)]


def test_a_schema_that_must_be_there(tmp_path: Path) -> None:
    """With auto.register.schemas=false it is only looked up."""
    file = _file(tmp_path, "schema.registry.auto.register.schemas=false")
    found = SimpleNamespace(schema_id=5)
    registry, client, _ = _registry(found, file=file)
    assert registry.subject_schema("t-key", '"string"') == (5, '"string"')
    assert client.asked == [("lookup", "t-key", '"string"', "AVRO", False)]


def test_the_newest_schema(tmp_path: Path) -> None:
    """With use.latest.version=true it is the one that is written."""
    file = _file(tmp_path, "schema.registry.use.latest.version=true")
    latest = SimpleNamespace(schema_id=9, schema=_schema('["null","string"]'))
    registry, client, _ = _registry(latest, file=file)
    assert registry.subject_schema("t-key", '"string"') == (9, '["null","string"]')
    assert client.asked == [("latest", "t-key")]


@pytest.mark.parametrize("line", ["auto.register.schemas=false", "use.latest.version=true"])
def test_a_subject_that_is_missing(tmp_path: Path, line: str) -> None:
    """Nothing can be written then."""
    missing = SchemaRegistryError(404, 40401, "Subject not found")
    registry, _, _ = _registry(missing, file=_file(tmp_path, f"schema.registry.{line}"))
    with pytest.raises(RegistryError, match="has no subject t-key with"):
        registry.subject_schema("t-key", '"string"')


def test_a_subject_with_another_schema() -> None:
    """The registry says that ours is not compatible."""
    error = SchemaRegistryError(409, 409, "Schema being registered is incompatible")
    registry, _, _ = _registry(error)
    with pytest.raises(RegistryError, match="does not give subject t-key: Schema being registered"):
        registry.subject_schema("t-key", '"string"')


# -- settings -----------------------------------------------------------------------------


def test_settings(tmp_path: Path) -> None:
    """Those with the prefix, without it; numbers as numbers; ours apart."""
    file = _file(
        tmp_path,
        "sasl.username=other",
        "schema.registry.basic.auth.credentials.source=USER_INFO",
        "schema.registry.basic.auth.user.info=name:word",
        "schema.registry.timeout=3",
        "schema.registry.use.latest.version=True",
        "schema.registry.normalize.schemas=true",
    )
    settings = registry_settings(RegistryConfig(URL, file))
    assert settings.client == {
        "url": URL,
        "timeout": 3.0,
        "max.retries": 0,
        "basic.auth.user.info": "name:word",
    }
    assert (settings.auto_register, settings.use_latest, settings.normalize) == (True, True, True)


def test_without_a_file() -> None:
    """A request does not wait for ever, as it would with the client's own default."""
    assert registry_settings(CONFIG).client == {"url": URL, "timeout": 10.0, "max.retries": 0}
    check_settings(CONFIG)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("url=http://other", "schema.registry.url is set; use --schema_registry_url"),
        ("basic.auth.credentials.source=SASL_INHERIT", "give schema.registry.basic.auth.user.info"),
        ("auto.register.schemas=yes", "is neither true nor false"),
        ("timeout=secret", "schema.registry.timeout is not a number"),
        ("ssl.ca.location=/not/there.pem", "ssl.ca.location=/not/there.pem is not there"),
        ("nonsense=secret", "Unrecognized properties: nonsense"),
        ("basic.auth.user.info=secret", "must be in the form"),
        ("ssl.truststore.location=/x", "a setting of Java clients"),
        ("ssl.key.location=-----BEGIN secret", "ssl.key.location is not there; give the path"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, line: str, why: str) -> None:
    """One line each, with the file and the name, and no value that may be a secret."""
    file = _file(tmp_path, f"schema.registry.{line}")
    with pytest.raises(UsageError) as raised:
        check_settings(RegistryConfig(URL, file))
    (problem,) = raised.value.problems
    assert problem.startswith(f"--kafka_config_file={file}: ")
    assert why in problem and "secret" not in problem
