"""One instance per worker process: clients, pools and queues that outlive bundles.

A runner makes DoFn instances as it likes, many per process and new ones for each bundle if it
wants to; what is dear to make, or must be one, is found here by the value it is configured with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=Hashable)

_lock = threading.RLock()
_instances: dict[Any, Any] = {}
_MISSING = object()


def per_process(make: Callable[[C], T], config: C) -> T:
    """The process's one `make(config)`, made at the first call for this `make` and `config`."""
    with _lock:
        # Asked once: a config is hashed anew each time, with all the configs in it.
        instance = _instances.get((make, config), _MISSING)
        if instance is _MISSING:
            instance = _instances[make, config] = make(config)
        return instance


def forget(make: Callable[[C], T], config: C) -> T | None:
    """Take an instance out, for its owner to close; the next call makes a new one."""
    with _lock:
        return _instances.pop((make, config), None)
