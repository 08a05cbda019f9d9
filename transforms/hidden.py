"""Hidden: what others write -> what may be shown of it. Pure, but for `quiet`.

No message of ours holds a secret. What a broker, a registry or AWS says goes into messages as it
is, and any of them may quote what it was sent.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

_SECRET = re.compile(r"password|passphrase|secret|user\.info|\.pem$|token$|keytab|jaas")
# What is shorter is no secret, and stands in texts for other reasons.
LEAST = 4
# A line of PEM that is quoted by itself.
_LEAST_OF_LINE = 16
# What AWS adds to a signature that is wrong: the request, with the token of the session.
_ECHO = re.compile(r"\s*The Canonical String for this request should have been.*", re.DOTALL)
# Of AWS's library: what it sends, gets and signs is in its log, from DEBUG on.
_TALKERS = ("botocore", "boto3")


def hide(text: str, settings: Mapping[str, Any]) -> str:
    """A text without what the secret ones among settings hold.

    Args:
        text: What somebody says to whom the settings were sent.
        settings: Of the client, by name.
    """
    found = {each for name, value in settings.items() for each in _quotable(name, value)}
    for each in sorted(found, key=len, reverse=True):
        text = text.replace(each, HIDDEN)
    return text


def _quotable(name: str, value: Any) -> Iterator[str]:
    """The forms in which the value of a setting may be quoted."""
    if not (isinstance(value, str) and _SECRET.search(name)):
        return
    for part in (value, value.partition(":")[2] if name.endswith("user.info") else ""):
        if len(part) >= LEAST:
            yield part
            yield base64.b64encode(part.encode()).decode()
    lines = value.splitlines()
    if len(lines) > 1:
        yield " ".join(value.split())
        for line in lines:
            if len(line) >= _LEAST_OF_LINE and not line.startswith("-----"):
                yield line


def without_request(text: str) -> str:
    """What AWS says of a request, without the request."""
    return _ECHO.sub("", text)


def quiet() -> None:
    """Keep secrets out of the log of a process whose loggers are not ours: a worker's."""
    for name in _TALKERS:
        logger = logging.getLogger(name)
        if logger.getEffectiveLevel() < logging.INFO:
            logger.setLevel(logging.INFO)
