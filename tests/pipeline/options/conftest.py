"""What all tests of options need."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is(logging_restored: None) -> None:
    """The command line sets up logging for its process; the tests after it need their own."""
