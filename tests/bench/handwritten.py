"""The peer: the same job as the pipeline's, as one would write it by hand in an afternoon.

A thread per partition consumes a batch, invokes the function, checks the reply's length, produces
one response per record, and about once a second waits for the responses and commits. At least
once, in strict order per partition. It has no retries but the clients' own, no error topic, no
bisection, no rebalancing, and it ends at the offsets that were the ends when it started.

``--each`` is the loop of one who wants each record answered at once, and runs until SIGTERM: poll
one, invoke, produce, flush, commit. It has a thread per partition, four at most, which share them.

``--orjson`` is the same loop with orjson in the place of the standard library's json. At its end it
prints one line: ``{"records": N, "elapsed_secs": S}``, S without the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import orjson
from botocore.config import Config
from confluent_kafka import (
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

COMMIT_INTERVAL_SECS = 1.0
EACH_THREADS = 4


def entry(message: Message, loads: Callable[..., Any]) -> dict[str, Any]:
    """A record as the function gets it."""
    return {
        "payload": {
            "timestamp": message.timestamp()[1],
            "topic": message.topic(),
            "partition": message.partition(),
            "offset": message.offset(),
            "key": message.key().decode(),
            "value": loads(message.value()),
        }
    }


def key_of(message: Message) -> str:
    """The key of a record's response."""
    coordinates = f'"topic":"{message.topic()}","partition":{message.partition()}'
    return f'{{{coordinates},"offset":{message.offset()}}}'


def results_of(response: Any, records: int, loads: Callable[..., Any]) -> list[Any]:
    """The function's results, one for each record."""
    body = response["Payload"].read()
    if "FunctionError" in response:
        raise RuntimeError(f"the function failed: {body[:500]!r}")
    results: list[Any] = loads(body)
    if len(results) != records:
        raise RuntimeError(f"{len(results)} results for {records} records")
    return results


def run_each(
    options: argparse.Namespace,
    partitions: list[int],
    function: Any,
    dumps: Callable[..., Any],
    loads: Callable[..., Any],
    ended: threading.Event,
) -> int:
    """Answer each record of some partitions as it comes, until told to end; return how many."""
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failures.append(error)

    servers = {"bootstrap.servers": options.bootstrap_servers}
    consumer = Consumer(
        {
            **servers,
            "group.id": options.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    producer = Producer({**servers, "enable.idempotence": True, "on_delivery": delivered})
    consumer.assign([TopicPartition(options.topic, number, OFFSET_STORED) for number in partitions])
    records = 0
    try:
        while not ended.is_set():
            message = consumer.poll(1.0)
            if message is None:
                continue
            if message.error():
                raise KafkaException(message.error())
            payload = dumps([entry(message, loads)])
            response = function.invoke(FunctionName=options.function, Payload=payload)
            (result,) = results_of(response, 1, loads)
            producer.produce(
                options.response_topic, key=key_of(message), value=dumps(result["payload"])
            )
            if producer.flush(60) or failures:
                raise RuntimeError(f"a response was not delivered: {failures[:1]}")
            consumer.commit(message, asynchronous=False)
            records += 1
    finally:
        # None goes on alone: an error is to end the process.
        ended.set()
    consumer.close()
    return records


def run_partition(
    options: argparse.Namespace,
    partition: int,
    function: Any,
    dumps: Callable[..., Any],
    loads: Callable[..., Any],
) -> int:
    """Send one partition's records to the function; return how many they were."""
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failures.append(error)

    consumer = Consumer(
        {
            "bootstrap.servers": options.bootstrap_servers,
            "group.id": options.group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": options.bootstrap_servers,
            "enable.idempotence": True,
            "linger.ms": 20,
            "delivery.report.only.error": True,
            "on_delivery": delivered,
        }
    )
    low, end = consumer.get_watermark_offsets(TopicPartition(options.topic, partition))
    stored = consumer.committed([TopicPartition(options.topic, partition)])[0].offset
    position = stored if stored >= 0 else low
    consumer.assign([TopicPartition(options.topic, partition, OFFSET_STORED)])

    def commit() -> None:
        if producer.flush(60) or failures:
            raise RuntimeError(f"responses were not delivered: {failures[:1]}")
        consumer.commit(
            offsets=[TopicPartition(options.topic, partition, position)], asynchronous=False
        )

    records = 0
    committed_at = time.monotonic()
    while position < end:
        messages = consumer.consume(min(options.batch_size, end - position), 1.0)
        for message in messages:
            if message.error():
                raise KafkaException(message.error())
        if not messages:
            continue
        payload = [entry(message, loads) for message in messages]
        response = function.invoke(FunctionName=options.function, Payload=dumps(payload))
        results = results_of(response, len(messages), loads)
        for message, result in zip(messages, results, strict=True):
            key = key_of(message)
            value = dumps(result["payload"])
            while True:
                try:
                    producer.produce(options.response_topic, key=key, value=value)
                    break
                except BufferError:  # the producer's queue is full
                    producer.poll(0.1)
        producer.poll(0)
        records += len(messages)
        position = messages[-1].offset() + 1
        if time.monotonic() - committed_at >= COMMIT_INTERVAL_SECS:
            commit()
            committed_at = time.monotonic()
    commit()
    consumer.close()
    return records


def main() -> None:
    """Run the threads to their end."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.handwritten")
    for name in ("bootstrap_servers", "topic", "response_topic", "group", "endpoint"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--function", default="bench")
    parser.add_argument("--batch_size", type=int, default=100, help="records per invocation")
    parser.add_argument("--orjson", action="store_true", help="orjson instead of json")
    parser.add_argument("--each", action="store_true", help="a call per record, until SIGTERM")
    options = parser.parse_args()
    ended = threading.Event()
    if options.each:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    begin = time.monotonic()
    dumps: Callable[..., Any] = orjson.dumps if options.orjson else json.dumps
    loads: Callable[..., Any] = orjson.loads if options.orjson else json.loads

    probe = Consumer({"bootstrap.servers": options.bootstrap_servers, "group.id": options.group})
    partitions = list(probe.list_topics(options.topic, timeout=10).topics[options.topic].partitions)
    probe.close()
    function = boto3.client(
        "lambda",
        region_name="us-east-1",
        endpoint_url=options.endpoint,
        config=Config(max_pool_connections=len(partitions)),
    )
    threads = min(len(partitions), EACH_THREADS) if options.each else len(partitions)
    with ThreadPoolExecutor(threads) as pool:
        if options.each:
            tasks = [
                pool.submit(
                    run_each, options, partitions[n::threads], function, dumps, loads, ended
                )
                for n in range(threads)
            ]
        else:
            tasks = [
                pool.submit(run_partition, options, partition, function, dumps, loads)
                for partition in partitions
            ]
        records = sum(task.result() for task in tasks)
    print(json.dumps({"records": records, "elapsed_secs": round(time.monotonic() - begin, 3)}))


if __name__ == "__main__":
    main()
