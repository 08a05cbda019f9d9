"""Redrive: the command of that name."""
