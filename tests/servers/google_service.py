"""Cloud Storage and Secret Manager on this machine, as far as their clients ask here."""

from __future__ import annotations

import base64
import json
from urllib.parse import unquote, urlsplit

from tests.servers.web_server import Quiet, WebServer


class Google(WebServer):
    """Both services; a context manager.

    Attributes:
        environment: By which Google's clients find it.
        contents: By name, what is there; a number is a status to answer with.
        asked: The paths of what was asked for.
    """

    def __init__(self) -> None:
        self.contents: dict[str, bytes | int] = {}
        self.asked: list[str] = []
        google = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                # The client also asks after the bucket, in the background, for its own statistics.
                if "/o/" in path or path.endswith(":access"):
                    google.asked.append(path)
                status, content = google._answer(path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        super().__init__(Handler)
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": self.url + "/",
        }

    def _answer(self, path: str) -> tuple[int, bytes]:
        is_secret = path.endswith(":access")
        name = unquote(path.partition("/o/")[2]) if not is_secret else path[4:-7]
        found = self.contents.get(name, 404)
        if isinstance(found, int):
            error = {"code": found, "message": f"Permission {found} on {name}", "status": "X"}
            return found, json.dumps({"error": error}).encode()
        if is_secret:
            payload = {"data": base64.b64encode(found).decode()}
            return 200, json.dumps({"name": name, "payload": payload}).encode()
        return 200, found
