"""Small models of every kind, each with what the contract needs to know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.helpers.kerases import LEGACY, keras, normal

layers = keras.layers
register = keras.saving.register_keras_serializable(package="tests")


@dataclass
class Model:
    """How to make a model (the same every time), and what it is like."""

    name: str
    make: Callable[[], Any]
    input_shape: tuple[int, ...]
    classes: int
    rebuildable: bool
    """Whether Keras can load a LoRA version of it from a whole-model file."""
    copyable: bool = True

    def inputs(self, n=4, seed=0):
        return normal(n, *self.input_shape, seed=seed)

    def labels(self, n=4):
        return np.arange(n) % self.classes


def functional():
    """Convolutions of several kinds, batch normalisation, a residual."""
    x = entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(x)
    x = layers.BatchNormalization(name="bn1")(x)
    x = y = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="dw")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.Conv2D(6, 1, name="pw")(x)
    x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.1)(x)
    x = layers.Dense(10, activation="relu", name="hidden")(x)
    x = layers.Dense(3, name="out")(x)
    return keras.Model(entry, layers.Activation("linear")(x), name="functional")


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, strides=2),
            layers.LayerNormalization(),
            layers.Flatten(),
            layers.Dense(7, activation="tanh"),
            layers.Dense(3),
        ],
        name="sequential",
    )


def nested():
    """Models in models, and one used twice."""
    entry = keras.Input((6,))
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, name="inner"), layers.LayerNormalization()],
        name="inner_model",
    )
    block = keras.Model(entry, inner(layers.Dense(6, name="first")(entry)), name="block")
    x = outer = keras.Input((6,))
    x = block(block(x))
    return keras.Model(outer, layers.Dense(4, name="head")(x), name="nested")


@register
class Block(layers.Layer):
    """Layers in a list and in a dict, a weight of its own, attention inside."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.parts = [layers.Dense(width, name=f"fc{i}") for i in range(2)]
        self.named = {"key/one": layers.Dense(width, name="in_dict")}
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.gamma = self.add_weight(name="gamma", shape=(self.width,), initializer="ones")
        super().build(shape)

    def call(self, x):
        for part in self.parts:
            x = x + keras.activations.tanh(part(x))
        x = x + self.attention(self.norm(x), self.norm(x))
        return self.named["key/one"](x) * self.gamma

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@register
class Subclassed(keras.Model):
    """A subclassed model with a weight of its own and batch normalisation."""

    def __init__(self, width=6, classes=3, **kwargs):
        super().__init__(**kwargs)
        self.width, self.classes = width, classes
        self.blocks = [Block(width, name=f"block{i}") for i in range(2)]
        self.norm = layers.BatchNormalization(name="bn")
        self.head = layers.Dense(classes, name="head")

    def build(self, shape):
        self.token = self.add_weight(name="token", shape=(1, 1, self.width), initializer="ones")
        super().build(shape)

    def call(self, x, training=False):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        x = self.norm(x, training=training)
        return self.head(x[:, 0])

    def get_config(self):
        return {"width": self.width, "classes": self.classes, "name": self.name}


def subclassed():
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 5, 6), "float32"))
    return model


def attention():
    """A functional model with attention in it."""
    entry = keras.Input((5, 6))
    x = layers.MultiHeadAttention(2, 4, name="attention")(entry, entry)
    x = layers.Dense(6, name="fc")(x)
    return keras.Model(entry, layers.Dense(3, name="head")(layers.Flatten()(x)))


GENERIC = [
    Model("functional", functional, (8, 8, 3), 3, True),
    Model("sequential", sequential, (8, 8, 3), 3, True),
    Model("nested", nested, (6,), 4, True),
    Model("subclassed", subclassed, (5, 6), 3, False),
    Model("attention", attention, (5, 6), 3, False),
]


def _convnext():
    from tfimm.architectures.convnext import ConvNeXt, ConvNeXtConfig

    cfg = ConvNeXtConfig(
        name="convnext",
        url="",
        nb_classes=3,
        input_size=(32, 32),
        embed_dim=(8, 8, 12, 16),
        nb_blocks=(1, 1, 2, 1),
        init_scale=1.0,  # the default 1e-6 hides every effect of the blocks
    )
    model = ConvNeXt(cfg)
    model(model.dummy_inputs)
    return model


def _vit():
    from tfimm.architectures.vit import ViT, ViTConfig

    cfg = ViTConfig(
        name="vit",
        url="",
        nb_classes=3,
        input_size=(16, 16),
        patch_size=8,
        embed_dim=8,
        nb_blocks=2,
        nb_heads=2,
    )
    model = ViT(cfg)
    model(model.dummy_inputs)
    for own in (model.cls_token, model.pos_embed):
        own.assign(normal(*own.shape, seed=1) * 0.5)
    return model


TFIMM = [
    Model("convnext", _convnext, (32, 32, 3), 3, False),
    Model("vit", _vit, (16, 16, 3), 3, False),
]


def _application(name, size=32, variance=None, **kwargs):
    def make():
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classes=3, **kwargs
        )
        for layer in model.layers:
            if type(layer).__name__ == "LayerScale":
                # Its initial value of 1e-6 hides every effect of the blocks.
                layer.gamma.assign(np.ones(layer.gamma.shape))
        for layer in model.layers if variance else []:
            if hasattr(layer, "moving_variance"):
                # Untrained, its signal dies out over the layers in inference mode.
                layer.moving_variance.assign(np.full(layer.moving_variance.shape, variance))
        return model

    return make


def _hub_vit():
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=(8, 8),
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    return keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=3)


APPLICATIONS = [
    Model(
        "MobileNetV2",
        _application("MobileNetV2", variance=0.2, alpha=0.35),
        (32, 32, 3),
        3,
        True,
    ),
    Model("ResNet50", _application("ResNet50"), (32, 32, 3), 3, True),
    Model("ConvNeXtTiny", _application("ConvNeXtTiny"), (32, 32, 3), 3, True),
    Model("keras_hub_vit", _hub_vit, (16, 16, 3), 3, False),
]

MODELS = GENERIC + (TFIMM if LEGACY else [])
IDS = [model.name for model in MODELS]
