"""Properties: the file of client settings, what may be in it, and what is ours to decide."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping

from transforms import java_login
from transforms.errors import UsageError
from transforms.text_file import read_text

SCHEMA_REGISTRY_PREFIX = "schema.registry."

PREFIXES = ("response.", "error.", SCHEMA_REGISTRY_PREFIX)


# A colon is what Java takes, too.
_SETTING = re.compile(r"([A-Za-z0-9._-]+)\s*[=:]\s*(.*)", re.DOTALL)

_ENVIRONMENT = re.compile(r"\$\{env:([^}]*)\}")


# Ours to decide: each of them would break a guarantee or another option.
_OURS = {
    "group.id": "use --consumer_group",
    "bootstrap.servers": "use --kafka_bootstrap_servers",
    "metadata.broker.list": "it is bootstrap.servers by another name; use "
    "--kafka_bootstrap_servers, or bootstrap.servers with a prefix",
    "enable.auto.commit": "offsets are committed when their records are finished",
    "enable.auto.offset.store": "offsets are committed when their records are finished",
    "auto.offset.reset": "use --starting_position",
    "enable.idempotence": "it is always on, since it keeps order and loses nothing",
    "acks": "it is always all",
    "request.required.acks": "it is always all",
    "transactional.id": "with --delivery=exactly_once each member has one of its own",
    "enable.partition.eof": "the reader needs it on",
}


JAVA_NAMES = {
    "sasl.jaas.config": "sasl.username and sasl.password",
    "ssl.truststore.location": "ssl.ca.location (PEM)",
    "ssl.keystore.location": "ssl.certificate.location and ssl.key.location (PEM), "
    "or ssl.keystore.location with a PKCS#12 file",
    "ssl.truststore.password": "ssl.ca.location (PEM), which needs no password",
    "sasl.login.callback.handler.class": "sasl.oauthbearer.method=oidc and its settings",
    "sasl.client.callback.handler.class": "sasl.mechanism=AWS_MSK_IAM, if it is for MSK",
}


def parse_properties(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Read ``name=value`` or ``name: value`` lines; ``#`` and ``!`` begin a comment line. A text
    that begins with ``{`` is JSON, an object of settings, as a manager of secrets may have it.

    Raises:
        UsageError: With all lines that are no setting, names that are not to be set, and
            environment variables that do not exist. Never shows a value.
    """
    settings: dict[str, str] = {}
    translated: dict[str, str] = {}
    problems: list[str] = []
    for where, name, value in _entries(text, problems):
        prefix = next((p for p in PREFIXES[:2] if name.startswith(p)), "")
        bare = name.removeprefix(prefix)
        try:
            ours = java_login.translate(bare, value)
        except ValueError as error:
            problems.append(f"{where} ({name}): {error}")
            continue
        if ours is not None:
            translated |= {prefix + setting: text for setting, text in ours.items()}
            continue
        if bare in _OURS and not (bare == "bootstrap.servers" and bare != name):
            problems.append(f"{where} sets {name}, which the pipeline owns: {_OURS[bare]}")
        bare = bare.removeprefix(SCHEMA_REGISTRY_PREFIX)
        if bare in JAVA_NAMES and not (bare == "ssl.keystore.location" and value.endswith("p12")):
            problems.append(
                f"{where} sets {name}, a setting of Java clients; here it is {JAVA_NAMES[bare]}"
            )
        missing = [key for key in _ENVIRONMENT.findall(value) if key not in environ]
        for key in missing:
            problems.append(f"{where} ({name}) needs the environment variable {key!r}")
        if not missing:
            settings[name] = _ENVIRONMENT.sub(lambda match: environ[match[1]], value)
    if problems:
        raise UsageError(problems)
    # The mechanism beside Amazon's handler is the one of what it makes.
    mechanisms = [name for name in translated if name.endswith("sasl.mechanism")]
    for name in mechanisms:
        settings.pop(f"{name}s", None)
    return translated | {k: v for k, v in settings.items() if k not in mechanisms}


def _entries(text: str, problems: list[str]) -> Iterator[tuple[str, str, str]]:
    """Each setting: where it stands, its name and its value."""
    if text.lstrip().startswith("{"):
        yield from _json_entries(text, problems)
        return
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#!":
            continue
        found = _SETTING.fullmatch(line)
        if not found:
            problems.append(f"line {number} is not of the form name=value")
            continue
        yield f"line {number}", found[1], found[2]


def _json_entries(text: str, problems: list[str]) -> Iterator[tuple[str, str, str]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        # What it says of the place is no part of the text.
        place = getattr(error, "lineno", None)
        problems.append(f"it is not JSON{f', in line {place}' if place else ''}")
        return
    for number, (name, value) in enumerate(content.items(), 1):
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, str | int | float):
            yield f"setting {number}", name, str(value)
        else:
            problems.append(f"setting {number} ({name}) is neither a text nor a number")


def load_properties(path: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Read a properties file; see `parse_properties`.

    Raises:
        UsageError: The file cannot be read, or what is in it does not fit.
    """
    text = read_text("kafka_config_file", path)
    try:
        return parse_properties(text, environ)
    except UsageError as error:
        prefix = f"--kafka_config_file={path}: "
        raise UsageError([prefix + problem for problem in error.problems]) from None
