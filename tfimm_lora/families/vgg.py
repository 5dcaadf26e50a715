"""VGG: every convolution except the first.

The 7x7 and 1x1 convolutions at the end are the fully connected layers of the paper. With batch
normalization, only timm has it, and the convolutions have other indices.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks", arXiv:1409.1556.
"""

from __future__ import annotations

from tfimm_lora.families.family import KERAS_HUB, TIMM, Family, Row

PRESETS = {"default": r"features/0*[1-9]\d*|pre_logits/fc[12]"}

_KERAS = "block{s+1}_conv{b+1}"

VGG = Family(
    "VGG",
    "arXiv:1409.1556",
    (
        Row("features.{f}", keras_hub=_KERAS, applications=_KERAS),
        *(
            Row(
                f"pre_logits.{name}",
                keras_hub=f"/head.{name}",
                applications=name,
                windows=((TIMM, size), (KERAS_HUB, size)),
            )
            for name, size in (("fc1", 7), ("fc2", 1))
        ),
        Row("head.fc", keras_hub="/head.predictions", applications="predictions"),
    ),
    timm_models=("vgg[0-9][0-9]",),
    tfimm="VGG",
    keras_hub=("VGGBackbone",),
    applications=("VGG*",),
    presets=PRESETS,
    depths=((1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)),
)

VGG_BN = Family(
    "VGG-BN",
    "arXiv:1409.1556",
    (
        Row("features.{f}"),
        Row("pre_logits.fc1"),
        Row("pre_logits.fc2"),
        Row("head.fc"),
    ),
    timm_models=("vgg*_bn",),
    tfimm="VGG",
    presets=PRESETS,
)
