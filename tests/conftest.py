"""Fixtures every test may use: the real Kafka broker, and names nobody else uses."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from pipeline.local.broker import KafkaBroker
from tests.schema_registry import SchemaRegistryServer

# Measurements, not tests; `./run.sh bench` runs them.
collect_ignore = ["bench"]


class Names:
    """Topic and group names for one test; the broker is shared by all of them."""

    def __init__(self) -> None:
        self._suffix = uuid.uuid4().hex[:8]

    def topic(self, name: str = "topic") -> str:
        """The same name gives the same topic within a test, and another one in the next."""
        return f"{name}-{self._suffix}"

    def group(self, name: str = "group") -> str:
        """The same name gives the same consumer group within a test."""
        return f"{name}-{self._suffix}"


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture(scope="session")
def broker() -> Iterator[KafkaBroker]:
    """One real Kafka broker for the whole run. A test that stops it starts it again."""
    with KafkaBroker() as running:
        yield running


@pytest.fixture(scope="session")
def registry(broker: KafkaBroker) -> Iterator[SchemaRegistryServer]:
    """One real schema registry for the whole run. A test that stops it starts it again."""
    with SchemaRegistryServer(broker) as running:
        yield running


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First, because `-m` selects in this same hook.
    for item in items:
        for fixture, marker in {"broker": "broker", "cluster": "flink"}.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
