"""One file per task: how it degrades a slice, its loss, its metrics."""
