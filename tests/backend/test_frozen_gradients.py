"""Frozen layers give to the bit what they gave, and the gradients that TensorFlow finds."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, normal, randomise, run

if not LEGACY:
    pytest.skip("layers of legacy Keras", allow_module_level=True)

import tensorflow as tf

layers = keras.layers

# Means over some ten numbers, in two orders.
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Doubled(layers.LayerNormalization):
    """A subclass with a call of its own."""

    def call(self, inputs):
        return 2 * super().call(inputs)


CASES = {
    "batch_norm": (layers.BatchNormalization, {}, (4, 5, 5, 3)),
    "batch_norm_rows": (layers.BatchNormalization, {}, (6, 3)),
    "batch_norm_no_scale": (layers.BatchNormalization, dict(scale=False), (4, 5, 5, 3)),
    "batch_norm_channels_first": (layers.BatchNormalization, dict(axis=1), (4, 3, 5)),
    "batch_norm_epsilon": (layers.BatchNormalization, dict(epsilon=0.3), (4, 5, 5, 3)),
    "layer_norm": (layers.LayerNormalization, dict(epsilon=1e-6), (4, 7, 8)),
    "layer_norm_fused": (layers.LayerNormalization, dict(epsilon=1e-3), (4, 7, 8)),
    "layer_norm_large_epsilon": (layers.LayerNormalization, dict(epsilon=0.5), (4, 7, 8)),
    "layer_norm_plain": (layers.LayerNormalization, dict(scale=False, center=False), (4, 8)),
    "layer_norm_two_axes": (layers.LayerNormalization, dict(axis=(1, 2)), (4, 7, 8)),
    "layer_norm_subclass": (Doubled, {}, (4, 7, 8)),
    "gelu": (layers.Activation, dict(activation="gelu"), (4, 7, 8)),
    "relu": (layers.Activation, dict(activation="relu"), (4, 7, 8)),
}


def made(name):
    """A built layer with no weight at its initial value, and an input."""
    cls, arguments, shape = CASES[name]
    layer, x = cls(**arguments), 2 * normal(*shape) + 0.5
    layer(x)
    for seed, variable in enumerate(layer.weights):
        value = normal(*variable.shape, seed=seed + 1)
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.name else value)
    return layer, x


def frozen(layer, shape, train_bias="none"):
    """The layer within a model that has LoRA."""
    entry = keras.Input(shape[1:])
    model = keras.Model(entry, layers.Dense(2, name="fc")(layer(entry)))
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"], lora_train_bias=train_bias)
    return model


def gradients(layer, x, sources=()):
    """Outputs, and the gradients by the input and by some variables, traced."""
    weights = tf.constant(normal(*layer(x).shape, seed=9))

    @tf.function
    def step(x):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([x, *sources])
            y = layer(x)
            loss = tf.reduce_sum(weights * tf.cast(y, tf.float32))
        return y, tape.gradient(loss, [x, *sources])

    y, found = step(tf.constant(x))
    return array(y), [array(g) for g in found], step.get_concrete_function(tf.constant(x))


@pytest.mark.parametrize("name", CASES)
def test_frozen_layer_has_the_same_outputs_and_gradients(name):
    layer, x = made(name)
    before, (expected,), _ = gradients(layer, x)
    frozen(layer, x.shape)
    after, (found,), _ = gradients(layer, x)
    np.testing.assert_array_equal(after, before)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("name", [n for n in CASES if "norm" in n and "plain" not in n])
def test_bias_of_a_frozen_normalisation_can_be_trained(name):
    layer, x = made(name)
    _, expected, _ = gradients(layer, x, [layer.beta])
    model = frozen(layer, x.shape, train_bias="all")
    assert any(v is layer.beta for v in model.trainable_weights)
    _, found, _ = gradients(layer, x, [layer.beta])
    for mine, theirs in zip(found, expected):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "gelu"])
def test_second_gradients_flow(name):
    layer, x = made(name)
    found = []
    for adapted in (False, True):
        if adapted:
            frozen(layer, x.shape)
        t = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(t)
            with tf.GradientTape() as inner:
                inner.watch(t)
                y = tf.reduce_sum(layer(t) ** 3)
            penalty = tf.reduce_sum(inner.gradient(y, t) ** 2)
        found.append(array(outer.gradient(penalty, t)))
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(found[1] / scale, found[0] / scale, **CLOSE)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "gelu"])
def test_gradients_flow_through_a_branch(name):
    """TensorFlow lets nothing from outside into the way back through tf.cond."""
    layer, x = made(name)
    _, (expected,), _ = gradients(layer, x)
    frozen(layer, x.shape)

    def branch(x):
        return tf.cond(tf.reduce_sum(x) > -1e9, lambda: layer(x), lambda: 0 * x)

    _, (found,), _ = gradients(branch, x)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_batch_norm_does_not_keep_its_input():
    layer, x = made("batch_norm")
    types = [op.type for op in gradients(layer, x)[2].graph.get_operations()]
    assert "FusedBatchNormV3" in types
    frozen(layer, x.shape)
    # Its own operation of the gradient would read the input again.
    types = [op.type for op in gradients(layer, x)[2].graph.get_operations()]
    assert "FusedBatchNormV3" in types and "FusedBatchNormGradV3" not in types


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "gelu"])
def test_layers_in_16_bits_are_left_to_keras(name, policy):
    policy("mixed_float16")
    layer, x = made(name)
    before, (expected,), _ = gradients(layer, x)
    frozen(layer, x.shape)
    after, (found,), _ = gradients(layer, x)
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(found, expected)


def test_removing_lora_restores_every_class():
    layer, x = made("gelu")
    model = frozen(layer, x.shape)
    assert type(layer) is not layers.Activation
    lora.remove_lora(model)
    assert type(layer) is layers.Activation


def test_model_with_such_layers_is_saved_and_trains_on(tmp_path):
    entry = keras.Input((6, 8))
    x = layers.Dense(8, name="fc")(layers.LayerNormalization(epsilon=1e-6)(entry))
    model = keras.Model(entry, layers.Activation("gelu")(layers.BatchNormalization()(x)))
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    randomise(model)
    x = normal(4, 6, 8)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    np.testing.assert_allclose(run(loaded, x), run(model, x), **CLOSE)
    assert [type(x) for x in loaded.layers] == [type(x) for x in model.layers]
    steps = []
    for one in (model, loaded):
        one.compile(keras.optimizers.SGD(0.1), "mse")
        one.train_on_batch(x, normal(4, 6, 8, seed=3))
        steps.append([array(v) for v in one.trainable_weights])
    for mine, theirs in zip(*steps):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


def plain_model():
    entry = keras.Input((6, 8))
    x = layers.LayerNormalization(epsilon=1e-6)(entry)
    x = layers.Activation("gelu")(layers.Dense(8, name="fc")(x))
    return keras.Model(entry, layers.Dense(3, name="head")(layers.BatchNormalization()(x)))


def test_copies_with_and_without_lora_have_plain_classes_where_they_should(tmp_path):
    plain, x = plain_model(), normal(4, 6, 8)
    classes = [type(layer) for layer in plain.layers]
    adapted = lora.convert_to_lora_model(plain, lora_rank=2, lora_targets=["fc"])
    assert [type(layer) for layer in plain.layers] == classes
    assert [type(layer) for layer in adapted.layers] != classes
    randomise(adapted)
    adapted.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    for model in (lora.convert_to_regular_model(adapted), lora.remove_lora(loaded)):
        assert [type(layer) for layer in model.layers] == classes
        np.testing.assert_allclose(run(model, x), run(adapted, x), **CLOSE)


# -- tfimm's attention -------------------------------------------------------------------


def tiny_vit():
    from tests.helpers.tiny_architectures import ARCHITECTURES

    return ARCHITECTURES["vit"].make(), normal(2, 16, 16, 3)


def test_attention_of_vit_gives_the_same_with_a_cheaper_gradient():
    model, x = tiny_vit()
    before, (expected,), concrete = gradients(model, x)
    lora.inject_lora(model, lora_rank=2)
    after, (found,), cheaper = gradients(model, x)
    np.testing.assert_allclose(after, before, **CLOSE)
    np.testing.assert_allclose(found, expected, **CLOSE)

    def slices(concrete):
        return sum(
            op.type == "StridedSliceGrad" and "attn" in op.name
            for op in concrete.graph.get_operations()
        )

    assert slices(concrete) == 3 * 2 and slices(cheaper) == 0


def test_attention_of_vit_gives_its_features():
    model, x = tiny_vit()
    before = model(x, return_features=True)[1]
    lora.inject_lora(model, lora_rank=2)
    after = model(x, return_features=True)[1]
    assert list(after) == list(before)
    for one, two in zip(tf.nest.flatten(before), tf.nest.flatten(after)):
        np.testing.assert_allclose(two, one, **CLOSE)
