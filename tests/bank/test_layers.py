"""Every kind of layer in a mixed batch: each example is what NumPy gives for its adapter."""

import dataclasses

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import array, keras
from tests.helpers.layer_cases import CASES
from tests.helpers.layer_contracts import CLOSE
from tfimm_lora.adapters.torch_layout import update_of

layers = keras.layers

#: The adapters of a batch of six examples: several, two of them twice, and none.
NAMES = ["low", None, "high", "variant", "low", "high"]


class Plus(layers.Layer):
    """Adds a weight that is zero, so that the layer before it is not taken for a classifier."""

    def build(self, shape):
        self.zero = self.add_weight(name="zero", shape=(), initializer="zeros")
        super().build(shape)

    def call(self, x):
        return x + self.zero


def model_of(case, base):
    kind = dict(dtype="int32") if case.integers else {}
    entry = keras.Input(case.input_shape[1:], **kind)
    return keras.Model(entry, Plus(name="plus")(base(entry)))


def batch_of(case):
    shape = (len(NAMES), *case.input_shape[1:])
    return dataclasses.replace(case, input_shape=shape).inputs(seed=1)


def leaf(variable):
    return variable.name.partition(":")[0].rpartition("/")[2]


def adapted(case, base, seed):
    """A LoRA layer with the weights of a base layer and random factors."""
    layer, weights = case.make(), {leaf(w): array(w) for w in base.weights}
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        own = leaf(variable)
        noise = 0.5 * rng.normal(size=tuple(variable.shape))
        variable.assign(weights.get(own, noise))
    return layer


@pytest.mark.backends
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_example_is_what_numpy_gives_for_its_adapter(case):
    base = case.make_base()
    model, x = model_of(case, base), batch_of(case)
    extra = dict(lora_bias=True) if case.has_bias and case.drops else dict(lora_use_dora=True)
    variants = {
        "low": case,
        "high": dataclasses.replace(case, rank=3, alpha=-4.0),
        "variant": dataclasses.replace(case, args={**case.args, **extra}),
    }
    tuned = {n: adapted(c, base, seed) for seed, (n, c) in enumerate(variants.items())}
    adapters = {n: lora.Adapter({"layer": update_of(layer)}) for n, layer in tuned.items()}
    expected = {n: c.expected(tuned[n], x) for n, c in variants.items()}
    untouched = adapted(case, base, 0)
    untouched.kernel_lora_b.assign(0 * array(untouched.kernel_lora_b))
    expected[None] = case.expected(untouched, x)
    with lora.AdapterBank(model, adapters) as bank:
        rows = bank.predict(x, NAMES)
        same = bank.predict(x[:2], ["variant", "variant"])
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(rows[i].logits, expected[name][i], **CLOSE)
    for i in range(2):
        np.testing.assert_allclose(same[i].logits, expected["variant"][i], **CLOSE)
