"""Tools before and during training: plan, EVA, LoRA+, AdaLoRA."""
