"""ConvNeXt: the two dense layers of every MLP, which are 1x1 convolutions.

Source: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.convnext import ConvNeXt, ConvNeXtConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.convnext import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAConvNeXtConfig(LoRAConfig, ConvNeXtConfig):
    """``ConvNeXtConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAConvNeXt(LoRAModel, ConvNeXt):
    """ConvNeXt with LoRA; see ``LoRAConvNeXtConfig``."""

    cfg_class = LoRAConvNeXtConfig
