"""The random numbers of ``lora.finetune``: new in each epoch, and equal after resuming."""

import numpy as np
import pytest
import tensorflow as tf

import tfimm_lora as lora
from tests.helpers.kerases import keras
from tfimm_lora.finetuning.training import finetune

LEGACY = keras.__version__ < "3"
only_legacy = pytest.mark.skipif(not LEGACY, reason="layers of Keras 3 have their own state")


class Noise(keras.layers.Layer):
    """A layer of a user, with a random operation that keeps its state in its kernel."""

    def call(self, x, training=None):
        return x + tf.random.uniform(tf.shape(x)) if training else x


def net(noise=None):
    """A model with a layer of a user, or with Keras' layers that draw random numbers."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    kinds = (layers.Dropout, layers.GaussianNoise, layers.GaussianDropout)
    random = [kind(0.5, name=f"random_{i}") for i, kind in enumerate(kinds)]
    inside = [layers.Dense(16, name="fc"), *([noise] if noise else random)]
    model = keras.Sequential([keras.Input((12,)), *inside, layers.Dense(3, name="head")])
    return lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)


def losses(model, epochs=3, shape=(12,), **options):
    """The loss of each epoch, which depends on nothing but random numbers: the rate is 0."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, *shape)).astype("float32"), np.arange(32) % 3
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    settings = {"optimizer": keras.optimizers.SGD(0.0), "verbose": "none", **options}
    return [h["loss"] for h in finetune(model, data, epochs=epochs, **settings).history]


@pytest.fixture
def seeds(monkeypatch):
    """The seeds that were set during a test."""
    found, set_seed = [], tf.random.set_seed
    monkeypatch.setattr(tf.random, "set_seed", lambda s: (found.append(s), set_seed(s)))
    return found


def resumed(make, folder, **options):
    """The losses of a training that was stopped after its first epoch."""

    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        losses(make(), out=folder, callbacks=[Crash()], **options)
    keras.utils.set_random_seed(99)  # another process has other random numbers
    return losses(make(), out=folder, resume=True, **options)


def test_each_epoch_draws_new_numbers_and_a_resumed_one_the_same(tmp_path, seeds):
    found = losses(net(), seed=5)
    assert len(set(found)) == 3
    assert seeds.count(5) == 1  # it clears all kernels, which takes seconds in a large model
    assert resumed(net, tmp_path, seed=5) == found
    if LEGACY:  # layers of Keras 3 have seeds of their own
        assert losses(net(), epochs=1, seed=6) != found[:1]


def test_random_operations_of_users_are_restarted(tmp_path, seeds):
    found = losses(net(Noise(name="noise")), seed=4)
    assert len(set(found)) == 1
    assert seeds.count(4) == 3
    assert resumed(lambda: net(Noise(name="noise")), tmp_path, seed=4) == found


def test_random_operations_without_a_graph_are_restarted():
    tf.config.run_functions_eagerly(True)
    try:
        found = losses(net(Noise(name="noise")), epochs=2)
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(set(found)) == 1


@only_legacy
def test_a_model_keeps_its_own_random_numbers():
    model = net()

    def state():
        found = [layer for layer in model.layers if hasattr(layer, "_random_generator")]
        return [(x.get_config(), set(vars(x)), set(vars(x._random_generator))) for x in found]

    before = state()
    losses(model, epochs=1)
    assert len(before) == 3 and state() == before
    x, y = np.ones((8, 12), "float32"), np.zeros(8, "int32")
    model.fit(x, y, verbose=0)  # with the function that finetune traced
    model(x, training=True)


@only_legacy
def test_stochastic_depth_of_tfimm_draws_new_numbers(tmp_path, seeds):
    from tests.helpers.tiny_architectures import ARCHITECTURES

    def make():
        keras.utils.set_random_seed(7)
        return lora.inject_lora(ARCHITECTURES["convnext"].make(drop_path_rate=0.8), lora_rank=2)

    options = {"seed": 5, "epochs": 2, "shape": (*ARCHITECTURES["convnext"].size, 3)}
    found = losses(make(), **options)
    assert len(set(found)) == 2
    assert seeds.count(5) == 1
    assert resumed(make, tmp_path, **options) == found


@only_legacy
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_stochastic_depth_is_that_of_tfimm(rate):
    from tfimm.layers.drop import DropPath

    from tfimm_lora.zoo.lora_classes.drop_path import drop_path

    layer, x = DropPath(rate), np.random.default_rng(0).normal(size=(5, 3, 2)).astype("float32")
    tf.random.set_seed(1)
    expected = layer(x, training=True)
    tf.random.set_seed(1)
    found = drop_path(layer, keras.src.backend.RandomGenerator(), tf.constant(x), training=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(drop_path(layer, None, tf.constant(x)), x)
