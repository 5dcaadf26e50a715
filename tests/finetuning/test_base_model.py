"""Opening the model to fine-tune: any classifier, files of both Kerases, keras_hub."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import keras_hub_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras
from tests.helpers.selection import nightly_except, nightly_on_legacy
from tfimm_lora.backend import installed
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.model.classifier import classifier_paths

layers = keras.layers

KERAS_HUB = not LEGACY and installed("keras_hub")


def inner_model(activation, last, sequential):
    chain = [
        layers.Conv2D(4, 3, name="conv"),
        layers.GlobalAveragePooling2D(name="pool"),
        layers.Dense(5, activation=activation, name="head"),
        *([last] if last is not None else []),
    ]
    if sequential:
        return keras.Sequential([keras.Input((8, 8, 3)), *chain], name="inner")
    inputs = x = keras.Input((8, 8, 3))
    for layer in chain:
        x = layer(x)
    return keras.Model(inputs, x, name="inner")


def alone(model):
    return model


def in_a_functional_model(model):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, model(layers.Rescaling(2.0)(inputs)))


def in_a_sequential_model(model):
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Rescaling(2.0), model])


def before_a_softmax(model):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Softmax()(model(inputs)))


def softmax(logits):
    exponents = np.exp(logits.astype("float64"))
    return exponents / exponents.sum(-1, keepdims=True)


def pictures(model, n=3):
    return np.random.default_rng(0).uniform(size=(n, *model.input_shape[1:])).astype("float32")


@pytest.mark.parametrize("sequential", [False, True], ids=["functional", "sequential"])
@pytest.mark.parametrize("around", [alone, in_a_functional_model, in_a_sequential_model])
@pytest.mark.parametrize(
    "activation, last",
    [("softmax", None), (None, layers.Softmax), (None, lambda: layers.Activation("softmax"))],
    ids=["argument", "layer", "activation layer"],
)
def test_a_softmax_is_found_wherever_it_is(activation, last, around, sequential, tmp_path):
    path = tmp_path / "model.keras"
    saved = around(inner_model(activation, last() if last else None, sequential))
    saved.save(path)
    x = pictures(saved)
    base = open_base_model(path, normalisation="unit")
    assert not base.new_classifier and base.weights == "weights of model.keras"
    logits = array(base.model(x))
    assert np.abs(logits.sum(-1) - 1).max() > 1e-3
    np.testing.assert_allclose(softmax(logits), array(saved(x)), rtol=1e-4, atol=1e-6)
    other = open_base_model(path, normalisation="unit", classes=3)
    assert other.new_classifier and other.model.output_shape == (None, 3)
    assert [p.rpartition("/")[2] for p in classifier_paths(other.model)] == ["head"]
    assert np.abs(array(other.model(x)).sum(-1) - 1).max() > 1e-3


def test_a_softmax_behind_a_model_of_logits_is_found(tmp_path):
    saved = before_a_softmax(inner_model(None, None, False))
    saved.save(tmp_path / "m.keras")
    base = open_base_model(tmp_path / "m.keras", normalisation="unit")
    x = pictures(saved)
    np.testing.assert_allclose(softmax(array(base.model(x))), array(saved(x)), rtol=1e-4)


@pytest.mark.parametrize("in_layer", [False, True])
def test_another_activation_at_the_end_is_not_removed_silently(in_layer, tmp_path):
    end = (None, layers.Activation("relu")) if in_layer else ("relu", None)
    inner_model(*end, False).save(tmp_path / "m.keras")
    for classes in (None, 3):
        with pytest.raises(ValueError, match="activation relu; expected a classifier"):
            open_base_model(tmp_path / "m.keras", normalisation="unit", classes=classes)


@nightly_on_legacy
@pytest.mark.parametrize(
    "name", nightly_except(["MobileNet", "MobileNetV3Small"], ["MobileNet"])
)
def test_a_convolution_may_be_the_classifier(name, tmp_path):
    """By name and as a file: another number of classes, trained, merged, saved and loaded."""
    by_name = open_base_model(name, classes=3, input_size=(32, 32))
    assert by_name.model.output_shape == (None, 3) and by_name.new_classifier
    create = getattr(keras.applications, name)
    saved = create(weights=None, input_shape=(32, 32, 3), classes=5)
    saved.save(tmp_path / "m.keras")
    x = pictures(saved)
    logits = array(open_base_model(tmp_path / "m.keras", normalisation="unit").model(x))
    np.testing.assert_allclose(softmax(logits), array(saved(x)), rtol=1e-3, atol=1e-5)
    model = open_base_model(tmp_path / "m.keras", normalisation="unit", classes=3).model
    (head,) = classifier_paths(model)
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    assert head not in lora.lora_layers(model) if hasattr(lora, "lora_layers") else True
    adapter = lora.adapter_of(model)
    assert any(key.startswith(head) for key in adapter.weights)
    merged = lora.convert_to_regular_model(model)
    merged.save(tmp_path / "merged.keras")
    again = keras.models.load_model(tmp_path / "merged.keras")
    np.testing.assert_allclose(array(again(x)), array(model(x)), rtol=1e-3, atol=1e-5)


def test_a_convolution_of_features_is_not_a_classifier():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="features")(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    assert classifier_paths(model) == []


def test_a_backbone_gets_a_classifier(tmp_path):
    inputs = keras.Input((8, 8, 3), name="images")
    maps = keras.Model(inputs, layers.Conv2D(4, 3, name="features")(inputs))
    vector = keras.Model(inputs, layers.GlobalMaxPooling2D()(maps(inputs)))
    for saved in (maps, vector):
        saved.save(tmp_path / "m.keras")
        base = open_base_model(tmp_path / "m.keras", normalisation="unit", classes=3)
        assert base.new_classifier and base.model.output_shape == (None, 3)
        assert classifier_paths(base.model) == ["predictions"]
        with pytest.raises(ValueError, match="has no classifier"):
            open_base_model(tmp_path / "m.keras", normalisation="unit")


@pytest.mark.skipif(not KERAS_HUB, reason="needs keras_hub, which is for Keras 3")
@pytest.mark.parametrize(
    "name", nightly_except(["DINOV2Backbone", "CLIPVisionEncoder"], ["CLIPVisionEncoder"])
)
def test_a_backbone_of_keras_hub_is_trained(name, tmp_path):
    (spec,) = [m for m in keras_hub_models.BACKBONES if m.name == name]
    saved, x = spec.make(), keras_hub_models.images()
    saved.save(tmp_path / "m.keras")
    base = open_base_model(tmp_path / "m.keras", normalisation="unit", classes=3)
    model = lora.inject_lora(base.model, lora_rank=2, lora_train_classifier=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    losses = model.fit(x, np.array([0, 2]), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    merged = lora.convert_to_regular_model(model)
    merged.save(tmp_path / "merged.keras")
    again = open_base_model(tmp_path / "merged.keras", normalisation="unit")
    assert not again.new_classifier
    np.testing.assert_allclose(array(again.model(x)), array(model(x)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "shape, make, message",
    [
        ((5, 8), lambda: layers.LayerNormalization(), "no classifier that can be"),
        ((8, 8, 3), lambda: layers.Reshape((64, 3)), "outputs have the shape.*64, 3"),
    ],
)
def test_a_model_that_is_no_backbone_of_pictures_is_refused(shape, make, message, tmp_path):
    inputs = keras.Input(shape)
    keras.Model(inputs, make()(layers.LayerNormalization()(inputs))).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=message):
        open_base_model(tmp_path / "m.keras", normalisation="unit", classes=3)


def test_a_model_of_any_size_needs_the_size(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
    keras.Model(inputs, layers.Dense(2, name="head")(x)).save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="any size.*--input-size"):
        open_base_model(tmp_path / "m.keras", normalisation="unit")
    base = open_base_model(tmp_path / "m.keras", normalisation="unit", input_size=(16, 24))
    assert base.preprocessing.input_size == (16, 24)
    fixed = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(2)])
    fixed.save(tmp_path / "fixed.keras")
    with pytest.raises(ValueError, match="8x8"):
        open_base_model(tmp_path / "fixed.keras", normalisation="unit", input_size=(9, 9))


# -- files ----------------------------------------------------------------------------------


OTHER = """
import os
import {module} as keras
path = {path!r}
keras.Sequential(
    [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2, name="head")]
).save(path)
"""


def change_config(path, change):
    """Change the text of config.json in a .keras file."""
    other = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == "config.json" else content)
    shutil.move(other, path)


@nightly_on_legacy
def test_a_file_of_the_other_keras_says_which_one_it_needs(tmp_path):
    path = tmp_path / "model.keras"
    code = OTHER.format(module="keras" if LEGACY else "tf_keras", path=str(path))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    if not LEGACY:  # Keras 3 opens simple files of legacy Keras, but not this class
        change_config(path, lambda text: text.replace(b'"Flatten"', b'"Flatten2"'))
    needed, switch = ("Keras 3", 0) if LEGACY else ("legacy Keras", 1)
    with pytest.raises(ValueError, match=f"saved by {needed}.*TF_USE_LEGACY_KERAS={switch}"):
        open_base_model(path, normalisation="unit")


@pytest.mark.skipif(LEGACY, reason="keras_hub is for Keras 3")
def test_a_missing_package_of_a_file_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((2,)), layers.Dense(2, name="head")]).save(path)
    change_config(
        path, lambda text: text.replace(b'"module": "keras"', b'"module": "keras_hub.src"')
    )
    from tfimm_lora.finetuning.base import keras_files

    monkeypatch.setattr(keras_files, "installed", lambda package: package != "keras_hub")
    with pytest.raises(ImportError, match="keras-hub, which is not installed.*pip install"):
        open_base_model(path, normalisation="unit")


@pytest.fixture(scope="module")
def hub_file(tmp_path_factory):
    """A small image classifier of keras_hub, with its preprocessor."""
    if LEGACY or BACKEND != "tensorflow" or not installed("keras_hub"):
        pytest.skip("needs keras_hub, which is for Keras 3")
    import keras_hub

    models = keras_hub.models
    backbone = models.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        hidden_dims=[8, 16],
        layerwise_num_heads=[1, 1],
        layerwise_sr_ratios=[2, 1],
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        max_drop_path_rate=0.1,
        image_shape=(32, 32, 3),
    )
    converter = keras_hub.layers.MiTImageConverter(
        image_size=(32, 32), scale=[1 / 127.5, 1 / 100, 1 / 50], offset=[-1.0, 0.0, 0.5]
    )
    model = models.MiTImageClassifier(
        backbone,
        num_classes=4,
        preprocessor=models.MiTImageClassifierPreprocessor(image_converter=converter),
        activation="softmax",
    )
    path = tmp_path_factory.mktemp("hub") / "hub.keras"
    model.save(path)
    return path, model


def test_a_model_of_keras_hub_brings_its_preprocessing(hub_file):
    path, saved = hub_file
    base = open_base_model(path)
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    prepared = np.asarray(base.preprocessing.function()(x))
    expected = np.asarray(saved.preprocessor.image_converter(x))
    np.testing.assert_allclose(prepared, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        softmax(array(base.model(prepared))), array(saved(expected)), rtol=1e-3, atol=1e-5
    )
    other = open_base_model(path, normalisation="unit")
    assert other.preprocessing.mean == (0.0,) * 3


@pytest.mark.long
def test_a_model_of_keras_hub_is_trained_merged_and_exported(hub_file, tmp_path):
    from tests.helpers.picture_folders import write_digits
    from tfimm_lora.cli import main

    write_digits(tmp_path / "pictures", labels=range(3), each=6, size=32)
    run = str(tmp_path / "run")
    training = ["--model", str(hub_file[0]), "--data", str(tmp_path / "pictures")]
    assert main(["finetune", *training, "--epochs", "1", "--rank", "2", "--out", run]) == 0
    merged = str(tmp_path / "merged.keras")
    assert main(["merge", run, "--out", merged]) == 0
    assert keras.models.load_model(merged).output_shape == (None, 3)
    # In a new process, keras_hub is imported for the file.
    command = ["-m", "tfimm_lora", "export", merged, "--out", str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, *command, "--format", "savedmodel"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == "hub.keras"
