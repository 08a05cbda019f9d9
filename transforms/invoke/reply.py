"""Reply: the body a function returned -> what it says about the records, or what is wrong. Pure.

``confluent``: a JSON array as long as the batch, each entry with the topic, partition and offset
of the record it answers, in the same order. ``batch_item_failures``: an object that names the
records the function failed in. ``any``: the body stands for all records. ``none``: it is not
looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from transforms.json_text import is_utf8, loads

CONFLUENT, BATCH_ITEM_FAILURES, ANY, NONE = REPLIES = (
    "confluent",
    "batch_item_failures",
    "any",
    "none",
)

MOST_STATE_BYTES = 5 * 2**20

_WHITE_SPACE = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
# Only to find where things end: what a number is does not matter.
_DECODER = json.JSONDecoder(parse_float=len, parse_int=len)


class _Coordinates(msgspec.Struct, gc=False):
    topic: str
    partition: int
    offset: int | str


class _Answer(msgspec.Struct, gc=False):
    payload: _Coordinates


class _RawAnswer(msgspec.Struct, gc=False):
    payload: msgspec.Raw


_answers = msgspec.json.Decoder(list[_Answer]).decode
_raw_answers = msgspec.json.Decoder(list[_RawAnswer]).decode


class InvalidReplyError(ValueError):
    """The function ran, but its reply does not answer the batch."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reply says about the records that were sent.

    Attributes:
        results: Per record its result as JSON text; None if the reply has none.
        body: The reply as it came, where it is kept as a whole.
        failed: Of the records that were sent, by index and rising, those that failed.
        state: What the function wants to be handed with the next call of the same window, as JSON
            text; None without windows.
    """

    results: Sequence[bytes] | None = None
    body: bytes | None = None
    failed: Sequence[int] = ()
    state: bytes | None = None


def read_reply(
    mode: str,
    body: bytes,
    topic: str,
    partition: int,
    offsets: Sequence[int | str],
    alone: bool = False,
) -> Answer:
    """What a reply says, read as one of `REPLIES`; `alone` is for `parse_stream_failures`, the
    other arguments are `parse_reply`'s.

    Raises:
        InvalidReplyError: It says nothing that fits the records.
    """
    if mode == CONFLUENT:
        return Answer(results=parse_reply(body, topic, partition, offsets))
    if mode == BATCH_ITEM_FAILURES and alone:
        return Answer(failed=parse_stream_failures(body, offsets))
    if mode == BATCH_ITEM_FAILURES:
        return Answer(failed=parse_failures(body, topic, partition, offsets))
    return Answer(body=body if mode == ANY else None)


def parse_state(body: bytes) -> bytes:
    """The state in a reply to a call of a window: JSON text, each digit as the function wrote it.

    Raises:
        InvalidReplyError: There is none, or one that could not be handed over again.
    """
    reply = _loads(body)
    state = reply.get("state") if type(reply) is dict else None
    if type(state) is not dict:
        raise InvalidReplyError(
            'the reply has no object as "state"; with --tumbling_window_secs it has to have one'
        )
    try:
        text = _members(body.decode())["state"]
    except RecursionError:
        raise InvalidReplyError("the reply is nested too deep") from None
    raw = text.encode()
    if len(raw) > MOST_STATE_BYTES:
        raise InvalidReplyError(
            f"the reply's state has {len(raw)} bytes; above {MOST_STATE_BYTES} it would fit into "
            f"no further invocation"
        )
    return raw


def parse_failures(
    body: bytes, topic: str, partition: int, offsets: Sequence[int | str]
) -> list[int]:
    """Which records of a batch the function says it failed in, as Lambda reads it for Kafka.

    Returns:
        Their indexes, rising; empty if all went well: for an empty list, for a reply without
        one, and for null.

    Raises:
        InvalidReplyError: It is not JSON, or no object, or names a record that was not sent.
    """
    reply = _loads(body)
    failures = _failures(reply)
    if not failures:
        return []
    places = {offset: index for index, offset in enumerate(offsets)}
    # True is no 1.
    kind = type(offsets[0]) if offsets else int
    here = f"{topic}-{partition}"
    failed = set()
    for number, failure in enumerate(failures):
        try:
            identifier = failure["itemIdentifier"]
            offset = identifier["offset"]
            known = identifier["partition"] == here and type(offset) is kind and offset in places
        except (TypeError, KeyError, IndexError):
            raise InvalidReplyError(
                f"entry {number} of batchItemFailures lacks itemIdentifier.partition or "
                f"itemIdentifier.offset"
            ) from None
        if not known:
            raise InvalidReplyError(
                f"entry {number} of batchItemFailures names a record that was not sent; sent "
                f"were {here}@{offsets[0]}-{offsets[-1]}"
            )
        failed.add(places[offset])
    return sorted(failed)


def parse_stream_failures(body: bytes, numbers: Sequence[int | str]) -> list[int]:
    """Which records of a batch the function says it failed in, as Lambda reads it for Kinesis: a
    record is named by its number alone, as a text.

    Returns:
        Their indexes, rising; empty if all went well: for an empty list, for a reply without one,
        and for a reply that is empty, null, or an empty text or array.

    Raises:
        InvalidReplyError: It is not JSON, or names a record that was not sent.
    """
    if not body.strip(_WHITE_SPACE):
        return []
    reply = _loads(body)
    failures = [] if reply in ("", []) else _failures(reply)
    if not failures:
        return []
    # Records of an aggregate have their number in common: it means the first of them.
    places: dict[int | str, int] = {}
    for index, number in enumerate(numbers):
        places[number] = index
        places.setdefault(str(number).partition(":")[0], index)
    failed = set()
    for number, failure in enumerate(failures):
        identifier = failure.get("itemIdentifier") if type(failure) is dict else None
        if type(identifier) is not str or identifier not in places:
            raise InvalidReplyError(
                f"entry {number} of batchItemFailures names no record that was sent; its "
                f"itemIdentifier has to be a sequenceNumber from {numbers[0]} to {numbers[-1]}"
            )
        failed.add(places[identifier])
    return sorted(failed)


def parse_reply(
    body: bytes, topic: str, partition: int, offsets: Sequence[int | str]
) -> list[bytes]:
    """Check a reply against the batch it answers.

    Args:
        body: The reply as it came.
        topic: The batch's topic.
        partition: The batch's partition.
        offsets: The offsets that were sent, in order; as they were written.

    Returns:
        Per record the entry's ``payload`` as JSON text.

    Raises:
        InvalidReplyError: It is not JSON, not an array, of another length, or an entry answers
            another record. The message names the first entry that does not fit.
    """
    if raw := _answered_in_order(body, topic, partition, offsets):
        return raw
    entries = _loads(body)
    if type(entries) is not list:
        raise InvalidReplyError(f"the reply is {_name(entries)}, not an array of results")
    if len(entries) != len(offsets):
        raise InvalidReplyError(
            f"the reply has {len(entries)} entries, {len(offsets)} records were sent"
        )
    if misfit := _misfit(entries, topic, partition, offsets):
        raise misfit
    return _raw_payloads(body)


def _answered_in_order(
    body: bytes, topic: str, partition: int, offsets: Sequence[int | str]
) -> list[bytes]:
    """The payloads' texts; nothing where it takes a closer look to see what is in the reply."""
    try:
        if any(space in body for space in _WHITE_SPACE):
            body = msgspec.json.format(body, indent=-1)
        answers = [entry.payload for entry in _answers(body)]
        raw = [bytes(entry.payload) for entry in _raw_answers(body)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    fits = (
        is_utf8(body)
        and [answer.offset for answer in answers] == [*offsets]
        and [answer.partition for answer in answers].count(partition) == len(answers)
        and [answer.topic for answer in answers].count(topic) == len(answers)
    )
    return raw if fits else []


def _misfit(
    entries: list[Any], topic: str, partition: int, offsets: Sequence[int | str]
) -> InvalidReplyError | None:
    """What is wrong with the first entry that does not answer the record at its place, if any."""
    for index, (entry, offset) in enumerate(zip(entries, offsets)):
        try:
            payload = entry["payload"]
            fits = (
                payload["offset"] == offset
                and payload["partition"] == partition
                and payload["topic"] == topic
            )
        except (TypeError, KeyError, IndexError):
            return InvalidReplyError(
                f"entry {index} of the reply lacks payload.topic, payload.partition or "
                f"payload.offset"
            )
        if not fits:
            return InvalidReplyError(
                f"entry {index} of the reply answers another record than {topic}-{partition}"
                f"@{offset}, which was sent at its place"
            )
    return None


def _raw_payloads(body: bytes) -> list[bytes]:
    """Cut each entry's payload out of a reply that was checked, digit for digit."""
    try:
        return _cut_out(body.decode())
    except RecursionError:
        raise InvalidReplyError("the reply is nested too deep") from None


def _members(text: str) -> dict[str, str]:
    """The members of an object that was checked, each value as it is written."""
    members: dict[str, str] = {}
    at = _skip(text, 0) + 1
    while text[at := _skip(text, at)] != "}":
        name, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, at = _DECODER.raw_decode(text, start)
        members[name] = text[start:at]
        at = _skip(text, at)
        at += text[at] == ","
    return members


def _cut_out(text: str) -> list[bytes]:
    raw = []
    at = _skip(text, 0) + 1
    while text[at := _skip(text, at)] != "]":
        at = _skip(text, at) + 1
        payload = ""
        while text[at := _skip(text, at)] != "}":
            name, at = _DECODER.raw_decode(text, at)
            start = _skip(text, _skip(text, at) + 1)
            _, at = _DECODER.raw_decode(text, start)
            if name == "payload":
                payload = text[start:at]
            at = _skip(text, at)
            at += text[at] == ","
        raw.append(payload.encode())
        at = _skip(text, at + 1)
        at += text[at] == ","
    return raw


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _loads(body: bytes) -> Any:
    try:
        return loads(body)
    except ValueError as error:
        raise InvalidReplyError(f"the reply is not JSON: {error}") from None


def _failures(reply: Any) -> list[Any]:
    """What a reply has in its array of failures; nothing if it is null, or without one."""
    if reply is None:
        return []
    if type(reply) is not dict:
        raise InvalidReplyError(f"the reply is {_name(reply)}, not an object")
    failures = reply.get("batchItemFailures")
    if failures is None:
        return []
    if type(failures) is not list:
        raise InvalidReplyError(f"batchItemFailures is {_name(failures)}, not an array")
    return failures


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
    }
    return names.get(type(value), "a number")
