"""Offsets: the command of that name."""
