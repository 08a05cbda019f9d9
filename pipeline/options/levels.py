"""Levels: from which on lines may be logged."""

from __future__ import annotations

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
