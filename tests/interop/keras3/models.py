"""Models of Keras 3 of the shapes in configs of transformers, with the same names."""

import keras
from keras_hub import models as hub

from tfimm_lora.model.new_classifier import with_classifier
from tfimm_lora.zoo.keras3_models import deit
from tfimm_lora.zoo.keras3_models.build import build
from tfimm_lora.zoo.keras3_models.transformers_models import of_transformers


def shape(config):
    return (config["image_size"], config["image_size"], 3)


def sizes(config):
    """The sizes of a ViT or DeiT, as keras_hub names them."""
    return dict(
        patch_size=config["patch_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
    )


def vit(config, classes):
    backbone = hub.ViTBackbone(
        image_shape=shape(config), layer_norm_epsilon=config["layer_norm_eps"], **sizes(config)
    )
    return hub.ViTImageClassifier(backbone=backbone, num_classes=classes)


def deit_distilled(config, classes):
    arguments = dict(epsilon=config["layer_norm_eps"], **sizes(config))
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


def _encoder(cls, config):
    arguments = sizes(config)
    arguments["intermediate_dim"] = arguments.pop("mlp_dim")
    return cls(image_shape=shape(config), **arguments)


def clip(config):
    """The image encoder alone, whose last layer is the last normalization."""
    return _encoder(hub.CLIPVisionEncoder, config)


def siglip(config):
    """The image encoder alone, whose last layers are a normalization and the pooling."""
    return _encoder(hub.SigLIPVisionEncoder, config)


def converted(config, classes):
    """A model that this package converts."""
    return build(of_transformers("model", config), classes=classes, input_size=(64, 64))[0]


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
