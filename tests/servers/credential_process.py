"""Credentials as a `credential_process` of AWS's configuration prints them.

``python credential_process.py KEY SECRET SECS``: of a session that ends in so many seconds, which
its token says, too. Without SECS it fails, as a vault does that is sealed.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path


def profile(folder: Path, *arguments: object, name: str = "msk") -> Path:
    """A configuration of AWS with a profile that asks this program."""
    command = " ".join(map(str, (sys.executable, Path(__file__).absolute(), *arguments)))
    path = folder / "aws.ini"
    path.write_text(f"[profile {name}]\ncredential_process = {command}\n")
    return path


def main(arguments: list[str]) -> int:
    if len(arguments) < 3:
        print("the vault is sealed", file=sys.stderr)
        return 1
    key, secret, secs = arguments
    ends = time.time() + float(secs)
    credentials = {
        "Version": 1,
        "AccessKeyId": key,
        "SecretAccessKey": secret,
        "SessionToken": f"expires-{int(ends * 1000)}-",
        "Expiration": datetime.fromtimestamp(ends, timezone.utc).isoformat(),
    }
    print(json.dumps(credentials))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
