"""Read: what a source is, and how its records come into a run, in rounds or as a stream."""
