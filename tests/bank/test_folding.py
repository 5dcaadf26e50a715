"""Batch normalization after an adapted layer, which a mixed batch folds into its product."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.banks import assert_rows, outputs_alone, random_adapter
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal

layers = keras.layers
NAMES = ["a", None, "b", "a"]
OPTIONS = dict(name="layer", use_bias=False)


def norm(x, axis=-1):
    return layers.BatchNormalization(axis=axis, name="norm")(x)


class Rows(layers.Layer):
    """A dense layer with bias, and batch normalization, on the places of pictures as rows."""

    def __init__(self):
        super().__init__(name="rows")
        self.fc, self.norm = layers.Dense(2, name="layer"), layers.BatchNormalization()

    def call(self, x):
        if LEGACY:
            from tensorflow import reshape
        else:
            from keras.ops import reshape

        return reshape(self.norm(self.fc(reshape(x, (-1, 2)))), (-1, 8, 8, 2))


def conv(x, filters, window, **options):
    return layers.Conv2D(filters, window, **{**OPTIONS, **options})(x)


def depthwise(x, multiplier):
    return layers.DepthwiseConv2D(3, depth_multiplier=multiplier, **OPTIONS)(x)


def einsum(equation, shape):
    return lambda x: norm(layers.EinsumDense(equation, shape, name="layer")(x))


def used_twice(x):
    x = conv(x, 2, 1)
    return layers.Add()([norm(x), layers.Activation("tanh")(x)])


FOLLOWED = {
    "pointwise_effective": lambda x: norm(conv(x, 3, 1)),
    "pointwise_factored": lambda x: norm(conv(x, 64, 1)),
    "convolution": lambda x: norm(conv(x, 3, 3, strides=2)),
    "grouped": lambda x: norm(conv(x, 4, 3, groups=2)),
    "with_bias": lambda x: norm(conv(x, 3, 1, use_bias=True)),
    "with_activation": lambda x: norm(conv(x, 3, 1, activation="tanh")),
    "used_twice": used_twice,
    "depthwise": lambda x: norm(depthwise(x, 1)),
    "depthwise_multiplied": lambda x: norm(depthwise(x, 2)),
    "dense": lambda x: norm(layers.Dense(3, name="layer")(layers.Flatten()(x))),
    "dense_rows": lambda x: Rows()(x),
    "einsum": einsum("abcd,def->abcef", (8, 8, 2, 2)),
    "einsum_in_another_order": einsum("abcd,def->abcfe", (8, 8, 2, 2)),
}
if BACKEND in ("jax", "torch"):
    first = dict(data_format="channels_first")
    FOLLOWED["channels_first"] = lambda x: norm(conv(x, 3, 1, **first), axis=1)
    FOLLOWED["of_width"] = lambda x: norm(conv(x, 2, 1, **first))


@pytest.mark.backends
@pytest.mark.parametrize("name", FOLLOWED)
def test_batch_normalization_after_an_adapted_layer(name):
    entry = keras.Input((8, 8, 2))
    y = FOLLOWED[name](entry)
    model = keras.Model(entry, layers.Dense(3, name="head")(layers.Flatten()(y)))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if "norm" in (variable.path if hasattr(variable, "path") else variable.name):
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif variable.name.startswith("layer/bias") or variable.name == "bias":
            variable.assign(rng.normal(size=variable.shape))
    x = normal(4, 8, 8, 2)
    adapters = {n: random_adapter(model, i, lora_targets=["layer"]) for i, n in enumerate("ab")}
    expected = {n: outputs_alone(model, adapters.get(n), x) for n in ("a", "b", None)}
    with lora.AdapterBank(model, adapters) as bank:
        assert_rows(bank.predict(x, NAMES), NAMES, expected)
