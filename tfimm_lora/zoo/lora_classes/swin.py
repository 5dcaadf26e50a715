"""Swin: the projections of attention and the MLP.

Source: Liu et al., "Swin Transformer", arXiv:2103.14030.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.swin import SwinTransformer, SwinTransformerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.swin import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRASwinTransformerConfig(LoRAConfig, SwinTransformerConfig):
    """``SwinTransformerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRASwinTransformer(LoRAModel, SwinTransformer):
    """Swin with LoRA; see ``LoRASwinTransformerConfig``."""

    cfg_class = LoRASwinTransformerConfig
