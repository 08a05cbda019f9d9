"""What all tests of options need."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

LOGGERS = ("apache_beam", "botocore", "urllib3", "pipeline", "transforms", "librdkafka")


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is() -> Iterator[None]:
    """The command line sets up logging for its process; the tests after it need their own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
