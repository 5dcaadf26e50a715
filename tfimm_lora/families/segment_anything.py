"""Segment Anything: the projections of attention and the MLP of the image encoder.

Source: Kirillov et al., "Segment Anything", arXiv:2304.02643.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

#: The targets in tfimm.
PRESETS = {
    "default": r"image_encoder/blocks/\d+/(attn/(qkv|proj)|mlp/lin[12])",
    "attention": r"image_encoder/blocks/\d+/attn/(qkv|proj)",
    "mlp": r"image_encoder/blocks/\d+/mlp/lin[12]",
}

_HUB = "windowed_transformer_encoder"
_ATTENTION = "multi_head_attention_with_relative_pe"
_POSITIONS = f"{_ATTENTION}.add_relative_positional_embedding"


def _block(timm: str, transformers: str, hub: str) -> tuple[Row, ...]:
    name = f"layers.{{i}}.{transformers}"
    return (
        # The name of the first layer of a class has no number.
        Row(f"blocks.0.{timm}", name.replace("{i}", "0"), None, f"{_HUB}.{hub}"),
        Row(f"blocks.{{i}}.{timm}", name, None, f"{_HUB}_{{i}}.{hub}"),
    )


SEGMENT_ANYTHING = Family(
    "Segment Anything",
    "arXiv:2304.02643",
    (
        Row("pos_embed", "pos_embed", None, "add_positional_embedding.pos_embed"),
        Row(
            "patch_embed.proj",
            "patch_embed.projection",
            None,
            "vi_t_det_patching_and_embedding.conv2d",
        ),
        *_block("norm1", "layer_norm1", "layer_normalization"),
        *_block("attn.qkv", "attn.qkv", f"{_ATTENTION}.dense"),
        *_block("attn.proj", "attn.proj", f"{_ATTENTION}.dense_1"),
        *_block("attn.rel_pos_h", "attn.rel_pos_h", f"{_POSITIONS}.rel_pos_h"),
        *_block("attn.rel_pos_w", "attn.rel_pos_w", f"{_POSITIONS}.rel_pos_w"),
        *_block("norm2", "layer_norm2", "layer_normalization_1"),
        *_block("mlp.fc1", "mlp.lin1", "mlp.dense"),
        *_block("mlp.fc2", "mlp.lin2", "mlp.dense_1"),
        Row("neck.0", "neck.conv1", None, "sequential.conv2d"),
        Row("neck.1", "neck.layer_norm1", None, "sequential.layer_normalization"),
        Row("neck.2", "neck.conv2", None, "sequential.conv2d_1"),
        Row("neck.3", "neck.layer_norm2", None, "sequential.layer_normalization_1"),
    ),
    timm_models=("samvit_*",),
    keras_hub=("ViTDetBackbone",),
    transformers={"sam": "vision_encoder"},
    presets={
        "attention": ("attn/qkv", "attn/proj"),
        "mlp": ("mlp/fc1", "mlp/fc2"),
    },
)
