"""Checkpoints and adapters of transformers' convolutional models, in models of tfimm."""

import dataclasses

import numpy as np
import pytest
import tfimm

import tfimm_lora as lora
from tests.helpers.selection import nightly_except

#: transformers' model in hugging_face.models -> the same model in tfimm.
MODELS = {
    "convnext": (
        "convnext_tiny",
        dict(embed_dim=(8, 16, 24, 32), nb_blocks=(1, 1, 2, 1)),
    ),
    "resnet": (
        "resnet50",
        dict(nb_blocks=(2, 1, 1, 1), nb_channels=(64, 16, 24, 32)),
    ),
    # The small EfficientNet is left out: where a narrow stage has as many inputs as outputs,
    # only tfimm adds a shortcut.
    "mobilenet_v2": (
        "mobilenet_v2_100",
        dict(
            channel_multiplier=0.35,
            stem_size=16,
            padding="symmetric",
            norm_layer="batch_norm_tf",
        ),
    ),
}

#: The largest relative difference of the logits.
TOLERANCE = {"convnext": 1e-5, "resnet": 1e-5, "mobilenet_v2": 5e-5}


def tfimm_model(name, classes, size):
    name, changes = MODELS[name]
    cfg = tfimm.models.model_config(name)
    cfg = dataclasses.replace(cfg, nb_classes=classes, input_size=(size, size), **changes)
    model = tfimm.models.model_class(name)(cfg)
    model(model.dummy_inputs)
    return model


@pytest.mark.parametrize("name", nightly_except(MODELS, ["convnext"]))
def test_logits_are_those_of_transformers(hugging_face, name):
    outputs = hugging_face.outputs(name)
    pixels = hugging_face.batch(name)["pixel_values"].transpose(0, 2, 3, 1)
    model = tfimm_model(name, outputs["base"].shape[-1], pixels.shape[1])
    lora.load_timm_weights(model, hugging_face.base(name) / "model.safetensors")
    _assert_close(model(pixels), outputs["base"], TOLERANCE[name])
    for adapter in hugging_face.models[name]["adapters"]:
        if adapter == "features":
            continue
        lora.load_adapter(model, hugging_face.adapter(name, adapter))
        _assert_close(model(pixels), outputs[adapter], TOLERANCE[name])
        lora.remove_lora(model)
        lora.load_timm_weights(model, hugging_face.base(name) / "model.safetensors")


def _assert_close(logits, expected, tolerance):
    error = np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()
    assert error < tolerance
