"""The values that travel between the steps. No Beam, no clients, no rules.

Records travel as columns (`Records`), not as one object each: building a column is one call in C
for a thousand records, and pickling it between two stages costs a tenth of a list of objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PartitionKey = tuple[str, int]
"""(topic, partition). A plain tuple, since Beam needs a state key whose coder is deterministic."""

Header = tuple[str, bytes | None]

NO_TIMESTAMP = -1
"""What Kafka clients report for a record that has no timestamp."""


@dataclass(frozen=True, slots=True)
class Records:
    """Consecutive records of one partition, as columns of equal length, offsets rising.

    Attributes:
        offsets: Kafka offsets. Gaps are normal (compaction, transactions).
        timestamps: Milliseconds since the epoch, or `NO_TIMESTAMP`.
        keys: Key bytes, or None.
        values: Value bytes, or None for a tombstone.
        headers: Per record its headers in order (names may repeat), or None if it has none.
    """

    offsets: Sequence[int] = ()
    timestamps: Sequence[int] = ()
    keys: Sequence[bytes | None] = ()
    values: Sequence[bytes | None] = ()
    headers: Sequence[Sequence[Header] | None] = ()

    def __len__(self) -> int:
        return len(self.offsets)

    def slice(self, low: int, high: int) -> Records:
        """The records from index `low` up to, but without, index `high`."""
        return Records(
            self.offsets[low:high],
            self.timestamps[low:high],
            self.keys[low:high],
            self.values[low:high],
            self.headers[low:high],
        )

    @staticmethod
    def join(parts: Iterable[Records]) -> Records:
        """One `Records` of all parts, in the order given."""
        columns: tuple[list, ...] = ([], [], [], [], [])
        for part in parts:
            columns[0].extend(part.offsets)
            columns[1].extend(part.timestamps)
            columns[2].extend(part.keys)
            columns[3].extend(part.values)
            columns[4].extend(part.headers)
        return Records(*columns)


@dataclass(frozen=True, slots=True)
class RecordChunk:
    """What Read emits: everything that partition holds in `[start, next_offset)`.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the range begins; the `next_offset` of the chunk before it.
        next_offset: Where the range ends, exclusive. Above the last record's offset + 1 where
            the log goes on with offsets that hold no record (transaction markers).
        records: The records of the range; may be empty.
        first: True if nothing before `start` has to be waited for.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    records: Records
    first: bool = False


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


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one partition that go to the function in one invocation.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the batch's range of offsets begins: the end of the batch before it.
        next_offset: Where it ends, exclusive; the offset to commit when the batch is finished.
        records: The records as Kafka had them, kept byte for byte for error records.
        entries: Each record already encoded as its JSON entry of the payload.
        rejection: Set if the batch is a single record that must not be sent.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    records: Records
    entries: Sequence[bytes]
    rejection: Rejection | None = None

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)

    @property
    def payload_bytes(self) -> int:
        """Size of the whole batch as a payload, in bytes."""
        return payload_bytes(sum(map(len, self.entries)), len(self.entries))

    def __len__(self) -> int:
        return len(self.entries)


def payload_bytes(entry_bytes: int, entries: int) -> int:
    """Size of a compact JSON array: its brackets, its entries, and the commas between them."""
    return 2 + entry_bytes + max(entries - 1, 0)


@dataclass(frozen=True, slots=True)
class Responses:
    """The function's answer to some records of a batch: one JSON text per record, in order.

    Attributes:
        offsets: The answered records' offsets.
        results: Per record the reply entry's `payload` as JSON text; None if replies are not kept.
    """

    offsets: Sequence[int]
    results: Sequence[bytes] | None

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


@dataclass(slots=True)
class Finished:
    """What Invoke emits, once per batch, in order per partition.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        start: Where the batch's range of offsets began.
        next_offset: Everything below it is done. Below the batch's own end if the partition
            was halted or the run was stopped inside this batch.
        parts: Outcomes of the batch's records, in offset order; each record in exactly one.
        stats: What it took.
        halted: Set if this failure stops the partition.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    parts: list[Responses | Failure] = field(default_factory=list)
    stats: CallStats = field(default_factory=CallStats)
    halted: Failure | None = None

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Progress:
    """What Write emits once all records of `[start, next_offset)` are acknowledged by Kafka."""

    topic: str
    partition: int
    start: int
    next_offset: int
