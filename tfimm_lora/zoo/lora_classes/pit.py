"""PiT and distilled PiT: the projections of attention and the MLP.

Source: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers",
arXiv:2103.16302.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.pit import PoolingVisionTransformer, PoolingVisionTransformerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.pit import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAPoolingVisionTransformerConfig(LoRAConfig, PoolingVisionTransformerConfig):
    """``PoolingVisionTransformerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAPoolingVisionTransformer(LoRAModel, PoolingVisionTransformer):
    """PiT with LoRA; see ``LoRAPoolingVisionTransformerConfig``."""

    cfg_class = LoRAPoolingVisionTransformerConfig
