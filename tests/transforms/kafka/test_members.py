"""Members: what of a group's deal is committed. What moves among real ones is in tests/runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupState, KafkaException, TopicPartition
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka.admin import AdminClient

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests.conftest import Names
from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig
from transforms.kafka.members import Member, MemberConfig, member_settings

A, B = ("t", 0), ("t", 1)
KAFKA = KafkaConfig("broker-1:9092", "group")


@pytest.mark.parametrize(
    ("given", "number", "ours", "secs"),
    [
        ({}, 0, {"session.timeout.ms": 45_000, "heartbeat.interval.ms": 300}, 300),
        ({"session.timeout.ms": "60000"}, 0, {"session.timeout.ms": "60000"}, 300),
        # The broker's settings are what counts then, and librdkafka refuses these.
        ({"group.protocol": "consumer"}, 0, {"session.timeout.ms": None}, 300),
        ({"group.protocol": "consumer"}, 0, {"partition.assignment.strategy": None}, 300),
        # However else partitions should be dealt out: only these come and go one by one.
        (
            {"partition.assignment.strategy": "range"},
            0,
            {"partition.assignment.strategy": "cooperative-sticky"},
            300,
        ),
        # Each of several processes is a member of its own.
        ({"group.instance.id": "one"}, 0, {"group.instance.id": None}, 300),
        ({"group.instance.id": "one"}, 2, {"group.instance.id": "one-2"}, 300),
        ({"max.poll.interval.ms": "60000"}, 0, {}, 60),
    ],
)
def test_what_a_member_is_told(given, number, ours, secs) -> None:
    settings, interval_secs = member_settings(given, number)
    assert {name: settings.get(name) for name in ours} == ours
    assert interval_secs == secs


class _Group:
    """A consumer; what the group says is queued, and said by the next poll."""

    def __init__(self) -> None:
        self.said: list[Callable[[], Any]] = []
        self.committed: list[dict[tuple[str, int], int]] = []
        self.error: ErrorCode | None = None
        self.released: list[tuple[str, int]] = []
        self.paused: list[tuple[str, int]] = []
        self.closed = False

    def subscribe(self, topics: list[str], **callbacks: Callable) -> None:
        self.topics, self.callbacks = topics, callbacks

    def say(self, what: str, *keys: tuple[str, int]) -> None:
        self.said.append(lambda: self.callbacks[what](self, [TopicPartition(*key) for key in keys]))

    def poll(self, timeout: float) -> None:
        assert timeout == 0
        if self.said:
            self.said.pop(0)()

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        pass

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.paused += [(each.topic, each.partition) for each in partitions]

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self.released += [(each.topic, each.partition) for each in partitions]

    def commit(self, offsets: list[TopicPartition], asynchronous: bool) -> list[TopicPartition]:
        if self.error:
            raise KafkaException(self.error)
        self.committed.append({(each.topic, each.partition): each.offset for each in offsets})
        return offsets

    def assignment(self) -> list[TopicPartition]:
        return [TopicPartition("t", 0)]

    def close(self) -> None:
        self.closed = True


@contextmanager
def _member() -> Iterator[tuple[Member, _Group]]:
    """A member that has taken up both partitions."""
    group = _Group()
    member = Member(MemberConfig(KAFKA), lambda kafka, settings: group)
    member.join(["t"])
    group.say("on_assign", A, B)
    try:
        wait_until(lambda: set(member.deal().given) == {A, B}, "nothing is given")
        member.take([A, B])
        yield member, group
    finally:
        member.close()
        assert group.closed


def test_what_is_given_is_not_fetched_by_the_member() -> None:
    with _member() as (_, group):
        assert group.paused == [A, B]


def test_only_what_is_taken_is_committed() -> None:
    """The broker would take any."""
    with _member() as (member, group):
        assert member.commit({A: 5, ("t", 9): 3}, {A: "note"}, late=False) is None
        group.say("on_lost", A)
        wait_until(lambda: A not in member.deal().given, "nothing is lost")
        assert member.commit({A: 6, B: 7}, {}, late=False) is None
        group.say("on_assign", A)
        wait_until(lambda: A in member.deal().given, "nothing is given")
        # Of before, since it was not taken up again.
        assert member.commit({A: 6}, {}, late=False) is None
        member.take([A])
        assert member.commit({A: 8}, {}, late=False) is None
    assert group.committed == [{A: 5}, {B: 7}, {A: 8}]


def test_what_is_given_again_has_another_number() -> None:
    with _member() as (member, group):
        before = member.deal().given[A]
        group.say("on_lost", A, B)
        group.say("on_assign", A)
        wait_until(lambda: B not in member.deal().given and A in member.deal().given, "not given")
        assert member.deal().given[A] != before


def test_what_is_asked_for_is_committed_and_then_let_go_of() -> None:
    """However long that takes; what comes after it is not committed."""
    with _member() as (member, group):
        group.say("on_revoke", A)
        wait_until(lambda: member.deal().leaving == {A}, "nothing is asked for")
        assert member.commit({A: 5, B: 6}, {}, late=False) is None
        assert group.released == []
        member.let_go([A])
        wait_until(lambda: group.released == [A], "it is not let go of")
        assert member.commit({A: 7, B: 7}, {}, late=False) is None
        assert set(member.deal().given) == {B}
    assert group.committed == [{A: 5, B: 6}, {B: 7}]


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.ILLEGAL_GENERATION,
        ErrorCode.REBALANCE_IN_PROGRESS,
        ErrorCode.UNKNOWN_MEMBER_ID,
        ErrorCode.STALE_MEMBER_EPOCH,
    ],
)
def test_while_partitions_move_a_commit_is_tried_again(code: int) -> None:
    """And if it goes on for too long, that ends the run."""
    with _member() as (member, group):
        group.error = ErrorCode(code)
        assert member.commit({A: 5}, {}, late=False)
        with pytest.raises(KafkaError):
            member.commit({A: 5}, {}, late=True)


def test_a_member_that_leaves_waits_for_nothing() -> None:
    with _member() as (member, group):
        group.say("on_revoke", A, B)
        wait_until(lambda: member.deal().leaving == {A, B}, "nothing is asked for")
    assert group.released == [A, B]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_that_was_given_nothing_leaves_at_once(
    broker: KafkaBroker, names: Names, tmp_path: Path, protocol: str
) -> None:
    """With real ones. Else the others' partitions do not move until its session is over."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1)
    file = tmp_path / "kafka.properties"
    file.write_text(f"group.protocol={protocol}\n")
    kafka = KafkaConfig(broker.bootstrap_servers, names.group(), str(file))
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})

    def has_members(count: int) -> bool:
        group = admin.describe_consumer_groups([kafka.group])[kafka.group].result(30)
        return group.state == ConsumerGroupState.STABLE and len(group.members) == count

    holder, other = (Member(MemberConfig(kafka)) for _ in range(2))
    try:
        holder.join([topic])
        wait_until(lambda: holder.deal().given, "nothing is given")
        other.join([topic])
        wait_until(lambda: has_members(2), "it is no member")
        other.close()
        wait_until(lambda: has_members(1), "it has not left", 15)
        assert holder.deal().given
    finally:
        holder.close()
        other.close()


_A_MEMBER = """
import sys, time
from transforms.kafka.client import KafkaConfig
from transforms.kafka.members import Member, MemberConfig
brokers, group, file, topic = sys.argv[1:]
member = Member(MemberConfig(KafkaConfig(brokers, group, file)))
member.join([topic])
while True:
    print(len(member.deal().given), len(member.deal().leaving), flush=True)
    time.sleep(0.02)
"""


def test_what_a_member_left_to_nobody_is_dealt_out_once_it_is_back(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """With real ones: with an id of its own, it is killed while it lets go of a partition."""
    topic, group = names.topic(), names.group()
    broker.create_topic(topic, partitions=2)

    def config(name: str) -> KafkaConfig:
        file = tmp_path / f"{name}.properties"
        file.write_text(f"group.instance.id={name}\n")
        return KafkaConfig(broker.bootstrap_servers, group, str(file))

    mine, command = config("a"), [sys.executable, "-c", _A_MEMBER]
    command += [mine.bootstrap_servers, group, str(mine.config_file), topic]
    others: list[Member] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            for line in process.stdout:
                given, leaving = map(int, line.split())
                if given == 2 and not others:
                    others.append(Member(MemberConfig(config("b"))))
                    others[0].join([topic])
                if leaving:
                    break
        finally:
            process.kill()
    again = Member(MemberConfig(mine))
    try:
        again.join([topic])
        wait_until(lambda: len(again.deal().given) == 1, "it is not back")
        wait_until(lambda: len(others[0].deal().given) == 1, "one is nobody's")
    finally:
        again.close()
        others[0].close()


def test_who_was_taken_for_dead_commits_nothing_of_others(
    broker: KafkaBroker, names: Names, tmp_path: Path
) -> None:
    """With real ones: it hangs, is replaced, and goes on with what it had done before. Being a
    member again, the broker would take that, and the group would be back where it was."""
    topic = names.topic()
    broker.create_topic(topic, partitions=2)
    file = tmp_path / "kafka.properties"
    file.write_text(
        "session.timeout.ms=1500\nheartbeat.interval.ms=200\nmax.poll.interval.ms=2000\n"
    )
    kafka = KafkaConfig(broker.bootstrap_servers, names.group(), str(file))
    both = [(topic, 0), (topic, 1)]
    hangs, other = (Member(MemberConfig(kafka)) for _ in range(2))
    try:
        hangs.join([topic])
        wait_until(lambda: set(hangs.deal().given) == {*both}, "nothing is given")
        hangs.take(both)
        before = set(hangs.deal().given.values())
        assert hangs.commit(dict.fromkeys(both, 5), {}, late=False) is None
        other.join([topic])
        # Nobody asks the first one how things stand: it is not polled any more.
        wait_until(lambda: set(other.deal().given) == {*both}, "it is not replaced")
        other.take(both)
        assert other.commit(dict.fromkeys(both, 50), {}, late=False) is None

        def given_anew() -> bool:
            other.let_go(other.deal().leaving)
            given = hangs.deal().given
            return len(given) == 1 and before.isdisjoint(given.values())

        wait_until(given_anew, "it is no member again")
        other.take(other.deal().given)
        assert hangs.commit(dict.fromkeys(both, 6), {}, late=False) is None
        assert broker.committed(kafka.group, topic) == {0: 50, 1: 50}
        # Nor does it commit anything of what it is given anew before that is taken up.
        hangs.take(hangs.deal().given)
        (key,) = hangs.deal().given
        assert hangs.commit({key: 60}, {}, late=False) is None
        assert broker.committed(kafka.group, topic)[key[1]] == 60
    finally:
        hangs.close()
        other.close()
