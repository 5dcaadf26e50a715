"""LoRA versions of tfimm's architectures, one file a family."""

from tfimm_lora.architectures.convnext import LoRAConvNeXt, LoRAConvNeXtConfig
from tfimm_lora.architectures.vit import LoRAViT, LoRAViTConfig

__all__ = ["LoRAConvNeXt", "LoRAConvNeXtConfig", "LoRAViT", "LoRAViTConfig"]
