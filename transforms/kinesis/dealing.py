"""Dealing: which leases a copy of the program takes, and which it asks others for. Pure.

Nobody deals them out. Each copy looks at all rows, takes what is free until it has its share, and
where nothing is free asks those who have more than theirs. Who is asked hands a shard over once its
running invocations have ended; nothing is taken from a copy that lives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transforms.kinesis.rows import Row

OWNERS = "beam-lambda-sink/"
"""What the names of our own copies begin with."""

JOBS = "beam-lambda-sink-job/"
"""What the names of streaming jobs begin with. A job has all shards, and shares none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a copy does now.

    Attributes:
        take: Leases that it takes.
        ask: Leases that it asks their owners for.
    """

    take: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()


def plan_alone(rows: Mapping[str, Row], stale: Collection[str], me: str) -> Plan:
    """What a job does, which has all leases or none; see `plan`."""
    free = (key for key, row in rows.items() if not row.owner or key in stale)
    return Plan(tuple(sorted(key for key in free if rows[key].owner != me)))


def plan(rows: Mapping[str, Row], stale: Collection[str], me: str) -> Plan:
    """What a copy does, as it sees the leases that can be worked on now.

    Args:
        rows: By key, all leases of shards that are neither done nor wait for their parents.
        stale: Those of which nobody has been heard for so long that their owner, and who asks for
            them, is taken for dead.
        me: The copy's own name.
    """
    owned: dict[str, list[str]] = {me: []}
    free = []
    for key, row in rows.items():
        if row.owner and (key not in stale or row.owner == me):
            owned.setdefault(row.owner, []).append(key)
        elif row.wanted in ("", me) or key in stale:
            free.append(key)
    share = len(rows) // len(owned)
    most = -(-len(rows) // len(owned))
    mine = len(owned[me])
    take = sorted(free, key=lambda key: (rows[key].wanted != me, key))[: max(0, most - mine)]
    coming = sum(row.wanted == me for key, row in rows.items() if key not in free)
    missing = share - mine - len(take) - coming
    ask: list[str] = []
    # Whoever is none of us would not hear it.
    ours = [owner for owner in owned if owner != me and owner.startswith(OWNERS)]
    others = sorted((len(owned[owner]), owner) for owner in ours)
    for count, owner in reversed(others):
        asked = [key for key in owned[owner] if not rows[key].wanted]
        left = count - (len(owned[owner]) - len(asked))
        spare = max(0, min(left - share, missing - len(ask)))
        ask += sorted(asked)[:spare]
    return Plan(tuple(take), tuple(ask))
