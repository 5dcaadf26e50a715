"""LoRA in a whole model: inject, convert, merge, choose targets, copy weights."""
