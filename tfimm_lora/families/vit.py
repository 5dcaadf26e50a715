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


def _block(hub: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of a block; keras_hub's ViT and DeiT differ in their MLP."""
    v4, v5 = "encoder.layer.{i}", "layers.{i}"
    before, after = "layernorm_before", "layernorm_after"
    return (
        Row(
            "blocks.{i}.norm1",
            f"{v4}.{before}",
            f"{v5}.{before}",
            f"{hub}.ln_1",
        ),
        *(
            Row(
                f"blocks.{{i}}.attn.qkv[{name[0]}]",
                f"{v4}.attention.attention.{name}",
                f"{v5}.attention.{name[0]}_proj",
                f"{hub}.mha.{name}",
            )
            for name in ("query", "key", "value")
        ),
        Row(
            "blocks.{i}.attn.proj",
            f"{v4}.attention.output.dense",
            f"{v5}.attention.o_proj",
            f"{hub}.mha.attention_output",
        ),
        Row("blocks.{i}.norm2", f"{v4}.{after}", f"{v5}.{after}", f"{hub}.ln_2"),
        Row("blocks.{i}.mlp.fc1", f"{v4}.intermediate.dense", f"{v5}.mlp.fc1", f"{hub}.{up}"),
        Row("blocks.{i}.mlp.fc2", f"{v4}.output.dense", f"{v5}.mlp.fc2", f"{hub}.{down}"),
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
        *_block("vit_encoder.transformer_block_{i+1}", "mlp.dense", "mlp.dense_1"),
        Row("norm", "layernorm", None, "vit_encoder.ln"),
        Row("head", "/classifier", None, "/predictions"),
    ),
    timm_models=("vit_*", "deit_*"),
    tfimm="ViT",
    keras_hub=("ViTBackbone",),
    transformers={"vit": "vit"},
    presets=PRESETS,
)

DEIT = Family(
    "DeiT",
    "arXiv:2012.12877",
    (
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
        *_block("deit_encoder.transformer_block_{i+1}", "mlp.dense", "output_layer.output"),
        Row("norm", "layernorm", None, "deit_encoder.ln"),
        Row("head", "/cls_classifier"),
        Row("head_dist", "/distillation_classifier"),
        Row("head", "/classifier", None, "/predictions"),
    ),
    timm_models=("deit_*distilled*",),
    tfimm="ViT",
    keras_hub=("DeiTBackbone",),
    transformers={"deit": "deit"},
    presets=PRESETS,
)
