"""What travels between the steps comes out as it went in, and its size is told without pickling."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from apache_beam import coders

from transforms.batch.batch import Batch
from transforms.coding import SizedPickleCoder, estimated_bytes
from transforms.invoke.invoke import Finished
from transforms.read.rounds import RecordChunk
from transforms.records import Failure, Records, Responses
from transforms.write.produce import Progress

COUNT = 100


def _records(value: bytes = b'{"id":1}' * 25) -> Records:
    column = [value] * COUNT
    times = [1_700_000_000_000] * COUNT
    # Of values that are equal and not the same, as they come from Kafka.
    values = [bytes(bytearray(each)) for each in column]
    return Records(list(range(COUNT)), times, [b"k"] * COUNT, values, [None] * COUNT)


ENTRIES = [b'{"payload":{"offset":%d,"value":%b}}' % (n, b"x" * 200) for n in range(COUNT)]
FAILURE = Failure(_records(), ENTRIES, "RetryAttemptsExhausted", "ValueError", "no", 1, 200, "E")
ELEMENTS = [
    RecordChunk("orders", 0, 0, COUNT, _records(), lane=0),
    RecordChunk("orders", 0, 0, COUNT, Records([0], [0], [None], [None], [None])),
    Batch("orders", 0, 0, COUNT, _records(), ENTRIES),
    Finished("orders", 0, 0, COUNT, [Responses(range(COUNT), ENTRIES)]),
    Finished("orders", 0, 0, COUNT, [Responses(range(COUNT), None, b"x" * 5000)]),
    Finished("orders", 0, 0, COUNT, [FAILURE], halted=FAILURE),
    Progress("orders", 0, 0, COUNT),
]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: type(element).__name__)
def test_sizes_are_about_right_and_nothing_is_pickled_for_them(
    element: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of 2 of what it is pickled, or of the little that is always there."""
    coder = coders.registry.get_coder(type(element))
    assert isinstance(coder, SizedPickleCoder)
    size = len(coder.encode(element))
    assert coder.decode(coder.encode(element)) == element
    monkeypatch.setattr(pickle, "dumps", lambda *_: pytest.fail("it was pickled"))
    estimate = coder.get_impl().estimate_size(element)
    assert estimate == estimated_bytes(element)
    assert size / 2 <= estimate + 400 and estimate <= 2 * size + 400


def test_the_coder_travels_with_the_pipeline() -> None:
    """A worker elsewhere gets it pickled."""
    coder = pickle.loads(pickle.dumps(SizedPickleCoder()))
    assert coder == SizedPickleCoder()
    assert coder.decode(coder.encode(ELEMENTS[0])) == ELEMENTS[0]
