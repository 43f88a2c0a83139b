"""The coordinator's report of a run."""
