"""EfficientNet and MobileNetV2: the 1x1 and 3x3 convolutions of every block and of the head.

Depthwise and squeeze-and-excite convolutions are not included; target them by "all" or by name.

Source: Tan and Le, "EfficientNet", arXiv:1905.11946, and "EfficientNetV2",
arXiv:2104.00298; Sandler et al., "MobileNetV2", arXiv:1801.04381.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.efficientnet import EfficientNet, EfficientNetConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.efficientnet import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAEfficientNetConfig(LoRAConfig, EfficientNetConfig):
    """``EfficientNetConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAEfficientNet(LoRAModel, EfficientNet):
    """EfficientNet, MobileNetV2 with LoRA; see ``LoRAEfficientNetConfig``."""

    cfg_class = LoRAEfficientNetConfig
