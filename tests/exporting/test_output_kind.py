"""Exports return logits or probabilities, as requested, and say which."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

import tfimm_lora as lora
from tests.exporting.test_export import NAMES, load, on_tensorflow
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal, randomise, run, values
from tests.helpers.tiny_models import MODELS
from tfimm_lora.exporting.export import export
from tfimm_lora.exporting.opening import instructions
from tfimm_lora.model.output_activation import output_activation

layers = keras.layers


def classifier(end=None, width=8, name="classifier"):
    """A small convolutional model that ends in an activation or a layer."""
    x = entry = keras.Input((8, 8, 3))
    x = layers.Conv2D(width, 3, strides=2, activation="relu", name="stem")(x)
    x = layers.GlobalAveragePooling2D()(x)
    is_layer = end is not None and not isinstance(end, str)
    x = layers.Dense(3, activation=None if is_layer else end, name="head")(x)
    return keras.Model(entry, end(x) if is_layer else x, name=name)


def convolutional(end=None):
    """As MobileNet: a convolution of one pixel is the classifier."""
    x = entry = keras.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Conv2D(3, 1, name="preds")(layers.Dropout(0.5)(x))
    x = layers.Reshape((3,))(x)
    return keras.Model(entry, layers.Activation(end, name="predictions")(x))


def within(end):
    """The classifier as the last layer of another model."""
    entry = keras.Input((8, 8, 3))
    return keras.Model(entry, classifier(end, name="inner")(layers.Rescaling(2.0)(entry)))


def stacked(end):
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(3, activation=end)]
    )


@keras.saving.register_keras_serializable(package="tests")
class OwnClassifier(keras.Model):
    """Its code, which nothing can read, decides what it returns."""

    def __init__(self, softmax=False, **kwargs):
        super().__init__(**kwargs)
        self.softmax, self.flatten = softmax, layers.Flatten()
        self.head = layers.Dense(3, name="head", bias_initializer="normal")

    def call(self, x):
        y = self.head(self.flatten(x))
        return keras.activations.softmax(y) if self.softmax else y

    def get_config(self):
        return {**super().get_config(), "softmax": self.softmax}


def own(softmax):
    model = OwnClassifier(softmax)
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


def adapted(model):
    lora.inject_lora(model, lora_rank=2)
    randomise(model)
    return model


def sidecar(done):
    return json.loads(done.description.read_text(encoding="utf-8"))


# -- the activation at the end --------------------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: classifier(), "linear"),
        (lambda: classifier("softmax"), "softmax"),
        (lambda: classifier("sigmoid"), "sigmoid"),
        (lambda: classifier(layers.Softmax()), "softmax"),
        (lambda: classifier(layers.Activation("softmax")), "softmax"),
        (lambda: classifier(layers.Activation("linear")), "linear"),
        (lambda: classifier(layers.Reshape((3, 1))), "linear"),
        (lambda: classifier(layers.ReLU()), None),
        (lambda: within("softmax"), "softmax"),
        (lambda: within(layers.Softmax()), "softmax"),
        (lambda: stacked("softmax"), "softmax"),
        (lambda: stacked("tanh"), "tanh"),
        (lambda: own(True), None),
        (lambda: convolutional(), "linear"),
        (lambda: convolutional("softmax"), "softmax"),
        (lambda: adapted(classifier("softmax")), "softmax"),
    ],
)
def test_the_activation_at_the_end_is_found(make, expected):
    assert output_activation(make()) == expected


# -- every format ---------------------------------------------------------------------------


@on_tensorflow
@pytest.mark.parametrize("format", NAMES)
def test_each_format_returns_the_softmax_of_the_logits(tmp_path, format):
    model = adapted(classifier())
    done = export(model, tmp_path / NAMES[format], probabilities=True, labels=list("abc"))
    x = normal(5, 8, 8, 3)
    np.testing.assert_allclose(
        load(format, done.path)(x), softmax(run(model, x).astype("float64"), axis=1), atol=1e-6
    )
    assert done.returns == sidecar(done)["returns"] == "probabilities"
    assert done.difference < 1e-5 and done.outputs[0].name == "outputs"
    assert output_activation(model) == "linear"  # the argument is not changed


@on_tensorflow
@pytest.mark.parametrize("format", NAMES)
def test_each_format_returns_the_logits_before_a_softmax(tmp_path, format):
    model = adapted(classifier("softmax"))
    done = export(model, tmp_path / NAMES[format], probabilities=False)
    x = normal(5, 8, 8, 3)
    found = load(format, done.path)(x).astype("float64")
    expected = run(model, x).astype("float64")
    np.testing.assert_allclose(softmax(found, axis=1), expected, atol=1e-6)
    assert np.abs(found.sum(1) - 1).max() > 1e-3  # no longer probabilities
    head = model.get_layer("head")
    assert head.activation is keras.activations.softmax
    kernel, bias = values([head.kernel, head.bias])
    features = run(keras.Model(model.input, head.input), x)
    np.testing.assert_allclose(found, features @ kernel + bias, atol=1e-5)
    assert done.returns == sidecar(done)["returns"] == "logits"


@on_tensorflow
@pytest.mark.parametrize("format", ["keras", "onnx"])
@pytest.mark.parametrize("end, expected", [(None, "logits"), ("softmax", "probabilities")])
def test_by_default_the_file_returns_what_the_model_returns(tmp_path, format, end, expected):
    model = adapted(classifier(end))
    done = export(model, tmp_path / NAMES[format])
    x = normal(5, 8, 8, 3)
    np.testing.assert_allclose(load(format, done.path)(x), run(model, x), atol=1e-5)
    assert done.returns == sidecar(done)["returns"] == expected


@on_tensorflow
def test_int8_returns_the_softmax_of_the_logits(tmp_path):
    model = adapted(classifier())
    samples = normal(40, 8, 8, 3)
    done = export(
        model, tmp_path / "m.tflite", quantize="int8", samples=samples, probabilities=True
    )
    found = load("tflite", done.path)(samples)
    expected = softmax(run(model, samples).astype("float64"), axis=1)
    # A softmax in int8 has steps of 1/256; activations and weights add some of their own.
    np.testing.assert_allclose(found, expected, atol=0.04)
    np.testing.assert_allclose(found.sum(1), 1, atol=0.02)
    assert done.returns == "probabilities" and done.agreement >= 0.9


def metadata(format, path):
    """The metadata inside a file."""
    if format == "onnx":
        import onnx

        return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    if format == "tflite":
        return json.loads(zipfile.ZipFile(path).read("metadata.json"))
    return json.loads((path / "assets.extra" / "metadata.json").read_text(encoding="utf-8"))


@on_tensorflow
@pytest.mark.parametrize("format", ["savedmodel", "tflite", "onnx"])
def test_the_metadata_of_a_file_are_inside_it(tmp_path, format):
    model, more = classifier(), {"mean": [0.5] * 3, "std": [0.25] * 3}
    done = export(model, tmp_path / NAMES[format], labels=["a", "b", "ü"], preprocessing=more)
    assert metadata(format, done.path) == {
        "returns": "logits",
        "labels": ["a", "b", "ü"],
        "preprocessing": more,
        "preprocessing_included": False,
    }
    again = export(model, done.path, probabilities=True, overwrite=True)
    assert metadata(format, again.path)["returns"] == "probabilities"
    x = normal(2, 8, 8, 3)
    expected = softmax(run(model, x).astype("float64"), axis=1)
    np.testing.assert_allclose(load(format, again.path)(x), expected, atol=1e-6)


# -- every kind of model --------------------------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize(
    "make",
    [
        lambda: within(None),
        lambda: stacked(None),
        lambda: own(False),
        lambda: classifier(layers.Flatten()),
        lambda: classifier(layers.Activation("linear")),
        lambda: convolutional(),
    ],
    ids=["nested", "sequential", "own", "flatten", "linear", "convolutional"],
)
def test_a_softmax_is_added_to_any_model(tmp_path, make):
    model = make()
    done = export(model, tmp_path / "m.keras", probabilities=True)
    x = normal(5, 8, 8, 3)
    expected = softmax(run(model, x).astype("float64"), axis=1)
    np.testing.assert_allclose(load("keras", done.path)(x), expected, atol=1e-6)
    again = export(model, tmp_path / "logits.keras")
    np.testing.assert_allclose(load("keras", again.path)(x), run(model, x), atol=1e-5)
    assert (done.returns, again.returns) == ("probabilities", "logits")


@pytest.mark.backends
@pytest.mark.parametrize(
    "make",
    [
        lambda: within("softmax"),
        lambda: stacked("softmax"),
        lambda: classifier(layers.Softmax()),
        lambda: classifier(layers.Activation("softmax")),
        lambda: classifier("sigmoid"),
        lambda: convolutional("softmax"),
    ],
    ids=["nested", "sequential", "layer", "activation", "sigmoid", "convolutional"],
)
def test_a_softmax_or_sigmoid_is_removed(tmp_path, make):
    model = make()
    activation = expit if output_activation(model) == "sigmoid" else _softmax_of_rows
    x = normal(5, 8, 8, 3)
    before = run(model, x)
    done = export(model, tmp_path / "m.keras", probabilities=False)
    found = load("keras", done.path)(x).astype("float64")
    np.testing.assert_allclose(activation(found), before, atol=1e-6)
    assert not np.allclose(found, before) and done.returns == "logits"
    np.testing.assert_array_equal(run(model, x), before)


def _softmax_of_rows(x):
    return softmax(x, axis=1)


@pytest.mark.backends
def test_a_class_of_ones_own_that_returns_probabilities_is_recognised(tmp_path):
    model = own(True)
    done = export(model, tmp_path / "m.keras")
    assert done.returns == "probabilities"
    again = export(model, tmp_path / "again.keras", probabilities=True)  # not a second softmax
    x = normal(5, 8, 8, 3)
    np.testing.assert_allclose(load("keras", again.path)(x), run(model, x), atol=1e-6)
    with pytest.raises(ValueError, match="cannot be removed; expected a functional"):
        export(model, tmp_path / "logits.keras", probabilities=False)
    assert not (tmp_path / "logits.keras").exists()


def test_outputs_that_are_neither_are_not_called_logits(tmp_path):
    features = keras.Model((m := classifier()).input, m.layers[-2].output)
    relu = classifier(layers.ReLU())
    entry = keras.Input((4,))
    two = keras.Model(entry, [layers.Dense(3)(entry), layers.Dense(2)(entry)])
    for i, model in enumerate((features, relu, two)):
        done = export(model, tmp_path / f"{i}.keras")
        assert done.returns is None and sidecar(done)["returns"] is None
    with pytest.raises(ValueError, match=r"\(None, 3\), \(None, 2\); expected a classifier"):
        export(two, tmp_path / "two.keras", probabilities=True)
    tanh = stacked("tanh")
    with pytest.raises(ValueError, match="ends in the activation tanh"):
        export(tanh, tmp_path / "tanh.keras", probabilities=True)


@on_tensorflow
def test_a_model_of_16_bits_returns_probabilities_in_float32(tmp_path, policy):
    policy("mixed_bfloat16")
    model = adapted(classifier())
    done = export(model, tmp_path / "m.keras", probabilities=True)
    policy("float32")
    x = normal(5, 8, 8, 3)
    found = load("keras", done.path)(x)
    assert found.dtype == "float32"
    expected = softmax(run(model, x).astype("float64"), axis=1)
    np.testing.assert_allclose(found, expected, atol=0.02)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@on_tensorflow
def test_the_comparison_is_with_outputs_of_the_same_kind(tmp_path, monkeypatch):
    """Large logits make any two softmaxes alike; a file with logits must still be refused."""
    from tfimm_lora.exporting import export as export_module
    from tfimm_lora.exporting import runners

    original = runners.runner_of

    def logits_instead(*arguments):
        run_file = original(*arguments)
        return lambda x: {name: np.log(y + 1e-9) for name, y in run_file(x).items()}

    monkeypatch.setattr(export_module, "runner_of", logits_instead)
    with pytest.raises(ValueError, match="differ from those of the model"):
        export(classifier(), tmp_path / "m.onnx", probabilities=True)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
@pytest.mark.parametrize("name", ["vit"])
@pytest.mark.parametrize("format", ["keras", "onnx"])
def test_tfimm_models_return_probabilities_on_request(tmp_path, name, format):
    made = next(model for model in MODELS if model.name == name)
    model = lora.convert_to_lora_model(made.make(), lora_rank=2)
    randomise(model)
    done = export(model, tmp_path / NAMES[format], probabilities=True)
    x = normal(3, *made.input_shape)
    logits = run(model, x).astype("float64")
    found = load(format, done.path)(x)
    np.testing.assert_allclose(found, np.exp(log_softmax(logits, axis=1)), atol=1e-5)
    assert done.returns == "probabilities"
    plain = export(model, tmp_path / f"plain-{NAMES[format]}")
    assert plain.returns == "logits"


# -- opening a Keras file -------------------------------------------------------------------


def follow(done, folder, x):
    """Do what the instructions say, in a fresh process that lacks this package."""
    opening = done.open_with
    assert sidecar(done)["open_with"] == opening
    text = instructions(opening, done.needs)
    for line in opening["code"].splitlines():
        assert f"    {line}\n" in text + "\n"
    for name, value in opening["environment"].items():
        assert f"{name}={value}" in text
    np.save(folder / "x.npy", x)
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    code = [
        "import sys; sys.modules['tfimm_lora'] = None",
        *lines,
        "import numpy as np",
        "np.save('y.npy', np.asarray(model.predict(np.load('x.npy'), verbose=0)))",
    ]
    environ = {k: v for k, v in os.environ.items() if k not in ("TF_USE_LEGACY_KERAS",)}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=folder,
        env={**environ, **opening["environment"], "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return np.load(folder / "y.npy")


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="one process is enough")
def test_a_keras_file_opens_as_its_instructions_say(tmp_path):
    model = adapted(classifier())
    done = export(model, tmp_path / "it's mine.keras", probabilities=True)
    x = normal(3, 8, 8, 3)
    expected = softmax(run(model, x).astype("float64"), axis=1)
    np.testing.assert_allclose(follow(done, tmp_path, x), expected, atol=1e-5)
    assert done.open_with["keras"] == ("legacy Keras" if LEGACY else "Keras 3")
    name = "tf-keras" if LEGACY else "keras"
    assert done.open_with["packages"] == {name: keras.__version__}
    assert done.open_with["environment"] == ({"TF_USE_LEGACY_KERAS": "1"} if LEGACY else {})


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_the_file_of_a_tfimm_model_opens_as_its_instructions_say(tmp_path):
    made = next(model for model in MODELS if model.name == "vit")
    model = lora.convert_to_lora_model(made.make(), lora_rank=2)
    randomise(model)
    done = export(model, tmp_path / "vit.keras")
    x = normal(3, *made.input_shape)
    np.testing.assert_allclose(follow(done, tmp_path, x), run(model, x), atol=1e-5)
    assert list(done.open_with["packages"]) == ["tf-keras", "tfimm"]
    assert done.open_with["code"].startswith("import tfimm\nimport tf_keras\n")
    assert "set TF_USE_LEGACY_KERAS=1 before" in instructions(done.open_with, done.needs)


@pytest.mark.long
@pytest.mark.skipif(LEGACY or BACKEND != "tensorflow", reason="keras_hub needs Keras 3")
def test_the_file_of_a_keras_hub_model_opens_as_its_instructions_say(tmp_path):
    models = pytest.importorskip("keras_hub").models
    backbone = models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    model = models.ViTImageClassifier(backbone=backbone, num_classes=3, preprocessor=None)
    x = normal(3, 8, 8, 3)
    done = export(model, tmp_path / "hub.keras")
    np.testing.assert_allclose(follow(done, tmp_path, x), run(model, x), atol=1e-5)
    assert done.returns == "logits"
    assert list(done.open_with["packages"]) == ["keras", "keras-hub"]
    soft = export(model, tmp_path / "soft.keras", probabilities=True)
    expected = softmax(run(model, x).astype("float64"), axis=1)
    np.testing.assert_allclose(load("keras", soft.path)(x), expected, atol=1e-5)


def test_probabilities_is_true_false_or_none(tmp_path):
    model = classifier(None)
    with pytest.raises(TypeError, match="probabilities='yes'; expected True or False"):
        export(model, tmp_path / "m.keras", probabilities="yes")
    assert not (tmp_path / "m.keras").exists()
