"""Signed: requests to AWS that boto3 makes and signs, and `transforms.aws.http` sends.

boto3 finds credentials, region and endpoint. What all requests of one kind have in common it makes
once; what it then costs is a signature (docs/adr/0012-lean-invocations.md).
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions as aws_errors
import urllib3.exceptions as http_errors
from botocore import xform_name
from botocore.awsrequest import AWSRequest
from botocore.httpsession import create_urllib3_context, get_cert_path, mask_proxy_url
from botocore.session import get_session
from botocore.utils import get_environ_proxies

from transforms.aws.answers import Fault
from transforms.aws.http import SendTimeoutError

CONFIG_ERRORS = (
    aws_errors.NoCredentialsError,
    aws_errors.PartialCredentialsError,
    aws_errors.NoRegionError,
    aws_errors.ProfileNotFound,
    aws_errors.ConfigNotFound,
    aws_errors.ConfigParseError,
    aws_errors.InvalidConfigError,
    aws_errors.ParamValidationError,
    aws_errors.InvalidRegionError,
    aws_errors.UnauthorizedSSOTokenError,
)
"""Of what boto3 raises before anything is sent, this is for the user to mend."""


@dataclass(frozen=True, slots=True)
class Template:
    """What all requests of a kind have in common, as boto3 makes them.

    Attributes:
        url: Where to.
        headers: Before they are signed.
        context: For the signer.
        signer: Signs.
        operation: Which call it is.
    """

    url: str
    headers: dict[str, str]
    context: dict[str, Any]
    signer: Any
    operation: str


class _NotSent(Exception):
    """Ends what boto3 does before it signs and sends."""


def template(client: Any, operation: str, arguments: Mapping[str, Any]) -> Template:
    """Let boto3 make a request, up to where it would sign it.

    Args:
        client: Has to be kept: the signer does not. Meanwhile no other thread may sign such a call
            with it: that would end here.
        operation: Which call, as AWS names it.
        arguments: Of the call, as far as its address depends on them.
    """
    made: list[Template] = []

    def keep(request: AWSRequest, request_signer: Any, **_: Any) -> None:
        headers = dict(request.headers.items())
        # Else it would be added on the way, and signed as the signer makes it out.
        headers["Host"] = urlsplit(request.url).netloc
        made.append(Template(request.url, headers, request.context, request_signer, operation))
        raise _NotSent

    service = client.meta.service_model.service_id.hyphenize()
    event = f"before-sign.{service}.{operation}"
    client.meta.events.register_first(event, keep)
    try:
        getattr(client, xform_name(operation))(**arguments)
    except _NotSent:
        pass
    finally:
        client.meta.events.unregister(event, keep)
    return made[0]


def signed_headers(
    template: Template, more_headers: Mapping[str, str], payload: bytes
) -> dict[str, str]:
    """All headers of a request; a signature is good for five minutes.

    Raises:
        Exception: Whatever the provider of the credentials raises.
    """
    request = AWSRequest("POST", template.url, template.headers | dict(more_headers), payload)
    request.context = dict(template.context)
    template.signer.sign(template.operation, request)
    headers = dict(request.headers.items())
    # Not signed, as proxies may change them.
    headers |= {"Accept-Encoding": "identity", "Content-Length": str(len(payload))}
    return headers


def no_reply(error: http_errors.HTTPError, url: str, proxy: str | None) -> Fault:
    """Why there is none, in the words of boto3, which are what people look for."""
    named: aws_errors.BotoCoreError
    match error:
        case SendTimeoutError():
            return Fault(0, "SendTimeoutError", f'Send timeout on endpoint URL: "{url}"')
        case http_errors.SSLError():
            named = aws_errors.SSLError(endpoint_url=url, error=error)
        case http_errors.NewConnectionError():
            named = aws_errors.EndpointConnectionError(endpoint_url=url)
        case http_errors.ProxyError():
            named = aws_errors.ProxyConnectionError(proxy_url=mask_proxy_url(proxy))
        case http_errors.ConnectTimeoutError():
            named = aws_errors.ConnectTimeoutError(endpoint_url=url)
        case http_errors.ReadTimeoutError():
            named = aws_errors.ReadTimeoutError(endpoint_url=url)
        case http_errors.ProtocolError():
            named = aws_errors.ConnectionClosedError(endpoint_url=url)
        case _:
            named = aws_errors.HTTPClientError(error=error)
    return Fault(0, type(named).__name__, str(named))


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL."""
    proxy = get_environ_proxies(url).get(urlsplit(url).scheme)
    if not proxy or "://" in proxy:
        return proxy
    return "http:" + proxy if proxy.startswith("//") else "http://" + proxy


def tls_of(url: str) -> ssl.SSLContext | None:
    """What to trust, from where boto3 would take it."""
    if urlsplit(url).scheme != "https":
        return None
    bundle = get_session().get_config_variable("ca_bundle")
    context = create_urllib3_context()
    context.load_verify_locations(
        get_cert_path(bundle or os.environ.get("REQUESTS_CA_BUNDLE") or True)
    )
    return context
