"""Kinesis: calls, shards, fetching and the lease table. No step, and no other source."""
