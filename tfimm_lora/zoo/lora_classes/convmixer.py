"""ConvMixer: the 1x1 convolution of every block.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv:2201.09792.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.convmixer import ConvMixer, ConvMixerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.convmixer import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAConvMixerConfig(LoRAConfig, ConvMixerConfig):
    """``ConvMixerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAConvMixer(LoRAModel, ConvMixer):
    """ConvMixer with LoRA; see ``LoRAConvMixerConfig``."""

    cfg_class = LoRAConvMixerConfig
