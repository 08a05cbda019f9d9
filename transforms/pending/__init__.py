"""Batch and Invoke as one keyed step, for streaming runs: what is not finished is kept in state."""
