"""DenseNet: the convolutions of every dense layer and of the transitions.

Source: Huang et al., "Densely Connected Convolutional Networks", arXiv:1608.06993.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {"default": r"features/(denseblock|transition)\d+/.*conv[12]?"}

_LAYER = "features.denseblock{s+1}.denselayer{b+1}"
_TRANSITION = "features.transition{s+1}"

DENSENET = Family(
    "DenseNet",
    "arXiv:1608.06993",
    (
        Row("features.conv0", keras_hub="conv1_conv", applications="conv1_conv"),
        Row("features.norm0", keras_hub="conv1_bn", applications="conv1_bn"),
        *(
            Row(
                f"{_LAYER}.{timm}",
                keras_hub=f"stack{{s+1}}_block{{b+1}}_{hub}",
                applications=f"conv{{s+2}}_block{{b+1}}_{applications}",
            )
            for timm, hub, applications in (
                ("norm1", "1_bn", "0_bn"),
                ("conv1", "1_conv", "1_conv"),
                ("norm2", "2_bn", "1_bn"),
                ("conv2", "2_conv", "2_conv"),
            )
        ),
        *(
            Row(
                f"{_TRANSITION}.{timm}",
                keras_hub=f"transition{{s+1}}_{keras}",
                applications=f"pool{{s+2}}_{keras}",
            )
            for timm, keras in (("norm", "bn"), ("conv", "conv"))
        ),
        Row("features.norm5", keras_hub="bn", applications="bn"),
        Row("classifier", keras_hub="/predictions", applications="predictions"),
    ),
    timm_models=("densenet*",),
    keras_hub=("DenseNetBackbone",),
    applications=("DenseNet*",),
    presets=PRESETS,
)
