"""Web identity: who this machine is to Google, as a token that AWS can be told to trust. No Beam.

A virtual machine, a pod or a worker of Dataflow asks its metadata server for it; nothing is stored
and there is no key to steal.
"""

from __future__ import annotations

import os
import time
import urllib.parse
import urllib.request
from collections.abc import Callable

from botocore.exceptions import MetadataRetrievalError

_TIMEOUT_SECS = 5.0
# The metadata server of a machine that has just started does not answer at once.
_ATTEMPTS = 4
_DELAY_SECS = 0.5
# Far more than any token has.
_MAX_BYTES = 65_536


def google_token(audience: str, sleep: Callable[[float], object] = time.sleep) -> str:
    """An identity token of this machine's service account, good for up to an hour.

    Args:
        audience: Whom it is for; what AWS compares with ``accounts.google.com:oaud``.
        sleep: Waits for so many seconds.

    Raises:
        MetadataRetrievalError: There is no metadata server of Google's, or it gives no token.
    """
    # The name of Google's own libraries for another place than the usual one.
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    query = urllib.parse.urlencode({"audience": audience, "format": "full"})
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/service-accounts/default/identity?{query}",
        headers={"Metadata-Flavor": "Google"},
    )
    # Never by a proxy: it would be told the token.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            sleep(_DELAY_SECS * 2**attempt)
        try:
            with opener.open(request, timeout=_TIMEOUT_SECS) as answer:
                if answer.headers.get("Metadata-Flavor") != "Google":
                    problem = f"{host} is not Google's metadata server"
                    break
                return str(answer.read(_MAX_BYTES).decode("ascii").strip())
        except (OSError, ValueError) as error:
            problem = f"the metadata server {host} gives no identity token: {error}"
    raise MetadataRetrievalError(error_msg=problem)
