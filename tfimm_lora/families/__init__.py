"""The families of models: their names in every library, and their LoRA targets.

One file per family. They are strings only: nothing here imports a framework.
"""

from tfimm_lora.families.beit import BEIT
from tfimm_lora.families.clip import CLIP, SIGLIP
from tfimm_lora.families.convnext import CONVNEXT, CONVNEXT_CONVOLUTIONS, CONVNEXTV2
from tfimm_lora.families.densenet import DENSENET
from tfimm_lora.families.dinov2 import (
    DINOV2,
    DINOV2_GIANT,
    DINOV2_GIANT_REGISTERS,
    DINOV2_REGISTERS,
)
from tfimm_lora.families.dinov3 import DINOV3, DINOV3_GATED
from tfimm_lora.families.efficientnet import EFFICIENTNET, EFFICIENTNET_EDGE, EFFICIENTNETV2
from tfimm_lora.families.family import Family
from tfimm_lora.families.mobilenet import MOBILENETV1, MOBILENETV2, MOBILENETV3
from tfimm_lora.families.pvt_v2 import PVT_V2
from tfimm_lora.families.resnet import RESNET, RESNET_C, RESNET_D, RESNETV2
from tfimm_lora.families.segformer import MIT, SEGFORMER
from tfimm_lora.families.segment_anything import SEGMENT_ANYTHING
from tfimm_lora.families.swin import SWIN, SWINV2
from tfimm_lora.families.vgg import VGG, VGG_BN
from tfimm_lora.families.vit import DEIT, DEIT_DISTILLED, VIT

#: More specific families first: the first whose patterns match a name is taken.
FAMILIES: tuple[Family, ...] = (
    SEGFORMER,
    MIT,
    PVT_V2,
    SEGMENT_ANYTHING,
    DINOV3_GATED,
    DINOV3,
    DINOV2_GIANT_REGISTERS,
    DINOV2_REGISTERS,
    DINOV2_GIANT,
    DINOV2,
    SIGLIP,
    CLIP,
    BEIT,
    DEIT_DISTILLED,
    DEIT,
    VIT,
    SWINV2,
    SWIN,
    CONVNEXTV2,
    CONVNEXT_CONVOLUTIONS,
    CONVNEXT,
    RESNET_C,
    RESNET_D,
    RESNET,
    RESNETV2,
    EFFICIENTNET_EDGE,
    EFFICIENTNETV2,
    EFFICIENTNET,
    MOBILENETV1,
    MOBILENETV2,
    MOBILENETV3,
    VGG_BN,
    VGG,
    DENSENET,
)

__all__ = ["FAMILIES", "Family"]
