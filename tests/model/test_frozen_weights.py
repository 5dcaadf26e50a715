"""What LoRA froze stays as it is in training, however a layer holds or changes its weights."""

import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, ids, keras, normal, run, values

layers = keras.layers
pytestmark = pytest.mark.backends
legacy_only = pytest.mark.skipif(not LEGACY, reason="of legacy Keras")
keras3_only = pytest.mark.skipif(LEGACY, reason="of Keras 3")


def around(*inside):
    """A small model with layers between its two dense layers."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, name="fc"),
            *inside,
            layers.Dense(3, name="head"),
        ]
    )


def fitted(model, epochs=2, **options):
    """The model after some steps; what Keras trained is what is reported."""
    named = ids(lora.lora_trainable_weights(model))
    seen = []

    class Trained(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(ids(self.model.trainable_weights))

    assert ids(model.trainable_weights) == named
    model.compile("adam", "mse", **options)
    x, y = normal(16, 4) + 2, normal(16, 3, seed=1)
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[Trained()])
    assert len(seen) == 2 * epochs and all(each == named for each in seen)
    assert ids(model.trainable_weights) == named
    return model


def stays(model, variables, **options):
    before = values(variables)
    fitted(model, **options)
    for variable, value in zip(variables, before):
        np.testing.assert_array_equal(array(variable), value)


# -- statistics ---------------------------------------------------------------------------


class WithKwargs(layers.BatchNormalization):
    def call(self, inputs, **kwargs):
        return super().call(inputs, **kwargs)


class AlwaysTraining(layers.BatchNormalization):
    def call(self, inputs, training=None):
        return super().call(inputs, training=True)


class WithoutTraining(layers.BatchNormalization):
    def call(self, inputs):
        return super().call(inputs, training=True)


class RunningNorm(layers.Layer):
    """Statistics under a name that only this class knows."""

    def build(self, shape):
        self.running = self.add_weight(
            name="running", shape=(shape[-1],), initializer="zeros", trainable=False
        )
        self.built = True

    def call(self, x, training=False):
        if training:
            mean = sum(x[k] for k in range(8)) / 8
            self.running.assign(0.9 * self.running + 0.1 * mean)
        return x - self.running


@pytest.mark.parametrize("cls", [WithKwargs, AlwaysTraining, WithoutTraining, RunningNorm])
def test_statistics_stay_frozen(cls):
    model = lora.inject_lora(around(cls(name="norm")), lora_rank=2)
    stays(model, model.get_layer("norm").weights)


class Outer(keras.Model):
    """Calls its batch normalization with training=True, whatever it is called with."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = layers.Dense(8, name="fc"), layers.BatchNormalization(name="norm")
        self.head = layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.norm(self.fc(x), training=True))


def test_statistics_stay_where_the_model_asks_for_training():
    model = Outer()
    run(model, normal(2, 4))
    lora.inject_lora(model, lora_rank=2)
    stays(model, model.norm.weights)


def test_a_fully_trained_layer_keeps_its_statistics_up_to_date():
    model = around(RunningNorm(name="norm"))
    lora.inject_lora(model, lora_rank=2, lora_train_modules=["norm"])
    model.compile("adam", "mse", run_eagerly=BACKEND == "tensorflow")
    model.fit(normal(8, 4) + 2, normal(8, 3), verbose=0)
    assert np.abs(array(model.get_layer("norm").running)).max() > 0


class Rate(layers.Layer):
    """A dropout whose rate a schedule sets; it drops everything here."""

    def build(self, shape):
        self.rate = self.add_weight(name="rate", shape=(), initializer="ones", trainable=False)
        self.built = True

    def call(self, x, training=False):
        return x * (1 - self.rate) if training else x


def test_a_single_number_is_no_statistic():
    model = lora.inject_lora(around(Rate(name="rate")), lora_rank=2)
    bias = array(model.get_layer("head").bias)
    outputs = run(model, normal(2, 4), training=True)
    np.testing.assert_array_equal(outputs, np.tile(bias, (2, 1)))


def test_a_layer_is_named_if_only_its_variables_show_statistics():
    with pytest.warns(UserWarning, match="layers norm have variables.*lora_train_modules"):
        lora.inject_lora(around(RunningNorm(name="norm")), lora_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora.inject_lora(around(WithKwargs(), layers.BatchNormalization()), lora_rank=2)


def test_weights_that_are_loaded_are_no_changed_statistics():
    model = around(WithKwargs(name="norm"))
    lora.inject_lora(model, lora_rank=2)
    model.get_layer("norm").moving_mean.assign(np.ones(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora.adapter_of(model)


class Counter(layers.Layer):
    """Changes a variable of its own in every call."""

    def build(self, shape):
        self.calls = self.add_weight(
            name="calls", shape=(), initializer="zeros", trainable=False
        )
        self.built = True

    def call(self, x):
        self.calls.assign(self.calls + 1.0)
        return x * self.calls


def test_saving_names_statistics_that_changed(tmp_path):
    pytest.importorskip("safetensors")
    model = lora.inject_lora(around(Counter(name="counter")), lora_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lora.adapter_of(model)
    fitted(model)
    with pytest.warns(UserWarning, match="counter/calls.*lora_train_modules"):
        lora.save_adapter(model, tmp_path)


# -- variables that Keras collects ----------------------------------------------------------


@legacy_only
def test_modules_that_refer_to_each_other_and_to_their_layer_stay():
    import tensorflow as tf

    class Wrap(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.outer, child = tf.Module(), tf.Module()
            self.outer.child, child.parent, child.layer = child, self.outer, self
            child.w = tf.Variable(tf.ones((8,)))
            self.own = tf.Variable(tf.ones((8,)))

        def call(self, x):
            return x * self.outer.child.w * self.own

    model = around(Wrap(name="wrap"))
    run(model, normal(2, 4))
    everything = list(model.get_layer("wrap").weights)
    assert len(everything) == 2
    lora.inject_lora(model, lora_rank=2)
    stays(model, everything)


@legacy_only
@pytest.mark.parametrize("where", ["attribute", "list", "nested", "model"])
def test_variables_of_a_module_stay_frozen(where):
    import tensorflow as tf

    class Linear(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tf.random.normal((8, 8)), name="w")

        def __call__(self, x):
            return x @ self.w

    class Holder(tf.Module):
        def __init__(self):
            super().__init__()
            self.parts = [Linear(), layers.BatchNormalization(name="inside")]

        def __call__(self, x, training):
            return self.parts[1](self.parts[0](x), training=training)

    class Wrap(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            module = Holder() if where == "nested" else Linear()
            self.inner = [module] if where == "list" else module

        def call(self, x, training=False):
            inner = self.inner[0] if where == "list" else self.inner
            return inner(x, training) if where == "nested" else inner(x)

    class Whole(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc, self.inner = layers.Dense(8, name="fc"), Linear()
            self.head = layers.Dense(3, name="head")

        def call(self, x):
            return self.head(self.inner(self.fc(x)))

    model = Whole() if where == "model" else around(Wrap(name="wrap"))
    x = normal(2, 4)
    before = run(model, x)
    everything, trainable = list(model.weights), ids(model.trainable_weights)
    lora.inject_lora(model, lora_rank=2)
    assert ids(everything) < ids(model.weights)
    stays(model, everything)
    lora.remove_lora(model, merge=False)
    np.testing.assert_array_equal(run(model, x), before)
    assert ids(model.trainable_weights) == trainable


@pytest.mark.skipif(BACKEND != "torch", reason="of torch")
def test_a_torch_module_stays_frozen():
    import torch

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        )

    module = make()
    model = around(layers.TorchModuleWrapper(module, name="torch", output_shape=(None, 8)))
    lora.inject_lora(model, lora_rank=2)
    fitted(model)
    found, expected = module.state_dict(), make().state_dict()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].cpu().numpy(), value.numpy(), err_msg=name)


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
def test_a_jax_layer_stays_frozen():
    import jax.numpy as jnp

    def init(rng, inputs, training=False):
        return {"w": jnp.eye(8)}, {"mean": jnp.zeros(8)}

    def call(params, state, inputs, training=False):
        mean = jnp.where(training, inputs.mean(0), state["mean"])
        return inputs @ params["w"] - mean, {"mean": mean}

    inner = layers.JaxLayer(call, init, name="jax")
    model = lora.inject_lora(around(inner), lora_rank=2)
    stays(model, inner.weights)


class Late(keras.Model):
    """Has layers that are first used in training."""

    def __init__(self, created_late=False):
        super().__init__()
        self.created_late, self.extra = created_late, None
        self.fc, self.norm = layers.Dense(8, name="fc"), layers.BatchNormalization(name="norm")
        self.aux, self.head = layers.Dense(8, name="aux"), layers.Dense(3, name="head")

    def call(self, x, training=False):
        x = self.fc(x)
        if training:
            x = self.aux(self.norm(x, training=training))
        if training and self.created_late:
            if self.extra is None:
                self.extra = keras.Sequential(
                    [layers.Dense(8, name="late"), layers.BatchNormalization(name="late_norm")]
                )
            x = self.extra(x, training=training)
        return self.head(x)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras itself fails to train such a model on JAX")
def test_layers_that_are_built_in_training_stay_frozen():
    model = Late()
    run(model, normal(2, 4))
    assert not model.aux.built
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    fitted(model)
    assert model.aux.built and model.norm.built
    kernel = array(model.aux.kernel).copy()
    for variable, value in zip(model.norm.weights, (1.0, 0.0, 0.0, 1.0)):
        np.testing.assert_array_equal(array(variable), np.full(8, value, "float32"))
    model.fit(normal(8, 4), normal(8, 3), verbose=0)
    np.testing.assert_array_equal(array(model.aux.kernel), kernel)


class Block(layers.Layer):
    """Gets a token and a layer when it is built."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(8, name="first")

    def build(self, shape):
        self.token = self.add_weight(name="token", shape=(8,), initializer="ones")
        self.second = layers.Dense(8, name="second")
        self.second.build((None, 8))
        self.first.build(shape)
        self.built = True

    def call(self, x):
        return self.second(self.first(x) + self.token)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras itself fails to train such a model on JAX")
def test_blocks_that_are_built_in_training_stay_frozen_and_reload():
    model = Late()
    model.aux = Block(name="aux")
    run(model, normal(2, 4))
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    with pytest.warns(UserWarning, match="'aux' created layer 'second'"):
        fitted(model)
    assert len(model.aux.weights) == 5
    with pytest.warns(UserWarning, match="ompile"):
        lora.remove_lora(model, merge=False)
    names = [v.name for v in model.trainable_weights]
    assert len(names) == 11, names  # two of each dense layer and the norm, and the token


@legacy_only  # Keras 3 does not allow it
@pytest.mark.parametrize("eagerly", [True, False])
def test_layers_that_are_created_in_training_are_frozen_with_a_warning(eagerly):
    model = Late(created_late=True)
    run(model, normal(2, 4))
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    with pytest.warns(UserWarning, match="created layer 'sequential.*frozen"):
        fitted(model, epochs=1, run_eagerly=eagerly)
    still = values(model.extra.weights)
    model.fit(normal(8, 4), normal(8, 3), verbose=0)
    assert len(still) == 6
    for variable, value in zip(model.extra.weights, still):
        np.testing.assert_array_equal(array(variable), value)


@legacy_only
def test_statistics_of_layers_created_in_a_traced_step_stay_after_it():
    """Also within the same fit, and in a layer that is not the model itself."""

    class Inner(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first, self.norm = layers.LayerNormalization(name="first"), None

        def call(self, x, training=False):
            x = self.first(x)
            if training and self.norm is None:
                self.norm = layers.BatchNormalization(name="late_norm")
            return self.norm(x, training=training) if training else x

    class Statistics(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(array(inner.norm.moving_mean).copy())

    inner, seen = Inner(name="inner"), []
    model = around(inner)
    lora.inject_lora(model, lora_rank=2)
    model.compile("sgd", "mse")
    x, y = normal(16, 4) + 2, normal(16, 3)
    with pytest.warns(UserWarning, match="created layer 'late_norm'"):
        model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[Statistics()])
    assert len(seen) == 8
    for later in seen[1:]:
        np.testing.assert_array_equal(later, seen[0])


# -- switching layers on --------------------------------------------------------------------


def test_a_frozen_layer_says_that_it_stays_frozen():
    model = lora.inject_lora(around(), lora_rank=2)
    with pytest.warns(UserWarning, match="'head'.*lora_train_modules"):
        model.get_layer("head").trainable = True
    stays(model, model.get_layer("head").weights)


def test_an_adapted_layer_says_that_its_kernel_stays_frozen():
    model = lora.inject_lora(around(), lora_rank=2)
    layer = model.get_layer("fc")
    with pytest.warns(UserWarning, match="'fc'.*adapted"):
        layer.trainable = True
    stays(model, [layer.kernel, layer.bias])


def test_switching_off_and_on_again_says_nothing():
    model = lora.inject_lora(around(layers.LayerNormalization()), lora_train_bias="all")
    before = ids(model.trainable_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.trainable = False
        model.trainable = True
        for name in ("fc", "head"):
            model.get_layer(name).trainable = False
            model.get_layer(name).trainable = True
    assert ids(model.trainable_weights) == before


@keras3_only
@pytest.mark.parametrize("name", ["fc", "head"])
def test_keras_own_lora_is_refused(name):
    model = lora.inject_lora(around(), lora_rank=2)
    with pytest.raises(ValueError, match=f"{name}.*enable_lora"):
        model.get_layer(name).enable_lora(3)


def test_a_fully_trained_layer_of_any_kind_is_reported():
    model = around(layers.BatchNormalization(name="norm"))
    lora.inject_lora(model, lora_rank=2, lora_train_modules=["norm"])
    named = lora.lora_trainable_weights(model, trainable_layers=["norm"])
    assert ids(model.trainable_weights) == ids(named)
