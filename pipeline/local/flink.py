"""A real Flink session cluster on this machine, without Docker: for tests and the demo.

    with FlinkCluster(task_slots=4) as cluster:
        run_pipeline(["--runner=FlinkRunner", *cluster.runner_options(), ...])
        job = cluster.rest.wait_for_job()
        cluster.rest.stop(job)

A JobManager, TaskManagers and a pool of Python workers as Flink users have them, and optionally
Beam's expansion service (for `ReadFromKafka`), a job server that outlives pipelines, and ZooKeeper,
with which jobs survive the JobManager. Each is a process on free ports of 127.0.0.1. They need Java
17 or newer and, once, Maven to fetch the jars (`pipeline.local.jars`, 190 MB).

Sizes are small: the whole cluster takes about 2 GB.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import stat
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.local.jars import classpath, fetch
from pipeline.local.processes import (
    LocalServers,
    ServerError,
    ServerProcess,
    free_ports,
    is_listening,
    java_command,
    wait_until,
)

_ROOT = Path(__file__).parent.parent.parent

_ENVIRONMENTS = {
    # Workers import what the pipeline was made of: this code, wherever it is.
    "worker-pool": {"PYTHONPATH": str(_ROOT)},
    # Jobs are made with what the pipeline asks for on a job server that it starts itself.
    "job-server": {"FLINK_CONF_DIR": str(_ROOT / "pipeline" / "submit" / "flink_conf")},
}

_START_SECS = 180.0  # of one process; a second or two unless the machine has other work
_REST_SECS = 30.0  # of one request

# What Flink and Beam reach into on Java 17.
_OPENS = (
    *(
        f"--add-opens=java.base/java.{package}=ALL-UNNAMED"
        for package in ("lang", "util", "net", "io", "nio", "util.concurrent", "time")
    ),
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
)

_LOGGING = """\
handlers=java.util.logging.ConsoleHandler
.level=INFO
java.util.logging.ConsoleHandler.formatter=java.util.logging.SimpleFormatter
java.util.logging.SimpleFormatter.format=%1$tF %1$tT.%1$tL %4$s %3$s %5$s%6$s%n
"""

_HEAP_MB = {
    "zookeeper": 64,
    "jobmanager": 384,
    "taskmanager": 1024,
    "job-server": 384,
    "expansion-service": 256,
}

# Flink asks for every part of a TaskManager's memory when nobody starts it by its shell scripts.
_MEMORY_CONFIG = {
    "jobmanager.memory.heap.size": f"{_HEAP_MB['jobmanager']}mb",
    "jobmanager.memory.off-heap.size": "128mb",
    "taskmanager.cpu.cores": "2",
    "taskmanager.memory.framework.heap.size": "64mb",
    "taskmanager.memory.task.heap.size": f"{_HEAP_MB['taskmanager'] - 64}mb",
    "taskmanager.memory.framework.off-heap.size": "128mb",
    "taskmanager.memory.task.off-heap.size": "256mb",
    "taskmanager.memory.network.min": "64mb",
    "taskmanager.memory.network.max": "64mb",
    "taskmanager.memory.managed.size": "32mb",
    "taskmanager.memory.jvm-metaspace.size": "256mb",
    "taskmanager.memory.jvm-overhead.min": "192mb",
    "taskmanager.memory.jvm-overhead.max": "192mb",
}

_CLUSTER_CONFIG = {
    "jobmanager.rpc.address": "127.0.0.1",
    "jobmanager.bind-host": "127.0.0.1",
    "taskmanager.host": "127.0.0.1",
    "taskmanager.bind-host": "127.0.0.1",
    "rest.address": "127.0.0.1",
    "rest.bind-address": "127.0.0.1",
    "state.backend.type": "hashmap",
    # The jars are on the classpath: classes are not loaded anew for each job, which would never
    # be unloaded again.
    "classloader.resolve-order": "parent-first",
    "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
    "restart-strategy.type": "fixed-delay",
    "restart-strategy.fixed-delay.attempts": "1000",
    # Longer than Beam's reader may still poll in what is restarted: its consumers are shared.
    "restart-strategy.fixed-delay.delay": "3s",
    # A process that was killed is missed within seconds.
    "heartbeat.interval": "1000",
    "heartbeat.timeout": "10000",
    # And found again when it is back, instead of half a minute later.
    "cluster.registration.max-timeout": "2000",
    "cluster.registration.error-delay": "1000",
    "cluster.registration.refused-registration-delay": "1000",
    # What the REST API answers is at most so old: records per task, and everything else.
    "metrics.fetcher.update-interval": "1000",
    "web.refresh-interval": "500",
}

_EXPANSION_SERVICE = "org.apache.beam.sdk.expansion.service.ExpansionService"
_JOB_SERVER = "org.apache.beam.runners.flink.FlinkJobServerDriver"
_ENDED = ("FINISHED", "FAILED", "CANCELED")

# How much of a trace or a log is shown when something went wrong.
_TRACE_LINES = 12
_LOG_LINES = 10  # the last ones, and of those before as many that warn
_WARNS = re.compile(r" (?:WARNING|SEVERE) ")  # as `_LOGGING` writes it


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the cluster lists it. ``status`` is Flink's: RUNNING, RESTARTING, FINISHED..."""

    id: str
    name: str
    status: str


class FlinkRest:
    """The REST API of a JobManager, as far as tests and the demo need it.

    Args:
        address: host:port.

    Raises:
        ServerError: In every method: the JobManager does not answer or refuses; while waiting only
            if it still does when the time is over.
    """

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}"

    def jobs(self) -> list[Job]:
        """All jobs the cluster remembers, the newest first."""
        listed = self.get("/jobs/overview")["jobs"]
        listed.sort(key=lambda job: job["start-time"], reverse=True)
        return [Job(job["jid"], job["name"], job["state"]) for job in listed]

    def running_jobs(self) -> list[Job]:
        """The jobs that have not ended."""
        return [job for job in self.jobs() if job.status not in _ENDED]

    def wait_for_job(self, known: Container[str] = (), timeout: float = 300) -> str:
        """Wait for a job that runs, all its tasks too; its id.

        Args:
            known: Ids of jobs that are not meant. The JobManager's answers may be old: one that was
                cancelled just now may seem to run.
            timeout: Seconds.
        """
        found: list[str] = []

        def is_running() -> bool:
            for job in self.running_jobs():
                if job.id not in known and self._all_tasks_run(job.id):
                    found.append(job.id)
            return bool(found)

        _wait(is_running, "no such job runs", timeout)
        return found[0]

    def status(self, job: str) -> str:
        """Flink's word for the state of a job."""
        return str(self.get(f"/jobs/{job}")["state"])

    def wait_for_status(self, job: str, *statuses: str, timeout: float = 180) -> str:
        """Wait until a job has one of the statuses; returns which."""
        seen: list[str] = []

        def reached() -> bool:
            seen[:] = [self.status(job)]
            return seen[0] in statuses

        _wait(reached, f"job {job} is not {' or '.join(statuses)}", timeout)
        return seen[0]

    def wait_until_restored(self, job: str, times: int = 1, timeout: float = 300) -> None:
        """Wait until a job was restored so often from a checkpoint and runs again, all of it."""

        def is_restored() -> bool:
            restored = int(self.checkpoints(job)["counts"]["restored"])
            return restored >= times and self._all_tasks_run(job)

        _wait(is_restored, f"job {job} is not restored and running", timeout)

    def exception(self, job: str) -> str:
        """The trace of what made a job fail or restart last; empty if nothing did."""
        return str(self.get(f"/jobs/{job}/exceptions").get("root-exception") or "")

    def checkpoints(self, job: str) -> Any:
        """Flink's statistics of a job's checkpoints: ``counts``, ``latest``, ``history``..."""
        return self.get(f"/jobs/{job}/checkpoints")

    def completed_checkpoints(self, job: str) -> int:
        """How many checkpoints of a job are complete, those of its earlier attempts too."""
        return int(self.checkpoints(job)["counts"]["completed"])

    def wait_for_checkpoints(self, job: str, more: int = 1, timeout: float = 180) -> str:
        """Wait until so many more checkpoints are complete; the path of the last one.

        One that was under way at the call may be among them.
        """
        wanted = self.completed_checkpoints(job) + more
        _wait(
            lambda: self.completed_checkpoints(job) >= wanted,
            f"job {job} has not {more} more checkpoints",
            timeout,
        )
        return self.latest_checkpoint(job)

    def latest_checkpoint(self, job: str) -> str:
        """The path of the last complete checkpoint, for ``--savepoint_path``."""
        latest = self.checkpoints(job)["latest"]["completed"]
        if latest is None:
            raise ServerError(f"job {job} has no checkpoint yet")
        return str(latest["external_path"])

    def savepoint(self, job: str, timeout: float = 180) -> str:
        """Write a savepoint while the job goes on; its path."""
        return self._operation(job, "savepoints", {"cancel-job": False}, timeout)

    def stop(self, job: str, drain: bool = False, timeout: float = 180) -> str:
        """End a job with a savepoint; its path.

        Args:
            job: Its id.
            drain: Ends all input first, so that windows close and their timers fire. For a job
                that will not come back.
            timeout: Seconds.
        """
        path = self._operation(job, "stop", {"drain": drain}, timeout)
        self.wait_for_status(job, *_ENDED)
        return path

    def cancel(self, job: str) -> None:
        """End a job at once, as after a crash but for the cleanup; returns when it has ended."""
        self.request("PATCH", f"/jobs/{job}?mode=cancel")
        self.wait_for_status(job, *_ENDED)

    def cancel_all(self) -> None:
        """End every job: one that is left holds its slots for ever."""
        for job in self.running_jobs():
            self.cancel(job.id)

    def tasks(self, job: str) -> dict[str, dict[str, Any]]:
        """Per task's name: its ``id``, ``parallelism``, ``status`` and ``metrics``.

        The metrics are ``read-records``, ``write-records``, ``accumulated-busy-time`` and others
        over all subtasks.
        """
        return {task["name"]: task for task in self.get(f"/jobs/{job}")["vertices"]}

    def subtasks(self, job: str, task: str) -> list[dict[str, float]]:
        """Per subtask of a task its metrics, which are named as those of `tasks`."""
        return [each["metrics"] for each in self.get(f"/jobs/{job}/vertices/{task}")["subtasks"]]

    def metrics(self, job: str, task: str, pattern: str) -> dict[str, float]:
        """Metrics of a task, Flink's and Beam's, summed over its subtasks.

        Args:
            job: Its id.
            task: Its id, of `tasks`.
            pattern: A regular expression some part of a metric's name has to match.
        """
        path = f"/jobs/{job}/vertices/{task}/subtasks/metrics"
        listed = [metric["id"] for metric in self.get(path)]
        found: dict[str, float] = {}
        for name in filter(re.compile(pattern).search, listed):
            for metric in self.get(f"{path}?get={urllib.parse.quote(name, safe='')}&agg=sum"):
                found[metric["id"]] = float(metric["sum"])
        return found

    def get(self, path: str) -> Any:
        """GET; the JSON that comes back."""
        return self.request("GET", path)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Any request; the JSON that comes back, or None."""
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # Not by the proxy of the environment: it does not know this machine's ports.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_REST_SECS) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ServerError(f"{method} {path} is answered {error.code}: {text}") from None
        except OSError as error:
            raise ServerError(f"the JobManager does not answer: {error}") from None
        return json.loads(content) if content else None

    def _operation(self, job: str, name: str, body: dict[str, Any], timeout: float) -> str:
        """Begin a savepoint and wait for its end; its path."""
        trigger = self.request("POST", f"/jobs/{job}/{name}", body)["request-id"]
        answer: dict[str, Any] = {}

        def is_complete() -> bool:
            answer.update(self.get(f"/jobs/{job}/savepoints/{trigger}"))
            return bool(answer["status"]["id"] == "COMPLETED")

        _wait(is_complete, f"the savepoint of job {job} is not complete", timeout)
        operation = answer["operation"]
        if "location" not in operation:
            trace = operation["failure-cause"]["stack-trace"]
            raise ServerError(f"the savepoint of job {job} failed:\n{trace[:4000]}")
        return str(operation["location"])

    def _all_tasks_run(self, job: str) -> bool:
        listed = self.get(f"/jobs/{job}")
        return bool(listed["state"] == "RUNNING") and all(
            task["status"] == "RUNNING" for task in listed["vertices"]
        )


def _shortened(trace: list[str]) -> list[str]:
    """A Java trace: what was thrown, and what was the cause of it, which comes last. Pure."""
    first, rest = trace[:_TRACE_LINES], trace[_TRACE_LINES:]
    causes = [line for line in rest[:-_TRACE_LINES] if line.startswith("Caused by")]
    return [*first, *(["..."] if rest else []), *causes, *rest[-_TRACE_LINES:]]


class FlinkCluster(LocalServers):
    """A session cluster; a context manager. Entering starts it, leaving ends it and its data.

    Args:
        task_managers: How many, each with a Python worker process of its own per job.
        task_slots: Of each: how many subtasks of a task it runs.
        job_server: Also start a job server, for PortableRunner. FlinkRunner starts its own.
        expansion_service: Also start the service that `ReadFromKafka` asks.
        high_availability: Also start ZooKeeper. Without it a JobManager that ends forgets its jobs.
        first_jar: Its classes come in place of the other jars'.
        config: Settings of Flink, added to or put in place of the usual ones.

    Attributes:
        rest: The JobManager's REST API.
    """

    def __init__(
        self,
        *,
        task_managers: int = 1,
        task_slots: int = 4,
        job_server: bool = False,
        expansion_service: bool = False,
        high_availability: bool = False,
        first_jar: Path | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__("cluster", _START_SECS)
        ports = iter(free_ports(7))
        self._rest_port = next(ports)
        self._job_manager_port = next(ports)
        self._zookeeper_port = next(ports)
        self._worker_pool_port = next(ports)
        self._job_server_port = next(ports)
        self._expansion_port = next(ports)
        self._task_managers = task_managers
        self._task_slots = task_slots
        self._with_job_server = job_server
        self._with_expansion_service = expansion_service
        self._high_availability = high_availability
        self._first_jar = first_jar
        self._extra_config = dict(config or {})
        self.rest = FlinkRest(self.address)

    # What a pipeline needs to know

    @property
    def address(self) -> str:
        """host:port for ``--flink_master``."""
        return f"127.0.0.1:{self._rest_port}"

    @property
    def worker_pool(self) -> str:
        """host:port for ``--environment_config`` with ``--environment_type=EXTERNAL``."""
        return f"127.0.0.1:{self._worker_pool_port}"

    @property
    def job_endpoint(self) -> str:
        """host:port for ``--job_endpoint``."""
        return f"127.0.0.1:{self._job_server_port}"

    @property
    def expansion_service(self) -> str:
        """host:port for `ReadFromKafka`."""
        return f"127.0.0.1:{self._expansion_port}"

    @property
    def job_server_jar(self) -> Path:
        """For ``--flink_job_server_jar``: what Beam would fetch, 150 MB, and start itself."""
        return self.folder / "job-server.jar"

    @property
    def expansion_service_jar(self) -> Path:
        """For ``--expansion_service``: what Beam would fetch, 140 MB, and start itself."""
        return self.folder / "expansion-service.jar"

    def runner_options(self) -> list[str]:
        """Options by which a pipeline runs here, besides ``--runner=FlinkRunner``."""
        return [
            f"--flink_master={self.address}",
            f"--flink_job_server_jar={self.job_server_jar}",
            "--environment_type=EXTERNAL",
            f"--environment_config={self.worker_pool}",
        ]

    # The processes

    @property
    def names(self) -> list[str]:
        """The processes, in the order they start: ``jobmanager``, ``taskmanager-1``..."""
        return list(self._processes)

    def log(self, name: str) -> str:
        """What a process wrote, in all its starts."""
        path = self._process(name).log_path
        return path.read_text(errors="replace") if path.exists() else ""

    def pid(self, name: str) -> int | None:
        """A process's id; None while it does not run."""
        return self._process(name).pid

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process and what it started: by default as a crash does."""
        self._process(name).end(how)

    def start(self, *names: str) -> None:
        """Start processes that do not run; returns when they all answer.

        Raises:
            ServerError: One runs already, or did not come up; its log's end is in the message.
        """
        self._start(*names)

    def restart(self, *names: str) -> None:
        """Kill processes and start them again; returns when they all answer."""
        for name in names:
            self.kill(name)
        self.start(*names)

    def mend(self) -> list[str]:
        """Start again what ended by itself, as whoever runs a real cluster does; their names.

        A TaskManager does when its heap is full, or a task of it cannot be cancelled.
        """
        ended = [name for name, process in self._processes.items() if process.has_ended()]
        self.restart(*ended)  # killed too: what they started may still be there
        return ended

    def start_over(self) -> None:
        """Start every process again, without any job: for when what is wrong is not known."""
        for name in self._processes:
            self.kill(name)
        for name in ("zookeeper", "jobs"):  # by which jobs survive the JobManager
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.start(*self._processes)

    def describe(self) -> str:
        """What there is to know when something on it went wrong: processes, jobs, ends of logs."""
        lines = []
        for name, process in self._processes.items():
            state = "ended by itself" if process.has_ended() else f"pid {process.pid}"
            lines.append(f"{name}: {state}")
        try:
            for job in self.rest.jobs()[:3]:
                tasks = (
                    f"{name} {task['status']}" for name, task in self.rest.tasks(job.id).items()
                )
                lines.append(f"job {job.id}: {job.status} ({', '.join(tasks)})")
                lines += _shortened(self.rest.exception(job.id).splitlines())
        except ServerError as error:
            lines.append(str(error))
        for name in self._processes:
            log = self.log(name).splitlines()
            warned = [line for line in log[:-_LOG_LINES] if _WARNS.search(line)]
            lines += [f"--- log of {name}", *warned[-_LOG_LINES:], "...", *log[-_LOG_LINES:]]
        return "\n".join(lines)

    def _start(self, *names: str) -> None:
        # First: what finds no ZooKeeper gives up sooner than that starts here.
        if "zookeeper" in names:
            super()._start("zookeeper")
        super()._start(*(name for name in names if name != "zookeeper"))

    def _is_up(self, name: str) -> bool:
        ports = {
            "zookeeper": self._zookeeper_port,
            "worker-pool": self._worker_pool_port,
            "job-server": self._job_server_port,
            "expansion-service": self._expansion_port,
        }
        if name in ports:
            return is_listening(ports[name])
        registered = self._registered()
        if name == "jobmanager":
            return registered >= 0
        # A TaskManager counts as up when the JobManager has as many as run here.
        running = sum(
            process.is_running()
            for other, process in self._processes.items()
            if other.startswith("taskmanager")
        )
        return self._process(name).is_running() and registered >= running

    def _registered(self) -> int:
        """How many TaskManagers the JobManager has; -1 if it does not answer."""
        try:
            return int(self.rest.get("/overview")["taskmanagers"])
        except ServerError:
            return -1

    # Their files and commands

    def _make(self, folder: Path) -> Iterator[ServerProcess]:
        jars = fetch("flink")
        for name in ("conf", "tmp"):
            (folder / name).mkdir()
        (folder / "logging.properties").write_text(_LOGGING)
        config = {**_CLUSTER_CONFIG, **_MEMORY_CONFIG, **self._own_config(), **self._extra_config}
        (folder / "conf" / "config.yaml").write_text(
            "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
        )
        _write_classpath_jar(self.job_server_jar, jars, _JOB_SERVER)
        _write_classpath_jar(self.expansion_service_jar, jars, _EXPANSION_SERVICE)
        for name, command in self._commands(folder).items():
            yield ServerProcess(name, command, folder, _ENVIRONMENTS.get(name))

    def _own_config(self) -> dict[str, str]:
        config = {
            "jobmanager.rpc.port": str(self._job_manager_port),
            "rest.port": str(self._rest_port),
            "taskmanager.numberOfTaskSlots": str(self._task_slots),
            "state.checkpoints.dir": f"file://{self.folder}/checkpoints",
            "state.savepoints.dir": f"file://{self.folder}/savepoints",
            "io.tmp.dirs": f"{self.folder}/tmp",
        }
        if self._high_availability:
            config |= {
                "high-availability.type": "zookeeper",
                "high-availability.zookeeper.quorum": f"127.0.0.1:{self._zookeeper_port}",
                "high-availability.storageDir": f"file://{self.folder}/jobs",
                "high-availability.jobmanager.port": str(self._job_manager_port),
                # How long a killed JobManager keeps its successor waiting.
                "high-availability.zookeeper.client.session-timeout": "5000",
                "zookeeper.sasl.disable": "true",
            }
        return config

    def _commands(self, folder: Path) -> dict[str, list[str]]:
        flink = ("--configDir", f"{folder}/conf")
        commands = {}
        if self._high_availability:
            (folder / "zookeeper.properties").write_text(
                f"dataDir={folder}/zookeeper\nclientPort={self._zookeeper_port}\n"
                "clientPortAddress=127.0.0.1\ntickTime=1000\nadmin.enableServer=false\n"
            )
            commands["zookeeper"] = self._java(
                "zookeeper",
                # Flink's own copy.
                "org.apache.flink.shaded.zookeeper3.org.apache.zookeeper.server.quorum"
                ".QuorumPeerMain",
                f"{folder}/zookeeper.properties",
            )
        commands["jobmanager"] = self._java(
            "jobmanager",
            "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint",
            *flink,
        )
        for number in range(1, self._task_managers + 1):
            commands[f"taskmanager-{number}"] = self._java(
                "taskmanager", "org.apache.flink.runtime.taskexecutor.TaskManagerRunner", *flink
            )
        commands["worker-pool"] = [
            sys.executable,
            *("-m", "apache_beam.runners.worker.worker_pool_main"),
            f"--service_port={self._worker_pool_port}",
            f"--container_executable={_write_worker_script(folder)}",
        ]
        if self._with_job_server:
            commands["job-server"] = self._java(
                "job-server",
                _JOB_SERVER,
                "--job-host=127.0.0.1",
                f"--job-port={self._job_server_port}",
                *("--artifact-port=0", "--expansion-port=0"),
                f"--artifacts-dir={folder}/artifacts",
                f"--flink-master={self.address}",
            )
        if self._with_expansion_service:
            commands["expansion-service"] = self._java(
                "expansion-service",
                _EXPANSION_SERVICE,
                str(self._expansion_port),
                "--javaClassLookupAllowlistFile=*",
                # Inside the TaskManager, and as a splittable DoFn, which finds new partitions.
                "--defaultEnvironmentType=EMBEDDED",
                "--experiments=beam_fn_api",
            )
        return commands

    def _java(self, kind: str, main: str, *arguments: str) -> list[str]:
        flags = [*_OPENS, f"-Xmx{_HEAP_MB[kind]}m"]
        if kind == "taskmanager":
            flags += ["-XX:MaxDirectMemorySize=448m", "-XX:MaxMetaspaceSize=256m"]
        else:
            flags.append("-XX:TieredStopAtLevel=1")  # starts sooner; their work is little
        flags.append(f"-Djava.util.logging.config.file={self.folder}/logging.properties")
        # The expansion service wants one jar at least that it may hand to the job.
        jars = f"{classpath('flink')}:{self.job_server_jar}"
        if self._first_jar is not None:
            jars = f"{self._first_jar}:{jars}"
        return [*java_command(jars, *flags), main, *arguments]


def _wait(condition: Callable[[], bool], problem: str, timeout: float) -> None:
    """`wait_until`, but a JobManager that does not answer, or does not know the job, may yet."""
    reason = ""

    def holds() -> bool:
        nonlocal reason
        try:
            reason = ""
            return condition()
        except ServerError as error:
            reason = f": {error}"
            return False

    try:
        wait_until(holds, problem, timeout)
    except ServerError as error:
        raise ServerError(f"{error}{reason}") from None


def _write_worker_script(folder: Path) -> Path:
    """What the worker pool starts for each worker, in place of a container's own program."""
    script = folder / "worker"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.local.worker "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def _write_classpath_jar(path: Path, jars: Path, main: str) -> None:
    """Write a jar that holds no class but names other jars, and which class of theirs to run."""
    urls = " ".join(jar.as_uri() for jar in sorted(jars.glob("*.jar")))
    lines = ["Manifest-Version: 1.0", f"Main-Class: {main}", f"Class-Path: {urls}"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", "".join(map(_manifest_line, lines)))


def _manifest_line(text: str) -> str:
    """A line of a manifest, folded: none may have more than 72 bytes, the line's end among them."""
    parts = [text[:70], *(text[i : i + 69] for i in range(70, len(text), 69))]
    return "\r\n ".join(parts) + "\r\n"
