"""Run: rounds on this machine. Knows the steps through `pipeline.build` only."""
