"""Interpreter: workers of a runner do not search for garbage, or ask for memory, all the time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from transforms import interpreter

_PENDING = """
from transforms.aws.function import FunctionConfig
from transforms.batch.batch import BatchConfig
from transforms.invoke.invoke import InvokeConfig
from transforms.pending.pending import _PendingFn
step = _PendingFn(BatchConfig(window_secs=0.0), InvokeConfig(FunctionConfig("f"), streaming=True))
"""
_READ = """
from transforms.read.streaming import NativeReadConfig, _ReadFn
step = _ReadFn(NativeReadConfig(source=None))
"""


@pytest.mark.parametrize("made", [_PENDING, _READ], ids=["pending", "read"])
def test_a_worker_searches_for_garbage_as_seldom_as_a_process_of_ours(made: str) -> None:
    """Records that wait for the function are many objects that live long: to search them by
    Python's own measure took 2 us of 14 a record."""
    program = f"""
import gc
{made}
before = gc.get_threshold(), gc.get_freeze_count()
step.setup()
frozen = gc.get_freeze_count()
step.setup()
print(before[0][0] < gc.get_threshold()[0] == 200_000, before[1] == 0 < frozen)
print(frozen == gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True True\nTrue\n", 0), done.stderr


_LARGE = """
import resource, sys, threading
from transforms.interpreter import collect_rarely
if sys.argv[1] == "kept":
    collect_rarely()
def work():
    for size in (1, 3, 6, 9, 12):
        for _ in range(50):
            b"".join([bytes(size << 20) for _ in range(2)])
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_large_memory_is_not_asked_of_the_kernel_each_time() -> None:
    """A chunk is joined, copied and sent: each page of it that is new costs a fault."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", _LARGE, how]))
        for how in ("as it is", "kept")
    ]
    assert faults[1] < faults[0] * 0.7


def test_without_glibc_memory_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.ctypes, "CDLL", lambda name: object())
    interpreter._keep_memory()
