"""The peer: the same job as the pipeline's, as one would write it by hand in an afternoon.

A thread per partition consumes a batch, invokes the function, checks the reply's length, produces
one response per record, and about once a second waits for the responses and commits. At least
once, in strict order per partition. It has no retries but the clients' own, no error topic, no
bisection, no rebalancing, and it ends at the offsets that were the ends when it started.

``--orjson`` is the same loop with orjson in the place of the standard library's json. At its end it
prints one line: ``{"records": N, "elapsed_secs": S}``, S without the start of the interpreter.
"""

from __future__ import annotations

import argparse
import json
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
        payload = [
            {
                "payload": {
                    "timestamp": message.timestamp()[1],
                    "topic": options.topic,
                    "partition": partition,
                    "offset": message.offset(),
                    "key": message.key().decode(),
                    "value": loads(message.value()),
                }
            }
            for message in messages
        ]
        response = function.invoke(FunctionName=options.function, Payload=dumps(payload))
        body = response["Payload"].read()
        if "FunctionError" in response:
            raise RuntimeError(f"the function failed: {body[:500]!r}")
        results = loads(body)
        if len(results) != len(messages):
            raise RuntimeError(f"{len(results)} results for {len(messages)} records")
        for message, result in zip(messages, results, strict=True):
            coordinates = f'"topic":"{options.topic}","partition":{partition}'
            key = f'{{{coordinates},"offset":{message.offset()}}}'
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
    """Run a thread per partition to the end."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.handwritten")
    for name in ("bootstrap_servers", "topic", "response_topic", "group", "endpoint"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--function", default="bench")
    parser.add_argument("--batch_size", type=int, default=100, help="records per invocation")
    parser.add_argument("--orjson", action="store_true", help="orjson instead of json")
    options = parser.parse_args()
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
    with ThreadPoolExecutor(len(partitions)) as pool:
        tasks = [
            pool.submit(run_partition, options, partition, function, dumps, loads)
            for partition in partitions
        ]
        records = sum(task.result() for task in tasks)
    print(json.dumps({"records": records, "elapsed_secs": round(time.monotonic() - begin, 3)}))


if __name__ == "__main__":
    main()
