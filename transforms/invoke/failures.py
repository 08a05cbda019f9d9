"""Failures: what is said of invocations that fail, and when. Pure; no clock, no logging.

A function that is away fails thousands of times, in each partition alike. So one line is said for
each partition and error type, and then one each `WINDOW_SECS` at most, with how many were held back
since. What is said never holds a payload or a reply: places, the kind and type of the error, its
message as error records have it, cut short and on one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transforms.invoke.outcome import Outcome
from transforms.names import spoken
from transforms.records import Failure, Finished, PartitionKey

WINDOW_SECS = 30.0
PROCESSING = {"event_type": "ESM_PROCESSING_EVENT"}
"""What an event source mapping calls the event of a failure in its log."""
MESSAGE_CHARACTERS = 500
"""As much of an error's message is shown."""
_TYPE_CHARACTERS = 128
# So many partitions and error types have lines of their own; the others share one.
_MOST_KEYS = 100

_LOGIN = re.compile(r"://[^/@\s\"]*@")


def shown(text: str, characters: int = MESSAGE_CHARACTERS) -> str:
    """Somebody else's text as it is shown: on one line, cut, and without the login of a URL."""
    cut = _LOGIN.sub("://***@", text[: 20 * characters])
    cut = f"{cut[:characters]}..." if len(cut) > characters else cut
    if cut.isprintable():
        return cut
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut
    )


@dataclass(frozen=True, slots=True)
class Failed:
    """One failure, as it may be shown.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        first: Offset of the first record that was sent.
        last: Offset of the last one.
        kind: Class of the outcome, in words.
        error_type: The cause.
        message: What is said about it; cut.
        attempt: Which call of these records it was; 0 if they were not sent.
        at: Seconds since the epoch.
        request_id: AWS request id, if there was an answer.
    """

    topic: str
    partition: int
    first: int
    last: int
    kind: str
    error_type: str
    message: str
    attempt: int
    at: float
    request_id: str | None = None

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)

    @property
    def facts(self) -> dict[str, Any]:
        """The same for a log that machines read."""
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offsets": [self.first, self.last],
            "kind": self.kind,
            "error_type": self.error_type,
            "error_message": self.message,
            "attempt": self.attempt,
            "request_id": self.request_id,
        }


def failed(
    key: PartitionKey, offsets: Sequence[int], outcome: Outcome, attempt: int, at: float
) -> Failed:
    """The failure of one invocation."""
    return Failed(
        *key,
        offsets[0],
        offsets[-1],
        outcome.kind.value,
        shown(outcome.error_type, _TYPE_CHARACTERS),
        shown(outcome.message),
        attempt,
        at,
        outcome.request_id and shown(outcome.request_id, _TYPE_CHARACTERS),
    )


def given_up(key: PartitionKey, failure: Failure, at: float) -> Failed:
    """The failure of records that are given up."""
    offsets = failure.records.offsets
    return Failed(
        *key,
        offsets[0],
        offsets[-1],
        failure.condition,
        shown(failure.error_type, _TYPE_CHARACTERS),
        shown(failure.message),
        failure.attempts,
        at,
        failure.request_id and shown(failure.request_id, _TYPE_CHARACTERS),
    )


def failure_line(failure: Failed, then: str, held_back: int) -> str:
    """What the log says of a failure.

    Args:
        failure: The failure.
        then: What comes next.
        held_back: How many like it were not said since the last line.
    """
    offsets = f"offset {spoken(failure.first)}"
    if failure.last > failure.first:
        offsets = f"offsets {spoken(failure.first)} to {spoken(failure.last)}"
    parts = [
        f"failed: {failure.topic}-{failure.partition} {offsets}: {failure.kind}, "
        f"{_cause(failure.error_type, failure.message)}"
    ]
    if failure.attempt:
        parts.append(f"attempt {failure.attempt}")
    parts.append(then)
    if failure.request_id:
        parts.append(f"request id {failure.request_id}")
    if held_back:
        parts.append(f"{held_back} more failed since the last such line")
    return "; ".join(parts)


def _cause(error_type: str, message: str) -> str:
    return f"{error_type}: {message}" if message else error_type


# -- halts --------------------------------------------------------------------------------


def halt_facts(finished: Finished) -> dict[str, Any]:
    """Where and why a partition was halted, for machines."""
    failure = finished.halted
    assert failure
    return {
        "topic": finished.topic,
        "partition": finished.partition,
        "offset": failure.records.offsets[0],
        "condition": failure.condition,
        "error_type": shown(failure.error_type, _TYPE_CHARACTERS),
        "message": shown(failure.message),
    }


def halt_line(finished: Finished) -> str:
    """The same for people: the one wording of a halt."""
    facts = halt_facts(finished)
    return (
        f"halted: {facts['topic']}-{facts['partition']} at offset {spoken(facts['offset'])}: "
        f"{facts['condition']}, {_cause(facts['error_type'], facts['message'])}"
    )


def halt_log_line(finished: Finished, held_back: int = 0) -> str:
    """What the log says when a partition is halted, while the others go on."""
    failure = finished.halted
    assert failure
    parts = [halt_line(finished)]
    if failure.attempts:
        parts.append(f"attempt {failure.attempts}")
    if failure.request_id:
        parts.append(f"request id {shown(failure.request_id, _TYPE_CHARACTERS)}")
    if held_back:
        parts.append(f"failures not logged before: {held_back}")
    parts.append("nothing from there on is committed, the other partitions go on")
    return "; ".join(parts)


# -- what to say, and when ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovery:
    """A partition is answered again.

    Attributes:
        secs: How long it has failed.
        failures: Failed invocations in that time.
        held_back: Failures of it that were not said.
    """

    secs: float
    failures: int
    held_back: int


def recovery_line(key: PartitionKey, recovery: Recovery) -> str:
    """What the log says when a partition is answered again."""
    held_back = recovery.held_back
    more = f"; failures not logged before: {held_back}" if held_back else ""
    after = ""
    if failures := recovery.failures:
        many = "s" if failures > 1 else ""
        after = f" after {recovery.secs:.1f} s and {failures} failed invocation{many}"
    return f"recovered: {key[0]}-{key[1]} is answered again{after}{more}"


@dataclass(slots=True)
class _Said:
    """What was said of a partition and an error type."""

    at: float
    held_back: int = 0


@dataclass(slots=True)
class _Failing:
    """A partition that fails."""

    since: float
    failures: int = 0
    lanes: set[int] = field(default_factory=set)
    said: bool = False


_OTHERS: PartitionKey = ("", -1)


class FailureLog:
    """Which failures are said. Never more than one line for each partition and error type within
    the window; what is held back is counted until it is said.

    Args:
        window_secs: Time between two lines of a partition and error type.
        most_keys: How many of these have lines of their own; the others share one.
    """

    def __init__(self, window_secs: float = WINDOW_SECS, most_keys: int = _MOST_KEYS) -> None:
        self._window_secs = window_secs
        self._most_keys = most_keys
        self._said: dict[PartitionKey, dict[str, _Said]] = {}
        self._failing: dict[PartitionKey, _Failing] = {}

    @property
    def is_quiet(self) -> bool:
        """Whether a success changes nothing."""
        return not self._said and not self._failing

    @property
    def keys(self) -> int:
        """Of how many partitions and error types something is kept."""
        return sum(map(len, self._said.values()))

    @property
    def held_back(self) -> int:
        """Failures that are still to be said."""
        return sum(said.held_back for types in self._said.values() for said in types.values())

    def failed(self, key: PartitionKey, lane: int, error_type: str, now: float) -> int | None:
        """An invocation has failed.

        Returns:
            How many were held back since the last line, if a line is due now; else None.
        """
        failing = self._failing.get(key)
        if failing is None and len(self._failing) < self._most_keys:
            failing = self._failing[key] = _Failing(now)
        if failing:
            failing.failures += 1
            failing.lanes.add(lane)
        held_back = self.given_up(key, error_type, now)
        if failing and held_back is not None:
            failing.said = True
        return held_back

    def given_up(self, key: PartitionKey, error_type: str, now: float) -> int | None:
        """Records were given up without an invocation; else as `failed`."""
        place, name = self._place(key, error_type, now)
        types = self._said.setdefault(place, {})
        said = types.get(name)
        if said and now - said.at < self._window_secs:
            said.held_back += 1
            return None
        types[name] = _Said(now)
        return said.held_back if said else 0

    def succeeded(self, key: PartitionKey, lane: int, now: float) -> Recovery | None:
        """An invocation was answered; what there is to say about it.

        A partition that fails now and then recovers as often: that is said only if its failure was.
        """
        failing = self._failing.get(key)
        if failing and not self._left(key, failing, lane):
            return None
        types = self._said.get(key, {})
        old = [said for said in types.values() if now - said.at >= self._window_secs]
        recovery = None
        if (failing and failing.said) or any(said.held_back for said in old):
            held_back = self._take_held_back(key)
            since, failures = (failing.since, failing.failures) if failing else (now, 0)
            recovery = Recovery(now - since, failures, held_back)
        self._drop(key, now)
        return recovery

    def left(self, key: PartitionKey, lane: int) -> None:
        """A lane is not invoked here any more."""
        if failing := self._failing.get(key):
            self._left(key, failing, lane)

    def halted(self, key: PartitionKey) -> int:
        """A partition is halted. How many of its failures were held back, to be said with it."""
        self._failing.pop(key, None)
        return self._take_held_back(key)

    def _left(self, key: PartitionKey, failing: _Failing, lane: int) -> bool:
        """Whether no lane of the partition fails any more."""
        failing.lanes.discard(lane)
        if not failing.lanes:
            del self._failing[key]
        return not failing.lanes

    def _take_held_back(self, key: PartitionKey) -> int:
        held_back = 0
        for said in self._said.get(key, {}).values():
            held_back += said.held_back
            said.held_back = 0
        return held_back

    def _place(self, key: PartitionKey, error_type: str, now: float) -> tuple[PartitionKey, str]:
        """What a failure is counted under."""
        if error_type in self._said.get(key, {}):
            return key, error_type
        if self.keys >= self._most_keys:
            for old in list(self._said):
                self._drop(old, now, also_held_back=True)
        return (key, error_type) if self.keys < self._most_keys else (_OTHERS, "")

    def _drop(self, key: PartitionKey, now: float, also_held_back: bool = False) -> None:
        """Forget what a line may be said of again; what was held back is not lost."""
        types = self._said.get(key, {})
        for error_type, said in list(types.items()):
            if key == _OTHERS or now - said.at < self._window_secs:
                continue
            if said.held_back:
                if not also_held_back:
                    continue
                others = self._said.setdefault(_OTHERS, {}).setdefault("", _Said(said.at))
                others.held_back += said.held_back
            del types[error_type]
        if not types:
            self._said.pop(key, None)


# -- errors by type -----------------------------------------------------------------------

MOST_TYPES = 20
"""So many error types are told apart; a function may have any number of them."""
OTHER = "_OTHER"


@dataclass(frozen=True, slots=True)
class Seen:
    """Errors of one type.

    Attributes:
        error_type: The type; `OTHER` for all that are not told apart.
        count: How many there were.
        first_at: When the first one was, in seconds since the epoch.
        last: The last one.
    """

    error_type: str
    count: int
    first_at: float
    last: Failed

    @staticmethod
    def add(found: dict[str, Seen], failure: Failed) -> None:
        """Take in one more failure."""
        Seen.join(found, [Seen(failure.error_type, 1, failure.at, failure)])

    @staticmethod
    def join(found: dict[str, Seen], more: Iterable[Seen]) -> None:
        """Take in what others have seen."""
        for each in more:
            error_type = each.error_type
            if error_type not in found and len(found.keys() - {OTHER}) >= MOST_TYPES:
                error_type = OTHER
            before = found.get(error_type, each)
            found[error_type] = Seen(
                error_type,
                each.count + (before.count if error_type in found else 0),
                min(before.first_at, each.first_at),
                max(before.last, each.last, key=lambda failed: failed.at),
            )


# -- how things stand ---------------------------------------------------------------------

BACKOFF, THROTTLE, BREAKER, REPEATING = "backoff", "throttle", "breaker", "reply"


@dataclass(frozen=True, slots=True)
class Stuck:
    """A partition that fails, and what it waits for.

    Attributes:
        topic: Topic name.
        partition: Partition number.
        waits_for: `BACKOFF` or `THROTTLE` (of so long a time), `BREAKER` (that lets it through), or
            `REPEATING` (its turn, or the reply to a repeated invocation).
        until: When it is invoked again, in seconds since the epoch; None if that is not known.
        error_type: Of its last failure.
        attempt: Which call of the same records that was.
        at: When it was.
    """

    topic: str
    partition: int
    waits_for: str
    until: float | None
    error_type: str
    attempt: int = 0
    at: float = 0.0

    @property
    def key(self) -> PartitionKey:
        return (self.topic, self.partition)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What does not go well, as things are.

    Attributes:
        last_error: The last failure.
        stuck: Partitions that fail, and what they wait for; those that are halted left out.
        oldest_age_secs: Age of the oldest record that is not finished, by its timestamp; None if
            there is none, or nobody knows.
        oldest_ms: By partition, the timestamp of its oldest record that is not finished; those
            left out where there is none, or nobody knows.
        halted_at: When partitions were halted, in seconds since the epoch.
        errors: All failures so far, by type.
    """

    last_error: Failed | None = None
    stuck: Sequence[Stuck] = ()
    oldest_age_secs: float | None = None
    oldest_ms: Mapping[PartitionKey, int] = field(default_factory=dict)
    halted_at: Mapping[PartitionKey, float] = field(default_factory=dict)
    errors: Sequence[Seen] = ()

    @staticmethod
    def join(troubles: Sequence[Trouble]) -> Trouble:
        """Those of several processes together."""
        errors = [each.last_error for each in troubles if each.last_error]
        ages = [each.oldest_age_secs for each in troubles if each.oldest_age_secs is not None]
        oldest_ms: dict[PartitionKey, int] = {}
        halted_at: dict[PartitionKey, float] = {}
        seen: dict[str, Seen] = {}
        for each in troubles:
            oldest_ms |= each.oldest_ms
            halted_at |= each.halted_at
            Seen.join(seen, each.errors)
        return Trouble(
            max(errors, key=lambda error: error.at, default=None),
            [stuck for each in troubles for stuck in each.stuck],
            max(ages, default=None),
            oldest_ms,
            halted_at,
            tuple(seen.values()),
        )
