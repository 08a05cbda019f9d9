"""Submit: streaming jobs for Flink and Dataflow, and what stays beside them."""
