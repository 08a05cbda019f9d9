"""Files that options name, here and in Google Cloud: names, what is said of them, what is kept."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from tests.servers.google_service import Google
from transforms import text_file
from transforms.errors import UsageError
from transforms.filter.filter import load_criteria
from transforms.properties import load_properties
from transforms.text_file import (
    CannotRead,
    RemoteTexts,
    Secret,
    StoredObject,
    fetch,
    is_remote,
    parse_remote,
    read_text,
)

SECRET = "secretmanager://projects/p/secrets/kafka/versions/3"
STORED = "gs://bucket/folder/kafka.properties"


# -- names -----------------------------------------------------------------------------------------

AWS_SECRET = (
    "aws-secretsmanager://arn:aws:secretsmanager:us-east-1:123456789012:secret:kafka-Ab12Cd"
)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (SECRET, Secret("projects/p/secrets/kafka/versions/3")),
        ("secretmanager://projects/p/secrets/s", Secret("projects/p/secrets/s/versions/latest")),
        ("secretmanager://p/s", Secret("projects/p/secrets/s/versions/latest")),
        ("secretmanager://p/s/7", Secret("projects/p/secrets/s/versions/7")),
        (
            "secretmanager://example.com:p/s",
            Secret("projects/example.com:p/secrets/s/versions/latest"),
        ),
        (
            "secretmanager://projects/p/locations/europe-west1/secrets/s",
            Secret("projects/p/locations/europe-west1/secrets/s/versions/latest", "europe-west1"),
        ),
        (STORED, StoredObject("bucket", "folder/kafka.properties")),
        ("gs://b-1.example.com/k", StoredObject("b-1.example.com", "k")),
    ],
)
def test_names_of_what_is_elsewhere(path: str, named: Secret | StoredObject) -> None:
    assert is_remote(path)
    assert parse_remote(path) == named


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("secretmanager://s", "secretmanager://projects/PROJECT"),
        ("secretmanager://projects/p/secrets/s/versions/", "secretmanager://projects/PROJECT"),
        ("secretmanager://projects/p/secret/s/version/1", "secretmanager://projects/PROJECT"),
        ("secretmanager://p/s/1/2", "secretmanager://projects/PROJECT"),
        ("secretmanager://p/a secret", "secretmanager://projects/PROJECT"),
        ("secretmanager://", "secretmanager://projects/PROJECT"),
        ("gs://", "gs://BUCKET/OBJECT"),
        ("gs://bucket", "gs://BUCKET/OBJECT"),
        ("gs://bucket/folder/", "gs://BUCKET/OBJECT"),
        ("gs:///object", "gs://BUCKET/OBJECT"),
        ("aws-secretsmanager://kafka", "aws-secretsmanager://arn:aws:secretsmanager:REGION"),
        (f"{AWS_SECRET[:24]}", "aws-secretsmanager://arn:aws:secretsmanager:REGION"),
    ],
)
def test_what_is_no_name_is_refused_before_anybody_is_asked(path: str, form: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_text("kafka_config_file", path)
    (problem,) = raised.value.problems
    assert problem.startswith(f"--kafka_config_file={path} cannot be read: it is not of the form ")
    assert form in problem


@pytest.mark.parametrize("path", ["kafka.properties", "/etc/gs://x", "", "s3://bucket/x"])
def test_other_names_are_files(path: str) -> None:
    assert not is_remote(path)


# -- what is kept ----------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Answers in turn; an exception is raised."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, path: str) -> bytes:
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_text_is_fetched_once_for_all_who_ask_and_anew_after_five_minutes() -> None:
    clock, store = Clock(), Store(b"a=1", b"a=2")
    texts = RemoteTexts(store, clock)
    assert {texts.get(STORED) for _ in range(1000)} == {"a=1"}
    clock.now = 299.9
    assert texts.get(STORED) == "a=1"
    assert store.asked == 1
    clock.now = 300.1
    assert {texts.get(STORED) for _ in range(1000)} == {"a=2"}
    assert store.asked == 2


def test_what_is_outdated_is_fetched_anew() -> None:
    """When a login was refused; but not again and again for each of many clients."""
    clock, store = Clock(), Store(b"1", b"2", CannotRead("gone"))
    texts = RemoteTexts(store, clock)
    assert texts.get(AWS_SECRET) == "1"
    texts.outdate()
    assert texts.get(AWS_SECRET) == "1"
    clock.now = 6
    texts.outdate()
    assert texts.get(AWS_SECRET) == "2"
    clock.now = 12
    texts.outdate()
    assert texts.get(AWS_SECRET) == "2", "what was known serves while it cannot be fetched"
    assert store.asked == 3


@mock_aws
def test_a_secret_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text or bytes; one that is not there is one line."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    client = boto3.client("secretsmanager", "us-east-1")
    arn = client.create_secret(Name="text", SecretString="a=1")["ARN"]
    assert fetch(f"aws-secretsmanager://{arn}") == b"a=1"
    arn = client.create_secret(Name="bytes", SecretBinary=b"a=2")["ARN"]
    assert fetch(f"aws-secretsmanager://{arn}") == b"a=2"
    with pytest.raises(CannotRead, match="ResourceNotFoundException: "):
        fetch(AWS_SECRET)


def test_each_path_is_its_own() -> None:
    texts = RemoteTexts(str.encode, Clock())
    assert [texts.get(path) for path in (STORED, SECRET, STORED)] == [STORED, SECRET, STORED]


def test_what_was_known_serves_while_it_cannot_be_fetched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, store = Clock(), Store(b"a=1", CannotRead("gone"), b"a=3")
    texts = RemoteTexts(store, clock)
    assert texts.get(STORED) == "a=1"
    clock.now = 301
    assert texts.get(STORED) == texts.get(STORED) == "a=1"
    assert store.asked == 2  # not for each who asks
    (warning,) = caplog.messages
    assert warning == f"{STORED}: gone; going on with what it was before"
    clock.now = 602
    assert texts.get(STORED) == "a=3"


def test_a_failure_is_kept_for_a_moment_only() -> None:
    """Many clients that are made at once do not each wait for what does not answer."""
    clock, store = Clock(), Store(CannotRead("not yet"), b"a=1")
    texts = RemoteTexts(store, clock)
    for _ in range(9):
        with pytest.raises(CannotRead, match="not yet"):
            texts.get(STORED)
    assert store.asked == 1
    clock.now = 5.1
    assert texts.get(STORED) == "a=1"


def test_threads_wait_for_one_fetch() -> None:
    begun = threading.Event()
    asked = []

    def slow(path: str) -> bytes:
        asked.append(path)
        begun.wait(5)
        return b"a=1"

    texts = RemoteTexts(slow, Clock())
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(texts.get(STORED))) for _ in range(20)]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join(10)
    assert found == ["a=1"] * 20
    assert asked == [STORED]


def test_bytes_that_are_no_text_are_refused_in_one_line() -> None:
    texts = RemoteTexts(Store(b"\xff\xfe"), Clock())
    with pytest.raises(UsageError, match="cannot be read: it is not UTF-8 text"):
        read_text("kafka_config_file", STORED, texts)


def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet in this process."""
    monkeypatch.setattr(text_file._remote_texts, "_texts", {})
    monkeypatch.setattr(text_file._remote_texts, "_failures", {})


# -- Google's clients ------------------------------------------------------------------------------


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    monkeypatch.setattr(text_file, "_TIMEOUT_SECS", 2.0)
    with Google() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def test_a_secret_and_an_object_are_read_as_they_are(google: Google) -> None:
    google.contents["projects/p/secrets/kafka/versions/3"] = b"sasl.password=a=b\n"
    google.contents["folder/kafka.properties"] = "# \u00e4\nlinger.ms=7\n".encode()
    assert fetch(SECRET) == b"sasl.password=a=b\n"
    assert fetch(STORED).decode() == "# ä\nlinger.ms=7\n"
    assert google.asked[0] == "/v1/projects/p/secrets/kafka/versions/3:access"
    assert "/b/bucket/o/folder%2Fkafka.properties" in google.asked[1]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "it does not exist"),
        (403, "; the account needs the role "),
        (400, "Permission 400"),
    ],
)
@pytest.mark.parametrize("path", [SECRET, STORED])
def test_a_refusal_is_one_line(google: Google, path: str, status: int, said: str) -> None:
    google.contents["projects/p/secrets/kafka/versions/3"] = status
    google.contents["folder/kafka.properties"] = status
    with pytest.raises(CannotRead) as raised:
        fetch(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", [SECRET, STORED])
def test_who_is_out_of_reach_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setattr(text_file, "_TIMEOUT_SECS", 1.0)
    before = time.monotonic()
    with pytest.raises(CannotRead) as raised:
        fetch(path)
    assert time.monotonic() - before < 20
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("path", [SECRET, STORED])
def test_without_credentials_there_is_advice(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/no/such/file.json")
    with pytest.raises(CannotRead, match="gcloud auth application-default login"):
        fetch(path)


@pytest.mark.parametrize(
    ("path", "module"),
    [(SECRET, "google.cloud.secretmanager"), (STORED, "google.cloud.storage")],
)
def test_without_google_s_libraries_it_is_said_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, path: str, module: str
) -> None:
    _fresh(monkeypatch)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as raised:
        load_properties(path)
    assert raised.value.problems == (
        f"--kafka_config_file={path} cannot be read: Google's libraries are not installed: "
        f"pip install 'beam-lambda-sink[gcp]'",
    )


@pytest.mark.parametrize(
    ("load", "content", "expected"),
    [
        (load_properties, b"\xef\xbb\xbfsasl.password=hunter2", {"sasl.password": "hunter2"}),
        (load_criteria, b'{"Filters": [{"Pattern": {"topic": ["t"]}}]}', ('{"topic":["t"]}',)),
    ],
)
def test_options_take_such_names(
    google: Google,
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[str], Any],
    content: bytes,
    expected: Any,
) -> None:
    _fresh(monkeypatch)
    google.contents["folder/kafka.properties"] = content
    for _ in range(5):
        assert load(STORED) == expected
    assert len(google.asked) == 1


def test_a_line_of_a_secret_that_is_none_is_not_shown(
    google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fresh(monkeypatch)
    google.contents["projects/p/secrets/kafka/versions/3"] = b"hunter2\ngroup.id=hunter2\n"
    with pytest.raises(UsageError) as raised:
        load_properties(SECRET)
    assert [problem.split(": ")[1][:7] for problem in raised.value.problems] == [
        "line 1 ",
        "line 2 ",
    ]
    assert "hunter2" not in str(raised.value)


def test_a_file_of_this_machine_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    for text in ("a=1", "a=2"):
        file.write_text(text)
        assert read_text("kafka_config_file", str(file)) == text
