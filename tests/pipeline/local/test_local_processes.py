"""Servers as processes: none outlives the process that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.local.processes import wait_until
from tests import ROOT
from tests.sink import is_there


def test_a_server_and_what_it_started_end_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also one that does not mind the loss of its folder, after a SIGKILL."""
    folder = tmp_path / "server"
    folder.mkdir()
    code = (
        "import os, pathlib, signal, sys\n"
        "from pipeline.local.processes import ServerProcess, wait_until\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "command = ['sh', '-c', 'sleep 600 & echo $! > child; wait']\n"
        "server = ServerProcess('server', command, folder)\n"
        "server.start()\n"
        "child = folder / 'child'\n"
        "wait_until(lambda: child.exists() and child.read_text().strip(), 'no child', 60)\n"
        "print(server.pid, child.read_text().strip(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_there, pids)), f"{pids} are still there", 60)
    wait_until(lambda: not folder.exists(), "the folder is still there", 60)
