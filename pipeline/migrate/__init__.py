"""Migrate: the configurations of other systems, as options of ours."""
