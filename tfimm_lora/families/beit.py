"""BEiT: the names of transformers and timm; Keras has no such model.

The names are recognized in messages, and adapters are converted between the two libraries.

Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv:2106.08254.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row
from tfimm_lora.families.vit import PRESETS, block

_V4, _V5 = "encoder.layer.{i}", "layers.{i}"
_TABLE = "relative_position_bias_table"

BEIT = Family(
    "BEiT",
    "arXiv:2106.08254",
    (
        Row("cls_token", "embeddings.cls_token"),
        Row("mask_token", "embeddings.mask_token", in_timm=False),
        Row("pos_embed", "embeddings.position_embeddings"),
        Row("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *block(),
        # The key has no bias.
        *(
            Row(
                f"blocks.{{i}}.attn.{name[0]}_bias",
                f"{_V4}.attention.attention.{name}.bias",
                f"{_V5}.attention.{name[0]}_proj.bias",
            )
            for name in ("query", "value")
        ),
        Row(
            f"blocks.{{i}}.attn.{_TABLE}",
            f"{_V4}.attention.attention.relative_position_bias.{_TABLE}",
            f"{_V5}.relative_position_bias.{_TABLE}",
        ),
        Row("blocks.{i}.gamma_1", f"{_V4}.lambda_1", f"{_V5}.lambda_1"),
        Row("blocks.{i}.gamma_2", f"{_V4}.lambda_2", f"{_V5}.lambda_2"),
        Row("fc_norm", "pooler.layernorm"),
        Row("head", "/classifier"),
    ),
    timm_models=("beit_*", "beitv2_*"),
    transformers={"beit": "beit"},
    presets=PRESETS,
)
