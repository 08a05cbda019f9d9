"""Fetch: reads shards with GetRecords, a thread for each; as often as Kinesis allows, and no more.

A thread asks for more once what it brought before was taken, so that of each shard one answer is
held at most, of about what a shard gives in a second.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from transforms.errors import KinesisError
from transforms.kinesis.aggregates import MAGIC, foreign, take_apart
from transforms.kinesis.client import CUT, Refused, StreamApi, final_error
from transforms.kinesis.reach import Reach
from transforms.kinesis.shards import (
    FIRST,
    SHARD_END,
    begin_at,
    is_time,
    limit_of,
    pause_secs,
    shard_id,
    starting_position,
)
from transforms.names import SUB_BITS
from transforms.records import PartitionKey, Records
from transforms.source import Fetched
from transforms.tally import FOREIGN_HASH, READ_CALLS, READ_THROTTLES, TALLY

_LOGGER = logging.getLogger(__name__)

_MOST_RECORDS = 10_000
# An iterator lives for five minutes.
_ITERATOR_SECS = 240.0
_THROTTLED_SECS = 0.5, 5.0
_AGAIN_SECS = 1.0, 5.0
_GONE_SECS = 5.0
_SAY_SECS = 30.0
# A shard takes one subscription in a second, and none within five of the one before.
_SUBSCRIBE_SECS, _IN_USE_SECS = 1.0, (1.0, 5.0)
_TAKEN_OVER, _TRIES = 3, 5
# Of these a reader that polls hears, too.
_BOTH = frozenset(
    {
        "KMSAccessDeniedException",
        "KMSDisabledException",
        "KMSInvalidStateException",
        "KMSNotFoundException",
        "KMSOptInRequired",
        "KMSOptInRequiredException",
        "InternalFailureException",
    }
)
# For an answer of ten thousand small records, whose names are larger than what is in them.
_LEAST_LIMIT = 100


class Message(NamedTuple):
    """A record of a shard."""

    number: int
    name: bytes
    data: bytes
    ms: int

    def offset(self) -> int:
        return self.number

    def timestamp(self) -> tuple[int, int]:
        return 1, self.ms


def read_messages(listed: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The records of an answer of GetRecords.

    Raises:
        ValueError: A number is none as AWS gives them.
    """
    messages = [
        Message(
            int(each["SequenceNumber"]) << SUB_BITS,
            each.get("PartitionKey", "").encode(),
            b64decode(each["Data"]),
            round(each.get("ApproximateArrivalTimestamp", 0) * 1000),
        )
        for each in listed
    ]
    if messages and messages[0].number < FIRST << SUB_BITS:
        number = messages[0].number >> SUB_BITS
        raise ValueError(f"sequence number {number} is too small to be one of Kinesis")
    return messages


class Aggregates:
    """Takes aggregates apart.

    Args:
        range: Of a shard: the first and the last hash key that belongs into it; None if that is
            not known.
    """

    def __init__(self, range: Callable[[PartitionKey], tuple[int, int] | None]) -> None:
        self._range = range

    def take_apart(self, key: PartitionKey, messages: list[Message]) -> list[Message]:
        """The records of a shard, those of aggregates each for itself."""
        if not any(each.data.startswith(MAGIC) for each in messages):
            return messages
        found: list[Message] = []
        for each in messages:
            parts = take_apart(each.data)
            if parts is None:
                found.append(each)
                continue
            number, ms = each.number, each.ms
            found += [
                Message(number + sub, name, data, ms) for sub, (name, data, _) in enumerate(parts)
            ]
            if (belongs := self._range(key)) and (count := foreign(parts, *belongs)):
                TALLY.count(FOREIGN_HASH, count, key[0])
        return found


class Consumer(Protocol):
    """With what shards are subscribed to."""

    def arn(self) -> str:
        """Its ARN.

        Raises:
            Refused: That is not known.
        """


@dataclass(eq=False)
class _Shard:
    """A shard that is read."""

    key: PartitionKey
    api: StreamApi
    position: int
    reach: Reach
    paused: bool = False
    closed: bool = False
    items: list[Fetched] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    woken: threading.Event = field(default_factory=threading.Event)
    iterator: str = ""
    iterator_at: float = 0.0
    limit: int = limit_of(0, 0)
    failures: int = 0
    said_at: float = float("-inf")
    told: int | None = None
    polled: bool = False
    after: str = ""
    subscribed_at: float = float("-inf")
    taken_over: int = 0

    @property
    def name(self) -> str:
        return f"{self.key[0]}-{self.key[1]}"


class KinesisFetcher:
    """The `Fetcher` of Kinesis.

    Args:
        api: Makes the calls for a stream, by its name.
        reach: Where to note, by shard, what is seen.
        poll_secs: How often to look for more in a shard that has nothing more.
        aggregates: Takes aggregates apart; None if they are handed on as they are.
        consumer: By a stream's name, the consumer that its shards are subscribed to with; None
            where they are polled.
    """

    most = _MOST_RECORDS

    def __init__(
        self,
        api: Callable[[str], StreamApi],
        reach: dict[PartitionKey, Reach],
        poll_secs: float,
        aggregates: Aggregates | None = None,
        consumer: Callable[[str], Consumer | None] = lambda name: None,
    ) -> None:
        self._api = api
        self._reach = reach
        self._poll_secs = poll_secs
        self._aggregates = aggregates
        self._consumer = consumer
        self._told_polled: set[tuple[str, str]] = set()
        self._shards: dict[PartitionKey, _Shard] = {}
        self._changed = threading.Condition()
        self._problem: KinesisError | None = None

    def assign(self, positions: Mapping[PartitionKey, int]) -> None:
        for key, position in positions.items():
            self._begin(key, position)

    def assign_again(self, key: PartitionKey, position: int) -> None:
        self._end(key)
        self._begin(key, position)

    def _begin(self, key: PartitionKey, position: int) -> None:
        reach = self._reach[key] = Reach()
        shard = _Shard(key, self._api(key[0]), position, reach)
        if position == SHARD_END:
            reach.note((), SHARD_END, 0, _now_ms())
            shard.items.append(Fetched(key, end=SHARD_END, ended=True))
        with self._changed:
            self._shards[key] = shard
            self._changed.notify_all()
        if position < SHARD_END:
            shard.go.set()
            name = f"shard {key[0]}-{key[1]}"
            threading.Thread(target=self._work, args=[shard], name=name, daemon=True).start()

    def _end(self, key: PartitionKey) -> None:
        with self._changed:
            shard = self._shards.pop(key)
            shard.closed = True
        shard.woken.set()
        shard.go.set()

    def unassign(self, keys: Collection[PartitionKey]) -> None:
        for key in keys:
            self._end(key)
            self._reach.pop(key, None)

    def pause(self, keys: Collection[PartitionKey]) -> None:
        # What was brought stays: to read it again would cost the shard's other readers theirs.
        with self._changed:
            for key in keys:
                self._shards[key].paused = True
                self._shards[key].go.clear()

    def resume(self, keys: Collection[PartitionKey]) -> None:
        with self._changed:
            for key in keys:
                shard = self._shards[key]
                shard.paused = False
                if not shard.items:
                    shard.go.set()
            self._changed.notify_all()

    def fetch(self, timeout_secs: float) -> tuple[int, Iterable[Fetched]]:
        fetched: list[Fetched] = []
        count = 0
        with self._changed:
            self._changed.wait_for(lambda: self._problem or self._ready(), timeout_secs)
            if self._problem:
                raise self._problem
            for shard in self._ready():
                fetched += shard.items
                count += sum(len(each.messages) or 1 for each in shard.items)
                shard.items = []
                shard.go.set()
                if count >= self.most:
                    break
        return count, fetched

    def _ready(self) -> list[_Shard]:
        return [shard for shard in self._shards.values() if shard.items and not shard.paused]

    def behind(self, key: PartitionKey, position: int) -> int | None:
        """Milliseconds to the shard's newest record; None before the first answer."""
        reach = self._reach.get(key)
        return reach.behind_ms(position) if reach else None

    def target(self, key: PartitionKey) -> int | None:
        """The position at which a shard had nothing more for the first time; None before."""
        reach = self._reach.get(key)
        return reach.target if reach else None

    def close(self) -> None:
        for key in list(self._shards):
            self._end(key)

    def keys(self, messages: Sequence[Message]) -> Iterable[bytes | None]:
        return map(attrgetter("name"), messages)

    def offsets(self, messages: Sequence[Message]) -> Iterable[int]:
        return map(attrgetter("number"), messages)

    def records(self, messages: list[Message]) -> Records:
        return to_records(messages)

    def bytes(self, messages: list[Message]) -> int:
        return sum(len(each.data) + len(each.name) for each in messages)

    # -- a shard's thread --------------------------------------------------------------------

    def _work(self, shard: _Shard) -> None:
        secs = 0.0
        while True:
            shard.woken.wait(secs)
            shard.go.wait()
            if shard.closed:
                return
            try:
                consumer = None if shard.polled else self._consumer(shard.key[0])
                try:
                    secs = self._listen(shard, consumer) if consumer else self._read(shard)
                except Refused as refused:
                    if not consumer or (late := self._listen_again(shard, refused)) is None:
                        late = self._see_to(shard, refused)
                    secs = late
            except KinesisError as error:
                self._give_up(error)
                return
            except Exception as error:
                _LOGGER.debug("%s cannot be read", shard.name, exc_info=True)
                self._give_up(KinesisError(f"--stream: {shard.name} cannot be read: {error!r}"))
                return
            if secs < 0:
                return

    def _give_up(self, error: KinesisError) -> None:
        with self._changed:
            self._problem = self._problem or error
            self._changed.notify_all()

    def _read(self, shard: _Shard) -> float:
        """Read once; how long to wait then, below 0 where it is over."""
        now = time.monotonic()
        if not shard.iterator or now - shard.iterator_at > _ITERATOR_SECS:
            arguments = {"ShardId": shard_id(shard.key[1])}
            arguments |= begin_at(shard.position, self._aggregates is not None)
            answer = shard.api.call("GetShardIterator", arguments)
            shard.iterator = answer["ShardIterator"]
            shard.iterator_at = now
        asked_ms = _now_ms()
        TALLY.count(READ_CALLS, 1, shard.key[0])
        answer = shard.api.call(
            "GetRecords", {"ShardIterator": shard.iterator, "Limit": shard.limit}
        )
        shard.failures = 0
        messages = read_messages(answer.get("Records", ()))
        behind_ms = answer.get("MillisBehindLatest") or 0
        after = answer.get("NextShardIterator")
        size = self.bytes(messages)
        if messages:
            shard.limit = limit_of(len(messages), size)
        shard.iterator, shard.iterator_at = after or "", time.monotonic()
        self._hand_on(shard, messages, behind_ms, not after, asked_ms)
        return pause_secs(size, behind_ms == 0, self._poll_secs) if after else -1

    def _hand_on(
        self, shard: _Shard, messages: list[Message], behind_ms: int, ended: bool, asked_ms: int
    ) -> None:
        """Bring what was read."""
        messages = self._to_come(shard, messages)
        items = []
        if messages:
            shard.position = messages[-1].number + 1
            items.append(Fetched(shard.key, messages))
        position = shard.position
        if ended:
            position = SHARD_END
            items.append(Fetched(shard.key, end=SHARD_END, ended=True))
        elif behind_ms == 0 and (messages or shard.told != position):
            items.append(Fetched(shard.key, end=position))
        shard.reach.note(messages, position, behind_ms, asked_ms)
        shard.told = position if behind_ms == 0 else None
        self._bring(shard, items)

    def _listen(self, shard: _Shard, consumer: Consumer) -> float:
        """Read what a shard sends by itself, until that ends; how long to wait then, below 0 where
        it is over."""
        since = time.monotonic() - shard.subscribed_at
        if since < _SUBSCRIBE_SECS:
            return _SUBSCRIBE_SECS - since
        start = starting_position(begin_at(shard.position, self._aggregates is not None))
        if shard.after:
            start = {"Type": "AFTER_SEQUENCE_NUMBER", "SequenceNumber": shard.after}
        TALLY.count(READ_CALLS, 1, shard.key[0])
        arguments = {
            "ConsumerARN": consumer.arn(),
            "ShardId": shard_id(shard.key[1]),
            "StartingPosition": start,
        }
        shard.subscribed_at = time.monotonic()
        with shard.api.subscribe(arguments) as heard:
            for event, asked_ms in heard:
                shard.failures = 0
                after = event.get("ContinuationSequenceNumber")
                # Else the end of a subscription would look like it.
                ended = bool(event.get("ChildShards")) or not after
                messages = read_messages(event.get("Records") or ())
                behind_ms = event.get("MillisBehindLatest") or 0
                self._hand_on(shard, messages, behind_ms, ended, asked_ms)
                shard.after = after or ""
                # What was brought is taken before more is read: so the connection holds the rest.
                shard.go.wait()
                if ended or shard.closed:
                    return -1
        shard.taken_over = 0
        return 0.0

    def _listen_again(self, shard: _Shard, refused: Refused) -> float | None:
        """What to do where a shard sends nothing any more; None where that is nothing else than
        where it is polled."""
        if shard.closed:
            return -1
        status = refused.fault.status_code
        if refused.code == "ResourceInUseException":
            if status == 200:
                # Out of one that was there.
                shard.taken_over += 1
            if shard.taken_over >= _TAKEN_OVER:
                self._poll(shard, f"another reader uses the same consumer: {refused}")
                return 0.0
            # Whoever had it before, or it is not ready yet: to ask costs nobody anything.
            self._say(shard, "is subscribed to again: %s", refused)
            return random.uniform(*_IN_USE_SECS)
        if refused.is_throttle or refused.code in _BOTH:
            return None
        lost = not status or status >= 500
        if lost and (shard.after or shard.failures + 1 < _TRIES):
            return None
        self._poll(shard, str(refused))
        return 0.0

    def _poll(self, shard: _Shard, why: str) -> None:
        """Poll a shard from here on, though it should send by itself."""
        shard.polled, shard.failures = True, 0
        if (shard.key[0], why) not in self._told_polled:
            self._told_polled.add((shard.key[0], why))
            _LOGGER.warning("%s is polled, and not subscribed to: %s", shard.name, why)

    def _to_come(self, shard: _Shard, messages: list[Message]) -> list[Message]:
        """What is to be handed on of what was read."""
        if self._aggregates and messages:
            messages = self._aggregates.take_apart(shard.key, messages)
            if messages[0].number < shard.position:
                # The beginning of an aggregate, which is done.
                messages = [each for each in messages if each.number >= shard.position]
        return messages

    def _bring(self, shard: _Shard, items: list[Fetched]) -> None:
        if not items:
            return
        with self._changed:
            if shard.closed:
                return
            shard.items += items
            shard.go.clear()
            self._changed.notify_all()

    def _see_to(self, shard: _Shard, refused: Refused) -> float:
        """What to do after a call that was refused; how long to wait then, below 0 for good.

        Raises:
            KinesisError: Nothing can be read any more.
        """
        if shard.closed:
            return -1
        if refused.is_throttle:
            # The iterator is as good as before.
            TALLY.count(READ_THROTTLES, 1, shard.key[0])
            shard.failures += 1
            least, most = _THROTTLED_SECS
            return random.uniform(least, min(most, 2 * least * 2**shard.failures))
        if refused.code == "ExpiredIteratorException":
            shard.iterator = ""
            return 0.0
        if refused.code == CUT and shard.limit > _LEAST_LIMIT:
            shard.limit = max(_LEAST_LIMIT, shard.limit // 2)
            return 0.0
        if refused.is_final:
            raise final_error(shard.api.stream, refused)
        if refused.code == "InvalidArgumentException":
            return self._lose_position(shard, refused)
        if refused.code == "ResourceNotFoundException":
            return self._look_for(shard, refused)
        self._say(shard, "is read again: %s", refused)
        shard.failures += 1
        least, most = _AGAIN_SECS
        return random.uniform(least / 2, min(most, least * 2 ** min(shard.failures, 5)))

    def _lose_position(self, shard: _Shard, refused: Refused) -> float:
        if shard.iterator:
            # What was refused is the iterator; a number is refused where one is asked for.
            shard.iterator = ""
            return _AGAIN_SECS[0]
        if is_time(shard.position) and shard.position > _now_ms() - 60_000:
            # This machine's clock is ahead of theirs.
            return _AGAIN_SECS[0]
        if shard.position < FIRST:
            raise final_error(shard.api.stream, refused)
        problem = KinesisError(f"shard {shard.name} does not know its position: {refused}")
        self._bring(shard, [Fetched(shard.key, problem=problem, overtaken=True)])
        return -1

    def _look_for(self, shard: _Shard, refused: Refused) -> float:
        """Go on without a shard that is not there, if its stream is."""
        try:
            listed = {each["ShardId"] for each in shard.api.list_shards()}
        except Refused as again:
            if again.code != "ResourceNotFoundException":
                self._say(shard, "is looked for again: %s", again)
                return _AGAIN_SECS[0]
            self._say(shard, "is gone, and its stream with it: %s", refused)
            problem = KinesisError(f"stream {shard.key[0]} is gone")
            self._bring(shard, [Fetched(shard.key, problem=problem)])
            return _GONE_SECS
        if shard_id(shard.key[1]) in listed:
            return self._lose_position(shard, refused)
        _LOGGER.warning(
            "%s: the shard is past the stream's retention; what was not read of it is lost",
            shard.name,
        )
        shard.reach.note((), SHARD_END, 0, _now_ms())
        self._bring(shard, [Fetched(shard.key, end=SHARD_END, ended=True)])
        return -1

    def _say(self, shard: _Shard, what: str, refused: Refused) -> None:
        now = time.monotonic()
        if now - shard.said_at > _SAY_SECS:
            shard.said_at = now
            _LOGGER.warning(f"%s {what}", shard.name, refused)


def to_records(messages: Sequence[Message]) -> Records:
    """Records as columns."""
    return Records(
        [each.number for each in messages],
        [each.ms for each in messages],
        [each.name for each in messages],
        [each.data for each in messages],
        [None] * len(messages),
    )


def fetch_again(
    api: StreamApi,
    key: PartitionKey,
    offsets: Sequence[int],
    aggregates: Aggregates | None = None,
    within_secs: float = 30.0,
) -> Records | None:
    """Records as the shard has them, read again; None if they are not all there any more."""
    wanted, found = set(offsets), []
    deadline = time.monotonic() + within_secs
    arguments = {"ShardId": shard_id(key[1])} | begin_at(offsets[0], parts=True)
    iterator: str | None = None
    while time.monotonic() < deadline:
        try:
            if iterator is None:
                iterator = api.call("GetShardIterator", arguments)["ShardIterator"]
            limit = min(_MOST_RECORDS, len(wanted) + 100)
            answer = api.call("GetRecords", {"ShardIterator": iterator, "Limit": limit})
        except Refused as refused:
            if not refused.is_throttle and refused.fault.status_code:
                _LOGGER.warning("%s-%d: %s", *key, refused)
                break
            time.sleep(0.5)
            continue
        messages = read_messages(answer.get("Records", ()))
        if aggregates:
            messages = aggregates.take_apart(key, messages)
        found += [each for each in messages if each.number in wanted]
        iterator = answer.get("NextShardIterator")
        past = messages and messages[-1].number >= offsets[-1]
        if past or not iterator or (not messages and not answer.get("MillisBehindLatest")):
            break
        time.sleep(0.2)
    return to_records(found) if len(found) == len(wanted) else None


def _now_ms() -> int:
    return int(time.time() * 1000)
