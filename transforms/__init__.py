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

In a streaming run Read is transforms/read_native.py or, with `--kafka_reader=beam`,
transforms/read_beam.py; the other steps are the same files.

With `--schema_registry_url` there is one more step, Decode, behind Read: transforms/decode.py,
RecordChunk -> RecordChunk with what schemas make of its records. With `--filter_criteria` there is
one more step, Filter, before Key: transforms/filter.py, RecordChunk -> RecordChunk without the
records that no filter matches.

The rules are pure functions beside them: `schemas` and its formats (what a schema makes of a
record), `filter_rules` (what filters can say), `payload` (records to JSON), `reply` (checking what
came back), `outcome` (what an invocation means), `retry` (what to do next), `concurrency` and
`breaker` (how many invocations at once, and when none), `formats` (records to write). `invoker`
runs those rules on threads; `aws` (over `http`), `kafka` and `registry` hold the clients.
`coding` says how what travels between the steps becomes bytes.
"""
