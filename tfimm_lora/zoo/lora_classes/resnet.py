"""ResNet, ResNeXt and variants: the 1x1 and 3x3 convolutions of every block.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.resnet import ResNet, ResNetConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.resnet import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAResNetConfig(LoRAConfig, ResNetConfig):
    """``ResNetConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAResNet(LoRAModel, ResNet):
    """ResNet with LoRA; see ``LoRAResNetConfig``."""

    cfg_class = LoRAResNetConfig
