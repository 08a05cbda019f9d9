"""Writes records to a topic at a steady rate, each with the moment it was due in its value.

``python -m tests.bench.generator --rate 100 --secs 13 ...`` prints on its first line when the first
record is due, in milliseconds since the epoch, and at its end one line of JSON (`Generated`).

Record number i is due i / rate seconds after the first one, whatever becomes of those before. It
sends in ticks of 10 ms, each time what has become due since the last one: to wait for each record
by itself would cost as much as what is measured. So above 100 records/s a record is up to 10 ms
late by design; how late shows in the records' own timestamps.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

from confluent_kafka import KafkaError, Message, Producer

TICK_SECS = 0.01
# A tick is never so early that what is due in it waits for the next.
_SLACK_SECS = 1e-5


@dataclass(frozen=True)
class Generated:
    """What came of it.

    Attributes:
        records: How many were written.
        cpu_percent: Of a core, from the first record to the last.
    """

    records: int
    cpu_percent: float


def due_count(elapsed_secs: float, rate: float, records: int) -> int:
    """How many records are due so long after the first one; all of them are `records`."""
    return min(records, int((elapsed_secs + _SLACK_SECS) * rate) + 1)


def value(due_ms: float, number: int, padding: str) -> bytes:
    """A record's value: a flat object."""
    return (
        f'{{"due":{due_ms:.3f},"id":{number},"customer":"customer-{number % 9973:04}",'
        f'"amount":{number % 9000 + 1000}.25,"note":"{padding}"}}'
    ).encode()


def generate(options: argparse.Namespace) -> Generated:
    """Write the records.

    Raises:
        RuntimeError: Not all were written.
    """
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer(
        {
            "bootstrap.servers": options.bootstrap_servers,
            "linger.ms": 0,
            "delivery.report.only.error": True,
            "on_delivery": delivered,
        }
    )
    producer.list_topics(options.topic, timeout=30)
    records = round(options.rate * options.secs)
    padding = "x" * max(0, options.record_bytes - len(value(time.time() * 1000, 0, "")))
    start = time.time() + 0.1
    print(f"{start * 1000:.3f}", flush=True)
    cpu = time.process_time()
    sent = tick = 0
    while sent < records:
        time.sleep(max(0.0, start + tick * TICK_SECS - time.time()))
        due = due_count(time.time() - start, options.rate, records)
        for number in range(sent, due):
            producer.produce(
                options.topic,
                value((start + number / options.rate) * 1000, number, padding),
                b"key-%d" % number,
                number % options.partitions,
            )
        sent = due
        producer.poll(0)
        tick = max(tick + 1, int((time.time() - start) / TICK_SECS))
    share = (time.process_time() - cpu) / max(time.time() - start, TICK_SECS)
    if producer.flush(60) or failures:
        raise RuntimeError(f"not all records were written: {failures[:1]}")
    return Generated(sent, round(100 * share, 2))


def main() -> None:
    """Write the records and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generator", description=__doc__)
    parser.add_argument("--bootstrap_servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--rate", type=float, required=True, help="records per second")
    parser.add_argument("--secs", type=float, required=True, help="how long")
    parser.add_argument("--record_bytes", type=int, default=200, help="bytes of a record's value")
    print(json.dumps(asdict(generate(parser.parse_args()))))


if __name__ == "__main__":
    main()
