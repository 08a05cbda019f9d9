"""Servers as processes of their own on 127.0.0.1, for tests and the demo."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", bound="LocalServers")

_LOG_END = 6000  # characters of a log in an error's message


class ServerError(Exception):
    """A server cannot be fetched, started, or did not do in time what it was asked."""


class ServerProcess:
    """One server process, which can be ended in any way and started again.

    It leads a process group: what it starts ends with it. All of it ends too when this Python
    process ends, in whatever way.

    Args:
        name: For messages and the log's name.
        command: What to run.
        folder: Its working directory, where its log is; removed when this process dies.
        environment: Variables added to this process's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = [str(part) for part in command]
        self._folder = folder
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id; None while it was not started or was ended."""
        return self._process.pid if self._process else None

    @property
    def log_path(self) -> Path:
        """What it wrote, in all its starts."""
        return self._folder / f"{self.name}.log"

    @property
    def log_end(self) -> str:
        """The last lines of the log."""
        try:
            return self.log_path.read_text(errors="replace")[-_LOG_END:]
        except FileNotFoundError:
            return ""

    def start(self) -> None:
        """Start it; returns at once.

        Raises:
            ServerError: It runs already.
        """
        if self._process is not None:
            raise ServerError(f"the {self.name} runs already")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the tests: they end the server when they are done with it. And it
                # makes the group that is signalled as a whole.
                start_new_session=True,
            )
        self._watchdog = _watch(self._process.pid, self._folder)

    def wait_until_up(self, is_up: Callable[[], bool], timeout: float) -> None:
        """Return when the condition holds.

        Raises:
            ServerError: The process ended, or it does not hold in time; the end of the log is in
                the message. A process that is still there is killed.
        """
        deadline = time.monotonic() + timeout
        while not is_up():
            ended = not self.is_running()
            if ended or time.monotonic() > deadline:
                code = self._process.returncode if self._process else None
                problem = (
                    f"ended with exit code {code}"
                    if ended
                    else f"did not answer within {timeout:g} s"
                )
                self.end(signal.SIGKILL)
                raise ServerError(f"the {self.name} {problem}; the end of its log:\n{self.log_end}")
            time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def has_ended(self) -> bool:
        """Whether it was started and has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Signal the process and wait until it is gone, then kill what it started.

        SIGKILL goes to all of them at once. Does nothing if it is not there.

        Raises:
            ServerError: It was still there after 30 seconds, and was killed.
        """
        process, self._process = self._process, None
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            # First, so that it never sees a process id that is somebody else's by then.
            watchdog.kill()
            watchdog.communicate()
        if process is None:
            return
        if how != signal.SIGKILL:
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        late = how != signal.SIGKILL and process.poll() is None
        # The group keeps its id while any member lives, also without its leader.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if late:
            raise ServerError(f"the {self.name} did not stop within 30 s and was killed")


class LocalServers(ABC):
    """Processes that serve together, with a folder of their own; a context manager.

    Entering starts them, leaving ends them and removes the folder. In between each can be ended in
    any way and started again, with what is in the folder.

    Args:
        name: For messages, and the beginning of the folder's name.
        start_timeout: Seconds until each process must answer.
    """

    def __init__(self, name: str, start_timeout: float) -> None:
        self._name = name
        self._start_timeout = start_timeout
        self._folder: Path | None = None
        self._processes: dict[str, ServerProcess] = {}

    def __enter__(self: T) -> T:
        try:
            self._prepare()
            self._start(*self._processes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def folder(self) -> Path:
        """Where everything of theirs is. Gone after `close`."""
        if self._folder is None:
            raise ServerError(f"the {self._name} was never started")
        return self._folder

    def close(self) -> None:
        """End all processes and remove the folder. The object can be started again, empty."""
        for process in reversed(self._processes.values()):
            process.end(signal.SIGKILL)
        self._processes = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @abstractmethod
    def _make(self, folder: Path) -> Iterable[ServerProcess]:
        """Write what they need; the processes, in the order they start. `folder` is there."""

    @abstractmethod
    def _is_up(self, name: str) -> bool:
        """Whether a process answers."""

    def _prepare(self) -> None:
        """Make the folder and the processes, if that is not done yet."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._name.replace(' ', '-')}-"))
            try:
                self._processes = {process.name: process for process in self._make(self._folder)}
            except BaseException:
                self.close()
                raise

    def _start(self, *names: str) -> None:
        """Start processes that do not run; returns when they all answer.

        Raises:
            ServerError: One runs already, or did not come up; its log's end is in the message.
        """
        for name in names:
            self._process(name).start()
        for name in names:
            process = self._process(name)
            try:
                process.wait_until_up(partial(self._is_up, name), self._start_timeout)
            except BaseException:
                process.end(signal.SIGKILL)
                raise

    def _process(self, name: str) -> ServerProcess:
        try:
            return self._processes[name]
        except KeyError:
            known = ", ".join(self._processes) or "none"
            raise ServerError(f"the {self._name} has no process {name} (it has {known})") from None


class LocalServer(LocalServers):
    """One process with a folder of its own; a context manager, as `LocalServers` says."""

    @property
    def pid(self) -> int | None:
        """The process's id; None while it does not run."""
        process = self._processes.get(self._name)
        return process.pid if process else None

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        process = self._processes.get(self._name)
        return process is not None and process.is_running()

    @property
    def log_path(self) -> Path:
        """What it wrote, in all its starts."""
        return self.folder / f"{self._name}.log"

    def start(self) -> None:
        """Start it and return when it answers.

        Raises:
            ServerError: It runs already, or did not come up; the log's end is in the message.
        """
        self._prepare()
        self._start(self._name)

    def stop(self) -> None:
        """End it with SIGTERM, as an orderly shutdown does. Nothing if it is not up.

        Raises:
            ServerError: It was still there after 30 seconds, and was killed.
        """
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash does. Nothing if it is not up."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End it and remove the folder. The object can be started again, empty."""
        self.kill()
        super().close()

    def _end(self, how: signal.Signals) -> None:
        if process := self._processes.get(self._name):
            process.end(how)

    def _make(self, folder: Path) -> Iterable[ServerProcess]:
        return [ServerProcess(self._name, self._command(folder), folder)]

    @abstractmethod
    def _command(self, folder: Path) -> Sequence[str]:
        """Write what it needs into its folder; what to run."""


def java_command(jars: str, *flags: str) -> list[str]:
    """The beginning of a Java command with a small, fast starting JVM.

    Args:
        jars: The classpath.
        flags: More options for the JVM.

    Raises:
        ServerError: There is no Java.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else "java"
    if shutil.which(java) is None:
        raise ServerError(f"Java 17 or newer is needed, and there is no {java}")
    return [java, "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", *flags, "-cp", jars]


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now.

    They are taken from below the range outgoing connections get theirs from, so that none of
    those has the port while the server is down between two starts.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError("there is no free port between 20000 and 32000")


def is_listening(port: int) -> bool:
    """Whether somebody takes connections at a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], problem: str, timeout: float = 30) -> None:
    """Return when the condition holds; it is tried every 20 ms.

    Raises:
        ServerError: It does not after ``timeout`` seconds; the message is ``problem`` and that.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{problem} after {timeout:g} s")
        time.sleep(0.02)


def _watch(pid: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start a shell that kills the process group and removes its data when this process is gone.

    It reads from a pipe that only this process holds open, so it sees the end of it also after
    a SIGKILL, which leaves no time for anything else.
    """
    return subprocess.Popen(
        # Without "--", which not every shell's kill knows.
        ["sh", "-c", 'read -r _; kill -9 "-$1"; rm -rf "$2"', "sh", str(pid), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
