"""Commit: how far everything is finished, made durable."""
