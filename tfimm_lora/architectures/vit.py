"""ViT, DeiT and the hybrids of ResNet and ViT: the projections of attention and the MLP.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; Touvron et
al., "Training data-efficient image transformers", arXiv:2012.12877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.vit import ViT, ViTConfig
from tfimm.models import keras_serializable

from tfimm_lora.architectures.model import LoRAModel
from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.registry import register_lora_architecture


@dataclass
class LoRAViTConfig(LoRAConfig, ViTConfig):
    """``ViTConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = {
        "attention": ("attn/qkv", "attn/proj"),
        "mlp": ("mlp/fc1", "mlp/fc2"),
    }


@keras_serializable
@register_lora_architecture
class LoRAViT(LoRAModel, ViT):
    """ViT, DeiT with LoRA; see ``LoRAViTConfig``."""

    cfg_class = LoRAViTConfig
