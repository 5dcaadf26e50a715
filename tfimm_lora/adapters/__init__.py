"""Adapters: LoRA factors as small files that PEFT reads, loaded, switched and combined."""
