"""One instance per worker process: clients, pools and queues that outlive bundles.

A runner makes DoFn instances as it likes, many per process and new ones for each bundle if it
wants to; what is dear to make, or must be one, is found here by the value it is configured with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")
C = TypeVar("C", bound=Hashable)

_MISSING = object()


class _Entry:
    """A place for one instance. Its lock is its own: what takes long to make stops nobody else."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.instance: Any = _MISSING
        self.forgotten = False


_lock = threading.Lock()
_entries: dict[Any, _Entry] = {}
# The same by the very object a step asks with, again and again: a config is hashed anew each time,
# with all the configs in it. The object is held, so that its id is no other's.
_asked: dict[tuple[Any, int], tuple[Any, _Entry]] = {}
_ASKED_MOST = 1000


def per_process(make: Callable[[C], T], config: C) -> T:
    """The process's one `make(config)`, made at the first call for this `make` and `config`."""
    asked = _asked.get((make, id(config)))
    if asked and asked[1].instance is not _MISSING:
        return cast(T, asked[1].instance)
    while True:
        with _lock:
            entry = _entries.get((make, config))
            if entry is None:
                entry = _entries[make, config] = _Entry()
            if len(_asked) >= _ASKED_MOST:
                # Of steps that are long gone, or configs that are made to ask with.
                _asked.clear()
            _asked[make, id(config)] = config, entry
        if entry.instance is not _MISSING:
            return cast(T, entry.instance)
        with entry.lock:
            if not entry.forgotten:
                if entry.instance is _MISSING:
                    entry.instance = make(config)
                return cast(T, entry.instance)


def forget(make: Callable[[C], T], config: C) -> T | None:
    """Take an instance out, for its owner to close; the next call makes a new one."""
    with _lock:
        entry = _entries.pop((make, config), None)
        for asked in [key for key, each in _asked.items() if each[1] is entry]:
            del _asked[asked]
    if entry is None:
        return None
    with entry.lock:
        entry.forgotten = True
        return None if entry.instance is _MISSING else cast(T, entry.instance)
