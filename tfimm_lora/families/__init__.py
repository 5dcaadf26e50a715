"""The families of models: their names in every library, and their LoRA targets.

One file per family. They are strings only: nothing here imports a framework.
"""

from tfimm_lora.families.family import Family
from tfimm_lora.families.swin import SWIN
from tfimm_lora.families.vit import DEIT, VIT

#: More specific families first: the first whose patterns match a name is taken.
FAMILIES: tuple[Family, ...] = (DEIT, VIT, SWIN)

__all__ = ["FAMILIES", "Family"]
