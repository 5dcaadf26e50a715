"""Kernels and biases that absorb a mean and a standard deviation."""

import numpy as np
import pytest

from tests.helpers.kerases import keras, normal, run, values
from tfimm_lora.model.output_scale import absorb_scale, scaled, standardised

pytestmark = pytest.mark.backends

MEAN, STD = (10.0, -2000.0, 0.5), (3.0, 250.0, 1e-3)


def dense(bias=True, end=None):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Flatten(),
            layers.Dense(3, end, use_bias=bias, name="head"),
        ]
    )


def convolution():
    inputs = keras.Input((4, 4, 2))
    pooled = keras.layers.GlobalAveragePooling2D(keepdims=True)(inputs)
    outputs = keras.layers.Flatten()(keras.layers.Conv2D(3, 1, name="head")(pooled))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("make", [dense, convolution])
def test_outputs_are_in_other_units(make):
    model, x = make(), normal(5, 4, 4, 2)
    model.get_layer("head").bias.assign(normal(3, seed=1))
    before = run(model, x)
    absorb_scale(model, MEAN, STD)
    found = run(model, x)
    expected = np.array(MEAN) + np.array(STD) * before.astype("float64")
    # float32 numbers around the mean: half a unit in their last place, for kernel and sum.
    bound = 4 * np.finfo("float32").eps * (np.abs(MEAN) + np.abs(STD))
    assert (np.abs(found - expected) <= bound * (1 + np.abs(before).max())).all()
    np.testing.assert_allclose(scaled(before, MEAN, STD), expected)
    np.testing.assert_allclose(standardised(expected, MEAN, STD), before, atol=1e-6)


@pytest.mark.parametrize("model", [dense(bias=False), dense(end="sigmoid")])
def test_other_ends_are_refused_and_not_changed(model):
    before = values(model.weights)
    with pytest.raises(ValueError, match="with a bias and without an activation"):
        absorb_scale(model, MEAN, STD)
    for one, two in zip(values(model.weights), before):
        np.testing.assert_array_equal(one, two)
