"""Translation between PEFT's LoraConfig and ``LoRAConfig``."""
