"""Decode: what the schemas of a registry make of records. Knows no source."""
