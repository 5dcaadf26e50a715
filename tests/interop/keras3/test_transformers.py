"""Checkpoints and adapters of real transformers and PEFT on models of Keras 3."""

import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import run
from tests.interop.keras3 import models

#: With a classifier, rsLoRA and biases, DoRA on query and value, a bias of the branch, other
#: ranks and scales for each of query, key and value, and convolutions.
ADAPTERS = ("classifier", "rslora_bias", "dora", "lora_bias", "patterns", "convolutions")


#: Model of the fixture -> the model of Keras, and the tolerance. keras_hub's MiT has the
#: approximate GELU, transformers' SegFormer the exact one.
MODELS = {
    "vit": (models.vit, 1e-5),
    "deit_distilled": (models.deit_distilled, 1e-5),
    "swin": (models.swin, 1e-5),
    "dinov2": (models.dinov2, 1e-5),
    "convnext": (models.converted, 1e-5),
    "resnet": (models.converted, 1e-5),
    "segformer": (models.segformer, 1e-3),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name, hugging_face):
    make, tolerance = MODELS[name]
    config = json.loads((hugging_face.base(name) / "config.json").read_text())
    model = make(config, len(config["id2label"]))
    lora.load_timm_weights(model, hugging_face.base(name))
    x = hugging_face.batch(name)["pixel_values"].transpose(0, 2, 3, 1)
    outputs, base = hugging_face.outputs(name), run(model, x)
    assert np.abs(base - outputs["base"]).max() < tolerance * np.abs(outputs["base"]).max()
    adapters = [x for x in ADAPTERS if x in hugging_face.models[name]["adapters"]]
    assert len(adapters) >= 3
    for adapter in adapters:
        lora.load_adapter(model, hugging_face.adapter(name, adapter))
        wanted, found = outputs[adapter], run(model, x)
        assert np.abs(wanted - base).max() > 100 * tolerance * np.abs(wanted).max()
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max(), adapter


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "convnext", "resnet"])
def test_models_are_created_from_folders(name, hugging_face):
    """By keras_hub's converters, and by those of this package for ConvNeXt and ResNet."""
    folder = str(hugging_face.base(name))
    x = hugging_face.batch(name)["pixel_values"].transpose(0, 2, 3, 1)
    outputs, size = hugging_face.outputs(name), {"input_size": x.shape[1:3]}
    model = lora.create_model(folder, lora_rank=2, **size)
    limit = 1e-5 * np.abs(outputs["base"]).max()
    if model.output_shape[-1] == outputs["base"].shape[-1]:
        assert np.abs(run(model, x) - outputs["base"]).max() < limit
    else:
        assert name in ("dinov2", "swin")  # keras_hub converts the backbone alone
    adapter = hugging_face.adapter(name, "classifier")
    model = lora.create_model(folder, adapter=adapter, **size)
    limit = 1e-5 * np.abs(outputs["classifier"]).max()
    assert np.abs(run(model, x) - outputs["classifier"]).max() < limit
    assert lora.create_model(folder, nb_classes=5).output_shape == (None, 5)
