"""EVA beside PEFT's own, on a small network of torch with the same weights and data."""

import itertools

import numpy as np
import peft
import pytest
import torch

import tfimm_lora as lora
from tests.helpers.kerases import keras
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import config_of

WIDTHS = (12, 20, 16, 3)


def falling(count, width, by):
    rng = np.random.default_rng(width)
    turned, _ = np.linalg.qr(rng.normal(size=(width, width)))
    rows = (rng.normal(size=(count, width)) * by ** np.arange(width)) @ turned
    return (rows + rng.normal(size=width)).astype("float32")


DATA = falling(96, WIDTHS[0], 0.6)


def theirs(rank, alpha, rho, batches):
    torch.manual_seed(0)
    body = torch.nn.Sequential()
    for i, (m, n) in enumerate(itertools.pairwise(WIDTHS)):
        body.add_module(f"fc{i}", torch.nn.Linear(m, n))
        body.add_module(f"tanh{i}", torch.nn.Tanh())
    weights = {n: p.detach().numpy().copy() for n, p in body.named_parameters()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=["fc0", "fc1"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.999),
    )
    model = peft.get_peft_model(body, config)
    peft.initialize_lora_eva_weights(
        model,
        [torch.from_numpy(x) for x in batches],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return model, weights


def ours(weights, rank, alpha, rho, batches):
    x = entry = keras.Input((WIDTHS[0],))
    for i, n in enumerate(WIDTHS[1:]):
        x = keras.layers.Dense(n, activation="tanh", name=f"fc{i}")(x)
    model = keras.Model(entry, x)
    for i in range(len(WIDTHS) - 1):
        kernel, bias = weights[f"fc{i}.weight"], weights[f"fc{i}.bias"]
        model.get_layer(f"fc{i}").set_weights([kernel.T, bias])
    lora.inject_lora(model, lora_rank=rank, lora_alpha=alpha, lora_targets=["fc0", "fc1"])
    lora.initialize_eva(model, batches, rho=rho)
    return model


@pytest.mark.parametrize("rank, alpha, rho", [(3, 6, 1.0), (4, 4, 2.0), (3, 12, 3.0)])
def test_directions_ranks_and_alphas_are_pefts(rank, alpha, rho):
    peft_model, weights = theirs(rank, alpha, rho, [DATA])
    model = ours(weights, rank, alpha, rho, [DATA])
    config = peft_model.peft_config["default"]
    for name, layer in lora_layers(model).items():
        module = getattr(peft_model.base_model.model, name)
        a = module.lora_A.default.weight.detach().numpy()
        mine = layer.kernel_lora_a.numpy()
        assert mine.shape == a.T.shape
        assert layer.lora.rank == config.rank_pattern.get(name, rank)
        assert layer.lora.alpha == pytest.approx(config.alpha_pattern.get(name, alpha))
        assert layer.lora.scale == pytest.approx(module.scaling["default"])
        # PEFT chooses signs in the same way, where two entries are not of one magnitude.
        cosines = np.abs((mine * a.T).sum(axis=0))
        np.testing.assert_allclose(cosines, 1, atol=1e-3)
        assert not module.lora_B.default.weight.detach().numpy().any()
    assert config.rank_pattern == config_of(model).lora_rank_pattern


def test_the_same_space_from_many_batches():
    """PEFT's is incremental and forgets what is small; ours is exact."""
    batches = np.split(DATA, 4)
    peft_model, weights = theirs(4, 4, 1.0, batches)
    model = ours(weights, 4, 4, 1.0, batches)
    for name, layer in lora_layers(model).items():
        a = getattr(peft_model.base_model.model, name).lora_A.default.weight.detach().numpy()
        overlap = np.linalg.svd(a @ layer.kernel_lora_a.numpy(), compute_uv=False)
        assert overlap.min() > 0.99
