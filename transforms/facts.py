"""Facts: a few values <-> bytes, for what crosses between workers and stays in state. Pure.

JSON behind a byte that is the version of the form. Whoever reads takes what is not there for what
it was before it was added, so a fact can be added, at the end, without another version.
"""

from __future__ import annotations

from typing import Any

import orjson

from transforms.errors import StateError

_MOST = 2**63


def versioned(version: int, facts: Any) -> bytes:
    """A few facts as JSON, behind the version of their form."""
    return bytes((version,)) + orjson.dumps(facts)


def unversioned(version: int, data: bytes, what: str) -> Any:
    """The facts that `versioned` has written.

    Raises:
        StateError: By a later version than this.
    """
    check_version(version, data, what)
    return orjson.loads(memoryview(data)[1:])


def check_version(version: int, data: bytes, what: str) -> None:
    """See whether bytes can be read by code that knows the forms up to this version.

    Raises:
        StateError: They cannot.
    """
    if not 0 < data[0] <= version:
        raise StateError(
            f"{what} in the job's state have the form {data[0]}, and this version of the program "
            f"knows those up to {version}; go on with the version that wrote them, or begin "
            "without the savepoint, at the group's committed offsets"
        )


def number(value: int) -> int | str:
    """A position as a fact: JSON here has no more than 64 bits. `int` reads either."""
    return value if -_MOST <= value < _MOST else str(value)
