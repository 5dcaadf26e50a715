"""Each test is a way in which changing a built layer goes wrong without a word."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import (
    BACKEND,
    LEGACY,
    array,
    ids,
    keras,
    normal,
    randomise,
    run,
    sgd,
    values,
)

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")


def test_fit_after_fit_trains_the_factors():
    """The cached train function must not go on training what is frozen now."""
    model = tiny_models.functional()
    x, y = normal(4, 8, 8, 3), np.zeros((4, 3))
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    with pytest.warns(UserWarning, match="ompile"):
        lora.inject_lora(model)
    model.compile("sgd", "mse")
    kernels = values(model.non_trainable_weights)
    factors = values(model.trainable_weights)
    model.fit(x, y, epochs=2, verbose=0)
    for variable, value in zip(model.non_trainable_weights, kernels):
        np.testing.assert_array_equal(array(variable), value)
    assert any(
        np.abs(array(v) - old).max() > 0 for v, old in zip(model.trainable_weights, factors)
    )


@on_tensorflow
def test_layer_changes_after_an_export_take_effect(tmp_path):
    """An export leaves a bound `call` in legacy layers, which would hide the class's."""
    model, x = tiny_models.functional(), normal(2, 8, 8, 3)
    lora.inject_lora(model)
    randomise(model)
    output = run(model, x)
    if LEGACY:
        model.save(str(tmp_path / "saved"))
    else:
        model.export(str(tmp_path / "saved"), verbose=False)
    lora.remove_lora(model, merge=False)
    plain = run(model, x)
    assert np.abs(plain - output).max() > 1e-3
    lora.inject_lora(model)
    randomise(model)
    assert np.abs(run(model, x) - plain).max() > 1e-3


@on_tensorflow
@pytest.mark.parametrize("merged", [False, True])
def test_exports_give_the_same_outputs(tmp_path, merged):
    import tensorflow as tf

    model, x = lora.inject_lora(tiny_models.functional()), normal(2, 8, 8, 3)
    randomise(model)
    output = run(model, x)
    if merged:
        lora.merge_lora_weights(model)
    path = str(tmp_path / "exported")
    model.export(path) if LEGACY else model.export(path, verbose=False)
    loaded = tf.saved_model.load(path)
    np.testing.assert_allclose(
        array(loaded.serve(tf.constant(x))), output, rtol=1e-4, atol=1e-5
    )
    lite = tf.lite.TFLiteConverter.from_saved_model(path).convert()
    interpreter = tf.lite.Interpreter(model_content=lite)
    entry = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(entry, x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(entry, x)
    interpreter.invoke()
    lite_output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(lite_output, output, rtol=1e-3, atol=1e-4)


def test_grouped_convolution_is_not_stale_after_merging():
    """Legacy Keras keeps a traced function for grouped convolutions."""
    layer, x = lora.LoRAConv2D(6, 3, groups=3, lora_rank=2), normal(2, 5, 5, 6)
    before = run(layer, x)
    randomise(layer)
    after = run(layer, x)
    assert np.abs(after - before).max() > 1e-3
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, x), after, rtol=1e-4, atol=1e-5)
    layer.unmerge_weights()
    layer.kernel_lora_b.assign(np.zeros(tuple(layer.kernel_lora_b.shape), "float32"))
    np.testing.assert_allclose(run(layer, x), before, rtol=1e-4, atol=1e-5)


def test_layer_norm_does_not_swap_gamma_and_beta_in_files(tmp_path):
    for train_bias in ("none", "all"):
        model = lora.inject_lora(tiny_models.sequential(), lora_train_bias=train_bias)
        norm = model.layers[1]
        norm.gamma.assign(np.full(4, 2.0))
        norm.beta.assign(np.full(4, 3.0))
        names = ["m.keras"] + (["m.h5", "m"] if LEGACY else [])
        for name in names:
            model.save(str(tmp_path / name))
            loaded = keras.models.load_model(str(tmp_path / name)).layers[1]
            np.testing.assert_array_equal(array(loaded.gamma), 2)
            np.testing.assert_array_equal(array(loaded.beta), 3)


@pytest.mark.skipif(LEGACY, reason="of Keras 3")
def test_keras_own_lora_stays_off():
    """Keras 3's layers own the names lora_rank and enable_lora."""
    layer = lora.LoRADense(4, lora_rank=2)
    run(layer, normal(2, 3))
    assert layer.lora_rank is None and not layer.lora_enabled
    assert len(layer.weights) == 4


def test_regularizer_counts_once_and_goes_with_the_layer():
    model = tiny_models.functional()
    lora.inject_lora(
        model, lora_targets=["hidden"], lora_regularizer=keras.regularizers.L2(1.0)
    )
    randomise(model)
    factors = [array(v) for v in model.trainable_weights]
    expected = sum((f**2).sum() for f in factors)
    np.testing.assert_allclose(sum(float(array(v)) for v in model.losses), expected, rtol=1e-5)
    lora.remove_lora(model)
    assert model.losses == []


def test_file_of_the_plain_model_does_not_pass_for_one_with_lora(tmp_path):
    plain = tiny_models.functional()
    plain.save_weights(str(tmp_path / "plain.weights.h5"))
    model = lora.inject_lora(tiny_models.functional())
    with pytest.raises(ValueError, match="kernel_lora_a|LoRA"):
        model.load_weights(str(tmp_path / "plain.weights.h5"))
    model.save_weights(str(tmp_path / "lora.weights.h5"))
    with pytest.raises(ValueError):
        tiny_models.functional().load_weights(str(tmp_path / "lora.weights.h5"))
    wider = lora.inject_lora(tiny_models.functional(), lora_rank=3)
    with pytest.raises(ValueError, match="shape"):
        wider.load_weights(str(tmp_path / "lora.weights.h5"))


def test_models_that_share_layers_are_not_copied_apart():
    """Keras' own clone_model loses the sharing, so a copy is refused, not wrong."""
    entry = keras.Input((6,))
    shared = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6)], name="shared")
    block = keras.Model(entry, shared(keras.layers.Dense(6)(entry)), name="block")
    outer = keras.Input((6,))
    model = keras.Model(outer, keras.layers.Dense(2, name="head")(shared(block(outer))))
    with pytest.raises(ValueError, match="cannot be copied.*inject_lora"):
        lora.convert_to_lora_model(model)
    x, before = normal(3, 6), run(model, normal(3, 6))
    lora.inject_lora(model)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)
    assert len(model.trainable_weights) == 4


def test_subclassed_model_without_a_config_is_refused_for_copying():
    class Bare(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.inner = layer

        def call(self, x):
            return self.inner(x)

    model = Bare(keras.layers.Dense(3, name="fc"))
    run(model, normal(2, 4))
    weights = values(model.weights)
    try:
        copy = lora.convert_to_lora_model(model, lora_targets=["fc"])
    except ValueError as error:
        assert "cannot be copied" in str(error)
    else:  # Keras 3 records the arguments of a constructor by itself
        assert not LEGACY and not ids(copy.weights) & ids(model.weights)
    for variable, value in zip(model.weights, weights):
        np.testing.assert_array_equal(array(variable), value)
    lora.inject_lora(model, lora_targets=["fc"])


def test_sequential_grown_after_injection_keeps_what_is_frozen():
    model = tiny_models.sequential()
    lora.inject_lora(model)
    named = ids(model.trainable_weights)
    model.add(keras.layers.Dense(2, name="new_head"))
    assert named < ids(model.trainable_weights)
    assert len(model.trainable_weights) == len(named) + 2


def test_submodel_of_an_adapted_model_agrees():
    model = lora.inject_lora(tiny_models.functional())
    features = keras.Model(model.inputs, model.get_layer("hidden").output)
    assert ids(features.trainable_weights) == ids(model.trainable_weights)


@on_tensorflow
def test_second_order_gradients_flow():
    import tensorflow as tf

    layer, x = lora.LoRADense(3, lora_rank=2), tf.constant(normal(2, 4, 5))
    layer(x)
    randomise(layer)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(layer(x) ** 3)
        first = inner.gradient(y, x)
        total = tf.reduce_sum(first**2)
    second = outer.gradient(total, layer.kernel_lora_b)
    b, delta = array(layer.kernel_lora_b).copy(), np.zeros((2, 3), "float32")
    delta[0, 1] = 1e-2

    def value(b):
        layer.kernel_lora_b.assign(b)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(layer(x) ** 3)
        return float(tf.reduce_sum(tape.gradient(y, x) ** 2))

    slope = (value(b + delta) - value(b - delta)) / 2e-2
    np.testing.assert_allclose(array(second)[0, 1], slope, rtol=2e-2)


@on_tensorflow
def test_regular_model_runs_without_the_package(tmp_path):
    model, x = lora.inject_lora(tiny_models.sequential()), normal(2, 8, 8, 3)
    randomise(model)
    lora.remove_lora(model)
    model.save(str(tmp_path / "model.keras"))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", run(model, x))
    code = f"""
import sys, numpy as np, tensorflow as tf
folder = {str(tmp_path)!r}
model = tf.keras.models.load_model(folder + "/model.keras")
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
np.testing.assert_allclose(np.array(model(x)), y, rtol=1e-6, atol=1e-6)
assert "tfimm_lora" not in sys.modules
assert len(model.trainable_weights) == len(model.weights)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class MergedForAMoment(keras.callbacks.Callback):
    """Merges and unmerges at every occasion within fit, evaluate and predict."""

    def _merge(self, *args, **kwargs):
        lora.merge_lora_weights(self.model)
        lora.unmerge_lora_weights(self.model)

    on_train_begin = on_epoch_begin = on_epoch_end = on_train_end = _merge
    on_test_begin = on_test_batch_end = on_predict_batch_end = _merge
    # On JAX, Keras writes the variables back at the end of an epoch only.
    on_train_batch_end = (
        _merge if BACKEND != "jax" else keras.callbacks.Callback.on_train_batch_end
    )


@pytest.mark.backends
def test_merging_within_fit_evaluate_and_predict_changes_nothing():
    results = []
    for callbacks in ([], [MergedForAMoment()]):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, name="fc"), keras.layers.Dense(3)]
        )
        lora.inject_lora(model, lora_rank=2)
        model.compile("adam", "mse")
        x, y = normal(8, 4), normal(8, 3)
        options = dict(verbose=0, batch_size=4, callbacks=callbacks)
        model.fit(x, y, epochs=3, shuffle=False, validation_data=(x, y), **options)
        loss = model.evaluate(x, y, **options)
        results.append([*values(model.weights), loss, model.predict(x, **options)])
    for plain, merged in zip(*results):
        np.testing.assert_allclose(merged, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.backends
@pytest.mark.parametrize("size", [1, 3])
def test_training_a_merged_model_warns(size):
    layer = keras.layers.Conv2D(4, size) if size > 1 else keras.layers.Dense(4)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layer,
            keras.layers.Flatten(),
            keras.layers.Dense(2, name="head"),
        ]
    )
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    model.compile("sgd", "mse")
    lora.merge_lora_weights(model)
    x, y = normal(4, 4, 4, 3), normal(4, 2)
    with pytest.warns(UserWarning, match="merged.*unmerge_lora_weights"):
        model.fit(x, y, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.predict(x, verbose=0)
        lora.unmerge_lora_weights(model)
        model.fit(x, y, verbose=0)


@on_tensorflow
@pytest.mark.parametrize("form", ["factored", "effective"])
@pytest.mark.parametrize("size", [1, 3])
def test_pictures_with_an_unknown_number_of_channels(size, form, monkeypatch):
    import tensorflow as tf

    from tfimm_lora.layers import forms

    monkeypatch.setattr(forms, "choose", lambda *args: forms.Form(form, "narrow"))
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(6, size, name="colour"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="head"),
        ]
    )
    lora.inject_lora(model, lora_rank=2)
    randomise(model)
    x = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), "uint8")
    pngs = [tf.io.encode_png(picture).numpy() for picture in x]
    pictures = tf.data.Dataset.from_tensor_slices((pngs, np.zeros((4, 3), "float32")))
    pictures = pictures.map(
        lambda png, y: (
            tf.image.resize(tf.io.decode_image(png, expand_animations=False), (8, 8)),
            y,
        )
    )
    expected = run(model, x.astype("float32"))
    found = model.predict(pictures.map(lambda x, y: x).batch(4), verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    model.compile("adam", "mse")
    model.fit(pictures.batch(4), verbose=0)


@pytest.mark.parametrize("form", ["factored", "effective"])
@pytest.mark.parametrize("kind", ["dense", "einsum", "conv", "depthwise", "embedding"])
def test_batches_of_a_generator_train_as_arrays_do(kind, form, monkeypatch):
    """Legacy Keras knows no size of what a generator yields, not even that of its axes."""
    from tfimm_lora.layers import forms

    monkeypatch.setattr(forms, "choose", lambda *args: forms.Form(form, "narrow"))
    layers = keras.layers
    entry, layer = {
        "dense": (keras.Input((5,)), layers.Dense(6)),
        "einsum": (keras.Input((4, 5)), layers.EinsumDense("abc,cd->abd", (4, 6))),
        "conv": (keras.Input((6, 6, 3)), layers.Conv2D(6, 1)),
        "depthwise": (keras.Input((6, 6, 3)), layers.DepthwiseConv2D(3)),
        "embedding": (keras.Input((5,), dtype="int32"), layers.Embedding(7, 6)),
    }[kind]
    model = keras.Sequential([entry, layer, layers.Flatten(), layers.Dense(3)])
    lora.inject_lora(model, lora_rank=2)
    randomise(model)
    rng = np.random.default_rng(0)
    shape = (8, *entry.shape[1:])
    x = rng.integers(0, 7, shape) if kind == "embedding" else rng.normal(size=shape)
    x = x.astype("int32" if kind == "embedding" else "float32")
    y = rng.normal(size=(8, 3)).astype("float32")
    start, trained, results = model.get_weights(), values(model.trainable_weights), []
    generator = ((x[i : i + 4], y[i : i + 4]) for i in (0, 4))
    for batches in ((x, y), (generator,)):
        model.set_weights(start)
        model.compile(sgd(0.1), "mse")
        model.fit(
            *batches, batch_size=4 if len(batches) == 2 else None, shuffle=False, verbose=0
        )
        results.append(values(model.trainable_weights))
    for found, expected, before in zip(*results[::-1], trained):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected - before).max() > 1e-4


class OwnFunctions(keras.Sequential):
    """As people wrote it before Keras had the argument ``force``."""

    def make_test_function(self):
        return super().make_test_function()


def test_a_make_function_without_force():
    model = OwnFunctions([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    model.evaluate(normal(4, 4), normal(4, 3), verbose=0)
    lora.inject_lora(model, lora_rank=2)
    model.evaluate(normal(4, 4), normal(4, 3), verbose=0)
    lora.merge_lora_weights(model)
    model.evaluate(normal(4, 4), normal(4, 3), verbose=0)


class SuperOfOwnClass(keras.layers.BatchNormalization):
    def call(self, inputs, training=None):
        return super(self.__class__, self).call(inputs, training=training)


class SuperOfType(keras.layers.Dense):
    def build(self, shape):
        super(type(self), self).build(shape)


class SuperInInit(keras.layers.Dense):
    """Common and harmless: the layer is converted after it was created."""

    def __init__(self, *args, **kwargs):
        super(self.__class__, self).__init__(*args, **kwargs)

    def call(self, inputs):
        assert type(self).__name__ and super().__class__ is not None
        return super().call(inputs)


@pytest.mark.backends
@pytest.mark.parametrize("make", [SuperOfOwnClass, lambda: SuperOfType(8)])
def test_super_of_the_own_class_is_refused_and_nothing_changes(make):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="fc"), make(), keras.layers.Dense(3)]
    )
    x, classes = normal(2, 4), [type(layer) for layer in model.layers]
    before = run(model, x)
    with pytest.raises(ValueError, match=r"super\(self.__class__, self\).*Write super\(\)"):
        lora.inject_lora(model, lora_rank=2)
    assert [type(layer) for layer in model.layers] == classes
    np.testing.assert_array_equal(run(model, x), before)


def test_super_of_the_own_class_in_init_does_no_harm():
    model = keras.Sequential(
        [keras.Input((4,)), SuperInInit(8, name="fc"), keras.layers.Dense(3)]
    )
    before = run(model, normal(2, 4))
    lora.inject_lora(model, lora_rank=2)
    np.testing.assert_allclose(run(model, normal(2, 4)), before, rtol=1e-6)


@pytest.mark.skipif(LEGACY, reason="keras_hub is for Keras 3")
def test_converted_models_are_not_found_in_the_registry_of_keras():
    class Task(keras.Model):
        def __init__(self):
            super().__init__()
            self.fc, self.head = keras.layers.Dense(4), keras.layers.Dense(3)

        def call(self, x):
            return self.head(self.fc(x))

    model = Task()
    run(model, normal(2, 4))
    lora.inject_lora(model, lora_rank=2)
    registered = keras.saving.get_custom_objects().values()
    assert not [c for c in registered if isinstance(c, type) and issubclass(c, Task)]


class Branches(keras.layers.Dense):
    """Reads its kernel in both branches of a condition."""

    def call(self, x):
        if LEGACY or BACKEND == "tensorflow":
            import tensorflow as tf

            return tf.cond(
                tf.reduce_mean(x) > 0,
                lambda: tf.matmul(x, self.kernel),
                lambda: tf.matmul(-x, self.kernel),
            )
        ops = keras.ops
        return ops.cond(
            ops.mean(x) > 0,
            lambda: ops.matmul(x, self.kernel),
            lambda: ops.matmul(-x, self.kernel),
        )


class Loop(keras.layers.Dense):
    """Reads its kernel in a loop that is part of the graph."""

    def call(self, x):
        if LEGACY:
            import tensorflow as tf

            for _ in tf.range(2):
                x = tf.matmul(x, self.kernel)
            return x
        return keras.ops.fori_loop(0, 2, lambda _, x: keras.ops.matmul(x, self.kernel), x)


@pytest.mark.backends
@pytest.mark.parametrize("cls", [Branches, Loop])
def test_a_kernel_that_is_read_in_a_branch_or_a_loop(cls):
    model = keras.Sequential([keras.Input((4,)), cls(4, use_bias=False, name="inner")])
    x = normal(2, 4)
    before = model.predict(x, verbose=0)
    lora.inject_lora(model, lora_rank=2, lora_targets=["inner"])
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)
    randomise(model)
    adapted = model.predict(x, verbose=0)
    model.compile("adam", "mse")
    factors = values(model.trainable_weights)
    model.fit(x, np.zeros((2, 4)), verbose=0)
    for variable, value in zip(model.trainable_weights, factors):
        assert np.abs(array(variable) - value).max() > 0
        variable.assign(value)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), adapted, rtol=1e-5, atol=1e-6)


class PassesItsKernelOn(keras.layers.Conv2D):
    """Hands its kernel to the convolution, as padding layers do."""

    def call(self, x):
        return self.convolution_op(x, self.kernel)


@pytest.mark.backends
@pytest.mark.parametrize("eager", [True, False])
def test_an_eager_convolution_uses_the_kernel_that_it_was_given(eager, monkeypatch):
    from tfimm_lora.layers.forward import LoRAForward

    if BACKEND == "jax" and eager:
        pytest.skip("on JAX the forms are those of compiled code")
    model = keras.Sequential([keras.Input((6, 6, 3)), PassesItsKernelOn(4, 3, name="conv")])
    lora.inject_lora(model, lora_rank=2, lora_targets=["conv"])
    randomise(model)
    computed, adapted = [], LoRAForward._adapted

    def counted(self, *args):
        computed.append(self.name)
        return adapted(self, *args)

    monkeypatch.setattr(LoRAForward, "_adapted", counted)
    x = normal(2, 6, 6, 3)
    found = run(model, x) if eager else model.predict(x, verbose=0)
    assert bool(computed) is not (eager or BACKEND == "torch")
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), found, rtol=1e-5, atol=1e-5)
