"""Models of Keras 3 that are those of tfimm, or as near as Keras has them."""

import re

import keras
from keras import layers

#: Name -> pattern of the names of the layers that are adapted, as for tfimm's models.
_APPLICATIONS = {
    "ResNet50": r"conv\d_block\d+_[123]_conv",
    "EfficientNetB0": r"block.*_(expand|project)_conv|top_conv",
    "ConvNeXtTiny": r".*_pointwise_conv_[12]",
}


def build(name, small):
    """A model with random weights that gives logits, and the names of adapted layers."""
    if name.startswith("vit"):
        pattern = r"block\d+_(qkv|proj|fc1|fc2)"
        sizes = {"vit_tiny": (192, 3), "vit_base": (768, 12)}[name]
        net = vit(*sizes, blocks=1 if small else 12, size=32 if small else 224)
    else:
        pattern = _APPLICATIONS[name]
        make = getattr(keras.applications, name)
        size = (32 if small else 224,) * 2
        net = make(weights=None, input_shape=(*size, 3), classifier_activation=None)
    return net, [layer.name for layer in net.layers if re.fullmatch(pattern, layer.name)]


def vit(width, heads, blocks, size, patch=16, classes=1000):
    """A vision transformer of Keras' own layers."""
    inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(width, patch, strides=patch, name="patches")(inputs)
    x = layers.Reshape((-1, width))(x)
    x = _Tokens()(x)
    for i in range(blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(3 * width, name=f"block{i}_qkv")(y)
        y = _Attention(heads)(y)
        x = x + layers.Dense(width, name=f"block{i}_proj")(y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(4 * width, activation="gelu", name=f"block{i}_fc1")(y)
        x = x + layers.Dense(width, name=f"block{i}_fc2")(y)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x[:, 0]))


class _Tokens(layers.Layer):
    """Puts the class token before the patches and adds the positions."""

    def build(self, shape):
        _, patches, width = shape
        self.token = self.add_weight(shape=(1, 1, width))
        self.positions = self.add_weight(shape=(1, patches + 1, width))

    def call(self, x):
        token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, x.shape[-1]))
        return keras.ops.concatenate([token, x], axis=1) + self.positions


class _Attention(layers.Layer):
    """Attention of a fused projection."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def call(self, qkv):
        ops = keras.ops
        tokens, width = qkv.shape[1], qkv.shape[2] // 3
        split = ops.reshape(qkv, (-1, tokens, 3, self.heads, width // self.heads))
        q, k, v = ops.unstack(ops.transpose(split, (2, 0, 3, 1, 4)), axis=0)
        scores = ops.matmul(q, ops.swapaxes(k, 2, 3)) * (width // self.heads) ** -0.5
        y = ops.matmul(ops.softmax(scores), v)
        return ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (-1, tokens, width))
