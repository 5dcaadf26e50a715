"""EfficientNet, EfficientNet-Lite, EfficientNet-EdgeTPU and EfficientNetV2.

LoRA adapts every convolution except depthwise ones, the first, and squeeze-and-excite.

Source: Tan and Le, "EfficientNet", arXiv:1905.11946; Gupta and Akin, "Accelerator-aware Neural
Network Design using AutoML", arXiv:2003.02838 (EdgeTPU); Tan and Le, "EfficientNetV2",
arXiv:2104.00298.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {"default": ("conv", "conv_exp", "conv_pw", "conv_pwl", "conv_head")}

_ENDS = (
    Row("conv_stem", "embeddings.convolution", None, "stem_conv", "stem_conv"),
    Row("bn1", "embeddings.batchnorm", None, "stem_bn", "stem_bn"),
    Row("conv_head", "encoder.top_conv", None, "top_conv", "top_conv"),
    Row("bn2", "encoder.top_bn", None, "top_bn", "top_bn"),
    Row("classifier", "/classifier", None, "/predictions", "predictions"),
)


def _rows(
    stage: str, *names: tuple[str, str | None, str | None, str | None]
) -> tuple[Row, ...]:
    """Return the rows of the blocks of stages: those of all, "", or of one, "=1".

    Args:
        stage: "" for all stages, or "=1" for one.
        names: The names in a block in timm, transformers, keras_hub and keras.applications.
            Those of keras_hub begin with "." if its blocks are layers of their own.
    """
    keras = f"block{{s+1{stage}}}{{b:a}}_"
    rows = []
    for timm, transformers, hub, applications in names:
        if hub is not None:
            hub = f"{keras}.{keras}{hub[1:]}" if hub.startswith(".") else keras + hub
        rows.append(
            Row(
                f"blocks.{{s{stage}}}.{{b}}.{timm}",
                transformers and f"encoder.blocks.{{n}}.{transformers}",
                None,
                hub,
                applications and keras + applications,
            )
        )
    return tuple(rows)


_DEPTHWISE, _NORM = "depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"
_PROJECT, _PROJECT_BN = "projection.project_conv", "projection.project_bn"

EFFICIENTNET = Family(
    "EfficientNet",
    "arXiv:1905.11946",
    (
        *_ENDS,
        *_rows(  # depthwise separable, without expansion
            "=0",
            ("conv_dw", _DEPTHWISE, "dwconv", "dwconv"),
            ("bn1", _NORM, "dwconv_bn", "bn"),
            ("conv_pw", _PROJECT, "project", "project_conv"),
            ("bn2", _PROJECT_BN, "project_bn", "project_bn"),
        ),
        *_rows(
            "",
            ("se.conv_reduce", "squeeze_excite.reduce", "se_reduce", "se_reduce"),
            ("se.conv_expand", "squeeze_excite.expand", "se_expand", "se_expand"),
            ("conv_pw", "expansion.expand_conv", "expand_conv", "expand_conv"),
            ("bn1", "expansion.expand_bn", "expand_bn", "expand_bn"),
            ("conv_dw", _DEPTHWISE, "dwconv", "dwconv"),
            ("bn2", _NORM, "dwconv_bn", "bn"),
            ("conv_pwl", _PROJECT, "project", "project_conv"),
            ("bn3", _PROJECT_BN, "project_bn", "project_bn"),
        ),
    ),
    timm_models=("*efficientnet_*",),
    tfimm="EfficientNet",
    keras_hub=("EfficientNetBackbone",),
    applications=("EfficientNetB*",),
    transformers={"efficientnet": "efficientnet"},
    presets=PRESETS,
    depths=(
        (1, 2, 2, 3, 3, 4, 1),
        (2, 3, 3, 4, 4, 5, 2),
        (2, 3, 3, 5, 5, 6, 2),
        (2, 4, 4, 6, 6, 8, 2),
        (3, 5, 5, 7, 7, 9, 3),
        (3, 6, 6, 8, 8, 11, 3),
        (4, 7, 7, 10, 10, 13, 4),
        (4, 8, 8, 11, 11, 15, 4),
    ),
)

_FUSED = (
    ("conv_exp", None, ".expand_conv", "expand_conv"),
    ("bn1", None, ".expand_bn", "expand_bn"),
    ("conv_pwl", None, ".project_conv", "project_conv"),
    ("bn2", None, ".project_bn", "project_bn"),
)
_UNFUSED = (
    ("se.conv_reduce", None, ".se_reduce", "se_reduce"),
    ("se.conv_expand", None, ".se_expand", "se_expand"),
    ("conv_pw", None, ".expand_conv", "expand_conv"),
    ("bn1", None, ".expand_bn", "expand_bn"),
    ("conv_dw", None, ".dwconv2", "dwconv2"),
    ("bn2", None, ".bn", "bn"),
    ("conv_pwl", None, ".project_conv", "project_conv"),
    ("bn3", None, ".project_bn", "project_bn"),
)
#: Of models with other stages, which only timm has.
_ANY = _rows(
    "",
    *(
        (name, None, None, None)
        for name in (
            "conv",
            "conv_exp",
            "conv_pw",
            "conv_dw",
            "conv_pwl",
            "bn1",
            "bn2",
            "bn3",
            "se.conv_reduce",
            "se.conv_expand",
        )
    ),
)
_V2_ENDS = tuple(row._replace(transformers=None) for row in _ENDS)

EFFICIENTNETV2 = Family(
    "EfficientNetV2",
    "arXiv:2104.00298",
    (
        *_V2_ENDS,
        *_rows(
            "=0",
            ("conv", None, ".conv", "project_conv"),
            ("bn1", None, ".bn", "project_bn"),
        ),
        *_rows("=0", ("conv", None, ".project_conv", None), ("bn1", None, ".project_bn", None)),
        *_rows("=1", *_FUSED),
        *_rows("=2", *_FUSED),
        *(row for stage in range(3, 7) for row in _rows(f"={stage}", *_UNFUSED)),
        *_ANY,
    ),
    timm_models=("*efficientnet_v2_*", "*efficientnetv2_*"),
    tfimm="EfficientNet",
    keras_hub=("EfficientNetBackbone",),
    applications=("EfficientNetV2*",),
    presets=PRESETS,
)

EFFICIENTNET_EDGE = Family(
    "EfficientNet-EdgeTPU",
    "arXiv:2003.02838",
    (
        *(row._replace(applications=None) for row in _V2_ENDS),
        *(
            row._replace(applications=None)
            for row in (
                *_rows("=0", *_FUSED),
                *_rows("=1", *_FUSED),
                *_rows("=2", *_FUSED),
                *(row for stage in range(3, 6) for row in _rows(f"={stage}", *_UNFUSED)),
            )
        ),
        *_ANY,
    ),
    timm_models=("*efficientnet_e[sml]*",),
    tfimm="EfficientNet",
    keras_hub=("EfficientNetBackbone",),
    presets=PRESETS,
)
