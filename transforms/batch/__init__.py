"""Key and Batch: records to lanes, to payloads, to batches. Knows no source and no function."""
