"""Fixtures every test may use: the real Kafka broker, and names nobody else uses."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from pipeline.local.broker import KafkaBroker
from pipeline.local.flink import FlinkCluster
from tests.servers.schema_registry import SchemaRegistryServer
from tests.servers.secrets_manager import SecretsManager
from tests.servers.secure_broker import SecureBroker

# Clusters on which a test has failed.
_SUSPECT: set[FlinkCluster] = set()

# Measurements, not tests; `./run.sh bench` runs them.
collect_ignore = ["bench"]

# On a busy machine an input may take any time.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


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


@pytest.fixture(scope="session")
def secure() -> Iterator[SecureBroker]:
    """One real Kafka broker with a listener for each way to log in."""
    with SecureBroker() as running:
        yield running


@pytest.fixture(scope="session")
def manager() -> Iterator[SecretsManager]:
    """A Secrets Manager for the whole run."""
    with SecretsManager() as running:
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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes `-n auto` means: none but this one where few tests are asked for.

    Most tests wait for a server, so that one more than there are processors does not slow them.
    """
    few = config.option.keyword or any(".py" in argument for argument in config.args)
    return 0 if few else min((os.cpu_count() or 1) + 1, 4)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: a file's tests stay together, and so do all with a Flink cluster.

    A file's fixtures are made once, and one cluster runs at a time beside all other tests.
    """
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "flink" if Path(file).stem.startswith("test_flink") else file

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # First, because `-m` selects in this same hook.
    for item in items:
        for fixture, marker in {"broker": "broker", "secure": "broker", "cluster": "flink"}.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
    # For pytest-xdist, which begins with the first: what takes longest may not be left to the end.
    if hasattr(config, "workerinput"):
        whole = {item.path: 2 for item in items}
        for item in items:
            for rank, marker in enumerate(("flink", "broker")):
                if item.get_closest_marker(marker):
                    whole[item.path] = min(rank, whole[item.path])
        items.sort(key=lambda item: whole[item.path])


LOGGERS = ("apache_beam", "botocore", "urllib3", "pipeline", "transforms", "librdkafka")


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Handlers and levels of this process are afterwards what they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
