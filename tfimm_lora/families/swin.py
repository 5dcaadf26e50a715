"""Swin: the projections of attention and the MLP.

Source: Liu et al., "Swin Transformer", arXiv:2103.14030.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {
    "attention": ("attn/qkv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}

_TIMM, _HUB = "layers.{s}.blocks.{b}", "stage_{s}.blocks_{b}"
_V4, _V5 = "encoder.layers.{s}.blocks.{b}", "layers.{s}.blocks.{b}"
_TABLE = "relative_position_bias_table"

SWIN = Family(
    "Swin",
    "arXiv:2103.14030",
    (
        Row(
            "patch_embed.proj",
            "embeddings.patch_embeddings.projection",
            None,
            "patch_embedding.conv_projection",
        ),
        Row("patch_embed.norm", "embeddings.norm", None, "patch_embedding.norm"),
        Row(f"{_TIMM}.norm1", f"{_V4}.layernorm_before", None, f"{_HUB}.norm1"),
        *(
            Row(f"{_TIMM}.attn.qkv[{name[0]}]", f"{_V4}.attention.self.{name}")
            for name in ("query", "key", "value")
        ),
        Row(f"{_TIMM}.attn.qkv", keras_hub=f"{_HUB}.attn.attention_qkv"),
        Row(
            f"{_TIMM}.attn.proj",
            f"{_V4}.attention.output.dense",
            None,
            f"{_HUB}.attn.attention_projection",
        ),
        Row(
            f"{_TIMM}.attn.{_TABLE}",
            f"{_V4}.attention.self.{_TABLE}",
            None,
            f"{_HUB}.attn.{_TABLE}",
        ),
        Row(f"{_TIMM}.norm2", f"{_V4}.layernorm_after", None, f"{_HUB}.norm2"),
        Row(f"{_TIMM}.mlp.fc1", f"{_V4}.intermediate.dense", None, f"{_HUB}.mlp.fc1"),
        Row(f"{_TIMM}.mlp.fc2", f"{_V4}.output.dense", None, f"{_HUB}.mlp.fc2"),
        *(
            Row(
                f"layers.{{s+1}}.downsample.{name}",
                f"encoder.layers.{{s}}.downsample.{name}",
                None,
                f"stage_{{s}}.downsample.{name}",
            )
            for name in ("reduction", "norm")
        ),
        Row("norm", "layernorm", None, "norm"),
        Row("head.fc", "/classifier", None, "/predictions"),
    ),
    timm_models=("swin_*",),
    tfimm="SwinTransformer",
    keras_hub=("SwinTransformerBackbone",),
    transformers={"swin": "swin"},
    presets=PRESETS,
)
