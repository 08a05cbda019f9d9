"""About: what a run is, as far as who watches it wants to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from pipeline.options.config import Config
from pipeline.options.declare import DIRECT_RUNNERS

_PACKAGE = "beam-lambda-sink"


@dataclass(frozen=True, slots=True)
class About:
    """What a run is.

    Attributes:
        group: The consumer group.
        function: The function, as it was given.
        runner: Name of the runner.
        version: Ours.
        envelope: How records are handed to the function.
        topics: Those that are read, as far as they are named.
        metrics_partitions: Up to how many partitions each has series of its own.
        function_timeout_secs: The function's own timeout.
        batch_size: Records of a batch at most.
        page_show: What is shown besides places, types and numbers.
        has_hands: Whether it can be told something.
        configuration: By option, its value and where that came from. No secret is in it.
    """

    group: str
    function: str
    runner: str = "DirectRunner"
    version: str = ""
    envelope: str = ""
    topics: tuple[str, ...] = ()
    metrics_partitions: int = 100
    function_timeout_secs: int = 900
    batch_size: int = 100
    page_show: str = "none"
    has_hands: bool = False
    configuration: Sequence[tuple[str, str, str]] = ()

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, where more is known of it."""
        return self.runner in DIRECT_RUNNERS

    @staticmethod
    def of(
        config: Config, runner: str, configuration: Sequence[tuple[str, str, str]] = ()
    ) -> About:
        """What a run with this configuration is."""
        return About(
            group=config.kafka.group,
            function=config.invoke.function.function,
            runner=runner,
            version=version(),
            envelope=config.batch.format.envelope.name,
            topics=config.source.topics,
            metrics_partitions=config.run.metrics_partitions,
            function_timeout_secs=config.invoke.function.timeout_secs,
            batch_size=config.batch.max_records,
            page_show=config.run.page_show,
            has_hands=bool(config.run.http_token) and runner in DIRECT_RUNNERS,
            configuration=configuration,
        )


def version() -> str:
    """Our version; ``unknown`` where we are not installed."""
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"
