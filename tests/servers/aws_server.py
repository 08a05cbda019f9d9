"""What STS and MSK answer, as far as logins need it: moto has neither in this form.

botocore asks, and takes nothing but what these services' models have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

from tests.servers.token_server import token
from tests.servers.web_server import Quiet, WebServer
from tests.sink import ACCESS_KEY, SECRET_KEY

_XML = "https://sts.amazonaws.com/doc/2011-06-15/"


class AwsServer(WebServer):
    """Gives out credentials and tokens that end soon, and names brokers. A context manager.

    Args:
        secs: How long what it gives is good for.
        brokers: What MSK says of each cluster, by the names of the API.

    Attributes:
        asked: The forms that STS was sent.
        clusters: The clusters whose brokers were asked for.
        url: For `AWS_ENDPOINT_URL_STS` and `AWS_ENDPOINT_URL_KAFKA`.
    """

    def __init__(self, secs: float = 60, brokers: Mapping[str, str] | None = None) -> None:
        self.asked: list[dict[str, str]] = []
        self.clusters: list[str] = []
        owner = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = dict(parse_qsl(body))
                owner.asked.append(form)
                self._answer(200, "text/xml", owner._sts(form, time.time() + secs))

            def do_GET(self) -> None:
                # /v1/clusters/ARN/bootstrap-brokers
                owner.clusters.append(unquote(self.path.split("/")[3]))
                self._answer(200, "application/json", json.dumps(dict(brokers or {})))

            def _answer(self, status: int, kind: str, text: str) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler)

    @staticmethod
    def _sts(form: Mapping[str, str], ends: float) -> str:
        action = form["Action"]
        at = datetime.fromtimestamp(ends, timezone.utc).isoformat()
        found: dict[str, str]
        if action == "GetWebIdentityToken":
            found = {"WebIdentityToken": token(secs=ends - time.time()), "Expiration": at}
            inner = _elements(found)
        else:
            found = {
                "AccessKeyId": ACCESS_KEY,
                "SecretAccessKey": SECRET_KEY,
                # What `MskValidator` reads the end of the credentials from.
                "SessionToken": f"expires-{int(ends * 1000)}-",
                "Expiration": at,
            }
            inner = f"<Credentials>{_elements(found)}</Credentials>"
        return (
            f'<{action}Response xmlns="{_XML}"><{action}Result>{inner}</{action}Result>'
            f"<ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></{action}Response>"
        )


def _elements(found: Mapping[str, str]) -> str:
    return "".join(f"<{name}>{escape(text)}</{name}>" for name, text in found.items())
