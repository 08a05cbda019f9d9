"""Text files that options name: here, in Cloud Storage or in a manager of secrets. No Beam.

What is elsewhere is kept for a while, since every client that a worker makes asks for its settings;
and longer, with a warning, while it cannot be fetched anew.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from transforms.errors import UsageError
from transforms.hidden import quiet, without_request

_LOGGER = logging.getLogger(__name__)

SECRET_FORM = "secretmanager://projects/PROJECT/secrets/SECRET/versions/latest"
GCS_FORM = "gs://BUCKET/OBJECT"
AWS_SCHEME = "aws-secretsmanager://"
AWS_FORM = f"{AWS_SCHEME}arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME"

_KEPT_SECS = 300.0
# So that not each of many clients waits in turn for what does not answer.
_FAILURE_KEPT_SECS = 5.0
# How often many clients whose login is refused may have the same fetched.
_RENEW_SECS = 5.0
_TIMEOUT_SECS = 20.0

_PART = r"[A-Za-z0-9._:-]+"
_SECRET = re.compile(
    rf"projects/(?P<project>{_PART})(?:/locations/(?P<location>{_PART}))?"
    rf"/secrets/(?P<secret>{_PART})(?:/versions/(?P<version>{_PART}))?"
)
_SHORT_SECRET = re.compile(rf"(?P<project>{_PART})/(?P<secret>{_PART})(?:/(?P<version>{_PART}))?")
_AWS_SECRET = re.compile(
    r"arn:aws[a-zA-Z-]*:secretsmanager:(?P<region>[a-z0-9-]+):\d{12}:secret:[A-Za-z0-9/_+=.@!-]+"
)
_OBJECT = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9._-]*)/(?P<name>.*[^/])")


@dataclass(frozen=True, slots=True)
class Secret:
    """A version of a secret.

    Attributes:
        name: As Secret Manager has it: ``projects/P/secrets/S/versions/V``.
        location: Of a regional secret, None for a global one.
    """

    name: str
    location: str | None = None


@dataclass(frozen=True, slots=True)
class AwsSecret:
    """The current version of a secret in AWS Secrets Manager."""

    arn: str
    region: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in Cloud Storage."""

    bucket: str
    name: str


def is_remote(path: str) -> bool:
    """Whether a path names something that is not on this machine."""
    return path.startswith(("gs://", "secretmanager://", AWS_SCHEME))


def parse_remote(path: str) -> Secret | StoredObject | AwsSecret:
    """What such a path names. Pure.

    A secret may be written without its version, which then is the latest, and in short as
    ``secretmanager://PROJECT/SECRET`` or ``secretmanager://PROJECT/SECRET/VERSION``.

    Raises:
        ValueError: It is not of the form.
    """
    scheme, _, rest = path.partition("://")
    if path.startswith(AWS_SCHEME):
        arn = _AWS_SECRET.fullmatch(rest)
        if not arn:
            raise ValueError(f"it is not of the form {AWS_FORM}")
        return AwsSecret(rest, arn["region"])
    if scheme == "gs":
        stored = _OBJECT.fullmatch(rest)
        if not stored:
            raise ValueError(f"it is not of the form {GCS_FORM}")
        return StoredObject(stored["bucket"], stored["name"])
    found = _SECRET.fullmatch(rest) or _SHORT_SECRET.fullmatch(rest)
    if not found:
        raise ValueError(f"it is not of the form {SECRET_FORM}")
    parts = found.groupdict()
    location = parts.get("location")
    place = f"/locations/{location}" if location else ""
    name = f"projects/{parts['project']}{place}/secrets/{parts['secret']}"
    return Secret(f"{name}/versions/{parts['version'] or 'latest'}", location)


class CannotRead(Exception):
    """Something elsewhere cannot be read; says why in half a line, never what is in it."""


def fetch(path: str) -> bytes:
    """Get what a path that is not on this machine names, by Google's or AWS's own clients.

    Raises:
        CannotRead: There is no such thing, it may not be read, or it cannot be reached.
    """
    try:
        named = parse_remote(path)
    except ValueError as error:
        raise CannotRead(str(error)) from None
    if isinstance(named, AwsSecret):
        return _aws_secret(named)
    module = "google.cloud.secretmanager" if isinstance(named, Secret) else "google.cloud.storage"
    try:
        client = importlib.import_module(module)
    except ImportError:
        raise CannotRead(
            "Google's libraries are not installed: pip install 'beam-lambda-sink[gcp]'"
        ) from None
    # They came with the module.
    from google.api_core import exceptions as api_errors
    from google.auth import exceptions as auth_errors

    role = (
        "Secret Manager Secret Accessor" if isinstance(named, Secret) else "Storage Object Viewer"
    )
    try:
        if isinstance(named, Secret):
            return _secret(client, named)
        return _stored(client, named)
    except api_errors.NotFound:
        raise CannotRead("it does not exist") from None
    except (api_errors.Forbidden, api_errors.Unauthorized) as error:
        raise CannotRead(f"{_line(error.message)}; the account needs the role {role}") from None
    except auth_errors.DefaultCredentialsError:
        raise CannotRead(
            "there are no Google credentials: run gcloud auth application-default login, or use a "
            "machine that has a service account"
        ) from None
    except (api_errors.GoogleAPIError, auth_errors.GoogleAuthError, OSError) as error:
        raise CannotRead(_line(error)) from None


def _line(error: object) -> str:
    return " ".join(without_request(str(error)).split()).rstrip(".")[:300]


def _secret(secretmanager: Any, secret: Secret) -> bytes:
    host = f"secretmanager.{secret.location}.rep.googleapis.com" if secret.location else None
    # The variable is the one of gcloud, for private endpoints.
    other = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER", "").rstrip("/")
    # Not gRPC: it leaves threads behind, and workers are forked from this process.
    settings: dict[str, Any] = {
        "client_options": {"api_endpoint": other or host},
        "transport": "rest",
    }
    if other.startswith("http://"):
        # No credentials go where anybody may listen.
        from google.auth.credentials import AnonymousCredentials

        settings["credentials"] = AnonymousCredentials()
    with secretmanager.SecretManagerServiceClient(**settings) as client:
        answer = client.access_secret_version(name=secret.name, timeout=_TIMEOUT_SECS)
    return bytes(answer.payload.data)


def _aws_secret(secret: AwsSecret) -> bytes:
    import boto3
    import botocore.exceptions as aws_errors
    from botocore.config import Config

    quiet()
    settings = Config(connect_timeout=4, read_timeout=10, retries={"total_max_attempts": 2})
    try:
        # A session of its own: the one that boto3 keeps is not for several threads.
        client = boto3.Session().client("secretsmanager", secret.region, config=settings)
        answer = client.get_secret_value(SecretId=secret.arn)
    except aws_errors.ClientError as error:
        found = error.response.get("Error", {})
        what = _line(f"{found.get('Code')}: {found.get('Message')}")
        refused = "AccessDenied" in str(found.get("Code"))
        right = "; it needs the right secretsmanager:GetSecretValue" if refused else ""
        raise CannotRead(f"{what}{right}") from None
    except aws_errors.NoCredentialsError:
        raise CannotRead("AWS's default chain finds no credentials") from None
    except (aws_errors.BotoCoreError, ValueError) as error:
        raise CannotRead(_line(error)) from None
    text = answer.get("SecretString")
    return bytes(answer["SecretBinary"]) if text is None else str(text).encode()


def _stored(storage: Any, stored: StoredObject) -> bytes:
    from google.cloud.storage.retry import DEFAULT_RETRY

    blob = storage.Client(project=None).bucket(stored.bucket).blob(stored.name)
    retry = DEFAULT_RETRY.with_timeout(_TIMEOUT_SECS)
    return bytes(blob.download_as_bytes(timeout=_TIMEOUT_SECS, retry=retry))


class RemoteTexts:
    """What was fetched, for all clients of this process. Thread-safe.

    Args:
        fetch: Gets the bytes; injected for tests, as is the next.
        timer: Monotonic seconds.
    """

    def __init__(
        self, fetch: Callable[[str], bytes] = fetch, timer: Callable[[], float] = monotonic
    ) -> None:
        self._fetch = fetch
        self._timer = timer
        self._lock = threading.Lock()
        self._texts: dict[str, tuple[float, str]] = {}
        self._failures: dict[str, tuple[float, CannotRead]] = {}

    def get(self, path: str) -> str:
        """The text, fetched anew when it is older than five minutes.

        Raises:
            CannotRead: It cannot be fetched, and never was.
            UnicodeDecodeError: It is not UTF-8.
        """
        with self._lock:
            fetched, text = self._texts.get(path, (float("-inf"), ""))
            if self._timer() - fetched < _KEPT_SECS:
                return text
            failed, failure = self._failures.get(path, (float("-inf"), CannotRead()))
            if self._timer() - failed < _FAILURE_KEPT_SECS:
                raise failure
            try:
                text = self._fetch(path).decode("utf-8-sig")
            except CannotRead as error:
                if path not in self._texts:
                    self._failures[path] = (self._timer(), error)
                    raise
                _LOGGER.warning("%s: %s; going on with what it was before", path, error)
            self._texts[path] = (self._timer(), text)
            return text

    def outdate(self) -> None:
        """Have what is older than a few seconds fetched anew when it is asked for."""
        with self._lock:
            for path, (fetched, text) in self._texts.items():
                if self._timer() - fetched >= _RENEW_SECS:
                    self._texts[path] = (float("-inf"), text)


_remote_texts = RemoteTexts()


def outdate() -> None:
    """See `RemoteTexts.outdate`; for what was fetched before in this process."""
    _remote_texts.outdate()


def read_text(option: str, path: str, texts: RemoteTexts = _remote_texts) -> str:
    """The text of the file that an option names.

    Args:
        option: Without the dashes, for the message.
        path: A file, or a ``gs://``, ``secretmanager://`` or ``aws-secretsmanager://`` name.
        texts: What was fetched before.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        if is_remote(path):
            return texts.get(path)
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
    except OSError as error:
        why = str(error.strerror)
    except (CannotRead, ValueError) as error:
        why = str(error)
    shown = path if path.isprintable() else repr(path)
    raise UsageError([f"--{option}={shown} cannot be read: {why}"])
