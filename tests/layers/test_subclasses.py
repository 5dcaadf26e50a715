"""Subclasses of Keras layers are adapted exactly, or refused with a reason."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import reference
from tests.helpers.kerases import LEGACY, array, keras, normal, randomise, run

Dense, Conv2D = keras.layers.Dense, keras.layers.Conv2D
CLOSE = dict(rtol=1e-4, atol=1e-5)


def mean(x, axes):
    import tensorflow as tf

    return tf.reduce_mean(x, axes, keepdims=True) if LEGACY else keras.ops.mean(x, axes, True)


class Centred(Conv2D):
    """Transforms its kernel before it convolves, like weight standardisation."""

    def call(self, x):
        kernel = self.kernel
        return self.convolution_op(x, kernel - mean(kernel, (0, 1, 2)))


class Doubling(Dense):
    """Reads the kernel twice and calls its parent."""

    def call(self, x, training=None):
        return super().call(x) + mean(self.kernel, (0, 1))


class Ignoring(Dense):
    """Never reads its kernel."""

    def call(self, x):
        return x * 2


class Scaling(Conv2D):
    """A convolution that is not linear in its kernel."""

    def convolution_op(self, x, kernel):
        return super().convolution_op(x, kernel * kernel)


class Named(Dense):
    """Overrides nothing that computes."""

    def __init__(self, *args, note="", **kwargs):
        super().__init__(*args, **kwargs)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


def converted(layer, x, **kwargs):
    run(layer, x)
    cls = type(layer)
    assert lora.convert_to_lora_layer(layer, lora_rank=2, lora_alpha=4, **kwargs) is layer
    assert isinstance(layer, cls)
    randomise(layer)
    return layer


def updated_kernel(layer):
    values = layer.lora_values()
    return values["kernel"] + 2 * reference.conv_update(
        values["kernel_lora_a"], values["kernel_lora_b"]
    )


def trains(layer, x):
    entry = keras.Input(x.shape[1:])
    model = keras.Model(entry, layer(entry))
    before = [array(v).copy() for v in layer.trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, run(model, x) + 1)
    moved = [np.abs(array(v) - old).max() for v, old in zip(layer.trainable_weights, before)]
    return len(moved) == 2 and min(moved) > 0


def test_transformed_kernel_is_adapted_before_the_transformation():
    x = normal(2, 5, 5, 3)
    layer = converted(Centred(4, 3, name="c"), x)
    assert isinstance(layer, lora.LoRAConv2D)
    kernel = updated_kernel(layer)
    kernel = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
    expected = reference.convolution(x, kernel, (1, 1), "valid", (1, 1))
    np.testing.assert_allclose(run(layer, x), expected, **CLOSE)
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, x), expected, **CLOSE)
    layer.unmerge_weights()
    assert trains(layer, x)


def test_dropout_is_refused_where_the_kernel_is_transformed():
    layer = Centred(4, 3)
    run(layer, normal(2, 5, 5, 3))
    variables = list(layer.weights)
    with pytest.raises(ValueError, match="transforms its kernel.*lora_dropout=0"):
        lora.convert_to_lora_layer(layer, lora_dropout=0.5)
    assert type(layer) is Centred and len(layer.weights) == len(variables)
    assert len(layer.trainable_weights) == len(variables)


def test_call_that_calls_its_parent_and_reads_the_kernel_again():
    x = normal(2, 3, 5)
    layer = converted(Doubling(4), x)
    kernel = updated_kernel(layer)
    expected = x @ kernel + array(layer.bias) + kernel.mean(axis=(0, 1))
    np.testing.assert_allclose(run(layer, x), expected, **CLOSE)
    assert trains(layer, x)


def test_call_that_ignores_the_kernel_is_refused():
    layer = Ignoring(5)
    run(layer, normal(2, 5))
    with pytest.raises(ValueError, match="never reads its kernel"):
        lora.convert_to_lora_layer(layer)
    assert type(layer) is Ignoring and len(layer.weights) == 2
    unbuilt = lora.convert_to_lora_layer(Ignoring(5))
    with pytest.raises(ValueError, match="never reads its kernel"):
        run(unbuilt, normal(2, 5))


def test_a_custom_convolution_is_used_and_not_split():
    x = normal(2, 5, 5, 3)
    layer = converted(Scaling(4, 3), x)
    expected = reference.convolution(x, updated_kernel(layer) ** 2, (1, 1), "valid", (1, 1))
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-3, atol=1e-3)
    assert trains(layer, x)


def test_subclass_without_a_call_of_its_own_keeps_its_config():
    x = normal(2, 3)
    layer = converted(Named(4, note="mine"), x)
    np.testing.assert_allclose(run(layer, x), x @ updated_kernel(layer), **CLOSE)
    twin = type(layer).from_config(layer.get_config())
    assert twin.note == "mine" and twin.lora.rank == 2 and isinstance(twin, Named)


def test_a_custom_class_loads_once_its_lora_class_is_registered(tmp_path):
    x = normal(2, 3)
    layer = converted(Named(4, note="mine"), x)
    entry = keras.Input((3,))
    model = keras.Model(entry, layer(entry))
    model.save(str(tmp_path / "model.keras"))
    lora.lora_class(Named)
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    np.testing.assert_allclose(run(loaded, x), run(model, x), **CLOSE)


def test_a_class_that_is_defined_again_replaces_the_old_one():
    """As when a cell of a notebook is run twice."""

    def define():
        class Mine(Dense):
            pass

        return Mine

    first, second = (lora.lora_class(define()) for _ in range(2))
    assert first is not second and first.__name__ == second.__name__


def test_error_inside_a_call_leaves_the_kernel_as_it_was():
    class Failing(Dense):
        fail = False

        def call(self, x):
            y = super().call(x)
            if self.fail:
                raise RuntimeError("on purpose")
            return y

    x = normal(2, 3)
    layer = converted(Failing(4), x)
    kernel = layer._kernel_variable
    layer.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        run(layer, x)
    layer.fail = False
    assert layer.kernel is kernel
    np.testing.assert_allclose(run(layer, x), x @ updated_kernel(layer), **CLOSE)


def test_other_threads_see_the_variable_while_a_call_runs():
    import threading

    seen = []

    class Watching(Dense):
        def call(self, x):
            mine = self.kernel
            thread = threading.Thread(target=lambda: seen.append(self.kernel))
            thread.start()
            thread.join()
            seen.append(mine)
            return super().call(x)

    layer = converted(Watching(4), normal(2, 3))
    seen.clear()
    run(layer, normal(2, 3))
    np.testing.assert_array_equal(array(seen[0]), array(layer._kernel_variable))
    np.testing.assert_allclose(array(seen[1]), updated_kernel(layer), **CLOSE)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
class TestTfimmConvolutions:
    """tfimm's own subclasses: symmetric padding, weight standardisation."""

    @pytest.mark.parametrize("strides, groups", [(1, 1), (2, 1), (1, 2)])
    def test_pad_conv(self, strides, groups):
        from tfimm.layers.conv import PadConv2D

        x = normal(2, 7, 6, 4)
        layer = PadConv2D(4, 3, strides=strides, padding="symmetric", groups=groups)
        layer = converted(layer, x)
        expected = reference.convolution(
            x, updated_kernel(layer), (strides, strides), (1, 1), (1, 1), groups
        )
        np.testing.assert_allclose(run(layer, x), expected, **CLOSE)
        assert trains(layer, x)
        twin = type(layer)(4, 3, strides=strides, padding="symmetric", lora_rank=2)
        assert twin.pad is not None

    def test_pad_conv_is_traced_as_the_convolution_of_keras(self):
        """Its call only pads, so it is not given an effective kernel that nothing uses."""
        import tensorflow as tf
        from tfimm.layers.conv import PadConv2D

        x, counts = normal(2, 7, 6, 4), []
        for cls in (PadConv2D, Conv2D):
            traced = tf.function(converted(cls(4, 3), x)).get_concrete_function(x)
            counts.append(len(traced.graph.get_operations()))
        assert counts[0] == counts[1]

    def test_pad_conv_drops(self):
        from tfimm.layers.conv import PadConv2D

        x = normal(2, 7, 6, 4)
        layer = converted(PadConv2D(4, 3, padding="symmetric"), x, lora_dropout=0.5)
        entry = keras.Input(x.shape[1:])
        model = keras.Model(entry, layer(entry))
        calm = run(model, x, training=False)
        assert np.abs(run(model, x, training=True) - calm).max() > 1e-2

    def test_pad_depthwise(self):
        from tfimm.layers.conv import PadDepthwiseConv2D

        x = normal(2, 7, 6, 4)
        layer = converted(PadDepthwiseConv2D(3, strides=2, padding="symmetric"), x)
        values = layer.lora_values()
        kernel = values["kernel"] + 2 * reference.depthwise_update(
            values["kernel_lora_a"], values["kernel_lora_b"], values["kernel"].shape
        )
        expected = reference.depthwise(x, kernel, (2, 2), (1, 1), (1, 1))
        np.testing.assert_allclose(run(layer, x), expected, **CLOSE)
        assert trains(layer, x)

    def test_std_conv(self):
        from tfimm.layers.conv import StdConv2D

        x = normal(2, 7, 6, 4)
        layer = converted(StdConv2D(5, 3, padding="symmetric", eps=1e-6), x)
        kernel = updated_kernel(layer)
        kernel = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        kernel = kernel / np.sqrt(kernel.var(axis=(0, 1, 2), keepdims=True) + 1e-6)
        expected = reference.convolution(x, kernel, (1, 1), (1, 1), (1, 1))
        output = run(layer, x)
        np.testing.assert_allclose(output, expected, **CLOSE)
        variable = layer._kernel_variable
        assert layer.kernel is variable and trains(layer, x)
        output = run(layer, x)
        layer.merge_weights()
        np.testing.assert_allclose(run(layer, x), output, rtol=1e-4, atol=1e-4)
        plain = StdConv2D(5, 3, padding="symmetric", eps=1e-6)
        run(plain, x)
        plain.kernel.assign(array(layer.kernel))
        plain.bias.assign(array(layer.bias))
        np.testing.assert_allclose(run(plain, x), output, rtol=1e-4, atol=1e-4)
