"""LoHa exchanged with real PEFT, in both directions, for each kind of layer."""

import json

import numpy as np
import peft
import pytest
import torch
from torch import nn

import tfimm_lora as lora
from tests.helpers.kerases import keras, randomise, run
from tests.interop import timm_models
from tfimm_lora.model.merge import has_lora, lora_layers

CLOSE = dict(rtol=1e-4, atol=1e-4)
#: Every kind of layer that PEFT's LoHa adapts.
LAYERS = ("wide", "grouped", "depthwise", "pointwise", "fc")


class Net(nn.Module):
    """Convolutions with a window, groups, a group per channel and 1x1, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        for layer in (self.wide, self.grouped, self.depthwise, self.pointwise):
            x = torch.tanh(layer(x))
        return self.fc(x.mean((-2, -1)))


def in_torch(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def in_keras(net):
    """The same network with the weights of another."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, strides=2, activation="tanh", name="wide"),
            layers.Conv2D(12, 3, groups=4, activation="tanh", name="grouped"),
            layers.DepthwiseConv2D(3, activation="tanh", name="depthwise"),
            layers.Conv2D(10, 1, activation="tanh", name="pointwise"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, name="fc"),
        ]
    )
    for name in LAYERS:
        weight = getattr(net, name).weight.detach().numpy()
        if name == "depthwise":
            kernel = weight.transpose(2, 3, 0, 1)
        else:
            kernel = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)
        bias = getattr(net, name).bias.detach().numpy()
        model.get_layer(name).set_weights([np.ascontiguousarray(kernel), bias])
    return model


def adapted(model, **config):
    """A model with PEFT's LoHa whose factors are not zero."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoHaConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "hada_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return wrapped.eval()


def outputs(wrapped, x):
    with torch.no_grad():
        return wrapped(timm_models.to_torch(x)).numpy()


@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "effective_conv2d"])
def test_loha_of_peft_gives_the_same_outputs_here(tucker, tmp_path):
    x, net = timm_models.images(16), in_torch()
    model = in_keras(net)
    plain = run(model, x)
    wrapped = adapted(
        net,
        r=3,
        alpha=7,
        target_modules=list(LAYERS),
        rank_pattern={"fc": 2},
        alpha_pattern={"grouped": 2},
        use_effective_conv2d=tucker,
    )
    wrapped.save_pretrained(str(tmp_path))
    lora.load_adapter(model, tmp_path)
    expected = outputs(wrapped, x)
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
    np.testing.assert_allclose(run(model, x), expected, **CLOSE)
    assert all(layer.lora.lora_use_loha for layer in lora_layers(model).values())
    # Merged, in a bank of adapters, and loaded by PEFT again.
    regular = lora.convert_to_regular_model(model)
    np.testing.assert_allclose(run(regular, x), expected, **CLOSE)
    bank = lora.AdapterBank(in_keras(in_torch()), {"peft": lora.Adapter.load(tmp_path)})
    mixed = [row.logits for row in bank.predict(np.repeat(x, 2, axis=0), ["peft", None] * 2)]
    np.testing.assert_allclose(mixed[::2], expected, **CLOSE)
    np.testing.assert_allclose(mixed[1::2], plain, **CLOSE)
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(in_torch(), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(outputs(again, x), expected, **CLOSE)


def test_loha_from_here_gives_the_same_outputs_in_peft(tmp_path):
    x, model = timm_models.images(16), in_keras(in_torch())
    plain = run(model, x)
    lora.inject_lora(
        model,
        lora_rank=3,
        lora_alpha=5,
        lora_use_loha=True,
        lora_targets=list(LAYERS),
        lora_rank_pattern={"wide": 2},
    )
    np.testing.assert_allclose(run(model, x), plain, rtol=1e-6, atol=1e-6)
    randomise(model, size=0.5)
    lora.save_adapter(model, tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(in_torch(), str(tmp_path)).eval()
    np.testing.assert_allclose(outputs(wrapped, x), run(model, x), **CLOSE)
    assert np.abs(run(model, x) - plain).max() > 0.1 * np.abs(plain).max()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOHA"
    fields = peft.LoHaConfig.from_pretrained(str(tmp_path))
    assert (fields.r, fields.alpha, dict(fields.rank_pattern)) == (3, 5, {"wide": 2})


def test_a_config_of_loha_means_the_same_in_both(tmp_path):
    given = peft.LoHaConfig(r=4, alpha=2, target_modules=["fc", "wide"])
    config = lora.LoRAConfig.from_peft(given)
    assert config.lora_use_loha and (config.lora_rank, config.lora_alpha) == (4, 2)
    fields = config.to_peft()
    again = peft.LoHaConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
    for name in ("r", "alpha", "target_modules", "rank_pattern", "use_effective_conv2d"):
        assert getattr(again, name) == getattr(given, name)
    for changes, words in (
        (dict(rank_dropout=0.1), "rank_dropout=0.1"),
        (dict(module_dropout=0.1), "module_dropout=0.1"),
        (dict(use_effective_conv2d=True), "third factor"),
        (dict(init_weights=False), "init_weights=False"),
    ):
        with pytest.raises(ValueError, match=words):
            lora.LoRAConfig.from_peft(peft.LoHaConfig(r=4, target_modules=["fc"], **changes))


def test_a_standardized_convolution_is_refused_in_both_directions(tmp_path):
    """PEFT adds its update to the standardized kernel, which is another function."""

    class Standardized(keras.layers.Conv2D):
        def call(self, inputs):
            kernel = self.kernel - keras.backend.mean(self.kernel, (0, 1, 2), keepdims=True)
            return self.activation(self.convolution_op(inputs, kernel) + self.bias)

    def model():
        return keras.Sequential([keras.Input((16, 16, 3)), Standardized(8, 3, name="wide")])

    tuned = lora.inject_lora(model(), lora_rank=2, lora_use_loha=True, lora_targets=["wide"])
    run(tuned, timm_models.images(16))
    with pytest.raises(ValueError, match="standardises"):
        lora.save_adapter(tuned, tmp_path / "ours", format="peft")
    adapted(in_torch(), r=2, target_modules=["wide"]).save_pretrained(str(tmp_path))
    fresh = model()
    run(fresh, timm_models.images(16))
    with pytest.raises(ValueError, match="standardised"):
        lora.load_adapter(fresh, tmp_path)
    assert not has_lora(fresh)


def test_loha_of_a_timm_model(tmp_path):
    """The fused projection of a vision transformer, and parts of it."""
    import tfimm

    theirs = timm_models.make("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 64, img_size=64)
    folder = timm_models.save(theirs, tmp_path / "base")
    x = timm_models.images(64)

    def ours():
        made = tfimm.create_model("vit_tiny_patch16_224", input_size=(64, 64))
        return lora.load_timm_weights(made, folder)

    for arguments in ({}, {"lora_qkv": "qv"}):
        model = ours()
        lora.inject_lora(
            model, lora_rank=2, lora_use_loha=True, lora_targets=["qkv", "fc1"], **arguments
        )
        randomise(model, size=0.3)
        out = tmp_path / f"adapter{len(arguments)}"
        lora.save_adapter(model, out, format="peft")
        fresh = lora.load_adapter(ours(), out)
        np.testing.assert_allclose(run(fresh, x), run(model, x), **CLOSE)
        if not arguments:
            wrapped = peft.PeftModel.from_pretrained(theirs, str(out)).eval()
            timm_models.assert_agree(run(model, x), outputs(wrapped, x))
            wrapped.unload()
