"""ResNet, ResNeXt and variants, and ResNetV2: the 1x1 and 3x3 convolutions of every block.

The ResNet50 of ``keras.applications`` has biases, and its strides are in other layers, so that
it has no column.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385; He et al.,
"Bag of Tricks for Image Classification", arXiv:1812.01187 (ResNet-D); He et al., "Identity
Mappings in Deep Residual Networks", arXiv:1603.05027 (ResNetV2); Kolesnikov et al., "Big
Transfer (BiT)", arXiv:1912.11370.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {"default": r"layer\d+/.*/conv[123]"}
PRESETS_V2 = {"default": r"stages/.*/conv[123]"}

_BLOCK = "layer{s+1}.{b}"
_TRANSFORMERS = "encoder.stages.{s}.layers.{b}"
_HUB = "stack{s}_block{b}"

_BLOCKS = (
    Row(
        f"{_BLOCK}.conv{{k+1}}",
        f"{_TRANSFORMERS}.layer.{{k}}.convolution",
        None,
        f"{_HUB}_{{k+1}}_conv",
    ),
    Row(
        f"{_BLOCK}.bn{{k+1}}",
        f"{_TRANSFORMERS}.layer.{{k}}.normalization",
        None,
        f"{_HUB}_{{k+1}}_bn",
    ),
    Row(f"{_BLOCK}.se.fc1"),
    Row(f"{_BLOCK}.se.fc2"),
    Row(f"{_BLOCK}.se.conv"),  # ECA
    Row("fc", "/classifier.1", None, "/predictions"),
)

RESNET = Family(
    "ResNet",
    "arXiv:1512.03385",
    (
        Row("conv1", "embedder.embedder.convolution", None, "conv1_conv"),
        Row("bn1", "embedder.embedder.normalization", None, "conv1_bn"),
        Row(
            f"{_BLOCK}.downsample.0",
            f"{_TRANSFORMERS}.shortcut.convolution",
            None,
            f"{_HUB}_0_conv",
        ),
        Row(
            f"{_BLOCK}.downsample.1",
            f"{_TRANSFORMERS}.shortcut.normalization",
            None,
            f"{_HUB}_0_bn",
        ),
        *_BLOCKS,
    ),
    timm_models=(
        "*resnet[0-9]*",
        "*resnext[0-9]*",
        "wide_resnet*",
        "ecaresnetlight",
        "resnetblur*",
        "resnetrs*",
    ),
    tfimm="ResNet",
    keras_hub=("ResNetBackbone",),
    transformers={"resnet": "resnet"},
    presets=PRESETS,
)

#: Three convolutions in the stem, and the blocks of keras_hub and timm.
_DEEP = (
    Row("conv1.0", keras_hub="conv1_conv"),
    Row("conv1.1", keras_hub="conv1_bn"),
    Row("conv1.3", keras_hub="conv2_conv"),
    Row("conv1.4", keras_hub="conv2_bn"),
    Row("conv1.6", keras_hub="conv3_conv"),
    Row("bn1", keras_hub="conv3_bn"),
    *(row._replace(transformers=None) for row in _BLOCKS),
)

RESNET_C = Family(
    "ResNet-C",
    "arXiv:1812.01187",
    (
        *_DEEP,
        Row(f"{_BLOCK}.downsample.0", keras_hub=f"{_HUB}_0_conv"),
        Row(f"{_BLOCK}.downsample.1", keras_hub=f"{_HUB}_0_bn"),
    ),
    timm_models=("*resnet[0-9]*[cs]",),
    keras_hub=("ResNetBackbone",),
    presets=PRESETS,
)

# Also with a pooling before the shortcut's convolution.
RESNET_D = Family(
    "ResNet-D",
    "arXiv:1812.01187",
    (
        *_DEEP,
        Row(f"{_BLOCK}.downsample.1", keras_hub=f"{_HUB}_0_conv"),
        Row(f"{_BLOCK}.downsample.2", keras_hub=f"{_HUB}_0_bn"),
        # The stem alone may be of this kind: the shortcut is that of ResNet.
        Row(f"{_BLOCK}.downsample.0"),
    ),
    timm_models=(
        "*resnet[0-9]*[dt]",
        "*resnext[0-9]*[dt]_*",
        "resnetrs*",
        "ecaresnetlight",
    ),
    tfimm="ResNet",
    keras_hub=("ResNetBackbone",),
    presets=PRESETS,
)

_V2 = "stages.{s}.blocks.{b}"

RESNETV2 = Family(
    "ResNetV2",
    "arXiv:1603.05027",
    (
        Row("stem.conv", keras_hub="conv1_conv"),
        Row(f"{_V2}.norm1", keras_hub=f"{_HUB}_pre_activation_bn"),
        Row(f"{_V2}.downsample.conv", keras_hub=f"{_HUB}_0_conv"),
        Row(f"{_V2}.conv{{k+1}}", keras_hub=f"{_HUB}_{{k+1}}_conv"),
        Row(f"{_V2}.norm{{k+2}}", keras_hub=f"{_HUB}_{{k+1}}_bn"),
        Row("norm", keras_hub="post_bn"),
        Row("head.fc", keras_hub="/predictions", windows=(("timm", 1),)),
    ),
    timm_models=("resnetv2_*",),
    tfimm="ResNetV2",
    keras_hub=("ResNetBackbone",),
    presets=PRESETS_V2,
)
