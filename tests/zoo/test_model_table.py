"""The table of models is that of the installed tfimm and Keras Applications."""

import inspect

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, keras
from tfimm_lora.finetuning.base.of_applications import applications
from tfimm_lora.zoo.model_table import applications_table, tfimm_models
from tfimm_lora.zoo.weights.hub_ids import WITHOUT_WEIGHTS


def test_the_table_has_the_models_of_keras_applications():
    known, table = applications(), applications_table()
    assert set(known) == {name for name, x in table.items() if LEGACY or x.in_keras3}
    for name, create in known.items():
        # The module of a function of Keras Applications is named after the family.
        assert table[name].family == inspect.unwrap(create).__module__.rpartition(".")[2]
    model = keras.applications.MobileNetV2(weights=None)
    row = table["MobileNetV2"]
    assert (row.parameters, row.input_size) == (model.count_params(), model.input_shape[1:3])


@pytest.mark.skipif(not LEGACY, reason="needs tfimm")
def test_the_table_has_the_models_of_tfimm():
    import tfimm

    table = tfimm_models()
    # Other tests of this process register models of their own.
    assert list(table) == [n for n in lora.list_models() if not n.startswith("tiny_")]
    for name, row in table.items():
        cls, cfg = tfimm.models.model_class(name), tfimm.models.model_config(name)
        targets = lora.lora_architecture(cls).cfg_class.presets()["default"]
        assert (row.family, row.input_size) == (cls.__name__, tuple(cfg.input_size))
        assert row.targets == (targets if isinstance(targets, str) else list(targets))
        assert row.pretrained == (name not in WITHOUT_WEIGHTS)
    for name in ("resnet18", "pvt_v2_b0"):
        weights = tfimm.create_model(name).weights
        assert table[name].parameters == sum(int(np.prod(w.shape)) for w in weights)
