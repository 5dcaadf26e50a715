"""Swin and Swin V2: the projections of attention and the MLP.

Source: Liu et al., "Swin Transformer", arXiv:2103.14030; "Swin Transformer V2",
arXiv:2111.09883.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {
    "attention": ("attn/qkv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}

_TIMM, _HUB = "layers.{s}.blocks.{b}", "stage_{s}.blocks_{b}"
_BLOCK = "encoder.layers.{s}.blocks.{b}"
_TABLE = "relative_position_bias_table"


def _block(v5: bool) -> tuple[Row, ...]:
    """The rows of a block. transformers 5 renamed those of Swin, but not of Swin V2."""

    def row(timm: str, v4: str, renamed: str | None = None, hub: str | None = None) -> Row:
        return Row(
            f"{_TIMM}.{timm}",
            f"{_BLOCK}.{v4}",
            f"{_BLOCK}.{renamed}" if renamed and v5 else None,
            f"{_HUB}.{hub}" if hub and v5 else None,
        )

    return (
        row("norm1", "layernorm_before", None, "norm1"),
        *(
            row(f"attn.qkv[{x[0]}]", f"attention.self.{x}", f"attention.{x[0]}_proj")
            for x in ("query", "key", "value")
        ),
        row(
            "attn.proj",
            "attention.output.dense",
            "attention.o_proj",
            "attn.attention_projection",
        ),
        row("norm2", "layernorm_after", None, "norm2"),
        row("mlp.fc1", "intermediate.dense", "mlp.fc1", "mlp.fc1"),
        row("mlp.fc2", "output.dense", "mlp.fc2", "mlp.fc2"),
    )


def _others(hub: bool) -> tuple[Row, ...]:
    """The rows outside of the blocks."""

    def row(timm: str, v4: str, name: str) -> Row:
        return Row(timm, v4, None, name if hub else None)

    return (
        row(
            "patch_embed.proj",
            "embeddings.patch_embeddings.projection",
            "patch_embedding.conv_projection",
        ),
        row("patch_embed.norm", "embeddings.norm", "patch_embedding.norm"),
        *(
            row(
                f"layers.{{s+1}}.downsample.{name}",
                f"encoder.layers.{{s}}.downsample.{name}",
                f"stage_{{s}}.downsample.{name}",
            )
            for name in ("reduction", "norm")
        ),
        row("norm", "layernorm", "norm"),
        row("head.fc", "/classifier", "/predictions"),
    )


SWIN = Family(
    "Swin",
    "arXiv:2103.14030",
    (
        *_block(v5=True),
        Row(f"{_TIMM}.attn.qkv", keras_hub=f"{_HUB}.attn.attention_qkv"),
        Row(
            f"{_TIMM}.attn.{_TABLE}",
            f"{_BLOCK}.attention.self.{_TABLE}",
            f"{_BLOCK}.attention.relative_position_bias.{_TABLE}",
            f"{_HUB}.attn.{_TABLE}",
        ),
        *_others(hub=True),
    ),
    timm_models=("swin_*",),
    tfimm="SwinTransformer",
    keras_hub=("SwinTransformerBackbone",),
    transformers={"swin": "swin"},
    presets=PRESETS,
)

# No Keras model: its names are recognized, and adapters converted between libraries.
SWINV2 = Family(
    "Swin V2",
    "arXiv:2111.09883",
    (
        *_block(v5=False),
        # The bias of the key is zero.
        *(
            Row(f"{_TIMM}.attn.{name[0]}_bias", f"{_BLOCK}.attention.self.{name}.bias")
            for name in ("query", "value")
        ),
        Row(f"{_TIMM}.attn.logit_scale", f"{_BLOCK}.attention.self.logit_scale"),
        Row(
            f"{_TIMM}.attn.cpb_mlp.{{n}}",
            f"{_BLOCK}.attention.self.continuous_position_bias_mlp.{{n}}",
        ),
        *_others(hub=False),
    ),
    timm_models=("swinv2_*",),
    transformers={"swinv2": "swinv2"},
    presets=PRESETS,
)
