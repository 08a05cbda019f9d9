"""MSK: what an event source mapping of a cluster leaves to AWS: its brokers, and how to log in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.migrate.carried import OWN, Carried, Value
from transforms import access
from transforms.aws.credentials import Identity
from transforms.aws.msk import TokenError, bootstrap_brokers
from transforms.kafka.login import IAM_LOGIN, TLS_LOGIN, login_at, region_of_arn

Ask = Callable[[str, Identity], Mapping[str, str]]

_KINDS = {
    access.SCRAM_512: ("SaslScram",),
    access.CERTIFICATE: ("Tls",),
    access.IAM: ("SaslIam",),
    access.TLS: ("Tls",),
}
# What AWS's own pollers take where the mapping has no secret.
_WITHOUT_SECRET = ("SaslIam", "Tls", "")
_BY_NAME = {"SaslIam": access.IAM, "Tls": access.TLS}
_BY_LOGIN = {IAM_LOGIN: access.IAM, TLS_LOGIN: access.TLS}


def complete(
    values: Mapping[str, Value], carried: Carried | None, ask: Ask = bootstrap_brokers
) -> tuple[dict[str, Value], list[str]]:
    """The options, with the brokers that MSK names where none are given, and, for a mapping without
    a login, the one that they are for.

    Args:
        values: By option, what is given and where.
        carried: What the file of --config came to.
        ask: Asks MSK for the brokers of an ARN.

    Returns:
        The options, and why MSK says nothing, one line.
    """
    found = dict(values)
    arn = found.get("event_source_arn")
    if arn is None or not region_of_arn(arn.text):
        return found, []
    if "kafka_bootstrap_servers" not in found:
        role = found.get("kafka_role_arn")
        try:
            brokers = ask(arn.text, Identity(role.text if role else None))
        except TokenError as error:
            why = f"--event_source_arn={arn.text}: MSK does not say what its brokers are: {error}"
            return found, [why]
        name = _choose(brokers, found.get("kafka_access"))
        if name is None:
            kinds = ", ".join(sorted(brokers)) or "none"
            return found, [
                f"--event_source_arn={arn.text}: the cluster has no brokers for this login, only "
                f"for {kinds}; give --kafka_bootstrap_servers"
            ]
        origin = f"what MSK says of {arn.text}"
        found["kafka_bootstrap_servers"] = Value(brokers[name], origin)
        login = _BY_NAME.get(name.removeprefix("Public"))
    else:
        origin = "the port of the brokers"
        login = _BY_LOGIN.get(login_at(found["kafka_bootstrap_servers"].text) or "")
    mapped = carried is not None and carried.system != OWN
    given = found.get("kafka_access", Value("", "")).text
    if mapped and login and "kafka_config_file" not in found and not access.has_login(given):
        found["kafka_access"] = Value(f"{given},{login}" if given else login, origin)
    return found, []


def _choose(brokers: Mapping[str, str], given: Value | None) -> str | None:
    """The name of the brokers for a login, from inside the network if there are such."""
    kinds = {text.partition("=")[0].strip() for text in given.text.split(",")} if given else set()
    wanted = next((names for kind, names in _KINDS.items() if kind in kinds), _WITHOUT_SECRET)
    for place in ("", "Public"):
        for name in wanted:
            if brokers.get(f"{place}{name}"):
                return f"{place}{name}"
    return None
