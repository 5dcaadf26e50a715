"""Checkpoints and adapters of real transformers and PEFT on models of Keras 3."""

import json

import keras
import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import run
from tests.helpers.selection import nightly_except
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


@pytest.mark.parametrize("name", nightly_except(MODELS, ["vit", "convnext"]))
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


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_image_encoders_are_those_of_transformers(name, hugging_face):
    """Before the last normalization of CLIP, which keras_hub applies to all tokens, and
    before the pooling of SigLIP."""
    config = json.loads((hugging_face.base(name) / "config.json").read_text())
    model = getattr(models, name)(config.get("vision_config", config))
    base = hugging_face.base(name)
    with pytest.raises(ValueError, match="unexpected: classifier.weight"):
        lora.load_timm_weights(model, base)
    lora.load_timm_weights(model, base, weights_to_ignore=["^classifier"])
    tensors = hugging_face.base_tensors(name)
    tokens = keras.Model(model.inputs[0], model.layers[-2 if name == "siglip" else -1].output)
    x = hugging_face.batch(name)["pixel_values"].transpose(0, 2, 3, 1)
    outputs = hugging_face.outputs(name)
    plain = run(tokens, x)
    for adapter in (None, "features"):
        if adapter is not None:
            lora.load_adapter(model, hugging_face.adapter(name, adapter))
        wanted = outputs[adapter or "base_features"]
        if name == "clip":
            centred = wanted - wanted.mean(-1, keepdims=True)
            wanted = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
            norm = "vision_model.post_layernorm"
            wanted = wanted * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]
        found = run(tokens, x)
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(found - plain).max() > 1e-2 * np.abs(plain).max()
    if name == "siglip":  # one parameter of torch's MultiheadAttention
        attention = model.get_layer("head").attention
        layers = (attention.query_dense, attention.key_dense, attention.value_dense)
        kernels = [np.asarray(layer.kernel).reshape(32, 32).T for layer in layers]
        expected = tensors["vision_model.head.attention.in_proj_weight"]
        np.testing.assert_array_equal(np.concatenate(kernels), expected)


@pytest.mark.parametrize(
    "name", nightly_except(["vit", "dinov2", "swin", "convnext", "resnet"], ["vit"])
)
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
