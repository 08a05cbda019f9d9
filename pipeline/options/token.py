"""Token: what who tells a run something over HTTP has to give. From a file or the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from transforms.errors import UsageError

VARIABLE = "BEAM_LAMBDA_SINK_TOKEN"
_LEAST = 16


def read_token(file: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The token; empty if there is none.

    Args:
        file: Where it is, None for the environment.
        environ: Environment variables.

    Raises:
        UsageError: It cannot be read, or is none.
    """
    if file is None:
        token, where = environ.get(VARIABLE, ""), f"the environment variable {VARIABLE}"
        if not token:
            return ""
    else:
        where = f"--http_token_file={file}"
        try:
            with open(file, encoding="utf-8") as opened:
                token = opened.read(10_000).strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise UsageError([f"{where} cannot be read: {why}"]) from None
    if len(token) < _LEAST or not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError(
            [f"{where} holds no token: give {_LEAST} or more letters and digits, in one line"]
        )
    return token
