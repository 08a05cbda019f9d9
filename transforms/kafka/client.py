"""Kafka clients: settings from an options value and a properties file. No Beam.

The properties file takes anything librdkafka takes. Settings without a prefix go to every client;
``response.`` and ``error.`` go to the producer of that topic only. ``${env:NAME}`` is replaced by
the environment variable, so that no secret has to be in the file. It may be in Secret Manager too:
see `transforms.text_file`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic, time
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from transforms import text_file
from transforms.access import Access, AccessError, kafka_settings
from transforms.aws.msk import TokenConfig, TokenError, Tokens
from transforms.errors import KafkaError, UsageError, one_line
from transforms.hidden import HIDDEN, LEAST, hide, quiet
from transforms.kafka.login import AwsLogin, LoginError, explain_refusal, put_over, take_iam
from transforms.kafka.oidc import AuthorityError, TokenRequest, ask, take_oidc
from transforms.per_process import per_process
from transforms.properties import PREFIXES, load_properties

_LOGGER = logging.getLogger(__name__)

# What a broker answers that has just begun: it knows no coordinator for the group yet.
NO_COORDINATOR = frozenset(
    {
        ErrorCode.NOT_COORDINATOR,
        ErrorCode.COORDINATOR_NOT_AVAILABLE,
        ErrorCode.COORDINATOR_LOAD_IN_PROGRESS,
    }
)

# While a partition gets a leader, its first one or another. Unlike a consumer, a client that asks
# does not wait for that.
NO_LEADER = frozenset(
    {
        ErrorCode.LEADER_NOT_AVAILABLE,
        ErrorCode.NOT_LEADER_FOR_PARTITION,
        ErrorCode.REPLICA_NOT_AVAILABLE,
        ErrorCode.KAFKA_STORAGE_ERROR,
        ErrorCode.FENCED_LEADER_EPOCH,
        ErrorCode.UNKNOWN_LEADER_EPOCH,
        ErrorCode.OFFSET_NOT_AVAILABLE,
    }
)

# With IAM, what is missing where Kafka says that something is not authorized.
_RIGHTS = {
    ErrorCode.TOPIC_AUTHORIZATION_FAILED: "kafka-cluster:ReadData to read it, WriteData to write "
    "it, DescribeTopic for both",
    ErrorCode.GROUP_AUTHORIZATION_FAILED: "kafka-cluster:DescribeGroup and AlterGroup",
    ErrorCode.CLUSTER_AUTHORIZATION_FAILED: "kafka-cluster:WriteDataIdempotently",
}

# Settings of a consumer as a member of its group.
_OF_MEMBERS = frozenset(
    {
        "group.instance.id",
        "group.protocol",
        "group.remote.assignor",
        "heartbeat.interval.ms",
        "max.poll.interval.ms",
        "partition.assignment.strategy",
        "session.timeout.ms",
    }
)

_WARN_SECS = 30.0
_LOOK_SECS = 5.0
_NOT_SET = "OAuth token not set"
_BEARER = "sasl.oauthbearer."
_NO_TOKEN = "OAuth callback raised exception"
# The part of a token's time in which who asks gets the one that is there.
_NEW_SHARE = 0.1
# What a client logs in with: one that runs takes another user and password, and nothing else.
_OF_LOGINS = ("sasl.", "ssl.", "https.")
_REFUSALS = frozenset({ErrorCode._AUTHENTICATION, ErrorCode._SSL})
# Of a certificate, which TLS refuses once the connection is there.
_TLS_REFUSAL = "tls alert"


@dataclass(frozen=True, slots=True)
class KafkaConfig:
    """Where Kafka is. Holds the name of the settings file, never what is in it.

    Attributes:
        bootstrap_servers: Comma separated host:port list.
        group: Consumer group whose committed offsets are the durable truth.
        config_file: Properties file, or None.
        login: What options say of a login with IAM.
        access: Logins as event source mappings name them; the properties file has the last word.
    """

    bootstrap_servers: str
    group: str
    config_file: str | None = None
    login: AwsLogin = AwsLogin()
    access: tuple[Access, ...] = ()


def client_settings(config: KafkaConfig, *prefixes: str) -> dict[str, Any]:
    """Settings of one client: the common ones, then those with its prefixes.

    With IAM, what makes tokens is among them, and with a login what looks for another one when it
    is refused; both belong to this process.

    Raises:
        UsageError: The settings file cannot be read, or what is in it does not fit.
    """
    given = _given(config, *prefixes)
    try:
        settings, tokens = take_iam(given, config.login)
    except LoginError as error:
        raise UsageError([f"Kafka settings: {error}"]) from None
    settings, request = take_oidc(settings)
    if tokens:
        settings["oauth_cb"] = per_process(IamLogin, tokens)
    elif request:
        settings["oauth_cb"] = OidcLogin(request, lambda: take_oidc(_given(config, *prefixes))[1])
    if any(name.startswith(_OF_LOGINS) for name in given):
        again = partial(client_settings, config, *prefixes)
        settings["error_cb"] = ErrorLog(tokens, again)
    return settings


def _given(config: KafkaConfig, *prefixes: str) -> dict[str, Any]:
    """What the settings file and the ways in say, with what is for us among it."""
    settings: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap_servers,
        "client.id": "beam-lambda-sink",
        # Else a connection that was forgotten on its way is found out at the next request only.
        "socket.keepalive.enable": True,
    }
    try:
        settings |= kafka_settings(config.access, _secret, config.login.region)
    except AccessError as error:
        raise UsageError([f"--kafka_access: {error}"]) from None
    if config.config_file:
        properties = load_properties(config.config_file)
        common = {k: v for k, v in properties.items() if not k.startswith(PREFIXES)}
        settings = put_over(settings, common)
        for prefix in prefixes:
            own = {k[len(prefix) :]: v for k, v in properties.items() if k.startswith(prefix)}
            settings = put_over(settings, own)
    return settings


def _secret(arn: str) -> str:
    return text_file.read_text("kafka_access", text_file.AWS_SCHEME + arn)


class TokenLogin:
    """Gives librdkafka a token whenever it asks for one, on a thread of its own.

    Attributes:
        kind: What it is called in messages.
    """

    kind = ""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[Any, ...] = ("", 0.0)
        self._new_until = float("-inf")

    def _make(self) -> tuple[Any, ...]:
        """A token, when to have another one, and what the broker is told beside it."""
        raise NotImplementedError

    def _get(self) -> tuple[Any, ...]:
        """One that is new: clients that ask at once get the same."""
        with self._lock:
            # Not by the clock of the day, which may be set back.
            if monotonic() >= self._new_until:
                self._made = self._make()
                self._new_until = monotonic() + _NEW_SHARE * (self._made[1] - time())
            return self._made

    def __call__(self, _config: str) -> tuple[Any, ...]:
        """For librdkafka, which asks again after a while if this raises."""
        try:
            return self._get()
        except TokenError as error:
            # All that librdkafka says of it is that it was raised.
            ErrorLog.say(f"login with {self.kind}: {error}")
            raise

    def check(self) -> None:
        """Try whether there are tokens; a client would be waiting for one for ten seconds.

        Raises:
            UsageError: Settings do not fit.
            KafkaError: There are none.
        """
        try:
            self._get()
        except AuthorityError as error:
            raise UsageError([f"Kafka settings: {error}; see --kafka_config_file"]) from None
        except TokenError as error:
            raise KafkaError(f"Kafka login with {self.kind}: {error}") from None


class IamLogin(TokenLogin):
    """Tokens for MSK.

    Args:
        config: Whose tokens.
        tokens: Makes them; injected for tests.

    Attributes:
        used: Whether any client of this process logs in so.
    """

    kind = "IAM"
    used = False

    def __init__(self, config: TokenConfig, tokens: Tokens | None = None) -> None:
        super().__init__()
        IamLogin.used = True
        self.config = config
        self._tokens = tokens or Tokens(config)

    def _make(self) -> tuple[Any, ...]:
        return self._tokens.make()


class OidcLogin(TokenLogin):
    """Tokens of a token server. Where it gives none, it is looked whether it is to be asked with
    another secret by now.

    Args:
        request: What it is asked.
        again: Gets that anew, from wherever the settings are.
    """

    kind = "OIDC"

    def __init__(self, request: TokenRequest, again: Callable[[], TokenRequest | None]) -> None:
        super().__init__()
        self._request = request
        self._again = again

    def _make(self) -> tuple[Any, ...]:
        try:
            token, until = ask(self._request)
        except TokenError:
            text_file.outdate()
            try:
                request = self._again()
            except UsageError as error:
                raise TokenError(f"there is no other secret: {error}") from None
            if request is None or request == self._request:
                raise
            token, until = ask(request)
            self._request = request
            _LOGGER.info("kafka: the token server was asked with the secret that is new")
        extensions = dict(self._request.extensions)
        return (token, until, self._request.client, extensions) if extensions else (token, until)


# Python's own classes, unlike those of C, can be referred to without being held.
class _Consumer(confluent_kafka.Consumer):
    """A consumer."""


class _Producer(confluent_kafka.Producer):
    """A producer."""


class _Admin(AdminClient):
    """A client that asks."""


def instance_id(settings: Mapping[str, Any], number: int) -> str | None:
    """The name that a member keeps when it is started again; None if it has none. Pure.

    Args:
        settings: The user's.
        number: Which of the members that have the same settings it is.
    """
    name = settings.get("group.instance.id")
    return f"{name}-{number}" if name and number else name


def make_consumer(
    config: KafkaConfig, member: Mapping[str, Any] | None = None, **defaults: Any
) -> confluent_kafka.Consumer:
    """A consumer that reads and commits what it is told to.

    Args:
        config: The cluster, the group and the settings file.
        member: Settings of one that will be subscribed, which the file may not change. None for
            one that never is: what the file says of a member does not concern it.
        defaults: Settings that the file may change.

    Raises:
        UsageError: librdkafka refuses the settings.
    """
    ours = {
        "group.id": config.group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # An offset that is gone must be heard of, not skipped in silence.
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
    }
    given = client_settings(config)
    if member is None:
        given = {name: value for name, value in given.items() if name not in _OF_MEMBERS}
    return _client(_Consumer, defaults | given | ours | dict(member or {}))


def make_admin(config: KafkaConfig) -> AdminClient:
    """A client that asks about topics; who uses it calls `poll(0)`, so that no events pile up.

    Raises:
        KafkaError: librdkafka refuses the settings.
    """
    return _client(_Admin, client_settings(config))


def make_producer(settings: Mapping[str, Any]) -> confluent_kafka.Producer:
    """An idempotent producer: keeps order, acknowledged by all replicas, reports failures only.

    Raises:
        UsageError: librdkafka refuses the settings.
    """
    ours = {
        "enable.idempotence": True,
        "delivery.report.only.error": True,
    }
    defaults = {
        "linger.ms": 5,
        "queue.buffering.max.messages": 500_000,
        "queue.buffering.max.kbytes": 65_536,
        # The broker's limit is the one that counts; the client's own must not be met first.
        "message.max.bytes": 1_000_000_000,
    }
    return _client(_Producer, defaults | dict(settings) | ours)


def _client(kind: Any, settings: Mapping[str, Any]) -> Any:
    login = settings.get("oauth_cb")
    log = settings.get("error_cb")
    if not isinstance(log, ErrorLog):
        log = ErrorLog(login.config if isinstance(login, IamLogin) else None)
    log.expect(settings)
    by_sts = settings.get(f"{_BEARER}metadata.authentication.type") == "aws_iam"
    if by_sts:
        # confluent-kafka asks for tokens itself.
        quiet()
    try:
        _try_tls(settings)
        if isinstance(login, TokenLogin):
            login.check()
        client = kind({**settings, "error_cb": log}, logger=logging.getLogger("librdkafka"))
        log.watch(client)
        return client
    except KafkaException as error:
        text = _shown(reason(error), settings)
        if _NOT_SET in text and by_sts:
            text += (
                f"; AWS gives none: credentials are those of its default chain, they need the "
                f"right sts:GetWebIdentityToken, and the region is the one in {_BEARER}config"
            )
        raise UsageError([f"Kafka settings: {text}; see --kafka_config_file"]) from None
    except (TypeError, ValueError, SystemError) as error:
        why = _shown(one_line(str(error.__cause__ or error)), settings)
        raise UsageError([f"Kafka settings: {why}; see --kafka_config_file"]) from None


def _try_tls(settings: Mapping[str, Any]) -> None:
    """Have librdkafka read certificates and keys before a token server is asked. Where it asks one
    itself, that it cannot ends the process.

    Raises:
        KafkaException: It cannot.
    """
    by_us = isinstance(settings.get("oauth_cb"), OidcLogin)
    if by_us or settings.get(f"{_BEARER}method") == "oidc":
        tls = {name: value for name, value in settings.items() if name.startswith("ssl.")}
        confluent_kafka.Producer(
            # That it has no brokers is no news.
            {**tls, "security.protocol": "SSL", "log_level": 0},
            logger=logging.getLogger("librdkafka"),
        )


def _shown(text: str, settings: Mapping[str, Any]) -> str:
    """What librdkafka says of settings; what came from the environment may be a secret, too."""
    text = hide(text, settings)
    for value in settings.values():
        if isinstance(value, str) and len(value) >= LEAST and value in os.environ.values():
            # As a word of its own: most such values are no secrets.
            text = re.sub(rf"(?<![\w.]){re.escape(value)}(?![\w])", HIDDEN, text)
    return text


def _on_a_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="log-in-anew", daemon=True).start()


class ErrorLog:
    """What a client says of its connections: one warning in a while, and the last cause.

    Where the client's login is refused, it looks whether there is another one by now.

    Args:
        tokens: With whose tokens the client logs in; None if it does not log in with IAM.
        again: Gets the client's settings anew; None if it does not log in.
        timer: Monotonic seconds.
        run: Does what takes long, elsewhere.

    Attributes:
        last: The last cause that any client of this process met; "all brokers are down" is none.
    """

    last = ""
    _warned = float("-inf")

    def __init__(
        self,
        tokens: TokenConfig | None = None,
        again: Callable[[], Mapping[str, Any]] | None = None,
        timer: Callable[[], float] = monotonic,
        run: Callable[[Callable[[], None]], None] = _on_a_thread,
    ) -> None:
        self._tokens = tokens
        self._run = run
        self._again = again
        self._timer = timer
        self._looked = float("-inf")
        self._settings: Mapping[str, Any] = {}
        self._before: Mapping[str, Any] = {}
        self._client: Callable[[], Any] = lambda: None

    def expect(self, settings: Mapping[str, Any]) -> None:
        """What the client is made with."""
        self._settings = settings

    def watch(self, client: Any) -> None:
        """Whose log it is."""
        # The client holds this log: held in turn, it would not go by itself.
        self._client = weakref.ref(client)

    def _is_time_to_look(self) -> bool:
        if self._again is None or self._timer() - self._looked < _LOOK_SECS:
            return False
        self._looked = self._timer()
        return True

    def _log_in_anew(self) -> None:
        client = self._client()
        if self._again is None or client is None:
            return
        text_file.outdate()
        try:
            settings = self._again()
        except UsageError as error:
            self.say(f"the login was refused, and there is no other one: {error}")
            return
        # What was refused a moment ago may be quoted still.
        before = self._before = self._settings
        self._settings = {**before, **settings}
        if (login := _password_of(settings)) != _password_of(before):
            client.set_sasl_credentials(*login)
            _LOGGER.info("kafka: the login was refused; logging in with the one that is new")
        elif others := _other_logins(before, settings):
            _LOGGER.warning(
                "kafka: the login was refused, and there is another %s by now, which is taken when "
                "the run is started again",
                ", ".join(others),
            )

    def __call__(self, error: Any) -> None:
        text = hide(hide(" ".join(error.str().split()), self._before), self._settings)
        is_refusal = error.code() in _REFUSALS or _TLS_REFUSAL in text
        if is_refusal and self._is_time_to_look():
            # A client may not be asked for anything in a callback of its own; and it may take long.
            self._run(self._log_in_anew)
        # Why there is no token, who was to make it has said.
        if error.code() == ErrorCode._ALL_BROKERS_DOWN or _NO_TOKEN in text:
            return
        self.say(explain_refusal(text, self._tokens) if self._tokens else text)

    @staticmethod
    def say(text: str) -> None:
        """Keep it as the last cause, and warn of it, unless there was a warning just now."""
        ErrorLog.last = text
        if monotonic() - ErrorLog._warned > _WARN_SECS:
            ErrorLog._warned = monotonic()
            _LOGGER.warning("kafka: %s", text)


def _password_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return settings.get("sasl.username", ""), settings.get("sasl.password", "")


def _other_logins(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings of a login that have changed. Pure."""
    names = sorted(name for name in before.keys() | now.keys() if name.startswith(_OF_LOGINS))
    return [name for name in names if before.get(name) != now.get(name)]


def reason(error: KafkaException) -> str:
    """What librdkafka says, as one line."""
    inner = error.args[0] if error.args else error
    return said(inner) if hasattr(inner, "str") else " ".join(str(inner).split())


def said(error: Any) -> str:
    """What librdkafka says in an error, as one line, and with IAM which right is missing."""
    text = " ".join(error.str().split())
    right = _RIGHTS.get(error.code()) if IamLogin.used else None
    return f"{text}, with IAM the right {right}" if right else text


def served(call: Callable[[float], Any], secs: float) -> Any:
    """What a call of a producer that serves its events comes to.

    In place of the error with which a client ends for good, such as of a producer that another one
    of its name has replaced, confluent-kafka 2.16 raises what a method of C has raised wrongly.

    Args:
        call: The producer's `poll` or `flush`.
        secs: For how long.

    Raises:
        KafkaException: The client has ended.
    """
    try:
        return call(secs)
    except SystemError:
        raise KafkaException(ErrorCode(ErrorCode._FATAL, "the client has ended for good")) from None


def describe(config: KafkaConfig) -> str:
    """How to name the cluster in a message."""
    return f"Kafka at {config.bootstrap_servers}"


def leave_group(consumer: confluent_kafka.Consumer) -> None:
    """Close a consumer that is subscribed.

    librdkafka 2.16 does not tell the group of it where the consumer was given nothing: the others'
    partitions would not move until its session is over. To unsubscribe tells it.
    """
    if not consumer.assignment():
        consumer.unsubscribe()
    consumer.close()


def partitions_of(metadata: Any, topics: Iterable[str]) -> list[tuple[str, int]]:
    """All (topic, partition) of the topics that the metadata has."""
    return [
        (topic, partition)
        for topic in topics
        if topic in metadata.topics
        for partition in sorted(metadata.topics[topic].partitions)
    ]
