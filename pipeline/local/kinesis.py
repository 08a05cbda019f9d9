"""A Kinesis and a DynamoDB in this process, for the demo and for fast tests.

Shards split and merge, iterators expire, and the limits of AWS are kept: whoever reads too often or
too much is refused. Of DynamoDB there is what a lease table needs. Nothing is signed for, and
nothing outlives the process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
import threading
import time
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from transforms.kinesis.frames import make_frame

ACCOUNT, REGION = "000000000000", "us-east-1"
CUT = "cut"

_KEYS = 2**128
_BASE, _PER_MS, _PER_SHARD = 495 * 10**53, 10**30, 10**20
_CALLS_PER_SEC = 5
_BYTES_PER_SEC, _MOST_BYTES = 2 * 2**20, 10 * 2**20
_WRITES_PER_SEC, _WRITTEN_PER_SEC = 1000, 2**20
_MOST_RECORDS = 10_000
_ITERATOR_SECS = 300.0
_MOST_SENT, _SEND_SECS = 1000, 0.05
_JSON = "application/x-amz-json-1.1"


class ServiceError(Exception):
    """An error as AWS answers it: its code, and what it says."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class StoredRecord(NamedTuple):
    """A record of a shard."""

    number: int
    key: str
    data: bytes
    ms: int


@dataclass
class _Shard:
    number: int
    low: int
    high: int
    parents: tuple[int, ...] = ()
    records: list[StoredRecord] = field(default_factory=list)
    trimmed: int = 0
    closed: bool = False
    last: int = 0
    calls: deque[float] = field(default_factory=deque)
    free_at: float = 0.0
    subscribed: dict[str, tuple[float, object]] = field(default_factory=dict)
    nothing: int = 0
    written: float = 0.0
    written_bytes: float = 0.0
    written_at: float = 0.0

    @property
    def id(self) -> str:
        return f"shardId-{self.number:012d}"

    def listed(self) -> dict[str, Any]:
        numbers = {"StartingSequenceNumber": str(_BASE + self.number * _PER_SHARD)}
        if self.closed:
            numbers["EndingSequenceNumber"] = str(self.last + 1)
        found: dict[str, Any] = {
            "ShardId": self.id,
            "HashKeyRange": self.range,
            "SequenceNumberRange": numbers,
        }
        for name, parent in zip(("ParentShardId", "AdjacentParentShardId"), self.parents):
            found[name] = f"shardId-{parent:012d}"
        return found

    @property
    def range(self) -> dict[str, str]:
        return {"StartingHashKey": str(self.low), "EndingHashKey": str(self.high)}


@dataclass
class _Stream:
    name: str
    created_ms: int
    shards: dict[int, _Shard] = field(default_factory=dict)
    consumers: dict[str, str] = field(default_factory=dict)
    next_number: int = 0

    def add(self, low: int, high: int, parents: tuple[int, ...] = ()) -> _Shard:
        shard = _Shard(self.next_number, low, high, parents)
        self.next_number += 1
        self.shards[shard.number] = shard
        return shard

    @property
    def arn(self) -> str:
        return f"arn:aws:kinesis:{REGION}:{ACCOUNT}:stream/{self.name}"


class LocalKinesis:
    """A server at 127.0.0.1, as a context.

    Args:
        iterator_secs: How long an iterator lives.
        early_ends: Whether a closed shard ends with its last records, and not one answer later.
            AWS has been seen to do either.
        list_most: Shards that one answer lists.
        subscription_secs: How long a subscription lives.
        again_secs: How soon after one the next is refused, for the same shard and consumer.
        idle_secs: How often a subscription is heard of that has nothing.

    Attributes:
        calls: How often each operation was called.
        refused: How often a limit was overstepped, by the code of the answer.
        tables: Items of DynamoDB's tables, by the text of their key.
    """

    def __init__(
        self,
        iterator_secs: float = _ITERATOR_SECS,
        early_ends: bool = False,
        list_most: int = 1000,
        subscription_secs: float = 300.0,
        again_secs: float = 5.0,
        idle_secs: float = 1.0,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.tables: dict[str, dict[str, dict[str, Any]]] = {}
        self._keys: dict[str, str] = {}
        self._streams: dict[str, _Stream] = {}
        self._faults: list[tuple[str, str, int]] = []
        self._iterator_secs = iterator_secs
        self._early_ends = early_ends
        self._list_most = list_most
        self._subscription_secs = subscription_secs
        self._again_secs = again_secs
        self._idle_secs = idle_secs
        self._lock = threading.RLock()
        self._is_up = True
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True)

    @property
    def url(self) -> str:
        """Where it is, for both services."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalKinesis:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_up = False
        self._server.shutdown()
        self._server.server_close()

    # -- what producers and operators do -----------------------------------------------------

    def create_stream(self, name: str, shards: int = 1) -> str:
        """Make a stream; returns its ARN. One that is there is deleted before."""
        with self._lock:
            stream = self._streams[name] = _Stream(name, _now_ms())
            width = _KEYS // shards
            for number in range(shards):
                high = _KEYS - 1 if number == shards - 1 else (number + 1) * width - 1
                stream.add(number * width, high)
            return stream.arn

    def delete_stream(self, name: str) -> None:
        """Delete a stream."""
        with self._lock:
            del self._streams[name]

    def put(
        self, name: str, records: Iterable[tuple[str, bytes]], ms: int | None = None
    ) -> list[tuple[int, int]]:
        """Append records, each with its partition key; returns the shard and number of each.

        Args:
            name: Of the stream.
            records: Keys and data.
            ms: When they arrive; None for now.
        """
        placed = []
        with self._lock:
            stream = self._streams[name]
            for key, data in records:
                shard = self._shard_of(stream, key)
                placed.append((shard.number, self._append(shard, key, data, ms or _now_ms())))
        return placed

    def _shard_of(self, stream: _Stream, key: str) -> _Shard:
        hashed = int.from_bytes(hashlib.md5(key.encode()).digest(), "big")
        return next(
            each
            for each in stream.shards.values()
            if not each.closed and each.low <= hashed <= each.high
        )

    def _append(self, shard: _Shard, key: str, data: bytes, ms: int) -> int:
        # Holes of any size, as AWS leaves them.
        least = _BASE + ms * _PER_MS + shard.number * _PER_SHARD
        number = max(least, shard.last + 1 + 7919 ** (len(shard.records) % 5))
        shard.last = number
        shard.records.append(StoredRecord(number, key, data, ms))
        return number

    def records(self, name: str, shard: int) -> list[StoredRecord]:
        """All records of a shard."""
        with self._lock:
            return list(self._streams[name].shards[shard].records)

    def parents(self, name: str, shard: int) -> tuple[int, ...]:
        """Those whose place a shard has taken."""
        with self._lock:
            return self._streams[name].shards[shard].parents

    def open_shards(self, name: str) -> list[int]:
        """Numbers of the shards that are written to."""
        with self._lock:
            return [s.number for s in self._streams[name].shards.values() if not s.closed]

    def split(self, name: str, number: int) -> tuple[int, int]:
        """Split a shard in the middle of its range; returns its children."""
        with self._lock:
            stream = self._streams[name]
            shard = self._close(stream, number)
            middle = (shard.low + shard.high) // 2
            first = stream.add(shard.low, middle, (number,))
            second = stream.add(middle + 1, shard.high, (number,))
            return first.number, second.number

    def merge(self, name: str, number: int, other: int) -> int:
        """Merge two shards whose ranges adjoin; returns their child."""
        with self._lock:
            stream = self._streams[name]
            a, b = sorted((stream.shards[number], stream.shards[other]), key=lambda s: s.low)
            if a.high + 1 != b.low:
                raise ServiceError("InvalidArgumentException", "the shards are not adjacent")
            for each in (number, other):
                self._close(stream, each)
            return stream.add(a.low, b.high, (number, other)).number

    def update_shard_count(self, name: str, count: int) -> None:
        """Split or merge until there are so many shards of about equal width; as AWS does it, also
        by way of some that live for a moment only."""
        with self._lock:
            stream = self._streams[name]
            bounds = [_KEYS * index // count for index in range(count + 1)]
            for bound in bounds[1:-1]:
                (shard,) = [s for s in self._open(stream) if s.low <= bound <= s.high]
                if shard.low < bound:
                    self._close(stream, shard.number)
                    stream.add(shard.low, bound - 1, (shard.number,))
                    stream.add(bound, shard.high, (shard.number,))
            for low, high in itertools.pairwise(bounds):
                own = [s for s in self._open(stream) if low <= s.low < high]
                while len(own) > 1:
                    child = self.merge(name, own[0].number, own[1].number)
                    own[:2] = [stream.shards[child]]

    def _open(self, stream: _Stream) -> list[_Shard]:
        """Shards that are written to, by what belongs into them."""
        return sorted((s for s in stream.shards.values() if not s.closed), key=lambda s: s.low)

    def register_consumer(self, name: str, consumer: str) -> str:
        """Register a consumer of a stream; returns its ARN."""
        with self._lock:
            stream = self._streams[name]
            arn = f"{stream.arn}/consumer/{consumer}:{int(time.time())}"
            return stream.consumers.setdefault(consumer, arn)

    def deregister_consumer(self, name: str, consumer: str) -> None:
        """The opposite."""
        with self._lock:
            del self._streams[name].consumers[consumer]

    def _close(self, stream: _Stream, number: int) -> _Shard:
        shard = stream.shards[number]
        if shard.closed:
            raise ServiceError("ResourceInUseException", f"shard {shard.id} is not open")
        shard.closed = True
        return shard

    def trim(self, name: str, number: int, count: int) -> None:
        """Have retention take a shard's oldest records."""
        with self._lock:
            self._streams[name].shards[number].trimmed += count

    def expire(self, name: str, number: int) -> None:
        """Have retention take a whole shard."""
        with self._lock:
            del self._streams[name].shards[number]

    def pass_over(self, name: str, number: int, times: int) -> None:
        """Answer the next reads of a shard with nothing, though there is more: as AWS does it where
        a shard has long had no records."""
        with self._lock:
            self._streams[name].shards[number].nothing = times

    def refuse(self, operation: str, code: str, times: int = 1) -> None:
        """Answer the next calls of an operation with an error; times below 0 for all of them. With
        `CUT` the connection is closed, and there is no answer."""
        with self._lock:
            self._faults = [each for each in self._faults if each[0] != operation]
            if times:
                self._faults.append((operation, code, times))

    # -- calls -------------------------------------------------------------------------------

    def answer(self, target: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One call.

        Raises:
            ServiceError: It is refused.
        """
        service, _, operation = target.rpartition(".")
        handler = f"_{re.sub(r'(?<!^)(?=[A-Z])', '_', operation).lower()}"
        with self._lock:
            self.calls[operation] += 1
            self._fail(operation)
            found: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, handler, None)
            if found is None or not service.startswith(("Kinesis_", "DynamoDB_")):
                raise ServiceError("UnknownOperationException", f"{target} is not known here")
            return found(arguments)

    def _fail(self, operation: str) -> None:
        for index, (name, code, times) in enumerate(self._faults):
            if name == operation:
                self._faults[index] = name, code, times - 1
                if times == 1:
                    del self._faults[index]
                status = 500 if code == "InternalFailure" else 400
                raise ServiceError(code, "as it was told to say", status)

    def _refuse(self, code: str, message: str) -> ServiceError:
        self.refused[code] += 1
        return ServiceError(code, message)

    def _stream(self, arguments: Mapping[str, Any]) -> _Stream:
        name = arguments.get("StreamName") or str(arguments.get("StreamARN")).rpartition("/")[2]
        if name not in self._streams:
            raise ServiceError(
                "ResourceNotFoundException",
                f"Stream {name} under account {ACCOUNT} not found.",
            )
        return self._streams[name]

    def _describe_stream_summary(self, arguments: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(arguments)
        return {
            "StreamDescriptionSummary": {
                "StreamName": stream.name,
                "StreamARN": stream.arn,
                "StreamStatus": "ACTIVE",
                "RetentionPeriodHours": 24,
                "StreamCreationTimestamp": stream.created_ms / 1000,
                "OpenShardCount": len(self.open_shards(stream.name)),
            }
        }

    def _create_stream(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments["StreamName"] in self._streams:
            raise ServiceError("ResourceInUseException", "there is such a stream")
        self.create_stream(arguments["StreamName"], arguments.get("ShardCount", 1))
        return {}

    def _delete_stream(self, arguments: dict[str, Any]) -> dict[str, Any]:
        del self._streams[self._stream(arguments).name]
        return {}

    def put_within_limits(
        self, name: str, records: Iterable[tuple[str, bytes]]
    ) -> list[tuple[int, int] | None]:
        """The same as `put` for what a shard takes now; None for what it refuses."""
        placed: list[tuple[int, int] | None] = []
        with self._lock:
            stream, now, ms = self._streams[name], time.monotonic(), _now_ms()
            for key, data in records:
                shard = self._shard_of(stream, key)
                since = now - shard.written_at
                count = max(0.0, shard.written - since * _WRITES_PER_SEC)
                size = max(0.0, shard.written_bytes - since * _WRITTEN_PER_SEC)
                more = len(key) + len(data)
                if count + 1 > _WRITES_PER_SEC or size + more > _WRITTEN_PER_SEC:
                    self.refused["PutRecords"] += 1
                    placed.append(None)
                    continue
                shard.written, shard.written_bytes = count + 1, size + more
                shard.written_at = now
                placed.append((shard.number, self._append(shard, key, data, ms)))
        return placed

    def _put_record(self, arguments: dict[str, Any]) -> dict[str, Any]:
        entry = (arguments["PartitionKey"], b64decode(arguments["Data"]))
        (placed,) = self.put_within_limits(self._stream(arguments).name, [entry])
        if placed is None:
            raise ServiceError("ProvisionedThroughputExceededException", "Rate exceeded.")
        return {"ShardId": f"shardId-{placed[0]:012d}", "SequenceNumber": str(placed[1])}

    def _put_records(self, arguments: dict[str, Any]) -> dict[str, Any]:
        entries = [(e["PartitionKey"], b64decode(e["Data"])) for e in arguments["Records"]]
        placed = self.put_within_limits(self._stream(arguments).name, entries)
        records = [
            {"ShardId": f"shardId-{each[0]:012d}", "SequenceNumber": str(each[1])}
            if each
            else {
                "ErrorCode": "ProvisionedThroughputExceededException",
                "ErrorMessage": "Rate exceeded.",
            }
            for each in placed
        ]
        return {"FailedRecordCount": placed.count(None), "Records": records}

    def _split_shard(self, arguments: dict[str, Any]) -> dict[str, Any]:
        number = int(arguments["ShardToSplit"].rpartition("-")[2])
        self.split(self._stream(arguments).name, number)
        return {}

    def _merge_shards(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names = arguments["ShardToMerge"], arguments["AdjacentShardToMerge"]
        numbers = [int(each.rpartition("-")[2]) for each in names]
        self.merge(self._stream(arguments).name, *numbers)
        return {}

    def _update_shard_count(self, arguments: dict[str, Any]) -> dict[str, Any]:
        name, count = self._stream(arguments).name, arguments["TargetShardCount"]
        before = len(self.open_shards(name))
        self.update_shard_count(name, count)
        return {"StreamName": name, "CurrentShardCount": before, "TargetShardCount": count}

    def _register_stream_consumer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        stream, name = self._stream(arguments), arguments["ConsumerName"]
        if name in stream.consumers:
            raise ServiceError("ResourceInUseException", f"there is a consumer {name}")
        self.register_consumer(stream.name, name)
        return {"Consumer": self._consumer_of(stream, name)}

    def _deregister_stream_consumer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(arguments)
        self.deregister_consumer(stream.name, arguments["ConsumerName"])
        return {}

    def _describe_stream_consumer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        stream, name = self._stream(arguments), arguments["ConsumerName"]
        described = {**self._consumer_of(stream, name), "StreamARN": stream.arn}
        return {"ConsumerDescription": described}

    def _consumer_of(self, stream: _Stream, name: str) -> dict[str, Any]:
        if name not in stream.consumers:
            raise ServiceError(
                "ResourceNotFoundException",
                f"Consumer {name} not found in the stream {stream.name}.",
            )
        return {
            "ConsumerName": name,
            "ConsumerARN": stream.consumers[name],
            "ConsumerStatus": "ACTIVE",
            "ConsumerCreationTimestamp": int(stream.consumers[name].rpartition(":")[2]),
        }

    def _list_shards(self, arguments: dict[str, Any]) -> dict[str, Any]:
        token = arguments.get("NextToken")
        if token and len(arguments) > len({"NextToken", "MaxResults"} & arguments.keys()):
            raise ServiceError(
                "InvalidArgumentException",
                "NextToken and StreamName cannot be provided together.",
            )
        name, begin = json.loads(b64decode(token)) if token else (None, 0)
        stream = self._stream({"StreamName": name} if token else arguments)
        shards = sorted(stream.shards.values(), key=lambda shard: shard.number)
        end = begin + min(self._list_most, arguments.get("MaxResults", self._list_most))
        answer: dict[str, Any] = {"Shards": [shard.listed() for shard in shards[begin:end]]}
        if end < len(shards):
            answer["NextToken"] = b64encode(json.dumps([stream.name, end]).encode()).decode()
        return answer

    def _get_shard_iterator(self, arguments: dict[str, Any]) -> dict[str, Any]:
        stream = self._stream(arguments)
        shard = stream.shards.get(int(arguments["ShardId"].rpartition("-")[2]))
        if shard is None:
            raise ServiceError(
                "ResourceNotFoundException",
                f"Shard {arguments['ShardId']} in stream {stream.name} does not exist",
            )
        index = self._index(shard, arguments)
        return {"ShardIterator": self._iterator(stream, shard, index)}

    def _index(self, shard: _Shard, arguments: dict[str, Any]) -> int:
        kind = arguments["ShardIteratorType"]
        if kind == "TRIM_HORIZON":
            return 0
        if kind == "LATEST":
            return len(shard.records)
        if kind == "AT_TIMESTAMP":
            ms = arguments["Timestamp"] * 1000
            if ms > _now_ms():
                raise ServiceError(
                    "InvalidArgumentException",
                    "The timestampInMillis parameter cannot be greater than the "
                    "currentTimestampInMillis.",
                )
            return sum(record.ms < ms for record in shard.records)
        number = int(arguments["StartingSequenceNumber"])
        if number == _BASE + shard.number * _PER_SHARD:
            return 0
        for index, record in enumerate(shard.records):
            if record.number == number and index >= shard.trimmed:
                return index + (kind == "AFTER_SEQUENCE_NUMBER")
        raise ServiceError(
            "InvalidArgumentException",
            f"StartingSequenceNumber {number} used in GetShardIterator on shard {shard.id} is "
            f"invalid because it did not come from this stream.",
        )

    def _iterator(self, stream: _Stream, shard: _Shard, index: int) -> str:
        made = [stream.name, stream.created_ms, shard.number, index, time.monotonic()]
        return b64encode(json.dumps(made).encode()).decode()

    def _get_records(self, arguments: dict[str, Any]) -> dict[str, Any]:
        limit = arguments.get("Limit", _MOST_RECORDS)
        if not 1 <= limit <= _MOST_RECORDS:
            raise self._refuse("ValidationException", f"{limit} is not a limit")
        try:
            name, created, number, index, at = json.loads(b64decode(arguments["ShardIterator"]))
        except ValueError:
            raise ServiceError("InvalidArgumentException", "Invalid ShardIterator.") from None
        stream = self._stream({"StreamName": name})
        if stream.created_ms != created:
            raise ServiceError("InvalidArgumentException", "Invalid ShardIterator.")
        if time.monotonic() - at > self._iterator_secs:
            raise self._refuse("ExpiredIteratorException", "Iterator expired.")
        if number not in stream.shards:
            raise ServiceError("ResourceNotFoundException", "the shard does not exist")
        shard = stream.shards[number]
        self._throttle(shard)
        index = max(index, shard.trimmed)
        if shard.nothing:
            shard.nothing, limit = shard.nothing - 1, 0
        found: list[StoredRecord] = []
        size = 0
        for record in shard.records[index : index + limit]:
            size += len(record.data) + len(record.key)
            if found and size > _MOST_BYTES:
                break
            found.append(record)
        end = index + len(found)
        shard.free_at = time.monotonic() + size / _BYTES_PER_SEC
        at_end = end == len(shard.records)
        answer = _sent(shard, found, end)
        if shard.closed and at_end and (self._early_ends or not found):
            answer["ChildShards"] = _children(stream, number)
        else:
            answer["NextShardIterator"] = self._iterator(stream, shard, end)
        return answer

    def subscribe(self, arguments: dict[str, Any]) -> Iterator[bytes]:
        """The events of a subscription, as AWS frames them.

        Raises:
            ServiceError: It is refused.
        """
        with self._lock:
            self.calls["SubscribeToShard"] += 1
            self._fail("SubscribeToShard")
            stream, shard, index, me = self._subscribed(arguments)
        return self._events(stream, shard, index, arguments["ConsumerARN"], me)

    def _subscribed(self, arguments: dict[str, Any]) -> tuple[_Stream, _Shard, int, object]:
        arn = str(arguments["ConsumerARN"])
        stream = self._stream({"StreamARN": arn.partition("/consumer/")[0]})
        if arn not in stream.consumers.values():
            raise ServiceError("ResourceNotFoundException", f"Consumer {arn} not found.")
        shard = stream.shards.get(int(arguments["ShardId"].rpartition("-")[2]))
        if shard is None:
            raise ServiceError("ResourceNotFoundException", f"{arguments['ShardId']} not found")
        start = arguments["StartingPosition"]
        asked = {
            "ShardIteratorType": start["Type"],
            "StartingSequenceNumber": start.get("SequenceNumber"),
            "Timestamp": start.get("Timestamp"),
        }
        now, me = time.monotonic(), object()
        since = now - shard.subscribed.get(arn, (-math.inf, None))[0]
        if since < self._again_secs:
            raise self._refuse(
                "ResourceInUseException",
                f"Another active subscription exists for this consumer: {arn}",
            )
        index = self._index(shard, asked)
        shard.subscribed[arn] = now, me
        return stream, shard, index, me

    def _events(
        self, stream: _Stream, shard: _Shard, index: int, arn: str, me: object
    ) -> Iterator[bytes]:
        until = time.monotonic() + self._subscription_secs
        yield make_frame(_event_headers("initial-response"), b"{}")
        silent_until = 0.0
        while (now := time.monotonic()) < until and self._is_up:
            try:
                event, index = self._event(stream, shard, index, arn, me)
            except ServiceError as error:
                headers = {":message-type": "exception", ":exception-type": error.code}
                said = json.dumps({"message": str(error)}).encode()
                yield make_frame({**headers, ":content-type": _JSON}, said)
                return
            ended = "ChildShards" in event
            if event["Records"] or ended or now >= silent_until:
                silent_until = now + self._idle_secs
                headers = _event_headers("SubscribeToShardEvent")
                yield make_frame(headers, json.dumps(event).encode())
            if ended:
                return
            size = sum(len(each["Data"]) * 3 // 4 for each in event["Records"])
            time.sleep(max(_SEND_SECS, size / _BYTES_PER_SEC))

    def _event(
        self, stream: _Stream, shard: _Shard, index: int, arn: str, me: object
    ) -> tuple[dict[str, Any], int]:
        """What a subscription sends next, and behind which record it is then.

        Raises:
            ServiceError: It ends with that.
        """
        with self._lock:
            self._fail("SubscribeToShardEvent")
            if shard.subscribed[arn][1] is not me:
                why = f"Another active subscription exists for this consumer: {arn}"
                raise ServiceError("ResourceInUseException", why)
            if self._streams.get(stream.name) is not stream:
                raise ServiceError("ResourceNotFoundException", "the stream is gone")
            index = max(index, shard.trimmed)
            found: list[StoredRecord] = []
            size = 0
            for record in shard.records[index : index + _MOST_SENT]:
                size += len(record.data) + len(record.key)
                if found and size > _BYTES_PER_SEC:
                    break
                found.append(record)
            index += len(found)
            event = _sent(shard, found, index)
            if not found and shard.closed and index == len(shard.records):
                event["ChildShards"] = _children(stream, shard.number)
            else:
                event["ContinuationSequenceNumber"] = str(self._continuation(shard, index))
            return event, index

    def _continuation(self, shard: _Shard, index: int) -> int:
        """A number that the shard knows, though it need not be a record's."""
        if index:
            return shard.records[index - 1].number
        return _BASE + shard.number * _PER_SHARD

    def _throttle(self, shard: _Shard) -> None:
        now = time.monotonic()
        while shard.calls and now - shard.calls[0] >= 1:
            shard.calls.popleft()
        if len(shard.calls) >= _CALLS_PER_SEC or now < shard.free_at:
            raise self._refuse(
                "ProvisionedThroughputExceededException", f"Rate exceeded for shard {shard.id}."
            )
        shard.calls.append(now)

    # -- DynamoDB ----------------------------------------------------------------------------

    def _table(self, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        name = arguments["TableName"]
        if name not in self.tables:
            raise ServiceError(
                "ResourceNotFoundException", f"Requested resource not found: Table: {name}"
            )
        return self.tables[name]

    def create_table(self, name: str) -> None:
        """Make a lease table."""
        key = {"AttributeName": "leaseKey", "KeyType": "HASH"}
        self._create_table({"TableName": name, "KeySchema": [key]})

    def _create_table(self, arguments: dict[str, Any]) -> dict[str, Any]:
        name = arguments["TableName"]
        if name in self.tables:
            raise ServiceError("ResourceInUseException", f"Table already exists: {name}")
        self.tables[name] = {}
        self._keys[name] = arguments["KeySchema"][0]["AttributeName"]
        return {"TableDescription": self._description(name)}

    def _describe_table(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self._table(arguments)
        return {"Table": self._description(arguments["TableName"])}

    def _description(self, name: str) -> dict[str, Any]:
        key = {"AttributeName": self._keys[name], "KeyType": "HASH"}
        return {"TableName": name, "TableStatus": "ACTIVE", "KeySchema": [key]}

    def _scan(self, arguments: dict[str, Any]) -> dict[str, Any]:
        items = [dict(item) for _, item in sorted(self._table(arguments).items())]
        return {"Items": items, "Count": len(items), "ScannedCount": len(items)}

    def _get_item(self, arguments: dict[str, Any]) -> dict[str, Any]:
        item = self._table(arguments).get(_text(arguments["Key"]))
        return {"Item": item} if item else {}

    def _put_item(self, arguments: dict[str, Any]) -> dict[str, Any]:
        item, table = arguments["Item"], self._table(arguments)
        table[
            _text({self._keys[arguments["TableName"]]: item[self._keys[arguments["TableName"]]]})
        ] = item
        return {}

    def _update_item(self, arguments: dict[str, Any]) -> dict[str, Any]:
        table, key = self._table(arguments), _text(arguments["Key"])
        before = table.get(key, {})
        expressions = _Expressions(
            arguments.get("ExpressionAttributeNames", {}),
            arguments.get("ExpressionAttributeValues", {}),
        )
        condition = arguments.get("ConditionExpression")
        if condition and not expressions.holds(condition, before):
            raise ServiceError("ConditionalCheckFailedException", "The conditional request failed")
        item = table[key] = {
            **arguments["Key"],
            **expressions.updated(arguments["UpdateExpression"], before),
        }
        return {"Attributes": item}


def _text(key: Mapping[str, Any]) -> str:
    ((_, value),) = key.items()
    return str(value["S"])


class _Expressions:
    """The part of DynamoDB's expressions that a lease table needs."""

    def __init__(self, names: Mapping[str, str], values: Mapping[str, Any]) -> None:
        self._names = names
        self._values = values

    def holds(self, text: str, item: Mapping[str, Any]) -> bool:
        """Whether a condition holds."""
        # Each comparison and each function becomes True or False; and Python knows the rest.
        name = r"(?P<name>#?\w+)"
        text = re.sub(
            rf"attribute_(?P<no>not_)?exists\({name}\)",
            lambda m: str((self._names.get(m["name"], m["name"]) in item) != bool(m["no"])),
            text,
        )
        text = re.sub(rf"{name} (?P<is>=|<>) (?P<value>:\w+)", lambda m: self._is(m, item), text)
        words = text.replace("(", " ( ").replace(")", " ) ").split()
        spoken = {"AND": "and", "OR": "or", "NOT": "not"}
        if not set(words) <= {*spoken, "True", "False", "(", ")"}:
            raise ServiceError("ValidationException", f"not known here: {text}")
        return bool(eval(" ".join(spoken.get(word, word) for word in words)))

    def _is(self, match: re.Match[str], item: Mapping[str, Any]) -> str:
        name = self._names.get(match["name"], match["name"])
        equal = item.get(name) == self._values[match["value"]]
        return str(equal == (match["is"] == "="))

    def updated(self, text: str, item: Mapping[str, Any]) -> dict[str, Any]:
        """An item after an update."""
        found = dict(item)
        sets, _, removes = text.partition(" REMOVE ")
        for each in sets.removeprefix("SET ").split(", "):
            name, _, value = each.partition(" = ")
            new = self._values[value]
            if new.get("SS") == []:
                raise ServiceError("ValidationException", "a set may not be empty")
            if len(new.get("N", "").lstrip("-")) > 38:
                raise ServiceError("ValidationException", "a number has 38 digits at most")
            found[self._names.get(name, name)] = new
        for name in filter(None, removes.split(", ")):
            found.pop(self._names.get(name, name), None)
        return found


def _event_headers(kind: str) -> dict[str, str]:
    return {":message-type": "event", ":event-type": kind, ":content-type": _JSON}


def _sent(shard: _Shard, found: Iterable[StoredRecord], end: int) -> dict[str, Any]:
    """Records of a shard as they are sent, of which `end` are sent by then."""
    at_end = end == len(shard.records)
    return {
        "Records": [
            {
                "SequenceNumber": str(record.number),
                "PartitionKey": record.key,
                "Data": b64encode(record.data).decode(),
                "ApproximateArrivalTimestamp": record.ms / 1000,
            }
            for record in found
        ],
        "MillisBehindLatest": 0 if at_end else max(1, _now_ms() - shard.records[end].ms),
    }


def _children(stream: _Stream, number: int) -> list[dict[str, Any]]:
    return [
        {
            "ShardId": each.id,
            "ParentShards": [f"shardId-{p:012d}" for p in each.parents],
            "HashKeyRange": each.range,
        }
        for each in stream.shards.values()
        if number in each.parents
    ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that was killed says nothing before.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _handler(kinesis: LocalKinesis) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = 200, {}
            try:
                target = self.headers.get("X-Amz-Target", "")
                if target.endswith(".SubscribeToShard"):
                    self._send(kinesis.subscribe(json.loads(body)))
                    return
                answer = kinesis.answer(target, json.loads(body))
            except ServiceError as error:
                if error.code == CUT:
                    self.close_connection = True
                    return
                status, answer = error.status, {"__type": error.code, "message": str(error)}
            except (KeyError, ValueError, TypeError) as error:
                status, answer = 400, {"__type": "SerializationException", "message": repr(error)}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _send(self, events: Iterator[bytes]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.amazon.eventstream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            # Whoever does not listen any more closes the connection.
            with suppress(OSError):
                for event in events:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
                self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _now_ms() -> int:
    return int(time.time() * 1000)


def partition_keys(shards: int, number: int, count: int) -> Sequence[str]:
    """Partition keys that fall into one of so many equal shards."""
    found: list[str] = []
    index = 0
    while len(found) < count:
        key = f"key-{index}"
        hashed = int.from_bytes(hashlib.md5(key.encode()).digest(), "big")
        if math.floor(hashed * shards / _KEYS) == number:
            found.append(key)
        index += 1
    return found
