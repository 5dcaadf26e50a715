"""Banks: many adapters in one model, one for each example of a batch."""
