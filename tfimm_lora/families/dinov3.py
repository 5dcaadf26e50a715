"""DINOv3: the projections of attention and the MLP, which is gated in some models.

timm's models have no bias of query, key and value, but for those whose names end with "_qkvb".
transformers has no DINOv3 with a classifier.

Source: Simeoni et al., "DINOv3", arXiv:2508.10104.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row
from tfimm_lora.families.vit import PRESETS

_HUB = "encoder.layers_{i}"


def _rows(gated: bool) -> tuple[Row, ...]:
    def row(timm: str, name: str) -> Row:
        return Row(
            f"blocks.{{i}}.{timm}",
            f"layer.{{i}}.{name}",
            f"model.layer.{{i}}.{name}",
            f"{_HUB}.{name}",
        )

    gate = (("mlp.fc1_g", "mlp.gate_proj"), ("mlp.fc1_x", "mlp.up_proj"))
    patches = "embeddings.patch_embeddings"
    return (
        Row("cls_token", "embeddings.cls_token", None, "embeddings.cls_token"),
        Row("reg_token", "embeddings.register_tokens", None, "embeddings.register_tokens"),
        Row(
            "mask_token",
            "embeddings.mask_token",
            None,
            "embeddings.mask_token",
            in_timm=False,
        ),
        Row("patch_embed.proj", patches, None, f"{patches}.projection"),
        row("norm1", "norm1"),
        *(row(f"attn.qkv[{x}]", f"attention.{x}_proj") for x in "qkv"),
        *(row(f"attn.{x}_bias", f"attention.{x}_proj.bias") for x in "qkv"),
        row("attn.proj", "attention.o_proj"),
        row("gamma_1", "layer_scale1.lambda1"),
        row("norm2", "norm2"),
        *(row(*names) for names in (gate if gated else [("mlp.fc1", "mlp.up_proj")])),
        row("mlp.fc2", "mlp.down_proj"),
        row("gamma_2", "layer_scale2.lambda1"),
        Row("norm", "norm", None, "layernorm"),
        Row("head", keras_hub="/predictions"),
    )


def _family(name: str, timm_models: tuple[str, ...], *needs: str) -> Family:
    gated = "use_gated_mlp" in needs
    return Family(
        name,
        "arXiv:2508.10104",
        _rows(gated),
        timm_models=timm_models,
        keras_hub=("DINOV3Backbone",),
        needs=needs,
        transformers={"dinov3_vit": ""},
        presets={
            "attention": PRESETS["attention"],
            "mlp": ("mlp/fc1_g", "mlp/fc1_x", "mlp/fc2") if gated else PRESETS["mlp"],
        },
    )


DINOV3 = _family("DINOv3", ("vit_*_dinov3", "vit_*_dinov3_qkvb"))
DINOV3_GATED = _family(
    "DINOv3 with a gated MLP",
    ("vit_*_plus_*_dinov3", "vit_*_plus_*_dinov3_qkvb", "vit_7b_*_dinov3"),
    "use_gated_mlp",
)
