"""Helpers that know nothing of Keras or LoRA: files, optional imports, text."""
