"""The reported error of a combination with DoRA is that of the kernels, computed here anew."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, normal, run
from tests.helpers.selection import nightly_on_legacy

K = keras.layers

TYPES = {
    "cat": {},
    "svd": dict(rank=2),
    "linear": {},
    "ties": dict(density=0.5),
    "dare_linear": dict(density=0.5),
    "ties_svd": dict(density=0.5, rank=2),
}


def make():
    keras.utils.set_random_seed(0)
    layers = [K.Conv2D(4, 3, name="conv"), K.Flatten(), K.Dense(5, name="fc")]
    return keras.Sequential([K.Input((5, 5, 2)), *layers, K.Dense(2, name="head")])


def adapter(seed, dora=True):
    targets = ["conv", "fc"]
    model = lora.inject_lora(make(), lora_rank=2, lora_targets=targets, lora_use_dora=dora)
    for index, variable in enumerate(model.trainable_weights):
        variable.assign(array(variable) + 0.3 * normal(*variable.shape, seed=seed + index))
    return lora.adapter_of(model)


def kernels(x):
    """The kernels of the merged model, by layer."""
    model = lora.load_adapter(make(), x)
    lora.merge_lora_weights(model)
    return {n: array(model.get_layer(n).kernel).astype("float64") for n in ("conv", "fc")}


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("combination_type", TYPES)
@pytest.mark.filterwarnings("ignore:combination_type.*lost")
@nightly_on_legacy
def test_the_error_is_that_of_the_merged_kernels(combination_type, merged):
    given, weights = [adapter(1), adapter(10)], [1.0, 0.5]
    combined = lora.combine_adapters(
        given, weights, combination_type, **TYPES[combination_type]
    )
    base = {n: array(make().get_layer(n).kernel).astype("float64") for n in ("conv", "fc")}
    model = lora.load_adapter(make(), given[1])
    if merged:
        lora.merge_lora_weights(model)
    told = lora.combination_errors(combined, given, weights, model=model)
    assert told == lora.combination_errors(combined, given, weights, model=make())
    ours, parts = kernels(combined), [kernels(x) for x in given]
    for name in ("conv", "fc"):
        exact = sum(w * (part[name] - base[name]) for w, part in zip(weights, parts))
        error = np.linalg.norm(ours[name] - base[name] - exact) / np.linalg.norm(exact)
        # The kernels of the model are float32, their changes a third of them.
        np.testing.assert_allclose(told[name], error, rtol=1e-4, atol=1e-5)
        assert told[name] > 1e-2


def test_one_dora_adapter_is_its_own_sum():
    one = adapter(1)
    twin = lora.combine_adapters([one])
    assert max(lora.combination_errors(twin, [one], model=make()).values()) < 1e-6
    x = normal(2, 5, 5, 2)
    outputs = [run(lora.load_adapter(make(), each), x) for each in (one, twin)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_without_dora_the_model_makes_no_difference():
    given = [adapter(1, dora=False), adapter(10, dora=False)]
    combined = lora.combine_adapters(given, [1.0, 0.5])
    told = lora.combination_errors(combined, given, [1.0, 0.5])
    assert told == lora.combination_errors(combined, given, [1.0, 0.5], model=make())
    assert max(told.values()) < 1e-6


@pytest.mark.skipif(not LEGACY, reason="once is enough")
def test_dora_without_the_base_model_or_with_another_one_is_refused():
    given = [adapter(1), adapter(10)]
    combined = lora.combine_adapters(given)
    with pytest.raises(ValueError, match="magnitudes .DoRA. in conv, fc, and no model"):
        lora.combination_errors(combined, given)
    other = keras.Sequential([K.Input((4,)), K.Dense(5, name="fc")])
    with pytest.raises(ValueError, match="does not fit.*no layer conv"):
        lora.combination_errors(combined, given, model=other)
