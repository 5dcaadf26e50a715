"""PVTv2: the projections of attention and the MLP.

Source: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer",
arXiv:2106.13797.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {
    "attention": ("attn/q", "attn/kv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}


def _block(timm: str, name: str) -> Row:
    return Row(f"stages.{{s}}.blocks.{{b}}.{timm}", f"encoder.layers.{{s}}.blocks.{{b}}.{name}")


PVT_V2 = Family(
    "PVTv2",
    "arXiv:2106.13797",
    (
        # The first stage is called otherwise in timm.
        Row("patch_embed.proj", "encoder.layers.0.patch_embedding.proj"),
        Row("patch_embed.norm", "encoder.layers.0.patch_embedding.layer_norm"),
        Row("stages.{s}.downsample.proj", "encoder.layers.{s}.patch_embedding.proj"),
        Row("stages.{s}.downsample.norm", "encoder.layers.{s}.patch_embedding.layer_norm"),
        _block("norm1", "layer_norm_1"),
        _block("attn.q", "attention.query"),
        _block("attn.kv[k]", "attention.key"),
        _block("attn.kv[v]", "attention.value"),
        _block("attn.proj", "attention.proj"),
        _block("attn.sr", "attention.spatial_reduction"),
        _block("attn.norm", "attention.layer_norm"),
        _block("norm2", "layer_norm_2"),
        _block("mlp.fc1", "mlp.dense1"),
        _block("mlp.dwconv", "mlp.dwconv.dwconv"),
        _block("mlp.fc2", "mlp.dense2"),
        Row("stages.{s}.norm", "encoder.layers.{s}.layer_norm"),
        Row("head", "/classifier"),
    ),
    timm_models=("pvt_v2_*",),
    tfimm="PyramidVisionTransformerV2",
    transformers={"pvt_v2": "pvt_v2"},
    presets=PRESETS,
)
