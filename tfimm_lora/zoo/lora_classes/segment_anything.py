"""Segment Anything: the projections of attention and the MLP of the image encoder.

The prompt encoder and the mask decoder are frozen. Pass ``lora_train_modules`` to train them
fully: ("mask_decoder",) for masks of a new kind.

Source: Kirillov et al., "Segment Anything", arXiv:2304.02643; Zhang and Liu, "Customized
Segment Anything Model for Medical Image Segmentation", arXiv:2304.13785, which
injects LoRA into the image encoder and trains the mask decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfimm.architectures.segment_anything import (
    SegmentAnythingModel,
    SegmentAnythingModelConfig,
)
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.segment_anything import PRESETS
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRASegmentAnythingModelConfig(LoRAConfig, SegmentAnythingModelConfig):
    """``SegmentAnythingModelConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRASegmentAnythingModel(LoRAModel, SegmentAnythingModel):
    """Segment Anything with LoRA; see ``LoRASegmentAnythingModelConfig``."""

    cfg_class = LoRASegmentAnythingModelConfig
