"""Adapters: what LoRA learned as small files that PEFT reads, switched and combined."""
