"""PVTv2: the projections of attention and the MLP.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer",
arXiv:2106.13797.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.pvt_v2 import (
    PyramidVisionTransformerV2,
    PyramidVisionTransformerV2Config,
)
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.pvt_v2 import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAPyramidVisionTransformerV2Config(LoRAConfig, PyramidVisionTransformerV2Config):
    """``PyramidVisionTransformerV2Config`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAPyramidVisionTransformerV2(LoRAModel, PyramidVisionTransformerV2):
    """PVTv2 with LoRA; see ``LoRAPyramidVisionTransformerV2Config``."""

    cfg_class = LoRAPyramidVisionTransformerV2Config
