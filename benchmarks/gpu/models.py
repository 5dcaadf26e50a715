"""The models by their names in timm, which tfimm_lora has too, and the rank of the updates."""

from __future__ import annotations

from measure import Entry

RANK, CLASSES = 8, 10
NAMES = {
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "convnext_base": "convnext_base",
    "resnet50": "resnet50",
}
#: For ``--small``, by the family of a model.
SMALL = {"vit": "vit_tiny_patch16_224", "convnext": "convnext_atto", "resnet": "resnet18"}


def family_of(entry: Entry) -> str:
    """The family of a model: "vit", "convnext" or "resnet"."""
    return next(family for family in SMALL if entry.model.startswith(family))


def name_of(entry: Entry, small: bool) -> str:
    """The name of a model."""
    return SMALL[family_of(entry)] if small else NAMES[entry.model]
