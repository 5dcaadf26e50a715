"""Checkpoints and adapters of transformers on tfimm, and those of tfimm in transformers."""

import numpy as np
import pytest
from tfimm.architectures.swin import SwinTransformer, SwinTransformerConfig
from tfimm.architectures.vit import ViT, ViTConfig

import tfimm_lora as lora
from tests.helpers.selection import nightly_except


def vit(name, **fields):
    config = ViTConfig(
        name=name,
        nb_classes=5,
        input_size=(32, 32),
        patch_size=8,
        embed_dim=32,
        nb_blocks=2,
        nb_heads=4,
        mlp_ratio=2.0,
        **fields,
    )
    return ViT(config)


def swin():
    config = SwinTransformerConfig(
        name="swin_tiny_patch4_window7_224",
        nb_classes=5,
        input_size=(64, 64),
        patch_size=4,
        embed_dim=16,
        nb_blocks=(2, 2),
        nb_heads=(2, 4),
        window_size=4,
        mlp_ratio=2.0,
    )
    return SwinTransformer(config)


MODELS = {
    "vit": lambda: vit("vit_tiny_patch16_224"),
    "deit_distilled": lambda: vit("deit_tiny_distilled_patch16_224", distilled=True),
    "swin": swin,
}


def run(model, pixels):
    """The logits; the mean of those of two classifiers, as in transformers."""
    logits = model(np.moveaxis(pixels, 1, -1), training=False).numpy()
    return logits.mean(axis=1) if logits.ndim == 3 else logits


def assert_close(value, wanted):
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", nightly_except(MODELS, ["vit"]))
def test_adapters_both_ways(hugging_face, name, tmp_path):
    model = MODELS[name]()
    model(model.dummy_inputs)
    lora.load_timm_weights(model, hugging_face.base(name))
    pixels, outputs = hugging_face.batch(name)["pixel_values"], hugging_face.outputs(name)
    assert_close(run(model, pixels), outputs["base"])
    folders, wanted = [], []
    # "features" is for a bare backbone, whose outputs are not logits.
    for adapter in [x for x in hugging_face.models[name]["adapters"] if x != "features"]:
        lora.load_adapter(model, hugging_face.adapter(name, adapter))
        wanted.append(run(model, pixels))
        assert_close(wanted[-1], outputs[adapter])
        folders.append(tmp_path / adapter)
        dialect = f"v{hugging_face.version}"
        lora.save_adapter(model, folders[-1], names="transformers", dialect=dialect)
    for read, value in zip(hugging_face.check(name, folders, tmp_path), wanted):
        assert_close(read, value)


def test_adapter_of_a_bare_backbone(hugging_face):
    """Its names have no prefix."""
    model = MODELS["vit"]()
    model(model.dummy_inputs)
    lora.load_timm_weights(model, hugging_face.base("vit"))
    lora.load_adapter(model, hugging_face.adapter("vit", "features"))
    assert set(lora.adapter_of(model).layers) == {f"blocks.{i}.attn.qkv" for i in range(2)}
