"""The tables of the convolutional families against the names of timm and transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.kerases import normal
from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.translation import translate
from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import APPLICATIONS, TIMM, V4
from tfimm_lora.families.recognize import Naming, family_of_timm, recognize
from tfimm_lora.families.templates import Name, Positions, Template
from tfimm_lora.families.vgg import VGG
from tfimm_lora.zoo.weights.windows import as_window

pytestmark = pytest.mark.once

#: Made by golden/make_names.py.
NAMES = json.loads((Path(__file__).parents[1] / "golden" / "names.json").read_text())


def naming_of_timm(model):
    family = family_of_timm(model)
    return Naming(family, TIMM).with_depths(NAMES["timm"][model])


@pytest.mark.parametrize("model", NAMES["timm"])
def test_every_module_of_timm_is_in_the_table_of_its_family(model):
    naming = naming_of_timm(model)
    for name in NAMES["timm"][model]:
        assert str(naming.to_timm(name)) == name == naming.from_timm(Name(name))


@pytest.mark.parametrize("model", NAMES["transformers"])
def test_modules_of_transformers_are_those_of_timm_one_to_one(model):
    timm, theirs = naming_of_timm(model), NAMES["transformers"][model]
    naming = recognize([f"{name}.weight" for name in theirs], is_weight=True)
    assert naming == recognize(theirs)
    assert naming.family is timm.family and naming.prefix
    assert naming.depths == timm.depths
    translated = {str(naming.to_timm(name)): name for name in theirs}
    assert len(translated) == len(theirs)
    assert set(translated) == set(NAMES["timm"][model])
    for name, own in translated.items():
        assert naming.from_timm(Name(name)) == own


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_classifier_of_a_family_is_a_row(family):
    assert family.head in {row.timm for row in family.rows}


def test_flat_numbers_need_the_depths_of_the_model():
    family = family_of_timm("tf_efficientnet_b0")
    name = "efficientnet.encoder.blocks.3.projection.project_conv"
    assert Naming(family, V4, "efficientnet.").to_timm(name) is None
    b0, b4 = (1, 2, 2, 3, 3, 4, 1), (2, 4, 4, 6, 6, 8, 2)
    for depths, expected in ((b0, "blocks.2.0.conv_pwl"), (b4, "blocks.1.1.conv_pwl")):
        naming = Naming(family, V4, "efficientnet.", depths=depths)
        assert str(naming.to_timm(name)) == expected


def test_a_number_may_be_fixed_or_repeated():
    template = Template("block_{s+1=0}_{b}.block_{s+1=0}_{b}_conv")
    assert template.read(Name("block_1_2.block_1_2_conv")) == {"s": 0, "b": 2}
    assert template.read(Name("block_1_2.block_1_3_conv")) is None
    assert template.read(Name("block_2_2.block_2_2_conv")) is None
    assert str(template.write({"s": 0, "b": 2})) == "block_1_2.block_1_2_conv"
    assert template.write({"s": 1, "b": 2}) is None and template.write({"s": 0}) is None
    assert Template("layer.{n-1}").write({"n": 0}) is None


def test_positions():
    positions = Positions((1, 2))
    third = {"s": 1, "b": 1, "n": 2, "d": 4, "f": 5, "z": 2}
    for given in ({"n": 2}, {"s": 1, "b": 1}, {"f": 5}, {"d": 4}):
        assert positions.complete(given) == third
    assert positions.complete({"n": 3}) == {"n": 3, "z": 2}
    assert positions.complete({"z": 3}) is None
    assert Positions().complete({"s": 1, "b": 0}) == {"s": 1, "b": 0}


@pytest.mark.parametrize("size", [1, 3])
def test_a_linear_layer_on_a_flattened_window_is_a_convolution(size):
    x = normal(2, size, size, 4)  # height, width, channels
    linear = normal(5, size * size * 4, seed=1)
    window = as_window(linear, size)
    assert window.shape == (5, 4, size, size)
    convolved = np.einsum("nhwc,ochw->no", x, window)
    np.testing.assert_allclose(convolved, x.reshape(2, -1) @ linear.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(as_window(window, 0), linear)
    assert as_window(linear, 0) is linear and as_window(window, size) is window


def test_the_dense_layers_of_vgg_are_convolutions_in_timm():
    depths = (2, 2, 3, 3, 3)
    keras, timm = (Naming(VGG, x, depths=depths) for x in (APPLICATIONS, TIMM))
    magnitude = np.abs(normal(6)) + 1
    adapter = AdapterData(
        {
            "fc1": LayerUpdate(normal(2, 49 * 8), normal(6, 2), magnitude=magnitude),
            "fc2": LayerUpdate(normal(2, 6), normal(6, 2), magnitude=magnitude),
        },
        {
            "fc1.weight": normal(6, 49 * 8),
            "fc1.bias": normal(6),
            "predictions.weight": normal(3, 6),
        },
        ("fc1", "predictions"),
    )
    there = translate(adapter, keras, timm)
    fc1, fc2 = (there.layers[f"pre_logits.{name}"] for name in ("fc1", "fc2"))
    assert (fc1.kind, fc1.a.shape, fc1.b.shape) == ("conv", (2, 8, 7, 7), (6, 2, 1, 1))
    assert (fc2.kind, fc2.a.shape, fc2.b.shape) == ("conv", (2, 6, 1, 1), (6, 2, 1, 1))
    assert there.weights["pre_logits.fc1.weight"].shape == (6, 8, 7, 7)
    assert there.weights["head.fc.weight"].shape == (3, 6)
    back = translate(there, timm, keras)
    for name, update in adapter.layers.items():
        for field in ("a", "b", "magnitude", "kind"):
            np.testing.assert_array_equal(
                getattr(back.layers[name], field), getattr(update, field)
            )
    for key, value in adapter.weights.items():
        np.testing.assert_array_equal(back.weights[key], value)


def test_inputs_that_are_no_window_cannot_be_translated():
    keras, timm = (Naming(VGG, x, depths=(1, 1, 2, 2, 2)) for x in (APPLICATIONS, TIMM))
    adapter = AdapterData({"fc1": LayerUpdate(normal(2, 50), normal(6, 2))})
    with pytest.raises(ValueError, match="50 inputs.*7x7 window"):
        translate(adapter, keras, timm)
