"""Properties: the file of client settings, what may be in it, and what is ours to decide."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

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
}


def parse_properties(text: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Read ``name=value`` or ``name: value`` lines; ``#`` and ``!`` begin a comment line.

    Raises:
        UsageError: With all lines that are no setting, names that are not to be set, and
            environment variables that do not exist. Never shows a value.
    """
    settings: dict[str, str] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#!":
            continue
        found = _SETTING.fullmatch(line)
        if not found:
            problems.append(f"line {number} is not of the form name=value")
            continue
        name, value = found.groups()
        bare = next((name[len(p) :] for p in PREFIXES[:2] if name.startswith(p)), name)
        if bare in _OURS and not (bare == "bootstrap.servers" and bare != name):
            problems.append(f"line {number} sets {name}, which the pipeline owns: {_OURS[bare]}")
        bare = bare.removeprefix(SCHEMA_REGISTRY_PREFIX)
        if bare in JAVA_NAMES and not (bare == "ssl.keystore.location" and value.endswith("p12")):
            problems.append(
                f"line {number} sets {name}, a setting of Java clients; here it is "
                f"{JAVA_NAMES[bare]}"
            )
        missing = [key for key in _ENVIRONMENT.findall(value) if key not in environ]
        for key in missing:
            problems.append(f"line {number} ({name}) needs the environment variable {key!r}")
        if not missing:
            settings[name] = _ENVIRONMENT.sub(lambda match: environ[match[1]], value)
    if problems:
        raise UsageError(problems)
    return settings


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
