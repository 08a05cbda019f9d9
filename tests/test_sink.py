"""What tests are made with: a fault of it may not be silent."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaException

from pipeline.local.broker import KafkaBroker
from pipeline.local.processes import ServerError, wait_until
from tests.conftest import Names
from tests.sink import Topics, load


def test_a_load_that_is_refused_fails_the_test(broker: KafkaBroker, names: Names) -> None:
    """Whatever the test was waiting for by then."""
    topics = Topics(broker, names, partitions=1)
    broker.delete_topic(topics.source)
    broker.create_topic(topics.source, partitions=1, max_message_bytes=100)
    with pytest.raises(KafkaException, match="MSG_SIZE_TOO_LARGE"), load(topics, 1):
        wait_until(lambda: bool(topics.sent()), "nothing is written", 5)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_load_goes_on_when_the_broker_is_back(
    broker: KafkaBroker, names: Names, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    """If the test has said that it is restarted."""
    topics = Topics(broker, names, partitions=1)
    tries: list[int] = []
    produce = broker.produce

    def once_not(*given: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise ServerError("5 of 5 records were not written within 60 s")
        return produce(*given)

    monkeypatch.setattr(broker, "produce", once_not)

    def loaded() -> None:
        with load(topics, 1, restarts):
            wait_until(lambda: len(tries) > restarts, "it has ended", 30)

    if restarts:
        loaded()
        assert len(topics.sent()) >= 5
    else:
        with pytest.raises(ServerError, match="were not written"):
            loaded()
