"""PoolFormer: the two 1x1 convolutions of every MLP.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", arXiv:2111.11418.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.poolformer import PoolFormer, PoolFormerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.poolformer import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAPoolFormerConfig(LoRAConfig, PoolFormerConfig):
    """``PoolFormerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAPoolFormer(LoRAModel, PoolFormer):
    """PoolFormer with LoRA; see ``LoRAPoolFormerConfig``."""

    cfg_class = LoRAPoolFormerConfig
