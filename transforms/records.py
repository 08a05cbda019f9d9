"""The values that travel between the steps. No Beam, no clients, no rules.

Records travel as columns (`Records`), not as one object each: building a column is one call in C
for a thousand records, and pickling it between two stages costs a tenth of a list of objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

PartitionKey = tuple[str, int]
"""(topic, partition)."""

LaneKey = tuple[str, int, int]
"""(topic, partition, lane): what order is kept by. A plain tuple, since Beam needs a state key
whose coder is deterministic. Without `--parallelization_factor` a partition has lane 0 only."""

Header = tuple[str, bytes | None]

NO_TIMESTAMP = -1
"""What Kafka clients report for a record that has no timestamp."""


BY_COUNT, BY_BYTES, BY_WINDOW, BY_END, ALONE = CLOSED_BY = (
    "count",
    "bytes",
    "window",
    "end",
    "alone",
)
"""What closes a batch: it is full, it or what waits for it is large enough, its time is over, there
is nothing more to come, or its record stands alone since it is not sent."""

PREFIX_BYTES = 5
"""Bytes of a record in front of its data: a zero, then the schema's id."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a record must not be sent to the function at all.

    Attributes:
        condition: Its place in the error record's `condition` header.
        error_type: Short name of the cause.
        message: One sentence with the limit or the parse error; never the payload.
    """

    condition: str
    error_type: str
    message: str


class Decoded(NamedTuple):
    """What the schemas of a record made of its key and value.

    Attributes:
        key: The key as JSON text; None if it has no schema or was left as it is.
        value: The same of the value.
        key_schema: ``(format, id)`` of the key's schema, e.g. ``("AVRO", "7")``; None without one.
        value_schema: The same of the value.
    """

    key: bytes | None = None
    value: bytes | None = None
    key_schema: tuple[str, str] | None = None
    value_schema: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """Consecutive records of one partition, as columns of equal length, offsets rising.

    Attributes:
        offsets: Kafka offsets. Gaps are normal (compaction, transactions).
        timestamps: Milliseconds since the epoch, or `NO_TIMESTAMP`.
        keys: Key bytes, or None.
        values: Value bytes, or None for a tombstone.
        headers: Per record its headers in order (names may repeat), or None if it has none.
        decoded: Per record what a schema made of it, or empty if no schemas are used.
        rejections: Per record why it must not be sent, or None; empty if all may be.
        log_append: Per record whether its timestamp is the broker's (LogAppendTime) and not the
            producer's; empty if none is.
    """

    offsets: Sequence[int] = ()
    timestamps: Sequence[int] = ()
    keys: Sequence[bytes | None] = ()
    values: Sequence[bytes | None] = ()
    headers: Sequence[Sequence[Header] | None] = ()
    decoded: Sequence[Decoded | None] = ()
    rejections: Sequence[Rejection | None] = ()
    log_append: Sequence[bool | None] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    def slice(self, low: int, high: int) -> Records:
        """The records from index `low` up to, but without, index `high`."""
        if low == 0 and high == len(self):
            return self
        return Records(*(column[low:high] for column in self._columns()))

    def where(self, chosen: Sequence[bool]) -> Records:
        """The records whose place in `chosen` is true."""
        return Records(*(list(compress(column, chosen)) for column in self._columns()))

    @staticmethod
    def join(parts: Iterable[Records]) -> Records:
        """One `Records` of all parts, in the order given."""
        parts = list(parts)
        columns: list[list] = []
        for column in zip(*(part._columns() for part in parts)):
            # A column that is left out by some parts only is one of Nones there.
            left_out = any(column) and not all(
                len(rows) == len(part) for rows, part in zip(column, parts)
            )
            joined: list = []
            for rows, part in zip(column, parts):
                joined.extend([None] * len(part) if left_out and not rows else rows)
            columns.append(joined)
        return Records(*columns)

    @property
    def held_bytes(self) -> int:
        """About what the records hold, in bytes: keys, values and headers."""
        columns = sum(map(len, filter(None, self.keys))) + sum(map(len, filter(None, self.values)))
        return columns + sum(map(header_bytes, filter(None, self.headers)))

    def _columns(self) -> tuple[Sequence, ...]:
        return (
            self.offsets,
            self.timestamps,
            self.keys,
            self.values,
            self.headers,
            self.decoded,
            self.rejections,
            self.log_append,
        )


def header_bytes(headers: Iterable[Header]) -> int:
    """What a record's headers hold, in bytes: names and values."""
    return sum(len(name) + len(value or b"") for name, value in headers)


@dataclass(frozen=True, slots=True)
class RecordChunk:
    """What Read emits: everything that partition, or a lane of it, holds in `[start, next_offset)`.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the range begins; the `next_offset` of the chunk before it.
        next_offset: Where the range ends, exclusive. Above the last record's offset + 1 where
            the log goes on with offsets that hold no record (transaction markers), or none of
            this lane.
        records: The records of the range; may be empty.
        first: True if nothing before `start` has to be waited for.
        lane: The lane whose records these are; None if they are not divided into lanes yet.
        last: True if nothing of its lane comes behind it, in this round or, where its partition
            ends for good, ever: no batch stays open for more.
        closed_by: If so, what closes the batch at its end, one of `CLOSED_BY`.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    records: Records
    first: bool = False
    lane: int | None = None
    last: bool = False
    closed_by: str = ""

    @property
    def lane_key(self) -> LaneKey:
        return (self.topic, self.partition, self.lane or 0)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the entries of a payload.

    Attributes:
        head: Everything up to the first entry.
        tail: Everything behind the last one.
    """

    head: bytes = b"["
    tail: bytes = b"]"

    def join(self, entries: Sequence[bytes]) -> bytes:
        """The payload: head, entries with commas between them, tail."""
        return self.head + b",".join(entries) + self.tail

    def payload_bytes(self, entry_bytes: int, entries: int) -> int:
        """Size of a payload with so many entries of so many bytes together."""
        return len(self.head) + entry_bytes + max(entries - 1, 0) + len(self.tail)


ARRAY = Frame()
"""A plain JSON array."""

FINAL, EARLY = "final", "early"


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one lane of a partition that go to the function in one invocation.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the batch's range of offsets begins: the end of the batch before it.
        next_offset: Where it ends, exclusive; the offset to commit when the batch is finished.
        records: The records as Kafka had them, kept byte for byte for error records.
        entries: Each record already encoded as its JSON entry of the payload.
        rejection: Set if the batch is a single record that must not be sent.
        frame: What stands around the entries in a payload, be it of all of them or of some.
        lane: The partition's lane; 0 if it has only one.
        closes: If it is one without records that ends the lane's tumbling window: whether it is
            over (`FINAL`), or may go on with an empty state (`EARLY`). Else empty.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    records: Records
    entries: Sequence[bytes]
    rejection: Rejection | None = None
    frame: Frame = ARRAY
    lane: int = 0
    closes: str = ""

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)

    @property
    def lane_key(self) -> LaneKey:
        return (self.topic, self.partition, self.lane)

    @property
    def payload_bytes(self) -> int:
        """Size of the whole batch as a payload, in bytes."""
        return self.frame.payload_bytes(sum(map(len, self.entries)), len(self.entries))

    def __len__(self) -> int:
        return len(self.entries)


def reply_bytes(results: Sequence[bytes] | None, body: bytes | None) -> int:
    """About what is held of a reply, in bytes."""
    return len(body or b"") + sum(map(len, results or ()))


@dataclass(frozen=True, slots=True)
class Responses:
    """The function's answer to some records of a batch, in order.

    Attributes:
        offsets: The answered records' offsets.
        results: Per record the reply entry's `payload` as JSON text; None if replies are not
            kept so.
        body: The reply to all of them as it came, where it is kept as a whole.
        trace: The `traceparent` of the invocation that answered, if it was traced.
    """

    offsets: Sequence[int]
    results: Sequence[bytes] | None
    body: bytes | None = None
    trace: str | None = None

    @property
    def held_bytes(self) -> int:
        """About what it holds, in bytes: the reply."""
        return reply_bytes(self.results, self.body)

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class Failure:
    """Records of a batch that ended in an error, and the facts about it.

    Attributes:
        records: The failed records as Kafka had them.
        entries: The same records as they were sent, or would have been.
        condition: Why the pipeline gave up, e.g. `RetryAttemptsExhausted`.
        error_type: The cause, e.g. the function's own error type.
        message: One sentence; the function's error message, or ours.
        attempts: Invocations of exactly these records; 0 if they were never sent.
        status_code: HTTP status of the last invocation; 0 if there was none.
        function_error: The `X-Amz-Function-Error` of the reply, or the error type.
        log_result: Base64 of the log's end, if the reply carried one.
        payload: The error's JSON text as the function returned it, or one made of our facts.
        executed_version: Version of the function that ran, if known.
        request_id: AWS request id of the last invocation, if known.
        frame: What stood around the entries.
        trace: The `traceparent` of the last invocation, if it was traced.
    """

    records: Records
    entries: Sequence[bytes]
    condition: str
    error_type: str
    message: str
    attempts: int
    status_code: int
    function_error: str
    log_result: str | None = None
    payload: str | None = None
    executed_version: str | None = None
    request_id: str | None = None
    frame: Frame = ARRAY
    trace: str | None = None

    @property
    def held_bytes(self) -> int:
        """About what it holds, in bytes: the records, their entries and the error's text."""
        texts = len(self.payload or "") + len(self.log_result or "")
        return self.records.held_bytes + sum(map(len, self.entries)) + texts

    def __len__(self) -> int:
        return len(self.records)


@dataclass(slots=True)
class CallStats:
    """What it took to finish a batch; plain counts, `invoke_ms` the sum over its invocations."""

    invocations: int = 0
    retries: int = 0
    bisections: int = 0
    throttles: int = 0
    invoke_ms: int = 0

    def add(self, more: CallStats) -> None:
        """Count what others have counted."""
        self.invocations += more.invocations
        self.retries += more.retries
        self.bisections += more.bisections
        self.throttles += more.throttles
        self.invoke_ms += more.invoke_ms

    def since(self, before: CallStats) -> CallStats:
        """What was counted since it stood so."""
        return CallStats(
            self.invocations - before.invocations,
            self.retries - before.retries,
            self.bisections - before.bisections,
            self.throttles - before.throttles,
            self.invoke_ms - before.invoke_ms,
        )


@dataclass(slots=True)
class Finished:
    """What Invoke emits, once per batch, in order per lane.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the batch's range of offsets began.
        next_offset: Everything below it is done. Below the batch's own end if the partition
            was halted or the run was stopped inside this batch.
        parts: Outcomes of the batch's records, in offset order; each record in exactly one.
        stats: What it took.
        halted: Set if this failure stops the partition.
        lane: The partition's lane.
        reach: The range that is done with it, where that is another one than its own: a window
            that is open holds its records back, and when it ends they are done together.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    parts: list[Responses | Failure] = field(default_factory=list)
    stats: CallStats = field(default_factory=CallStats)
    halted: Failure | None = None
    lane: int = 0
    reach: tuple[int, int] | None = None

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)

    @property
    def lane_key(self) -> LaneKey:
        return (self.topic, self.partition, self.lane)

    @property
    def held_bytes(self) -> int:
        """About what it holds until it is written, in bytes."""
        return sum(part.held_bytes for part in self.parts)


def halt_name(finished: Finished) -> str:
    """Where a partition was halted and why, as a counter's name or a note; empty if it was not.

    See `halt_of`.
    """
    failure = finished.halted
    if failure is None:
        return ""
    facts = (*finished.key, failure.records.offsets[0], failure.condition, failure.error_type)
    return "|".join(map(str, facts))[:1000]


def halt_of(name: str) -> Finished:
    """The halt that `halt_name` tells of.

    Raises:
        ValueError: It tells of none.
    """
    topic, partition, offset, condition, error_type = name.split("|", 4)
    records = Records([int(offset)], [NO_TIMESTAMP], [None], [None], [None])
    message = "the workers' log says more"
    failure = Failure(records, (), condition, error_type, message, 0, 0, error_type)
    return Finished(topic, int(partition), int(offset), int(offset), halted=failure)


EVERY_LANE = -1
"""As the lane of a `Progress`: it says where the partition begins, in each of its lanes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What Write emits once a lane's records of `[start, next_offset)` are acknowledged.

    `halted` says where and why the partition stops there, as `halt_name` does; else it is empty.
    With `asked` nothing was done: it asks how far the partition is, see `END_NOTE`.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    lane: int = 0
    halted: str = ""
    asked: int = 0


HALT_NOTE = "halted "
"""Begins what is kept with the committed offset of a partition that a failure has stopped."""


END_NOTE = "end "
"""Begins what is kept with the position of a partition that has ended, once the job's own state has
said that all of it is done; behind it is the number under which it was asked."""


def read_halt(note: str) -> Finished | None:
    """The halt that is kept with an offset, if one is. Pure."""
    if not note.startswith(HALT_NOTE):
        return None
    try:
        return halt_of(note.removeprefix(HALT_NOTE))
    except ValueError:
        return None
