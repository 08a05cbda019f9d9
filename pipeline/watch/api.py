"""API: a run's `Status` -> what `/api/status` and the page show, and whether it lives and is ready.

Places, types and numbers only. A function's error message may quote a record, so it is there only
if `--page_show=messages` says so.
"""

from __future__ import annotations

from typing import Any

from pipeline.run.status import BACKING_OFF, HALTED, PartitionView, Status
from pipeline.watch.about import About
from pipeline.watch.progress import summary, when
from transforms.invoke.failures import Seen, Stuck, halt_facts
from transforms.records import Finished, PartitionKey

STILL_SECS = 120.0
"""A loop that has not turned for so long does not live. What it waits for knowingly does not count:
a commit that is repeated, a registry that is away, records that Kafka does not acknowledge."""

MESSAGES = "messages"
_NAMED_HALTS = 100


def live(status: Status) -> tuple[bool, dict[str, Any]]:
    """Whether the loop turns, and what there is to say about it."""
    still = status.still_secs
    facts = {"live": still < STILL_SECS, "loop_still_secs": round(still, 3)}
    return still < STILL_SECS, facts


def ready(status: Status) -> tuple[bool, dict[str, Any]]:
    """Whether the partitions are known and more is begun; halts and an open breaker are no reason
    against it."""
    is_ready = status.begun and not status.draining
    reasons = []
    if not status.begun:
        reasons.append("starting: the partitions are not known yet")
    if status.draining:
        reasons.append("draining: nothing more is begun")
    if status.breaker_open:
        reasons.append("breaker open")
    if status.paused:
        reasons.append("paused")
    if status.halted:
        reasons.append(f"halted: {len(status.halted)} of {len(status.lags)} partitions")
    return is_ready, {"ready": is_ready, "reasons": reasons}


def state_word(status: Status) -> str:
    """How the run stands, in words."""
    if not status.begun:
        return "starting"
    if status.draining:
        return "draining"
    if status.paused:
        return "paused"
    if status.breaker_open:
        return "breaker open"
    if status.halted:
        return f"halted {len(status.halted)} of {len(status.lags)}"
    return "running"


def reason(status: Status) -> str:
    """Why it stands so, in one sentence; as an event source mapping words its last result."""
    trouble = status.trouble
    if not status.begun:
        return "The partitions are being looked for"
    if status.draining:
        return "Told to stop: what runs is finished and committed"
    if status.paused:
        return "Paused by an operator"
    if status.halted:
        facts = halt_facts(status.halted[0])
        return (
            f"PROBLEM: {facts['topic']}-{facts['partition']} is halted at offset "
            f"{facts['offset']}: {facts['condition']}, {facts['error_type']}"
        )
    if trouble.stuck:
        stuck = trouble.stuck[0]
        return (
            f"PROBLEM: Function call failed: {len(trouble.stuck)} of {len(status.lags)} partitions "
            f"fail, with {stuck.error_type}"
        )
    return "OK" if status.totals.records else "No records processed"


def facts_of(status: Status, about: About) -> dict[str, Any]:
    """All there is to see, for JSON."""
    with_messages = about.page_show == MESSAGES
    numbers = summary(status)
    if numbers["last_error"] and not with_messages:
        del numbers["last_error"]["error_message"]
    known = [lag for lag in status.lags.values() if lag is not None]
    limit = numbers.pop("concurrency")
    for gone in ("halted", "waits", "committed", "breaker"):
        del numbers[gone]
    return {
        "group": about.group,
        "function": about.function,
        "runner": about.runner,
        "version": about.version,
        "workers": numbers.pop("workers"),
        "state": state_word(status),
        "reason": reason(status),
        "numbers": {
            **numbers,
            "read": int(status.books.total("polled")) or status.totals["read.records"],
            "lag": max(known, default=0) if status.names.lag_ms else sum(known),
            "in_flight": status.in_flight,
            "in_flight_max": limit["in_flight_max"],
            "limit": status.limit,
            "breaker_open": status.breaker_open,
        },
        "hands": about.has_hands,
        "partition_count": len(status.lags),
        "partitions": partitions_of(status),
        "halted": [_halt(each, status, about) for each in status.halted[:_NAMED_HALTS]],
        "errors": [_seen(each, status, with_messages) for each in status.trouble.errors],
        "configuration": [
            {"option": option, "value": value, "origin": origin}
            for option, value, origin in about.configuration
        ],
    }


def partitions_of(status: Status) -> list[dict[str, Any]]:
    """Each partition, with the four offsets that an event source mapping logs."""
    stuck = {each.key: each for each in status.trouble.stuck}
    halted = {each.key for each in status.halted}
    rows = []
    for key in sorted(status.lags):
        row = _partition(key, status, status.partitions.get(key))
        if key in halted:
            row["state"] = HALTED
        elif key in stuck:
            row |= _waits(stuck[key])
        rows.append(row)
    return rows


def _partition(key: PartitionKey, status: Status, view: PartitionView | None) -> dict[str, Any]:
    lag, committed = status.lags[key], status.committed.get(key)
    position = status.names.position
    oldest_ms = status.trouble.oldest_ms.get(key)
    offsets = {"end": None, "read": None, "processed": None, "committed": committed}
    if view:
        offsets |= {"end": view.end, "read": view.read, "processed": view.processed}
    elif committed is not None and lag is not None and not status.names.lag_ms:
        offsets["end"] = committed + lag
    return {
        "topic": key[0],
        "partition": key[1],
        **{name: None if at is None else position(at) for name, at in offsets.items()},
        "lag": lag,
        "held": view.records if view else None,
        "oldest": None if oldest_ms is None else when(oldest_ms / 1000),
        "state": view.state if view else "reading",
        "waits_for": None,
        "next_try": None,
        "attempt": None,
        "error_type": None,
    }


def _waits(stuck: Stuck) -> dict[str, Any]:
    return {
        "state": BACKING_OFF,
        "waits_for": stuck.waits_for,
        "next_try": None if stuck.until is None else when(stuck.until),
        "attempt": stuck.attempt,
        "error_type": stuck.error_type,
    }


def _halt(finished: Finished, status: Status, about: About) -> dict[str, Any]:
    facts = halt_facts(finished)
    facts["offset"] = status.names.number(facts["offset"])
    if about.page_show != MESSAGES:
        del facts["message"]
    at, failure = status.trouble.halted_at.get(finished.key), finished.halted
    return {
        **facts,
        "since": None if at is None else when(at),
        "attempt": failure.attempts if failure else None,
        "request_id": failure.request_id if failure else None,
        "go_on": _ways_on(facts, about),
    }


def _ways_on(facts: dict[str, Any], about: About) -> list[str]:
    """How to go on with a halted partition, as commands."""
    place = f"{facts['topic']}-{facts['partition']}"
    if not about.has_hands:
        return [
            "Mend the function, end the run and run the same command again; or go on without such "
            "records: --on_error=log --error_topic=TOPIC --bisect_on_error"
        ]
    return [
        f"beam-lambda-sink ctl resume-halted --partition={place}",
        f"beam-lambda-sink ctl skip --partition={place} --offset={facts['offset']}",
    ]


def _seen(seen: Seen, status: Status, with_messages: bool) -> dict[str, Any]:
    last = seen.last
    facts = {
        "error_type": seen.error_type,
        "count": seen.count,
        "first": when(seen.first_at),
        "last": when(last.at),
        "topic": last.topic,
        "partition": last.partition,
        "offsets": status.names.numbers([last.first, last.last]),
        "kind": last.kind,
        "request_id": last.request_id,
    }
    return facts | ({"message": last.message} if with_messages else {})
