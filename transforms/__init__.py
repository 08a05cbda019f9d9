"""The steps of the pipeline, in the order of the data.

========  ===========================  ========================================================
step      file                         in -> out
========  ===========================  ========================================================
Read      transforms/read/rounds.py    Round -> RecordChunk
Key       transforms/batch/key.py      RecordChunk -> ((topic, partition), RecordChunk)
Batch     transforms/batch/batch.py    ((topic, partition), RecordChunk) -> Batch
Invoke    transforms/invoke/invoke.py  Batch -> Finished (responses and failures of one batch)
Write     transforms/write/write.py    Finished -> Progress, once Kafka has acknowledged
Commit    transforms/commit/commit.py  Progress -> committed offsets of the consumer group
========  ===========================  ========================================================

In a streaming run Read is transforms/read/streaming.py, which asks the source in
transforms/kafka/streaming.py, or, with `--kafka_reader=beam`, transforms/kafka/beam_reader.py.
Batch and Invoke are one step there, transforms/pending/pending.py, which goes by the rules of both
and keeps what is not finished in state; the other steps are the same files.

With `--schema_registry_url` there is one more step, Decode, behind Read:
transforms/decode/decode.py, RecordChunk -> RecordChunk with what schemas make of its records. With
`--filter_criteria` there is one more step, Filter, before Key: transforms/filter/filter.py,
RecordChunk -> RecordChunk without the records that no filter matches.

Each step has a folder, and its rules are pure functions beside it: in `decode/` the formats (what a
schema makes of a record), in `filter/` `rules` (what filters can say), in `batch/` `payload` and
`envelope` (records to JSON), in `invoke/` `reply` (checking what came back), `outcome` (what an
invocation means), `retry` (what to do next), `window` (states from call to call), `concurrency` and
`breaker` (how many invocations at once, and when none), in `write/` `formats` (records to write).
`invoke/invoker.py` runs those rules on threads. `aws/` and `kafka/` hold the clients. The files
beside the folders are the ground that all of them stand on; `coding`, `columns` and `facts` say how
what travels between the steps, and what stays in state, becomes bytes, and `spread` how keys are
dealt out evenly on Flink.
"""
