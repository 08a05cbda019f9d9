"""Tests: `transforms/` and `pipeline/` mirror the rooms of the program, `runs/` has whole runs.

`servers/` holds what stands in for other people's services, `bench/` measures.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The project's folder."""
