"""Schemas: the registry, and what its Avro, JSON and Protobuf schemas make of bytes. No step."""
