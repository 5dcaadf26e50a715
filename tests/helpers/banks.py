"""Adapters for banks, and what each of them gives in its model alone."""

import numpy as np

import tfimm_lora as lora
from tests.helpers.kerases import array, run, values


def random_adapter(model, seed=0, size=0.2, **arguments):
    """An adapter of a model whose trained weights all moved. The model is unchanged."""
    before = values(model.weights)
    lora.inject_lora(model, **{"lora_rank": 2, "lora_alpha": 3, **arguments})
    rng = np.random.default_rng(seed)
    for variable in model.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign(array(variable) + size * noise)
    adapter = lora.adapter_of(model)
    lora.remove_lora(model, merge=False)
    for variable, value in zip(model.weights, before):
        variable.assign(value)
    return adapter


def outputs_alone(model, adapter, x):
    """What a model gives with an adapter loaded on its own. The model is unchanged."""
    if adapter is None:
        return run(model, x, training=False)
    lora.load_adapter(model, adapter)
    outputs = run(model, x, training=False)
    lora.remove_lora(model, merge=False)
    return outputs


def assert_rows(rows, names, expected, tolerance=1e-4):
    """Each example of a mixed batch has the outputs of its adapter alone.

    Args:
        rows: What ``AdapterBank.predict`` returned.
        names: The adapters of the examples.
        expected: Name -> the outputs of all examples with this adapter alone.
        tolerance: Relative to the largest output: two forms of a product round differently.
    """
    assert [row.adapter for row in rows] == list(names)
    for index, (row, name) in enumerate(zip(rows, names)):
        alone = expected[name][index]
        assert row.logits.shape == alone.shape
        scale = max(0.1, np.abs(expected[name]).max())
        np.testing.assert_allclose(row.logits, alone, rtol=0, atol=tolerance * scale)
