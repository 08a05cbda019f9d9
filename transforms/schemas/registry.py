"""Registry: this process's client of a Confluent schema registry. No Beam.

A registry that is out of reach is waited for: what cannot be asked now is no reason to give up a
record. What only a person can mend (a refused login, a wrong setting) ends the run.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from transforms import text_file
from transforms.access import Access, AccessError
from transforms.access import registry_settings as access_settings
from transforms.errors import RegistryError, Stopped, UsageError
from transforms.hidden import hide
from transforms.per_process import per_process
from transforms.properties import SCHEMA_REGISTRY_PREFIX, load_properties
from transforms.schemas.schema import AVRO, PROTOBUF, SchemaText

if TYPE_CHECKING:
    # Imported where it is used: it takes a quarter of a second, and few runs have a registry.
    from confluent_kafka.schema_registry import SchemaRegistryClient

_LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

_TIMEOUT_SECS = 10.0
_FIRST_DELAY_SECS, _LONGEST_DELAY_SECS = 0.2, 5.0
_WARN_SECS = 10.0
# How often a login that is refused is looked for anew.
_LOOK_SECS = 5.0
# A password is changed first, and what is kept of it a little later. So for some time a login that
# was good before may be refused.
_CHANGE_SECS = 120.0
# A schema is there before the first record that names it, so one that is missing stays missing;
# but another node of the registry may come to know of it a little later.
_MISSING_SECS = 10.0
_MISSING_IDS = 1_000
# A registry that comes up may answer before it has loaded what it has to know. So for some time
# after it was out of reach it is not believed that it knows something not.
_SETTLE_SECS = 10.0

MAX_ID = 2**31 - 1

_NUMBERS = (
    "timeout",
    "max.retries",
    "retries.wait.ms",
    "retries.max.wait.ms",
    "cache.capacity",
    "cache.latest.ttl.sec",
)
_FLAGS = {"auto.register.schemas": True, "use.latest.version": False, "normalize.schemas": False}


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Where the registry is. Holds the name of the settings file, never what is in it.

    Attributes:
        url: Its address; of several nodes of one registry, with commas between them.
        config_file: Properties file that may hold its settings, or None.
        access: Logins as event source mappings name them; the file has the last word.
    """

    url: str
    config_file: str | None = None
    access: tuple[Access, ...] = ()


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """What the properties file says of the registry.

    Attributes:
        client: Settings of confluent-kafka's client.
        auto_register: Whether schemas of ours are registered when they are missing.
        use_latest: Whether the newest schema of a subject is written in place of ours.
        normalize: Whether the registry normalizes schemas before it compares them.
        pem: Settings that name a file, by what has to be in it.
    """

    client: dict[str, Any]
    auto_register: bool = True
    use_latest: bool = False
    normalize: bool = False
    pem: dict[str, str] = field(default_factory=dict)


def registry_settings(config: RegistryConfig) -> RegistrySettings:
    """Read the settings.

    Raises:
        UsageError: With all that do not fit. Never shows a value.
    """
    properties = load_properties(config.config_file) if config.config_file else {}
    prefix = SCHEMA_REGISTRY_PREFIX
    given = {k[len(prefix) :]: v for k, v in properties.items() if k.startswith(prefix)}
    problems = []
    client: dict[str, Any] = {"timeout": _TIMEOUT_SECS, "max.retries": 0}
    try:
        login, pem = access_settings(config.access, _secret)
    except AccessError as error:
        raise UsageError([f"--schema_registry_access: {error}"]) from None
    client |= login
    flags = dict(_FLAGS)
    for name, value in given.items():
        if name == "url":
            problems.append(f"{prefix}url is set; use --schema_registry_url")
        elif name == "basic.auth.credentials.source":
            # A setting of Java clients; the first of its values is how it is here anyway.
            if value != "USER_INFO":
                problems.append(f"{prefix}{name} is not known; give {prefix}basic.auth.user.info")
        elif name in flags:
            if value.lower() not in ("true", "false"):
                problems.append(f"{prefix}{name} is neither true nor false")
            flags[name] = value.lower() == "true"
        elif name in _NUMBERS:
            try:
                client[name] = float(value)
            except ValueError:
                problems.append(f"{prefix}{name} is not a number")
        else:
            client[name] = value
            if name.startswith("ssl.") and name.endswith(".location") and not os.path.exists(value):
                # It may be the certificate itself, or the key.
                shown = f"{prefix}{name}" if "-----" in value else f"{prefix}{name}={value}"
                problems.append(f"{shown} is not there; give the path of a file")
    if problems:
        raise UsageError([f"--kafka_config_file={config.config_file}: {p}" for p in problems])
    pem = {name: text for name, text in pem.items() if name not in client}
    register, latest, normalize = flags.values()
    return RegistrySettings({"url": config.url, **client}, register, latest, normalize, pem)


def _secret(arn: str) -> str:
    return text_file.read_text("schema_registry_access", text_file.AWS_SCHEME + arn)


def make_client(config: RegistryConfig, settings: RegistrySettings) -> SchemaRegistryClient:
    """confluent-kafka's client; asks nothing yet.

    Raises:
        UsageError: It refuses the settings.
    """
    from confluent_kafka.schema_registry import SchemaRegistryClient

    try:
        with tempfile.TemporaryDirectory() as folder:
            # It reads them while it is made, and from files only. Nobody else may read the folder.
            files = {}
            for name, text in settings.pem.items():
                files[name] = os.path.join(folder, name)
                with open(files[name], "w", encoding="utf-8") as written:
                    written.write(text)
            return SchemaRegistryClient({**settings.client, **files})
    except (OSError, TypeError, ValueError) as error:
        file = f"--kafka_config_file={config.config_file}" if config.config_file else "settings"
        why = hide(str(error), settings.client)
        raise UsageError([f"{file}: {SCHEMA_REGISTRY_PREFIX}*: {why}"]) from None


def check_settings(config: RegistryConfig) -> None:
    """Whether a client can be made.

    Raises:
        UsageError: It cannot.
    """
    make_client(config, registry_settings(config))


class SchemaRegistry:
    """Asks the registry, and waits for it while it is out of reach.

    Args:
        config: Where it is.
        make: Makes the client; injected for tests, as are the next two.
        timer: Monotonic seconds.
        random: From 0 to 1.

    Attributes:
        stop: Once it is set nothing is waited for any more.
    """

    def __init__(
        self,
        config: RegistryConfig,
        make: Callable[[RegistryConfig, RegistrySettings], SchemaRegistryClient] = make_client,
        timer: Callable[[], float] = monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.stop = threading.Event()
        self._url = config.url
        self._settings = registry_settings(config)
        self._client = make(config, self._settings)
        self._config = config
        self._make = make
        # Who asks may do so on several threads.
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._is_known = False
        self._refused_at: float | None = None
        self._timer = timer
        self._random = random
        self._missing: dict[int, float] = {}
        self._failed_at = float("-inf")

    def check(self) -> None:
        """Ask for a schema once, without waiting.

        Raises:
            RegistryError: There is no answer, or none that a registry would give.
        """
        try:
            self._fetch(MAX_ID)
        except Exception as error:
            if not _is_missing(error):
                raise self._refused("a look-up", error) from None
        self._is_known = True

    def schema(self, id: int) -> SchemaText | None:
        """The schema of an id, None if there is none.

        Raises:
            RegistryError: The registry refuses to say.
            Stopped: It is out of reach, and the run is to end.
        """
        if id > MAX_ID or self._missing.get(id, 0.0) > self._timer():
            return None
        schema = self._ask(f"schema {id}", lambda: self._fetch(id))
        if schema is None:
            if len(self._missing) >= _MISSING_IDS:
                self._missing.clear()
            self._missing[id] = self._timer() + _MISSING_SECS
        return schema

    def subject_schema(self, subject: str, schema: str) -> tuple[int, str]:
        """What to write records of a subject with: an id, and the Avro schema.

        Registers the schema if it is missing and the settings do not say otherwise.

        Args:
            subject: ``<topic>-key`` or ``<topic>-value``.
            schema: The Avro schema of what we write.

        Raises:
            RegistryError: The subject has no such schema and will not take it.
            Stopped: The registry is out of reach, and the run is to end.
        """
        from confluent_kafka.schema_registry import Schema

        ours = Schema(schema, AVRO)

        def ask() -> tuple[int | None, str | None]:
            client, settings = self._client, self._settings
            if settings.use_latest:
                latest = client.get_latest_version(subject)
                return latest.schema_id, latest.schema.schema_str
            if settings.auto_register:
                return client.register_schema(subject, ours, settings.normalize), schema
            return client.lookup_schema(subject, ours, settings.normalize).schema_id, schema

        found = self._ask(f"subject {subject}", ask)
        if found is None or found[0] is None or found[1] is None:
            wanted = "a schema" if self._settings.use_latest else "the schema that is written"
            raise RegistryError(
                f"the schema registry at {self._url} has no subject {subject} with {wanted}; "
                f"register it, or leave out auto.register.schemas and use.latest.version"
            )
        return found[0], found[1]

    # -- asking ----------------------------------------------------------------------------

    def _fetch(self, id: int) -> SchemaText:
        # Its cache makes no difference between a schema's forms; what is fetched is kept by ours.
        self._client.clear_caches()
        schema = self._client.get_schema(id)
        if schema.schema_type == PROTOBUF:
            self._client.clear_caches()
            schema = self._client.get_schema(id, fmt="serialized")
        return self._with_references(schema)

    def _with_references(self, schema: Any, above: frozenset[Any] = frozenset()) -> SchemaText:
        format = schema.schema_type or AVRO
        form = "serialized" if format == PROTOBUF else None
        references = []
        for reference in schema.references or ():
            place = reference.subject, reference.version
            # In a circle there is no end to them; whoever needs it finds it by its name.
            if place not in above:
                found = self._client.get_version(*place, True, form)
                inner = self._with_references(found.schema, above | {place})
                references.append((reference.name, inner))
        return SchemaText(format, schema.schema_str or "", tuple(references))

    def _ask(self, what: str, ask: Callable[[], T]) -> T | None:
        """The answer, None for a 404; asks again until there is one."""
        delay_secs, warned, failed = _FIRST_DELAY_SECS, float("-inf"), False
        while True:
            answer, why, client, settings = None, None, self._client, self._settings
            try:
                answer = ask()
            except Exception as error:
                why = self._why_not(what, error, client, settings)
            if why is None:
                self._is_known, self._refused_at = True, None
                if failed:
                    _LOGGER.warning("schema registry at %s: it answers again", self._url)
                return answer
            failed = True
            if self._timer() - warned >= _WARN_SECS:
                warned = self._timer()
                _LOGGER.warning(
                    "schema registry at %s: no answer for %s: %s; waiting for it, no record is "
                    "given up",
                    self._url,
                    what,
                    why,
                )
            if self.stop.wait(self._random() * delay_secs):
                raise Stopped(
                    f"the schema registry at {self._url} did not answer for {what} before the "
                    f"run was told to stop: {why}"
                )
            delay_secs = min(2 * delay_secs, _LONGEST_DELAY_SECS)

    def _why_not(
        self, what: str, error: Exception, client: Any, settings: RegistrySettings
    ) -> str | None:
        """Why there is no answer yet; None if the answer is that there is no such thing."""
        if _is_missing(error):
            if self._timer() - self._failed_at > _SETTLE_SECS:
                return None
        elif _is_transient(error):
            self._failed_at = self._timer()
            if self._settings.pem and _status(error) is None:
                # A certificate that is over makes no connection.
                self._log_in_anew(client)
        elif not (_status(error) in (401, 403) and self._may_be_let_in(client)):
            raise self._refused(what, error) from None
        # The login may be another one by now, and the old one is what is quoted.
        return hide(self._reason(error, settings), self._settings.client)

    def _may_be_let_in(self, client: Any) -> bool:
        """Whether one whose login was refused is to ask again: with another one, or later."""
        if self._log_in_anew(client):
            self._refused_at = None
            return True
        now = self._timer()
        self._refused_at = now if self._refused_at is None else self._refused_at
        return self._is_known and now - self._refused_at < _CHANGE_SECS

    def _log_in_anew(self, client: Any) -> bool:
        """Whether there is another login than that of the client; then it is taken."""
        with self._lock:
            if client is not self._client:
                return True  # another thread has found it
            if self._timer() - self._looked < _LOOK_SECS:
                return False
            self._looked = self._timer()
            text_file.outdate()
            try:
                settings = registry_settings(self._config)
                if settings == self._settings:
                    return False
                self._client = self._make(self._config, settings)
            except UsageError as error:
                _LOGGER.warning("schema registry at %s: no other login: %s", self._url, error)
                return False
            self._settings = settings
            return True

    def _reason(self, error: Exception, settings: RegistrySettings) -> str:
        """What went wrong with a client of these settings, as one line."""
        status = _status(error)
        text = getattr(error, "error_message", None) or str(error) or type(error).__name__
        text = " ".join(hide(text, settings.client).split())[:200]
        return f"{text} (HTTP {status})" if status else text

    def _refused(self, what: str, error: Exception) -> RegistryError:
        why = self._reason(error, self._settings)
        return RegistryError(
            f"--schema_registry_url={self._url} does not give {what}: {why}; "
            f"check the address, and {SCHEMA_REGISTRY_PREFIX}* in --kafka_config_file"
        )


def _is_missing(error: Exception) -> bool:
    # The code says that it is the registry that speaks, and not a proxy in front of it.
    code = getattr(error, "error_code", None) or 0
    return getattr(error, "http_status_code", None) == 404 and code // 100 == 404


def _status(error: Exception) -> int | None:
    """Of the answer; None if there was none."""
    return getattr(error, "http_status_code", None)


def _is_transient(error: Exception) -> bool:
    """Whether the registry may answer later: no connection, 5xx, too many requests."""
    status = _status(error)
    return status is None or status in (404, 408, 429) or status >= 500


def shared_registry(config: RegistryConfig) -> SchemaRegistry:
    """This process's client of the registry."""
    return per_process(SchemaRegistry, config)
