"""LoRA versions of tfimm's architectures, one file a family."""

from tfimm_lora.zoo.families.cait import LoRACaiT, LoRACaiTConfig
from tfimm_lora.zoo.families.convmixer import LoRAConvMixer, LoRAConvMixerConfig
from tfimm_lora.zoo.families.convnext import LoRAConvNeXt, LoRAConvNeXtConfig
from tfimm_lora.zoo.families.efficientnet import LoRAEfficientNet, LoRAEfficientNetConfig
from tfimm_lora.zoo.families.mlp_mixer import LoRAMLPMixer, LoRAMLPMixerConfig
from tfimm_lora.zoo.families.pit import (
    LoRAPoolingVisionTransformer,
    LoRAPoolingVisionTransformerConfig,
)
from tfimm_lora.zoo.families.poolformer import LoRAPoolFormer, LoRAPoolFormerConfig
from tfimm_lora.zoo.families.pvt import (
    LoRAPyramidVisionTransformer,
    LoRAPyramidVisionTransformerConfig,
)
from tfimm_lora.zoo.families.pvt_v2 import (
    LoRAPyramidVisionTransformerV2,
    LoRAPyramidVisionTransformerV2Config,
)
from tfimm_lora.zoo.families.resnet import LoRAResNet, LoRAResNetConfig
from tfimm_lora.zoo.families.resnetv2 import LoRAResNetV2, LoRAResNetV2Config
from tfimm_lora.zoo.families.segment_anything import (
    LoRASegmentAnythingModel,
    LoRASegmentAnythingModelConfig,
)
from tfimm_lora.zoo.families.swin import LoRASwinTransformer, LoRASwinTransformerConfig
from tfimm_lora.zoo.families.vgg import LoRAVGG, LoRAVGGConfig
from tfimm_lora.zoo.families.vit import LoRAViT, LoRAViTConfig

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
