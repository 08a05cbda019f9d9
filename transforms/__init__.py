"""The steps of the pipeline, in the order of the data.

========  ======================  =============================================================
step      file                    in -> out
========  ======================  =============================================================
Read      transforms/read.py      Round -> RecordChunk
Key       transforms/key.py       RecordChunk -> ((topic, partition), RecordChunk)
Batch     transforms/batch.py     ((topic, partition), RecordChunk) -> Batch
Invoke    transforms/invoke.py    Batch -> Finished (responses and failures of one batch)
Write     transforms/write.py     Finished -> Progress, once Kafka has acknowledged
Commit    transforms/commit.py    Progress -> committed offsets of the consumer group
========  ======================  =============================================================

The rules are pure functions beside them: `payload` (records to JSON), `reply` (checking what came
back), `outcome` (what an invocation means), `retry` (what to do next), `formats` (records to
write). `invoker` runs those rules on threads, `aws` and `kafka` hold the clients.
"""
