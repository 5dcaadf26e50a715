"""tfimm models: their names, the LoRA versions of their classes, and pretrained weights."""
