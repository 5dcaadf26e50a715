"""MLP-Mixer, ResMLP, gMLP and gMixer: the MLPs over tokens and over channels.

Source: Tolstikhin et al., "MLP-Mixer", arXiv:2105.01601; Touvron et al., "ResMLP",
arXiv:2105.03404; Liu et al., "Pay Attention to MLPs", arXiv:2105.08050.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.mlp_mixer import MLPMixer, MLPMixerConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.mlp_mixer import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAMLPMixerConfig(LoRAConfig, MLPMixerConfig):
    """``MLPMixerConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAMLPMixer(LoRAModel, MLPMixer):
    """MLP-Mixer with LoRA; see ``LoRAMLPMixerConfig``."""

    cfg_class = LoRAMLPMixerConfig
