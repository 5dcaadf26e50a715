"""Variables that more than one layer uses, and kernels that others read or replace."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run, values

layers = keras.layers
pytestmark = pytest.mark.backends


def share(layer, other):
    """Give a layer the kernel of another."""
    if LEGACY:
        layer.kernel = other.kernel
        return
    layer._tracker.unlock()
    layer._untrack_variable(layer._kernel)
    layer._kernel = other._kernel
    layer._tracker.lock()


def two_with_one_kernel():
    one = layers.Dense(4, name="one")
    two = layers.Dense(4, name="two")
    entry = keras.Input((4,))
    x = two(one(entry))
    share(two, one)
    return keras.Model(entry, layers.Dense(2, name="head")(x))


def test_a_kernel_of_two_layers_is_refused_and_nothing_changes():
    model, x = two_with_one_kernel(), normal(3, 4)
    before, classes = run(model, x), [type(layer) for layer in model.layers]
    for targets in (None, ["one"], ["two"]):
        with pytest.raises(ValueError, match="'one'.*also that of.*'two'|'two'.*'one'"):
            lora.inject_lora(model, lora_rank=2, lora_targets=targets)
    assert [type(layer) for layer in model.layers] == classes
    np.testing.assert_array_equal(run(model, x), before)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])


def test_one_layer_that_is_called_twice_merges_without_loss():
    layer, entry = layers.Dense(4, name="twice"), keras.Input((4,))
    model = keras.Model(entry, layers.Dense(2, name="head")(layer(layer(entry))))
    lora.inject_lora(model, lora_rank=2)
    randomise(model)
    x, kernel = normal(3, 4), array(layer.kernel).copy()
    before = run(model, x)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)
    lora.unmerge_lora_weights(model)
    np.testing.assert_array_equal(array(layer.kernel), kernel)


class Tied(keras.Model):
    """A head that is tied to the embedding."""

    def __init__(self, layer):
        super().__init__()
        self.embed = layer

    def call(self, x):
        rows = self.embed(x)
        ops = __import__("tensorflow") if LEGACY else keras.ops
        return ops.matmul(rows, ops.transpose(self.embed.embeddings))


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_tied_to_an_embedding_merges_without_loss(dora):
    model, x = Tied(layers.Embedding(9, 4, name="embed")), np.array([[1, 2], [3, 8]])
    run(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=["embed"], lora_use_dora=dora)
    for seed, variable in enumerate(model.trainable_weights):
        variable.assign(0.3 * normal(*variable.shape, seed=seed))
    before, base = run(model, x), array(model.embed.embeddings).copy()
    # Both uses are adapted: E' E'^T with E' = E + s A B.
    table = lora.merge_lora_weights(model).embed.merged_kernel()
    np.testing.assert_allclose(before, table[x] @ table.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-5)
    lora.unmerge_lora_weights(model)
    np.testing.assert_array_equal(array(model.embed.embeddings), base)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)


def test_a_layer_that_was_created_with_lora_shows_its_kernel_to_others():
    layer = lora.lora_class(layers.Embedding)(9, 4, lora_rank=2, name="embed")
    model, x = Tied(layer), np.array([[1, 2], [3, 8]])
    run(model, x)
    randomise(model)
    before = run(model, x)
    layer.merge_weights()
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-5)


def test_a_kernel_in_the_graph_of_a_functional_model_is_refused():
    layer, entry = layers.Embedding(9, 4, name="embed"), keras.Input((2,), dtype="int32")
    rows = layer(entry)
    if LEGACY:
        import tensorflow as tf

        outputs = tf.matmul(rows, layer.embeddings, transpose_b=True)
    else:
        outputs = keras.ops.einsum("abc,dc->abd", rows, layer.embeddings)
    model = keras.Model(entry, layers.Dense(2, name="head")(outputs), name="whole")
    with pytest.raises(ValueError, match="'embed' is also that of an operation.*'whole'"):
        lora.inject_lora(model, lora_rank=2, lora_targets=["embed"])
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="with tf.Variable and a gradient tape")
def test_the_gradient_through_a_tied_head_is_the_true_one():
    import tensorflow as tf

    model, x = Tied(layers.Embedding(9, 4, name="embed")), np.array([[1, 2], [3, 8]])
    run(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=["embed"])
    randomise(model)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(x)))
    trained = [getattr(v, "value", v) if not LEGACY else v for v in model.trainable_weights]
    gradients = tape.gradient(loss, trained)
    for variable, gradient in zip(model.trainable_weights, gradients):
        gradient, value = array(tf.convert_to_tensor(gradient)), array(variable).copy()
        direction = normal(*value.shape, seed=5)
        ends = []
        for step in (1e-3, -1e-3):
            variable.assign(value + step * direction)
            ends.append(float(np.sum(run(model, x).astype("float64") ** 2)))
        variable.assign(value)
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / 2e-3, np.sum(gradient * direction), rtol=1e-2
        )


class WeightNorm(layers.Wrapper):
    """Replaces the kernel of its layer before each call, and keeps the variable."""

    hidden = False

    def build(self, shape=None):
        super().build(shape)
        kernel = self.layer.kernel
        # In a tuple of a plain object, Keras does not see it.
        self.__dict__["held"] = (kernel,)
        if not self.hidden:
            self.v = kernel
        self.g = self.add_weight(name="g", shape=(kernel.shape[-1],), initializer="ones")

    def call(self, x):
        kernel = self.__dict__["held"][0]
        self.layer.kernel = kernel * self.g
        y = self.layer(x)
        self.layer.kernel = kernel
        return y


class HiddenWeightNorm(WeightNorm):
    hidden = True


@pytest.mark.skipif(not LEGACY, reason="the kernel of a layer of Keras 3 cannot be replaced")
@pytest.mark.parametrize("cls", [WeightNorm, HiddenWeightNorm])
def test_a_kernel_that_a_wrapper_replaces_is_refused(cls):
    entry = keras.Input((4,))
    x = cls(layers.Dense(4, name="inner"))(entry)
    model = keras.Model(entry, layers.Dense(2, name="head")(x))
    before = run(model, normal(3, 4))
    with pytest.raises(ValueError, match="inner"):
        lora.inject_lora(model, lora_rank=2)
        run(model, normal(3, 4))
    if cls is WeightNorm:
        np.testing.assert_array_equal(run(model, normal(3, 4)), before)
    else:
        lora.remove_lora(model, merge=False)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    np.testing.assert_allclose(run(model, normal(3, 4)), before, rtol=1e-6)


@pytest.mark.skipif(not hasattr(layers, "SpectralNormalization"), reason="too old")
def test_a_layer_in_spectral_normalization_is_adapted():
    entry = keras.Input((8,))
    x = layers.SpectralNormalization(layers.Dense(8, name="inner"))(entry)
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=2, lora_targets=["inner"])
    randomise(model)
    frozen = model.non_trainable_weights
    still, x = values(frozen), normal(4, 8)
    model.compile("sgd", "mse")
    model.fit(x, normal(4, 3), verbose=0)
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value)
    before = run(model, x)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)


def test_a_factor_cannot_be_replaced():
    layer = layers.Dense(3, name="fc")
    model = keras.Sequential([keras.Input((4,)), layer])
    lora.inject_lora(model, lora_targets=["fc"])
    with pytest.raises(AttributeError, match="kernel_lora_a.*assign"):
        layer.kernel_lora_a = np.zeros((4, 4), "float32")
    layer.kernel_lora_a.assign(np.ones((4, 4), "float32"))
