"""Every LoRA model keeps every promise of the contract."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import model_contracts as contracts
from tests.helpers.kerases import BACKEND, LEGACY, UNIT_ROUNDOFF, array, keras, run, values
from tests.helpers.selection import nightly_except
from tests.helpers.tiny_models import APPLICATIONS, GENERIC, MODELS

#: These trace several training and prediction functions, which takes seconds for each model.
TRACING = {
    contracts.fit_changes_exactly_the_named_variables,
    contracts.comes_back_as_it_was,
    contracts.weight_files_load_and_train_on,
    contracts.whole_files_load_and_train_on_or_are_refused,
}
QUICK = {"functional"} if LEGACY else {"functional", "nested"}
#: One of each kind of model. On Keras 3 the others run, too.
KINDS = {"functional", "subclassed", "convnext"}


def _is_nightly(name, promise):
    return (promise in TRACING and name not in QUICK) or (LEGACY and name not in KINDS)


EVERY = [
    pytest.param(
        spec,
        promise,
        id=f"{spec.name}-{promise.__name__}",
        marks=pytest.mark.nightly if _is_nightly(spec.name, promise) else (),
    )
    for spec in MODELS
    for promise in contracts.PROMISES
]


@pytest.mark.backends
@pytest.mark.parametrize("spec, promise", EVERY)
def test_model(spec, promise, tmp_path):
    promise(spec, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(
    LEGACY or BACKEND != "tensorflow", reason="of Keras 3, tested on TensorFlow"
)
@pytest.mark.parametrize("spec", nightly_except(APPLICATIONS, [APPLICATIONS[0].name]))
def test_applications_adapt_train_merge_and_reload(spec, tmp_path):
    contracts.adapts_trains_merges_and_comes_back(spec, tmp_path)


@pytest.mark.parametrize("kind", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("spec", nightly_except(GENERIC, ["functional"]))
def test_model_trains_and_merges_in_16_bits(spec, kind, policy):
    policy(kind)
    model, x = contracts.adapted(spec), spec.inputs(8)
    frozen = model.non_trainable_weights
    still = values(frozen)
    contracts.compile_for(model, 0.02)
    losses = model.fit(x, spec.labels(8), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for variable, value in zip(frozen, still):
        np.testing.assert_array_equal(array(variable), value)
    before = run(model, x).astype("float64")
    with lora.disable_adapter(model):
        update = np.linalg.norm(before - run(model, x).astype("float64"))
    lora.merge_lora_weights(model)
    error = np.linalg.norm(before - run(model, x).astype("float64"))
    # Some ten layers, each rounding its input, kernel and output once.
    bound = 32 * UNIT_ROUNDOFF[kind] * np.linalg.norm(before)
    assert error < bound < update / 2


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA on TensorFlow; JAX always compiles")
@pytest.mark.parametrize("spec", nightly_except(GENERIC, ["sequential"]))
def test_model_trains_the_same_under_xla(spec):
    results, start = [], None
    for jit in (False, True):
        model, x = contracts.adapted(spec), spec.inputs()
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0  # its draws differ under XLA
        start = start or values(model.weights)
        model.set_weights(start)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit)
        fit = model.fit(x, spec.labels(), epochs=3, verbose=0, shuffle=False)
        results.append(fit.history["loss"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3)
