"""Runs on streams, against our own Kinesis: what their tests have in common."""

from __future__ import annotations

import threading
import time
from base64 import b64decode
from collections import Counter
from hashlib import md5
from typing import Any

from pipeline.local.kinesis import LocalKinesis
from pipeline.local.lambda_server import LambdaContext, LambdaServer
from tests import sink

STREAM, TABLE = "orders", "orders-to-lambda"


class Function:
    """Notes what it is sent; fails for data that begins with bad."""

    def __init__(self, names_failures: bool = False, secs: float = 0.0) -> None:
        self._names_failures = names_failures
        self._secs = secs
        self.lock = threading.Lock()
        self.calls: list[tuple[int, list[str], list[str]]] = []
        self.events: list[Any] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        records = event["Records"]
        shards = {int(each["eventID"].split(":")[0].rpartition("-")[2]) for each in records}
        assert len(shards) == 1
        numbers = [each["kinesis"]["sequenceNumber"] for each in records]
        data = [b64decode(each["kinesis"]["data"]).decode() for each in records]
        time.sleep(self._secs)
        with self.lock:
            self.calls.append((shards.pop(), numbers, data))
            self.events.append(event)
        bad = [number for number, text in zip(numbers, data) if text.startswith("bad")]
        if bad and not self._names_failures:
            raise ValueError("cannot process this")
        return {"batchItemFailures": [{"itemIdentifier": number} for number in bad]}

    def has(self, calls: int) -> bool:
        """Whether it was called so often."""
        return len(self.calls) >= calls

    def got(self, texts: int) -> bool:
        """Whether so many came."""
        return len(self.texts()) == texts

    def first(self) -> dict[int, list[str]]:
        """By shard, what came, each the first time."""
        by_shard: dict[int, dict[str, str]] = {}
        with self.lock:
            for shard, numbers, data in self.calls:
                for number, text in zip(numbers, data):
                    by_shard.setdefault(shard, {}).setdefault(number, text)
        return {shard: list(own.values()) for shard, own in by_shard.items()}

    def texts(self) -> list[str]:
        """All that came, in order, each once."""
        with self.lock:
            return list(dict.fromkeys(text for _, _, data in self.calls for text in data))


def arguments_of(kinesis: LocalKinesis, server: LambdaServer, **options: Any) -> list[str]:
    given = {
        "stream": STREAM,
        "lease_table": TABLE,
        "lease_secs": 2,
        "stream_poll_secs": 0.2,
        "kinesis_endpoint_url": kinesis.url,
        "dynamodb_endpoint_url": kinesis.url,
        "function": sink.FUNCTION,
        "lambda_endpoint_url": server.url,
        "envelope": "kinesis_event",
        "until": "caught_up",
        "summary": "json",
        **options,
    }
    return sink.command_line(given)


def start_on(kinesis: LocalKinesis, server: LambdaServer, **options: Any) -> sink.Sink:
    return sink.Sink(arguments_of(kinesis, server, **options), sink.environment())


def run_on(
    kinesis: LocalKinesis, server: LambdaServer, code: int | None = 0, **options: Any
) -> sink.Ended:
    with start_on(kinesis, server, **options) as run:
        return run.wait(code)


def put(kinesis: LocalKinesis, count: int, text: str = "order", keys: int = 9) -> list[str]:
    texts = [f"{text} {index}" for index in range(count)]
    kinesis.put(STREAM, [(f"key-{i % keys}", each.encode()) for i, each in enumerate(texts)])
    return texts


def rows_of(kinesis: LocalKinesis) -> dict[str, dict[str, Any]]:
    return {key: dict(row) for key, row in kinesis.tables.get(TABLE, {}).items()}


def by_key(kinesis: LocalKinesis, shards: int) -> dict[str, list[str]]:
    """By partition key, its data in the order in which it was put."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number in range(shards):
        for each in kinesis.records(STREAM, number):
            found.setdefault(each.key, []).append((each.number, each.data.decode()))
    return {key: [text for _, text in sorted(own)] for key, own in found.items()}


def came_by_key(function: Function) -> dict[str, list[str]]:
    """The same as the function got it, each the first time."""
    found: dict[str, dict[str, None]] = {}
    with function.lock:
        for event in function.events:
            for each in event["Records"]:
                own = found.setdefault(each["kinesis"]["partitionKey"], {})
                own.setdefault(b64decode(each["kinesis"]["data"]).decode())
    return {key: list(own) for key, own in found.items()}


class Watched(Function):
    """Notes shards that were begun before all of their parents were committed."""

    def __init__(self, kinesis: LocalKinesis, secs: float = 0.0) -> None:
        super().__init__(secs=secs)
        self._kinesis = kinesis
        self.too_early: list[int] = []

    def __call__(self, event: Any, context: LambdaContext) -> Any:
        shard = int(event["Records"][0]["eventID"][8:20])
        rows = rows_of(self._kinesis)
        for parent in self._kinesis.parents(STREAM, shard):
            if rows[f"shardId-{parent:012d}"]["checkpoint"] != {"S": "SHARD_END"}:
                self.too_early.append(shard)
        return super().__call__(event, context)


def checkpoints_past_what_came(kinesis: LocalKinesis, function: Function) -> list[str]:
    """Records that the table says are done, and that the function was not sent."""
    rows = rows_of(kinesis)
    done = set(function.texts())
    found = []
    for key, row in rows.items():
        text = row["checkpoint"]["S"]
        for each in kinesis.records(STREAM, int(key[8:])):
            below = text == "SHARD_END" or (text.isdecimal() and each.number <= int(text))
            if below and each.data.decode() not in done:
                found.append(each.data.decode())
    return found


def all_committed(kinesis: LocalKinesis) -> bool:
    """Whether the table says of all records that they are done, and of all parents."""
    rows = rows_of(kinesis)
    said = {int(key[8:]): row["checkpoint"]["S"] for key, row in rows.items()}
    for shard in kinesis.open_shards(STREAM):
        if {said.get(each) for each in kinesis.parents(STREAM, shard)} - {"SHARD_END"}:
            return False
        records = kinesis.records(STREAM, shard)
        if records and said.get(shard) != str(records[-1].number):
            return False
    return True


def owners(kinesis: LocalKinesis) -> dict[str, int]:
    """How many leases each has; nobody has those that are free."""
    found = [row.get("leaseOwner", {}).get("S") for row in rows_of(kinesis).values()]
    return Counter(owner for owner in found if owner)


def aggregate(records: list[tuple[str, bytes, int | None]]) -> bytes:
    """What the Kinesis Producer Library makes of records, each a partition key, data and a hash
    key to be used in place of the key's."""
    keys = list(dict.fromkeys(key for key, _, _ in records))
    hashes = list(dict.fromkeys(hash for _, _, hash in records if hash is not None))
    body = b"".join(field(1, key.encode()) for key in keys)
    body += b"".join(field(2, str(each).encode()) for each in hashes)
    for key, data, hash in records:
        own = field(1, keys.index(key))
        own += b"" if hash is None else field(2, hashes.index(hash))
        tag = field(4, field(1, b"tag"))
        body += field(3, own + field(3, data) + tag)
    return signed(body)


def signed(body: bytes) -> bytes:
    """A message of Protobuf as an aggregate has it."""
    return b"\xf3\x89\x9a\xc2" + body + md5(body).digest()


def field(number: int, value: int | bytes) -> bytes:
    """A field of Protobuf: a number or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    text = bytearray()
    while number > 127:
        text.append(number & 127 | 128)
        number >>= 7
    return bytes([*text, number])
