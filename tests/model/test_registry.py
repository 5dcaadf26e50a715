"""The registry of LoRA architectures, and classes that users register."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import array, ids, keras, normal, randomise, run
from tfimm_lora.model import registry


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_lora_classes", dict(registry._lora_classes))
    monkeypatch.setattr(registry, "_base_classes", dict(registry._base_classes))


@dataclass
class NetConfig:
    nb_classes: int = 3
    width: int = 6


class Net(keras.Model):
    cfg_class = NetConfig

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.hidden = keras.layers.Dense(cfg.width, activation="tanh", name="hidden")
        self.norm = keras.layers.BatchNormalization(name="norm")
        self.head = keras.layers.Dense(cfg.nb_classes, name="head")

    @property
    def dummy_inputs(self):
        return np.zeros((1, 4), "float32")

    def call(self, x, training=False):
        return self.head(self.norm(self.hidden(x), training=training))


@dataclass
class LoRANetConfig(NetConfig):
    lora_rank: int = 2
    lora_alpha: float = 2.0


class LoRANet(Net):
    cfg_class = LoRANetConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        lora.convert_to_lora_layer(
            self.hidden, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha
        )


def net(**kwargs):
    model = Net(NetConfig(**kwargs))
    model(model.dummy_inputs)
    return model


def test_bare_decorator_takes_the_base_class():
    assert lora.register_lora_architecture(LoRANet) is LoRANet
    assert lora.lora_architecture(Net) is LoRANet
    assert lora.lora_base_architecture(LoRANet) is Net
    assert lora.lora_config(Net) is LoRANetConfig


def test_decorator_with_a_base_class():
    class Other(keras.Model):
        cfg_class = LoRANetConfig

    assert lora.register_lora_architecture(base_cls=Net)(Other) is Other
    assert lora.lora_architecture(Net) is Other
    assert lora.lora_base_architecture(Other) is Net


def test_class_that_is_its_own_lora_version():
    @dataclass
    class FlexConfig:
        width: int = 6
        lora_rank: int = 0

    class Flex(keras.Model):
        cfg_class = FlexConfig

        def __init__(self, cfg):
            super().__init__()
            self.cfg = cfg
            self.fc = keras.layers.Dense(cfg.width, name="fc")
            if cfg.lora_rank:
                lora.convert_to_lora_layer(self.fc, lora_rank=cfg.lora_rank)

        @property
        def dummy_inputs(self):
            return np.zeros((1, 4), "float32")

        def call(self, x):
            return self.fc(x)

    lora.register_lora_architecture(Flex, base_cls=Flex)
    model = Flex(FlexConfig(width=5))
    model(model.dummy_inputs)
    x = normal(3, 4)
    adapted = lora.convert_to_lora_model(model, lora_rank=2)
    assert type(adapted) is Flex and adapted.cfg == FlexConfig(5, 2)
    randomise(adapted)
    regular = lora.convert_to_regular_model(adapted)
    assert type(regular) is Flex and type(regular.fc) is keras.layers.Dense
    assert regular.cfg == FlexConfig(5, 0)
    np.testing.assert_allclose(run(regular, x), run(adapted, x), rtol=1e-5, atol=1e-5)


def test_overwriting_warns():
    class Second(LoRANet):
        cfg_class = LoRANetConfig

    lora.register_lora_architecture(LoRANet)
    lora.register_lora_architecture(LoRANet)  # the same class does not overwrite
    with pytest.warns(UserWarning, match="Net already has the LoRA version LoRANet"):
        lora.register_lora_architecture(Second, base_cls=Net)
    assert lora.lora_architecture(Net) is Second
    with pytest.raises(ValueError, match="LoRANet"):
        lora.lora_base_architecture(LoRANet)


def test_look_up_errors_list_what_exists():
    lora.register_lora_architecture(LoRANet)
    with pytest.raises(ValueError, match="Received Model.*Registered: .*Net"):
        lora.lora_architecture(keras.Model)
    with pytest.raises(ValueError, match="Received Net.*Registered: .*LoRANet"):
        lora.lora_base_architecture(Net)
    with pytest.raises(ValueError, match="inject_lora"):
        lora.lora_config(keras.Model)


def test_wrong_registrations_are_refused():
    with pytest.raises(TypeError, match="expected a class"):
        lora.register_lora_architecture(Net(NetConfig()))
    with pytest.raises(TypeError, match="base_cls="):
        lora.register_lora_architecture(type("Bare", (keras.Model,), {}))

    class NoDataclass(Net):
        cfg_class = dict

    with pytest.raises(TypeError, match="expected a dataclass"):
        lora.register_lora_architecture(NoDataclass)

    @dataclass
    class Small:
        lora_rank: int = 2

    with pytest.raises(TypeError, match=r"lacks the fields \['nb_classes', 'width'\]"):
        lora.register_lora_architecture(type("Lacking", (Net,), {"cfg_class": Small}))


def test_registered_class_is_converted_there_and_back():
    lora.register_lora_architecture(LoRANet)
    model, x = net(), normal(5, 4)
    before = run(model, x)
    adapted = lora.convert_to_lora_model(model, lora_rank=3)
    assert type(adapted) is LoRANet
    assert dataclasses.asdict(adapted.cfg) == dict(
        nb_classes=3, width=6, lora_rank=3, lora_alpha=2.0
    )
    np.testing.assert_allclose(run(adapted, x), before, rtol=1e-5, atol=1e-6)
    assert ids(adapted.trainable_weights) == ids(lora.lora_trainable_weights(adapted))
    assert not ids(adapted.weights) & ids(model.weights)
    assert type(model) is Net and len(model.trainable_weights) == 6
    randomise(adapted)
    regular = lora.convert_to_regular_model(adapted)
    assert type(regular) is Net and type(regular.cfg) is NetConfig
    np.testing.assert_allclose(run(regular, x), run(adapted, x), rtol=1e-5, atol=1e-5)
    # In place the same comes out.
    output = run(adapted, x)
    lora.remove_lora(adapted)
    assert type(adapted) is Net and type(adapted.cfg) is NetConfig
    np.testing.assert_allclose(run(adapted, x), output, rtol=1e-5, atol=1e-5)


def test_other_fields_change_on_the_way():
    lora.register_lora_architecture(LoRANet)
    model = net()
    adapted = lora.convert_to_lora_model(model, nb_classes=13)
    assert adapted.head.units == 13
    np.testing.assert_array_equal(array(adapted.hidden.kernel), array(model.hidden.kernel))
    with pytest.raises(TypeError, match="nb_clases; did you mean nb_classes"):
        lora.convert_to_lora_model(model, nb_clases=13)
    with pytest.raises(ValueError, match="hidden/kernel has shape"):
        lora.convert_to_lora_model(model, width=7)


def test_registered_class_without_lora_layers_is_an_error():
    class Idle(Net):
        cfg_class = LoRANetConfig

    lora.register_lora_architecture(Idle)
    with pytest.raises(ValueError, match="Idle has no LoRA layers"):
        lora.convert_to_lora_model(net())


def test_a_class_that_defines_what_is_trained():
    class Own(LoRANet):
        cfg_class = LoRANetConfig

        @property
        def trainable_weights(self):
            return lora.lora_trainable_weights(self, trainable_layers=["head"])

        @property
        def non_trainable_weights(self):
            return lora.lora_non_trainable_weights(self, trainable_layers=["head"])

    lora.register_lora_architecture(Own, base_cls=Net)
    adapted = lora.convert_to_lora_model(net())
    assert len(adapted.trainable_weights) == 4
    kept = [array(v).copy() for v in adapted.non_trainable_weights]
    adapted.compile("sgd", "mse")
    adapted.train_on_batch(normal(4, 4), normal(4, 3))
    moving = {"moving_mean", "moving_variance"}
    for variable, value in zip(adapted.non_trainable_weights, kept):
        if variable.name.rpartition("/")[2].partition(":")[0] not in moving:
            np.testing.assert_array_equal(array(variable), value)
