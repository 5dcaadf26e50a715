"""DINOv2, also with registers and with SwiGLU: the projections of attention and the MLP.

With registers, timm's position embedding has no row for the class token, whose value is added
to the class token itself. The shapes differ, so only timm's weights fit timm's models.

transformers' classifier has twice the inputs of timm's: the class token and the mean of the
patches.

Source: Oquab et al., "DINOv2", arXiv:2304.07193; Darcet et al., "Vision Transformers Need
Registers", arXiv:2309.16588.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row
from tfimm_lora.families.vit import PRESETS

_LAYER, _HUB = "encoder.layer.{i}", "encoder.layers_{i}"


def _rows(swiglu: bool) -> tuple[Row, ...]:
    """The table. The two layers of the MLP are called otherwise with SwiGLU."""
    first, second = ("weights_in", "weights_out") if swiglu else ("fc1", "fc2")

    def same(timm: str, name: str) -> Row:
        return Row(f"blocks.{{i}}.{timm}", f"{_LAYER}.{name}", None, f"{_HUB}.{name}")

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
        Row(
            "pos_embed",
            "embeddings.position_embeddings",
            None,
            "embeddings.position_embeddings",
        ),
        # Resized to the images of the model, from the position embeddings.
        Row(
            "pos_embed_resized",
            keras_hub="embeddings.interpolated_position_embeddings",
            in_timm=False,
        ),
        Row(
            "patch_embed.proj",
            "embeddings.patch_embeddings.projection",
            None,
            "embeddings.patch_embeddings.projection",
        ),
        same("norm1", "norm1"),
        *(
            Row(
                f"blocks.{{i}}.attn.qkv[{name[0]}]",
                f"{_LAYER}.attention.attention.{name}",
                f"{_LAYER}.attention.{name[0]}_proj",
                f"{_HUB}.attention.attention.{name}",
            )
            for name in ("query", "key", "value")
        ),
        Row(
            "blocks.{i}.attn.proj",
            f"{_LAYER}.attention.output.dense",
            f"{_LAYER}.attention.o_proj",
            f"{_HUB}.attention.attention.attention_output",
        ),
        same("ls1.gamma", "layer_scale1.lambda1"),
        same("norm2", "norm2"),
        same("mlp.fc1", f"mlp.{first}"),
        same("mlp.fc2", f"mlp.{second}"),
        same("ls2.gamma", "layer_scale2.lambda1"),
        Row("norm", "layernorm", None, "layernorm"),
        Row("head", "/classifier", None, "/predictions"),
    )


def _family(name: str, timm_model: str, backbone: str, *needs: str) -> Family:
    return Family(
        name,
        "arXiv:2309.16588" if "num_register_tokens" in needs else "arXiv:2304.07193",
        _rows("use_swiglu_ffn" in needs),
        timm_models=(timm_model,),
        keras_hub=("DINOV2Backbone",),
        needs=needs,
        transformers={backbone: backbone},
        presets=PRESETS,
        patch_positions="num_register_tokens" in needs,
    )


_REGISTERS, _SWIGLU = "num_register_tokens", "use_swiglu_ffn"
_WITH_REGISTERS = "dinov2_with_registers"

DINOV2 = _family("DINOv2", "vit_*_dinov2", "dinov2")
DINOV2_REGISTERS = _family(
    "DINOv2 with registers", "vit_*_reg4_dinov2", _WITH_REGISTERS, _REGISTERS
)
DINOV2_GIANT = _family("DINOv2 with SwiGLU", "vit_giant_*_dinov2", "dinov2", _SWIGLU)
DINOV2_GIANT_REGISTERS = _family(
    "DINOv2 with SwiGLU and registers",
    "vit_giant_*_reg4_dinov2",
    _WITH_REGISTERS,
    _REGISTERS,
    _SWIGLU,
)
