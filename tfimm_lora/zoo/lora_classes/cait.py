"""CaiT: the projections of attention and the MLP, also in the class attention blocks.

The projections over heads (proj_l, proj_w) are not included, since they are no larger than a
LoRA factor.

Source: Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.cait import CaiT, CaiTConfig
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.cait import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRACaiTConfig(LoRAConfig, CaiTConfig):
    """``CaiTConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRACaiT(LoRAModel, CaiT):
    """CaiT with LoRA; see ``LoRACaiTConfig``."""

    cfg_class = LoRACaiTConfig
