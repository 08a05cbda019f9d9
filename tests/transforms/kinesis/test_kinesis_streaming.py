"""Kinesis as the source of streaming runs: on our own Kinesis and DynamoDB, without a runner."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.processes import wait_until
from tests import sink
from transforms.commit.committer import CommitConfig, Committer
from transforms.errors import KinesisError
from transforms.kinesis.client import AwsConfig
from transforms.kinesis.shards import SHARD_END, TRIM_HORIZON, shard_id
from transforms.kinesis.stream import AT_HORIZON, AT_LATEST, KinesisSource
from transforms.kinesis.streaming import KinesisStream, ShardFinder, ShardReader, ShardReaders
from transforms.names import joined
from transforms.read.lending import ReadAhead
from transforms.read.streaming import Asked
from transforms.records import PartitionKey

STREAM = "orders"
PARENT, OTHER = (STREAM, 0), (STREAM, 1)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in sink.environment().items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis() as running:
        yield running


class Jobs:
    """Jobs with one table; `member` tells their processes apart."""

    def __init__(self, kinesis: LocalKinesis) -> None:
        self.kinesis = kinesis
        self._made: list[KinesisSource] = []
        self._alive: list[threading.Event] = []

    def source(
        self, job: str = "a", process: int = 0, starting_position: str = AT_HORIZON
    ) -> KinesisSource:
        aws = AwsConfig("us-east-1", kinesis_url=self.kinesis.url, dynamodb_url=self.kinesis.url)
        made = KinesisSource(
            (STREAM,),
            "leases",
            aws,
            starting_position,
            poll_secs=0.2,
            expiry_secs=2,
            member=process,
            job=job,
        )
        self._made.append(made)
        return made

    def live(self, source: KinesisSource) -> threading.Event:
        """Have a job look for shards until it is told to stop."""
        finder, ended = ShardFinder(source), threading.Event()
        known = frozenset(finder.look(None, {})[0])

        def look() -> None:
            while not ended.wait(0.1):
                finder.look(known, {})

        threading.Thread(target=look, daemon=True).start()
        self._alive.append(ended)
        return ended

    def stop(self, source: KinesisSource) -> None:
        """As if its processes were killed."""
        table = source.members()
        table._closed = True
        table._woken.set()
        if table._thread:
            table._thread.join(30)

    def close(self) -> None:
        for ended in self._alive:
            ended.set()
        for each in self._made:
            each.members().close()


@pytest.fixture
def jobs(kinesis: LocalKinesis) -> Iterator[Jobs]:
    made = Jobs(kinesis)
    yield made
    made.close()


def _put(kinesis: LocalKinesis, count: int, text: str = "order") -> None:
    kinesis.put(STREAM, [(f"key-{i % 9}", f"{text} {i}".encode()) for i in range(count)])


def _behind(number: int) -> int:
    """The position behind a record."""
    return joined(number, 0) + 1


def _row(kinesis: LocalKinesis, number: int) -> Mapping[str, Mapping[str, str]]:
    return kinesis.tables["leases"][shard_id(number)]


def _until_found(
    finder: ShardFinder, known: frozenset[PartitionKey], asked: Asked
) -> tuple[dict[PartitionKey, tuple[int, int]], dict[PartitionKey, int]]:
    """Look until something is found or asked."""
    last: list[tuple[dict[PartitionKey, tuple[int, int]], dict[PartitionKey, int]]] = []

    def told() -> bool:
        last[:] = [finder.look(known, asked)]
        return bool(last[0][0]) or last[0][1] != asked

    wait_until(told, "nothing is found", 30)
    return last[0]


def _read_all(reader: ShardReader, done: Callable[[], bool]) -> tuple[list[str], int]:
    texts: list[str] = []
    position = -1

    def read() -> bool:
        nonlocal position
        records, position = reader.read(0.05)
        texts.extend(value.decode() for value in records.values if value)
        return done()

    wait_until(read, "not all is read", 30)
    return texts, position


def test_a_shard_is_read_to_its_end_and_its_children_begin_once_the_job_has_done_it(
    kinesis: LocalKinesis, jobs: Jobs
) -> None:
    kinesis.create_stream(STREAM, 1)
    _put(kinesis, 2500)
    source = jobs.source()
    finder, committer = ShardFinder(source), Committer(CommitConfig(source))
    found, asked = finder.look(None, {})
    assert (found, asked) == ({PARENT: (TRIM_HORIZON, TRIM_HORIZON)}, {})
    known = frozenset(found)
    low, high = kinesis.split(STREAM, 0)
    with ShardReaders(KinesisStream(source)).lend(PARENT) as reader:
        assert reader.go_to(TRIM_HORIZON)
        texts, position = _read_all(reader, lambda: reader.ended)
    assert texts == [each.data.decode() for each in kinesis.records(STREAM, 0)]
    assert position == SHARD_END
    # Read is not done.
    assert finder.look(known, {}) == ({}, {})
    committer.commit({PARENT: SHARD_END})
    # Nor is what the table says, until the job's state has said it, too.
    found, asked = _until_found(finder, known, {})
    assert not found and asked[PARENT] > 0
    assert finder.look(known, asked) == ({}, asked)
    committer.commit({PARENT: SHARD_END}, {PARENT: f"end {asked[PARENT]}"})
    found, confirmed = _until_found(finder, known, asked)
    wait_until(lambda: len(finder.look(known, confirmed)[0]) == 2, "children are not begun")
    found, confirmed = finder.look(known, confirmed)
    assert found == {(STREAM, low): (0, 0), (STREAM, high): (0, 0)}
    assert confirmed == {PARENT: 0}
    row = _row(kinesis, 0)
    assert row["leaseOwner"] == {"S": "beam-lambda-sink-job/a"}
    assert row["childShardIds"] == {"SS": [shard_id(low), shard_id(high)]}


def test_after_a_restore_the_table_is_not_believed(kinesis: LocalKinesis, jobs: Jobs) -> None:
    """It says how far the job was before. The children wait for what is repeated, and are repeated
    themselves."""
    kinesis.create_stream(STREAM, 1)
    _put(kinesis, 20)
    kinesis.split(STREAM, 0)
    source = jobs.source()
    finder, committer = ShardFinder(source), Committer(CommitConfig(source))
    known = frozenset(finder.look(None, {})[0])
    committer.commit({PARENT: SHARD_END})
    _, asked = _until_found(finder, known, {})
    committer.commit({PARENT: SHARD_END}, {PARENT: f"end {asked[PARENT]}"})
    _, confirmed = _until_found(finder, known, asked)
    _put(kinesis, 20, "later")
    child, last = (STREAM, 1), (STREAM, 4)
    done = _behind(kinesis.records(STREAM, 1)[-1].number)
    wait_until(lambda: len(finder.look(known, confirmed)[0]) == 2, "not begun")
    # One of the children has ended since then, too, and its own were begun.
    kinesis.split(STREAM, 2)
    committer.commit({child: done, (STREAM, 2): SHARD_END})

    def is_leased() -> bool:
        finder.look(known | {child, (STREAM, 2)}, confirmed)
        return shard_id(last[1]) in kinesis.tables["leases"]

    wait_until(is_leased, "no lease", 30)
    committer.commit({last: done})
    for before in ({}, asked):
        # As a checkpoint of then has it.
        found, again = _until_found(finder, known, before)
        assert not found and again[PARENT] not in (0, before.get(PARENT))
        # The state was not so far then.
        position = _behind(kinesis.records(STREAM, 0)[4].number)
        committer.commit({PARENT: position})
        assert finder.look(known, again) == ({}, {})
        committer.commit({PARENT: SHARD_END})
    found, again = _until_found(finder, known, {})
    committer.commit({PARENT: SHARD_END}, {PARENT: f"end {again[PARENT]}"})
    _, confirmed = _until_found(finder, known, again)
    found = {}

    def begun() -> bool:
        found.update(finder.look(known, confirmed)[0])
        return len(found) == 2

    wait_until(begun, "not begun", 30)
    assert found == dict.fromkeys([child, (STREAM, 2)], (TRIM_HORIZON, TRIM_HORIZON))
    for number in (1, 2):
        assert _row(kinesis, number)["checkpoint"] == {"S": "TRIM_HORIZON"}
    # Nor are the children's children begun beside them.
    known |= found.keys()
    assert finder.look(known, confirmed)[0] == {}
    # A new job has nothing of before, and goes on with what is kept.
    committer.commit({child: done})
    jobs.stop(source)
    assert ShardFinder(jobs.source("b")).look(None, {})[0][child] == (done, done)


def test_a_child_of_two_waits_for_both(kinesis: LocalKinesis, jobs: Jobs) -> None:
    kinesis.create_stream(STREAM, 2)
    source = jobs.source()
    finder, committer = ShardFinder(source), Committer(CommitConfig(source))
    known = frozenset(finder.look(None, {})[0])
    assert known == {PARENT, OTHER}
    child = (STREAM, kinesis.merge(STREAM, 0, 1))
    committer.commit({PARENT: SHARD_END})
    _, asked = _until_found(finder, known, {})
    committer.commit({PARENT: SHARD_END}, {PARENT: f"end {asked[PARENT]}"})
    _, asked = _until_found(finder, known, asked)
    committer.commit({OTHER: SHARD_END})
    _, asked = _until_found(finder, known, asked)
    assert asked[PARENT] == 0 and asked[OTHER] > 0
    committer.commit({OTHER: SHARD_END}, {OTHER: f"end {asked[OTHER]}"})
    _, asked = _until_found(finder, known, asked)
    wait_until(lambda: set(finder.look(known, asked)[0]) == {child}, "not begun")


def test_all_processes_of_a_job_are_one_owner(kinesis: LocalKinesis, jobs: Jobs) -> None:
    """One finds and renews, another commits; and either may be begun again."""
    kinesis.create_stream(STREAM, 2)
    finding = jobs.source()
    finder = ShardFinder(finding)
    known = frozenset(finder.look(None, {})[0])
    number = kinesis.put(STREAM, [("key", b"1")])[0][1]
    for process in (1, 2):
        committer = Committer(CommitConfig(jobs.source(process=process)))
        committer.commit({PARENT: _behind(number)})
        committer.commit({PARENT: _behind(number + process)})
        assert _row(kinesis, 0)["checkpoint"] == {"S": str(number + process)}
    counter = int(_row(kinesis, 1)["leaseCounter"]["N"])

    def renewed() -> bool:
        finder.look(known, {})
        return int(_row(kinesis, 1)["leaseCounter"]["N"]) > counter + 1

    wait_until(renewed, "the leases are not renewed", 30)
    committer.commit({OTHER: _behind(number)})
    assert _row(kinesis, 1)["checkpoint"] == {"S": str(number)}
    assert finder.look(known, {}) == ({}, {})


def test_a_job_waits_for_leases_of_a_dead_one_and_refuses_those_of_a_live_one(
    kinesis: LocalKinesis, jobs: Jobs
) -> None:
    kinesis.create_stream(STREAM, 1)
    first = jobs.source("first")
    alive = jobs.live(first)
    line = (
        "--lease_table=leases is in use: beam-lambda-sink-job/first has the lease "
        "shardId-000000000000, and a streaming job shares none; stop it, or give another table"
    )
    second = jobs.source("second")
    with pytest.raises(KinesisError, match=line):
        ShardFinder(second).look(None, {})
    # Nor may a copy of the program on the DirectRunner.
    copy = jobs.source("")
    copy.partitions(copy.fetcher()).find()
    copy.members().join(())

    def refused() -> bool:
        try:
            copy.members().deal()
        except KinesisError as error:
            return line in str(error)
        return False

    wait_until(refused, "it is not refused", 30)
    alive.set()
    jobs.stop(first)
    # In the same process: a runner begins a job again there. And by what commits, where that is
    # restored before what finds.
    number = kinesis.put(STREAM, [("key", b"1")])[0][1]
    Committer(CommitConfig(jobs.source("second", 1))).commit({PARENT: _behind(number)})
    assert ShardFinder(second).look(None, {})[0] == {PARENT: (_behind(number), _behind(number))}
    with pytest.raises(KinesisError, match="job/second has the lease"):
        Committer(CommitConfig(first)).commit({PARENT: _behind(number)})


def test_a_starting_position_is_durable_and_an_earlier_halt_is_over(
    kinesis: LocalKinesis, jobs: Jobs
) -> None:
    kinesis.create_stream(STREAM, 1)
    first = jobs.source("first", starting_position=AT_LATEST)
    ((start, _),) = ShardFinder(first).look(None, {})[0].values()
    assert start > TRIM_HORIZON
    halt = f"halted {STREAM}|0|5|RetryAttemptsExhausted|ValueError"
    Committer(CommitConfig(first)).commit({PARENT: start}, {PARENT: halt})
    jobs.stop(first)
    second = jobs.source("second", starting_position=AT_LATEST)
    assert ShardFinder(second).look(None, {})[0] == {PARENT: (start, start)}
    assert "sinkLanes" not in _row(kinesis, 0)


def test_a_shard_is_not_read_far_ahead_of_what_is_committed(
    kinesis: LocalKinesis, jobs: Jobs
) -> None:
    kinesis.create_stream(STREAM, 1)
    _put(kinesis, 5000)
    source = jobs.source()
    ShardFinder(source).look(None, {})
    committer = Committer(CommitConfig(source))
    # The reader asks what is committed once in a while. No time goes by but what is set here.
    now_secs = 0.0
    reader = ShardReader(source, PARENT, ReadAhead(records=1500), timer=lambda: now_secs)
    assert reader.go_to(TRIM_HORIZON) and not reader.go_to(TRIM_HORIZON)
    texts, position = _read_all(reader, lambda: not reader.may_read())
    assert 1500 <= len(texts) <= 2500
    committer.commit({PARENT: position})
    now_secs = 60.0
    wait_until(reader.may_read, "a commit gives no room", 30)
    # Read again from a checkpoint: what is kept is from before then, and gives none.
    assert reader.go_to(TRIM_HORIZON)
    again, _ = _read_all(reader, lambda: not reader.may_read())
    assert again == texts[: len(again)] and len(again) >= 1500
    reader.close()


def test_what_retention_has_taken_is_passed_over(
    kinesis: LocalKinesis, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    kinesis.create_stream(STREAM, 1)
    _put(kinesis, 30)
    source = jobs.source()
    ShardFinder(source).look(None, {})
    reader = ShardReader(source, PARENT)
    position = _behind(kinesis.records(STREAM, 0)[9].number)
    kinesis.trim(STREAM, 0, 20)
    reader.go_to(position)
    texts: list[str] = []

    def read() -> bool:
        texts.extend(value.decode() for value in reader.read(0.05)[0].values if value)
        return len(texts) >= 10

    wait_until(read, "nothing is read", 30)
    assert texts == [f"order {index}" for index in range(20, 30)]
    reader.close()


def test_a_reader_that_failed_is_made_anew(kinesis: LocalKinesis, jobs: Jobs) -> None:
    kinesis.create_stream(STREAM, 1)
    _put(kinesis, 3)
    kinesis.refuse("GetRecords", "AccessDeniedException")
    source = jobs.source()
    ShardFinder(source).look(None, {})
    readers = ShardReaders(KinesisStream(source))
    with readers.lend(PARENT) as reader:
        reader.go_to(TRIM_HORIZON)
        with pytest.raises(KinesisError, match="AccessDenied"):
            _read_all(reader, lambda: False)
    with readers.lend(PARENT) as reader:
        reader.go_to(TRIM_HORIZON)
        texts: list[str] = []

        def read() -> bool:
            texts.extend(value.decode() for value in reader.read(0.05)[0].values if value)
            return len(texts) == 3

        wait_until(read, "nothing is read", 30)


def test_kinesis_that_is_away_is_asked_again(
    kinesis: LocalKinesis, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    kinesis.create_stream(STREAM, 1)
    finder = ShardFinder(jobs.source())
    found, _ = finder.look(None, {})
    kinesis.refuse("ListShards", "AccessDeniedException", -1)
    finder._shards._listed = float("-inf")
    with caplog.at_level(logging.WARNING):
        assert finder.look(frozenset(found), {PARENT: 7}) == ({}, {PARENT: 7})
    assert "new shards cannot be looked for" in caplog.text
