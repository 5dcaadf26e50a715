"""Models of transformers that this package converts to Keras 3, from folders and the hub."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.hub_server import HubServer
from tests.helpers.kerases import LEGACY, array, run, values
from tfimm_lora.zoo.keras3_models.known import known
from tfimm_lora.zoo.keras3_models.transformers_models import of_transformers

pytest.importorskip("safetensors")
only_keras3 = pytest.mark.skipif(LEGACY, reason="these models are for Keras 3")

CONVNEXT = {
    "model_type": "convnext",
    "architectures": ["ConvNextForImageClassification"],
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "image_size": 64,
    "id2label": {"0": "ant", "1": "bee", "2": "cat"},
}
RESNET = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "layer_type": "basic",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [64, 8, 16, 16],
    "id2label": {"0": "ant", "1": "bee", "2": "cat"},
}


@pytest.mark.once
def test_defaults_are_those_of_the_configs_of_transformers():
    labels = {str(index): f"class {index}" for index in range(1000)}
    for kind, name in (("convnext", "convnext_tiny"), ("resnet", "resnet50")):
        architectures = [f"{kind}ForImageClassification"]
        config = {"model_type": kind, "architectures": architectures, "id2label": labels}
        found = of_transformers("mine", config)
        assert (found.config.architecture, found.config.nb_classes) == (name, 1000)
        assert found.arguments == known(name).arguments
    without_names = of_transformers("mine", {**CONVNEXT, "id2label": None})
    assert without_names.config.nb_classes == 2
    for other in ("vit", None, ["convnext"]):
        assert of_transformers("mine", {"model_type": other}) is None
    # null is the default of transformers; without layer scale there is no such parameter.
    assert of_transformers("mine", {"model_type": "convnext", "depths": None}).arguments == (
        known("convnext_tiny").arguments
    )
    plain = of_transformers("mine", {**CONVNEXT, "layer_scale_init_value": 0})
    assert plain.arguments["layer_scale_init_value"] is None


@pytest.mark.once
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**CONVNEXT, "hidden_act": "relu"}, "hidden_act='relu'; expected hidden_act='gelu'"),
        ({**RESNET, "downsample_in_bottleneck": True}, "downsample_in_bottleneck=True"),
        ({**RESNET, "hidden_sizes": [8, 8, 8, 8]}, r"hidden_sizes=\[8, 8, 8, 8\]; expected 64"),
        ({**RESNET, "depths": "3"}, "depths='3'; expected 4 positive integers"),
        ({**CONVNEXT, "hidden_sizes": [8, 8, 8]}, r"hidden_sizes=\[8, 8, 8\]; expected 4"),
        ({**CONVNEXT, "depths": [1, 1, 0, 1]}, r"depths=\[1, 1, 0, 1\]; expected 4"),
        ({**CONVNEXT, "image_size": [32, 32]}, r"image_size=\[32, 32\]; expected a positive"),
    ],
)
def test_settings_that_cannot_be_built_are_named(config, words):
    with pytest.raises(ValueError, match=f"'mine', whose config.json has {words}"):
        of_transformers("mine", config)


def folder_of(config, path):
    """Write a folder as transformers does, of a model with random weights."""
    from tfimm_lora.zoo.keras3_models.build import build

    model, _ = build(of_transformers("source", config))
    for variable in model.weights:
        value = np.random.default_rng(variable.shape[0]).normal(size=tuple(variable.shape))
        variable.assign(1 + 0.1 * value if "variance" in variable.path else 0.2 * value)
    lora.save_timm_weights(model, path, names="transformers")
    (path / "config.json").write_text(json.dumps(config))
    return model


def known_size(config):
    return of_transformers("mine", config).config.input_size


@only_keras3
@pytest.mark.parametrize("config", [CONVNEXT, RESNET], ids=["convnext", "resnet"])
def test_folders_are_opened(config, tmp_path):
    if config is RESNET:
        pytest.importorskip("keras_hub")
    source = folder_of(config, tmp_path / "mine")
    size = (*known_size(config), 3)
    x = np.random.default_rng(0).normal(size=(2, *size)).astype("float32")
    model = lora.create_model(str(tmp_path / "mine"), lora_rank=2)
    np.testing.assert_allclose(run(model, x), run(source, x), rtol=1e-4, atol=1e-5)
    assert lora.class_names(model) == ("ant", "bee", "cat")
    assert model.cfg.name == "mine" and model.cfg.mean == known("convnext_tiny").config.mean
    head = model.cfg.classifier[0]
    assert not model.get_layer(head).trainable_weights
    other = lora.create_model(str(tmp_path / "mine"), nb_classes=5, lora_rank=2)
    assert other.output_shape == (None, 5) and lora.class_names(other) is None
    assert other.get_layer(head).trainable_weights  # the classifier is new


@only_keras3
def test_a_backbone_gets_a_classifier(tmp_path):
    source = folder_of(CONVNEXT, tmp_path / "mine")
    path = tmp_path / "mine" / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    # As ConvNextModel writes it.
    names = {key: key.removeprefix("convnext.") for key in tensors if "classifier" not in key}
    save_file({name: tensors[key] for key, name in names.items()}, path)
    config = {**CONVNEXT, "architectures": ["ConvNextModel"]}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mine' with 0 classes.*Pass nb_classes"):
        lora.create_model(str(tmp_path / "mine"))
    model = lora.create_model(str(tmp_path / "mine"), nb_classes=5, lora_rank=2)
    assert model.output_shape == (None, 5)
    head = model.cfg.classifier[0]
    assert model.get_layer(head).trainable_weights
    theirs = {v.path: x for v, x in zip(source.weights, values(source.weights))}
    kept = [v for v in model.weights if v.path in theirs and head not in v.path]
    assert len(kept) > 0.7 * len(theirs)  # the others have no name, and another number
    for variable in kept:
        np.testing.assert_array_equal(array(variable), theirs[variable.path])


@only_keras3
def test_a_repository_on_the_hub_is_opened(tmp_path):
    pytest.importorskip("huggingface_hub")
    source = folder_of(CONVNEXT, tmp_path / "mine")
    files = {x.name: x.read_bytes() for x in (tmp_path / "mine").iterdir()}
    x = np.ones((1, 64, 64, 3), "float32")
    np.save(tmp_path / "expected.npy", run(source, x))
    code = """
import numpy as np, keras, tfimm_lora as lora
model = lora.create_model("hf://someone/convnext", lora_rank=2)
found = keras.ops.convert_to_numpy(model(np.ones((1, 64, 64, 3), "float32")))
np.testing.assert_allclose(found, np.load("expected.npy"), rtol=1e-4, atol=1e-5)
print(lora.adapter_of(model).base_model)
try:
    lora.create_model("hf://someone/other")
except FileNotFoundError as error:
    print(error)
"""
    with HubServer({"someone/convnext": files}) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        environment["PYTHONPATH"] = os.getcwd()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
    lines = done.stdout.splitlines()
    assert lines[0] == "someone/convnext", done.stderr[-2000:]
    assert "'someone/other' does not exist" in lines[1]


@only_keras3
def test_finetuning_opens_folders_without_keras_hub(tmp_path, monkeypatch):
    from tfimm_lora.finetuning.base import early
    from tfimm_lora.finetuning.base_model import open_base_model

    folder_of(CONVNEXT, tmp_path / "mine")
    monkeypatch.setattr(early, "installed", lambda name: name != "keras_hub")
    base = open_base_model(str(tmp_path / "mine"), classes=4, input_size=(32, 32))
    assert base.new_classifier and not base.from_scratch and base.weights == "weights of mine"
    assert base.model.output_shape == (None, 4) and base.preprocessing.input_size == (32, 32)
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ImportError, match="needs keras_hub"):
        open_base_model(str(tmp_path / "mine"), classes=4)
