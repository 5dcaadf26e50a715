"""ResNetV2 (BiT): the 1x1 and 3x3 convolutions of every block.

Their weights are standardised; the update is added to the kernel before that.

Source: Kolesnikov et al., "Big Transfer (BiT)", arXiv:1912.11370.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.resnetv2 import ResNetV2, ResNetV2Config
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.resnet import PRESETS_V2
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAResNetV2Config(LoRAConfig, ResNetV2Config):
    """``ResNetV2Config`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS_V2


@keras_serializable
@register_lora_architecture
class LoRAResNetV2(LoRAModel, ResNetV2):
    """ResNetV2 (BiT) with LoRA; see ``LoRAResNetV2Config``."""

    cfg_class = LoRAResNetV2Config
