"""Frozen layers give to the bit what they gave, and the gradients that TensorFlow finds.

Large ones are compiled, and give the same up to rounding.
"""

import math

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run

if BACKEND != "tensorflow":
    pytest.skip("gradients and compiled layers of TensorFlow", allow_module_level=True)

import tensorflow as tf

from tfimm_lora.backend import compiled_layers

layers = keras.layers
on_legacy = pytest.mark.skipif(not LEGACY, reason="a gradient for legacy Keras")

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
    "silu": (layers.Activation, dict(activation="swish"), (4, 7, 8)),
    "relu": (layers.Activation, dict(activation="relu"), (4, 7, 8)),
}


COMPILED = [n for n in CASES if n.startswith(("layer_norm", "gelu", "silu"))]
# Two axes and subclasses are left to Keras. A layer without variables stays as it is.
COMPILED = [n for n in COMPILED if not n.endswith(("two_axes", "subclass", "plain"))]


@pytest.fixture
def compiles(monkeypatch):
    """Compiles examples of any size."""
    monkeypatch.setattr(compiled_layers, "LEAST", 1)


def compiled(concrete):
    """How many functions of a traced function XLA compiles."""
    operations = concrete.graph.get_operations()
    names = ("PartitionedCall", "StatefulPartitionedCall")
    return sum(op.type in names and "_XlaMustCompile" in op.node_def.attr for op in operations)


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
    # A variable of Keras 3 holds one of TensorFlow.
    sources = [v if isinstance(v, tf.Variable) else v.value for v in sources]

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


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layer_has_the_outputs_and_gradients_of_keras(name, compiles):
    layer, x = made(name)
    before, (expected,), plain = gradients(layer, x)
    frozen(layer, x.shape)
    after, (found,), concrete = gradients(layer, x)
    assert compiled(plain) == 0 and compiled(concrete) == 2  # forward and backward
    np.testing.assert_allclose(after, before, **CLOSE)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("dtype, bits", [("mixed_bfloat16", 8), ("mixed_float16", 11)])
@pytest.mark.parametrize("name", ["gelu", "silu", "layer_norm"])
def test_compiled_layers_in_16_bits_are_rounded_once(name, dtype, bits, compiles, policy):
    policy(dtype)
    layer, x = made(name)
    frozen(layer, x.shape)
    x = tf.cast(x, layer.compute_dtype)
    found, (gradient,), _ = gradients(layer, x)
    x = array(x).astype("float64")
    # The numbers in between that float64 has, by central differences for the gradient.
    reference = {
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
        "silu": lambda x: x / (1 + np.exp(-x)),
        "layer_norm": lambda x: (
            array(layer.beta)
            + array(layer.gamma)
            * (x - x.mean(-1, keepdims=True))
            / np.sqrt(x.var(-1, keepdims=True) + layer.epsilon)
        ),
    }[name]
    expected = reference(x)
    assert np.abs(expected).max() > 1
    half = 2.0**-bits  # of the last bit, relative to the number
    np.testing.assert_allclose(found.astype("float64"), expected, rtol=1.01 * half, atol=1e-5)
    # The gradient of the output has 16 bits, too.
    dy = array(tf.cast(normal(*x.shape, seed=9), layer.compute_dtype)).astype("float64")
    slopes = np.empty_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        slopes[i] = np.sum(dy * (reference(x + step) - reference(x - step))) / 2e-6
    np.testing.assert_allclose(gradient.astype("float64"), slopes, rtol=1.01 * half, atol=1e-4)


def test_nothing_is_compiled_where_it_would_not_help(compiles):
    layer, x = made("gelu")
    frozen(layer, x.shape)
    forward = tf.function(layer).get_concrete_function(tf.constant(x))
    assert compiled(forward) == 0  # nothing is differentiated
    with lora.use_compiled_layers(False):
        assert compiled(gradients(layer, x)[2]) == 0
    with (
        pytest.raises(TypeError, match="enabled=0; expected True or False"),
        lora.use_compiled_layers(0),
    ):
        pass

    @tf.function(input_signature=[tf.TensorSpec((None, None, 8))])
    def of_any_size(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, x)

    assert compiled(of_any_size.get_concrete_function()) == 0


def test_small_examples_are_not_compiled():
    layer, x = made("gelu")
    frozen(layer, x.shape)
    assert compiled(gradients(layer, x)[2]) == 0
    large = normal(2, 8, compiled_layers.LEAST // 8)
    assert compiled(gradients(layer, large)[2]) == 2
    assert compiled(gradients(layer, large[:, 1:])[2]) == 0


@pytest.mark.parametrize("activation", ["gelu", "swish"])
def test_activation_of_an_adapted_dense_layer_is_compiled(activation, compiles):
    x = normal(4, 7, 8)
    layer = layers.Dense(6, activation=activation)
    entry = keras.Input((7, 8))
    model = keras.Model(entry, layer(entry))
    lora.inject_lora(model, lora_rank=2, lora_targets=[layer.name])
    randomise(model)
    factors = [layer.kernel_lora_a, layer.kernel_lora_b]
    with lora.use_compiled_layers(False):
        before, expected, plain = gradients(layer, x, factors)
    after, found, concrete = gradients(layer, x, factors)
    assert compiled(plain) == 0 and compiled(concrete) == 2
    np.testing.assert_allclose(after, before, **CLOSE)
    for mine, theirs in zip(found, expected):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, **CLOSE)
    forward = tf.function(layer).get_concrete_function(tf.constant(x))
    assert compiled(forward) == 0


class Doubling:
    """An activation that has no hash."""

    def __call__(self, x):
        return 2 * x

    def __eq__(self, other):
        return isinstance(other, Doubling)


def test_activations_need_no_hash(compiles):
    entry = keras.Input((7, 8))
    layer = layers.Dense(6, activation=Doubling())
    lora.inject_lora(keras.Model(entry, layer(entry)), lora_rank=2, lora_targets=[layer.name])
    y, _, _ = gradients(layer, normal(4, 7, 8))
    np.testing.assert_allclose(y, 2 * (normal(4, 7, 8) @ array(layer.kernel)), **CLOSE)


@pytest.mark.skipif(LEGACY, reason="an argument of Keras 3")
@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`:UserWarning")
def test_layer_normalization_without_the_mean_is_left_to_keras(compiles):
    layer, x = layers.LayerNormalization(rms_scaling=True), 2 * normal(4, 7, 8) + 0.5
    before, (expected,), _ = gradients(layer, x)
    frozen(layer, x.shape)
    after, (found,), concrete = gradients(layer, x)
    assert compiled(concrete) == 0
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(found, expected)


def test_without_xla_keras_computes_the_layers(compiles, monkeypatch):
    layer, x = made("layer_norm")
    frozen(layer, x.shape)
    monkeypatch.setattr(compiled_layers, "_compiles_here", lambda: False)
    assert compiled(gradients(layer, x)[2]) == 0


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_fit_with_batches_of_two_sizes_is_that_without_compiled_layers(jit_compile, compiles):
    results = []
    for enabled in (False, True):
        keras.utils.set_random_seed(0)
        model = plain_model()
        lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        randomise(model)
        with lora.use_compiled_layers(enabled):
            model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
            x, y = normal(7, 6, 8), normal(7, 6, 3, seed=3)
            model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        results.append([array(v) for v in model.trainable_weights])
    for one, two in zip(*results):
        np.testing.assert_allclose(two, one, **CLOSE)


@pytest.mark.parametrize("form", ["kept", "compiled"])
@pytest.mark.parametrize("name", [n for n in CASES if "norm" in n and "plain" not in n])
def test_bias_of_a_frozen_normalisation_can_be_trained(name, form, request):
    if form == "compiled":
        request.getfixturevalue("compiles")
    layer, x = made(name)
    _, expected, _ = gradients(layer, x, [layer.beta])
    model = frozen(layer, x.shape, train_bias="all")
    assert any(v is layer.beta for v in model.trainable_weights)
    _, found, _ = gradients(layer, x, [layer.beta])
    for mine, theirs in zip(found, expected):
        np.testing.assert_allclose(mine, theirs, **CLOSE)


@pytest.mark.parametrize("form", ["kept", "compiled"])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "gelu", "silu"])
def test_second_gradients_flow(name, form, request):
    if form == "compiled":
        request.getfixturevalue("compiles")
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


@pytest.mark.parametrize("form", ["kept", "compiled"])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "gelu"])
def test_gradients_flow_through_a_branch(name, form, request):
    """TensorFlow lets nothing from outside into the way back through tf.cond."""
    if form == "compiled":
        request.getfixturevalue("compiles")
    layer, x = made(name)

    def branch(x):
        return tf.cond(tf.reduce_sum(x) > -1e9, lambda: layer(1.5 * x), lambda: 0 * x)

    _, (expected,), _ = gradients(branch, x)
    frozen(layer, x.shape)
    _, (found,), _ = gradients(branch, x)
    np.testing.assert_allclose(found, expected, **CLOSE)


@on_legacy
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


@on_legacy
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


@on_legacy
def test_attention_of_vit_gives_its_features():
    model, x = tiny_vit()
    before = model(x, return_features=True)[1]
    lora.inject_lora(model, lora_rank=2)
    after = model(x, return_features=True)[1]
    assert list(after) == list(before)
    for one, two in zip(tf.nest.flatten(before), tf.nest.flatten(after)):
        np.testing.assert_allclose(two, one, **CLOSE)
