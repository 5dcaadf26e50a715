"""Checkpoints in the names of timm and transformers, written and read on either Keras."""

import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, keras, normal

safetensors = pytest.importorskip("safetensors.numpy")


def vit():
    """A small ViT with random weights that are not zero, of tfimm or keras_hub."""
    if LEGACY:
        import tfimm

        cfg = tfimm.models.model_config("vit_tiny_patch16_224")
        small = dict(input_size=(32, 32), nb_classes=3, embed_dim=8, nb_blocks=2, nb_heads=2)
        model = type(cfg).__name__ and tfimm.models.model_class("vit_tiny_patch16_224")(
            type(cfg)(**{**cfg.__dict__, **small})
        )
        model(model.dummy_inputs)
    else:
        hub = pytest.importorskip("keras_hub").models
        backbone = hub.ViTBackbone(
            image_shape=(32, 32, 3),
            patch_size=16,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=32,
        )
        model = hub.ViTImageClassifier(backbone=backbone, num_classes=3)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(0.1, 0.5, size=variable.shape))
    return model


def outputs(model):
    return np.array(keras.ops.convert_to_numpy(model(x)) if not LEGACY else model(x))


class Config:
    """The preprocessing of a model."""

    mean, std, in_channels = (0.5,) * 3, (0.5,) * 3, 3


x = normal(2, 32, 32, 3)


@pytest.mark.parametrize("names", ["timm", "transformers"])
def test_weights_come_back(names, tmp_path):
    model = vit()
    expected = outputs(model)
    lora.save_timm_weights(model, tmp_path, names=names)
    other = vit()
    for variable in other.weights:
        variable.assign(np.zeros(variable.shape))
    lora.load_timm_weights(other, tmp_path)
    np.testing.assert_array_equal(outputs(other), expected)


def test_timm_names_and_shapes(tmp_path):
    """As timm 1.0 writes them for vit_tiny_patch16_224 of these sizes."""
    lora.save_timm_weights(vit(), tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    shapes = {key: value.shape for key, value in tensors.items()}
    assert shapes["cls_token"] == (1, 1, 8)
    assert shapes["pos_embed"] == (1, 5, 8)
    assert shapes["patch_embed.proj.weight"] == (8, 3, 16, 16)
    assert shapes["blocks.1.attn.qkv.weight"] == (24, 8)
    assert shapes["blocks.1.attn.qkv.bias"] == (24,)
    assert shapes["blocks.1.attn.proj.weight"] == (8, 8)
    assert shapes["blocks.0.mlp.fc1.weight"] == (32, 8)
    assert shapes["norm.weight"] == shapes["blocks.0.norm2.bias"] == (8,)
    assert shapes["head.weight"] == (3, 8)
    assert len(shapes) == 4 + 12 * 2 + 4


def test_transformers_has_the_blocks_of_the_projection_apart(tmp_path):
    model = vit()
    lora.save_timm_weights(model, tmp_path / "timm")
    lora.save_timm_weights(model, tmp_path / "transformers", names="transformers")
    timm, other = (
        safetensors.load_file(tmp_path / name / "model.safetensors")
        for name in ("timm", "transformers")
    )
    attention = "vit.encoder.layer.1.attention.attention"
    for index, block in enumerate(("query", "key", "value")):
        for leaf in ("weight", "bias"):
            rows = np.split(timm[f"blocks.1.attn.qkv.{leaf}"], 3)[index]
            np.testing.assert_array_equal(other[f"{attention}.{block}.{leaf}"], rows)
    np.testing.assert_array_equal(other["classifier.weight"], timm["head.weight"])


def test_config_of_transformers_sets_labels(tmp_path):
    model = vit()
    lora.save_timm_weights(model, tmp_path, names="transformers")
    config = {"model_type": "vit", "id2label": {"2": "cat", "0": "ant", "1": "bee"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora.load_timm_weights(model, tmp_path)
    assert lora.class_names(model) == ("ant", "bee", "cat")


@pytest.mark.skipif(LEGACY, reason="of keras_hub and Keras 3's layers")
def test_shapes_are_those_of_timm(tmp_path):
    """A convolution of keras.applications that is linear in timm, and DINOv2's positions."""
    model = keras.applications.MobileNetV3Small(
        weights=None, input_shape=(32, 32, 3), classes=3, include_preprocessing=False
    )
    lora.save_timm_weights(model, tmp_path / "mobilenet")
    tensors = safetensors.load_file(tmp_path / "mobilenet" / "model.safetensors")
    assert tensors["classifier.weight"].shape == (3, 1024)
    assert tensors["conv_head.weight"].shape == (1024, 576, 1, 1)
    hub = pytest.importorskip("keras_hub").models
    for registers in (0, 4):
        folder = tmp_path / str(registers)
        backbone = hub.DINOV2Backbone(
            *(8, 1, 16, 2, 32),
            num_register_tokens=registers,
            image_shape=(32, 32, 3),
            position_embedding_shape=(32, 32),
        )
        lora.save_timm_weights(backbone, folder)
        tensors = safetensors.load_file(folder / "model.safetensors")
        # Beside registers, timm adds no position to the class token.
        assert tensors["pos_embed"].shape == (1, 16 if registers else 17, 16)
        assert not {"mask_token", "pos_embed_resized"} & tensors.keys()
        lora.load_timm_weights(backbone, folder)


def test_path_must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        lora.save_timm_weights(vit(), tmp_path / "file")


def test_merged_copy_keeps_config_and_labels(tmp_path):
    model = vit()
    model.cfg = getattr(model, "cfg", None) or Config()
    config = {"model_type": "vit", "id2label": {"2": "cat", "0": "ant", "1": "bee"}}
    lora.save_timm_weights(model, tmp_path, names="transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    lora.load_timm_weights(model, tmp_path)
    regular = lora.convert_to_regular_model(lora.convert_to_lora_model(model, lora_rank=2))
    assert lora.class_names(regular) == ("ant", "bee", "cat")
    assert lora.create_preprocessing(regular) is not None


def test_model_with_lora_is_refused(tmp_path):
    model = lora.inject_lora(vit(), lora_rank=2)
    with pytest.raises(ValueError, match="which has LoRA.*convert_to_regular_model"):
        lora.save_timm_weights(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_of_no_family_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="no family whose names"):
        lora.save_timm_weights(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
