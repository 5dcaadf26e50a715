"""What an adapter computes depends neither on what was loaded before it nor on merging."""

import itertools

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import array, keras, normal, run, values
from tfimm_lora.adapters import load
from tfimm_lora.adapters.torch_layout import DoesNotFit
from tfimm_lora.model.merge import has_lora, lora_layers

pytestmark = [pytest.mark.backends, pytest.mark.once]

K = keras.layers
CLOSE = dict(rtol=1e-5, atol=1e-5)

#: Adapters that replace kernels and biases, and adapters that depend on them.
SETTINGS = {
    "whole": dict(lora_targets=["fc"], lora_train_classifier=True, lora_train_modules=["mid"]),
    "dora": dict(lora_targets=["fc", "mid", "head"], lora_use_dora=True),
    "dora_biases": dict(lora_targets=["mid"], lora_use_dora=True, lora_train_bias="lora_only"),
    "branch_bias": dict(lora_targets=["fc", "mid"], lora_bias=True, lora_train_bias="all"),
    "same_layers": dict(lora_targets=["fc", "mid"], lora_bias=True, lora_train_bias="none"),
}


def make():
    keras.utils.set_random_seed(0)
    layers = [K.Dense(8, name="fc"), K.Dense(8, name="mid"), K.Dense(3, name="head")]
    return keras.Sequential([K.Input((8,)), *layers])


def tuned(**settings):
    """An adapter, none of whose values is trivial, and the outputs of its model."""
    arguments = {"lora_rank": 2, "lora_train_classifier": False, **settings}
    model = lora.inject_lora(make(), **arguments)
    for seed, variable in enumerate(model.trainable_weights):
        variable.assign(array(variable) + 0.3 * normal(*variable.shape, seed=seed))
    return lora.adapter_of(model), run(model, normal(4, 8))


@pytest.fixture(scope="module")
def adapters():
    return {name: tuned(**settings) for name, settings in SETTINGS.items()}


def assert_loaded(model, adapter, outputs):
    np.testing.assert_allclose(run(model, normal(4, 8)), outputs, **CLOSE)
    found = lora.adapter_of(model)
    assert found.layers.keys() == adapter.layers.keys() and found.modules == adapter.modules
    for module, update in adapter.layers.items():
        for name, value in update.arrays().items():
            # A magnitude is kept as its difference from the norm, which rounds.
            found_value = found.layers[module].arrays()[name]
            np.testing.assert_allclose(found_value, value, rtol=1e-6, err_msg=name)
    for key, value in adapter.weights.items():
        np.testing.assert_array_equal(found.weights[key], value, err_msg=key)


@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("order", list(itertools.permutations(SETTINGS, 2)), ids="-".join)
def test_an_adapter_is_the_same_after_any_other(order, merge, adapters):
    model = make()
    plain, x = values(model.weights), normal(4, 8)
    untouched = run(model, x)
    for name in (*order, *order):
        lora.load_adapter(model, adapters[name][0])
        assert_loaded(model, *adapters[name])
        if merge:
            if not any(layer.merged for layer in lora_layers(model).values()):
                lora.merge_lora_weights(model)
            assert_loaded(model, *adapters[name])
            with lora.disable_adapter(model):
                np.testing.assert_allclose(run(model, x), untouched, **CLOSE)
            assert_loaded(model, *adapters[name])
    if merge:
        lora.unmerge_lora_weights(model)
        assert_loaded(model, *adapters[order[1]])
    lora.remove_lora(model, merge=False)
    for found, expected in zip(values(model.weights), plain):
        np.testing.assert_array_equal(found, expected)


def test_half_the_strength_is_the_same_after_an_adapter_that_replaced_kernels(adapters):
    alone, after = (lora.load_adapter(make(), adapters[n][0]) for n in ("dora", "whole"))
    lora.load_adapter(after, adapters["dora"][0])
    for model in (alone, after):
        lora.set_adapter_scale(model, 0.5)
    x = normal(4, 8)
    np.testing.assert_allclose(run(after, x), run(alone, x), **CLOSE)
    lora.set_adapter_scale(after, 1)
    assert_loaded(after, *adapters["dora"])


@pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("former", SETTINGS)
def test_a_failure_restores_values_strength_and_merging(former, merge, adapters, monkeypatch):
    model = lora.load_adapter(make(), adapters[former][0])
    lora.set_adapter_scale(model, 0.5)
    if merge:
        lora.merge_lora_weights(model)
    before, outputs = lora.adapter_of(model), run(model, normal(4, 8))
    weights = values(model.weights)
    other = tuned(lora_targets=["fc", "head"], lora_rank=3)[0]
    checked = load.fitted_updates

    def fails_for_the_new_one(names, adapter):
        if adapter is other and has_lora(names.model):
            raise DoesNotFit("for a test")
        return checked(names, adapter)

    monkeypatch.setattr(load, "fitted_updates", fails_for_the_new_one)
    with pytest.raises(ValueError, match="for a test"):
        lora.load_adapter(model, other)
    assert lora.adapter_of(model) == before
    for found, expected in zip(values(model.weights), weights):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(run(model, normal(4, 8)), outputs)
    assert all(layer.merged == merge for layer in lora_layers(model).values())
    lora.set_adapter_scale(model, 1)
    assert_loaded(model, *adapters[former])


@pytest.mark.parametrize("name", SETTINGS)
def test_removing_a_merged_adapter_restores_all_that_it_replaced(name, adapters):
    model = make()
    plain = values(model.weights)
    lora.load_adapter(model, adapters[name][0])
    lora.merge_lora_weights(model)
    lora.remove_lora(model, merge=False)
    for found, expected in zip(values(model.weights), plain):
        np.testing.assert_array_equal(found, expected)
