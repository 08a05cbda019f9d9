"""Watch: what a run shows of itself: logs, progress, summary."""
