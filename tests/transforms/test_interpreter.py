"""Interpreter: workers of a runner do not search for garbage all the time."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
print(before[0][0] < gc.get_threshold()[0] == 50_000, before[1] == 0 < frozen)
print(frozen == gc.get_freeze_count())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True True\nTrue\n", 0), done.stderr
