"""Whole runs for tests: the pipeline as a process of its own, and what must hold of every run.

    topics = Topics(broker, names, partitions=4, count=100)
    with serve() as server:
        topics.run(server, batch_size=10)
    topics.assert_exactly_once()

The process gets its options as a user gives them, so that exit codes, signals and what it prints
are the real ones. The checkers look at nothing but Kafka and the calls the function got.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import Consumer, ConsumerGroupState, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker, StoredRecord
from pipeline.local.faults import Fault
from pipeline.local.lambda_server import FunctionSpec, LambdaContext, LambdaServer
from pipeline.local.processes import ServerError, wait_until
from tests import ROOT
from transforms.original import ORIGINAL_HEADER, decode_original

if TYPE_CHECKING:
    from tests.conftest import Names

FUNCTION = "process-orders"
ACCESS_KEY, SECRET_KEY = "AKIDFORTESTS", "secret-key-for-tests"
MEMBERS = ROOT / "tests" / "members.properties"
SAME_MEMBER = ROOT / "tests" / "static.properties"
"""As `kafka_config_file`, for runs that are killed and started again."""
TRANSACTIONS = ROOT / "tests" / "transactions.properties"
"""The same, for runs with --delivery=exactly_once."""
RUN_SECS = 120.0
"""After so long a run is taken for stuck; none here needs a quarter of it."""


Partition = tuple[str, int]
Coordinates = tuple[str, int, int]
"""(topic, partition, offset)."""


# The function


def answer(event: Any, context: LambdaContext | None = None) -> Any:
    """Answer each record with its own value, so that a mixed-up answer shows."""
    return [
        {
            "payload": {
                name: entry["payload"][name]
                for name in ("timestamp", "topic", "partition", "offset")
            }
            | {"result": entry["payload"]["value"]}
        }
        for entry in event
    ]


def poison(*values: str) -> Callable[[Any, LambdaContext], Any]:
    """A function that fails in each batch that holds one of the values."""

    def handler(event: Any, context: LambdaContext) -> Any:
        for entry in event:
            if entry["payload"]["value"] in values:
                raise ValueError("cannot process this order")
        return answer(event)

    return handler


def serve(
    handler: Any = answer,
    faults: Iterable[Fault] = (),
    timeout_secs: float = 60,
    concurrency: int = 100,
    **settings: Any,
) -> LambdaServer:
    """A Lambda endpoint that serves `FUNCTION`."""
    function = FunctionSpec(FUNCTION, handler, timeout_secs, concurrency)
    return LambdaServer([function], faults=faults, **settings)


def of_partition(partition: int) -> Callable[[bytes, str], bool]:
    """For a fault's `when`: the calls of one partition."""
    wanted = b'"partition":%d,' % partition
    return lambda payload, name: wanted in payload


class Invocation(NamedTuple):
    """One call of the function."""

    topic: str
    partition: int
    offsets: tuple[int, ...]
    started: float
    ended: float
    answered: bool
    """Whether the caller got a reply, and no function error."""
    function_error: bool
    """Whether the caller got a function error."""
    entries: list[dict[str, Any]]
    """The records as the function saw them."""

    @property
    def key(self) -> Partition:
        return (self.topic, self.partition)


def records_of(event: Any) -> list[dict[str, Any]]:
    """An event's records, whatever its envelope."""
    if isinstance(event, dict):
        (found,) = event["records"].values()
        return found
    return [entry.get("payload", entry) for entry in event]


def invocations(server: LambdaServer) -> list[Invocation]:
    """The calls so far in the order they began; the check before a run is none."""
    found = []
    for call in server.calls:
        if call.invocation_type == "DryRun":
            continue
        entries = records_of(json.loads(call.payload))
        partitions = {(entry["topic"], entry["partition"]) for entry in entries}
        assert len(partitions) == 1, f"one call with records of {partitions}"
        found.append(
            Invocation(
                *partitions.pop(),
                tuple(entry["offset"] for entry in entries),
                call.started,
                call.ended,
                200 <= call.status < 300 and call.function_error is None,
                call.status == 200 and call.function_error is not None,
                entries,
            )
        )
    return sorted(found, key=lambda invocation: invocation.started)


def offsets_called(server: LambdaServer, partition: int = 0) -> list[list[int]]:
    """The offsets of each call of a partition, in the order of the calls."""
    return [list(i.offsets) for i in invocations(server) if i.partition == partition]


# The process


def environment(**changes: str | None) -> dict[str, str]:
    """The environment of a run: with credentials that work, without any of this machine's."""
    variables: dict[str, str | None] = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        # On SIGABRT each thread's stack goes to stderr: see `Sink.wait`.
        "PYTHONFAULTHANDLER": "1",
        **changes,
    }
    return {name: value for name, value in variables.items() if value is not None}


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """The line of `--summary=json`, which is all there is on stdout."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, f"not one line on stdout: {lines}"
        return json.loads(lines[0])

    @property
    def errors(self) -> list[str]:
        """What is said to the user about why the run failed."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Sink:
    """A process of the pipeline, just started. Leaving the context kills it if it still runs."""

    def __init__(
        self,
        arguments: Iterable[str],
        env: Mapping[str, str],
        program: Sequence[str] = ("-m", "pipeline"),
    ) -> None:
        # Files and not pipes, which would have to be emptied while it runs.
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 (closed on leaving)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            # Ctrl-C is for the tests, which end the process themselves.
            start_new_session=True,
        )

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        # What it started and could not end.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._stdout.close()
        self._stderr.close()

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return _read(self._stderr)

    def until(self, condition: Callable[[], bool], problem: str, timeout: float = 60) -> None:
        """Wait for something the running process brings about.

        Raises:
            AssertionError: The process ended before; its stderr is in the message.
            ServerError: It did not come about in time.
        """

        def holds() -> bool:
            if condition():
                return True
            code = self.process.poll()
            assert code is None, f"the run ended with {code} before: {problem}\n{self.stderr}"
            return False

        wait_until(holds, problem, timeout)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does, and return when it is gone."""
        assert self.process.poll() is None, f"the run ended before the kill:\n{self.stderr}"
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def left(self) -> list[str]:
        """The processes it has started that are still there; each its command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                # The name in parentheses may hold anything, spaces too.
                state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    def wait(self, code: int | None = 0) -> Ended:
        """Return when it has ended, with the exit code that was expected; None for any.

        Raises:
            AssertionError: Another exit code, or it is stuck; its stderr is in the message,
                with the stacks of its threads if it is stuck.
        """
        try:
            self.process.wait(RUN_SECS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(10)
            raise AssertionError(f"the run is stuck:\n{self.stderr}") from None
        ended = Ended(self.process.returncode, _read(self._stdout), self.stderr)
        assert code in (None, ended.code), (
            f"exit code {ended.code} in place of {code}; stdout:\n{ended.stdout}\n"
            f"stderr:\n{ended.stderr}"
        )
        return ended


def _read(file: Any) -> str:
    # By position: the process writes through the same open file.
    return os.pread(file.fileno(), 10_000_000, 0).decode(errors="replace")


def is_there(pid: int) -> bool:
    """Whether a process still runs. A zombie is gone, even where nothing collects it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def arguments(broker: KafkaBroker, server: LambdaServer | None, **options: Any) -> list[str]:
    """The command line of a run of topics."""
    given: dict[str, Any] = {
        "kafka_bootstrap_servers": broker.bootstrap_servers,
        "function": FUNCTION,
        "lambda_endpoint_url": server.url if server else None,
        "until": "caught_up",
        "summary": "json",
        **options,
    }
    return command_line(given)


def command_line(given: Mapping[str, Any]) -> list[str]:
    """Options as arguments. One that is None is left out, one that is True has no value."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None
    ]


def start(
    broker: KafkaBroker,
    server: LambdaServer | None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Sink:
    """Start a run; the options are the command line's."""
    return Sink(arguments(broker, server, **options), env or environment())


def run(
    broker: KafkaBroker,
    server: LambdaServer | None,
    code: int | None = 0,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Ended:
    """Run to the end; the exit code must be the one given."""
    with start(broker, server, env, **options) as sink:
        return sink.wait(code)


class Topics:
    """A test's topics and group, made anew, and runs of the pipeline between them.

    Args:
        broker: Where they are.
        names: Of the test.
        partitions: Of each topic.
        count: Records in each partition of the source.
        responses: Settings of the response topic.
        errors: Settings of the error topic. It is there, and no run writes to it unless told to.
        options: Of each run.

    Attributes:
        options: What each run is given besides its own options: where it reads, its group, where
            responses go, and those above.
    """

    def __init__(
        self,
        broker: KafkaBroker,
        names: Names,
        partitions: int = 2,
        count: int = 0,
        responses: Mapping[str, str] = MappingProxyType({}),
        errors: Mapping[str, str] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        self.broker = broker
        self.source, self.responses = names.topic("orders"), names.topic("responses")
        self.errors, self.group = names.topic("errors"), names.group()
        broker.create_topic(self.source, partitions)
        broker.create_topic(self.responses, partitions, **responses)
        broker.create_topic(self.errors, partitions, **errors)
        if count:
            broker.produce(self.source, numbered(partitions, count))
        self.options: dict[str, Any] = {
            "topics": self.source,
            "consumer_group": self.group,
            "response_topic": self.responses,
            **options,
        }

    @property
    def log_errors(self) -> dict[str, Any]:
        """Options by which error records go to the error topic."""
        return {"on_error": "log", "error_topic": self.errors}

    def start(self, server: LambdaServer | None, **options: Any) -> Sink:
        """`start`, with these topics."""
        return start(self.broker, server, **{**self.options, **options})

    def run(self, server: LambdaServer | None, code: int | None = 0, **options: Any) -> Ended:
        """`run`, with these topics."""
        return run(self.broker, server, code, **{**self.options, **options})

    def is_dealt(self, members: int) -> bool:
        """Whether the group has so many members, each with partitions: nothing moves any more."""
        admin = AdminClient({"bootstrap.servers": self.broker.bootstrap_servers})
        try:
            group = admin.describe_consumer_groups([self.group])[self.group].result(30)
        except KafkaException:
            return False  # who looks after it is not known yet
        given = [each.assignment and each.assignment.topic_partitions for each in group.members]
        return group.state == ConsumerGroupState.STABLE and len(given) == members and all(given)

    def sent(self) -> set[Coordinates]:
        """All records of the source."""
        return {coordinates(record) for record in self.broker.read_all(self.source)}

    def missing(self) -> set[Coordinates]:
        """Records that have no answer."""
        return self.sent() - set(answered(self.broker, self.responses))

    def assert_exactly_once(self) -> None:
        """Each record below what is committed has one outcome, in one of the topics."""
        assert_exactly_once(self.broker, self.group, [self.source], self.responses, self.errors)

    def assert_caught_up(self) -> None:
        """All of the source is committed."""
        assert_caught_up(self.broker, self.group, self.source)


@contextmanager
def load(topics: Topics, partitions: int, restarts: bool = False) -> Iterator[None]:
    """Some records for each partition, again and again.

    Args:
        topics: Whose source.
        partitions: Of it.
        restarts: Whether the broker is restarted meanwhile: what it has not taken in time is
            written again.

    Raises:
        Exception: Records could not be written, at the end, whatever else went wrong by then.
    """
    ended = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        step = 0
        while not ended.wait(0.1):
            records = [
                (p, b"k%d" % n, b"order %d/%d" % (p, step * 5 + n))
                for p in range(partitions)
                for n in range(5)
            ]
            try:
                topics.broker.produce(topics.source, records)
            except ServerError as error:
                if restarts:
                    continue
                failures.append(error)
                return
            except Exception as error:
                failures.append(error)
                return
            step += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if failures:
            raise failures[0]


def commit(broker: KafkaBroker, group: str, topic: str, offsets: dict[int, int]) -> None:
    """Commit offsets as any other client could."""
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": group})
    marks = [TopicPartition(topic, *each) for each in offsets.items()]
    consumer.commit(offsets=marks, asynchronous=False)
    consumer.close()


# What a run left behind


def coordinates(record: StoredRecord) -> Coordinates:
    return (record.topic, record.partition, record.offset)


def answered(broker: KafkaBroker, topic: str) -> list[Coordinates]:
    """Which records the response topic has answers for, in the order they are in it."""
    found = []
    for response in broker.read_all(topic):
        key = json.loads(response.key or b"")
        found.append((key["topic"], key["partition"], key["offset"]))
    return found


def originals(record: StoredRecord) -> list[dict[str, Any]]:
    """The records an error record is about, as they were in their topic."""
    return [
        decode_original(data or b"") for name, data in record.headers if name == ORIGINAL_HEADER
    ]


def failed(broker: KafkaBroker, topic: str) -> list[Coordinates]:
    """Which records the error topic has, in the order they are in it."""
    return [
        (original["topic"], original["partition"], original["offset"])
        for record in broker.read_all(topic)
        for original in originals(record)
    ]


def facts(record: StoredRecord) -> dict[str, str]:
    """An error record's headers, without the originals."""
    return {
        name: (value or b"").decode() for name, value in record.headers if name != ORIGINAL_HEADER
    }


def by_partition(found: Iterable[Coordinates]) -> dict[Partition, list[int]]:
    """Offsets by (topic, partition), in the order given."""
    offsets: dict[Partition, list[int]] = {}
    for topic, partition, offset in found:
        offsets.setdefault((topic, partition), []).append(offset)
    return offsets


# What must hold


def assert_rising(broker: KafkaBroker, topic: str) -> None:
    """The answers to a source partition are in one partition of the topic, in offset order."""
    homes: dict[Partition, set[int]] = {}
    for response in broker.read_all(topic):
        key = json.loads(response.key or b"")
        homes.setdefault((key["topic"], key["partition"]), set()).add(response.partition)
    assert all(len(home) == 1 for home in homes.values()), homes
    for partition, offsets in by_partition(answered(broker, topic)).items():
        assert offsets == sorted(set(offsets)), f"{partition} is out of order"


def assert_answers_match(broker: KafkaBroker, sources: Iterable[str], responses: str) -> None:
    """Each answer of `answer` holds its own record's coordinates, timestamp and value."""
    sent = {coordinates(record): record for topic in sources for record in broker.read_all(topic)}
    for response in broker.read_all(responses):
        value = json.loads(response.value or b"")
        record = sent[value["topic"], value["partition"], value["offset"]]
        key = {name: value[name] for name in ("topic", "partition", "offset")}
        assert json.loads(response.key or b"") == key
        assert value["timestamp"] == record.timestamp
        assert value["result"] == (record.value and record.value.decode())


def assert_one_at_a_time(calls: Iterable[Invocation]) -> None:
    """No two calls of a partition were running at the same time."""
    ended: dict[Partition, float] = {}
    for call in calls:
        assert call.started >= ended.get(call.key, 0.0), f"{call.key}: calls overlap at {call}"
        ended[call.key] = call.ended


def assert_in_order(
    calls: Iterable[Invocation], starts: Mapping[Partition, int] | None = None
) -> dict[Partition, int]:
    """Each call begins with the first record that no call before it has answered.

    For partitions without gaps whose records all come to an answer in the end: a call that jumps
    ahead, goes back or repeats what is done would break it.

    Returns:
        Per partition the next record that would be sent.
    """
    due = dict(starts or {})
    for call in calls:
        first = due.get(call.key, 0)
        assert call.offsets == tuple(range(call.offsets[0], call.offsets[-1] + 1)), call
        assert call.offsets[0] == first, f"{call.key}: {call.offsets[0]} is sent, {first} was due"
        due[call.key] = call.offsets[-1] + 1 if call.answered else first
    return due


def assert_exactly_once(
    broker: KafkaBroker,
    group: str,
    sources: Iterable[str],
    responses: str | None = None,
    errors: str | None = None,
    elsewhere: Iterable[Coordinates] = (),
    crashed: bool = False,
) -> None:
    """Each record below what is committed has one outcome, each one from there on has none.

    Args:
        broker: Where everything is.
        group: The consumer group of the run.
        sources: The topics it read.
        responses: Its response topic.
        errors: Its error topic.
        elsewhere: Records that ended in neither topic, such as those in the log.
        crashed: The run was broken off: outcomes may be there more than once, and before they
            are committed.
    """
    # First: a run that goes on writes outcomes before it commits.
    committed_in = {topic: broker.committed(group, topic) for topic in sources}
    outcomes = Counter(elsewhere)
    if responses:
        outcomes.update(answered(broker, responses))
    if errors:
        outcomes.update(failed(broker, errors))
    for topic, committed in committed_in.items():
        for record in broker.read_all(topic):
            count = outcomes.pop(coordinates(record), 0)
            where = f"{coordinates(record)}, committed {committed.get(record.partition)}"
            if record.offset < committed.get(record.partition, 0):
                assert count == 1 or (crashed and count), f"{count} outcomes of {where}"
            else:
                assert count == 0 or crashed, f"{count} outcomes of {where}"
    assert not outcomes, f"outcomes of records that do not exist: {list(outcomes)[:10]}"


def assert_caught_up(broker: KafkaBroker, group: str, topic: str) -> None:
    """All of a topic is committed."""
    assert broker.committed(group, topic) == broker.end_offsets(topic)


def numbered(partitions: int, count: int, prefix: str = "order") -> Iterator[tuple[Any, ...]]:
    """So many records for each of so many partitions, the partitions taking turns."""
    for number in range(count):
        for partition in range(partitions):
            yield partition, b"%d" % number, f"{prefix} {partition}/{number}".encode()
