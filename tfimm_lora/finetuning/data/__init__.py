"""Pictures on disk to batches."""
