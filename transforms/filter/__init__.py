"""Filter: which records reach the function. The rules know neither Beam nor a source."""
