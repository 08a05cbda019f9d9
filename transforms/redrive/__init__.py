"""Redrive: the records of an error topic once more, each error record once."""
