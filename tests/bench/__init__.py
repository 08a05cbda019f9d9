"""The benchmark: the pipeline beside a loop written by hand (``python -m tests.bench``)."""
