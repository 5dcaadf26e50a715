"""What real transformers and PEFT write: files, names, and that they read it again."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.hugging_face.models import MODELS

#: Model -> the name of its first query layer with transformers 4 and 5.
QUERIES = {
    "vit": (
        "vit.encoder.layer.0.attention.attention.query",
        "vit.layers.0.attention.q_proj",
    ),
    "deit": (
        "deit.encoder.layer.0.attention.attention.query",
        "deit.layers.0.attention.q_proj",
    ),
    "deit_distilled": (
        "deit.encoder.layer.0.attention.attention.query",
        "deit.layers.0.attention.q_proj",
    ),
    "swin": (
        "swin.encoder.layers.0.blocks.0.attention.self.query",
        "swin.encoder.layers.0.blocks.0.attention.q_proj",
    ),
    "swinv2": ("swinv2.encoder.layers.0.blocks.0.attention.self.query",) * 2,
}


def test_every_model_and_adapter_is_there(hugging_face):
    assert hugging_face.index["versions"]["transformers"].startswith(hugging_face.version)
    assert list(hugging_face.models) == list(MODELS)
    for name, entry in hugging_face.models.items():
        outputs = hugging_face.outputs(name)
        tensors = hugging_face.base_tensors(name)
        constant = [
            key for key, x in tensors.items() if x.dtype.kind == "f" and not np.abs(x).min() > 0
        ]
        assert not constant, f"weights of {name} with zeros"
        assert {"base", *entry["adapters"]} <= set(outputs)
        for adapter in entry["adapters"]:
            base = outputs["base_features" if adapter == "features" else "base"]
            assert np.abs(outputs[adapter] - base).max() > 0.01 * np.abs(base).max()
            config = hugging_face.adapter_config(name, adapter)
            assert config["peft_type"] == "LORA"
            tensors = hugging_face.adapter_tensors(name, adapter)
            assert all(np.abs(x).max() > 0 for x in tensors.values())


@pytest.mark.parametrize("name", QUERIES)
def test_names_of_the_two_versions(hugging_face, name):
    four, five = QUERIES[name]
    ours = four if hugging_face.version == "4" else five
    keys = hugging_face.adapter_tensors(name, "classifier")
    assert f"base_model.model.{ours}.lora_A.weight" in keys
    # Files of whole models have the names of transformers 4 in both versions.
    assert f"{four}.weight" in hugging_face.base_tensors(name)
    # A model without a classifier has no prefix.
    keys = hugging_face.adapter_tensors(name, "features")
    assert f"base_model.model.{ours.partition('.')[2]}.lora_A.weight" in keys


def test_each_version_reads_what_it_wrote(hugging_face, tmp_path):
    # One model with a prefix, and a module that transformers does not know.
    for name, adapters in {"swin": ["classifier", "features"], "backbone": ["dora"]}.items():
        folders = [None, *(hugging_face.adapter(name, a) for a in adapters)]
        outputs = hugging_face.outputs(name)
        read = hugging_face.check(name, folders, tmp_path)
        for key, x in zip(["base", *adapters], read):
            np.testing.assert_allclose(x, outputs[key], atol=1e-5 * np.abs(x).max())


def test_an_adapter_of_the_other_version_is_an_error(transformers_4, transformers_5, tmp_path):
    with pytest.raises(AssertionError, match="No modules were targeted"):
        transformers_5.check("vit", [transformers_4.adapter("vit", "classifier")], tmp_path)


def test_an_unknown_key_is_an_error(transformers_5, tmp_path):
    tensors = transformers_5.adapter_tensors("vit", "classifier")
    name = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"
    tensors[name.replace("q_proj", "query")] = tensors.pop(name)
    config = transformers_5.adapter_config("vit", "classifier")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AssertionError, match="missing"):
        transformers_5.check("vit", [tmp_path], tmp_path)


@pytest.mark.nightly
def test_training_goes_down(hugging_face, tmp_path):
    hugging_face.run(
        "train",
        hugging_face.base("vit"),
        hugging_face.adapter("vit", "classifier"),
        hugging_face.folder / "vit" / "batch.npz",
        tmp_path,
    )
    losses = np.load(tmp_path / "losses.npz")["losses"]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    keys = hugging_face.adapter_tensors("vit", "classifier")
    trained = load_file(tmp_path / "adapter_model.safetensors")
    assert set(trained) == set(keys)
    assert all(np.abs(trained[k] - keys[k]).max() > 0 for k in keys)
