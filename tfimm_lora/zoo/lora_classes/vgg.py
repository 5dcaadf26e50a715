"""VGG: every convolution except the first.

The 7x7 and 1x1 convolutions at the end are the fully connected layers of the paper.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks", arXiv:1409.1556.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.vgg import VGG, VGGConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.vgg import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAVGGConfig(LoRAConfig, VGGConfig):
    """``VGGConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAVGG(LoRAModel, VGG):
    """VGG with LoRA; see ``LoRAVGGConfig``."""

    cfg_class = LoRAVGGConfig
