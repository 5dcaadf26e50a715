"""Frozen convolutions with one group per channel use TensorFlow's depthwise convolution."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, array, keras, normal, randomise, run
from tfimm_lora.backend.interface import Backend

if BACKEND != "tensorflow":
    pytest.skip("the routine is TensorFlow's", allow_module_level=True)

import tensorflow as tf

Conv2D = keras.layers.Conv2D
CLOSE = dict(rtol=1e-4, atol=1e-5)

#: Name -> arguments of a Conv2D on 4 channels.
FAST = {
    "3x3": dict(filters=4, kernel_size=3),
    "7x7_same": dict(filters=4, kernel_size=7, padding="same"),
    "multiplier": dict(filters=12, kernel_size=3, padding="same"),
    "strided": dict(filters=4, kernel_size=3, strides=2),
    "strided_same": dict(filters=8, kernel_size=(3, 2), strides=2, padding="same"),
    "dilated": dict(filters=4, kernel_size=3, dilation_rate=2),
    "dilated_unequally": dict(filters=8, kernel_size=3, dilation_rate=(1, 2), padding="same"),
    "relu_without_bias": dict(filters=4, kernel_size=3, use_bias=False, activation="relu"),
}
#: The same for what the routine cannot compute, or need not.
LEFT_ALONE = {
    "fewer_groups": dict(filters=4, kernel_size=3, groups=2),
    "unequal_strides": dict(filters=4, kernel_size=3, strides=(1, 2)),
    "plain": dict(filters=4, kernel_size=3, groups=1),
}


class WithCall(Conv2D):
    """A subclass that computes something else."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class WithConvolution(Conv2D):
    """A subclass whose convolution is another one."""

    def convolution_op(self, inputs, kernel):
        return 2 * super().convolution_op(inputs, kernel)


class Named(Conv2D):
    """A subclass that changes nothing."""


def model_with(cls=Conv2D, **arguments):
    """A model of a grouped convolution and a Dense layer, with non-zero biases."""
    entry = keras.Input((9, 9, 4))
    x = cls(**{"groups": 4, **arguments}, bias_initializer="normal", name="conv")(entry)
    return keras.Model(entry, keras.layers.Dense(3, name="head")(x))


def output_and_gradient(model, x, **options):
    """The output for x, and the gradient of the sum of its squares."""

    @tf.function(**options)
    def compute(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
            loss = tf.reduce_sum(y**2)
        return y, tape.gradient(loss, x)

    return [array(value) for value in compute(tf.constant(x))]


def uses_routine(function, *inputs):
    """Whether the graph of a function has a depthwise convolution."""
    inputs = [tf.constant(x) for x in inputs]
    graph = tf.function(function).get_concrete_function(*inputs).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return any(node.op == "DepthwiseConv2dNative" for node in nodes)


@pytest.mark.parametrize("name", FAST)
def test_outputs_and_gradients_are_those_of_the_plain_layer(name):
    model, x = model_with(**FAST[name]), normal(2, 9, 9, 4)
    expected = output_and_gradient(model, x)
    assert not uses_routine(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    assert uses_routine(model, x)
    for value, plain in zip(output_and_gradient(model, x), expected):
        np.testing.assert_allclose(value, plain, **CLOSE)
    np.testing.assert_allclose(run(model, x), expected[0], **CLOSE)  # eagerly
    lora.remove_lora(model)
    assert not uses_routine(model, x) and type(model.get_layer("conv")) is Conv2D
    np.testing.assert_array_equal(output_and_gradient(model, x)[0], expected[0])


@pytest.mark.parametrize("name", ["7x7_same", "multiplier", "strided", "dilated"])
def test_outputs_and_gradients_agree_when_compiled_by_xla(name):
    model, x = model_with(**FAST[name]), normal(2, 9, 9, 4)
    expected = output_and_gradient(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    for value, plain in zip(output_and_gradient(model, x, jit_compile=True), expected):
        np.testing.assert_allclose(value, plain, **CLOSE)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_convolutions_are_left_alone(name):
    model, x = model_with(**LEFT_ALONE[name]), normal(2, 9, 9, 4)
    expected = output_and_gradient(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    assert not uses_routine(model, x)
    for value, same in zip(output_and_gradient(model, x), expected):
        np.testing.assert_allclose(value, same, **CLOSE)


@pytest.mark.parametrize("cls, fast", [(WithCall, 0), (WithConvolution, 0), (Named, 1)])
@pytest.mark.parametrize("target", ["head", "conv"])
def test_subclasses_that_compute_differently_are_left_alone(cls, fast, target):
    model, x = model_with(cls, filters=8, kernel_size=3), normal(2, 9, 9, 4)
    expected = output_and_gradient(model, x)
    lora.inject_lora(model, lora_rank=2, lora_targets=[target])
    assert uses_routine(model, x) == bool(fast)
    for value, plain in zip(output_and_gradient(model, x), expected):
        np.testing.assert_allclose(value, plain, **CLOSE)


def test_a_trained_layer_is_left_alone():
    model, x = model_with(filters=4, kernel_size=3), normal(2, 9, 9, 4)
    modules = dict(lora_targets=["head"], lora_train_modules=["conv"])
    lora.inject_lora(model, lora_rank=2, **modules)
    assert not uses_routine(model, x)


def test_other_devices_are_left_alone(monkeypatch):
    model, x = model_with(filters=4, kernel_size=3), normal(2, 9, 9, 4)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    monkeypatch.setattr(Backend, "is_tensorflow_on_cpu", lambda self: False)
    assert not uses_routine(model, x)


def test_only_a_cpu_counts(monkeypatch):
    backend = lora.backend.backend_of(Conv2D)
    assert backend.is_tensorflow_on_cpu()
    devices = [tf.config.LogicalDevice("/device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda: devices)
    assert not backend.is_tensorflow_on_cpu()


def test_channels_first_is_left_alone():
    layer = Conv2D(4, 3, groups=4, data_format="channels_first")
    layer.build((None, 4, 9, 9))
    entry = keras.Input((4, 9, 9))
    model = keras.Model(entry, keras.layers.Dense(3, name="head")(layer(entry)))
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    assert not uses_routine(model, normal(2, 4, 9, 9))


@pytest.mark.parametrize("kind, unit", [("mixed_bfloat16", 2**-8), ("mixed_float16", 2**-11)])
def test_outputs_in_16_bits_are_near_those_in_float32(kind, unit, policy):
    plain, x = model_with(filters=8, kernel_size=7, padding="same"), normal(2, 9, 9, 4)
    expected = run(plain, x)
    policy(kind)
    model = model_with(filters=8, kernel_size=7, padding="same")
    model.set_weights(plain.get_weights())
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    assert uses_routine(model, x)
    error = run(model, x).astype("float32") - expected
    assert np.linalg.norm(error) < 4 * unit * np.linalg.norm(expected)


def test_an_input_smaller_than_the_window_is_treated_as_by_keras():
    entry = keras.Input((None, None, 4))
    x = Conv2D(4, 3, groups=4)(entry)
    model = keras.Model(entry, keras.layers.Dense(3, name="head")(x))

    def outcome():
        try:
            return run(model, normal(1, 2, 2, 4)).shape
        except Exception as error:
            return type(error)

    before = outcome()
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    assert outcome() == before


def test_an_adapted_layer_uses_the_routine_for_its_effective_kernel():
    model, x = model_with(filters=8, kernel_size=3), normal(2, 9, 9, 4)
    lora.inject_lora(model, lora_rank=2, lora_targets=["conv"])
    randomise(model)
    assert uses_routine(model, x)
    values = output_and_gradient(model, x)
    regular = lora.convert_to_regular_model(model)
    assert not uses_routine(regular, x)
    for value, plain in zip(values, output_and_gradient(regular, x)):
        np.testing.assert_allclose(value, plain, **CLOSE)


def test_a_converted_model_agrees_with_the_model_it_is_converted_back_to():
    plain, x = model_with(filters=8, kernel_size=7, padding="same"), normal(2, 9, 9, 4)
    expected = output_and_gradient(plain, x)
    model = lora.convert_to_lora_model(plain, lora_rank=2, lora_targets=["head"])
    assert uses_routine(model, x) and not uses_routine(plain, x)
    back = lora.convert_to_regular_model(model)
    assert type(back.get_layer("conv")) is Conv2D and not uses_routine(back, x)
    for converted in (model, back):
        for value, same in zip(output_and_gradient(converted, x), expected):
            np.testing.assert_allclose(value, same, **CLOSE)


def test_a_loaded_model_uses_the_routine(tmp_path):
    model, x = model_with(filters=8, kernel_size=3), normal(2, 9, 9, 4)
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    assert uses_routine(loaded, x)
    np.testing.assert_allclose(run(loaded, x), run(model, x), **CLOSE)


def test_training_steps_are_those_of_the_plain_layer(monkeypatch):
    steps, x = [], normal(2, 9, 9, 4)
    start = model_with(filters=4, kernel_size=3).get_weights()
    for on_cpu in (True, False):
        model = model_with(filters=4, kernel_size=3)
        model.set_weights(start)
        monkeypatch.setattr(Backend, "is_tensorflow_on_cpu", lambda self, value=on_cpu: value)
        keras.utils.set_random_seed(1)
        lora.inject_lora(model, lora_rank=2, lora_targets=["conv", "head"])
        randomise(model)
        model.compile(keras.optimizers.SGD(0.01), "mse")
        assert uses_routine(model, x) == on_cpu
        for _ in range(2):
            model.train_on_batch(x, np.zeros((2, 7, 7, 3), "float32"))
        steps.append([array(v) for v in model.trainable_weights])
    assert len(steps[0]) == 4
    for fast, plain in zip(*steps):
        np.testing.assert_allclose(fast, plain, **CLOSE)
