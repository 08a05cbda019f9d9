"""Keys fall where Flink would have them, and evenly."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.pending.pending import _KEY_CODER, salted
from transforms.records import LaneKey
from transforms.spread import GROUPS, _hash, _murmur, key_group, place_of


@pytest.mark.parametrize(
    ("data", "code", "group"),
    [
        ("00", 1862229173, 46),
        ("80", 1670709642, 72),
        ("0102ff", 1343921901, 33),
        ("0a0574657374730300", 342116555, 8),
        ("0b8301066f72646572730300", -305606766, 83),
        ("000102030405060708090a0b0c0d0e0f", -1852817616, 40),
        ("000102030405060708090a0b0c0d0e0f10", -1612201458, 102),
        ("ff" * 39, -539008974, 108),
    ],
)
def test_as_flink_has_it(data: str, code: int, group: int) -> None:
    """The values are of the classes themselves: the hash of Beam's `FlinkKey`, and what Flink's
    `KeyGroupRangeAssignment.assignToKeyGroup(key, 128)` makes of it."""
    found = _hash(bytes.fromhex(data))
    assert found == code % 2**32
    assert _murmur(found) % GROUPS == group


def test_a_key_has_its_length_before_it() -> None:
    key = _KEY_CODER.encode((131, "orders", 3, 0))
    assert key == bytes.fromhex("0b8301066f72646572730300")
    assert key_group(key) == 83
    assert _KEY_CODER.encode((1, "t" * 300, 0, 0)).startswith(b"\xb1\x02\x01\xac\x02ttt")


@pytest.mark.parametrize(
    ("key", "salt"),
    [
        (("orders", 0, 0), 6),
        (("orders", 1, 0), 179),
        (("orders", 2, 0), 376),
        (("orders", 3, 0), 54),
        (("orders", 3, 9), 79),
    ],
)
def test_a_key_keeps_its_salt(key: LaneKey, salt: int) -> None:
    """Else the state of a job that goes on with another version would be found no more."""
    assert salted(key) == (salt, *key)


@given(
    topic=st.text(max_size=249),
    first=st.integers(0, 10_000),
    partitions=st.integers(1, 64),
    lanes=st.integers(1, 10),
    subtasks=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_each_subtask_gets_as_many(
    topic: str, first: int, partitions: int, lanes: int, subtasks: int
) -> None:
    """The places, not the hash: any partitions of a topic that follow on each other."""
    owners: Counter[int] = Counter()
    for partition in range(first, first + partitions):
        for lane in range(lanes):
            place = place_of(topic, partition, lane)
            wanted = int(f"{place % GROUPS:07b}"[::-1], 2)
            owners[wanted * subtasks // GROUPS] += 1
    counts = [owners[subtask] for subtask in range(subtasks)]
    assert max(counts) - min(counts) <= min(partitions, lanes)


@pytest.mark.parametrize("subtasks", [2, 3, 4, 6, 8])
def test_keys_of_a_topic_are_dealt_out_evenly(subtasks: int) -> None:
    owners: Counter[int] = Counter()
    for partition in range(24):
        group = key_group(_KEY_CODER.encode(salted(("events", partition, 0))))
        owners[group * subtasks // GROUPS] += 1
    counts = [owners[subtask] for subtask in range(subtasks)]
    assert max(counts) - min(counts) <= 1 + (subtasks & (subtasks - 1) != 0)
