"""The names of real models of transformers 4 and 5, and of timm's models of the same shape."""

import pytest
import torch

from tests.interop.hugging_face.models import MODELS, make_timm
from tfimm_lora.families.family import V4, V5
from tfimm_lora.families.recognize import recognize

#: Model -> its family.
FAMILIES = {
    "vit": "ViT",
    "deit": "DeiT",
    "deit_distilled": "DeiT with two classifiers",
    "swin": "Swin",
    "swinv2": "Swin V2",
    "dinov2": "DINOv2",
    "dinov2_registers": "DINOv2 with registers",
    "dinov3": "DINOv3",
    "segformer": "MiT",
    "segformer_segmentation": "SegFormer",
    "pvt_v2": "PVTv2",
    "beit": "BEiT",
    "siglip": "SigLIP",
    "clip": "CLIP",
}

#: Weights of transformers that are refused, since their values are not timm's.
REFUSED = {
    # The classifiers get other features.
    "siglip": {
        "classifier.weight",
        "classifier.bias",
        # One parameter where timm has two layers.
        "vision_model.head.attention.in_proj_weight",
        "vision_model.head.attention.in_proj_bias",
    },
    "clip": {"classifier.weight", "classifier.bias"},
}

#: Weights that timm's model lacks.
NOT_IN_TIMM = {
    "dinov2": {"mask_token"},
    "dinov2_registers": {"mask_token"},
    "dinov3": {"mask_token"},
}

#: Weights that only timm's model has.
ONLY_IN_TIMM = {
    "dinov3": {"head.weight", "head.bias"},
    "clip": {"head.weight", "head.bias"},
    "siglip": {
        "head.weight",
        "head.bias",
        *(f"attn_pool.{x}.{y}" for x in ("q", "kv") for y in ("weight", "bias")),
    },
}

#: Weights of timm's DINOv3 with biases of query and value; the model here is without.
_BIASES = {f"blocks.{i}.attn.{x}_bias" for i in range(2) for x in "qv"}


def keys_of(hugging_face, name):
    """The weights in files and in memory, with the library of their names."""
    files = [
        key for key in hugging_face.base_tensors(name) if not key.endswith("position_index")
    ]
    memory = hugging_face.models[name]["parameters"]
    version = V5 if hugging_face.version == "5" else V4
    return {"file": (files, V4), "memory": (memory, version)}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_models(hugging_face, name):
    assert MODELS[name]
    for keys, library in keys_of(hugging_face, name).values():
        keys = [key for key in keys if "running_" not in key and "num_batches" not in key]
        naming = recognize(keys, libraries=(library,), is_weight=True)
        assert naming.family.name == FAMILIES[name] or name == "deit"
        found = {key: naming.to_timm(key, is_weight=True) for key in keys}
        assert {key for key, x in found.items() if x is None} == REFUSED.get(name, set())
        found = {key: x for key, x in found.items() if x is not None}
        assert len(set(found.values())) == len(found)
        back = {key: naming.from_timm(x, is_weight=True) for key, x in found.items()}
        if name == "deit":  # its names are those of other families, too
            continue
        assert back == {key: key for key in found}
        if MODELS[name].timm is None:
            continue
        timm = set(dict(make_timm(name).named_parameters()))
        ours = {x.name for x in found.values()} - NOT_IN_TIMM.get(name, set())
        assert ours - (_BIASES if name == "dinov3" else set()) == (
            timm - ONLY_IN_TIMM.get(name, set())
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_of_adapters(hugging_face, name):
    version = V5 if hugging_face.version == "5" else V4
    entry = hugging_face.models[name]
    modules = set()
    if MODELS[name].timm is not None:
        timm = dict(make_timm(name).named_modules())
        linear = (torch.nn.Linear, torch.nn.Conv2d)
        modules = {x for x, module in timm.items() if isinstance(module, linear)}
    for adapter in entry["adapters"]:
        keys = hugging_face.adapter_tensors(name, adapter)
        layers = {
            key.removeprefix("base_model.model.").partition(".lora_")[0]
            for key in keys
            if ".lora_A" in key
        }
        naming = recognize(layers)
        found = {layer: naming.to_timm(layer) for layer in layers}
        assert None not in found.values(), adapter
        assert len(set(found.values())) == len(found)
        assert naming.library in (version, V4), adapter
        if modules:
            assert {x.name for x in found.values()} <= modules
