"""OIDC: tokens of a token server, for the id of a client and its secret. No client of Kafka.

librdkafka asks for them too, but as long as it runs with the secret that it was made with. So it
is given them from here. What else it has, such as assertions that are signed, stays its own.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode, urlsplit

from transforms.aws.msk import SHARE, TokenError
from transforms.hidden import hide
from transforms.kafka.login import mechanism_of

_TIMEOUT_SECS = 10.0
_MOST_BYTES = 1_000_000
_MOST_SECS = 24 * 3600.0
_BEARER = "sasl.oauthbearer."
_SERVER = f"{_BEARER}token.endpoint.url"
_CLIENT = (f"{_BEARER}client.credentials.client.id", f"{_BEARER}client.id")
_SECRET = (f"{_BEARER}client.credentials.client.secret", f"{_BEARER}client.secret")
_SCOPE, _EXTENSIONS = f"{_BEARER}scope", f"{_BEARER}extensions"
_FILE, _PEM = "https.ca.location", "https.ca.pem"
# What it has to be for a client's secret, each with its default.
_KIND = {
    f"{_BEARER}method": ("oidc", "default"),
    f"{_BEARER}grant.type": ("client_credentials", "client_credentials"),
    f"{_BEARER}metadata.authentication.type": ("none", "none"),
}
_TAKEN = frozenset({_SERVER, *_CLIENT, *_SECRET, _SCOPE, _EXTENSIONS, _FILE, _PEM, *_KIND})


class AuthorityError(TokenError):
    """There is nobody to trust: what settings say of the server's authority cannot be read."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a token server is asked.

    Attributes:
        url: Where tokens are.
        client: The client's id.
        secret: Its secret.
        scope: What the token is for, or None.
        extensions: What the broker is told beside the token.
        authority_file: File with the certificate to trust, or None for the system's.
        authority_pem: The certificate itself, or None.
    """

    url: str
    client: str
    secret: str = field(repr=False)
    scope: str | None = None
    extensions: tuple[tuple[str, str], ...] = ()
    authority_file: str | None = None
    authority_pem: str | None = None

    @property
    def server(self) -> str:
        """Who is asked, as it may be shown."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


def take_oidc(settings: Mapping[str, Any]) -> tuple[dict[str, Any], TokenRequest | None]:
    """A client's settings as librdkafka is to have them, and what to ask for tokens. Pure.

    Args:
        settings: The client's. Where something is missing, librdkafka is to refuse them.
    """
    client = next((settings[name] for name in _CLIENT if settings.get(name)), None)
    secret = next((settings[name] for name in _SECRET if settings.get(name)), None)
    kind = {name: str(settings.get(name, default)).lower() for name, (_, default) in _KIND.items()}
    fits = mechanism_of(settings).upper() == "OAUTHBEARER" and all(
        kind[name] == wanted for name, (wanted, _) in _KIND.items()
    )
    url = str(settings.get(_SERVER, ""))
    if not (fits and client and secret and url.startswith(("https://", "http://"))):
        return dict(settings), None
    pairs = [each.partition("=") for each in str(settings.get(_EXTENSIONS, "")).split(",") if each]
    file = settings.get(_FILE)
    request = TokenRequest(
        url,
        client,
        secret,
        settings.get(_SCOPE),
        tuple((name.strip(), text.strip()) for name, _, text in pairs),
        None if file == "probe" else file,
        settings.get(_PEM),
    )
    return {name: value for name, value in settings.items() if name not in _TAKEN}, request


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the secret is for this server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(request: TokenRequest) -> tuple[str, float]:
    """A token, and when to have another one, in seconds since the epoch.

    Raises:
        AuthorityError: Whom to trust cannot be read.
        TokenError: The server gives none.
    """
    login = f"{request.client}:{request.secret}"
    form = {"grant_type": "client_credentials"}
    if request.scope:
        form["scope"] = request.scope
    headers = {
        "Authorization": f"Basic {base64.b64encode(login.encode()).decode()}",
        "Accept": "application/json",
    }
    asked = urllib.request.Request(request.url, urlencode(form).encode(), headers, method="POST")
    opener = urllib.request.build_opener(
        _Stay, urllib.request.HTTPSHandler(context=_trusted(request))
    )
    now = time.time()
    try:
        with opener.open(asked, timeout=_TIMEOUT_SECS) as answer:
            content = answer.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            why = f"{error.code} {_said(_content(error.read(_MOST_BYTES)))}"
        said = hide(why, {"user.info": login})
        raise TokenError(f"the token server {request.server} answers {said.strip()}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = " ".join(str(getattr(error, "reason", error)).split())
        raise TokenError(f"the token server {request.server} does not answer: {why}") from None
    found = _content(content)
    token = found.get("access_token")
    secs = _lifetime(found, now)
    if not (isinstance(token, str) and token and secs and secs > 0):
        raise TokenError(f"the token server {request.server} gives no token, or one that is over")
    return token, now + SHARE * min(secs, _MOST_SECS)


def _trusted(request: TokenRequest) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(
            cafile=request.authority_file, cadata=request.authority_pem
        )
    except (OSError, ValueError):
        name = _FILE if request.authority_file else _PEM
        raise AuthorityError(f"{name} cannot be read as certificates (PEM)") from None


def _content(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _said(content: Mapping[str, Any]) -> str:
    """Why there is none, as OAuth has it; what else is in an answer is not shown."""
    texts = [content.get(name) for name in ("error", "error_description")]
    return " ".join(": ".join(text for text in texts if isinstance(text, str)).split())[:300]


def _lifetime(content: Mapping[str, Any], now: float) -> float | None:
    """For how long a token is good: as the server says, else as the token does."""
    said = content.get("expires_in")
    try:
        if said is not None:
            return float(said)
        claims = str(content.get("access_token")).split(".")[1]
        return float(_content(base64.urlsafe_b64decode(claims + "=="))["exp"]) - now
    except (TypeError, ValueError, IndexError, KeyError, binascii.Error):
        return None
