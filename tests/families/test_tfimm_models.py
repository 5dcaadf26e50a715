"""Every weight of a small model of tfimm is in the table of its family."""

import pytest

from tests.helpers.kerases import LEGACY

if not LEGACY:
    pytest.skip("tfimm needs legacy Keras", allow_module_level=True)

from tests.helpers.tiny_architectures import ARCHITECTURES
from tfimm_lora.zoo.weights.module_names import ModuleNames

CONVOLUTIONAL = (
    "convnext",
    "efficientnet",
    "mobilenet_v2",
    "resnet",
    "seresnext",
    "resnetv2",
    "vgg",
)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_weight_is_in_the_table(name):
    names = ModuleNames(ARCHITECTURES[name].make())
    assert names.naming is not None
    for weight in names.weights:
        assert names.naming.to_timm(weight.key, is_weight=True) is not None, weight.key
