"""PVT: the projections of attention and the MLP.

Source: Wang et al., "Pyramid Vision Transformer", arXiv:2102.12122.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.pvt import PyramidVisionTransformer, PyramidVisionTransformerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.pvt import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAPyramidVisionTransformerConfig(LoRAConfig, PyramidVisionTransformerConfig):
    """``PyramidVisionTransformerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAPyramidVisionTransformer(LoRAModel, PyramidVisionTransformer):
    """PVT with LoRA; see ``LoRAPyramidVisionTransformerConfig``."""

    cfg_class = LoRAPyramidVisionTransformerConfig
