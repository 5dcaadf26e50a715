"""The families of models: their names in every library, and their LoRA targets.

One file per family. They are strings only: nothing here imports a framework.
"""

from tfimm_lora.families.convnext import CONVNEXT, CONVNEXTV2
from tfimm_lora.families.densenet import DENSENET
from tfimm_lora.families.efficientnet import EFFICIENTNET, EFFICIENTNET_EDGE, EFFICIENTNETV2
from tfimm_lora.families.family import Family
from tfimm_lora.families.mobilenet import MOBILENETV1, MOBILENETV2, MOBILENETV3
from tfimm_lora.families.resnet import RESNET, RESNET_D, RESNETV2
from tfimm_lora.families.swin import SWIN
from tfimm_lora.families.vgg import VGG, VGG_BN
from tfimm_lora.families.vit import DEIT, VIT

#: More specific families first: the first whose patterns match a name is taken.
FAMILIES: tuple[Family, ...] = (
    DEIT,
    VIT,
    SWIN,
    CONVNEXTV2,
    CONVNEXT,
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
