"""ViT and DeiT: the projections of attention and the MLP.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; Touvron et al.,
"Training data-efficient image transformers", arXiv:2012.12877.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {
    "attention": ("attn/qkv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}

_EMBED, _DEIT_EMBED = "vit_patching_and_embedding", "deit_patching_and_embedding"


def block(hub: str | None = None, up: str = "", down: str = "") -> tuple[Row, ...]:
    """The rows of a block of ViT, DeiT and BEiT in transformers.

    Args:
        hub: A block in keras_hub, where the two layers of the MLP have different names.
        up: The first of them.
        down: The second.
    """
    v4, v5 = "encoder.layer.{i}", "layers.{i}"

    def row(timm: str, old: str, new: str, name: str) -> Row:
        return Row(
            f"blocks.{{i}}.{timm}",
            f"{v4}.{old}",
            f"{v5}.{new}",
            f"{hub}.{name}" if hub else None,
        )

    return (
        row("norm1", "layernorm_before", "layernorm_before", "ln_1"),
        *(
            row(
                f"attn.qkv[{name[0]}]",
                f"attention.attention.{name}",
                f"attention.{name[0]}_proj",
                f"mha.{name}",
            )
            for name in ("query", "key", "value")
        ),
        row("attn.proj", "attention.output.dense", "attention.o_proj", "mha.attention_output"),
        row("norm2", "layernorm_after", "layernorm_after", "ln_2"),
        row("mlp.fc1", "intermediate.dense", "mlp.fc1", up),
        row("mlp.fc2", "output.dense", "mlp.fc2", down),
    )


VIT = Family(
    "ViT",
    "arXiv:2010.11929",
    (
        Row("cls_token", "embeddings.cls_token", None, f"{_EMBED}.class_token"),
        Row(
            "pos_embed",
            "embeddings.position_embeddings",
            None,
            f"{_EMBED}.position_embedding.weight",
        ),
        Row(
            "patch_embed.proj",
            "embeddings.patch_embeddings.projection",
            None,
            f"{_EMBED}.patch_embedding",
        ),
        *block("vit_encoder.transformer_block_{i+1}", "mlp.dense", "mlp.dense_1"),
        Row("norm", "layernorm", None, "vit_encoder.ln"),
        Row("head", "/classifier", None, "/predictions"),
    ),
    timm_models=("vit_*", "deit_*"),
    tfimm="ViT",
    keras_hub=("ViTBackbone",),
    transformers={"vit": "vit"},
    presets=PRESETS,
)

_DEIT = (
    Row("cls_token", "embeddings.cls_token", None, f"{_DEIT_EMBED}.class_token"),
    Row(
        "dist_token",
        "embeddings.distillation_token",
        None,
        f"{_DEIT_EMBED}.distillation_token",
    ),
    Row(
        "pos_embed",
        "embeddings.position_embeddings",
        None,
        f"{_DEIT_EMBED}.position_embedding",
    ),
    Row(
        "patch_embed.proj",
        "embeddings.patch_embeddings.projection",
        None,
        f"{_DEIT_EMBED}.patch_embedding",
    ),
    *block("deit_encoder.transformer_block_{i+1}", "mlp.dense", "output_layer.output"),
    Row("norm", "layernorm", None, "deit_encoder.ln"),
)

#: With the classifiers of both tokens: DeiTForImageClassificationWithTeacher.
DEIT_DISTILLED = Family(
    "DeiT with two classifiers",
    "arXiv:2012.12877",
    (
        *_DEIT,
        Row("head", "/cls_classifier", None, "/predictions"),
        Row("head_dist", "/distillation_classifier", None, "/predictions_distillation"),
        Row("head", "/classifier"),
    ),
    timm_models=("deit_*distilled*",),
    tfimm="ViT",
    keras_hub=("DeiTBackbone",),
    needs=("/predictions_distillation",),
    transformers={"deit": "deit"},
    presets=PRESETS,
)

#: With the class token's classifier alone: DeiTForImageClassification and keras_hub's.
DEIT = Family(
    "DeiT",
    "arXiv:2012.12877",
    (
        *_DEIT,
        Row("head", "/classifier", None, "/predictions"),
        Row("head", "/cls_classifier"),
        Row("head_dist", "/distillation_classifier"),
    ),
    keras_hub=("DeiTBackbone",),
    transformers={"deit": "deit"},
    presets=PRESETS,
)
