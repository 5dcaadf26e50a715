"""Whether the base model that an adapter names is that of a model created by a timm name."""

import dataclasses

import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY

if LEGACY:
    pytest.skip("on legacy Keras: test_adapters_tfimm.py", allow_module_level=True)
pytest.importorskip("keras_hub")


@pytest.mark.parametrize(
    ("base_model", "words"),
    [
        (
            "resnet34 (random weights)",
            "stackwise_num_blocks is .3, 4, 6, 3. there",
        ),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "it is of the family vit"),
        ("timm/resnet18.a1_in1k", None),
        ("user/something", None),
    ],
)
def test_an_adapter_of_another_architecture_is_refused(base_model, words, resnet18):
    adapter = dataclasses.replace(lora.adapter_of(resnet18), base_model=base_model)
    if words is None:
        lora.load_adapter(resnet18, adapter)
        return
    with pytest.raises(ValueError, match=words):
        lora.load_adapter(resnet18, adapter)


@pytest.fixture(scope="module")
def resnet18():
    return lora.create_model("resnet18", lora_rank=2)
