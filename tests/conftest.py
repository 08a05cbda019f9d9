"""Fixtures every test may use: the real Kafka broker, and names nobody else uses."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Generator, Iterator

import pytest

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from tests.servers.schema_registry import SchemaRegistryServer

# Clusters on which a test has failed.
_SUSPECT: set[FlinkCluster] = set()

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


@pytest.fixture
def mended(cluster: FlinkCluster) -> FlinkCluster:
    """The module's cluster, whole: what made a test fail is not there in the next."""
    if cluster in _SUSPECT:
        _SUSPECT.remove(cluster)
        cluster.start_over()
    elif ended := cluster.mend():
        warnings.warn(f"started again, having ended by itself: {', '.join(ended)}", stacklevel=1)
    return cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell of a failure on Flink what only the cluster knows."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, FlinkCluster):
        report.sections.append(("Flink cluster", cluster.describe()))
        _SUSPECT.add(cluster)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First, because `-m` selects in this same hook.
    for item in items:
        for fixture, marker in {"broker": "broker", "cluster": "flink"}.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
