"""Whole runs on streams that are resharded all the time, by copies that are killed all the time.

`KINESIS_KILLS` says how often, for each number of copies: once is enough to see that it
holds, many to look for what is rare.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from pipeline.local.kinesis import LocalKinesis, ServiceError
from tests import sink
from tests.kinesis import (
    STREAM,
    Watched,
    all_committed,
    by_key,
    came_by_key,
    checkpoints_past_what_came,
    put,
    rows_of,
    run_on,
    start_on,
)

KILLS = int(os.environ.get("KINESIS_KILLS", "1"))


@pytest.fixture
def kinesis() -> Iterator[LocalKinesis]:
    with LocalKinesis(subscription_secs=3, again_secs=0.5) as running:
        running.create_stream(STREAM, 2)
        running.register_consumer(STREAM, "fast")
        yield running


def _reshard(kinesis: LocalKinesis, chance: random.Random) -> None:
    """One split, one merge, or all of the stream to another count."""
    shards = kinesis.open_shards(STREAM)
    kind = chance.choice(["split", "merge", "count"])
    if kind == "split" and len(shards) < 6:
        kinesis.split(STREAM, chance.choice(shards))
    elif kind == "merge" and len(shards) > 1:
        for one in chance.sample(shards, len(shards)):
            for other in shards:
                try:
                    kinesis.merge(STREAM, one, other)
                    return
                except ServiceError:
                    continue
    else:
        kinesis.update_shard_count(STREAM, chance.randint(1, 5))


@pytest.mark.parametrize(
    ("copies", "options"),
    [
        (1, {"parallelization_factor": 2}),
        (3, {}),
        (2, {"consumer_name": "fast"}),
    ],
    ids=["one copy with lanes", "three copies", "two copies that are subscribed"],
)
def test_reshards_and_kills(kinesis: LocalKinesis, copies: int, options: dict[str, object]) -> None:
    """All of it comes, in order by partition key over parents and children, none of which is begun
    too early; and a checkpoint is never past what has not come."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    function = Watched(kinesis, secs=0.01)
    options = {"until": "forever", "batch_size": 7, "lease_secs": 1.5, **options}
    texts: list[str] = []
    with sink.serve(function) as server, ExitStack() as stack:

        def begin() -> sink.Sink:
            return stack.enter_context(start_on(kinesis, server, **options))

        running = [begin() for _ in range(copies)]
        for turn in range(KILLS):
            texts += put(kinesis, 60, f"turn {turn}")
            for _ in range(chance.randint(1, 3)):
                _reshard(kinesis, chance)
                texts += put(kinesis, 20, f"turn {turn} {len(texts)}")
            enough = len(function.calls) + chance.randint(1, 12)
            running[0].until(partial(function.has, enough), "nothing comes", 120)
            victim = chance.randrange(copies)
            running[victim].kill()
            assert checkpoints_past_what_came(kinesis, function) == []
            running[victim] = begin()
        running[0].until(lambda: function.got(len(texts)), "not all of it came", 180)
        running[0].until(lambda: all_committed(kinesis), "not all of it is committed", 60)
        for each in running:
            each.send(signal.SIGTERM)
        # One that has only just been started does not hear it yet.
        assert {each.wait(None).code for each in running} <= {0, -signal.SIGTERM}
        del options["until"]
        ended = run_on(kinesis, server, **options)
    assert sorted(function.texts()) == sorted(texts)
    shards = max(int(key[8:]) for key in rows_of(kinesis)) + 1
    assert came_by_key(function) == by_key(kinesis, shards)
    assert function.too_early == []
    assert ended.summary["records"] == 0
    if copies == 1:
        # Else who gives a shard away and who gets it may ask for more in one second than it allows.
        assert not kinesis.refused
