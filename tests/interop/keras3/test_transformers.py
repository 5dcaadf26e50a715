"""Checkpoints and adapters of real transformers and PEFT on models of Keras 3."""

import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import keras, run
from tfimm_lora.model.new_classifier import with_classifier
from tfimm_lora.zoo.keras3_models import convnext, deit

hub = pytest.importorskip("keras_hub").models

#: With a classifier, rsLoRA and biases, DoRA on query and value, a bias of the branch, other
#: ranks and scales for each of query, key and value, and convolutions.
ADAPTERS = ("classifier", "rslora_bias", "dora", "lora_bias", "patterns", "convolutions")


def shape(config):
    return (config["image_size"], config["image_size"], 3)


def vit(config, classes):
    backbone = hub.ViTBackbone(
        image_shape=shape(config),
        patch_size=config["patch_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        layer_norm_epsilon=config["layer_norm_eps"],
    )
    return hub.ViTImageClassifier(backbone=backbone, num_classes=classes)


def deit_distilled(config, classes):
    arguments = dict(
        patch_size=config["patch_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        epsilon=config["layer_norm_eps"],
    )
    return deit.build(keras, arguments, classes, shape(config))


def swin(config, classes):
    backbone = hub.SwinTransformerBackbone(
        image_shape=shape(config),
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        drop_path_rate=0.0,
    )
    return hub.SwinTransformerImageClassifier(backbone=backbone, num_classes=classes)


def dinov2(config, classes):
    backbone = hub.DINOV2Backbone(
        config["patch_size"],
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        image_shape=shape(config),
        position_embedding_shape=shape(config)[:2],
    )
    return with_classifier(backbone, classes)


def convnext_tiny(config, classes):
    arguments = dict(depths=config["depths"], projection_dims=config["hidden_sizes"])
    return convnext.build(keras, arguments, classes, shape(config))


def segformer(config, classes):
    backbone = hub.MiTBackbone(
        layerwise_depths=config["depths"],
        num_layers=len(config["depths"]),
        layerwise_num_heads=config["num_attention_heads"],
        layerwise_sr_ratios=config["sr_ratios"],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=config["patch_sizes"],
        layerwise_strides=config["strides"],
        hidden_dims=config["hidden_sizes"],
        image_shape=(64, 64, 3),
    )
    return hub.MiTImageClassifier(backbone=backbone, num_classes=classes)


#: Model of the fixture -> the model of Keras, and the tolerance. keras_hub's MiT has the
#: approximate GELU, transformers' SegFormer the exact one.
MODELS = {
    "vit": (vit, 1e-5),
    "deit_distilled": (deit_distilled, 1e-5),
    "swin": (swin, 1e-5),
    "dinov2": (dinov2, 1e-5),
    "convnext": (convnext_tiny, 1e-5),
    "segformer": (segformer, 1e-3),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name, hugging_face):
    make, tolerance = MODELS[name]
    config = json.loads((hugging_face.base(name) / "config.json").read_text())
    model = make(config, len(config["id2label"]))
    lora.load_timm_weights(model, hugging_face.base(name))
    x = hugging_face.batch(name)["pixel_values"].transpose(0, 2, 3, 1)
    outputs, base = hugging_face.outputs(name), run(model, x)
    assert np.abs(base - outputs["base"]).max() < tolerance * np.abs(outputs["base"]).max()
    adapters = [x for x in ADAPTERS if x in hugging_face.models[name]["adapters"]]
    assert len(adapters) >= 3
    for adapter in adapters:
        lora.load_adapter(model, hugging_face.adapter(name, adapter))
        wanted, found = outputs[adapter], run(model, x)
        assert np.abs(wanted - base).max() > 100 * tolerance * np.abs(wanted).max()
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max(), adapter
