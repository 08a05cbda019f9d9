"""How many inputs a generated test tries: some for every run, more where it is asked for."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = "BEAM_SINK_EXAMPLES"
"""Environment variable with the number of inputs for each generated test."""


def examples(default: int) -> settings:
    """Settings of a generated test that tries `default` inputs, or as many as EXAMPLES says."""
    return settings(
        max_examples=int(os.environ.get(EXAMPLES, default)),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
