"""ConvNeXt and ConvNeXtV2: the MLP of every block.

Source: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545; Woo et al., "ConvNeXt V2",
arXiv:2301.00808.
"""

from __future__ import annotations

from dataclasses import replace

from tfimm_lora.families.family import TIMM, Family, Row

PRESETS = {"mlp": ("mlp/fc1", "mlp/fc2")}

_BLOCK = "stages.{s}.blocks.{b}"
_TRANSFORMERS = "encoder.stages.{s}"
_KERAS = "stage_{s}_block_{b}"

_SHARED = (
    Row("stem.0", "embeddings.patch_embeddings", applications="stem.stem_conv"),
    Row("stem.1", "embeddings.layernorm", applications="stem.stem_layernorm"),
    Row(
        "stages.{s}.downsample.0",
        f"{_TRANSFORMERS}.downsampling_layer.0",
        applications="downsampling_block_{s-1}.downsampling_layernorm_{s-1}",
    ),
    Row(
        "stages.{s}.downsample.1",
        f"{_TRANSFORMERS}.downsampling_layer.1",
        applications="downsampling_block_{s-1}.downsampling_conv_{s-1}",
    ),
    *(
        Row(
            f"{_BLOCK}.{timm}",
            f"{_TRANSFORMERS}.layers.{{b}}.{transformers}",
            applications=f"{_KERAS}_{keras}",
        )
        for timm, transformers, keras in (
            ("conv_dw", "dwconv", "depthwise_conv"),
            ("norm", "layernorm", "layernorm"),
            ("mlp.fc1", "pwconv1", "pointwise_conv_1"),
            ("mlp.fc2", "pwconv2", "pointwise_conv_2"),
        )
    ),
    Row("head.norm", "layernorm", applications="head_layernorm"),
    Row("head.fc", "/classifier", applications="head_dense"),
)

CONVNEXT = Family(
    "ConvNeXt",
    "arXiv:2201.03545",
    (
        *_SHARED,
        Row(
            f"{_BLOCK}.gamma",
            f"{_TRANSFORMERS}.layers.{{b}}.layer_scale_parameter",
            applications=f"{_KERAS}_layer_scale.variable",
        ),
    ),
    timm_models=("convnext_*",),
    tfimm="ConvNeXt",
    applications=("ConvNeXt*",),
    transformers={"convnext": "convnext"},
    presets=PRESETS,
)

# The small ones have 1x1 convolutions instead of linear layers in timm.
CONVNEXT_CONVOLUTIONS = replace(
    CONVNEXT,
    name="ConvNeXt of 1x1 convolutions",
    rows=tuple(
        row._replace(windows=((TIMM, 1),)) if ".mlp." in row.timm else row
        for row in CONVNEXT.rows
    ),
    timm_models=tuple(f"convnext_{name}*" for name in ("atto", "femto", "pico", "nano")),
    tfimm="",
)

# Without layer scale, and with global response normalization, which keras.applications lacks.
CONVNEXTV2 = Family(
    "ConvNeXtV2",
    "arXiv:2301.00808",
    (
        *(row._replace(applications=None) for row in _SHARED),
        Row(f"{_BLOCK}.mlp.grn", f"{_TRANSFORMERS}.layers.{{b}}.grn"),
    ),
    timm_models=("convnextv2_*",),
    transformers={"convnextv2": "convnextv2"},
    presets=PRESETS,
)
