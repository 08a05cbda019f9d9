"""Redrive: error records -> RecordChunks of their originals, and Progress -> what is redriven.

The error topic is read by a consumer group of its own. An error record is redriven when all its
originals have come to an end again, and then never taken again: the group's committed offset is the
first error record that is not redriven, and what is redriven behind it is in the metadata of that
commit (docs/adr/0011-redrive.md).
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam

from transforms.commit.commit import REFRESH_SECS, CommitConfig, OffsetCommitter
from transforms.errors import KafkaError
from transforms.kafka.client import KafkaConfig
from transforms.lanes import Lanes
from transforms.original import HEADER_PREFIX, ORIGINAL_HEADER, decode_original
from transforms.per_process import per_process
from transforms.records import (
    Header,
    LaneKey,
    PartitionKey,
    Progress,
    RecordChunk,
    Records,
)

_MARK = "redriven:1:"
_METADATA_BYTES = 4096
"""What a broker takes with an offset, unless its `offset.metadata.max.bytes` says more."""
_SAFE_METADATA_BYTES = 3500
"""Above it no more is taken: what is done in part takes more room than what is done."""

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1

Original = Mapping[str, Any]
"""A record with the fields of `transforms.original.ORIGINAL_SCHEMA`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which error records to redrive; empty takes all.

    Attributes:
        since_ms: Only those that were written then or later.
        conditions: Only those with one of these conditions.
        error_types: Only those with one of these error types.
    """

    since_ms: int | None = None
    conditions: tuple[str, ...] = ()
    error_types: tuple[str, ...] = ()

    def takes(self, record: ErrorRecord) -> bool:
        """Whether an error record is to be redriven."""
        return (
            (self.since_ms is None or record.timestamp_ms >= self.since_ms)
            and (not self.conditions or record.condition in self.conditions)
            and (not self.error_types or record.error_type in self.error_types)
        )


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """What redriving needs of a record of the error topic.

    Attributes:
        partition: Of the error topic.
        offset: In the error topic.
        timestamp_ms: When it was written.
        condition: Why its originals were given up.
        error_type: The cause.
        originals: The originals as they are in its headers; empty if it has none.
    """

    partition: int
    offset: int
    timestamp_ms: int
    condition: str
    error_type: str
    originals: tuple[bytes, ...]


def error_records(chunk: RecordChunk) -> Iterator[ErrorRecord]:
    """The error records of a chunk that was read from an error topic."""
    records = chunk.records
    for offset, timestamp, headers in zip(records.offsets, records.timestamps, records.headers):
        facts = {name: value or b"" for name, value in headers or () if name != ORIGINAL_HEADER}
        yield ErrorRecord(
            chunk.partition,
            offset,
            timestamp,
            facts.get(f"{HEADER_PREFIX}condition", b"").decode(errors="replace"),
            facts.get(f"{HEADER_PREFIX}error.type", b"").decode(errors="replace"),
            tuple(value or b"" for name, value in headers or () if name == ORIGINAL_HEADER),
        )


def read_originals(record: ErrorRecord) -> list[Original] | None:
    """The originals of an error record; None if it has none that can be read."""
    try:
        originals: list[Original] = [decode_original(data) for data in record.originals]
    except (ValueError, TypeError, LookupError, EOFError, OverflowError):
        return None  # a header of that name which is somebody else's
    return originals if originals and all(map(_is_possible, originals)) else None


def _is_possible(original: Original) -> bool:
    """Whether Kafka could have a record at such a place: other bytes can be read as Avro, too."""
    return (
        bool(original["topic"])
        and 0 <= original["partition"] <= _INT32_MAX
        and 0 <= original["offset"] < _INT64_MAX
        and -_INT64_MAX <= original["timestamp"] <= _INT64_MAX
    )


def to_chunk(key: PartitionKey, originals: Iterable[Original]) -> RecordChunk:
    """Originals of one partition, each of another offset, as if they were read from it."""
    ordered = sorted(originals, key=lambda original: int(original["offset"]))
    records = Records(
        [original["offset"] for original in ordered],
        [original["timestamp"] for original in ordered],
        [original["key"] for original in ordered],
        [original["value"] for original in ordered],
        [_headers(original) for original in ordered],
    )
    start, end = records.offsets[0], records.offsets[-1] + 1
    return RecordChunk(*key, start, end, records, first=True)


def _headers(original: Original) -> list[Header] | None:
    return [(header["name"], header["value"]) for header in original["headers"]] or None


class OffsetSet:
    """Offsets of one partition, a bit each: a million in a row take some 200 kB. Pure."""

    _BLOCK = 1024

    def __init__(self, offsets: Iterable[int] = ()) -> None:
        self._blocks: dict[int, int] = {}
        for offset in offsets:
            self.add(offset)

    def add(self, offset: int) -> None:
        block, bit = divmod(offset, self._BLOCK)
        self._blocks[block] = self._blocks.get(block, 0) | 1 << bit

    def __contains__(self, offset: int) -> bool:
        block, bit = divmod(offset, self._BLOCK)
        return bool(self._blocks.get(block, 0) >> bit & 1)

    def forget(self, end: int) -> None:
        """Let go of offsets below this one, all but some of them."""
        for block in [block for block in self._blocks if (block + 1) * self._BLOCK <= end]:
            del self._blocks[block]

    def bits(self, begin: int) -> int:
        """The offsets from `begin` on: its lowest bit stands for `begin`."""
        first = begin // self._BLOCK
        last = max(self._blocks, default=first - 1)
        size = self._BLOCK // 8
        parts = (self._blocks.get(n, 0).to_bytes(size, "little") for n in range(first, last + 1))
        return int.from_bytes(b"".join(parts), "little") >> begin % self._BLOCK

    def add_bits(self, begin: int, bits: int) -> None:
        """Take in offsets, the lowest bit standing for `begin`."""
        first, shift = divmod(begin, self._BLOCK)
        size = self._BLOCK // 8
        whole = bits << shift
        data = whole.to_bytes(-(-whole.bit_length() // self._BLOCK) * size, "little")
        for place in range(0, len(data), size):
            if block := int.from_bytes(data[place : place + size], "little"):
                number = first + place // size
                self._blocks[number] = self._blocks.get(number, 0) | block


class Redriven:
    """Which error records of a partition are redriven. Pure.

    Args:
        begin: The committed offset, or where the partition begins.
        metadata: What was committed with it.
        first: The first offset that is still there.

    Attributes:
        position: Up to where error records have been looked at, exclusive.

    Raises:
        ValueError: The metadata is somebody else's.
    """

    def __init__(self, begin: int, metadata: str = "", first: int = 0) -> None:
        self.position = max(begin, first)
        self._left: int | None = None
        self._taken: set[int] = set()
        # Of those below the mark nobody asks any more.
        self._done = OffsetSet()
        if metadata:
            if not metadata.startswith(_MARK):
                raise ValueError("not written by a redrive")
            try:
                bits = zlib.decompress(b64decode(metadata.removeprefix(_MARK)))
            except zlib.error as error:
                raise ValueError(str(error)) from None
            self._done.add_bits(begin, int.from_bytes(bits, "little"))

    def look(self, next_offset: int) -> None:
        """All error records below an offset have been taken, left or were redriven before."""
        self.position = max(self.position, next_offset)

    def leave(self, offset: int) -> None:
        """An error record is left where it is, for another redrive."""
        self._left = offset if self._left is None else min(self._left, offset)

    def skip(self, next_offset: int) -> None:
        """Leave all below an offset without looking at them."""
        for offset in range(self.position, next_offset):
            if offset not in self._done:
                self.leave(offset)
                break
        self.look(next_offset)

    def take(self, offset: int) -> None:
        """An error record is to be redriven."""
        self._taken.add(offset)

    def add(self, offset: int) -> None:
        """An error record that was taken is redriven."""
        self._taken.discard(offset)
        self._done.add(offset)

    def __contains__(self, offset: int) -> bool:
        return offset in self._done

    def commit(self, more: Iterable[int] = ()) -> tuple[int, str]:
        """The offset to commit and its metadata.

        Args:
            more: Error records to count as redriven, to see what that would come to.
        """
        also = OffsetSet(more)
        end = self.position if self._left is None else min(self.position, self._left)
        self._done.forget(min(end, min(self._taken, default=end)))
        mark = min((each for each in self._taken if each not in also), default=end)
        mark = min(mark, end)
        # The record at the mark is not redriven.
        bits = (self._done.bits(mark) | also.bits(mark)) & ~1
        if not bits:
            return mark, ""
        data = bits.to_bytes(-(-bits.bit_length() // 8), "little")
        return mark, _MARK + b64encode(zlib.compress(data, 9)).decode()


@dataclass(frozen=True, slots=True)
class RedriveConfig:
    """What is redriven.

    Attributes:
        kafka: The cluster, and the group that remembers what is redriven.
        error_topic: Where the error records are.
        selection: Which of them.
        topics: Topics whose originals are taken, empty with a regex.
        topics_regex: Regex for whole topic names, or None.
        lanes: How a partition's records are divided.
        limit: Error records to take at most; None for all.
        refresh_secs: How often what was committed is committed again.
    """

    kafka: KafkaConfig
    error_topic: str
    selection: Selection = Selection()
    topics: tuple[str, ...] = ()
    topics_regex: str | None = None
    lanes: Lanes = Lanes()
    limit: int | None = None
    refresh_secs: float | None = REFRESH_SECS


class Ledger:
    """What is under way in this process, and what of it is redriven. Holds no client.

    Args:
        config: What is redriven.

    Attributes:
        partitions: Which error records are redriven, by partition of the error topic.
        redriven: How many were redriven by this process.
    """

    def __init__(self, config: RedriveConfig) -> None:
        self._config = config
        self.partitions: dict[int, Redriven] = {}
        self.redriven = 0
        self._chunks: list[RecordChunk] = []
        self._sent: dict[LaneKey, list[int]] = {}
        self._finished: dict[PartitionKey, OffsetSet] = {}
        self._waiting: dict[tuple[PartitionKey, int], list[tuple[int, int]]] = {}
        self._missing: dict[tuple[int, int], int] = {}

    def begin(self, records: Iterable[tuple[ErrorRecord, Sequence[Original]]]) -> int:
        """Have the originals of error records handed out by the next `take`.

        An original is handed out once in a run, however often it is in the topic. What was
        handed out before must have come to its end, or to none because its partition is halted.

        Returns:
            How many originals will be handed out.
        """
        fresh: dict[PartitionKey, dict[int, Original]] = {}
        for record, originals in records:
            owner = (record.partition, record.offset)
            missing = 0
            for original in originals:
                key, offset = (original["topic"], original["partition"]), original["offset"]
                if offset in self._finished.setdefault(key, OffsetSet()):
                    continue
                missing += 1
                waiting = self._waiting.setdefault((key, offset), [])
                if not waiting:
                    fresh.setdefault(key, {})[offset] = original
                waiting.append(owner)
            if missing:
                self._missing[owner] = missing
            else:
                self._redriven(owner)
        self._sent = {}
        for key, by_offset in fresh.items():
            for chunk in self._config.lanes.split(to_chunk(key, by_offset.values())):
                self._sent[chunk.lane_key] = list(chunk.records.offsets)
                self._chunks.append(chunk)
        return sum(map(len, fresh.values()))

    def take(self) -> list[RecordChunk]:
        """What is to be sent."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def finish(self, progress: Progress) -> None:
        """The originals of a range have come to their end, and that is acknowledged."""
        key = (progress.topic, progress.partition)
        offsets = self._sent.get((*key, progress.lane), [])
        low = bisect_left(offsets, progress.start)
        high = bisect_left(offsets, progress.next_offset)
        for offset in offsets[low:high]:
            self._finished[key].add(offset)
            for owner in self._waiting.pop((key, offset), ()):
                self._missing[owner] -= 1
                if not self._missing[owner]:
                    del self._missing[owner]
                    self._redriven(owner)

    def _redriven(self, owner: tuple[int, int]) -> None:
        partition, offset = owner
        self.partitions[partition].add(offset)
        self.redriven += 1

    def has_room_for(self, records: Iterable[ErrorRecord]) -> bool:
        """Whether it could be remembered that these are redriven, too."""
        more: dict[int, list[int]] = {}
        for record in records:
            more.setdefault(record.partition, []).append(record.offset)
        return all(
            len(self.partitions[partition].commit(offsets)[1]) <= _SAFE_METADATA_BYTES
            for partition, offsets in more.items()
        )


def shared_ledger(config: RedriveConfig) -> Ledger:
    """This process's ledger for the config."""
    return per_process(Ledger, config)


def _make_committer(config: RedriveConfig) -> OffsetCommitter:
    return OffsetCommitter(CommitConfig(config.kafka, refresh_secs=config.refresh_secs))


def marks(config: RedriveConfig) -> dict[PartitionKey, int]:
    """By partition of the error topic, the first error record that is not redriven."""
    partitions = shared_ledger(config).partitions.items()
    return {(config.error_topic, number): redriven.commit()[0] for number, redriven in partitions}


def commit(config: RedriveConfig) -> None:
    """Commit what is redriven now.

    Raises:
        KafkaError: It cannot be committed.
    """
    committer = per_process(_make_committer, config)
    offsets, metadata = {}, {}
    for partition, redriven in shared_ledger(config).partitions.items():
        key = (config.error_topic, partition)
        offsets[key], metadata[key] = redriven.commit()
        if len(metadata[key]) > _METADATA_BYTES:
            raise KafkaError(cannot_remember(config))
    committer.commit(offsets, metadata)


def refresh(config: RedriveConfig, now: bool = False) -> None:
    """Commit again what was committed, if it is time to; see `OffsetCommitter.refresh`."""
    per_process(_make_committer, config).refresh(now)


def cannot_remember(config: RedriveConfig) -> str:
    """Why nothing more is taken."""
    return (
        f"--error_topic={config.error_topic}: too many single error records would be redriven "
        f"between others that are left out; Kafka keeps {_METADATA_BYTES} bytes to remember them. "
        f"Redrive the others too, or go on with another --redrive_group"
    )


class TakeRedriven(beam.PTransform):
    """Hand out what the process's ledger has. Bounded; order: offsets rise per lane.

    Args:
        config: What is redriven.
    """

    def __init__(self, config: RedriveConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, root: beam.pvalue.PBegin) -> beam.PCollection[RecordChunk]:
        return (
            root
            | "Begin" >> beam.Impulse()
            | "Take" >> beam.ParDo(_TakeFn(self._config)).with_output_types(RecordChunk)
        )


class _TakeFn(beam.DoFn):
    def __init__(self, config: RedriveConfig) -> None:
        self._config = config
        self._records = beam.metrics.Metrics.counter("read", "records")

    def process(self, _: bytes) -> Iterator[RecordChunk]:
        chunks = shared_ledger(self._config).take()
        self._records.inc(sum(len(chunk.records) for chunk in chunks))
        # As in a round: what earlier ones began is collected only if something reaches the steps.
        yield from chunks or [RecordChunk("", 0, 0, 0, Records(), lane=0)]


class CommitRedriven(beam.PTransform):
    """Commit which error records are redriven, once per bundle.

    Comes after Write, so an error record counts as redriven only when what became of its
    originals is acknowledged.

    Args:
        config: What is redriven.
    """

    def __init__(self, config: RedriveConfig) -> None:
        super().__init__()
        self._config = config

    def expand(self, progress: beam.PCollection[Progress]) -> beam.PCollection[Any]:
        return progress | "CommitGroup" >> beam.ParDo(_CommitFn(self._config))


class _CommitFn(beam.DoFn):
    def __init__(self, config: RedriveConfig) -> None:
        self._config = config
        self._commits = beam.metrics.Metrics.counter("commit", "commits")

    def process(self, progress: Progress) -> Iterable[Any]:
        shared_ledger(self._config).finish(progress)
        return ()

    def finish_bundle(self) -> Iterator[Any]:
        commit(self._config)
        self._commits.inc()
        yield from ()
