"""LoRA versions of tfimm's architectures, one file a family."""

from tfimm_lora.architectures.cait import LoRACaiT, LoRACaiTConfig
from tfimm_lora.architectures.convmixer import LoRAConvMixer, LoRAConvMixerConfig
from tfimm_lora.architectures.convnext import LoRAConvNeXt, LoRAConvNeXtConfig
from tfimm_lora.architectures.efficientnet import LoRAEfficientNet, LoRAEfficientNetConfig
from tfimm_lora.architectures.mlp_mixer import LoRAMLPMixer, LoRAMLPMixerConfig
from tfimm_lora.architectures.pit import (
    LoRAPoolingVisionTransformer,
    LoRAPoolingVisionTransformerConfig,
)
from tfimm_lora.architectures.poolformer import LoRAPoolFormer, LoRAPoolFormerConfig
from tfimm_lora.architectures.pvt import (
    LoRAPyramidVisionTransformer,
    LoRAPyramidVisionTransformerConfig,
)
from tfimm_lora.architectures.pvt_v2 import (
    LoRAPyramidVisionTransformerV2,
    LoRAPyramidVisionTransformerV2Config,
)
from tfimm_lora.architectures.resnet import LoRAResNet, LoRAResNetConfig
from tfimm_lora.architectures.resnetv2 import LoRAResNetV2, LoRAResNetV2Config
from tfimm_lora.architectures.segment_anything import (
    LoRASegmentAnythingModel,
    LoRASegmentAnythingModelConfig,
)
from tfimm_lora.architectures.swin import LoRASwinTransformer, LoRASwinTransformerConfig
from tfimm_lora.architectures.vgg import LoRAVGG, LoRAVGGConfig
from tfimm_lora.architectures.vit import LoRAViT, LoRAViTConfig

__all__ = [
    "LoRACaiT",
    "LoRACaiTConfig",
    "LoRAConvMixer",
    "LoRAConvMixerConfig",
    "LoRAConvNeXt",
    "LoRAConvNeXtConfig",
    "LoRAEfficientNet",
    "LoRAEfficientNetConfig",
    "LoRAMLPMixer",
    "LoRAMLPMixerConfig",
    "LoRAPoolFormer",
    "LoRAPoolFormerConfig",
    "LoRAPoolingVisionTransformer",
    "LoRAPoolingVisionTransformerConfig",
    "LoRAPyramidVisionTransformer",
    "LoRAPyramidVisionTransformerConfig",
    "LoRAPyramidVisionTransformerV2",
    "LoRAPyramidVisionTransformerV2Config",
    "LoRAResNet",
    "LoRAResNetConfig",
    "LoRAResNetV2",
    "LoRAResNetV2Config",
    "LoRASegmentAnythingModel",
    "LoRASegmentAnythingModelConfig",
    "LoRASwinTransformer",
    "LoRASwinTransformerConfig",
    "LoRAVGG",
    "LoRAVGGConfig",
    "LoRAViT",
    "LoRAViTConfig",
]
