"""Checks of how Kafka's clients log in: what the settings file says, with what options say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.options.declare import OPTIONS
from transforms import java_login
from transforms.kafka.login import (
    AwsLogin,
    LoginError,
    contradictions,
    put_over,
    region_of_arn,
    take_iam,
    uses_iam,
)
from transforms.properties import PREFIXES

_AUTHENTICATION = "sasl.oauthbearer.metadata.authentication.type"
# Of the clients: those that read and commit, and the writers.
_CLIENTS = ("", *PREFIXES[:2])


def login_of(
    values: Mapping[str, Any], settings: Mapping[str, str], environ: Mapping[str, str]
) -> AwsLogin:
    """What options say of a login with IAM.

    Args:
        values: By option, its value.
        settings: What --kafka_config_file sets.
        environ: Environment variables; those of workers elsewhere may be others.
    """
    region = None
    if any_iam(settings) or settings.get(_AUTHENTICATION) == "aws_iam":
        region = region_of_arn(values["event_source_arn"]) or environ.get("AWS_REGION")
        region = region or environ.get("AWS_DEFAULT_REGION")
    return AwsLogin(
        values["kafka_role_arn"],
        values["aws_web_identity"],
        values["aws_web_identity_audience"],
        region,
    )


def any_iam(settings: Mapping[str, str]) -> bool:
    """Whether any client logs in with IAM."""
    return any(uses_iam(merged) for _, merged in _by_client(settings))


def _by_client(settings: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The settings of each kind of client, by its prefix."""
    common = {name: text for name, text in settings.items() if not name.startswith(PREFIXES)}
    for prefix in _CLIENTS:
        own = {n.removeprefix(prefix): t for n, t in settings.items() if n.startswith(prefix)}
        if not prefix:
            yield "", common
        elif own:
            yield prefix, put_over(common, own)


def check_login(
    values: Mapping[str, Any],
    settings: Mapping[str, str],
    environ: Mapping[str, str],
    problems: list[str],
) -> None:
    """Note what does not go together about logins; see `checks.check_together`."""
    servers, role = values["kafka_bootstrap_servers"], values["kafka_role_arn"]
    if role and not OPTIONS["kafka_role_arn"].fits(role):
        problems.append(f"--kafka_role_arn={role} is not the ARN of a role")
    if role and not any_iam(settings):
        problems.append(
            f"--kafka_role_arn goes with sasl.mechanism={java_login.MECHANISM} in "
            f"--kafka_config_file, or with --kafka_access=IAM_AUTH, only"
        )
    if role and settings.get(java_login.ROLE, role) != role:
        problems.append(
            f"--kafka_role_arn={role} is not the role that --kafka_config_file has; give one of "
            f"them"
        )
    login = login_of(values, settings, environ)
    for prefix, merged in _by_client(settings):
        reached = merged.get("bootstrap.servers", servers)
        if not reached:
            continue
        where = f"for {prefix} " if prefix else ""
        option = f"{prefix}bootstrap.servers" if prefix else "--kafka_bootstrap_servers"
        try:
            take_iam({**merged, "bootstrap.servers": reached}, login)
        except LoginError as error:
            problems.append(f"Kafka settings: {where}{error}")
        if not prefix or reached != servers or _logs_in_anew(settings, prefix):
            problems += [f"{option}={text}" for text in contradictions(reached, merged)]


def _logs_in_anew(settings: Mapping[str, str], prefix: str) -> bool:
    own = {name.removeprefix(prefix) for name in settings if name.startswith(prefix)}
    return any(name.startswith(("sasl.", "security.")) for name in own)
