"""``export``: what is written gives the model's outputs, elsewhere; else nothing is left."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal, randomise, run, values
from tests.helpers.selection import nightly_except, nightly_on_legacy
from tests.helpers.tiny_models import MODELS, Subclassed
from tfimm_lora.exporting import export as export_module
from tfimm_lora.exporting import runners
from tfimm_lora.exporting.comparison import relative_difference
from tfimm_lora.exporting.export import export
from tfimm_lora.model.merge import lora_layers

layers = keras.layers
NAMES = {"keras": "m.keras", "savedmodel": "m", "tflite": "m.tflite", "onnx": "m.onnx"}
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="needs TensorFlow's graphs")


def cnn():
    """With what converters stumble on: groups (compiled for XLA), GELU (erfc), reshaping."""
    x = entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Conv2D(8, 3, groups=2, activation="gelu", name="grouped")(x)
    x = layers.Reshape((36, 8))(x)
    x = layers.Dense(6, activation="gelu", name="tokens")(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(entry, layers.Dense(3, name="head")(x), name="cnn")
    for name, value in (("moving_mean", 0.3), ("moving_variance", 0.5)):
        getattr(model.get_layer("bn"), name).assign(np.full(8, value, "float32"))
    return model


def small():
    x = entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, strides=2, name="stem")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="bn")(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(entry, layers.Dense(3, name="out")(x), name="small")


def adapted(make=small, **arguments):
    model = lora.inject_lora(make(), **{"lora_rank": 2, **arguments})
    randomise(model)
    return model


def load(format, path):
    """What somebody without this package does to run a file: a function of arrays."""
    if format == "keras":
        model = keras.models.load_model(path, compile=False)
        return lambda x: run(model, x)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (name,) = (i.name for i in session.get_inputs())
        return lambda x: session.run(None, {name: x})[0]
    import tensorflow as tf

    if format == "tflite":
        runner = tf.lite.Interpreter(str(path)).get_signature_runner()
        (name,) = runner.get_input_details()
        return lambda x: next(iter(runner(**{name: x}).values()))
    loaded = tf.saved_model.load(str(path))
    return lambda x: next(
        iter(loaded.signatures["serving_default"](tf.constant(x)).values())
    ).numpy()


def assert_same(format, path, model, shape=(8, 8, 3), **tolerance):
    """The file gives what the model gives, for batches of any size."""
    predict = load(format, path)
    for n in (1, 2, 5):
        x = normal(n, *shape, seed=n)
        expected = run(model, x)
        # Rounding of float32 over a dozen layers, relative to the largest output.
        bound = {"rtol": 0, "atol": 1e-5 * np.abs(expected).max(), **tolerance}
        np.testing.assert_allclose(predict(x), expected, **bound)


@on_tensorflow
@pytest.mark.parametrize("format", NAMES)
def test_a_lora_model_in_each_format(tmp_path, format):
    model = adapted(cnn)
    before = values(model.weights)
    done = export(model, tmp_path / NAMES[format], labels=["cat", "dog", "owl"])
    assert_same(format, done.path, model)
    assert done.format == format and done.path == tmp_path / NAMES[format]
    assert done.difference < 1e-5
    assert done.inputs[0].shape == (None, 8, 8, 3) and done.inputs[0].name == "inputs"
    assert done.outputs[0].shape == (None, 3) and done.outputs[0].name == "outputs"
    assert sorted(os.listdir(tmp_path)) == sorted([NAMES[format], f"{NAMES[format]}.json"])
    files = [done.path] if done.path.is_file() else list(done.path.rglob("*"))
    assert done.bytes == sum(f.stat().st_size for f in files if f.is_file())
    told = json.loads(done.description.read_text())
    assert told["labels"] == ["cat", "dog", "owl"] and told["format"] == format
    assert told["inputs"] == [{"name": "inputs", "shape": [None, 8, 8, 3], "dtype": "float32"}]
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.backends
def test_a_keras_file_holds_ordinary_layers_and_no_optimizer(tmp_path):
    model = adapted()
    model.compile("adam", "mse")
    done = export(model, tmp_path / "m.keras")
    loaded = keras.models.load_model(done.path)
    found = {type(layer).__module__.partition(".")[0] for layer in loaded.layers}
    assert found == {"tf_keras" if LEGACY else "keras"} and set(done.needs) == found
    assert getattr(loaded, "optimizer", None) is None
    assert_same("keras", done.path, model)


@pytest.mark.backends
def test_a_merged_model_stays_merged_and_is_restored_exactly(tmp_path):
    model = adapted()
    before = values(model.weights)
    lora.merge_lora_weights(model)
    done = export(model, tmp_path / "m.keras")
    assert_same("keras", done.path, model)
    assert all(layer.merged for layer in lora_layers(model).values())
    lora.unmerge_lora_weights(model)
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)


@pytest.mark.backends
@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow writes them all")
@pytest.mark.parametrize("format", ["savedmodel", "tflite", "onnx"])
def test_other_backends_get_advice(tmp_path, format):
    with pytest.raises(ValueError, match=f"on {BACKEND}.*KERAS_BACKEND=tensorflow"):
        export(adapted(), tmp_path / NAMES[format])
    assert not os.listdir(tmp_path)


@on_tensorflow
def test_an_ordinary_model_that_is_training_is_left_alone(tmp_path):
    model = small()
    model.compile("sgd", "mse")
    x, y = normal(4, 8, 8, 3), normal(4, 3)
    model.fit(x, y, verbose=0)
    before = values(model.weights)
    export(model, tmp_path / "m")
    assert_same("savedmodel", tmp_path / "m", model)
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)
    model.fit(x, y, verbose=0)


@on_tensorflow
@pytest.mark.parametrize("format", ["keras", "savedmodel"])
def test_a_subclassed_model(tmp_path, format):
    """Keras 3 loads its class without the weights of layers that are built when called."""
    model = adapted(_subclassed)
    done = export(model, tmp_path / NAMES[format])
    assert_same(format, done.path, model, (5, 6))
    assert ("tests" in done.needs) == (format == "keras")


def _subclassed():
    model = Subclassed(name="subclassed")
    model(np.zeros((1, 5, 6), "float32"))
    return model


@pytest.mark.long
@on_tensorflow
@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_a_subclassed_model_converted(tmp_path, format):
    model = adapted(_subclassed)
    done = export(model, tmp_path / NAMES[format])
    assert_same(format, done.path, model, (5, 6))


@on_tensorflow
def test_a_file_that_would_need_this_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "ordinary_model", lambda model, **_: nullcontext(model))
    with pytest.raises(ValueError, match="would need tfimm_lora"):
        export(adapted(), tmp_path / "m.keras")
    assert not os.listdir(tmp_path)


@pytest.mark.backends
def test_layers_written_as_lora_layers_become_ordinary(tmp_path):
    entry = keras.Input((4,))
    model = keras.Model(entry, lora.LoRADense(3, lora_rank=2, name="fc")(entry))
    randomise(model)
    done = export(model, tmp_path / "m.keras")
    assert type(keras.models.load_model(done.path).layers[-1]) is layers.Dense
    assert_same("keras", done.path, model, (4,))


class Unconfigured(keras.Model):
    """Keras cannot make it again from its config."""

    def __init__(self, widths):
        super().__init__()
        self.parts = [layers.Dense(width, name=f"fc{width}") for width in widths]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def get_config(self):
        raise NotImplementedError


@on_tensorflow
def test_a_model_that_cannot_be_copied_is_merged_only_while_it_is_written(tmp_path):
    model = Unconfigured((5, 3))
    model(np.zeros((1, 4), "float32"))
    lora.inject_lora(model, lora_rank=2)
    randomise(model)
    before = values(model.weights)
    done = export(model, tmp_path / "m")
    assert_same("savedmodel", done.path, model, (4,))
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)
    with pytest.raises(ValueError, match="cannot be copied"):
        export(model, tmp_path / "m.keras")
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)


@on_tensorflow
def test_several_inputs_and_outputs_keep_their_names(tmp_path):
    import onnxruntime

    one, two = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    both = layers.Concatenate()([one, two])
    model = keras.Model(
        {"left": one, "right": two},
        {"sum": layers.Dense(2)(both), "label": layers.Dense(3)(both)},
    )
    done = export(model, tmp_path / "m.onnx")
    assert [t.name for t in done.inputs] == ["left", "right"]
    assert sorted(t.name for t in done.outputs) == ["label", "sum"]
    given = {"left": normal(2, 4), "right": normal(2, 4, seed=1)}
    found = onnxruntime.InferenceSession(str(done.path)).run(["sum"], given)[0]
    np.testing.assert_allclose(found, np.asarray(model(given)["sum"]), atol=1e-6)


@on_tensorflow
def test_a_model_of_unknown_inputs_takes_its_shape_from_check_inputs(tmp_path, monkeypatch):
    model = _subclassed()
    from tfimm_lora.exporting import serving

    monkeypatch.setattr(serving, "_structure_of", lambda model: None)
    with pytest.raises(ValueError, match="pass check_inputs="):
        export(model, tmp_path / "m")
    export(model, tmp_path / "m", check_inputs=normal(2, 5, 6))
    assert_same("savedmodel", tmp_path / "m", model, (5, 6))


# -- the comparison ------------------------------------------------------------------------


@on_tensorflow
@pytest.mark.parametrize("format", ["keras", "savedmodel"])  # a file and a folder
def test_a_different_file_is_an_error_and_is_removed(tmp_path, monkeypatch, format):
    path = tmp_path / NAMES[format]
    model = adapted()
    export(model, path)
    marked = path if path.is_file() else path / "saved_model.pb"
    then, told = marked.read_bytes(), (tmp_path / f"{path.name}.json").read_bytes()
    _spoil(monkeypatch, lambda y: y + 0.01 * np.abs(y).max())
    with pytest.raises(ValueError, match="of the model by 0.01 of the largest"):
        export(model, path, overwrite=True)
    assert marked.read_bytes() == then
    assert (tmp_path / f"{path.name}.json").read_bytes() == told
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="Nothing was written"):
        export(model, tmp_path / "new" / path.name)
    assert not os.listdir(tmp_path / "new")
    loose = export(model, tmp_path / "new" / path.name, tolerance=0.02)
    assert loose.difference == pytest.approx(0.01, rel=0.01)


def _spoil(monkeypatch, change):
    """Let files give something else than they do."""
    whole = runners.runner_of

    def runner_of(*arguments):
        run_file = whole(*arguments)
        return lambda arrays: {name: change(y) for name, y in run_file(arrays).items()}

    monkeypatch.setattr(export_module, "runner_of", runner_of)


@pytest.mark.parametrize(
    "y, expected",
    [
        ([1.0, -3.0], 1 / 4),
        ([1.0, -4.0], 0.0),
        ([1.0, np.nan], np.inf),
        ([1.0], np.inf),
    ],
)
def test_difference_is_relative_to_the_largest_and_infinite_where_nothing_compares(y, expected):
    model = {"y": np.array([1.0, -4.0])}
    assert relative_difference({"y": np.array(y)}, model) == expected
    assert relative_difference({"z": model["y"]}, model) == np.inf
    zero = {"y": np.zeros(2)}
    assert relative_difference(zero, zero) == 0
    assert relative_difference({"y": np.full(2, 0.5)}, zero) == 0.5


@on_tensorflow
def test_a_model_that_gives_no_numbers_is_refused(tmp_path):
    model = adapted()
    model.get_layer("out").bias.assign([0.0, np.nan, 0.0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        export(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


@on_tensorflow
def test_a_fixed_batch_size_of_one_is_found(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class One(layers.Layer):
        def call(self, x):
            import tensorflow as tf

            return tf.reshape(x, (1 if x.shape[0] in (None, 1) else -1, 12))

    entry = keras.Input((3, 4))
    model = keras.Model(entry, layers.Dense(2)(One()(entry)))
    with pytest.raises(ValueError, match="cannot be exported to the format 'savedmodel'"):
        export(model, tmp_path / "m")
    assert not os.listdir(tmp_path)


# -- arguments -----------------------------------------------------------------------------


@on_tensorflow
@pytest.mark.parametrize(
    "name, arguments, error, words",
    [
        ("m.onnx", {"format": "onxx"}, ValueError, "did you mean onnx"),
        ("m.pb", {}, ValueError, "without a format; expected the suffix .keras"),
        ("m.tflite", {"format": "onnx"}, ValueError, "expected a name with the suffix .onnx"),
        ("m.h5", {"format": "keras"}, ValueError, "the suffix .keras"),
        ("no/m.onnx", {}, FileNotFoundError, "expected an existing folder"),
        ("m.onnx", {"quantize": "int8"}, ValueError, "Only the format 'tflite'"),
        (
            "m.tflite",
            {"quantize": "int4"},
            ValueError,
            "expected one of float16, dynamic, int8; did you mean int8",
        ),
        ("m.tflite", {"quantize": "int8"}, ValueError, "without samples; expected samples"),
        ("m.tflite", {"samples": np.zeros((1, 8, 8, 3))}, ValueError, "with samples"),
        ("m.tflite", {"opset": 17}, ValueError, "Only the format 'onnx'"),
        ("m.onnx", {"opset": 99}, ValueError, "expected 13 to 18"),
        ("m.onnx", {"tolerance": 0}, ValueError, "expected a number above 0"),
        ("m.onnx", {"tolerance": "1"}, TypeError, "expected a number above 0"),
        ("m.onnx", {"labels": ["a"]}, ValueError, "Received 1 labels for a model with outputs"),
        ("m.onnx", {"include_preprocessing": True}, ValueError, "is unknown. Pass preproc"),
        ("m.onnx", {"preprocessing": {"mean": [0.5]}}, TypeError, "without std; expected"),
        ("m.onnx", {"check_inputs": np.zeros((2, 9, 9, 3))}, ValueError, r"\(None, 8, 8, 3\)"),
        (
            "m.keras",
            {"include_preprocessing": True, "preprocessing": {"mean": [0.5], "std": [0.5]}},
            ValueError,
            "The preprocessing is in the JSON file beside it",
        ),
        (
            "m.onnx",
            {"include_preprocessing": True, "preprocessing": {"mean": [0.5], "std": [0.5]}},
            ValueError,
            r"expected pictures, \(batch, height, width, 1\)",
        ),
    ],
)
def test_errors_say_what_was_expected(tmp_path, name, arguments, error, words):
    with pytest.raises(error, match=words):
        export(small(), tmp_path / name, **arguments)
    assert not os.listdir(tmp_path)


@on_tensorflow
def test_what_is_there_is_replaced_only_on_request(tmp_path):
    model = adapted()
    path = tmp_path / "m"
    path.mkdir()
    export(model, path)  # an empty folder is nothing
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(model, path)
    (path / "old").write_text("")
    export(model, path, overwrite=True)
    assert not (path / "old").exists()
    assert_same("savedmodel", path, model)
    (tmp_path / "n.keras.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"n\.keras\.json already exists"):
        export(model, tmp_path / "n.keras")
    assert (tmp_path / "n.keras.json").read_text() == "mine"


@on_tensorflow
def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for name, match in (("home", "not a SavedModel"), ("home.onnx", "is a folder")):
        if name != "home":
            (tmp_path / "home").rename(tmp_path / name)
        with pytest.raises(IsADirectoryError, match=match):
            export(small(), tmp_path / name, overwrite=True)
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="A SavedModel is a folder"):
        export(small(), tmp_path / "file", overwrite=True)


@on_tensorflow
@pytest.mark.parametrize("package", ["tf2onnx", "onnxruntime"])
def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.*tfimm_lora\[onnx\]"):
        export(small(), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_a_disabled_adapter_is_not_exported_for_the_base(tmp_path):
    model = adapted()
    with lora.disable_adapter(model), pytest.raises(ValueError, match="Leave the disable_ad"):
        export(model, tmp_path / "m.keras")


# -- precision -----------------------------------------------------------------------------


@on_tensorflow
@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_a_model_of_16_bits_is_written_in_float32(tmp_path, policy, name):
    policy(name)
    model = adapted()
    before = values(model.weights)
    done = export(model, tmp_path / "m.keras")
    policy("float32")
    loaded = keras.models.load_model(done.path, compile=False)
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    x = normal(4, 8, 8, 3)
    expected = run(model, x).astype("float32")
    assert run(loaded, x).dtype == "float32"
    # bfloat16 has 8 bits: some 2 % after a few layers.
    np.testing.assert_allclose(run(loaded, x), expected, atol=0.05 * np.abs(expected).max())
    for now, then in zip(values(model.weights), before):
        np.testing.assert_array_equal(now, then)


@on_tensorflow
def test_a_model_that_differs_in_16_bits_is_reported(tmp_path, policy):
    """What is to be seen are differences of about 1 of numbers about 1000, in steps of 4."""
    policy("mixed_bfloat16")
    entry = keras.Input((4,))
    hidden = layers.Dense(2, name="hidden")(entry)
    model = keras.Model(entry, layers.Dense(3, name="out")(hidden))
    model.get_layer("hidden").bias.assign([1000.0, 1000.0])
    model.get_layer("out").kernel.assign([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    with pytest.raises(ValueError, match="differ from those in float32"):
        export(model, tmp_path / "m.keras")
    assert not os.listdir(tmp_path)


@on_tensorflow
@nightly_on_legacy
@pytest.mark.parametrize("quantize", ["float16", "dynamic"])
def test_quantised_weights_are_smaller(tmp_path, quantize):
    entry = keras.Input((64,))
    hidden = layers.Dense(512, activation="relu", name="fc")(entry)
    model = adapted(lambda: keras.Model(entry, layers.Dense(3, name="head")(hidden)))
    whole = export(model, tmp_path / "m.tflite")
    small = export(model, tmp_path / "q.tflite", quantize=quantize)
    assert small.bytes < (0.55 if quantize == "float16" else 0.35) * whole.bytes
    assert_same("tflite", small.path, model, (64,), atol=0.05)
    assert small.quantize == quantize and 1e-6 < small.difference < 0.05


@on_tensorflow
def test_int8_has_activations_in_int8_and_agrees_on_the_top_class(tmp_path):
    import tensorflow as tf

    model = adapted()
    x, labels = normal(40, 8, 8, 3), np.zeros(40)
    samples = tf.data.Dataset.from_tensor_slices((x, labels)).batch(8)
    done = export(model, tmp_path / "m.tflite", quantize="int8", samples=samples)
    details = tf.lite.Interpreter(str(done.path)).get_tensor_details()
    kinds = {np.dtype(t["dtype"]).name for t in details}
    assert kinds == {"int8", "int32", "float32"}
    assert sum(t["dtype"] is np.float32 for t in details) == 2  # what goes in and out
    predict = load("tflite", done.path)
    same = predict(x).argmax(1) == run(model, x).argmax(1)
    assert done.agreement == same.mean() >= 0.9
    assert json.loads(done.description.read_text())["quantize"] == "int8"


@on_tensorflow
def test_int8_that_confuses_classes_is_an_error(tmp_path, monkeypatch):
    def other_classes(y):
        return np.roll(y, 1, axis=1) if len(y) > 3 else y

    _spoil(monkeypatch, other_classes)
    with pytest.raises(
        ValueError, match="the same top class as the model for only.*Pass more typical"
    ):
        export(
            adapted(),
            tmp_path / "m.tflite",
            quantize="int8",
            samples=[picture for picture in normal(20, 8, 8, 3)],
        )
    assert not os.listdir(tmp_path)


# -- pictures ------------------------------------------------------------------------------

PREPROCESSING = {"input_size": (8, 8), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


@on_tensorflow
@pytest.mark.parametrize("format", ["savedmodel", "tflite", "onnx"])
def test_preprocessing_in_the_file_is_the_formula(tmp_path, format):
    model = adapted()
    order = "bgr" if format == "onnx" else "rgb"
    done = export(
        model,
        tmp_path / NAMES[format],
        preprocessing={**PREPROCESSING, "channel_order": order},
        include_preprocessing=True,
    )
    assert (done.inputs[0].name, done.inputs[0].dtype) == ("pictures", "float32")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("float32")
    seen = pictures[..., ::-1] if order == "bgr" else pictures
    x = (seen / 255 - np.array(PREPROCESSING["mean"])) / np.array(PREPROCESSING["std"])
    expected = run(model, x.astype("float32"))
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(load(format, done.path)(pictures), expected, atol=bound)
    told = json.loads(done.description.read_text())
    assert told["preprocessing_included"] is True
    assert told["preprocessing"]["mean"] == [0.4, 0.5, 0.6]


@on_tensorflow
def test_onnx_has_a_named_batch_the_opset_and_labels_in_its_metadata(tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    labels = ["cat", "dög", "owl"]
    export(small(), path, labels=labels, preprocessing=PREPROCESSING, opset=15)
    model = onnx.load(path)
    assert [x.version for x in model.opset_import if x.domain == ""] == [15]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    told = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert told["labels"] == labels and told["preprocessing_included"] is False
    assert told["preprocessing"]["std"] == [0.2, 0.3, 0.25]


# -- graphs --------------------------------------------------------------------------------


def traced(function, *shape):
    import tensorflow as tf

    spec = tf.TensorSpec(shape, tf.float32, "x")
    return tf.function(function, input_signature=[spec]).get_concrete_function()


@on_tensorflow
def test_sizes_that_do_not_depend_on_the_batch_become_numbers():
    import tensorflow as tf

    from tfimm_lora.exporting.static_shapes import with_static_shapes

    def windows(x):
        batch, height, width, channels = tf.unstack(tf.shape(x))
        x = tf.reshape(x, (batch, height // 2, 2, width // 3, 3, channels))
        x = tf.transpose(x, (0, 1, 3, 2, 4, 5))
        return tf.roll(tf.reshape(x, (batch, height * width, -1)), [1, -2], [1, 2])

    before = traced(windows, None, 4, 6, 5)
    after = traced(lambda x: with_static_shapes(before)(x)[0], None, 4, 6, 5)
    assert before.outputs[0].shape.as_list() == [None, 24, None]
    assert after.outputs[0].shape.as_list() == [None, 24, 5]
    assert "Roll" not in {op.type for op in after.graph.get_operations()}
    x = normal(3, 4, 6, 5)
    y = x.reshape(3, 2, 2, 2, 3, 5).transpose(0, 1, 3, 2, 4, 5).reshape(3, 24, 5)
    expected = np.roll(y, (1, -2), (1, 2))
    np.testing.assert_array_equal(after(tf.constant(x)), expected)


@on_tensorflow
def test_a_graph_with_a_loop_is_unchanged():
    import tensorflow as tf

    from tfimm_lora.exporting.static_shapes import with_static_shapes

    def looped(x):
        return tf.while_loop(lambda x: tf.reduce_sum(x) < 1.0, lambda x: (x + 1.0,), (x,))[0]

    assert with_static_shapes(traced(looped, None, 2)) is None


@on_tensorflow
def test_a_model_with_a_custom_loop_is_converted(tmp_path):
    import tensorflow as tf

    @keras.saving.register_keras_serializable(package="tests")
    class Halving(layers.Layer):
        @tf.function
        def halved(self, x):
            while tf.reduce_max(tf.abs(x)) > 1.0:
                x = x / 2.0
            return x

        def call(self, x):
            return self.halved(x)

    entry = keras.Input((4,))
    model = keras.Model(entry, layers.Dense(3, name="fc")(Halving()(entry)))
    done = export(model, tmp_path / "m.onnx")
    predict = load("onnx", done.path)
    x = 10 * normal(1, 4)
    np.testing.assert_allclose(predict(x), run(model, x), atol=1e-6)


# -- tfimm, and processes without this package ---------------------------------------------

FAST = ("vit", "onnx")


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize(
    "name, format",
    [
        pytest.param(n, f, marks=() if (n, f) == FAST else pytest.mark.nightly)
        for n in ("vit", "convnext")
        for f in NAMES
    ],
)
def test_tfimm_models(tmp_path, name, format):
    made = next(model for model in MODELS if model.name == name)
    model = lora.convert_to_lora_model(made.make(), lora_rank=2)
    randomise(model)
    done = export(model, tmp_path / NAMES[format])
    assert_same(format, done.path, model, made.input_shape)
    assert done.needs == (("tf_keras", "tfimm") if format == "keras" else ())
    told = json.loads(done.description.read_text())["preprocessing"]
    assert told["mean"] == list(model.cfg.mean) and told["input_size"] == [
        *model.cfg.input_size
    ]


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize("name", nightly_except(["swin", "pvt", "seresnext"], ["pvt"]))
@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_tfimm_models_that_ask_for_sizes_roll_or_have_groups(tmp_path, name, format):
    """As they are, TFLite lacks operations for them, and onnxruntime refuses PVT's file."""
    from tests.helpers.tiny_architectures import ARCHITECTURES

    model = adapted(ARCHITECTURES[name].make)
    done = export(model, tmp_path / NAMES[format])
    assert done.difference < 1e-4 and done.inputs[0].shape[0] is None


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_a_class_that_keras_cannot_load_is_an_error(tmp_path):
    from tests.helpers.tiny_architectures import ARCHITECTURES

    with pytest.raises(
        ValueError, match="cannot load the class EfficientNet from a file: Assertion"
    ):
        export(ARCHITECTURES["mobilenet_v2"].make(), tmp_path / "m.keras")
    assert not os.listdir(tmp_path)


ELSEWHERE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tfimm_lora", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np, tensorflow as tf
path, kind, x = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
if kind == "savedmodel":
    serve = tf.saved_model.load(path).signatures["serving_default"]
    y = serve(inputs=tf.constant(x))["outputs"]
else:
    if kind == "tfimm":
        import tfimm
    y = tf.keras.models.load_model(path)(x)
np.save(sys.argv[4], np.asarray(y))
assert "tfimm_lora" not in sys.modules
"""


@pytest.mark.long
@on_tensorflow
@pytest.mark.parametrize("kind", ["savedmodel", "keras", *(["tfimm"] if LEGACY else [])])
def test_a_process_without_this_package_predicts_the_same(tmp_path, kind):
    make = next(m for m in MODELS if m.name == "vit").make if kind == "tfimm" else cnn
    model = adapted(make)
    done = export(model, tmp_path / ("m" if kind == "savedmodel" else "m.keras"))
    x = normal(4, *done.inputs[0].shape[1:])
    np.save(tmp_path / "x.npy", x)
    arguments = [str(done.path), kind, str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        env={**os.environ, "TF_USE_LEGACY_KERAS": str(int(LEGACY)), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = run(model, x)
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=bound)
