"""MiT and SegFormer: the projections of attention and the MLP.

timm has neither: PVTv2 has the same blocks, but a padding, normalizations and an order of
stages of its own. The first column is in the style of timm's PVTv2.

Source: Xie et al., "SegFormer", arXiv:2105.15203.
"""

from __future__ import annotations

from tfimm_lora.families.family import Family, Row

PRESETS = {
    "attention": ("attn/q", "attn/k", "attn/v", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}

_ATTENTION = "seg_former_multihead_attention"


def _backbone(inside: str) -> tuple[Row, ...]:
    """The rows of MiT.

    Args:
        inside: The layer of keras_hub that holds it, with a dot at the end.
    """

    def stage(timm: str, v4: str, v5: str, hub: str) -> Row:
        return Row(f"stages.{timm}", v4, f"stages.{v5}", f"{inside}{hub}", in_timm=False)

    def block(timm: str, v4: str, v5: str, hub: str) -> Row:
        return stage(
            f"{{s}}.blocks.{{b}}.{timm}",
            f"encoder.block.{{s}}.{{b}}.{v4}",
            f"{{s}}.blocks.{{b}}.{v5}",
            f"hierarchical_encoder_{{s}}_{{b}}.{hub}",
        )

    def patches(name: str, v4: str, hub: str) -> Row:
        return stage(
            f"{{s}}.patch_embed.{name}",
            f"encoder.patch_embeddings.{{s}}.{v4}",
            f"{{s}}.patch_embeddings.{v4}",
            f"patch_and_embed_{{s}}.{hub}",
        )

    norm, reduction = "layer_normalization", "attention.sequence_reduction"
    return (
        patches("proj", "proj", "conv2d"),
        patches("norm", "layer_norm", norm),
        block("norm1", "layer_norm_1", "layernorm_before", norm),
        *(
            block(
                f"attn.{name[0]}",
                f"attention.self.{name}",
                f"attention.{name[0]}_proj",
                f"{_ATTENTION}.{hub}",
            )
            for name, hub in (("query", "dense"), ("key", "dense_1"), ("value", "dense_2"))
        ),
        block(
            "attn.proj",
            "attention.output.dense",
            "attention.o_proj",
            f"{_ATTENTION}.dense_3",
        ),
        block(
            "attn.sr",
            "attention.self.sr",
            f"{reduction}.sequence_reduction",
            f"{_ATTENTION}.conv2d",
        ),
        block(
            "attn.norm",
            "attention.self.layer_norm",
            f"{reduction}.layer_norm",
            f"{_ATTENTION}.{norm}",
        ),
        block("norm2", "layer_norm_2", "layernorm_after", f"{norm}_1"),
        block("mlp.fc1", "mlp.dense1", "mlp.fc1", "mix_ffn.dense"),
        block(
            "mlp.dwconv",
            "mlp.dwconv.dwconv",
            "mlp.dwconv.dwconv",
            "mix_ffn.depthwise_conv2d",
        ),
        block("mlp.fc2", "mlp.dense2", "mlp.fc2", "mix_ffn.dense_1"),
        # The name of the first layer of a class has no number.
        stage("0.norm", "encoder.layer_norm.0", "0.layer_norm", norm),
        stage("{s}.norm", "encoder.layer_norm.{s}", "{s}.layer_norm", f"{norm}_{{s}}"),
    )


def _head(name: str, v4: str, v5: str | None, hub: str) -> Row:
    """A row of SegFormer's decoder. In keras_hub it is in its backbone."""
    return Row(
        f"decode_head.{name}",
        f"/decode_head.{v4}",
        None if v5 is None else f"/decode_head.{v5}",
        hub,
        in_timm=False,
    )


MIT = Family(
    "MiT",
    "arXiv:2105.15203",
    (
        *_backbone(""),
        Row("head", "/classifier", None, "/predictions", in_timm=False),
    ),
    keras_hub=("MiTBackbone",),
    transformers={"segformer": "segformer"},
    presets=PRESETS,
)

SEGFORMER = Family(
    "SegFormer",
    "arXiv:2105.15203",
    (
        *_backbone("functional."),
        _head("linear_c.{s}", "linear_c.{s}.proj", "linear_projections.{s}.proj", "linear_{s}"),
        _head("linear_fuse", "linear_fuse", None, "sequential.conv2d"),
        _head("batch_norm", "batch_norm", None, "sequential.batch_normalization"),
        _head("classifier", "classifier", None, "/conv2d"),
    ),
    keras_hub=("SegFormerBackbone",),
    numbered=("linear_{s}",),
    transformers={"segformer": "segformer"},
    presets=PRESETS,
)
