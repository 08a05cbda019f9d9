"""Read: records of any bytes, from a real broker."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import wait_until
from tests.conftest import Names
from tests.examples import examples
from tests.raw_records import RawRecord, send
from transforms.kafka.client import KafkaConfig
from transforms.kafka.offsets import SourceConfig
from transforms.read.rounds import ReadConfig, Room, Round, RoundReader
from transforms.records import RecordChunk

PLENTY = 10**9

fields = st.none() | st.binary(max_size=40)
names = st.binary(max_size=8) | st.text(max_size=4).map(lambda s: s.encode(errors="replace"))
records = st.builds(
    RawRecord,
    fields,
    fields,
    st.lists(st.tuples(names, fields), max_size=4),
    st.integers(0, 1_700_000_000_000),
)


def _name(raw: bytes) -> str:
    """As the client reads a name."""
    try:
        return raw.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        return "\ufffd"


def _reader(broker: KafkaBroker, topic: str) -> RoundReader:
    kafka = KafkaConfig(broker.bootstrap_servers, "group-of-nobody")
    reader = RoundReader(ReadConfig(SourceConfig(kafka, (topic,)), batch_size=1))
    reader.assign({(topic, 0): [0]})
    return reader


def _take(reader: RoundReader, topic: str, until: int) -> list[RecordChunk]:
    chunks: list[RecordChunk] = []

    def has_all() -> bool:
        reader.fill(0.05)
        reader.begin(Round((Room(topic, 0, PLENTY, PLENTY),), PLENTY, PLENTY))
        chunks.extend(reader.take())
        return reader.position((topic, 0)) >= until

    wait_until(has_all, "not all is read")
    return chunks


def test_records_of_any_bytes_are_read_as_they_are(broker: KafkaBroker, names: Names) -> None:
    """Keys, values, timestamps and header values byte for byte, names as far as they are text."""
    topic = names.topic()
    broker.create_topic(topic, partitions=1, retention_ms=-1)
    reader = _reader(broker, topic)
    try:
        _any_bytes(broker, topic, reader)()
    finally:
        reader.close()


def _any_bytes(broker: KafkaBroker, topic: str, reader: RoundReader) -> Callable[[], None]:
    @examples(60)
    @given(st.lists(records, min_size=1, max_size=25))
    def check(sent: list[RawRecord]) -> None:
        first = send(broker, topic, 0, sent)
        # What a broken earlier example left behind is passed over.
        chunks = _take(reader, topic, first + len(sent))
        rows = {
            offset: (key, value, stamp, headers)
            for chunk in chunks
            for offset, key, value, stamp, headers in zip(
                chunk.records.offsets,
                chunk.records.keys,
                chunk.records.values,
                chunk.records.timestamps,
                chunk.records.headers,
                strict=True,
            )
        }
        for offset, record in enumerate(sent, first):
            headers = [(_name(name), value) for name, value in record.headers]
            expected = (record.key, record.value, record.timestamp, headers or None)
            assert rows[offset] == expected

    return check


def test_a_header_name_that_is_no_text_stops_nothing(broker: KafkaBroker, names: Names) -> None:
    """Its record is read with the headers' values; so are those around it."""
    topic = names.topic()
    broker.create_topic(topic)
    headers = [(b"a", b"1"), (b"caf\xe9", b"2"), (b"a", None), (b"\xff", None)]
    send(
        broker,
        topic,
        0,
        [
            RawRecord(b"k", b"0"),
            RawRecord(b"k", b"1", headers),
            RawRecord(b"k", b"2", [(b"z", b"")]),
        ],
    )
    reader = _reader(broker, topic)
    try:
        chunks = _take(reader, topic, 3)
    finally:
        reader.close()
    assert [each for chunk in chunks for each in chunk.records.headers] == [
        None,
        [("a", b"1"), ("\ufffd", b"2"), ("a", None), ("\ufffd", None)],
        [("z", b"")],
    ]
