"""Read: what a round hands out of what a consumer has fetched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError as ErrorCode
from confluent_kafka import KafkaException, Message, TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from transforms.errors import KafkaError
from transforms.kafka.beam_reader import to_columns
from transforms.kafka.client import KafkaConfig
from transforms.kafka.fetch import KafkaFetcher
from transforms.kafka.messages import to_records
from transforms.kafka.offsets import SourceConfig
from transforms.lanes import Lanes
from transforms.read import rounds as module
from transforms.read.rounds import (
    ReadConfig,
    Room,
    Round,
    RoundReader,
    fair_level,
    releasable,
    turns,
)
from transforms.records import NO_TIMESTAMP, Records

KAFKA = KafkaConfig("broker:9092", "g")
SOURCE = SourceConfig(KAFKA, ("t",))
KEY = ("t", 0)
PLENTY = 10**9


def _message(offset: int, partition: int = 0, value: bytes | None = b"v", **more) -> Message:
    fields = {"topic": "t", "timestamp": (1, 1000 + offset)} | more
    return Message(partition=partition, offset=offset, value=value, **fields)


def _event(code: int, offset: int = 0, partition: int = 0, **more) -> Message:
    error = ErrorCode(code, "why", **more)
    return Message(topic="t", partition=partition, offset=offset, error=error)


def _end(offset: int, partition: int = 0) -> Message:
    return _event(ErrorCode._PARTITION_EOF, offset, partition)


class FakeConsumer:
    """Gives back what it is told to, one list for each time it is asked."""

    def __init__(self) -> None:
        self.fetched: list[list[Message]] = []
        self.assigned: list[tuple[str, int, int]] = []
        self.paused: set[tuple[str, int]] = set()
        self.highs: dict[tuple[str, int], int] = {}
        self.closed = False
        self.error: KafkaException | None = None

    def poll(self, timeout: float) -> Message | None:
        if self.error:
            raise self.error
        while self.fetched and not self.fetched[0]:
            self.fetched.pop(0)
        return self.fetched[0].pop(0) if self.fetched else None

    def consume(self, num_messages: int, timeout: float) -> list[Message]:
        """What came with the message before; only that is waited for."""
        assert timeout == 0
        return self.fetched.pop(0) if self.fetched else []

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self.assigned += [(each.topic, each.partition, each.offset) for each in partitions]

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {(each.topic, each.partition) for each in partitions}

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.paused |= {(each.topic, each.partition) for each in partitions}

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {(each.topic, each.partition) for each in partitions}

    def get_watermark_offsets(self, partition: TopicPartition, cached: bool) -> tuple[int, int]:
        high = self.highs[partition.topic, partition.partition]
        if high == -2:
            raise KafkaException(ErrorCode(ErrorCode._STATE))
        return 0, high

    def close(self) -> None:
        self.closed = True


class FakeSource(SourceConfig):
    """A source that is read by what it is given."""

    def __init__(self, fetcher: Callable[[], KafkaFetcher]) -> None:
        super().__init__(KAFKA, ("t",))
        object.__setattr__(self, "fetcher", fetcher)


class Timer:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.secs = 0.0

    def __call__(self) -> float:
        return self.secs


class Reading:
    """A reader over a fake consumer, and the chunks it has handed out."""

    def __init__(
        self, starts: dict[int, int] | None = None, ahead: list[int] | None = None, **config
    ) -> None:
        self.consumer = FakeConsumer()
        self.timer = Timer()
        self.settings: dict = {}
        config = {"batch_size": 10, "batch_window_secs": 1.0} | config
        source = FakeSource(lambda: KafkaFetcher(KAFKA, self._make))
        self.reader = RoundReader(ReadConfig(source, **config), self.timer)
        self.starts = starts or {0: 0}
        count = config.get("lanes", Lanes()).count
        marks = {("t", p): ahead or [at] * count for p, at in self.starts.items()}
        self.reader.assign(marks)
        self.at = {(p, lane): at for (_, p), own in marks.items() for lane, at in enumerate(own)}
        self.chunks: list = []

    def _make(self, config: KafkaConfig, **settings) -> FakeConsumer:
        self.settings = settings
        return self.consumer

    def fill(self, *fetches: list[Message]) -> None:
        for messages in fetches:
            self.consumer.fetched.append(list(messages))
            assert self.reader.fill(0) == len(messages)

    def take(self, rooms: dict[int, tuple[int, int]] | None = None, **limits) -> list:
        """One round; its chunks. Checks that each lane goes on where it stood."""
        all_rooms = dict.fromkeys(self.starts, (PLENTY, PLENTY)) if rooms is None else rooms
        limits = {"records": PLENTY, "bytes": PLENTY} | limits
        self.reader.begin(
            Round(tuple(Room("t", p, *room) for p, room in all_rooms.items()), **limits)
        )
        chunks = list(self.reader.take())
        for chunk in chunks:
            assert chunk.start == self.at[chunk.partition, chunk.lane]
            self.at[chunk.partition, chunk.lane] = chunk.next_offset
            assert all(chunk.start <= o < chunk.next_offset for o in chunk.records.offsets)
        for p in self.starts:
            lowest = min(at for (partition, _), at in self.at.items() if partition == p)
            assert self.reader.position(("t", p)) == lowest
        self.chunks += chunks
        return chunks


def _offsets(chunks: list, partition: int = 0) -> list[int]:
    return [o for c in chunks if c.partition == partition for o in c.records.offsets]


# -- releasable ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "size", "waited", "ended", "busy", "expected"),
    [
        (0, 0, 0, False, False, 0),
        (9, 0, 0, False, False, 0),
        (10, 0, 0, False, False, 10),
        (19, 0, 0, False, False, 10),
        (20, 0, 0, False, False, 20),
        (9, 0, 0.999, False, False, 0),
        (9, 0, 1.0, False, False, 9),
        (19, 0, 1.0, False, False, 19),
        (9, 999, 0, False, False, 0),
        (9, 1000, 0, False, False, 9),
        (9, 0, 0, True, False, 9),
        (0, 0, 9, True, False, 0),
        # Behind a call that is running it would only wait, and can grow instead.
        (9, 0, 1.0, False, True, 0),
        (9, 0, 9, True, True, 0),
        (19, 0, 9, True, True, 10),
        (9, 1000, 0, False, True, 9),
    ],
)
def test_what_may_be_batched_now(records, size, waited, ended, busy, expected) -> None:
    """Whole batches always; the rest at the window's end, at enough bytes, or at the end."""
    config = ReadConfig(SOURCE, batch_size=10, batch_bytes=1000, batch_window_secs=1.0)
    assert releasable(records, size, waited, ended, busy, config) == expected


def test_a_window_of_0_waits_for_nothing() -> None:
    """With no window what is there is due."""
    config = ReadConfig(SOURCE, batch_size=10, batch_window_secs=0)
    assert releasable(1, 0, 0.0, False, False, config) == 1


# -- columns ------------------------------------------------------------------------------


def test_messages_become_columns() -> None:
    """Offsets, timestamps, keys, values and headers as Kafka had them; None is not empty."""
    records = to_records(
        [
            _message(4, key=b"k", headers=[("a", b"1"), ("a", None)]),
            _message(7, key=None, value=None, timestamp=(0, 0)),
            _message(8, key=b"", value=b"", timestamp=(2, 5)),
        ]
    )
    assert records.offsets == [4, 7, 8]
    assert records.timestamps == [1004, NO_TIMESTAMP, 5]
    assert records.keys == [b"k", None, b""]
    assert records.values == [b"v", None, b""]
    assert records.headers == [[("a", b"1"), ("a", None)], None, None]
    assert records.log_append == [False, False, True]


def test_who_set_the_time_is_a_column_only_where_the_broker_did() -> None:
    """Nothing is carried along for what nearly all topics have."""
    records = to_records([_message(4), _message(7, timestamp=(0, 0))])
    assert not records.log_append
    assert to_records([]) == Records([], [], [], [], [], log_append=[])


def _row(offset: int, type_id: int, **more) -> SimpleNamespace:
    fields = {"timestamp": 1000 + offset, "key": None, "value": b"v", "headers": []}
    return SimpleNamespace(offset=offset, timestampTypeId=type_id, **(fields | more))


def test_rows_of_beam_s_reader_become_the_same_columns() -> None:
    """As messages do; the numbers of timestamp types are Java's."""
    header = SimpleNamespace(key="a", value=None)
    rows = [_row(4, 0, key=b"k", headers=[header]), _row(7, -1, value=None), _row(8, 1)]
    records = to_columns(rows)
    assert records.offsets == [4, 7, 8]
    assert records.timestamps == [1004, NO_TIMESTAMP, 1008]
    assert (records.keys, records.values) == ([b"k", None, None], [b"v", None, b"v"])
    assert records.headers == [[("a", None)], None, None]
    assert records.log_append == [False, False, True]
    assert not to_columns(rows[:2]).log_append


# -- filling ------------------------------------------------------------------------------


def test_reading_begins_at_the_offsets_given() -> None:
    """The consumer is assigned what is asked for, and the position is where it begins."""
    reading = Reading({0: 5, 3: 70})
    assert reading.consumer.assigned == [("t", 0, 5), ("t", 3, 70)]
    assert reading.reader.partitions == [("t", 0), ("t", 3)]
    assert reading.reader.position(("t", 3)) == 70


@pytest.mark.parametrize(
    "fetched",
    [
        [_message(0), _message(1), _end(2), _message(2), _message(3)],
        [_end(0), _message(0), _message(1), _message(2), _message(3)],
        [_message(0), _message(1), _message(2), _message(3), _end(4)],
        [_message(0), _end(1), _end(1), _message(1), _message(2), _message(3), _end(4)],
        [_end(0), _message(0), _end(1), _message(1), _end(2), _message(2), _end(3), _message(3)],
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_an_end_among_the_records_loses_none(fetched: list[Message], split: bool) -> None:
    """The end of a partition is believed only after the records that stand before it."""
    reading = Reading()
    if split:
        reading.fill(*([message] for message in fetched))
    else:
        reading.fill(fetched)
    reading.timer.secs = 9
    chunks = reading.take()
    assert _offsets(chunks) == [0, 1, 2, 3]
    assert chunks[0].start == 0
    assert chunks[-1].next_offset == 4


def test_ends_of_several_partitions_in_one_fetch() -> None:
    """Each partition's end is its own, wherever it stands among the others' records."""
    reading = Reading({0: 0, 1: 50})
    reading.fill(
        [
            _message(0),
            _message(50, 1),
            _end(51, 1),
            _message(1),
            _message(52, 1),
            _end(2),
            _end(60, 1),
        ]
    )
    chunks = reading.take(flush=True)
    assert _offsets(chunks, 0) == [0, 1]
    assert _offsets(chunks, 1) == [50, 52]
    assert reading.reader.position(("t", 0)) == 2
    assert reading.reader.position(("t", 1)) == 60


def test_offsets_without_records_behind_the_last_one_are_handed_out() -> None:
    """Where the log ends in offsets that hold nothing, the last chunk reaches to the end."""
    reading = Reading()
    reading.fill([_message(0), _message(1), _end(5)])
    chunks = reading.take(flush=True)
    assert _offsets(chunks) == [0, 1]
    assert chunks[-1].next_offset == 5


def test_a_tail_without_any_record_is_a_chunk_of_its_own() -> None:
    """A range that holds no record is handed out too, once, so that it can be committed."""
    reading = Reading({0: 3})
    assert not reading.reader.ready(KEY, flush=False)
    reading.fill([_end(7)])
    assert reading.reader.ready(KEY, flush=False)
    (chunk,) = reading.take()
    assert (chunk.start, chunk.next_offset, len(chunk.records)) == (3, 7, 0)
    assert not reading.reader.ready(KEY, flush=False)
    assert reading.take() == []


def test_a_tail_found_after_its_records_is_handed_out() -> None:
    """The end may be heard of only when the records before it are gone already."""
    reading = Reading()
    reading.fill([_message(offset) for offset in range(10)])
    assert reading.take()[-1].next_offset == 10
    reading.fill([_end(12)])
    (chunk,) = reading.take()
    assert (chunk.start, chunk.next_offset, len(chunk.records)) == (10, 12, 0)


def test_gaps_belong_to_the_chunk_behind_them() -> None:
    """Between two chunks of a partition there is no hole, whatever the log leaves out. A chunk ends
    right behind its last record: what stands there is for its source alone to say."""
    reading = Reading({0: 2}, batch_size=2)
    reading.fill([_message(offset) for offset in (5, 9, 20, 21)])
    chunks = reading.take({0: (2, PLENTY)}) + reading.take()
    assert [(c.start, c.next_offset) for c in chunks] == [(2, 10), (10, 22)]


def test_an_old_end_is_not_believed() -> None:
    """An end before what was read already says nothing."""
    reading = Reading()
    reading.fill([_message(0), _message(1)], [_end(1)])
    chunks = reading.take(flush=True)
    assert chunks == []
    reading.fill([_end(2)])
    assert _offsets(reading.take(flush=True)) == [0, 1]


def test_records_that_come_again_after_a_pause_are_dropped() -> None:
    """A resumed partition may repeat what was fetched before; each record is handed out once."""
    reading = Reading(batch_size=1)
    reading.fill([_message(0), _message(1)])
    reading.reader.set_wanted([])
    reading.reader.set_wanted([KEY])
    reading.fill([_message(0), _message(1)], [_message(1), _message(2)], [_message(2)])
    assert _offsets(reading.take()) == [0, 1, 2]
    reading.fill([_message(1), _message(2), _message(3)])
    assert _offsets(reading.take()) == [3]


def test_only_what_is_wanted_is_fetched() -> None:
    """Partitions that may not hand over anything are paused, and resumed when they may."""
    reading = Reading({0: 0, 1: 0, 2: 0})
    reading.reader.set_wanted([("t", 1)])
    assert reading.consumer.paused == {("t", 0), ("t", 2)}
    reading.reader.set_wanted([("t", 1), ("t", 2)])
    assert reading.consumer.paused == {("t", 0)}
    reading.reader.set_wanted([("t", p) for p in range(3)])
    assert reading.consumer.paused == set()


@pytest.mark.parametrize(("high", "expected"), [(7, 7), (0, 0), (-1001, None), (-2, None)])
def test_the_end_of_a_partition_as_far_as_it_is_known(high: int, expected: int | None) -> None:
    """Before the first fetch nobody knows it."""
    reading = Reading()
    reading.consumer.highs[KEY] = high
    assert reading.reader.behind(KEY, 0) == expected


@pytest.mark.parametrize("number", [0, -1], ids=["of the partition", "of the topic"])
@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (ErrorCode.TOPIC_AUTHORIZATION_FAILED, ["topic t", "credentials"]),
        (ErrorCode.UNKNOWN_TOPIC_OR_PART, ["topic t", "gone"]),
        (ErrorCode._UNKNOWN_TOPIC, ["topic t", "gone"]),
        (ErrorCode._UNKNOWN_PARTITION, ["topic t", "gone"]),
    ],
)
def test_a_partition_that_cannot_be_read_is_lost(caplog, code: int, number: int, parts) -> None:
    """One line that says which and why, once; what was read before it is handed out first."""
    reading = Reading({0: 0}, batch_size=1)
    reading.fill([_message(0), _event(code, partition=number), _event(code, partition=number)])
    assert reading.reader.lost == {}
    assert _offsets(reading.take()) == [0]
    (error,) = reading.reader.lost.values()
    (warning,) = caplog.messages
    for part in parts:
        assert part in str(error)
        assert part in warning
    # It is there again.
    reading.fill([_message(1)])
    assert reading.reader.lost == {}
    assert _offsets(reading.take()) == [1]
    assert reading.reader.lost == {}


def test_other_partitions_are_not_lost_with_one() -> None:
    """They go on."""
    reading = Reading({0: 0, 1: 0}, batch_size=1)
    reading.fill([_event(ErrorCode._UNKNOWN_PARTITION), _message(0, 1)])
    assert list(reading.reader.lost) == [KEY]
    assert _offsets(reading.take(), 1) == [0]


@pytest.mark.parametrize("code", [ErrorCode._AUTO_OFFSET_RESET, ErrorCode.OFFSET_OUT_OF_RANGE])
def test_a_partition_that_retention_has_overtaken_goes_on_where_it_is_told(code: int) -> None:
    """What was read stays, and the offsets that are gone belong to what comes before them."""
    reading = Reading({0: 0, 1: 0}, batch_size=2)
    reading.fill([_message(0), _event(code, 1), _message(0, 1)])
    assert reading.reader.overtaken == {KEY: 1}
    reading.reader.set_wanted([("t", 1)])
    reading.reader.go_on_at(KEY, 7)
    assert reading.reader.overtaken == {}
    assert not reading.reader.is_paused(KEY)
    assert reading.consumer.assigned[-1] == ("t", 0, 7)
    reading.fill([_message(7)])
    assert _offsets(reading.take()) == [0, 7]
    assert reading.reader.position(KEY) == 8


def test_nothing_is_gone_where_a_partition_goes_on_before_what_was_read() -> None:
    """It is fetched from where it stands."""
    reading = Reading(batch_size=1)
    reading.fill([_message(0), _message(1), _event(ErrorCode._AUTO_OFFSET_RESET, 2)])
    reading.reader.go_on_at(KEY, 1)
    assert reading.consumer.assigned[-1] == ("t", 0, 2)
    assert _offsets(reading.take()) == [0, 1]


def test_a_partition_that_begins_anew_forgets_what_was_read() -> None:
    """Also one that was dropped: these are other records."""
    reading = Reading({0: 5}, batch_size=1, lanes=Lanes(2))
    reading.fill([_message(5, key=b"k")])
    reading.reader.drop(KEY)
    reading.reader.begin_anew({KEY: [0, 0]})
    reading.at = dict.fromkeys(reading.at, 0)
    assert not reading.reader.is_dropped(KEY)
    assert reading.consumer.assigned[-1] == ("t", 0, 0)
    reading.fill([_message(0, key=b"k"), _end(1)])
    assert _offsets(reading.take(flush=True)) == [0]


def test_a_client_that_is_broken_ends_the_run() -> None:
    """One line that says which; the records before it are kept."""
    reading = Reading(batch_size=1)
    with pytest.raises(KafkaError, match="broker:9092"):
        reading.fill([_message(0), _event(ErrorCode._FATAL, fatal=True)])
    assert _offsets(reading.take()) == [0]


def test_a_broker_that_is_away_for_a_moment_is_only_logged(caplog) -> None:
    """What librdkafka mends by itself ends nothing."""
    reading = Reading(batch_size=1)
    reading.fill([_message(0), _event(ErrorCode._TRANSPORT), _message(1)])
    assert _offsets(reading.take()) == [0, 1]
    assert "broker:9092" in caplog.text


def test_a_consumer_that_fails_is_one_line() -> None:
    """The exception of the client becomes an error for the user."""
    reading = Reading()
    reading.consumer.error = KafkaException(ErrorCode(ErrorCode._ALL_BROKERS_DOWN))
    with pytest.raises(KafkaError) as raised:
        reading.reader.fill(0)
    assert "broker:9092" in str(raised.value)


def test_closing_leaves_kafka() -> None:
    """The consumer is closed with its reader."""
    reading = Reading()
    reading.reader.close()
    assert reading.consumer.closed


# -- taking -------------------------------------------------------------------------------


def test_a_partial_batch_waits_for_its_window() -> None:
    """What is short of a batch stays until its time is over, and then goes at once."""
    reading = Reading()
    reading.fill([_message(offset) for offset in range(13)])
    assert reading.reader.ready(KEY, flush=False)
    assert len(_offsets(reading.take())) == 10
    assert not reading.reader.ready(KEY, flush=False)
    assert reading.take() == []
    reading.timer.secs = 0.999
    assert reading.take() == []
    reading.timer.secs = 1.0
    assert reading.reader.ready(KEY, flush=False)
    assert _offsets(reading.take()) == [10, 11, 12]


def test_flush_takes_incomplete_batches_at_the_end_only() -> None:
    """Nothing is waited for once a partition has nothing more; before that it may fill up."""
    reading = Reading()
    reading.fill([_message(0), _message(1)])
    assert not reading.reader.ready(KEY, flush=True)
    assert reading.take(flush=True) == []
    reading.fill([_end(2)])
    assert not reading.reader.ready(KEY, flush=False)
    assert reading.reader.ready(KEY, flush=True)
    assert _offsets(reading.take(flush=True)) == [0, 1]


def test_more_records_undo_an_end() -> None:
    """A partition that goes on is not at its end any more."""
    reading = Reading()
    reading.fill([_message(0), _end(1), _message(1)])
    assert not reading.reader.ready(KEY, flush=True)


def test_enough_bytes_are_due_without_a_full_batch() -> None:
    """Records that fill a payload by their size wait for no window."""
    reading = Reading(batch_bytes=100)
    reading.fill([_message(0, value=b"x" * 60)])
    assert not reading.reader.ready(KEY, flush=False)
    reading.fill([_message(1, value=b"x" * 40)])
    assert _offsets(reading.take()) == [0, 1]


def test_each_partition_s_first_chunk_of_a_round_is_marked() -> None:
    """Behind a round nothing is remembered, so its first chunk waits for no predecessor."""
    reading = Reading({0: 0, 1: 0}, batch_size=500)
    for partition in (0, 1):
        reading.fill([_message(offset, partition) for offset in range(12_000)])
    chunks = reading.take()
    for partition in (0, 1):
        firsts = [chunk.first for chunk in chunks if chunk.partition == partition]
        assert firsts[0] is True
        assert not any(firsts[1:])
        assert len(firsts) > 1


def test_a_round_that_was_not_begun_hands_out_nothing() -> None:
    """What may be taken holds for one round."""
    reading = Reading(batch_size=1)
    reading.fill([_message(0), _message(1)])
    assert list(reading.reader.take()) == []
    assert _offsets(reading.take({0: (1, PLENTY)})) == [0]
    assert list(reading.reader.take()) == []
    assert reading.take({}) == []


def test_partitions_without_room_are_left_alone() -> None:
    """What a round does not name stays where it is."""
    reading = Reading({0: 0, 1: 0}, batch_size=1)
    reading.fill([_message(0), _message(0, 1)])
    assert _offsets(reading.take({1: (PLENTY, PLENTY)}), 1) == [0]
    assert reading.reader.position(("t", 0)) == 0
    assert _offsets(reading.take({0: (PLENTY, PLENTY)})) == [0]


@pytest.mark.parametrize(("room", "expected"), [(9, 0), (10, 10), (19, 10), (20, 20), (100, 30)])
def test_a_partition_s_room_is_filled_in_whole_batches(room: int, expected: int) -> None:
    """A batch is better begun in the next round than cut in two."""
    reading = Reading()
    reading.fill([_message(offset) for offset in range(35)])
    assert len(_offsets(reading.take({0: (room, PLENTY)}))) == expected


@pytest.mark.parametrize(("records", "expected"), [(10, 10), (25, 20), (30, 30), (1000, 60)])
def test_a_round_s_records_are_taken_in_whole_batches(records: int, expected: int) -> None:
    """The limit for all partitions together is kept, whoever has the records."""
    reading = Reading({0: 0, 1: 0})
    for partition in (0, 1):
        reading.fill([_message(offset, partition) for offset in range(30)])
    chunks = reading.take(records=records)
    assert len(_offsets(chunks, 0)) + len(_offsets(chunks, 1)) == expected


def _bytes_reading(count: int = 40) -> Reading:
    """A partition of records of 10 bytes each."""
    reading = Reading()
    reading.fill([_message(offset, key=b"k", value=b"v" * 9) for offset in range(count)])
    return reading


# Behind the last whole batch that fits, the reader goes on record by record up to the limit.
BYTES = [
    (100, 10),
    (199, 10),
    (200, 20),
    (255, 20),
    (399, 30),
    (400, 40),
    (10_000, 40),
]


@pytest.mark.parametrize(("size", "expected"), BYTES)
def test_a_partition_s_bytes_are_taken_in_whole_batches(size: int, expected: int) -> None:
    """Keys and values count; the limit is not passed, and no batch is cut in two by it."""
    assert len(_offsets(_bytes_reading().take({0: (PLENTY, size)}))) == expected


@pytest.mark.parametrize(("size", "expected"), BYTES)
def test_a_round_s_bytes_are_taken_in_whole_batches(size: int, expected: int) -> None:
    """The same for the limit of all partitions together."""
    assert len(_offsets(_bytes_reading().take(bytes=size))) == expected


def test_the_bytes_of_all_chunks_of_a_lane_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk has what those before it have left over."""
    monkeypatch.setattr(module, "_CHUNK_RECORDS", 10)
    reading = Reading(batch_size=10)
    reading.fill([_message(offset) for offset in range(60)])
    chunks = reading.take({0: (PLENTY, 35)})
    assert [len(chunk.records) for chunk in chunks] == [10, 10, 10]
    chunks = reading.take({0: (PLENTY, 20)})
    assert [len(chunk.records) for chunk in chunks] == [10, 10]


def test_a_record_larger_than_all_room_is_handed_out_alone() -> None:
    """Otherwise it could never be read."""
    reading = Reading(batch_bytes=100)
    reading.fill([_message(0, value=b"x" * 1000), _message(1), _message(2)])
    assert _offsets(reading.take({0: (PLENTY, 500)})) == [0]
    reading.timer.secs = 9
    assert _offsets(reading.take({0: (PLENTY, 500)})) == [1, 2]


@pytest.mark.parametrize(
    ("places", "last", "order"),
    [
        ([], 3, []),
        ([0, 1, 2], -1, [0, 1, 2]),
        ([0, 1, 2], 0, [1, 2, 0]),
        ([0, 1, 2], 2, [0, 1, 2]),
        # Who is not there now is passed over.
        ([0, 4, 7], 5, [2, 0, 1]),
        ([0, 4, 7], 4, [2, 0, 1]),
    ],
)
def test_who_has_the_next_turn(places: list[int], last: int, order: list[int]) -> None:
    """Who stands behind the last one that was served."""
    assert turns(places, last) == order


@examples(300)
@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_a_level_is_the_highest_at_which_there_is_enough(dues: list[int], records: int) -> None:
    """Nobody gets less for the sake of one who has more."""
    level = fair_level(dues, records)
    assert sum(min(due, level) for due in dues) <= records
    if level < max(dues, default=0):
        assert sum(min(due, level + 1) for due in dues) > records


def test_who_has_much_leaves_the_others_their_share_of_a_round() -> None:
    """What fits into a round is divided; nobody waits until the first one is done with."""
    reading = Reading({0: 0, 1: 0, 2: 0})
    for p, count in ((0, 5000), (1, 400), (2, 5000)):
        reading.fill([_message(offset, p) for offset in range(count)])
    chunks = reading.take(records=3000)
    taken = [len(_offsets(chunks, p)) for p in range(3)]
    assert taken == [1300, 400, 1300]


def test_the_first_batches_of_each_idle_lane_come_first() -> None:
    """Its function has nothing to do; what has something under way has its turn behind. Little more
    than the first batches is not worth a chunk of its own."""
    reading = Reading({0: 0, 1: 0, 2: 0})
    for p, count in ((0, 2500), (1, 2500), (2, 1500)):
        reading.fill([_message(offset, p) for offset in range(count)])
    rooms = tuple(
        Room("t", p, PLENTY, PLENTY, busy=frozenset({0}) if p == 1 else frozenset())
        for p in range(3)
    )
    reading.reader.begin(Round(rooms, PLENTY, PLENTY))
    chunks = [(c.partition, len(c.records), c.first, c.last) for c in reading.reader.take()]
    assert chunks == [
        (0, 200, True, False),
        (2, 1500, True, True),
        (0, 2300, False, True),
        (1, 2500, True, True),
    ]


def test_the_window_of_what_is_handed_out_in_two_parts_is_one() -> None:
    """The first part does not begin it anew for the second."""
    reading = Reading()
    reading.fill([_message(offset) for offset in range(2055)])
    reading.timer.secs = 1.0
    chunks = reading.take()
    assert [len(chunk.records) for chunk in chunks] == [200, 1855]
    assert [chunk.last for chunk in chunks] == [False, True]


def test_a_round_looks_for_a_partition_of_which_nothing_has_come_yet() -> None:
    """A response of the broker holds much of one partition before anything of the next."""
    reading = Reading({0: 0, 1: 0})
    reading.fill([_message(offset) for offset in range(100)])
    reading.reader.fetcher.most = 50
    reading.consumer.fetched += [
        [_message(offset) for offset in range(100, 150)],
        [_message(offset, 1) for offset in range(50)],
        [_message(offset, 1) for offset in range(50, 100)],
    ]
    chunks = reading.take(records=100)
    assert sorted(len(_offsets(chunks, p)) for p in range(2)) == [50, 50]
    # Nobody is waited for any more.
    assert len(reading.consumer.fetched) == 1


@examples(100)
@given(st.integers(1, 40), st.data())
def test_nobody_waits_while_another_is_served_twice(partitions: int, data: st.DataObject) -> None:
    """However many a round serves: between two turns of one each other that waits has one."""
    reading = Reading(dict.fromkeys(range(partitions), 0))
    served: list[int] = []
    at = 0
    for _ in range(data.draw(st.integers(1, 12))):
        due = data.draw(st.sets(st.integers(0, partitions - 1), min_size=1)) | {0}
        for p in range(partitions):
            at += 10
            reading.fill([_message(o, p) for o in range(at, at + 10)])
        rooms = dict.fromkeys(due, (10, PLENTY))
        chunks = reading.take(rooms, records=10 * data.draw(st.integers(1, partitions)))
        served += [c.partition for c in chunks if len(c.records)]
    turns_of_0 = [i for i, p in enumerate(served) if p == 0]
    for first, second in pairwise(turns_of_0):
        between = served[first + 1 : second]
        assert len(set(between)) == len(between)


def test_a_partition_that_is_dropped_is_read_no_more() -> None:
    """What was read of it is gone, what still comes is not taken in, and nothing is fetched."""
    reading = Reading({0: 5, 1: 0})
    reading.fill([_message(5), _message(6), _message(0, 1)])
    reading.reader.drop(KEY)
    reading.fill([_message(7), _end(8), _message(1, 1)])
    assert reading.reader.waiting(KEY) == (0, 0)
    assert not reading.reader.ready(KEY, flush=True)
    assert reading.reader.position(KEY) == 5
    reading.reader.set_wanted([KEY, ("t", 1)])
    assert reading.consumer.paused == {KEY}
    chunks = reading.take(flush=True)
    assert _offsets(chunks) == []


def test_partitions_take_turns_at_the_front() -> None:
    """A round with room for one batch only goes to another partition each time."""
    reading = Reading({0: 0, 1: 0, 2: 0})
    for partition in range(3):
        reading.fill([_message(offset, partition) for offset in range(50)])
    turns = [reading.take(records=10)[0].partition for _ in range(6)]
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_a_round_takes_what_has_been_fetched_and_waits_for_nothing_more() -> None:
    """A fetch that is not full was the last of it: what comes later is for the next round.

    Otherwise a source that gives a little all the time would keep a round from its end.
    """
    reading = Reading()
    reading.fill([_message(offset) for offset in range(10)])
    reading.consumer.fetched += [
        [_message(offset) for offset in range(10, 510)],
        [_message(offset) for offset in range(510, 520)],
        [_message(offset) for offset in range(520, 530)],
    ]
    assert len(_offsets(reading.take())) == 520
    assert len(reading.consumer.fetched) == 1


def test_a_round_fetches_no_more_than_it_has_room_for() -> None:
    """What it could not hand out would only pile up."""
    reading = Reading()
    reading.consumer.fetched = [
        [_message(offset) for offset in range(start, start + 500)] for start in range(0, 5000, 500)
    ]
    assert len(_offsets(reading.take({0: (1200, PLENTY)}))) == 1200
    assert len(reading.consumer.fetched) == 7


# -- lanes --------------------------------------------------------------------------------


def _keyed(*lanes: int, start: int = 0) -> list[Message]:
    """A record for each of the lanes given, of five."""
    return [_message(start + index, key=_KEYS[lane], value=b"") for index, lane in enumerate(lanes)]


FIVE = Lanes(5, run=2)
_KEYS = {FIVE.of([b"%d" % number], [0])[0]: b"%d" % number for number in range(100)}


def _by_lane(chunks: list) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for chunk in chunks:
        found.setdefault(chunk.lane, []).extend(chunk.records.offsets)
    return {lane: offsets for lane, offsets in found.items() if offsets}


def test_without_lanes_everything_is_in_lane_0() -> None:
    """Whatever the keys are."""
    reading = Reading(batch_size=1)
    reading.fill(_keyed(0, 1, 2, 3, 4))
    assert [chunk.lane for chunk in reading.take()] == [0]


def test_each_lane_hands_out_its_whole_batches() -> None:
    """A lane that has a batch does not wait for one that has not, nor take it along."""
    reading = Reading(batch_size=2, lanes=FIVE)
    reading.fill(_keyed(1, 2, 1, 3, 3, 3))
    assert reading.reader.ready(KEY, flush=False)
    assert _by_lane(reading.take()) == {1: [0, 2], 3: [3, 4]}
    assert not reading.reader.ready(KEY, flush=False)
    # Lane 2 still has its first record.
    assert reading.reader.position(KEY) == 0
    reading.fill(_keyed(2, start=6))
    assert _by_lane(reading.take()) == {2: [1, 6]}
    # Lane 3 has one that is waiting; all before it is handed out.
    assert reading.reader.position(KEY) == 5


def test_a_lane_s_window_is_its_own() -> None:
    """What has waited long enough goes, what came later waits on."""
    reading = Reading(batch_size=2, lanes=FIVE)
    reading.fill(_keyed(1))
    reading.timer.secs = 0.5
    reading.fill(_keyed(2, start=1))
    reading.timer.secs = 1.0
    assert _by_lane(reading.take()) == {1: [0]}
    reading.timer.secs = 1.5
    assert _by_lane(reading.take()) == {2: [1]}


def test_lanes_without_records_say_so_with_the_others() -> None:
    """Their offsets have to be committed too, but are worth no round of their own."""
    reading = Reading(batch_size=2, lanes=FIVE)
    reading.fill(_keyed(1, 1, 4))
    chunks = reading.take()
    assert [(c.lane, c.start, c.next_offset) for c in chunks if not c.records.offsets] == [
        (0, 0, 3),
        (2, 0, 3),
        (3, 0, 3),
    ]
    assert all(chunk.first for chunk in chunks)
    assert not reading.reader.ready(KEY, flush=False)
    assert reading.take() == []


def test_a_tail_without_records_is_every_lane_s() -> None:
    """An end behind the last record is handed out in all lanes, once nothing waits."""
    reading = Reading(batch_size=1, lanes=FIVE)
    reading.fill([*_keyed(1), _end(7)])
    reading.take()
    assert reading.reader.position(KEY) == 7
    reading.fill([_end(9)])
    assert reading.reader.ready(KEY, flush=False)
    assert sorted(chunk.lane for chunk in reading.take()) == [0, 1, 2, 3, 4]
    assert reading.reader.position(KEY) == 9


def test_a_lane_goes_on_where_an_earlier_run_left_it() -> None:
    """What it has done already, ahead of the others, is passed over."""
    reading = Reading(batch_size=2, lanes=FIVE, ahead=[10, 14, 12, 10, 99])
    assert reading.consumer.assigned == [("t", 0, 10)]
    reading.fill(_keyed(1, 2, 3, 1, 1, 2, 4, 1, start=10))
    assert reading.reader.position(KEY) == 10
    reading.timer.secs = 9
    assert _by_lane(reading.take()) == {1: [14, 17], 2: [15], 3: [12]}
    assert reading.reader.position(KEY) == 18
    reading.fill([_end(120)])
    reading.take()
    assert reading.reader.position(KEY) == 120


def test_lanes_take_turns_at_the_front() -> None:
    """A round with room for one batch only goes to another lane each time."""
    reading = Reading(batch_size=2, lanes=FIVE)
    reading.fill(_keyed(*[0, 1, 2, 3, 4] * 10))
    turns = [next(iter(_by_lane(reading.take(records=2)))) for _ in range(10)]
    assert sorted(turns[:5]) == sorted(turns[5:]) == [0, 1, 2, 3, 4]


def test_records_without_a_key_fill_one_lane_s_batch_after_the_other() -> None:
    """Few records make one batch, not a little of each lane's."""
    reading = Reading(batch_size=2, lanes=FIVE)
    reading.fill([_message(offset) for offset in range(5)])
    assert _by_lane(reading.take()) == {0: [0, 1], 1: [2, 3]}


# -- everything together ------------------------------------------------------------------


@given(
    # Per partition: its offsets as gaps; per fetch: how many messages of which partition.
    gaps=st.lists(st.lists(st.integers(1, 3), max_size=60), min_size=1, max_size=3),
    fetches=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 25), st.booleans(), st.booleans()),
        max_size=25,
    ),
    rounds=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 60), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    batch_size=st.integers(1, 12),
    lanes=st.integers(1, 4),
    tail=st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_rounds_hand_out_every_record_once(gaps, fetches, rounds, batch_size, lanes, tail) -> None:
    """However records, ends and repeats come in, rounds give all of them, in order, once."""
    logs = []
    for steps in gaps:
        offsets, at = [], -1
        for step in steps:
            at += step
            offsets.append(at)
        logs.append(offsets)
    divided = Lanes(lanes, run=2)
    reading = Reading(dict.fromkeys(range(len(logs)), 0), batch_size=batch_size, lanes=divided)
    keys = [None, b"a", b"b", b"c", b"d"]
    read = [0] * len(logs)
    # Two fetches in one consume, to have partitions and ends side by side.
    pending: list[Message] = []
    plan = list(rounds)

    def fetch(partition: int, count: int, repeat: bool) -> None:
        low = max(0, read[partition] - 2) if repeat else read[partition]
        read[partition] = min(len(logs[partition]), read[partition] + count)
        offsets = logs[partition][low : read[partition]]
        pending.extend(_message(offset, partition, key=keys[offset % 5]) for offset in offsets)
        if read[partition] == len(logs[partition]):
            end = logs[partition][-1] + 1 if logs[partition] else 0
            pending.append(_end(end + tail, partition))

    for partition, count, repeat, flushes in fetches:
        if repeat:
            # What was fetched before a pause comes again in a later consume, never in the same.
            reading.fill(pending)
            pending = []
        fetch(partition % len(logs), count, repeat)
        if flushes or len(pending) > 30:
            reading.fill(pending)
            pending = []
            records, size, room, flush = plan[0]
            plan = plan[1:] + plan[:1]
            chunks = reading.take(
                dict.fromkeys(range(len(logs)), (room, PLENTY)),
                records=records,
                bytes=size + 100,
                flush=flush,
            )
            taken = sum(len(chunk.records) for chunk in chunks)
            assert taken <= records
            for p in range(len(logs)):
                assert len(_offsets(chunks, p)) <= room
    for partition in range(len(logs)):
        fetch(partition, 100, False)
    reading.fill(pending)
    reading.timer.secs += 100
    reading.take(flush=True)
    for partition, offsets in enumerate(logs):
        homes = divided.of([keys[offset % 5] for offset in offsets], offsets)
        for lane in range(lanes):
            own = [chunk for chunk in reading.chunks if chunk.lane == lane]
            expected = [offset for offset, home in zip(offsets, homes) if home == lane]
            assert _offsets(own, partition) == expected
        end = offsets[-1] + 1 if offsets else 0
        assert reading.reader.position(("t", partition)) == end + tail


def test_a_reader_s_consumer_fetches_ahead() -> None:
    """The consumer is made with settings for a reader that outlives its rounds."""
    assert int(Reading().settings["queued.min.messages"]) > 1000
