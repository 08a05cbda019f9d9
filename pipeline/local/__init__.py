"""Local: stand-ins for the services around the pipeline, for the demo and the tests."""
