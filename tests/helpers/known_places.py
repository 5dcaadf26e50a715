"""Pictures whose class is decided at one known place, and small models that learn them."""

import numpy as np

from tests.helpers.kerases import keras
from tfimm_lora.backend import default_backend

SIDE, SQUARE = 32, 8

layers = keras.layers


def pictures(n, seed):
    """Noise with a striped square: inputs, whether its stripes are horizontal, its corners."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (n, SIDE, SIDE, 1)).astype("float32")
    y = rng.integers(0, 2, n)
    corners = rng.integers(0, SIDE - SQUARE + 1, (n, 2))
    stripes = np.tile([[1.5], [-1.5]], (SQUARE // 2, SQUARE))
    for picture, horizontal, (top, left) in zip(x, y, corners):
        square = picture[top : top + SQUARE, left : left + SQUARE, 0]
        square += stripes if horizontal else stripes.T
    return x, y, corners


def masks(corners, margin=2):
    """Where the squares are, with a margin of half a place of the feature maps."""
    found = np.zeros((len(corners), SIDE, SIDE), bool)
    for mask, (top, left) in zip(found, corners):
        ends = top + SQUARE + margin, left + SQUARE + margin
        mask[max(0, top - margin) : ends[0], max(0, left - margin) : ends[1]] = True
    return found


def share_inside(maps, corners):
    """The share of each map that is inside its square."""
    total = maps.sum((1, 2))
    inside = (maps * masks(corners)).sum((1, 2))
    return np.divide(inside, total, out=np.zeros_like(total), where=total > 0)


def hits(maps, corners):
    """The share of maps whose maximum is inside the square."""
    places = maps.reshape(len(maps), -1).argmax(1)
    return masks(corners).reshape(len(maps), -1)[np.arange(len(maps)), places].mean()


def convolutional(end=None):
    x = entry = keras.Input((SIDE, SIDE, 1))
    for filters in (16, 24):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(24, 3, padding="same", activation="relu", name="features")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(entry, layers.Dense(2, activation=end, name="head")(x))


class WithClassToken(layers.Layer):
    """Tokens with a class token before them, and positions."""

    def build(self, shape):
        make = {"initializer": "normal", "trainable": True}
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token", **make)
        self.places = self.add_weight(shape=(1, shape[1] + 1, shape[-1]), name="at", **make)

    def call(self, x):
        tokens = self.token + 0 * x[:, :1]
        return default_backend().ops.concatenate([tokens, x], axis=1) + self.places


class ClassToken(layers.Layer):
    def call(self, x):
        return x[:, 0]


def transformer():
    """Two blocks of attention over 8 x 8 patches, whose class token is classified."""
    entry = keras.Input((SIDE, SIDE, 1))
    x = layers.Conv2D(32, 4, strides=4, name="patches")(entry)
    x = WithClassToken()(layers.Reshape((64, 32), name="tokens")(x))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 16)(y, y)])
        y = layers.Dense(64, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(32)(y)])
    x = ClassToken()(layers.LayerNormalization(name="last")(x))
    return keras.Model(entry, layers.Dense(2, name="head")(x))


def train(model, epochs, rate, from_logits=True, seed=0):
    x, y, _ = pictures(600, seed)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
    )
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)
    return model
