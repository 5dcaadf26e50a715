"""The model to fine-tune: its name, its file, its weights and its classifier."""
