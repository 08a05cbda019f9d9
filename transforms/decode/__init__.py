"""Decode: what schemas make of records. Knows a schema registry, and no source."""
