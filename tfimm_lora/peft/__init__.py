"""PEFT's LoraConfig: its fields, and the LoRAConfig that means the same."""
