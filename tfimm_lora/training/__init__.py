"""Before and during training: plan, EVA, LoRA+, AdaLoRA."""
