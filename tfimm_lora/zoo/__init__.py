"""The models of tfimm: their names, LoRA versions of their classes, pretrained weights."""
