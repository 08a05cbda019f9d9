"""Kafka: clients, offsets, messages, fetching and committing. No step, and no other source."""
