"""Reading shards from our own Kinesis, with boto3 beside it as the peer."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest

import transforms.aws.http
import transforms.kinesis.client
import transforms.kinesis.fetch
from pipeline.local.kinesis import CUT, LocalKinesis
from pipeline.local.processes import wait_until
from tests import sink
from transforms.aws.signed import Template, template
from transforms.errors import KinesisError
from transforms.kinesis.client import AwsConfig, Refused, StreamApi
from transforms.kinesis.fetch import KinesisFetcher, Message, fetch_again
from transforms.kinesis.reach import Reach
from transforms.kinesis.shards import SHARD_END
from transforms.kinesis.stream import KinesisSource
from transforms.names import joined
from transforms.records import PartitionKey
from transforms.source import Fetched
from transforms.tally import READ_THROTTLES, TALLY

STREAM = "orders"
KEY: PartitionKey = (STREAM, 0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in sink.environment().items():
        monkeypatch.setenv(key, value)


@pytest.fixture(params=[False, True], ids=["one answer later", "with its last records"])
def kinesis(request: pytest.FixtureRequest) -> Iterator[LocalKinesis]:
    """However a closed shard ends."""
    with LocalKinesis(early_ends=request.param) as running:
        running.create_stream(STREAM)
        yield running


class Reader:
    """A fetcher, and all that it has brought."""

    def __init__(self, kinesis: LocalKinesis) -> None:
        self.api = StreamApi(AwsConfig("us-east-1", kinesis_url=kinesis.url), STREAM)
        self.reach: dict[PartitionKey, Reach] = {}
        self.fetcher = KinesisFetcher(lambda name: self.api, self.reach, 0.2)
        self.brought: list[Fetched] = []

    def messages(self) -> list[Message]:
        _, fetched = self.fetcher.fetch(0.1)
        self.brought += fetched
        return [message for each in self.brought for message in each.messages]

    def until(self, count: int) -> list[Message]:
        wait_until(lambda: len(self.messages()) >= count, f"there are no {count} records", 60)
        return self.messages()

    def until_ended(self) -> None:
        def ended() -> bool:
            self.messages()
            return any(each.ended for each in self.brought)

        wait_until(ended, "it did not end", 60)


@pytest.fixture
def reader(kinesis: LocalKinesis) -> Iterator[Reader]:
    made = Reader(kinesis)
    yield made
    made.fetcher.close()


def _put(kinesis: LocalKinesis, count: int, size: int = 10) -> None:
    kinesis.put(STREAM, [(f"k{i % 5}", os.urandom(size)) for i in range(count)])


def _numbers(kinesis: LocalKinesis) -> list[int]:
    return [joined(each.number) for each in kinesis.records(STREAM, 0)]


def test_records_are_those_that_boto3_reads(kinesis: LocalKinesis, reader: Reader) -> None:
    client: Any = boto3.client("kinesis", endpoint_url=kinesis.url, region_name="us-east-1")
    entries = [
        {"PartitionKey": key, "Data": data}
        for key, data in [("ü", b""), ("k" * 256, bytes(range(256))), ('"', b"x" * 100_000)]
    ]
    client.put_records(StreamName=STREAM, Records=entries)
    iterator = client.get_shard_iterator(
        StreamName=STREAM, ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    expected = [
        Message(
            joined(int(each["SequenceNumber"])),
            each["PartitionKey"].encode(),
            each["Data"],
            round(each["ApproximateArrivalTimestamp"].timestamp() * 1000),
        )
        for each in client.get_records(ShardIterator=iterator)["Records"]
    ]
    reader.fetcher.assign({KEY: 0})
    assert reader.until(3) == expected


def test_a_shard_is_read_to_its_end_from_anywhere(kinesis: LocalKinesis, reader: Reader) -> None:
    _put(kinesis, 50)
    kinesis.split(STREAM, 0)
    numbers = _numbers(kinesis)
    reader.fetcher.assign({KEY: numbers[19] + 1})
    reader.until_ended()
    assert [each.number for each in reader.messages()] == numbers[20:]
    assert [each.end for each in reader.brought if each.ended] == [SHARD_END]
    # And again, from its beginning.
    reader.brought = []
    reader.fetcher.assign_again(KEY, 0)
    reader.until_ended()
    assert [each.number for each in reader.messages()] == numbers


def test_a_pause_loses_nothing(kinesis: LocalKinesis, reader: Reader) -> None:
    _put(kinesis, 20)
    reader.fetcher.assign({KEY: 0})
    wait_until(lambda: kinesis.calls["GetRecords"] > 0, "it is not read", 30)
    reader.fetcher.pause([KEY])
    _put(kinesis, 20)
    assert reader.messages() == []
    reader.fetcher.resume([KEY])
    numbers = _numbers(kinesis)
    assert [each.number for each in reader.until(40)] == numbers


def test_an_answer_that_is_too_large_is_asked_for_in_parts(
    kinesis: LocalKinesis, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms.aws.http, "MAX_BODY_BYTES", 60_000)
    _put(kinesis, 600, 50)
    reader.fetcher.assign({KEY: 0})
    numbers = _numbers(kinesis)
    assert [each.number for each in reader.until(600)] == numbers


def test_a_shard_that_retention_has_taken_ends(
    kinesis: LocalKinesis, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    _put(kinesis, 5)
    kinesis.split(STREAM, 0)
    number = _numbers(kinesis)[1]
    kinesis.expire(STREAM, 0)
    with caplog.at_level(logging.WARNING):
        reader.fetcher.assign({KEY: number + 1})
        reader.until_ended()
    assert "what was not read of it is lost" in caplog.text


def test_a_number_that_is_not_there_any_more_is_told(kinesis: LocalKinesis, reader: Reader) -> None:
    """Whoever reads decides on where to go on; nothing is asked for meanwhile."""
    _put(kinesis, 5)
    number = _numbers(kinesis)[1]
    kinesis.trim(STREAM, 0, 3)
    reader.fetcher.assign({KEY: number + 1})
    wait_until(lambda: not reader.messages() and bool(reader.brought), "nothing is told", 30)
    (told,) = reader.brought
    assert told.overtaken
    assert "does not know its position" in str(told.problem)


def test_an_idle_shard_is_asked_as_often_as_it_is_told(
    kinesis: LocalKinesis, reader: Reader
) -> None:
    """And its end is told once."""
    reader.fetcher.assign({KEY: 0})
    wait_until(lambda: bool(reader.messages() or reader.brought), "nothing is told", 30)
    wait_until(lambda: kinesis.calls["GetRecords"] >= 4, "it is not asked again", 30)
    reader.messages()
    assert [(each.end, each.ended) for each in reader.brought] == [(0, False)]
    assert reader.fetcher.behind(KEY, 0) == 0
    assert not kinesis.refused


def test_what_cannot_be_waited_out_is_raised(kinesis: LocalKinesis, reader: Reader) -> None:
    kinesis.refuse("GetRecords", "KMSDisabledException", -1)
    reader.fetcher.assign({KEY: 0})
    with pytest.raises(KinesisError, match="--stream=orders cannot be read: KMSDisabled"):
        wait_until(lambda: bool(reader.messages()), "nothing is told", 30)


def _throttles() -> float:
    return TALLY.take().counts.get((READ_THROTTLES, (STREAM,)), 0)


SURE = pytest.mark.parametrize("kinesis", [False], indirect=True, ids=["one answer later"])


@SURE
@pytest.mark.parametrize(
    "code",
    [
        "AccessDeniedException",
        "ExpiredTokenException",
        "KMSAccessDeniedException",
        "KMSInvalidStateException",
        "KMSNotFoundException",
        "KMSOptInRequired",
        "UnrecognizedClientException",
    ],
)
def test_what_is_for_people_to_mend_is_raised(
    kinesis: LocalKinesis, reader: Reader, code: str
) -> None:
    """Nothing is passed over."""
    _put(kinesis, 3)
    kinesis.refuse("GetRecords", code, -1)
    reader.fetcher.assign({KEY: 0})
    with pytest.raises(KinesisError, match=f"--stream=orders cannot be read: {code}"):
        wait_until(lambda: bool(reader.messages()), "nothing is told", 30)


@SURE
@pytest.mark.parametrize(
    ("operation", "code", "throttles"),
    [
        ("GetRecords", "ProvisionedThroughputExceededException", 1),
        ("GetRecords", "KMSThrottlingException", 1),
        ("GetRecords", "LimitExceededException", 1),
        ("GetRecords", "ExpiredIteratorException", 0),
        ("GetRecords", "InternalFailure", 0),
        ("GetRecords", CUT, 0),
        ("GetShardIterator", "ProvisionedThroughputExceededException", 1),
        ("GetShardIterator", "InternalFailure", 0),
        ("GetShardIterator", CUT, 0),
    ],
)
def test_what_passes_is_waited_out(
    kinesis: LocalKinesis,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    code: str,
    throttles: int,
) -> None:
    """And counted, where there were too many calls."""
    monkeypatch.setattr(transforms.kinesis.fetch, "_THROTTLED_SECS", (0.1, 0.2))
    monkeypatch.setattr(transforms.kinesis.fetch, "_AGAIN_SECS", (0.1, 0.2))
    before = _throttles()
    _put(kinesis, 20)
    kinesis.refuse(operation, code)
    reader.fetcher.assign({KEY: 0})
    assert [each.number for each in reader.until(20)] == _numbers(kinesis)
    assert _throttles() - before == throttles


def test_an_iterator_expires_while_nothing_is_taken() -> None:
    """It goes on behind the last record that it has brought."""
    with LocalKinesis(iterator_secs=0.4) as kinesis:
        kinesis.create_stream(STREAM)
        _put(kinesis, 20)
        reader = Reader(kinesis)
        reader.fetcher.assign({KEY: 0})
        reader.until(20)
        reader.fetcher.pause([KEY])
        time.sleep(0.6)
        _put(kinesis, 20)
        reader.fetcher.resume([KEY])
        assert [each.number for each in reader.until(40)] == _numbers(kinesis)
        assert kinesis.refused["ExpiredIteratorException"] > 0
        reader.fetcher.close()


@SURE
def test_empty_answers_are_no_end(kinesis: LocalKinesis, reader: Reader) -> None:
    """As long as they say that there is more, nothing is said to be reached."""
    _put(kinesis, 5)
    kinesis.pass_over(STREAM, 0, 4)
    reader.fetcher.assign({KEY: 0})
    wait_until(lambda: kinesis.calls["GetRecords"] >= 4, "it is not asked again", 30)
    assert reader.fetcher.target(KEY) is None or reader.messages()
    assert [each.number for each in reader.until(5)] == _numbers(kinesis)
    assert reader.brought[0].messages


def test_shards_are_listed_anew_where_a_token_has_expired() -> None:
    """Of many pages."""
    with LocalKinesis(list_most=2) as kinesis:
        kinesis.create_stream(STREAM, 7)
        api = Reader(kinesis).api
        assert len(api.list_shards()) == 7
        kinesis.refuse("ListShards", "ExpiredNextTokenException")
        with pytest.raises(Refused) as refused:
            api.list_shards()
        assert not refused.value.is_final


def test_records_are_read_again(kinesis: LocalKinesis, reader: Reader) -> None:
    _put(kinesis, 9)
    stored = kinesis.records(STREAM, 0)
    wanted = [_numbers(kinesis)[at] for at in (2, 5)]
    records = fetch_again(reader.api, KEY, wanted)
    assert records is not None
    assert (records.offsets, records.values) == (wanted, [stored[2].data, stored[5].data])
    kinesis.trim(STREAM, 0, 4)
    assert fetch_again(reader.api, KEY, wanted) is None


@pytest.mark.parametrize(
    ("operation", "code", "said"),
    [
        ("ListShards", "AccessDeniedException", "--stream=orders cannot be read: AccessDenied"),
        ("DescribeStreamSummary", "AccessDeniedException", "--stream=orders cannot be read: Acc"),
        ("Scan", "AccessDeniedException", "--lease_table=t cannot be used"),
    ],
)
def test_what_nobody_can_wait_out_before_anything_is_read(
    operation: str, code: str, said: str
) -> None:
    with LocalKinesis() as kinesis:
        kinesis.create_stream(STREAM)
        kinesis.refuse(operation, code, -1)
        aws = AwsConfig("us-east-1", kinesis_url=kinesis.url, dynamodb_url=kinesis.url)
        source = KinesisSource((STREAM,), f"t-{operation}", aws)
        fetcher = source.fetcher()
        partitions = source.partitions(fetcher)
        with pytest.raises(KinesisError, match=said.replace("=t ", f"=t-{operation} ")):
            partitions.survey([each.key for each in partitions.find()])
        fetcher.close()


def test_a_first_request_of_a_kind_is_made_up_once(
    kinesis: LocalKinesis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two threads with the same call, the second one would end the signing of the first."""
    made = Counter[str]()

    def make(client: Any, operation: str, arguments: dict[str, Any]) -> Template:
        made[operation] += 1
        time.sleep(0.2)
        return template(client, operation, arguments)

    monkeypatch.setattr(transforms.kinesis.client, "template", make)
    api = StreamApi(AwsConfig("us-east-1", kinesis_url=kinesis.url), STREAM)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: api.summary(), range(4)))
    assert {each["StreamName"] for each in answers} == {STREAM}
    assert made == {"DescribeStreamSummary": 1}
