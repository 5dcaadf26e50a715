"""MobileNet, MobileNetV2 and MobileNetV3.

LoRA adapts every convolution except depthwise ones, the first, and squeeze-and-excite.

Source: Howard et al., "MobileNets", arXiv:1704.04861; Sandler et al., "MobileNetV2",
arXiv:1801.04381; Howard et al., "Searching for MobileNetV3", arXiv:1905.02244.
"""

from __future__ import annotations

from tfimm_lora.families.efficientnet import PRESETS
from tfimm_lora.families.family import APPLICATIONS, Family, Row

_FIRST, _BLOCK = "blocks.0.0", "blocks.{s}.{b}"

MOBILENETV1 = Family(
    "MobileNet",
    "arXiv:1704.04861",
    (
        Row("conv_stem", "conv_stem.convolution", applications="conv1"),
        Row("bn1", "conv_stem.normalization", applications="conv1_bn"),
        Row(f"{_BLOCK}.conv_dw", "layer.{d}.convolution", applications="conv_dw_{n+1}"),
        Row(f"{_BLOCK}.bn1", "layer.{d}.normalization", applications="conv_dw_{n+1}_bn"),
        Row(f"{_BLOCK}.conv_pw", "layer.{d+1}.convolution", applications="conv_pw_{n+1}"),
        Row(f"{_BLOCK}.bn2", "layer.{d+1}.normalization", applications="conv_pw_{n+1}_bn"),
        Row(
            "classifier",
            "/classifier",
            applications="conv_preds",
            windows=((APPLICATIONS, 1),),
        ),
    ),
    timm_models=("mobilenetv1_*",),
    applications=("MobileNet",),
    transformers={"mobilenet_v1": "mobilenet_v1"},
    presets=PRESETS,
    depths=((1, 2, 2, 6, 2),),
)

MOBILENETV2 = Family(
    "MobileNetV2",
    "arXiv:1801.04381",
    (
        Row("conv_stem", "conv_stem.first_conv.convolution", applications="Conv1"),
        Row("bn1", "conv_stem.first_conv.normalization", applications="bn_Conv1"),
        *(
            Row(
                f"{_FIRST}.{timm}",
                f"conv_stem.{transformers}",
                applications=f"expanded_conv_{keras}",
            )
            for timm, transformers, keras in (
                ("conv_dw", "conv_3x3.convolution", "depthwise"),
                ("bn1", "conv_3x3.normalization", "depthwise_BN"),
                ("conv_pw", "reduce_1x1.convolution", "project"),
                ("bn2", "reduce_1x1.normalization", "project_BN"),
            )
        ),
        *(
            Row(
                f"{_BLOCK}.{timm}",
                f"layer.{{n-1}}.{transformers}",
                applications=f"block_{{n}}_{keras}",
            )
            for timm, transformers, keras in (
                ("conv_pw", "expand_1x1.convolution", "expand"),
                ("bn1", "expand_1x1.normalization", "expand_BN"),
                ("conv_dw", "conv_3x3.convolution", "depthwise"),
                ("bn2", "conv_3x3.normalization", "depthwise_BN"),
                ("conv_pwl", "reduce_1x1.convolution", "project"),
                ("bn3", "reduce_1x1.normalization", "project_BN"),
            )
        ),
        Row("conv_head", "conv_1x1.convolution", applications="Conv_1"),
        Row("bn2", "conv_1x1.normalization", applications="Conv_1_bn"),
        Row("classifier", "/classifier", applications="predictions"),
    ),
    timm_models=("mobilenetv2_*", "mobilenet_v2_*"),
    tfimm="EfficientNet",
    applications=("MobileNetV2",),
    transformers={"mobilenet_v2": "mobilenet_v2"},
    presets=PRESETS,
    depths=((1, 2, 3, 4, 3, 3, 1),),
)

_HUB_FIRST, _HUB = "block_0_0", "block_{s}_{b}"
_LAST = "blocks.{z}.0"


def _v3(timm: str, hub: str, keras: str) -> tuple[Row, ...]:
    """Return the rows of a module of the inverted residual blocks of MobileNetV3."""
    row = Row(
        f"{_BLOCK}.{timm}", None, None, f"{_HUB}.{_HUB}_{hub}", f"expanded_conv_{{n}}_{keras}"
    )
    return (row,)


MOBILENETV3 = Family(
    "MobileNetV3",
    "arXiv:1905.02244",
    (
        Row("conv_stem", None, None, "input_conv", "conv"),
        Row("bn1", None, None, "input_batch_norm", "conv_bn"),
        *(
            Row(f"{_FIRST}.{timm}", None, None, f"{_HUB_FIRST}.{_HUB_FIRST}_{hub}", keras)
            for timm, hub, keras in (
                ("conv_dw", "conv1", "expanded_conv_depthwise"),
                ("bn1", "bn1", "expanded_conv_depthwise_bn"),
                ("conv_pw", "conv2", "expanded_conv_project"),
                ("bn2", "bn2", "expanded_conv_project_bn"),
                (
                    "se.conv_reduce",
                    f"squeeze_excite.{_HUB_FIRST}_squeeze_excite_conv_reduce",
                    "expanded_conv_squeeze_excite_conv",
                ),
                (
                    "se.conv_expand",
                    f"squeeze_excite.{_HUB_FIRST}_squeeze_excite_conv_expand",
                    "expanded_conv_squeeze_excite_conv_1",
                ),
            )
        ),
        Row(f"{_LAST}.conv", None, None, "block_{z}_0.block_{z}_0_conv", "conv_1"),
        Row(f"{_LAST}.bn1", None, None, "block_{z}_0.block_{z}_0_bn", "conv_1_bn"),
        *_v3("conv_pw", "conv1", "expand"),
        *_v3("bn1", "bn1", "expand_bn"),
        *_v3("conv_dw", "conv2", "depthwise"),
        *_v3("bn2", "bn2", "depthwise_bn"),
        *_v3("se.conv_reduce", f"se.{_HUB}_se_conv_reduce", "squeeze_excite_conv"),
        *_v3("se.conv_expand", f"se.{_HUB}_se_conv_expand", "squeeze_excite_conv_1"),
        *_v3("conv_pwl", "conv3", "project"),
        *_v3("bn3", "bn3", "project_bn"),
        Row("conv_head", None, None, "/classifier_conv", "conv_2"),
        Row(
            "classifier",
            None,
            None,
            "/predictions",
            "logits",
            windows=((APPLICATIONS, 1),),
        ),
    ),
    timm_models=("*mobilenetv3_*",),
    keras_hub=("MobileNetBackbone",),
    applications=("MobileNetV3*",),
    presets=PRESETS,
    depths=((1, 2, 3, 2, 3), (1, 2, 3, 4, 2, 3)),
)
