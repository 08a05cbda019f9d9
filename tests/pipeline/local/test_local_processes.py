"""Servers as processes: how they start and end, and that none outlives who started it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipeline.local.processes import (
    LocalServer,
    LocalServers,
    ServerError,
    ServerProcess,
    wait_until,
)
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


_SERVES = "echo started >> starts; echo said; touch up-$$; exec sleep 600"


class Server(LocalServer):
    """It is up when it has written a file named for its process."""

    script = _SERVES

    def __init__(self) -> None:
        super().__init__("server", 60)

    def _command(self, folder: Path) -> Sequence[str]:
        return ["sh", "-c", self.script]

    def _is_up(self, name: str) -> bool:
        return (self.folder / f"up-{self.pid}").exists()


def test_a_server_is_ended_and_started_again_with_what_it_had() -> None:
    """Until it is closed; then it begins anew."""
    server = Server()
    assert server.pid is None and not server.is_running
    with pytest.raises(ServerError, match="the server was never started"):
        _ = server.log_path
    with server:
        folder, first = server.folder, server.pid
        assert first and server.is_running
        with pytest.raises(ServerError, match="the server runs already"):
            server.start()
        for end in (server.stop, server.kill):
            end()
            end()
            assert server.pid is None and not server.is_running
            server.start()
            assert server.pid != first and server.folder == folder
        assert (folder / "starts").read_text() == "started\n" * 3
        assert server.log_path.read_text() == "said\n" * 3
        last = server.pid
        assert last
    assert not is_there(last) and not folder.exists()
    with server:
        assert (server.folder / "starts").read_text() == "started\n"


class Broken(Server):
    script = "echo what is wrong; exit 7"


def test_a_server_that_does_not_come_up_says_why_and_leaves_nothing() -> None:
    server = Broken()
    with pytest.raises(ServerError, match=r"ended with exit code 7.*\n.*what is wrong"):
        server.start()
    folder = server.folder
    assert not server.is_running
    server.close()
    assert not folder.exists()
    with pytest.raises(ServerError, match="ended with exit code 7"), server:
        pass
    with pytest.raises(ServerError, match="was never started"):
        _ = server.folder


class Several(LocalServers):
    def __init__(self) -> None:
        super().__init__("cluster", 60)

    def _make(self, folder: Path) -> Iterator[ServerProcess]:
        for name in ("a", "b"):
            yield ServerProcess(name, ["sh", "-c", _SERVES], folder)

    def _is_up(self, name: str) -> bool:
        return (self.folder / f"up-{self._process(name).pid}").exists()


def test_servers_that_serve_together_start_and_end_together() -> None:
    with Several() as servers:
        folder = servers.folder
        pids = [process.pid for process in servers._processes.values()]
        assert sorted(path.name for path in folder.glob("*.log")) == ["a.log", "b.log"]
        with pytest.raises(ServerError, match=r"the cluster has no process c \(it has a, b\)"):
            servers._start("c")
    assert len(pids) == 2 and not any(is_there(pid) for pid in pids if pid)
    assert not folder.exists()
