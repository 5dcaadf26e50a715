"""The image encoders of CLIP and SigLIP: the projections of attention and the MLP.

transformers' classifiers on them are not translated: they average the tokens, in CLIP those
before the last normalization. timm takes the class token, or the pooling by attention, whose
query, key and value are one parameter in transformers, and so have no names.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020; Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row
from tfimm_lora.families.vit import PRESETS

_LAYER, _HUB = "encoder.layers.{i}", "encoder_block_{i}"
_POSITIONS = "position_embedding.weight"


def _block(attention: str, norm: str, first: str, second: str) -> tuple[Row, ...]:
    """The rows of a block, with the names of keras_hub, which differ between the two."""

    def row(timm: str, name: str, hub: str) -> Row:
        return Row(f"blocks.{{i}}.{timm}", f"{_LAYER}.{name}", None, f"{_HUB}.{hub}")

    return (
        row("norm1", "layer_norm1", f"{norm}1"),
        *(
            row(f"attn.qkv[{x[0]}]", f"self_attn.{x[0]}_proj", f"{attention}.{x}")
            for x in ("query", "key", "value")
        ),
        row("attn.proj", "self_attn.out_proj", f"{attention}.attention_output"),
        row("norm2", "layer_norm2", f"{norm}2"),
        row("mlp.fc1", "mlp.fc1", first),
        row("mlp.fc2", "mlp.fc2", second),
    )


def _embeddings() -> tuple[Row, ...]:
    return (
        Row("pos_embed", f"embeddings.{_POSITIONS}", None, f"embedding.{_POSITIONS}"),
        Row(
            "patch_embed.proj",
            "embeddings.patch_embedding",
            None,
            "embedding.patch_embedding",
        ),
    )


CLIP = Family(
    "CLIP",
    "arXiv:2103.00020",
    (
        Row("cls_token", "embeddings.class_embedding", None, "embedding.class_embedding"),
        *_embeddings(),
        Row("norm_pre", "pre_layrnorm", None, "pre_layer_norm"),
        *_block("attention", "layer_norm_", "dense", "dense_1"),
        Row("norm", "post_layernorm", None, "layer_norm"),
        Row("head", keras_hub="/predictions"),
    ),
    timm_models=("vit_*_clip_*",),
    keras_hub=("CLIPVisionEncoder",),
    transformers={"clip": "vision_model", "clip_vision_model": "vision_model"},
    presets=PRESETS,
)


def _pool(timm: str, transformers: str | None, hub: str) -> Row:
    return Row(
        f"attn_pool.{timm}",
        None if transformers is None else f"head.{transformers}",
        None,
        f"head.{hub}",
    )


SIGLIP = Family(
    "SigLIP",
    "arXiv:2303.15343",
    (
        *_embeddings(),
        *_block("self_attn", "layer_norm", "mlp.fc1", "mlp.fc2"),
        Row("norm", "post_layernorm", None, "post_layer_norm"),
        _pool("latent", "probe", "variable"),
        _pool("q", None, "attention.query"),
        _pool("kv[k]", None, "attention.key"),
        _pool("kv[v]", None, "attention.value"),
        _pool("proj", "attention.out_proj", "attention.attention_output"),
        _pool("norm", "layernorm", "layernorm"),
        _pool("mlp.fc1", "mlp.fc1", "mlp.fc1"),
        _pool("mlp.fc2", "mlp.fc2", "mlp.fc2"),
        Row("head", keras_hub="/predictions"),
    ),
    timm_models=("vit_*_siglip_*",),
    keras_hub=("SigLIPVisionEncoder",),
    transformers={"siglip": "vision_model", "siglip_vision_model": "vision_model"},
    presets={
        # Not the pooling, of which PEFT adapts only some layers.
        "default": r"blocks/\d+/(attn/(qkv|proj)|mlp/fc[12])",
        "attention": r"blocks/\d+/attn/(qkv|proj)",
        "mlp": r"blocks/\d+/mlp/fc[12]",
    },
)
