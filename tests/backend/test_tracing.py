"""Traced functions of LoRA models on legacy Keras contain what they need, and no more."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, normal, randomise

if not LEGACY:
    pytest.skip("functions of legacy Keras", allow_module_level=True)

import tensorflow as tf

layers = keras.layers


class Branching(layers.Dense):
    """A layer of a user that branches on a tensor, which AutoGraph makes possible."""

    def call(self, inputs):
        x = super().call(inputs)
        if tf.reduce_sum(x) > 0:
            x = -x
        return x


def model_with(cls=layers.Dense):
    """A convolutional model with frozen normalization, adapted layers and factors not zero."""
    entry = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1, name="conv")(entry)
    x = layers.BatchNormalization(name="bn")(x)
    x = cls(8, name="inside")(layers.Flatten()(x))
    model = keras.Model(entry, layers.Dense(3, name="fc")(x))
    lora.inject_lora(model, lora_rank=2, lora_targets=["conv", "fc"])
    randomise(model)
    return model


def types_in(function, *arguments):
    return [op.type for op in function.get_concrete_function(*arguments).graph.get_operations()]


def test_custom_gradients_are_traced_only_where_something_is_differentiated():
    model, x = model_with(), tf.constant(normal(2, 6, 6, 3))

    @tf.function
    def outputs(x, training):
        return model(x, training=training)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(model(x, training=False) ** 2)
        return tape.gradient(y, model.trainable_variables)

    with lora.use_form("effective", "narrow"):
        # The graph of a custom gradient has an IdentityN, which TensorFlow gives the gradient.
        assert types_in(gradient, x).count("IdentityN") == 3  # conv, bn and fc
        assert types_in(outputs, x, True).count("IdentityN") == 3
        assert "IdentityN" not in types_in(outputs, x, False)
        np.testing.assert_array_equal(outputs(x, False), outputs(x, True))
        # A function may be differentiated as a whole, after it was traced without a tape.
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(outputs(x, False) ** 2)
        found, expected = tape.gradient(y, model.trainable_variables), gradient(x)
    for one, two in zip(found, expected):
        assert np.abs(array(one)).max() > 0.1
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["fc"], ["inside", "fc"]])
def test_layers_of_users_are_converted_and_layers_of_keras_are_not(targets):
    entry = keras.Input((4,))
    outputs = layers.Dense(3, name="fc")(Branching(5, name="inside")(entry))
    model = keras.Model(entry, outputs)
    x = tf.constant(normal(2, 4))
    expected = [array(model(sign * x)) for sign in (1, -1)]
    lora.inject_lora(model, lora_rank=2, lora_targets=targets)
    function = tf.function(lambda x: model(x))
    for sign, y in zip((1, -1), expected):
        np.testing.assert_allclose(function(sign * x), y, rtol=1e-5, atol=1e-6)
    converted = {x.name: x._should_use_autograph() for x in model.layers[1:]}
    assert converted == {"inside": True, "fc": False}


@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0), (2,)])
@pytest.mark.parametrize("known", [True, False])
def test_axes_of_unknown_and_of_no_size(shape, known):
    layer = lora.LoRADense(3, lora_rank=2)
    layer.build((None, 4))
    layer.kernel_lora_b.assign(normal(2, 3))
    x = normal(*shape, 4)
    spec = tf.TensorSpec([None, *shape[1:], 4] if known else [None] * len(shape) + [4])
    found = tf.function(lambda x: layer(x), input_signature=[spec])(x)
    a, b = array(layer.kernel_lora_a), array(layer.kernel_lora_b)
    kernel = array(layer.kernel) + layer.lora.scale * a @ b
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-4, atol=1e-5)
    assert found.shape == (*shape, 3)
